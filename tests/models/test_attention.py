"""Attention's kernels against plain attention, and caches in 8 bits."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MESHES, TINY, assert_close, fake_params
from jax.experimental.pallas.ops.tpu import splash_attention

from jrlhf.config import UserError
from jrlhf.models import attention
from jrlhf.models.attention import LayerCache, Segments, attend, attention_implementation, quantized, splash
from jrlhf.models.config import MoEConfig
from jrlhf.models.transformer import Model, causal_mask
from jrlhf.rollout.rollout import rollout
from jrlhf.rollout.sampling import SamplingConfig, make_sampling
from jrlhf.sharding import make_mesh, map_shards
from jrlhf.types import Prompts

B, T, N, K, H = 4, 200, 4, 2, 8


@pytest.fixture
def interpreted(monkeypatch):
    """TPU kernels run on a CPU, and the CPU is taken for a TPU."""
    run = partial(splash_attention.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha", run)
    monkeypatch.setattr(attention, "platform", lambda: "tpu")


def segments():
    """Packed texts; padding on the right, on the left and on both sides; a whole row."""
    t = np.arange(T)
    rows = (1 + (t > 60) + (t > 130), t < 150, t > 70, (t > 20) & (t < 190))
    return np.stack(rows).astype(np.int32)


def arrays(prefix: int = 0):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    q, k, v, weights = (
        draw(B, T - prefix, N, H),
        draw(B, K, T, H),
        draw(B, K, T, H),
        draw(B, T - prefix, N, H),
    )
    return q, k, v, weights


@pytest.mark.parametrize(
    ("window", "softcap", "windowed"),
    [(0, 0.0, False), (40, 0.0, True), (0, 3.0, False), (40, 3.0, "traced")],
)
def test_splash_is_plain_attention(interpreted, window, softcap, windowed):
    """Results and gradients at real tokens, with grouped heads; of packed rows and padding on any side."""
    kinds = (True, False) if windowed == "traced" else ()
    config = replace(TINY, window=window, windowed=kinds, attention_softcap=softcap, attention="splash")
    ids, (q, k, v, weights) = jnp.asarray(segments()), arrays()
    t = np.arange(T)
    near = (t[:, None] - t[None] < (window or T))[None]
    weights = jnp.where((ids != 0)[:, :, None, None], weights, 0.0)

    def of_kernel(q, k, v, windowed):
        out = splash(config, q, LayerCache(k, v), Segments(ids, ids), windowed, 0.3)
        return jnp.sum(jnp.where(weights != 0, out * weights, 0.0)), out

    def plain(q, k, v, windowed):
        mask = causal_mask(ids) & (near if windowed else True)
        out = attend(q, LayerCache(k, v), mask, 0.3, softcap)
        return jnp.sum(jnp.where(weights != 0, out * weights, 0.0)), out

    real = np.asarray(ids != 0)[:, :, None, None]
    for here in (True, False) if windowed == "traced" else (windowed,):
        asked = jnp.asarray(here) if windowed == "traced" else here
        value = lambda f: jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)  # noqa: E731
        (_, out), grads = jax.jit(value(of_kernel), static_argnums=() if windowed == "traced" else 3)(
            q, k, v, asked
        )
        (_, expected), same = value(plain)(q, k, v, here)
        assert np.isfinite(out).all()
        assert_close(np.where(real, out, 0.0), np.where(real, expected, 0.0))
        assert_close(grads, same, atol=2e-5)


@pytest.mark.parametrize("change", [{}, {"window": 50, "windowed": (True, False)}], ids=str)
def test_a_model_with_splash_is_the_same_model(interpreted, change):
    """Alone, with shared prompts and on a mesh: log-probabilities and gradients."""
    config = replace(TINY, context=T, **change)
    plain, model = Model(replace(config, attention="xla")), Model(replace(config, attention="splash"))
    params, rng = fake_params(plain), np.random.default_rng(0)
    prompts, group, start = 4, 2, 60
    tokens = np.concatenate(
        [np.repeat(rng.integers(1, 32, (prompts, start)), group, 0), rng.integers(1, 32, (8, T - start))],
        axis=1,
    )
    mask = np.arange(T) >= np.repeat(rng.integers(0, start, prompts), group)[:, None]
    mask &= np.arange(T) < rng.integers(start, T + 1, 8)[:, None]

    def loss(model, group, params):
        logprobs, _ = model.logprobs(params, tokens, mask, start, group=group)
        return jnp.sum(jnp.where(mask[:, start:], logprobs, 0.0)) / 100

    def run(model, group):
        return jax.jit(jax.value_and_grad(partial(loss, model, group)))(params)

    expected = run(plain, 1)
    assert_close(run(model, 1), expected, atol=2e-5)
    assert_close(run(model, group), expected, atol=2e-5)
    with jax.set_mesh(make_mesh(MESHES["all"])):
        assert_close(run(model, 1), expected, atol=2e-5)


@pytest.mark.parametrize("rows", [8, 3])
def test_a_kernel_gets_its_own_part_of_rows_and_heads(rows):
    """Of a mesh of 2 x 2 x 2; rows that do not divide are everywhere. Gradients are those of one device."""
    x, weights = jnp.arange(rows * 4.0).reshape(rows, 4), jnp.arange(1.0, 5)
    parts = []

    def kernel(x, w):
        parts.append(x.shape)
        return jnp.sin(x) * w[None]

    axes = (("batch", "heads"), ("heads",))
    loss = lambda x, w: jnp.sum(map_shards(kernel, axes, axes[0], x, w) ** 2)  # noqa: E731
    expected = jax.value_and_grad(loss, argnums=(0, 1))(x, weights)
    with jax.set_mesh(make_mesh(MESHES["all"])):
        found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, weights)
    assert_close(found, expected)
    assert set(parts) == {(rows, 4), (2, 2) if rows == 8 else (3, 2)}


def test_what_auto_picks(monkeypatch):
    config = replace(TINY, dtype="bfloat16")
    picks = lambda config, *lengths: attention_implementation(config, *lengths or (256, 256))  # noqa: E731
    assert picks(config) == "xla"
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    assert [picks(config), picks(config, 100, 100), picks(config, 128, 200)] == ["splash", "xla", "xla"]
    assert picks(replace(config, attention="splash"), 100, 100) == "splash"
    assert picks(replace(config, attention="xla")) == "xla"
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    assert [picks(config, 100, 100), picks(TINY)] == ["cudnn", "xla"]
    assert picks(replace(config, attention_softcap=2.0)) == "xla"


def test_a_kernel_that_is_not_there_is_an_error():
    with pytest.raises(UserError, match=r"model.attention: splash does not run on a cpu; use auto"):
        attention_implementation(replace(TINY, attention="splash"), 128, 128)
    with pytest.raises(UserError, match="cuDNN has no soft-cap"):
        replace(TINY, attention="cudnn", attention_softcap=1.0, dtype="bfloat16")
    with pytest.raises(UserError, match="cuDNN has no float32"):
        replace(TINY, attention="cudnn")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_eight_bits_are_as_near_as_they_can_be(dtype):
    """int8: half a step, a 127th of a vector's largest entry. float8 has 3 bits after the leading one: 1 in 16 of each
    entry, where they are no less than its smallest normal number, 2^-6 of 448."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3, 7, 16)), jnp.float32)
    x = x.at[0, 0, 0].set(0.0).at[1].multiply(1e-20).at[2].multiply(1e20)
    values, scale = quantized(x, jnp.dtype(dtype))
    assert (values.dtype, scale.shape, scale.dtype) == (dtype, (5, 3, 7, 1), jnp.float32)
    found = values.astype(jnp.float32) * scale
    most = np.abs(x).max(-1, keepdims=True)
    allowed = most / 254 if dtype == "int8" else np.maximum(np.abs(x) / 16, most * 2.0**-10 / 448)
    assert np.all(np.abs(found - x) <= allowed * 1.0001)
    assert not np.any(np.asarray(found[0, 0, 0]))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("shared", [False, True])
