"""Log-probabilities and entropies of tokens, always in float32.

The policy is the distribution that is sampled: logits are divided by the temperature (> 0) before the
log-softmax, in the sampler and here alike.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def token_logprobs(logits: jax.Array, targets: jax.Array, temperature: jax.Array | float = 1.0) -> jax.Array:
    """log softmax(logits / temperature)[targets]; logits [..., V], targets [...] int -> [...] float32."""
    logits = logits.astype(jnp.float32) / temperature
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits: jax.Array, temperature: jax.Array | float = 1.0) -> jax.Array:
    """Entropy in nats of softmax(logits / temperature), [..., V] -> [...]; logits of -inf are allowed."""
    return _entropy(jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1))


def _entropy(logps: jax.Array) -> jax.Array:
    finite = jnp.where(jnp.isneginf(logps), 0.0, logps)  # 0·log 0 = 0, with a gradient of 0
    return -jnp.sum(jnp.exp(logps) * finite, axis=-1)


def logprobs_and_entropy(
    logits: jax.Array, targets: jax.Array, temperature: jax.Array | float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """(`token_logprobs`, `entropy`) from one log-softmax; logits [..., V], targets [...] -> two [...]."""
    logps = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
    return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0], _entropy(logps)


@jax.custom_vjp
def project(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """hidden [..., D] @ kernel [D, V]: products in the hidden's dtype, sums and result in float32.

    The derivative is written out to keep its products in that dtype as well: left alone, the float32
    cotangent would turn both of them into float32 products, several times slower on accelerators.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])  # two matrices: see `models.layers.product`
    logits = jnp.matmul(flat, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logits.reshape(*hidden.shape[:-1], kernel.shape[1])


def _project_fwd(hidden, kernel):
    return project(hidden, kernel), (hidden, kernel)


def _project_bwd(saved, cotangent):
    hidden, kernel = saved
    cotangent = cotangent.astype(hidden.dtype)
    hidden_ND, cotangent_NV = hidden.reshape(-1, hidden.shape[-1]), cotangent.reshape(-1, cotangent.shape[-1])
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    d_hidden = product(cotangent_NV, kernel.astype(hidden.dtype).T).reshape(hidden.shape)
    d_kernel = product(hidden_ND.T, cotangent_NV)
    return d_hidden.astype(hidden.dtype), d_kernel.astype(kernel.dtype)


project.defvjp(_project_fwd, _project_bwd)


def _identity(logits: jax.Array) -> jax.Array:
    return logits


def chunked_logprobs_and_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    temperature: jax.Array | float = 1.0,
    *,
    chunk: int,
    of_logits: Callable[[jax.Array], jax.Array] = _identity,
    needed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(`token_logprobs`, `entropy`) of logits = hidden @ kernel, without ever holding all the logits.

    hidden [B, T, D], kernel [D, V], targets [B, T] -> two [B, T] float32. The head and the log-softmax run
    on `chunk` positions at a time (a scan along T), forward and backward, so that [B, chunk, V] float32 is
    the largest array; the backward pass computes each chunk's logits again, and with their normalisers, which are
    kept, the gradient directly. `of_logits` (hashable, of static values alone) is applied to the logits before the
    temperature: a soft-cap. The product is taken in `hidden.dtype` and summed in float32; the kernel's gradient is
    accumulated in the kernel's dtype.

    needed: [B, T] bool. Chunks of which nothing is needed are left out, both ways: zeros stand there, with no gradient.
    """
    if needed is None:
        needed = jnp.ones(targets.shape, bool)
    return _chunked(hidden, kernel, targets, jnp.asarray(temperature, jnp.float32), needed, chunk, of_logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _chunked(hidden, kernel, targets, temperature, needed, chunk, of_logits):
    return _chunked_fwd(hidden, kernel, targets, temperature, needed, chunk, of_logits)[0]


def _chunked_fwd(hidden, kernel, targets, temperature, needed, chunk, of_logits):
    def compute(hidden, targets):
        return _normalised(of_logits(project(hidden, kernel)) / temperature, targets)

    def one_chunk(_, rows):
        hidden, targets, needed = rows
        return None, _where_needed(jnp.any(needed), compute, hidden, targets)

    rows = _split_positions((hidden, targets, needed), chunk)
    _, out = jax.lax.scan(one_chunk, None, rows)
    logps, entropies, norms = _merge_positions(out, targets.shape[1])
    return (logps, entropies), (hidden, kernel, targets, temperature, needed, norms, entropies)


def _where_needed(needed: jax.Array, f: Callable[..., Any], *args: Any) -> Any:
    """`f(*args)`, or zeros of its shapes without the work."""
    zeros = lambda *args: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, *args))  # noqa: E731
    return jax.lax.cond(needed, f, zeros, *args)


def _added_where(needed: jax.Array, added: Callable[..., Any], total: jax.Array) -> Any:
    """`added(total) -> (total, results)`, or the same total and zeros. (The sum is a part of the branch so that it is
    taken where its summand is made: a head's gradient is as large as the head.)"""
    _, results = jax.eval_shape(added, total)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), results)
    return jax.lax.cond(needed, added, lambda total: (total, zeros), total)


def _normalised(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of the targets, entropy and logsumexp of logits [..., V], in one pass over them."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    below = logits - top
    mass = jnp.exp(below)
    total = jnp.sum(mass, axis=-1)
    mean = (
        jnp.sum(jnp.where(mass > 0, mass * below, 0.0), axis=-1) / total
    )  # a forbidden token is -inf: 0 * inf
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    norm = top[..., 0] + jnp.log(total)
    return chosen - norm, jnp.log(total) - mean, norm


def _is_target(targets: jax.Array, logits: jax.Array) -> jax.Array:
    return targets[..., None] == jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)


