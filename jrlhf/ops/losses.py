"""Losses as pure functions of arrays, all float32, each with its source.

`denominator` replaces the number of unmasked tokens, as in `masking.masked_mean`.
"""

import jax
import jax.numpy as jnp

from jrlhf.ops.masking import masked_mean
from jrlhf.types import Array

Scalar = Array | float


def language_model_loss(logprobs: Array, mask: Array, denominator: Scalar | None = None) -> jax.Array:
    """Negative log-likelihood per unmasked token; logprobs, mask [...] -> scalar."""
    return -masked_mean(logprobs, mask, denominator=denominator)


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
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    # Masking before exp: an overflow on a masked token would reach the gradient as 0·inf.
    log_ratio = jnp.where(mask.astype(bool), logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    unclipped = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - low, 1.0 + high)
    loss = masked_mean(jnp.maximum(unclipped, clipped), mask, denominator=denominator)
    stats = {
        "approx_kl": masked_mean(ratio - 1.0 - log_ratio, mask, denominator=denominator),
        "clip_frac": masked_mean(clipped > unclipped, mask, denominator=denominator),
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


def _cross_entropy(logit: Array, target: float) -> jax.Array:
    """Of sigmoid(logit) against a probability `target`."""
    return -target * jax.nn.log_sigmoid(logit) - (1.0 - target) * jax.nn.log_sigmoid(-logit)


def dpo_loss(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Array, Array, Array]:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7), four [N] -> three [N].

    The inputs are log-probabilities of whole answers: *sums* over tokens, not means. Returns (loss, implicit
    rewards of the chosen, of the rejected); the rewards β log(π/π_ref) carry no gradient.
    `label_smoothing` is the assumed probability that a label is flipped (conservative DPO, Mitchell 2023).
    """
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    loss = _cross_entropy(chosen - rejected, 1.0 - label_smoothing)
    return loss, jax.lax.stop_gradient(chosen), jax.lax.stop_gradient(rejected)


def ipo_loss(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    tau: float,
) -> tuple[Array, Array, Array]:
    """Identity preference optimisation (Azar et al. 2023, eq. 17): (h - 1/(2τ))², four [N] -> three [N].

    h is the difference of log(π/π_ref), of whole answers, between chosen and rejected. Its optimum is
    π_ref·exp(P(y ≻ μ)/τ) up to a constant. Returns (loss, τ·log(π/π_ref) of the chosen, of the rejected).
    """
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    loss = jnp.square(chosen - rejected - 1.0 / (2.0 * tau))
    return loss, jax.lax.stop_gradient(tau * chosen), jax.lax.stop_gradient(tau * rejected)


def bradley_terry_loss(
    chosen: Array, rejected: Array, margin: Scalar = 0.0, label_smoothing: float = 0.0
) -> jax.Array:
    """-log sigmoid(chosen - rejected - margin), rewards [N] -> [N].

    Bradley & Terry 1952; the margin is that of Llama 2 (Touvron et al. 2023, eq. 2).
    `label_smoothing` is the assumed probability that a label is flipped.
    """
    return _cross_entropy(chosen - rejected - margin, 1.0 - label_smoothing)


def _pairs(ranks: Array) -> tuple[Array, Array]:
    """Masks [B, K, K] from ranks [B, K]: answer i ranked before answer j; i < j tied. Rank 0 is no answer."""
    i, j = ranks[:, :, None], ranks[:, None, :]
    both = (i > 0) & (j > 0)
    upper = jnp.triu(jnp.ones(2 * ranks.shape[-1:], bool), k=1)[None]
    return both & (i < j), both & (i == j) & upper


def kwise_bradley_terry_loss(
    scores: Array,
    ranks: Array,
    margins: Array | None = None,
    label_smoothing: float = 0.0,
    ties: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bradley-Terry over all pairs of a prompt's K answers (Ouyang et al. 2022, eq. 1).

    scores [B, K]; ranks [B, K] int: 1 is best, equal ranks are ties, 0 is padding (its score is never read);
    margins [B, K]: the pair (i, j) has margin margins_i - margins_j. Returns, each [B] float32:
    the mean loss over the prompt's pairs (0 when it has none), the number of pairs, and how many of them are
    ordered as the labels say (equal scores count half).

    `ties=True` counts tied pairs with a target probability of ½ and no margin (cross-entropy, so that their
    loss is least, log 2, at equal scores); they count half as correct. `ties=False` leaves them out, so that
    correct / pairs is the plain accuracy.
    """
    before, tied = _pairs(ranks)
    scores = jnp.where(ranks > 0, scores.astype(jnp.float32), 0.0)
    difference = scores[:, :, None] - scores[:, None, :]
    margin = 0.0 if margins is None else margins[:, :, None] - margins[:, None, :]
    losses = jnp.where(
        before, bradley_terry_loss(difference, jnp.zeros_like(difference), margin, label_smoothing), 0.0
    )
    correct = jnp.where(before, 0.5 * (1.0 + jnp.sign(difference)), 0.0)
    counted = before
    if ties:
        losses = losses + jnp.where(tied, _cross_entropy(difference, 0.5), 0.0)
        correct = correct + jnp.where(tied, 0.5, 0.0)
        counted = before | tied
    pairs = jnp.sum(counted.astype(jnp.float32), axis=(1, 2))
    loss = jnp.sum(losses, axis=(1, 2)) / jnp.maximum(pairs, 1.0)
    return loss, pairs, jax.lax.stop_gradient(jnp.sum(correct, axis=(1, 2)))


def plackett_luce_loss(scores: Array, ranks: Array) -> jax.Array:
    """Negative log-likelihood of a whole ranking (Luce 1959; Plackett 1975), scores, ranks [B, K] -> [B].

    Σ_i log Σ_{j not ranked before i} exp(s_j) - s_i: the best is drawn by softmax, then the best of the rest.
    Ranks as in `kwise_bradley_terry_loss`; two answers give its loss exactly. Each of several tied answers
    is drawn against all of them (Breslow's treatment of ties).
    """
    real = ranks > 0
    scores = jnp.where(real, scores.astype(jnp.float32), 0.0)
    remaining = real[:, :, None] & real[:, None, :] & (ranks[:, None, :] >= ranks[:, :, None])
    # A padding row keeps itself, so that no log-sum-exp is empty.
    remaining = remaining | jnp.eye(ranks.shape[-1], dtype=bool)[None]
    contenders = jnp.where(remaining, scores[:, None, :], -jnp.inf)
    return jnp.sum(jnp.where(real, jax.nn.logsumexp(contenders, axis=-1) - scores, 0.0), axis=-1)


def centering_loss(scores: Array, ranks: Array | None = None) -> jax.Array:
    """(r_i + r_j)², averaged over a prompt's pairs, scores [B, K] -> [B] (Eisenstein et al. 2023, §3).

    Pairwise losses leave a reward's offset free; this small penalty pins it at 0. Answers of rank 0 are
    padding and left out.
    """
    real = jnp.ones_like(scores, bool) if ranks is None else ranks > 0
    scores = jnp.where(real, scores.astype(jnp.float32), 0.0)
    pair = real[:, :, None] & real[:, None, :] & jnp.triu(jnp.ones(2 * scores.shape[-1:], bool), k=1)[None]
    return masked_mean(jnp.square(scores[:, :, None] + scores[:, None, :]), pair, axis=(1, 2))
