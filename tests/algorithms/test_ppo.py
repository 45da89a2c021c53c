"""PPO: the reward pipeline against a plain loop, the update against its definition, and the same on any mesh.

Where only PPO's own arithmetic is at stake the policy is a table: one distribution over tokens, whatever came
before, and a value for each previous token.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    AXES,
    DESCENT,
    MESHES,
    MODEL,
    SCALAR,
    assert_close,
    largest_difference,
    lm_params,
    one_step,
    scalar_params,
)

from jrlhf.algorithms.ppo import ActorCritic, PPOConfig, actor_critic, make_ppo
from jrlhf.config import UserError
from jrlhf.metrics import check_name
from jrlhf.optim import Optimizer
from jrlhf.rollout.rollout import pad_prompts, rollout
from jrlhf.rollout.sampling import SamplingConfig, make_sampling
from jrlhf.sharding import make_mesh, put_batch, state_shardings
from jrlhf.types import Rollout, SequenceBatch

KEY = jax.random.key(0)
VOCAB, ROWS, PROMPT, RESPONSE = 6, 8, 2, 5
STILL = Optimizer(optax.sgd(0.0), lambda updates: jnp.float32(0.0), None)
ONE = PPOConfig(epochs=1, minibatches=1)

# --- a table for a policy -----------------------------------------------------------------------------------------


def table_logprobs(policy, tokens, temperature=1.0):
    return jax.nn.log_softmax(policy / temperature)[tokens]


def table_entropy(policy, temperature=1.0):
    logps = jax.nn.log_softmax(policy / temperature)
    return -jnp.sum(jnp.exp(logps) * logps)


def forward(params, tokens, mask, start, temperature):
    logprobs = table_logprobs(params["policy"], tokens[:, start:], temperature)
    entropy = jnp.full(logprobs.shape, table_entropy(params["policy"], temperature))
    return logprobs, entropy, params["critic"][tokens[:, start - 1 : -1]]


def reference(policy, tokens, mask, start, temperature):
    return table_logprobs(policy, tokens[:, start:], temperature)


def language_loss(policy, batch, denominator):
    return (
        -jnp.sum(jnp.where(batch.loss_mask, table_logprobs(policy, batch.tokens), 0.0)[:, 1:]) / denominator
    )


TABLE = ActorCritic(forward, reference, language_loss)


@pytest.fixture(scope="module")
def tables():
    """policy, critic, reference policy."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(VOCAB), jnp.float32) for _ in range(3)]


@pytest.fixture(scope="module")
def samples(tables):
    """(rollout, scores): rows of 1 to 5 tokens; the fourth and sixth did not end."""
    rng = np.random.default_rng(1)
    lengths = np.array([1, 2, 3, 5, 4, 5, 2, 5])
    ended = np.array([True, True, True, False, True, False, True, True])
    tokens = rng.integers(0, VOCAB, (ROWS, PROMPT + RESPONSE)).astype(np.int32)
    response = np.arange(RESPONSE) < lengths[:, None]
    mask = np.concatenate([np.ones((ROWS, PROMPT), bool), response], axis=1)
    logprobs = np.where(response, table_logprobs(tables[0], tokens[:, PROMPT:]), 0.0).astype(np.float32)
    scores = rng.standard_normal(ROWS).astype(np.float32)
    return jax.tree.map(jnp.asarray, (Rollout(tokens, mask, response, logprobs, ended), scores))


make = functools.cache(make_ppo)  # one algorithm per config, and one program per algorithm
jitted = functools.cache(jax.jit)


def start_of(config, tables, optimizer=DESCENT, temperature=1.0):
    algorithm = make(config, TABLE, optimizer, STILL, temperature)
    return algorithm, algorithm.init(*tables, KEY)


@pytest.fixture(scope="module")
def table_batch(tables, samples):
    algorithm, state = start_of(ONE, tables)
    return jitted(algorithm.make_batch)(state, *samples)


