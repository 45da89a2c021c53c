"""Policy-gradient surrogates, one loss a token. Each names its paper; they differ in what is weighted, and by what.

All take (log-probs, old log-probs, advantages, mask), each [B, T], and return (losses [B, T], clipped [B, T]): the
loss of each token, before any mean, and whether the clip removes its gradient (None where nothing is clipped). A loss
of whole answers stands at each of their tokens: a mean over tokens, then over answers ("sequence") is then the mean
over answers. With old log-probs equal to log-probs every gradient here is that of REINFORCE, -A ∇log π (GSPO's
divided by the length). At masked positions nothing is read; their gradient is 0.
"""

import jax
import jax.numpy as jnp

from jrlhf.ops.masking import masked_mean
from jrlhf.types import Array

Clip = float | tuple[float, float]  # ratio within [1 - low, 1 + high]; one number for both
ClippedLosses = tuple[jax.Array, jax.Array]


def reinforce_loss(
    logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array
) -> tuple[jax.Array, None]:
    """-A log π (Williams 1992). For samples of the very policy that is trained: `old_logprobs` is not read."""
    return -jnp.where(mask, advantages, 0.0) * jnp.where(mask, logprobs, 0.0), None


def clipped_loss(
    logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, clip: Clip
) -> ClippedLosses:
    """-min(ρ A, clip(ρ) A) with the ratio ρ = π/π_old of each token (Schulman et al. 2017, eq. 7).

    PPO, GRPO, DAPO (with clip = (low, high), eq. 8) and REINFORCE++.
    """
    return _clipped(jnp.exp(_log_ratio(logprobs, old_logprobs, mask)), advantages, mask, clip)


def sequence_clipped_loss(
    logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, clip: Clip
) -> ClippedLosses:
    """The same with the ratio of whole answers, ρ = Π_t ρ_t: the answer is one action (RLOO, Ahmadian et al. 2024)."""
    log_ratio = jnp.sum(_log_ratio(logprobs, old_logprobs, mask), axis=1, keepdims=True)
    return _clipped(jnp.broadcast_to(jnp.exp(log_ratio), mask.shape), advantages, mask, clip)


def gspo_loss(
    logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, clip: Clip
) -> ClippedLosses:
    """The same with an answer's mean ratio, geometric, s = (Π_t ρ_t)^(1/|y|) (GSPO, Zheng et al. 2025, eq. 5 to 7)."""
    log_ratio = masked_mean(_log_ratio(logprobs, old_logprobs, mask), mask, axis=1)
    return _clipped(jnp.broadcast_to(jnp.exp(log_ratio)[:, None], mask.shape), advantages, mask, clip)


def cispo_loss(
    logprobs: Array, old_logprobs: Array, advantages: Array, mask: Array, clip: Clip
) -> ClippedLosses:
    """-sg(clip(ρ)) A log π (CISPO, MiniMax-M1 2025, eq. 4): the weight is clipped, no token loses its gradient.

    `clipped` says where the weight is. The paper bounds it from above alone: clip = (1, high).
    """
    low, high = _bounds(clip)
    ratio = jnp.exp(jax.lax.stop_gradient(_log_ratio(logprobs, old_logprobs, mask)))
    weight = jnp.clip(ratio, 1.0 - low, 1.0 + high)
    return -weight * jnp.where(mask, advantages, 0.0) * jnp.where(mask, logprobs, 0.0), weight != ratio


def _clipped(ratio: jax.Array, advantages: Array, mask: Array, clip: Clip) -> tuple[jax.Array, jax.Array]:
    low, high = _bounds(clip)
    advantages = jnp.where(mask, advantages, 0.0)
    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - low, 1.0 + high)
    return jnp.maximum(unclipped, clipped), clipped > unclipped


def _bounds(clip: Clip) -> tuple[float, float]:
    return clip if isinstance(clip, tuple) else (clip, clip)


def _log_ratio(logprobs: Array, old_logprobs: Array, mask: Array) -> jax.Array:
    """Masked before exp: an overflow on a masked token would reach the gradient as 0·inf."""
    return jnp.where(mask.astype(bool), logprobs - old_logprobs, 0.0)
