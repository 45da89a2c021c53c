"""REINFORCE++ (Hu 2025): PPO's clip and token rewards without its critic, normalised over the whole batch.

    A_it = (R_it - mean) / std over the batch's tokens,     R_it = r_i - beta Σ_{s≥t} log(π(y_is)/ref(y_is))
    L = -1/Σ|y_i| Σ_i Σ_t min(ρ_it A_it, clip(ρ_it, 1 ± clip) A_it)

With `group_baseline` (the paper's REINFORCE++-baseline) the mean reward of a prompt's answers is subtracted first;
the paper then has k2 in the loss instead of the penalty in the reward. One number is subtracted from all tokens and
divides them all, so the optimum is that of E[r] - beta·KL(π‖ref), but for the small part of the batch's mean that an
answer makes itself.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax.numpy as jnp

from jrlhf.config import UserError
from jrlhf.ops.advantages import reward_to_go
from jrlhf.ops.masking import masked_whiten
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
class REINFORCEPlusPlusConfig(OnPolicyConfig):
    """The KL, penalties on scores, epochs and means are options of `OnPolicyConfig` (jrlhf/ops/on_policy.py)."""

    token_rewards: ClassVar[bool] = True

    beta: float = 0.01
    normalise: Normalise = "token"
    minibatches: int = 4
    clip: float = 0.2
    group_baseline: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.group_baseline and self.group_size < 2:
            raise UserError(f"group_size must be at least 2 with group_baseline, got {self.group_size}")


def make_reinforce_plus_plus(
    config: REINFORCEPlusPlusConfig, model: LanguageModel, optimizer: Optimizer, temperature: float = 1.0
) -> Algorithm:
    def advantages(rewards_BR, mask_BR, greedy_B):
        to_go_BR = reward_to_go(rewards_BR, mask_BR)
        if config.group_baseline:
            groups = rewards_BR.sum(axis=1).reshape(-1, config.group_size)
            to_go_BR = to_go_BR - jnp.repeat(groups.mean(axis=1), config.group_size)[:, None]
        return masked_whiten(to_go_BR, mask_BR)

    loss = partial(clipped_loss, clip=config.clip)
    return policy_gradient(config, advantages, loss, model, optimizer, temperature)
