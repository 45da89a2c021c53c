"""Distillation from a teacher with the same vocabulary (Agarwal et al. 2024, "On-policy distillation", GKD).

    L(θ) = E_{x, y} [ Σ_n D(student_θ(·|x, y_<n), teacher(·|x, y_<n)) ] / E[|y|]

a mean over the answers' tokens in the global batch, D over the whole vocabulary (`ops.distillation`): the forward KL
KL(teacher‖student), the reverse KL(student‖teacher), or their generalised Jensen-Shannon mixture (eq. 1). The answers
are demonstrations (λ = 0: supervised distillation, Hinton et al. 2015), or the student's own samples (λ = 1), or at
each step one of them, its own with probability λ (Algorithm 1).

Gradient: that of D at the states that the answers visit, with the answers held constant. On its own samples that leaves
out that the student chooses its states (no gradient through sampling, as GKD has it; MiniLLM adds one). Every D is 0
only where the student is the teacher, so that a student which can be is the fixed point whatever the answers, at the
states that they visit.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax.numpy as jnp

from jrlhf.config import UserError
from jrlhf.models.transformer import Model
from jrlhf.ops.distillation import Divergence, forward_kl, generalized_jsd, reverse_kl
from jrlhf.ops.masking import masked_mean, positions_from_mask
from jrlhf.ops.microbatch import value_and_grad_rows
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm, Rollout, SequenceBatch, TrainState


@dataclass(frozen=True)
class DistillationConfig:
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: float = (
        0.5  # of "jsd": the teacher's weight in the mixture; near 0 like the forward, near 1 the reverse KL
    )
    temperature: float = 1.0  # divides the logits of both
    on_policy: float = 0.0  # λ: probability that a step learns from the student's own samples
    microbatches: int = 1  # gradient accumulation: memory for time, same gradient

    def __post_init__(self):
        if not 0 < self.beta < 1:
            raise UserError(
                f"beta must be between 0 and 1, got {self.beta}; its ends are divergence 'forward_kl' and 'reverse_kl'"
            )
        if self.temperature <= 0:
            raise UserError(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.on_policy <= 1:
            raise UserError(f"on_policy is a probability, got {self.on_policy}")


def divergence_of(config: DistillationConfig) -> Divergence:
    named: dict[str, Divergence] = {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jsd": partial(generalized_jsd, beta=config.beta),
    }
    return named[config.divergence]


def make_distillation(
    config: DistillationConfig, model: Model, teacher: Model, optimizer: Optimizer
) -> Algorithm:
    """Of SequenceBatches; `init(params, teacher_params, key, frozen=None)`, frozen being the base that adapters
    `params` are trained beside. `make_batch(state, samples)` makes one of the student's own samples."""
    of = divergence_of(config)

    def init(params, teacher_params, key, frozen=None) -> TrainState:
        params = {"policy": params}
        fixed = {"teacher": teacher_params, "base": frozen}
        return TrainState(jnp.int32(0), params, optimizer.init(params), fixed, key)

    def make_batch(state: TrainState, samples: Rollout) -> SequenceBatch:
        prompt = samples.tokens.shape[1] - samples.response_mask.shape[1]
        return SequenceBatch(
            samples.tokens,
            samples.mask.astype(jnp.int32),
            positions_from_mask(samples.mask),
            jnp.pad(samples.response_mask, ((0, 0), (prompt, 0))),
        )

    def train_step(state: TrainState, batch: SequenceBatch):
        tokens = jnp.maximum(jnp.sum(batch.loss_mask[:, 1:], dtype=jnp.float32), 1.0)
        fixed = state.ref_params

        def loss(params, rows: SequenceBatch):
            whole = model.whole(params["policy"], fixed["base"])
            divergences = model.divergence(
                whole, fixed["teacher"], rows.tokens, rows.segment_ids, 1, config.temperature, of, teacher,
                rows.positions,
            )  # fmt: skip
            value = masked_mean(divergences, rows.loss_mask[:, 1:], denominator=tokens)
            return value, ({"train/loss": value}, {})

        metrics, _, grads = value_and_grad_rows(loss, state.params, batch, config.microbatches)
        params, opt_state, grad_norm = optimizer.apply(grads, state.opt_state, state.params)
        metrics |= {
            "train/grad_norm": grad_norm,
            "train/lr": optimizer.learning_rate(state.step),
            "train/tokens": tokens,
            "perf/pad_frac": jnp.mean(batch.segment_ids == 0, dtype=jnp.float32),
        }
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return Algorithm(init, make_batch, train_step)
