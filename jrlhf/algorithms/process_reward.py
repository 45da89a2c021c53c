"""The process reward model: a scalar head read where each step of an answer ends, trained on labels of steps.

Uesato et al. 2022; Lightman et al. 2023. Cross-entropy of every labelled step, mean over those of the global batch.
An answer of one step with the outcome's label makes it an outcome reward model (Cobbe et al. 2021).
"""

from dataclasses import dataclass

import jax.numpy as jnp

from jrlhf.models.transformer import Model
from jrlhf.ops.masking import masked_mean
from jrlhf.ops.microbatch import value_and_grad_rows
from jrlhf.ops.reward_losses import step_loss
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm, StepBatch, TrainState


@dataclass(frozen=True)
class ProcessRewardConfig:
    microbatches: int = 1


def labelled_steps(batch: StepBatch):
    """[B, T] bool: ends of steps that have a label."""
    return batch.ends & (batch.labels >= 0)


def process_reward_loss(model: Model, params, batch: StepBatch, steps):
    """Mean over `steps`, the labelled ones of the global batch."""
    labelled = labelled_steps(batch)
    scores = model.scores(params, batch.tokens, batch.mask)
    loss = step_loss(scores, batch.labels, labelled, steps)
    right = (scores > 0) == (batch.labels > 0.5)
    sums = {"rm/loss": loss, "rm/step_acc": masked_mean(right, labelled, denominator=steps)}
    return loss, (sums, {})


def make_process_reward(config: ProcessRewardConfig, model: Model, optimizer: Optimizer) -> Algorithm:
    def init(params, key, frozen=None) -> TrainState:
        """frozen: the base that adapters `params` are trained beside."""
        params = {"policy": params}
        return TrainState(jnp.int32(0), params, optimizer.init(params), frozen, key)

    def train_step(state: TrainState, batch: StepBatch):
        steps = jnp.maximum(jnp.sum(labelled_steps(batch), dtype=jnp.float32), 1.0)
        whole = lambda params: model.whole(params["policy"], state.ref_params)  # noqa: E731
        loss = lambda params, rows: process_reward_loss(model, whole(params), rows, steps)  # noqa: E731
        metrics, _, grads = value_and_grad_rows(loss, state.params, batch, config.microbatches)
        params, opt_state, grad_norm = optimizer.apply(grads, state.opt_state, state.params)
        metrics |= {"train/grad_norm": grad_norm, "train/lr": optimizer.learning_rate(state.step)}
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return Algorithm(init, None, train_step)
