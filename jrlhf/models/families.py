"""One table per family of Hugging Face checkpoints, read in both directions: a family is added here.

A table says which fields of config.json are which of `ModelConfig`, what the family does always, and which tensor of
the file is which parameter. Loading, checking and saving (`hf.py`) all walk the same rows, so a row that is right one
way is right the other way too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from jrlhf.models.config import ModelConfig

Head = Literal["lm", "scalar"]
Shape = tuple[int, ...]


# --- what a table is made of --------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How one of our parameters lies in a tensor of the file. `shape` is ours, without stacked axes and padding.

    `view` shows the part of a file's tensor that is ours, in our shape, without copying: read through it, the tensor
    is loaded; written through it, it is saved.
    """

    hf_shape: Callable[[Shape, ModelConfig], Shape]
    view: Callable[[np.ndarray, Shape, ModelConfig], np.ndarray]


SAME = Layout(lambda shape, c: shape, lambda x, shape, c: x)
# A bias of several axes ([heads, head_dim]) is one axis in the file.
FLAT = Layout(lambda shape, c: (math.prod(shape),), lambda x, shape, c: x.reshape(shape))


def linear(n_in: int = 1) -> Layout:
    """torch keeps a linear map as [out, in]; ours has its `n_in` input axes first, then its output axes."""
    hf_shape = lambda shape, c: (math.prod(shape[n_in:]), math.prod(shape[:n_in]))  # noqa: E731
    return Layout(hf_shape, lambda x, shape, c: x.T.reshape(shape))


def conv1d(n_in: int = 1, part: int = 0, parts: int = 1) -> Layout:
    """GPT-2's linear maps are [in, out], those of queries, keys and values side by side."""
    hf_shape = lambda shape, c: (math.prod(shape[:n_in]), parts * math.prod(shape[n_in:]))  # noqa: E731
    return Layout(hf_shape, lambda x, shape, c: x.reshape(len(x), parts, -1)[:, part].reshape(shape))


def part_of_bias(part: int, parts: int) -> Layout:
    hf_shape = lambda shape, c: (parts * math.prod(shape),)  # noqa: E731
    return Layout(hf_shape, lambda x, shape, c: x.reshape(parts, *shape)[part])


def rows_of(part: int, sizes: Callable[[ModelConfig], tuple[int, ...]]) -> Layout:
    """Phi-3: linear maps of one input stacked along the file's output axis."""

    def view(x, shape, c):
        start = sum(sizes(c)[:part])
        return x[start : start + sizes(c)[part]].T.reshape(shape)

    return Layout(lambda shape, c: (sum(sizes(c)), shape[0]), view)


def heads_of(part: int) -> Layout:
    """GPT-NeoX: query, key and value of each head follow one another."""
    hf_shape = lambda shape, c: (3 * shape[1] * shape[2], shape[0])  # noqa: E731
    return Layout(
        hf_shape, lambda x, shape, c: x.reshape(shape[1], 3, shape[2], shape[0])[:, part].transpose(2, 0, 1)
    )


def heads_of_bias(part: int) -> Layout:
    return Layout(
        lambda shape, c: (3 * math.prod(shape),),
        lambda x, shape, c: x.reshape(shape[0], 3, shape[1])[:, part],
    )


class Weight(NamedTuple):
    """One row: the name in the file (`{layer}`, `{expert}`), the path in our tree, and how the two differ."""

    hf: str
    path: str
    layout: Layout
    optional: bool = False  # zeros where the file has none, and left out of the file where it is zero

    @property
    def stacked(self) -> int:
        """How many leading axes of ours are tensors of their own in the file."""
        return ("{layer}" in self.hf) + ("{expert}" in self.hf)

    def name(self, index: Sequence[int]) -> str:
        return self.hf.format(**dict(zip(("layer", "expert"), index, strict=False)))


class Field(NamedTuple):
    """A config.json field that is a ModelConfig field ("moe.experts": of the record there)."""

    hf: str
    ours: str
    default: Any = None  # transformers' default where the field is absent; None: it must be there
    names: Mapping[str, str] | None = None  # its values and ours; the first of several is written
    null: Any = None  # what null in the file means to us
    also: str = ""  # another name that some versions write


@dataclass(frozen=True)
class Windows:
    """Which layers see a window only, where config.json has no `layer_types`.

    none; all, if `sliding_window` is set; late: from `max_window_layers` on, if `use_sliding_window`; all but every
    n-th (`sliding_window_pattern`).
    """

    kind: Literal["none", "all", "late", "all but every"] = "none"
    default: int | None = None  # transformers' default of sliding_window
    every: int = 0


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}


