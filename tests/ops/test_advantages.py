import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.ops.advantages import gae, group_advantages, rloo_advantages

RNG = np.random.default_rng(0)
B, T = 5, 7
REWARDS = RNG.standard_normal((B, T)).astype(np.float32)
VALUES = RNG.standard_normal((B, T)).astype(np.float32)
LENGTHS = [7, 4, 1, 0, 6]
MASK = np.arange(T)[None, :] < np.array(LENGTHS)[:, None]


def gae_of_one_row(rewards, values, gamma, lam):
    """The definition (Schulman et al. 2016, eq. 16): a sum of discounted TD errors, in float64."""
    n = len(rewards)
    values = np.append(np.asarray(values, np.float64), 0.0)
    delta = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(n)]
    return np.array([sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_the_plain_sum_on_rows_of_any_length(gamma, lam):
    advantages, returns = gae(jnp.asarray(REWARDS), jnp.asarray(VALUES), jnp.asarray(MASK), gamma, lam)
    for row, n in enumerate(LENGTHS):
        expected = gae_of_one_row(REWARDS[row, :n], VALUES[row, :n], gamma, lam)
        np.testing.assert_allclose(advantages[row, :n], expected, atol=1e-5)
        np.testing.assert_allclose(returns[row, :n], expected + VALUES[row, :n], atol=1e-5)
        np.testing.assert_array_equal(advantages[row, n:], 0)
        np.testing.assert_array_equal(returns[row, n:], 0)


def test_gae_ignores_whatever_is_masked_and_looks_past_it():
    """A tool's output in the middle: as if the row had only its unmasked tokens."""
    mask = RNG.random((B, T)) < 0.6
    junk = lambda x: jnp.where(mask, x, jnp.nan)  # noqa: E731
    advantages, returns = gae(junk(REWARDS), junk(VALUES), jnp.asarray(mask), 0.9, 0.8)
    for row in range(B):
        keep = mask[row]
        expected = gae_of_one_row(REWARDS[row, keep], VALUES[row, keep], 0.9, 0.8)
        np.testing.assert_allclose(advantages[row][keep], expected, atol=1e-5)
    assert bool(jnp.all(jnp.isfinite(returns)))


def test_gae_with_lambda_1_is_the_return_minus_the_value():
    advantages, _ = gae(jnp.asarray(REWARDS), jnp.asarray(VALUES), jnp.ones((B, T), bool), 1.0, 1.0)
    to_go = np.cumsum(REWARDS[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(advantages, to_go - VALUES, atol=1e-5)


def test_group_advantages():
    rewards = jnp.array([1.0, 2.0, 3.0, 10.0, 10.0, 40.0])
    np.testing.assert_allclose(group_advantages(rewards, 3, std=False), [-1, 0, 1, -10, -10, 20], atol=1e-5)
    # Sample standard deviations 1 and √300.
    np.testing.assert_allclose(
        group_advantages(rewards, 3, std=True),
        [-1, 0, 1, -10 / 300**0.5, -10 / 300**0.5, 20 / 300**0.5],
        atol=2e-4,
    )


def test_equal_rewards_give_no_advantage_and_nan_is_not_hidden():
    same = jnp.full(6, 0.1)
    assert float(jnp.max(jnp.abs(group_advantages(same, 3, std=True)))) < 1e-3
    broken = jnp.array([jnp.nan, 1.0, 2.0, 3.0])
    advantages = group_advantages(broken, 2, std=True)
    assert bool(jnp.all(jnp.isnan(advantages[:2])))
    assert bool(jnp.all(jnp.isfinite(advantages[2:])))


def test_rloo_subtracts_the_mean_of_the_others():
    rewards = RNG.standard_normal(12).astype(np.float32)
    expected = [
        rewards[i] - np.mean([rewards[j] for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i])
        for i in range(12)
    ]
    np.testing.assert_allclose(rloo_advantages(jnp.asarray(rewards), 4), expected, atol=1e-6)


@pytest.mark.parametrize("advantages", [lambda r, g: group_advantages(r, g, std=True), rloo_advantages])
@pytest.mark.parametrize(("n", "group_size"), [(4, 1), (5, 2)])
def test_impossible_groups_are_errors(advantages, n, group_size):
    with pytest.raises(ValueError, match="group"):
        advantages(jnp.zeros(n), group_size)


def test_no_gradient_surprise_under_jit():
    jitted = jax.jit(gae, static_argnums=(3, 4))
    plain = gae(jnp.asarray(REWARDS), jnp.asarray(VALUES), jnp.asarray(MASK), 0.9, 0.8)
    for a, b in zip(jitted(REWARDS, VALUES, MASK, 0.9, 0.8), plain, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
