import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.ops.losses import (
    bradley_terry_loss,
    centering_loss,
    dpo_loss,
    ipo_loss,
    kwise_bradley_terry_loss,
    language_model_loss,
    plackett_luce_loss,
    ppo_policy_loss,
    value_loss,
)

RNG = np.random.default_rng(0)
B, T = 4, 6


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


LOGPROBS, OLD = -np.abs(normal(B, T)), -np.abs(normal(B, T))
ADVANTAGES, RETURNS, VALUES, OLD_VALUES = normal(B, T), normal(B, T), normal(B, T), normal(B, T)
MASK = np.arange(T)[None, :] < np.array([6, 3, 1, 5])[:, None]
LN2 = math.log(2)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# Policy gradient


@pytest.mark.parametrize("clip", [0.2, (0.1, 0.4)])
def test_ppo_policy_loss_equals_its_equation_term_by_term(clip):
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    terms, clipped, kls, ratios = [], [], [], []
    for b, t in zip(*np.nonzero(MASK), strict=True):
        ratio = math.exp(LOGPROBS[b, t] - OLD[b, t])
        bounded = min(max(ratio, 1 - low), 1 + high)
        surrogate = min(ratio * ADVANTAGES[b, t], bounded * ADVANTAGES[b, t])  # maximised
        terms.append(-surrogate)
        clipped.append(surrogate < ratio * ADVANTAGES[b, t])
        kls.append(ratio - 1 - math.log(ratio))
        ratios.append(ratio)
    loss, stats = ppo_policy_loss(LOGPROBS, OLD, ADVANTAGES, jnp.asarray(MASK), clip)
    assert float(loss) == pytest.approx(np.mean(terms), abs=1e-5)
    assert float(stats["clip_frac"]) == pytest.approx(np.mean(clipped), abs=1e-6)
    assert 0 < np.mean(clipped) < 1
    assert float(stats["approx_kl"]) == pytest.approx(np.mean(kls), abs=1e-5)
    assert float(stats["ratio_max"]) == pytest.approx(max(ratios), rel=1e-5)


def test_ppo_gradient_is_reinforce_where_old_equals_new_and_zero_where_clipped():
    gradient = jax.grad(lambda x: ppo_policy_loss(x, OLD, ADVANTAGES, jnp.asarray(MASK), 0.2)[0])
    np.testing.assert_allclose(
        gradient(jnp.asarray(OLD)), np.where(MASK, -ADVANTAGES, 0) / MASK.sum(), atol=1e-6
    )
    _, stats = ppo_policy_loss(OLD, OLD, ADVANTAGES, jnp.asarray(MASK), 0.2)
    assert float(stats["ratio_max"]) == 1
    assert float(stats["approx_kl"]) == 0
    # Ratio e: no gradient for positive advantages, a full one for negative.
    moved = np.asarray(gradient(jnp.asarray(OLD) + 1))
    np.testing.assert_array_equal(moved[MASK & (ADVANTAGES > 0)], 0)
    assert np.all(moved[MASK & (ADVANTAGES < 0)] != 0)


def test_ppo_overflow_on_a_masked_token_reaches_nothing():
    wild = jnp.where(MASK, LOGPROBS, 1e4)
    (loss, stats), gradient = jax.value_and_grad(ppo_policy_loss, has_aux=True)(
        wild, OLD, ADVANTAGES, jnp.asarray(MASK), 0.2
    )
    assert all(math.isfinite(float(x)) for x in (loss, *stats.values()))
    assert bool(jnp.all(jnp.isfinite(gradient)))


