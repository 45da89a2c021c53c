"""Makes tiny checkpoints of many model families, and what transformers computes with them.

    python tests/golden/make_hf_families.py                           the committed set, beside this file in hf/
    python tests/golden/make_hf_families.py --out FOLDER --all        every case, the further variants too
    python tests/golden/make_hf_families.py --out FOLDER --case NAME...
    python tests/golden/make_hf_families.py --verify FOLDER [--out GOLDEN]
        loads FOLDER/<case>, which `save_hf` wrote, with transformers, and holds it against GOLDEN/<case>

Needs torch, transformers and (for the lora_* cases) peft, which the tests do not. Each case is a folder:

    config.json, model.safetensors   as transformers' `save_pretrained` writes them, bfloat16
    older_config.json                the same model as files of transformers 4 describe it
    golden.npz                       tokens [B, T] right-padded, lengths [B]; logits [sum(lengths), V] float32 of
                                     the real tokens, row after row; greedy [B, N], the continuation of each row
                                     alone; aux_loss [] of a mixture of experts (right-padded rows, padding left
                                     out). A classifier has token_scores [sum(lengths)] and scores [B] instead.
    lora_*: adapter_config.json, adapter_model.safetensors as peft writes them, over the checkpoint `llama`;
                                     golden.npz with logits under the adapter and merged_logits

`defaults.json` has, of each family, config.json with every field at transformers' default. `versions.json` names the
versions and each case's seed. All numbers are float32 arithmetic, with eager attention,
on the weights as they lie in the file. Every parameter is random, norms and biases included.

What a case proves is checked here, before it is written: every tensor changes the result, and so does each
config field that the case is about; left padding gives what right padding gives; no greedy token and no choice
of experts hangs on rounding.
"""

import argparse
import copy
import importlib.metadata
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent / "hf"
LENGTHS = (24, 13, 1)  # of the batch's rows; the longest is three windows long
NEW_TOKENS = 12
VOCAB = 96
GREEDY_MARGIN = 5e-3  # least distance of the best logit from the second best along a greedy continuation
ROUTER_MARGIN = 1e-3  # least distance in probability of the last expert taken from the first that is not
EFFECT = 1e-2  # least change of some logit when a tensor changes
FIELD_EFFECT = 1e-3  # the same for a config field; five times what the test tolerates

Config = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """`matters`: changes of config.json each of which must change the result; what the case is about."""

    architecture: str
    config: Config
    matters: tuple[Config, ...] = ()
    committed: bool = True


# --- the cases ----------------------------------------------------------------------------------------------

# head_dim is not 24 / 4
WIDE = dict(hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=10)
# families without a head_dim field
EVEN = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
TWO = dict(num_hidden_layers=2, intermediate_size=40)
SCALAR = dict(num_labels=1)
WINDOW, FULL = "sliding_attention", "full_attention"


def rope(theta: float, kind: str = "default", **more) -> Config:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = dict(factor=4.0, original_max_position_embeddings=16)
GEMMA = dict(rms_norm_eps=1e-5, query_pre_attn_scalar=7)
GEMMA3_ROPE = {
    "rope_parameters": {
        WINDOW: {"rope_type": "default", "rope_theta": 300.0},
        FULL: {"rope_type": "default", "rope_theta": 5_000.0},
    }
}
GEMMA3_LINEAR = copy.deepcopy(GEMMA3_ROPE)
GEMMA3_LINEAR["rope_parameters"][FULL] |= {"rope_type": "linear", "factor": 8.0}
MOE = dict(num_hidden_layers=2, num_experts_per_tok=2)
QWEN3_MOE = {**WIDE, **MOE, "num_experts": 4, "moe_intermediate_size": 16, "intermediate_size": 20}

