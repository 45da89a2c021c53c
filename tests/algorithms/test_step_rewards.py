"""Rewards of single tokens: what enters an update, process supervision by plain loops, and where each leads.

On the exact space a reward that is paid in parts has the optimum of the whole, and potential-based shaping moves
nothing (Ng et al. 1999, theorem 1).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.algorithms import FROM_ROLLOUTS
from jrlhf.algorithms.cispo import CISPOConfig
from jrlhf.algorithms.dapo import DAPOConfig
from jrlhf.algorithms.dr_grpo import DrGRPOConfig
from jrlhf.algorithms.grpo import GRPOConfig
from jrlhf.algorithms.ppo import PPOConfig, actor_critic, make_ppo
from jrlhf.algorithms.reinforce import REINFORCEConfig
from jrlhf.algorithms.reinforce_plus_plus import REINFORCEPlusPlusConfig
from jrlhf.algorithms.remax import ReMaxConfig
from jrlhf.algorithms.rloo import RLOOConfig
from jrlhf.lab import exact
from jrlhf.metrics import check_name
from jrlhf.ops.advantages import advantages_to_go, gae, process_advantages
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.training.exact import answer_logprobs, as_rollout, greedy_answer, probabilities, run, tabular
from jrlhf.training.online import shaped_totals
from jrlhf.types import Scores

WORLD = exact.make_world(11)
SPACE = WORLD.space
TOKENS, MASK = SPACE.all_sequences()
GROUP, ROWS, SLOTS = 4, 8, SPACE.length
NONE = np.nan


# --- advantages -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paid():
    """(rewards, mask, steps), each [8, 4]: two groups of answers of 1 to 4 tokens; masked tokens hold NaN."""
    rng = np.random.default_rng(0)
    mask = np.arange(SLOTS) < np.array([1, 2, 3, 4, 4, 3, 2, 4])[:, None]
    steps = mask & (rng.random(mask.shape) < 0.6)
    steps[:, 0] = True
    rewards = np.where(mask, rng.standard_normal(mask.shape), NONE).astype(np.float32)
    return rewards, mask, steps


def test_process_supervision_is_the_papers(paid):
    """A step's normalised reward goes to it and to all before it (DeepSeekMath, section 4.1.3)."""
    rewards, mask, steps = paid
    rewards = np.where(steps, rewards, 0.0)
    expected = np.zeros(mask.shape)
    for first in (0, GROUP):
        rows = slice(first, first + GROUP)
        of_group = rewards[rows][steps[rows]].astype(np.float64)
        normalised = (rewards[rows] - of_group.mean()) / (of_group.std(ddof=1) + 1e-4)
        for i in range(GROUP):
            for t in range(SLOTS):
                later = [s for s in range(t, SLOTS) if steps[first + i, s]]
                expected[first + i, t] = mask[first + i, t] * sum(normalised[i, s] for s in later)
    found = process_advantages(np.where(mask, rewards, NONE), mask, steps | ~mask, GROUP)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Of outcomes alone it is outcome supervision.
    last = np.arange(SLOTS) == mask.sum(axis=1, keepdims=True) - 1
    found = process_advantages(np.where(last, rewards, 0.0), mask, last, GROUP)
    outcome = np.where(last, rewards, 0.0).sum(axis=1).reshape(-1, GROUP)
    scaled = (outcome - outcome.mean(axis=1, keepdims=True)) / (
        outcome.std(axis=1, ddof=1, keepdims=True) + 1e-4
    )
    np.testing.assert_allclose(found, scaled.reshape(-1, 1) * mask, atol=1e-5)


def test_an_advantage_loses_what_was_earned_before(paid):
    rewards, mask, _ = paid
    whole = np.linspace(-1, 1, ROWS, dtype=np.float32)
    found = advantages_to_go(whole, rewards, mask)
    for i, t in np.argwhere(mask):
        assert found[i, t] == pytest.approx(whole[i] - rewards[i, :t].sum(), abs=1e-5)
    assert not np.any(np.asarray(found)[~mask])