def updated(config, tables, batch, optimizer=DESCENT):
    """(new state, metrics) after one iteration. The batch does not depend on how it is learned from."""
    algorithm, state = start_of(config, tables, optimizer)
    return jax.device_get(jitted(algorithm.train_step)(state, batch))


def plain_batch(config, tables, samples, temperature):
    """The reward pipeline and GAE, token by token in float64."""
    sampled, scores = jax.device_get(samples)
    policy, critic, ref = (np.asarray(t, np.float64) for t in tables)
    logps, ref_logps = ((x := t / temperature) - np.log(np.sum(np.exp(x))) for t in (policy, ref))
    rewards, values = [], []
    for row in range(ROWS):
        length = int(sampled.response_mask[row].sum())
        score = float(scores[row])
        if config.score_clip:
            score = min(max(score, -config.score_clip), config.score_clip)
        if not sampled.ended[row]:
            score -= config.missing_eos_penalty
        tokens = sampled.tokens[row]
        rewards.append([config.beta * (ref_logps[t] - logps[t]) for t in tokens[PROMPT : PROMPT + length]])
        rewards[-1][-1] += score
        values.append([critic[t] for t in tokens[PROMPT - 1 : PROMPT - 1 + length]])
    if config.whiten_rewards:
        every = np.concatenate(rewards)
        rewards = [list((np.array(r) - every.mean()) / every.std() + every.mean()) for r in rewards]
    advantages = np.zeros((ROWS, RESPONSE))
    for row in range(ROWS):
        running = 0.0
        for t in reversed(range(len(rewards[row]))):
            after = values[row][t + 1] if t + 1 < len(values[row]) else 0.0
            running = (
                rewards[row][t] + config.gamma * after - values[row][t] + config.gamma * config.lam * running
            )
            advantages[row, t] = running
    mask = sampled.response_mask
    returns = np.where(mask, advantages, 0.0)
    for row, v in enumerate(values):
        returns[row, : len(v)] += v
    if config.whiten_advantages:
        real = advantages[mask]
        advantages = np.where(mask, (advantages - real.mean()) / real.std(), 0.0)
    return advantages, returns


@pytest.mark.parametrize(
    ("config", "temperature"),
    [
        (ONE, 1.0),
        (
            replace(
                ONE,
                beta=0.3,
                score_clip=0.5,
                gamma=0.9,
                lam=0.7,
                missing_eos_penalty=0.25,
                whiten_rewards=True,
                whiten_advantages=False,
            ),
            1.5,
        ),
    ],
)
def test_advantages_are_those_of_a_plain_loop(tables, samples, config, temperature):
    algorithm, state = start_of(config, tables, temperature=temperature)
    batch = jitted(algorithm.make_batch)(state, *samples)
    advantages, returns = plain_batch(config, tables, samples, temperature)
    np.testing.assert_allclose(batch.advantages, advantages, atol=1e-5)
    np.testing.assert_allclose(batch.extra.returns, returns, atol=1e-5)


def test_kl_is_a_cost_and_the_coefficient_is_the_states(tables, samples):
    algorithm, state = start_of(ONE, tables)
    make_batch = jitted(algorithm.make_batch)
    metrics = make_batch(state, *samples).metrics
    sampled = samples[0]
    gap = table_logprobs(tables[0], sampled.tokens[:, PROMPT:]) - table_logprobs(
        tables[2], sampled.tokens[:, PROMPT:]
    )
    kl = np.mean(np.sum(np.where(sampled.response_mask, gap, 0.0), axis=1))
    assert metrics["kl/ref_k1"] == pytest.approx(kl, rel=1e-5)
    assert metrics["kl/ref_k3"] > 0
    raised = make_batch(state._replace(extra={"kl_coef": jnp.float32(ONE.beta + 1.0)}), *samples).metrics
    difference = raised["reward/total/mean"] - metrics["reward/total/mean"]
    assert difference == pytest.approx(-1.0 * kl, rel=1e-4)
    assert metrics["rollout/eos_rate"] == pytest.approx(6 / 8)
    assert metrics["rollout/len_mean"] == pytest.approx(27 / 8)
    for name in metrics:
        check_name(name)


