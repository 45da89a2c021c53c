"""DPO on whole rankings, ties included: the reward model's likelihoods, on the reward that the policy implies.

    r(x, y) = beta [ log pi(y|x) - log ref(y|x) ]

- "plackett_luce": K-wise DPO (Rafailov et al. 2023, appendix A.3, eq. 20): the best is drawn from all answers, then the
  best of the rest. Each of several tied answers is drawn against all of them (Breslow).
- "bradley_terry": the mean over all pairs of a ranking; a tied pair has a target probability of 1/2.
- "rao_kupper", "davidson": DPO-RK and DPO-D (Chen et al. 2024, "On extending DPO to accommodate ties"), in which a tie
  has a probability of its own, largest between equal rewards.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jrlhf.config import UserError, did_you_mean
from jrlhf.ops.pairs import Answers, LanguageModel, ReferencedPairConfig, pair_algorithm
from jrlhf.ops.reward_losses import kwise_bradley_terry_loss, plackett_luce_loss
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm

Likelihood = Literal["plackett_luce", "bradley_terry", "rao_kupper", "davidson"]


@dataclass(frozen=True)
class RankedDPOConfig(ReferencedPairConfig):
    learns_from = "rankings"

    beta: float = 0.1  # strength of the KL constraint that the loss implies
    likelihood: Likelihood = "plackett_luce"
    # Rao-Kupper, Davidson: how often equally good answers tie (1/2: nu = 3 and nu = 1, as in the paper)
    tie_rate: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if self.beta <= 0:
            raise UserError(f"beta must be positive, got {self.beta}")
        if self.likelihood not in get_args(Likelihood):
            hint = did_you_mean(self.likelihood, get_args(Likelihood))
            raise UserError(f"likelihood {self.likelihood!r} is unknown.{hint}")
        if not 0 < self.tie_rate < 1:
            raise UserError(f"tie_rate must be between 0 and 1, got {self.tie_rate}")

    def implicit_reward(self, answers: Answers) -> jax.Array:
        """beta log(pi/ref) of the whole answer."""
        return self.beta * answers.ratios


def make_ranked_dpo(config: RankedDPOConfig, model: LanguageModel, optimizer: Optimizer) -> Algorithm:
    """Of RankedBatches; `init(params, ref_params, key)`. The loss is a mean over prompts."""
    rate = config.tie_rate

    def loss(answers: Answers) -> jax.Array:
        rewards, ranks = config.beta * answers.ratios, jnp.asarray(answers.ranks)
        match config.likelihood:
            case "plackett_luce":
                return plackett_luce_loss(rewards, ranks)
            case "bradley_terry":
                return kwise_bradley_terry_loss(rewards, ranks)[0]
            case "rao_kupper":
                log_theta = math.log((1 + rate) / (1 - rate))
                return kwise_bradley_terry_loss(rewards, ranks, ties="rao_kupper", tie_parameter=log_theta)[0]
            case "davidson":
                log_nu = math.log(2 * rate / (1 - rate))
                return kwise_bradley_terry_loss(rewards, ranks, ties="davidson", tie_parameter=log_nu)[0]

    return pair_algorithm(loss, config, model, optimizer)
