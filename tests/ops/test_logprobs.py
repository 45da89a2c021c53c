import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jrlhf.ops.logprobs import (
    chunked_logprobs_and_entropy,
    entropy,
    logprobs_and_entropy,
    token_logprobs,
    weighted_logprobs,
)

RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.standard_normal((2, 5, 11))).astype(np.float32)
TARGETS = RNG.integers(0, 11, (2, 5)).astype(np.int32)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_against_scipy(temperature):
    logps = scipy.special.log_softmax(LOGITS.astype(np.float64) / temperature, axis=-1)
    chosen = np.take_along_axis(logps, TARGETS[..., None], axis=-1)[..., 0]
    entropies = scipy.special.entr(np.exp(logps)).sum(-1)
    np.testing.assert_allclose(token_logprobs(LOGITS, TARGETS, temperature), chosen, atol=1e-5)
    np.testing.assert_allclose(entropy(LOGITS, temperature), entropies, atol=1e-5)
    for found, expected in zip(
        logprobs_and_entropy(LOGITS, TARGETS, temperature), (chosen, entropies), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bfloat16_logits_are_normalised_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    found = token_logprobs(logits, TARGETS, jnp.float32(0.7))  # a traced temperature is an array
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, token_logprobs(logits.astype(jnp.float32), TARGETS, 0.7))


def test_forbidden_tokens_add_no_entropy_and_no_nan_gradient():
    allowed = np.arange(11) < 7
    logits = jnp.where(allowed, LOGITS, -jnp.inf)
    np.testing.assert_allclose(entropy(logits), entropy(LOGITS[..., :7]), atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(entropy(jnp.where(allowed, x, -jnp.inf))))(jnp.asarray(LOGITS))
    assert bool(jnp.all(jnp.isfinite(gradient)))
    np.testing.assert_array_equal(gradient[..., 7:], 0)


def head_arrays(dtype, positions=10, vocabulary=37):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (3, positions, 16), dtype)
    kernel = jax.random.normal(keys[1], (16, vocabulary)) / 4
    targets = jax.random.randint(keys[2], (3, positions), 0, vocabulary)
    weights = jax.random.normal(keys[3], (2, 3, positions))
    return hidden, kernel, targets, weights


def unchunked(hidden, kernel, targets, temperature):
    logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logprobs_and_entropy(logits, targets, temperature)


@pytest.mark.parametrize("chunk", [3, 5, 64])  # 3 does not divide 10; 64 is longer than it
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 2e-5), (jnp.bfloat16, 0.03)])
def test_chunked_equals_unchunked_in_value_and_gradient(chunk, dtype, atol):
    hidden, kernel, targets, weights = head_arrays(dtype)

    def weighted(f):
        def loss(hidden, kernel, temperature):
            logprobs, entropies = f(hidden, kernel, targets, temperature)
            return jnp.sum(weights[0] * logprobs + weights[1] * entropies), (logprobs, entropies)

        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        return gradient(hidden, kernel, jnp.float32(0.8))

    (_, outputs), gradients = weighted(lambda *a: chunked_logprobs_and_entropy(*a, chunk=chunk))
    (_, expected), expected_gradients = weighted(unchunked)
    for found, wanted in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_allclose(
            found.astype(jnp.float32),
            wanted.astype(jnp.float32),
            rtol=0.02 if atol > 1e-3 else 1e-4,
            atol=atol,
        )


def capped(logits):
    """A soft-cap, and two rows that only pad the vocabulary."""
    padding = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) >= logits.shape[-1] - 2
    return jnp.where(padding, -jnp.inf, 2 * jnp.tanh(logits / 2))


@pytest.mark.parametrize("chunk", [4, 64])
def test_what_is_done_to_logits_has_its_gradient_in_chunks_too(chunk):
    hidden, kernel, targets, weights = head_arrays(jnp.float32)
    targets = jnp.minimum(targets, 34)

    def gradient(f):
        def loss(hidden, kernel):
            logprobs, entropies = f(hidden, kernel)
            return jnp.sum(weights[0] * logprobs + weights[1] * entropies)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, kernel)

    found = gradient(
        lambda h, k: chunked_logprobs_and_entropy(h, k, targets, 0.7, chunk=chunk, of_logits=capped)
    )
    expected = gradient(lambda h, k: logprobs_and_entropy(capped(h @ k), targets, 0.7))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)


