"""The product's own PPO and DPO reach the known optimum of the KL-regularised objective.

The space of jrlhf.lab.exact: 121 answers, a tabular policy in the decoder's place, a dummy prompt token.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.algorithms.dpo import DPOConfig, make_dpo
from jrlhf.algorithms.ppo import ActorCritic, PPOConfig, make_ppo
from jrlhf.lab import exact
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.types import PairBatch, Rollout

SEEDS, UPDATES, ANSWERS = 10, 1500, 256
ADAM = OptimConfig(lr=0.02, schedule="cosine", grad_clip=0.0)


def forward(params, tokens, mask, start, temperature):
    answers, real = tokens[:, start:], mask[:, start:]
    logprobs = exact.logprobs(params["policy"], answers, real)
    return logprobs, jnp.zeros_like(logprobs), exact.values(params["critic"], answers, real)


def reference(params, tokens, mask, start, temperature):
    return exact.logprobs(params, tokens[:, start:], mask[:, start:])


def as_rollout(samples: exact.Samples) -> Rollout:
    """With one prompt token before each answer."""
    before = lambda x, fill: jnp.pad(x, ((0, 0), (1, 0)), constant_values=fill)  # noqa: E731
    ended = jnp.any((samples.tokens == exact.EOS) & samples.mask, axis=1)
    return Rollout(
        before(samples.tokens, 0), before(samples.mask, True), samples.mask, samples.logprobs, ended
    )


@jax.jit
@jax.vmap
def train_ppo(world, kl_coef, key):
    """The trained policy's distance from the optimum. `kl_coef` is the penalty that PPO is given."""
    config = PPOConfig(beta=1.0, epochs=1, minibatches=1, missing_eos_penalty=0.0, whiten_advantages=False)
    optimizer = build_optimizer(ADAM, UPDATES)
    algorithm = make_ppo(config, ActorCritic(forward, reference), optimizer, optimizer)
    state = algorithm.init(world.ref_params, jnp.zeros(exact.STATES), world.ref_params, key)

    def update(state, step):
        samples = exact.sample(state.params["policy"], jax.random.fold_in(key, step), ANSWERS)
        scores = world.reward[exact.sequence_number(samples.tokens)]
        return algorithm.train_step(state, algorithm.make_batch(state, as_rollout(samples), scores))[0], None

    state, _ = jax.lax.scan(update, state._replace(extra={"kl_coef": kl_coef}), jnp.arange(UPDATES))
    learned = jnp.exp(exact.sequence_logprobs(state.params["policy"]))
    return exact.total_variation(learned, exact.optimum(world))


def stacked(n):
    return jax.tree.map(lambda *x: jnp.stack(x), *[exact.make_world(0)._replace(beta=jnp.float32(0.5))] * n)


def test_ppo_reaches_the_optimum_and_without_kl_it_does_not():
    """Ten seeds with the world's KL coefficient and one with none, side by side."""
    world = stacked(SEEDS + 1)
    kl_coef = world.beta.at[-1].set(0.0)
    distance = np.asarray(train_ppo(world, kl_coef, jax.random.split(jax.random.key(0), SEEDS + 1)))
    assert np.max(distance[:-1]) < 0.01
    assert distance[-1] > 0.5


class TabularModel:
    """What DPO asks of a model."""

    @property
    def base(self):
        return self

    def whole(self, trained, frozen):
        return trained

    def logprobs(self, params, tokens, mask):
        logprobs = exact.logprobs(params, tokens[:, 1:], mask[:, 1:])
        return logprobs, jnp.zeros_like(logprobs)


def test_dpo_reaches_the_optimum():
    """Fresh pairs of the reference's answers in every step, labelled by Bradley and Terry's law."""
    world, pairs, updates = exact.make_world(0), 1024, 2000
    optimizer = build_optimizer(OptimConfig(lr=0.05, schedule="cosine", grad_clip=0.0), updates)
    algorithm = make_dpo(DPOConfig(world.beta), TabularModel(), optimizer)

    def update(state, step):
        key = jax.random.fold_in(state.key, step)
        samples = exact.sample(world.ref_params, key, 2 * pairs)
        reward = world.reward[exact.sequence_number(samples.tokens)].reshape(pairs, 2)
        first = jax.random.uniform(jax.random.fold_in(key, 99), (pairs,)) < jax.nn.sigmoid(
            reward[:, 0] - reward[:, 1]
        )
        ref = jnp.sum(samples.logprobs, axis=1)
        out = as_rollout(samples)
        response = jnp.pad(samples.mask, ((0, 0), (1, 0)))
        batch = jax.tree.map(
            lambda x: jnp.where(
                first.reshape(-1, *[1] * x.ndim), *(y := x.reshape(pairs, 2, *x.shape[1:]), y[:, ::-1])
            ),
            PairBatch(out.tokens, out.mask, response, ref),
        )
        return algorithm.train_step(state, batch)

    state = algorithm.init(world.ref_params, world.ref_params, jax.random.key(1))
    state, metrics = jax.jit(lambda s: jax.lax.scan(update, s, jnp.arange(updates)))(state)
    assert metrics["pref/loss"][0] == pytest.approx(np.log(2), abs=1e-6)
    learned = jnp.exp(exact.sequence_logprobs(state.params["policy"]))
    assert exact.total_variation(learned, exact.optimum(world)) < 0.05
    assert (
        exact.total_variation(jnp.exp(exact.sequence_logprobs(world.ref_params)), exact.optimum(world)) > 0.5
    )
