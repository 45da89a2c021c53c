"""The enumeration itself: what it counts, what it samples, and that the optima are optima."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.config import UserError
from jrlhf.lab import exact
from jrlhf.ops.kl import full_kl
from jrlhf.ops.logprobs import entropy as entropy_of_logits

WORLD = exact.make_world(11)
SPACE = WORLD.space


def objective(params, penalty):
    """E[reward] - beta·KL, with the KL in the direction asked for."""
    p, ref = jnp.exp(SPACE.sequence_logprobs(params)), jnp.exp(SPACE.sequence_logprobs(WORLD.ref_params))
    return jnp.sum(p * WORLD.reward) - WORLD.beta * penalty(p, ref)


SPACES = [exact.Space(), exact.Space(2, 5), exact.Space(5, 3), exact.Space(1, 4), exact.Space(3, 1)]


@pytest.mark.parametrize(
    ("space", "states", "answers"),
    [(SPACES[0], 40, 121), (SPACES[1], 31, 63), (SPACES[2], 31, 156), (SPACES[3], 4, 5), (SPACES[4], 1, 4)],
)
def test_every_answer_is_there_once_and_the_numbering_is_its_own_inverse(space, states, answers):
    assert (space.states, space.sequences) == (states, answers)
    tokens, mask = space.all_sequences()
    assert tokens.shape == (answers, space.length)
    written = {tuple(int(t) for t in row[keep]) for row, keep in zip(tokens, mask, strict=True)}
    assert len(written) == answers
    # EOS stands last or nowhere, and every answer without it is full.
    assert all(
        space.eos not in answer[:-1] and (answer[-1] == space.eos or len(answer) == space.length)
        for answer in written
    )
    np.testing.assert_array_equal(space.sequence_number(tokens), np.arange(answers))


@pytest.mark.parametrize("space", SPACES)
def test_any_distribution_has_a_table_in_any_space(space):
    world = exact.make_world(0, space=space)
    assert float(jnp.sum(space.probabilities(world.ref_params))) == pytest.approx(1, abs=1e-6)
    probabilities = np.random.default_rng(0).dirichlet(np.ones(space.sequences))
    back = space.probabilities(space.policy_with(probabilities))
    np.testing.assert_allclose(back, probabilities, atol=1e-6)


@pytest.mark.parametrize("sizes", [(0, 4), (3, 0)])
def test_an_empty_space_is_refused(sizes):
    with pytest.raises(UserError, match="must be at least 1"):
        exact.Space(*sizes)


def test_the_worlds_are_those_that_were_measured():
    """Values of world 11 from before spaces had sizes: the tables of docs/exact-space.md are about these worlds."""
    np.testing.assert_array_equal(
        WORLD.ref_params[0], np.float32([0.023934936, 0.9518233, 0.85730475, -0.35721496])
    )
    np.testing.assert_array_equal(WORLD.reward[-3:], np.float32([0.46999002, -0.21097611, 1.1769546]))
    np.testing.assert_allclose(exact.optimum(WORLD)[:3], [0.05798885, 0.02388067, 0.04829094], rtol=1e-6)
    np.testing.assert_allclose(
        exact.forward_kl_optimum(WORLD)[:3], [0.03183315, 0.01185553, 0.02091957], rtol=1e-6
    )


def test_probabilities_are_a_distribution_and_products_of_the_tables_rows():
    logps = SPACE.sequence_logprobs(WORLD.ref_params)
    assert float(jnp.sum(jnp.exp(logps))) == pytest.approx(1, abs=1e-6)
    rows = np.asarray(jax.nn.log_softmax(WORLD.ref_params))
    assert float(logps[0]) == pytest.approx(rows[0, SPACE.eos], abs=1e-6)  # EOS at once
    # Symbols 2, 1, then EOS: from the root to node 3, from there to node 3·3+1+1 = 11.
    assert float(logps[11]) == pytest.approx(rows[0, 2] + rows[3, 1] + rows[11, SPACE.eos], abs=1e-5)


def test_samples_follow_the_policy_and_carry_its_logprobs():
    n = 100_000
    samples = SPACE.sample(WORLD.ref_params, jax.random.key(0), n)
    again = SPACE.logprobs(WORLD.ref_params, samples.tokens, samples.mask)
    np.testing.assert_allclose(samples.logprobs, again, atol=1e-5)
    expected = n * np.exp(np.asarray(SPACE.sequence_logprobs(WORLD.ref_params), np.float64))
    counts = np.bincount(np.asarray(SPACE.sequence_number(samples.tokens)), minlength=121)
    chi_square = np.sum((counts - expected) ** 2 / expected)
    assert chi_square < 120 + 4 * np.sqrt(2 * 120)  # 120 degrees of freedom, four standard deviations


def test_the_critic_values_the_state_before_each_token():
    tokens, mask = SPACE.all_sequences()
    values = np.where(mask, SPACE.rows(jnp.arange(SPACE.states, dtype=jnp.float32), tokens), 0)
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
    best = SPACE.policy_with(optimum(WORLD))
    value, gradient = jax.value_and_grad(objective)(best, penalty)
    assert float(jnp.max(jnp.abs(gradient))) < 1e-5
    for seed in range(20):
        step = 0.1 * jax.random.normal(jax.random.key(seed), best.shape)
        assert float(objective(best + step, penalty)) < float(value)


def test_value_of_the_optimum_is_the_log_partition_function():
    ref = SPACE.sequence_logprobs(WORLD.ref_params)
    value = objective(SPACE.policy_with(exact.optimum(WORLD)), exact.kl_divergence)
    free_energy = WORLD.beta * jax.nn.logsumexp(ref + WORLD.reward / WORLD.beta)
    assert float(value) == pytest.approx(float(free_energy), abs=1e-5)


ENTROPY = 0.3


def entropy_of(p):
    return -jnp.sum(p * jnp.log(p))


def test_the_entropy_regularised_optimum_is_stationary_and_beats_its_neighbours():
    def value_of(params):
        return objective(params, exact.kl_divergence) + ENTROPY * entropy_of(SPACE.probabilities(params))

    best = SPACE.policy_with(exact.entropy_optimum(WORLD, ENTROPY))
    value, gradient = jax.value_and_grad(value_of)(best)
    assert float(jnp.max(jnp.abs(gradient))) < 1e-5
    for seed in range(20):
        step = 0.1 * jax.random.normal(jax.random.key(seed), best.shape)
        assert float(value_of(best + step)) < float(value)


def test_token_level_optimum_with_everything_in_the_reward_is_the_optimum():
    found = exact.token_level_optimum(WORLD, in_reward=WORLD.beta)
    np.testing.assert_allclose(found, exact.optimum(WORLD), atol=1e-6)


@pytest.mark.parametrize(
    "weights",
    [{"in_loss": 0.5}, {"in_reward": 0.5, "entropy": 0.3}, {"in_loss": 0.2, "entropy": 0.1}],
)
def test_token_level_optimum_is_stationary_for_the_gradient_that_leaves_out_the_states(weights):
    """Expected surrogate gradient over all answers, and of the penalties at the states that are reached."""
    in_reward, in_loss, entropy = (weights.get(name, 0.0) for name in ("in_reward", "in_loss", "entropy"))
    tokens, mask = SPACE.all_sequences()

    def loss(params):
        logp, logits = SPACE.logprobs(params, tokens, mask), SPACE.rows(params, tokens)
        ref, ref_logits = SPACE.logprobs(WORLD.ref_params, tokens, mask), SPACE.rows(WORLD.ref_params, tokens)
        held = jax.lax.stop_gradient(logp)
        reward = WORLD.reward - in_reward * jnp.sum(held - ref, axis=1)
        penalty = in_loss * full_kl(logits, ref_logits) - entropy * entropy_of_logits(logits)
        of_answers = jnp.sum(logp, axis=1) * reward - jnp.sum(jnp.where(mask, penalty, 0.0), axis=1)
        return -jnp.sum(jnp.exp(jnp.sum(held, axis=1)) * of_answers)

    best = SPACE.policy_with(exact.token_level_optimum(WORLD, **weights))
    assert float(jnp.max(jnp.abs(jax.grad(loss)(best)))) < 1e-5
    assert float(jnp.max(jnp.abs(jax.grad(loss)(SPACE.policy_with(exact.optimum(WORLD)))))) > 1e-2


def test_preferences_are_bradley_and_terrys_with_flips_and_ties():
    prefers = exact.preferences(WORLD)
    gap = float(WORLD.reward[3] - WORLD.reward[5])
    assert float(prefers[3, 5]) == pytest.approx(1 / (1 + np.exp(-gap)), abs=1e-6)
    flipped, tied = exact.preferences(WORLD, flips=0.2), exact.preferences(WORLD, ties=1.0)
    assert float(flipped[3, 5]) == pytest.approx(0.2 + 0.6 * float(prefers[3, 5]), abs=1e-6)
    win, lose, tie = np.exp(gap), 1.0, np.exp(gap / 2)  # Davidson's three outcomes, unnormalised
    assert float(tied[3, 5]) == pytest.approx((win + tie / 2) / (win + lose + tie), abs=1e-6)
    for p in (prefers, flipped, tied):
        np.testing.assert_allclose(p + p.T, jnp.ones_like(p), atol=1e-6)


@pytest.mark.parametrize("label", [{}, {"flips": 0.2}, {"ties": 2.0}])
def test_dpo_optimum_lets_every_answer_win_as_often_as_it_should(label):
    preference = exact.preferences(WORLD, **label)
    ref = SPACE.probabilities(WORLD.ref_params)
    found = exact.dpo_optimum(WORLD, preference)
    scores = WORLD.beta * (jnp.log(found) - jnp.log(ref))
    np.testing.assert_allclose(
        jax.nn.sigmoid(scores[:, None] - scores[None]) @ ref, preference @ ref, atol=1e-5
    )
    distance = float(exact.total_variation(found, exact.optimum(WORLD)))
    assert (distance > 0.1) if label else (distance < 1e-5)


def test_dpo_optimum_refuses_an_answer_that_always_wins():
    always = exact.preferences(WORLD).at[3].set(1.0).at[:, 3].set(0.0)
    with pytest.raises(ValueError, match="always wins"):
        exact.dpo_optimum(WORLD, always)


def test_nca_optimum_is_a_distribution_and_best_of_n_of_two_is_its_limit():
    """2·P(y ≻ μ) where the better answer always wins is the law of the best of two."""
    preference = exact.preferences(WORLD)
    assert float(jnp.sum(exact.nca_optimum(WORLD, preference))) == pytest.approx(1, abs=1e-5)
    better = 0.5 * (1.0 + jnp.sign(WORLD.reward[:, None] - WORLD.reward[None]))
    np.testing.assert_allclose(exact.nca_optimum(WORLD, better), exact.best_of_n_optimum(WORLD, 2), atol=1e-6)
