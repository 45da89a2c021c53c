"""SimPO (Meng et al. 2024): the policy's own mean log-probability per token as the reward, and a margin; no reference.

    L = -log sigmoid( beta/|y_w| log pi(y_w|x) - beta/|y_l| log pi(y_l|x) - gamma )      (eq. 6)

With `nll_coef` it is CPO-SimPO: the chosen answers' NLL per token is added. With `alpha` it is AlphaPO (Gupta et al.
2025): the reward is beta (1 - p^-alpha) / alpha, where p is the geometric mean of the tokens' probabilities.
"""

from dataclasses import dataclass

import jax

from jrlhf.config import UserError
from jrlhf.ops.pairs import Answers, LanguageModel, PairConfig, pair_algorithm
from jrlhf.ops.preference_losses import alpha_reward, simpo_loss
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm


@dataclass(frozen=True)
class SimPOConfig(PairConfig):
    beta: float = 2.0  # scale of the reward; nothing holds the policy to its start
    gamma: float = (
        1.0  # target margin between the rewards, in the reward's unit (the paper tunes gamma / beta)
    )
    label_smoothing: float = 0.0  # probability that a label is flipped
    alpha: float = 0.0  # shape of the reward (AlphaPO); 0: the logarithm
    nll_coef: float = 0.0  # weight of the chosen answers' NLL, a mean over the batch's tokens

    def __post_init__(self):
        if self.beta <= 0:
            raise UserError(f"beta must be positive, got {self.beta}")
        if self.gamma < 0:
            raise UserError(f"gamma must be zero or more, got {self.gamma}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.nll_coef < 0:
            raise UserError(f"nll_coef must be zero or more, got {self.nll_coef}")

    def implicit_reward(self, answers: Answers) -> jax.Array:
        """beta times the mean log-probability per token (reshaped by alpha)."""
        return self.beta * alpha_reward(answers.mean_logps, self.alpha)


def make_simpo(config: SimPOConfig, model: LanguageModel, optimizer: Optimizer) -> Algorithm:
    """Of PairBatches, whose `ref_logprobs` are not read; `init(params, ref_params, key)` keeps no reference."""

    def loss(answers: Answers) -> jax.Array:
        reward = alpha_reward(answers.mean_logps, config.alpha)
        losses = simpo_loss(reward[:, 0], reward[:, 1], config.beta, config.gamma, config.label_smoothing)
        return losses + config.nll_coef * answers.token_nll if config.nll_coef else losses

    return pair_algorithm(loss, config, model, optimizer)
