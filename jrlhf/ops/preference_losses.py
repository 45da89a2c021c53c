"""Losses on preferences between answers: pure functions of arrays, all float32, each with its source.

Log-probabilities are those of whole answers: *sums* over tokens, unless a loss says that it takes means per token.
`chosen` and `rejected` [N] are log-ratios log(π/π_ref) of the two answers of each pair; without a reference, log π.
Every loss is [N], to be averaged over pairs. β is the strength of the KL constraint that is implied. Likelihoods of
whole rankings and of ties are in `reward_losses`: given implicit rewards, they make DPO's relatives for these.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jrlhf.types import Array

Scalar = Array | float


# --- a link function of the margin --------------------------------------------------------------------------------


def logistic_link(margin: Array) -> jax.Array:
    """-log sigmoid(m): DPO (Rafailov et al. 2023, eq. 7)."""
    return -jax.nn.log_sigmoid(margin)


def hinge_link(margin: Array) -> jax.Array:
    """max(0, 1 - m): SLiC-HF (Zhao et al. 2023, eq. 4), RSO (Liu et al. 2023, eq. 10)."""
    return jax.nn.relu(1.0 - margin)


def exponential_link(margin: Array) -> jax.Array:
    """exp(-m) (Tang et al. 2024, table 1)."""
    return jnp.exp(-margin)


def square_link(margin: Array) -> jax.Array:
    """(m - 1)² (Tang et al. 2024, table 1): with m = βh, it is β² times IPO's loss at τ = β/2."""
    return jnp.square(margin - 1.0)


def discopop_link(margin: Array, temperature: float = 0.05) -> jax.Array:
    """(1 - w)·logistic(m) + w·exp(-m), w = sigmoid(m / temperature): DiscoPOP (Lu et al. 2024, eq. 5)."""
    weight = jax.nn.sigmoid(margin / temperature)
    # w·exp(-m) in one exponent: far below 0 it would be 0·inf.
    return (1.0 - weight) * logistic_link(margin) + jnp.exp(jax.nn.log_sigmoid(margin / temperature) - margin)


# Generalised preference optimisation (Tang et al. 2024, eq. 6): the mean of f(m), m = β(chosen - rejected).
LINKS: dict[str, Callable[[Array], jax.Array]] = {
    "sigmoid": logistic_link,
    "hinge": hinge_link,
    "exponential": exponential_link,
    "square": square_link,
    "discopop": discopop_link,
}


def link_loss(
    margin: Array,
    link: Callable[[Array], jax.Array] = logistic_link,
    label_smoothing: float = 0.0,
    certainty: Scalar = 1.0,
) -> jax.Array:
    """p·f(m) + (1 - p)·f(-m), [N] -> [N], where p is certainty·(1 - ε) + (1 - certainty)·ε.

    `label_smoothing` ε is the assumed probability that a label is flipped (conservative DPO, Mitchell 2023);
    `certainty` [N] says of each pair how probable it is that the chosen answer is the better, such as a share of votes.
    """
    if not isinstance(certainty, float):
        sure = certainty * (1.0 - label_smoothing) + (1.0 - certainty) * label_smoothing
        return jnp.asarray(sure * link(margin) + (1.0 - sure) * link(-margin))
    if not label_smoothing:
        return link(margin)
    return (1.0 - label_smoothing) * link(margin) + label_smoothing * link(-margin)


# --- the reward that a divergence from the reference implies --------------------------------------------------------

# f'(t) of the f-divergence that is constrained, up to a constant, as a function of log t = log(π/π_ref): f-DPO
# (Wang et al. 2023, table 1). β·f'(π/π_ref) is the implicit reward; reverse KL is DPO's own.
DIVERGENCES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "reverse_kl": lambda ratio: ratio,
    # Bounded: a rejected answer may become as unlikely as it likes, and exp would overflow into the gradient as 0·inf.
    "forward_kl": lambda ratio: -jnp.exp(jnp.minimum(-ratio, 80.0)),
    "jensen_shannon": lambda ratio: jax.nn.log_sigmoid(ratio),
}


# --- pairs, against a reference -----------------------------------------------------------------------------------


