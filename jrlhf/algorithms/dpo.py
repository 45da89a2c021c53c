"""Direct preference optimisation (Rafailov et al. 2023).

    L = -log sigmoid( beta [ (log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x)) ] )      (eq. 7)

Log-probabilities are summed over the answer (a mean would have another optimum). Chosen and rejected go through the
model in one forward pass.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jrlhf.config import UserError
from jrlhf.models.transformer import Model
from jrlhf.ops.losses import dpo_loss
from jrlhf.ops.microbatch import map_rows, value_and_grad_rows
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm, Array, TrainState


@dataclass(frozen=True)
class DPOConfig:
    beta: float = 0.1  # strength of the KL constraint that the loss implies
    label_smoothing: float = 0.0  # conservative DPO: probability that a label is flipped
    reference: Literal["precomputed", "on_the_fly"] = "precomputed"  # memory against time
    microbatches: int = 1

    def __post_init__(self):
        if self.beta <= 0:
            raise UserError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")


class PairBatch(NamedTuple):
    """Chosen (index 0) and rejected (index 1) answers to each prompt."""

    tokens: Array  # [B, 2, T] int32, prompt then answer
    mask: Array  # [B, 2, T] bool, a real token
    response_mask: Array  # [B, 2, T] bool, a token of the answer
    ref_logprobs: Array  # [B, 2] summed reference log-probabilities; ignored when computed on the fly


def pair_logprobs(model: Model, params, batch: PairBatch) -> jax.Array:
    """Summed log-probability of each answer given its prompt, [B, 2]."""
    b, k, t = batch.tokens.shape
    logprobs, _ = model.logprobs(params, batch.tokens.reshape(b * k, t), batch.mask.reshape(b * k, t))
    mask = batch.response_mask.reshape(b * k, t)[:, 1:].astype(jnp.float32)
    return jnp.sum(logprobs * mask, axis=1).reshape(b, k)


def make_dpo(config: DPOConfig, model: Model, optimizer: Optimizer) -> Algorithm:
    def init(params, ref_params, key) -> TrainState:
        """`ref_params` are kept only where the reference is scored on the fly."""
        params = {"policy": params}
        ref_params = ref_params if config.reference == "on_the_fly" else None
        return TrainState(jnp.int32(0), params, optimizer.init(params), ref_params, key)

    def train_step(state: TrainState, batch: PairBatch):
        if config.reference == "on_the_fly":
            score = lambda rows: pair_logprobs(model, state.ref_params, rows)  # noqa: E731
            batch = batch._replace(ref_logprobs=map_rows(score, batch, config.microbatches))
        pairs = jnp.float32(batch.tokens.shape[0])

        def loss(params, rows: PairBatch):
            logp = pair_logprobs(model, params["policy"], rows)
            ref = rows.ref_logprobs
            losses, chosen, rejected = dpo_loss(
                logp[:, 0], logp[:, 1], ref[:, 0], ref[:, 1], config.beta, config.label_smoothing
            )
            mean = lambda x: jnp.sum(x, dtype=jnp.float32) / pairs  # noqa: E731
            sums = {
                "pref/loss": mean(losses),
                "pref/acc": mean(chosen > rejected),
                "pref/margin": mean(chosen - rejected),
                "pref/logp_chosen": mean(logp[:, 0]),
                "pref/logp_rejected": mean(logp[:, 1]),
            }
            return mean(losses), (sums, {})

        metrics, _, grads = value_and_grad_rows(loss, state.params, batch, config.microbatches)
        params, opt_state, grad_norm = optimizer.apply(grads, state.opt_state, state.params)
        metrics |= {"policy/grad_norm": grad_norm, "policy/lr": optimizer.learning_rate(state.step)}
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return Algorithm(init, None, train_step)
