"""Prompts by how often a policy solves them: those that it always or never solves teach it nothing."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import jax
import numpy as np

from jrlhf.config import (
    LANGUAGE_MODEL,
    PROMPTS,
    REWARD_MODEL,
    Source,
    StageContext,
    UserError,
    stage_ref,
    stage_ref_or_name,
)
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import load_model
from jrlhf.training.evaluation import score
from jrlhf.training.rewards import Texts, make_reward
from jrlhf.training.stages.common import (
    MeshStage,
    TooLongPrompt,
    check_answers,
    check_reward,
    sample_answers,
    start_config,
    write_text,
)
from jrlhf.training.stages.sizes import sampling_plan, usable

BINS = 10  # of the histogram


def write_rows(path, rows: Iterable[dict]) -> None:
    """As JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class Answered(NamedTuple):
    """Answers to P prompts, n to each, one prompt's after the other."""

    rows: list[dict]  # of the P prompts
    texts: Texts  # of the P n answers
    rewards: np.ndarray  # [P, n] float64
    ended: np.ndarray  # [P, n] bool


@dataclass(frozen=True)
class ScoredAnswers(MeshStage):
    """A stage that has a policy answer every prompt several times, and scores the answers by a reward."""

    abstract: ClassVar[bool] = True

    start: str = stage_ref(artifact=LANGUAGE_MODEL)
    reward: str = stage_ref_or_name(artifact=REWARD_MODEL)
    prompts: Source = field(kw_only=True)
    samples: int = 8  # per prompt
    sampling: SamplingConfig = SamplingConfig()
    max_prompt: int = 0  # longest prompt in tokens; 0: whatever fits the context
    too_long: TooLongPrompt = "error"

    def validate(self, stages):
        check_reward(self.reward, stages)
        if self.samples < 1:
            raise UserError(f"samples must be positive, got {self.samples}")
        check_answers(self.start, stages, self.sampling, self.max_prompt)

    def plan(self, ctx):
        rows, config = usable(self.prompts, self.too_long), start_config(ctx.stages, self.start)
        return sampling_plan(config, rows, rows.times(self.samples), self.sampling.max_new_tokens, 2)

    def answered(self, ctx: StageContext) -> Answered:
        mesh, n = make_mesh(ctx.mesh), self.samples
        with jax.set_mesh(mesh):
            policy = load_model(ctx.parents[self.start], mesh)
            reward = make_reward(self.reward, dict(ctx.parents), mesh, policy.tokenizer)
            rows, _, samples, texts = sample_answers(self, policy, ctx, n, (reward,))
            values = np.asarray(score(reward, samples, texts, mesh), np.float64)
        return Answered(rows, texts, values.reshape(-1, n), np.asarray(samples.ended).reshape(-1, n))


@dataclass(frozen=True)
class SolveRate(ScoredAnswers):
    """How often a policy solves each prompt, and the prompts that it solves neither too often nor too seldom. Leaves
    `prompts.jsonl`, of which each row has the field `solve_rate` (`Curriculum` can order by it).

    The share of `samples` answers whose reward is at least `right_at`; or, with None, their mean reward as it is. By
    few samples it is known roughly: of 8, one that solves half is seen at 0 or 1 once in 128 prompts, one that solves
    nine tenths at 1 in 43 of 100. Where groups are all right or all wrong there is nothing to learn from, which dynamic
    sampling (`resample_rounds`) sees in every step, at the price of the samples that it throws away; this filter does
    so once, for the policy that it starts from.
    """

    artifact: ClassVar[str] = PROMPTS

    right_at: float | None = 1.0
    low: float = 0.0  # rates kept, the ends included
    high: float = 1.0

    def validate(self, stages):
        super().validate(stages)
        if not self.low <= self.high:
            raise UserError(f"low {self.low} is above high {self.high}: no prompt would be kept")

    def run(self, ctx: StageContext) -> dict:
        done = self.answered(ctx)
        solved = done.rewards if self.right_at is None else done.rewards >= self.right_at
        rates = solved.mean(axis=1)
        kept = (rates >= self.low) & (rates <= self.high)
        if not kept.any():
            raise UserError(
                f"low {self.low} and high {self.high} keep none of {len(rates)} prompts: their rates go from "
                f"{rates.min():.3g} to {rates.max():.3g}"
            )
        write_rows(
            ctx.folder / "prompts.jsonl",
            (
                row | {"solve_rate": float(rate)}
                for row, rate, keep in zip(done.rows, rates, kept, strict=True)
                if keep
            ),
        )
        ends = (0.0, 1.0) if self.right_at is not None else None
        counts, edges = np.histogram(rates, BINS, ends)
        return {
            "prompts": len(rates),
            "kept": int(kept.sum()),
            "too_hard": int(np.sum(rates < self.low)),
            "too_easy": int(np.sum(rates > self.high)),
            "solve_rate": float(rates.mean()),
            "all_alike": float(np.mean(done.rewards.max(axis=1) == done.rewards.min(axis=1))),
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        }