def dpo_loss(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Scalar,
    ref_rejected: Scalar,
    beta: Scalar,
    label_smoothing: float = 0.0,
    certainty: Scalar = 1.0,
) -> tuple[jax.Array, Array, Array]:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7), four [N] -> three [N].

    Returns (loss, implicit rewards of the chosen, of the rejected); the rewards β log(π/π_ref) carry no gradient.
    `label_smoothing` and `certainty` as in `link_loss`.
    """
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    loss = link_loss(chosen - rejected, logistic_link, label_smoothing, certainty)
    return loss, jax.lax.stop_gradient(chosen), jax.lax.stop_gradient(rejected)


def ipo_loss(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Scalar,
    ref_rejected: Scalar,
    tau: Scalar,
) -> tuple[jax.Array, Array, Array]:
    """Identity preference optimisation (Azar et al. 2023, eq. 17): (h - 1/(2τ))², four [N] -> three [N].

    h is the difference of log(π/π_ref), of whole answers, between chosen and rejected. Its optimum is
    π_ref·exp(P(y ≻ μ)/τ) up to a constant. Returns (loss, τ·log(π/π_ref) of the chosen, of the rejected).
    TRL averages the log-probabilities over tokens instead, another objective: give it means to have that.
    """
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    loss = jnp.square(chosen - rejected - 1.0 / (2.0 * tau))
    return loss, jax.lax.stop_gradient(tau * chosen), jax.lax.stop_gradient(tau * rejected)


def robust_dpo_loss(chosen: Array, rejected: Array, beta: Scalar, flip: float) -> jax.Array:
    """Robust DPO (Chowdhury et al. 2024, eq. 12): unbiased where labels are flipped with probability `flip` < 1/2.

    ((1 - ε)·f(m) - ε·f(-m)) / (1 - 2ε): its expectation over flips is DPO's loss on the true labels.
    """
    margin = beta * (chosen - rejected)
    return ((1.0 - flip) * logistic_link(margin) - flip * logistic_link(-margin)) / (1.0 - 2.0 * flip)


def exo_pair_loss(chosen: Array, rejected: Array, beta: Scalar, flip: float) -> jax.Array:
    """Efficient exact optimisation on pairs (Ji et al. 2024, eq. 16): KL(p_θ || p_label), `flip` > 0.

    p_θ = softmax of the β·log-ratios of both answers, p_label = (1 - flip, flip).
    """
    margin = beta * (chosen - rejected)
    log_p, log_q = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return jnp.exp(log_p) * (log_p - jnp.log1p(-flip)) + jnp.exp(log_q) * (log_q - jnp.log(flip))


def nca_pair_loss(chosen: Array, rejected: Array, beta: Scalar) -> jax.Array:
    """Noise contrastive alignment on pairs (Chen et al. 2024, "NCA", algorithm 1 with K = 2 and hard labels).

    f(r_w) + ½·f(-r_w) + ½·f(-r_l), f = -log sigmoid, r = β·log-ratio: rewards are absolute, not only differences.
    """
    return (
        logistic_link(beta * chosen)
        + 0.5 * logistic_link(-beta * chosen)
        + 0.5 * logistic_link(-beta * rejected)
    )


def sppo_hard_loss(chosen: Array, rejected: Array, beta: Scalar) -> jax.Array:
    """Self-play preference optimisation (Wu et al. 2024, eq. 4.7), the winning probabilities taken as 1 and 0.

    (log-ratio of the chosen - 1/(2β))² + (log-ratio of the rejected + 1/(2β))². The paper's η is 1/β.
    """
    return jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)


def aot_loss(
    policy_chosen: Array,
    policy_rejected: Array,
    ref_chosen: Array,
    ref_rejected: Array,
    beta: Scalar,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Alignment via optimal transport, paired (Melnyk et al. 2024, §3): four [N] -> [N] in sorted order.

    The policy's differences log π(w) - log π(l), *sorted over the batch*, are held against the reference's, sorted
    too: all rows of the batch are coupled, and loss n does not belong to row n.
    """
    policy, ref = jnp.sort(policy_chosen - policy_rejected), jnp.sort(ref_chosen - ref_rejected)
    return link_loss(beta * (policy - ref), logistic_link, label_smoothing)


