"""Hugging Face checkpoints: parity with transformers, round trips, and what a broken folder says."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub import constants as hub
from safetensors.numpy import load_file, save_file

from jrlhf.config import MeshConfig, UserError
from jrlhf.data.tokenizer import load_tokenizer
from jrlhf.models.config import ModelConfig
from jrlhf.models.hf import config_from_hf, load_hf, resolve_checkpoint, save_hf
from jrlhf.models.transformer import Model, with_scalar_head
from jrlhf.rollout.rollout import pad_prompts, response_ids, rollout
from jrlhf.rollout.sampling import SamplingConfig, make_sampling
from jrlhf.sharding import make_mesh, state_shardings
from jrlhf.types import Prompts

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
TINY = ModelConfig(vocab_size=16, d_model=8, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=12, context=32)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "llama.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the untied golden checkpoint, to be broken."""
    return Path(shutil.copytree(GOLDEN / "llama_untied", tmp_path / "model"))


def random_params(model: Model, seed: int = 0):
    """Every parameter random, norms and bias included."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return tree.unflatten([jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves])


def assert_same(a, b):
    """Equal trees, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def edit_json(path: Path, **fields):
    """Set fields; a value of `...` removes the field."""
    card = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in card.items() if v is not ...}))


def edit_tensors(path: Path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# --- parity with transformers -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("side", ["", "_left"])
def test_logits_equal_transformers(golden, kind, side):
    model, params = load_hf(GOLDEN / f"llama_{kind}")
    tokens, mask = (jnp.asarray(golden[f"{kind}/{name}{side}"]) for name in ("tokens", "mask"))
    logits = np.asarray(jax.jit(lambda *a: model.logits(params, model.hidden(params, *a)))(tokens, mask))
    np.testing.assert_allclose(logits[mask], golden[f"{kind}/logits{side}"][mask], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_greedy_continuation_equals_transformers(golden, kind):
    model, params = load_hf(GOLDEN / f"llama_{kind}")
    expected = golden[f"{kind}/greedy"]
    prompts = Prompts(golden[f"{kind}/tokens_left"], golden[f"{kind}/mask_left"])
    config = SamplingConfig(max_new_tokens=expected.shape[1], temperature=0.0)
    out = rollout(model, params, prompts, jax.random.key(0), make_sampling(config, (), 0))
    assert response_ids(out) == expected.tolist()


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_prefill_and_decode_equal_one_forward_pass(golden, kind):
    """Over the left-padded prompt and the reference continuation, token by token."""
    model, params = load_hf(GOLDEN / f"llama_{kind}")
    prompt, prompt_mask, new = (golden[f"{kind}/{n}"] for n in ("tokens_left", "mask_left", "greedy"))
    tokens = jnp.concatenate([prompt, new], axis=1)
    mask = jnp.concatenate([prompt_mask, np.ones_like(new, bool)], axis=1)
    whole = jax.jit(model.hidden)(params, tokens, mask)

    (b, p), t = prompt.shape, tokens.shape[1]
    positions = jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)
    sees = jnp.tril(jnp.ones((t, t), bool))[None] & mask[:, None, :]
    decode_params, cache = model.decode_params(params), model.init_cache(b, t)
    decode, parts = jax.jit(model.decode), []
    for start, end in [(0, p), *((i, i + 1) for i in range(p, t))]:
        part, cache = decode(
            decode_params, tokens[:, start:end], positions[:, start:end], sees[:, start:end], cache,
            jnp.int32(start),
        )  # fmt: skip
        parts.append(part)
    np.testing.assert_allclose(
        np.asarray(jnp.concatenate(parts, axis=1))[mask], np.asarray(whole)[mask], rtol=0, atol=2e-5
    )


def test_scores_equal_transformers(golden):
    """A bfloat16 sequence classifier: our score at each row's last token is its output."""
    model, params = load_hf(GOLDEN / "llama_scalar", head="scalar")
    tokens, mask = golden["scalar/tokens"], golden["scalar/mask"]
    scores = np.asarray(jax.jit(model.scores)(params, jnp.asarray(tokens), jnp.asarray(mask)))
    last = scores[np.arange(len(tokens)), mask.sum(axis=1) - 1]
    np.testing.assert_allclose(last, golden["scalar/scores"], rtol=0, atol=2e-5)
    dtypes = {name: {str(x.dtype) for x in jax.tree.leaves(tree)} for name, tree in params.items()}
    assert dtypes.pop("score") == {"float32"}
    assert set.union(*dtypes.values()) == {"bfloat16"}  # as the file has it
    _, params = load_hf(GOLDEN / "llama_scalar", head="scalar", param_dtype="float32")
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"}


# --- config.json --------------------------------------------------------------------------------------------


def test_config_of_a_checkpoint():
    config = config_from_hf(GOLDEN / "llama_untied", dtype="bfloat16", remat="full", logits_chunk=8)
    assert config == ModelConfig(
        vocab_size=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=12, d_ff=48, context=64,
        rope_theta=50_000.0, norm_eps=1e-3, tie_embeddings=False, dtype="bfloat16", remat="full",
        logits_chunk=8,
    )  # fmt: skip


def test_absent_fields_mean_what_transformers_takes(checkpoint):
    edit_json(checkpoint / "config.json", num_key_value_heads=..., head_dim=..., rms_norm_eps=...)
    edit_json(checkpoint / "config.json", rope_parameters=..., tie_word_embeddings=...)
    config = config_from_hf(checkpoint)
    assert (config.n_kv_heads, config.head_size, config.norm_eps) == (4, 8, 1e-6)
    assert (config.rope_theta, config.tie_embeddings) == (10_000.0, False)


def test_rope_theta_of_older_files(checkpoint):
    edit_json(checkpoint / "config.json", rope_parameters=..., rope_theta=500_000, rope_scaling=None)
    assert config_from_hf(checkpoint).rope_theta == 500_000.0
    edit_json(checkpoint / "config.json", rope_scaling={"type": "default"})
    assert config_from_hf(checkpoint).rope_theta == 500_000.0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"model_type": "bert"},
            "model_type 'bert' is not supported. Known: gemma, gemma2, gemma3_text, gpt2",
        ),
        ({"architectures": ["LlamaForTokenClassification"]}, "Known: one of LlamaForCausalLM"),
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported"),
        ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 8.0}},
            "rope_scaling.rope_type 'dynamic' is not supported",
        ),
        (
            {"rope_scaling": {"type": "linear", "factr": 8.0}},
            "rope_scaling.factr is not supported. Did you mean 'factor'",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": "8"}},
            "rope_scaling: factor must be a float, got '8'",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "no field rope_parameters.factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor 0.5"),
        ({"rope_theta": 1e6}, "rope_theta 1000000.0 differs from rope_parameters.rope_theta 50000.0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4}"),
        ({"hidden_size": ...}, "no field 'hidden_size'"),
        ({"hidden_size": "32"}, "hidden_size must be a positive int, got '32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive int, got 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"num_key_value_heads": 3}, "model.n_heads 4 is not a multiple of model.n_kv_heads 3"),
    ],
)
def test_what_we_do_not_compute_is_refused(checkpoint, fields, says):
    edit_json(checkpoint / "config.json", **fields)
    for load in (config_from_hf, load_hf):
        with pytest.raises(UserError) as error:
            load(checkpoint)
        assert str(error.value).startswith(str(checkpoint / "config.json"))
        assert says in str(error.value)


