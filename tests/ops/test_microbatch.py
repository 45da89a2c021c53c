"""Rows in pieces: what goes where, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.ops.microbatch import (
    Lengths,
    bucket_sizes,
    by_length,
    flat,
    in_groups,
    map_rows,
    merge_rows,
    split_rows,
    value_and_grad_rows,
)

WIDTH = 6


def lengths(sizes=(2, 4, WIDTH)):
    return Lengths(sizes, lambda x: jnp.sum(x != 0, axis=1, dtype=jnp.int32), lambda x, n: x[:, :n])


def rows(*of):
    """A row of ones, then zeros, for each length."""
    return jnp.asarray(np.arange(WIDTH) < np.array(of)[:, None], jnp.float32)


@pytest.mark.parametrize(
    ("slots", "buckets", "sizes"),
    [(64, 4, (16, 32, 48, 64)), (10, 4, (3, 5, 8, 10)), (3, 8, (1, 2, 3)), (7, 1, (7,)), (1, 4, (1,))],
)
def test_sizes_are_even_and_end_with_all_slots(slots, buckets, sizes):
    assert bucket_sizes(slots, buckets) == sizes


def test_pieces_by_length_hold_neighbours_in_length():
    used = jnp.asarray([5, 1, 4, 0, 3, 2, 7, 6])
    pieces = split_rows(used[by_length(used, 4)], 4)
    assert [sorted(piece) for piece in np.asarray(pieces).tolist()] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert np.asarray(used[by_length(used, 1)]).tolist() == list(range(8))


def test_groups_and_pieces_are_taken_apart_and_put_together():
    x = jnp.arange(24).reshape(12, 2)
    assert in_groups(x, 4).tolist() == [x[:4].tolist(), x[4:8].tolist(), x[8:].tolist()]
    assert flat(in_groups(x, 4)).tolist() == x.tolist()
    assert split_rows(x, 3)[1].tolist() == x[1::3].tolist()
    assert merge_rows(split_rows(x, 3)).tolist() == x.tolist()


@pytest.mark.parametrize("parts", [1, 3])
def test_results_stand_where_their_rows_stood(parts):
    """Each piece is as long as it must be; what was cut off is 0."""
    batch = rows(5, 1, 0, 4, 2, 3)

    def f(x):
        number = 10.0 * x.shape[1] + jnp.arange(x.shape[1], dtype=jnp.float32)
        return x * number[None], {"sum": jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True), x.shape)}

    scaled, more = jax.jit(lambda x: map_rows(f, x, parts, lengths()))(batch)
    size = np.array([6, 2, 2, 6, 4, 4] if parts == 3 else [6] * 6)[:, None]
    np.testing.assert_array_equal(scaled, np.asarray(batch) * (10 * size + np.arange(WIDTH)))
    totals = np.array([5, 1, 0, 4, 2, 3])[:, None]
    np.testing.assert_array_equal(more["sum"], np.where(np.arange(WIDTH) < size, totals, 0))


@pytest.mark.parametrize(
    ("of", "parts", "sizes"),
    [((1, 2, 2, 1), 1, [2] * 4), ((1, 3, 2, 1), 1, [4] * 4), ((0, 0), 1, [2] * 2), ((1, 6, 2, 5), 2, [2, 6, 2, 6])],
)  # fmt: skip
def test_a_gradient_goes_through_the_slots_that_are_needed(of, parts, sizes):
    """The slope of each row's sum, times the slots that it was given; nothing of the others is run."""

    def loss(slope, x):
        first = jnp.sum(x[:, 0]) if x.shape[1] == WIDTH else jnp.float32(0.0)
        return slope * x.shape[1] * jnp.sum(x), ({"rows": jnp.float32(len(x))}, {"full": first})

    sums, maxima, slope = value_and_grad_rows(loss, jnp.float32(1.0), rows(*of), parts, lengths())
    assert float(slope) == np.dot(of, sizes)
    assert sums["rows"] == len(of)
    assert maxima["full"] == (len(of) // parts if WIDTH in sizes else 0)
