"""Confidence intervals that several rooms report."""

from collections.abc import Callable

import numpy as np


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of a proportion (Wilson 1927); sound near 0 and 1 and for few trials. Ties' halves are rounded."""
    from scipy.stats import binomtest  # half a second to import: not for those who only list runs

    limits = binomtest(round(successes), trials).proportion_ci(confidence, method="wilson")
    return float(limits.low), float(limits.high)


def auc_interval(scores: np.ndarray, labels: np.ndarray, clusters: np.ndarray) -> tuple[float, float, float]:
    """(AUC, low, high): how often a score of label 1 exceeds one of label 0 (ties: half), and its 95% interval.

    scores, labels, clusters [N]; scores of one cluster (the answers to one prompt) may depend on one another
    (Obuchowski 1997; with clusters of one DeLong et al. 1988). A normal approximation, cut at 0 and 1. ValueError when
    a label is missing or all scores are of one cluster.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels, bool)
    above, below = scores[labels], scores[~labels]
    _, cluster = np.unique(clusters, return_inverse=True)
    groups = int(cluster.max()) + 1 if cluster.size else 0
    if not above.size or not below.size or groups < 2:
        raise ValueError(
            f"need both labels and two clusters, got {above.size} and {below.size} scores in {groups}"
        )

    def share_below(x: np.ndarray, of: np.ndarray) -> np.ndarray:
        of = np.sort(of)
        return 0.5 * (np.searchsorted(of, x, "left") + np.searchsorted(of, x, "right")) / len(of)

    placed, placed_below = share_below(above, below), 1.0 - share_below(below, above)
    auc = float(np.mean(placed))

    def residuals(values: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, int]:
        """Summed over each cluster, and how many clusters have any."""
        sums = np.bincount(cluster[chosen], weights=values - auc, minlength=groups)
        return sums, len(np.unique(cluster[chosen]))

    (a, n_a), (b, n_b) = residuals(placed, labels), residuals(placed_below, ~labels)
    scale = lambda n: n / (n - 1) if n > 1 else 1.0  # noqa: E731
    variance = scale(n_a) * np.sum(a * a) / above.size**2 + scale(n_b) * np.sum(b * b) / below.size**2
    variance += 2.0 * scale(groups) * np.sum(a * b) / (above.size * below.size)
    spread = 1.959964 * float(np.sqrt(max(variance, 0.0)))
    return auc, max(auc - spread, 0.0), min(auc + spread, 1.0)


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], clusters: np.ndarray, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """(low, high), the 95% percentile interval (Efron 1979) of `statistic(indices)`, over resamples of whole clusters.

    clusters [N]: to which cluster (a prompt) each item belongs; indices: the items drawn, some of them several times.
    Resamples on which the statistic is NaN are left out; (NaN, NaN) when it is on all.
    """
    _, cluster = np.unique(clusters, return_inverse=True)
    members = np.split(np.argsort(cluster, kind="stable"), np.cumsum(np.bincount(cluster))[:-1])
    rng, values = np.random.default_rng(seed), []
    for _ in range(resamples if len(members[0]) else 0):
        drawn = rng.integers(len(members), size=len(members))
        values.append(statistic(np.concatenate([members[c] for c in drawn])))
    known = np.asarray(values)[~np.isnan(values)]
    if not known.size:
        return float("nan"), float("nan")
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)
