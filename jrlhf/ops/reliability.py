"""Who is to be believed, and what is then true: models of labellers of unequal care, fitted to their votes alone.

Plain numpy on the host; SciPy is slow to import, so that only who needs it does. A vote is a row of three arrays [V]:
which item, which labeller, what was said.
"""

from typing import NamedTuple

import numpy as np


class DawidSkene(NamedTuple):
    """What votes say of N items in C classes and of L labellers."""

    posterior: np.ndarray  # [N, C], the probability of each class
    confusion: (
        np.ndarray
    )  # [L, C, C], the probability that labeller l says k of an item of class c: [l, c, k]
    prior: np.ndarray  # [C]
    log_likelihood: float  # with the pseudo-counts' prior, never decreasing over the iterations

    @property
    def reliability(self) -> np.ndarray:
        """[L]: how often each labeller is expected to say the true class."""
        return np.einsum("c,lcc->l", self.prior, self.confusion)


def dawid_skene(
    item: np.ndarray,
    labeler: np.ndarray,
    said: np.ndarray,
    shape: tuple[int, int, int],
    pseudo_count: float = 0.1,
    iterations: int = 200,
) -> DawidSkene:
    """Expectation-maximisation of Dawid & Skene 1979: each labeller has a confusion matrix, votes are independent given
    the true class. Starts from the shares of votes; shape is (items, labellers, classes).

    pseudo_count: added to every cell of the matrices and to each class (a Dirichlet prior), so that a few votes make
    nobody certain; on the diagonal of a matrix twice that, because people are right more often than not.
    """
    from scipy.special import logsumexp

    n, people, classes = shape
    votes = np.zeros((n, classes))
    np.add.at(votes, (item, said), 1.0)
    posterior = votes / np.maximum(votes.sum(axis=1, keepdims=True), 1.0)
    alpha = pseudo_count * (1.0 + np.eye(classes))
    before = -np.inf
    for _ in range(iterations):
        prior = posterior.sum(axis=0) + pseudo_count
        prior /= prior.sum()
        confusion = np.zeros((people, classes, classes))
        np.add.at(confusion.transpose(0, 2, 1), (labeler, said), posterior[item])
        confusion += alpha
        confusion /= confusion.sum(axis=2, keepdims=True)
        joint = np.tile(np.log(prior), (n, 1))
        np.add.at(joint, item, np.log(confusion)[labeler, :, said])
        evidence = logsumexp(joint, axis=1, keepdims=True)
        posterior = np.exp(joint - evidence)
        penalty = np.sum(alpha * np.log(confusion)) + pseudo_count * np.sum(np.log(prior))
        likelihood = float(np.sum(evidence) + penalty)
        if likelihood - before < 1e-9 * abs(likelihood):
            break
        before = likelihood
    return DawidSkene(posterior, confusion, prior, likelihood)


class BradleyTerry(NamedTuple):
    """Utilities of N answers, and how sharply each of L labellers sees their differences."""

    utility: np.ndarray  # [N], in units in which the labellers' mean sharpness is 1
    sharpness: np.ndarray  # [L], 1 / temperature: 0 guesses, below 0 prefers the worse

    def probability(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """That a labeller of mean sharpness prefers the first, [V]."""
        from scipy.special import expit

        return expit(self.utility[first] - self.utility[second])


def bradley_terry(
    first: np.ndarray,
    second: np.ndarray,
    labeler: np.ndarray,
    share: np.ndarray,
    shape: tuple[int, int],
    spread: float = 1.0,
) -> BradleyTerry:
    """Maximum a posteriori of P(first preferred) = sigmoid(s_l (u_first - u_second)): Bradley & Terry 1952 with a
    sharpness s for each labeller, as the Boltzmann-rational teachers of Jeon et al. 2020 and Barnett et al. 2023.

    All [V]: the answers' numbers, who judged, and 1, 1/2 (a tie) or 0 for the first; shape is (answers, labellers).
    Utilities have a normal prior of mean 0 and standard deviation `spread`, sharpnesses one of mean 1 and standard
    deviation 1, so that few votes leave both near these.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    n, people = shape

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        u, s = x[:n], x[n:]
        gap = u[first] - u[second]
        logit = s[labeler] * gap
        loss = np.logaddexp(0.0, logit) - share * logit
        slope = expit(logit) - share  # of each vote's loss, by its logit
        by_gap = slope * s[labeler]
        of_u = np.bincount(first, by_gap, n) - np.bincount(second, by_gap, n) + u / spread**2
        of_s = np.bincount(labeler, slope * gap, people) + (s - 1.0)
        prior = 0.5 * np.sum(np.square(u / spread)) + 0.5 * np.sum(np.square(s - 1.0))
        return float(np.sum(loss) + prior), np.concatenate([of_u, of_s])

    start = np.concatenate([np.zeros(n), np.ones(people)])
    found = minimize(
        objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "maxfun": 4000}
    ).x
    u, s = found[:n], found[n:]
    # Where it is below 0 it turns all round: of the two solutions that mirror each other, to the likelier.
    scale = np.mean(s)
    return BradleyTerry(u * scale, s / scale)
