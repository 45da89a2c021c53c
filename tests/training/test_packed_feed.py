"""Packed batches: the prompts of the padded ones in the same steps, in few shapes; evaluation in packed chunks."""

import jax
import numpy as np
import pytest

from jrlhf.config import MeshConfig
from jrlhf.sharding import batch_ways, make_mesh
from jrlhf.training.data import SHAPES, BatchFeed, PackedFeed, TargetFeed, feed_of, in_chunks, with_targets
from jrlhf.types import PreferenceBatch, SequenceBatch

N, SIZE = 300, 32


@pytest.fixture(scope="module")
def arrays() -> PreferenceBatch:
    """Pairs of very different lengths; the margin of an answer says which it is."""
    rng = np.random.default_rng(0)
    prompt = np.minimum(rng.geometric(0.1, N), 40)
    lengths = prompt[:, None] + np.minimum(rng.geometric(0.1, (N, 2)), 24)
    slots = np.arange(64)
    mask = slots < lengths[..., None]
    tokens = np.where(mask, rng.integers(1, 30, (N, 1, 64)) * np.ones((1, 2, 1), int), 0).astype(np.int32)
    response = mask & (slots >= prompt[:, None, None])
    margins = np.arange(2 * N, dtype=np.float32).reshape(N, 2)
    return PreferenceBatch(tokens, mask, response, np.tile(np.int32([1, 2]), (N, 1)), margins)


@pytest.fixture(params=["one device", "data 8"], scope="module")
def mesh(request):
    devices = jax.devices()[:1] if request.param == "one device" else jax.devices()
    return make_mesh(MeshConfig(len(devices), 1, 1), devices)


def test_steps_have_the_same_prompts_in_few_shapes(arrays, mesh):
    feed, padded = PackedFeed(arrays, SIZE, 3, mesh, 400, parts=2), BatchFeed(arrays, SIZE, 3, mesh)
    shapes = set()
    try:
        for step in range(60):
            batch, same = feed(step), padded(step)
            np.testing.assert_array_equal(batch.margins, same.margins)
            lengths = np.sum(np.asarray(same.response_mask), axis=2)
            np.testing.assert_array_equal(batch.tokens.lengths, lengths)
            shapes.add(batch.tokens.tokens.shape)
            rows = batch.tokens.tokens.shape[0]
            assert rows % (2 * batch_ways(mesh)) == 0
            assert rows <= SIZE
        known = {batch.tokens.tokens.shape for batch in feed.shapes()}
        assert shapes <= known
        assert len(known) <= SHAPES
        # Any step can be the first.
        for again, first in zip(jax.tree.leaves(feed(7)), jax.tree.leaves(feed(7)), strict=True):
            np.testing.assert_array_equal(again, first)
    finally:
        feed.close()
        padded.close()


def test_short_runs_have_one_shape(arrays, mesh):
    feed = PackedFeed(arrays, SIZE, 3, mesh, 20)
    assert len(feed.shapes()) == 1


def test_a_batch_that_needs_more_rows_than_any_of_the_run_has_them(arrays):
    """Steps beyond those that were planned for cannot fail."""
    one = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    feed = PackedFeed(arrays, SIZE, 3, one, 1)
    longest = np.argsort(-arrays.mask.sum((1, 2)))[:SIZE]
    planned = feed.shapes()[0].tokens.tokens.shape[0]
    batch = feed._put(longest)
    assert batch.tokens.tokens.shape[0] > planned
    np.testing.assert_array_equal(
        np.sum(np.asarray(batch.tokens.owners) >= 0), arrays.response_mask[longest].sum()
    )


def test_packed_chunks_come_back_in_the_order_of_the_rows(arrays, mesh):
    def f(batch):
        return {"margins": batch.margins, "lengths": batch.tokens.lengths}

    found = in_chunks(f, arrays, 64, mesh, packing=True)
    np.testing.assert_array_equal(found["margins"], arrays.margins)
    np.testing.assert_array_equal(found["lengths"], arrays.response_mask.sum(2))


def test_batches_have_room_for_the_targets_of_their_rows(mesh):
    """Of all rows few have many targets: most batches are spared their room, and none loses one."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 30, (N, 64), np.int32)
    learned = np.where(np.arange(N) % 60 == 7, 50, rng.integers(1, 12, N))
    whole = SequenceBatch(tokens, np.ones_like(tokens), tokens * 0, np.arange(64) >= 64 - learned[:, None])
    rows = with_targets(whole)
    feed, all_targets = feed_of(rows, 16, 3, mesh, 400), BatchFeed(rows, 16, 3, mesh)
    assert isinstance(feed, TargetFeed)
    widths = []
    try:
        for step in range(40):
            batch, same = feed(step), all_targets(step)
            width = batch.targets.shape[1]
            np.testing.assert_array_equal(batch.tokens, same.tokens)
            np.testing.assert_array_equal(batch.targets, same.targets[:, :width])
            assert np.all(np.asarray(same.targets)[:, width:] < 0)
            widths.append(width)
        assert {shape.targets.shape[1] for shape in feed.shapes()} == {*widths}
        assert len({*widths}) == 2
        assert np.mean(widths) < 0.7 * rows.targets.shape[1]
    finally:
        feed.close()
        all_targets.close()
    assert len(feed_of(rows, 16, 3, mesh, 50).shapes()) == 1
    assert type(feed_of(whole, 16, 3, mesh, 50)) is BatchFeed
