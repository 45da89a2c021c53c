"""ORPO (Hong et al. 2024): supervised fine-tuning on the chosen answers and an odds ratio against the rejected ones.

    L = NLL(y_w) - lambda log sigmoid( log odds(y_w|x) - log odds(y_l|x) ),   odds = p / (1 - p)      (eq. 6, 7)

with p the geometric mean of the answer's token probabilities. No reference: it may start from a base model.
"""

from dataclasses import dataclass

import jax

from jrlhf.config import UserError
from jrlhf.ops.pairs import Answers, LanguageModel, PairConfig, pair_algorithm
from jrlhf.ops.preference_losses import log_odds, odds_ratio_loss
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm


@dataclass(frozen=True)
class ORPOConfig(PairConfig):
    odds_coef: float = 0.1  # lambda, the weight of the odds ratio; the NLL is a mean over the batch's tokens

    def __post_init__(self):
        if self.odds_coef <= 0:
            raise UserError(f"odds_coef must be positive, got {self.odds_coef}")

    def implicit_reward(self, answers: Answers) -> jax.Array:
        """The log-odds of each answer."""
        return log_odds(answers.mean_logps)


def make_orpo(config: ORPOConfig, model: LanguageModel, optimizer: Optimizer) -> Algorithm:
    """Of PairBatches, whose `ref_logprobs` are not read; `init(params, ref_params, key)` keeps no reference."""

    def loss(answers: Answers) -> jax.Array:
        mean = answers.mean_logps
        return answers.token_nll + config.odds_coef * odds_ratio_loss(mean[:, 0], mean[:, 1])

    return pair_algorithm(loss, config, model, optimizer)
