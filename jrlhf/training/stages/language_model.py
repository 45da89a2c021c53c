"""A language model: pretrained on raw text or read from a checkpoint, then fine-tuned on demonstrations."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrlhf.algorithms.sft import SFTConfig, check_balance, make_sft, targets
from jrlhf.config import REWARD_MODEL, Source, StageContext, UserError
from jrlhf.data.chat import ChatConfig
from jrlhf.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from jrlhf.models.config import AttentionKernel, CacheDtype, ModelConfig, Remat
from jrlhf.models.families import Head
from jrlhf.models.hf import config_from_hf, load_hf, resolve_checkpoint
from jrlhf.models.lora import join, merged
from jrlhf.models.peft import load_peft, peft_config
from jrlhf.models.transformer import Model
from jrlhf.models.vocabulary import grow_vocabulary
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.sharding import make_mesh, state_shardings
from jrlhf.training.artifacts import (
    Beginning,
    begin,
    check_vocabulary,
    load_model,
    save_model,
    save_trained,
)
from jrlhf.training.data import (
    Later,
    StreamFeed,
    demonstration_batch,
    encode_cut_demonstration,
    encode_text,
    feed_of,
    in_chunks,
    load_rows,
    one_per_row,
    packed_texts,
    rows_of,
    take,
    text_batch,
    with_targets,
)
from jrlhf.training.evaluation import chunk_rows
from jrlhf.training.loop import stage_key
from jrlhf.training.offline import train_offline
from jrlhf.training.stages.common import (
    FineTuningStage,
    ModelStage,
    TooLong,
    TrainingStage,
    check_attention,
    check_length,
    check_microbatches,
    labelled,
    start_config,
)
from jrlhf.training.stages.sizes import (
    QUIET,
    UNKNOWN,
    Count,
    at_most,
    check_kind,
    count_rows,
    packed_rows,
    tokenizer_of,
    training_plan,
)
from jrlhf.training.utilisation import Pass, flops_of_passes, peak_flops
from jrlhf.types import Plan, SequenceBatch


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer a pretraining stage uses: a trained SentencePiece model, or one that exists."""

    path: str = ""  # a folder or file to load; "" trains one
    vocab_size: int = 4096  # upper bound when training
    model_type: Literal["unigram", "bpe", "word"] = "unigram"
    texts: tuple[Source, ...] = ()  # further texts to train on, beside the stage's data


