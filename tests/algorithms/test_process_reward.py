"""The process reward model: a score at the end of every labelled step, whatever the layout or the devices."""

import functools

import jax
import numpy as np
import pytest
from helpers import DESCENT, SCALAR, assert_close, one_step, scalar_params

from jrlhf.algorithms.process_reward import ProcessRewardConfig, make_process_reward
from jrlhf.metrics import check_name
from jrlhf.types import StepBatch

ROWS, LENGTH = 16, 12
make = functools.cache(make_process_reward)


def make_batch(side="right", pad_id=0) -> StepBatch:
    """Answers of up to four steps; some rows have no label, and some no step."""
    rng = np.random.default_rng(3)
    tokens = np.full((ROWS, LENGTH), pad_id, np.int32)
    mask, ends = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    labels = np.full(tokens.shape, -1.0, np.float32)
    for row in range(ROWS):
        n = rng.integers(5, LENGTH + 1)
        start = LENGTH - n if side == "left" else 0
        tokens[row, start : start + n], mask[row, start : start + n] = rng.integers(0, 32, n), True
        places = start + np.sort(rng.choice(np.arange(2, n), size=row % 4, replace=False))
        ends[row, places] = True
        labels[row, places] = rng.choice([0.0, 1.0, 0.3, -1.0], len(places))
    return StepBatch(tokens, mask, ends, labels)


def step(batch, mesh=None, **config):
    algorithm = make(ProcessRewardConfig(**config), SCALAR, DESCENT)
    return one_step(algorithm, (scalar_params(), jax.random.key(0)), batch, mesh)


@pytest.fixture(scope="module")
def whole():
    return step(make_batch())


def test_loss_and_accuracy_are_a_plain_loop_over_labelled_steps(whole):
    batch = make_batch()
    scores = np.asarray(jax.jit(SCALAR.scores)(scalar_params(), batch.tokens, batch.mask), np.float64)
    losses, right = [], []
    for row, t in np.argwhere(batch.ends & (batch.labels >= 0)):
        x, y = scores[row, t], batch.labels[row, t]
        losses.append(y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x))
        right.append((x > 0) == (y > 0.5))
    assert 5 < len(losses) < batch.ends.sum()
    assert whole.metrics["rm/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert whole.metrics["rm/step_acc"] == pytest.approx(np.mean(right), rel=1e-5)
    for name in whole.metrics:
        check_name(name)


def test_layout_is_irrelevant(whole):
    order = np.random.default_rng(0).permutation(ROWS)
    other = step(jax.tree.map(lambda x: x[order], make_batch("left", pad_id=17)))
    assert_close((other.metrics, other.gradient), (whole.metrics, whole.gradient))


@pytest.mark.parametrize("mesh", [None, "all"])
def test_microbatches_and_a_mesh_give_the_same_gradient(whole, mesh):
    parts = step(make_batch(), mesh, microbatches=2)
    assert_close((parts.metrics, parts.gradient), (whole.metrics, whole.gradient))
