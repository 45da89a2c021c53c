"""What the families do beyond Llama, held against plain computations, other meshes and other layouts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MESHES, assert_close, fake_params

from jrlhf.config import UserError
from jrlhf.models.config import LoRAConfig, ModelConfig, MoEConfig, RopeScaling
from jrlhf.models.hf import load_hf, save_hf
from jrlhf.models.transformer import Model
from jrlhf.models.vocabulary import grow_vocabulary
from jrlhf.rollout.rollout import rollout
from jrlhf.rollout.sampling import SamplingConfig, make_sampling
from jrlhf.sharding import make_mesh, state_shardings
from jrlhf.types import Prompts

SMALL = ModelConfig(vocab_size=20, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, context=32)
GEMMA = replace(
    SMALL, window=3, windowed=(True, False), window_rope_theta=100.0, norm_plus_one=True, norm_placement="both",
    qk_norm="head", activation="gelu_tanh", scale_embedding=True, query_scalar=7.0, attention_softcap=2.0,
    logits_softcap=3.0, rope_scaling=RopeScaling("linear", 4.0), vocab_multiple=8,
)  # fmt: skip
GPT = replace(
    SMALL, n_kv_heads=4, positions="learned", norm="layer", qkv_bias=True, o_bias=True, mlp_bias=True, gated_mlp=False,
    activation="gelu", parallel_residual=True,
)  # fmt: skip
OLMO = replace(SMALL, norm_placement="post", qk_norm="all", rotary_dim=2, window=4)
MIXTURE = replace(SMALL, moe=MoEConfig(experts=4, per_token=2), tie_embeddings=False)
ADAPTED = replace(SMALL, lora=LoRAConfig(rank=2, alpha=2.0))
CONFIGS = {"gemma": GEMMA, "gpt": GPT, "olmo": OLMO, "mixture": MIXTURE, "adapted": ADAPTED}
TOKENS = np.random.default_rng(0).integers(0, 20, (4, 12)).astype(np.int32)
SEGMENTS = np.array([[1] * 12, [1] * 9 + [0] * 3, [0] * 4 + [1] * 8, [1] * 5 + [2] * 7], np.int32)
POSITIONS = np.maximum(np.array([list(range(12))] * 3 + [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]]), 0).astype(
    np.int32
)
POSITIONS[2] = np.maximum(np.arange(12) - 4, 0)


def loss(model):
    """A scalar of everything that a train step differentiates: log-probabilities and the balance of experts."""

    def f(params, tokens, segments, positions):
        hidden, balance = model.hidden_and_balance(params, tokens, segments, positions)
        logprobs, entropy = model.logprobs_of_hidden(params, hidden[:, :-1], tokens[:, 1:], 0.7)
        real = (segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])
        return (
            jnp.sum(jnp.where(real, logprobs + 0.1 * entropy, 0.0)) / jnp.sum(real, dtype=jnp.float32)
            + balance
        )

    return f


@pytest.mark.parametrize("name", CONFIGS)
def test_eight_devices_compute_what_one_does(name):
    """Loss and gradients, with experts and heads split over the tensor axis, and weights over fsdp."""
    model = Model(CONFIGS[name])
    params = fake_params(model)
    expected = jax.jit(jax.value_and_grad(loss(model)))(params, TOKENS, SEGMENTS, POSITIONS)
    devices = make_mesh(MESHES["all"])
    with jax.set_mesh(devices):
        shardings = state_shardings(devices, jax.eval_shape(lambda: params), model.logical_axes())
        split = jax.device_put(params, shardings)
        found = jax.jit(jax.value_and_grad(loss(model)))(split, TOKENS, SEGMENTS, POSITIONS)
    assert_close(found, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_decode_are_one_forward_pass(name):
    model = Model(CONFIGS[name])
    params = fake_params(model)
    mask = SEGMENTS[:3] > 0
    mask[1] = np.roll(mask[1], 3)  # left-padded prompts, as rollouts have them
    tokens = TOKENS[:3].copy()
    tokens[1] = np.roll(tokens[1], 3)
    expected = jax.jit(lambda p: model.hidden(p, tokens, mask))(params)

    @jax.jit
    def by_steps(params):
        decode_params, cache = model.decode_params(params), model.init_cache(3, 12)
        out = []
        for start, stop in ((0, 8), *((t, t + 1) for t in range(8, 12))):
            causal = np.arange(12)[None] <= np.arange(start, stop)[:, None]
            positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, start:stop]
            hidden, cache = model.decode(
                decode_params, tokens[:, start:stop], jnp.asarray(positions), jnp.asarray(causal[None] & mask[:, None]),
                cache, jnp.int32(start),
            )  # fmt: skip
            out.append(hidden)
        return jnp.concatenate(out, axis=1)

    assert_close(np.asarray(by_steps(params))[mask], np.asarray(expected)[mask])


def test_a_windowed_layer_sees_its_window_and_no_more():
    """By gradient, with one layer: token 8 sees tokens 5 to 8 of a window of 4."""
    model = Model(replace(SMALL, n_layers=1, window=4))
    params = fake_params(model)
    tokens, ones = TOKENS[:1], np.ones((1, 12), np.int32)

    def of_embedding(table):
        whole = params | {"embed": {"embedding": table}}
        ids = jnp.arange(12, dtype=jnp.int32)[None]  # every position its own row
        return jnp.sum(model.hidden(whole, ids, ones)[0, 8])

    table = params["embed"]["embedding"][np.r_[tokens[0], np.zeros(8, int)]]
    seen = np.abs(np.asarray(jax.jit(jax.grad(of_embedding))(table))).sum(axis=1) > 1e-6
    assert np.flatnonzero(seen).tolist() == [5, 6, 7, 8]


def test_experts_are_the_weighted_sum_of_those_chosen():
    """Against a plain loop over tokens; padding has no part in the balance."""
    model = Model(MIXTURE)
    params = fake_params(model)
    _, balance = jax.jit(model.hidden_and_balance)(params, TOKENS, SEGMENTS, POSITIONS)
    shorter = model.hidden_and_balance(params, TOKENS[:1, :6], SEGMENTS[:1, :6], POSITIONS[:1, :6])[1]
    padded = model.hidden_and_balance(params, TOKENS[:1], np.r_[[1] * 6, [0] * 6][None], POSITIONS[:1])[1]
    np.testing.assert_allclose(shorter, padded, rtol=1e-6)
    assert 1.9 < float(balance) < 4.0  # per_token where all are used alike, experts where one is

    from jrlhf.models.experts import combine_experts

    rng = np.random.default_rng(1)
    x, gate, up = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 4), (3, 4, 5), (3, 4, 5)))
    down = rng.normal(size=(3, 5, 4)).astype(np.float32)
    weights, chosen = (
        rng.random((2, 3, 2)).astype(np.float32),
        np.array([[[0, 1], [2, 1], [1, 0]], [[1, 2]] * 3]),
    )
    silu = lambda z: z / (1 + np.exp(-z))  # noqa: E731
    expected = np.zeros_like(x)
    for b, t, k in np.ndindex(2, 3, 2):
        e, token = chosen[b, t, k], x[b, t]
        expected[b, t] += weights[b, t, k] * ((silu(token @ gate[e]) * (token @ up[e])) @ down[e])
    found = combine_experts(x, weights, jnp.asarray(chosen, jnp.int32), gate, up, down, jax.nn.silu)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_pad_the_vocabulary_are_no_tokens(tied, tmp_path):
    plain = Model(replace(SMALL, vocab_size=19, tie_embeddings=tied))
    padded = Model(replace(plain.config, vocab_multiple=8))
    save_hf(tmp_path / "saved", plain, fake_params(plain))
    model, params = load_hf(tmp_path / "saved", vocab_multiple=8)
    assert params["embed"]["embedding"].shape == (24, 16)
    assert not np.any(params["embed"]["embedding"][19:])
    assert model.config == padded.config
    params = jax.tree.map(lambda x: x + 0.0, params)
    params["embed"]["embedding"] = params["embed"]["embedding"].at[19:].set(9.0)  # whatever is there
    if not tied:
        params["lm_head"]["kernel"] = params["lm_head"]["kernel"].at[:, 19:].set(9.0)
    tokens = TOKENS % 19
    for chunk in (0, 5):
        f = lambda model: Model(replace(model.config, logits_chunk=chunk)).logprobs  # noqa: B023, E731
        assert_close(f(model)(params, tokens, SEGMENTS), f(plain)(fake_params(plain), tokens, SEGMENTS))
    prompts = Prompts(jnp.asarray(tokens[:, :4]), jnp.ones((4, 4), bool))
    out = rollout(
        model, params, prompts, jax.random.key(0), make_sampling(SamplingConfig(max_new_tokens=16), (), 0)
    )
    assert int(out.tokens.max()) < 19
    save_hf(tmp_path / "again", model, params)
    names = ["model.safetensors", "config.json"]
    assert [(tmp_path / "again" / n).read_bytes() for n in names] == [
        (tmp_path / "saved" / n).read_bytes() for n in names
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_are_the_mean_of_the_old(tied):
    config = replace(SMALL, tie_embeddings=tied, vocab_multiple=8)
    params = fake_params(Model(config))
    new, grown = grow_vocabulary(config, params, 23)
    assert (new.vocab_size, grown["embed"]["embedding"].shape) == (23, (24, 16))
    old = np.asarray(params["embed"]["embedding"])[:20]
    np.testing.assert_array_equal(grown["embed"]["embedding"][:20], old)
    np.testing.assert_allclose(grown["embed"]["embedding"][20:23], np.tile(old.mean(0), (3, 1)), rtol=1e-5)
    before = Model(config).logits(params, Model(config).hidden(params, TOKENS, SEGMENTS))
    after = Model(new).logits(grown, Model(new).hidden(grown, TOKENS, SEGMENTS))
    np.testing.assert_array_equal(after[..., :20], before[..., :20])
    assert np.all(np.isneginf(after[..., 23:]))
    with pytest.raises(UserError, match="cannot be cut to the tokenizer's 19"):
        grow_vocabulary(config, params, 19)
