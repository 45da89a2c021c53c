import itertools

import numpy as np
import pytest

from jrlhf.ops.best_of_n import best_of_n, best_of_n_kl
from jrlhf.ops.calibration import expected_calibration_error

RNG = np.random.default_rng(0)


def test_calibration_error_by_hand():
    # One bin says 0.75 and is right half the time, the other says 0.2 and is right a quarter of the time.
    error = expected_calibration_error([0.75, 0.75, 0.2, 0.2, 0.2, 0.2], [1, 0, 1, 0, 0, 0])
    assert error == pytest.approx(2 / 6 * 0.25 + 4 / 6 * 0.05)
    assert expected_calibration_error([1.0, 0.0], [1, 0]) == 0
    assert expected_calibration_error([1.0, 0.0], [0, 1]) == 1


def test_calibration_error_is_small_exactly_when_probabilities_are_true():
    p = RNG.random(100_000)
    labels = RNG.random(100_000) < p
    assert expected_calibration_error(p, labels) < 0.01
    assert expected_calibration_error(p**2, labels) > 0.1


@pytest.mark.parametrize(("p", "labels"), [([], []), ([0.5], [1, 0]), ([1.2], [1]), ([np.nan], [1])])
def test_calibration_error_refuses_nonsense(p, labels):
    with pytest.raises(ValueError, match=r"probabilities|vectors"):
        expected_calibration_error(p, labels)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_best_of_n_is_the_average_over_all_subsets(n):
    proxy = RNG.standard_normal((3, 7))
    proxy[1] = np.round(proxy[1])  # ties
    proxy[2] = 0.0  # nothing but ties
    gold = RNG.standard_normal((3, 7))
    for found, p, g in zip(best_of_n(proxy, gold, n), proxy, gold, strict=True):
        picks = [np.array(subset) for subset in itertools.combinations(range(7), n)]
        expected = np.mean([g[s][p[s] == p[s].max()].mean() for s in picks])
        assert found == pytest.approx(expected, abs=1e-12)


def test_best_of_n_of_many_samples_does_not_overflow():
    proxy = RNG.standard_normal((1, 5000))
    assert best_of_n(proxy, proxy, 2500)[0] == pytest.approx(proxy.max(), abs=0.5)
    assert best_of_n(np.zeros((1, 5000)), np.ones((1, 5000)), 2500)[0] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("n", [0, 8])
def test_best_of_n_needs_enough_samples(n):
    with pytest.raises(ValueError, match="samples per prompt"):
        best_of_n(np.zeros((2, 7)), np.zeros((2, 7)), n)


def test_best_of_n_refuses_nan():
    with pytest.raises(ValueError, match="not finite"):
        best_of_n(np.full((1, 3), np.nan), np.zeros((1, 3)), 2)


def test_best_of_n_kl_of_a_continuous_reward():
    """KL of the law with density n·u^(n-1) on [0, 1] from the uniform one, by quadrature."""
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    for n in (1, 2, 16, 256):
        density = n * u ** (n - 1)
        log_density = np.log(n) + (n - 1) * np.log(u)
        assert best_of_n_kl(n) == pytest.approx(np.mean(density * log_density), abs=1e-4)
