"""Preferences: several answers to each prompt, ranked."""

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from jrlhf.config import (
    Labeler,
    Source,
    Stage,
    StageContext,
    UserError,
    stage_ref,
)
from jrlhf.data.sources import check_row
from jrlhf.metrics import progress
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import Loaded, load_model
from jrlhf.training.data import (
    load_rows,
)
from jrlhf.training.evaluation import Sampler, prompt_slots
from jrlhf.training.loop import stage_key
from jrlhf.training.rewards import read_texts
from jrlhf.training.stages.common import (
    TooLongPrompt,
    source_size,
    start_config,
    training_plan,
    usable_prompts,
    write_text,
)
from jrlhf.types import Plan


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


def preference_plan(stage, ctx: StageContext, pairs: str = "") -> Plan:
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
    if pairs:
        rows *= answers * (answers - 1) // 2 if pairs == "all" else 1
        answers = 2
    return training_plan(config, stage.loop, rows, stage.max_length or config.context, answers)
