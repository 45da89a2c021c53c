"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024): single answers, each labelled desirable or not.

    L = λ_D·(1 - sigmoid(β (r - z0)))  of a desirable answer                                                   (eq. 8)
        λ_U·(1 - sigmoid(β (z0 - r)))  of an undesirable one,     r = log π(y|x) - log ref(y|x)
    z0 = max(0, mean of log π(y'|x) - log ref(y'|x)) over the batch, y' an answer to another prompt; no gradient

Log-probabilities are summed over the answer. The loss saturates: an answer far on either side of z0 is left alone, so
that a contradicted label is given up rather than fitted. At a stationary point, with data mass D(y) and U(y) of
desirable and undesirable answers to a prompt and c = λ_D·D - λ_U·U: π(y) ∝ c(y)·sigmoid'(β(r(y) - z0)) where c > 0, and
π(y) = 0 elsewhere, unseen answers included.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from jrlhf.config import UserError
from jrlhf.ops.pairs import LanguageModel, Optimizer
from jrlhf.ops.unpaired import UnpairedConfig, UnpairedRule, unpaired_algorithm
from jrlhf.ops.unpaired_losses import kto_loss, kto_reference_point
from jrlhf.types import Algorithm


@dataclass(frozen=True)
class KTOConfig(UnpairedConfig):
    beta: float = 0.1  # strength of the KL constraint: how soon the loss saturates
    desirable_weight: float = 1.0  # λ_D. The paper's rule: λ_D·n_D / (λ_U·n_U) between 1 and 4/3
    undesirable_weight: float = 1.0  # λ_U
    # "zero": z0 = 0 (APO-zero on unpaired labels), for data better than what the start would write
    reference_point: Literal["kl", "zero"] = "kl"

    def __post_init__(self):
        if self.beta <= 0:
            raise UserError(f"beta must be positive, got {self.beta}")
        for name in ("desirable_weight", "undesirable_weight"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def mismatched(self) -> bool:
        return self.reference_point == "kl"


def make_kto(config: KTOConfig, model: LanguageModel, optimizer: Optimizer) -> Algorithm:
    """Of UnpairedBatches, with mismatched answers if `config.mismatched`; `init(params, ref_params, key)`."""

    def shift(extra, log_ratios, batch):
        if not config.mismatched:
            return jnp.float32(0.0), extra
        return kto_reference_point(log_ratios(batch.mismatched)), extra

    def loss(ratios, labels, z0):
        return kto_loss(ratios, labels, z0, config.beta, config.desirable_weight, config.undesirable_weight)

    rule = UnpairedRule(config.beta, loss, shift, reward_of_shift=config.beta)
    return unpaired_algorithm(rule, config, model, optimizer)
