"""Contrastive preference optimisation (Xu et al. 2024): DPO with a uniform reference, and the chosen answers' NLL.

    L = -log sigmoid( beta [ log pi(y_w|x) - log pi(y_l|x) ] ) + nll_coef NLL(y_w)      (eq. 5)

With `loss="hinge"` it is SLiC-HF (Zhao et al. 2023) with delta = 1 / beta and the chosen answers as its targets.
"""

from dataclasses import dataclass
from typing import Literal

import jax

from jrlhf.config import UserError
from jrlhf.ops.pairs import Answers, LanguageModel, PairConfig, pair_algorithm
from jrlhf.ops.preference_losses import LINKS, cpo_loss
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm


@dataclass(frozen=True)
class CPOConfig(PairConfig):
    beta: float = 0.1  # scale of the margin between the log-probabilities of whole answers
    nll_coef: float = 1.0  # weight of the chosen answers' NLL, a mean over the batch's tokens
    loss: Literal["sigmoid", "hinge"] = "sigmoid"
    label_smoothing: float = 0.0  # probability that a label is flipped

    def __post_init__(self):
        if self.beta <= 0:
            raise UserError(f"beta must be positive, got {self.beta}")
        if self.nll_coef < 0:
            raise UserError(f"nll_coef must be zero or more, got {self.nll_coef}")
        if self.loss not in ("sigmoid", "hinge"):
            raise UserError(f"loss must be 'sigmoid' or 'hinge', got {self.loss!r}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")

    def implicit_reward(self, answers: Answers) -> jax.Array:
        """beta times the log-probability of the whole answer."""
        return self.beta * answers.logps


def make_cpo(config: CPOConfig, model: LanguageModel, optimizer: Optimizer) -> Algorithm:
    """Of PairBatches, whose `ref_logprobs` are not read; `init(params, ref_params, key)` keeps no reference."""

    def loss(answers: Answers) -> jax.Array:
        chosen, rejected = answers.logps[:, 0], answers.logps[:, 1]
        losses = cpo_loss(chosen, rejected, config.beta, LINKS[config.loss], config.label_smoothing)
        return losses + config.nll_coef * answers.token_nll

    return pair_algorithm(loss, config, model, optimizer)
