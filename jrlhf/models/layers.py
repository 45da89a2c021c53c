"""The decoder's layers. B batch, T tokens, S cache slots, D model, N query heads, K key-value heads,
G = N / K, H head size, F feed-forward, V vocabulary."""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jrlhf.models.attention import LayerCache, Segments, attend, by_heads, by_lengths, self_attention, written
from jrlhf.models.config import ModelConfig
from jrlhf.models.experts import INTO, OUT, combine_experts
from jrlhf.models.rope import Rotation, rotate
from jrlhf.ops.masking import Places, at_places
from jrlhf.sharding import by_hand_ways, constrain, sequence_ways


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(w: jax.Array, dtype: Any, axes: tuple[str, ...]) -> jax.Array:
    return constrain(w.astype(dtype), *(None if axis == "embed" else axis for axis in axes))


def gathered(w: jax.Array, dtype: Any, *axes: str) -> jax.Array:
    """A weight as a matrix product uses it: in the compute dtype, whole along the axis that fsdp splits. Its gradient
    is split again at once, so that the devices sum only what each of them keeps.

    Without this the partitioner may rather split the activations, and reshard them at every layer. (On a mesh there is
    no forward-mode derivative: the gradient's split is a rule of its own.)
    """
    mesh = jax.sharding.get_abstract_mesh()
    return w.astype(dtype) if mesh.empty or mesh.size == 1 else _gathered(w, dtype, axes)


_gathered.defvjp(
    lambda w, dtype, axes: (_gathered(w, dtype, axes), jnp.zeros((), w.dtype)),
    lambda dtype, axes, like, gradient: (constrain(gradient, *axes).astype(like.dtype),),
)


class View(NamedTuple):
    """What a layer sees: which keys, and by which angles they are rotated."""

    mask_BTS: jax.Array
    rotation: Rotation | None  # None: positions were added to the embedding


class Views(NamedTuple):
    full: View
    windowed: View | None  # None: no layer has a window
    segments: Segments | None = None  # None: only the masks say who sees whom

    def of(self, windowed: bool | jax.Array) -> View:
        """The view of a layer; in a scan over layers of both kinds `windowed` is a traced bool."""
        if self.windowed is None or isinstance(windowed, bool):
            return self.windowed if self.windowed is not None and windowed else self.full
        return jax.tree.map(lambda w, f: jnp.where(windowed, w, f), self.windowed, self.full)


class RMSNorm(nn.Module):
    """Over the last axis; with `norm_plus_one` the parameter is the scale's difference from 1 (Gemma)."""

    config: ModelConfig
    axes: tuple[str, ...] = ("norm",)

    @nn.compact
    def __call__(self, x):
        c = self.config
        n = len(self.axes)
        init = nn.initializers.zeros if c.norm_plus_one else nn.initializers.ones
        scale = self.param("scale", logical(init, *self.axes), x.shape[-n:], jnp.dtype(c.param_dtype))
        scale = scale.astype(jnp.float32) + (1.0 if c.norm_plus_one else 0.0)
        x32 = x.astype(jnp.float32)
        axes = tuple(range(-n, 0))
        y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=axes, keepdims=True) + c.norm_eps)
        return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)


class LayerNorm(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        c, dtype = self.config, jnp.dtype(self.config.param_dtype)
        scale_D = self.param("scale", logical(nn.initializers.ones, "norm"), (x.shape[-1],), dtype)
        bias_D = self.param("bias", logical(nn.initializers.zeros, "norm"), (x.shape[-1],), dtype)
        x32 = x.astype(jnp.float32)
        y = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + c.norm_eps)
        scale, bias = (jnp.broadcast_to(w.astype(jnp.float32), y.shape) for w in (scale_D, bias_D))
        return (y * scale + bias).astype(x.dtype)


def norm(config: ModelConfig, name: str) -> nn.Module:
    return (RMSNorm if config.norm == "rms" else LayerNorm)(config, name=name)


def product(x: jax.Array, w: jax.Array, inputs: int, dtype: Any = None) -> jax.Array:
    """x [..., inputs] times w [inputs, outputs], of which `inputs` axes are summed over, as a product of two matrices.
    dtype: of the result (None: that of x and w).

    Left to contract rows and tokens for a weight's gradient, XLA on a CPU first writes out transposed activations,
    which takes longer than the product. (Rows and lengths that are both split over devices cannot become one axis.)
    """
    n, outer = math.prod(x.shape[-inputs:]), x.shape[:-inputs]
    rows = (-1,) if sequence_ways() == 1 else outer
    y = jnp.matmul(x.reshape(*rows, n), w.reshape(n, -1), preferred_element_type=dtype)
    return y.reshape(*outer, *w.shape[inputs:])


