"""The one function that samples responses: training, labelling, best-of-n, evaluation and `generate` call it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from jrlhf.models.transformer import Cache, Model
from jrlhf.ops.masking import lengthened
from jrlhf.rollout.sampling import Sampling, draw, filter_logits, row_keys
from jrlhf.rollout.stops import ACCEPTED
from jrlhf.sharding import MESH_AXES, fetch, path_names, sampling_axes, sampling_ways
from jrlhf.types import Params, Prompts, Rollout


class Slots(NamedTuple):
    """Rows that are being sampled, one in each of S slots."""

    row_S: jax.Array  # which of the N rows; N: none yet
    age_S: jax.Array  # tokens drawn so far
    live_S: jax.Array
    stop_S: Any  # what has been written of the stop strings, a state of `sampling.next_state`; () without any
    hidden_SD: jax.Array  # of the last token: its logits are those of the next
    seen_SL: jax.Array  # places of the cache that hold tokens of this row
    cache: Cache  # [S, K, L, H] a layer


class Read(NamedTuple):
    """Prompts after their prefill, C of the Q: what rows start from."""

    first: jax.Array  # the number of the first of them
    hidden_CD: jax.Array  # of the last token
    mask_CP: jax.Array
    cache: Cache  # [C, K, P, H] a layer


class Drawn(NamedTuple):
    """What all N rows have so far."""

    tokens_NR: jax.Array
    logprobs_NR: jax.Array
    mask_NR: jax.Array
    ended_N: jax.Array


class State(NamedTuple):
    at: jax.Array  # the place that the next token of every slot is written to, before it is wrapped
    waiting: jax.Array  # the first row that has no slot yet
    slots: Slots
    read: Read
    drawn: Drawn


# Is told of every chunk of tokens, as numpy arrays: rows [S], tokens [S, C], and which of them are real, [S, C].
Stream = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


@partial(jax.jit, static_argnames=("model", "group", "slots", "stream"))
def rollout(
    model: Model,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    sampling: Sampling,
    group: int = 1,
    slots: int = 0,
    first_row: jax.Array | int = 0,
    stream: Stream | None = None,
) -> Rollout:
    """Continue every prompt `group` times, until a stop token, a stop string or `max_new_tokens`.

    prompts: tokens and mask [Q, P], left-padded. key: one key; row i draws from `fold_in(key, first_row + i)`, so that
    a row's tokens do not depend on the other rows. Returns a `Rollout` of N = Q * group rows, those of a prompt next
    to each other, [N, P + R] tokens whose `logprobs` are those of the distribution that was sampled (temperature and
    filters included).

    slots: how many rows are sampled at a time, 0 for all. Where there are more rows, each that ends leaves its slot to
    the next one, inside this one program. `group` and `slots` change no draw, only speed and memory (tokens may differ
    where rounding decides: sums are taken in another order).

    stream: called with each chunk of tokens as it is drawn, in their order, by the running program. On one device only
    (ValueError otherwise). Another function is another program.

    - A prompt is read once, whatever its group. With all rows at a time its keys and values are not copied either: the
      group's answers attend to the same ones.
    - Tokens are decoded by `lax.scan` in chunks inside a `while_loop`: the scan has a known length (no host
      synchronisation per token on a GPU), the loop ends when all rows have.
    - All slots write to the same place of their caches, one contiguous update whatever their ages. With a queue the
      cache is a ring, and the prompt of a row that starts later is copied to the places behind the current one;
      without, it grows in a few steps, so that attention does not read what is still empty.
    - On a mesh every shard of the rows (`sampling_axes`) has slots and a queue of its own, and whole weights (but for
      `tensor`, and an expert's for `expert`).
    """
    decode_params = model.decode_params(params)
    tokens_QP, mask_QP = jnp.asarray(prompts.tokens, jnp.int32), jnp.asarray(prompts.mask, bool)
    keys_N = row_keys(key, len(tokens_QP) * group, first_row)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        drawn = _sample(model, group, slots, decode_params, tokens_QP, mask_QP, keys_N, sampling, stream)
    elif stream is not None:
        raise ValueError(f"a stream comes of one device, and the mesh has {mesh.size}")
    else:
        rows = jax.P(sampling_axes(mesh, len(tokens_QP)))
        here = partial(_sample, model, group, slots // sampling_ways(mesh, len(tokens_QP)))
        drawn = jax.shard_map(
            here, in_specs=(_weights(model, decode_params), rows, rows, rows, jax.P()), out_specs=rows,
            axis_names=set(MESH_AXES) - {"tensor"}, check_vma=False,
        )(decode_params, tokens_QP, mask_QP, keys_N, sampling)  # fmt: skip
    repeated = lambda x: jnp.repeat(x, group, axis=0)  # noqa: E731
    return Rollout(
        tokens=jnp.concatenate([repeated(tokens_QP), drawn.tokens_NR], axis=1),
        mask=jnp.concatenate([repeated(mask_QP), drawn.mask_NR], axis=1),
        response_mask=drawn.mask_NR,
        logprobs=drawn.logprobs_NR,
        ended=drawn.ended_N,
    )


def _weights(model: Model, decode_params: Params) -> Any:
    """How each device has them: whole, but for the experts, of which it has its own. (`tensor` splits by itself.)"""
    if not model.config.moe.experts:
        return jax.P()
    axes = model.logical_axes()

    def split(path: tuple, _: Any) -> jax.P:
        names = path_names(path)
        own = axes[(names[0], *names[2:])][1:] if names[0] == "layers" else axes[names]
        return jax.P(*["expert" if axis == "experts" else None for axis in own])

    return jax.tree_util.tree_map_with_path(split, decode_params)


def _sample(
    model: Model,
    group: int,
    slots: int,
    params: Params,
    tokens_QP,
    mask_QP,
    keys_N,
    sampling: Sampling,
    stream: Stream | None = None,
) -> Drawn:
    """The rows of one device (or of one group of devices that share a model)."""
    (q, p), r = tokens_QP.shape, sampling.max_new_tokens
    n = q * group
    s = min(slots or n, n)
    queue = n > s
    shared = group > 1 and not queue  # the prompts' keys and values stay where they were read
    chunk = _chunk(s, r)
    steps = -(-r // chunk) * chunk
    # With a queue rows start where a few slots are free, and as many prompts are read as they need.
    at_once = max(s // 8, 1) if queue else s
    c = max(at_once // group, 1) if queue else q
    before = p if shared else 0  # slots of the cache's numbering that are not in the slots' own cache
    stops = jnp.asarray(sampling.stop_ids or (-1,), jnp.int32)
    next_state = sampling.next_state
    length_N = jnp.repeat(jnp.sum(mask_QP, axis=1, dtype=jnp.int32), group)

    def read_prompts(first) -> Read:
        """Prompts first ... first + C. Each sees itself causally."""
        index = jnp.minimum(first + jnp.arange(c, dtype=jnp.int32), q - 1)
        tokens, mask = tokens_QP[index], mask_QP[index]
        positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        causal = jnp.tril(jnp.ones((p, p), bool))[None] & mask[:, None, :]
        hidden, cache = model.decode(params, tokens, positions, causal, model.init_cache(c, p), jnp.int32(0))
        return Read(first, hidden[:, -1], mask, cache)

    def started(read: Read, rows, at, length: int) -> Slots:
        """Rows before their first token. Where prompts are not shared, they lie in the places before `at`."""
        of = jnp.clip(rows // group - read.first, 0, c - 1)
        a = len(rows)

        def to_places(x, axis):
            room = lengthened(x, axis, length - p)
            return jnp.roll(room, at - p, axis) if queue else room

        if shared:
            seen, cache = jnp.pad(read.mask_CP[of], ((0, 0), (0, length))), model.init_cache(a, length)
        else:
            seen = to_places(read.mask_CP[of], 1)
            cache = jax.tree.map(lambda x: to_places(x[of], 2), read.cache)
        age = jnp.zeros(a, jnp.int32)
        stop = () if next_state is None else jnp.zeros(a, jnp.int32)
        return Slots(rows, age, jnp.ones(a, bool), stop, read.hidden_CD[of], seen, cache)

    def refill(state: State) -> State:
        """Rows whose prompts are read start in free slots."""
        read = jax.lax.cond(
            state.waiting // group >= state.read.first + c,
            lambda: read_prompts(state.waiting // group),
            lambda: state.read,
        )
        free_A = jnp.argsort(state.slots.live_S)[:at_once]  # stable: free slots come first
        rows_A = state.waiting + jnp.arange(at_once, dtype=jnp.int32)
        usable_A = ~state.slots.live_S[free_A] & (rows_A < n) & (rows_A // group < read.first + c)
        new = started(read, rows_A, state.at, state.slots.seen_SL.shape[1])
        place_A = jnp.where(usable_A, free_A, s)
        slots = jax.tree.map(lambda old, new: old.at[place_A].set(new, mode="drop"), state.slots, new)
        waiting = state.waiting + jnp.sum(usable_A, dtype=jnp.int32)
        return state._replace(waiting=waiting, slots=slots, read=read)

    def decode_one(carry, prefix: Cache | None):
        at, slots = carry
        length = slots.cache[0].k_BKSH.shape[2]
        place = (at - before) % length
        places_L = jnp.arange(length, dtype=jnp.int32)
        behind_L = at - (place - places_L) % length if queue else before + places_L
        numbers_L = jnp.concatenate([jnp.arange(before, dtype=jnp.int32), behind_L])

        logits_SV = filter_logits(model.logits(params, slots.hidden_SD[:, None])[:, 0], sampling)
        row_S = jnp.minimum(slots.row_S, n - 1)
        token_S = draw(logits_SV, keys_N[row_S], slots.age_S)
        logprob_S = jnp.take_along_axis(jax.nn.log_softmax(logits_SV), token_S[:, None], axis=1)[:, 0]
        live_S = slots.live_S
        token_S = jnp.where(live_S, token_S, jnp.int32(sampling.pad_id))
        stopped_S = jnp.any(token_S[:, None] == stops[None], axis=1)
        stop_S = slots.stop_S
        if next_state is not None:
            stop_S = next_state[stop_S, token_S].astype(jnp.int32)
            stopped_S |= stop_S == ACCEPTED
        stopped_S &= live_S
        seen_SL = slots.seen_SL | (jnp.arange(before + length) == before + place)[None]
        hidden_S1D, cache = model.decode(
            params, token_S[:, None], (length_N[row_S] + slots.age_S)[:, None], seen_SL[:, None], slots.cache, place,
            query_slots=at[None], key_slots=numbers_L, prefix=prefix,
        )  # fmt: skip
        age_S = slots.age_S + live_S.astype(jnp.int32)
        live_next_S = live_S & ~stopped_S & (age_S < r)
        slots = Slots(slots.row_S, age_S, live_next_S, stop_S, hidden_S1D[:, 0], seen_SL, cache)
        return (at + 1, slots), (token_S, jnp.where(live_S, logprob_S, 0.0), live_S, stopped_S)

    def decode_chunk(state: State) -> State:
        row_S, age_S, drawn = state.slots.row_S, state.slots.age_S, state.drawn
        prefix = state.read.cache if shared else None
        (at, slots), out = jax.lax.scan(
            lambda carry, _: decode_one(carry, prefix), (state.at, state.slots), None, length=chunk
        )
        tokens, logprobs, live, stopped = (x.T for x in out)
        if stream is not None:
            told = lambda *chunk: stream(*map(np.asarray, chunk))  # noqa: E731
            io_callback(told, None, row_S, tokens, live, ordered=True)
        to = (jnp.where(live, row_S[:, None], n), age_S[:, None] + jnp.arange(chunk)[None])
        drawn = Drawn(
            drawn.tokens_NR.at[to].set(tokens, mode="drop"),
            drawn.logprobs_NR.at[to].set(logprobs, mode="drop"),
            drawn.mask_NR.at[to].set(live, mode="drop"),
            drawn.ended_N.at[jnp.where(jnp.any(stopped, axis=1), row_S, n)].set(True, mode="drop"),
        )
        return state._replace(at=at, slots=slots, drawn=drawn)

    def can_start(state: State):
        free = jnp.sum(~state.slots.live_S)
        return (state.waiting < n) & (free >= jnp.minimum(at_once, n - state.waiting))

    def body(state: State) -> State:
        return decode_chunk(jax.lax.while_loop(can_start, refill, state) if queue else state)

    def unfinished(state: State):
        return (state.waiting < n) | jnp.any(state.slots.live_S)

    def fits(end: int, state: State):
        return unfinished(state) & (state.at < p + end)

    def grown(state: State, length: int) -> State:
        more = length - state.slots.cache[0].k_BKSH.shape[2]
        cache = jax.tree.map(lambda x: lengthened(x, 2, more), state.slots.cache)
        seen_SL = lengthened(state.slots.seen_SL, 1, more)
        return state._replace(slots=state.slots._replace(seen_SL=seen_SL, cache=cache))

    nothing = Drawn(
        jnp.full((n, r), sampling.pad_id, jnp.int32),
        jnp.zeros((n, r), jnp.float32),
        jnp.zeros((n, r), bool),
        jnp.zeros(n, bool),
    )
    read, at = read_prompts(jnp.int32(0)), jnp.int32(p)
    if queue:
        idle = started(read, jnp.full(s, n, jnp.int32), at, p + steps)._replace(live_S=jnp.zeros(s, bool))
        return jax.lax.while_loop(unfinished, body, State(at, jnp.int32(0), idle, read, nothing)).drawn
    ends = _cache_ends(steps, chunk)
    first = started(read, jnp.arange(n, dtype=jnp.int32), at, p - before + ends[0])
    state = State(at, jnp.int32(n), first, read, nothing)
    for end in ends:
        state = grown(state, p - before + end)
        state = jax.lax.while_loop(partial(fits, end), body, state)
    return state.drawn


def _chunk(slots: int, answer: int) -> int:
    """Tokens that are drawn between two looks at which rows have ended."""
    return min(4 if slots <= 8 else 8, answer)


def loop_trips(rows: int, slots: int, answer: int) -> tuple[float, ...]:
    """How often the loops of `rollout` run, outer ones first, where each of a device's rows has `answer` tokens; that
    over free slots on average. For a planner: the program finds out."""
    s = min(slots or rows, rows)
    chunk = _chunk(s, answer)
    steps = -(-answer // chunk) * chunk
    if rows > s:
        chunks = rows / s * steps / chunk
        return chunks, rows / max(s // 8, 1) / chunks
    ends = _cache_ends(steps, chunk)
    return tuple((end - start) / chunk for start, end in zip([0, *ends[:-1]], ends, strict=True))


def _cache_ends(steps: int, chunk: int) -> list[int]:
    """After how many tokens the cache grows: one to four pieces of at least 128 tokens, whole chunks each."""
    pieces = min(max(steps // 128, 1), 4)
    return [-(-steps * (i + 1) // pieces // chunk) * chunk for i in range(pieces)]


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
