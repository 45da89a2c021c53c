"""Losses of reward models, and how several scores become one reward: pure functions of arrays, all float32.

Ranks are int [B, K]: 1 is best, equal ranks are ties, 0 is padding, whose score is never read.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jrlhf.ops.masking import masked_mean
from jrlhf.types import Array

Scalar = Array | float
Ties = Literal["half", "drop", "rao_kupper", "davidson"]
Combine = Literal["mean", "min", "mean_minus_variance", "vote"]
Aggregate = Literal["min", "product", "last", "mean"]


def binary_cross_entropy(logit: Array, target: Scalar) -> Array:
    """Of sigmoid(logit) against a probability `target`, elementwise."""
    return -target * jax.nn.log_sigmoid(logit) - (1.0 - target) * jax.nn.log_sigmoid(-logit)


# --- pairs and rankings -------------------------------------------------------------------------------------


def bradley_terry_loss(
    chosen: Array, rejected: Array, margin: Scalar = 0.0, label_smoothing: float = 0.0
) -> Array:
    """-log sigmoid(chosen - rejected - margin), rewards [N] -> [N].

    Bradley & Terry 1952; the margin is that of Llama 2 (Touvron et al. 2023, eq. 2).
    `label_smoothing` is the assumed probability that a label is flipped.
    """
    return binary_cross_entropy(chosen - rejected - margin, 1.0 - label_smoothing)


def rao_kupper_logprobs(gap: Array, log_theta: Scalar) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities that the first wins, that they tie, that it loses (Rao & Kupper 1967, eqs. 2.4 to 2.6).

    gap: difference of the utilities, [...] -> three [...]. With s the sigmoid, P(win) = s(gap - log θ) and P(loss) =
    s(-gap - log θ); the threshold θ > 1 says that a difference below log θ is hardly perceived. θ = 1 is Bradley-Terry,
    which has no ties.
    """
    win, loss = jax.nn.log_sigmoid(gap - log_theta), jax.nn.log_sigmoid(-gap - log_theta)
    return win, jnp.log(jnp.expm1(2.0 * log_theta)) + win + loss, loss


def davidson_logprobs(gap: Array, log_nu: Scalar) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities that the first wins, that they tie, that it loses (Davidson 1970, eq. 2.3).

    gap: difference of the utilities, [...] -> three [...]. Win : tie : loss = exp(gap / 2) : nu : exp(-gap / 2), so
    that a tie's odds are nu against the geometric mean of the others'. nu = 0 is Bradley-Terry.
    """
    half = 0.5 * gap
    logits = jnp.stack([half, jnp.broadcast_to(log_nu, half.shape), -half], axis=-1)
    win, tie, loss = jnp.moveaxis(jax.nn.log_softmax(logits), -1, 0)
    return win, tie, loss


def ordered_pairs(ranks: Array) -> tuple[Array, Array]:
    """Masks [B, K, K] bool: answer i is ranked before answer j; i < j are tied (each pair once)."""
    i, j = ranks[:, :, None], ranks[:, None, :]
    both = (i > 0) & (j > 0)
    return both & (i < j), both & (i == j) & _upper(ranks.shape[-1])


def _upper(k: int) -> jax.Array:
    return jnp.triu(jnp.ones((k, k), bool), k=1)[None]


def kwise_bradley_terry_loss(
    scores: Array,
    ranks: Array,
    margins: Array | None = None,
    label_smoothing: float = 0.0,
    ties: Ties = "half",
    tie_parameter: Scalar = 0.0,
    certainty: Scalar = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bradley-Terry over all pairs of a prompt's K answers (Ouyang et al. 2022, eq. 1).

    scores [B, K]; ranks [B, K]; margins [B, K]: the pair (i, j) has margin margins_i - margins_j. Returns, each [B]
    float32: the mean loss over the prompt's pairs (0 when it has none), the number of pairs, and how many of them are
    ordered as the labels say (equal scores count half).

    ties: "half" counts tied pairs with a target probability of ½ and no margin (cross-entropy, so that their loss is
    least, log 2, at equal scores); "drop" leaves them out, so that correct / pairs is the plain accuracy; "rao_kupper"
    and "davidson" give a tie a probability of its own, with `tie_parameter` log θ or log nu. Where tied pairs count,
    they count half as correct. `label_smoothing` exchanges wins with losses and leaves ties alone.

    certainty [B] or a number: the probability, of 1/2 or more, that what is ranked before is the better: the soft label
    of -p log s(m) - (1 - p) log s(-m), such as a share of votes. 1 - ε is `label_smoothing` ε of that row alone. The
    models of ties have no place for it (ValueError).
    """
    if ties in ("rao_kupper", "davidson") and not isinstance(certainty, float):
        raise ValueError(f"ties {ties!r} gives a tie a probability of its own and reads no certainty")
    before, tied = ordered_pairs(ranks)
    scores = jnp.where(ranks > 0, scores.astype(jnp.float32), 0.0)
    difference = scores[:, :, None] - scores[:, None, :]
    of_order: Array
    of_tie: Array
    if ties in ("rao_kupper", "davidson"):
        model = rao_kupper_logprobs if ties == "rao_kupper" else davidson_logprobs
        win, tie, lose = model(difference, tie_parameter)
        of_order, of_tie = -(1.0 - label_smoothing) * win - label_smoothing * lose, -tie
    else:
        margin = 0.0 if margins is None else margins[:, :, None] - margins[:, None, :]
        sure = jnp.reshape(jnp.asarray(certainty, jnp.float32), (-1, 1, 1))
        target = (1.0 - label_smoothing) * sure + label_smoothing * (1.0 - sure)
        of_order = binary_cross_entropy(difference - margin, target)
        of_tie = binary_cross_entropy(difference, 0.5)
    counted = before if ties == "drop" else before | tied
    losses = jnp.where(before, of_order, jnp.where(counted, of_tie, 0.0))
    right = jnp.where(before, 0.5 * (1.0 + jnp.sign(difference)), jnp.where(counted, 0.5, 0.0))
    pairs = jnp.sum(counted.astype(jnp.float32), axis=(1, 2))
    loss = jnp.sum(losses, axis=(1, 2)) / jnp.maximum(pairs, 1.0)
    return loss, pairs, jax.lax.stop_gradient(jnp.sum(right, axis=(1, 2)))