@dataclass(frozen=True)
class Family:
    """All that tells one family of checkpoints from another."""

    model_type: str
    architectures: Mapping[Head, str]
    fields: tuple[Field, ...]
    weights: tuple[Weight, ...]
    ours: Mapping[str, Any] = field(default_factory=dict)  # ModelConfig fields that all members share
    fixed: Mapping[str, tuple[Any, ...]] = field(
        default_factory=dict
    )  # field -> values that we compute; the first is written
    windows: Windows = Windows()
    rope_theta: float = 10_000.0  # transformers' default
    theta_field: str = "rope_theta"
    rotary: tuple[str, float] = ("", 1.0)  # the field of the share of a head that rotates, and its default
    local_theta: tuple[str, float] = ("", 0.0)  # the field of the windowed layers' own base, and its default
    prefix: str = "model."  # that the language model's tensors may lack (a checkpoint of the bare decoder)
    ignored: str = r".*rotary_emb\.inv_freq"  # buffers that can be recomputed

    def name_of(self, path: str) -> str:
        return next(w.hf for w in self.weights if w.path == path)


# --- what families share ------------------------------------------------------------------------------------


def architectures(name: str) -> dict[Head, str]:
    return {"lm": f"{name}ForCausalLM", "scalar": f"{name}ForSequenceClassification"}


def fields(
    *more: Field,
    tied: bool = False,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    context: int = 2048,
    eps: float = 1e-6,
    act: str = "hidden_act",
    act_default: str = "silu",
) -> tuple[Field, ...]:
    """What the Llama-like families have in common, and what `more` says otherwise."""
    llama = (
        Field("vocab_size", "vocab_size"),
        Field("hidden_size", "d_model"),
        Field("intermediate_size", "d_ff"),
        Field("num_hidden_layers", "n_layers"),
        Field("num_attention_heads", "n_heads"),
        Field("num_key_value_heads", "n_kv_heads", kv_heads),  # None: num_attention_heads
        Field("head_dim", "head_dim", head_dim),  # None: hidden_size / num_attention_heads
        Field("max_position_embeddings", "context", context),
        Field("rms_norm_eps", "norm_eps", eps),
        Field("tie_word_embeddings", "tie_embeddings", tied),
        Field(act, "activation", act_default, ACTIVATIONS),
    )
    changed = {f.ours for f in more}
    return tuple(f for f in llama if f.ours not in changed) + more


SCALAR_HEAD = (
    Weight("score.weight", "score/kernel", linear()),
    # transformers has no such tensor and ignores it: its scores then lack a constant, which no comparison of two
    # answers sees.
    Weight("score.bias", "score/bias", SAME, optional=True),
)


def weights(*changed: Weight, without: Sequence[str] = ()) -> tuple[Weight, ...]:
    """Llama's tensors, with some in another place (by path), some more, and some that a family lacks."""
    layer = "model.layers.{layer}."
    own = {w.path for w in changed} | set(without)
    llama = (
        Weight("model.embed_tokens.weight", "embed/embedding", SAME),
        Weight(layer + "input_layernorm.weight", "layers/attn_norm/scale", SAME),
        Weight(layer + "self_attn.q_proj.weight", "layers/attn/q", linear()),
        Weight(layer + "self_attn.k_proj.weight", "layers/attn/k", linear()),
        Weight(layer + "self_attn.v_proj.weight", "layers/attn/v", linear()),
        Weight(layer + "self_attn.o_proj.weight", "layers/attn/o", linear(2)),
        Weight(layer + "self_attn.q_proj.bias", "layers/attn/q_bias", FLAT),
        Weight(layer + "self_attn.k_proj.bias", "layers/attn/k_bias", FLAT),
        Weight(layer + "self_attn.v_proj.bias", "layers/attn/v_bias", FLAT),
        Weight(layer + "self_attn.o_proj.bias", "layers/attn/o_bias", FLAT),
        Weight(layer + "self_attn.q_norm.weight", "layers/attn/q_norm/scale", FLAT),
        Weight(layer + "self_attn.k_norm.weight", "layers/attn/k_norm/scale", FLAT),
        Weight(layer + "post_attention_layernorm.weight", "layers/mlp_norm/scale", SAME),
        Weight(layer + "mlp.gate_proj.weight", "layers/mlp/gate", linear()),
        Weight(layer + "mlp.up_proj.weight", "layers/mlp/up", linear()),
        Weight(layer + "mlp.down_proj.weight", "layers/mlp/down", linear()),
        Weight(layer + "mlp.gate_proj.bias", "layers/mlp/gate_bias", FLAT),
        Weight(layer + "mlp.up_proj.bias", "layers/mlp/up_bias", FLAT),
        Weight(layer + "mlp.down_proj.bias", "layers/mlp/down_bias", FLAT),
        Weight("model.norm.weight", "final_norm/scale", SAME),
        Weight("lm_head.weight", "lm_head/kernel", linear()),
        *SCALAR_HEAD,
    )
    return tuple(w for w in llama if w.path not in own) + changed


