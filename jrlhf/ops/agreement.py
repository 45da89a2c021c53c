"""How far people agree, with one another, with themselves, and each with an order: plain numpy on the host.

Ratings are a table [L, N] of L raters and N items, numbers, NaN where a rater did not see an item. A preference between
two answers is a rating of the pair: 1 the first, 0 a tie, -1 the second.
"""

from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

Level = Literal["nominal", "ordinal", "interval"]
Weights = Literal["none", "linear", "quadratic"]


def category_counts(ratings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the values that occur, sorted [V]; how many raters gave each item each of them [N, V]) of ratings [L, N]."""
    ratings = np.asarray(ratings, np.float64)
    values = np.unique(ratings[~np.isnan(ratings)])
    return values, np.sum(ratings[:, :, None] == values, axis=0)


def in_both_orders(choices: np.ndarray) -> np.ndarray:
    """Choices [..., N] between two answers, every pair once as it is and once with its answers changed over, [..., 2N].

    Which answer of a pair comes first is the file's doing. Where it puts the chosen one first, all raters seem to say
    "first" all the time, and what they agree on seems chance. Agreement on both orders does not depend on it.
    """
    choices = np.asarray(choices, np.float64)
    return np.concatenate([choices, -choices], axis=-1)


def krippendorff_alpha(ratings: np.ndarray, level: Level = "nominal") -> float:
    """1 - observed / expected disagreement of ratings [L, N] (Krippendorff 2011, "Computing Krippendorff's
    Alpha-Reliability"); 1 is perfect, 0 what chance gives. NaN where there is nothing to compare: no item with two
    ratings, or only one value in use."""
    values, counts = category_counts(ratings)
    return alpha_of_counts(counts, values, level)


def alpha_of_counts(counts: np.ndarray, values: np.ndarray, level: Level = "nominal") -> float:
    """Krippendorff's alpha of how often [N, V] each item was given each of the sorted values [V]: it does not matter by
    whom. Items with fewer than two ratings are left out."""
    counts = np.asarray(counts, np.float64)
    each = counts.sum(axis=1)
    counts, each = counts[each > 1], each[each > 1]
    # o[c, k]: pairs of ratings (c, k) of one item by two raters, each item as much as it has ratings.
    share = counts / np.maximum(each - 1, 1)[:, None]
    o = share.T @ counts - np.diag(share.sum(axis=0))
    total = o.sum(axis=1)
    n = total.sum()
    expected = np.outer(total, total)  # less what a value shares with itself, whose distance is 0
    distance = _distance(np.asarray(values, np.float64), total, level)
    if n < 2 or not (denominator := np.sum(expected * distance)):
        return float("nan")
    return float(1.0 - (n - 1) * np.sum(o * distance) / denominator)


def _distance(values: np.ndarray, total: np.ndarray, level: Level) -> np.ndarray:
    """Squared difference δ² between values, [V, V]."""
    if level == "nominal":
        return 1.0 - np.eye(len(values))
    if level == "ordinal":  # by how many ratings lie between them, half of those at either end included
        values = np.cumsum(total) - total / 2
    return np.square(values[:, None] - values[None])


def cohen_kappa(first: np.ndarray, second: np.ndarray, weights: Weights = "none") -> float:
    """Agreement of two raters beyond chance (Cohen 1960; weighted by the distance of categories, Cohen 1968), [N], [N].

    Items that one of them did not see (NaN) are left out. NaN where none is left, or where chance explains all: both
    used one value. The distances are those between the places of the sorted values.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    both = ~np.isnan(first) & ~np.isnan(second)
    values, place = np.unique(np.concatenate([first[both], second[both]]), return_inverse=True)
    n, v = int(both.sum()), len(values)
    if not n:
        return float("nan")
    observed = np.zeros((v, v))
    np.add.at(observed, (place[:n], place[n:]), 1.0 / n)
    chance = np.outer(observed.sum(axis=1), observed.sum(axis=0))
    gap = np.abs(np.subtract.outer(np.arange(v), np.arange(v)))
    cost = {"none": gap > 0, "linear": gap, "quadratic": gap**2}[weights]
    disagreement = np.sum(chance * cost)
    return float(1.0 - np.sum(observed * cost) / disagreement) if disagreement else float("nan")


def pairwise_kappa(ratings: np.ndarray, weights: Weights = "none") -> np.ndarray:
    """Cohen's κ of every two raters of ratings [L, N] -> [L, L], symmetric; 1 on the diagonal."""
    kappa = np.eye(len(ratings))
    for i, j in combinations(range(len(ratings)), 2):
        kappa[i, j] = kappa[j, i] = cohen_kappa(ratings[i], ratings[j], weights)
    return kappa


def fleiss_kappa(counts: np.ndarray) -> float:
    """Agreement of many raters beyond chance (Fleiss 1971), from how often [N, V] each item was given each value.

    Every item must have the same number of ratings, two or more (ValueError; `alpha_of_counts` needs neither). NaN
    where only one value is in use.
    """
    counts = np.asarray(counts, np.float64)
    each = counts.sum(axis=1)
    if not len(each) or each[0] < 2 or np.any(each != each[0]):
        raise ValueError("Fleiss' kappa needs the same number of ratings, at least 2, of every item")
    expected = float(np.sum(np.square(counts.sum(axis=0) / counts.sum())))
    return (raw_agreement(counts) - expected) / (1.0 - expected) if expected < 1 else float("nan")


def raw_agreement(counts: np.ndarray) -> float:
    """The share of agreeing pairs of ratings of one item, mean over the items with two or more, from counts [N, V]; NaN
    where there is none."""
    counts = np.asarray(counts, np.float64)
    each = counts.sum(axis=1)
    counts, each = counts[each > 1], each[each > 1]
    if not len(each):
        return float("nan")
    return float(np.mean(np.sum(counts * (counts - 1), axis=1) / (each * (each - 1))))


class Triples(NamedTuple):
    """Of every three answers all of whose pairs were compared."""

    total: int
    cycles: int  # a beats b beats c beats a
    violations: (
        int  # no ranking, ties allowed, gives the three choices: cycles, and a = b, b = c but a beats c, ...
    )


def transitivity(choices: np.ndarray) -> Triples:
    """Of choices between K answers, [K, K]: 1 where i was preferred to j, -1 the other way round, 0 a tie, NaN where
    nobody was asked. Only the entries i < j are read.

    Three choices fit a ranking unless i to j and j to k point one way (or one of them is a tie), and i to k does not.
    """
    total = cycles = violations = 0
    for i, j, k in combinations(range(len(choices)), 3):
        ij, jk, ik = choices[i, j], choices[j, k], choices[i, k]
        if np.isnan(ij + jk + ik):
            continue
        total += 1
        decided = ij == 0 or jk == 0 or ij == jk  # what the third must be
        violations += bool(decided and ik != np.sign(ij + jk))
        cycles += bool(ij == jk != 0 and ik == -ij)
    return Triples(total, cycles, violations)


def retest(labels: np.ndarray, items: np.ndarray) -> tuple[float, int]:
    """How often a rater, asked again, says the same: (share, pairs of answers to one question) of labels [N] on items
    [N] of one rater. The share is NaN where nothing was asked twice."""
    agreeing = pairs = 0
    order = np.argsort(items, kind="stable")
    for same in np.split(np.asarray(labels)[order], np.flatnonzero(np.diff(np.asarray(items)[order])) + 1):
        _, counts = np.unique(same, return_counts=True)
        agreeing += int(np.sum(counts * (counts - 1) // 2))
        pairs += len(same) * (len(same) - 1) // 2
    return (agreeing / pairs if pairs else float("nan")), pairs
