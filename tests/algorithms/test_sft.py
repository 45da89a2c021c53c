"""Next-token learning: the loss is a plain cross-entropy, and the same however the batch is laid out or split."""

import functools

import jax
import numpy as np
import pytest
from helpers import DESCENT, MODEL, assert_close, largest_difference, lm_params, one_step

from jrlhf.algorithms.sft import SFTConfig, make_sft
from jrlhf.metrics import check_name
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.training.data import with_targets
from jrlhf.types import SequenceBatch

ROWS, LENGTH = 24, 12  # three rows on each of eight devices
KEY = jax.random.key(0)


def texts():
    rng = np.random.default_rng(1)
    return [rng.integers(0, 32, rng.integers(3, 6)) for _ in range(ROWS)]


def batch_of(rows: list[list[np.ndarray]], length=LENGTH, side="right", pad_id=0) -> SequenceBatch:
    """Rows of one or more texts each; the first token of a text and every third after it are not learned."""
    arrays = [np.zeros((len(rows), length), t) for t in (np.int32, np.int32, np.int32, bool)]
    tokens, segments, positions, loss_mask = arrays
    tokens[:] = pad_id
    for i, row in enumerate(rows):
        at = length - sum(map(len, row)) if side == "left" else 0
        for number, text in enumerate(row, start=1):
            span = slice(at, at + len(text))
            tokens[i, span], segments[i, span], positions[i, span] = text, number, np.arange(len(text))
            loss_mask[i, span] = np.arange(len(text)) % 3 > 0
            at += len(text)
    return SequenceBatch(*arrays)


BATCH = batch_of([[t] for t in texts()])


ADAM = build_optimizer(OptimConfig(lr=0.01, weight_decay=0.1), 10)
make = functools.cache(make_sft)


def step(batch=BATCH, microbatches=1, mesh=None):
    return one_step(make(SFTConfig(microbatches), MODEL, DESCENT), (lm_params(), KEY), batch, mesh)


@pytest.fixture(scope="module")
def whole():
    return step()


def test_loss_is_the_cross_entropy_of_the_masked_tokens(whole):
    batch = BATCH
    logits = jax.jit(lambda p: MODEL.logits(p, MODEL.hidden(p, batch.tokens, batch.segment_ids)))(lm_params())
    logits = np.asarray(logits, np.float64)
    total = count = 0
    for row, t in np.argwhere(batch.loss_mask):
        before = logits[row, t - 1]
        total += np.log(np.sum(np.exp(before - before.max()))) + before.max() - before[batch.tokens[row, t]]
        count += 1
    assert whole.metrics["train/loss"] == pytest.approx(total / count, rel=1e-5)
    assert whole.metrics["train/tokens"] == count
    for name in whole.metrics:
        check_name(name)


def test_unmasked_tokens_are_no_targets(whole):
    """A last token that is not learned may be any other: nothing follows it."""
    tokens, free = BATCH.tokens.copy(), 0
    for row, text in enumerate(texts()):
        if not BATCH.loss_mask[row, len(text) - 1]:
            tokens[row, len(text) - 1] = (tokens[row, len(text) - 1] + 5) % 32
            free += 1
    assert free > 3
    assert_close(step(BATCH._replace(tokens=tokens)).gradient, whole.gradient)


def test_layout_is_irrelevant(whole):
    """Padding side, pad token, order of the rows, and two texts packed into a row."""
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = [[texts()[i]] for i in order]
    left = step(batch_of(shuffled, side="left", pad_id=9))
    assert_close((left.metrics, left.gradient), (whole.metrics, whole.gradient))
    half = ROWS // 2
    packed = step(batch_of([[texts()[i], texts()[i + half]] for i in range(half)] + [[]] * half))
    assert_close((packed.metrics, packed.gradient), (whole.metrics, whole.gradient))


def test_microbatches_accumulate_the_same_gradient(whole):
    parts = step(microbatches=3)
    assert_close((parts.metrics, parts.gradient), (whole.metrics, whole.gradient))
    assert f"f32[{ROWS},{LENGTH}," in whole.hlo
    assert f"f32[{ROWS},{LENGTH}," not in parts.hlo


def test_a_mesh_gives_the_same_gradient_and_splits_the_work(whole):
    spread = step(mesh="long")
    assert_close((spread.metrics, spread.gradient), (whole.metrics, whole.gradient))
    assert f"f32[{ROWS},{LENGTH}," not in spread.hlo, "an activation of the whole batch is on one device"


def test_adam_on_a_split_state_is_adam(whole):
    """On all three mesh axes; parameters and moments stay split after the step."""
    algorithm, params = make(SFTConfig(), MODEL, ADAM), {"policy": lm_params()}
    spread = one_step(algorithm, (lm_params(), KEY), BATCH, "all")
    expected, _, norm = jax.jit(ADAM.apply)(whole.gradient, ADAM.init(params), params)
    assert_close(spread.params, expected)
    assert_close(spread.metrics, whole.metrics | {"train/lr": 0.01, "train/grad_norm": norm})
    assert 0.005 < largest_difference(spread.params, params) < 0.02
    assert f"f32[{ROWS},{LENGTH}," not in spread.hlo
    ways = {"embedding": 4, "q": 4, "o": 4, "gate": 4, "down": 4, "scale": 1}
    found = dict.fromkeys(ways, 0)
    for path, x in jax.tree_util.tree_leaves_with_path((spread.state.params, spread.state.opt_state)):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name in ways:
            assert x.addressable_shards[0].data.size * ways[name] == x.size, jax.tree_util.keystr(path)
            found[name] += 1
    assert all(found[name] >= 3 for name in ways)  # the parameter and both moments


@pytest.mark.parametrize(("microbatches", "mesh"), [(1, None), (3, "data")])
def test_positions_that_learn_nothing_need_no_logits(whole, microbatches, mesh):
    """Only the states before a target reach the head; those of a row with fewer than others are filled up with none."""
    few = with_targets(BATCH)
    assert 0 < few.targets.shape[1] < LENGTH - 1
    assert np.any(few.targets < 0)
    found = step(few, microbatches, mesh)
    assert_close((found.metrics, found.gradient), (whole.metrics, whole.gradient))
    if mesh is None:
        assert f"f32[{ROWS},{LENGTH - 1},32]" in whole.hlo
        assert f"f32[{ROWS},{LENGTH - 1},32]" not in found.hlo


def test_where_all_is_learned_nothing_is_left_out():
    every = BATCH._replace(loss_mask=np.arange(LENGTH) * np.ones((ROWS, 1), int) > 0)
    assert with_targets(every) == every
