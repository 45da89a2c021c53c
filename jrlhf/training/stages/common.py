"""What the stages share: their bases, checks at config time, prompts that fit, small files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from jrlhf import hosts
from jrlhf.config import (
    LANGUAGE_MODEL,
    MeshConfig,
    Source,
    Stage,
    StageContext,
    UserError,
    did_you_mean,
    stage_ref,
)
from jrlhf.metrics import progress
from jrlhf.models.attention import LANES, attention_implementation, check_heads
from jrlhf.models.config import LoRAConfig, ModelConfig
from jrlhf.models.packed import window_spans
from jrlhf.models.transformer import Model
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import HOST, check_batch, leads, make_mesh, on_host, placed
from jrlhf.training.artifacts import Loaded, load_model
from jrlhf.training.data import prompt_ids
from jrlhf.training.evaluation import Sampler, prompt_slots
from jrlhf.training.loop import LoopConfig, stage_key
from jrlhf.training.rewards import REWARDS, Reward, Texts, check_all, read_texts
from jrlhf.types import Rollout

TooLong = Literal["error", "drop", "truncate"]
TooLongPrompt = Literal["error", "drop", "truncate_left"]


@dataclass(frozen=True)
class MeshStage(Stage):
    """A stage that runs on the devices of the mesh."""

    abstract: ClassVar[bool] = True

    def check_mesh(self, mesh: MeshConfig) -> None:
        make_mesh(mesh)


@dataclass(frozen=True)
class ModelStage(MeshStage):
    """A stage that leaves a model."""

    abstract: ClassVar[bool] = True
    artifact: ClassVar[str] = LANGUAGE_MODEL

    def model_config(self, stages: Mapping[str, Stage]) -> ModelConfig:
        """Of the model that it will leave; `stages` are those of the experiment."""
        raise TypeError(f"{type(self).__name__} does not define model_config()")

    def needs_download(self, stages: Mapping[str, Stage]) -> bool:
        """Whether `model_config` has to fetch something from a server."""
        return False

    def device_mesh(self, config: MeshConfig) -> Mesh:
        """The mesh on which the model is trained."""
        return make_mesh(config)

    def check_model(self, mesh: MeshConfig, stages: Mapping[str, Stage]) -> None:
        if mesh.expert == mesh.sequence == 1 or self.needs_download(stages):
            return
        devices, config = self.device_mesh(mesh), self.model_config(stages)
        check_axes(devices, config)
        # (A dense reward model beside a policy with experts has its rows split over the axis, and nothing else.)
        if devices.shape["expert"] > 1 and not any(_has_experts(stage, stages) for stage in stages.values()):
            raise UserError(
                f"mesh.expert {devices.shape['expert']}: no model of this experiment has experts (model.moe); use "
                "mesh.fsdp or mesh.data"
            )


@dataclass(frozen=True)
class TrainingStage(ModelStage):
    """A stage that trains a model: its batches must divide over the mesh."""

    abstract: ClassVar[bool] = True

    loop: LoopConfig = field(kw_only=True)

    def check_mesh(self, mesh: MeshConfig) -> None:
        devices = self.device_mesh(mesh)
        check_batch(devices, self.loop.batch_size, "loop.batch_size")
        self.check_offload(devices)

    def check_offload(self, mesh: Mesh) -> None:
        """That the devices reach the memory in which `loop` keeps something, and that there is something to keep."""
        for name in ("offload_optimizer", "offload_reference"):
            if getattr(self.loop, name):
                on_host(mesh, None, f"loop.{name}")
        if self.loop.offload_reference and (reason := self.no_reference()):
            raise UserError(f"loop.offload_reference: {reason}; leave it off")

    def no_reference(self) -> str:
        """Why `loop.offload_reference` would have nothing to move; "" where it has."""
        return f"{type(self).__name__} has no reference"


@dataclass(frozen=True)
class FineTuningStage(TrainingStage):
    """A stage that trains the language model that another left; what it leaves has the same shape."""

    abstract: ClassVar[bool] = True

    start: str = stage_ref(artifact=LANGUAGE_MODEL)
    lora: LoRAConfig = field(default=LoRAConfig(), kw_only=True)  # rank 0 trains all parameters

    def check_adapters(self, stages: Mapping[str, Stage]) -> None:
        """At config time, that the model has the layers that `lora` names."""
        if self.lora.rank and not self.needs_download(stages):
            replace(start_config(stages, self.start), lora=self.lora)

    def model_config(self, stages: Mapping[str, Stage]) -> ModelConfig:
        return start_config(stages, self.start)

    def needs_download(self, stages: Mapping[str, Stage]) -> bool:
        return model_stage(stages, self.start).needs_download(stages)

    def load_start(self, ctx: StageContext, mesh: Mesh) -> Loaded:
        """The model of `start`. With `loop.offload_reference` it lies in the host's memory: what is trained is a copy
        on the devices, and whoever holds the start holds nothing there."""
        loaded = load_model(ctx.parents[self.start], mesh)
        if not self.loop.offload_reference:
            return loaded
        return replace(loaded, params=placed(loaded.params, HOST))


def fixed_reference(stage: Any) -> str:
    """`no_reference` of a stage whose reference is its start."""
    if stage.lora.rank:
        return "with adapters (lora) the reference is their base, which every pass needs"
    if getattr(stage.algorithm, "ref_update_every", 0):
        return "a reference that is refreshed (algorithm.ref_update_every) is part of what is trained"
    if getattr(stage.algorithm, "reference", "") == "on_the_fly":
        return "algorithm.reference 'on_the_fly' reads it in every step (with 'precomputed' none does)"
    return ""


def model_stage(stages: Mapping[str, Stage], name: str) -> ModelStage:
    stage = stages[name]
    if not isinstance(stage, ModelStage):
        raise TypeError(f"{type(stage).__name__} leaves {stage.artifact}: derive it from ModelStage")
    return stage


def start_config(stages: Mapping[str, Stage], name: str) -> ModelConfig:
    """The config of the model that a stage will leave: that at the beginning of its chain of stages."""
    return model_stage(stages, name).model_config(stages)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, by the first process."""
    if leads():
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.rename(path)


