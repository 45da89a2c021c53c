"""Estimators of KL(π‖π_ref) from samples of π (Schulman 2020, "Approximating KL divergence").

Each takes log-probabilities of sampled tokens (or of whole sequences: sums of token log-probabilities)
and is elementwise. An estimator has a value and, when it is put into a loss and differentiated, a gradient,
and the two need not agree:

| in the loss | value, as an estimate of KL(π‖π_ref) | expected gradient for samples of π |
|---|---|---|
| k1 | unbiased, may be negative | zero: a penalty that does nothing |
| k2 | biased, ≥ 0 | that of KL(π‖π_ref) |
| k3 | unbiased, ≥ 0 | that of KL(π_ref‖π), the forward KL |

On single tokens these are the gradients of the KL *at the state reached*; they leave out that π also chooses
which states it reaches. The KL-regularised objective itself is optimised by putting k1 into the *reward*
(without differentiating it): then the score function carries the whole gradient.
"""

import jax
import jax.numpy as jnp


def kl_k1(logp: jax.Array, ref_logp: jax.Array) -> jax.Array:
    """log π - log π_ref. Unbiased; summed over a sequence's tokens it estimates the sequence KL.

    Gradient: ∇log π, zero in expectation. Use it in the reward or as a metric, not in a loss.
    """
    return logp - ref_logp


def kl_k2(logp: jax.Array, ref_logp: jax.Array) -> jax.Array:
    """½ (log π - log π_ref)². A biased value with little variance.

    Gradient: (log π - log π_ref) ∇log π, in expectation exactly ∇KL(π‖π_ref).
    """
    return 0.5 * jnp.square(logp - ref_logp)


def kl_k3(logp: jax.Array, ref_logp: jax.Array) -> jax.Array:
    """π_ref/π - 1 - log(π_ref/π). Unbiased and never negative; GRPO's penalty (Shao et al. 2024, eq. 4).

    Gradient: (1 - π_ref/π) ∇log π, in expectation ∇KL(π_ref‖π): the forward KL, not the one estimated.
    """
    log_ratio = ref_logp - logp
    return jnp.expm1(log_ratio) - log_ratio


def full_kl(logits_p: jax.Array, logits_q: jax.Array) -> jax.Array:
    """KL(softmax(logits_p) ‖ softmax(logits_q)) over the whole vocabulary, [..., V] twice -> [...] nats.

    No sampling noise at a given state. Gradient: the exact one at that state. A logit of -inf in p counts
    nothing; one in q alone gives infinity.
    """
    logp = jax.nn.log_softmax(logits_p.astype(jnp.float32), axis=-1)
    logq = jax.nn.log_softmax(logits_q.astype(jnp.float32), axis=-1)
    possible = ~jnp.isneginf(logp)
    log_ratio = jnp.where(possible, logp, 0.0) - jnp.where(possible, logq, 0.0)
    return jnp.sum(jnp.exp(logp) * log_ratio, axis=-1)
