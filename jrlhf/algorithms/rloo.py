"""REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024, "Back to basics", eq. 8).

    A_i = R_i - mean of the other answers' R                                    over the answers to a prompt
    L = -1/G Σ_i min(ρ_i A_i, clip(ρ_i, 1 ± clip) A_i),     ρ_i = π(y_i)/π_old(y_i),  R_i = r_i - beta log(π/ref)

An answer is one action. On the samples' own policy the gradient is that of REINFORCE, -A_i ∇log π(y_i), unbiased; the
clip matters from the second minibatch on. The optimum is that of E[r] - beta·KL(π‖ref).
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from jrlhf.ops.advantages import rloo_advantages
from jrlhf.ops.on_policy import (
    LanguageModel,
    Normalise,
    OnPolicyConfig,
    policy_gradient,
)
from jrlhf.ops.policy_losses import sequence_clipped_loss
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm


@dataclass(frozen=True)
class RLOOConfig(OnPolicyConfig):
    """The KL, penalties on scores, epochs and means are options of `OnPolicyConfig` (jrlhf/ops/on_policy.py)."""

    grouped: ClassVar[bool] = True
    whole_answers: ClassVar[bool] = True

    group_size: int = 4
    beta: float = 0.05
    normalise: Normalise = "sequence"
    clip: float = 0.2


def make_rloo(
    config: RLOOConfig, model: LanguageModel, optimizer: Optimizer, temperature: float = 1.0
) -> Algorithm:
    def advantages(rewards_BR, mask_BR, greedy_B):
        return rloo_advantages(rewards_BR.sum(axis=1), config.group_size)

    loss = partial(sequence_clipped_loss, clip=config.clip)
    return policy_gradient(config, advantages, loss, model, optimizer, temperature)
