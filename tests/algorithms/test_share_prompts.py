"""A prompt that goes through the model once for its group: the same batch, step and metrics."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import MODEL, assert_close, fake_params

from jrlhf.algorithms.dr_grpo import DrGRPOConfig, make_dr_grpo
from jrlhf.algorithms.grpo import GRPOConfig, make_grpo
from jrlhf.algorithms.online_dpo import OnlineDPOConfig
from jrlhf.algorithms.ppo import PPOConfig
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


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (make_grpo, GRPOConfig(group_size=G)),
        (make_grpo, GRPOConfig(group_size=G, kl="full", microbatches=2, epochs=2, mask_truncated=True)),
        (make_dr_grpo, DrGRPOConfig(group_size=G, beta=0.1, microbatches=4)),
        (make_rloo, RLOOConfig(group_size=G, entropy_coef=0.1)),
    ],
    ids=["grpo", "grpo_full_kl", "dr_grpo", "rloo"],
)
def test_shared_prompts_change_no_step(make, config):
    params, reference = fake_params(MODEL, 0), fake_params(MODEL, 1)
    scores = jnp.asarray(np.random.default_rng(1).standard_normal(Q * G), jnp.float32)
    after = []
    for share in (False, True):
        algorithm = make(replace(config, share_prompts=share), MODEL, DESCENT, 0.9)
        state = algorithm.init(params, reference, jax.random.key(0))
        batch = jax.jit(algorithm.make_batch)(state, rollout(), scores)
        after.append(jax.jit(algorithm.train_step)(state, batch))
    (alone, metrics), (shared, same) = after
    assert_close(shared.params, alone.params)
    assert_close(same, metrics, atol=1e-4, rtol=1e-4)
    assert not np.allclose(alone.params["policy"]["final_norm"]["scale"], params["final_norm"]["scale"])


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
        (lambda: PPOConfig(share_prompts=True, group_size=2), "not possible in PPOConfig"),
        (lambda: OnlineDPOConfig(share_prompts=True), "not possible in OnlineDPOConfig"),
        (lambda: RAFTConfig(share_prompts=True), "not possible in RAFTConfig"),
        (lambda: PPOConfig(share_prompts=True), "group_size is 1"),
    ],
)
def test_where_prompts_cannot_be_shared_it_is_an_error(config, message):
    with pytest.raises(UserError, match=message):
        config()
