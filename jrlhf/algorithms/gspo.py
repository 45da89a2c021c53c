"""Group sequence policy optimisation (Zheng et al. 2025, eq. 5 to 7).

    A_i = (r_i - mean(r)) / std(r)                                              over the answers to a prompt
    L = -1/G Σ_i min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i),      s_i = (π(y_i) / π_old(y_i))^(1/|y_i|)

An answer is clipped as a whole, by the geometric mean of its tokens' ratios; hence the narrow clip. The ratios leave
1 only after the first minibatch, so a batch is cut into several.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from jrlhf.ops.advantages import group_advantages
from jrlhf.ops.on_policy import (
    LanguageModel,
    Normalise,
    OnPolicyConfig,
    policy_gradient,
)
from jrlhf.ops.policy_losses import gspo_loss
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm


@dataclass(frozen=True)
class GSPOConfig(OnPolicyConfig):
    """The KL, penalties on scores, epochs and means are options of `OnPolicyConfig` (jrlhf/ops/on_policy.py)."""

    grouped: ClassVar[bool] = True
    whole_answers: ClassVar[bool] = True

    group_size: int = 8
    beta: float = 0.0
    normalise: Normalise = "sequence"
    minibatches: int = 4
    clip_low: float = 3e-4
    clip_high: float = 4e-4


def make_gspo(
    config: GSPOConfig, model: LanguageModel, optimizer: Optimizer, temperature: float = 1.0
) -> Algorithm:
    def advantages(rewards_BR, mask_BR, greedy_B):
        return group_advantages(rewards_BR.sum(axis=1), config.group_size, std=True)

    loss = partial(gspo_loss, clip=(config.clip_low, config.clip_high))
    return policy_gradient(config, advantages, loss, model, optimizer, temperature)
