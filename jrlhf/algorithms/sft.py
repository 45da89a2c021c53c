"""Next-token learning: pretraining on packed text, and supervised fine-tuning on demonstrations.

They differ in their loss mask alone: text learns every token, a demonstration only its completion and EOS.
InstructGPT (Ouyang et al. 2022), section 3.5, step 1.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from jrlhf.models.transformer import Model
from jrlhf.ops.losses import language_model_loss
from jrlhf.ops.masking import masked_mean
from jrlhf.ops.microbatch import value_and_grad_rows
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm, SequenceBatch, TrainState


@dataclass(frozen=True)
class SFTConfig:
    microbatches: int = 1  # gradient accumulation: memory for time, same gradient


def sft_loss(model: Model, params, batch: SequenceBatch, denominator):
    """Cross-entropy summed over the batch's target tokens / denominator (target tokens of the global batch)."""
    logprobs, entropy = model.logprobs(params, batch.tokens, batch.segment_ids, positions_BT=batch.positions)
    mask = batch.loss_mask[:, 1:]
    loss = language_model_loss(logprobs, mask, denominator)
    return loss, (
        {"train/loss": loss, "policy/entropy": masked_mean(entropy, mask, denominator=denominator)},
        {},
    )


def target_tokens(batch: SequenceBatch):
    return jnp.maximum(jnp.sum(batch.loss_mask[:, 1:], dtype=jnp.float32), 1.0)


def make_sft(config: SFTConfig, model: Model, optimizer: Optimizer) -> Algorithm:
    def init(params, key) -> TrainState:
        params = {"policy": params}
        return TrainState(jnp.int32(0), params, optimizer.init(params), None, key)

    def train_step(state: TrainState, batch: SequenceBatch):
        tokens = target_tokens(batch)
        loss = lambda params, rows: sft_loss(model, params["policy"], rows, tokens)  # noqa: E731
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
