"""Confidence intervals that several rooms report."""


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of a proportion (Wilson 1927); sound near 0 and 1 and for few trials. Ties' halves are rounded."""
    from scipy.stats import binomtest  # half a second to import: not for those who only list runs

    limits = binomtest(round(successes), trials).proportion_ci(confidence, method="wilson")
    return float(limits.low), float(limits.high)