# --- tensors ------------------------------------------------------------------------------------------------


def refused(folder, *says, **kw):
    with pytest.raises(UserError) as error:
        load_hf(folder, **kw)
    for text in says:
        assert text in str(error.value)


def test_missing_and_unknown_tensors_are_named(checkpoint):
    file = checkpoint / "model.safetensors"
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_tensors(file, lambda t: t.pop(name))
    refused(checkpoint, str(checkpoint), f"missing tensors: {name}")
    edit_tensors(file, lambda t: t.update({name: np.zeros((48, 32), np.float32)}))
    load_hf(checkpoint)
    edit_tensors(file, lambda t: t.update({name.replace("weight", "bias"): np.zeros(48, np.float32)}))
    refused(checkpoint, str(file), "unknown tensors: model.layers.1.self_attn.q_proj.bias", "Did you mean")


def test_more_layers_than_the_config_says(checkpoint):
    edit_json(checkpoint / "config.json", num_hidden_layers=1)
    refused(checkpoint, "unknown tensors: model.layers.1.", "1 layers")


def test_a_wrong_shape_names_both(checkpoint):
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(checkpoint / "model.safetensors", lambda t: t.update({name: t[name].T.copy()}))
    refused(checkpoint, str(checkpoint / "model.safetensors"), name, "[48, 32]", "[32, 48]")


def test_rotary_buffers_are_ignored(checkpoint):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(6, np.float32)}
    edit_tensors(checkpoint / "model.safetensors", lambda t: t.update(buffer))
    assert_same(load_hf(checkpoint)[1], load_hf(GOLDEN / "llama_untied")[1])


