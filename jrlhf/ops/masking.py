"""Reductions under a mask. A mask is bool (or 0/1) with the shape of what it masks.

Values where the mask is 0 never enter a result, not even when they are NaN or infinite.
"""

import jax
import jax.numpy as jnp

from jrlhf.types import Array

Axis = int | tuple[int, ...] | None
Places = Array | slice | None  # of each row: [B, A] int32, or the same of all rows; None is all of them


def masked_sum(x: Array, mask: Array, axis: Axis = None) -> jax.Array:
    """Sum of `x` where `mask` is set, in float32."""
    return jnp.sum(jnp.where(mask.astype(bool), x.astype(jnp.float32), 0.0), axis=axis)


def masked_mean(
    x: Array, mask: Array, axis: Axis = None, denominator: Array | float | None = None
) -> jax.Array:
    """Mean of `x` where `mask` is set: sum(x·mask) / max(sum(mask), 1); 0 where nothing is set.

    `denominator` replaces sum(mask). A loss that is a token mean over the *global* batch passes the global
    number of tokens: its microbatches' losses and gradients then add up to those of the whole batch.
    """
    if denominator is None:
        denominator = jnp.maximum(masked_sum(jnp.ones_like(mask, jnp.float32), mask, axis), 1.0)
    return masked_sum(x, mask, axis) / jnp.asarray(denominator, jnp.float32)


def masked_var(x: Array, mask: Array, axis: Axis = None) -> jax.Array:
    """Population variance (divided by the count) of `x` where `mask` is set."""
    mean = masked_mean(x, mask, axis)
    mean = jnp.expand_dims(mean, axis if axis is not None else tuple(range(x.ndim)))
    return masked_mean(jnp.square(x.astype(jnp.float32) - mean), mask, axis)


def masked_whiten(x: Array, mask: Array, shift_mean: bool = True) -> jax.Array:
    """`x` scaled to unit (population) variance over all set positions, and 0 elsewhere.

    `shift_mean=True` also removes the mean (advantages); False keeps it (rewards), so that the sign of a
    reward survives. The variance has 1e-8 added.
    """
    x = x.astype(jnp.float32)
    mean = masked_mean(x, mask)
    whitened = (x - mean) * jax.lax.rsqrt(masked_var(x, mask) + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return jnp.where(mask.astype(bool), whitened, 0.0)


def positions_from_mask(mask: Array) -> jax.Array:
    """Position of each real token among the real ones, [..., T] int32; the same for either padding side.

    The first real token has position 0. Padding before it gets 0, padding after the last real token
    repeats the last position; neither is ever attended to.
    """
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=-1, dtype=jnp.int32) - 1, 0)


def last_token_index(mask: Array) -> jax.Array:
    """Index of the last set position along the last axis, [..., T] -> [...] int32; 0 for an empty row."""
    slots = jnp.arange(mask.shape[-1], dtype=jnp.int32)
    return jnp.max(jnp.where(mask.astype(bool), jnp.broadcast_to(slots, mask.shape), 0), axis=-1)


def at_places(x: Array, at: Places) -> jax.Array:
    """x [B, T, ...] at some places of each row, [B, A, ...]; `at` is None for all of them."""
    if at is None:
        return jnp.asarray(x)
    if isinstance(at, slice):
        return jnp.asarray(x[:, at])
    return jnp.take_along_axis(jnp.asarray(x), at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)


def lengthened(x: jax.Array, axis: int, more: int) -> jax.Array:
    """x with `more` zeros (False) behind the last place of one axis."""
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])
