"""A reward as the chance to beat the start policy's own answers to the same prompt."""

import json
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import numpy as np

from jrlhf.config import (
    LANGUAGE_MODEL,
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
from jrlhf.training.rewards import SHAPED, Shape, fault_rates, make_reward, on_host_scores, reference_key
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


@dataclass(frozen=True)
class Shaped(MeshStage):
    """The reward `reward`, seen from the M answers of `start` to the same prompt (`rewards.shape_scores`):

    "sigmoid": mean over m of sigmoid(r - r_m), in (0, 1): "Preference As Reward" of Fu et al. 2025 (arXiv 2502.18770).
    "log_sigmoid": mean over m of log sigmoid(r - r_m), below 0. With one reference: u = log sigmoid(r - r_ref(x)) of
    Wang et al. 2024 (arXiv 2402.00742), who choose the one r_ref of a prompt where here it is drawn.

    Far above the references neither grows any more; far below them the first is flat, too, and the second has the slope
    of `reward`. When all rewards of a prompt move by a constant, nothing changes.

    `prompts` are all that will ever be scored, those of evaluations too: any other is a UserError, never a guess. One
    that comes several times has the references of all its rows.

    Leaves `shaped.json`; no parameter is copied. What `reward` could not score has the value that its config gives,
    among the references too.
    """

    artifact: ClassVar[str] = REWARD_MODEL

    reward: str = stage_ref_or_name(artifact=REWARD_MODEL)
    start: str = stage_ref(artifact=LANGUAGE_MODEL)  # whose answers are the references
    prompts: Source = field(kw_only=True)
    samples: int = 1  # references: answers to each row of `prompts`
    shape: Shape = "sigmoid"
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

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            policy = load_model(ctx.parents[self.start], mesh)
            reward = make_reward(self.reward, dict(ctx.parents), mesh, policy.tokenizer)
            rows, _, samples, texts = sample_answers(self, policy, ctx, self.samples, (reward,))
            said = on_host_scores(reward, samples, texts, mesh)
        scores = np.asarray(said.total, np.float64).reshape(len(rows), self.samples)
        of_prompt: dict[str, list[float]] = {}
        for row, some in zip(rows, scores.tolist(), strict=True):
            of_prompt.setdefault(reference_key(row), []).extend(some)
        known = self.reward in ctx.parents
        note = {
            "stage" if known else "program": ctx.parents[self.reward].name if known else self.reward,
            "shape": self.shape,
            "references": of_prompt,
        }
        write_text(ctx.folder / SHAPED, json.dumps(note))
        results: dict = {
            "prompts": len(of_prompt),
            "mean": float(scores.mean()),
            "std": float(scores.std()),
        }
        if min(scores.shape) > 1:
            results["between_prompts"] = share_between(scores)
        if rates := fault_rates(reward.name, said, ctx.console):
            results["unscored"] = rates
        return results


def share_between(scores: np.ndarray) -> float:
    """The share of the variance of scores [P, M] that is between the P prompts rather than within them: the intraclass
    correlation by one-way analysis of variance, in [0, 1]; P and M at least 2. Near 0 a reference for each prompt tells
    no more than one for all; near 1 most of what the unshaped reward says is which prompt it was."""
    within = float(np.mean(np.var(scores, axis=1, ddof=1)))
    between = max(float(np.var(scores.mean(axis=1), ddof=1)) - within / scores.shape[1], 0.0)
    return between / (between + within) if between else 0.0
