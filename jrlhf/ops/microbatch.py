"""Splitting a batch's rows so that less of it is in memory at a time, without changing what is computed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrlhf.sharding import constrain_rows


def split_rows(tree: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B / parts, ...]. Part i takes rows i, i + parts, ...: each device's rows stay its own."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def merge_rows(tree: Any) -> Any:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


class Lengths(NamedTuple):
    """How rows whose last slots are padding are shortened: to the first of `sizes` that holds the longest of a piece.

    Each size is a program of its own, of which a switch runs one.
    """

    sizes: tuple[int, ...]  # slots, ascending; the last is all of them
    used: Callable[[Any], jax.Array]  # rows [B, ...] -> slots that each needs, [B] int32
    cut: Callable[[Any, int], Any]  # (rows, size) -> rows without the slots from `size` on

    def switch(self, f: Callable[..., Any], rows: Any) -> Any:
        """`f(cut rows, their size)`; its result must have the same shape for every size."""
        # A maximum over the rows of all devices, so that they all take the same branch.
        longest = jnp.max(self.used(rows))
        bucket = jnp.sum(longest > jnp.asarray(self.sizes[:-1], jnp.int32), dtype=jnp.int32)
        return jax.lax.switch(bucket, [lambda rows, n=n: f(self.cut(rows, n), n) for n in self.sizes], rows)


def bucket_sizes(slots: int, buckets: int) -> tuple[int, ...]:
    """At most `buckets` numbers of slots, evenly spaced; the last is `slots`."""
    return tuple(sorted({-(-slots * i // buckets) for i in range(1, buckets + 1)}))


def by_length(used: jax.Array, parts: int) -> jax.Array:
    """An order of rows [B] in which the first of the `parts` of `split_rows` has the shortest, the last the longest."""
    return jnp.argsort(used).reshape(parts, -1).T.reshape(-1)


def map_rows(f: Callable[[Any], Any], batch: Any, parts: int, lengths: Lengths | None = None) -> Any:
    """`f(batch)` for a row-wise f, `parts` pieces one after the other.

    With `lengths`, f's results are arrays whose last axis is that of the slots. They are 0 in those that were cut off.
    """
    if lengths is None:
        return f(batch) if parts == 1 else merge_rows(jax.lax.map(f, split_rows(batch, parts)))

    def whole(rows, size):
        missing = lengths.sizes[-1] - size
        pad = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])  # noqa: E731
        return jax.tree.map(pad, f(rows))

    order = by_length(lengths.used(batch), parts)
    results = map_rows(lambda rows: lengths.switch(whole, rows), taken(batch, order), parts)
    return taken(results, jnp.argsort(order))


def taken(batch: Any, index: jax.Array) -> Any:
    """The rows `index` of a batch, split over the devices as all batches are."""
    return constrain_rows(jax.tree.map(lambda x: x[index], batch))


def value_and_grad_rows(
    loss: Callable[[Any, Any], tuple[jax.Array, tuple]],
    params: Any,
    batch: Any,
    parts: int,
    lengths: Lengths | None = None,
) -> tuple:
    """Gradient of a loss that is a sum over rows, accumulated over `parts` microbatches in a scan.

    `loss(params, rows) -> (value, (sums, maxima))`: value and sums must already be divided by the whole batch's
    denominator, so that parts add up to what one pass gives. Beside the two there may be arrays [rows, ...] of the same
    shape at every length. Returns (sums, maxima, gradient), and those arrays where there are any. With `lengths` each
    microbatch is as long as its longest row needs: the more so where `by_length` ordered them.
    """
    of_loss = jax.value_and_grad(loss, has_aux=True)
    # The switch is around the gradient: inside, the residuals of all its branches would be kept.
    grad = of_loss
    if lengths is not None:
        grad = lambda params, rows: lengths.switch(lambda rows, _: of_loss(params, rows), rows)  # noqa: E731

    def run(rows):
        (_, (sums, maxima, *by_row)), grads = grad(params, rows)
        return (sums, maxima, grads), by_row

    if parts == 1:
        whole, by_row = run(batch)
        return *whole, *by_row

    def step(summed, rows):
        (sums, maxima, grads), by_row = run(rows)
        return jax.tree.map(jnp.add, summed, grads), (sums, maxima, by_row)

    # Of the gradient the sum alone is kept; the others are small. (No trial run tells their shapes: tracing the loss
    # once more takes as long as compiling it.)
    grads, (sums, maxima, by_row) = jax.lax.scan(
        step, jax.tree.map(jnp.zeros_like, params), split_rows(batch, parts)
    )
    total = lambda tree: jax.tree.map(lambda x: jnp.sum(x, axis=0), tree)  # noqa: E731
    largest = jax.tree.map(lambda x: jnp.max(x, axis=0), maxima)
    return total(sums), largest, grads, *merge_rows(by_row)


def in_groups(tree: Any, group: int) -> Any:
    """[B, ...] -> [B / group, group, ...]: rows that stay together, whatever is done with the first axis."""
    return jax.tree.map(lambda x: x.reshape(-1, group, *x.shape[1:]), tree)


def flat(tree: Any) -> Any:
    """The inverse of `in_groups`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
