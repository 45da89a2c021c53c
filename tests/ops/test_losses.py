import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.ops.losses import (
    ppo_policy_loss,
    value_loss,
)

RNG = np.random.default_rng(0)
B, T = 4, 6


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


LOGPROBS, OLD = -np.abs(normal(B, T)), -np.abs(normal(B, T))
ADVANTAGES, RETURNS, VALUES, OLD_VALUES = normal(B, T), normal(B, T), normal(B, T), normal(B, T)
MASK = np.arange(T)[None, :] < np.array([6, 3, 1, 5])[:, None]
LN2 = math.log(2)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# Policy gradient


@pytest.mark.parametrize("clip", [0.2, (0.1, 0.4)])
def test_ppo_policy_loss_equals_its_equation_term_by_term(clip):
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    terms, clipped, kls, ratios = [], [], [], []
    for b, t in zip(*np.nonzero(MASK), strict=True):
        ratio = math.exp(LOGPROBS[b, t] - OLD[b, t])
        bounded = min(max(ratio, 1 - low), 1 + high)
        surrogate = min(ratio * ADVANTAGES[b, t], bounded * ADVANTAGES[b, t])  # maximised
        terms.append(-surrogate)
        clipped.append(surrogate < ratio * ADVANTAGES[b, t])
        kls.append(ratio - 1 - math.log(ratio))
        ratios.append(ratio)
    loss, stats = ppo_policy_loss(LOGPROBS, OLD, ADVANTAGES, jnp.asarray(MASK), clip)
    assert float(loss) == pytest.approx(np.mean(terms), abs=1e-5)
    assert float(stats["clip_frac"]) == pytest.approx(np.mean(clipped), abs=1e-6)
    assert 0 < np.mean(clipped) < 1
    assert float(stats["approx_kl"]) == pytest.approx(np.mean(kls), abs=1e-5)
    assert float(stats["ratio_max"]) == pytest.approx(max(ratios), rel=1e-5)


def test_ppo_gradient_is_reinforce_where_old_equals_new_and_zero_where_clipped():
    gradient = jax.grad(lambda x: ppo_policy_loss(x, OLD, ADVANTAGES, jnp.asarray(MASK), 0.2)[0])
    np.testing.assert_allclose(
        gradient(jnp.asarray(OLD)), np.where(MASK, -ADVANTAGES, 0) / MASK.sum(), atol=1e-6
    )
    _, stats = ppo_policy_loss(OLD, OLD, ADVANTAGES, jnp.asarray(MASK), 0.2)
    assert float(stats["ratio_max"]) == 1
    assert float(stats["approx_kl"]) == 0
    # Ratio e: no gradient for positive advantages, a full one for negative.
    moved = np.asarray(gradient(jnp.asarray(OLD) + 1))
    np.testing.assert_array_equal(moved[MASK & (ADVANTAGES > 0)], 0)
    assert np.all(moved[MASK & (ADVANTAGES < 0)] != 0)


def test_ppo_overflow_on_a_masked_token_reaches_nothing():
    wild = jnp.where(MASK, LOGPROBS, 1e4)
    (loss, stats), gradient = jax.value_and_grad(ppo_policy_loss, has_aux=True)(
        wild, OLD, ADVANTAGES, jnp.asarray(MASK), 0.2
    )
    assert all(math.isfinite(float(x)) for x in (loss, *stats.values()))
    assert bool(jnp.all(jnp.isfinite(gradient)))


def test_value_loss_equals_its_equation_term_by_term():
    clip, terms, clipped = 0.3, [], []
    for b, t in zip(*np.nonzero(MASK), strict=True):
        near = min(max(VALUES[b, t], OLD_VALUES[b, t] - clip), OLD_VALUES[b, t] + clip)
        errors = (VALUES[b, t] - RETURNS[b, t]) ** 2, (near - RETURNS[b, t]) ** 2
        terms.append(0.5 * max(errors))
        clipped.append(errors[1] > errors[0])
    loss, frac = value_loss(VALUES, OLD_VALUES, RETURNS, jnp.asarray(MASK), clip)
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-5)
    assert float(frac) == pytest.approx(np.mean(clipped), abs=1e-6)
    assert 0 < np.mean(clipped) < 1
    plain, frac = value_loss(VALUES, OLD_VALUES, RETURNS, jnp.asarray(MASK), math.inf)
    assert float(plain) == pytest.approx(0.5 * np.mean((VALUES - RETURNS)[MASK] ** 2), rel=1e-5)
    assert float(frac) == 0


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, n: ppo_policy_loss(LOGPROBS[s], OLD[s], ADVANTAGES[s], MASK[s], 0.2, n)[0],
        lambda s, n: ppo_policy_loss(LOGPROBS[s], OLD[s], ADVANTAGES[s], MASK[s], 0.2, n)[1]["clip_frac"],
        lambda s, n: value_loss(VALUES[s], OLD_VALUES[s], RETURNS[s], MASK[s], 0.3, n)[0],
    ],
)
def test_microbatches_add_up_to_the_whole(loss):
    parts = [loss(s, float(MASK.sum())) for s in (slice(0, 1), slice(1, 3), slice(3, 4))]
    assert float(sum(parts)) == pytest.approx(float(loss(slice(None), None)), rel=1e-5)
