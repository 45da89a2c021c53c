"""A model's vocabulary made larger, for tokens that were added to its tokenizer."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jrlhf.config import UserError
from jrlhf.models.config import ModelConfig
from jrlhf.types import Params


def grow_vocabulary(config: ModelConfig, params: Params, vocab_size: int) -> tuple[ModelConfig, Params]:
    """The model with `vocab_size` tokens. A new token's rows are the mean of the old ones' (Hewitt 2021): its logit is
    then an ordinary one, where a random row could swallow the probability of all others.

    Raises UserError when there would be fewer tokens than before: their rows would be lost.
    """
    if vocab_size < config.vocab_size:
        raise UserError(
            f"the model has {config.vocab_size} tokens; it cannot be cut to the tokenizer's {vocab_size}"
        )
    new = replace(config, vocab_size=vocab_size)

    def grown(table, axis: int):
        """[V, D] or [D, V] with more tokens, and zeros where the rows are padding."""
        rows = jnp.moveaxis(table, axis, 0)[: config.vocab_size]
        mean = jnp.mean(rows.astype(jnp.float32), axis=0, keepdims=True).astype(rows.dtype)
        added = jnp.broadcast_to(mean, (vocab_size - config.vocab_size, *mean.shape[1:]))
        whole = jnp.concatenate([rows, added])
        return jnp.moveaxis(jnp.pad(whole, ((0, new.padded_vocab - vocab_size), (0, 0))), 0, axis)

    out = params | {"embed": params["embed"] | {"embedding": grown(params["embed"]["embedding"], 0)}}
    if "lm_head" in params:
        out["lm_head"] = {"kernel": grown(params["lm_head"]["kernel"], 1)}
    return new, jax.tree.map(jnp.asarray, out)
