"""The optimiser against values worked out by hand and by numpy."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.config import UserError
from jrlhf.optim import OptimConfig, build_optimizer, learning_rate, make_optimizer


def step(config, params, grads, n=1, total=10, mask=None):
    """Params, state and gradient norm after `n` updates with the same gradient, under jit."""
    optimizer = build_optimizer(config, total, mask)
    state, apply = optimizer.init(params), jax.jit(optimizer.apply)
    for _ in range(n):
        params, state, norm = apply(grads, state, params)
    return params, state, norm


# Of 10 steps 4 are warm-up, and lr is 8. cosine: 0.5 * (1 + cos(pi * 3 / 6)) is one half, (… 2 / 6) three
# quarters; with final_lr 0.1 the half becomes 0.1 + 0.9 * 0.5.
@pytest.mark.parametrize(
    ("schedule", "final_lr", "expected"),
    [
        ("constant", 0.0, {0: 2, 1: 4, 3: 8, 4: 8, 9: 8, 50: 8}),
        ("linear", 0.0, {0: 2, 3: 8, 4: 8, 7: 4, 10: 0, 50: 0}),
        ("linear", 0.5, {0: 2, 4: 8, 7: 6, 10: 4, 50: 4}),
        ("cosine", 0.0, {0: 2, 3: 8, 4: 8, 6: 6, 7: 4, 8: 2, 10: 0, 50: 0}),
        ("cosine", 0.1, {4: 8, 7: 4.4, 10: 0.8, 50: 0.8}),
    ],
)
def test_schedule(schedule, final_lr, expected):
    config = OptimConfig(lr=8.0, schedule=schedule, warmup_steps=4, final_lr=final_lr)
    rate = jax.jit(learning_rate(config, 10))
    for n, value in expected.items():
        got = rate(jnp.int32(n))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, value, rtol=1e-6, atol=1e-6)


def test_schedule_without_warmup_starts_at_the_peak():
    assert learning_rate(OptimConfig(lr=0.5, schedule="cosine"), 10)(0) == 0.5


def test_adam_steps_are_numpys():
    """Two AdamW steps, eps 1e-5, decay 0.1, cosine from 0.01 over 10 steps (Kingma & Ba, algorithm 1)."""
    rng = np.random.default_rng(0)
    p, grads = rng.normal(size=(2, 3)), rng.normal(size=(2, 2, 3)) * 1e-4
    config = OptimConfig(
        lr=0.01, schedule="cosine", b1=0.8, b2=0.99, eps=1e-5, weight_decay=0.1, grad_clip=0.0
    )
    optimizer = build_optimizer(config, 10)
    params = {"w": jnp.asarray(p, jnp.float32)}
    state = optimizer.init(params)
    m = v = 0.0
    for n, g in enumerate(grads):
        params, state, norm = optimizer.apply({"w": jnp.asarray(g, jnp.float32)}, state, params)
        np.testing.assert_allclose(norm, np.sqrt(np.sum(g * g)), rtol=1e-5)
        m, v = 0.8 * m + 0.2 * g, 0.99 * v + 0.01 * g * g
        direction = (m / (1 - 0.8 ** (n + 1))) / (np.sqrt(v / (1 - 0.99 ** (n + 1))) + 1e-5)
        p = p - 0.01 * 0.5 * (1 + math.cos(math.pi * n / 10)) * (direction + 0.1 * p)
        np.testing.assert_allclose(params["w"], p, rtol=1e-5, atol=1e-7)


def test_clip_scales_to_the_global_norm():
    """With a huge eps Adam's first step is lr * g / eps, so that the clipped gradient can be read off."""
    config = OptimConfig(lr=1e6, eps=1e6, grad_clip=0.5)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(2)}
    grads = {"a": jnp.array([3.0]), "b": jnp.array([0.0, 4.0])}  # norm 5: scaled by 0.1
    new, _, norm = step(config, params, grads)
    np.testing.assert_allclose(new["a"], [-0.3], rtol=1e-5)
    np.testing.assert_allclose(new["b"], [0.0, -0.4], rtol=1e-5)
    assert norm == 5.0  # the norm that is reported is the one before clipping
    for clip in (0.0, 10.0):  # off, and above the norm
        new, _, _ = step(replace(config, grad_clip=clip), params, grads)
        np.testing.assert_allclose(new["b"], [0.0, -4.0], rtol=1e-5)