def test_an_integer_tensor_is_refused(checkpoint):
    name = "model.norm.weight"
    edit_tensors(checkpoint / "model.safetensors", lambda t: t.update({name: np.ones(32, np.int8)}))
    refused(checkpoint, str(checkpoint / "model.safetensors"), name, "I8")


def test_a_tied_head_must_be_the_embedding(checkpoint):
    file = checkpoint / "model.safetensors"
    edit_json(checkpoint / "config.json", tie_word_embeddings=True)
    refused(checkpoint, str(file), "lm_head.weight differs from model.embed_tokens.weight")
    edit_tensors(file, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert "lm_head" not in load_hf(checkpoint)[1]


@pytest.mark.parametrize("keep", [0, 5, 1000, -4])
def test_a_truncated_file(checkpoint, keep):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(checkpoint, f"{file}: not a whole safetensors file")


def test_no_weights(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    refused(checkpoint, "no model.safetensors and no model.safetensors.index.json", "pytorch_model.bin")
    (checkpoint / "config.json").unlink()
    refused(checkpoint, f"{checkpoint / 'config.json'}: no such file")


def test_broken_shards(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "llama_tied", tmp_path / "model"))
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    name, shard = "model.norm.weight", where["model.norm.weight"]
    other = next(file for file in where.values() if file != shard)

    edit_json(index, weight_map={**where, name: other})
    refused(folder, str(index), f"tensor {name} should be in {other}, but it is in {shard}")
    edit_json(index, weight_map={**where, "extra": other})
    refused(folder, str(index), f"tensor extra should be in {other}, but it is in no file")
    edit_json(index, weight_map={**where, name: "../model.safetensors"})
    refused(folder, str(index), "'../model.safetensors' is not the name of a file in the same folder")
    edit_json(index, weight_map=where)

    norm = load_file(folder / shard)[name]
    edit_tensors(folder / other, lambda t: t.update({name: norm}))
    refused(folder, f"tensor {name} is in two files", shard, other)
    (folder / other).unlink()
    refused(folder, f"{folder / other}: no such file, but model.safetensors.index.json lists it")
    shutil.copy(GOLDEN / "llama_untied" / "model.safetensors", folder)
    refused(folder, str(folder), "both model.safetensors and model.safetensors.index.json")


def test_heads_are_not_mixed_up(tmp_path):
    refused(GOLDEN / "llama_untied", "LlamaForCausalLM", "with_scalar_head", head="scalar")
    refused(GOLDEN / "llama_scalar", "LlamaForSequenceClassification", "head='scalar'")
    refused(GOLDEN / "llama_scalar", "'scaler' is unknown. Did you mean 'scalar'?", head="scaler")
    folder = Path(shutil.copytree(GOLDEN / "llama_scalar", tmp_path / "model"))
    edit_json(folder / "config.json", id2label={"0": "a", "1": "b", "2": "c"})
    refused(folder, "num_labels is 3", head="scalar")
    edit_json(folder / "config.json", id2label=...)
    refused(folder, "num_labels is 2", head="scalar")  # transformers' default


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_sixteen_bit_files_become_float32(checkpoint, dtype):
    def cast(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(dtype)

    params = load_hf(checkpoint)[1]
    edit_tensors(checkpoint / "model.safetensors", cast)
    rounded = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(dtype).astype(np.float32)), params)
    assert_same(load_hf(checkpoint, param_dtype="float32")[1], rounded)


def test_each_device_is_given_its_own_part(tmp_path):
    config = ModelConfig(vocab_size=16, d_model=8, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=12)
    model = Model(ModelConfig(**{**vars(config), "tie_embeddings": False}))
    params = random_params(model)
    save_hf(tmp_path / "model", model, params)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = state_shardings(mesh, jax.eval_shape(model.init, jax.random.key(0)), model.logical_axes())
    loaded = load_hf(tmp_path / "model", shardings=shardings)[1]
    assert_same(loaded, params)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings
    assert loaded["layers"]["attn"]["o"].addressable_shards[0].data.shape == (2, 2, 2, 4)  # of (2, 4, 2, 8)


# --- saving -------------------------------------------------------------------------------------------------

