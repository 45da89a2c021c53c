"""The enumeration itself: what it counts, what it samples, and that the optima are optima."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.lab import exact

WORLD = exact.make_world(11)


def objective(params, penalty):
    """E[reward] - beta·KL, with the KL in the direction asked for."""
    p, ref = jnp.exp(exact.sequence_logprobs(params)), jnp.exp(exact.sequence_logprobs(WORLD.ref_params))
    return jnp.sum(p * WORLD.reward) - WORLD.beta * penalty(p, ref)


def test_there_are_121_distinct_answers_and_the_numbering_is_its_own_inverse():
    tokens, mask = exact.all_sequences()
    assert tokens.shape == (121, 4)
    written = {tuple(int(t) for t in row[keep]) for row, keep in zip(tokens, np.asarray(mask), strict=True)}
    assert len(written) == 121
    # EOS stands last or nowhere, and every answer without it is full.
    assert all(
        exact.EOS not in answer[:-1] and (answer[-1] == exact.EOS or len(answer) == 4) for answer in written
    )
    np.testing.assert_array_equal(exact.sequence_number(tokens), np.arange(121))


def test_probabilities_are_a_distribution_and_products_of_the_tables_rows():
    logps = exact.sequence_logprobs(WORLD.ref_params)
    assert float(jnp.sum(jnp.exp(logps))) == pytest.approx(1, abs=1e-6)
    rows = np.asarray(jax.nn.log_softmax(WORLD.ref_params))
    assert float(logps[0]) == pytest.approx(rows[0, exact.EOS], abs=1e-6)  # EOS at once
    # Symbols 2, 1, then EOS: from the root to node 3, from there to node 3·3+1+1 = 11.
    assert float(logps[11]) == pytest.approx(rows[0, 2] + rows[3, 1] + rows[11, exact.EOS], abs=1e-5)


def test_any_distribution_has_a_table():
    probabilities = np.random.default_rng(0).dirichlet(np.ones(121))
    back = jnp.exp(exact.sequence_logprobs(exact.policy_with(probabilities)))
    np.testing.assert_allclose(back, probabilities, atol=1e-6)


def test_samples_follow_the_policy_and_carry_its_logprobs():
    n = 100_000
    samples = exact.sample(WORLD.ref_params, jax.random.key(0), n)
    again = exact.logprobs(WORLD.ref_params, samples.tokens, samples.mask)
    np.testing.assert_allclose(samples.logprobs, again, atol=1e-5)
    expected = n * np.exp(np.asarray(exact.sequence_logprobs(WORLD.ref_params), np.float64))
    counts = np.bincount(np.asarray(exact.sequence_number(samples.tokens)), minlength=121)
    chi_square = np.sum((counts - expected) ** 2 / expected)
    assert chi_square < 120 + 4 * np.sqrt(2 * 120)  # 120 degrees of freedom, four standard deviations


def test_the_critic_values_the_state_before_each_token():
    tokens, mask = exact.all_sequences()
    values = exact.values(jnp.arange(exact.STATES, dtype=jnp.float32), tokens, mask)
    np.testing.assert_array_equal(values[0], [0, 0, 0, 0])
    np.testing.assert_array_equal(values[11], [0, 3, 11, 0])  # the answer (2, 1, EOS) and a masked slot
    np.testing.assert_array_equal(values[120], [0, 3, 12, 39])  # 2, 2, 2, 2


@pytest.mark.parametrize(
    ("name", "optimum", "penalty"),
    [
        ("reverse", exact.optimum, lambda p, ref: exact.kl_divergence(p, ref)),
        ("forward", exact.forward_kl_optimum, lambda p, ref: exact.kl_divergence(ref, p)),
    ],
)
def test_closed_form_optimum_is_stationary_and_beats_its_neighbours(name, optimum, penalty):
    best = exact.policy_with(optimum(WORLD))
    value, gradient = jax.value_and_grad(objective)(best, penalty)
    assert float(jnp.max(jnp.abs(gradient))) < 1e-5
    for seed in range(20):
        step = 0.1 * jax.random.normal(jax.random.key(seed), best.shape)
        assert float(objective(best + step, penalty)) < float(value)


def test_value_of_the_optimum_is_the_log_partition_function():
    ref = exact.sequence_logprobs(WORLD.ref_params)
    value = objective(exact.policy_with(exact.optimum(WORLD)), exact.kl_divergence)
    free_energy = WORLD.beta * jax.nn.logsumexp(ref + WORLD.reward / WORLD.beta)
    assert float(value) == pytest.approx(float(free_energy), abs=1e-5)
