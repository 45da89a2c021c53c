"""Sampled RLOO, GRPO and PPO on the exact space, written with the product's advantages and losses.

1,500 updates of 256 fresh answers. With -beta·k1 in the reward each reaches the optimum for every seed; with
a KL estimator in the loss, or a division by the group's standard deviation in the wrong place, none does.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrlhf.lab import exact
from jrlhf.ops.advantages import gae, group_advantages, rloo_advantages
from jrlhf.ops.kl import kl_k1, kl_k2, kl_k3
from jrlhf.ops.losses import ppo_policy_loss, value_loss
from jrlhf.ops.masking import last_token_index, masked_mean, masked_sum

pytestmark = pytest.mark.usefixtures("optimised")

WORLD = exact.make_world(11)
SPACE = WORLD.space
UPDATES, ANSWERS, LEARNING_RATE = 1500, 256, 0.02
CLIP = 0.2
rloo = partial(rloo_advantages, group_size=16)
grpo = partial(group_advantages, group_size=16, std=False)
grpo_std = partial(group_advantages, group_size=16, std=True)


class Batch(NamedTuple):
    """All [N, 4]; `returns` and `old_values` only where there is a critic."""

    tokens: jax.Array
    mask: jax.Array
    old_logprobs: jax.Array
    ref_logprobs: jax.Array
    advantages: jax.Array
    returns: jax.Array | None = None
    old_values: jax.Array | None = None


def grouped_batch(world, params, samples, *, advantages, kl="in the reward"):
    """One advantage per answer. `kl`: "in the reward", "after" the advantages, or "none"."""
    ref = SPACE.logprobs(world.ref_params, samples.tokens, samples.mask)
    penalty = world.beta * masked_sum(kl_k1(samples.logprobs, ref), samples.mask, axis=1)
    reward = world.reward[SPACE.sequence_number(samples.tokens)]
    advantage = advantages(reward - penalty if kl == "in the reward" else reward)
    if kl == "after":
        advantage = advantage - penalty
    advantage = jnp.broadcast_to(advantage[:, None], samples.mask.shape)
    return Batch(samples.tokens, samples.mask, samples.logprobs, ref, advantage)


def grouped_loss(world, params, batch, *, penalty=None, per_length=False):
    """The surrogate summed over tokens, averaged over answers; `penalty`: a KL estimator in the loss."""
    logprobs = SPACE.logprobs(params["policy"], batch.tokens, batch.mask)
    answers = float(batch.mask.shape[0])
    weight = jnp.ones(batch.mask.shape)
    if per_length:
        weight = weight / masked_sum(weight, batch.mask, axis=1)[:, None]
    loss, _ = ppo_policy_loss(
        logprobs, batch.old_logprobs, weight * batch.advantages, batch.mask, CLIP, denominator=answers
    )
    if penalty is not None:
        estimate = weight * penalty(logprobs, batch.ref_logprobs)
        loss = loss + world.beta * masked_mean(estimate, batch.mask, denominator=answers)
    return loss


def ppo_batch(world, params, samples):
    """Per-token rewards -beta·k1, the answer's reward on its last token, GAE with a tabular critic."""
    ref = SPACE.logprobs(world.ref_params, samples.tokens, samples.mask)
    last = jax.nn.one_hot(last_token_index(samples.mask), SPACE.length)
    rewards = last * world.reward[SPACE.sequence_number(samples.tokens)][:, None]
    rewards = rewards - world.beta * kl_k1(samples.logprobs, ref)
    old_values = SPACE.rows(params["critic"], samples.tokens)
    advantages, returns = gae(rewards, old_values, samples.mask, gamma=1.0, lam=0.95)
    return Batch(samples.tokens, samples.mask, samples.logprobs, ref, advantages, returns, old_values)


def ppo_loss(world, params, batch):
    values = SPACE.rows(params["critic"], batch.tokens)
    critic, _ = value_loss(
        values, batch.old_values, batch.returns, batch.mask, CLIP, denominator=float(batch.mask.shape[0])
    )
    return grouped_loss(world, params, batch) + critic


