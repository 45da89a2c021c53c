"""The stages of the pipeline, in the order of InstructGPT. Each says what it starts from and what it leaves behind.

    Pretrain (or Checkpoint) -> SFT -> Preferences -> RewardModel -> PPO, DPO, BestOfN -> Evaluate

A stage's `run` is glue: it reads its parents' folders, calls a driver, and saves a model or a table. The algorithms
are in `jrlhf/algorithms`, one file each.
"""

import json
import zlib
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrlhf.algorithms.dpo import DPOConfig, PairBatch, make_dpo, pair_logprobs
from jrlhf.algorithms.ppo import PPOConfig, actor_critic, make_ppo
from jrlhf.algorithms.reward_model import (
    RewardModelConfig,
    make_reward_model,
    preference_scores,
)
from jrlhf.algorithms.sft import SFTConfig, make_sft, sft_loss
from jrlhf.config import (
    Labeler,
    Source,
    Stage,
    StageContext,
    UserError,
    did_you_mean,
    stage_ref,
    stage_ref_or_name,
)
from jrlhf.data.sources import check_row
from jrlhf.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from jrlhf.lab import CRITERIA, MAXIMA
from jrlhf.metrics import progress
from jrlhf.models.config import ModelConfig
from jrlhf.models.hf import config_from_hf, load_hf, resolve_checkpoint
from jrlhf.models.transformer import Model, with_scalar_head
from jrlhf.ops.best_of_n import best_of_n, best_of_n_kl
from jrlhf.ops.calibration import expected_calibration_error
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import check_batch, leads, make_mesh, state_shardings
from jrlhf.training.artifacts import Loaded, check_vocabulary, load_model, model_meta, save_model
from jrlhf.training.data import (
    Later,
    StreamFeed,
    demonstration_batch,
    encode_cut_demonstration,
    encode_text,
    in_chunks,
    load_rows,
    one_per_row,
    pair_arrays,
    preference_arrays,
    prompt_ids,
    rows_of,
    split_by_prompt,
    take,
    text_batch,
)
from jrlhf.training.evaluation import Probe, Sampler, Scorer, chunk_rows, prompt_slots, score
from jrlhf.training.loop import LoopConfig, stage_key
from jrlhf.training.offline import train_offline
from jrlhf.training.online import train_online
from jrlhf.training.rewards import REWARDS, Reward, Texts, make_reward, program_reward, read_texts
from jrlhf.types import Plan, PreferenceBatch, SequenceBatch

TooLong = Literal["error", "drop", "truncate"]
TooLongPrompt = Literal["error", "drop", "truncate_left"]


@dataclass(frozen=True)
class TrainingStage(Stage):
    """A stage with a loop: its batches must divide over the mesh."""

    def check_mesh(self, mesh):
        check_batch(make_mesh(mesh), self.loop.batch_size, "loop.batch_size")


# --- 1. a language model --------------------------------------------------------------------------------------


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
    loop: LoopConfig
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=20, weight_decay=0.01)
    algorithm: SFTConfig = SFTConfig()
    length: int = 0  # tokens of a packed row; 0: the model's context
    eval_rows: int = 64  # packed rows kept for the held-out loss

    def validate(self, names):
        if self.length > self.model.context:
            raise UserError(f"length {self.length} is longer than model.context {self.model.context}")
        check_stream(self)
        if streams(self.data) and not self.tokenizer.path:
            raise UserError("tokenizer.path: a tokenizer cannot be trained on a stream; name one that exists")
        check_microbatches(self)

    def files(self):
        return super().files() + ((self.tokenizer.path,) if self.tokenizer.path else ())

    def plan(self, ctx):
        config = replace(self.model, vocab_size=self.model.vocab_size or self.tokenizer.vocab_size)
        return training_plan(config, self.loop, source_size(self.data), self.length or config.context)

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            key = stage_key(ctx)
            tokenizer = self._tokenizer(ctx)
            model = Model(check_vocabulary(self.model, tokenizer, "model"))
            length = self.length or model.config.context
            if streams(self.data):
                kept: SequenceBatch | StreamFeed
                kept, held = streamed(self, encode_text, tokenizer, length, ctx, mesh)
            else:
                kept, held = hold_out(text_batch(self.data, tokenizer, length, ctx.console), self.eval_rows)
            shardings = state_shardings(mesh, jax.eval_shape(model.init, key), model.logical_axes())
            params = jax.jit(model.init, out_shardings=shardings)(jax.random.fold_in(key, 1))
            params = train_language_model(self, ctx, mesh, model, params, key, kept, held)
            save_model(ctx.folder, model, params, tokenizer)
            return {"eval_loss": final_loss(model, params, held, mesh), "parameters": model.config.n_params}

    def _tokenizer(self, ctx: StageContext) -> Tokenizer:
        if self.tokenizer.path:
            return load_tokenizer(self.tokenizer.path)
        folder = ctx.folder / "tokenizer"
        if (folder / "tokenizer.model").exists():
            return load_tokenizer(folder)
        texts = (row["text"] for source in (self.data, *self.tokenizer.texts) for row in source.rows())
        return train_sentencepiece(texts, self.tokenizer.vocab_size, folder, self.tokenizer.model_type)


