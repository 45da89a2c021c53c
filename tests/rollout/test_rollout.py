"""Sampled rows: their log-probabilities are the trainer's, and each depends on its own prompt and key alone."""

import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import AXES, MESHES, MODEL, TINY, fake_params, lm_params

from jrlhf.models.config import ModelConfig
from jrlhf.models.transformer import Model
from jrlhf.rollout.rollout import _cache_ends, pad_prompts, response_ids, rollout
from jrlhf.rollout.sampling import SamplingConfig, make_sampling
from jrlhf.rollout.stops import TokenBytes, stop_table
from jrlhf.sharding import make_mesh, put_batch, sampling_ways, state_shardings
from jrlhf.training.loop import COMPILATIONS

ROWS, PROMPT, RESPONSE = 8, 5, 10  # 10 is no multiple of the chunk of 4
STOP, PAD = (3, 7), 0
KEY = jax.random.key(11)


@pytest.fixture(scope="module")
def params():
    return lm_params()


def prompts(rows=ROWS, length=PROMPT, pad_id=PAD):
    rng = np.random.default_rng(5)
    return pad_prompts(
        [rng.integers(8, 32, rng.integers(1, PROMPT + 1)).tolist() for _ in range(rows)], length, pad_id
    )


def sampling(temperature=1.0, stop=STOP, max_new_tokens=RESPONSE, pad_id=PAD, **filters):
    return make_sampling(SamplingConfig(max_new_tokens, temperature, **filters), stop, pad_id)


def roll(params, rule, key=KEY, batch=None):
    return jax.device_get(rollout(MODEL, params, prompts() if batch is None else batch, key, rule))


@jax.jit
def next_token_logits(params, tokens, mask):
    """[B, R, V] of the training-time forward pass, for the response's tokens."""
    return MODEL.logits(params, MODEL.hidden(params, tokens, mask))[:, PROMPT - 1 : -1]


