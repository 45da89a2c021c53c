"""The numbers of a report: one row per policy and split, and the sentences that say what they show."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jrlhf.compare.runs import Evaluation, Policy, Run, read_evaluations, read_run
from jrlhf.compare.statistics import (
    Interval,
    difference_interval,
    interquartile_mean,
    mean_interval,
    rate_interval,
    win_rate,
)

ENOUGH_SEEDS = 3
MINUS = "\u2212"


@dataclass(frozen=True)
class Row:
    """One policy on one split. KL in nats from the baseline, length in tokens, rates in [0, 1]."""

    label: str  # the evaluation's label and the policy's name
    policy: str
    evaluation: str
    split: str
    is_baseline: bool
    gold: Interval
    share: Interval | None  # of the maximum that the gold reward allows
    gain: Interval | None  # gold minus the baseline's, paired by prompt; None for the baseline
    win: Interval | None  # share of answers above the baseline's by gold, ties half; None for the baseline
    proxy: Interval | None
    kl: Interval | None  # limits are NaN where the value is exact
    length: Interval
    ended: Interval
    criteria: dict[str, Interval]
    middle: float | None  # interquartile mean of gold over seeds
    prompts: int
    answers: int  # per prompt and seed
    seeds: int


@dataclass(frozen=True)
class Summary:
    """Everything that the table, the figures and the page show."""

    runs: tuple[Run, ...]
    evaluations: tuple[Evaluation, ...]
    rows: tuple[Row, ...]

    @property
    def reward_name(self) -> str:
        return self.evaluations[0].reward_name

    @property
    def seeds(self) -> int:
        """The smallest number of seeds behind any evaluation."""
        return min(len(evaluation.seeds) for evaluation in self.evaluations)

    @property
    def main(self) -> tuple[Row, ...]:
        """The rows of each evaluation's main split (its first)."""
        mains = {evaluation.label: evaluation.main_split for evaluation in self.evaluations}
        return tuple(row for row in self.rows if row.split == mains[row.evaluation])

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.split for row in self.rows))


def summarize(folders: Sequence[Path]) -> Summary:
    """Read the run folders and compute every number of the report."""
    runs = tuple(read_run(folder) for folder in folders)
    evaluations = tuple(read_evaluations(runs))
    rows = tuple(
        _row(evaluation, policy, split)
        for evaluation in evaluations
        for policy in evaluation.policies
        for split in policy.splits
    )
    return Summary(runs, evaluations, rows)


def _row(evaluation: Evaluation, policy: Policy, name: str) -> Row:
    split, baseline = policy.splits[name], evaluation.baseline.splits.get(name)
    gold = mean_interval(split.gold)
    against = baseline if policy is not evaluation.baseline else None
    kl: Interval | None
    if policy is evaluation.baseline:
        kl = Interval(0.0, 0.0, 0.0)
    elif policy.kl_exact is not None:
        kl = Interval(policy.kl_exact, float("nan"), float("nan"))
    else:
        kl = mean_interval(split.kl) if split.kl is not None else None
    return Row(
        label=f"{policy.name} ({evaluation.label})" if evaluation.label else policy.name,
        policy=policy.name,
        evaluation=evaluation.label,
        split=name,
        is_baseline=policy is evaluation.baseline,
        gold=gold,
        share=gold.scaled(1 / evaluation.gold_max)
        if evaluation.gold_max and name == evaluation.main_split
        else None,
        gain=difference_interval(split.gold, against.gold) if against else None,
        win=win_rate(split.gold, against.gold) if against else None,
        proxy=mean_interval(split.proxy) if split.proxy is not None else None,
        kl=kl,
        length=mean_interval(split.length),
        ended=rate_interval(split.ended),
        criteria={key: mean_interval(scores) for key, scores in split.criteria.items()},
        middle=interquartile_mean(split.gold),
        prompts=len(split.gold[0]),
        answers=int(np.median([len(answers) for answers in split.gold[0]])),
        seeds=len(evaluation.seeds),
    )


def headline(summary: Summary) -> str:
    """What the comparison found, in sentences computed from the main split."""
    sentences = []
    for evaluation in summary.evaluations:
        rows = [row for row in summary.main if row.evaluation == evaluation.label]
        baseline, gains = rows[0], [(row, row.gain) for row in rows if row.gain]
        start = f"{baseline.label} scores {baseline.gold.value:.2f} gold"
        start += f" ({baseline.share.value:.0%} of the maximum)." if baseline.share else "."
        sentences.append(start)
        moved = [(row, gain) for row, gain in gains if gain.excludes(0)]
        same = [(row, gain) for row, gain in gains if not gain.excludes(0)]
        if moved:
            moved.sort(key=lambda entry: -entry[1].value)
            sentences.append("; ".join(f"{row.label} {_moved(gain)}{_at(row)}" for row, gain in moved) + ".")
        for row, gain in same:
            sentences.append(
                f"{row.label} cannot be told from {baseline.label}"
                f" ({signed(gain.value)} {limits(gain)}{_at(row)})."
            )
    return " ".join(sentences)


def seed_note(summary: Summary) -> str:
    """What the intervals cover, and a warning when there are few seeds."""
    least = summary.seeds
    if least == 1:
        return (
            "One seed: intervals cover prompts only, not training randomness. Another training run may "
            "differ by more than these intervals; run three or more seeds before ranking algorithms."
        )
    note = f"{least} seeds: intervals cover both training seeds and prompts."
    if least < ENOUGH_SEEDS:
        note += (
            " Two seeds say little about training randomness, so the intervals are wide; run three or more."
        )
    return note


def signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS)


def number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}".replace("-", MINUS)


def limits(interval: Interval, digits: int = 2, percent: bool = False) -> str:
    """`[0.55, 0.67]`, or an empty string where there is no interval."""
    if np.isnan(interval.low):
        return ""
    if percent:
        return f"[{interval.low:.0%}, {interval.high:.0%}]".replace("-", MINUS)
    return f"[{number(interval.low, digits)}, {number(interval.high, digits)}]"


def _moved(gain: Interval) -> str:
    verb = "gains" if gain.value > 0 else "loses"
    return f"{verb} {signed(gain.value)} {limits(gain)}"


def _at(row: Row) -> str:
    return f" at KL {number(row.kl.value)}" if row.kl else ""
