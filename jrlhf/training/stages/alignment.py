"""What the stages share that learn from preferences without a reward model, from pairs, rankings or single labels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from jrlhf.config import (
    PREFERENCES,
    REWARD_MODEL,
    Source,
    StageContext,
    UserError,
    did_you_mean,
    stage_ref,
    stage_ref_or_name,
)
from jrlhf.models.transformer import Model
from jrlhf.optim import OptimConfig
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.training.artifacts import Loaded
from jrlhf.training.evaluation import Probe, Sampler, prompt_slots
from jrlhf.training.rewards import make_reward
from jrlhf.training.stages.common import (
    FineTuningStage,
    TooLongPrompt,
    check_answers,
    check_microbatches,
    check_reward,
    fixed_reference,
    usable_prompts,
)
from jrlhf.training.stages.preferences import check_one_of


@dataclass(frozen=True)
class AlignmentStage(FineTuningStage):
    """A policy that learns from preferences alone; `algorithm` says how."""

    abstract: ClassVar[bool] = True

    preferences: str = stage_ref("", PREFERENCES)
    data: Source | None = None
    optim: OptimConfig = OptimConfig(lr=1e-4, schedule="cosine", warmup_steps=20)
    eval_fraction: float = 0.1  # of the prompts, held out
    eval_prompts: Source | None = None  # sampled from during training: an offline method drifts too
    sampling: SamplingConfig = SamplingConfig()  # for eval_prompts
    gold: str = stage_ref_or_name("", REWARD_MODEL)  # a reward, logged on eval_prompts
    max_length: int = 0
    too_long: TooLongPrompt = "error"

    def check_algorithm(self, known: dict[type, Callable], learns_from: str) -> None:
        if type(self.algorithm) not in known:  # type: ignore[attr-defined]  # every stage has its own kind
            name = type(self.algorithm).__name__  # type: ignore[attr-defined]
            hint = did_you_mean(name, [config.__name__ for config in known])
            raise UserError(f"algorithm: {name} is none that learns from {learns_from}.{hint}")

    def no_reference(self) -> str:
        return fixed_reference(self)

    def validate(self, stages):
        check_one_of(self)
        check_microbatches(self)
        self.check_adapters(stages)
        if not 0 < self.eval_fraction < 1:
            raise UserError(f"eval_fraction must be between 0 and 1, got {self.eval_fraction}")
        if self.gold:
            check_reward(self.gold, stages, "gold")
            if self.eval_prompts is None:
                raise UserError("gold is measured on samples: give eval_prompts")
        if self.eval_prompts is not None:
            if self.sampling.filtered:
                raise UserError(
                    "sampling: the KL to the start policy is measured on unfiltered samples; use temperature"
                )
            check_answers(self.start, stages, self.sampling, 0)

    def probe(
        self, ctx: StageContext, mesh: Mesh, policy: Loaded, trained: Model, key: jax.Array
    ) -> Callable[[Any, int], dict]:
        """(params, step) -> what samples on `eval_prompts` are like; nothing without such prompts."""
        if self.eval_prompts is None:
            return lambda params, step: {}
        room = policy.model.config.context - self.sampling.max_new_tokens
        rows, ids = usable_prompts(
            policy, self.eval_prompts, room, self.sampling, self.too_long, ctx, "eval_prompts"
        )
        sampler = Sampler(trained, policy.tokenizer, mesh, self.sampling, prompt_slots(ids))
        rewards = [make_reward(self.gold, dict(ctx.parents), mesh, policy.tokenizer)] if self.gold else []
        return Probe(ctx.folder, sampler, rows, ids, policy.params, rewards, key)