@dataclass(frozen=True)
class Pretrain(TrainingStage):
    """Raw text -> tokenizer and language model. Documents are packed; every token is learned."""

    data: Source
    model: ModelConfig
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=20, weight_decay=0.01)
    algorithm: SFTConfig = SFTConfig()
    length: int = 0  # tokens of a packed row; 0: the model's context
    eval_rows: int = 64  # packed rows kept for the held-out loss
    chat: ChatConfig | None = None  # a chat template for the tokenizer

    def validate(self, stages):
        if self.length > self.model.context:
            raise UserError(f"length {self.length} is longer than model.context {self.model.context}")
        check_stream(self)
        if streams(self.data) and not self.tokenizer.path:
            raise UserError("tokenizer.path: a tokenizer cannot be trained on a stream; name one that exists")
        check_microbatches(self)
        check_balance(self.algorithm, self.model)
        if self.model.lora.rank:
            raise UserError(
                "model.lora: pretraining trains all parameters; give `lora` to a stage that fine-tunes"
            )

    def files(self):
        chat = self.chat.files() if self.chat else ()
        return super().files() + ((self.tokenizer.path,) if self.tokenizer.path else ()) + chat

    def check_mesh(self, mesh):
        super().check_mesh(mesh)
        check_attention(make_mesh(mesh), self.model)

    def model_config(self, stages) -> ModelConfig:
        return replace(self.model, vocab_size=self.model.vocab_size or self.tokenizer.vocab_size)

    def plan(self, ctx):
        config = self.model_config(ctx.stages)
        check_kind(self.data, "text", "data")
        length, documents = self.length or config.context, count_rows(self.data)
        rows = UNKNOWN  # long documents are cut, short ones packed
        if not self.loop.steps and self.tokenizer.path and documents.exact:
            tokenizer = load_tokenizer(self.tokenizer.path)
            rows = packed_rows(self.eval_rows, lambda: text_batch(self.data, tokenizer, length, QUIET))
        return training_plan(config, self.loop, rows, Count(length), read=documents)

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            key = stage_key(ctx)
            console = labelled(ctx.console, "data")
            rows: Iterable[dict]
            rows = self.data.rows() if streams(self.data) else load_rows(self.data, "text", console)
            tokenizer = with_chat(self._tokenizer(ctx, rows), self.chat)
            model = Model(check_vocabulary(self.model, tokenizer, "model"))
            length = self.length or model.config.context
            if streams(self.data):
                kept: SequenceBatch | StreamFeed
                kept, held = streamed(self, encode_text, tokenizer, length, ctx, mesh)
            else:
                arrays = packed_texts(rows, tokenizer, length)
                del rows
                kept, held = hold_out(arrays, self.eval_rows)
            shardings = state_shardings(mesh, jax.eval_shape(model.init, key), model.logical_axes())
            # It runs once: LLVM's dearest passes over the random numbers take longer than they save.
            quick = {"xla_backend_optimization_level": 1}
            init = jax.jit(model.init, out_shardings=shardings, compiler_options=quick)
            params = init(jax.random.fold_in(key, 1))
            params = train_language_model(self, ctx, mesh, Beginning(model, params, None), key, kept, held)
            save_model(ctx.folder, model, params, tokenizer)
            return {"eval_loss": final_loss(model, params, held, mesh), "parameters": model.config.n_params}

    def _tokenizer(self, ctx: StageContext, rows: Iterable[dict]) -> Tokenizer:
        """The one that is named, that an interrupted run has left, or one trained on the data's rows."""
        if self.tokenizer.path:
            return load_tokenizer(self.tokenizer.path)
        folder = ctx.folder / "tokenizer"
        if (folder / "tokenizer.model").exists():
            return load_tokenizer(folder)
        further = (row for source in self.tokenizer.texts for row in source.rows())
        texts = (row["text"] for row in chain(rows, further))
        return train_sentencepiece(texts, self.tokenizer.vocab_size, folder, self.tokenizer.model_type)