CASES: dict[str, Case] = {
    "llama": Case(
        "LlamaForCausalLM", {**WIDE, **TWO, **rope(700.0), "rms_norm_eps": 1e-3},
        ({"rms_norm_eps": 1e-6}, rope(10_000.0)),
    ),
    "llama3_tied": Case(
        "LlamaForCausalLM", {**WIDE, **TWO, **rope(500.0, "llama3", **LLAMA3), "tie_word_embeddings": True},
        (
            rope(500.0),
            rope(500.0, "llama3", **{**LLAMA3, "high_freq_factor": 2.0}),
            rope(500.0, "llama3", **{**LLAMA3, "low_freq_factor": 0.25}),
        ),
    ),
    "llama_linear": Case(
        "LlamaForCausalLM", {**WIDE, **TWO, **rope(700.0, "linear", factor=4.0)}, (rope(700.0),)
    ),
    "llama_yarn": Case(
        "LlamaForCausalLM", {**WIDE, **TWO, **rope(100.0, "yarn", **YARN)},
        (rope(100.0), rope(100.0, "yarn", **YARN, attention_factor=1.0), rope(100.0, "yarn", **YARN, beta_slow=2)),
    ),
    "llama_scalar": Case("LlamaForSequenceClassification", {**WIDE, **TWO, **SCALAR}),
    "mistral": Case(
        "MistralForCausalLM", {**WIDE, **TWO, **rope(800.0), "sliding_window": 8},
        ({"sliding_window": None}, {"sliding_window": 9}, rope(10_000.0)),
    ),
    "mistral_scalar": Case(
        "MistralForSequenceClassification", {**WIDE, **TWO, **SCALAR, "sliding_window": 8},
        ({"sliding_window": None},),
    ),
    "qwen2": Case("Qwen2ForCausalLM", {**EVEN, **TWO, **rope(900.0)}, (rope(10_000.0),)),
    "qwen2_window": Case(
        "Qwen2ForCausalLM",
        {
            **EVEN, "num_hidden_layers": 3, "intermediate_size": 24, "tie_word_embeddings": True,
            "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
        },
        ({"layer_types": [FULL] * 3}, {"layer_types": [WINDOW] * 3}),
    ),
    "qwen2_scalar": Case("Qwen2ForSequenceClassification", {**EVEN, **TWO, **SCALAR}),
    "qwen3": Case("Qwen3ForCausalLM", {**WIDE, **TWO, **rope(900.0), "tie_word_embeddings": True}),
    "gemma": Case(
        "GemmaForCausalLM", {**WIDE, **TWO, **rope(600.0), "num_key_value_heads": 1, "rms_norm_eps": 0.02},
        ({"hidden_act": "silu"}, {"rms_norm_eps": 1e-6}, rope(10_000.0)),
    ),
    "gemma2": Case(
        "Gemma2ForCausalLM",
        {
            **WIDE, **GEMMA, "num_hidden_layers": 4, "intermediate_size": 20, "sliding_window": 8,
            "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        },
        (
            {"attn_logit_softcapping": None}, {"final_logit_softcapping": None}, {"query_pre_attn_scalar": 10},
            {"layer_types": [FULL] * 4}, {"layer_types": [FULL, WINDOW] * 2}, {"hidden_activation": "silu"},
        ),
    ),
    "gemma2_scalar": Case(
        "Gemma2ForSequenceClassification",
        {**WIDE, **TWO, **GEMMA, **SCALAR, "sliding_window": 8, "attn_logit_softcapping": 2.0},
        ({"layer_types": [FULL] * 2},),
    ),
    "gemma3_text": Case(  # five local layers, then a global one
        "Gemma3ForCausalLM",
        {
            **GEMMA, **GEMMA3_ROPE, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 12, "num_hidden_layers": 6, "intermediate_size": 24, "sliding_window": 8,
        },
        (
            {"layer_types": [FULL] * 6}, {"layer_types": [WINDOW] * 6}, {"query_pre_attn_scalar": 12},
            {"rope_parameters": {k: GEMMA3_ROPE["rope_parameters"][FULL] for k in (WINDOW, FULL)}},
            {"rope_parameters": {k: GEMMA3_ROPE["rope_parameters"][WINDOW] for k in (WINDOW, FULL)}},
        ),
    ),
    "gemma3_linear": Case(
        "Gemma3ForCausalLM",
        {**WIDE, **TWO, **GEMMA, **GEMMA3_LINEAR, "sliding_window": 8, "layer_types": [WINDOW, FULL]},
        (GEMMA3_ROPE,),
    ),
    "phi3": Case(
        "Phi3ForCausalLM", {**EVEN, **TWO, **rope(600.0), "sliding_window": 8},
        ({"sliding_window": None}, rope(10_000.0)),
    ),
    "phi3_partial": Case(
        "Phi3ForCausalLM",
        {**EVEN, **TWO, **rope(600.0, partial_rotary_factor=0.75), "tie_word_embeddings": True},
        (rope(600.0, partial_rotary_factor=1.0), rope(600.0, partial_rotary_factor=0.5)),
    ),
    "olmo2": Case("Olmo2ForCausalLM", {**EVEN, **TWO, **rope(600.0)}, (rope(10_000.0),)),
    "gpt2": Case(
        "GPT2LMHeadModel", dict(n_embd=24, n_layer=2, n_head=4, layer_norm_epsilon=1e-3),
        ({"activation_function": "gelu"}, {"layer_norm_epsilon": 1e-6}),
    ),
    "gpt2_scalar": Case("GPT2ForSequenceClassification", dict(n_embd=24, n_layer=2, n_head=4, **SCALAR)),
    "gpt_neox": Case(
        "GPTNeoXForCausalLM",
        {**TWO, **rope(600.0, partial_rotary_factor=0.25), "hidden_size": 32, "num_attention_heads": 2},
        (
            {"use_parallel_residual": False}, rope(600.0, partial_rotary_factor=0.5),
            rope(10_000.0, partial_rotary_factor=0.25), {"hidden_act": "silu"},
        ),
    ),
    "gpt_neox_serial": Case(
        "GPTNeoXForCausalLM",
        {
            **TWO, **rope(600.0, partial_rotary_factor=1.0), "hidden_size": 32, "num_attention_heads": 4,
            "use_parallel_residual": False,
        },
        ({"use_parallel_residual": True}, rope(10_000.0, partial_rotary_factor=1.0)),
    ),
    "mixtral": Case(
        "MixtralForCausalLM", {**WIDE, **MOE, **rope(700.0), "num_local_experts": 4, "intermediate_size": 16},
        ({"num_experts_per_tok": 1}, rope(10_000.0)),
    ),
    "qwen3_moe": Case(
        "Qwen3MoeForCausalLM", {**QWEN3_MOE, "norm_topk_prob": True}, ({"norm_topk_prob": False},)
    ),
    "qwen3_moe_raw": Case(
        "Qwen3MoeForCausalLM", {**QWEN3_MOE, "norm_topk_prob": False}, ({"norm_topk_prob": True},)
    ),
    # --- variants, made on demand ---------------------------------------------------------------------------
    "llama_bias": Case(
        "LlamaForCausalLM", {**WIDE, **TWO, "attention_bias": True, "mlp_bias": True}, committed=False
    ),
    "llama3_untied": Case(
        "LlamaForCausalLM", {**WIDE, **TWO, **rope(500.0, "llama3", **LLAMA3)}, committed=False
    ),
    "llama_yarn_tuned": Case(
        "LlamaForCausalLM",
        {
            **WIDE, **TWO,
            **rope(100.0, "yarn", **YARN, beta_fast=4.0, beta_slow=0.5, attention_factor=0.8, truncate=False),
        },
        (rope(100.0, "yarn", **YARN, beta_fast=4.0, beta_slow=0.5, attention_factor=0.8, truncate=True),),
        committed=False,
    ),
    "llama_yarn_mscale": Case(
        "LlamaForCausalLM", {**WIDE, **TWO, **rope(100.0, "yarn", **YARN, mscale=2.0, mscale_all_dim=0.5)},
        (rope(100.0, "yarn", **YARN),), committed=False,
    ),
    "llama_even": Case(  # no grouped heads, as in Llama 2
        "LlamaForCausalLM", {**EVEN, **TWO, "num_key_value_heads": 4}, committed=False
    ),
    "mistral_full": Case("MistralForCausalLM", {**WIDE, **TWO, "sliding_window": None}, committed=False),
    "mistral_even": Case("MistralForCausalLM", {**EVEN, **TWO, "sliding_window": 8}, committed=False),
    "qwen2_yarn": Case("Qwen2ForCausalLM", {**EVEN, **TWO, **rope(100.0, "yarn", **YARN)}, committed=False),
    "qwen2_tied": Case("Qwen2ForCausalLM", {**EVEN, **TWO, "tie_word_embeddings": True}, committed=False),
    "qwen3_bias": Case("Qwen3ForCausalLM", {**WIDE, **TWO, "attention_bias": True}, committed=False),
    "qwen3_window": Case(
        "Qwen3ForCausalLM",
        {**WIDE, **TWO, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        ({"layer_types": [FULL] * 2},), committed=False,
    ),
    "qwen3_scalar": Case("Qwen3ForSequenceClassification", {**WIDE, **TWO, **SCALAR}, committed=False),
    "gemma_scalar": Case("GemmaForSequenceClassification", {**WIDE, **TWO, **SCALAR}, committed=False),
    "gemma2_uncapped": Case(
        "Gemma2ForCausalLM",
        {
            **WIDE, **TWO, **GEMMA, "sliding_window": 8, "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        committed=False,
    ),
    "gemma3_scalar": Case(
        "Gemma3TextForSequenceClassification",
        {**WIDE, **TWO, **GEMMA, **GEMMA3_ROPE, **SCALAR, "sliding_window": 8, "layer_types": [WINDOW, FULL]},
        committed=False,
    ),
    "gemma3_odd": Case(  # eight layers: the pattern does not come out even
        "Gemma3ForCausalLM",
        {**WIDE, **GEMMA, **GEMMA3_ROPE, "num_hidden_layers": 8, "intermediate_size": 24, "sliding_window": 8},
        committed=False,
    ),
    "phi3_scalar": Case("Phi3ForSequenceClassification", {**EVEN, **TWO, **SCALAR}, committed=False),
    "olmo2_bias": Case("Olmo2ForCausalLM", {**EVEN, **TWO, "attention_bias": True}, committed=False),
    "olmo2_scalar": Case("Olmo2ForSequenceClassification", {**EVEN, **TWO, **SCALAR}, committed=False),
    "gpt2_inner": Case(
        "GPT2LMHeadModel", dict(n_embd=24, n_layer=2, n_head=4, n_inner=40, activation_function="relu"),
        committed=False,
    ),
    "gpt_neox_unbiased": Case(
        "GPTNeoXForCausalLM",
        {**TWO, **rope(600.0, partial_rotary_factor=0.5), "hidden_size": 32, "num_attention_heads": 2,
         "attention_bias": False, "tie_word_embeddings": True},
        committed=False,
    ),
    "gpt_neox_scalar": Case(
        "GPTNeoXForSequenceClassification", {**TWO, "hidden_size": 32, "num_attention_heads": 2, **SCALAR},
        committed=False,
    ),
    "mixtral_window": Case(
        "MixtralForCausalLM",
        {**WIDE, **MOE, "num_local_experts": 4, "intermediate_size": 16, "sliding_window": 8},
        ({"sliding_window": None},), committed=False,
    ),
    "mixtral_one": Case(
        "MixtralForCausalLM",
        {**WIDE, **MOE, "num_local_experts": 3, "intermediate_size": 16, "num_experts_per_tok": 1},
        committed=False,
    ),
    "mixtral_scalar": Case(
        "MixtralForSequenceClassification",
        {**WIDE, **MOE, **SCALAR, "num_local_experts": 4, "intermediate_size": 16}, committed=False,
    ),
}  # fmt: skip

TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA_BASE = "llama"
LORA: dict[str, Config] = {
    "lora_r4": dict(r=4, lora_alpha=6, target_modules=TARGETS),
    "lora_rslora": dict(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=True),
    "lora_dora": dict(r=4, lora_alpha=6, target_modules=TARGETS, use_dora=True),
}


# --- the model ----------------------------------------------------------------------------------------------


def make_model(case: Case, seed: int):
    """With its own random parameters, float32."""
    cls = getattr(transformers, case.architecture)
    long = {"n_positions" if "n_embd" in case.config else "max_position_embeddings": 64}
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = cls(cls.config_class(**{"vocab_size": VOCAB, **long, **ids, **case.config}))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(drawn(case, name, torch.randn_like(p)))
    return model.eval()


def drawn(case: Case, name: str, noise: torch.Tensor) -> torch.Tensor:
    """Large enough for the logits to depend on all of it."""
    is_norm = "norm" in name or ".ln_" in name
    if is_norm and name.endswith("weight"):
        return 0.3 * noise if "Gemma" in case.architecture else 1 + 0.3 * noise  # Gemma adds the 1 itself
    if noise.ndim == 1:
        return 0.3 * noise
    if any(part in name for part in ("embed_tokens", "embed_in", "wte", "wpe")):
        return 0.5 * noise
    is_conv = "GPT2" in case.architecture and noise.shape[0] > 1  # [in, out], unlike a linear map
    return noise * (1.5 / noise.shape[0 if is_conv else -1] ** 0.5)


def load(case: Case, folder: Path, **changes: Any):
    """What lies in the folder, computed in float32. `changes`: of config.json."""
    cls = getattr(transformers, case.architecture)
    kw = {"experts_implementation": "eager"} if is_moe(case) else {}
    if changes:
        card = json.loads((folder / "config.json").read_text()) | changes
        kw["config"] = cls.config_class.from_dict(card)
    model, info = cls.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **kw
    )
    assert not any(info.values()), info  # no missing, unexpected or mismatched tensor
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return model.eval()


def is_moe(case: Case) -> bool:
    return "num_experts_per_tok" in case.config


def is_scalar(case: Case) -> bool:
    return "num_labels" in case.config


# --- what it computes ---------------------------------------------------------------------------------------


def batch(seed: int, length: int = max(LENGTHS)) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded rows of unequal length; padding is filled with random ids, which nothing may see."""
    tokens = np.random.default_rng(seed).integers(3, VOCAB, (len(LENGTHS), length))
    mask = np.arange(length)[None] < np.array(LENGTHS)[:, None]
    return tokens, mask


def left_padded(rows: np.ndarray) -> np.ndarray:
    return np.stack([np.roll(row, max(LENGTHS) - n) for row, n in zip(rows, LENGTHS, strict=True)])


def inputs(tokens: np.ndarray, mask: np.ndarray) -> dict[str, torch.Tensor]:
    """Positions count real tokens, as `generate` has it."""
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return {
        "input_ids": torch.tensor(tokens),
        "attention_mask": torch.tensor(mask.astype(np.int64)),
        "position_ids": torch.tensor(positions),
    }


@torch.no_grad()
def outputs(model, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[sum(lengths), V] logits, or [sum(lengths)] scores, of the real tokens."""
    given = inputs(tokens, mask)
    if hasattr(model, "score"):
        out = model.score(model.base_model(**given).last_hidden_state)[..., 0]
    else:
        out = model(**given).logits
    return out.numpy()[mask]


@torch.no_grad()
def greedy(model, tokens: np.ndarray) -> tuple[np.ndarray, float]:
    """The continuation of each row alone, and the least margin of a token in it."""
    model.generation_config.eos_token_id = None  # the test compares a fixed number of tokens
    rows, margins = [], []
    for row, n in zip(tokens, LENGTHS, strict=True):
        ids = torch.tensor(row[None, :n])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        top = torch.cat(out.logits).topk(2, dim=-1).values
        margins.append(float((top[:, 0] - top[:, 1]).min()))
        # The whole sequence at once gives the same tokens as the cache did.
        whole = model(out.sequences).logits[0, n - 1 : -1].argmax(-1)
        assert torch.equal(whole, out.sequences[0, n:])
        rows.append(out.sequences[0, n:].numpy())
    return np.stack(rows).astype(np.int32), min(margins)


@torch.no_grad()
def router_margin(model, top_k: int, tokens: np.ndarray, new: np.ndarray) -> float:
    """Over every real token of the prompts and their continuations."""
    margins = []
    for row, n, more in zip(tokens, LENGTHS, new, strict=True):
        ids = torch.tensor(np.concatenate([row[:n], more]))[None]
        for logits in model(ids, output_router_logits=True).router_logits:
            best = logits.softmax(-1).sort(-1, descending=True).values
            margins.append(float((best[:, top_k - 1] - best[:, top_k]).min()))
    return min(margins)


def reference(case: Case, model, seed: int) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of golden.npz, and why this seed will not do ("" if it does)."""
    tokens, mask = batch(seed)
    out = outputs(model, tokens, mask)
    left = outputs(model, left_padded(tokens), left_padded(mask))
    np.testing.assert_allclose(left, out, rtol=0, atol=5e-5)
    arrays = {"tokens": tokens.astype(np.int32), "lengths": np.array(LENGTHS, np.int32)}
    if is_scalar(case):
        with torch.no_grad():
            rows = zip(tokens, LENGTHS, strict=True)
            scores = [model(torch.tensor(row[None, :n])).logits[0, 0].item() for row, n in rows]
        np.testing.assert_allclose(out[np.cumsum(LENGTHS) - 1], scores, rtol=0, atol=5e-5)
        return arrays | {"token_scores": out, "scores": np.array(scores, np.float32)}, ""
    assert 0.5 < out.std() < 5, f"logits have standard deviation {out.std()}"
    arrays["logits"] = out
    arrays["greedy"], margin = greedy(model, tokens)
    if margin < GREEDY_MARGIN:
        return arrays, f"greedy margin {margin:.1e}"
    if is_moe(case):
        margin = router_margin(model, case.config["num_experts_per_tok"], tokens, arrays["greedy"])
        if margin < ROUTER_MARGIN:
            return arrays, f"router margin {margin:.1e}"
        with torch.no_grad():
            loss = model(**inputs(tokens, mask), output_router_logits=True).aux_loss
        arrays["aux_loss"] = np.float32(loss)
    return arrays, ""


def check_that_it_matters(case: Case, model, folder: Path, seed: int) -> None:
    """Every tensor, and every config field that the case is about, changes the result."""
    tokens, mask = batch(seed)
    before = outputs(model, tokens, mask)
    for name, p in model.named_parameters():
        kept = p.detach().clone()
        for _ in range(3):  # what one random step adds to a scalar may be nothing by chance
            with torch.no_grad():
                p.add_(torch.randn_like(p) * 0.5)
            effect = np.abs(outputs(model, tokens, mask) - before).max()
            if effect > EFFECT:
                break
        assert effect > EFFECT, f"{name} has hardly an effect: {effect:.1e}"
        with torch.no_grad():
            p.copy_(kept)
    for changes in case.matters:
        effect = np.abs(outputs(load(case, folder, **changes), tokens, mask) - before).max()
        assert effect > FIELD_EFFECT, f"{changes} has hardly an effect: {effect:.1e}"


# --- config.json as it used to be ---------------------------------------------------------------------------


def older(card: Config) -> Config:
    """What most published checkpoints have: rotary fields at the top, and no `layer_types`."""
    card = copy.deepcopy(card)
    family = card["model_type"]
    card["torch_dtype"] = card.pop("dtype")
    card["transformers_version"] = "4.44.0"
    scaling = card.pop("rope_parameters", None)
    if family == "gemma3_text":
        local, scaling = scaling[WINDOW], scaling[FULL]
        card["rope_local_base_freq"] = local["rope_theta"]
        card["cache_implementation"] = "hybrid"
        pattern = card.pop("_sliding_window_pattern")
        kinds = [WINDOW if (i + 1) % pattern else FULL for i in range(card["num_hidden_layers"])]
        if card["layer_types"] == kinds:
            del card["layer_types"]
            card["sliding_window_pattern"] = pattern
    if scaling is not None:
        theta, part = scaling.pop("rope_theta"), scaling.pop("partial_rotary_factor", None)
        card["rotary_emb_base" if family == "gpt_neox" else "rope_theta"] = theta
        if part is not None:
            card["rotary_pct" if family == "gpt_neox" else "partial_rotary_factor"] = part
        kind = scaling["rope_type"]
        card["rope_scaling"] = None if kind == "default" else scaling
        if kind == "linear" and family == "llama":  # the oldest name of the field
            card["rope_scaling"]["type"] = scaling.pop("rope_type")
    if family in ("qwen2", "qwen3", "gemma2"):
        del card["layer_types"]
    if "use_sliding_window" in card and not card["use_sliding_window"]:
        card["sliding_window"] = 131072  # given, and not used
    if family.startswith("gemma"):
        del card["tie_word_embeddings"]  # true is these families' default
    if family == "gemma":
        card["hidden_act"] = "gelu"  # which always meant the approximation by tanh
    if family == "gpt_neox":
        del card["attention_bias"]
    if family == "qwen3_moe":
        card["num_experts"] = card.pop("num_local_experts")
    even = card.get("head_dim", 0) * card.get("num_attention_heads", 0) == card.get("hidden_size")
    if family in ("llama", "mistral") and even:
        del card["head_dim"]
    return card


def write_older_config(case: Case, folder: Path, tokens: np.ndarray, mask: np.ndarray) -> None:
    """Only if transformers takes it for the same model."""
    card = older(json.loads((folder / "config.json").read_text()))
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "config.json").write_text(json.dumps(card))
        shutil.copy(folder / "model.safetensors", temporary)
        found = outputs(load(case, Path(temporary)), tokens, mask)
    np.testing.assert_array_equal(found, outputs(load(case, folder), tokens, mask))
    (folder / "older_config.json").write_text(json.dumps(dict(sorted(card.items())), indent=2) + "\n")


# --- files --------------------------------------------------------------------------------------------------


def make_case(name: str, target: Path) -> int:
    """Writes the folder; the seed that it took."""
    case = CASES[name]
    for seed in range(100):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / name
            # Casting the model that is run would round its rotary frequencies too: it is loaded again.
            make_model(case, seed).to(torch.bfloat16).save_pretrained(folder)
            model = load(case, folder)
            arrays, unfit = reference(case, model, seed)
            if unfit:
                continue
            check_that_it_matters(case, load(case, folder), folder, seed)
            if case.config.get("attention_bias", True) or "GPTNeoX" not in case.architecture:
                write_older_config(case, folder, *batch(seed))
            np.savez_compressed(folder / "golden.npz", **arrays)
            (folder / "generation_config.json").unlink(missing_ok=True)
            shutil.rmtree(target / name, ignore_errors=True)
            shutil.copytree(folder, target / name)
            (target / name / "model.safetensors").chmod(0o644)
            return seed
    raise SystemExit(f"{name}: no seed will do; the last: {unfit}")


@torch.no_grad()
def make_lora(name: str, target: Path) -> int:
    """The same for an adapter over a case that is there already."""
    import peft

    base = target / LORA_BASE
    if not base.is_dir():
        raise SystemExit(f"{name}: make the case {LORA_BASE} in the same folder first")
    config = peft.LoraConfig(task_type="CAUSAL_LM", **LORA[name])
    model = peft.get_peft_model(load(CASES[LORA_BASE], base), config).eval()
    torch.manual_seed(seed := 7)
    for parameter_name, p in model.named_parameters():
        if "lora_" in parameter_name:
            noise = torch.randn_like(p)
            is_magnitude = "magnitude" in parameter_name
            p.copy_(p * (1 + 0.2 * noise) if is_magnitude else noise * (0.7 / p.shape[1] ** 0.5))
    tokens, mask = batch(0)
    logits = outputs(model, tokens, mask)
    plain = outputs(load(CASES[LORA_BASE], base), tokens, mask)
    assert np.abs(logits - plain).max() > 0.5, "the adapter hardly matters"
    folder = target / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    for file in folder.iterdir():
        if file.name not in ("adapter_config.json", "adapter_model.safetensors"):
            file.unlink()
    card = json.loads((folder / "adapter_config.json").read_text())
    card["base_model_name_or_path"] = f"../{LORA_BASE}"  # not a path of the machine that made it
    card["target_modules"] = sorted(card["target_modules"])
    (folder / "adapter_config.json").write_text(json.dumps(card, indent=2) + "\n")

    again = peft.PeftModel.from_pretrained(load(CASES[LORA_BASE], base), folder).eval()
    np.testing.assert_array_equal(outputs(again, tokens, mask), logits)
    merged = outputs(again.merge_and_unload(), tokens, mask)
    np.testing.assert_allclose(merged, logits, rtol=0, atol=1e-4)
    (folder / "adapter_model.safetensors").chmod(0o644)
    np.savez_compressed(
        folder / "golden.npz", tokens=tokens.astype(np.int32), lengths=np.array(LENGTHS, np.int32),
        logits=logits, merged_logits=merged,
    )  # fmt: skip
    return seed


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def compare(case: Case, folder: Path, original: Path) -> tuple[str, str]:
    """(what is wrong with the checkpoint, or "", and the fields of its config that differ all the same)."""
    with np.load(original / "golden.npz") as arrays:
        expected = arrays["token_scores" if is_scalar(case) else "logits"]
        mask = np.arange(arrays["tokens"].shape[1])[None] < arrays["lengths"][:, None]
        found = outputs(load(case, folder), arrays["tokens"].astype(np.int64), mask)
    ours, theirs = tensors_of(folder), tensors_of(original)
    a, b = (transformers.AutoConfig.from_pretrained(f).to_dict() for f in (folder, original))
    fields = {
        k: (a.get(k), b.get(k))
        for k in sorted({*a, *b} - {"transformers_version", "_name_or_path"})
        if a.get(k) != b.get(k)
    }
    note = f"(config, saved and original: {fields})"
    if set(ours) != set(theirs):
        return f"other tensors: {sorted(set(ours) ^ set(theirs))}", note
    changed = [k for k, v in theirs.items() if ours[k].dtype != v.dtype or not torch.equal(ours[k], v)]
    difference = np.abs(found - expected).max()
    wrong = [f"other bits in {changed}"] if changed else []
    if difference > 1e-5:
        wrong.append(f"logits differ by {difference:.1e}")
    return "; ".join(wrong), note


def verify(saved: Path, golden: Path) -> bool:
    """Whether transformers computes with every checkpoint in `saved` what it did with the original."""
    good = True
    folders = sorted(p for p in saved.iterdir() if p.name in CASES and (p / "config.json").is_file())
    if not folders:
        raise SystemExit(f"{saved}: holds no folder named like a case")
    for folder in folders:
        try:
            unlike, note = compare(CASES[folder.name], folder, golden / folder.name)
        except Exception as e:  # whatever transformers says of the file
            unlike, note = f"{type(e).__name__}: {e}", ""
        good &= not unlike
        print(f"{'BAD' if unlike else 'ok '} {folder.name}: {unlike} {note}", flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE, help="where the cases are, or will be")
    parser.add_argument("--all", action="store_true", help="the variants too")
    parser.add_argument("--case", nargs="+", choices=[*CASES, *LORA], metavar="NAME")
    parser.add_argument("--verify", type=Path, metavar="FOLDER", help="checkpoints that save_hf wrote")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if args.verify:
        sys.exit(not verify(args.verify, args.out))
    names = args.case or [*(n for n, c in CASES.items() if args.all or c.committed), *LORA]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "versions.json"
    seeds = json.loads(path.read_text())["seeds"] if path.exists() else {}
    for name in names:
        seeds[name] = make_lora(name, args.out) if name in LORA else make_case(name, args.out)
        size = sum(f.stat().st_size for f in (args.out / name).iterdir())
        print(f"{name}: seed {seeds[name]}, {size / 1000:.0f} kB", flush=True)
    kinds = {getattr(transformers, case.architecture).config_class for case in CASES.values()}
    defaults = {kind.model_type: json.loads(kind().to_json_string(use_diff=False)) for kind in kinds}
    (args.out / "defaults.json").write_text(json.dumps(defaults, indent=1, sort_keys=True) + "\n")
    versions = {m: importlib.metadata.version(m) for m in ("torch", "transformers", "peft", "numpy")}
    path.write_text(json.dumps(versions | {"seeds": dict(sorted(seeds.items()))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