# --- what an update is given ----------------------------------------------------------------------------------------


@functools.cache
def adam(updates=1):
    return build_optimizer(OptimConfig(lr=0.02, schedule="cosine", grad_clip=0.0), updates)


def made(config, updates=1):
    """(algorithm, what it starts from) of a tabular policy."""
    learner = tabular(WORLD)
    if isinstance(config, PPOConfig):
        models = actor_critic(learner.model, learner.critic)
        algorithm = make_ppo(config, models, adam(updates), adam(updates))
        return algorithm, (learner.params, learner.critic_params, learner.params)
    algorithm = FROM_ROLLOUTS[type(config)](config, learner.model, adam(updates))
    return algorithm, (learner.params, learner.params)


@pytest.fixture(scope="module")
def samples():
    return SPACE.sample(0.3 * WORLD.ref_params, jax.random.key(1), ROWS)


def batch_of(config, samples, scores, token_rewards=None, **more):
    algorithm, start = made(config)
    state = algorithm.init(*start, jax.random.key(0))
    rollout = as_rollout(SPACE, samples)
    more |= {} if token_rewards is None else {"token_rewards": jnp.asarray(token_rewards)}
    return jax.device_get(algorithm.make_batch(state, rollout, jnp.asarray(scores), **more))


def test_token_rewards_are_added_and_masked_ones_never_read(samples):
    mask = np.asarray(samples.mask)
    rng = np.random.default_rng(2)
    said = rng.random(mask.shape) < 0.5
    earned = rng.standard_normal(mask.shape).astype(np.float32)
    scores = 3.0 * np.ones(ROWS, np.float32)
    config = PPOConfig(beta=0.0, score_clip=1.0, whiten_advantages=False, missing_eos_penalty=0.0)
    given = np.where(mask, np.where(said, earned, NONE), np.inf).astype(np.float32)
    batch = batch_of(config, samples, scores, given)
    last = np.arange(SLOTS) == mask.sum(axis=1, keepdims=True) - 1
    expected = np.where(said & mask, earned, 0.0) + last  # the score is clipped, what tokens earn is not
    np.testing.assert_allclose(batch.rewards, expected, atol=1e-6)
    # The critic is zero: each advantage is what follows, discounted.
    zeros = np.zeros_like(expected)
    np.testing.assert_allclose(batch.advantages, gae(expected, zeros, mask, 1.0, 0.95)[0], atol=1e-5)
    sums = np.where(said & mask, earned, 0.0).sum(axis=1)
    assert batch.metrics["reward/tokens/mean"] == pytest.approx(sums.mean(), abs=1e-6)
    assert batch.metrics["reward/tokens/count"] == pytest.approx((said & mask).sum() / ROWS)
    assert batch.metrics["reward/score/mean"] == pytest.approx(3 + sums.mean(), abs=1e-6)
    for name in batch.metrics:
        check_name(name)
    with pytest.raises(ValueError, match="token rewards"):
        batch_of(config, samples, scores, given[:, 1:])


def test_scores_know_what_answers_earn_in_all():
    tokens = np.array([[NONE, 1.0, 2.0], [NONE, NONE, NONE]], np.float32)
    np.testing.assert_allclose(Scores(np.array([0.5, 0.25], np.float32), tokens=tokens).total, [3.5, 0.25])
    assert Scores(np.ones(2)).total.tolist() == [1, 1]


def test_the_baseline_of_greedy_answers_is_paid_as_samples_are(samples):
    """In all, an answer earns the same whether it is sampled or the baseline."""
    rng = np.random.default_rng(4)
    config = ReMaxConfig(beta=0.0, score_clip=1.0, missing_eos_penalty=0.5)
    given = np.where(np.asarray(samples.mask), rng.uniform(1.0, 2.0, samples.mask.shape), NONE)
    scores = Scores(3.0 * np.ones(ROWS, np.float32), tokens=given.astype(np.float32))
    batch = batch_of(config, samples, scores.values, scores.tokens, greedy=jnp.zeros(ROWS))
    total = shaped_totals(config, as_rollout(SPACE, samples), scores)
    np.testing.assert_allclose(total, batch.rewards.sum(axis=1), atol=1e-5)