MODELS = {
    "tied": Model(TINY),
    "untied": Model(ModelConfig(**{**vars(TINY), "tie_embeddings": False, "rope_theta": 3e5})),
    "wide heads": Model(ModelConfig(**{**vars(TINY), "head_dim": 6, "norm_eps": 1e-3})),
    "one key-value head": Model(ModelConfig(**{**vars(TINY), "n_kv_heads": 1, "n_layers": 1})),
    "scalar": Model(TINY, "scalar"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 1500])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, name, max_shard_bytes):
    model = MODELS[name]
    params = random_params(model)
    save_hf(tmp_path / "a", model, params, max_shard_bytes=max_shard_bytes)
    again, loaded = load_hf(tmp_path / "a", head=model.head)
    assert again == model
    assert_same(loaded, params)

    shards = sorted(p.name for p in (tmp_path / "a").glob("*.safetensors"))
    if max_shard_bytes == 1500:
        assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
        assert len(shards) > 1
        for shard in shards:
            tensors = load_file(tmp_path / "a" / shard)
            assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= max_shard_bytes
        index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * sum(x.size for x in jax.tree.leaves(params))
    else:
        assert shards == ["model.safetensors"]


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_a_loaded_checkpoint_is_saved_as_it_was(tmp_path, kind):
    """Tensor by tensor against what transformers wrote: the same names, shapes and bits."""

    def tensors(folder):
        return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}

    model, params = load_hf(GOLDEN / f"llama_{kind}")
    save_hf(tmp_path / "model", model, params)
    ours, theirs = tensors(tmp_path / "model"), tensors(GOLDEN / f"llama_{kind}")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, strict=True)


def test_bfloat16_files_are_rounded_once(tmp_path):
    model = MODELS["untied"]
    params = random_params(model)
    save_hf(tmp_path / "a", model, params, dtype="bfloat16")
    loaded = load_hf(tmp_path / "a", param_dtype="float32")[1]
    assert_same(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params))
    half = load_hf(tmp_path / "a")[1]
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    assert_same(jax.tree.map(lambda x: x.astype(jnp.float32), half), loaded)
    save_hf(tmp_path / "b", model, loaded, dtype="bfloat16")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "a/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_zero_bias_is_left_out(tmp_path):
    """transformers' classifiers have no bias, so a fresh scalar head is saved as exactly theirs."""
    lm = random_params(MODELS["tied"])
    params = with_scalar_head(lm, jax.random.key(1))
    save_hf(tmp_path / "model", MODELS["scalar"], params)
    assert "score.bias" not in load_file(tmp_path / "model" / "model.safetensors")
    assert_same(load_hf(tmp_path / "model", head="scalar")[1], params)


def test_tokenizer_files_and_special_ids(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "notes.txt").write_text("not a tokenizer file")
    (source / "config.json").write_text('{"eos_token_id": 2, "bos_token_id": 1}')
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 2], "top_p": 0.9}')
    save = lambda name, **kw: save_hf(tmp_path / name, MODELS["tied"], random_params(MODELS["tied"]), **kw)  # noqa: E731
    read = lambda name, file: json.loads((tmp_path / name / file).read_text())  # noqa: E731
    ids = lambda name: {k: v for k, v in read(name, "config.json").items() if k.endswith("_token_id")}  # noqa: E731

    save("inherited", tokenizer_folder=source)
    assert {p.name for p in (tmp_path / "inherited").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja",
    }  # fmt: skip
    assert read("inherited", "generation_config.json") == {"eos_token_id": [5, 2], "top_p": 0.9}
    assert ids("inherited") == {"bos_token_id": 1, "eos_token_id": [5, 2], "pad_token_id": None}

    save("asked", tokenizer_folder=source, eos_ids=(7,), pad_id=0)
    assert read("asked", "generation_config.json") == {"eos_token_id": 7, "top_p": 0.9, "pad_token_id": 0}
    assert ids("asked") == {"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0}

    save("bare")
    assert not (tmp_path / "bare" / "generation_config.json").exists()
    assert ids("bare") == {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    with pytest.raises(UserError, match=r"no tokenizer\.json or tokenizer\.model to copy"):
        save("wrong", tokenizer_folder=tmp_path)


def test_saving_replaces_only_a_checkpoint_and_only_when_asked(tmp_path):
    model, folder = MODELS["tied"], tmp_path / "out" / "model"
    first, second = random_params(model, 1), random_params(model, 2)
    save_hf(folder, model, first, max_shard_bytes=1500)
    with pytest.raises(UserError, match="there is a checkpoint already"):
        save_hf(folder, model, second)
    assert_same(load_hf(folder)[1], first)
    save_hf(folder, model, second, overwrite=True)
    assert_same(load_hf(folder)[1], second)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]  # nothing temporary is left
    (folder / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"thesis\.tex, which is no part of a checkpoint"):
        save_hf(folder, model, second, overwrite=True)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_hf(tmp_path / "model", MODELS["tied"], random_params(MODELS["tied"]))
    assert list(tmp_path.iterdir()) == []


def test_only_the_models_own_parameters_are_saved(tmp_path):
    params = random_params(MODELS["tied"])
    with pytest.raises(ValueError, match="lm_head/kernel is missing"):
        save_hf(tmp_path / "model", MODELS["untied"], params)
    with pytest.raises(ValueError, match="score/bias is no parameter of the model"):
        save_hf(tmp_path / "model", MODELS["tied"], with_scalar_head(params, jax.random.key(0)))
    with pytest.raises(
        ValueError, match=r"layers/attn/k has shape \(2, 8, 2, 2\), the model's is \(2, 8, 4, 2\)"
    ):
        save_hf(tmp_path / "model", Model(ModelConfig(**{**vars(TINY), "n_kv_heads": 4})), params)
    with pytest.raises(UserError, match="'float16' is unknown"):
        save_hf(tmp_path / "model", MODELS["tied"], params, dtype="float16")
    assert list(tmp_path.iterdir()) == []


# --- where a checkpoint is ----------------------------------------------------------------------------------


def test_a_local_folder_is_itself(tmp_path):
    (tmp_path / "llama-1b").mkdir()
    assert resolve_checkpoint(tmp_path / "llama-1b") == tmp_path / "llama-1b"
    with pytest.raises(UserError, match=r"no such checkpoint folder\. Did you mean 'llama-1b'"):
        resolve_checkpoint(tmp_path / "lama-1b")
    with pytest.raises(UserError, match="There is no folder"):
        resolve_checkpoint(tmp_path / "nowhere" / "llama-1b")
    with pytest.raises(UserError, match=r"no such checkpoint folder\. Did you mean 'llama-1b'"):
        load_hf(tmp_path / "llama-1")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="this is a file"):
        resolve_checkpoint(tmp_path / "file")


