"""Adapters: what peft computes and writes, and that base, adapter and merged weights are one model."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jrlhf.config import UserError
from jrlhf.models.config import LoRAConfig, ModelConfig, MoEConfig
from jrlhf.models.hf import load_hf
from jrlhf.models.lora import join, merged, split
from jrlhf.models.peft import PEFT_CONFIG, PEFT_WEIGHTS, load_peft, save_peft
from jrlhf.models.transformer import Model, with_scalar_head

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "hf"
SMALL = ModelConfig(vocab_size=19, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, context=16)
LORA = LoRAConfig(rank=3, alpha=5.0, targets=("q", "o", "down"))


def logits(model, params, tokens, lengths):
    mask = jnp.arange(tokens.shape[1])[None] < jnp.asarray(lengths)[:, None]
    out = jax.jit(lambda p: model.logits(p, model.hidden(p, jnp.asarray(tokens), mask)))(params)
    return np.asarray(out)[np.asarray(mask)]


def random_adapter(model, params):
    """One that changes something: B is not zero."""
    adapter = model.fresh_adapter(jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), 100))
    return join(params, jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), adapter))


@pytest.mark.parametrize("case", ["lora_r4", "lora_rslora"])
def test_peft_adapters_compute_what_peft_computes(case, tmp_path):
    base, params = load_hf(GOLDEN / "llama", param_dtype="float32")
    golden = np.load(GOLDEN / case / "golden.npz")
    model, adapter = load_peft(GOLDEN / case, base)
    tokens, lengths = golden["tokens"], golden["lengths"]
    whole = join(params, adapter)
    np.testing.assert_allclose(logits(model, whole, tokens, lengths), golden["logits"], rtol=0, atol=2e-4)
    folded = merged(model.config, whole)
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    np.testing.assert_allclose(
        logits(base, folded, tokens, lengths), golden["merged_logits"], rtol=0, atol=2e-4
    )

    save_peft(tmp_path / "adapter", model, adapter, "the base")
    ours, theirs = (load_file(f / PEFT_WEIGHTS) for f in (tmp_path / "adapter", GOLDEN / case))
    assert set(ours) == set(theirs)
    for name, x in ours.items():
        np.testing.assert_array_equal(x, theirs[name].astype(np.float32))
    ours, theirs = (json.loads((f / PEFT_CONFIG).read_text()) for f in (tmp_path / "adapter", GOLDEN / case))
    assert sorted(ours.pop("target_modules")) == sorted(theirs["target_modules"])
    assert ours.pop("base_model_name_or_path") == "the base"
    assert {k: theirs[k] for k in ours} == ours


def test_what_our_adapters_are_not_is_refused(tmp_path):
    base, _ = load_hf(GOLDEN / "llama")
    with pytest.raises(UserError, match=r"adapter_config.json: use_dora True is not supported"):
        load_peft(GOLDEN / "lora_dora", base)
    card = json.loads((GOLDEN / "lora_r4" / PEFT_CONFIG).read_text())
    tensors = load_file(GOLDEN / "lora_r4" / PEFT_WEIGHTS)

    def adapter(changes: dict, without: str = "", **tensor):
        (tmp_path / PEFT_CONFIG).write_text(json.dumps(card | changes))
        save_file({k: v for k, v in tensors.items() if k != without} | tensor, tmp_path / PEFT_WEIGHTS)
        return tmp_path

    first = sorted(tensors)[0]
    for folder, says in (
        (lambda: adapter({"target_modules": ["q_prj"]}), "'q_prj' is unknown. Did you mean 'q_proj'"),
        (lambda: adapter({"rank_pattern": {"q_proj": 8}}), "rank_pattern"),
        (lambda: adapter({"bias": "all"}), "bias 'all' is not supported"),
        (lambda: adapter({"r": None}), "adapter_config.json: no field 'r'"),
        (lambda: adapter({"layers_to_transform": [0]}), "layers_to_transform [0] is not supported"),
        (lambda: adapter({}, without=first), f"missing tensor {first}"),
        (lambda: adapter({}, stray=np.zeros(2, np.float32)), "unknown tensor stray"),
        (lambda: adapter({}, **{first: np.zeros((4, 7), np.float32)}), f"tensor {first} has shape [4, 7]"),
    ):
        with pytest.raises(UserError) as error:
            load_peft(folder(), base)
        assert says in str(error.value)


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_a_fresh_adapter_changes_nothing_and_a_merged_one_nothing_more(head):
    base = Model(SMALL, head)
    params = Model(SMALL).init(jax.random.key(0))
    if head == "scalar":
        params = with_scalar_head(params, jax.random.key(3))
    model = Model(replace(SMALL, lora=LORA), head)
    tokens, ones = jnp.arange(12).reshape(2, 6), jnp.ones((2, 6), bool)
    f = lambda model, params: np.asarray(model.hidden(params, tokens, ones))  # noqa: E731
    plain, _ = split(params)
    fresh = join(params, model.fresh_adapter(jax.random.key(1)))
    np.testing.assert_array_equal(f(model, fresh), f(base, params))
    assert jax.tree.structure(fresh) == jax.tree.structure(model.init(jax.random.key(0)))
    changed = random_adapter(model, params)
    assert np.abs(f(model, changed) - f(base, params)).max() > 0.1
    np.testing.assert_allclose(f(model, changed), f(base, merged(model.config, changed)), atol=2e-5)
    again, adapter = split(changed)
    jax.tree.map(np.testing.assert_array_equal, join(again, adapter), changed)
    assert jax.tree.structure(again) == jax.tree.structure(plain)
    assert set(adapter) == ({"layers", "score"} if head == "scalar" else {"layers"})


def test_decoding_uses_the_adapter():
    model = Model(replace(SMALL, lora=LORA))
    params = random_adapter(model, model.init(jax.random.key(0)))
    tokens = jnp.arange(8).reshape(2, 4)
    positions, ones = jnp.broadcast_to(jnp.arange(4), (2, 4)), jnp.ones((2, 4), bool)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((4, 4), bool)), (2, 4, 4))
    decoded, _ = model.decode(
        model.decode_params(params), tokens, positions, mask, model.init_cache(2, 4), jnp.int32(0)
    )
    np.testing.assert_allclose(decoded, model.hidden(params, tokens, ones), atol=1e-5)


def test_layers_that_a_model_does_not_have():
    with pytest.raises(
        UserError,
        match="'gate' is no linear layer of this model; there are attn/q, attn/k, attn/v, attn/o, mlp/up, mlp/down",
    ):
        replace(SMALL, gated_mlp=False, lora=LoRAConfig(rank=2, targets=("gate",)))
    with pytest.raises(UserError, match="'up' is no linear layer of this model"):
        replace(SMALL, moe=MoEConfig(experts=2), lora=LoRAConfig(rank=2, targets=("q", "up")))
    chosen = lambda *patterns: replace(SMALL, lora=LoRAConfig(rank=2, targets=patterns)).adapted_layers  # noqa: E731
    assert chosen("attn/*") == ("attn/q", "attn/k", "attn/v", "attn/o")
    assert chosen("q", "mlp/[gu]*") == ("attn/q", "mlp/gate", "mlp/up")
    assert chosen() == SMALL.linear_layers
    with pytest.raises(ValueError, match="adapters need a frozen base"):
        Model(replace(SMALL, lora=LORA)).whole({}, None)
    phi = Model(replace(SMALL, hf_family="phi3", lora=LORA))
    with pytest.raises(UserError, match="'q' shares a tensor with others in phi3"):
        save_peft("nowhere", phi, phi.fresh_adapter(jax.random.key(0)), "")
