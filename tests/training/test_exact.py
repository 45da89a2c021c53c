"""The product's own algorithms reach the known optimum of what they optimise, on a space that can be enumerated.

A table, and a two-layer transformer, in other worlds, at another beta and over other vocabularies. Each has a control
that must not get there: a test that everything passes proves nothing.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.algorithms.dpo import DPOConfig, make_dpo
from jrlhf.algorithms.kto import KTOConfig, make_kto
from jrlhf.algorithms.ppo import PPOConfig, actor_critic, make_ppo
from jrlhf.algorithms.ranked_dpo import RankedDPOConfig, make_ranked_dpo
from jrlhf.algorithms.rloo import RLOOConfig, make_rloo
from jrlhf.lab import exact
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.rollout.rollout import rollout
from jrlhf.rollout.sampling import SamplingConfig, make_sampling
from jrlhf.training.exact import (
    TableModel,
    after_prompt,
    answer_logprobs,
    greedy_answer,
    measure,
    probabilities,
    run_from_labels,
    run_from_pairs,
    run_from_rankings,
    run_from_rollouts,
    tabular,
    transformer,
)
from jrlhf.types import Prompts

SEEDS, UPDATES = 10, 1500
pytestmark = pytest.mark.usefixtures("optimised")

WORLD = exact.make_world(11)
SMALL = exact.Space(2, 4)  # for the transformer


def adam(lr, updates=UPDATES):
    return build_optimizer(OptimConfig(lr=lr, schedule="cosine", grad_clip=0.0), updates)


def stacked(worlds):
    """Worlds of one space, side by side."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(x, jnp.float32) for x in leaves]), *worlds)


@pytest.fixture(scope="module")
def small():
    return transformer(11, space=SMALL, d_model=16)


# --- the harness ---------------------------------------------------------------------------------------------------


def test_the_table_has_the_models_functions():
    learner = tabular(WORLD)
    space, model = WORLD.space, learner.model
    tokens, mask = after_prompt(space, *space.all_sequences())
    other = 0.5 * WORLD.ref_params
    logprobs, entropy = model.logprobs(learner.params, tokens, mask, temperature=0.7)
    expected = space.logprobs(learner.params / 0.7, *space.all_sequences())
    np.testing.assert_allclose(jnp.where(mask[:, 1:], logprobs, 0.0), expected, atol=1e-6)
    rows = np.asarray(jax.nn.log_softmax(learner.params / 0.7), np.float64)
    np.testing.assert_allclose(
        entropy[11, 2], -np.sum(np.exp(rows[11]) * rows[11]), atol=1e-6
    )  # after (2, 1)
    others = np.asarray(jax.nn.log_softmax(other / 0.7), np.float64)
    divergence = model.divergence(learner.params, other, tokens, mask, temperature=0.7)
    np.testing.assert_allclose(
        divergence[11, 2], np.sum(np.exp(rows[11]) * (rows[11] - others[11])), atol=1e-6
    )
    values = model.scores(jnp.arange(space.states, dtype=jnp.float32), tokens, mask)
    np.testing.assert_array_equal(values[11, :3], [0, 3, 11])  # at the prompt, after 2, after (2, 1)
    with pytest.raises(ValueError, match="not a prompt"):
        model.logprobs(learner.params, tokens[:, 1:], mask[:, 1:])


def test_the_transformer_is_its_worlds_reference(small):
    found = probabilities(small, small.params)
    assert float(jnp.sum(found)) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(found, jnp.exp(small.world.ref_logprobs()), atol=1e-6)


def test_enumeration_is_what_the_rollout_samples(small):
    """The chi-square of 20,000 answers of the product's sampler, and its greedy answer."""
    n = 20_000
    prompts = Prompts(np.full((n, 1), SMALL.eos, np.int32), np.ones((n, 1), bool))
    config = SamplingConfig(max_new_tokens=SMALL.length)
    drawn = rollout(
        small.model, small.params, prompts, jax.random.key(0), make_sampling(config, (SMALL.eos,), 0)
    )
    counts = np.bincount(SMALL.sequence_number(drawn.tokens[:, 1:]), minlength=SMALL.sequences)
    expected = n * np.exp(np.asarray(small.world.ref_logprobs(), np.float64))
    assert np.sum((counts - expected) ** 2 / expected) < 30 + 4 * np.sqrt(2 * 30)

    logprobs = answer_logprobs(small, small.params)
    mine = SMALL.draw(logprobs, jax.random.key(1), n)
    counts = np.bincount(SMALL.sequence_number(mine.tokens), minlength=SMALL.sequences)
    assert np.sum((counts - expected) ** 2 / expected) < 30 + 4 * np.sqrt(2 * 30)

    config = SamplingConfig(max_new_tokens=SMALL.length, temperature=0)
    one = jax.tree.map(lambda x: x[:1], prompts)
    best = rollout(small.model, small.params, one, jax.random.key(0), make_sampling(config, (SMALL.eos,), 0))
    _, mask = SMALL.all_sequences()
    assert int(SMALL.sequence_number(best.tokens[:, 1:])[0]) == int(greedy_answer(mask, logprobs))


# --- from rollouts -------------------------------------------------------------------------------------------------


def ppo(learner, lr=0.02, updates=UPDATES):
    """(algorithm, what it starts from); the KL coefficient is the world's."""
    config = PPOConfig(beta=1.0, epochs=1, minibatches=1, missing_eos_penalty=0.0, whiten_advantages=False)
    models = actor_critic(learner.model, learner.critic)
    algorithm = make_ppo(config, models, adam(lr, updates), adam(lr, updates))
    return algorithm, (learner.params, learner.critic_params, learner.params)


