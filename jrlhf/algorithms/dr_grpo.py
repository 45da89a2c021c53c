"""Dr. GRPO: GRPO "done right" (Liu et al. 2025, "Understanding R1-Zero-like training", section 3.2).

    A_i = r_i - mean(r)                                                         over the answers to a prompt
    L = -1/G Σ_i 1/slots Σ_t min(ρ_it A_i, clip(ρ_it, 1 ± clip) A_i)

Without the division by the group's spread (which favours prompts that are nearly solved or nearly hopeless) and by the
answer's own length (which favours long wrong answers). The published recipe has no KL penalty; with `beta` it is in the
reward, and the optimum is that of E[r] - beta·KL(π‖ref).
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from jrlhf.ops.advantages import advantages_to_go, group_advantages
from jrlhf.ops.on_policy import (
    LanguageModel,
    Normalise,
    OnPolicyConfig,
    policy_gradient,
)
from jrlhf.ops.policy_losses import clipped_loss
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm


@dataclass(frozen=True)
class DrGRPOConfig(OnPolicyConfig):
    """The KL, penalties on scores, epochs and means are options of `OnPolicyConfig` (jrlhf/ops/on_policy.py)."""

    grouped: ClassVar[bool] = True
    token_rewards: ClassVar[bool] = True

    group_size: int = 8
    beta: float = 0.0
    normalise: Normalise = "constant"
    clip: float = 0.2


def make_dr_grpo(
    config: DrGRPOConfig, model: LanguageModel, optimizer: Optimizer, temperature: float = 1.0
) -> Algorithm:
    def advantages(rewards_BR, mask_BR, greedy_B):
        return group_advantages(rewards_BR.sum(axis=1), config.group_size, std=False)

    def token_advantages(rewards_BR, mask_BR, steps_BR):
        return advantages_to_go(advantages(rewards_BR, mask_BR, None), rewards_BR, mask_BR)

    loss = partial(clipped_loss, clip=config.clip)
    return policy_gradient(config, advantages, loss, model, optimizer, temperature, token_advantages)
