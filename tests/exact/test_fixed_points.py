"""Losses written with the product's functions, minimised over all 121 answers, against closed forms.

No sampling: what is off here is a wrong loss, not noise. Every claim has a negative control beside it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.lab import exact
from jrlhf.ops.kl import kl_k1, kl_k3
from jrlhf.ops.losses import ppo_policy_loss
from jrlhf.ops.masking import masked_sum
from jrlhf.ops.preference_losses import (
    DIVERGENCES,
    dpo_loss,
    exponential_link,
    ipo_loss,
    link_loss,
    nca_pair_loss,
    robust_dpo_loss,
    sppo_hard_loss,
    square_link,
)
from jrlhf.training.exact import all_pairs, minimise, pair_law, population_fixed_point

pytestmark = pytest.mark.usefixtures("optimised")

WORLD = exact.make_world(11)
SPACE = WORLD.space
TOKENS, MASK = SPACE.all_sequences()
TOLERANCE = 1e-4
FLIPS = 0.2


def distance(world, loss, target):
    """Total variation between the policy that minimises `loss(world, params)` and `target`."""
    params = minimise(partial(loss, world), world.ref_params)
    return float(exact.total_variation(world.space.probabilities(params), target))


def policy_gradient(world, params, kl_in_reward=True, k3_in_loss=False):
    """The surrogate of every answer, weighted by its probability: the gradient is the expected one."""
    logprobs = SPACE.logprobs(params, TOKENS, MASK)
    ref = SPACE.logprobs(world.ref_params, TOKENS, MASK)
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


def four(answers):
    return *answers.logps.T, *answers.ref_logps.T


def dpo(world, answers):
    return dpo_loss(*four(answers), world.beta)[0]


def dpo_of_means(world, answers):
    means = answers._replace(logps=answers.mean_logps, ref_logps=answers.ref_logps / answers.lengths)
    return dpo(world, means)


def conservative_dpo(world, answers):
    return dpo_loss(*four(answers), world.beta, label_smoothing=FLIPS)[0]


def robust_dpo(world, answers):
    return robust_dpo_loss(*answers.ratios.T, world.beta, FLIPS)


def ipo(world, answers):
    return ipo_loss(*four(answers), world.beta)[0]


def linked(link, world, answers):
    return link_loss(world.beta * (answers.ratios[:, 0] - answers.ratios[:, 1]), link)


def nca(world, answers):
    return nca_pair_loss(*answers.ratios.T, world.beta)


def sppo(world, answers):
    return sppo_hard_loss(*answers.ratios.T, world.beta)


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


def flipped(world):
    return exact.preferences(world, flips=FLIPS)


def tied(world):
    return exact.preferences(world, ties=1.0)


def ipo_optimum(world, beta=None):
    return exact.ipo_optimum(world, exact.preferences(world), beta or world.beta)


# name -> (loss, preference or None, closed form, whether that is another one than the optimum)
PAIRWISE = {
    "dpo": (dpo, None, exact.optimum, False),
    "ipo": (ipo, None, ipo_optimum, True),
    "dpo under flips": (dpo, flipped, lambda w: exact.dpo_optimum(w, flipped(w)), True),
    "dpo under ties": (dpo, tied, lambda w: exact.dpo_optimum(w, tied(w)), True),
    # Smoothing true labels does what flips do to plain DPO; the robust loss undoes them.
    "conservative dpo": (conservative_dpo, None, lambda w: exact.dpo_optimum(w, flipped(w)), True),
    "robust dpo under flips": (robust_dpo, flipped, exact.optimum, False),
    "square": (partial(linked, square_link), None, lambda w: ipo_optimum(w, w.beta / 2), True),
    "exponential": (partial(linked, exponential_link), None, exact.exponential_optimum, True),
    "nca, beta 1": (nca, None, lambda w: exact.nca_optimum(w, exact.preferences(w)), True),
    "sppo": (sppo, None, lambda w: exact.sppo_optimum(w, exact.preferences(w), w.beta), True),
}


def check_pairwise(name, seed, space, apart):
    loss, preference, closed_form, elsewhere = PAIRWISE[name]
    world = exact.make_world(seed, beta=1.0 if "beta 1" in name else 0.5, space=space)
    reached = population_fixed_point(partial(loss, world), world, preference(world) if preference else None)
    assert float(exact.total_variation(reached, closed_form(world))) <= TOLERANCE
    assert (float(exact.total_variation(reached, exact.optimum(world))) > apart) == elsewhere


@pytest.mark.parametrize("seed", [11, 0, 3])
@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_dpo_and_ipo_reach_their_closed_forms(name, seed):
    check_pairwise(name, seed, SPACE, apart=0.1)


@pytest.mark.parametrize("name", PAIRWISE)
def test_pairwise_losses_reach_their_closed_forms_in_a_smaller_space(name):
    check_pairwise(name, 1, exact.Space(2, 4), apart=0.08)


def test_dpo_with_the_forward_kl_as_its_constraint_is_stationary_at_that_optimum():
    """Stationary, and nowhere else: minimising it takes 10,000 steps."""
    world = exact.make_world(1, space=exact.Space(2, 4))
    law = pair_law(world)

    @jax.grad
    def slope(params):
        rewards = world.beta * DIVERGENCES["forward_kl"](all_pairs(world, params, law).ratios)
        return jnp.sum(law.reshape(-1) * link_loss(rewards[:, 0] - rewards[:, 1]))

    at = lambda law: float(jnp.max(jnp.abs(slope(world.space.policy_with(law)))))  # noqa: E731
    assert at(exact.forward_kl_optimum(world)) < 1e-6
    assert at(exact.optimum(world)) > 1e-3


def test_dpo_with_mean_instead_of_summed_logprobs_does_not():
    reached = population_fixed_point(partial(dpo_of_means, WORLD), WORLD)
    assert float(exact.total_variation(reached, exact.optimum(WORLD))) > 0.4


@pytest.mark.parametrize(
    ("pairs", "furthest", "least_accuracy"), [(10_000, 0.35, 0.92), (100_000, 0.06, 0.98)]
)
def test_dpo_from_sampled_pairs(pairs, furthest, least_accuracy):
    rng = np.random.default_rng(0)
    reward = np.asarray(WORLD.reward, np.float64)
    ref = np.exp(np.asarray(WORLD.ref_logprobs(), np.float64))
    ref = ref / ref.sum()
    a, b = rng.choice(SPACE.sequences, (2, pairs), p=ref)
    a_wins = rng.random(pairs) < 1 / (1 + np.exp(reward[b] - reward[a]))
    counts = np.zeros((SPACE.sequences, SPACE.sequences), np.float32)
    np.add.at(counts, (np.where(a_wins, a, b), np.where(a_wins, b, a)), np.float32(1 / pairs))

    def loss(params):
        return jnp.sum(counts.reshape(-1) * dpo(WORLD, all_pairs(WORLD, params, counts)))

    logprobs = SPACE.sequence_logprobs(minimise(loss, WORLD.ref_params))
    assert float(exact.total_variation(jnp.exp(logprobs), exact.optimum(WORLD))) <= furthest

    # How often the implicit reward orders a fresh pair as the true reward does (pairs from the reference).
    implicit = np.asarray(logprobs - WORLD.ref_logprobs())
    right = np.sign(implicit[:, None] - implicit[None]) == np.sign(reward[:, None] - reward[None])
    weight = ref[:, None] * ref[None] * (1 - np.eye(SPACE.sequences))
    assert float(np.sum(weight * right) / np.sum(weight)) >= least_accuracy
