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
    return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _project_fwd(hidden, kernel):
    return project(hidden, kernel), (hidden, kernel)


def _project_bwd(saved, cotangent):
    hidden, kernel = saved
    cotangent = cotangent.astype(hidden.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    d_hidden = product("...v,dv->...d", cotangent, kernel.astype(hidden.dtype))
    d_kernel = product("...d,...v->dv", hidden, cotangent)
    return d_hidden.astype(hidden.dtype), d_kernel.astype(kernel.dtype)


project.defvjp(_project_fwd, _project_bwd)


def chunked_logprobs_and_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    temperature: jax.Array | float = 1.0,
    *,
    chunk: int,
    of_logits: Callable[[jax.Array], jax.Array] = lambda logits: logits,
) -> tuple[jax.Array, jax.Array]:
    """(`token_logprobs`, `entropy`) of logits = hidden @ kernel, without ever holding all the logits.

    hidden [B, T, D], kernel [D, V], targets [B, T] -> two [B, T] float32. The head and the log-softmax run
    on `chunk` positions at a time (a scan along T), forward and backward, so that [B, chunk, V] float32 is
    the largest array; the backward pass computes each chunk's logits again. `of_logits` is applied
    to them before the temperature (a soft-cap). The product is taken in
    `hidden.dtype` and summed in float32; the kernel's gradient is accumulated in the kernel's dtype.
    """

    def one_chunk(kernel, hidden, targets):
        return logprobs_and_entropy(of_logits(project(hidden, kernel)), targets, temperature)

    return in_chunks_of_positions(one_chunk, kernel, (hidden, targets), chunk)


def in_chunks_of_positions(
    f: Callable[..., Any], shared: Any, arrays: tuple[jax.Array, ...], chunk: int
) -> Any:
    """`f(shared, *arrays)` on `chunk` positions at a time, for an f that treats positions apart.

    arrays [B, T, ...] -> a tree of [B, T, ...]. A scan along T of which nothing is kept for the backward pass: it
    calls f again on each chunk. The gradient of `shared` (a head's kernel) is accumulated in its own dtype.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    B, T = arrays[0].shape[:2]
    chunk = min(chunk, T)
    n_chunks = -(-T // chunk)

    def split(x):  # [B, T, ...] -> [n_chunks, B, chunk, ...]
        x = jnp.pad(x, ((0, 0), (0, n_chunks * chunk - T), *((0, 0) for _ in x.shape[2:])))
        return jnp.swapaxes(x.reshape(B, n_chunks, chunk, *x.shape[2:]), 0, 1)

    def merge(x):  # [n_chunks, B, chunk, ...] -> [B, T, ...]
        return jnp.swapaxes(x, 0, 1).reshape(B, n_chunks * chunk, *x.shape[3:])[:, :T]

    # Closing over `shared` uncast makes the backward scan accumulate its gradient in its own dtype.
    step = jax.checkpoint(f)
    _, out = jax.lax.scan(lambda carry, xs: (carry, step(shared, *xs)), None, jax.tree.map(split, arrays))
    return jax.tree.map(merge, out)
