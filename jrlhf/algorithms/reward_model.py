"""The reward model: the SFT model, LM head off, a linear scalar head on, scored at the last response token.

Bradley-Terry on every pair of a prompt's K ranked answers, all in one batch element, divided by the number of pairs
(InstructGPT, Ouyang et al. 2022, equation 1; Stiennon et al. 2020). K = 2 is the ordinary pair.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jrlhf.config import UserError
from jrlhf.models.transformer import Model
from jrlhf.ops.losses import centering_loss, kwise_bradley_terry_loss
from jrlhf.ops.masking import last_token_index
from jrlhf.ops.microbatch import value_and_grad_rows
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm, PreferenceBatch, TrainState


@dataclass(frozen=True)
class RewardModelConfig:
    label_smoothing: float = 0.0  # probability that a label is assumed flipped
    margins: bool = False  # subtract the rows' score differences inside the sigmoid (Llama 2)
    ties: bool = True  # learn from equal ranks (target 1/2); False drops those pairs
    centering: float = 0.0  # weight of (r_i + r_j)^2, which keeps scores near zero (Eisenstein et al. 2023)
    microbatches: int = 1

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.centering < 0:
            raise UserError(f"centering must not be negative, got {self.centering}")


def sequence_scores(model: Model, params, tokens_BT, mask_BT) -> jax.Array:
    """The scalar head at each sequence's last real token, [B] float32."""
    scores_BT = model.scores(params, tokens_BT, mask_BT)
    return jnp.take_along_axis(scores_BT, last_token_index(mask_BT)[:, None], axis=1)[:, 0]


def preference_scores(model: Model, params, batch: PreferenceBatch) -> jax.Array:
    """[B, K] scores of the answers; those of padding answers mean nothing."""
    b, k, t = batch.tokens.shape
    flat = sequence_scores(model, params, batch.tokens.reshape(b * k, t), batch.mask.reshape(b * k, t))
    return flat.reshape(b, k)


def reward_model_loss(config: RewardModelConfig, model: Model, params, batch: PreferenceBatch, prompts):
    """Mean over `prompts` (those of the global batch) of each prompt's mean pair loss."""
    scores = preference_scores(model, params, batch)
    margins = batch.margins if config.margins else jnp.zeros_like(batch.margins)
    loss, pairs, correct = kwise_bradley_terry_loss(
        scores, batch.ranks, margins, config.label_smoothing, config.ties
    )
    loss = jnp.sum(loss) / prompts
    centering = jnp.sum(centering_loss(scores, batch.ranks)) / prompts
    ordered = ordered_pairs(batch.ranks)
    gap = scores[:, :, None] - scores[:, None, :]
    per_prompt = lambda x, n: jnp.sum(x / jnp.maximum(n, 1.0)) / prompts  # noqa: E731
    sums = {
        "rm/loss": loss,
        "rm/acc": per_prompt(correct, pairs),
        "rm/margin": per_prompt(jnp.sum(gap * ordered, axis=(1, 2)), jnp.sum(ordered, axis=(1, 2))),
    }
    return loss + config.centering * centering, (sums, {})


def ordered_pairs(ranks_BK) -> jax.Array:
    """[B, K, K] float32: 1 where answer i is ranked strictly above answer j (rank 0 is padding)."""
    i, j = ranks_BK[:, :, None], ranks_BK[:, None, :]
    return ((i < j) & (i > 0)).astype(jnp.float32)


def usable_prompts(config: RewardModelConfig, batch: PreferenceBatch) -> jax.Array:
    """How many prompts of the batch have a pair to learn from."""
    answers = jnp.sum(batch.ranks > 0, axis=1)
    has_pair = answers > 1 if config.ties else jnp.any(ordered_pairs(batch.ranks) > 0, axis=(1, 2))
    return jnp.maximum(jnp.sum(has_pair, dtype=jnp.float32), 1.0)


def make_reward_model(config: RewardModelConfig, model: Model, optimizer: Optimizer) -> Algorithm:
    def init(params, key, frozen=None) -> TrainState:
        """frozen: the base that adapters `params` are trained beside."""
        params = {"policy": params}
        return TrainState(jnp.int32(0), params, optimizer.init(params), frozen, key)

    def train_step(state: TrainState, batch: PreferenceBatch):
        prompts = usable_prompts(config, batch)
        whole = lambda params: model.whole(params["policy"], state.ref_params)  # noqa: E731
        loss = lambda params, rows: reward_model_loss(config, model, whole(params), rows, prompts)  # noqa: E731
        metrics, _, grads = value_and_grad_rows(loss, state.params, batch, config.microbatches)
        params, opt_state, grad_norm = optimizer.apply(grads, state.opt_state, state.params)
        metrics |= {"train/grad_norm": grad_norm, "train/lr": optimizer.learning_rate(state.step)}
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return Algorithm(init, None, train_step)