def test_first_step_is_the_policy_gradient(tables, samples, table_batch):
    """With one minibatch the ratio is 1: the gradient is that of -mean(advantage · log-probability)."""
    after, metrics = updated(ONE, tables, table_batch)
    sampled, batch = samples[0], table_batch

    def surrogate(policy):
        logprobs = table_logprobs(policy, sampled.tokens[:, PROMPT:])
        return -jnp.sum(batch.advantages * logprobs) / jnp.sum(sampled.response_mask, dtype=jnp.float32)

    np.testing.assert_allclose(tables[0] - after.params["policy"], jax.grad(surrogate)(tables[0]), atol=1e-6)
    assert metrics["policy/ratio_max"] == 1
    assert metrics["policy/clip_frac"] == metrics["policy/approx_kl"] == 0
    assert metrics["policy/updates"] == 1
    for name in metrics:
        check_name(name)


@functools.cache
def sgd(rate):
    return Optimizer(optax.sgd(rate), lambda updates: jnp.float32(rate), None)


def test_the_clip_binds_when_the_policy_runs_away(tables, table_batch):
    config = PPOConfig(epochs=4, minibatches=2, whiten_advantages=True)
    clipped, metrics = updated(config, tables, table_batch, sgd(3.0))
    assert metrics["policy/clip_frac"] > 0.05
    assert metrics["policy/ratio_max"] > 1.2
    assert metrics["policy/updates"] == 8
    free, free_metrics = updated(replace(config, clip=1e6), tables, table_batch, sgd(3.0))
    assert free_metrics["policy/clip_frac"] == 0
    moved = [np.max(np.abs(s.params["policy"] - tables[0])) for s in (clipped, free)]
    assert moved[0] < moved[1]


def test_stop_kl_skips_the_rest(tables, table_batch):
    config = PPOConfig(epochs=4, minibatches=2)
    free, free_metrics = updated(config, tables, table_batch, sgd(1.0))
    loose, loose_metrics = updated(replace(config, stop_kl=1e6), tables, table_batch, sgd(1.0))
    tight, tight_metrics = updated(replace(config, stop_kl=1e-4), tables, table_batch, sgd(1.0))
    assert_close((loose.params, loose_metrics), (free.params, free_metrics))
    # The first update sees a KL of 0, the second one that is over the limit: it is the last.
    assert tight_metrics["policy/updates"] == 2
    assert largest_difference(tight.params["policy"], tables[0]) < largest_difference(
        free.params["policy"], tables[0]
    )
    assert tight_metrics["policy/approx_kl"] > 1e-4 / 2


@pytest.mark.parametrize(("share", "error"), [(0.5, -0.2), (0.95, -0.05), (1.1, 0.1), (3.0, 0.2)])
def test_the_adaptive_coefficient_moves_towards_its_target(tables, table_batch, share, error):
    """KL = share x target. Ziegler et al. 2019: factor 1 + clip(KL / target - 1, ±0.2) · sequences / horizon."""
    config = replace(ONE, target_kl=2.0, kl_horizon=40)
    metrics = table_batch.metrics | {"kl/ref_k1": jnp.float32(share * config.target_kl)}
    after, _ = updated(config, tables, table_batch._replace(metrics=metrics))
    assert after.extra["kl_coef"] == pytest.approx(ONE.beta * (1 + error * ROWS / 40), rel=1e-4)
    fixed, _ = updated(ONE, tables, table_batch)
    assert fixed.extra["kl_coef"] == np.float32(ONE.beta)


def test_until_the_critic_is_warm_the_policy_stands_still(tables, table_batch):
    """Its parameters and optimiser, and the KL coefficient that would adapt; the critic learns."""
    config = replace(ONE, critic_warmup=1, target_kl=1.0, kl_horizon=10)
    algorithm = make(config, TABLE, DESCENT, DESCENT, 1.0)
    state = algorithm.init(*tables, KEY)
    step = jitted(algorithm.train_step)
    first, _ = step(state, table_batch)
    np.testing.assert_array_equal(first.params["policy"], state.params["policy"])
    assert largest_difference(first.params["critic"], state.params["critic"]) > 1e-3
    assert first.extra["kl_coef"] == state.extra["kl_coef"]
    second, _ = step(first, table_batch)
    assert largest_difference(second.params["policy"], state.params["policy"]) > 1e-3
    assert second.extra["kl_coef"] != state.extra["kl_coef"]