def check_reward(name: str, stages: Mapping[str, Stage], field: str = "reward") -> None:
    if name not in stages and name not in REWARDS:
        hint = did_you_mean(name, [*stages, *REWARDS])
        raise UserError(f"{field} {name!r} is neither a stage nor a known reward.{hint}")


def check_answers(start: str, stages: Mapping[str, Stage], sampling: SamplingConfig, max_prompt: int) -> None:
    """That prompts and answers can fit the context of the model of the stage `start`."""
    if max_prompt < 0:
        raise UserError(f"max_prompt must not be negative, got {max_prompt}")
    if model_stage(stages, start).needs_download(stages):
        return  # the stage itself will see
    context = start_config(stages, start).context
    if max_prompt + sampling.max_new_tokens > context:
        prompts = f"max_prompt {max_prompt} and " if max_prompt else ""
        raise UserError(
            f"{prompts}sampling.max_new_tokens {sampling.max_new_tokens} do not fit the context of {context} tokens "
            f"of {start!r}"
        )
    if not max_prompt and context - sampling.max_new_tokens < 2:  # one is taken by the beginning of the text
        raise UserError(
            f"sampling.max_new_tokens {sampling.max_new_tokens} leaves no room for a prompt in the context of "
            f"{context} tokens of {start!r}; lower it"
        )


def check_axes(mesh: Mesh, config: ModelConfig) -> None:
    """UserError where the model's heads or experts do not divide over the mesh."""
    check_heads(config.n_heads, mesh.shape["sequence"], mesh.shape["tensor"])
    if config.moe.experts % mesh.shape["expert"]:
        raise UserError(
            f"mesh.expert {mesh.shape['expert']}: model.moe.experts {config.moe.experts} is not divisible by it"
        )