def linear(
    module: nn.Module,
    name: str,
    x: jax.Array,
    inputs: tuple[str, ...],
    outputs: dict[str, int],
    bias: bool = False,
) -> jax.Array:
    """x [B, T, inputs...] times a weight `name` [inputs..., outputs...] -> [B, T, outputs...].

    `inputs` and `outputs` are logical axes. Where the config's adapters name this layer, a low-rank product is added:
    parameters `<name>_lora_a` [inputs..., rank] and `<name>_lora_b` [rank, outputs...], B starting at zero.
    """
    c: ModelConfig = module.config  # type: ignore[attr-defined]
    dtype, param_dtype, n = x.dtype, jnp.dtype(c.param_dtype), len(inputs)
    shape_in, shape_out, axes = x.shape[-n:], tuple(outputs.values()), (*inputs, *outputs)
    init = fan_in(tuple(range(n)))
    w = module.param(name, logical(init, *axes), (*shape_in, *shape_out), param_dtype)
    y = product(x, gathered(w, dtype, *axes), n)
    if bias:
        b = module.param(f"{name}_bias", logical(nn.initializers.zeros, *outputs), shape_out, param_dtype)
        y = y + jnp.broadcast_to(b.astype(dtype), y.shape)
    if f"{module.name}/{name}" in c.adapted_layers:
        a_axes, b_axes = (*inputs, "rank"), ("rank", *outputs)
        a = module.param(f"{name}_lora_a", logical(init, *a_axes), (*shape_in, c.lora.rank), jnp.float32)
        b = module.param(
            f"{name}_lora_b", logical(nn.initializers.zeros, *b_axes), (c.lora.rank, *shape_out), jnp.float32
        )
        down = product(x, gathered(a, dtype, *a_axes), n)
        y = y + product(down, gathered(b, dtype, *b_axes), 1) * jnp.asarray(c.lora.scale, dtype)
    return y