@dataclass(frozen=True)
class Checkpoint(Stage):
    """A Hugging Face checkpoint (folder or hub name) as the model to start from."""

    path: str
    tokenizer: str = ""  # "": the checkpoint's own
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "dots"] = "none"
    logits_chunk: int = 0

    def files(self):
        return tuple(p for p in (self.path, self.tokenizer) if p and Path(p).exists())

    def config(self) -> ModelConfig:
        config = config_from_hf(resolve_checkpoint(self.path), dtype=self.dtype)
        return replace(config, remat=self.remat, logits_chunk=self.logits_chunk)

    def plan(self, ctx):
        config = self.config()
        return Plan(model_params=config.n_params, memory_bytes=4 * config.n_params)

    def run(self, ctx: StageContext) -> dict:
        folder = resolve_checkpoint(self.path)
        tokenizer = load_tokenizer(self.tokenizer or folder)
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            model = Model(check_vocabulary(self.config(), tokenizer, "model"))
            shardings = state_shardings(
                mesh, jax.eval_shape(model.init, jax.random.key(0)), model.logical_axes()
            )
            _, params = load_hf(folder, dtype=self.dtype, shardings=shardings)
            save_model(ctx.folder, model, params, tokenizer)
        return {"parameters": model.config.n_params}


@dataclass(frozen=True)
class SFT(TrainingStage):
    """Supervised fine-tuning on demonstrations; the loss is on completions and their EOS."""

    start: str = stage_ref()
    data: Source = field(kw_only=True)
    loop: LoopConfig = field(kw_only=True)
    optim: OptimConfig = OptimConfig(lr=3e-4, schedule="cosine")
    algorithm: SFTConfig = SFTConfig()
    length: int = 0  # tokens of a packed row; 0: the model's context
    too_long: TooLong = "error"
    eval_rows: int = 32

    def validate(self, names):
        check_microbatches(self)
        check_stream(self)

    def plan(self, ctx):
        config = start_config(ctx, self.start)
        return training_plan(config, self.loop, source_size(self.data), self.length or config.context)

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            loaded = load_model(ctx.parents[self.start], mesh)
            model, length = loaded.model, self.length or loaded.model.config.context
            check_length(length, model, "length")
            if streams(self.data):
                kept: SequenceBatch | StreamFeed
                kept, held = streamed(self, encode_cut_demonstration, loaded.tokenizer, length, ctx, mesh)
            else:
                arrays = demonstration_batch(self.data, loaded.tokenizer, length, self.too_long, ctx.console)
                kept, held = hold_out(arrays, self.eval_rows)
            params = train_language_model(self, ctx, mesh, model, loaded.params, stage_key(ctx), kept, held)
            save_model(ctx.folder, model, params, loaded.tokenizer)
            return {"eval_loss": final_loss(model, params, held, mesh)}


def train_language_model(
    stage, ctx, mesh, model, params, key, kept: SequenceBatch | StreamFeed, held: SequenceBatch
):
    """What Pretrain and SFT share: next-token training and the held-out loss."""
    steps = stage.loop.steps if isinstance(kept, StreamFeed) else stage.loop.total_steps(rows_of(kept))
    algorithm = make_sft(stage.algorithm, model, build_optimizer(stage.optim, steps))
    evaluate = lambda state, step: {"eval/loss": final_loss(model, state.params["policy"], held, mesh)}  # noqa: E731
    state = train_offline(
        ctx, mesh, stage.loop, steps, algorithm, (params, key), model.logical_axes(), kept, evaluate
    )
    return state.params["policy"]


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
    logprobs, _ = model.logprobs(params, batch.tokens, batch.segment_ids, positions_BT=batch.positions)
    mask = batch.loss_mask[:, 1:]
    return jnp.sum(jnp.where(mask, -logprobs, 0.0), axis=1), jnp.sum(mask, axis=1)