@jax.jit
@jax.vmap
def ppo_distance(world, kl_coef, key):
    """Of tabular PPO from the optimum."""
    learner = tabular(world)
    algorithm, start = ppo(learner)

    def init(*start):
        state = algorithm.init(*start)
        return state._replace(extra=state.extra | {"kl_coef": kl_coef})

    reached = run_from_rollouts(algorithm._replace(init=init), start, learner, key)
    return measure(world, reached, exact.optimum(world)).distance


def test_ppo_reaches_the_optimum_and_without_kl_it_does_not():
    """Ten seeds, another world, another beta, and one run without a penalty, side by side."""
    worlds = stacked([WORLD] * SEEDS + [exact.make_world(0), exact.make_world(5, beta=1.0), WORLD])
    kl_coef = worlds.beta.at[-1].set(0.0)
    distance = ppo_distance(worlds, kl_coef, jax.random.split(jax.random.key(0), SEEDS + 3))
    assert float(jnp.max(distance[:-1])) <= 0.01
    assert float(distance[-1]) > 0.5


def test_ppo_reaches_the_optimum_over_another_vocabulary():
    worlds = stacked([exact.make_world(seed, space=exact.Space(5, 3)) for seed in (1, 2)])
    assert float(jnp.max(ppo_distance(worlds, worlds.beta, jax.random.split(jax.random.key(2), 2)))) <= 0.01


def test_a_transformer_reaches_the_optimum_from_rollouts_and_without_kl_it_does_not(small):
    updates, world = 500, small.world

    def distance(beta):
        algorithm = make_rloo(RLOOConfig(beta=beta, group_size=16), small.model, adam(5e-3, updates))
        run = jax.jit(
            lambda key: run_from_rollouts(
                algorithm, (small.params, small.params), small, key, updates=updates, answers=128
            )
        )
        return float(measure(world, run(jax.random.key(0)), exact.optimum(world)).distance)

    assert distance(world.beta) <= 0.03
    assert distance(0.0) > 0.3


# --- from pairs, rankings and labels -------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeanTable(TableModel):
    """Its log-probabilities are divided by the answer's length, so that their sum is a mean."""

    def logprobs(self, params, tokens, mask, start=1, temperature=1.0):
        logprobs, entropy = super().logprobs(params, tokens, mask, start, temperature)
        return logprobs / jnp.sum(mask[:, 1:], axis=1, keepdims=True, dtype=jnp.float32), entropy


def dpo_distances(worlds, model, beta=0.5, reference="precomputed"):
    algorithm = make_dpo(DPOConfig(beta, reference=reference), model, adam(0.05))

    def distance(world, key):
        start = (world.ref_params, world.ref_params)
        reached = run_from_pairs(algorithm, start, tabular(world), key)
        return measure(world, reached, exact.optimum(world)).distance

    keys = jax.random.split(jax.random.key(0), len(worlds))
    return np.asarray(jax.jit(jax.vmap(distance))(stacked(worlds), keys))


def test_dpo_reaches_the_optimum_in_three_worlds():
    worlds = [exact.make_world(seed) for seed in (11, 0, 5)]
    assert dpo_distances(worlds, TableModel(WORLD.space)).max() <= 0.05


def test_dpo_reaches_the_optimum_at_another_beta_over_another_vocabulary():
    world = exact.make_world(1, beta=1.0, space=exact.Space(2, 5))
    assert dpo_distances([world], TableModel(world.space), beta=1.0).max() <= 0.02


def test_dpo_with_mean_instead_of_summed_logprobs_does_not():
    assert dpo_distances([WORLD], MeanTable(WORLD.space), reference="on_the_fly").min() > 0.4


def test_a_transformer_reaches_the_optimum_from_pairs(small):
    updates, world = 500, small.world
    algorithm = make_dpo(DPOConfig(world.beta), small.model, adam(5e-3, updates))
    run = jax.jit(
        lambda key: run_from_pairs(
            algorithm, (small.params, small.params), small, key, updates=updates, pairs=128
        )
    )
    assert float(measure(world, run(jax.random.key(0)), exact.optimum(world)).distance) <= 0.03


def test_dpo_on_rankings_reaches_the_optimum():
    learner = tabular(exact.make_world(11, space=SMALL))
    algorithm = make_ranked_dpo(RankedDPOConfig(learner.world.beta), learner.model, adam(0.05))
    run = jax.jit(lambda key: run_from_rankings(algorithm, (learner.params, None), learner, key))
    assert (
        float(measure(learner.world, run(jax.random.key(0)), exact.optimum(learner.world)).distance) <= 0.03
    )


def test_kto_reaches_its_own_optimum_and_not_dpos():
    learner = tabular(exact.make_world(11, space=SMALL))
    algorithm = make_kto(KTOConfig(learner.world.beta, reference_point="zero"), learner.model, adam(0.05))
    run = jax.jit(lambda key: run_from_labels(algorithm, (learner.params, None), learner, key))
    reached = run(jax.random.key(0))
    target = exact.kto_optimum(learner.world, jax.nn.sigmoid(learner.world.reward))
    assert float(measure(learner.world, reached, target).distance) <= 0.02
    assert float(measure(learner.world, reached, exact.optimum(learner.world)).distance) > 0.1