class Attention(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD,
        view: View,
        segments: Segments | None,
        windowed,
        cache: LayerCache | None,
        slot,
        prefix: LayerCache | None,
        at: Places,
    ):
        """-> (what was attended to, keys). Without a cache T = S and the keys are this call's own. With one, the T keys
        are written at `slot`. With a prefix, A rows next to each other see one row of it before their own keys. Only
        the tokens `at` some places ask (without a cache)."""
        c = self.config
        n, k, h = c.n_heads, c.n_kv_heads, c.head_size
        asking_BTD = at_places(x_BTD, at)
        q = linear(self, "q", asking_BTD, ("embed",), {"heads": n, "head_dim": h}, c.qkv_bias)
        key = linear(self, "k", x_BTD, ("embed",), {"kv_heads": k, "head_dim": h}, c.qkv_bias)
        value = linear(self, "v", x_BTD, ("embed",), {"kv_heads": k, "head_dim": h}, c.qkv_bias)
        if c.qk_norm != "none":
            by_head = c.qk_norm == "head"
            q = RMSNorm(c, ("head_dim",) if by_head else ("heads", "head_dim"), name="q_norm")(q)
            key = RMSNorm(c, ("head_dim",) if by_head else ("kv_heads", "head_dim"), name="k_norm")(key)
        if view.rotation is not None:
            q = rotate(q, Rotation(*(at_places(x, at) for x in view.rotation)))
            key = rotate(key, view.rotation)
        q, key, value = (
            checkpoint_name(x, name) for x, name in ((q, "query"), (key, "key"), (value, "value"))
        )
        scale = (c.query_scalar or h) ** -0.5
        if cache is not None:
            cache = written(cache, key, value, slot)
            out = attend(q, cache, view.mask_BTS, scale, c.attention_softcap, prefix)
        else:
            q, key, value = by_heads(q, key, value)
            cache = LayerCache(key.swapaxes(1, 2), value.swapaxes(1, 2))
            if at is None:
                out = self_attention(c, q, cache, view.mask_BTS, segments, windowed, scale, prefix)
            else:  # the kernels want all queries
                mask_BAS = at_places(view.mask_BTS, at)
                out = attend(q, cache, mask_BAS, scale, c.attention_softcap, prefix)
                out = checkpoint_name(out, "attention")
            out = by_lengths(out)
        return linear(self, "o", out, ("heads", "head_dim"), {"embed": c.d_model}, c.o_bias), cache


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class MLP(nn.Module):
    """SwiGLU and its relatives (Shazeer 2020), or two plain layers."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        hidden = {"mlp": c.d_ff}
        act = ACTIVATIONS[c.activation]
        up_BTF = checkpoint_name(linear(self, "up", x_BTD, ("embed",), hidden, c.mlp_bias), "up")
        if c.gated_mlp:
            gate_BTF = checkpoint_name(linear(self, "gate", x_BTD, ("embed",), hidden, c.mlp_bias), "gate")
            h_BTF = act(gate_BTF) * up_BTF
        else:
            h_BTF = act(up_BTF)
        h_BTF = constrain(h_BTF, "batch", "length", "mlp")
        return linear(self, "down", h_BTF, ("mlp",), {"embed": c.d_model}, c.mlp_bias)


class Experts(nn.Module):
    """A router and gated experts (Shazeer et al. 2017). Also returns what the load-balancing loss needs:
    [2, E] float32, each expert's share of the real tokens' choices and its mean probability."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD, real_BT):
        c, dtype = self.config, x_BTD.dtype
        e, d, f, param_dtype = c.moe.experts, c.d_model, c.d_ff, jnp.dtype(c.param_dtype)
        router_DE = self.param("router", logical(fan_in((0,)), "embed", "router"), (d, e), param_dtype)
        here = e // by_hand_ways("expert")  # while answers are sampled, a device's own are all that it sees
        gate = self.param("gate", logical(fan_in((1,)), *INTO), (here, d, f), param_dtype)
        up = self.param("up", logical(fan_in((1,)), *INTO), (here, d, f), param_dtype)
        down = self.param("down", logical(fan_in((1,)), *OUT), (here, f, d), param_dtype)

        logits_BTE = jnp.einsum(
            "BTD,DE->BTE",
            x_BTD,
            gathered(router_DE, dtype, "embed", "router"),
            preferred_element_type=jnp.float32,
        )
        probs_BTE = jax.nn.softmax(logits_BTE)
        weights_BTk, chosen_BTk = jax.lax.top_k(probs_BTE, c.moe.per_token)
        if c.moe.normalize:
            weights_BTk = weights_BTk / jnp.sum(weights_BTk, axis=-1, keepdims=True)
        y_BTD = combine_experts(
            x_BTD,
            weights_BTk.astype(dtype),
            chosen_BTk,
            gathered(gate, dtype, *INTO),
            gathered(up, dtype, *INTO),
            gathered(down, dtype, *OUT),
            ACTIVATIONS[c.activation],
        )
        real_BT1 = real_BT[..., None].astype(jnp.float32)
        count = jnp.maximum(jnp.sum(real_BT1), 1.0)
        share_E = jnp.sum(jax.nn.one_hot(chosen_BTk, e).sum(2) * real_BT1, axis=(0, 1)) / count
        return y_BTD, jnp.stack([share_E, jnp.sum(probs_BTE * real_BT1, axis=(0, 1)) / count])


class Block(nn.Module):
    """Attention and feed-forward around a residual stream. Training and sampling both call this."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD,
        windowed,
        views: Views,
        cache: LayerCache | None = None,
        slot=None,
        prefix=None,
        at: Places = None,
    ):
        """-> (x, (new cache or None, balance [2, E] or None)). x is computed `at` some places of each row."""
        c = self.config
        before = lambda name, x: x if c.norm_placement == "post" else norm(c, name)(x)  # noqa: E731
        after = lambda name, x: x if c.norm_placement == "pre" else norm(c, name)(x)  # noqa: E731
        view = views.of(windowed)

        attended, cache = Attention(c, name="attn")(
            before("attn_norm", x_BTD), view, views.segments, windowed, cache, slot, prefix, at
        )
        x_BTD = at_places(x_BTD, at)
        attended = after("attn_out_norm", attended)
        x_after_BTD = constrain(x_BTD + attended, "batch", "length", "act_embed")
        normed = before("mlp_norm", x_BTD if c.parallel_residual else x_after_BTD)
        if c.moe.experts:
            real_BT = jnp.any(view.mask_BTS, axis=-1)  # padding sees nothing
            out, balance = Experts(c, name="moe")(normed, real_BT)
        else:
            out, balance = MLP(c, name="mlp")(normed), None
        x_BTD = x_after_BTD + after("mlp_out_norm", out)
        return constrain(x_BTD, "batch", "length", "act_embed"), (cache, balance)