def aot_unpaired_loss(
    chosen: Array, rejected: Array, beta: Scalar, label_smoothing: float = 0.0
) -> jax.Array:
    """Alignment via optimal transport, unpaired (Melnyk et al. 2024, §3): [N], [N] -> [N] in sorted order.

    The log-ratios of all chosen answers, sorted, against those of all rejected answers, sorted: who was compared with
    whom does not matter. Rows are coupled as in `aot_loss`.
    """
    return link_loss(beta * (jnp.sort(chosen) - jnp.sort(rejected)), logistic_link, label_smoothing)


def apo_zero_loss(chosen: Array, rejected: Array, beta: Scalar) -> jax.Array:
    """Anchored preference optimisation, "zero" (D'Oosterlinck et al. 2024, eq. 7): 1 - s(βw) + s(βl), s = sigmoid.

    For chosen answers that are better than the policy's own: their likelihood rises, that of the rejected falls.
    """
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down_loss(chosen: Array, rejected: Array, beta: Scalar) -> jax.Array:
    """Anchored preference optimisation, "down" (D'Oosterlinck et al. 2024, eq. 8): s(βw) + 1 - s(β(w - l)).

    For chosen answers that are worse than the policy's own: both likelihoods fall, the rejected one's further.
    """
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))


def wpo_weight(mean_logps: Array) -> jax.Array:
    """Weight of a pair by how likely the policy is to write it (Zhou et al. 2024, eq. 2), [N, 2] -> [N], no gradient.

    exp(mean log-probability per token) of both answers, multiplied: the paper's length-normalised weight without its
    "alignment" terms. TRL subtracts log Σ_v π(v)² at each token (the paper's sampled alignment, §3.2).
    """
    return jnp.exp(jax.lax.stop_gradient(jnp.sum(mean_logps, axis=1)))


# --- pairs, without a reference -----------------------------------------------------------------------------------


def simpo_loss(
    mean_chosen: Array, mean_rejected: Array, beta: Scalar, gamma: float, label_smoothing: float = 0.0
) -> jax.Array:
    """SimPO (Meng et al. 2024, eq. 6): -log sigmoid(β·(w - l) - gamma), of means of log π per token, [N] -> [N]."""
    return link_loss(beta * (mean_chosen - mean_rejected) - gamma, logistic_link, label_smoothing)


def alpha_reward(mean_logps: jax.Array, alpha: float) -> jax.Array:
    """(1 - p^-alpha) / alpha with p = exp(mean log-probability per token), elementwise; its limit log p at alpha 0.

    AlphaPO (Gupta et al. 2025, eq. 7): alpha > 0 steepens the reward of improbable answers, alpha < 0 flattens it.
    """
    return -jnp.expm1(-alpha * mean_logps) / alpha if alpha else mean_logps


def cpo_loss(
    chosen: Array,
    rejected: Array,
    beta: Scalar,
    link: Callable[[Array], jax.Array] = logistic_link,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Contrastive preference optimisation (Xu et al. 2024, eq. 5 without its NLL): f(β·(log π(w) - log π(l))).

    The hinge in place of the logistic link is SLiC-HF's rank loss with δ = 1/β, divided by δ.
    """
    return link_loss(beta * (chosen - rejected), link, label_smoothing)


def log_odds(mean_logps: Array) -> jax.Array:
    """log(p / (1 - p)) with p = exp(mean log-probability per token) (ORPO, Hong et al. 2024, eq. 4).

    A mean above -1e-6 counts as that, with no gradient: of a certain answer the odds are infinite.
    """
    x = jnp.minimum(mean_logps, -1e-6)
    near = x > -0.7  # log(1 - e^x) is accurate by the one form near 0, by the other far from it
    log_rest = jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))),
        jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))),
    )
    return x - log_rest


def odds_ratio_loss(mean_chosen: Array, mean_rejected: Array) -> jax.Array:
    """-log sigmoid(log odds(w) - log odds(l)): the relative term of ORPO (Hong et al. 2024, eq. 7), means per token."""
    return logistic_link(log_odds(mean_chosen) - log_odds(mean_rejected))
