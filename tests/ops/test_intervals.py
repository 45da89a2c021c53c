"""Wilson's interval against its closed form and a published value."""

import numpy as np
import pytest

from jrlhf.ops.intervals import wilson_interval


def test_wilson_against_the_closed_form():
    for right, n in ((8, 10), (0, 5), (50, 100)):
        z, p = 1.959964, right / n
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        assert wilson_interval(right, n) == pytest.approx((max(middle - half, 0), middle + half), abs=1e-5)


def test_wilson_interval_of_a_published_value():
    """Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662."""
    np.testing.assert_allclose(wilson_interval(81, 263), [0.2553, 0.3662], atol=5e-5)
