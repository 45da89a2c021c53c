"""DAPO: decoupled clip and dynamic sampling policy optimisation (Yu et al. 2025, eq. 8 to 13).

    A_i = (r_i - mean(r)) / std(r)                                              over the answers to a prompt
    L = -1/Σ|y_i| Σ_i Σ_t min(ρ_it A_i, clip(ρ_it, 1 - clip_low, 1 + clip_high) A_i)

Four changes to GRPO, and no KL penalty: the upper clip is further away (clip-higher), every token counts alike,
prompts whose answers all score the same are replaced by fresh ones until the batch is full (`resample_rounds`; the
driver samples again), and answers near the length limit are punished softly (`overlong_buffer`).
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
from jrlhf.ops.policy_losses import clipped_loss
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm


@dataclass(frozen=True)
class DAPOConfig(OnPolicyConfig):
    """The KL, penalties on scores, epochs and means are options of `OnPolicyConfig` (jrlhf/ops/on_policy.py)."""

    grouped: ClassVar[bool] = True
    token_rewards: ClassVar[bool] = True

    group_size: int = 8
    beta: float = 0.0
    normalise: Normalise = "token"
    minibatches: int = 4  # 16 in the paper; with one there is nothing to clip
    clip_low: float = 0.2
    clip_high: float = 0.28
    resample_rounds: int = 10
    overlong_buffer: float = 0.2  # 4,096 of 20,480 tokens in the paper


def make_dapo(
    config: DAPOConfig, model: LanguageModel, optimizer: Optimizer, temperature: float = 1.0
) -> Algorithm:
    def advantages(rewards_BR, mask_BR, greedy_B):
        return group_advantages(rewards_BR.sum(axis=1), config.group_size, std=True)

    loss = partial(clipped_loss, clip=(config.clip_low, config.clip_high))
    of_tokens = partial(process_advantages, group_size=config.group_size)
    return policy_gradient(config, advantages, loss, model, optimizer, temperature, of_tokens)
