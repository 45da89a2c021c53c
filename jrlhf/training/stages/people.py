"""What several people said of the same answers: how far they agree, whom to believe, and one label for each pair."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, Literal

import numpy as np
from rich.console import Console

from jrlhf.config import PREFERENCES, Source, Stage, StageContext, UserError, stage_ref
from jrlhf.data.labelers import Votes, aggregated, votes_of
from jrlhf.ops.agreement import (
    Triples,
    alpha_of_counts,
    cohen_kappa,
    in_both_orders,
    raw_agreement,
    retest,
    transitivity,
)
from jrlhf.ops.reliability import bradley_terry, dawid_skene
from jrlhf.training.stages.common import write_text
from jrlhf.training.stages.preferences import check_one_of, preference_rows

Method = Literal["majority", "soft", "dawid_skene", "bradley_terry"]
VALUES = np.asarray([-1.0, 0.0, 1.0])  # what a vote may say of a pair: its second answer, a tie, its first


@dataclass(frozen=True)
class AggregateLabels(Stage):
    """Votes on the same pairs become one row for each pair. Leaves `preferences.jsonl`; the results say how far the
    labellers agree with one another and each with himself.

    "majority": what most said, a tie where nobody has most; "soft": the share of votes, ties half to each side;
    "dawid_skene": every labeller has a confusion matrix; "bradley_terry": every answer has a utility and every labeller
    a sharpness. All but the majority leave a `probability`, a soft label. Rankings are taken apart into their pairs.
    """

    artifact: ClassVar[str] = PREFERENCES

    preferences: str = stage_ref("", PREFERENCES)
    data: Source | None = None
    method: Method = "soft"
    # a pair's `weight`: with "votes" their number, so that soft labels teach exactly what the single votes would
    weight: Literal["one", "votes"] = "one"

    def validate(self, stages):
        check_one_of(self)

    def run(self, ctx: StageContext) -> dict:
        votes = votes_of(preference_rows(self, ctx))
        report, of_each = agreement(votes)
        probability, reliability = self._decide(votes)
        for name, told in reliability.items():
            of_each[name] |= told
        rows = aggregated(votes, probability, self.method != "majority", self.weight == "votes")
        write_text(
            ctx.folder / "preferences.jsonl",
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        )
        print_agreement(ctx.console, report)
        tied = sum(row["ranks"] == [1, 1] for row in rows)
        return report | {"with_ties": tied, "labelers": of_each}

    def _decide(self, votes: Votes) -> tuple[np.ndarray, dict[str, dict]]:
        """The probability of each pair's first answer [N], and what the method says of every labeller."""
        counts = votes.counts()
        if self.method == "soft":
            return (counts[:, 2] + 0.5 * counts[:, 1]) / counts.sum(axis=1), {}
        if self.method == "majority":
            most = counts == counts.max(axis=1, keepdims=True)
            clear = most.sum(axis=1) == 1
            return np.where(clear & most[:, 2], 1.0, np.where(clear & most[:, 0], 0.0, 0.5)), {}
        if "" in votes.names:
            raise UserError(
                f"method {self.method!r} asks who labelled each row, and some have no field 'labeler'"
            )
        people = len(votes.names)
        if self.method == "dawid_skene":
            # A class that nobody uses would take its share of the prior.
            used = counts.sum(axis=0)
            said = np.flatnonzero(used + used[::-1])
            # Every pair in both orders: whom we believe must not depend on which answer stands first in the file.
            item = np.concatenate([votes.pair, votes.pair + len(counts)])
            place = np.searchsorted(said, np.concatenate([votes.choice, -votes.choice]) + 1)
            fit = dawid_skene(item, np.tile(votes.labeler, 2), place, (2 * len(counts), people, len(said)))
            known = fit.reliability
            told = {name: {"reliability": float(known[n])} for n, name in enumerate(votes.names)}
            return np.clip(fit.posterior[: len(counts)] @ (0.5 * said), 0.0, 1.0), told
        first, second = votes.answers[votes.pair].T
        size = (int(votes.answers.max()) + 1, people)
        ranking = bradley_terry(first, second, votes.labeler, 0.5 * (1 + votes.choice), size)
        told = {name: {"sharpness": float(ranking.sharpness[n])} for n, name in enumerate(votes.names)}
        return ranking.probability(*votes.answers.T), told


