"""Arithmetic of FLOPs, against the products in the programs themselves."""

from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp
import pytest

from jrlhf.models.config import LoRAConfig, ModelConfig, MoEConfig
from jrlhf.models.flops import backward_flops, forward_flops, recomputed_flops, rows_passed, train_flops
from jrlhf.models.lora import split
from jrlhf.models.transformer import Model

DENSE = ModelConfig(
    vocab_size=50, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=24, context=32, remat="none"
)
PLAIN = replace(DENSE, gated_mlp=False, head_dim=6)
EXPERTS = replace(DENSE, moe=MoEConfig(experts=4, per_token=2))
ROWS, LENGTH = 2, 8


def products(jaxpr) -> tuple[float, float]:
    """FLOPs of a program's matrix products: (those with weights, those of attention, which go row by row)."""
    weights = attention = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), (batch, _) = eqn.params["dimension_numbers"]
            flops = (
                2.0 * prod(eqn.outvars[0].aval.shape) * prod(eqn.invars[0].aval.shape[i] for i in contract)
            )
            weights, attention = weights + flops * (not batch), attention + flops * bool(batch)
            continue
        if eqn.primitive.name.startswith("ragged_dot"):
            # Rows are sorted by expert: each meets the weights of one.
            (rows, inputs), last = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            weights += 2.0 * rows * inputs * last[-1] if len(last) == 2 else 2.0 * rows * prod(last[1:])
            continue
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(
            [v for v in eqn.params.values()], is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                w, a = products(getattr(inner, "jaxpr", inner))
                weights, attention = weights + times * w, attention + times * a
    return weights, attention


def traced(config: ModelConfig, learn: bool) -> tuple[float, float]:
    """Of a model's forward pass over ROWS of LENGTH tokens, each of which predicts one; or of the gradient too."""
    model = Model(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jnp.ones((ROWS, LENGTH), jnp.int32)

    def loss(trained, frozen):
        whole = model.whole(trained, frozen)
        return jnp.sum(model.logits(whole, model.hidden(whole, tokens, tokens)))

    base, adapter = split(params)
    args = (adapter, base) if config.lora.rank else (params, None)
    return products(jax.make_jaxpr(jax.grad(loss) if learn else loss)(*args).jaxpr)


def arithmetic(config: ModelConfig, flops) -> tuple[float, float]:
    """The same parts by arithmetic. XLA's attention computes what the mask hides: every token has LENGTH keys."""
    passed = rows_passed(config, ROWS * LENGTH, LENGTH)
    without = flops(config, passed._replace(keys=0.0))
    return without, flops(config, passed._replace(keys=float(ROWS * LENGTH * LENGTH))) - without


def gradient(config, passed) -> float:
    again = recomputed_flops(config, passed)
    return forward_flops(config, passed) + backward_flops(config, passed) + again


@pytest.mark.parametrize("config", [DENSE, PLAIN, EXPERTS], ids=["dense", "plain", "experts"])
def test_a_forward_pass_does_the_products_that_are_counted(config):
    assert traced(config, learn=False) == arithmetic(config, forward_flops)


@pytest.mark.parametrize("remat", ["none", "full", "dots", "attention", "mlp", "attention_mlp"])
@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_a_gradient_does_the_products_that_are_counted(config, remat):
    if config.moe.experts and "mlp" in remat:
        pytest.skip("experts keep no activations")
    config = replace(config, remat=remat)
    weights, attention = traced(config, learn=True)
    expected = arithmetic(config, gradient)
    assert weights == expected[0]
    # Where q, k and v are kept the scores are computed again, half of a pass, which nobody counts.
    scores = 0.5 * arithmetic(config, forward_flops)[1]
    assert attention == expected[1] + (scores if remat in ("attention", "attention_mlp") else 0.0)


def test_adapters_need_no_gradient_of_frozen_weights():
    config = replace(DENSE, lora=LoRAConfig(rank=2, targets=("q", "down")))
    weights, attention = traced(config, learn=True)
    expected = arithmetic(config, gradient)
    assert attention == expected[1]
    # The first layer's input needs no gradient, and nothing before its first adapter does.
    d, h, k = config.d_model, config.n_heads * config.head_size, config.n_kv_heads * config.head_size
    assert 0 <= expected[0] - weights <= 2 * ROWS * LENGTH * d * (h + 2 * k)


def test_training_is_six_times_the_weights_and_attention_of_half_a_row():
    n = DENSE.n_params  # the embedding is the head, and meets each token once
    norms = DENSE.d_model * (2 * DENSE.n_layers + 1)
    keys = (LENGTH + 1) / 2
    attention = 12 * DENSE.n_layers * DENSE.n_heads * DENSE.head_size * keys
    assert train_flops(DENSE, 100, LENGTH) == 100 * (6 * (n - norms) + attention)


def test_a_window_bounds_what_a_token_sees():
    windowed = replace(DENSE, window=3, windowed=(True, False, True))
    seen = [min(t, 3) for t in range(1, LENGTH + 1)]
    full = list(range(1, LENGTH + 1))
    expected = (2 * sum(seen) + sum(full)) / 3 / LENGTH
    assert rows_passed(windowed, 1.0, LENGTH).keys == pytest.approx(expected)
