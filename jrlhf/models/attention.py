"""Attention by the best kernel that there is for a device, and the keys and values that it reads. Letters as in
`layers`."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jrlhf.config import UserError
from jrlhf.models.config import ModelConfig
from jrlhf.ops.masking import lengthened
from jrlhf.sharding import constrain, map_shards, sequence_ways

LANES = 128  # a TPU kernel's blocks are multiples of this


class LayerCache(NamedTuple):
    """Keys and values of one layer. `[B, K, S, H]` is the layout that decodes fastest.

    In 8 bits each token's key (value) of each head has a float32 scale, by which it is to be multiplied.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    k_scale_BKS1: jax.Array | tuple[()] = ()
    v_scale_BKS1: jax.Array | tuple[()] = ()


class Segments(NamedTuple):
    """The texts that queries and keys belong to; 0 is padding. A token sees earlier ones of its own."""

    q_BT: jax.Array
    k_BS: jax.Array


def empty_cache(config: ModelConfig, rows: int, slots: int) -> LayerCache:
    """A layer's cache, of zeros, in the config's `cache_dtype`."""
    shape, dtype = (rows, config.n_kv_heads, slots, config.head_size), jnp.dtype(config.kept_dtype)
    zeros = lambda *args: constrain(jnp.zeros(*args), "batch", "kv_heads", None, None)  # noqa: E731
    if dtype.itemsize > 1:
        return LayerCache(zeros(shape, dtype), zeros(shape, dtype))
    scales = lambda: zeros((*shape[:3], 1), jnp.float32)  # noqa: E731
    return LayerCache(zeros(shape, dtype), zeros(shape, dtype), scales(), scales())


def written(cache: LayerCache, key_BTKH: jax.Array, value_BTKH: jax.Array, slot: jax.Array) -> LayerCache:
    """The cache with the keys and values of T tokens in the slots from `slot` on."""
    k, v = key_BTKH.swapaxes(1, 2), value_BTKH.swapaxes(1, 2)
    dtype, zero = cache.k_BKSH.dtype, jnp.zeros((), slot.dtype)
    if dtype.itemsize > 1:
        new = LayerCache(k.astype(dtype), v.astype(dtype))
    else:
        (k, k_scale), (v, v_scale) = quantized(k, dtype), quantized(v, dtype)
        new = LayerCache(k, v, k_scale, v_scale)
    write = lambda old, new: jax.lax.dynamic_update_slice(old, new, (zero, zero, slot, zero))  # noqa: E731
    return jax.tree.map(write, cache, new)


