"""Losses on single answers that are labelled desirable or not, as pure functions of arrays, all float32.

Log-ratios are log π(y|x) - log π_ref(y|x) of whole answers: *sums* over tokens, not means. What an answer is compared
with (`z0`, `delta`) is a number for the whole batch, and a constant: it carries no gradient.
"""

import jax
import jax.numpy as jnp

from jrlhf.types import Array

Scalar = Array | float


def kto_loss(
    log_ratios: Array,
    labels: Array,
    z0: Scalar,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> jax.Array:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, eq. 8), log_ratios and bool labels [N] -> [N].

    λ_y - v(x, y), where v = λ_D·sigmoid(β(r - z0)) for a desirable answer and λ_U·sigmoid(β(z0 - r)) for another,
    with log-ratio r. The reference point z0 = `kto_reference_point(...)`; z0 = 0 is APO-zero on unpaired labels
    (D'Oosterlinck et al. 2024, eq. 7: "apo_zero_unpaired").
    """
    z0 = jax.lax.stop_gradient(jnp.asarray(z0, jnp.float32))
    gain = beta * (log_ratios.astype(jnp.float32) - z0)
    return jnp.where(
        labels, desirable_weight * jax.nn.sigmoid(-gain), undesirable_weight * jax.nn.sigmoid(gain)
    )


def kto_reference_point(mismatched_log_ratios: Array) -> jax.Array:
    """z0 = max(0, mean of log π(y'|x) - log π_ref(y'|x)), y' an answer to another prompt: [N] -> scalar.

    A biased estimate of KL(π‖π_ref) (Ethayarajh et al. 2024, §4.1), without β.
    """
    return jnp.maximum(jnp.mean(mismatched_log_ratios.astype(jnp.float32)), 0.0)


def bco_loss(log_ratios: Array, labels: Array, delta: Scalar, beta: float) -> jax.Array:
    """Binary classifier optimisation (Jung et al. 2024), log_ratios and bool labels [N] -> [N].

    The cross-entropy of a classifier with the logit r - δ, implicit reward r = β·log_ratio: -log sigmoid(r - δ) for a
    desirable answer, -log sigmoid(δ - r) for another. `delta` is the mean implicit reward of what was seen
    (`running_mean`).
    """
    logit = beta * log_ratios.astype(jnp.float32) - jax.lax.stop_gradient(jnp.asarray(delta, jnp.float32))
    return jnp.where(labels, jax.nn.softplus(-logit), jax.nn.softplus(logit))


def running_mean(mean: Array, count: Array, values: Array) -> tuple[jax.Array, jax.Array]:
    """(mean, count) of all values seen, after `values` [N] more: every value of the past weighs the same."""
    total = count + jnp.float32(values.size)
    return mean + (jnp.mean(values.astype(jnp.float32)) - mean) * (jnp.float32(values.size) / total), total