# --- 2. preferences -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preferences(Stage):
    """Sample several answers to each prompt and have them ranked. Leaves `preferences.jsonl`."""

    start: str = stage_ref()
    prompts: Source = field(kw_only=True)
    labeler: Labeler = field(kw_only=True)
    responses: int = 2  # answers per prompt: 2 makes pairs, 4 to 9 K-wise rankings
    sampling: SamplingConfig = SamplingConfig()
    max_prompt: int = 0  # longest prompt in tokens; 0: whatever fits the context
    too_long: TooLongPrompt = "error"

    def validate(self, names):
        if self.responses < 2:
            raise UserError(f"responses is {self.responses}; a preference needs at least 2")

    def plan(self, ctx):
        config = start_config(ctx, self.start)
        rows = source_size(self.prompts) * self.responses
        tokens = rows * self.sampling.max_new_tokens
        return Plan(config.n_params, source_size(self.prompts), 0, tokens, 4 * config.n_params)

    def run(self, ctx: StageContext) -> dict:
        path = ctx.folder / "preferences.jsonl"
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            loaded = load_model(ctx.parents[self.start], mesh)
            rows, ids = self._prompts(loaded, ctx)
            repeated = [row for row in ids for _ in range(self.responses)]
            sampler = Sampler(loaded.model, loaded.tokenizer, mesh, self.sampling, prompt_slots(ids))
            with progress(ctx.console, len(repeated), f"{ctx.name}: sampling") as bar:
                samples = sampler.sample(loaded.params, repeated, stage_key(ctx), bar.update)
            texts = read_texts(
                samples, [row for row in rows for _ in range(self.responses)], loaded.tokenizer
            )
        k = self.responses
        groups = [texts.completions[i : i + k] for i in range(0, len(texts.completions), k)]
        asked = [
            dict(row, ended=[r["ended"] for r in texts.rows[i * k : (i + 1) * k]])
            for i, row in enumerate(rows)
        ]
        seed = zlib.crc32(f"labels {ctx.seed}".encode())
        labels = [check_row(row, "preference", "labeler") for row in self.labeler.label(asked, groups, seed)]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in labels))
        tied = sum(len(set(row["ranks"])) < len(row["ranks"]) for row in labels)
        return {
            "prompts": len(labels),
            "answers": len(repeated),
            "with_ties": tied,
            "length": float(np.mean(np.sum(samples.response_mask, axis=1))),
            "ended": float(np.mean(samples.ended)),
        }

    def _prompts(self, loaded: Loaded, ctx: StageContext):
        limit = self.max_prompt or loaded.model.config.context - self.sampling.max_new_tokens
        return usable_prompts(loaded, self.prompts, limit, self.sampling, self.too_long, ctx)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, by the first process."""
    if leads():
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.rename(path)


def stored_preferences(folder: Path) -> list[dict]:
    path = folder / "preferences.jsonl"
    if not path.exists():
        raise UserError(f"{folder}: this stage has no preferences.jsonl; name a Preferences stage")
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def preference_rows(stage, ctx: StageContext) -> list[dict]:
    """From the parent stage `preferences`, or from the source `data`."""
    if stage.preferences:
        return stored_preferences(ctx.parents[stage.preferences])
    return load_rows(stage.data, "preference", ctx.console)


def check_one_of(stage) -> None:
    if bool(stage.preferences) == (stage.data is not None):
        raise UserError("give either preferences (a stage) or data (a source of preference rows)")


# --- 3. the reward model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardModel(TrainingStage):
    """The SFT model with a scalar head, trained on preferences and normalised to mean 0, std 1."""

    start: str = stage_ref()
    loop: LoopConfig = field(kw_only=True)
    preferences: str = stage_ref("")
    data: Source | None = None
    eval_data: Source | None = None  # held-out preferences; None: a share of the prompts
    optim: OptimConfig = OptimConfig(lr=3e-4, schedule="cosine", warmup_steps=50)
    algorithm: RewardModelConfig = RewardModelConfig()
    eval_fraction: float = 0.1  # of the prompts (all their rows) are kept for evaluation
    max_length: int = 0  # tokens of prompt and answer; 0: the longest in the data
    too_long: TooLongPrompt = "error"

    def validate(self, names):
        check_one_of(self)
        check_microbatches(self)
        if not 0 < self.eval_fraction < 1:
            raise UserError(f"eval_fraction must be between 0 and 1, got {self.eval_fraction}")

    def plan(self, ctx):
        return preference_plan(self, ctx)

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            key = stage_key(ctx)
            loaded = load_model(ctx.parents[self.start], mesh)
            rows = preference_rows(self, ctx)
            if self.eval_data is not None:
                held_rows = load_rows(self.eval_data, "preference", ctx.console)
            else:
                rows, held_rows = split_by_prompt(rows, self.eval_fraction)
            arrays, held = (
                preference_arrays(r, loaded.tokenizer, self.max_length, self.too_long, ctx.console)
                for r in (rows, held_rows)
            )
            check_length(max(a.tokens.shape[2] for a in (arrays, held)), loaded.model, "max_length")
            check_ordered(held)

            model = Model(loaded.model.config, "scalar")
            params = with_scalar_head(loaded.params, jax.random.fold_in(key, 1))
            steps = self.loop.total_steps(rows_of(arrays))
            algorithm = make_reward_model(self.algorithm, model, build_optimizer(self.optim, steps))
            evaluate = lambda state, step: reward_accuracy(model, state.params["policy"], held, mesh)  # noqa: E731
            state = train_offline(
                ctx, mesh, self.loop, steps, algorithm, (params, key), model.logical_axes(), arrays, evaluate,
                ("rm/loss", "rm/acc"),
            )  # fmt: skip
            params = state.params["policy"]
            mean, std = reference_moments(model, params, arrays, mesh)
            accuracy = reward_accuracy(model, params, held, mesh)
            by_criterion = {}
            if rows_of(held) == len(held_rows):  # none was dropped for its length
                by_criterion = criteria_accuracy(all_scores(model, params, held, mesh), held_rows)
            save_model(ctx.folder, model, params, loaded.tokenizer, normalization={"mean": mean, "std": std})
        return {
            "held_out_accuracy": accuracy["eval/rm_acc/mean"],
            "held_out_accuracy_low": accuracy["eval/rm_acc/ci_low"],
            "held_out_accuracy_high": accuracy["eval/rm_acc/ci_high"],
            "held_out_ece": accuracy["rm/ece"],
            "held_out_pairs": accuracy["eval/rm_pairs"],
            "held_out_accuracy_against": by_criterion,
            "normalization": {"mean": mean, "std": std},
        }


def reference_moments(model: Model, params, arrays: PreferenceBatch, mesh: Mesh) -> tuple[float, float]:
    """Mean and std of the raw scores of the training answers, which the start policy (or people) wrote."""
    scores = all_scores(model, params, arrays, mesh)[arrays.ranks > 0]
    return float(scores.mean()), float(max(scores.std(), 1e-6))


def all_scores(model: Model, params, arrays: PreferenceBatch, mesh: Mesh) -> np.ndarray:
    f = partial(jitted_scores, model, params)
    return in_chunks(f, arrays, chunk_rows(rows_of(arrays), mesh), mesh)


jitted_scores = jax.jit(preference_scores, static_argnums=0)


def ordered_pairs(arrays: PreferenceBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, better answer, worse answer) of every pair that is no tie."""
    ranks = arrays.ranks
    row, better, worse = np.nonzero((ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] > 0))
    return row, better, worse


def check_ordered(held: PreferenceBatch) -> None:
    if not len(ordered_pairs(held)[0]):
        raise UserError("the held-out preferences hold no ordered pair: every answer is tied")


