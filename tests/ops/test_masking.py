import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.ops.masking import (
    last_token_index,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    positions_from_mask,
)

RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 6)).astype(np.float32)
MASK = RNG.random((4, 6)) < 0.6
KEPT = X[MASK]


@pytest.mark.parametrize("as_type", [bool, np.int32, np.float32])
def test_reductions_equal_numpy_on_the_kept_values(as_type):
    mask = jnp.asarray(MASK.astype(as_type))
    assert float(masked_sum(X, mask)) == pytest.approx(KEPT.sum(), abs=1e-6)
    assert float(masked_mean(X, mask)) == pytest.approx(KEPT.mean(), abs=1e-6)
    assert float(masked_var(X, mask)) == pytest.approx(KEPT.var(), abs=1e-6)
    for axis in (0, 1):
        expected = [np.take(X, i, 1 - axis)[np.take(MASK, i, 1 - axis)] for i in range(X.shape[1 - axis])]
        np.testing.assert_allclose(masked_mean(X, mask, axis), [k.mean() for k in expected], atol=1e-6)
        np.testing.assert_allclose(masked_var(X, mask, axis), [k.var() for k in expected], atol=1e-6)


def test_an_empty_mask_gives_zero_with_a_zero_gradient():
    value, gradient = jax.value_and_grad(masked_mean)(jnp.asarray(X), jnp.zeros((4, 6), bool))
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, np.zeros_like(X))


def test_masked_values_never_enter_not_even_nan():
    poisoned = jnp.where(MASK, X, jnp.nan)
    for reduce in (masked_sum, masked_mean, masked_var, lambda x, m: masked_whiten(x, m, True)):
        np.testing.assert_array_equal(reduce(poisoned, jnp.asarray(MASK)), reduce(X, jnp.asarray(MASK)))


def test_microbatches_with_the_global_denominator_add_up():
    """Value and gradient; the plain mean of microbatch means would weight short rows more."""
    total = jnp.asarray(MASK.sum())  # an integer array, as a caller counts tokens

    def loss(x, rows):
        return masked_mean(jnp.square(x[rows]), jnp.asarray(MASK[rows]), denominator=total)

    whole = jax.value_and_grad(lambda x: masked_mean(jnp.square(x), jnp.asarray(MASK)))(jnp.asarray(X))
    parts = [jax.value_and_grad(loss)(jnp.asarray(X), rows) for rows in (slice(0, 1), slice(1, 4))]
    summed = jax.tree.map(jnp.add, *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, summed)


def test_whitening():
    white = np.asarray(masked_whiten(X, jnp.asarray(MASK), shift_mean=True))
    assert white[MASK].mean() == pytest.approx(0, abs=1e-6)
    assert white[MASK].var() == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(white[~MASK], 0)
    kept_mean = np.asarray(masked_whiten(X, jnp.asarray(MASK), shift_mean=False))
    assert kept_mean[MASK].mean() == pytest.approx(KEPT.mean(), abs=1e-6)
    assert kept_mean[MASK].var() == pytest.approx(1, abs=1e-5)


def test_positions_do_not_depend_on_the_padding_side():
    right = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    left = right[:, ::-1]
    for mask in (left, right):
        positions = positions_from_mask(mask)
        assert positions.dtype == jnp.int32
        np.testing.assert_array_equal(positions[0][mask[0]], [0, 1, 2])
        np.testing.assert_array_equal(positions[1], [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(positions_from_mask(left)[0], [0, 0, 0, 1, 2])


def test_last_token_index():
    mask = jnp.array([[[1, 1, 0, 0], [0, 1, 0, 1]], [[0, 0, 1, 0], [0, 0, 0, 0]]], bool)
    np.testing.assert_array_equal(last_token_index(mask), [[1, 3], [2, 0]])