def test_value_loss_equals_its_equation_term_by_term():
    clip, terms, clipped = 0.3, [], []
    for b, t in zip(*np.nonzero(MASK), strict=True):
        near = min(max(VALUES[b, t], OLD_VALUES[b, t] - clip), OLD_VALUES[b, t] + clip)
        errors = (VALUES[b, t] - RETURNS[b, t]) ** 2, (near - RETURNS[b, t]) ** 2
        terms.append(0.5 * max(errors))
        clipped.append(errors[1] > errors[0])
    loss, frac = value_loss(VALUES, OLD_VALUES, RETURNS, jnp.asarray(MASK), clip)
    assert float(loss) == pytest.approx(np.mean(terms), rel=1e-5)
    assert float(frac) == pytest.approx(np.mean(clipped), abs=1e-6)
    assert 0 < np.mean(clipped) < 1
    plain, frac = value_loss(VALUES, OLD_VALUES, RETURNS, jnp.asarray(MASK), math.inf)
    assert float(plain) == pytest.approx(0.5 * np.mean((VALUES - RETURNS)[MASK] ** 2), rel=1e-5)
    assert float(frac) == 0


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, n: ppo_policy_loss(LOGPROBS[s], OLD[s], ADVANTAGES[s], MASK[s], 0.2, n)[0],
        lambda s, n: ppo_policy_loss(LOGPROBS[s], OLD[s], ADVANTAGES[s], MASK[s], 0.2, n)[1]["clip_frac"],
        lambda s, n: value_loss(VALUES[s], OLD_VALUES[s], RETURNS[s], MASK[s], 0.3, n)[0],
        lambda s, n: language_model_loss(LOGPROBS[s], MASK[s], n),
    ],
)
def test_microbatches_add_up_to_the_whole(loss):
    parts = [loss(s, float(MASK.sum())) for s in (slice(0, 1), slice(1, 3), slice(3, 4))]
    assert float(sum(parts)) == pytest.approx(float(loss(slice(None), None)), rel=1e-5)


def test_language_model_loss_is_the_mean_negative_log_likelihood():
    loss = language_model_loss(LOGPROBS, jnp.asarray(MASK))
    assert float(loss) == pytest.approx(-LOGPROBS[MASK].mean(), rel=1e-6)


# Preferences


def test_dpo_loss_is_ln_2_at_the_reference_and_follows_its_equation():
    pc, pr, rc, rr = normal(4, 5)
    loss, chosen, rejected = dpo_loss(pc, pr, pc, pr, beta=0.3)
    np.testing.assert_allclose(loss, LN2, rtol=1e-6)
    np.testing.assert_array_equal(chosen, 0)
    loss, chosen, rejected = dpo_loss(pc, pr, rc, rr, beta=0.3)
    np.testing.assert_allclose(chosen, 0.3 * (pc - rc), atol=1e-6)
    np.testing.assert_allclose(rejected, 0.3 * (pr - rr), atol=1e-6)
    expected = [
        -math.log(sigmoid(0.3 * ((a - c) - (b - d)))) for a, b, c, d in zip(pc, pr, rc, rr, strict=True)
    ]
    np.testing.assert_allclose(loss, expected, atol=1e-6)
    smooth, *_ = dpo_loss(pc, pr, rc, rr, beta=0.3, label_smoothing=0.1)
    swapped, *_ = dpo_loss(pr, pc, rr, rc, beta=0.3)
    np.testing.assert_allclose(smooth, 0.9 * loss + 0.1 * swapped, atol=1e-6)


def test_dpo_gradient_weighs_by_the_implicit_error():
    """Rafailov et al. 2023, below eq. 7: -beta·sigmoid(r_rejected - r_chosen)."""
    pc, pr, rc, rr = normal(4, 5)
    gradient = jax.grad(lambda x: jnp.sum(dpo_loss(x, pr, rc, rr, 0.3)[0]))(jnp.asarray(pc))
    expected = [-0.3 * sigmoid(0.3 * ((b - d) - (a - c))) for a, b, c, d in zip(pc, pr, rc, rr, strict=True)]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_ipo_loss():
    pc, pr, rc, rr = normal(4, 5)
    loss, chosen, rejected = ipo_loss(pc, pr, rc, rr, tau=0.25)
    np.testing.assert_allclose(loss, ((pc - rc) - (pr - rr) - 2) ** 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(chosen - rejected, 0.25 * ((pc - rc) - (pr - rr)), atol=1e-6)


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


@pytest.mark.parametrize("ties", [True, False])
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
                if ties:
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
