"""DPO: ln 2 where it must be, the reference's two ways agree, and layout or devices change nothing."""

import functools

import jax
import numpy as np
import pytest
from helpers import DESCENT, MODEL, assert_close, lm_params, one_step

from jrlhf.algorithms.dpo import DPOConfig, make_dpo
from jrlhf.metrics import check_name
from jrlhf.ops.pairs import pair_logprobs
from jrlhf.types import PairBatch

ROWS, LENGTH = 16, 10
KEY = jax.random.key(0)
BETA = 0.3
make = functools.cache(make_dpo)
summed = jax.jit(lambda p, b: pair_logprobs(MODEL, p, b))


def make_batch(side="right", pad_id=0) -> PairBatch:
    rng = np.random.default_rng(0)
    tokens = np.full((ROWS, 2, LENGTH), pad_id, np.int32)
    mask, response = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for row in range(ROWS):
        prompt = rng.integers(0, 32, rng.integers(1, 4))
        for answer in range(2):
            text = np.concatenate([prompt, rng.integers(0, 32, rng.integers(1, 7))])
            start = LENGTH - len(text) if side == "left" else 0
            end = start + len(text)
            tokens[row, answer, start:end], mask[row, answer, start:end] = text, True
            response[row, answer, start + len(prompt) : end] = True
    batch = PairBatch(tokens, mask, response, np.zeros((ROWS, 2), np.float32))
    return batch._replace(ref_logprobs=np.asarray(summed(lm_params(1), batch)))


def step(batch, mesh=None, reference="precomputed", params=None, **config):
    algorithm = make(DPOConfig(BETA, reference=reference, **config), MODEL, DESCENT)
    return one_step(algorithm, (params or lm_params(), lm_params(1), KEY), batch, mesh)


@pytest.fixture(scope="module")
def batch():
    return make_batch()


@pytest.fixture(scope="module")
def whole(batch):
    return step(batch)


def test_logprobs_are_sums_over_the_answer_alone(batch):
    logits = jax.jit(lambda p, t, m: MODEL.logits(p, MODEL.hidden(p, t, m)))
    for row, answer in ((0, 0), (5, 1), (9, 0)):
        tokens, response = batch.tokens[row, answer], batch.response_mask[row, answer]
        x = np.asarray(logits(lm_params(), tokens[None], batch.mask[row, answer][None]), np.float64)[0]
        logps = x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))
        expected = sum(logps[t - 1, tokens[t]] for t in np.flatnonzero(response))
        assert summed(lm_params(), batch)[row, answer] == pytest.approx(expected, rel=1e-5)


def test_loss_is_equation_7(whole, batch):
    policy = np.asarray(summed(lm_params(), batch), np.float64)
    margin = BETA * ((policy - batch.ref_logprobs)[:, 0] - (policy - batch.ref_logprobs)[:, 1])
    assert whole.metrics["pref/loss"] == pytest.approx(np.mean(np.log1p(np.exp(-margin))), rel=1e-5)
    assert whole.metrics["pref/acc"] == pytest.approx(np.mean(margin > 0))
    assert whole.metrics["pref/margin"] == pytest.approx(np.mean(margin), rel=1e-4)
    for name in whole.metrics:
        check_name(name)


def test_loss_is_ln_2_at_the_reference_and_its_step_prefers_the_chosen(batch):
    first = step(batch, params=lm_params(1))
    assert first.metrics["pref/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(first.metrics["pref/margin"]) < 1e-5
    moved = jax.tree.map(lambda p, g: p - 0.01 * g, lm_params(1), first.gradient["policy"])
    gain = np.asarray(summed(moved, batch)) - batch.ref_logprobs
    assert np.mean(gain[:, 0] - gain[:, 1]) > 0.01


def test_layout_is_irrelevant(whole):
    order = np.random.default_rng(0).permutation(ROWS)
    moved = jax.tree.map(lambda x: x[order], make_batch("left", 21))
    other = step(moved)
    assert_close((other.metrics, other.gradient), (whole.metrics, whole.gradient))


def test_microbatches_accumulate_the_same_gradient_with_the_reference_on_the_fly(whole, batch):
    nothing = batch._replace(ref_logprobs=np.zeros_like(batch.ref_logprobs))
    parts = step(nothing, microbatches=4, reference="on_the_fly")
    assert_close((parts.metrics, parts.gradient), (whole.metrics, whole.gradient))
    assert f"f32[{2 * ROWS},{LENGTH}," in whole.hlo
    assert f"f32[{2 * ROWS},{LENGTH}," not in parts.hlo  # neither of the policy nor of the reference


@pytest.mark.parametrize(("mesh", "reference"), [("long", "precomputed"), ("all", "on_the_fly")])
def test_a_mesh_gives_the_same_gradient(whole, batch, mesh, reference):
    if reference == "on_the_fly":
        batch = batch._replace(ref_logprobs=np.zeros_like(batch.ref_logprobs))
    spread = step(batch, mesh, reference)
    assert_close((spread.metrics, spread.gradient), (whole.metrics, whole.gradient))
    assert f"f32[{2 * ROWS},{LENGTH}," not in spread.hlo


def test_a_precomputed_reference_is_not_kept():
    state = make_dpo(DPOConfig(), MODEL, DESCENT).init(lm_params(), lm_params(1), KEY)
    assert state.ref_params is None