def test_scores_and_probabilities_take_the_scales(dtype, shared):
    """Attending to 8-bit keys and values is attending to what they stand for, and so with a prefix."""
    q, k, v, _ = arrays(prefix=T - 3)
    mask = jnp.asarray(np.random.default_rng(1).random((B, 3, T)) < 0.5).at[:, :, -1].set(True)
    (k8, k_scale), (v8, v_scale) = quantized(k, jnp.dtype(dtype)), quantized(v, jnp.dtype(dtype))
    cache = LayerCache(k8, v8, k_scale, v_scale)
    floats = LayerCache(k8.astype(jnp.float32) * k_scale, v8.astype(jnp.float32) * v_scale)
    part = lambda cache, rows, slots: jax.tree.map(lambda x: x[rows, :, slots], cache)  # noqa: E731
    if not shared:
        found, expected = attend(q, cache, mask, 0.3, 2.0), attend(q, floats, mask, 0.3, 2.0)
    else:  # the first 100 keys are those of every second row
        every, rest = (slice(None, None, 2), slice(100)), (slice(None), slice(100, None))
        found = attend(q, part(cache, *rest), mask, 0.3, 2.0, part(cache, *every))
        expected = attend(q, part(floats, *rest), mask, 0.3, 2.0, part(floats, *every))
    assert_close(found, expected)