def reward_accuracy(model: Model, params, held: PreferenceBatch, mesh: Mesh) -> dict[str, float]:
    """Accuracy (ties left out, with a Wilson interval), margin and calibration on held-out pairs."""
    scores = all_scores(model, params, held, mesh)
    n, i, j = ordered_pairs(held)
    gap = (scores[n, i] - scores[n, j]).astype(np.float64)
    right = (gap > 0) + 0.5 * (gap == 0)
    low, high = wilson(right.sum(), len(right))
    # Half of the pairs are turned round, so that the labels are not all ones.
    turned = np.arange(len(gap)) % 2 == 1
    probability = 1 / (1 + np.exp(-np.where(turned, -gap, gap)))
    return {
        "rm/ece": expected_calibration_error(probability, (~turned).astype(np.float64)),
        "eval/rm_acc/mean": float(right.mean()),
        "eval/rm_acc/ci_low": low,
        "eval/rm_acc/ci_high": high,
        "eval/rm_margin/mean": float(gap.mean()),
        "eval/rm_pairs": len(gap),
    }


def criteria_accuracy(scores: np.ndarray, rows: list[dict]) -> dict[str, float]:
    """How often scores order two answers of a prompt as each criterion that the rows carry does.

    scores: [N, K] in the order of `rows` (at most their answers). Pairs that a criterion ties are left out.
    """
    right: dict[str, list[float]] = {}
    for row, values in zip(rows, scores, strict=True):
        for name, criterion in row.get("criteria", {}).items():
            c = np.asarray(criterion, np.float64)
            i, j = np.triu_indices(len(c), 1)
            gap, wanted = values[i] - values[j], np.sign(c[i] - c[j])
            right.setdefault(name, []).extend((0.5 + 0.5 * np.sign(gap) * wanted)[wanted != 0].tolist())
    return {name: float(np.mean(v)) for name, v in right.items() if v}


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95% interval of a proportion."""
    from scipy.stats import binomtest

    interval = binomtest(round(successes), n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


# --- 4. policies ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PPO(TrainingStage):
    """Reinforcement learning from the reward model (or a program), with a KL penalty to the start policy."""

    start: str = stage_ref()
    reward: str = stage_ref_or_name()
    prompts: Source = field(kw_only=True)
    loop: LoopConfig = field(kw_only=True)
    algorithm: PPOConfig = PPOConfig()
    sampling: SamplingConfig = SamplingConfig()
    critic: Literal["reward", "policy", "shared"] = "reward"  # start the critic from the reward model, from
    # the start policy, or share the policy's trunk
    optim: OptimConfig = OptimConfig(lr=1e-4, eps=1e-5)
    critic_optim: OptimConfig = OptimConfig(lr=3e-4, eps=1e-5)
    gold: str = ""  # a program reward that is only logged
    eval_prompts: Source | None = None
    ptx: Source | None = None  # pretraining text for algorithm.ptx_coef
    max_prompt: int = 0
    too_long: TooLongPrompt = "error"

    def validate(self, names):
        check_reward(self.reward, names)
        if self.gold:
            program_reward(self.gold)
        if self.sampling.filtered:
            raise UserError(
                "sampling: PPO trains the distribution that is sampled, so top_k, top_p, min_p and temperature 0 are "
                "not possible here; use temperature"
            )
        if self.critic == "reward" and self.reward not in names:
            raise UserError(
                f"critic 'reward' needs a reward-model stage; {self.reward!r} is a program: use 'policy'"
            )
        if bool(self.ptx) != bool(self.algorithm.ptx_coef):
            raise UserError(
                "ptx (text) and algorithm.ptx_coef (its weight) go together: give both or neither"
            )
        if self.loop.epochs:
            raise UserError("loop.epochs: PPO counts steps; set loop.steps")
        minibatch = self.algorithm.minibatches * self.algorithm.microbatches
        if self.loop.batch_size % minibatch:
            raise UserError(
                f"loop.batch_size {self.loop.batch_size} is not divisible by minibatches x microbatches = {minibatch}"
            )

    def plan(self, ctx):
        config = start_config(ctx, self.start)
        rows = self.loop.batch_size
        length = self.sampling.max_new_tokens + (self.max_prompt or 0)
        plan = training_plan(config, self.loop, source_size(self.prompts), length)
        critic = 0 if self.critic == "shared" else 1
        state = 4 * config.n_params * (1 + 3 * critic)  # reference, critic and its moments
        return replace(plan, tokens=self.loop.steps * rows * length, memory_bytes=plan.memory_bytes + state)

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            key = stage_key(ctx)
            policy = load_model(ctx.parents[self.start], mesh)
            model, tokenizer = policy.model, policy.tokenizer
            limit = self.max_prompt or model.config.context - self.sampling.max_new_tokens
            rows, ids = usable_prompts(policy, self.prompts, limit, self.sampling, self.too_long, ctx)
            reward = make_reward(self.reward, dict(ctx.parents), mesh, tokenizer)
            watch = (
                [make_reward(self.gold, {}, mesh, tokenizer)]
                if self.gold and self.gold != self.reward
                else []
            )

            # Models: the policy, its frozen start, and a critic.
            critic_model, critic_params = self._critic(ctx, mesh, policy, jax.random.fold_in(key, 1))
            language_loss = (lambda p, b, n: sft_loss(model, p, b, n)[0]) if self.ptx else None
            updates = self.loop.steps * self.algorithm.epochs * self.algorithm.minibatches
            algorithm = make_ppo(
                self.algorithm,
                actor_critic(model, critic_model, language_loss),
                build_optimizer(self.optim, updates),
                build_optimizer(self.critic_optim, updates),
                self.sampling.temperature,
            )
            eval_rows, eval_ids = (
                usable_prompts(policy, self.eval_prompts, limit, self.sampling, self.too_long, ctx)
                if self.eval_prompts
                else ([], [])
            )
            slots = prompt_slots(ids, eval_ids)
            sampler = Sampler(model, tokenizer, mesh, self.sampling, slots)
            evaluate = None
            if eval_ids:
                probe = Probe(
                    ctx.folder,
                    sampler,
                    eval_rows,
                    eval_ids,
                    policy.params,
                    [reward, *watch],
                    jax.random.fold_in(key, 2),
                )
                evaluate = lambda state, step: probe(state.params["policy"], step)  # noqa: E731
            text = None
            if self.ptx:
                text = text_batch(self.ptx, tokenizer, slots + self.sampling.max_new_tokens, ctx.console)
            axes = model.logical_axes() | Model(model.config, "scalar").logical_axes()
            state = train_online(
                ctx, mesh, self.loop, algorithm, (policy.params, critic_params, policy.params, key), axes, sampler,
                rows, ids, reward, watch, jax.random.fold_in(key, 3), text, evaluate,
                ("reward/score/mean", *(f"reward/{w.name}/mean" for w in watch), "kl/ref_k1"),
            )  # fmt: skip
            save_model(ctx.folder, model, state.params["policy"], tokenizer)
        return {"kl_coef": float(state.extra["kl_coef"])}

    def _critic(self, ctx: StageContext, mesh: Mesh, policy: Loaded, key) -> tuple[Model | None, Any]:
        if self.critic == "shared":
            return None, {"score": with_scalar_head(policy.params, key)["score"]}
        if self.critic == "policy":
            return Model(policy.model.config, "scalar"), with_scalar_head(policy.params, key)
        loaded = load_model(ctx.parents[self.reward], mesh, "scalar")
        return loaded.model, loaded.params


@dataclass(frozen=True)
class DPO(TrainingStage):
    """Direct preference optimisation on the same preferences, without a reward model or rollouts."""

    start: str = stage_ref()
    loop: LoopConfig = field(kw_only=True)
    preferences: str = stage_ref("")
    data: Source | None = None
    pairs: Literal["all", "best_worst"] = "all"  # of each prompt's ranked answers
    optim: OptimConfig = OptimConfig(lr=1e-4, schedule="cosine", warmup_steps=20)
    algorithm: DPOConfig = DPOConfig()
    eval_fraction: float = 0.1  # of the prompts, for held-out implicit accuracy
    eval_prompts: Source | None = None  # sampled from during training: an offline method drifts too
    sampling: SamplingConfig = SamplingConfig()  # for eval_prompts
    gold: str = ""  # a program reward, logged on eval_prompts
    max_length: int = 0
    too_long: TooLongPrompt = "error"

    def validate(self, names):
        check_one_of(self)
        check_microbatches(self)
        if self.gold:
            program_reward(self.gold)
            if self.eval_prompts is None:
                raise UserError("gold is measured on samples: give eval_prompts")
        if self.eval_prompts is not None and self.sampling.filtered:
            raise UserError(
                "sampling: the KL to the start policy is measured on unfiltered samples; use temperature"
            )
        if not 0 < self.eval_fraction < 1:
            raise UserError(f"eval_fraction must be between 0 and 1, got {self.eval_fraction}")

    def plan(self, ctx):
        return preference_plan(self, ctx)

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            key = stage_key(ctx)
            policy = load_model(ctx.parents[self.start], mesh)
            model, tokenizer = policy.model, policy.tokenizer
            train_rows, held_rows = split_by_prompt(preference_rows(self, ctx), self.eval_fraction)
            ranked, answers = (
                preference_arrays(r, tokenizer, self.max_length, self.too_long, ctx.console)
                for r in (train_rows, held_rows)
            )
            pairs, held = pair_arrays(ranked, self.pairs), pair_arrays(answers, self.pairs)
            check_length(max(p.tokens.shape[2] for p in (pairs, held)), model, "max_length")
            held = with_reference(model, policy.params, held, mesh)
            if self.algorithm.reference == "precomputed":
                pairs = with_reference(model, policy.params, pairs, mesh)

            probe = None
            if self.eval_prompts:
                limit = model.config.context - self.sampling.max_new_tokens
                rows, ids = usable_prompts(
                    policy, self.eval_prompts, limit, self.sampling, self.too_long, ctx
                )
                sampler = Sampler(model, tokenizer, mesh, self.sampling, prompt_slots(ids))
                rewards = [make_reward(self.gold, {}, mesh, tokenizer)] if self.gold else []
                probe = Probe(
                    ctx.folder, sampler, rows, ids, policy.params, rewards, jax.random.fold_in(key, 2)
                )

            def evaluate(state, step):
                params = state.params["policy"]
                metrics = implicit_accuracy(model, params, held, mesh)
                return metrics | (probe(params, step) if probe else {})

            steps = self.loop.total_steps(rows_of(pairs))
            algorithm = make_dpo(self.algorithm, model, build_optimizer(self.optim, steps))
            state = train_offline(
                ctx, mesh, self.loop, steps, algorithm, (policy.params, policy.params, key), model.logical_axes(),
                pairs, evaluate, ("pref/loss", "pref/acc"),
            )  # fmt: skip
            save_model(ctx.folder, model, state.params["policy"], tokenizer)
            params = state.params["policy"]
            accuracy = implicit_accuracy(model, params, held, mesh)
            by_criterion = {}
            if rows_of(answers) == len(held_rows):
                gain = answer_logprobs(model, params, answers, mesh) - answer_logprobs(
                    model, policy.params, answers, mesh
                )
                by_criterion = criteria_accuracy(gain, held_rows)
        return {
            "implicit_accuracy": accuracy["eval/pref_acc/mean"],
            "implicit_accuracy_low": accuracy["eval/pref_acc/ci_low"],
            "implicit_accuracy_high": accuracy["eval/pref_acc/ci_high"],
            "implicit_accuracy_against": by_criterion,
        }


def answer_logprobs(model: Model, params, answers: PreferenceBatch, mesh: Mesh) -> np.ndarray:
    """Summed log-probability of every answer, [N, K]."""
    f = jax.jit(lambda params, batch: pair_logprobs(model, params, batch))
    return in_chunks(partial(f, params), answers, chunk_rows(rows_of(answers), mesh), mesh)


def with_reference(model: Model, ref_params, pairs: PairBatch, mesh: Mesh) -> PairBatch:
    """The pairs with the reference's log-probabilities, computed once."""
    return pairs._replace(ref_logprobs=all_pair_logprobs(model, ref_params, pairs, mesh))


