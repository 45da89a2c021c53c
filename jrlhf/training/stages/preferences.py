"""Preferences: several answers to each prompt, ranked."""

import json
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.config import (
    LANGUAGE_MODEL,
    PREFERENCES,
    REWARD_MODEL,
    Labeler,
    Source,
    StageContext,
    UserError,
    stage_ref,
    stage_ref_or_name,
)
from jrlhf.data.sources import check_row
from jrlhf.models.config import ModelConfig
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import load_model
from jrlhf.training.data import load_rows, split_by_prompt
from jrlhf.training.evaluation import score
from jrlhf.training.rewards import make_reward
from jrlhf.training.stages.common import (
    MeshStage,
    TooLongPrompt,
    check_answers,
    check_reward,
    labelled,
    sample_answers,
    start_config,
    write_text,
)
from jrlhf.training.stages.sizes import (
    UNKNOWN,
    Count,
    at_most,
    check_kind,
    count_rows,
    finished,
    local_rows,
    sampling_plan,
    training_plan,
    usable,
)
from jrlhf.types import Plan


@dataclass(frozen=True)
class Preferences(MeshStage):
    """Sample several answers to each prompt and have them ranked. Leaves `preferences.jsonl`.

    By a labeller, or without noise by a reward: a reward model's stage, as iterative DPO has it (Xiong et al. 2024).
    """

    artifact: ClassVar[str] = PREFERENCES

    start: str = stage_ref(artifact=LANGUAGE_MODEL)
    prompts: Source = field(kw_only=True)
    labeler: Labeler | None = None
    reward: str = stage_ref_or_name("", REWARD_MODEL)  # instead of a labeller
    responses: int = 2  # answers per prompt: 2 makes pairs, 4 to 9 K-wise rankings
    sampling: SamplingConfig = SamplingConfig()
    max_prompt: int = 0  # longest prompt in tokens; 0: whatever fits the context
    too_long: TooLongPrompt = "error"

    def validate(self, stages):
        if (self.labeler is None) == (not self.reward):
            raise UserError("give either labeler or reward (a reward model's stage, or a program reward)")
        if self.reward:
            check_reward(self.reward, stages)
        if self.responses < 2:
            raise UserError(f"responses is {self.responses}; a preference needs at least 2")
        check_answers(self.start, stages, self.sampling, self.max_prompt)

    def plan(self, ctx):
        rows, config = usable(self.prompts, self.too_long), start_config(ctx.stages, self.start)
        return sampling_plan(config, rows, rows.times(self.responses), self.sampling.max_new_tokens, 1)

    def run(self, ctx: StageContext) -> dict:
        path = ctx.folder / "preferences.jsonl"
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            loaded = load_model(ctx.parents[self.start], mesh)
            reward = None
            if self.reward:
                reward = make_reward(self.reward, dict(ctx.parents), mesh, loaded.tokenizer)
            asks = () if reward is None else (reward,)
            rows, _, samples, texts = sample_answers(self, loaded, ctx, self.responses, asks)
            if reward is not None:
                scores = score(reward, samples, texts, mesh)
        k = self.responses
        groups = [texts.completions[i : i + k] for i in range(0, len(texts.completions), k)]
        asked = [
            dict(row, ended=[r["ended"] for r in texts.rows[i * k : (i + 1) * k]])
            for i, row in enumerate(rows)
        ]
        if self.labeler is not None:
            seed = zlib.crc32(f"labels {ctx.seed}".encode())
            labelled_rows = self.labeler.label(asked, groups, seed)
        else:
            labelled_rows = [
                {
                    "prompt": row["prompt"],
                    "responses": group,
                    "ranks": ranks_of(values),
                    "scores": values.tolist(),
                }
                for row, group, values in zip(asked, groups, scores.reshape(-1, k), strict=True)
            ]
        labels = [check_row(row, "preference", self.reward or "labeler") for row in labelled_rows]
        # What the labeller need not know: which answers were cut off by their length, and the prompt's tools.
        for row, source in zip(labels, asked, strict=True):
            row["ended"] = source["ended"]
            if "tools" in source:
                row["tools"] = source["tools"]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in labels))
        tied = sum(len(set(row["ranks"])) < len(row["ranks"]) for row in labels)
        return {
            "prompts": len(labels),
            "answers": len(texts.completions),
            "with_ties": tied,
            "length": float(np.mean(np.sum(samples.response_mask, axis=1))),
            "ended": float(np.mean(samples.ended)),
        }


