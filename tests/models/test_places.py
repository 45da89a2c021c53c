"""A last layer that is computed only where something reads it: the same states and gradients, by less work."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, assert_close, fake_params

from jrlhf.models.config import LoRAConfig, MoEConfig
from jrlhf.models.transformer import Model
from jrlhf.ops.masking import at_places

B, T = 4, 16
rng = np.random.default_rng(0)
TOKENS = rng.integers(1, 32, (B, T)).astype(np.int32)
SEGMENTS = np.array([[1] * 16, [1] * 5 + [2] * 8 + [0] * 3, [0] * 4 + [1] * 12, [1] * 2 + [0] * 14], np.int32)
AT = np.array([[15, 3, 3], [4, 12, 0], [15, 4, 9], [1, 0, 0]], np.int32)  # in any order, and twice
WEIGHTS = 0.1 * rng.standard_normal((B, T, TINY.d_model)).astype(np.float32)


def through(model, params, at, early):
    """States at places and the gradient of something of them; without `early` by all states."""

    def loss(params):
        if early:
            states = model.hidden(params, TOKENS, SEGMENTS, at=at)
        else:
            states = at_places(model.hidden(params, TOKENS, SEGMENTS), at)
        real = at_places(SEGMENTS[..., None] > 0, at)
        return jnp.sum(jnp.where(real, states * at_places(WEIGHTS, at), 0.0)), jnp.where(real, states, 0.0)

    return jax.jit(jax.grad(loss, has_aux=True))(params)


@pytest.mark.parametrize("at", [AT, slice(9, -1), slice(-1, None)], ids=["each_its_own", "answers", "last"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"n_layers": 1},
        {"remat": "full", "n_layers": 3},
        {"window": 4, "windowed": (False, True)},
        {"positions": "learned", "norm": "layer"},
        {"attention_softcap": 5.0, "parallel_residual": True},
        {"qk_norm": "all", "norm_placement": "both"},
        {"lora": LoRAConfig(rank=2)},
    ],
    ids=str,
)
def test_states_at_places_are_those_of_the_whole(change, at):
    model = Model(replace(TINY, **change))
    params = fake_params(model)
    states, places = through(model, params, at, True), at_places(TOKENS, at).shape[1]
    assert_close(states, through(model, params, at, False), atol=2e-5)
    # There is a feed-forward block there alone.
    assert f"f32[{B},{places},{TINY.d_ff}]" in jaxpr(model, params, at)


@pytest.mark.parametrize(
    ("change", "at"),
    [
        ({"moe": MoEConfig(experts=4, per_token=2)}, AT),  # all tokens count in the balance
        ({"n_layers": 16}, slice(4, None)),  # not worth a second program
    ],
    ids=["experts", "deep"],
)
def test_where_it_is_not_worth_it_all_states_are_computed(change, at):
    model = Model(replace(TINY, **change))
    params = fake_params(model)
    assert f" length={model.config.n_layers}" in jaxpr(model, params, at)


def jaxpr(model, params, at) -> str:
    return str(jax.make_jaxpr(lambda p: model.hidden_and_balance(p, TOKENS, SEGMENTS, at=at))(params))
