"""The AUC of scores between two labels: by counting pairs, and how often its interval holds the truth."""

import numpy as np
import pytest
from scipy.stats import norm

from jrlhf.ops.intervals import auc_interval


def by_counting(scores, labels):
    above, below = scores[labels], scores[~labels]
    return np.mean(0.5 + 0.5 * np.sign(above[:, None] - below[None]))


def test_it_is_the_share_of_pairs_in_order_ties_half():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 8, 50).astype(float), rng.random(50) < 0.4
    auc, low, high = auc_interval(scores, labels, np.arange(50))
    assert auc == pytest.approx(by_counting(scores, labels))
    assert 0 <= low < auc < high <= 1


def test_without_clusters_it_is_delongs():
    """Variance of the placements of either label, as DeLong et al. write it."""
    rng = np.random.default_rng(1)
    scores, labels = rng.standard_normal(60), np.arange(60) < 25
    above, below = scores[labels], scores[~labels]
    ordered = above[:, None] > below[None]
    v10, v01 = ordered.mean(1), ordered.mean(0)
    spread = 1.959964 * np.sqrt(v10.var(ddof=1) / len(v10) + v01.var(ddof=1) / len(v01))
    auc, low, high = auc_interval(scores, labels, np.arange(60))
    np.testing.assert_allclose([low, high], [auc - spread, auc + spread], atol=1e-6)


@pytest.mark.parametrize(("shared", "of_prompts"), [(0.0, False), (2.0, False), (2.0, True)])
def test_it_holds_the_truth_about_as_often_as_it_says(shared, of_prompts):
    """Also where the answers to one prompt share most of their score, and their labels (`of_prompts`)."""
    rng, held, prompts, each, trials = np.random.default_rng(2), 0, 150, 4, 1000
    cluster = np.repeat(np.arange(prompts), each)
    labels = cluster % 2 == 0 if of_prompts else np.tile([True, False], prompts * each // 2)
    gap = np.sqrt(1 + shared**2)
    apart, together = norm.cdf(1 / np.sqrt(2)), norm.cdf(gap / np.sqrt(2))  # of two prompts, and of one
    truth = apart + (0 if of_prompts else (together - apart) / prompts)
    for _ in range(trials):
        scores = np.repeat(shared * rng.standard_normal(prompts), each) + rng.standard_normal(prompts * each)
        _, low, high = auc_interval(scores + gap * labels, labels, cluster)
        held += low <= truth <= high
    assert 0.93 < held / trials < 0.97


@pytest.mark.parametrize("labels", [[True, True], [False, False]])
def test_one_label_is_no_comparison(labels):
    with pytest.raises(ValueError, match="both labels"):
        auc_interval(np.zeros(2), np.asarray(labels), np.arange(2))
