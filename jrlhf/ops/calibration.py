"""Whether a probability means what it says."""

import numpy as np


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> float:
    """Σ_b (n_b/N)·|mean label - mean probability| over `bins` equal-width bins (Guo et al. 2017, eq. 3).

    probabilities [N] that the label is 1, in [0, 1]; labels [N], 0 or 1 (½ for a tie). For a reward model:
    sigmoid(score difference) of each pair, in an order that does not depend on the label (always listing the
    chosen answer first makes every label 1). Raises ValueError on empty or out-of-range input.
    """
    probabilities = np.asarray(probabilities, np.float64)
    labels = np.asarray(labels, np.float64)
    if probabilities.ndim != 1 or probabilities.shape != labels.shape or not probabilities.size:
        raise ValueError(f"need two equal non-empty vectors, got {probabilities.shape} and {labels.shape}")
    if not np.all((probabilities >= 0) & (probabilities <= 1)):
        raise ValueError("probabilities must lie in [0, 1]")
    index = np.minimum((probabilities * bins).astype(int), bins - 1)  # 1.0 belongs to the last bin
    gaps = np.bincount(index, weights=labels - probabilities, minlength=bins)
    return float(np.abs(gaps).sum() / probabilities.size)
