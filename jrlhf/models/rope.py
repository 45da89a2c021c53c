"""Rotary position embedding (Su et al. 2021), and its frequencies for contexts longer than pretraining's."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.models.config import ModelConfig, RopeScaling


class Rotation(NamedTuple):
    """Sines and cosines of every position's angles, [B, T, rotary_dim / 2] float32."""

    sin_BTh: jax.Array
    cos_BTh: jax.Array


def rotation(config: ModelConfig, positions_BT: jax.Array, windowed: bool) -> Rotation:
    """Once per forward pass: every layer of a kind turns by the same angles."""
    freq_h, factor = frequencies(config, windowed)
    angle_BTh = positions_BT[:, :, None].astype(jnp.float32) * jnp.asarray(freq_h)[None, None]
    return Rotation(jnp.sin(angle_BTh) * factor, jnp.cos(angle_BTh) * factor)


def rotate(x_BTNH: jax.Array, rotation: Rotation) -> jax.Array:
    """The leading `rotary_dim` dimensions turned in halves, as Hugging Face has it. In float32."""
    half = rotation.sin_BTh.shape[-1]
    sin, cos = rotation.sin_BTh[:, :, None], rotation.cos_BTh[:, :, None]
    x = x_BTNH.astype(jnp.float32)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x_BTNH.dtype)


def frequencies(config: ModelConfig, windowed: bool = False) -> tuple[np.ndarray, float]:
    """(radians per position [rotary_dim / 2] float32, factor of sine and cosine)."""
    own = windowed and config.window_rope_theta > 0
    theta = config.window_rope_theta if own else config.rope_theta
    dim = config.rotary_size
    freq = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = RopeScaling() if own else config.rope_scaling
    original = scaling.original_context or config.context
    if scaling.kind == "linear":
        freq = freq / scaling.factor
    elif scaling.kind == "llama3":
        # Blend by how many wavelengths fit the original context: fewer than `low` are stretched, more than `high` kept.
        fits = original * freq / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((fits - low) / (high - low), 0.0, 1.0)
        freq = keep * freq + (1 - keep) * freq / scaling.factor
    elif scaling.kind == "yarn":
        # The index of the pair that turns `beta` times in the original context (Peng et al. 2023, section 3.2).
        index = lambda beta: dim * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(theta))  # noqa: E731
        low, high = index(scaling.beta_fast), index(scaling.beta_slow)
        if scaling.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
        freq = (1 - ramp) * freq + ramp * freq / scaling.factor
        return freq.astype(np.float32), scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return freq.astype(np.float32), 1.0