def _chunked_bwd(chunk, of_logits, saved, cotangents):
    hidden, kernel, targets, temperature, needed, norms, entropies = saved
    d_logps, d_entropies = cotangents

    def compute(hidden, targets, norms, entropies, d_logps, d_entropies):
        logits, back = jax.vjp(lambda hidden, kernel: of_logits(project(hidden, kernel)), hidden, kernel)
        # d log p_y = 1_y - p and dH = -p (log p + H), each with respect to logits / temperature
        logps = logits / temperature - norms[..., None]
        p = jnp.exp(logps)
        surprise = jnp.where(p > 0, logps, 0.0) + entropies[..., None]
        d = jnp.where(_is_target(targets, logits), d_logps[..., None], 0.0) - p * (
            d_logps[..., None] + d_entropies[..., None] * surprise
        )
        d_temperature = -jnp.sum(jnp.where(p > 0, d * logits, 0.0)) / temperature**2
        return *back(d / temperature), d_temperature

    def one_chunk(d_kernel, rows):
        needed, *arrays = rows

        def added(d_kernel):
            d_hidden, more, d_temperature = compute(*arrays)
            return d_kernel + more, (d_hidden, d_temperature)

        return _added_where(jnp.any(needed), added, d_kernel)

    rows = _split_positions((needed, hidden, targets, norms, entropies, d_logps, d_entropies), chunk)
    d_kernel, (d_hidden, d_temperature) = jax.lax.scan(one_chunk, jnp.zeros_like(kernel), rows)
    return _merge_positions(d_hidden, hidden.shape[1]), d_kernel, None, jnp.sum(d_temperature), None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def weighted_logprobs(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int,
    of_logits: Callable[[jax.Array], jax.Array] = _identity,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Σ weights · log-probability, [] float32, beside the log-probabilities and entropies themselves, [B, T] float32.

    For losses whose weights [B, T] are known before the forward pass (supervised learning): the sum's gradient is
    computed on the way, while a chunk's logits are there, so that they are needed once. `hidden` and `kernel` alone
    have a gradient, and the sum's alone. Chunks without any weight are left out: zeros stand there. Otherwise as
    `chunked_logprobs_and_entropy`.
    """
    return _weighted(hidden, kernel, targets, jax.lax.stop_gradient(weights), chunk, of_logits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _weighted(hidden, kernel, targets, weights, chunk, of_logits):
    (logps, entropies), _ = _chunked_fwd(
        hidden, kernel, targets, jnp.float32(1.0), weights != 0, chunk, of_logits
    )
    return jnp.sum(weights * logps), logps, entropies


def _weighted_fwd(hidden, kernel, targets, weights, chunk, of_logits):
    def compute(hidden, targets, weights):
        logits, back = jax.vjp(lambda hidden, kernel: of_logits(project(hidden, kernel)), hidden, kernel)
        logps, entropies, norms = _normalised(logits, targets)
        p = jnp.exp(logits - norms[..., None])
        d = weights[..., None] * (_is_target(targets, logits).astype(jnp.float32) - p)
        return logps, entropies, *back(d)

    def one_chunk(d_kernel, rows):
        def added(d_kernel):
            *out, more = compute(*rows)
            return d_kernel + more, out

        return _added_where(jnp.any(rows[-1] != 0), added, d_kernel)

    rows = _split_positions((hidden, targets, weights), chunk)
    d_kernel, out = jax.lax.scan(one_chunk, jnp.zeros_like(kernel), rows)
    logps, entropies, d_hidden = _merge_positions(out, targets.shape[1])
    return (jnp.sum(weights * logps), logps, entropies), (d_hidden, d_kernel)


def _weighted_bwd(chunk, of_logits, saved, cotangents):
    d_hidden, d_kernel = saved
    scale = cotangents[0]
    return (d_hidden * scale.astype(d_hidden.dtype)), (d_kernel * scale.astype(d_kernel.dtype)), None, None


_weighted.defvjp(_weighted_fwd, _weighted_bwd)


def in_chunks_of_positions(
    f: Callable[..., Any], shared: Any, arrays: tuple[jax.Array, ...], chunk: int
) -> Any:
    """`f(shared, *arrays)` on `chunk` positions at a time, for an f that treats positions apart.

    arrays [B, T, ...] -> a tree of [B, T, ...]. A scan along T of which nothing is kept for the backward pass: it
    calls f again on each chunk. The gradient of `shared` (a head's kernel) is accumulated in its own dtype.
    """
    # Closing over `shared` uncast makes the backward scan accumulate its gradient in its own dtype.
    step = jax.checkpoint(f)
    rows = _split_positions(arrays, chunk)
    _, out = jax.lax.scan(lambda carry, xs: (carry, step(shared, *xs)), None, rows)
    return _merge_positions(out, arrays[0].shape[1])


def _split_positions(tree: Any, chunk: int) -> Any:
    """[B, T, ...] -> [chunks, B, chunk, ...], zeros behind the last position."""
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")

    def split(x):
        B, T = x.shape[:2]
        size = min(chunk, T)
        n = -(-T // size)
        x = jnp.pad(x, ((0, 0), (0, n * size - T), *((0, 0) for _ in x.shape[2:])))
        return jnp.swapaxes(x.reshape(B, n, size, *x.shape[2:]), 0, 1)

    return jax.tree.map(split, tree)


def _merge_positions(tree: Any, length: int) -> Any:
    """The inverse of `_split_positions`."""

    def merge(x):
        n, B, size = x.shape[:3]
        return jnp.swapaxes(x, 0, 1).reshape(B, n * size, *x.shape[3:])[:, :length]

    return jax.tree.map(merge, tree)
