"""REINFORCE with a baseline (Williams 1992).

    L = -1/B Σ_i Σ_t (R_i - b_i) log π(y_it),        R_i = r_i - beta log(π(y_i)/ref(y_i))

The baseline b_i is the mean of the batch's other rewards, whatever their prompts, so that the gradient stays
unbiased; one answer to each prompt is enough. Each batch is used once: there is no ratio. The optimum is that of E[r]
- beta·KL(π‖ref).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jrlhf.config import UserError
from jrlhf.ops.advantages import advantages_to_go, leave_one_out_advantages
from jrlhf.ops.on_policy import LanguageModel, Normalise, OnPolicyConfig, policy_gradient
from jrlhf.ops.policy_losses import reinforce_loss
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm


@dataclass(frozen=True)
class REINFORCEConfig(OnPolicyConfig):
    """The KL, penalties on scores, epochs and means are options of `OnPolicyConfig` (jrlhf/ops/on_policy.py)."""

    token_rewards: ClassVar[bool] = True

    beta: float = 0.05
    normalise: Normalise = "sum"
    baseline: Literal["batch", "none"] = "batch"

    def __post_init__(self):
        super().__post_init__()
        if self.epochs * self.minibatches > 1:
            raise UserError(
                "epochs and minibatches must be 1: REINFORCE has no ratio that corrects for old samples"
            )


def make_reinforce(
    config: REINFORCEConfig, model: LanguageModel, optimizer: Optimizer, temperature: float = 1.0
) -> Algorithm:
    def advantages(rewards_BR, mask_BR, greedy_B):
        rewards_B = rewards_BR.sum(axis=1)
        return leave_one_out_advantages(rewards_B) if config.baseline == "batch" else rewards_B

    def token_advantages(rewards_BR, mask_BR, steps_BR):
        return advantages_to_go(advantages(rewards_BR, mask_BR, None), rewards_BR, mask_BR)

    return policy_gradient(
        config, advantages, reinforce_loss, model, optimizer, temperature, token_advantages
    )