def test_weight_decay_spares_scales_and_biases():
    names = ("kernel", "scale", "bias", "embedding")
    params = {"layer": {name: jnp.full(2, 2.0) for name in names}}
    new, _, _ = step(OptimConfig(lr=0.1, weight_decay=0.5), params, jax.tree.map(jnp.zeros_like, params))
    for name in names:
        expected = 2.0 if name in ("scale", "bias") else 2.0 - 0.1 * 0.5 * 2.0
        np.testing.assert_allclose(new["layer"][name], expected, rtol=1e-6)


def test_a_frozen_parameter_stays_has_no_moments_and_does_not_count_in_the_clip():
    params = {"lora": {"kernel": jnp.ones(2)}, "base": {"kernel": jnp.ones(5)}}
    grads = {"lora": {"kernel": jnp.array([3.0, 4.0])}, "base": {"kernel": jnp.full(5, 1e3)}}
    mask = {"lora": {"kernel": True}, "base": {"kernel": False}}
    config = OptimConfig(lr=1e6, eps=1e6, grad_clip=0.5, weight_decay=1e-9)
    new, state, norm = step(config, params, grads, mask=mask)
    np.testing.assert_array_equal(new["base"]["kernel"], 1.0)
    np.testing.assert_allclose(new["lora"]["kernel"], [1 - 0.3 - 1e-3, 1 - 0.4 - 1e-3], rtol=1e-5)
    assert norm == 5.0
    assert sorted({x.shape for x in jax.tree.leaves(state)}) == [(), (2,)]


def test_state_dtype_is_of_the_first_moment():
    params = {"w": jnp.ones(4)}
    for name, dtype in (("float32", jnp.float32), ("bfloat16", jnp.bfloat16)):
        _, state, _ = step(OptimConfig(state_dtype=name), params, params)
        moments = [x.dtype for x in jax.tree.leaves(state) if x.shape]
        assert moments == [dtype, jnp.float32]


def test_bfloat16_state_still_converges():
    """After 2,000 gradients of 0.1 the second moment is 0.01 * (1 - 0.999**2000), as in float32.

    Kept in bfloat16 it would stop growing at about a tenth of that.
    """
    params, grads = {"w": jnp.ones(1)}, {"w": jnp.full(1, 0.1)}
    optimizer = build_optimizer(OptimConfig(state_dtype="bfloat16"), 2000)

    def body(_, carry):
        return optimizer.apply(grads, carry[1], carry[0])[:2]

    _, state = jax.lax.fori_loop(0, 2000, body, (params, optimizer.init(params)))
    (nu,) = [x for x in jax.tree.leaves(state) if x.shape and x.dtype == jnp.float32]
    np.testing.assert_allclose(nu, 0.01 * (1 - 0.999**2000), rtol=1e-3)


def test_bfloat16_parameters_keep_their_type():
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    new, _, _ = step(OptimConfig(lr=0.5, weight_decay=0.1), params, params)
    assert new["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(new["w"].astype(jnp.float32), 1 - 0.5 * (1 + 0.1), atol=1e-2)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"lr": -1e-3}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"state_dtype": "float16"}, "state_dtype"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"b1": 1.0}, "b1"),
        ({"b2": -0.1}, "b2"),
        ({"eps": 0.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"grad_clip": -1.0}, "grad_clip"),
        ({"final_lr": 2.0}, "final_lr"),
    ],
)
def test_a_bad_config_is_a_user_error(change, field):
    with pytest.raises(UserError, match=field):
        OptimConfig(**change)


def test_no_steps_is_a_user_error():
    with pytest.raises(UserError, match="total_steps is 0"):
        make_optimizer(OptimConfig(), 0)
