"""Means, differences and win rates of evaluated policies, with intervals that respect how they were drawn.

Every function takes scores as `[S][P][N]` nested sequences: S training runs (one per seed), P prompts, N answers
to one prompt (N may differ between prompts). Answers to one prompt are not independent, so the unit that is
drawn is the prompt, and with several training runs also the run. A prompt that was drawn twice is two draws: the
mean over independent draws is what is estimated, and to cluster the repeats would only make intervals too wide
(Abadie, Athey, Imbens & Wooldridge 2023: cluster where the sampling did).

One training run: a bias-corrected and accelerated bootstrap over prompts (Efron 1987, `scipy.stats.bootstrap`).
It says nothing about the randomness of training.

Several: prompts are crossed with training runs (each run answers the same prompts), and there are too few
runs to resample: a percentile bootstrap of three covers the truth about 80% of the time when it says 95%.
So the two-way random-effects variance of the mean is used with Student's t, its degrees of freedom by
Satterthwaite (1946); Searle, Casella & McCulloch, *Variance Components*, 1992, chapter 4. Two policies whose
training runs do not belong together in pairs (three of one, five of the other) each add their own part. A policy
with a single training run adds none: the comparison is then with that one run and not with its algorithm.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from jrlhf.ops.intervals import wilson_interval

Scores = Sequence[Sequence[Sequence[float]]]  # [S][P][N]
RESAMPLES = 2000


class Interval(NamedTuple):
    """An estimate and its confidence limits. The limits are NaN where one prompt and one training run give none."""

    value: float
    low: float
    high: float

    def excludes(self, point: float) -> bool:
        """Whether the whole interval lies on one side of `point`. False when there is no interval."""
        return self.low > point or self.high < point

    def scaled(self, factor: float) -> "Interval":
        """The interval of `factor` times the quantity, `factor` > 0 taken as known."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)

    def reflected(self, whole: float = 0.0) -> "Interval":
        """The interval of `whole` minus the quantity: of b - a from a - b, of losses from wins (whole 1)."""
        return Interval(whole - self.value, whole - self.high, whole - self.low)


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
    means = prompt_means(scores)
    return _interval(means.mean(axis=0), (means,), confidence)


def rate_interval(scores: Scores, confidence: float = 0.95) -> Interval:
    """`mean_interval` of scores in [0, 1], with limits in [0, 1].

    When every answer is 0 or every answer is 1 resampling would claim certainty, so the Wilson interval
    with one trial per prompt is given instead.
    """
    means = prompt_means(scores)
    return _rate(means.mean(axis=0), (means,), confidence)


def difference_interval(
    a: Scores, b: Scores, confidence: float = 0.95, *, paired_runs: bool = True
) -> Interval:
    """The mean of `a - b`, paired by prompt: what the two share (hard prompts) cancels.

    With `paired_runs` the i-th training run of `a` belongs to the i-th of `b` (the same seed), and what the two
    share cancels too. Without it any numbers of runs go together, and their variances add.
    """
    x, y = _alike(prompt_means(a), prompt_means(b), paired_runs)
    tables = (x - y,) if paired_runs else (x, y)
    return _interval(x.mean(axis=0) - y.mean(axis=0), tables, confidence)


def gap_interval(a: Scores, b: Scores, confidence: float = 0.95) -> Interval:
    """The mean of `a` minus that of `b`: the same training runs on two sets of prompts, which may differ in number.

    One training run: Welch's t interval over prompts. Several: as for a mean, of the runs' differences.
    """
    tables = prompt_means(a), prompt_means(b)
    runs = len(tables[0])
    if runs != len(tables[1]):
        raise ValueError(f"a gap is of the same training runs: {runs} against {len(tables[1])}")
    x, y = tables
    value = float(x.mean() - y.mean())
    # As in `_crossed`; prompts of the two sets are drawn apart, so that their parts add up.
    prompts, shared, spread = [], [], 0.0
    for table in tables:
        size = table.shape[1]
        if size == 1 and runs == 1:
            return Interval(value, float("nan"), float("nan"))
        part = np.var(table.mean(axis=0), ddof=1) / size if size > 1 else 0.0
        prompts.append(part)
        spread += part**2 / max(size - 1, 1)
        if runs > 1:
            rest = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
            freedom = (runs - 1) * max(size - 1, 1)
            shared.append(np.sum(rest**2) / freedom / table.size)
            spread += shared[-1] ** 2 / freedom
    between = 0.0
    if runs > 1:
        between = np.var(x.mean(axis=1) - y.mean(axis=1), ddof=1) / runs
        spread += between**2 / (runs - 1)
    variance = max(between + sum(prompts) - sum(shared), between, sum(prompts))
    if variance <= 1e-18 * max(1.0, value**2):
        return Interval(value, value, value)
    half = stats.t.ppf((1 + confidence) / 2, variance**2 / spread) * np.sqrt(variance)
    return Interval(value, float(value - half), float(value + half))


