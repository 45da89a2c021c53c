"""Votes: the rows of several labellers, who were asked the same or not, as arrays, and back to one row for each pair.

A row that ranks K answers holds a vote on each of its K(K-1)/2 pairs. Two rows ask the same when prompt and both
answers are equal, in either order.
"""

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from jrlhf.config import UserError, did_you_mean
from jrlhf.data.schema import rounded_ranks


class Votes(NamedTuple):
    """V votes on N pairs among M answers by L labellers."""

    pair: np.ndarray  # [V] int
    labeler: np.ndarray  # [V] int
    choice: np.ndarray  # [V] int: 1 the pair's first answer, 0 a tie, -1 its second
    answers: np.ndarray  # [N, 2] int, of each pair
    names: tuple[str, ...]  # of the labellers; "" is whoever labelled rows without a name
    rows: list[dict]  # [N]: of each pair the prompt, the two responses and what else a row may say of them

    def counts(self) -> np.ndarray:
        """How often each pair was voted for: the second answer, a tie, the first, [N, 3]."""
        counts = np.zeros((len(self.rows), 3), np.int64)
        np.add.at(counts, (self.pair, self.choice + 1), 1)
        return counts


def rater_of(row: dict, place: str, why: str) -> str:
    """The labeller of a row; UserError when it has none, which `why` needs."""
    if "labeler" not in row:
        raise UserError(f"{place}: no field 'labeler', which {why} needs.")
    return row["labeler"]


def of_labelers(rows: list[dict], patterns: Sequence[str], where: str) -> list[dict]:
    """The rows whose labeller matches one of the patterns ("A*"), of which each must match someone (UserError)."""
    names = dict.fromkeys(rater_of(row, f"{where} row {n}", "labelers") for n, row in enumerate(rows, 1))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join([*names][:8]) + (", ..." if len(names) > 8 else "")
            raise UserError(
                f"{where}: labelers: nobody matches {pattern!r}.{did_you_mean(pattern, names)} Labellers: {some}."
            )
    matching = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
    return [row for row in rows if row["labeler"] in matching]


def raters_of(rows: list[dict]) -> list[str]:
    """Whose type a mixture asks for, [N]: the row's labeller, or its prompt where no row names one. UserError where
    only some rows name one."""
    named = ["labeler" in row for row in rows]
    if any(named) and not all(named):
        raise UserError(
            f"preferences row {named.index(False) + 1}: no field 'labeler', which other rows have: a mixture asks for "
            "the type of every labeller, or of every prompt"
        )
    return [row["labeler"] if "labeler" in row else _key(row["prompt"]) for row in rows]


def votes_of(rows: list[dict], where: str = "preferences") -> Votes:
    """The votes in preference rows, in their order. UserError for rows that are not votes: with `probability` or
    `weight`, they are aggregated already."""
    answers: dict[tuple[str, str], int] = {}
    pairs: dict[tuple[int, int], int] = {}
    names: dict[str, int] = {}
    templates: list[dict] = []
    votes = []
    for n, row in enumerate(rows, 1):
        if told := [name for name in ("probability", "weight") if name in row]:
            raise UserError(
                f"{where} row {n} has {told[0]!r}: it is an aggregate already, not a vote (AILabels with soft=False "
                "makes votes)."
            )
        who = names.setdefault(row.get("labeler", ""), len(names))
        prompt = _key([row["prompt"], row.get("tools", [])])
        keys = [answers.setdefault((prompt, _key(r)), len(answers)) for r in row["responses"]]
        for i, j in combinations(range(len(keys)), 2):
            if keys[i] == keys[j]:
                continue  # one answer beside itself
            choice = int(np.sign(row["ranks"][j] - row["ranks"][i]))
            first, second, sign = (i, j, 1) if (keys[j], keys[i]) not in pairs else (j, i, -1)
            pair = (keys[first], keys[second])
            if pair not in pairs:
                pairs[pair] = len(pairs)
                templates.append(_template(row, first, second))
            votes.append((pairs[pair], who, sign * choice))
    if not votes:
        raise UserError(f"{where}: no two different answers were compared")
    pair, labeler, choice = np.asarray(votes).T
    return Votes(pair, labeler, choice, np.asarray([*pairs]), tuple(names), templates)


def _key(spoken: Any) -> str:
    return spoken if isinstance(spoken, str) else json.dumps(spoken, sort_keys=True, ensure_ascii=False)


def _template(row: dict, i: int, j: int) -> dict:
    """Of a row the part that is about two of its answers and does not depend on who judged them."""
    found: dict[str, Any] = {"prompt": row["prompt"], "responses": [row["responses"][i], row["responses"][j]]}
    if "ended" in row:
        found["ended"] = [row["ended"][i], row["ended"][j]]
    if "tools" in row:
        found["tools"] = row["tools"]
    return found


def aggregated(votes: Votes, probability: np.ndarray, soft: bool, by_votes: bool) -> list[dict]:
    """A preference row for each pair: with `soft` the probability [N] that its first answer is preferred, else its
    rounding alone; with `by_votes` as its weight the number of votes; and how many said first, tie and second."""
    rows = []
    for template, p, (second, tie, first) in zip(
        votes.rows, probability.tolist(), votes.counts().tolist(), strict=True
    ):
        row = template | {"ranks": rounded_ranks(p), "votes": [first, tie, second]}
        if soft:
            row["probability"] = p
        if by_votes:
            row["weight"] = float(first + tie + second)
        rows.append(row)
    return rows
