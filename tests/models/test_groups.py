"""A prompt that goes through the model once for its whole group: the same log-probabilities and gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, assert_close, fake_params

from jrlhf.models.config import MoEConfig
from jrlhf.models.transformer import Model

Q, G, P, R = 3, 4, 5, 6


def rows():
    """Q prompts of 1 to P tokens, G answers of 0 to R tokens to each: tokens and mask [Q * G, P + R]."""
    rng = np.random.default_rng(0)
    prompt, answer = rng.integers(1, 32, (Q, P)), rng.integers(1, 32, (Q * G, R))
    prompt_mask = np.arange(P) >= np.array([0, 2, 4])[:, None]
    answer_mask = np.arange(R) < rng.integers(0, R + 1, Q * G)[:, None]
    tokens = np.concatenate([np.repeat(prompt, G, axis=0), answer], axis=1)
    return tokens, np.concatenate([np.repeat(prompt_mask, G, axis=0), answer_mask], axis=1)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"remat": "full"},
        {"remat": "dots", "logits_chunk": 4},
        {"window": 4, "windowed": (True, False)},
        {"positions": "learned"},
        {"attention_softcap": 5.0, "parallel_residual": True},
        {"moe": MoEConfig(experts=4, per_token=2)},
    ],
    ids=str,
)
def test_a_shared_prompt_changes_no_logprob_and_no_gradient(change):
    model = Model(replace(TINY, **change))
    params, (tokens, mask) = fake_params(model), rows()
    weights = np.random.default_rng(1).standard_normal((Q * G, R)) * mask[:, P:]

    def loss(params, group):
        logprobs, entropy = model.logprobs(params, tokens, mask, P, 0.7, group=group)
        return jnp.sum(jnp.where(mask[:, P:], (logprobs + 0.3 * entropy) * weights, 0.0)), logprobs

    (_, alone), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(params, 1)
    (_, shared), same = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(params, G)
    assert_close(np.where(mask[:, P:], shared, 0.0), np.where(mask[:, P:], alone, 0.0))
    assert_close(same, grads, atol=2e-5)


def test_rows_that_are_no_whole_groups_are_an_error():
    model, (tokens, mask) = Model(TINY), rows()
    with pytest.raises(ValueError, match="11 rows in groups of 4"):
        model.logprobs(fake_params(model), tokens[:-1], mask[:-1], P, group=G)
    with pytest.raises(ValueError, match="their positions are counted"):
        model.logprobs(fake_params(model), tokens, mask, P, positions_BT=tokens, group=G)
