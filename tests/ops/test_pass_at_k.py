import itertools

import numpy as np
import pytest

from jrlhf.ops.best_of_n import best_of_n
from jrlhf.ops.pass_at_k import is_verdict, pass_at_k, powers_of_two, verdict_summary, zero_variance


def test_it_is_the_mean_over_all_subsets():
    """By enumeration: the share of the subsets of k answers that hold a right one."""
    right = np.array([[0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [1, 0, 1, 0, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    for k in range(1, 6):
        subsets = list(itertools.combinations(range(5), k))
        expected = [np.mean([max(row[list(s)]) for s in subsets]) for row in right]
        np.testing.assert_allclose(pass_at_k(right, k), expected, rtol=1e-12)


def test_values_by_hand():
    # 2 right of 4: 1 - C(2,2)/C(4,2) = 5/6; 1 right of 10: k/10; never more than certain
    np.testing.assert_allclose(pass_at_k(np.array([[1, 1, 0, 0]]), 2), [5 / 6])
    np.testing.assert_allclose(pass_at_k(np.eye(1, 10), 3), [0.3])
    assert pass_at_k(np.array([[True, False, False]]), 3).tolist() == [1.0]
    assert pass_at_k(np.ones((2, 200)), 100).tolist() == [1.0, 1.0]
    assert pass_at_k(np.zeros((2, 200)), 100).tolist() == [0.0, 0.0]


def test_many_answers_neither_overflow_nor_lose_digits():
    # c = 1 of N: k/N exactly, where C(N, k) itself is beyond a float
    right = np.eye(1, 2000)
    np.testing.assert_allclose(pass_at_k(right, 1000), [0.5], rtol=1e-9)


def test_it_is_unbiased_where_the_plug_in_is_not():
    """Over many draws of N answers of known rate p, the mean is 1 - (1 - p)^k."""
    p, n, k = 0.2, 6, 4
    right = (np.random.default_rng(0).random((200_000, n)) < p).astype(int)
    truth = 1 - (1 - p) ** k
    estimates = pass_at_k(right, k)
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - truth) < 4 * error
    plug_in = 1 - (1 - right.mean(axis=1)) ** k
    assert abs(plug_in.mean() - truth) > 20 * error  # the negative control


def test_it_is_best_of_n_with_the_truth_as_the_proxy():
    right = (np.random.default_rng(1).random((50, 16)) < 0.3).astype(float)
    for k in powers_of_two(16):
        np.testing.assert_allclose(pass_at_k(right, k), best_of_n(right, right, k), atol=1e-12)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_more_answers_than_there_are_cannot_be_drawn(k):
    with pytest.raises(ValueError, match="needs 1 <= k <= 3"):
        pass_at_k(np.zeros((2, 3)), k)


@pytest.mark.parametrize("right", [np.array([[0.5, 1.0]]), np.array([0, 1]), np.array([[np.nan, 1.0]])])
def test_only_verdicts_are_counted(right):
    with pytest.raises(ValueError, match="0 and 1"):
        pass_at_k(right, 1)


def test_zero_variance_groups():
    scores = np.array([[1, 1, 1], [0, 0, 0], [0, 1, 0], [0.2, 0.2, 0.2], [1, 1, 0]])
    assert zero_variance(scores).tolist() == [True, True, False, True, False]


def test_what_is_a_verdict():
    assert is_verdict(np.array([0, 1, 1.0]))
    assert is_verdict(np.array([True, False]))
    assert not is_verdict(np.array([0, 1, 0.5]))
    assert not is_verdict(np.array([0, 1, -1]))
    assert not is_verdict(np.array([0, np.nan]))


def test_powers_of_two():
    assert [powers_of_two(n) for n in (1, 2, 3, 8, 12)] == [[1], [1, 2], [1, 2], [1, 2, 4, 8], [1, 2, 4, 8]]


def test_the_summary_of_an_evaluation():
    gold, length = [[1, 0, 0, 0], [1, 1, 1, 1]], [[10, 20, 30, 40], [2, 4, 6, 8]]
    assert verdict_summary(gold, length) == pytest.approx(
        {
            "pass_at_1": (1 / 4 + 1) / 2,
            "pass_at_2": (1 / 2 + 1) / 2,
            "pass_at_4": 1.0,
            "zero_variance": 0.5,
            "length_right": 6.0,  # each right answer weighs the same
            "length_wrong": 30.0,
        }
    )
    assert "length_wrong" not in verdict_summary([[1, 1]], [[3, 3]])
    assert "length_right" not in verdict_summary([[0, 0]], [[3, 3]])
    assert verdict_summary([[1], [0]], [[3], [4]]) == {}  # one answer each
    assert verdict_summary([[0.3, 1.0]], [[3, 4]]) == {}  # another kind of reward
