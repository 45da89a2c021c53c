"""Means, differences and win rates of evaluated policies, with intervals that respect how they were drawn.

Every function takes scores as `[S][P][N]` nested sequences: S seeds (training runs), P prompts, N answers
of one prompt (N may differ between prompts). Answers to one prompt are not independent, so the unit that
is drawn is the prompt, and with several seeds also the seed.

One seed: a bias-corrected and accelerated bootstrap over prompts (Efron 1987, `scipy.stats.bootstrap`).
It says nothing about the randomness of training.

Several seeds: prompts are crossed with seeds (each seed answers the same prompts), and there are too few
seeds to resample: a percentile bootstrap of three seeds covers the truth about 80% of the time when it
says 95%. So the two-way random-effects variance of the mean is used with Student's t, its degrees of
freedom by Satterthwaite (1946); Searle, Casella & McCulloch, *Variance Components*, 1992, chapter 4.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from jrlhf.ops.intervals import wilson_interval

Scores = Sequence[Sequence[Sequence[float]]]  # [S][P][N]
RESAMPLES = 2000


class Interval(NamedTuple):
    """An estimate and its confidence limits. The limits are NaN where one prompt and one seed give none."""

    value: float
    low: float
    high: float

    def excludes(self, point: float) -> bool:
        """Whether the whole interval lies on one side of `point`. False when there is no interval."""
        return self.low > point or self.high < point

    def scaled(self, factor: float) -> "Interval":
        """The interval of `factor` times the quantity, `factor` > 0 taken as known."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)


def prompt_means(scores: Scores) -> np.ndarray:
    """[S][P][N] -> [S, P] float64, each prompt's mean. Raises ValueError when a prompt has no answer or
    when the seeds have different numbers of prompts."""
    counts = {len(seed) for seed in scores}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"every seed must score the same prompts; the seeds have {sorted(counts)} prompts")
    if any(len(answers) == 0 for seed in scores for answers in seed):
        raise ValueError("a prompt without answers has no mean")
    return np.array([[np.mean(answers, dtype=np.float64) for answers in seed] for seed in scores])


def mean_interval(scores: Scores, confidence: float = 0.95) -> Interval:
    """The mean over prompts of each prompt's mean answer, in the units of `scores`."""
    return _interval(prompt_means(scores), confidence)


def rate_interval(scores: Scores, confidence: float = 0.95) -> Interval:
    """`mean_interval` of scores in [0, 1], with limits in [0, 1].

    When every answer is 0 or every answer is 1 resampling would claim certainty, so the Wilson interval
    with one trial per prompt is given instead.
    """
    return _rate(prompt_means(scores), confidence)


def difference_interval(a: Scores, b: Scores, confidence: float = 0.95) -> Interval:
    """The mean of `a - b`, paired by seed and prompt: what the two share (hard prompts) cancels."""
    return _interval(_paired(prompt_means(a), prompt_means(b)), confidence)


def win_rate(a: Scores, b: Scores, confidence: float = 0.95) -> Interval:
    """How often an answer of `a` scores above an answer of `b` to the same prompt. A tie counts half.

    Every answer of `a` meets every answer of `b` (the Mann-Whitney statistic within a prompt), prompts
    weigh the same, and the interval is clustered by prompt.
    """
    _paired(prompt_means(a), prompt_means(b))  # the same shapes, or an error that says which differ
    wins = [[_wins(*pair) for pair in zip(*seeds, strict=True)] for seeds in zip(a, b, strict=True)]
    return _rate(np.array(wins), confidence)


def interquartile_mean(scores: Scores) -> float | None:
    """The mean of the middle half of the seeds' means (Agarwal et al. 2021), robust to one failed seed.

    None with fewer than four seeds, where nothing would be trimmed.
    """
    seeds = prompt_means(scores).mean(axis=1)
    return float(stats.trim_mean(seeds, 0.25)) if len(seeds) >= 4 else None


def _wins(a: Sequence[float], b: Sequence[float]) -> float:
    return float((np.sign(np.subtract.outer(np.asarray(a, float), np.asarray(b, float))).mean() + 1) / 2)


def _paired(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.shape != b.shape:
        raise ValueError(f"paired scores need the same seeds and prompts: {a.shape} against {b.shape}")
    return a - b


def _rate(means: np.ndarray, confidence: float) -> Interval:
    if np.all(means == 0) or np.all(means == 1):
        prompts = means.shape[1]
        return Interval(means[0, 0], *wilson_interval(prompts if means[0, 0] else 0, prompts, confidence))
    value, low, high = _interval(means, confidence)
    return Interval(value, max(low, 0.0), min(high, 1.0)) if np.isfinite(low) else Interval(value, low, high)


def _interval(means: np.ndarray, confidence: float) -> Interval:  # means [S, P]
    value = float(means.mean())
    if means.size == 1:
        return Interval(value, float("nan"), float("nan"))
    if np.ptp(means) <= 1e-9 * max(1.0, abs(value)):  # all equal, up to rounding
        return Interval(value, value, value)
    return _crossed(means, confidence) if len(means) > 1 else _bootstrap(means[0], confidence)


def _bootstrap(values: np.ndarray, confidence: float) -> Interval:  # values [P]
    limits = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // len(values)),  # bounds the memory of many prompts
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(values.mean()), float(limits.low), float(limits.high))


def _crossed(means: np.ndarray, confidence: float) -> Interval:  # means [S, P], S > 1
    seeds, prompts = means.shape
    by_seed, by_prompt = means.mean(axis=1), means.mean(axis=0)
    value = float(means.mean())
    # Mean squares over the number of cells; each bounds the variance of the mean from below in expectation.
    # The part that seeds and prompts share (their interaction and the sampling of answers) is in both.
    seed = np.var(by_seed, ddof=1) / seeds
    prompt = np.var(by_prompt, ddof=1) / prompts if prompts > 1 else 0.0
    rest = means - by_seed[:, None] - by_prompt + value
    freedom = (seeds - 1) * max(prompts - 1, 1)
    shared = np.sum(rest**2) / freedom / means.size
    variance = max(seed + prompt - shared, seed, prompt)
    spread = seed**2 / (seeds - 1) + prompt**2 / max(prompts - 1, 1) + shared**2 / freedom
    half = stats.t.ppf((1 + confidence) / 2, variance**2 / spread) * np.sqrt(variance)
    return Interval(value, float(value - half), float(value + half))
