"""The decoder's layers. B batch, T tokens, S cache slots, D model, N query heads, K key-value heads,
G = N / K, H head size, F feed-forward, V vocabulary."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jrlhf.models.config import ModelConfig
from jrlhf.sharding import constrain


class LayerCache(NamedTuple):
    """Keys and values of one layer. `[B, K, S, H]` is the layout that decodes fastest."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array


def logical(init, *axes):
    return nn.with_logical_partitioning(init, axes)


def fan_in(axes: tuple[int, ...]) -> Any:
    """Truncated normal with variance 1 / fan-in, the fan-in being the product of these axes."""

    def init(key, shape, dtype):
        # Every other axis is an output: flax would count one that is neither into the fan-in.
        outputs = tuple(i for i in range(len(shape)) if i not in axes)
        scaled = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=axes, out_axis=outputs
        )
        return scaled(key, shape, dtype)

    return init


def rope(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021) on halves, as Hugging Face Llama has it. Angles in float32."""
    half = x_BTNH.shape[-1] // 2
    freq_h = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1h = positions_BT[:, :, None, None].astype(jnp.float32) * freq_h[None, None, None, :]
    sin, cos = jnp.sin(angle_BT1h), jnp.cos(angle_BT1h)
    x = x_BTNH.astype(jnp.float32)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def gathered(w: jax.Array, dtype: Any, *axes: str) -> jax.Array:
    """A weight as a matrix product uses it: in the compute dtype, whole along the axis that fsdp splits.

    Without this the partitioner may rather split the activations, and reshard them at every layer.
    """
    return constrain(w.astype(dtype), *(None if axis == "embed" else axis for axis in axes))


class RMSNorm(nn.Module):
    eps: float

    @nn.compact
    def __call__(self, x):
        scale_D = self.param("scale", logical(nn.initializers.ones, "norm"), (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return (y * jnp.broadcast_to(scale_D, y.shape)).astype(x.dtype)


def attend(q_BTNH, cache: LayerCache, mask_BTS) -> jax.Array:
    """Attention of T queries over S keys. Scores and softmax in float32.

    jax.nn.dot_product_attention's own XLA path has no gradient in bfloat16 under strict type promotion.
    """
    b, t, n, h = q_BTNH.shape
    k = cache.k_BKSH.shape[1]
    q_BTKGH = q_BTNH.reshape(b, t, k, n // k, h) * jnp.asarray(h**-0.5, q_BTNH.dtype)
    s_BKGTS = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, cache.k_BKSH, preferred_element_type=jnp.float32)
    s_BKGTS = jnp.where(mask_BTS[:, None, None], s_BKGTS, jnp.float32(-1e30))
    p_BKGTS = jax.nn.softmax(s_BKGTS, axis=-1).astype(q_BTNH.dtype)
    return jnp.einsum("BKGTS,BKSH->BTKGH", p_BKGTS, cache.v_BKSH).reshape(b, t, n, h)


def attention_implementation(config: ModelConfig) -> str:
    """cuDNN's kernel on a GPU (16-bit only), XLA's elsewhere, unless the config names one."""
    if config.attention != "auto":
        return config.attention
    return "cudnn" if jax.default_backend() == "gpu" and config.dtype == "bfloat16" else "xla"


class Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, positions_BT, mask_BTS, cache: LayerCache | None, slot):
        """Without a cache T = S and keys are this call's own. With one, the T keys are written at `slot`."""
        c, dtype = self.config, x_BTD.dtype
        d, n, k, h = c.d_model, c.n_heads, c.n_kv_heads, c.head_dim
        wq = self.param("q", logical(fan_in((0,)), "embed", "heads", "head_dim"), (d, n, h), jnp.float32)
        wk = self.param("k", logical(fan_in((0,)), "embed", "kv_heads", "head_dim"), (d, k, h), jnp.float32)
        wv = self.param("v", logical(fan_in((0,)), "embed", "kv_heads", "head_dim"), (d, k, h), jnp.float32)
        wo = self.param("o", logical(fan_in((0, 1)), "heads", "head_dim", "embed"), (n, h, d), jnp.float32)
        q = jnp.einsum("BTD,DNH->BTNH", x_BTD, gathered(wq, dtype, "embed", "heads", "head_dim"))
        key = jnp.einsum("BTD,DKH->BTKH", x_BTD, gathered(wk, dtype, "embed", "kv_heads", "head_dim"))
        value = jnp.einsum("BTD,DKH->BTKH", x_BTD, gathered(wv, dtype, "embed", "kv_heads", "head_dim"))
        q = rope(q, positions_BT, c.rope_theta)
        key = rope(key, positions_BT, c.rope_theta)
        if cache is None:
            q = constrain(q, "batch", "length", "heads", "head_dim")
            if attention_implementation(c) == "cudnn":
                mask_B1TS = mask_BTS[:, None]
                out = jax.nn.dot_product_attention(q, key, value, mask=mask_B1TS, implementation="cudnn")
            else:
                out = attend(q, LayerCache(key.swapaxes(1, 2), value.swapaxes(1, 2)), mask_BTS)
        else:
            zero = jnp.zeros((), slot.dtype)
            at = (zero, zero, slot, zero)
            cache = LayerCache(
                jax.lax.dynamic_update_slice(cache.k_BKSH, key.swapaxes(1, 2).astype(cache.k_BKSH.dtype), at),
                jax.lax.dynamic_update_slice(
                    cache.v_BKSH, value.swapaxes(1, 2).astype(cache.v_BKSH.dtype), at
                ),
            )
            out = attend(q, cache, mask_BTS)
        return jnp.einsum("BTNH,NHD->BTD", out, gathered(wo, dtype, "heads", "head_dim", "embed")), cache


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD):
        c, dtype = self.config, x_BTD.dtype
        gate = self.param("gate", logical(fan_in((0,)), "embed", "mlp"), (c.d_model, c.d_ff), jnp.float32)
        up = self.param("up", logical(fan_in((0,)), "embed", "mlp"), (c.d_model, c.d_ff), jnp.float32)
        down = self.param("down", logical(fan_in((0,)), "mlp", "embed"), (c.d_ff, c.d_model), jnp.float32)
        h_BTF = jax.nn.silu(x_BTD @ gathered(gate, dtype, "embed", "mlp")) * (
            x_BTD @ gathered(up, dtype, "embed", "mlp")
        )
        return constrain(h_BTF, "batch", "length", "mlp") @ gathered(down, dtype, "mlp", "embed")


class Block(nn.Module):
    """Pre-norm attention and feed-forward. Training and sampling both call this."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, positions_BT, mask_BTS, cache: LayerCache | None = None, slot=None):
        eps = self.config.norm_eps
        normed = RMSNorm(eps, name="attn_norm")(x_BTD)
        attended, cache = Attention(self.config, name="attn")(normed, positions_BT, mask_BTS, cache, slot)
        x_BTD = constrain(x_BTD + attended, "batch", "length", "act_embed")
        x_BTD = x_BTD + MLP(self.config, name="mlp")(RMSNorm(eps, name="mlp_norm")(x_BTD))
        return constrain(x_BTD, "batch", "length", "act_embed"), cache
