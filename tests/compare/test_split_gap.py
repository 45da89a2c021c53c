"""How much less gold a policy has on other prompts than on those of the main split."""

import numpy as np
import pytest
from scipy import stats

from jrlhf.compare.statistics import gap_interval, mean_interval


def nested(table: np.ndarray) -> list:
    """[S, P] as scores with one answer to each prompt."""
    return [[[value] for value in run] for run in table.tolist()]


def test_of_one_training_run_it_is_welchs_interval():
    rng = np.random.default_rng(0)
    x, y = rng.normal(1.0, 1.0, (1, 30)), rng.normal(0.2, 3.0, (1, 12))
    expected = stats.ttest_ind(x[0], y[0], equal_var=False).confidence_interval(0.95)
    gap = gap_interval(nested(x), nested(y))
    assert gap.value == pytest.approx(x.mean() - y.mean())
    assert (gap.low, gap.high) == pytest.approx((expected.low, expected.high))


def test_where_only_training_runs_differ_it_is_students_interval_of_their_differences():
    runs = np.asarray([0.1, 0.5, 0.2, 0.9])
    x, y = np.tile(1.0 + runs[:, None], (1, 10)), np.tile(runs[::-1, None], (1, 7))
    difference = x[:, 0] - y[:, 0]
    half = stats.t.ppf(0.975, 3) * stats.sem(difference)
    gap = gap_interval(nested(x), nested(y))
    assert gap.value == pytest.approx(difference.mean())
    assert gap.high - gap.value == pytest.approx(half)


def test_from_a_set_without_spread_it_is_the_interval_of_the_mean():
    rng = np.random.default_rng(2)
    x = rng.normal(0, 1, (3, 1)) + rng.normal(0, 1.5, (1, 9)) + rng.normal(0, 1, (3, 9))
    assert gap_interval(nested(x), nested(np.zeros((3, 5)))) == pytest.approx(mean_interval(nested(x)))


def test_it_covers_the_truth_as_often_as_it_says():
    """Prompts and training runs both vary, and a run that is better is so on both sets."""
    rng, covered = np.random.default_rng(1), []
    for _ in range(400):
        run = rng.normal(0, 0.3, (4, 1))
        x = 1.0 + run + rng.normal(0, 0.5, (1, 40)) + rng.normal(0, 0.3, (4, 40))
        y = 0.4 + run + rng.normal(0, 0.2, (4, 1)) + rng.normal(0, 0.5, (1, 20)) + rng.normal(0, 0.3, (4, 20))
        gap = gap_interval(nested(x), nested(y))
        covered.append(gap.low <= 0.6 <= gap.high)
    assert 0.92 <= np.mean(covered) <= 0.99


def test_without_spread_there_is_no_doubt_and_with_one_prompt_no_interval():
    assert gap_interval([[[1.0], [1.0]]], [[[0.25], [0.25]]]) == (0.75, 0.75, 0.75)
    assert np.isnan(gap_interval([[[1.0]]], [[[0.0], [1.0]]]).low)
    with pytest.raises(ValueError, match="same training runs"):
        gap_interval([[[1.0]]], [[[1.0]], [[0.0]]])