def train(world, key, make_batch, loss, minibatches=1):
    """Probabilities [121] of the policy after `UPDATES` batches."""
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, UPDATES * minibatches))
    params = {"policy": world.ref_params, "critic": jnp.zeros(SPACE.states)}

    def minibatch(carry, batch):
        params, opt_state = carry
        grads = jax.grad(lambda p: loss(world, p, batch))(params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            changes, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, changes), opt_state), None

    def update(carry, step):
        samples = SPACE.sample(carry[0]["policy"], jax.random.fold_in(key, step), ANSWERS)
        batch = make_batch(world, carry[0], samples)
        return jax.lax.scan(
            minibatch, carry, jax.tree.map(lambda x: x.reshape(minibatches, -1, *x.shape[1:]), batch)
        )

    (params, _), _ = jax.lax.scan(update, (params, optimizer.init(params)), jnp.arange(UPDATES))
    return jnp.exp(SPACE.sequence_logprobs(params["policy"]))


def distances(make_batch, loss, *, seeds, minibatches=1, targets=(exact.optimum,)):
    """Total variation from each target, [targets, seeds]."""
    run = jax.jit(jax.vmap(lambda key: train(WORLD, key, make_batch, loss, minibatches)))
    policies = run(jax.random.split(jax.random.key(0), seeds))
    return np.stack([exact.total_variation(policies, target(WORLD)[None]) for target in targets])


@pytest.mark.parametrize(
    ("make_batch", "loss", "minibatches"),
    [
        pytest.param(partial(grouped_batch, advantages=rloo), grouped_loss, 1, id="rloo"),
        pytest.param(partial(grouped_batch, advantages=grpo), grouped_loss, 1, id="grpo-no-std"),
        # Two minibatches: the second one's ratio is no longer 1.
        pytest.param(ppo_batch, ppo_loss, 2, id="ppo"),
    ],
)
def test_kl_in_the_reward_reaches_the_optimum_for_ten_seeds(make_batch, loss, minibatches):
    assert distances(make_batch, loss, seeds=10, minibatches=minibatches).max() <= 0.01


def test_it_does_so_in_other_worlds():
    worlds = [exact.make_world(seed) for seed in range(8)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves]), *worlds)
    make_batch = partial(grouped_batch, advantages=rloo)
    keys = jax.random.split(jax.random.key(1), len(worlds))
    policies = jax.jit(jax.vmap(lambda world, key: train(world, key, make_batch, grouped_loss)))(
        stacked, keys
    )
    optima = jnp.stack([exact.optimum(world) for world in worlds])
    assert float(jnp.max(exact.total_variation(policies, optima))) <= 0.01


@pytest.mark.parametrize(
    ("penalty", "where", "at_least"),
    [
        # The KL of each state, blind to which states are reached.
        pytest.param(
            kl_k2, lambda world: exact.token_level_optimum(world, in_loss=world.beta), 0.15, id="k2"
        ),
        # The forward KL of each state.
        pytest.param(kl_k3, exact.token_level_forward_kl_optimum, 0.1, id="k3"),
    ],
)
def test_a_token_level_estimator_in_the_loss_leads_elsewhere(penalty, where, at_least):
    make_batch = partial(grouped_batch, advantages=rloo, kl="none")
    loss = partial(grouped_loss, penalty=penalty)
    from_optimum, from_where = distances(make_batch, loss, seeds=3, targets=(exact.optimum, where))
    assert from_optimum.min() >= at_least
    assert from_where.max() <= 0.02


def test_k1_in_the_loss_is_no_penalty_at_all():
    make_batch = partial(grouped_batch, advantages=rloo, kl="none")
    assert distances(make_batch, partial(grouped_loss, penalty=kl_k1), seeds=3).min() >= 0.7


def test_grpo_as_published_is_as_far_away_as_it_should_be():
    """Group standard deviation, 1/length, k3 in the loss. Nearer than this, it is silently something else."""
    make_batch = partial(grouped_batch, advantages=grpo_std, kl="none")
    found = distances(make_batch, partial(grouped_loss, penalty=kl_k3, per_length=True), seeds=3)
    assert found.min() >= 0.13
    assert found.max() <= 0.24


def test_kl_after_the_division_by_the_group_std_collapses():
    """The division enlarges the reward as the answers become alike, the penalty is left as it is."""
    whole_batch = partial(group_advantages, group_size=ANSWERS, std=True)
    found = distances(partial(grouped_batch, advantages=whole_batch, kl="after"), grouped_loss, seeds=3)
    assert found.min() >= 0.7


def test_kl_before_the_division_by_the_group_std_is_harmless_here():
    """At the optimum of one prompt reward - beta·k1 is a constant, whatever it is divided by."""
    assert distances(partial(grouped_batch, advantages=grpo_std), grouped_loss, seeds=3).max() <= 0.01