@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 2e-5), (jnp.bfloat16, 0.03)])
def test_weighted_sum_in_one_pass(chunk, dtype, atol):
    hidden, kernel, targets, weights = head_arrays(dtype)
    targets = jnp.minimum(targets, 34)

    def one_pass(hidden, kernel):
        total, *each = weighted_logprobs(hidden, kernel, targets, weights[0], chunk=chunk, of_logits=capped)
        return -2 * total, each

    def plain(hidden, kernel):
        logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
        logprobs, entropies = logprobs_and_entropy(capped(logits), targets)
        return -2 * jnp.sum(weights[0] * logprobs), [logprobs, entropies]

    # Each on its own: without a gradient another program is run.
    alone = jax.jit(one_pass)(hidden, kernel)
    found, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(hidden, kernel)
        for f in (one_pass, plain)
    )
    close = lambda a, b: np.testing.assert_allclose(  # noqa: E731
        a.astype(jnp.float32), b.astype(jnp.float32), rtol=0.02 if atol > 1e-3 else 1e-4, atol=atol
    )
    jax.tree.map(close, alone, expected[0])
    jax.tree.map(close, found, expected)
    assert [x.dtype for x in found[1]] == [hidden.dtype, kernel.dtype]


def test_chunks_of_which_nothing_is_needed_are_left_out():
    """What is in them is not even looked at: NaN does not come through, neither as a value nor as a gradient."""
    hidden, kernel, targets, weights = head_arrays(jnp.float32)
    broken = hidden.at[:, 6:].set(jnp.nan)  # two of three chunks, the last one cut
    needed = jnp.zeros(targets.shape, bool).at[1, :6].set(True)

    def total(hidden, kernel, chunked):
        if chunked:
            f = chunked_logprobs_and_entropy
            logprobs, entropies = f(hidden, kernel, targets, 0.8, chunk=3, needed=needed)
        else:
            logprobs, entropies = unchunked(hidden, kernel, targets, 0.8)
        return jnp.sum(jnp.where(needed, weights[0] * logprobs + weights[1] * entropies, 0.0))

    def one_pass(hidden, kernel, chunked):
        if not chunked:
            return jnp.sum(jnp.where(needed, weights[0] * unchunked(hidden, kernel, targets, 1.0)[0], 0.0))
        return weighted_logprobs(hidden, kernel, targets, jnp.where(needed, weights[0], 0.0), chunk=3)[0]

    for loss in (total, one_pass):
        value = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
        found, expected = value(broken, kernel, True), value(hidden, kernel, False)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, expected)
        assert np.isfinite(jax.jit(loss, static_argnums=2)(broken, kernel, True))


def test_weighted_sum_needs_the_logits_once():
    hidden, kernel, targets, weights = head_arrays(jnp.float32)
    loss = lambda h, k: weighted_logprobs(h, k, targets, weights[0], chunk=5)[0]  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, kernel))
    assert text.count("dot_general") == 3  # the logits, and the two derivatives


def test_every_product_of_the_head_takes_the_compute_dtype():
    """Forward and backward: a float32 cotangent would make float32 products, several times slower."""
    hidden, kernel, targets, _ = head_arrays(jnp.bfloat16)

    def loss(hidden, kernel):
        return jnp.sum(chunked_logprobs_and_entropy(hidden, kernel, targets, chunk=5)[0])

    def products(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield [v.aval.dtype for v in (*equation.invars, *equation.outvars)]
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from products(inner)

    found = list(products(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(hidden, kernel).jaxpr))
    assert len(found) == 4  # forward, forward again in the backward pass, and the two derivatives
    assert all(dtypes == [jnp.bfloat16, jnp.bfloat16, jnp.float32] for dtypes in found)


def test_chunked_memory_is_a_fraction_of_the_logits():
    """Compiled gradient at a vocabulary of 32k: the temporaries hold a few chunks of logits, not all."""
    B, T, D, V, chunk = 4, 256, 32, 32_768, 16
    shapes = (
        jax.ShapeDtypeStruct((B, T, D), jnp.float32),
        jax.ShapeDtypeStruct((D, V), jnp.float32),
        jax.ShapeDtypeStruct((B, T), jnp.int32),
    )

    def temporaries(f):
        gradient = jax.grad(lambda h, k, t: sum(jnp.sum(x) for x in f(h, k, t, 1.0)), argnums=(0, 1))
        return jax.jit(gradient).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    all_logits = 4 * B * T * V
    assert temporaries(unchunked) >= all_logits
    assert temporaries(lambda *a: chunked_logprobs_and_entropy(*a, chunk=chunk)) < all_logits / 4


def test_chunk_must_be_positive():
    hidden, kernel, targets, _ = head_arrays(jnp.float32)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        chunked_logprobs_and_entropy(hidden, kernel, targets, chunk=0)
