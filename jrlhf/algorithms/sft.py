"""Next-token learning: pretraining on packed text, and supervised fine-tuning on demonstrations.

They differ in their loss mask alone: text learns every token, a demonstration only its completion and EOS.
InstructGPT (Ouyang et al. 2022), section 3.5, step 1.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jrlhf.config import UserError
from jrlhf.models.config import ModelConfig
from jrlhf.models.transformer import Model
from jrlhf.ops.masking import at_places, masked_mean
from jrlhf.ops.microbatch import value_and_grad_rows
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm, Array, SequenceBatch, TrainState


@dataclass(frozen=True)
class SFTConfig:
    microbatches: int = 1  # gradient accumulation: memory for time, same gradient
    balance_coef: float = 0.0  # weight of the load-balancing loss of a mixture of experts

    def __post_init__(self):
        if self.balance_coef < 0:
            raise UserError(f"balance_coef must not be negative, got {self.balance_coef}")


class Targets(NamedTuple):
    """Tokens to be predicted, of which each row holds at most A."""

    hidden: jax.Array  # [B, A, D] from which they are predicted
    tokens: Array  # [B, A] int32
    mask: Array  # [B, A] bool: there is one
    balance: jax.Array  # [] float32, the load-balancing loss of a mixture of experts


def targets(model: Model, params, batch: SequenceBatch) -> Targets:
    """Of a batch without `targets`, every position but the first counts as a place for one: A is T - 1."""
    states = partial(model.hidden_and_balance, params, batch.tokens, batch.segment_ids, batch.positions)
    if isinstance(batch.targets, tuple):
        hidden, balance = states(slice(-1))
        return Targets(hidden, batch.tokens[:, 1:], batch.loss_mask[:, 1:], balance)
    slots = jnp.maximum(batch.targets, 1)
    hidden, balance = states(slots - 1)
    return Targets(hidden, at_places(batch.tokens, slots), batch.targets > 0, balance)


def sft_loss(model: Model, params, batch: SequenceBatch, denominator, balance_coef: float = 0.0):
    """Cross-entropy summed over the batch's target tokens / denominator (target tokens of the global batch)."""
    hidden, tokens, mask, balance = targets(model, params, batch)
    weights = jnp.where(mask, 1.0 / denominator, 0.0)
    logprob, _, entropy = model.weighted_logprobs_of_hidden(params, hidden, tokens, weights)
    loss = -logprob
    sums = {"train/loss": loss, "policy/entropy": masked_mean(entropy, mask, denominator=denominator)}
    if balance_coef:
        # Weighted by its share of the tokens, so that microbatches add up to about what one pass gives.
        sums["train/balance_loss"] = balance * jnp.sum(mask, dtype=jnp.float32) / denominator
        loss = loss + balance_coef * sums["train/balance_loss"]
    return loss, (sums, {})


def target_tokens(batch: SequenceBatch):
    return jnp.maximum(jnp.sum(batch.loss_mask[:, 1:], dtype=jnp.float32), 1.0)


def check_balance(config: SFTConfig, model: ModelConfig) -> None:
    if config.balance_coef and not model.moe.experts:
        raise UserError("algorithm.balance_coef is for a mixture of experts, and this model is dense")


def make_sft(config: SFTConfig, model: Model, optimizer: Optimizer) -> Algorithm:
    check_balance(config, model.config)

    def init(params, key, frozen=None) -> TrainState:
        """frozen: the base that adapters `params` are trained beside."""
        params = {"policy": params}
        return TrainState(jnp.int32(0), params, optimizer.init(params), frozen, key)

    def train_step(state: TrainState, batch: SequenceBatch):
        tokens = target_tokens(batch)
        whole = lambda params: model.whole(params["policy"], state.ref_params)  # noqa: E731
        loss = lambda params, rows: sft_loss(model, whole(params), rows, tokens, config.balance_coef)  # noqa: E731
        metrics, _, grads = value_and_grad_rows(loss, state.params, batch, config.microbatches)
        params, opt_state, grad_norm = optimizer.apply(grads, state.opt_state, state.params)
        metrics |= {
            "train/grad_norm": grad_norm,
            "train/lr": optimizer.learning_rate(state.step),
            "train/tokens": tokens,
            "perf/pad_frac": jnp.mean(batch.segment_ids == 0, dtype=jnp.float32),
        }
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return Algorithm(init, None, train_step)