def _has_experts(stage: Stage, stages: Mapping[str, Stage]) -> bool:
    """Whether it is known that the stage's model has experts."""
    if not isinstance(stage, ModelStage):
        return False
    return stage.needs_download(stages) or stage.model_config(stages).moe.experts > 0


def check_attention(mesh: Mesh, config: ModelConfig) -> None:
    """That the devices have the kernel that the model names."""
    with jax.set_mesh(mesh):
        attention_implementation(config, LANES, LANES)


def check_microbatches(stage) -> None:
    rows, parts = stage.loop.batch_size, stage.algorithm.microbatches
    if parts < 1 or rows % parts:
        raise UserError(f"loop.batch_size {rows} is not divisible by algorithm.microbatches {parts}")


def check_packing(packing: bool, config: ModelConfig, max_length: int) -> None:
    """That answers of at most `max_length` tokens (0: the model's context) can be packed, where they are to be."""
    if packing and not window_spans(config, length := max_length or config.context):
        raise UserError(
            f"packing: the model has layers with a window of {config.window} tokens, which cannot be counted in packed "
            f"rows, and answers may have {length}. Set packing to False, or max_length to at most {config.window}."
        )


def check_length(length: int, model: Model, field_name: str) -> None:
    if length > model.config.context:
        raise UserError(
            f"{field_name}: sequences of {length} tokens do not fit the model's context of {model.config.context}"
        )


def usable_prompts(
    loaded: Loaded, source: Source, limit: int, sampling: SamplingConfig, too_long: str, ctx, label: str
):
    """Prompt rows and ids that leave room for a response in the context. `label` tells sources apart in the log."""
    if limit < 1 or limit + sampling.max_new_tokens > loaded.model.config.context:
        raise UserError(
            f"prompts of {limit} tokens and sampling.max_new_tokens {sampling.max_new_tokens} do not fit the model's "
            f"context of {loaded.model.config.context}"
        )
    return prompt_ids(source, loaded.tokenizer, limit, too_long, labelled(ctx.console, label))


class Sampled(NamedTuple):
    """Answers of a policy, `n` to each prompt in consecutive rows, on the host."""

    rows: list[dict]  # of the prompts
    ids: list[list[int]]  # of the prompts
    samples: Rollout
    texts: Texts


def sample_answers(
    stage: Any, policy: Loaded, ctx: StageContext, n: int, rewards: Sequence[Reward] = ()
) -> Sampled:
    """`n` answers to each of the stage's `prompts`, by its `sampling`, `max_prompt` and `too_long`. rewards: those that
    will read the prompts' rows; UserError before anything is sampled where one cannot."""
    limit = stage.max_prompt or policy.model.config.context - stage.sampling.max_new_tokens
    rows, ids = usable_prompts(policy, stage.prompts, limit, stage.sampling, stage.too_long, ctx, "prompts")
    check_all(rewards)(rows)
    sampler = Sampler(policy.model, policy.tokenizer, make_mesh(ctx.mesh), stage.sampling, prompt_slots(ids))
    total = len(ids) * n
    with progress(ctx.console, total, f"{ctx.name}: sampling") as bar:

        def drawn(done: int) -> None:
            bar.update(done)
            hosts.WATCH.moved(what := f"{done} of {total} answers are drawn")
            if done < total:
                hosts.heed_stop(what)

        samples = sampler.sample(policy.params, ids, stage_key(ctx), drawn, group=n)
    texts = read_texts(samples, [row for row in rows for _ in range(n)], policy.tokenizer)
    return Sampled(rows, ids, samples, texts)


class _Labelled:
    """A console for the readers of data, whose lines say what is read."""

    def __init__(self, console: Console, label: str) -> None:
        self._console, self._label = console, label

    def print(self, line: str, **options: Any) -> None:
        self._console.print(f"  {self._label}: {line.lstrip()}", **options)


def labelled(console: Console, label: str) -> Any:
    return _Labelled(console, label)
