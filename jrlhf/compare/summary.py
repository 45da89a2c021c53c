"""The numbers of a report: one row per policy and split, and the sentences that say what they show."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jrlhf.compare.evaluations import Evaluation, Policy, Split, read_evaluations
from jrlhf.compare.pairs import Pair, all_pairs, pair
from jrlhf.compare.runs import Run, read_run
from jrlhf.compare.statistics import (
    Interval,
    Scores,
    gap_interval,
    interquartile_mean,
    mean_interval,
    rate_interval,
)
from jrlhf.ops.pass_at_k import is_verdict, pass_at_k, powers_of_two, zero_variance

ENOUGH_SEEDS = 3
FEW_PAIRS = 6  # of four policies
MINUS, DAGGER = "\u2212", "\u2020"


@dataclass(frozen=True)
class Row:
    """One policy on one split. KL in nats from the baseline, length in tokens, rates in [0, 1]."""

    label: str  # the policy's name, and its run where that is needed to tell
    policy: str
    evaluation: str
    split: str
    is_baseline: bool
    gold: Interval
    share: Interval | None  # of the maximum that the gold reward allows
    gain: Interval | None  # gold minus the baseline's, paired by prompt; None for the baseline
    gap: Interval | None  # the policy's gold on the main split minus that on this one; None on the main split
    win: Interval | None  # share of answers above the baseline's by gold, ties half; None for the baseline
    proxy: Interval | None
    kl: Interval | None  # limits are NaN where the value is exact
    length: Interval
    ended: Interval
    criteria: dict[str, Interval]
    groups: dict[str, Interval]
    pass_at: dict[int, Interval]  # by k; empty but for several answers, each right (gold 1) or wrong (gold 0)
    zero_variance: Interval | None  # share of prompts whose answers are all right or all wrong
    length_right: float | None  # mean over right answers, and over wrong ones; None where there are none
    length_wrong: float | None
    middle: float | None  # interquartile mean of gold over training runs
    prompts: int
    distinct: int | None  # of these prompts; None where the evaluation did not record them
    answers: int  # per prompt and training run
    seeds: int  # distinct training runs of this policy


@dataclass(frozen=True)
class Summary:
    """Everything that the table, the figures and the page show."""

    runs: tuple[Run, ...]
    evaluations: tuple[Evaluation, ...]
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]  # on the main split, the better first
    notices: tuple[str, ...] = ()  # what a reader has to know about how the runs were put together

    @property
    def reward_name(self) -> str:
        return self.evaluations[0].reward_name

    @property
    def compared(self) -> tuple[Row, ...]:
        """The main rows that are compared with a baseline (without any, the baselines)."""
        return tuple(row for row in self.main if not row.is_baseline) or self.main

    @property
    def seeds(self) -> int:
        """The smallest number of training runs behind a policy that is compared with a baseline."""
        return min(row.seeds for row in self.compared)

    def marked(self, *runs: int) -> bool:
        """Whether intervals cover prompts only for one of these numbers of training runs and not elsewhere."""
        return 1 in runs and self.seeds == 1 and any(row.seeds > 1 for row in self.compared)

    @property
    def baseline(self) -> str:
        """What gains are over: the baseline's name, or the word where the runs have several."""
        names = {evaluation.baseline.name for evaluation in self.evaluations}
        return names.pop() if len(names) == 1 else "baseline"

    @property
    def main(self) -> tuple[Row, ...]:
        """The rows of each evaluation's main split (its first)."""
        mains = {evaluation.label: evaluation.main_split for evaluation in self.evaluations}
        return tuple(row for row in self.rows if row.split == mains[row.evaluation])

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.split for row in self.rows))


def summarize(folders: Sequence[Path]) -> Summary:
    """Read the run folders, each once, and compute every number of the report."""
    once = {Path(folder).resolve(): Path(folder) for folder in reversed(folders)}
    runs = tuple(read_run(folder) for folder in reversed(once.values()))
    evaluations = tuple(read_evaluations(runs))
    rows = tuple(
        _row(evaluation, policy, split)
        for evaluation in evaluations
        for policy in evaluation.policies
        for split in policy.splits
    )
    again = [run.name for run in runs if [Path(f).resolve() for f in folders].count(run.folder.resolve()) > 1]
    notices = [f"{name} was given more than once and is read once." for name in again]
    return Summary(runs, evaluations, rows, tuple(all_pairs(evaluations)), (*notices, *_notices(evaluations)))


