"""The reward model: pairs of K ranked answers against a plain loop, whatever the layout or the devices."""

import functools

import jax
import numpy as np
import pytest
from helpers import DESCENT, SCALAR, assert_close, one_step, scalar_params

from jrlhf.algorithms.reward_model import (
    RewardModelConfig,
    make_reward_model,
    preference_scores,
    reward_model_loss,
    usable_prompts,
)
from jrlhf.metrics import check_name
from jrlhf.types import PreferenceBatch

ROWS, LENGTH = 16, 10
KEY = jax.random.key(0)
RANKS = (
    [1, 2, 0, 0],
    [2, 1, 3, 3],
    [1, 1, 1, 0],
    [3, 4, 2, 1],
    [1, 0, 0, 0],
    [1, 1, 2, 2],
    [2, 1, 0, 1],
    [0, 0, 0, 0],
)


def make_batch(k: int, length=LENGTH, side="right", pad_id=0) -> PreferenceBatch:
    """Answers of different lengths. With K = 4 also ties, missing answers and prompts that teach nothing."""
    rng = np.random.default_rng(k)
    ranks = np.array(RANKS * (ROWS // 8) if k == 4 else [[1, 2], [2, 1]] * (ROWS // 2), np.int32)
    tokens = np.full((ROWS, k, length), pad_id, np.int32)
    mask, response = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for row, answer in np.argwhere(ranks > 0):
        n = rng.integers(4, LENGTH + 1)
        start = length - n if side == "left" else 0
        tokens[row, answer, start : start + n] = rng.integers(0, 32, n)
        mask[row, answer, start : start + n] = True
        response[row, answer, start + 3 : start + n] = True
    margins = rng.standard_normal(ranks.shape).astype(np.float32)
    return PreferenceBatch(tokens, mask, response, ranks, margins)


make = functools.cache(make_reward_model)
answer_scores = jax.jit(lambda p, b: preference_scores(SCALAR, p, b))


def step(batch, mesh=None, **config):
    return one_step(make(RewardModelConfig(**config), SCALAR, DESCENT), (scalar_params(), KEY), batch, mesh)


@pytest.fixture(scope="module")
def batches():
    return {k: make_batch(k) for k in (2, 4)}


@pytest.fixture(scope="module")
def whole(batches):
    return {k: step(batches[k], margins=k == 2, centering=0.1) for k in (2, 4)}


def plain_loss(scores, batch, margins, ties=True):
    """Equation 1 of Ouyang et al. by a loop: mean over a prompt's pairs, then over prompts that have one."""
    losses, accuracies = [], []
    for s, ranks, m in zip(scores.astype(np.float64), batch.ranks, batch.margins, strict=True):
        terms, right = [], []
        for i, j in np.argwhere(np.triu(np.ones((len(s), len(s))), 1)):
            if ranks[i] and ranks[j] and (ties or ranks[i] != ranks[j]):
                if ranks[i] > ranks[j]:
                    i, j = j, i
                gap = s[i] - s[j] - (m[i] - m[j] if margins and ranks[i] != ranks[j] else 0.0)
                tied = ranks[i] == ranks[j]
                terms.append(
                    0.5 * np.logaddexp(0, gap) + 0.5 * np.logaddexp(0, -gap)
                    if tied
                    else np.logaddexp(0, -gap)
                )
                right.append(0.5 if tied else float(s[i] > s[j]))
        if terms:
            losses.append(np.mean(terms))
            accuracies.append(np.mean(right))
    return np.mean(losses), np.mean(accuracies)


@pytest.mark.parametrize("k", [2, 4])
def test_loss_is_a_plain_loop_over_pairs(whole, batches, k):
    scores = answer_scores(scalar_params(), batches[k])
    loss, accuracy = plain_loss(np.asarray(scores), batches[k], margins=k == 2)
    assert whole[k].metrics["rm/loss"] == pytest.approx(loss, rel=1e-5)
    assert whole[k].metrics["rm/acc"] == pytest.approx(accuracy, rel=1e-5)
    for name in whole[k].metrics:
        check_name(name)


def test_scores_are_read_at_the_last_real_token(batches):
    batch = batches[2]
    scores = np.asarray(answer_scores(scalar_params(), batch))
    flat = [x.reshape(-1, LENGTH) for x in (batch.tokens, batch.mask)]
    every = np.asarray(jax.jit(SCALAR.scores)(scalar_params(), *flat))
    last = every[np.arange(len(every)), np.sum(flat[1], axis=1) - 1]
    np.testing.assert_allclose(scores.reshape(-1), last, atol=1e-6)


def test_layout_is_irrelevant(whole):
    order = np.random.default_rng(0).permutation(ROWS)
    batch = jax.tree.map(lambda x: x[order], make_batch(4, side="left", pad_id=17))
    other = step(batch, centering=0.1)
    assert_close((other.metrics, other.gradient), (whole[4].metrics, whole[4].gradient))


def test_microbatches_accumulate_the_same_gradient(whole, batches):
    parts = step(batches[4], centering=0.1, microbatches=4)
    assert_close((parts.metrics, parts.gradient), (whole[4].metrics, whole[4].gradient))


@pytest.mark.parametrize(("mesh", "k"), [("data", 4), ("all", 2)])
def test_a_mesh_gives_the_same_gradient(whole, batches, mesh, k):
    spread = step(batches[k], mesh, margins=k == 2, centering=0.1)
    assert_close((spread.metrics, spread.gradient), (whole[k].metrics, whole[k].gradient))


def test_tied_pairs_can_be_left_out(batches):
    """The value alone; their gradient is that of the loss."""
    config, batch = RewardModelConfig(ties=False), batches[4]
    value = jax.jit(lambda p: reward_model_loss(config, SCALAR, p, batch, usable_prompts(config, batch)))
    loss, (sums, _) = value(scalar_params())
    expected = plain_loss(np.asarray(answer_scores(scalar_params(), batch)), batch, margins=False, ties=False)
    assert (float(loss), float(sums["rm/acc"])) == pytest.approx(expected, rel=1e-5)


def test_a_step_moves_scores_as_the_labels_say(whole, batches):
    """Along the gradient, by a little: chosen scores rise over rejected ones; centering alone shrinks them."""
    params = scalar_params()
    moved = jax.tree.map(lambda p, g: p - 0.01 * g, params, whole[2].gradient["policy"])
    before, after = (np.asarray(answer_scores(p, batches[2])) for p in (params, moved))
    chosen = np.where(batches[2].ranks[:, 0] == 1, 1.0, -1.0)
    assert np.mean(chosen * (after[:, 0] - after[:, 1])) > np.mean(chosen * (before[:, 0] - before[:, 1]))
