"""Intervals against values worked by hand or by another method, and against simulated truth."""

import numpy as np
import pytest
from scipy import stats

from jrlhf.compare.statistics import (
    Interval,
    difference_interval,
    interquartile_mean,
    mean_interval,
    rate_interval,
    win_rate,
)
from jrlhf.ops.intervals import wilson_interval


def test_prompts_weigh_the_same_however_many_answers_they_have():
    assert mean_interval([[[0.0, 0.0, 0.0, 0.0], [1.0]]]).value == 0.5


def test_one_seed_agrees_with_the_central_limit_theorem():
    prompts = np.random.default_rng(0).normal(2.0, 3.0, 400)
    interval = mean_interval([prompts[:, None].tolist()])
    half = 1.96 * prompts.std(ddof=1) / 20
    assert interval.value == pytest.approx(prompts.mean())
    np.testing.assert_allclose(interval[1:], [prompts.mean() - half, prompts.mean() + half], atol=0.05)


def test_answers_to_one_prompt_are_one_draw():
    """Ten copies of each answer say nothing new: the interval must not shrink."""
    prompts = np.random.default_rng(0).normal(size=50)
    once = mean_interval([prompts[:, None].tolist()])
    copied = mean_interval([np.repeat(prompts[:, None], 10, axis=1).tolist()])
    np.testing.assert_allclose(once, copied)


def test_seeds_that_agree_in_every_prompt_but_a_shift_give_a_t_interval():
    """Without prompt-by-seed noise and with one prompt level, the mean square of seeds is all there is."""
    shifts = np.array([0.1, 0.4, 0.7])
    scores = np.broadcast_to(shifts[:, None, None], (3, 20, 1))
    mean, error = shifts.mean(), shifts.std(ddof=1) / np.sqrt(3)
    expected = stats.t.interval(0.95, 2, loc=mean, scale=error)
    np.testing.assert_allclose(mean_interval(scores.tolist())[1:], expected)


def test_two_way_variance_of_a_worked_example():
    """Table [[1, 2, 6], [2, 5, 5]]: mean squares (times cells) by hand are 1.5, 8 and 1.5."""
    table = [[[1.0], [2.0], [6.0]], [[2.0], [5.0], [5.0]]]
    # seeds: means 3, 4 -> 3 * 0.5 = 1.5; prompts: means 1.5, 3.5, 5.5 -> 2 * 4 = 8
    # residuals: [.0, -1, 1] and its negative -> 4 / 2 = 2
    seed, prompt, rest = 1.5 / 6, 8 / 6, 2 / 6
    variance = max(seed + prompt - rest, seed, prompt)
    freedom = variance**2 / (seed**2 / 1 + prompt**2 / 2 + rest**2 / 2)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    np.testing.assert_allclose(mean_interval(table), [3.5, 3.5 - half, 3.5 + half])


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (3, 0.0), (3, 0.3), (5, 0.1), (5, 0.3)])
def test_coverage(seeds, spread):
    """The truth, 0, is inside about 95% of the time, also when training randomness dominates."""
    rng = np.random.default_rng(3)
    trials, inside = 150 if seeds == 1 else 400, 0
    for _ in range(trials):
        table = (
            rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 0.6, (1, 40)) + rng.normal(0, 0.6, (seeds, 40))
        )
        inside += not mean_interval(table[:, :, None].tolist()).excludes(0.0)
    assert 0.90 <= inside / trials <= 0.99


def test_a_paired_difference_cancels_hard_prompts():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, (1, 100, 1))
    a, b = hard + 0.3 + rng.normal(0, 0.1, (1, 100, 1)), hard
    difference = difference_interval(a.tolist(), b.tolist())
    assert difference.excludes(0)
    assert (
        difference.high - difference.low
        < 0.1
        < mean_interval(a.tolist()).high - mean_interval(a.tolist()).low
    )


def test_a_mean_over_random_draws_does_not_mind_repeats():
    """Prompts drawn with replacement from twelve: 64 draws are 64 draws, and the truth is inside 95% of the time."""
    rng = np.random.default_rng(0)
    share, score = rng.dirichlet(np.ones(12)), rng.normal(size=12)
    truth, inside = share @ score, 0
    for _ in range(200):
        drawn = score[rng.choice(12, 64, p=share)] + rng.normal(0, 0.3, 64)
        inside += not mean_interval([(drawn - truth)[:, None].tolist()]).excludes(0.0)
    assert 0.90 <= inside / 200 <= 0.985


