"""Splitting a batch's rows so that less of it is in memory at a time, without changing what is computed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def split_rows(tree: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B / parts, ...]. Part i takes rows i, i + parts, ...: each device's rows stay its own."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def merge_rows(tree: Any) -> Any:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def map_rows(f: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """`f(batch)` for a row-wise f, `parts` pieces one after the other."""
    return f(batch) if parts == 1 else merge_rows(jax.lax.map(f, split_rows(batch, parts)))


def value_and_grad_rows(
    loss: Callable[[Any, Any], tuple[jax.Array, tuple[dict, dict]]], params: Any, batch: Any, parts: int
) -> tuple[dict, dict, Any]:
    """Gradient of a loss that is a sum over rows, accumulated over `parts` microbatches in a scan.

    `loss(params, rows) -> (value, (sums, maxima))`: value and sums must already be divided by the whole batch's
    denominator, so that parts add up to what one pass gives. Returns (sums, maxima, gradient).
    """
    grad = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (_, (sums, maxima)), grads = grad(params, batch)
        return sums, maxima, grads

    def step(carry, rows):
        (_, (sums, maxima)), grads = grad(params, rows)
        carry_sums, carry_maxima, carry_grads = carry
        add = lambda a, b: jax.tree.map(jnp.add, a, b)  # noqa: E731
        return (
            add(carry_sums, sums),
            jax.tree.map(jnp.maximum, carry_maxima, maxima),
            add(carry_grads, grads),
        ), None

    pieces = split_rows(batch, parts)
    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], pieces))
    (_, (sums, maxima)), grads = shapes
    zero = lambda tree: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree)  # noqa: E731
    lowest = jax.tree.map(lambda s: jnp.full(s.shape, -jnp.inf, s.dtype), maxima)
    carry, _ = jax.lax.scan(step, (zero(sums), lowest, zero(grads)), pieces)
    return carry


def in_groups(tree: Any, group: int) -> Any:
    """[B, ...] -> [B / group, group, ...]: rows that stay together, whatever is done with the first axis."""
    return jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), tree)


def flat(tree: Any) -> Any:
    """The inverse of `in_groups`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
