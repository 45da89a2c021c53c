"""The one function that samples responses: training, labelling, best-of-n, evaluation and `generate` call it."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.models.transformer import Cache, Model
from jrlhf.rollout.sampling import Sampling, draw, filter_logits, row_keys
from jrlhf.sharding import RULES, batch_ways, fetch
from jrlhf.types import Params, Prompts, Rollout

class Slots(NamedTuple):
    """Rows that are being sampled, one in each of S slots."""

    row_S: jax.Array  # which prompt; N: none
    age_S: jax.Array  # tokens drawn so far
    live_S: jax.Array
    hidden_SD: jax.Array  # of the last token: its logits are those of the next
    seen_SL: jax.Array  # places of the cache that hold tokens of this row
    cache: Cache  # [S, K, L, H] a layer


class Drawn(NamedTuple):
    """What all N rows have so far."""

    tokens_NR: jax.Array
    logprobs_NR: jax.Array
    mask_NR: jax.Array
    ended_N: jax.Array


@partial(jax.jit, static_argnums=0, static_argnames="slots")
def rollout(
    model: Model, params: Params, prompts: Prompts, key: jax.Array, sampling: Sampling, slots: int = 0
) -> Rollout:
    """Continue every prompt until a stop token or `max_new_tokens`.

    prompts: tokens and mask [N, P], left-padded. key: one key; row i draws from `fold_in(key, i)`, so that a row's
    tokens do not depend on the other rows. Returns a `Rollout` of [N, P + R] tokens whose `logprobs` are those of
    the distribution that was sampled (temperature and filters included).

    slots: how many rows are sampled at a time, 0 for all. Where there are more rows, each that ends leaves its slot to
    the next prompt, inside this one program. Draws depend on the row alone, so `slots` changes no token (but for
    rounding, where a sum over the cache is taken in another order), only speed and memory.

    Tokens are decoded by `lax.scan` in chunks inside a `while_loop`: the scan has a known length (no host
    synchronisation per token on a GPU), the loop ends when all rows have. All slots write to the same place of their
    caches, a ring: one contiguous update for all of them, whatever their ages (a row that starts later finds its prompt
    copied to the places behind). On a mesh every shard of the batch has slots and a queue of its own.
    """
    decode_params = model.decode_params(params)
    tokens_NP, mask_NP = jnp.asarray(prompts.tokens, jnp.int32), jnp.asarray(prompts.mask, bool)
    keys_N = row_keys(key, len(tokens_NP))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        drawn = _sample(model, slots, decode_params, tokens_NP, mask_NP, keys_N, sampling)
    else:
        ways, batch = batch_ways(mesh), jax.P(RULES["batch"])
        here = partial(_sample, model, slots // ways)
        drawn = jax.shard_map(
            here, in_specs=(jax.P(), batch, batch, batch, jax.P()), out_specs=batch, axis_names=set(RULES["batch"]),
            check_vma=False,
        )(decode_params, tokens_NP, mask_NP, keys_N, sampling)  # fmt: skip
    return Rollout(
        tokens=jnp.concatenate([tokens_NP, drawn.tokens_NR], axis=1),
        mask=jnp.concatenate([mask_NP, drawn.mask_NR], axis=1),
        response_mask=drawn.mask_NR,
        logprobs=drawn.logprobs_NR,
        ended=drawn.ended_N,
    )


def _sample(model: Model, slots: int, params: Params, tokens_NP, mask_NP, keys_N, sampling: Sampling) -> Drawn:
    """The rows of one device (or of one group of devices that share a model)."""
    n, p = tokens_NP.shape
    s, r = min(slots or n, n), sampling.max_new_tokens
    chunk = min(4 if s <= 8 else 8, r)
    at_once = max(s // 8, 1)  # rows that start together in slots that became free
    length = p + -(-r // chunk) * chunk  # of the ring
    places_L = jnp.arange(length, dtype=jnp.int32)
    stops = jnp.asarray(sampling.stop_ids or (-1,), jnp.int32)
    prompt_length_N = jnp.sum(mask_NP, axis=1, dtype=jnp.int32)

    def prefill(rows, at) -> Slots:
        """New rows, their prompts in the places of the ring before `at`. The prompt sees itself causally."""
        tokens, mask = tokens_NP[rows], mask_NP[rows]
        positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        causal = jnp.tril(jnp.ones((p, p), bool))[None] & mask[:, None, :]
        empty = model.init_cache(len(tokens), p)
        hidden, cache = model.decode(params, tokens, positions, causal, empty, jnp.int32(0))
        to_ring = lambda x, axis: jnp.roll(  # noqa: E731
            jnp.pad(x, [(0, length - p if a == axis else 0) for a in range(x.ndim)]), at - p, axis
        )
        zero = jnp.zeros(len(tokens), jnp.int32)
        live = jnp.ones(len(tokens), bool)
        return Slots(
            rows, zero, live, hidden[:, -1], to_ring(mask, 1), jax.tree.map(lambda x: to_ring(x, 2), cache)
        )

    def refill(state):
        at, waiting, slots_, drawn = state
        free_C = jnp.argsort(slots_.live_S)[:at_once]  # stable: free slots come first
        rows_C = waiting + jnp.arange(at_once, dtype=jnp.int32)
        usable_C = ~slots_.live_S[free_C] & (rows_C < n)
        new = prefill(jnp.minimum(rows_C, n - 1), at)
        place_C = jnp.where(usable_C, free_C, s)
        slots_ = jax.tree.map(lambda old, new: old.at[place_C].set(new, mode="drop"), slots_, new)
        return at, waiting + jnp.sum(usable_C, dtype=jnp.int32), slots_, drawn

    def decode_one(carry, j):
        at, slots_ = carry
        logits_SV = filter_logits(model.logits(params, slots_.hidden_SD[:, None])[:, 0], sampling)
        row_S = jnp.minimum(slots_.row_S, n - 1)
        token_S = draw(logits_SV, keys_N[row_S], slots_.age_S)
        logprob_S = jnp.take_along_axis(jax.nn.log_softmax(logits_SV), token_S[:, None], axis=1)[:, 0]
        live_S = slots_.live_S
        token_S = jnp.where(live_S, token_S, jnp.int32(sampling.pad_id))
        stopped_S = jnp.any(token_S[:, None] == stops[None], axis=1) & live_S
        place = at % length
        seen_SL = slots_.seen_SL | (places_L == place)[None]
        hidden_S1D, cache = model.decode(
            params, token_S[:, None], (prompt_length_N[row_S] + slots_.age_S)[:, None], seen_SL[:, None],
            slots_.cache, place, key_slots=at - (place - places_L) % length, query_slots=at[None],
        )  # fmt: skip
        age_S = slots_.age_S + live_S.astype(jnp.int32)
        slots_ = Slots(
            slots_.row_S, age_S, live_S & ~stopped_S & (age_S < r), hidden_S1D[:, 0], seen_SL, cache
        )
        return (at + 1, slots_), (token_S, jnp.where(live_S, logprob_S, 0.0), live_S, stopped_S)

    def decode_chunk(state):
        at, waiting, slots_, drawn = state
        row_S, age_S = slots_.row_S, slots_.age_S
        (at, slots_), out = jax.lax.scan(decode_one, (at, slots_), jnp.arange(chunk))
        tokens, logprobs, live, stopped = (x.T for x in out)
        to = (jnp.where(live, row_S[:, None], n), age_S[:, None] + jnp.arange(chunk)[None])
        drawn = Drawn(
            drawn.tokens_NR.at[to].set(tokens, mode="drop"),
            drawn.logprobs_NR.at[to].set(logprobs, mode="drop"),
            drawn.mask_NR.at[to].set(live, mode="drop"),
            drawn.ended_N.at[jnp.where(jnp.any(stopped, axis=1), row_S, n)].set(True, mode="drop"),
        )
        return at, waiting, slots_, drawn

    def can_start(state):
        _, waiting, slots_, _ = state
        free = jnp.sum(~slots_.live_S)
        return (waiting < n) & (free >= jnp.minimum(at_once, n - waiting))

    def body(state):
        if n > s:
            state = jax.lax.while_loop(can_start, refill, state)
        return decode_chunk(state)

    def unfinished(state):
        _, waiting, slots_, _ = state
        return (waiting < n) | jnp.any(slots_.live_S)

    first = jnp.arange(s, dtype=jnp.int32)
    nothing = Drawn(
        jnp.full((n, r), sampling.pad_id, jnp.int32),
        jnp.zeros((n, r), jnp.float32),
        jnp.zeros((n, r), bool),
        jnp.zeros(n, bool),
    )
    start = (jnp.int32(p), jnp.int32(s), prefill(first, jnp.int32(p)), nothing)
    return jax.lax.while_loop(unfinished, body, start)[3]


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
