"""Updates that leave out slots which no answer of a microbatch fills: the same batch, step and metrics."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import AXES, DESCENT, MESHES, MODEL, SCALAR, assert_close, lm_params, one_step, scalar_params

from jrlhf.algorithms import FROM_ROLLOUTS
from jrlhf.algorithms.dr_grpo import DrGRPOConfig
from jrlhf.algorithms.grpo import GRPOConfig
from jrlhf.algorithms.gspo import GSPOConfig
from jrlhf.algorithms.online_dpo import OnlineDPOConfig
from jrlhf.algorithms.ppo import PPOConfig, actor_critic, make_ppo
from jrlhf.algorithms.reinforce import REINFORCEConfig
from jrlhf.config import UserError
from jrlhf.optim import Optimizer
from jrlhf.sharding import make_mesh, put_batch, state_shardings
from jrlhf.types import Rollout

G, P, R = 4, 5, 6
KEY = jax.random.key(0)
SKEWED = (1, 2, 1, 6, 2, 1, 1, 3, 1, 1, 6, 2, 1, 4, 2, 1, 1, 2, 4, 1, 2, 6, 1, 1, 3, 1, 1, 2, 6, 1, 2, 1)
SLOW = Optimizer(optax.sgd(0.1), lambda updates: jnp.float32(0.1), None)  # for several updates


def rollout(lengths):
    """Groups of G answers of these lengths to the same prompt. Those of all R slots did not end."""
    rng, lengths = np.random.default_rng(0), np.array(lengths)
    prompts, answers = rng.integers(1, 32, (len(lengths) // G, P)), rng.integers(1, 32, (len(lengths), R))
    prompt_mask = np.arange(P) >= rng.integers(0, P, (len(prompts), 1))
    response_mask = np.arange(R) < lengths[:, None]
    tokens = np.concatenate([np.repeat(prompts, G, axis=0), answers], axis=1).astype(np.int32)
    mask = np.concatenate([np.repeat(prompt_mask, G, axis=0), response_mask], axis=1)
    logprobs = np.where(response_mask, -3.0, 0.0).astype(np.float32)
    scores = np.linspace(-1.0, 2.0, len(lengths), dtype=np.float32) ** 2
    return Rollout(tokens, mask, response_mask, logprobs, lengths < R), scores


@functools.cache
def make(config):
    descent = SLOW if config.epochs * config.minibatches > 1 else DESCENT
    if isinstance(config, PPOConfig):
        return make_ppo(config, actor_critic(MODEL, SCALAR), descent, descent, 0.9)
    return FROM_ROLLOUTS[type(config)](config, MODEL, descent, 0.9)


def start(config):
    critic = (scalar_params(1),) if isinstance(config, PPOConfig) else ()
    return (lm_params(0), *critic, lm_params(2), KEY)


@functools.cache
def compiled(function):
    return jax.jit(function)


def batch_of(config, lengths, mesh):
    """What is made of the samples; log-probabilities only where there is a token."""
    algorithm, samples = make(config), rollout(lengths)
    state = algorithm.init(*start(config))
    if mesh is None:
        batch = compiled(algorithm.make_batch)(state, *samples)
    else:
        devices = make_mesh(MESHES[mesh])
        state = jax.device_put(state, state_shardings(devices, state, AXES))
        with jax.set_mesh(devices):
            batch = jax.jit(algorithm.make_batch)(state, *put_batch(devices, samples))
    batch = jax.device_get(batch)
    real = lambda x: np.where(batch.response_mask, x, 0.0)  # noqa: E731
    batch = batch._replace(logprobs=real(batch.logprobs), ref_logprobs=real(batch.ref_logprobs))
    if isinstance(config, PPOConfig):
        batch = batch._replace(extra=batch.extra._replace(values=real(batch.extra.values)))
    return batch


@functools.cache
def step(config, lengths=SKEWED, mesh=None):
    """(the batch, what one train step did), all of it on one device or on the mesh."""
    batch = batch_of(config, lengths, mesh)
    rows = batch._replace(metrics={}) if mesh else batch
    return batch, one_step(make(config), start(config), rows, mesh)


CONFIGS = {
    "ppo": PPOConfig(epochs=2, minibatches=2, microbatches=2),
    "grpo that shares prompts": GRPOConfig(group_size=G, microbatches=2, share_prompts=True, entropy_coef=0.01),
    "full kl": GRPOConfig(group_size=G, kl="full"),
    "a divisor of all slots": DrGRPOConfig(group_size=G, beta=0.01, kl="k2", kl_level="sequence", microbatches=4),
    "answers that ended": GSPOConfig(group_size=G, microbatches=4, minibatches=1, mask_truncated=True),
    "pairs": OnlineDPOConfig(group_size=G, microbatches=2),
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_left_out_changes_no_step(config):
    batch, whole = step(config)
    assert whole.metrics["policy/grad_norm"] > 1e-3
    same, found = step(replace(config, length_buckets=2))
    assert_close(same, batch)
    assert_close((found.metrics, found.gradient), (whole.metrics, whole.gradient))
    assert_close(found.state.extra, whole.state.extra)


def test_nor_does_it_on_a_mesh():
    config = CONFIGS["grpo that shares prompts"]
    batch, whole = step(config)
    same, found = step(replace(config, length_buckets=2), mesh="all")
    assert_close(same, batch, atol=2e-5)
    metrics = {name: whole.metrics[name] for name in found.metrics}  # those of the batch were just compared
    assert_close((found.metrics, found.gradient), (metrics, whole.gradient), atol=2e-5)


@pytest.mark.parametrize("length", [1, R])
def test_answers_of_one_length(length):
    config = CONFIGS["grpo that shares prompts"]
    batch, whole = step(config, (length,) * len(SKEWED))
    same, found = step(replace(config, length_buckets=2), (length,) * len(SKEWED))
    assert_close(same, batch)
    assert_close((found.metrics, found.gradient), (whole.metrics, whole.gradient))


# --- what is run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slots:
    """A language model that tells how many slots for an answer it was given: each log-probability is params times
    that."""

    @property
    def base(self):
        return self

    def whole(self, trained, frozen):
        return trained

    def logprobs(self, params, tokens, mask, start=1, temperature=1.0, *, group=1):
        slots = tokens.shape[1] - start
        return jnp.full((len(tokens), slots), slots * params), jnp.zeros((len(tokens), slots))


LENGTHS = np.array([3, 1, 6, 2, 1, 6, 2, 1])


def seen(config, lengths=LENGTHS, slots=R):
    """(slots that the model was given for each row, [B], as it scored; the mean over rows of length times slots, as it
    learned)."""
    algorithm = FROM_ROLLOUTS[type(config)](config, Slots(), DESCENT, 1.0)
    state = algorithm.init(jnp.float32(1.0), jnp.float32(1.0), KEY)
    batch = jax.jit(algorithm.make_batch)(state, rollout(lengths)[0], np.ones(len(lengths), np.float32))
    scored, given = np.asarray(batch.ref_logprobs), np.max(np.asarray(batch.ref_logprobs), axis=1)
    # Zeros in place of what was left out, and nothing was left out of an answer.
    np.testing.assert_array_equal(scored, np.where(np.arange(R) < given[:, None], given[:, None], 0.0))
    assert np.all(given >= lengths)
    if not config.scored_in_update:
        np.testing.assert_array_equal(np.asarray(batch.logprobs), scored)
    after, _ = jax.jit(algorithm.train_step)(state, batch)
    return given.astype(int).tolist(), float(after.params["policy"] - 1.0)  # of -log π


PLAIN = REINFORCEConfig(
    beta=0.0, baseline="none", normalise="sum"
)  # of scores 1: the mean of summed log-probabilities


def test_a_microbatch_is_as_long_as_its_longest_answer():
    """By length: (1, 1), (1, 2), (2, 3), (6, 6), of which each is given 2, 4 or 6 slots."""
    given, learned = seen(replace(PLAIN, microbatches=4, length_buckets=3))
    assert sorted(given) == [2, 2, 2, 2, 4, 4, 6, 6]
    assert given[0] == 4
    assert learned == np.sum([1 * 2, 1 * 2, 1 * 2, 2 * 2, 2 * 4, 3 * 4, 6 * 6, 6 * 6]) / 8
    given, learned = seen(replace(PLAIN, microbatches=4))
    assert given == [R] * 8
    assert learned == np.sum(LENGTHS * R) / 8


def test_in_one_piece_too_the_slots_that_no_answer_fills_are_left_out():
    assert seen(replace(PLAIN, length_buckets=3)) == ([R] * 8, np.sum(LENGTHS * R) / 8)
    assert seen(replace(PLAIN, length_buckets=3), np.full(8, 1)) == ([2] * 8, 2.0)
    assert seen(replace(PLAIN, length_buckets=6), np.full(8, 5)) == ([5] * 8, 25.0)
    assert seen(replace(PLAIN, length_buckets=4), np.full(8, 4)) == ([5] * 8, 20.0)  # of 2, 3, 5 and 6


def test_groups_stay_together_and_are_as_long_as_their_longest_answer():
    config = GRPOConfig(group_size=G, microbatches=2, share_prompts=True, length_buckets=3)
    given, _ = seen(config, np.array([1, 6, 1, 1, 2, 2, 1, 2]))
    assert given == [6, 6, 6, 6, 2, 2, 2, 2]


def test_answers_that_teach_nothing_need_no_slots():
    config = replace(PLAIN, length_buckets=3, mask_truncated=True)
    assert not config.scored_in_update  # an update that scored them would need them
    given, learned = seen(config, np.array([6, 2, 1, 6, 6, 1, 2, 6]))
    assert given == [6] * 8
    assert learned == np.sum([2 * 2, 1 * 2, 1 * 2, 2 * 2]) / 4


def test_mistakes_are_named():
    with pytest.raises(UserError, match="length_buckets must be positive"):
        GRPOConfig(length_buckets=0)