def all_pair_logprobs(model: Model, params, pairs: PairBatch, mesh: Mesh) -> np.ndarray:
    """Summed log-probabilities of both answers of all pairs, [N, 2]."""
    f = partial(jitted_pair_logprobs, model, params)
    return in_chunks(f, pairs, chunk_rows(rows_of(pairs), mesh), mesh)


jitted_pair_logprobs = jax.jit(pair_logprobs, static_argnums=0)


def implicit_accuracy(model: Model, params, held: PairBatch, mesh: Mesh) -> dict[str, float]:
    """Share of held-out pairs whose chosen answer has the larger log(pi / ref)."""
    gain = all_pair_logprobs(model, params, held, mesh) - held.ref_logprobs
    right = float(np.sum(gain[:, 0] > gain[:, 1]))
    low, high = wilson(right, len(gain))
    return {
        "eval/pref_acc/mean": right / len(gain),
        "eval/pref_acc/ci_low": low,
        "eval/pref_acc/ci_high": high,
    }


@dataclass(frozen=True)
class BestOfN(Stage):
    """Rerank samples of a policy by the reward: the strongest simple baseline. Leaves `best_of_n.json`."""

    start: str = stage_ref()
    reward: str = stage_ref_or_name()
    prompts: Source = field(kw_only=True)
    gold: str = ""
    samples: int = 64  # per prompt; every n up to it is estimated without bias from the same samples
    sampling: SamplingConfig = SamplingConfig()
    max_prompt: int = 0
    too_long: TooLongPrompt = "error"

    def validate(self, names):
        check_reward(self.reward, names)
        if self.samples < 2:
            raise UserError(f"samples is {self.samples}; best-of-n needs at least 2")

    def plan(self, ctx):
        config = start_config(ctx, self.start)
        rows = source_size(self.prompts)
        return Plan(
            config.n_params, rows, 0, rows * self.samples * self.sampling.max_new_tokens, 8 * config.n_params
        )

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            policy = load_model(ctx.parents[self.start], mesh)
            limit = self.max_prompt or policy.model.config.context - self.sampling.max_new_tokens
            rows, ids = usable_prompts(policy, self.prompts, limit, self.sampling, self.too_long, ctx)
            reward = make_reward(self.reward, dict(ctx.parents), mesh, policy.tokenizer)
            gold = make_reward(self.gold, {}, mesh, policy.tokenizer) if self.gold else reward
            sampler = Sampler(policy.model, policy.tokenizer, mesh, self.sampling, prompt_slots(ids))
            n = self.samples
            repeated = [row for row in ids for _ in range(n)]
            with progress(ctx.console, len(repeated), f"{ctx.name}: sampling") as bar:
                samples = sampler.sample(policy.params, repeated, stage_key(ctx), bar.update)
            texts = read_texts(samples, [row for row in rows for _ in range(n)], policy.tokenizer)
            by_prompt = lambda x: np.asarray(x, np.float64).reshape(len(ids), n)  # noqa: E731
            values = {
                "proxy": by_prompt(score(reward, samples, texts, mesh)),
                "gold": by_prompt(score(gold, samples, texts, mesh)),
                "length": by_prompt(np.sum(samples.response_mask, axis=1)),
                "ended": by_prompt(samples.ended),
            }
        ns = [2**i for i in range(n.bit_length()) if 2**i <= n]
        proxy = values["proxy"]
        curves = {name: {str(m): best_of_n(proxy, v, m).tolist() for m in ns} for name, v in values.items()}
        table = {
            "prompts": [row["prompt"] for row in rows],
            "n": ns,
            "kl": [best_of_n_kl(m) for m in ns],
            "per_prompt": curves,
            "best_text": [texts.completions[i * n + int(np.argmax(proxy[i]))] for i in range(len(ids))],
        }
        write_text(ctx.folder / "best_of_n.json", json.dumps(table))
        return {name: {m: float(np.mean(v)) for m, v in by_n.items()} for name, by_n in curves.items()}