GROUPED = {"group_size": GROUP}


@pytest.mark.parametrize(
    "config",
    [
        GRPOConfig(**GROUPED),
        GRPOConfig(**GROUPED, scale="none"),
        GRPOConfig(**GROUPED, scale="batch"),
        DrGRPOConfig(**GROUPED),
        DAPOConfig(**GROUPED, resample_rounds=0, overlong_buffer=0.0),
        CISPOConfig(**GROUPED),
        REINFORCEConfig(beta=0.0),
        REINFORCEPlusPlusConfig(beta=0.0),
        ReMaxConfig(beta=0.0),
    ],
    ids=lambda config: type(config).__name__,
)
def test_every_able_algorithm_gives_credit_to_the_step_that_earned_it(config, samples):
    """What is earned by the first token alone is no reason to prefer the tokens after it; what the last earns is."""
    assert config.token_rewards
    mask = np.asarray(samples.mask)
    length = mask.sum(axis=1)
    assert length.max() > 1
    long = int(np.argmax(length))
    more = {"greedy": jnp.zeros(ROWS)} if config.greedy_baseline else {}
    first = np.where(mask, 0.0, NONE).astype(np.float32)
    late = first.copy()
    first[long, 0], late[long, length[long] - 1] = 1.0, 1.0
    given = lambda tokens: batch_of(config, samples, np.zeros(ROWS, np.float32), tokens, **more)  # noqa: E731
    early, lately = given(first).advantages[long], given(late).advantages[long]
    end = length[long] - 1
    assert early[0] > early[1] + 0.1
    assert lately[0] < lately[1] + 1e-5  # both precede what was earned
    assert lately[end] > early[end] + 0.1


def test_an_algorithm_of_whole_answers_refuses(samples):
    with pytest.raises(ValueError, match="RLOOConfig takes no token rewards"):
        batch_of(RLOOConfig(**GROUPED), samples, np.zeros(ROWS, np.float32), np.zeros(samples.mask.shape))
    assert {c.__name__ for c in FROM_ROLLOUTS if not c.token_rewards} == {
        "GSPOConfig",
        "OnlineDPOConfig",
        "RAFTConfig",
        "RLOOConfig",
    }


# --- fixed points ---------------------------------------------------------------------------------------------------


class Paid(NamedTuple):
    """A reward in parts. What it sums to is `whole`."""

    tokens: np.ndarray  # [M, V] for choosing a token after a prefix
    answers: np.ndarray  # [S] at the end of each answer

    @property
    def whole(self):
        return self.answers + summed(self.tokens)


def of_tokens(table, tokens):
    """[N, L]: what each token earns."""
    return jnp.take_along_axis(SPACE.rows(table, tokens), jnp.asarray(tokens)[..., None], axis=-1)[..., 0]


def summed(table):
    return np.where(MASK, of_tokens(jnp.asarray(table), TOKENS), 0.0).sum(axis=1)


def ways_to_pay() -> dict[str, Paid]:
    rng = np.random.default_rng(5)
    reward = np.asarray(WORLD.reward)
    states, k = np.arange(SPACE.states), SPACE.symbols
    # The node that each token leads to; EOS, and the last symbol, end the answer that has the node's number.
    child = np.concatenate([k * states[:, None] + 1 + np.arange(k), states[:, None]], axis=1)
    ends = (child >= SPACE.states) | (np.arange(k + 1) == k)
    some = rng.standard_normal(ends.shape)
    potential = rng.standard_normal(SPACE.sequences)
    reached = np.where(ends, 0.0, potential[child])
    everything = np.where(ends, 0.0, some)
    before = summed(everything.astype(np.float32))
    every_end = np.where(ends, (reward - before)[child], everything)
    as_float = lambda paid: Paid(*(np.asarray(x, np.float32) for x in paid))  # noqa: E731
    ways = {
        "in parts": Paid(some, reward - summed(some.astype(np.float32))),
        "by tokens alone": Paid(every_end, np.zeros_like(reward)),
        "shaped by a potential": Paid(reached - potential[states][:, None], reward),
        "paid for the potential": Paid(reached, reward),  # the control: this is another reward
    }
    return {name: as_float(paid) for name, paid in ways.items()}


