"""The one function that samples responses: training, labelling, best-of-n, evaluation and `generate` call it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.models.transformer import Model
from jrlhf.rollout.sampling import Sampling, draw, filter_logits, row_keys
from jrlhf.sharding import constrain, fetch
from jrlhf.types import Params, Prompts, Rollout

CHUNK = 4  # tokens between two looks at whether every row has ended


@partial(jax.jit, static_argnums=0)
def rollout(model: Model, params: Params, prompts: Prompts, key: jax.Array, sampling: Sampling) -> Rollout:
    """Continue every prompt until a stop token or `max_new_tokens`.

    prompts: tokens and mask [B, P], left-padded. key: one key; row i draws from `fold_in(key, i)`, so that a row's
    tokens do not depend on the other rows. Returns a `Rollout` of [B, P + R] tokens whose `logprobs` are those of
    the distribution that was sampled (temperature and filters included).

    Prompts share one prefill. Tokens are decoded by `lax.scan` in chunks inside a `while_loop` that ends
    when all rows have: the scan has a known length (no host synchronisation per token on a GPU), the loop saves
    the tail.
    """
    b, p = prompts.tokens.shape
    r = sampling.max_new_tokens
    chunk = min(CHUNK, r)
    slots = p + -(-r // chunk) * chunk
    tokens_BP = constrain(jnp.asarray(prompts.tokens, jnp.int32), "batch", "length")
    prompt_mask_BP = constrain(jnp.asarray(prompts.mask, bool), "batch", "length")
    decode_params = model.decode_params(params)
    keys_B = row_keys(key, b)
    stops = jnp.asarray(sampling.stop_ids or (-1,), jnp.int32)

    # Prefill: the prompt sees itself causally. The cache then grows by the response's slots.
    length_B = jnp.sum(prompt_mask_BP, axis=1, dtype=jnp.int32)
    positions_BP = jnp.maximum(jnp.cumsum(prompt_mask_BP, axis=1, dtype=jnp.int32) - 1, 0)
    causal = jnp.tril(jnp.ones((p, p), bool))[None] & prompt_mask_BP[:, None, :]
    hidden, cache = model.decode(
        decode_params, tokens_BP, positions_BP, causal, model.init_cache(b, p), jnp.int32(0)
    )
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots - p), (0, 0))), cache)
    slot_S = jnp.arange(slots, dtype=jnp.int32)
    seen_BS = jnp.pad(prompt_mask_BP, ((0, 0), (0, slots - p)), constant_values=True)

    def decode_one(carry, t):
        hidden_BD, ended_B, cache = carry
        logits_BV = filter_logits(model.logits(decode_params, hidden_BD[:, None])[:, 0], sampling)
        token_B = draw(logits_BV, keys_B, t)
        logprob_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], axis=1)[:, 0]
        live_B = ~ended_B & (t < r)
        token_B = jnp.where(live_B, token_B, jnp.int32(sampling.pad_id))
        logprob_B = jnp.where(live_B, logprob_B, 0.0)
        ended_B = ended_B | jnp.any(token_B[:, None] == stops[None], axis=1) & live_B
        mask_B1S = (seen_BS & (slot_S <= p + t)[None])[:, None]
        hidden_B1D, cache = model.decode(
            decode_params, token_B[:, None], (length_B + t)[:, None], mask_B1S, cache, p + t
        )
        return (hidden_B1D[:, 0], ended_B, cache), (token_B, logprob_B, live_B)

    def decode_chunk(state):
        t, carry, tokens_BR, logprobs_BR, mask_BR = state
        carry, out = jax.lax.scan(decode_one, carry, t + jnp.arange(chunk, dtype=jnp.int32))
        write = lambda buffer, new: jax.lax.dynamic_update_slice(buffer, new.T, (jnp.int32(0), t))  # noqa: E731
        return (t + chunk, carry, *map(write, (tokens_BR, logprobs_BR, mask_BR), out))

    def unfinished(state):
        t, (_, ended_B, _) = state[:2]
        return (t < r) & ~jnp.all(ended_B)

    empty = lambda fill, dtype: jnp.full((b, slots - p), fill, dtype)  # noqa: E731
    start = (
        jnp.int32(0),
        (hidden[:, -1], jnp.zeros((b,), bool), cache),
        empty(sampling.pad_id, jnp.int32),
        empty(0.0, jnp.float32),
        empty(False, bool),
    )
    _, (_, ended_B, _), tokens_BR, logprobs_BR, response_mask_BR = jax.lax.while_loop(
        unfinished, decode_chunk, start
    )
    response_mask_BR = response_mask_BR[:, :r]
    return Rollout(
        tokens=jnp.concatenate([tokens_BP, tokens_BR[:, :r]], axis=1),
        mask=jnp.concatenate([prompt_mask_BP, response_mask_BR], axis=1),
        response_mask=response_mask_BR,
        logprobs=logprobs_BR[:, :r],
        ended=ended_B,
    )


def pad_prompts(ids: list[list[int]], length: int, pad_id: int) -> Prompts:
    """Left-pad prompts to [B, length] numpy arrays. ValueError on an empty or too long one."""
    tokens = np.full((len(ids), length), pad_id, np.int32)
    mask = np.zeros((len(ids), length), bool)
    for i, row in enumerate(ids):
        if not 0 < len(row) <= length:
            raise ValueError(f"prompt {i} has {len(row)} tokens; it must have 1 to {length}")
        tokens[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return Prompts(tokens, mask)


def response_ids(rollout: Rollout) -> list[list[int]]:
    """Each row's sampled token ids (stop token included), whole on every host."""
    tokens, mask = fetch((rollout.tokens, rollout.response_mask))
    return [
        row[m].tolist() for row, m in zip(tokens[:, tokens.shape[1] - mask.shape[1] :], mask, strict=True)
    ]