def plackett_luce_loss(scores: Array, ranks: Array) -> jax.Array:
    """Negative log-likelihood of a whole ranking (Luce 1959; Plackett 1975), scores, ranks [B, K] -> [B].

    Σ_i log Σ_{j not ranked before i} exp(s_j) - s_i: the best is drawn by softmax, then the best of the rest.
    Two answers give the loss of `bradley_terry_loss` exactly. Each of several tied answers is drawn against all of
    them (Breslow's treatment of ties).
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
    pair = real[:, :, None] & real[:, None, :] & _upper(scores.shape[-1])
    return masked_mean(jnp.square(scores[:, :, None] + scores[:, None, :]), pair, axis=(1, 2))


# --- ratings and steps --------------------------------------------------------------------------------------


def rating_loss(scores: Array, ratings: Array, ranks: Array) -> jax.Array:
    """Squared error of each answer's score, averaged over a prompt's answers, all [B, K] -> [B].

    Regression on ratings, as attribute models are trained (Wang et al. 2023, HelpSteer). Rank 0 is padding.
    """
    real = ranks > 0
    error = jnp.where(real, scores.astype(jnp.float32) - ratings, 0.0)
    return masked_mean(jnp.square(error), real, axis=1)


def step_loss(logits: Array, labels: Array, mask: Array, denominator: Scalar | None = None) -> jax.Array:
    """Cross-entropy of sigmoid(logit) against each step's label, mean over the steps that `mask` sets -> scalar.

    All [B, T]; the score is read where a step ends (Lightman et al. 2023, §2.6; Uesato et al. 2022). labels are
    probabilities in [0, 1]: a person's verdict, or the share of continuations that came out right (Wang et al. 2024).
    `denominator` replaces the number of steps, as in `masking.masked_mean`.
    """
    real = mask.astype(bool)
    logits, labels = jnp.where(real, logits.astype(jnp.float32), 0.0), jnp.where(real, labels, 0.0)
    return masked_mean(binary_cross_entropy(logits, labels), real, denominator=denominator)


def aggregate_steps(logits: Array, ends: Array, how: Aggregate) -> jax.Array:
    """One score in [0, 1] for an answer from the logits at its steps' ends, logits and ends [B, T] -> [B] float32.

    "min": the weakest step; "product": the probability that every step is right (Lightman et al. 2023, §2.7 compare
    these two); "last": the last step, as an outcome reward model would; "mean". An answer without a step has 0.
    """
    ends = ends.astype(bool)
    logp = jax.nn.log_sigmoid(jnp.where(ends, logits.astype(jnp.float32), 0.0))
    if how == "min":
        score = jnp.exp(jnp.min(jnp.where(ends, logp, 0.0), axis=1))
    elif how == "product":
        score = jnp.exp(jnp.sum(jnp.where(ends, logp, 0.0), axis=1))
    elif how == "mean":
        score = masked_mean(jnp.exp(logp), ends, axis=1)
    else:
        slots = jnp.arange(ends.shape[1], dtype=jnp.int32)[None]
        last = jnp.max(jnp.where(ends, slots, 0), axis=1, keepdims=True)
        score = jnp.exp(jnp.take_along_axis(logp, last, axis=1)[:, 0])
    return jnp.where(jnp.any(ends, axis=1), score, 0.0)


# --- ensembles ----------------------------------------------------------------------------------------------


def combine_scores(
    scores: Array, how: Combine, lam: float = 0.0, weights: tuple[float, ...] = ()
) -> jax.Array:
    """One reward from those of M ensemble members, [M, B] -> [B] float32 (Coste et al. 2023, §3; Eisenstein et al.
    2023).

    "mean"; "min", worst-case optimisation, over groups that of the worst-off (Chakraborty et al. 2024, MaxMin-RLHF);
    "mean_minus_variance", uncertainty-weighted: mean - λ · population variance; "vote": the mean of Φ(score).

    A single answer has no rivals to be ranked against, so a member votes on it against a fixed field: of scores that
    have mean 0 and std 1 over reference answers, Φ(score) is the share of these that it beats, if they are normal. That
    is its Borda count there. It is bounded: no member outvotes the others by the scale of its scores.

    weights: of the members in "mean" and "vote", of any positive sum; () is equal.
    """
    scores = jnp.asarray(scores, jnp.float32)
    if how == "min":
        return jnp.min(scores, axis=0)
    if how == "vote":
        scores = jax.scipy.special.ndtr(scores)
    if weights:
        share = jnp.asarray(weights, jnp.float32)
        return jnp.tensordot(share / jnp.sum(share), scores, axes=1)
    mean = jnp.mean(scores, axis=0)
    return mean if how in ("mean", "vote") else mean - lam * jnp.var(scores, axis=0)
