"""Several rewards made into one number: each rule against arithmetic by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.ops.mixing import mix_scores

SCORES = np.float32([[1.0, 0.0, 0.5, 1.0], [2.0, 3.0, 0.2, 0.4], [4.0, 5.0, 6.0, 7.0]])  # 3 parts, 4 answers


@pytest.mark.parametrize(
    ("how", "weights", "expected"),
    [
        ("sum", [1.0, 2.0, -1.0], [1.0, 1.0, -5.1, -5.2]),
        ("product", [1.0, 2.0, 0.5], [8.0, 0.0, 0.5 * 0.04 * 6**0.5, 0.16 * 7**0.5]),
        ("min", [1.0, 2.0, 1.0], [1.0, 0.0, 0.4, 0.8]),
    ],
)
def test_rules(how, weights, expected):
    np.testing.assert_allclose(mix_scores(SCORES, how, jnp.float32(weights)), expected, rtol=1e-5)


def test_a_gate_that_is_not_passed_ends_the_sum_after_its_own_part():
    """Gates 0.5, 0.4 and none. The second answer fails the first gate; the third fails the second; the fourth passes
    both, the second one exactly."""
    gates = np.float32([0.5, 0.4, -np.inf])
    weights = jnp.float32([1.0, 2.0, 10.0])
    got = mix_scores(SCORES, "gates", weights, gates=gates)
    np.testing.assert_allclose(got, [1 + 4 + 40, 0.0, 0.5 + 0.4, 1 + 0.8 + 70], rtol=1e-6)
    # A gate is of the score as it came, whatever the parts are normalised by.
    mean, std = jnp.float32([1.0, 0.0, 4.0]), jnp.float32([0.5, 1.0, 2.0])
    got = mix_scores(SCORES, "gates", weights, mean, std, gates)
    np.testing.assert_allclose(got, [0 + 4 + 0, -2.0, -1 + 0.4, 0 + 0.8 + 15], rtol=1e-6)


def test_by_group_takes_the_part_of_each_answers_group():
    chosen = np.int32([0, 1, 2, 0])
    got = mix_scores(SCORES, "by_group", jnp.float32([1.0, 2.0, 1.0]), chosen=chosen)
    np.testing.assert_allclose(got, [1.0, 6.0, 6.0, 1.0])
