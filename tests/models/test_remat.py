"""What a layer keeps for its backward pass: the same gradient, by less memory."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY, assert_close, fake_params

from jrlhf.models.transformer import REMAT, Model

LENGTH = 64
CONFIG = replace(TINY, n_layers=4, context=LENGTH, logits_chunk=8)
TOKENS = np.random.default_rng(0).integers(1, 32, (4, LENGTH)).astype(np.int32)
MASK = np.arange(LENGTH) < np.array([[64], [50], [7], [33]])


@pytest.fixture(scope="module")
def compiled():
    """Of each policy: loss and gradient, the bytes that the step needs, and its jaxpr."""
    found = {}
    for name in ("none", *REMAT):
        model = Model(replace(CONFIG, remat=name))

        def loss(params, model=model):
            logprobs, _ = model.logprobs(params, TOKENS, MASK)
            return -jnp.sum(jnp.where(MASK[:, 1:], logprobs, 0.0)) / 100

        params, step = fake_params(model), jax.value_and_grad(loss)
        program = jax.jit(step).lower(params).compile()
        bytes = program.memory_analysis().temp_size_in_bytes
        found[name] = jax.device_get(program(params)), bytes, str(jax.make_jaxpr(step)(params))
    return found


@pytest.mark.parametrize("name", REMAT)
def test_every_policy_has_the_same_gradient(compiled, name):
    assert_close(compiled[name][0], compiled["none"][0], atol=1e-6)


def test_what_is_kept_takes_its_memory(compiled):
    memory = {name: bytes for name, (_, bytes, _) in compiled.items()}
    assert memory["full"] < memory["attention"] < memory["attention_mlp"] < memory["none"]
    assert memory["full"] < memory["mlp"] < memory["attention_mlp"]


def test_offloaded_activations_go_to_the_host_and_back(compiled):
    """A CPU has such a memory too, which is the same: only the program tells."""
    for name, (_, _, jaxpr) in compiled.items():
        assert ("<host>" in jaxpr) == name.startswith("offload"), name
