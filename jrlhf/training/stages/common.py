"""What the stages share: checks at config time, prompts that fit, sizes for the dry run, small files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jrlhf.config import (
    Source,
    Stage,
    StageContext,
    UserError,
    did_you_mean,
)
from jrlhf.models.config import ModelConfig
from jrlhf.models.transformer import Model
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import check_batch, leads, make_mesh
from jrlhf.training.artifacts import Loaded
from jrlhf.training.data import (
    prompt_ids,
)
from jrlhf.training.loop import LoopConfig
from jrlhf.training.rewards import REWARDS
from jrlhf.types import Plan

TooLong = Literal["error", "drop", "truncate"]
TooLongPrompt = Literal["error", "drop", "truncate_left"]


@dataclass(frozen=True)
class TrainingStage(Stage):
    """A stage with a loop: its batches must divide over the mesh."""

    def check_mesh(self, mesh):
        check_batch(make_mesh(mesh), self.loop.batch_size, "loop.batch_size")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, by the first process."""
    if leads():
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.rename(path)


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
    if hasattr(stage, "model_config"):
        return stage.model_config()
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