def test_pretraining_mix_adds_its_gradient(tables, table_batch):
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, VOCAB, (ROWS, 4)).astype(np.int32)
    ptx = SequenceBatch(tokens, np.ones_like(tokens), tokens, rng.random(tokens.shape) < 0.7)
    alpha = 0.4
    with_text = table_batch._replace(extra=table_batch.extra._replace(ptx=ptx))
    mixed, metrics = updated(replace(ONE, ptx_coef=alpha), tables, with_text)
    alone, _ = updated(ONE, tables, table_batch)
    targets = ptx.loss_mask[:, 1:].sum()
    expected = jax.grad(lambda p: alpha * language_loss(p, ptx, np.float32(targets)))(tables[0])
    np.testing.assert_allclose(alone.params["policy"] - mixed.params["policy"], expected, atol=1e-6)
    assert metrics["policy/ptx_loss"] == pytest.approx(
        float(language_loss(tables[0], ptx, np.float32(targets)))
    )
    with pytest.raises(UserError, match="language_loss"):
        make_ppo(replace(ONE, ptx_coef=alpha), TABLE._replace(language_loss=None), DESCENT, STILL)


def test_entropy_bonus_raises_the_entropy(tables, table_batch):
    bonus, _ = updated(replace(ONE, entropy_coef=0.3), tables, table_batch)
    alone, _ = updated(ONE, tables, table_batch)
    expected = jax.grad(lambda p: 0.3 * table_entropy(p))(tables[0])
    np.testing.assert_allclose(bonus.params["policy"] - alone.params["policy"], expected, atol=1e-6)


def test_critic_and_shared_trunk_descend_on_the_squared_error(tables, samples, table_batch):
    """Weighted by value_coef; where values are still the old ones the clip does nothing."""

    def shared(params, tokens, mask, start, temperature):
        logprobs, entropy, values = forward(params, tokens, mask, start, temperature)
        inherited = params["policy"][tokens[:, start - 1 : -1]]  # the policy's parameters have a part in them
        return logprobs, entropy, values + inherited - jax.lax.stop_gradient(inherited)

    sampled, batch = samples[0], table_batch
    algorithm = make(replace(ONE, value_coef=0.5), TABLE._replace(forward=shared), DESCENT, DESCENT, 1.0)
    after = jitted(algorithm.train_step)(algorithm.init(*tables, KEY), batch)[0]
    apart, _ = updated(ONE, tables, batch)

    def error(critic):
        values = critic[sampled.tokens[:, PROMPT - 1 : -1]]
        squared = jnp.where(sampled.response_mask, jnp.square(values - batch.extra.returns), 0.0)
        return 0.5 * 0.5 * jnp.sum(squared) / jnp.sum(sampled.response_mask, dtype=jnp.float32)

    expected = jax.grad(error)(tables[1])
    np.testing.assert_allclose(tables[1] - after.params["critic"], expected, atol=1e-6)
    np.testing.assert_allclose(apart.params["policy"] - after.params["policy"], expected, atol=1e-6)


def test_value_clip_holds_the_critic_near_its_old_values(tables, table_batch):
    """The critic's rate is high: the second update finds values that have left the clip's range."""
    fractions = {}
    for clip in (0.2, 0.0):
        config = PPOConfig(epochs=4, minibatches=1, value_clip=clip)
        algorithm = make(config, TABLE, STILL, sgd(30.0), 1.0)
        metrics = jitted(algorithm.train_step)(algorithm.init(*tables, KEY), table_batch)[1]
        fractions[clip] = float(metrics["value/clip_frac"])
    assert fractions[0.2] > 0.05
    assert fractions[0.0] == 0


