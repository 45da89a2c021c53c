"""Best-of-n: draw n answers, keep the one that a proxy reward likes best."""

import numpy as np


def _log_binomial(a: np.ndarray, b: int) -> np.ndarray:
    """log C(a, b), -inf where a < b."""
    from scipy.special import gammaln  # slow to import

    a = np.asarray(a, np.float64)
    safe = np.maximum(a, b)
    return np.where(a < b, -np.inf, gammaln(safe + 1) - gammaln(b + 1) - gammaln(safe - b + 1))


def best_of_n(proxy: np.ndarray, gold: np.ndarray, n: int) -> np.ndarray:
    """Expected gold reward of the answer with the highest proxy among n, proxy and gold [P, N] -> [P].

    For each of P prompts, the average over all subsets of n of its N samples, computed from order statistics
    (Nakano et al. 2021, appendix I; Gao et al. 2022, §2): unbiased for any n ≤ N, with far less variance
    than one draw of n. Answers with equal proxy share their probability equally. `best_of_n(proxy, proxy, n)`
    is the expected proxy itself. Raises ValueError unless 1 ≤ n ≤ N and all proxies are finite.
    """
    proxy, gold = np.asarray(proxy, np.float64), np.asarray(gold, np.float64)
    if proxy.ndim != 2 or proxy.shape != gold.shape:
        raise ValueError(
            f"proxy and gold must be two equal [P, N] arrays, got {proxy.shape} and {gold.shape}"
        )
    samples = proxy.shape[1]
    if not 1 <= n <= samples:
        raise ValueError(f"best of n={n} needs 1 <= n <= {samples}, the number of samples per prompt")
    if not np.all(np.isfinite(proxy)):
        raise ValueError("a proxy reward is not finite")
    ordered = np.sort(proxy, axis=1)
    not_above = np.stack([np.searchsorted(o, p, side="right") for o, p in zip(ordered, proxy, strict=True)])
    below = np.stack([np.searchsorted(o, p, side="left") for o, p in zip(ordered, proxy, strict=True)])
    # P(maximum of the subset equals this proxy), shared among those that have it.
    total = _log_binomial(samples, n)
    weight = np.exp(_log_binomial(not_above, n) - total) - np.exp(_log_binomial(below, n) - total)
    return np.sum(weight / (not_above - below) * gold, axis=1)


def best_of_n_distribution(probabilities: np.ndarray, proxy: np.ndarray, n: int) -> np.ndarray:
    """The policy that best-of-n is, for a policy with known probabilities [Y] and proxy rewards [Y] -> [Y].

    An answer y wins with probability F(y)ⁿ - F₋(y)ⁿ, where F and F₋ are the probabilities of drawing a proxy
    not above and below its own; answers with equal proxy share it in proportion to their probability.
    """
    probabilities, proxy = np.asarray(probabilities, np.float64), np.asarray(proxy, np.float64)
    levels, level = np.unique(proxy, return_inverse=True)
    mass = np.bincount(level, weights=probabilities, minlength=levels.size)
    upto = np.cumsum(mass)
    win = upto**n - (upto - mass) ** n
    share = np.divide(probabilities, mass[level], out=np.zeros_like(mass[level]), where=mass[level] > 0)
    return win[level] * share


def best_of_n_kl(n: int) -> float:
    """log n - (n-1)/n: KL(best-of-n ‖ policy) in nats for a continuous proxy, an upper bound otherwise.

    Stated by Stiennon et al. 2020 (appendix G.3); shown to be an upper bound by Beirami et al. 2024.
    """
    return float(np.log(n) - (n - 1) / n)
