"""KL estimators and best-of-n against enumeration: values, biases and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.lab import exact
from jrlhf.ops.best_of_n import best_of_n, best_of_n_distribution, best_of_n_kl
from jrlhf.ops.kl import full_kl, kl_k1, kl_k2, kl_k3
from jrlhf.ops.masking import masked_sum

WORLD = exact.make_world(11)
SPACE = WORLD.space
TOKENS, MASK = SPACE.all_sequences()
POLICY = SPACE.policy_with(exact.optimum(WORLD))
REF = WORLD.ref_params


def probabilities(params):
    return jnp.exp(SPACE.sequence_logprobs(params))


def both_logprobs(tokens, mask):
    return SPACE.logprobs(POLICY, tokens, mask), SPACE.logprobs(REF, tokens, mask)


def token_estimator(estimator):
    return lambda tokens, mask: masked_sum(estimator(*both_logprobs(tokens, mask)), mask, axis=1)


def sequence_estimator(estimator):
    def estimate(tokens, mask):
        return estimator(*(masked_sum(x, mask, axis=1) for x in both_logprobs(tokens, mask)))

    return estimate


def full_vocabulary(tokens, mask):
    return masked_sum(full_kl(SPACE.rows(POLICY, tokens), SPACE.rows(REF, tokens)), mask, axis=1)


UNBIASED = {
    "k1": token_estimator(kl_k1),
    "k3 of tokens": token_estimator(kl_k3),
    "k3 of sequences": sequence_estimator(kl_k3),
    "full vocabulary": full_vocabulary,
}
BIASED = {"k2 of tokens": token_estimator(kl_k2), "k2 of sequences": sequence_estimator(kl_k2)}
TRUE_KL = float(exact.kl_divergence(probabilities(POLICY), probabilities(REF)))


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_estimators(name):
    exactly = jnp.sum(probabilities(POLICY) * UNBIASED[name](TOKENS, MASK))
    assert float(exactly) == pytest.approx(TRUE_KL, rel=1e-4)
    samples = SPACE.sample(POLICY, jax.random.key(3), 20_000)
    drawn = np.asarray(UNBIASED[name](samples.tokens, samples.mask))
    assert abs(drawn.mean() - TRUE_KL) <= 3 * drawn.std() / np.sqrt(len(drawn))


@pytest.mark.parametrize("name", BIASED)
def test_k2_is_biased(name):
    samples = SPACE.sample(POLICY, jax.random.key(3), 20_000)
    drawn = np.asarray(BIASED[name](samples.tokens, samples.mask))
    assert abs(drawn.mean() - TRUE_KL) > 5 * drawn.std() / np.sqrt(len(drawn))
    exactly = float(jnp.sum(probabilities(POLICY) * BIASED[name](TOKENS, MASK)))
    assert abs(exactly - TRUE_KL) > 0.02


def gradient_in_a_loss(estimator, params):
    """Expected gradient of an estimator of whole answers, when samples of the policy are held fixed."""

    def loss(p):
        logp = SPACE.sequence_logprobs(p)
        return jnp.sum(jnp.exp(jax.lax.stop_gradient(logp)) * estimator(logp, SPACE.sequence_logprobs(REF)))

    return jax.grad(loss)(params)


def test_gradients_of_the_estimators_are_those_that_are_documented():
    reverse = jax.grad(lambda p: exact.kl_divergence(probabilities(p), probabilities(REF)))(POLICY)
    forward = jax.grad(lambda p: exact.kl_divergence(probabilities(REF), probabilities(p)))(POLICY)
    assert float(jnp.max(jnp.abs(reverse))) > 0.05
    assert float(jnp.max(jnp.abs(reverse - forward))) > 0.05
    np.testing.assert_allclose(gradient_in_a_loss(kl_k1, POLICY), jnp.zeros_like(POLICY), atol=1e-6)
    np.testing.assert_allclose(gradient_in_a_loss(kl_k2, POLICY), reverse, atol=1e-6)
    np.testing.assert_allclose(gradient_in_a_loss(kl_k3, POLICY), forward, atol=1e-6)


def test_full_kl_has_the_exact_gradient_of_one_state():
    logits = SPACE.rows(POLICY, TOKENS)[:, 0]
    ref = SPACE.rows(REF, TOKENS)[:, 0]
    p, q = jax.nn.softmax(logits), jax.nn.softmax(ref)
    expected = p * (jnp.log(p) - jnp.log(q) - exact.kl_divergence(p, q)[:, None])
    gradient = jax.grad(lambda x: jnp.sum(full_kl(x, ref)))(logits)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("levels", [None, 5])
def test_best_of_n_law_equals_enumeration_of_all_draws(n, levels):
    """All 121ⁿ draws, with a reward of distinct values and with one of five levels (ties)."""
    ref = np.asarray(probabilities(REF), np.float64)
    reward = np.asarray(WORLD.reward, np.float64)
    if levels:
        reward = np.digitize(reward, np.quantile(reward, np.linspace(0, 1, levels + 1)[1:-1])).astype(float)
    draws = np.indices((SPACE.sequences,) * n).reshape(n, -1)
    best = reward[draws] == reward[draws].max(axis=0)  # ties share the win
    won = np.zeros(SPACE.sequences)
    for row, wins in zip(draws, best / best.sum(axis=0), strict=True):
        won += np.bincount(row, weights=wins * ref[draws].prod(axis=0), minlength=SPACE.sequences)
    law = best_of_n_distribution(ref, reward, n)
    np.testing.assert_allclose(law, won, atol=1e-9)


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_best_of_n_kl_is_an_upper_bound(n):
    ref = probabilities(REF)
    law = best_of_n_distribution(np.asarray(ref, np.float64), np.asarray(WORLD.reward), n)
    law = jnp.asarray(law, jnp.float32)
    assert 0 < float(exact.kl_divergence(law, ref)) <= best_of_n_kl(n)


@pytest.mark.parametrize("n", [2, 8])
def test_best_of_n_estimate_is_unbiased(n):
    """A gold reward that is not the proxy, 16 samples for each of 4,000 prompts."""
    gold = np.random.default_rng(0).standard_normal(SPACE.sequences) + np.asarray(WORLD.reward)
    proxy = np.round(np.asarray(WORLD.reward, np.float64), 1)
    law = best_of_n_distribution(np.asarray(probabilities(REF), np.float64), proxy, n)
    samples = SPACE.sample(REF, jax.random.key(5), 4000 * 16)
    number = np.asarray(SPACE.sequence_number(samples.tokens)).reshape(4000, 16)
    estimates = best_of_n(proxy[number], gold[number], n)
    assert abs(estimates.mean() - law @ gold) <= 3 * estimates.std() / np.sqrt(4000)