@dataclass(frozen=True)
class Checkpoint(ModelStage):
    """A Hugging Face checkpoint (folder or hub name) as the model to start from."""

    path: str
    tokenizer: str = ""  # "": the checkpoint's own
    adapter: str = ""  # a PEFT folder, merged into the checkpoint
    chat: ChatConfig | None = None  # None: the checkpoint's own template, if it has one
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products
    param_dtype: Literal["float32", "bfloat16"] = (
        "float32"  # bfloat16: half the memory; for a base beside adapters
    )
    remat: Remat = "auto"
    attention: AttentionKernel = "auto"
    cache_dtype: CacheDtype = "auto"
    logits_chunk: int = 0
    vocab_multiple: int = 1  # pad the embedding's rows, so that they divide over the mesh
    grow_vocabulary: bool = False  # new rows where the tokenizer has more ids; otherwise that is an error

    head: ClassVar[Head] = "lm"

    def files(self):
        named = tuple(p for p in (self.path, self.tokenizer, self.adapter) if p and Path(p).exists())
        return named + (self.chat.files() if self.chat else ())

    def validate(self, stages):
        if not self.needs_download(stages):
            config = self.model_config(stages)
            self._check_vocabulary(config, self._tokenizer())
            if self.adapter and not _named_by_hub(self.adapter):
                peft_config(resolve_checkpoint(self.adapter), config)

    def needs_download(self, stages) -> bool:
        return _named_by_hub(self.path)

    def check_mesh(self, mesh):
        super().check_mesh(mesh)
        if not self.needs_download({}):
            check_attention(make_mesh(mesh), self.model_config({}))

    def model_config(self, stages) -> ModelConfig:
        return config_from_hf(resolve_checkpoint(self.path), head=self.head, **self._ours())

    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer or resolve_checkpoint(self.path))

    def _check_vocabulary(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        if config.vocab_size < tokenizer.vocab_size and not self.grow_vocabulary:
            raise UserError(
                f"tokenizer: {self.tokenizer or self.path} has {tokenizer.vocab_size} ids, but the model has only "
                f"{config.vocab_size} tokens. Set grow_vocabulary to give the others new rows."
            )

    def _ours(self) -> dict[str, Any]:
        names = (
            "dtype",
            "param_dtype",
            "remat",
            "attention",
            "cache_dtype",
            "logits_chunk",
            "vocab_multiple",
        )
        return {name: getattr(self, name) for name in names}

    def plan(self, ctx):
        config = self.model_config(ctx.stages)
        size = jnp.dtype(config.param_dtype).itemsize
        return Plan(model_params=config.n_params, memory_bytes=size * config.n_params)

    def run(self, ctx: StageContext) -> dict:
        folder = resolve_checkpoint(self.path)
        tokenizer = with_chat(self._tokenizer(), self.chat)
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            config = self.model_config({})
            check_attention(mesh, config)
            self._check_vocabulary(config, tokenizer)
            placed = lambda m: state_shardings(  # noqa: E731
                mesh, jax.eval_shape(m.init, jax.random.key(0)), m.logical_axes()
            )
            model, params = load_hf(folder, head=self.head, shardings=placed, **self._ours())
            if self.adapter:
                adapted, adapter = load_peft(resolve_checkpoint(self.adapter), model)
                params = jax.jit(partial(merged, adapted.config), out_shardings=placed(model))(
                    join(params, adapter)
                )
            if config.vocab_size < tokenizer.vocab_size:
                config, params = grow_vocabulary(config, params, tokenizer.vocab_size)
                model = Model(config, self.head)
                params = jax.device_put(params, placed(model))
            save_model(ctx.folder, model, params, tokenizer)
        return {"parameters": model.config.n_params}


def _named_by_hub(name: str) -> bool:
    """Whether it must be "org/name"; anything else that is no folder is a mistake, which reading it tells."""
    path = Path(name).expanduser()
    return not path.exists() and len(path.parts) == 2 and not path.parent.is_dir()


@dataclass(frozen=True)
class RewardCheckpoint(Checkpoint):
    """A Hugging Face sequence classifier of one label as a reward model. Its scores are taken as they are."""

    artifact: ClassVar[str] = REWARD_MODEL
    head: ClassVar[Head] = "scalar"


@dataclass(frozen=True)
class SFT(FineTuningStage):
    """Supervised fine-tuning on demonstrations; the loss is on completions and their EOS."""

    data: Source = field(kw_only=True)
    optim: OptimConfig = OptimConfig(lr=3e-4, schedule="cosine")
    algorithm: SFTConfig = SFTConfig()
    length: int = 0  # tokens of a packed row; 0: the model's context
    too_long: TooLong = "error"
    eval_rows: int = 32
    chat: ChatConfig | None = None  # None: the start's own template, if it has one

    def files(self):
        return super().files() + (self.chat.files() if self.chat else ())

    def validate(self, stages):
        check_microbatches(self)
        check_stream(self)
        self.check_adapters(stages)
        if not self.needs_download(stages):
            check_balance(self.algorithm, start_config(stages, self.start))

    def plan(self, ctx):
        config = start_config(ctx.stages, self.start)
        length, read = self.length or config.context, count_rows(self.data)
        rows = at_most(max(read.n - self.eval_rows, 0))
        check_kind(self.data, "demonstration", "data")
        tokenizer = tokenizer_of(ctx, self.start)
        tokenizer = with_chat(tokenizer, self.chat) if tokenizer is not None else None
        if not self.loop.steps and tokenizer is not None and read.exact:
            pack = partial(demonstration_batch, self.data, tokenizer, length, self.too_long, QUIET)
            rows = packed_rows(self.eval_rows, pack)
        return training_plan(config, self.loop, rows, Count(length), read=read, lora=self.lora)

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            key = stage_key(ctx)
            loaded = load_model(ctx.parents[self.start], mesh)
            beginning = begin(loaded, "lm", self.lora, jax.random.fold_in(key, 1))
            model, length = beginning.model, self.length or loaded.model.config.context
            check_length(length, model, "length")
            tokenizer = with_chat(loaded.tokenizer, self.chat)
            if streams(self.data):
                kept: SequenceBatch | StreamFeed
                kept, held = streamed(self, encode_cut_demonstration, tokenizer, length, ctx, mesh)
            else:
                arrays = demonstration_batch(
                    self.data, tokenizer, length, self.too_long, labelled(ctx.console, "data")
                )
                kept, held = (with_targets(rows) for rows in hold_out(arrays, self.eval_rows))
            trained = train_language_model(self, ctx, mesh, beginning, key, kept, held)
            params = save_trained(ctx.folder, beginning, trained, tokenizer, ctx.parents[self.start])
            return {"eval_loss": final_loss(model.base, params, held, mesh)}


def train_language_model(
    stage, ctx, mesh, beginning: Beginning, key, kept: SequenceBatch | StreamFeed, held: SequenceBatch
):
    """What Pretrain and SFT share: next-token training and the held-out loss. Returns what was trained."""
    model, start, frozen = beginning
    steps = stage.loop.steps if isinstance(kept, StreamFeed) else stage.loop.total_steps(rows_of(kept))
    algorithm = make_sft(stage.algorithm, model, build_optimizer(stage.optim, steps))
    whole = lambda state: model.whole(state.params["policy"], frozen)  # noqa: E731
    feed = (
        kept if isinstance(kept, StreamFeed) else feed_of(kept, stage.loop.batch_size, ctx.seed, mesh, steps)
    )
    evaluate = lambda state, step: {"eval/loss": final_loss(model, whole(state), held, mesh)}  # noqa: E731
    state = train_offline(
        ctx, mesh, stage.loop, steps, algorithm, (start, key, frozen), model.logical_axes(), feed, evaluate,
        flops=partial(flops_of_passes, (Pass(model),)), peak=peak_flops(mesh, model),
    )  # fmt: skip
    return state.params["policy"]


def with_chat(tokenizer: Tokenizer, chat: ChatConfig | None) -> Tokenizer:
    return tokenizer if chat is None else tokenizer.with_chat(chat)


def streams(source: Source) -> bool:
    """Whether a source is read as training goes, instead of into memory first."""
    return bool(getattr(source, "streaming", False))


def check_stream(stage) -> None:
    """What a streaming source rules out, at config time."""
    if streams(stage.data) and not stage.loop.steps:
        raise UserError("loop.epochs: the length of a stream is not known; set loop.steps")


def streamed(stage, encode, tokenizer: Tokenizer, length: int, ctx, mesh) -> tuple[StreamFeed, SequenceBatch]:
    """The first `eval_rows` rows of a stream for evaluation, the others to train on, one in each row."""
    encode_one = lambda row: encode(row, tokenizer, length)  # noqa: E731
    first = [encode_one(row) for row in islice(stage.data.rows(), stage.eval_rows)]
    if not first:
        raise UserError("eval_rows: the stream has no rows, or eval_rows is 0")
    held = one_per_row(first, length, tokenizer.pad_id)
    rest = Later(stage.data, stage.eval_rows)
    return StreamFeed(rest, encode_one, stage.loop.batch_size, length, ctx.seed, mesh, tokenizer.pad_id), held


def hold_out(arrays: SequenceBatch, rows: int) -> tuple[SequenceBatch, SequenceBatch]:
    """The last `rows` packed rows for evaluation, the others to train on."""
    n = rows_of(arrays)
    if n < 2:
        raise UserError(
            "the data fills one packed row: there is nothing to hold out; give more data, or a shorter length"
        )
    if not 0 < rows < n:
        raise UserError(
            f"eval_rows is {rows}, but the data fills {n} packed rows: give a number from 1 to {n - 1}"
        )
    return take(arrays, np.arange(n - rows)), take(arrays, np.arange(n - rows, n))


def final_loss(model: Model, params, held: SequenceBatch, mesh: Mesh) -> float:
    """Nats per target token on held-out rows."""
    losses, tokens = in_chunks(
        partial(row_losses, model, params), held, chunk_rows(rows_of(held), mesh), mesh
    )
    return float(losses.sum() / tokens.sum())


# Compiled once for all evaluations. Parameters are arguments: those of several hosts cannot be closed over.
@partial(jax.jit, static_argnums=0)
def row_losses(model: Model, params, batch: SequenceBatch) -> tuple[jax.Array, jax.Array]:
    """Summed loss and number of target tokens of each row, [B] each."""
    hidden, tokens, mask, _ = targets(model, params, batch)
    logprobs, _ = model.logprobs_of_hidden(params, hidden, tokens, 1.0, mask)
    return jnp.sum(jnp.where(mask, -logprobs, 0.0), axis=1), jnp.sum(mask, axis=1)
