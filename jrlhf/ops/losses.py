"""Losses as pure functions of arrays, all float32, each with its source.

`denominator` replaces the number of unmasked tokens, as in `masking.masked_mean`.
"""

import jax
import jax.numpy as jnp

from jrlhf.ops.masking import masked_mean
from jrlhf.ops.policy_losses import clipped_loss
from jrlhf.types import Array

Scalar = Array | float


def ppo_policy_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    mask: Array,
    clip: float | tuple[float, float],
    denominator: Scalar | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The clipped surrogate (Schulman et al. 2017, eq. 7) as a token mean; all arrays [B, T] -> scalar.

    `clip` ε keeps the ratio within [1 - ε, 1 + ε]; a pair (low, high) within [1 - low, 1 + high] (DAPO).
    Where `old_logprobs` equals `logprobs` the gradient is that of REINFORCE.

    Statistics (no gradient): `approx_kl`, k3 between old and new policy; `clip_frac`, the share of tokens
    whose gradient the clip removes; `ratio_max`. The first two use `denominator` and add up over
    microbatches as the loss does; `ratio_max` is to be maximised over them.
    """
    losses, clipped = clipped_loss(logprobs, old_logprobs, advantages, mask, clip)
    loss = masked_mean(losses, mask, denominator=denominator)
    # Masking before exp: an overflow on a masked token would reach the gradient as 0·inf.
    log_ratio = jnp.where(mask.astype(bool), logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    stats = {
        "approx_kl": masked_mean(ratio - 1.0 - log_ratio, mask, denominator=denominator),
        "clip_frac": masked_mean(clipped, mask, denominator=denominator),
        "ratio_max": jnp.max(jnp.where(mask.astype(bool), ratio, 0.0)),
    }
    return loss, jax.tree.map(jax.lax.stop_gradient, stats)


def value_loss(
    values: Array,
    old_values: Array,
    returns: Array,
    mask: Array,
    clip: float,
    denominator: Scalar | None = None,
) -> tuple[jax.Array, jax.Array]:
    """½·max((V - R)², (clip(V, V_old ± clip) - R)²), a token mean; arrays [B, T] -> (loss, clip_frac).

    The clipped value loss of OpenAI's PPO (Ziegler et al. 2019; Huang et al. 2023). `clip_frac` is the share
    of tokens whose gradient the clip removes. `clip=inf` is the plain squared error.
    """
    near = jnp.clip(values, old_values - clip, old_values + clip)
    unclipped, clipped = jnp.square(values - returns), jnp.square(near - returns)
    loss = 0.5 * masked_mean(jnp.maximum(unclipped, clipped), mask, denominator=denominator)
    clip_frac = masked_mean(clipped > unclipped, mask, denominator=denominator)
    return loss, jax.lax.stop_gradient(clip_frac)