def experts(name: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """A mixture of experts in the place of the feed-forward layer."""
    layer = "model.layers.{layer}." + name
    return (
        Weight(layer + ".gate.weight", "layers/moe/router", linear()),
        Weight(layer + ".experts.{expert}." + gate + ".weight", "layers/moe/gate", linear()),
        Weight(layer + ".experts.{expert}." + up + ".weight", "layers/moe/up", linear()),
        Weight(layer + ".experts.{expert}." + down + ".weight", "layers/moe/down", linear()),
    )


def sandwich(*norms: str) -> tuple[Weight, ...]:
    """Norms by their names in the file: after attention, before and after the feed-forward layer."""
    paths = ("attn_out_norm", "mlp_norm", "mlp_out_norm")
    return tuple(
        Weight("model.layers.{layer}." + name + ".weight", f"layers/{path}/scale", SAME)
        for name, path in zip(norms, paths, strict=True)
        if name
    )


def layer_norm(name: str, path: str) -> tuple[Weight, Weight]:
    return Weight(f"{name}.weight", f"{path}/scale", SAME), Weight(f"{name}.bias", f"{path}/bias", SAME)


def qkv_sizes(c: ModelConfig) -> tuple[int, ...]:
    return c.n_heads * c.head_size, c.n_kv_heads * c.head_size, c.n_kv_heads * c.head_size


def gate_up_sizes(c: ModelConfig) -> tuple[int, ...]:
    return c.d_ff, c.d_ff


UNQUANTIZED = {"quantization_config": (None,)}
PROJECTION_BIAS = (Field("attention_bias", "qkv_bias", False), Field("attention_bias", "o_bias", False))
GEMMA = {"norm_plus_one": True, "scale_embedding": True}
CAUSAL = {"use_bidirectional_attention": (False, None)}


def caps(logits: float, attention: float) -> tuple[Field, ...]:
    """Soft-caps and the scale of attention scores; the arguments are the defaults, null switches a cap off."""
    return (
        Field("query_pre_attn_scalar", "query_scalar", 256),
        Field("final_logit_softcapping", "logits_softcap", logits, null=0.0),
        Field("attn_logit_softcapping", "attention_softcap", attention, null=0.0),
    )


# --- the families -------------------------------------------------------------------------------------------

LLAMA = Family(
    "llama",
    architectures("Llama"),
    fields(*PROJECTION_BIAS, Field("mlp_bias", "mlp_bias", False)),
    weights(),
    fixed=UNQUANTIZED,
)
MISTRAL = Family(
    "mistral",
    architectures("Mistral"),
    fields(kv_heads=8, context=131_072),
    weights(),
    fixed=UNQUANTIZED,
    windows=Windows("all", 4096),
)
QWEN2 = Family(
    "qwen2",
    architectures("Qwen2"),
    fields(kv_heads=32, context=32_768),
    weights(),
    {"qkv_bias": True},
    UNQUANTIZED,
    Windows("late", 4096),
)
QWEN3 = Family(
    "qwen3",
    architectures("Qwen3"),
    fields(*PROJECTION_BIAS, kv_heads=32, head_dim=128, context=32_768),
    weights(),
    {"qk_norm": "head"},
    UNQUANTIZED,
    Windows("late", 4096),
)
# Gemma was always trained with the tanh approximation; its first config files say "gelu", or say it elsewhere.
GEMMA1 = Family(
    "gemma",
    architectures("Gemma"),
    fields(
        *PROJECTION_BIAS,
        Field(
            "hidden_act",
            "activation",
            "gelu_pytorch_tanh",
            {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"},
        ),
        tied=True,
        kv_heads=16,
        head_dim=256,
        context=8192,
    ),
    weights(),
    GEMMA,
    UNQUANTIZED | CAUSAL | {"hidden_activation": (None, "gelu_pytorch_tanh")},
)
GEMMA2 = Family(
    "gemma2",
    architectures("Gemma2"),
    fields(
        *PROJECTION_BIAS,
        *caps(30.0, 50.0),
        tied=True,
        kv_heads=4,
        head_dim=256,
        context=8192,
        act="hidden_activation",
        act_default="gelu_pytorch_tanh",
    ),
    weights(*sandwich("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")),
    GEMMA | {"norm_placement": "both"},
    UNQUANTIZED | CAUSAL,
    Windows("all but every", 4096, 2),
)
GEMMA3 = Family(
    "gemma3_text",
    {"lm": "Gemma3ForCausalLM", "scalar": "Gemma3TextForSequenceClassification"},
    fields(
        *PROJECTION_BIAS,
        *caps(0.0, 0.0),
        tied=True,
        kv_heads=4,
        head_dim=256,
        context=131_072,
        act="hidden_activation",
        act_default="gelu_pytorch_tanh",
    ),
    weights(*sandwich("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")),
    GEMMA | {"norm_placement": "both", "qk_norm": "head"},
    UNQUANTIZED | CAUSAL,
    Windows("all but every", 4096, 6),
    rope_theta=1_000_000.0,
    local_theta=("rope_local_base_freq", 10_000.0),
)
PHI3 = Family(
    "phi3",
    architectures("Phi3"),
    fields(context=4096, eps=1e-5),
    weights(
        *(
            Weight(
                "model.layers.{layer}.self_attn.qkv_proj.weight", f"layers/attn/{name}", rows_of(i, qkv_sizes)
            )
            for i, name in enumerate("qkv")
        ),
        *(
            Weight(
                "model.layers.{layer}.mlp.gate_up_proj.weight",
                f"layers/mlp/{name}",
                rows_of(i, gate_up_sizes),
            )
            for i, name in enumerate(("gate", "up"))
        ),
    ),
    fixed=UNQUANTIZED,
    windows=Windows("all"),
    rotary=("partial_rotary_factor", 1.0),
)
OLMO2 = Family(
    "olmo2",
    architectures("Olmo2"),
    fields(*PROJECTION_BIAS, eps=1e-5),
    weights(
        *sandwich("post_attention_layernorm", "", "post_feedforward_layernorm"),
        without=("layers/attn_norm/scale", "layers/mlp_norm/scale"),
    ),
    {"norm_placement": "post", "qk_norm": "all"},
    UNQUANTIZED,
)
MIXTRAL = Family(
    "mixtral",
    architectures("Mixtral"),
    fields(
        Field("num_local_experts", "moe.experts", 8),
        Field("num_experts_per_tok", "moe.per_token", 2),
        kv_heads=8,
        context=131_072,
        eps=1e-5,
    ),
    weights(*experts("block_sparse_moe", "w1", "w3", "w2")),
    {"moe.normalize": True},
    UNQUANTIZED,
    Windows("all"),
    rope_theta=1_000_000.0,
)
QWEN3_MOE = Family(
    "qwen3_moe",
    architectures("Qwen3Moe"),
    fields(
        *PROJECTION_BIAS,
        Field("moe_intermediate_size", "d_ff", 768),
        Field("num_experts", "moe.experts", 128, also="num_local_experts"),
        Field("num_experts_per_tok", "moe.per_token", 8),
        Field("norm_topk_prob", "moe.normalize", False),
        kv_heads=4,
        context=32_768,
    ),
    weights(*experts("mlp", "gate_proj", "up_proj", "down_proj")),
    {"qk_norm": "head"},
    UNQUANTIZED | {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    Windows("late", 4096),
)
GPT2 = Family(
    "gpt2",
    {"lm": "GPT2LMHeadModel", "scalar": "GPT2ForSequenceClassification"},
    (
        Field("vocab_size", "vocab_size"),
        Field("n_embd", "d_model"),
        Field("n_inner", "d_ff"),  # absent: 4 n_embd
        Field("n_layer", "n_layers"),
        Field("n_head", "n_heads"),
        Field("n_positions", "context", 1024),
        Field("layer_norm_epsilon", "norm_eps", 1e-5),
        Field("tie_word_embeddings", "tie_embeddings", True),
        Field("activation_function", "activation", "gelu_new", {"gelu_new": "gelu_tanh"} | ACTIVATIONS),
    ),
    (
        Weight("transformer.wte.weight", "embed/embedding", SAME),
        Weight("transformer.wpe.weight", "embed/positions", SAME),
        *layer_norm("transformer.h.{layer}.ln_1", "layers/attn_norm"),
        *(
            Weight("transformer.h.{layer}.attn.c_attn.weight", f"layers/attn/{name}", conv1d(1, i, 3))
            for i, name in enumerate("qkv")
        ),
        *(
            Weight("transformer.h.{layer}.attn.c_attn.bias", f"layers/attn/{name}_bias", part_of_bias(i, 3))
            for i, name in enumerate("qkv")
        ),
        Weight("transformer.h.{layer}.attn.c_proj.weight", "layers/attn/o", conv1d(2)),
        Weight("transformer.h.{layer}.attn.c_proj.bias", "layers/attn/o_bias", SAME),
        *layer_norm("transformer.h.{layer}.ln_2", "layers/mlp_norm"),
        Weight("transformer.h.{layer}.mlp.c_fc.weight", "layers/mlp/up", conv1d()),
        Weight("transformer.h.{layer}.mlp.c_fc.bias", "layers/mlp/up_bias", SAME),
        Weight("transformer.h.{layer}.mlp.c_proj.weight", "layers/mlp/down", conv1d()),
        Weight("transformer.h.{layer}.mlp.c_proj.bias", "layers/mlp/down_bias", SAME),
        *layer_norm("transformer.ln_f", "final_norm"),
        Weight("lm_head.weight", "lm_head/kernel", linear()),
        *SCALAR_HEAD,
    ),
    {
        "positions": "learned",
        "norm": "layer",
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "gated_mlp": False,
    },
    UNQUANTIZED
    | {
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
    prefix="transformer.",
    ignored=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",
)
NEOX_QKV = "gpt_neox.layers.{layer}.attention.query_key_value."
GPT_NEOX = Family(
    "gpt_neox",
    architectures("GPTNeoX"),
    (
        Field("vocab_size", "vocab_size"),
        Field("hidden_size", "d_model"),
        Field("intermediate_size", "d_ff"),
        Field("num_hidden_layers", "n_layers"),
        Field("num_attention_heads", "n_heads"),
        Field("max_position_embeddings", "context", 2048),
        Field("layer_norm_eps", "norm_eps", 1e-5),
        Field("tie_word_embeddings", "tie_embeddings", False),
        Field("hidden_act", "activation", "gelu", ACTIVATIONS),
        Field("use_parallel_residual", "parallel_residual", True),
        Field("attention_bias", "qkv_bias", True),
        Field("attention_bias", "o_bias", True),
    ),
    (
        Weight("gpt_neox.embed_in.weight", "embed/embedding", SAME),
        *layer_norm("gpt_neox.layers.{layer}.input_layernorm", "layers/attn_norm"),
        *(Weight(NEOX_QKV + "weight", f"layers/attn/{name}", heads_of(i)) for i, name in enumerate("qkv")),
        *(
            Weight(NEOX_QKV + "bias", f"layers/attn/{name}_bias", heads_of_bias(i))
            for i, name in enumerate("qkv")
        ),
        Weight("gpt_neox.layers.{layer}.attention.dense.weight", "layers/attn/o", linear(2)),
        Weight("gpt_neox.layers.{layer}.attention.dense.bias", "layers/attn/o_bias", SAME),
        *layer_norm("gpt_neox.layers.{layer}.post_attention_layernorm", "layers/mlp_norm"),
        Weight("gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight", "layers/mlp/up", linear()),
        Weight("gpt_neox.layers.{layer}.mlp.dense_h_to_4h.bias", "layers/mlp/up_bias", SAME),
        Weight("gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight", "layers/mlp/down", linear()),
        Weight("gpt_neox.layers.{layer}.mlp.dense_4h_to_h.bias", "layers/mlp/down_bias", SAME),
        *layer_norm("gpt_neox.final_layer_norm", "final_norm"),
        Weight("embed_out.weight", "lm_head/kernel", linear()),
        *SCALAR_HEAD,
    ),
    {"norm": "layer", "mlp_bias": True, "gated_mlp": False},
    UNQUANTIZED,
    theta_field="rotary_emb_base",
    rotary=("rotary_pct", 0.25),
    prefix="gpt_neox.",
    ignored=r"(gpt_neox\.)?layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
)

FAMILIES: dict[str, Family] = {
    f.model_type: f
    for f in (
        LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA1, GEMMA2, GEMMA3, PHI3, OLMO2, GPT2, GPT_NEOX, MIXTRAL, QWEN3_MOE
    )
}  # fmt: skip
