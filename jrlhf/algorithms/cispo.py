"""Clipped importance sampling policy optimisation (MiniMax-M1, 2025, eq. 4 and 5).

    A_i = (r_i - mean(r)) / std(r)                                              over the answers to a prompt
    L = -1/Σ|y_i| Σ_i Σ_t sg[ min(ρ_it, 1 + clip_high) ] A_i log π(y_it)

PPO's clip drops the gradient of rare tokens that became likelier; here every token keeps its gradient, and only its
importance weight is bounded, from above.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from jrlhf.ops.advantages import group_advantages, process_advantages
from jrlhf.ops.on_policy import (
    LanguageModel,
    Normalise,
    OnPolicyConfig,
    policy_gradient,
)
from jrlhf.ops.policy_losses import cispo_loss
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm


@dataclass(frozen=True)
class CISPOConfig(OnPolicyConfig):
    """The KL, penalties on scores, epochs and means are options of `OnPolicyConfig` (jrlhf/ops/on_policy.py)."""

    grouped: ClassVar[bool] = True
    token_rewards: ClassVar[bool] = True

    group_size: int = 8
    beta: float = 0.0
    normalise: Normalise = "token"
    minibatches: int = 4
    clip_high: float = (
        4.0  # the paper gives no number; Khatri et al. 2025 find 4 to 5 good, and little sensitivity
    )


def make_cispo(
    config: CISPOConfig, model: LanguageModel, optimizer: Optimizer, temperature: float = 1.0
) -> Algorithm:
    def advantages(rewards_BR, mask_BR, greedy_B):
        return group_advantages(rewards_BR.sum(axis=1), config.group_size, std=True)

    loss = partial(cispo_loss, clip=(1.0, config.clip_high))
    of_tokens = partial(process_advantages, group_size=config.group_size)
    return policy_gradient(config, advantages, loss, model, optimizer, temperature, of_tokens)
