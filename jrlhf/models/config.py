"""The decoder's shape and numerics."""

from dataclasses import dataclass
from typing import Literal

from jrlhf.config import UserError


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-like decoder. Parameters are float32; `dtype` is what matrix products run in."""

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
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "dots"] = "none"  # what the backward pass recomputes
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    logits_chunk: int = 0  # positions whose logits are alive at a time; 0: all (small vocabularies)

    def __post_init__(self):
        if not self.head_dim:
            if self.d_model % self.n_heads:
                raise UserError(
                    f"model.d_model {self.d_model} is not divisible by model.n_heads {self.n_heads}"
                )
            object.__setattr__(self, "head_dim", self.d_model // self.n_heads)
        for name in ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "context"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name} must be positive, got {getattr(self, name)}")
        if self.vocab_size < 0 or self.logits_chunk < 0:
            raise UserError("model.vocab_size and model.logits_chunk must not be negative")
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"model.n_heads {self.n_heads} is not a multiple of model.n_kv_heads {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim {self.head_dim} must be even (rotary pairs)")

    @property
    def n_params(self) -> int:
        """Parameters of the language model."""
        attention = self.d_model * self.head_dim * (2 * self.n_heads + 2 * self.n_kv_heads)
        layer = attention + 3 * self.d_model * self.d_ff + 2 * self.d_model
        embeddings = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return self.n_layers * layer + embeddings + self.d_model