def ranks_of(values: np.ndarray) -> list[int]:
    """1 for the largest; equal values are tied."""
    return [1 + int(np.sum(values > value)) for value in values]


def stored_preferences(folder: Path) -> list[dict]:
    path = folder / "preferences.jsonl"
    if not path.exists():
        raise UserError(f"{path} is missing; run its stage again with --force")
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def preference_rows(stage, ctx: StageContext) -> list[dict]:
    """From the parent stage `preferences`, or from the source `data`."""
    if stage.preferences:
        return stored_preferences(ctx.parents[stage.preferences])
    return load_rows(stage.data, "preference", labelled(ctx.console, "data"))


def check_one_of(stage) -> None:
    if bool(stage.preferences) == (stage.data is not None):
        raise UserError("give either preferences (a stage) or data (a source of preference rows)")


def preference_plan(stage, ctx: StageContext, pairs: str = "") -> Plan:
    """Of a stage on preferences: batch rows are prompts with all their answers, or for `pairs` ordered pairs."""
    config = start_config(ctx.stages, stage.start)
    rows, answers = _training_preferences(stage, ctx, pairs)
    if stage.too_long == "drop":
        rows = at_most(rows.n)
    # Sequences are as long as the longest in the data.
    length = at_most(min(stage.max_length or config.context, config.context))
    return training_plan(config, stage.loop, rows, length, 2 if pairs else answers, lora=stage.lora)


def with_references(plan: Plan, stage, config: ModelConfig) -> Plan:
    """`plan` with the start that a policy is compared with, which stays in memory, and its refreshed successor."""
    if stage.lora.rank:
        return plan  # the adapters' base, which is counted
    if stage.loop.offload_reference and getattr(stage.algorithm, "kl", "") != "full":
        return plan  # it is in the host's memory while the policy is updated
    references = 1 + bool(getattr(stage.algorithm, "ref_update_every", 0))
    size = jnp.dtype(config.param_dtype).itemsize * config.n_params
    return replace(plan, memory_bytes=plan.memory_bytes + references * size)


def _training_preferences(stage, ctx: StageContext, pairs: str) -> tuple[Count, int]:
    """(batch rows without the held-out ones, answers to each prompt), as well as can be told before the parent ran."""
    if stage.preferences and not finished(ctx.parents.get(stage.preferences)):
        parent = ctx.stages[stage.preferences]
        if not isinstance(parent, Preferences):
            return UNKNOWN, 2
        asked, k = local_rows(parent.prompts), parent.responses
        if asked is None:
            whole = at_most(count_rows(parent.prompts).n)
        else:
            whole = Count(len(split_by_prompt(asked, stage.eval_fraction)[0]), parent.too_long != "drop")
        # Ties make no pairs.
        return (at_most(whole.n * (k * (k - 1) // 2 if pairs == "all" else 1)) if pairs else whole), k
    if stage.data is not None:
        check_kind(stage.data, "preference", "data")
    rows = stored_preferences(ctx.parents[stage.preferences]) if stage.preferences else local_rows(stage.data)
    if rows is None:
        return at_most(count_rows(stage.data).n), 2
    if getattr(stage, "eval_data", None) is None:
        rows = split_by_prompt(rows, stage.eval_fraction)[0]
    answers = max(len(row["responses"]) for row in rows)
    if not pairs:
        return Count(len(rows)), answers
    ordered_pairs = (sum(a < b for a in row["ranks"] for b in row["ranks"]) for row in rows)
    return Count(sum(n if pairs == "all" else min(n, 1) for n in ordered_pairs)), answers
