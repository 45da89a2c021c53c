"""Losses of reward models: against loops, recovered truths, and what must not enter them."""

import functools
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.ops.reward_losses import (
    aggregate_steps,
    bradley_terry_loss,
    centering_loss,
    combine_scores,
    davidson_logprobs,
    kwise_bradley_terry_loss,
    plackett_luce_loss,
    rao_kupper_logprobs,
    rating_loss,
    step_loss,
)

RNG = np.random.default_rng(0)
LN2 = math.log(2)
GOLDEN = Path(__file__).parents[1] / "golden" / "trl_rewards.npz"


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_bradley_terry_loss_is_finite_far_out_and_follows_its_equation():
    found = bradley_terry_loss(jnp.array([2.0, -200.0, 200.0]), jnp.array([0.5, 0.0, 0.0]), margin=1.0)
    np.testing.assert_allclose(found, [-math.log(sigmoid(0.5)), 201, 0], atol=1e-5)
    smooth = bradley_terry_loss(jnp.array([2.0]), jnp.array([0.5]), label_smoothing=0.2)
    np.testing.assert_allclose(
        smooth, [-0.8 * math.log(sigmoid(1.5)) - 0.2 * math.log(sigmoid(-1.5))], rtol=1e-5
    )


SCORES = normal(4, 5)
RANKS = np.array([[1, 2, 3, 4, 5], [2, 1, 2, 0, 0], [3, 1, 0, 1, 2], [0, 0, 0, 0, 1]], np.int32)
MARGINS = normal(4, 5)