def _notices(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    for evaluation in evaluations:
        if evaluation.merged:
            one = len(evaluation.merged) == 1
            yield (
                f"{listed(evaluation.merged)} {'is' if one else 'are'} the same stage in several of the runs, and "
                f"{'is' if one else 'each'} one row."
            )
        for policy in evaluation.policies:
            if policy.aliases:
                yield f"{listed(policy.aliases)} came out of the same training as {policy.label}: one row."
        if evaluation.mixed_proxies:
            yield "The runs have reward models of their own: proxy is not comparable between them."


def _row(evaluation: Evaluation, policy: Policy, name: str) -> Row:
    split, is_baseline = policy.splits[name], policy is evaluation.baseline
    prompts = evaluation.prompts.get(name)
    against = None
    if not is_baseline and name in evaluation.baseline.splits:
        against = pair(policy, evaluation.baseline, name)
    gold = mean_interval(split.gold)
    kl: Interval | None
    if is_baseline:
        kl = Interval(0.0, 0.0, 0.0)
    elif policy.kl_exact is not None:
        kl = Interval(policy.kl_exact, float("nan"), float("nan"))
    else:
        kl = mean_interval(split.kl) if split.kl is not None else None
    # A share of the maximum says something only from zero up.
    has_share = evaluation.gold_max and name == evaluation.main_split and gold.value >= 0
    return Row(
        label=policy.label,
        policy=policy.name,
        evaluation=evaluation.label,
        split=name,
        is_baseline=is_baseline,
        gold=gold,
        share=gold.scaled(1 / evaluation.gold_max) if has_share and evaluation.gold_max else None,
        gain=against.difference if against else None,
        gap=_gap(evaluation, policy, name),
        win=against.win if against else None,
        proxy=mean_interval(split.proxy) if split.proxy is not None else None,
        kl=kl,
        length=mean_interval(split.length),
        ended=rate_interval(split.ended),
        criteria={key: mean_interval(scores) for key, scores in split.criteria.items()},
        groups={key: mean_interval(scores) for key, scores in split.groups.items()},
        **_verified(split, verdicts=_are_verdicts(evaluation, name) and policy.kl_exact is None),
        middle=interquartile_mean(split.gold),
        prompts=len(split.gold[0]),
        distinct=len(set(prompts)) if prompts else None,
        answers=int(np.median([len(answers) for answers in split.gold[0]])),
        seeds=len(policy.folders),
    )


def _gap(evaluation: Evaluation, policy: Policy, name: str) -> Interval | None:
    main = policy.splits.get(evaluation.main_split)
    if name == evaluation.main_split or main is None:
        return None
    return gap_interval(main.gold, policy.splits[name].gold)


def _are_verdicts(evaluation: Evaluation, name: str) -> bool:
    """Whether the gold reward says right or wrong of every answer that was sampled (best-of-n holds expectations)."""
    sampled = (p.splits[name].gold for p in evaluation.policies if name in p.splits and p.kl_exact is None)
    return all(is_verdict(answers) for gold in sampled for run in gold for answers in run)


def _verified(split: Split, verdicts: bool) -> dict[str, Any]:
    """The fields of a `Row` that are known where answers are right or wrong and each prompt has several."""
    least = min(len(answers) for run in split.gold for answers in run)
    if not verdicts or least < 2:
        return {"pass_at": {}, "zero_variance": None, "length_right": None, "length_wrong": None}

    def by_prompt(measure: Callable[[np.ndarray], np.ndarray]) -> Scores:  # measure: [1, N] -> [1]
        return [[[float(measure(np.asarray([answers]))[0])] for answers in run] for run in split.gold]

    flat = lambda scores: np.concatenate([answers for run in scores for answers in run])  # noqa: E731
    right, tokens = flat(split.gold) == 1, flat(split.length)
    return {
        "pass_at": {
            k: rate_interval(by_prompt(lambda answers, k=k: pass_at_k(answers, k)))  # type: ignore[misc]
            for k in powers_of_two(least)
        },
        "zero_variance": rate_interval(by_prompt(zero_variance)),
        "length_right": float(tokens[right].mean()) if right.any() else None,
        "length_wrong": float(tokens[~right].mean()) if not right.all() else None,
    }


# --- in words -------------------------------------------------------------------------------------------


def headline(summary: Summary) -> str:
    """What the comparison found, in sentences computed from the main split."""
    sentences = []
    for evaluation in summary.evaluations:
        rows = [row for row in summary.main if row.evaluation == evaluation.label]
        baseline, gains = rows[0], [(row, row.gain) for row in rows if row.gain]
        start = f"{baseline.label} scores {number(baseline.gold.value)} gold"
        start += f" ({baseline.share.value:.0%} of the maximum)." if baseline.share else "."
        sentences.append(start)
        moved = [(row, gain) for row, gain in gains if gain.excludes(0)]
        same = [(row, gain) for row, gain in gains if not gain.excludes(0)]
        if moved:
            moved.sort(key=lambda entry: -entry[1].value)
            clauses = (f"{row.label} {_moved(gain)}{_at(row)}{_once(summary, row)}" for row, gain in moved)
            sentences.append("; ".join(clauses) + ".")
        for row, gain in same:
            sentences.append(
                f"{row.label} cannot be told from {baseline.label}"
                f" ({signed(gain.value)} {limits(gain)}{_at(row)}){_once(summary, row)}."
            )
    return " ".join([*sentences, pairs_found(summary)]).strip()


def best_against_others(summary: Summary) -> list[Pair]:
    """The compared policy with the most gold against each other one. Empty with fewer than two."""
    others = {row.label for row in summary.compared}
    best = max(summary.compared, key=lambda row: row.gold.value).label
    found = (p if p.a == best else p.reversed for p in summary.pairs if best in (p.a, p.b))
    return [p for p in found if p.b in others]


def shown_pairs(summary: Summary) -> list[Pair]:
    """The pairs that the terminal shows: all of the compared policies when they are few, else the best's."""
    labels = {row.label for row in summary.compared}
    every = [p for p in summary.pairs if p.a in labels and p.b in labels]
    return every if len(every) <= FEW_PAIRS else best_against_others(summary)


def pairs_found(summary: Summary) -> str:
    """Whether policies can be told from one another: `ppo has more gold than dpo. ...`."""
    pairs = shown_pairs(summary)
    return " ".join(_found([p for p in pairs if p.a == a]) for a in dict.fromkeys(p.a for p in pairs))


def _found(pairs: Sequence[Pair]) -> str:
    more = [p for p in pairs if p.difference.excludes(0)]
    level = [p for p in pairs if not p.difference.excludes(0)]
    brief = len(pairs) > 3  # the numbers are in the table of pairs
    name = lambda p: p.b if brief else f"{p.b} ({signed(p.difference.value)} {limits(p.difference)})"  # noqa: E731
    parts = [f"has more gold than {listed([name(p) for p in more])}"] if more else []
    parts += [f"cannot be told from {listed([name(p) for p in level])}"] if level else []
    return f"{pairs[0].a} {' and '.join(parts)}."


def seed_note(summary: Summary) -> str:
    """What the intervals cover and what they do not, with a warning when there are few seeds."""
    least, most = summary.seeds, max(row.seeds for row in summary.compared)
    if most == 1:
        return (
            "One seed: intervals cover prompts only, not training randomness. Another training run may "
            "differ by more than these intervals; run three or more seeds before ranking algorithms."
        )
    if least == 1:
        single = [row.label for row in summary.compared if row.seeds == 1]
        several = ", ".join(f"{row.seeds} of {row.label}" for row in summary.compared if row.seeds > 1)
        note = (
            f"Training runs: {several}; one of {listed(single)}. {DAGGER} Of a policy with one training run the "
            "intervals cover prompts only: another run of it may differ by more. Its difference from a policy with "
            "several runs covers the randomness of those."
        )
    else:
        many = f"{least}" if least == most else f"{least} to {most}"
        note = f"{many} seeds: intervals cover both training seeds and prompts."
        if least < ENOUGH_SEEDS:
            note += " Two seeds say little about training randomness, so the intervals are wide; run three or more."
    shared = _shared_stages(summary, most)
    if shared:
        note += f" All seeds share these stages, so their randomness is in no interval: {', '.join(shared)}."
    return note


def _shared_stages(summary: Summary, most: int) -> list[str]:
    """Stages with fewer training runs than the policies that are compared, and none of these."""
    labels = {row.label for row in summary.compared}
    policies = (policy for evaluation in summary.evaluations for policy in evaluation.policies)
    compared = {folder for policy in policies if policy.label in labels for folder in policy.folders}
    folders: dict[str, set[str]] = {}
    for run in summary.runs:
        for stage in run.stages:
            folders.setdefault(stage.name, set()).add(stage.folder.name)
    return [name for name, made in folders.items() if len(made) < most and not made & compared]


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


def listed(items: Sequence[str]) -> str:
    """`a, b and c`"""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _moved(gain: Interval) -> str:
    verb = "gains" if gain.value > 0 else "loses"
    return f"{verb} {signed(gain.value)} {limits(gain)}"


def _at(row: Row) -> str:
    return f" at KL {number(row.kl.value)}" if row.kl else ""


def _once(summary: Summary, row: Row) -> str:
    return " (one training run)" if summary.marked(row.seeds) else ""