def test_minibatches_visit_every_row_once_per_epoch_in_a_new_order(tables, samples):
    """The row in each optimiser step, read off the gradient that it alone gives (one row per minibatch)."""
    tokens = jnp.broadcast_to(jnp.arange(ROWS, dtype=jnp.int32)[:, None], (ROWS, 3))
    ones = jnp.ones((ROWS, 1), bool)
    sampled = Rollout(tokens, jnp.ones((ROWS, 3), bool), ones, jnp.zeros((ROWS, 1)), ones[:, 0])
    seen = optax.GradientTransformation(
        lambda params: (jnp.zeros((2 * ROWS, ROWS)), jnp.int32(0)),
        lambda grads, state, params: (
            jnp.zeros_like(grads),
            (state[0].at[state[1]].set(grads), state[1] + 1),
        ),
    )
    config = PPOConfig(epochs=2, minibatches=ROWS, whiten_advantages=False, beta=0.0, value_coef=1.0)
    critic = Optimizer(seen, lambda updates: jnp.float32(0), None)
    algorithm = make_ppo(config, TABLE, STILL, critic)
    flat = jnp.zeros(ROWS)
    state = algorithm.init(flat, flat, flat, KEY)
    batch = algorithm.make_batch(state, sampled, jnp.ones(ROWS))
    train_step = jax.jit(algorithm.train_step)
    orders = []
    for _ in range(2):
        state, _ = train_step(state, batch)
        gradients, count = state.opt_state["critic"]
        assert count == 2 * ROWS
        rows = np.argmax(np.abs(gradients), axis=1).reshape(2, ROWS)
        assert [sorted(r) for r in rows.tolist()] == [list(range(ROWS))] * 2
        orders += rows.tolist()
        state = state._replace(opt_state=state.opt_state | {"critic": seen.init(flat)})
    assert len({tuple(o) for o in orders}) == 4
    assert train_step._cache_size() == 1  # the second call compiled nothing


# --- the decoder --------------------------------------------------------------------------------------------------

TEMPERATURE = 0.7
DECODER_ROWS = 32
SLOW = sgd(0.1)
TWO = PPOConfig(epochs=2, minibatches=2)
DECODERS = actor_critic(MODEL, SCALAR)
start_args = lambda: (lm_params(0), scalar_params(1), lm_params(2), KEY)  # noqa: E731


def decode(temperature):
    """(rollout, scores) of the decoder."""
    rng = np.random.default_rng(3)
    prompts = pad_prompts(
        [rng.integers(4, 32, rng.integers(1, 6)).tolist() for _ in range(DECODER_ROWS)], 5, 0
    )
    rule = make_sampling(
        SamplingConfig(max_new_tokens=6, temperature=temperature), tuple(range(0, 32, 3)), 31
    )
    out = jax.device_get(rollout(MODEL, lm_params(0), prompts, KEY, rule))
    assert 0.2 < np.mean(out.ended) < 0.9
    return out, rng.standard_normal(DECODER_ROWS).astype(np.float32)


@pytest.fixture(scope="module")
def decoded():
    return decode(TEMPERATURE)


def ppo(config=ONE, optimizer=SLOW):
    return make(config, DECODERS, optimizer, optimizer, TEMPERATURE)


@pytest.fixture(scope="module")
def batch(decoded):
    algorithm = ppo()
    return jax.device_get(jitted(algorithm.make_batch)(algorithm.init(*start_args()), *decoded))


def learned(config, batch, mesh=None, optimizer=SLOW):
    return one_step(ppo(config, optimizer), start_args(), batch._replace(metrics={}), mesh)


@pytest.fixture(scope="module")
def whole(batch):
    return learned(ONE, batch)


@pytest.fixture(scope="module")
def whole_two(batch):
    return learned(TWO, batch)


def test_the_sampler_and_the_trainer_are_one_policy(batch):
    assert batch.metrics["mismatch/logp_diff_max"] < 2e-5
    assert abs(batch.metrics["mismatch/kl"]) < 1e-5
    assert batch.metrics["mismatch/ess"] == pytest.approx(1, abs=1e-4)
    algorithm = ppo()  # a sampler at another temperature is found out
    metrics = jitted(algorithm.make_batch)(algorithm.init(*start_args()), *decode(1.0)).metrics
    assert metrics["mismatch/kl"] > 0.01
    assert metrics["mismatch/ess"] < 0.9