@pytest.mark.parametrize("before", [0, 30])
def test_blocks_of_queries_see_what_all_of_them_see(before):
    """Against attention written out in float64; gradients as without blocks. `before` keys are shared by two rows."""
    q, k, v, weights = arrays(before)
    real = jnp.asarray(segments()[:, before:])
    seen = jnp.asarray(np.random.default_rng(2).random((B, 1, before)) < 0.7)
    mask = jnp.concatenate([jnp.broadcast_to(seen, (B, T - before, before)), causal_mask(real)], axis=2)
    own, shared = LayerCache(k[:, :, before:], v[:, :, before:]), None
    if before:
        shared = LayerCache(k[::2, :, :before], v[::2, :, :before])
    weights = jnp.where((real != 0)[:, :, None, None], weights, 0.0)

    def total(q, own, shared, causal):
        out = attend(q, own, mask, 0.3, 2.0, shared, causal)
        return jnp.sum(out * weights), out

    value = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    (_, out), grads = value(q, own, shared, True)
    (_, plain), plain_grads = value(q, own, shared, False)
    assert_close(grads, plain_grads)
    whole = lambda own, prefix: np.repeat(  # noqa: E731
        own if prefix is None else np.concatenate([np.repeat(prefix, 2, axis=0), own], 2), N // K, axis=1
    )
    keys, values = (np.asarray(whole(own[i], shared and shared[i]), np.float64) for i in (0, 1))
    scores = 2 * np.tanh(np.einsum("btnh,bnsh->bnts", np.asarray(q, np.float64), keys) * 0.3 / 2)
    mass = np.where(np.asarray(mask)[:, None], np.exp(scores), 0.0)
    expected = np.einsum("bnts,bnsh->btnh", mass / np.maximum(mass.sum(-1, keepdims=True), 1e-300), values)
    for found in (out, plain):
        there = np.asarray(real != 0)
        np.testing.assert_allclose(found[there], expected[there], rtol=1e-4, atol=1e-5)


PROMPTS = Prompts(
    np.random.default_rng(0).integers(1, 32, (4, 6)).astype(np.int32),
    np.arange(6) >= np.array([[0], [3], [5], [2]]),
)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_sampling_with_a_small_cache(dtype):
    """The same tokens with a queue and without, with shared prompts and without; near the trainer's log-probabilities,
    but not at them."""
    model = Model(replace(TINY, cache_dtype=dtype))
    params, sampling = fake_params(model), make_sampling(SamplingConfig(max_new_tokens=12), (3,), 0)
    assert {x.dtype.name for x in jax.tree.leaves(model.init_cache(1, 2))} == {dtype} | (
        set() if dtype == "bfloat16" else {"float32"}
    )
    out = rollout(model, params, PROMPTS, jax.random.key(0), sampling, group=2)
    queued = rollout(model, params, PROMPTS, jax.random.key(0), sampling, group=2, slots=2)
    np.testing.assert_array_equal(out.tokens, queued.tokens)
    # Sums in another order may take a key to the next of the few numbers that are kept.
    assert_close(out.logprobs, queued.logprobs, atol=1e-3)
    logprobs, _ = model.logprobs(params, out.tokens, out.mask, 6)
    error = np.abs(np.where(out.response_mask, logprobs - out.logprobs, 0.0))
    assert 1e-5 < error.max() < {"bfloat16": 0.02, "int8": 0.05, "float8_e4m3fn": 0.3}[dtype]


def test_a_cache_wider_than_what_is_computed_is_an_error():
    with pytest.raises(UserError, match=r"model\.cache_dtype float32"):
        replace(TINY, dtype="bfloat16", cache_dtype="float32")
    with pytest.raises(UserError, match=r"model\.remat attention_mlp: experts"):
        replace(TINY, moe=MoEConfig(experts=2, per_token=1), remat="attention_mlp")
