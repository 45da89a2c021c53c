"""A prompt that goes through the model once for its group: the same batch, step and metrics."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import MODEL, SCALAR, assert_close, fake_params

from jrlhf.algorithms.grpo import GRPOConfig, make_grpo
from jrlhf.algorithms.online_dpo import OnlineDPOConfig
from jrlhf.algorithms.ppo import PPOConfig, actor_critic, make_ppo
from jrlhf.algorithms.raft import RAFTConfig
from jrlhf.algorithms.rloo import RLOOConfig, make_rloo
from jrlhf.config import UserError
from jrlhf.optim import Optimizer
from jrlhf.types import Rollout

Q, G, P, R = 4, 4, 5, 6
DESCENT = Optimizer(optax.sgd(0.1), lambda updates: jnp.float32(0.1), None)


def rollout():
    rng = np.random.default_rng(0)
    prompt, answer = rng.integers(1, 32, (Q, P)), rng.integers(1, 32, (Q * G, R))
    prompt_mask = np.arange(P) >= rng.integers(0, P, Q)[:, None]
    response_mask = np.arange(R) < rng.integers(1, R + 1, Q * G)[:, None]
    tokens = np.concatenate([np.repeat(prompt, G, axis=0), answer], axis=1).astype(np.int32)
    mask = np.concatenate([np.repeat(prompt_mask, G, axis=0), response_mask], axis=1)
    logprobs = np.where(response_mask, -3.0, 0.0).astype(np.float32)
    return Rollout(tokens, mask, response_mask, logprobs, rng.random(Q * G) < 0.8)


def make_with_critic(config, model, optimizer, temperature):
    return make_ppo(config, actor_critic(model, SCALAR), optimizer, optimizer, temperature)


def make_with_value_head(config, model, optimizer, temperature):
    return make_ppo(config, actor_critic(model, None), optimizer, optimizer, temperature)


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (make_grpo, GRPOConfig(group_size=G)),
        (make_grpo, GRPOConfig(group_size=G, kl="full", microbatches=2, epochs=2, mask_truncated=True)),
        (make_rloo, RLOOConfig(group_size=G, entropy_coef=0.1, microbatches=4)),
        (make_with_critic, PPOConfig(group_size=G, kl="full", epochs=2, minibatches=1, microbatches=2)),
        (make_with_value_head, PPOConfig(group_size=G, epochs=1, minibatches=1)),
    ],
    ids=["grpo", "grpo_full_kl", "rloo", "ppo_critic", "ppo_value_head"],
)
def test_shared_prompts_change_no_step(make, config):
    params, reference = fake_params(MODEL, 0), fake_params(MODEL, 1)
    critic = {
        make_with_critic: (fake_params(SCALAR, 2),),
        make_with_value_head: ({"score": fake_params(SCALAR)["score"]},),
    }
    scores = jnp.asarray(np.random.default_rng(1).standard_normal(Q * G), jnp.float32)
    samples = rollout()
    after, texts = [], []
    for share in (False, True):
        algorithm = make(replace(config, share_prompts=share), MODEL, DESCENT, 0.9)
        state = algorithm.init(params, *critic.get(make, ()), reference, jax.random.key(0))
        of_samples = jax.jit(algorithm.make_batch).lower(state, samples, scores).compile()
        batch = of_samples(state, samples, scores)
        of_batch = jax.jit(algorithm.train_step).lower(state, batch).compile()
        real = lambda x, batch=batch: np.where(batch.response_mask, x, 0.0)  # noqa: E731
        made = {
            name: real(getattr(batch, name)) for name in ("logprobs", "ref_logprobs", "rewards", "advantages")
        }
        after.append((made, *of_batch(state, batch)))
        texts.append(of_samples.as_text() + of_batch.as_text())
    (made, alone, metrics), (same_made, shared, same) = after
    assert_close(same_made, made)
    assert_close(shared.params, alone.params)
    assert_close(same, metrics, atol=1e-4, rtol=1e-4)
    assert not np.allclose(alone.params["policy"]["final_norm"]["scale"], params["final_norm"]["scale"])
    # No layer saw a prompt and an answer in one row, neither while scoring nor while learning.
    rows = Q * G // config.microbatches
    assert f"f32[{rows},{P + R}," in texts[0]
    assert f"f32[{rows},{P + R}," not in texts[1]


def test_minibatches_are_made_of_whole_groups():
    """Otherwise a row would be given the prompt of another."""
    config = GRPOConfig(group_size=G, minibatches=4, epochs=3, share_prompts=True)
    algorithm = make_grpo(config, MODEL, DESCENT)
    params = fake_params(MODEL)
    state = algorithm.init(params, params, jax.random.key(0))
    batch = jax.jit(algorithm.make_batch)(state, rollout(), jnp.arange(Q * G, dtype=jnp.float32))
    one = batch._replace(advantages=jnp.zeros_like(batch.advantages))
    # Without an advantage nothing is learned but the penalty, which is nothing at the reference: were rows mixed, the
    # ratio to the log-probabilities that were taken before would not be 1.
    _, metrics = jax.jit(algorithm.train_step)(state, one)
    assert metrics["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: OnlineDPOConfig(share_prompts=True),
            "share_prompts: OnlineDPOConfig does not learn from all answers",
        ),
        (lambda: RAFTConfig(share_prompts=True), "share_prompts: RAFTConfig does not learn from all answers"),
        (lambda: PPOConfig(share_prompts=True), "group_size is 1"),
    ],
)
def test_where_prompts_cannot_be_shared_it_is_an_error(config, message):
    with pytest.raises(UserError, match=message):
        config()
