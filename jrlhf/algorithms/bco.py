"""Binary classifier optimisation (Jung et al. 2024): single answers, each labelled desirable or not.

    L = -log sigmoid(r - δ) of a desirable answer, -log sigmoid(δ - r) of an undesirable one
    r = β [log π(y|x) - log ref(y|x)]

δ is the mean of r over all answers seen so far, those of the batch included (as in TRL; the paper's is the middle
between the two labels' means, the same where labels are balanced); no gradient. Log-probabilities are summed
over the answer. The optimum over answers that do not take all probability is r(y) = δ + log D(y)/U(y), D and U being
the data mass of desirable and undesirable labels: π ∝ ref·(D/U)^(1/β), the KL-regularised optimum for the log-odds of
being desirable. δ is at rest where those log-odds have mean 0 over the data; otherwise it drifts towards their sign.

Left out is the paper's underlying-distribution matching: where desirable and undesirable answers come from different
prompts, it weighs undesirable ones by p(desirable|x) / p(undesirable|x), from a classifier on embeddings of the
prompts by another model.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from jrlhf.config import UserError
from jrlhf.ops.pairs import LanguageModel, Optimizer
from jrlhf.ops.unpaired import UnpairedConfig, UnpairedRule, unpaired_algorithm
from jrlhf.ops.unpaired_losses import bco_loss, running_mean
from jrlhf.types import Algorithm


@dataclass(frozen=True)
class BCOConfig(UnpairedConfig):
    beta: float = 0.1  # strength of the KL constraint that the loss implies

    def __post_init__(self):
        if self.beta <= 0:
            raise UserError(f"beta must be positive, got {self.beta}")


def make_bco(config: BCOConfig, model: LanguageModel, optimizer: Optimizer) -> Algorithm:
    """Of UnpairedBatches; `init(params, ref_params, key)`. The state's `extra` holds the running mean."""

    def shift(extra, log_ratios, batch):
        rewards = config.beta * log_ratios(batch.answers)
        delta, count = running_mean(extra["delta"], extra["count"], rewards)
        return delta, {"delta": delta, "count": count}

    rule = UnpairedRule(
        config.beta,
        lambda ratios, labels, delta: bco_loss(ratios, labels, delta, config.beta),
        shift,
        reward_of_shift=1.0,
        extra=lambda: {"delta": jnp.float32(0.0), "count": jnp.float32(0.0)},
    )
    return unpaired_algorithm(rule, config, model, optimizer)