def quantized(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """(values [..., H] in 8 bits, scales [..., 1] float32) with x ≈ values * scales.

    Each vector's largest entry becomes the largest number of the type: int8's 127, float8_e4m3fn's 448.
    """
    integer = jnp.issubdtype(dtype, jnp.integer)
    most = float(jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / most
    scale = jnp.where(scale > 0, scale, 1.0)
    x = x / scale
    return (jnp.round(x) if integer else x).astype(dtype), scale


def attend(
    q_BTNH,
    cache: LayerCache,
    mask_BTS,
    scale: float,
    softcap: float = 0.0,
    prefix: LayerCache | None = None,
    causal: bool = False,
) -> jax.Array:
    """Attention of T queries over S keys. Scores and softmax in float32.

    prefix: keys of B / A rows that come before those of `cache`; A rows next to each other attend to the same ones.
    Scales of 8-bit keys multiply scores, those of values probabilities: no cache is ever made of floats.
    causal: query i sees no key of `cache` behind i. Queries then go in up to 4 blocks of at least 64, each over the
    keys up to its own end: the scores that the mask would take away are mostly not computed.

    jax.nn.dot_product_attention's own XLA path has no gradient in bfloat16 under strict type promotion.
    """
    t, before = q_BTNH.shape[1], 0 if prefix is None else prefix.k_BKSH.shape[2]
    blocks = min(4, t // 64) if causal else 1
    if blocks < 2:
        return _attend_block(q_BTNH, cache, mask_BTS, scale, softcap, prefix)
    ends = [t * (i + 1) // blocks for i in range(blocks)]
    outs = []
    for start, end in zip([0, *ends], ends, strict=False):
        so_far = jax.tree.map(lambda x, end=end: x[:, :, :end], cache)
        mask = mask_BTS[:, start:end, : before + end]
        outs.append(_attend_block(q_BTNH[:, start:end], so_far, mask, scale, softcap, prefix))
    return jnp.concatenate(outs, axis=1)


def _attend_block(
    q_BTNH, cache: LayerCache, mask_BTS, scale: float, softcap: float, prefix: LayerCache | None
) -> jax.Array:
    b, t, n, h = q_BTNH.shape
    k, dtype = cache.k_BKSH.shape[1], q_BTNH.dtype
    g = n // k
    # Queries of a key's heads are rows of one matrix: what is transposed is small, and scores never are.
    q_BTKGH = q_BTNH.reshape(b, t, k, g, h) * jnp.asarray(scale, dtype)
    q_BKQH = q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(b, k, g * t, h)
    k_BKSH, v_BKSH = cache.k_BKSH.astype(dtype), cache.v_BKSH.astype(dtype)
    s_BKQS = jnp.einsum("BKQH,BKSH->BKQS", q_BKQH, k_BKSH, preferred_element_type=jnp.float32)
    s_BKGTS = _scaled(s_BKQS.reshape(b, k, g, t, -1), cache.k_scale_BKS1)
    if prefix is not None:
        c, _, p, _ = prefix.k_BKSH.shape
        q_CAKQH = q_BKQH.reshape(c, b // c, k, g * t, h)
        k_CKPH, v_CKPH = prefix.k_BKSH.astype(dtype), prefix.v_BKSH.astype(dtype)
        s_CAKQP = jnp.einsum("CAKQH,CKPH->CAKQP", q_CAKQH, k_CKPH, preferred_element_type=jnp.float32)
        s_CAKGTP = _scaled(s_CAKQP.reshape(c, b // c, k, g, t, p), prefix.k_scale_BKS1)
        s_BKGTS = jnp.concatenate([s_CAKGTP.reshape(b, k, g, t, p), s_BKGTS], axis=-1)
    if softcap:
        s_BKGTS = jnp.tanh(s_BKGTS / softcap) * softcap
    s_BKGTS = jnp.where(mask_BTS[:, None, None], s_BKGTS, jnp.float32(-1e30))
    p_BKGTS = jax.nn.softmax(s_BKGTS, axis=-1)
    own_BKGTS = p_BKGTS if prefix is None else p_BKGTS[..., p:]
    own_BKQS = _scaled(own_BKGTS, cache.v_scale_BKS1).astype(dtype).reshape(b, k, g * t, -1)
    out_BKQH = jnp.einsum("BKQS,BKSH->BKQH", own_BKQS, v_BKSH)
    if prefix is not None:
        p_CAKGTP = p_BKGTS[..., :p].reshape(c, b // c, k, g, t, p)
        p_CAKQP = _scaled(p_CAKGTP, prefix.v_scale_BKS1).astype(dtype).reshape(c, b // c, k, g * t, p)
        out_CAKQH = jnp.einsum("CAKQP,CKPH->CAKQH", p_CAKQP, v_CKPH)
        out_BKQH = out_BKQH + out_CAKQH.reshape(b, k, g * t, h)
    return out_BKQH.reshape(b, k, g, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def _scaled(x: jax.Array, scale_BKS1: jax.Array | tuple[()]) -> jax.Array:
    """x [B, K, G, T, S] or [B, A, K, G, T, S] times the scale of each key."""
    if isinstance(scale_BKS1, tuple):
        return x
    b, k, s, _ = scale_BKS1.shape
    return x * scale_BKS1.reshape(b, *(1,) * (x.ndim - 5), k, 1, 1, s)


def by_heads(
    q_BTNH: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values as attention takes them. Where the mesh splits lengths, each device gets whole lengths
    of some heads instead (Jacobs et al. 2023, DeepSpeed-Ulysses), so that any kernel runs as it is, and all devices
    have the same to do. Keys' heads are repeated where they are fewer than the devices.

    UserError where queries' heads do not divide.
    """
    if (ways := sequence_ways()) == 1:
        return constrain(q_BTNH, "batch", "length", "heads", "head_dim"), key_BTKH, value_BTKH
    tensor = jax.sharding.get_abstract_mesh().shape["tensor"]
    check_heads(q_BTNH.shape[2], ways, tensor)
    more = ways // math.gcd(key_BTKH.shape[2] // tensor, ways)

    def split(x):
        # Said twice, so that what is exchanged is this array, with heads for all devices, and no part of its making.
        x = constrain(x, "batch", "length", "heads", "head_dim")
        return constrain(x, "batch", None, "attention_heads", "head_dim")

    return split(q_BTNH), *(split(jnp.repeat(x, more, axis=2)) for x in (key_BTKH, value_BTKH))


def by_lengths(out_BTNH: jax.Array) -> jax.Array:
    """What was attended to, on the devices of its lengths again."""
    if sequence_ways() == 1:
        return out_BTNH
    out_BTNH = constrain(out_BTNH, "batch", None, "attention_heads", "head_dim")
    return constrain(out_BTNH, "batch", "length", "heads", "head_dim")


def check_heads(heads: int, sequence: int, tensor: int) -> None:
    """UserError where the mesh splits lengths and there are not enough heads to split instead."""
    if sequence > 1 and heads % (sequence * tensor):
        raise UserError(
            f"mesh.sequence {sequence} x mesh.tensor {tensor}: model.n_heads {heads} is not divisible by "
            f"{sequence * tensor}. Where the rest of the model splits lengths, attention splits heads: lower "
            "mesh.sequence"
        )


def self_attention(
    config: ModelConfig,
    q_BTNH: jax.Array,
    own: LayerCache,
    mask_BTS: jax.Array,
    segments: Segments | None,
    windowed: bool | jax.Array,
    scale: float,
    prefix: LayerCache | None,
) -> jax.Array:
    """`attend` without a cache (training, scoring), by the kernel that `attention_implementation` names.

    `segments` say what `mask_BTS` says. Splash attention never holds a mask: without segments it is XLA's, too.
    """
    kernel = attention_implementation(config, mask_BTS.shape[1], mask_BTS.shape[2])
    if kernel == "xla" or (kernel == "splash" and segments is None):
        out = attend(q_BTNH, own, mask_BTS, scale, config.attention_softcap, prefix, causal=True)
        return checkpoint_name(out, "attention")
    if prefix is not None:  # both kernels take keys of whole rows
        before = jax.tree.map(lambda x: jnp.repeat(x, len(q_BTNH) // len(x), axis=0), prefix)
        own = jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), before, own)
    if kernel == "splash" and segments is not None:
        return splash(config, q_BTNH, own, segments, windowed, scale)
    key_BSKH, value_BSKH = own.k_BKSH.swapaxes(1, 2), own.v_BKSH.swapaxes(1, 2)
    out = jax.nn.dot_product_attention(
        q_BTNH, key_BSKH, value_BSKH, mask=mask_BTS[:, None], scale=scale, implementation="cudnn"
    )
    return checkpoint_name(out, "attention")


def attention_implementation(config: ModelConfig, queries: int, keys: int) -> str:
    """The kernel that a pass without a cache takes on the devices of `jax.set_mesh`, or else the default ones.

    `auto` is splash on a TPU where the numbers of queries and keys are multiples of 128, cuDNN on a GPU in bfloat16
    without a soft-cap, and XLA anywhere else. UserError where the config names a kernel that the device has not.
    """
    here = platform()
    own = {"tpu": "splash", "gpu": "cudnn"}.get(here, "xla")
    if config.attention != "auto":
        if config.attention not in ("xla", own):
            raise UserError(
                f"model.attention: {config.attention} does not run on a {here}; use auto or {own}"
            )
        return config.attention
    if own == "splash" and (queries % LANES or keys % LANES):
        return "xla"
    if own == "cudnn" and (config.dtype != "bfloat16" or config.attention_softcap):
        return "xla"
    return own


def platform() -> str:
    """ "tpu", "gpu" or "cpu": that of `jax.set_mesh` (it may be compiled for, and not be here), or the default one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    found = jax.default_backend() if device is None else device.platform
    return "gpu" if found == "cuda" else found


def splash(
    config: ModelConfig,
    q_BTNH: jax.Array,
    own: LayerCache,
    segments: Segments,
    windowed: bool | jax.Array,
    scale: float,
) -> jax.Array:
    """Splash attention, JAX's kernel for TPUs: no scores in memory, and no work for blocks that are masked.

    Query t stands at key S - T + t. Lengths that are no multiples of 128 are padded. In padding the result is any
    finite number, another one than that of `attend`. A kernel knows its window when it is compiled: where layers of
    both kinds are scanned there are two, of which one runs.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention  # slow to import
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import (
        LocalMask,
        MultiHeadMask,
    )

    t, s = q_BTNH.shape[1], own.k_BKSH.shape[2]
    more_t = -t % LANES
    more_s = more_t + -(s + more_t) % LANES  # every padding query finds the key of its own place
    q_BNTH = lengthened(q_BTNH * jnp.asarray(scale, q_BTNH.dtype), 1, more_t).swapaxes(1, 2)
    k_BKSH, v_BKSH = lengthened(own.k_BKSH, 2, more_s), lengthened(own.v_BKSH, 2, more_s)
    q_segments, k_segments = lengthened(segments.q_BT, 1, more_t), lengthened(segments.k_BS, 1, more_s)

    def kernel(window: int):
        def on_shard(q_BNTH, k_BKSH, v_BKSH, q_BT, k_BS):
            n, lengths = q_BNTH.shape[1], (q_BNTH.shape[2], k_BKSH.shape[2])
            seen = LocalMask(lengths, (window - 1 if window else None, 0), offset=s - t)
            run = splash_attention.make_splash_mha(
                mask=MultiHeadMask([seen] * n), head_shards=1, q_seq_shards=1, block_sizes=_blocks(*lengths),
                attn_logits_soft_cap=config.attention_softcap or None, residual_checkpoint_name="attention",
            )  # fmt: skip
            return jax.vmap(run)(q_BNTH, k_BKSH, v_BKSH, splash_attention.SegmentIds(q_BT, k_BS))

        # Kernels do not partition themselves.
        heads, rows = ("batch", "attention_heads", None, None), ("batch", None)
        return lambda *args: map_shards(on_shard, (heads, heads, heads, rows, rows), heads, *args)

    args = (q_BNTH, k_BKSH, v_BKSH, q_segments, k_segments)
    if len(kinds := set(config.layers_windowed)) == 1:
        windowed = kinds.pop()
    if isinstance(windowed, bool):
        out_BNTH = kernel(config.window if windowed else 0)(*args)
    else:
        out_BNTH = jax.lax.cond(windowed, kernel(config.window), kernel(0), *args)
    return out_BNTH[:, :, :t].swapaxes(1, 2)


def _blocks(queries: int, keys: int) -> Any:
    """The largest blocks up to 512 that divide the lengths (multiples of 128)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes

    q, k = math.gcd(queries, 512), math.gcd(keys, 512)
    return BlockSizes(
        block_q=q, block_kv=k, block_kv_compute=k, block_q_dkv=q, block_kv_dkv=k, block_kv_dkv_compute=k,
        block_q_dq=q, block_kv_dq=k,
    )  # fmt: skip