def agreement(votes: Votes) -> tuple[dict[str, Any], dict[str, dict]]:
    """Of all labellers together, and of each by name. None stands where nothing can be said (nobody was asked twice,
    no pair was seen by two).

    Where a labeller saw a pair more than once, the last vote is held against the others' and all against one another.
    Rows without a labeller are taken as votes of different people, but for transitivity as those of one.
    """
    last = {(n, who): c for n, who, c in zip(*(x.tolist() for x in votes[:3]), strict=True)}
    counts = votes.counts()
    if "" not in votes.names:
        counts = np.zeros_like(counts)
        for (n, _), choice in last.items():
            counts[n, choice + 1] += 1
    both: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for group in _by_first(last).values():
        for (a, x), (b, y) in combinations(sorted(group), 2):
            both[a, b].append((x, y))
    names = votes.names
    kappa = {
        (a, b): cohen_kappa(*in_both_orders(np.asarray(pairs).T))
        for (a, b), pairs in sorted(both.items())
        if names[a] and names[b]
    }
    beside: dict[int, list[bool]] = defaultdict(list)
    mean_kappa: dict[int, list[float]] = defaultdict(list)
    for pair, seen in both.items():
        for who in pair:
            beside[who] += [x == y for x, y in seen]
            mean_kappa[who] += [k for k in (kappa.get(pair, math.nan),) if not math.isnan(k)]
    triples = transitivity_of(votes, last)
    of_each: dict[str, dict] = {}
    agreeing, asked = 0.0, 0
    for who, name in enumerate(names):
        mine = votes.labeler == who
        share, pairs = retest(votes.choice[mine], votes.pair[mine]) if name else (math.nan, 0)
        agreeing, asked = agreeing + (share * pairs if pairs else 0.0), asked + pairs
        of_each[name or "(no name)"] = {
            "votes": int(mine.sum()),
            "agreement": float(np.mean(beside[who])) if beside[who] and name else None,
            "kappa": float(np.mean(mean_kappa[who])) if mean_kappa[who] else None,
            "retest": share if pairs else None,
            "violations": triples[who].violations,
            "triples": triples[who].total,
        }
    in_either_order = np.concatenate([counts, counts[:, ::-1]])
    total = Triples(*(sum(column) for column in zip(*triples, strict=True)))
    report = {
        "votes": len(votes.pair),
        "pairs": len(votes.rows),
        "seen_by_several": int(np.sum(counts.sum(axis=1) > 1)),
        "raw_agreement": _or_none(raw_agreement(counts)),
        "alpha": {
            level: _or_none(alpha_of_counts(in_either_order, VALUES, level))
            for level in ("nominal", "ordinal", "interval")
        },
        "kappa": {f"{names[a]} and {names[b]}": _or_none(k) for (a, b), k in kappa.items()},
        "transitivity": total._asdict(),
        "retest": {"agreement": agreeing / asked if asked else None, "pairs": asked},
    }
    return report, of_each


def transitivity_of(votes: Votes, last: dict[tuple[int, int], int]) -> list[Triples]:
    """Of every labeller, summed over prompts; only answers to one prompt were compared."""
    answers = votes.answers.tolist()
    prompts = {json.dumps(row["prompt"], sort_keys=True): None for row in votes.rows}
    number = {prompt: n for n, prompt in enumerate(prompts)}
    of_pair = [number[json.dumps(row["prompt"], sort_keys=True)] for row in votes.rows]
    asked: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
    for (n, who), choice in last.items():
        asked[who, of_pair[n]].append((*answers[n], choice))
    totals = np.zeros((len(votes.names), 3), int)
    for (who, _), choices in asked.items():
        if len(choices) < 3:
            continue
        seen = sorted({a for i, j, _ in choices for a in (i, j)})
        table = np.full((len(seen), len(seen)), np.nan)
        for i, j, choice in choices:
            i, j = seen.index(i), seen.index(j)
            table[i, j], table[j, i] = choice, -choice
        totals[who] += transitivity(table)
    return [Triples(*row) for row in totals.tolist()]


def _by_first(last: dict[tuple[int, int], int]) -> dict[int, list[tuple[int, int]]]:
    groups: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for (n, who), choice in last.items():
        groups[n].append((who, choice))
    return groups


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def print_agreement(console: Console, report: dict[str, Any]) -> None:
    told = lambda x: "unknown" if x is None else f"{x:.3f}"  # noqa: E731
    triples, again = report["transitivity"], report["retest"]
    console.print(
        f"  {report['votes']} votes on {report['pairs']} pairs, {report['seen_by_several']} of them with several: "
        f"agreement {told(report['raw_agreement'])}, Krippendorff's ordinal alpha {told(report['alpha']['ordinal'])}\n"
        f"  {triples['violations']} of {triples['total']} triples fit no ranking ({triples['cycles']} cycles); asked "
        f"again {again['pairs']} times, the same answer: {told(again['agreement'])}",
        highlight=False,
    )