# --- 5. evaluation -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluate(Stage):
    """Every policy on the same prompts: gold, proxy, KL to the first policy, length. Leaves `evaluation.json`."""

    policies: tuple[str, ...] = stage_ref()
    gold: str = stage_ref_or_name()  # the reward that is reported
    prompts: dict[str, Source] = field(kw_only=True)  # by split; the first is the main one
    proxy: str = stage_ref_or_name("")  # the learned reward, for comparison
    best_of_n: str = stage_ref("")
    samples: int = 4  # per prompt
    sampling: SamplingConfig = SamplingConfig()
    show: int = 12  # prompts whose answers are kept as text
    max_prompt: int = 0
    too_long: TooLongPrompt = "error"

    def validate(self, names):
        check_reward(self.gold, names)
        if self.proxy:
            check_reward(self.proxy, names)
        if not self.policies or not self.prompts:
            raise UserError("policies and prompts must not be empty")
        if self.sampling.filtered:
            raise UserError(
                "sampling: the KL to the first policy is measured on unfiltered samples; use temperature"
            )
        if self.samples < 1:
            raise UserError(f"samples must be positive, got {self.samples}")

    def plan(self, ctx):
        config = start_config(ctx, self.policies[0])
        rows = sum(map(source_size, self.prompts.values()))
        tokens = rows * self.samples * len(self.policies) * self.sampling.max_new_tokens
        return Plan(config.n_params, rows, 0, tokens, 12 * config.n_params)

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        # Mistakes first: the policies are sampled one after the other, which takes long.
        table = best_of_n_table(ctx.parents[self.best_of_n]) if self.best_of_n else None
        tokenizers = {name: model_meta(ctx.parents[name])["tokenizer"] for name in self.policies}
        for name in self.policies:
            if tokenizers[name] != tokenizers[self.policies[0]]:
                raise UserError(f"policies: {name} and {self.policies[0]} have different tokenizers")
        with jax.set_mesh(mesh):
            base = load_model(ctx.parents[self.policies[0]], mesh)
            limit = self.max_prompt or base.model.config.context - self.sampling.max_new_tokens
            splits = {
                name: usable_prompts(base, source, limit, self.sampling, self.too_long, ctx)
                for name, source in self.prompts.items()
            }
            slots = prompt_slots(*(ids for _, ids in splits.values()))
            gold = make_reward(self.gold, dict(ctx.parents), mesh, base.tokenizer)
            proxy = make_reward(self.proxy, dict(ctx.parents), mesh, base.tokenizer) if self.proxy else None
            measured: dict[str, dict] = {}
            criteria: dict[str, dict] = {}
            kept = {}
            total = len(self.policies) * sum(len(ids) for _, ids in splits.values()) * self.samples
            done = 0
            with progress(ctx.console, total, f"{ctx.name}: sampling") as bar:
                for name in self.policies:
                    policy = load_model(ctx.parents[name], mesh)
                    sampler = Sampler(policy.model, policy.tokenizer, mesh, self.sampling, slots)
                    measured[name], criteria[name] = {"splits": {}}, {}
                    for i, (split, (rows, ids)) in enumerate(splits.items()):
                        # Every policy uses the same keys: common random numbers make differences less noisy.
                        result, texts = self._measure(
                            policy,
                            base,
                            sampler,
                            rows,
                            ids,
                            gold,
                            proxy,
                            jax.random.fold_in(stage_key(ctx), i),
                        )
                        measured[name]["splits"][split] = result
                        if self.gold in CRITERIA:
                            values = CRITERIA[self.gold](texts.prompts, texts.completions, texts.rows)
                            criteria[name][split] = {k: self._by_prompt(v) for k, v in values.items()}
                        if i == 0:
                            kept[name] = (texts, result)
                        done += len(texts.completions)
                        bar.update(done)
        main = next(iter(splits))
        prompts = [row["prompt"] for row in splits[main][0]]
        evaluation = {
            "reward_name": self.gold,
            "gold_max": float(np.mean(MAXIMA[self.gold](prompts))) if self.gold in MAXIMA else None,
            "policies": measured,
            "criteria": criteria,
            "samples": self._samples(kept, prompts),
            "best_of_n": None,
        }
        if table is not None:
            self._add_best_of_n(evaluation, table, main, prompts)
        write_text(ctx.folder / "evaluation.json", json.dumps(evaluation, allow_nan=False))
        return {
            name: {
                split: {k: float(np.mean(v)) for k, v in values.items() if v is not None}
                for split, values in measured[name]["splits"].items()
            }
            for name in measured
        }

    def _by_prompt(self, values) -> list[list[float]]:
        return np.round(np.asarray(values, np.float64), 6).reshape(-1, self.samples).tolist()

    def _measure(
        self,
        policy: Loaded,
        base: Loaded,
        sampler: Sampler,
        rows,
        ids,
        gold: Reward,
        proxy: Reward | None,
        key,
    ) -> tuple[dict, Texts]:
        n = self.samples
        samples = sampler.sample(policy.params, [row for row in ids for _ in range(n)], key)
        texts = read_texts(samples, [row for row in rows for _ in range(n)], policy.tokenizer)
        base_logprobs = Scorer(base.model, sampler.mesh, self.sampling.temperature).logprobs(
            base.params, samples
        )
        return {
            "gold": self._by_prompt(score(gold, samples, texts, sampler.mesh)),
            "proxy": self._by_prompt(score(proxy, samples, texts, sampler.mesh)) if proxy else None,
            "kl": self._by_prompt(np.sum(samples.logprobs, axis=1) - base_logprobs),
            "length": self._by_prompt(np.sum(samples.response_mask, axis=1)),
            "ended": self._by_prompt(samples.ended),
        }, texts

    def _samples(self, kept: dict, prompts: list[str]) -> list[dict]:
        out = []
        for i in range(min(self.show, len(prompts))):
            answers = {}
            for name, (texts, result) in kept.items():
                answers[name] = {"text": texts.completions[i * self.samples], "gold": result["gold"][i][0]}
                if result["proxy"] is not None:
                    answers[name]["proxy"] = result["proxy"][i][0]
            out.append({"prompt": prompts[i], "answers": answers})
        return out

    def _add_best_of_n(self, evaluation: dict, table: dict, main: str, prompts: list[str]) -> None:
        curves = table["per_prompt"]
        mean = lambda name: [float(np.mean(curves[name][str(n)])) for n in table["n"]]  # noqa: E731
        error = [
            1.96 * float(np.std(curves["gold"][str(n)]) / len(table["prompts"]) ** 0.5) for n in table["n"]
        ]
        evaluation["best_of_n"] = {
            "n": table["n"],
            "gold": mean("gold"),
            "proxy": mean("proxy"),
            "kl": table["kl"],
            "gold_low": [g - e for g, e in zip(mean("gold"), error, strict=True)],
            "gold_high": [g + e for g, e in zip(mean("gold"), error, strict=True)],
        }
        if table["prompts"] == prompts:  # the same prompts: a row of the table, comparable prompt by prompt
            n = 16 if 16 in table["n"] else table["n"][-1]
            column = lambda name: [[v] for v in curves[name][str(n)]]  # noqa: E731
            split = {k: column(k) for k in ("gold", "proxy", "length", "ended")} | {"kl": None}
            evaluation["policies"][f"best_of_{n}"] = {"splits": {main: split}, "kl_exact": best_of_n_kl(n)}


