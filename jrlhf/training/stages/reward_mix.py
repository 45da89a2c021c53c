"""Several rewards as one, each logged by itself."""

import json
import math
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import numpy as np

from jrlhf.config import (
    LANGUAGE_MODEL,
    ORDERED,
    REWARD_MODEL,
    Source,
    StageContext,
    UserError,
    stage_ref,
    stage_ref_or_name,
)
from jrlhf.metrics import DRIVER_REWARDS
from jrlhf.ops.mixing import Mixing
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import load_model
from jrlhf.training.rewards import MIX, check_groups, fault_rates, group_numbers, make_reward, scores_of_rows
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
from jrlhf.types import Plan


@dataclass(frozen=True)
class Part:
    reward: str = stage_ref_or_name(artifact=REWARD_MODEL)
    weight: float = 1.0
    gate: float | None = None  # of how "gates": below it, the parts that follow count for nothing


@dataclass(frozen=True)
class RewardMix(MeshStage):
    """Several rewards as one: their weighted sum, product, minimum, a sum that stops at the first gate that an answer
    does not pass, or the part that the field `group` of a prompt's row names (`ops.mixing.mix_scores`).

    Every part is logged under its name. With `start` and `prompts` each is first normalised to mean 0 and std 1 over
    that policy's answers, so that weights compare rewards of different scales. Leaves `mix.json`; no parameter is
    copied.
    """

    artifact: ClassVar[str] = REWARD_MODEL

    parts: dict[str, Part] = field(kw_only=True, metadata=ORDERED)  # "gates" goes through them in order
    how: Mixing = "sum"
    start: str = stage_ref("", LANGUAGE_MODEL)  # whose answers the parts are normalised on
    prompts: Source | None = None
    samples: int = 1  # to each of these prompts
    sampling: SamplingConfig = SamplingConfig()
    max_prompt: int = 0
    too_long: TooLongPrompt = "error"

    def validate(self, stages):
        if len(self.parts) < 2:
            raise UserError(f"parts: a mix has at least 2, got {len(self.parts)}")
        for name, part in self.parts.items():
            if "/" in name or name in DRIVER_REWARDS:
                raise UserError(
                    f"parts: {name!r} cannot name a part, for reward/{name}/mean is something else"
                )
            check_reward(part.reward, stages, f"parts.{name}.reward")
            if not math.isfinite(part.weight) or part.weight == 0:
                raise UserError(f"parts.{name}.weight is {part.weight}; it must be a finite number, not 0")
            if part.gate is not None and self.how != "gates":
                raise UserError(f"parts.{name}.gate is only read with how 'gates', not {self.how!r}")
            if part.gate is not None and not math.isfinite(part.gate):
                raise UserError(f"parts.{name}.gate is {part.gate}; it must be a finite number")
            if self.how == "product" and part.weight < 0:
                raise UserError(
                    f"parts.{name}.weight is {part.weight}: in a product it is an exponent above 0"
                )
        if self.how == "gates" and all(part.gate is None for part in self.parts.values()):
            raise UserError("how 'gates': no part has a gate; give one, or take how 'sum'")
        if bool(self.start) != (self.prompts is not None):
            raise UserError("start (a policy) and prompts, on which parts are normalised, go together")
        if self.start:
            if self.how == "product":
                raise UserError(
                    "how 'product' multiplies rewards that are not negative: leave start and prompts out"
                )
            if self.samples < 1:
                raise UserError(f"samples must be positive, got {self.samples}")
            check_answers(self.start, stages, self.sampling, self.max_prompt)

    def plan(self, ctx):
        if self.prompts is None:
            return Plan()
        rows, config = usable(self.prompts, self.too_long), start_config(ctx.stages, self.start)
        return sampling_plan(config, rows, rows.times(self.samples), self.sampling.max_new_tokens, 1)

    def run(self, ctx: StageContext) -> dict:
        moments = self._moments(ctx) if self.prompts is not None else {}
        parts = {}
        for name, part in self.parts.items():
            known = part.reward in ctx.parents
            parts[name] = {
                "stage" if known else "program": ctx.parents[part.reward].name if known else part.reward,
                "weight": part.weight,
                "gate": part.gate,
                **moments.get(name, {"mean": 0.0, "std": 1.0}),
            }
        write_text(ctx.folder / MIX, json.dumps({"how": self.how, "parts": parts}))
        return {"normalization": moments}

    def _moments(self, ctx: StageContext) -> dict[str, dict[str, float]]:
        """Mean and std of each part over answers of `start`."""
        assert self.prompts is not None
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            policy = load_model(ctx.parents[self.start], mesh)
            rewards = {
                name: make_reward(part.reward, dict(ctx.parents), mesh, policy.tokenizer)
                for name, part in self.parts.items()
            }
            by_group = self.how == "by_group"
            asked = [*rewards.values()]
            if by_group:
                asked = [asked[0]._replace(check=check_groups(ctx.name, rewards))]
            _, _, samples, texts = sample_answers(self, policy, ctx, self.samples, asked)
            chosen = group_numbers(ctx.name, [*rewards], texts.rows) if by_group else None
            found = {}
            for n, (name, reward) in enumerate(rewards.items()):
                mine = np.arange(len(texts.rows)) if chosen is None else np.flatnonzero(chosen == n)
                if not len(mine):
                    raise UserError(
                        f"parts.{name}: no prompt has this group, so that it cannot be normalised"
                    )
                said = scores_of_rows(reward, samples, texts, mine, mesh)
                fault_rates(reward.name, said, ctx.console)
                values = np.asarray(said.total, np.float64)
                if values.std() < 1e-6:
                    raise UserError(
                        f"parts.{name}: {reward.name!r} gives every answer of {self.start!r} the same reward, "
                        f"{values[0]:g}, so that it cannot be normalised on them; leave start and prompts out, and "
                        "let weights make up for scales"
                    )
                found[name] = {"mean": float(values.mean()), "std": float(values.std())}
        return found
