"""KTO and BCO: their equations on whole answers, what an answer is compared with, and layout changes nothing."""

import functools

import jax
import numpy as np
import pytest
import scipy.special
from helpers import DESCENT, MODEL, assert_close, lm_params, one_step

from jrlhf.algorithms.bco import BCOConfig, make_bco
from jrlhf.algorithms.kto import KTOConfig, make_kto
from jrlhf.metrics import check_name
from jrlhf.ops.unpaired import answer_logprobs
from jrlhf.types import AnswerBatch, UnpairedBatch

ROWS, LENGTH = 16, 10
KEY = jax.random.key(0)
BETA = 0.3
kto, bco = functools.cache(make_kto), functools.cache(make_bco)
summed = jax.jit(lambda p, b: answer_logprobs(MODEL, p, b))
LABELS = np.arange(ROWS) % 3 != 0


def answers(seed: int, side: str, pad_id: int, extra: int = 0) -> AnswerBatch:
    rng = np.random.default_rng(seed)
    length = LENGTH + extra
    tokens = np.full((ROWS, length), pad_id, np.int32)
    mask, response = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for row in range(ROWS):
        prompt, answer = rng.integers(0, 32, rng.integers(1, 4)), rng.integers(0, 32, rng.integers(1, 7))
        text = np.concatenate([prompt, answer])
        start = length - len(text) if side == "left" else 0
        tokens[row, start : start + len(text)], mask[row, start : start + len(text)] = text, True
        response[row, start + len(prompt) : start + len(text)] = True
    return AnswerBatch(tokens, mask, response, np.zeros(ROWS, np.float32))


def make_batch(side="right", pad_id=0, extra=0) -> UnpairedBatch:
    def scored(seed):
        made = answers(seed, side, pad_id, extra)
        return made._replace(ref_logprobs=np.asarray(summed(lm_params(1), answers(seed, "right", 0))))

    return UnpairedBatch(scored(0), LABELS, scored(9))


def without_reference(batch: UnpairedBatch) -> UnpairedBatch:
    forget = lambda a: a._replace(ref_logprobs=np.zeros_like(a.ref_logprobs))  # noqa: E731
    return batch._replace(answers=forget(batch.answers), mismatched=forget(batch.mismatched))


def step(make, batch, mesh=None, params=None, **fields):
    config = KTOConfig if make is kto else BCOConfig
    algorithm = make(config(beta=BETA, **fields), MODEL, DESCENT)
    return one_step(algorithm, (params or lm_params(), lm_params(1), KEY), batch, mesh)


@pytest.fixture(scope="module")
def batch():
    return make_batch()


@pytest.fixture(scope="module")
def whole(batch):
    return {"kto": step(kto, batch), "bco": step(bco, batch)}


@pytest.fixture(scope="module")
def log_ratios(batch):
    ratios = lambda a: np.asarray(summed(lm_params(), a), np.float64) - a.ref_logprobs  # noqa: E731
    return ratios(batch.answers), ratios(batch.mismatched)


def test_logprobs_are_sums_over_the_answer_alone(batch):
    logits = jax.jit(lambda p, t, m: MODEL.logits(p, MODEL.hidden(p, t, m)))
    found, rows = summed(lm_params(), batch.answers), batch.answers
    all_logits = np.asarray(logits(lm_params(), rows.tokens, rows.mask), np.float64)
    logps = scipy.special.log_softmax(all_logits, axis=-1)
    for row in range(ROWS):
        targets = np.flatnonzero(rows.response_mask[row])
        expected = sum(logps[row, t - 1, rows.tokens[row, t]] for t in targets)
        assert found[row] == pytest.approx(expected, rel=1e-5)


def test_kto_is_equation_8(whole, log_ratios, batch):
    ratios, mismatched = log_ratios
    z0 = max(0.0, mismatched.mean())
    assert z0 > 0.1  # the case is not a trivial one
    gain = BETA * (ratios - z0)
    expected = np.where(LABELS, 1 - scipy.special.expit(gain), 1 - scipy.special.expit(-gain))
    metrics = whole["kto"].metrics
    assert metrics["pref/loss"] == pytest.approx(expected.mean(), rel=1e-5)
    assert metrics["pref/shift"] == pytest.approx(BETA * z0, rel=1e-5)
    assert metrics["pref/label_acc"] == pytest.approx(np.mean((gain > 0) == LABELS))
    assert metrics["pref/reward_desirable"] == pytest.approx(BETA * ratios[LABELS].mean(), rel=1e-4)
    assert metrics["pref/reward_undesirable"] == pytest.approx(BETA * ratios[~LABELS].mean(), rel=1e-4)
    assert metrics["pref/desirable_frac"] == pytest.approx(LABELS.mean())
    for name in metrics:
        check_name(name)


def test_kto_weighs_labels_and_may_compare_with_zero(batch, log_ratios):
    found = step(
        kto, batch._replace(mismatched=None), reference_point="zero", desirable_weight=2.0,
        undesirable_weight=0.5,
    )  # fmt: skip
    gain = BETA * log_ratios[0]
    expected = np.where(LABELS, 2 * scipy.special.expit(-gain), 0.5 * scipy.special.expit(gain))
    assert found.metrics["pref/loss"] == pytest.approx(expected.mean(), rel=1e-5)
    assert found.metrics["pref/shift"] == 0