def win_rate(a: Scores, b: Scores, confidence: float = 0.95, *, paired_runs: bool = True) -> Interval:
    """How often an answer of `a` scores above an answer of `b` to the same prompt. A tie counts half.

    Every answer of `a` meets every answer of `b` (the Mann-Whitney statistic within a prompt), prompts
    weigh the same, and the interval is clustered by prompt. `paired_runs` as in `difference_interval`: with it
    only training runs of one pair meet, without it all do.
    """
    _alike(prompt_means(a), prompt_means(b), paired_runs)
    if paired_runs:
        wins = np.array([_wins(*pair) for pair in zip(a, b, strict=True)])
        return _rate(wins.mean(axis=0), (wins,), confidence)
    wins = np.array([[_wins(one, other) for other in b] for one in a])  # [runs of a, runs of b, prompts]
    return _rate(wins.mean(axis=(0, 1)), (wins.mean(axis=1), wins.mean(axis=0)), confidence)


def interquartile_mean(scores: Scores) -> float | None:
    """The mean of the middle half of the seeds' means (Agarwal et al. 2021), robust to one failed seed.

    None with fewer than four seeds, where nothing would be trimmed.
    """
    seeds = prompt_means(scores).mean(axis=1)
    return float(stats.trim_mean(seeds, 0.25)) if len(seeds) >= 4 else None


def not_dominated(values: ArrayLike) -> np.ndarray:
    """The Pareto front of P policies by G rewards, [P, G] -> [P] bool: which rows no other row dominates.

    More is better. One row dominates another when it is at least as good in all columns and better in one (Pareto
    dominance), so equal rows both stay. A row with a NaN was not measured in full and compares with nothing: it
    dominates no other and is itself not on the front. Raises ValueError unless `values` is [P, G] with G ≥ 1.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"values must be a [P, G] array with at least one column, got shape {values.shape}")
    # [P, P], row i against row j. Comparisons with NaN are false, so such a row never counts as at least as good.
    at_least = np.all(values[:, None] >= values[None], axis=2)
    better = np.any(values[:, None] > values[None], axis=2)
    dominated = np.any(at_least & better, axis=0)
    return ~dominated & ~np.isnan(values).any(axis=1)


def _wins(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> list[float]:
    """[P] the share of pairs of answers to each prompt that `a` wins."""
    signs = (np.sign(np.subtract.outer(np.asarray(x), np.asarray(y))) for x, y in zip(a, b, strict=True))
    return [float((sign.mean() + 1) / 2) for sign in signs]


def _alike(a: np.ndarray, b: np.ndarray, paired_runs: bool) -> tuple[np.ndarray, np.ndarray]:
    if (a.shape != b.shape) if paired_runs else (a.shape[1] != b.shape[1]):
        raise ValueError(f"paired scores need the same runs and prompts: {a.shape} against {b.shape}")
    return a, b


# --- the intervals --------------------------------------------------------------------------------------
#
# `values` [P] is what is averaged over prompts. Each of `tables` [S, P] holds it by training run, up to a constant
# and a sign: one table when the runs are one set (or pairs), two when two policies' runs vary by themselves.


def _rate(values: np.ndarray, tables: Sequence[np.ndarray], confidence: float) -> Interval:
    if np.ptp(values) == 0 and values[0] in (0, 1):
        trials = len(values)
        return Interval(float(values[0]), *wilson_interval(trials if values[0] else 0, trials, confidence))
    value, low, high = _interval(values, tables, confidence)
    return Interval(value, max(low, 0.0), min(high, 1.0)) if np.isfinite(low) else Interval(value, low, high)


def _interval(values: np.ndarray, tables: Sequence[np.ndarray], confidence: float) -> Interval:
    value = float(values.mean())
    tables = [table for table in tables if len(table) > 1]
    if len(values) == 1 and not tables:
        return Interval(value, float("nan"), float("nan"))
    if all(np.ptp(x) <= 1e-9 * max(1.0, abs(value)) for x in (values, *tables)):  # all equal, up to rounding
        return Interval(value, value, value)
    if tables:
        return _crossed(values, tables, confidence)
    return _bootstrap(values, confidence)


def _bootstrap(values: np.ndarray, confidence: float) -> Interval:
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


def _crossed(values: np.ndarray, tables: Sequence[np.ndarray], confidence: float) -> Interval:
    # Mean squares over the number of cells; each bounds the variance of the mean from below in expectation.
    # The part that runs and prompts share (their interaction and the sampling of answers) is in both.
    prompts, value = len(values), float(values.mean())
    prompt = np.var(values, ddof=1) / prompts if prompts > 1 else 0.0
    runs, shared, spread = [], [], prompt**2 / max(prompts - 1, 1)
    for table in tables:  # [S, P], S > 1
        by_run = table.mean(axis=1)
        rest = table - by_run[:, None] - table.mean(axis=0) + by_run.mean()
        freedom = (len(table) - 1) * max(prompts - 1, 1)
        runs.append(np.var(by_run, ddof=1) / len(table))
        shared.append(np.sum(rest**2) / freedom / table.size)
        spread += runs[-1] ** 2 / (len(table) - 1) + shared[-1] ** 2 / freedom
    variance = max(sum(runs) + prompt - sum(shared), sum(runs), prompt)
    half = stats.t.ppf((1 + confidence) / 2, variance**2 / spread) * np.sqrt(variance)
    return Interval(value, float(value - half), float(value + half))
