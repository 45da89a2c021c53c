"""ReMax (Li et al. 2024, eq. 5): REINFORCE whose baseline is the reward of the greedy answer to the same prompt.

    L = -1/B Σ_i Σ_t (R_it - r(greedy_i)) log π(y_it),       R_it = r_i - beta Σ_{s≥t} log(π(y_is)/ref(y_is))

The driver samples the greedy answers too: twice the sampling of REINFORCE, and no critic. Each batch is used once.
The optimum is that of E[r] - beta·KL(π‖ref).
"""

from dataclasses import dataclass
from typing import ClassVar

from jrlhf.config import UserError
from jrlhf.ops.advantages import reward_to_go
from jrlhf.ops.on_policy import LanguageModel, Normalise, OnPolicyConfig, policy_gradient
from jrlhf.ops.policy_losses import reinforce_loss
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm


@dataclass(frozen=True)
class ReMaxConfig(OnPolicyConfig):
    """The KL, penalties on scores, epochs and means are options of `OnPolicyConfig` (jrlhf/ops/on_policy.py)."""

    greedy_baseline: ClassVar[bool] = True
    token_rewards: ClassVar[bool] = True

    beta: float = 0.05
    normalise: Normalise = "sum"

    def __post_init__(self):
        super().__post_init__()
        if self.epochs * self.minibatches > 1:
            raise UserError(
                "epochs and minibatches must be 1: ReMax has no ratio that corrects for old samples"
            )


def make_remax(
    config: ReMaxConfig, model: LanguageModel, optimizer: Optimizer, temperature: float = 1.0
) -> Algorithm:
    def advantages(rewards_BR, mask_BR, greedy_B):
        return reward_to_go(rewards_BR, mask_BR) - greedy_B[:, None]

    return policy_gradient(config, advantages, reinforce_loss, model, optimizer, temperature)