@pytest.mark.parametrize("ties", ["half", "drop"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_margins", [True, False])
def test_kwise_loss_equals_a_loop_over_pairs(ties, smoothing, with_margins):
    margins = MARGINS if with_margins else np.zeros_like(MARGINS)
    loss, pairs, correct = kwise_bradley_terry_loss(
        SCORES, RANKS, MARGINS if with_margins else None, label_smoothing=smoothing, ties=ties
    )
    for row in range(4):
        terms, right = [], 0.0
        for i, j in itertools.combinations(np.flatnonzero(RANKS[row]), 2):
            if RANKS[row, i] > RANKS[row, j]:
                i, j = j, i
            gap = SCORES[row, i] - SCORES[row, j]
            if RANKS[row, i] == RANKS[row, j]:
                if ties == "half":
                    terms.append(-0.5 * math.log(sigmoid(gap)) - 0.5 * math.log(sigmoid(-gap)))
                    right += 0.5
                continue
            gap_beyond = gap - (margins[row, i] - margins[row, j])
            terms.append(
                -(1 - smoothing) * math.log(sigmoid(gap_beyond)) - smoothing * math.log(sigmoid(-gap_beyond))
            )
            right += gap > 0
        assert float(pairs[row]) == len(terms)
        assert float(loss[row]) == pytest.approx(np.mean(terms) if terms else 0, abs=1e-5)
        assert float(correct[row]) == right


def test_kwise_loss_of_equal_scores():
    loss, pairs, correct = kwise_bradley_terry_loss(jnp.zeros((1, 3)), jnp.array([[1, 2, 2]]))
    np.testing.assert_allclose(loss, [LN2], rtol=1e-6)
    np.testing.assert_array_equal(pairs, [3])
    np.testing.assert_array_equal(correct, [1.5])


@pytest.mark.parametrize(
    "loss",
    [
        lambda s: jnp.sum(kwise_bradley_terry_loss(s, RANKS)[0]),
        lambda s: jnp.sum(plackett_luce_loss(s, RANKS)),
        lambda s: jnp.sum(centering_loss(s, RANKS)),
        lambda s: jnp.sum(rating_loss(s, MARGINS, RANKS)),
        lambda s: jnp.sum(kwise_bradley_terry_loss(s, RANKS, ties="davidson", tie_parameter=0.3)[0]),
        lambda s: jnp.sum(kwise_bradley_terry_loss(s, RANKS, ties="rao_kupper", tie_parameter=0.3)[0]),
        lambda s: step_loss(s, 0.5 + 0 * MARGINS, RANKS > 0),
        lambda s: jnp.sum(aggregate_steps(s, RANKS > 0, "product")),
        lambda s: jnp.sum(aggregate_steps(s, RANKS > 0, "min")),
    ],
)
def test_the_scores_of_padding_are_never_read(loss):
    clean = jax.value_and_grad(loss)(jnp.asarray(SCORES))
    junk = jax.value_and_grad(loss)(jnp.where(RANKS > 0, SCORES, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, junk)
    np.testing.assert_array_equal(junk[1][RANKS == 0], 0)


def test_plackett_luce_is_a_distribution_over_rankings_and_its_own_sequential_choice():
    scores = normal(1, 4)
    rankings = np.array(list(itertools.permutations([1, 2, 3, 4])), np.int32)
    losses = plackett_luce_loss(np.repeat(scores, 24, 0), rankings)
    assert float(jnp.sum(jnp.exp(-losses))) == pytest.approx(1, abs=1e-5)
    for loss, ranks in zip(losses, rankings, strict=True):
        order, expected = np.argsort(ranks), 0.0
        for k in range(4):
            expected -= math.log(np.exp(scores[0, order[k]]) / np.exp(scores[0, order[k:]]).sum())
        assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_plackett_luce_of_two_is_bradley_terry_and_padding_and_ties_are_handled():
    two = plackett_luce_loss(SCORES[:, :2], jnp.full((4, 1), 1) * jnp.array([[1, 2]]))
    np.testing.assert_allclose(two, bradley_terry_loss(SCORES[:, 0], SCORES[:, 1]), atol=1e-5)
    padded = plackett_luce_loss(jnp.array([[3.0, 9.0, 1.0]]), jnp.array([[1, 0, 2]]))
    np.testing.assert_allclose(padded, [-math.log(sigmoid(2))], rtol=1e-5)
    # Two tied best of three: each drawn against all three (Breslow).
    tied = plackett_luce_loss(jnp.array([[0.5, 0.1, -1.0]]), jnp.array([[1, 1, 2]]))
    everyone = math.log(sum(math.exp(s) for s in (0.5, 0.1, -1.0)))
    np.testing.assert_allclose(tied, [2 * everyone - 0.6], rtol=1e-5)


def test_centering_loss():
    np.testing.assert_allclose(centering_loss(jnp.array([[1.0, 2.0], [0.5, -0.5]])), [9, 0], atol=1e-6)
    three = centering_loss(jnp.array([[1.0, 2.0, 7.0, 3.0]]), jnp.array([[1, 2, 0, 2]]))
    np.testing.assert_allclose(three, [(9 + 16 + 25) / 3], rtol=1e-6)


# Ties

GAPS = np.linspace(-9.0, 9.0, 41).astype(np.float32)
TIE_MODELS = {"rao_kupper": rao_kupper_logprobs, "davidson": davidson_logprobs}


def plain_tie_probabilities(kind, gap, parameter):
    """Win, tie, loss by the papers' formulas in the merits p = exp(utility)."""
    p, q, t = math.exp(gap / 2), math.exp(-gap / 2), parameter
    if kind == "davidson":
        total = p + q + t * math.sqrt(p * q)
        return p / total, t * math.sqrt(p * q) / total, q / total
    tie = (t * t - 1) * p * q / ((p + t * q) * (t * p + q))
    return p / (p + t * q), tie, q / (t * p + q)


@pytest.mark.parametrize("kind", TIE_MODELS)
@pytest.mark.parametrize("parameter", [1.01, 1.7, 6.0])
def test_win_tie_and_loss_are_a_distribution_with_the_published_probabilities(kind, parameter):
    logs = TIE_MODELS[kind](GAPS, math.log(parameter))
    np.testing.assert_allclose(sum(np.exp(x) for x in logs), 1.0, atol=1e-6)
    expected = [plain_tie_probabilities(kind, float(gap), parameter) for gap in GAPS]
    np.testing.assert_allclose(np.exp(np.stack(logs, axis=1)), expected, atol=1e-6)
    win, tie, loss = logs
    np.testing.assert_allclose(win, loss[::-1], atol=1e-5)
    np.testing.assert_allclose(tie, tie[::-1], atol=1e-5)
    assert np.argmax(tie) == len(GAPS) // 2


@pytest.mark.parametrize("kind", TIE_MODELS)
def test_tie_models_far_out_stay_finite(kind):
    value, slope = jax.value_and_grad(lambda g: jnp.sum(jnp.stack(TIE_MODELS[kind](g, 0.5))))(
        jnp.float32(300)
    )
    assert math.isfinite(value)
    assert math.isfinite(slope)


@pytest.mark.parametrize("kind", TIE_MODELS)
def test_kwise_loss_with_a_tie_model_equals_a_loop_over_pairs(kind):
    loss, pairs, correct = kwise_bradley_terry_loss(
        SCORES, RANKS, label_smoothing=0.1, ties=kind, tie_parameter=math.log(1.7)
    )
    for row in range(4):
        terms, right = [], 0.0
        for i, j in itertools.combinations(np.flatnonzero(RANKS[row]), 2):
            if RANKS[row, i] > RANKS[row, j]:
                i, j = j, i
            win, tie, lose = plain_tie_probabilities(kind, float(SCORES[row, i] - SCORES[row, j]), 1.7)
            tied = RANKS[row, i] == RANKS[row, j]
            terms.append(-math.log(tie) if tied else -0.9 * math.log(win) - 0.1 * math.log(lose))
            right += 0.5 if tied else float(SCORES[row, i] > SCORES[row, j])
        assert float(pairs[row]) == len(terms)
        assert float(loss[row]) == pytest.approx(np.mean(terms) if terms else 0, abs=1e-5)
        assert float(correct[row]) == right


# Known truths are found again

UTILITIES = np.array([1.2, 0.4, 0.0, -0.5, -1.1], np.float32)


@functools.partial(jax.jit, static_argnums=0)
def fitted(loss, start, *data):
    """The minimum of a convex loss of a dict of vectors."""

    def step(params, _):
        return jax.tree.map(lambda p, g: p - 2.0 * g, params, jax.grad(loss)(params, *data)), None

    return jax.lax.scan(step, start, length=400)[0]


def tie_loss(params, kind_is_davidson, ranks, i, j):
    scores = jnp.stack([params["u"][i], params["u"][j]], axis=1)
    loss = functools.partial(kwise_bradley_terry_loss, scores, ranks, tie_parameter=params["tie"])
    kinds = [jnp.mean(loss(ties=kind)[0]) for kind in ("rao_kupper", "davidson")]
    return jnp.where(kind_is_davidson, kinds[1], kinds[0])


@pytest.mark.parametrize("kind", TIE_MODELS)
def test_utilities_and_tie_parameter_are_recovered_from_simulated_labels(kind):
    rng, n, parameter = np.random.default_rng(1), 20_000, 1.8
    i, j = rng.integers(0, 5, (2, n))
    i, j = i[i != j], j[i != j]
    table = np.array(
        [[plain_tie_probabilities(kind, float(a - b), parameter) for b in UTILITIES] for a in UTILITIES]
    )
    drawn = np.sum(rng.random((len(i), 1)) > np.cumsum(table[i, j], axis=1), axis=1)
    ranks = np.array([[1, 2], [1, 1], [2, 1]], np.int32)[drawn]
    start = {"u": jnp.zeros(5), "tie": jnp.float32(0.2)}
    found = fitted(tie_loss, start, kind == "davidson", ranks, i, j)
    np.testing.assert_allclose(found["u"] - np.mean(found["u"]), UTILITIES, atol=0.08)
    assert math.exp(found["tie"]) == pytest.approx(parameter, abs=0.08)


def ranking_loss(params, ranks):
    return jnp.mean(plackett_luce_loss(jnp.broadcast_to(params["u"], ranks.shape), ranks))


def test_plackett_luce_recovers_utilities_from_simulated_rankings():
    rng = np.random.default_rng(2)
    order = np.argsort(-(UTILITIES + rng.gumbel(size=(8000, 5))), axis=1)
    ranks = (np.argsort(order, axis=1) + 1).astype(np.int32)
    found = fitted(ranking_loss, {"u": jnp.zeros((1, 5))}, ranks)["u"][0]
    np.testing.assert_allclose(found - np.mean(found), UTILITIES, atol=0.08)


# Ratings and steps


def test_rating_loss_is_the_mean_squared_error_of_a_prompts_answers():
    loss = rating_loss(SCORES, MARGINS, RANKS)
    expected = [np.mean((SCORES - MARGINS)[row][RANKS[row] > 0] ** 2) for row in range(4)]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


LOGITS, STEP_LABELS = normal(4, 6), RNG.random((4, 6)).astype(np.float32)
ENDS = np.array([[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1]], bool)


def test_step_loss_equals_a_loop_and_microbatches_add_up():
    terms = [
        -y * math.log(sigmoid(x)) - (1 - y) * math.log(sigmoid(-x))
        for x, y in zip(LOGITS[ENDS].tolist(), STEP_LABELS[ENDS].tolist(), strict=True)
    ]
    assert float(step_loss(LOGITS, STEP_LABELS, ENDS)) == pytest.approx(np.mean(terms), rel=1e-5)
    parts = [
        step_loss(LOGITS[s], STEP_LABELS[s], ENDS[s], float(ENDS.sum())) for s in (slice(1), slice(1, 4))
    ]
    assert float(sum(parts)) == pytest.approx(np.mean(terms), rel=1e-5)


@pytest.mark.parametrize("how", ["min", "product", "last", "mean"])
def test_an_answers_score_is_put_together_from_those_of_its_steps(how):
    found = aggregate_steps(np.where(ENDS, LOGITS, np.nan), ENDS, how)
    put = {"min": min, "product": math.prod, "last": lambda p: p[-1], "mean": np.mean}[how]
    expected = [
        put([sigmoid(x) for x in row[ends].tolist()]) if ends.any() else 0.0
        for row, ends in zip(LOGITS, ENDS, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# Ensembles


def test_ensembles_are_combined_by_their_formulas():
    scores = normal(5, 7)
    np.testing.assert_allclose(combine_scores(scores, "mean"), scores.mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(combine_scores(scores, "min"), scores.min(axis=0))
    careful = scores.mean(axis=0) - 0.7 * np.mean((scores - scores.mean(axis=0)) ** 2, axis=0)
    np.testing.assert_allclose(combine_scores(scores, "mean_minus_variance", 0.7), careful, atol=1e-6)
    same = np.repeat(scores[:1], 4, axis=0)
    for how in ("mean", "min", "mean_minus_variance"):
        np.testing.assert_allclose(combine_scores(same, how, 3.0), scores[0], atol=1e-6)


# Parity with trl (RewardTrainer) and transformers (token classification with -100)


@pytest.mark.parametrize("name", ["plain", "margin", "centered"])
def test_pairwise_losses_and_gradients_are_those_of_trl(name):
    golden = np.load(GOLDEN)
    n = len(golden["margin"])
    ranks = jnp.broadcast_to(jnp.array([1, 2]), (n, 2))
    margins = np.stack([golden["margin"], np.zeros(n, np.float32)], axis=1) if name != "plain" else None

    def loss(scores):
        pairs = scores.reshape(2, n).T
        value = jnp.mean(kwise_bradley_terry_loss(pairs, ranks, margins)[0])
        return value + (golden["centering"] * jnp.mean(centering_loss(pairs)) if name == "centered" else 0.0)

    found, gradient = jax.value_and_grad(loss)(jnp.asarray(golden["scores"]))
    np.testing.assert_allclose(found, golden[f"{name}_loss"], atol=1e-6)
    np.testing.assert_allclose(gradient, golden[f"{name}_gradient"], atol=1e-6)


def test_step_loss_and_gradient_are_those_of_a_two_label_token_classifier():
    """Our one logit is the difference of its two; the gradient of each of these is plus or minus ours."""
    golden = np.load(GOLDEN)
    logits, labels = golden["step_logits"], golden["step_labels"]
    known = labels >= 0
    assert 0 < known.sum() < known.size
    loss = lambda x: step_loss(x, np.where(known, labels, np.nan).astype(np.float32), known)  # noqa: E731
    found, gradient = jax.value_and_grad(loss)(jnp.asarray(logits[..., 1] - logits[..., 0]))
    np.testing.assert_allclose(found, golden["step_loss"], atol=1e-6)
    np.testing.assert_allclose(np.stack([-gradient, gradient], axis=-1), golden["step_gradient"], atol=1e-6)