def test_z0_is_never_negative(batch):
    """Answers of which the reference is surer than the policy."""
    sure = batch.mismatched._replace(ref_logprobs=np.zeros(ROWS, np.float32))
    assert step(kto, batch._replace(mismatched=sure)).metrics["pref/shift"] == 0


def test_bco_is_a_classifiers_cross_entropy(whole, log_ratios):
    rewards = BETA * log_ratios[0]
    logit = rewards - rewards.mean()
    expected = np.where(LABELS, np.log1p(np.exp(-logit)), np.log1p(np.exp(logit)))
    metrics = whole["bco"].metrics
    assert metrics["pref/loss"] == pytest.approx(expected.mean(), rel=1e-5)
    assert metrics["pref/shift"] == pytest.approx(rewards.mean(), rel=1e-5)
    assert metrics["pref/label_acc"] == pytest.approx(np.mean((logit > 0) == LABELS))


def test_bcos_delta_is_the_mean_of_all_rewards_so_far(batch):
    """Three steps of different batches; each reward is the one before its own step."""
    algorithm = bco(BCOConfig(BETA), MODEL, DESCENT)
    take_step = jax.jit(algorithm.train_step)
    state, seen = algorithm.init(lm_params(), lm_params(1), KEY), []
    other = batch._replace(answers=batch.mismatched)
    for rows in (batch, other, batch):
        policy = np.asarray(summed(state.params["policy"], rows.answers))
        seen.extend(BETA * (policy - rows.answers.ref_logprobs))
        state, metrics = take_step(state, rows)
        assert metrics["pref/shift"] == pytest.approx(np.mean(seen), rel=1e-4)
    assert state.extra["count"] == 3 * ROWS
    assert state.extra["delta"] == metrics["pref/shift"]


@pytest.mark.parametrize(("make", "value"), [(kto, 0.5), (bco, np.log(2))])
def test_the_reference_itself_is_on_neither_side_and_its_step_prefers_the_desirable(batch, make, value):
    first = step(make, batch, params=lm_params(1))
    assert first.metrics["pref/loss"] == pytest.approx(value, abs=1e-6)
    assert abs(first.metrics["pref/shift"]) < 1e-5
    moved = jax.tree.map(lambda p, g: p - 0.01 * g, lm_params(1), first.gradient["policy"])
    gain = np.asarray(summed(moved, batch.answers)) - batch.answers.ref_logprobs
    assert gain[LABELS].mean() - gain[~LABELS].mean() > 0.01


@pytest.mark.parametrize("make", [kto, bco])
def test_layout_is_irrelevant(whole, make):
    """Padding side, amount and token, and the order of rows (which mismatched answer stands beside which)."""
    order = np.random.default_rng(0).permutation(ROWS)
    moved = make_batch("left", 21, extra=3)
    moved = moved._replace(
        answers=jax.tree.map(lambda x: x[order], moved.answers), labels=moved.labels[order]
    )
    other, name = step(make, moved), "kto" if make is kto else "bco"
    assert_close((other.metrics, other.gradient), (whole[name].metrics, whole[name].gradient))


@pytest.mark.parametrize("make", [kto, bco])
def test_microbatches_accumulate_the_same_gradient_with_the_reference_on_the_fly(whole, batch, make):
    parts = step(make, without_reference(batch), microbatches=4, reference="on_the_fly")
    expected = whole["kto" if make is kto else "bco"]
    assert_close((parts.metrics, parts.gradient), (expected.metrics, expected.gradient))
    assert f"f32[{ROWS},{LENGTH}," in expected.hlo
    assert (
        f"f32[{ROWS},{LENGTH}," not in parts.hlo
    )  # neither for the shift, nor the reference, nor the gradient


@pytest.mark.parametrize(
    ("make", "mesh", "reference"),
    [(kto, "long", "precomputed"), (kto, "all", "on_the_fly"), (bco, "all", "precomputed")],
)
def test_a_mesh_gives_the_same_gradient(whole, batch, make, mesh, reference):
    rows = without_reference(batch) if reference == "on_the_fly" else batch
    spread = step(make, rows, mesh, reference=reference)
    expected = whole["kto" if make is kto else "bco"]
    assert_close((spread.metrics, spread.gradient), (expected.metrics, expected.gradient))
    assert f"f32[{ROWS},{LENGTH}," not in spread.hlo


def test_masked_tokens_enter_nothing(whole, batch):
    """Tokens outside every mask, however wild."""
    a = batch.answers
    wild = batch._replace(answers=a._replace(tokens=np.where(a.mask, a.tokens, 31)))
    found = step(kto, wild)
    assert_close((found.metrics, found.gradient), (whole["kto"].metrics, whole["kto"].gradient), 1e-7, 0)


def test_a_precomputed_reference_is_not_kept():
    assert make_kto(KTOConfig(), MODEL, DESCENT).init(lm_params(), lm_params(1), KEY).ref_params is None