def best_of_n_table(folder: Path) -> dict:
    path = folder / "best_of_n.json"
    if not path.exists():
        raise UserError(f"{folder}: this stage has no best_of_n.json; name a BestOfN stage")
    return json.loads(path.read_text(encoding="utf-8"))


# --- shared by the stages ------------------------------------------------------------------------------------


def check_reward(name: str, names: tuple[str, ...]) -> None:
    if name not in names and name not in REWARDS:
        raise UserError(
            f"reward {name!r} is neither a stage nor a known reward.{did_you_mean(name, [*names, *REWARDS])}"
        )


def check_microbatches(stage) -> None:
    rows, parts = stage.loop.batch_size, stage.algorithm.microbatches
    if parts < 1 or rows % parts:
        raise UserError(f"loop.batch_size {rows} is not divisible by algorithm.microbatches {parts}")


def check_length(length: int, model: Model, field_name: str) -> None:
    if length > model.config.context:
        raise UserError(
            f"{field_name}: sequences of {length} tokens do not fit the model's context of {model.config.context}"
        )


def usable_prompts(loaded: Loaded, source: Source, limit: int, sampling: SamplingConfig, too_long: str, ctx):
    """Prompt rows and ids that leave room for a response in the context."""
    if limit < 1 or limit + sampling.max_new_tokens > loaded.model.config.context:
        raise UserError(
            f"prompts of {limit} tokens and sampling.max_new_tokens {sampling.max_new_tokens} do not fit the model's "
            f"context of {loaded.model.config.context}"
        )
    return prompt_ids(source, loaded.tokenizer, limit, too_long, ctx.console)


