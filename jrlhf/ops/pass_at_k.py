"""Answers that are right or wrong: pass@k, and the groups from which a group-relative advantage learns nothing."""

import numpy as np
from numpy.typing import ArrayLike


def pass_at_k(right: np.ndarray, k: int) -> np.ndarray:
    """The probability that at least one of k answers is right, from N ≥ k answers to each prompt, [P, N] -> [P].

    1 - C(N - c, k) / C(N, k) with c right answers (Chen et al. 2021, "Evaluating Large Language Models Trained
    on Code", eq. 1): the average over all subsets of k, unbiased where 1 - (1 - c/N)^k is not. `right` holds 0
    and 1 (or bools). Raises ValueError for anything else, and unless 1 ≤ k ≤ N.
    """
    right = np.asarray(right, np.float64)
    if right.ndim != 2 or not is_verdict(right):
        raise ValueError(f"right must be a [P, N] array of 0 and 1, got shape {right.shape}")
    answers = right.shape[1]
    if not 1 <= k <= answers:
        raise ValueError(f"pass@{k} needs 1 <= k <= {answers}, the number of answers per prompt")
    wrong = answers - right.sum(axis=1)
    # C(w, k) / C(N, k) as a product of k factors (w - i) / (N - i): no large binomials.
    taken = np.arange(k)
    return 1 - np.prod(np.maximum(wrong[:, None] - taken, 0) / (answers - taken), axis=1)


def zero_variance(scores: np.ndarray) -> np.ndarray:
    """Whether all answers of a prompt have the same score, [P, N] -> [P] bool.

    From such a group an advantage relative to the group's mean learns nothing (Yu et al. 2025, DAPO, §3.2).
    """
    scores = np.asarray(scores)
    return np.all(scores == scores[:, :1], axis=1)


def is_verdict(scores: ArrayLike) -> bool:
    """Whether every score is 0 or 1, so that it says right or wrong."""
    scores = np.asarray(scores)
    return bool(np.all((scores == 0) | (scores == 1)))


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to n."""
    return [2**i for i in range(n.bit_length())]


def verdict_summary(gold: ArrayLike, length: ArrayLike) -> dict[str, float]:
    """What several answers to each prompt tell of a gold reward that is 0 or 1; both are [P, N].

    `pass_at_<k>` for k = 1, 2, 4, ... ≤ N, `zero_variance` (share of prompts), and the mean `length_right` and
    `length_wrong` of the answers that are so (absent where none are). Empty for any other reward, and for N = 1.
    """
    right, tokens = np.asarray(gold), np.asarray(length)
    if right.shape[1] < 2 or not is_verdict(right):
        return {}
    found = {f"pass_at_{k}": float(np.mean(pass_at_k(right, k))) for k in powers_of_two(right.shape[1])}
    found["zero_variance"] = float(np.mean(zero_variance(right)))
    lengths = {"length_right": tokens[right == 1], "length_wrong": tokens[right == 0]}
    return found | {name: float(np.mean(of)) for name, of in lengths.items() if of.size}