def log_softmax(x):
    x = x - np.max(x, axis=-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def same(a, b):
    """Row for row the same tokens, masks and ends, and log-probabilities up to rounding."""
    for name in ("tokens", "mask", "response_mask", "ended"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)


# --- log-probabilities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_recorded_logprobs_are_those_of_the_forward_pass(params, temperature):
    out = roll(params, sampling(temperature))
    logps, _ = jax.jit(partial(MODEL.logprobs, start=PROMPT))(
        params, out.tokens, out.mask, temperature=temperature
    )
    np.testing.assert_allclose(out.logprobs, np.where(out.response_mask, logps, 0.0), atol=2e-5)
    assert np.min(out.logprobs) < -1


def test_bfloat16_rounds_alike_in_sampler_and_trainer(params):
    """Sums are taken in another order, so they differ by bfloat16's own noise; no more than either does from
    float32."""
    model = Model(replace(TINY, dtype="bfloat16"))
    out = jax.device_get(rollout(model, params, prompts(), KEY, sampling()))
    logps, _ = jax.jit(partial(model.logprobs, start=PROMPT))(params, out.tokens, out.mask)
    difference = np.abs(out.logprobs - logps)[out.response_mask]
    assert 0 < np.mean(difference) < 0.02
    dtypes = {x.dtype.name for x in jax.tree.leaves(model.decode_params(params)["layers"])}
    assert dtypes == {"bfloat16", "float32"}  # norm scales are not rounded, as in training


def test_recorded_logprobs_under_filters_are_renormalised(params):
    temperature, top_k, min_p = 1.4, 5, 0.05
    out = roll(params, sampling(temperature, top_k=top_k, top_p=0.9, min_p=min_p))
    x = np.asarray(next_token_logits(params, out.tokens, out.mask), np.float64) / temperature
    x = np.where(x >= np.sort(x, axis=-1)[..., -top_k, None], x, -np.inf)
    p = np.exp(log_softmax(x))
    descending = -np.sort(-p, axis=-1)
    last = np.argmax(np.cumsum(descending, axis=-1) >= 0.9, axis=-1)
    p = np.where(p >= np.take_along_axis(descending, last[..., None], axis=-1), p, 0.0)
    p = np.where(p >= min_p * np.max(p, axis=-1, keepdims=True), p, 0.0)
    p = p / np.sum(p, axis=-1, keepdims=True)
    chosen = np.take_along_axis(p, out.tokens[:, PROMPT:, None], axis=-1)[..., 0][out.response_mask]
    assert np.min(chosen) > 0
    np.testing.assert_allclose(out.logprobs[out.response_mask], np.log(chosen), atol=1e-4)


def test_greedy_takes_the_most_likely_token_and_is_sure_of_it(params):
    out = roll(params, sampling(0.0))
    best = np.argmax(next_token_logits(params, out.tokens, out.mask), axis=-1)
    np.testing.assert_array_equal(out.tokens[:, PROMPT:][out.response_mask], best[out.response_mask])
    np.testing.assert_array_equal(out.logprobs, 0.0)


@pytest.mark.parametrize("vocab", [32, 700])  # one block of the inverse CDF, and three
def test_frequencies_are_the_models_probabilities(vocab):
    """Two tokens from one prompt, many times: the first, and the second given the most frequent first."""
    rows = 8192
    model = Model(ModelConfig(vocab_size=vocab, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=8))
    params = fake_params(model)
    prompt = pad_prompts([[4, 1]] * rows, 3, PAD)
    out = jax.device_get(rollout(model, params, prompt, KEY, sampling(0.8, stop=(), max_new_tokens=2)))
    first, second = out.tokens[:, 3], out.tokens[:, 4]
    common = np.bincount(first).argmax()
    context = np.array([[4, 1, common]], np.int32)
    logits = np.asarray(jax.jit(lambda t: model.logits(params, model.hidden(params, t, t >= 0)))(context))[0]
    p = np.exp(log_softmax(logits.astype(np.float64) / 0.8))
    for drawn, probability in ((first, p[1]), (second[first == common], p[2])):
        n = len(drawn)
        order = np.argsort(-probability)
        bins = np.minimum(np.arange(vocab), 40)[np.argsort(order)]  # the tail in one bin
        expected = n * np.bincount(bins, weights=probability)
        observed = np.bincount(bins[drawn], minlength=len(expected))
        assert np.min(expected) > 5 or n < 2000
        degrees = len(expected) - 1
        assert np.sum((observed - expected) ** 2 / expected) < degrees + 4 * np.sqrt(2 * degrees)


# --- ends ---------------------------------------------------------------------------------------------------------


def test_a_stop_token_ends_its_row_and_is_kept(params):
    out = roll(params, sampling(1.5, stop=tuple(range(0, 32, 8))))
    ends = np.isin(out.tokens[:, PROMPT:], range(0, 32, 8))
    lengths = np.sum(out.response_mask, axis=1)
    assert np.any(out.ended)
    for row in range(ROWS):
        sampled = ends[row] & out.response_mask[row]
        assert np.array_equal(out.response_mask[row], np.arange(RESPONSE) < lengths[row])
        assert sampled.sum() == int(out.ended[row])
        assert out.ended[row] == sampled[lengths[row] - 1]
        assert out.ended[row] or lengths[row] == RESPONSE
        assert np.all(out.tokens[row, PROMPT + lengths[row] :] == PAD)
        assert np.all(out.logprobs[row, lengths[row] :] == 0)
    np.testing.assert_array_equal(out.mask[:, PROMPT:], out.response_mask)
    assert [len(ids) for ids in response_ids(out)] == lengths.tolist()
    assert response_ids(out)[0] == out.tokens[0, PROMPT : PROMPT + lengths[0]].tolist()


def test_no_stop_token_runs_to_the_length(params):
    out = roll(params, sampling(stop=()))
    assert np.all(out.response_mask)
    assert not np.any(out.ended)
    assert out.tokens.shape == (ROWS, PROMPT + RESPONSE)


def test_stopping_early_leaves_the_same_rows(params):
    """Rows that all end soon, alone and beside one that goes on to the length; and rows added after others
    change nothing."""
    rule = sampling(1.0, stop=tuple(i for i in range(32) if i % 3))
    alone = roll(params, rule)
    more = prompts()
    crowd = type(more)(np.concatenate([more.tokens] * 40), np.concatenate([more.mask] * 40))
    beside = roll(params, rule, batch=crowd)
    longest = [np.sum(x.response_mask, axis=1).max() for x in (alone, beside)]
    assert longest[0] <= 4 < longest[1]  # the first loop ended after one chunk
    same(alone, jax.tree.map(lambda x: x[:ROWS], beside))


# --- keys ---------------------------------------------------------------------------------------------------------


def test_rows_and_keys_give_different_answers(params):
    """The same prompt in every row, and two consecutive keys."""
    batch = pad_prompts([[9, 10, 11]] * ROWS, PROMPT, PAD)
    rule = sampling(1.5, stop=())
    runs = [roll(params, rule, jax.random.fold_in(KEY, step), batch).tokens[:, PROMPT:] for step in (0, 1)]
    rows = np.concatenate(runs)
    assert len(np.unique(rows, axis=0)) == 2 * ROWS
    # Nor is one row another one shifted by some steps.
    assert all(np.mean(a[1:] == a[:-1]) < 0.5 for a in rows)


def test_padding_of_the_prompts_changes_nothing(params):
    short, wide = (
        roll(params, sampling(), batch=prompts(length=n, pad_id=pad))
        for n, pad in ((PROMPT, 0), (PROMPT + 4, 21))
    )
    same(short, wide._replace(tokens=np.where(wide.mask, wide.tokens, 0)[:, 4:], mask=wide.mask[:, 4:]))


# --- compilation and devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"slots": 3}, {"group": 4, "slots": 8}], ids=str)
def test_new_values_do_not_recompile(params, how):
    """Other prompts, keys, first rows, values of the filters, stop strings whose tables have one size, weights."""

    def call(number, **filters):
        batch = jax.tree.map(jnp.asarray, many(12))._replace(tokens=jnp.asarray(many(12).tokens + number % 2))
        rule = stopped_by(("ab", "bcd", "da\n", "ca")[number], temperature=1.0 + 0.1 * number, **filters)
        more = jax.tree.map(lambda x: x + 0.01 * number, params)
        rollout(MODEL, more, batch, jax.random.key(number), rule, first_row=12 * number, **how)

    call(0)
    call(0, top_k=4, top_p=0.8, min_p=0.1)
    before, programs = COMPILATIONS.count, rollout._cache_size()
    for number in (1, 2, 3):
        call(number)
        call(number, top_k=4 + number, top_p=0.8 / number, min_p=0.1 + 0.1 * number)
    assert COMPILATIONS.count == before
    assert rollout._cache_size() == programs
    call(1, top_k=4)  # which filters there are is static
    assert COMPILATIONS.count > before


@pytest.mark.parametrize("name", MESHES)
def test_a_mesh_samples_the_same_tokens(params, name):
    mesh = make_mesh(MESHES[name])
    rule = sampling(0.8)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, state_shardings(mesh, params, AXES))
        out = rollout(MODEL, spread, put_batch(mesh, prompts()), KEY, rule)
        shards = {s.data.shape[0] for s in out.tokens.addressable_shards}
    same(jax.device_get(out), roll(params, rule))
    assert shards == {ROWS // sampling_ways(mesh, ROWS)}


def test_pad_prompts():
    batch = pad_prompts([[5], [6, 7, 8]], 4, 2)
    assert batch.tokens.tolist() == [[2, 2, 2, 5], [2, 6, 7, 8]]
    assert batch.mask.tolist() == [[False] * 3 + [True], [False] + [True] * 3]
    for wrong in ([[]], [[1, 2, 3, 4, 5]]):
        with pytest.raises(ValueError, match="prompt 0"):
            pad_prompts(wrong, 4, 2)
    assert batch.tokens.dtype == jnp.int32
    assert TINY.vocab_size == 32


# --- slots and groups -------------------------------------------------------------------------------------------

STOPS = (3, 7, 9, 11)


def many(rows=40, repeated=1):
    rng = np.random.default_rng(6)
    ids = [rng.integers(8, 32, rng.integers(1, PROMPT + 1)).tolist() for _ in range(rows)]
    return pad_prompts([row for row in ids for _ in range(repeated)], PROMPT, PAD)


def drawn(model, params, batch, **how):
    rule = sampling(1.2, max_new_tokens=22, stop=STOPS)
    return jax.device_get(rollout(model, params, batch, KEY, rule, **how))


@pytest.mark.parametrize("slots", [1, 3, 8, 16, 40])
def test_slots_change_no_token(params, slots):
    at_once = drawn(MODEL, params, many())
    same(drawn(MODEL, params, many(), slots=slots), at_once)
    lengths = at_once.response_mask.sum(1)
    assert lengths.min() < 3  # rows end at all times
    assert lengths.max() == 22


@pytest.mark.parametrize("slots", [0, 4, 5, 12])
def test_a_prompt_that_is_read_once_gives_its_group_the_same_tokens(params, slots):
    alone = drawn(MODEL, params, many(10, repeated=4))
    same(drawn(MODEL, params, many(10), group=4, slots=slots), alone)


@pytest.mark.parametrize("how", [{}, {"slots": 8}, {"group": 4}, {"group": 4, "slots": 8}], ids=str)
@pytest.mark.parametrize("name", ["data", "all"])
def test_slots_and_groups_on_a_mesh_change_no_token(params, name, how):
    mesh, group = make_mesh(MESHES[name]), how.get("group", 1)
    rule = sampling(1.2, max_new_tokens=22, stop=STOPS)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, state_shardings(mesh, params, AXES))
        out = rollout(MODEL, spread, put_batch(mesh, many(64 // group)), KEY, rule, **how)
    same(jax.device_get(out), drawn(MODEL, params, many(64 // group, repeated=group)))


@pytest.mark.parametrize(
    "change",
    [{"window": 4, "windowed": (True, False)}, {"positions": "learned"}, {"attention_softcap": 5.0}],
    ids=str,
)
@pytest.mark.parametrize("how", [{"slots": 4}, {"group": 4}, {"group": 4, "slots": 8}], ids=str)
def test_slots_and_groups_of_every_kind_of_attention(change, how):
    model = Model(replace(TINY, **change))
    params, group = fake_params(model), how.get("group", 1)
    alone = drawn(model, params, many(40 // group, repeated=group))
    same(drawn(model, params, many(40 // group), **how), alone)


def test_a_cache_that_grows_changes_no_token(params, monkeypatch):
    """Long answers: the cache has room for a part of them, then for more."""
    module = sys.modules[rollout.__module__]
    grows = drawn(MODEL, params, many(8))
    monkeypatch.setattr(module, "_cache_ends", lambda steps, chunk: [chunk, 3 * chunk, steps])
    jax.clear_caches()
    same(drawn(MODEL, params, many(8)), grows)
    same(drawn(MODEL, params, many(2), group=4), drawn(MODEL, params, many(2, repeated=4)))
    jax.clear_caches()


@pytest.mark.parametrize(("steps", "chunk"), [(4, 4), (128, 8), (200, 8), (256, 8), (1000, 8), (4096, 8)])
def test_the_cache_ends_where_the_last_token_does(steps, chunk):
    ends = _cache_ends(steps, chunk)
    assert ends[-1] == steps
    assert all(end % chunk == 0 for end in ends)
    assert ends == sorted(set(ends))
    assert len(ends) == min(max(steps // 128, 1), 4)


def test_rows_are_numbered_from_the_first(params):
    """A batch in two calls draws what one call draws."""
    batch = many(16)
    second = jax.tree.map(lambda x: x[8:], batch)
    whole, part = drawn(MODEL, params, batch), drawn(MODEL, params, second, first_row=8)
    same(part, jax.tree.map(lambda x: x[8:], whole))


def test_more_answers_to_a_prompt_than_slots(params):
    """A group is begun by some of its rows, and its prompt is read again where it has to be."""
    alone = drawn(MODEL, params, many(3, repeated=12))
    for slots in (1, 2, 8, 11):
        same(drawn(MODEL, params, many(3), group=12, slots=slots), alone)
    # Two start at a time, of three to a prompt: the second may have to wait for its prompt.
    same(drawn(MODEL, params, many(9), group=3, slots=17), drawn(MODEL, params, many(9, repeated=3)))


def test_rows_start_as_soon_as_a_few_slots_are_free(params):
    """The order in which rows have their slots: a few at a time, whatever the group."""
    chunks = []
    stream = lambda rows, tokens, real: chunks.append((rows, real))  # noqa: E731
    drawn(MODEL, params, many(2), group=20, slots=16, stream=stream)
    jax.effects_barrier()
    assert {rows.shape for rows, _ in chunks} == {(16,)}
    starts = [sorted({*rows.tolist()} - {*before.tolist()}) for (before, _), (rows, _) in pairwise(chunks)]
    started = [row for some in starts for row in some]
    assert started == list(range(16, 40))  # in their order
    assert min(len(some) for some in starts if some) == 2
    busy = np.mean([np.sum(real[:, 0]) for rows, real in chunks if rows.max() < 39])
    assert busy >= 14  # at most one slot is empty, waiting for another, when a chunk begins


# --- stop strings -----------------------------------------------------------------------------------------------

# Token i writes the letter a, b, c or d, one of every four two of them.
WRITTEN = [("abcd"[i % 4] + ("a" if i % 16 > 11 else "")).encode() for i in range(32)]
TOKENS = TokenBytes(WRITTEN, WRITTEN, [False] * 32)


def stopped_by(*stop, stop_ids=(), temperature=1.2, **filters):
    config = SamplingConfig(22, temperature, stop=stop, **filters)
    return make_sampling(config, stop_ids, PAD, stop_table(stop, TOKENS, 32))


@pytest.mark.parametrize("how", [{}, {"slots": 3}, {"group": 2, "slots": 8}], ids=str)
def test_a_row_ends_with_the_token_that_completes_a_stop_string(params, how):
    stop = ("abd", "ca", "ddd")
    group = how.get("group", 1)
    batch = many(40 // group)
    rule = replace(stopped_by(*stop), next_state=None)
    free = jax.device_get(rollout(MODEL, params, many(40 // group, repeated=group), KEY, rule))
    out = jax.device_get(rollout(MODEL, params, batch, KEY, stopped_by(*stop), **how))
    lengths = []
    for i, ids in enumerate(response_ids(free)):
        texts = [b"".join(WRITTEN[t] for t in ids[: n + 1]) for n in range(len(ids))]
        ends = [n + 1 for n, text in enumerate(texts) if any(s.encode() in text for s in stop)]
        lengths.append(ends[0] if ends else 22)
        assert out.ended[i] == bool(ends)
        np.testing.assert_array_equal(out.response_mask[i], np.arange(22) < lengths[-1])
    np.testing.assert_array_equal(
        out.tokens[:, PROMPT:], np.where(out.response_mask, free.tokens[:, PROMPT:], PAD)
    )
    np.testing.assert_allclose(out.logprobs, np.where(out.response_mask, free.logprobs, 0.0), atol=2e-5)
    assert min(lengths) < 4
    assert max(lengths) == 22


def test_stop_tokens_and_stop_strings_end_rows_side_by_side(params):
    out = roll(params, stopped_by("abd", "ca", stop_ids=STOPS), batch=many())
    last = [ids[-1] for ids in response_ids(out)]
    texts = [b"".join(WRITTEN[t] for t in ids) for ids in response_ids(out)]
    by_token, by_string = np.isin(last, STOPS), np.array([b"abd" in t or b"ca" in t for t in texts])
    np.testing.assert_array_equal(out.ended, by_token | by_string)
    assert np.any(by_token & ~by_string)
    assert np.any(by_string & ~by_token)


def test_stop_strings_on_a_mesh(params):
    mesh = make_mesh(MESHES["all"])
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, state_shardings(mesh, params, AXES))
        out = rollout(MODEL, spread, put_batch(mesh, many()), KEY, stopped_by("abd", "ca"), slots=16)
    same(jax.device_get(out), roll(params, stopped_by("abd", "ca"), batch=many()))


def test_without_stop_strings_nothing_is_added_to_the_program(params):
    rule = stopped_by("abd")
    sizes = [
        str(jax.make_jaxpr(partial(rollout, MODEL))(params, many(), KEY, some)).count("\n")
        for some in (rule, replace(rule, next_state=None))
    ]
    assert sizes[0] > sizes[1]
    assert sum(x is not None for x in jax.tree.leaves(replace(rule, next_state=None))) == 4


# --- streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"slots": 3}, {"group": 4}], ids=str)
def test_a_stream_has_every_token_in_its_order(params, how):
    told: dict[int, list[int]] = {}

    def stream(rows, tokens, real):
        assert all(isinstance(x, np.ndarray) for x in (rows, tokens, real))
        for row, of_row, m in zip(rows.tolist(), tokens, real, strict=True):
            told.setdefault(row, []).extend(of_row[m].tolist())

    out = drawn(MODEL, params, many(8), stream=stream, **how)
    jax.effects_barrier()
    told.pop(len(out.tokens), None)  # a slot that has no row yet
    assert [told[i] for i in range(len(out.tokens))] == response_ids(out)
    same(out, drawn(MODEL, params, many(8), **how))


def test_a_stream_is_of_one_device(params):
    mesh = make_mesh(MESHES["data"])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="the mesh has 8"):
        rollout(MODEL, params, put_batch(mesh, prompts()), KEY, sampling(), stream=print)
