"""A model on packed answers: prompts that go through it once, each followed by all of its answers, many in a row."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from jrlhf.models.config import ModelConfig
from jrlhf.models.transformer import Model, causal_mask, scalar_heads
from jrlhf.ops.masking import Places
from jrlhf.types import PackedAnswers, Params


def packed_mask(rows: PackedAnswers) -> jax.Array:
    """[N, T, T]: a token sees earlier tokens of its own segment that are the prompt's or its own answer's."""
    branch_NT = jnp.asarray(rows.branches)
    same = branch_NT[:, :, None] == branch_NT[:, None, :]
    return causal_mask(jnp.asarray(rows.segment_ids)) & (same | (branch_NT == 0)[:, None, :])


def window_spans(config: ModelConfig, length: int) -> bool:
    """Whether no window hides anything in sequences of `length` tokens: then they can be packed.

    Windows go by slots, and in a packed row other answers lie between an answer and its prompt.
    """
    return not any(config.layers_windowed) or config.window >= length


def packed_hidden(model: Model, params: Params, rows: PackedAnswers, at: Places = None) -> jax.Array:
    """Hidden states [N, T, D] after the final norm, or `at` some places of each row; of every token those that it has
    in an unpacked row.

    The sequences must fit into the model's window, if it has one (`window_spans`).
    """
    config, length = model.config, rows.tokens.shape[1]
    if any(config.layers_windowed):
        config = replace(config, window=max(config.window, length))  # none in terms of slots
    return replace(model, config=config).states(
        params, rows.tokens, rows.positions, packed_mask(rows), at=at
    )[0]


def packed_logprobs(model: Model, params: Params, rows: PackedAnswers) -> jax.Array:
    """Log-probabilities of the answers' tokens, [N, A] float32; without meaning where there is none.

    Only the states that predict them reach the head.
    """
    before_NAD = packed_hidden(model, params, rows, rows.before)
    return model.logprobs_of_hidden(params, before_NAD, rows.targets, 1.0, rows.owners >= 0)[0]


def packed_scores(model: Model, params: Params, rows: PackedAnswers) -> jax.Array:
    """Every scalar head at each answer's last token, [B, K, n] float32; those of missing answers mean nothing."""
    scores_NEn = scalar_heads(params["score"], packed_hidden(model, params, rows, rows.ends))
    return scores_NEn.reshape(-1, scores_NEn.shape[-1])[rows.answers]


@dataclass(frozen=True)
class PackedModel(Model):
    """A model that also takes packed answers, as the algorithms on preferences ask of it."""

    def packed_logprobs(self, params: Params, rows: PackedAnswers) -> jax.Array:
        return packed_logprobs(self, params, rows)


def as_packed(model: Model) -> PackedModel:
    return PackedModel(model.config, model.head, model.heads)