def test_a_hub_name_without_a_network(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"some-org/some-model: no such folder.*hub cannot be reached"):
        resolve_checkpoint("some-org/some-model")
    with pytest.raises(UserError, match=r"some-org/some--model: no such folder.*hub could not give it"):
        resolve_checkpoint("some-org/some--model")  # the hub's own rule for names


def test_a_hub_name_in_the_cache(monkeypatch, tmp_path):
    """Laid out as the hub's client leaves it: found without a network."""
    repo, commit = tmp_path / "models--some-org--some-model", "0" * 40
    shutil.copytree(GOLDEN / "llama_untied", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    assert config_from_hf(resolve_checkpoint("some-org/some-model")).vocab_size == 61


# --- a real checkpoint --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(shared_data):
    folder = shared_data / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no checkpoint at {folder}")
    return folder, *load_hf(folder), load_tokenizer(folder)


def test_stories260k_loss(stories, shared_data):
    """The first 20 stories, each after BOS: 6,425 input positions, which predict 6,405 tokens."""
    _, model, params, tokenizer = stories
    text = (shared_data / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    rows = [[1, *tokenizer.encode(s.strip())] for s in text.split("<|endoftext|>")[:20]]
    assert sum(map(len, rows)) == 6425
    longest = max(map(len, rows))
    tokens = np.array([row + [0] * (longest - len(row)) for row in rows], np.int32)
    mask = np.arange(longest)[None] < np.array([[len(row)] for row in rows])
    logprobs, _ = jax.jit(model.logprobs)(params, tokens, mask)
    assert -np.asarray(logprobs)[mask[:, 1:]].mean() == pytest.approx(1.273, abs=0.002)


def test_stories260k_writes_a_story(stories):
    _, model, params, tokenizer = stories
    prompts = pad_prompts([[1, *tokenizer.encode("Once upon a time")]], 8, tokenizer.pad_id)
    sampling = make_sampling(SamplingConfig(max_new_tokens=16, temperature=0.0), tokenizer.eos_ids, 0)
    ids = response_ids(rollout(model, params, prompts, jax.random.key(0), sampling))[0]
    assert tokenizer.decode(ids).startswith(", there was a little girl named")


def test_stories260k_round_trip(stories, tmp_path):
    folder, model, params, tokenizer = stories
    save_hf(tmp_path / "copy", model, params, folder)
    again, loaded = load_hf(tmp_path / "copy")
    assert again == model
    assert_same(loaded, params)
    copied = load_tokenizer(tmp_path / "copy")
    assert (copied.fingerprint(), copied.eos_ids) == (tokenizer.fingerprint(), tokenizer.eos_ids)
