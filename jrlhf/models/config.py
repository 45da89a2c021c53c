"""The decoder's shape and numerics. One config expresses every family of `models/hf.py`."""

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal

from jrlhf.config import UserError

# fmt: off
Remat = Literal[
    "auto", "none", "full", "dots", "attention", "mlp", "attention_mlp", "offload_attention", "offload_attention_mlp",
]
# fmt: on
AttentionKernel = Literal["auto", "xla", "cudnn", "splash"]
CacheDtype = Literal["auto", "float32", "bfloat16", "int8", "float8_e4m3fn"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context that a model was pretrained on.

    linear: positions divided by `factor` (Chen et al. 2023). llama3: long wavelengths divided by `factor`, short ones
    kept, blended between (Llama 3.1). yarn: the same idea by rotations (Peng et al. 2023), with the attention
    temperature `attention_factor`.
    """

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_context: int = 0  # llama3, yarn: the context of pretraining; 0: the model's
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: more rotations than this in the original context keep their frequency
    beta_slow: float = 1.0  # yarn: fewer than this are divided by `factor`
    attention_factor: float = 0.0  # yarn: multiplies sine and cosine; 0: 0.1 ln(factor) + 1
    truncate: bool = True  # yarn: the ramp starts and ends at whole frequencies


@dataclass(frozen=True)
class MoEConfig:
    """Experts in place of one feed-forward layer. No token is ever dropped."""

    experts: int = 0  # 0: a dense feed-forward layer
    per_token: int = 2  # how many experts see each token
    normalize: bool = True  # the chosen experts' weights sum to 1


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al. 2021): y = x W + (alpha / rank) x A B, with W frozen."""

    rank: int = 0  # 0: no adapters
    alpha: float = 16.0
    # linear layers, by name or pattern: q, k, v, o, gate, up, down, "attn/*", "mlp/*", ...; (): all that the model has
    targets: tuple[str, ...] = ()
    rank_stabilized: bool = False  # alpha / sqrt(rank) (Kalajdzievski 2023)

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder. The defaults are a small Llama; `dtype` is what matrix products run in."""

    vocab_size: int = 0  # 0: taken from the tokenizer
    d_model: int = 96
    n_layers: int = 3
    n_heads: int = 4
    n_kv_heads: int = 4
    head_dim: int = 0  # 0: d_model / n_heads
    d_ff: int = 256
    context: int = 512  # longest sequence, in tokens
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    # numerics
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    # what of a layer is kept for the backward pass: all, only its input, or also some products (see REMAT)
    remat: Remat = "auto"
    attention: AttentionKernel = "auto"  # the kernel of passes without a cache
    # what sampling keeps keys and values in; auto: as they are computed. 8 bits have a scale by token and head
    cache_dtype: CacheDtype = "auto"
    logits_chunk: int = (
        0  # positions whose logits are alive at a time; 0: by the device (`Model.logits_chunk`)
    )
    vocab_multiple: int = (
        1  # embedding rows are padded to a multiple of this, so that they divide over a mesh
    )
    # what other families do otherwise
    hf_family: str = "llama"  # the table of models/hf.py by which a checkpoint is written
    positions: Literal["rope", "learned"] = "rope"
    rotary_dim: int = 0  # leading dimensions of a head that rotate; 0: all
    rope_scaling: RopeScaling = RopeScaling()
    window: int = 0  # keys that a windowed layer sees, the token itself included; 0: all
    windowed: tuple[bool, ...] = ()  # which layers are windowed; (): all, where `window` is set
    window_rope_theta: float = 0.0  # windowed layers' own base, without rope_scaling; 0: as the other layers
    norm: Literal["rms", "layer"] = "rms"
    norm_plus_one: bool = False  # the scale is kept as its difference from 1
    norm_placement: Literal["pre", "post", "both"] = "pre"  # around attention and feed-forward
    qk_norm: Literal["none", "head", "all"] = "none"  # RMSNorm of queries and keys, by head or over all heads
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    parallel_residual: bool = False  # attention and feed-forward both read the block's input
    scale_embedding: bool = False  # by sqrt(d_model)
    query_scalar: float = 0.0  # attention scores are divided by its root; 0: head_dim
    attention_softcap: float = 0.0  # scores -> cap tanh(scores / cap)
    logits_softcap: float = 0.0
    moe: MoEConfig = MoEConfig()
    lora: LoRAConfig = LoRAConfig()

    def __post_init__(self):
        for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "context", "vocab_multiple"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name} must be positive, got {getattr(self, name)}")
        for name in ("vocab_size", "logits_chunk", "head_dim", "rotary_dim", "window"):
            if getattr(self, name) < 0:
                raise UserError(f"model.{name} must not be negative, got {getattr(self, name)}")
        if not self.head_dim and self.d_model % self.n_heads:
            raise UserError(f"model.d_model {self.d_model} is not divisible by model.n_heads {self.n_heads}")
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"model.n_heads {self.n_heads} is not a multiple of model.n_kv_heads {self.n_kv_heads}"
            )
        if self.positions == "rope" and (self.rotary_size % 2 or self.rotary_size > self.head_size):
            name = "rotary_dim" if self.rotary_dim else "head_dim"
            raise UserError(
                f"model.{name} {self.rotary_size} must be even (pairs rotate), and rotary_dim at most head_dim"
            )
        if self.windowed and len(self.windowed) != self.n_layers:
            raise UserError(
                f"model.windowed names {len(self.windowed)} layers, but there are {self.n_layers}"
            )
        if any(self.windowed) and not self.window:
            raise UserError(f"model.windowed layers need a positive model.window, got {self.window}")
        if self.attention == "cudnn" and self.attention_softcap:
            raise UserError("model.attention: cuDNN has no soft-cap; use xla")
        if self.attention == "cudnn" and self.dtype == "float32":
            raise UserError("model.attention: cuDNN has no float32; use xla, or model.dtype bfloat16")
        if self.cache_dtype == "float32" and self.dtype == "bfloat16":
            raise UserError(
                "model.cache_dtype float32 would keep zeros: keys are computed in model.dtype bfloat16"
            )
        if self.moe.experts and "mlp" in self.remat:
            raise UserError(f"model.remat {self.remat}: experts keep no activations; use attention")
        if self.moe.experts and not 0 < self.moe.per_token <= self.moe.experts:
            raise UserError(f"model.moe.per_token {self.moe.per_token} of {self.moe.experts} experts")
        if self.moe.experts and (self.mlp_bias or not self.gated_mlp):
            raise UserError("model.moe: experts are gated and have no bias")
        if self.lora.rank < 0:
            raise UserError(f"model.lora.rank must not be negative, got {self.lora.rank}")
        for pattern in self.lora.targets:
            if not _matching((pattern,), self.linear_layers):
                raise UserError(
                    f"model.lora.targets: {pattern!r} is no linear layer of this model; "
                    f"there are {', '.join(self.linear_layers)}"
                )

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Layers that can have an adapter. Experts cannot."""
        attention = ("attn/q", "attn/k", "attn/v", "attn/o")
        if self.moe.experts:
            return attention
        return (*attention, *(("mlp/gate",) if self.gated_mlp else ()), "mlp/up", "mlp/down")

    @property
    def adapted_layers(self) -> tuple[str, ...]:
        """Layers that do have one."""
        if not self.lora.rank:
            return ()
        return _matching(self.lora.targets, self.linear_layers) if self.lora.targets else self.linear_layers

    @property
    def head_size(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def kept_dtype(self) -> str:
        """Of keys and values in a cache."""
        return self.dtype if self.cache_dtype == "auto" else self.cache_dtype

    @property
    def rotary_size(self) -> int:
        return self.rotary_dim or self.head_size

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def layers_windowed(self) -> tuple[bool, ...]:
        """Of each layer, whether it sees a window only."""
        return self.windowed or (self.window > 0,) * self.n_layers

    @property
    def n_params(self) -> int:
        """Parameters of the language model."""
        from jrlhf.models.transformer import Model  # the layers themselves know best

        return Model(self).n_params


def _matching(patterns: tuple[str, ...], layers: tuple[str, ...]) -> tuple[str, ...]:
    """Layers ("attn/q") that a pattern names, by their whole name or its last part."""
    named = lambda layer, p: fnmatch(layer, p) or fnmatch(layer.split("/")[1], p)  # noqa: E731
    return tuple(layer for layer in layers if any(named(layer, p) for p in patterns))