def test_the_first_ratio_is_one(whole):
    assert whole.metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-6)
    assert whole.metrics["policy/clip_frac"] == 0
    assert whole.metrics["policy/approx_kl"] == pytest.approx(0, abs=1e-9)


def test_padding_and_row_order_are_irrelevant(whole, batch):
    """Other pad tokens, other tokens after the end, rows in another order (one minibatch holds them all)."""
    order = np.random.default_rng(0).permutation(DECODER_ROWS)
    tokens = np.where(batch.mask, batch.tokens, 19)
    moved = jax.tree.map(lambda x: x[order], batch._replace(tokens=tokens, metrics=None))
    other = learned(ONE, moved)
    assert_close((other.metrics, other.gradient), (whole.metrics, whole.gradient))


def test_a_mesh_gives_the_same_gradient(whole, batch):
    spread = learned(ONE, batch, "long")
    assert_close((spread.metrics, spread.gradient), (whole.metrics, whole.gradient))
    assert f"f32[{DECODER_ROWS},11," not in spread.hlo


def test_minibatches_and_microbatches_on_a_mesh(whole_two, batch):
    """Two epochs of two minibatches, in one piece on one device and in two pieces over all three mesh axes."""
    spread = learned(replace(TWO, microbatches=2), batch, "all")
    assert_close(spread.metrics, whole_two.metrics, atol=2e-5)
    assert_close(spread.gradient, whole_two.gradient)
    assert whole_two.metrics["policy/ratio_max"] > 1.001
    for rows in (DECODER_ROWS, DECODER_ROWS // 2, DECODER_ROWS // 4):
        assert f"f32[{rows},11," not in spread.hlo
    assert f"f32[{DECODER_ROWS // 16},11," in spread.hlo  # 2 minibatches x 2 pieces x 4 ways


def test_make_batch_on_a_mesh(batch, decoded):
    mesh = make_mesh(MESHES["all"])
    algorithm = ppo(replace(TWO, microbatches=2))
    state = algorithm.init(*start_args())
    state = jax.device_put(state, state_shardings(mesh, state, AXES))
    with jax.set_mesh(mesh):
        spread = jax.device_get(jax.jit(algorithm.make_batch)(state, *put_batch(mesh, decoded)))
    assert_close(spread, batch, atol=2e-5)


def test_a_value_head_on_the_policys_trunk(batch):
    """Values come from the policy's own hidden states, before each token, and depend on its parameters."""
    params = {"policy": lm_params(0), "critic": {"score": scalar_params(1)["score"]}}
    whole = lambda p: p | {"reference": None}  # noqa: E731
    values = lambda p: actor_critic(MODEL, None).forward(whole(p), batch.tokens, batch.mask, 5, TEMPERATURE)  # noqa: E731
    nudge = jax.tree.map(jnp.zeros_like, params) | {"policy": params["policy"]}
    (logprobs, _, got), (_, _, change) = jax.jit(lambda p: jax.jvp(values, (p,), (nudge,)))(params)
    head = jax.device_get(params["critic"]["score"])
    hidden = np.asarray(jax.jit(MODEL.hidden)(lm_params(0), batch.tokens, batch.mask))[:, 4:-1]
    real = batch.response_mask
    np.testing.assert_allclose(got[real], (hidden @ head["kernel"][:, 0] + head["bias"])[real], atol=1e-5)
    np.testing.assert_allclose(logprobs[real], batch.logprobs[real], atol=1e-5)
    assert np.min(np.abs(change[real])) > 0


def test_mistakes_are_named():
    for wrong in (
        {"beta": -1.0},
        {"clip": 0.0},
        {"minibatches": 0},
        {"gamma": 1.5},
        {"target_kl": 1.0, "beta": 0.0},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            PPOConfig(**wrong)
