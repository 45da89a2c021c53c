"""Direct preference optimisation (Rafailov et al. 2023) and the losses that share its data, reference and reward.

    L = -log sigmoid( beta [ (log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x)) ] )      (eq. 7)

Log-probabilities are summed over the answer (a mean would have another optimum). `loss` names another function of the
same log-ratios (`ops/preference_losses.py`, each with its equation); the other fields may be combined with any of them
except where an error says otherwise.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jrlhf.config import UserError, did_you_mean
from jrlhf.ops.pairs import Answers, LanguageModel, ReferencedPairConfig, When, pair_algorithm
from jrlhf.ops.preference_losses import (
    DIVERGENCES,
    LINKS,
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    dpo_loss,
    exo_pair_loss,
    ipo_loss,
    link_loss,
    nca_pair_loss,
    robust_dpo_loss,
    sppo_hard_loss,
    wpo_weight,
)
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm

Loss = Literal[
    "sigmoid", "hinge", "exponential", "square", "discopop",  # a link function of the margin
    "ipo", "robust", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down",
    "aot", "aot_unpaired",
]  # fmt: skip
Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon"]
COUPLED = ("aot", "aot_unpaired")  # rows of a batch are sorted
FLIPPED = ("robust", "exo_pair")  # need to know how often labels are flipped
SMOOTHED = (*LINKS, *COUPLED)  # can be told
OF_REWARDS = (*LINKS, "ipo", *FLIPPED)  # of the difference between two implicit rewards alone


@dataclass(frozen=True)
class DPOConfig(ReferencedPairConfig):
    beta: float = 0.1  # strength of the KL constraint that the loss implies (IPO's tau)
    label_smoothing: float = 0.0  # probability that a label is flipped (conservative or robust DPO, EXO)

    _: KW_ONLY

    loss: Loss = "sigmoid"
    divergence: Divergence = "reverse_kl"  # that is constrained (f-DPO)
    length_normalized: bool = False  # log-probabilities per token, not of the answer
    reference_free: bool = False  # as if the reference found all answers alike
    rpo_alpha: float = 0.0  # weight of the chosen answer's NLL per token (RPO)
    wpo: bool = False  # weigh pairs by how likely the policy is to write them (WPO)
    ld_alpha: float = 1.0  # weight of tokens beyond the shorter answer's length (LD-DPO)

    def __post_init__(self):
        super().__post_init__()
        smoothing = self.label_smoothing
        if self.loss not in get_args(Loss):
            raise UserError(f"loss {self.loss!r} is unknown.{did_you_mean(self.loss, get_args(Loss))}")
        if self.beta <= 0:
            raise UserError(f"beta must be positive, got {self.beta}")
        if not 0 <= smoothing < 0.5:
            raise UserError(f"label_smoothing must be in [0, 0.5), got {smoothing}")
        if self.loss in FLIPPED and not smoothing:
            raise UserError(
                f"loss {self.loss!r} asks how often labels are flipped: give label_smoothing, such as 0.1"
            )
        if smoothing and self.loss not in (*SMOOTHED, *FLIPPED):
            raise UserError(
                f"loss {self.loss!r} reads no label_smoothing; those that do: {[*SMOOTHED, *FLIPPED]}"
            )
        if self.divergence not in get_args(Divergence):
            hint = did_you_mean(self.divergence, get_args(Divergence))
            raise UserError(f"divergence {self.divergence!r} is unknown.{hint}")
        if self.divergence != "reverse_kl" and (self.loss not in OF_REWARDS or self.length_normalized):
            raise UserError(
                f"divergence {self.divergence!r} needs a loss of the difference of two answers' rewards "
                f"({', '.join(OF_REWARDS)}), not length-normalised"
            )
        if self.rpo_alpha < 0:
            raise UserError(f"rpo_alpha must be zero or more, got {self.rpo_alpha}")
        if not 0 <= self.ld_alpha <= 1:
            raise UserError(f"ld_alpha must be in [0, 1], got {self.ld_alpha}")
        if self.ld_alpha != 1 and (self.length_normalized or self.rpo_alpha or self.wpo):
            raise UserError("ld_alpha leaves no plain sum: not with length_normalized, rpo_alpha or wpo")
        if self.wpo and self.loss in COUPLED:
            raise UserError(f"wpo weighs pairs, and loss {self.loss!r} takes them apart: choose one")
        if self.reference_free and (self.reference != "precomputed" or self.ref_update_every):
            raise UserError(
                "reference_free: there is no reference to score or to refresh; leave `reference` alone"
            )

    @property
    def reference_scored(self) -> When:
        return "never" if self.reference_free else self.reference

    @property
    def tail_weight(self) -> float:
        return self.ld_alpha

    @property
    def reads_weights(self) -> bool:
        return self.loss not in COUPLED

    @property
    def reads_certainty(self) -> bool:
        return (
            self.loss == "sigmoid" and not self.rpo_alpha
        )  # which learns a chosen answer as if it were certain

    def implicit_reward(self, answers: Answers) -> jax.Array:
        """beta log(pi/ref), of the answer or per token; beta f'(pi/ref) of another divergence."""
        ratios = (
            answers.ratios / jnp.maximum(answers.lengths, 1.0) if self.length_normalized else answers.ratios
        )
        return self.beta * DIVERGENCES[self.divergence](ratios)


def make_dpo(config: DPOConfig, model: LanguageModel, optimizer: Optimizer) -> Algorithm:
    """Of PairBatches; `init(params, ref_params, key)`."""

    def loss(answers: Answers) -> jax.Array:
        losses = preference_loss(config, answers)
        if config.wpo:
            losses = losses * wpo_weight(answers.mean_logps)
        if config.rpo_alpha:  # Pang et al. 2024 (Iterative RPO), eq. 1: a mean over each answer's tokens
            losses = losses - config.rpo_alpha * answers.mean_logps[:, 0]
        return losses

    return pair_algorithm(loss, config, model, optimizer, coupled=config.loss in COUPLED)


def preference_loss(config: DPOConfig, answers: Answers) -> jax.Array:
    """What `config.loss` names, [B]."""
    policy, ref = answers.logps, answers.ref_logps
    if config.length_normalized:
        lengths = jnp.maximum(answers.lengths, 1.0)
        policy, ref = policy / lengths, ref / lengths
    ratios = DIVERGENCES[config.divergence](policy - ref)
    chosen, rejected = ratios[:, 0], ratios[:, 1]
    beta, smoothing = config.beta, config.label_smoothing
    match config.loss:
        case "sigmoid":
            return dpo_loss(chosen, rejected, 0.0, 0.0, beta, smoothing, answers.certainty)[0]
        case "hinge" | "exponential" | "square" | "discopop":
            return link_loss(beta * (chosen - rejected), LINKS[config.loss], smoothing)
        case "ipo":
            return ipo_loss(chosen, rejected, 0.0, 0.0, beta)[0]
        case "robust":
            return robust_dpo_loss(chosen, rejected, beta, smoothing)
        case "exo_pair":
            return exo_pair_loss(chosen, rejected, beta, smoothing)
        case "nca_pair":
            return nca_pair_loss(chosen, rejected, beta)
        case "sppo_hard":
            return sppo_hard_loss(chosen, rejected, beta)
        case "apo_zero":
            return apo_zero_loss(chosen, rejected, beta)
        case "apo_down":
            return apo_down_loss(chosen, rejected, beta)
        case "aot":
            return aot_loss(policy[:, 0], policy[:, 1], ref[:, 0], ref[:, 1], beta, smoothing)
        case "aot_unpaired":
            return aot_unpaired_loss(chosen, rejected, beta, smoothing)
