"""Two policies against each other: the difference in gold and the win rate, paired by what they share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from jrlhf.compare.evaluations import Evaluation, Policy
from jrlhf.compare.statistics import Interval, difference_interval, win_rate

LIMIT = 12  # policies in the table of pairs; more are the best by gold


@dataclass(frozen=True)
class Pair:
    """Policy `a` against policy `b`, by label, on the same prompts of one split.

    `difference` is gold of a minus gold of b, `win` how often an answer of a has more gold (ties half). `runs` are
    their numbers of training runs: of a policy with a single one the intervals do not cover the training.
    """

    a: str
    b: str
    difference: Interval
    win: Interval
    runs: tuple[int, int]
    paired_runs: bool  # training runs of one seed are paired

    @property
    def reversed(self) -> "Pair":
        win = self.win.reflected(1.0)
        return Pair(self.b, self.a, self.difference.reflected(), win, self.runs[::-1], self.paired_runs)


def pair(a: Policy, b: Policy, split: str) -> Pair:
    """`a` against `b` on one split, on which they answered the same prompts."""
    paired = a.seeds == b.seeds
    x, y = a.splits[split].gold, b.splits[split].gold
    return Pair(
        a=a.label,
        b=b.label,
        difference=difference_interval(x, y, paired_runs=paired),
        win=win_rate(x, y, paired_runs=paired),
        runs=(len(a.folders), len(b.folders)),
        paired_runs=paired and len(a.folders) > 1,
    )


def all_pairs(evaluations: Sequence[Evaluation]) -> Iterator[Pair]:
    """Every two policies that answered the same main prompts, the one with more gold first."""
    entries = [
        (evaluation, policy)
        for evaluation in evaluations
        for policy in evaluation.policies
        if evaluation.main_split in policy.splits
    ]
    gold = lambda entry: _mean(entry[1].splits[entry[0].main_split].gold)  # noqa: E731
    best = sorted(entries, key=gold, reverse=True)[:LIMIT]
    for (one, a), (other, b) in combinations(best, 2):
        split = one.main_split
        if one is other or (split == other.main_split and one.same_prompts(other, split)):
            yield pair(a, b, split)


def _mean(scores) -> float:
    return float(np.mean([np.mean(answers) for run in scores for answers in run]))
