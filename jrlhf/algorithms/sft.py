"""Next-token learning: pretraining on packed text, and supervised fine-tuning on demonstrations.

They differ in their loss mask alone: text learns every token, a demonstration only its completion and EOS.
InstructGPT (Ouyang et al. 2022), section 3.5, step 1.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from jrlhf.config import UserError
from jrlhf.models.config import ModelConfig
from jrlhf.models.transformer import Model
from jrlhf.ops.losses import language_model_loss
from jrlhf.ops.masking import masked_mean
from jrlhf.ops.microbatch import value_and_grad_rows
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm, SequenceBatch, TrainState


@dataclass(frozen=True)
class SFTConfig:
    microbatches: int = 1  # gradient accumulation: memory for time, same gradient
    balance_coef: float = 0.0  # weight of the load-balancing loss of a mixture of experts

    def __post_init__(self):
        if self.balance_coef < 0:
            raise UserError(f"balance_coef must not be negative, got {self.balance_coef}")


def sft_loss(model: Model, params, batch: SequenceBatch, denominator, balance_coef: float = 0.0):
    """Cross-entropy summed over the batch's target tokens / denominator (target tokens of the global batch)."""
    hidden, balance = model.hidden_and_balance(params, batch.tokens, batch.segment_ids, batch.positions)
    logprobs, entropy = model.logprobs_of_hidden(params, hidden[:, :-1], batch.tokens[:, 1:], 1.0)
    mask = batch.loss_mask[:, 1:]
    loss = language_model_loss(logprobs, mask, denominator)
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
