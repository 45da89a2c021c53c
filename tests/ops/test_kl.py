"""Elementwise identities; values, biases and gradients by enumeration are in tests/exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jrlhf.ops.kl import full_kl, kl_k1, kl_k2, kl_k3

RNG = np.random.default_rng(0)


def test_estimators_follow_their_definitions():
    logp, ref = RNG.standard_normal((2, 7)).astype(np.float32)
    log_ratio = ref.astype(np.float64) - logp
    np.testing.assert_allclose(kl_k1(logp, ref), -log_ratio, atol=1e-6)
    np.testing.assert_allclose(kl_k2(logp, ref), log_ratio**2 / 2, atol=1e-6)
    np.testing.assert_allclose(kl_k3(logp, ref), np.exp(log_ratio) - 1 - log_ratio, atol=1e-5)


def test_k3_is_not_negative_for_the_smallest_differences():
    """exp(x) - 1 - x cancels in float32 where expm1(x) - x does not."""
    ref = jnp.linspace(-1e-3, 1e-3, 101)
    k3 = kl_k3(jnp.zeros_like(ref), ref)
    assert float(jnp.min(k3)) >= 0
    np.testing.assert_allclose(k3, kl_k2(jnp.zeros_like(ref), ref), atol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_full_kl_against_scipy(dtype):
    p = jnp.asarray(RNG.standard_normal((3, 9)), dtype)
    q = jnp.asarray(RNG.standard_normal((3, 9)), dtype)
    probabilities = [scipy.special.softmax(np.asarray(x, np.float64), axis=-1) for x in (p, q)]
    np.testing.assert_allclose(full_kl(p, q), scipy.special.rel_entr(*probabilities).sum(-1), atol=1e-5)
    np.testing.assert_allclose(full_kl(p, p), 0, atol=1e-6)


def test_full_kl_with_forbidden_tokens():
    p, q = jnp.array([[0.3, -0.2, 1.0]]), jnp.array([[0.1, 0.4, -1.0]])
    allowed = jnp.array([[True, True, False]])
    both = lambda p, q: full_kl(jnp.where(allowed, p, -jnp.inf), jnp.where(allowed, q, -jnp.inf))  # noqa: E731
    np.testing.assert_allclose(both(p, q), full_kl(p[:, :2], q[:, :2]), atol=1e-6)
    assert bool(jnp.all(jnp.isfinite(jax.grad(lambda p: jnp.sum(both(p, q)))(p))))
    assert float(full_kl(p, jnp.where(allowed, q, -jnp.inf))[0]) == np.inf
