"""Group relative policy optimisation, as published (DeepSeekMath, Shao et al. 2024, eq. 3 and 4).

    A_i = (r_i - mean(r)) / std(r)                                              over the answers to a prompt
    L = -1/G Σ_i 1/|y_i| Σ_t [ min(ρ_it A_i, clip(ρ_it, 1 ± clip) A_i) - beta · k3_it ]

Its fixed point is not that of E[r] - beta·KL(π‖ref): the division by the group's spread, the mean over each answer's
own tokens, and k3 in the loss (whose gradient is that of the forward KL) all move it (docs/algorithms.md). With
`scale="none"`, `kl="reward"` and `normalise="sum"` it optimises that objective.

Where steps are rewarded, a token's advantage is the sum of the normalised rewards of the steps from it on (section
4.1.3); with another `scale` the answer's advantage less what was earned before the token (docs/step-rewards.md).
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import jax.numpy as jnp

from jrlhf.ops.advantages import advantages_to_go, group_advantages, process_advantages
from jrlhf.ops.on_policy import (
    KL,
    LanguageModel,
    Normalise,
    OnPolicyConfig,
    policy_gradient,
)
from jrlhf.ops.policy_losses import clipped_loss
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm


@dataclass(frozen=True)
class GRPOConfig(OnPolicyConfig):
    """The KL, penalties on scores, epochs and means are options of `OnPolicyConfig` (jrlhf/ops/on_policy.py)."""

    grouped: ClassVar[bool] = True
    token_rewards: ClassVar[bool] = True

    group_size: int = 8
    beta: float = 0.04
    kl: KL = "k3"
    normalise: Normalise = "sequence"
    clip: float = 0.2
    scale: Literal["group", "batch", "none"] = "group"  # whose standard deviation advantages are divided by


def make_grpo(
    config: GRPOConfig, model: LanguageModel, optimizer: Optimizer, temperature: float = 1.0
) -> Algorithm:
    def scale(rewards_BR):
        return jnp.std(rewards_BR.sum(axis=1), ddof=1) + 1e-4 if config.scale == "batch" else 1.0

    def advantages(rewards_BR, mask_BR, greedy_B):
        std = config.scale == "group"
        return group_advantages(rewards_BR.sum(axis=1), config.group_size, std) / scale(rewards_BR)

    def token_advantages(rewards_BR, mask_BR, steps_BR):
        if config.scale == "group":
            return process_advantages(rewards_BR, mask_BR, steps_BR, config.group_size)
        whole_B = group_advantages(rewards_BR.sum(axis=1), config.group_size, std=False)
        return advantages_to_go(whole_B, rewards_BR, mask_BR) / scale(rewards_BR)

    loss = partial(clipped_loss, clip=config.clip)
    return policy_gradient(config, advantages, loss, model, optimizer, temperature, token_advantages)