WAYS = ways_to_pay()
UPDATES, SEEDS = 1500, 2


def distances(config, target, answers, ways=tuple(WAYS)):
    """Total variation [ways, seeds] of where the policy ends from `target(way)`, [S]."""
    learner = tabular(WORLD)
    algorithm, start = made(config, UPDATES)
    paid = jax.tree.map(lambda *x: jnp.stack(x), *[WAYS[name] for name in ways])

    def reached(paid, key):
        def draw(state, key):
            logprobs = answer_logprobs(learner, state.params["policy"])
            samples = SPACE.draw(logprobs, key, answers)
            more = {"token_rewards": of_tokens(paid.tokens, samples.tokens)}
            if config.greedy_baseline:
                whole = paid.answers + jnp.sum(jnp.where(MASK, of_tokens(paid.tokens, TOKENS), 0.0), axis=1)
                more["greedy"] = jnp.broadcast_to(whole[greedy_answer(MASK, logprobs)], (answers,))
            scores = paid.answers[SPACE.sequence_number(samples.tokens)]
            return algorithm.make_batch(state, as_rollout(SPACE, samples), scores, **more)

        state, _ = run(algorithm, start, key, draw, UPDATES)
        return probabilities(learner, state.params["policy"])

    keys = jax.random.split(jax.random.key(0), SEEDS)
    policies = jax.jit(jax.vmap(lambda paid: jax.vmap(lambda key: reached(paid, key))(keys)))(paid)
    targets = jnp.stack([target(name) for name in ways])[:, None]
    return np.asarray(exact.total_variation(policies, targets))


def optimum_of(reward):
    return exact.optimum(exact.World(WORLD.ref_params, jnp.asarray(reward), WORLD.beta, SPACE))


def test_the_parts_add_up():
    for name in ("in parts", "by tokens alone"):
        np.testing.assert_allclose(WAYS[name].whole, WORLD.reward, atol=1e-5)
    shift = WAYS["shaped by a potential"].whole - WORLD.reward
    np.testing.assert_allclose(shift, shift[0], atol=1e-5)  # the first state's potential, whatever the answer
    paid = optimum_of(WAYS["paid for the potential"].whole)
    assert float(exact.total_variation(paid, exact.optimum(WORLD))) > 0.3


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    ("config", "answers"),
    [
        (PPOConfig(beta=0.5, epochs=1, minibatches=1, missing_eos_penalty=0.0, whiten_advantages=False), 256),
        # A reward to go varies at the optimum too, where a whole answer's is constant: without a critic its noise
        # stays, and goes with one over the root of the answers (0.029 with 256, 0.010 with 1,024).
        (DrGRPOConfig(group_size=16, beta=0.5), 2048),
    ],
    ids=["PPO", "Dr. GRPO"],
)
def test_a_reward_in_parts_has_the_optimum_of_the_whole(config, answers):
    """And a potential moves nothing; what is paid for a potential without taking it back is another reward."""
    found = distances(config, lambda name: optimum_of(WAYS[name].whole), answers)
    assert found.max() <= 0.01


def test_process_supervision_as_published_does_not():
    """Every step is charged the group's mean: where answers differ in steps, that is another reward."""
    config = GRPOConfig(group_size=16, kl="reward", beta=0.5, normalise="sum", minibatches=1)
    paid_alike = ("in parts", "by tokens alone", "shaped by a potential")
    found = distances(config, lambda name: exact.optimum(WORLD), 256, paid_alike)
    assert found.min() >= 0.1