def source_size(source: Source | None) -> int:
    """Rows of a source as far as its config says (a size, a limit); 0 when only reading it would tell."""
    for name in ("size", "documents", "max_rows"):
        if getattr(source, name, None):
            return getattr(source, name)
    return 0


def start_config(ctx: StageContext, name: str) -> ModelConfig:
    """The model config at the beginning of a chain of stages, for the dry run."""
    stage = ctx.stages[name]
    if isinstance(stage, Pretrain):
        return replace(stage.model, vocab_size=stage.model.vocab_size or stage.tokenizer.vocab_size)
    if isinstance(stage, Checkpoint):
        return stage.config()
    if not hasattr(stage, "start"):
        raise UserError(f"stages.{ctx.name}: no model comes from {name!r} ({type(stage).__name__})")
    return start_config(ctx, stage.start)


def training_plan(config: ModelConfig, loop: LoopConfig, rows: int, length: int, per_row: int = 1) -> Plan:
    """Sizes of a training stage. Memory: float32 parameters, gradient and two moments, and activations."""
    steps = loop.steps or (loop.total_steps(rows) if rows else 0)
    tokens_step = loop.batch_size * per_row * length
    kept = config.d_model * (2 if config.remat == "full" else 16) * config.n_layers
    logits = 3 * config.vocab_size * min(1.0, (config.logits_chunk or length) / length)
    activations = int(4 * tokens_step * (kept + logits))
    note = "" if steps else "steps depend on the data"
    return Plan(config.n_params, rows, steps, steps * tokens_step, 16 * config.n_params + activations, note)


def preference_plan(stage, ctx: StageContext) -> Plan:
    """Of a stage on preferences: batch rows are prompts with all their answers, or for DPO ordered pairs."""
    config = start_config(ctx, stage.start)
    rows, answers = source_size(stage.data), 2
    if stage.preferences:
        parent = ctx.stages[stage.preferences]
        if not isinstance(parent, Preferences):
            raise UserError(
                f"stages.{ctx.name}: no preferences come from {stage.preferences!r} ({type(parent).__name__})"
            )
        rows, answers = source_size(parent.prompts), parent.responses
    if getattr(stage, "eval_data", None) is None:
        rows = round(rows * (1 - stage.eval_fraction))
    if isinstance(stage, DPO):
        rows *= answers * (answers - 1) // 2 if stage.pairs == "all" else 1
        answers = 2
    return training_plan(config, stage.loop, rows, stage.max_length or config.context, answers)