@pytest.mark.parametrize("counts", [(3, 1), (5, 3), (2, 4)])
def test_coverage_with_unequal_numbers_of_training_runs(counts):
    """No difference in expectation: 0 is inside about 95% of the time. A single run is its own truth."""
    rng = np.random.default_rng(5)
    inside, won = 0, 0
    for _ in range(300):
        hard = rng.normal(0, 0.6, (1, 40))
        a, b = (
            (rng.normal(0, 0.3 * (runs > 1), (runs, 1)) + hard + rng.normal(0, 0.5, (runs, 40)))[:, :, None]
            for runs in counts
        )
        inside += not difference_interval(a, b, paired_runs=False).excludes(0.0)
        won += not win_rate(a, b, paired_runs=False).excludes(0.5)
    assert 0.91 <= inside / 300 <= 0.99
    assert 0.91 <= won / 300 <= 0.99


def test_unpaired_variances_add():
    """With prompts that say nothing the variance is that of Welch's test, the freedom nearly so."""
    a, b = np.array([0.1, 0.5, 0.6]), np.array([1.0, 1.7])
    scores = [np.broadcast_to(x[:, None, None], (len(x), 30, 1)).tolist() for x in (a, b)]
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    interval = difference_interval(*scores, paired_runs=False)
    assert interval.value == pytest.approx(a.mean() - b.mean())
    np.testing.assert_allclose(interval[1:], [expected.low, expected.high], rtol=1e-6)


def test_every_training_run_meets_every_other_one_when_unpaired():
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 3, (3, 5, 2)).astype(float), rng.integers(0, 3, (2, 5, 4)).astype(float)
    x, y = a[:, None, :, :, None], b[None, :, :, None, :]
    expected = ((x > y) + 0.5 * (x == y)).mean()
    assert win_rate(a.tolist(), b.tolist(), paired_runs=False).value == pytest.approx(expected)


def test_reflection_turns_an_interval_around():
    a, b = np.random.default_rng(0).normal(size=(2, 3, 20, 2))
    there, back = difference_interval(a, b), difference_interval(b, a)
    np.testing.assert_allclose(there.reflected(), back)
    np.testing.assert_allclose(win_rate(a, b).reflected(1.0), win_rate(b, a))


def test_win_rate_by_hand():
    """Prompt 1: 3 beats 1 and 3, 1 ties 1 and loses to 3 -> (1 + .5 + .5 + 0) / 4. Prompt 2: a loss."""
    a, b = [[[3.0, 1.0], [0.0]]], [[[1.0, 3.0], [1.0]]]
    assert win_rate(a, b).value == pytest.approx((2.0 / 4 + 0.0) / 2)
    assert win_rate(b, a).value == pytest.approx(1 - win_rate(a, b).value)


def test_win_rate_within_a_prompt_is_mann_whitney():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 4, 7).astype(float), rng.integers(0, 4, 5).astype(float)
    expected = stats.mannwhitneyu(a, b).statistic / 35
    assert win_rate([[a.tolist()] * 2], [[b.tolist()] * 2]).value == pytest.approx(expected)


def test_a_policy_against_itself_wins_half():
    scores = np.random.default_rng(0).normal(size=(2, 30, 1)).tolist()
    assert win_rate(scores, scores) == Interval(0.5, 0.5, 0.5)


def test_a_rate_of_one_is_not_certain():
    interval = rate_interval([[[1.0, 1.0]] * 20])
    assert interval == (1.0, *wilson_interval(20, 20))
    assert interval.low == pytest.approx(1 / (1 + 1.959964**2 / 20))


def test_rates_stay_in_their_range():
    scores = [[[1.0]] * 19 + [[0.0]], [[1.0]] * 20, [[1.0]] * 10 + [[0.0]] * 10]
    interval = rate_interval(scores)
    assert 0 <= interval.low < interval.value < interval.high <= 1


def test_interquartile_mean_ignores_a_failed_seed():
    scores = [[[1.0]], [[1.1]], [[1.2]], [[-9.0]]]
    assert interquartile_mean(scores) == pytest.approx(1.05)
    assert interquartile_mean(scores[:3]) is None


def test_one_number_has_no_interval():
    interval = mean_interval([[[0.3, 0.5]]])
    assert interval.value == pytest.approx(0.4)
    assert np.isnan(interval.low)
    assert not interval.excludes(0)


def test_the_same_scores_give_the_same_interval():
    scores = np.random.default_rng(0).normal(size=(1, 30, 2)).tolist()
    assert mean_interval(scores) == mean_interval(scores)


@pytest.mark.parametrize("scores", [[], [[]], [[[]]], [[[1.0]], [[1.0], [2.0]]]])
def test_scores_without_a_mean_are_refused(scores):
    with pytest.raises(ValueError, match="prompt"):
        mean_interval(scores)


def test_pairs_must_share_their_prompts():
    with pytest.raises(ValueError, match="same runs and prompts"):
        difference_interval([[[1.0], [2.0]]], [[[1.0]]])


def test_unpaired_runs_still_share_their_prompts():
    with pytest.raises(ValueError, match="same runs and prompts"):
        win_rate([[[1.0], [2.0]]], [[[1.0]]], paired_runs=False)
