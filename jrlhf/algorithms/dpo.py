"""Direct preference optimisation (Rafailov et al. 2023).

    L = -log sigmoid( beta [ (log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x)) ] )      (eq. 7)

Log-probabilities are summed over the answer (a mean would have another optimum).
"""

from dataclasses import dataclass

from jrlhf.config import UserError
from jrlhf.ops.losses import dpo_loss
from jrlhf.ops.pairs import LanguageModel, PairConfig, pair_algorithm
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm, Array


@dataclass(frozen=True)
class DPOConfig(PairConfig):
    beta: float = 0.1  # strength of the KL constraint that the loss implies
    label_smoothing: float = 0.0  # conservative DPO: probability that a label is flipped

    def __post_init__(self):
        if self.beta <= 0:
            raise UserError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")


def make_dpo(config: DPOConfig, model: LanguageModel, optimizer: Optimizer) -> Algorithm:
    """Of PairBatches; `init(params, ref_params, key)`."""

    def loss(logp_B2: Array, ref_B2: Array):
        policy_chosen, policy_rejected = logp_B2[:, 0], logp_B2[:, 1]
        ref_chosen, ref_rejected = ref_B2[:, 0], ref_B2[:, 1]
        return dpo_loss(
            policy_chosen, policy_rejected, ref_chosen, ref_rejected, config.beta, config.label_smoothing
        )

    return pair_algorithm(loss, config, model, optimizer)
