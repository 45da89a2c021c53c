"""Losses written with the product's functions, minimised over all 121 answers, against closed forms.

No sampling: what is off here is a wrong loss, not noise. Every claim has a negative control beside it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrlhf.lab import exact
from jrlhf.ops.kl import kl_k1, kl_k3
from jrlhf.ops.losses import dpo_loss, ipo_loss, ppo_policy_loss
from jrlhf.ops.masking import masked_mean, masked_sum

WORLD = exact.make_world(11)
TOKENS, MASK = exact.all_sequences()
PAIRS = tuple(index.reshape(-1) for index in np.indices((exact.SEQUENCES, exact.SEQUENCES)))
TOLERANCE = 1e-4


def minimise(loss, params, steps=3000, learning_rate=0.05):
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def step(carry, _):
        params, opt_state = carry
        grads = jax.grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            changes, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, changes), opt_state), None

    @jax.jit
    def run(params):
        return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]

    return run(params)


def distance(world, loss, target):
    """Total variation between the policy that minimises `loss(world, params)` and `target`."""
    params = minimise(partial(loss, world), world.ref_params)
    return float(exact.total_variation(jnp.exp(exact.sequence_logprobs(params)), target))


def policy_gradient(world, params, kl_in_reward=True, k3_in_loss=False):
    """The surrogate of every answer, weighted by its probability: the gradient is the expected one."""
    logprobs = exact.logprobs(params, TOKENS, MASK)
    ref = exact.logprobs(world.ref_params, TOKENS, MASK)
    old = jax.lax.stop_gradient(logprobs)
    probability = jnp.exp(masked_sum(old, MASK, axis=1))
    reward = world.reward
    if kl_in_reward:
        reward = reward - world.beta * masked_sum(kl_k1(old, ref), MASK, axis=1)
    advantages = jnp.broadcast_to((probability * reward)[:, None], MASK.shape)
    loss, _ = ppo_policy_loss(logprobs, old, advantages, MASK, clip=0.2, denominator=1.0)
    if k3_in_loss:
        k3 = kl_k3(masked_sum(logprobs, MASK, axis=1), masked_sum(ref, MASK, axis=1))
        loss = loss + world.beta * jnp.sum(probability * k3)
    return loss


def pairwise(world, params, loss, weights, over_tokens=masked_sum):
    """A DPO-like loss over all ordered pairs of answers; `weights` [121, 121] of (chosen, rejected)."""
    logprobs = over_tokens(exact.logprobs(params, TOKENS, MASK), MASK, axis=1)
    ref = over_tokens(exact.logprobs(world.ref_params, TOKENS, MASK), MASK, axis=1)
    chosen, rejected = PAIRS
    losses = loss(logprobs[chosen], logprobs[rejected], ref[chosen], ref[rejected], world.beta)[0]
    return jnp.sum(weights.reshape(-1) * losses)


def population(world):
    """(pair weights, p(row beats column)): pairs from the reference, labels by Bradley and Terry."""
    ref = jnp.exp(exact.sequence_logprobs(world.ref_params))
    preference = jax.nn.sigmoid(world.reward[:, None] - world.reward[None, :])
    return ref[:, None] * ref[None, :] * preference, preference


@pytest.mark.parametrize("seed", [11, 0, 3])
def test_policy_gradient_with_kl_in_the_reward_reaches_the_optimum(seed):
    world = exact.make_world(seed)
    assert distance(world, policy_gradient, exact.optimum(world)) <= TOLERANCE


def test_policy_gradient_without_kl_does_not():
    without = partial(policy_gradient, kl_in_reward=False)
    assert distance(WORLD, without, exact.optimum(WORLD)) > 0.5


@pytest.mark.parametrize("seed", [11, 0, 3])
def test_k3_in_the_loss_reaches_the_forward_kl_optimum_instead(seed):
    world = exact.make_world(seed)
    penalised = partial(policy_gradient, kl_in_reward=False, k3_in_loss=True)
    assert distance(world, penalised, exact.forward_kl_optimum(world)) <= TOLERANCE
    assert float(exact.total_variation(exact.forward_kl_optimum(world), exact.optimum(world))) > 0.3


@pytest.mark.parametrize("seed", [11, 0, 3])
def test_dpo_population_loss_reaches_the_optimum(seed):
    world = exact.make_world(seed)
    loss = partial(pairwise, loss=dpo_loss, weights=population(world)[0])
    assert distance(world, loss, exact.optimum(world)) <= TOLERANCE


def test_dpo_with_mean_instead_of_summed_logprobs_does_not():
    loss = partial(pairwise, loss=dpo_loss, weights=population(WORLD)[0], over_tokens=masked_mean)
    assert distance(WORLD, loss, exact.optimum(WORLD)) > 0.4


@pytest.mark.parametrize("seed", [11, 0, 3])
def test_ipo_reaches_its_own_optimum_and_not_dpos(seed):
    world = exact.make_world(seed)
    weights, preference = population(world)
    target = exact.ipo_optimum(world, preference, world.beta)
    assert distance(world, partial(pairwise, loss=ipo_loss, weights=weights), target) <= TOLERANCE
    assert float(exact.total_variation(target, exact.optimum(world))) > 0.1


@pytest.mark.parametrize(
    ("pairs", "furthest", "least_accuracy"), [(10_000, 0.35, 0.92), (100_000, 0.06, 0.98)]
)
def test_dpo_from_sampled_pairs(pairs, furthest, least_accuracy):
    rng = np.random.default_rng(0)
    reward = np.asarray(WORLD.reward, np.float64)
    ref = np.exp(np.asarray(exact.sequence_logprobs(WORLD.ref_params), np.float64))
    ref = ref / ref.sum()
    a, b = rng.choice(exact.SEQUENCES, (2, pairs), p=ref)
    a_wins = rng.random(pairs) < 1 / (1 + np.exp(reward[b] - reward[a]))
    counts = np.zeros((exact.SEQUENCES, exact.SEQUENCES))
    np.add.at(counts, (np.where(a_wins, a, b), np.where(a_wins, b, a)), 1 / pairs)

    loss = partial(pairwise, WORLD, loss=dpo_loss, weights=jnp.asarray(counts, jnp.float32))
    logprobs = exact.sequence_logprobs(minimise(loss, WORLD.ref_params))
    assert float(exact.total_variation(jnp.exp(logprobs), exact.optimum(WORLD))) <= furthest

    # How often the implicit reward orders a fresh pair as the true reward does (pairs from the reference).
    log_ref = exact.sequence_logprobs(WORLD.ref_params)
    one, other = PAIRS
    _, implicit, implicit_other = dpo_loss(
        logprobs[one], logprobs[other], log_ref[one], log_ref[other], WORLD.beta
    )
    right = np.sign(implicit - implicit_other) == np.sign(reward[one] - reward[other])
    weight = ref[one] * ref[other] * (one != other)
    assert float(np.sum(weight * right) / np.sum(weight)) >= least_accuracy
