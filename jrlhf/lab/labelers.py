"""Simulated labellers for Larder, whose noise is known, so that the best possible accuracy is known too.

Labeller l values an answer at

    u = s_l (w_H * helpful + w_S * harmless + style) + b * words + c * [the answer says "great"]

with s_l log-normal; group A weighs (w_H, w_S) = (1.3, 0.5), group B (0.6, 1.6), group C (1.3, -0.6). What the
labeller then answers is one random ranking, drawn by `rank_by_utility`, whose law for a pair is `pair_probabilities`.

**The noise**, in the order in which it acts. The answers are shown in the order of the list.

1. Position bias: the answer shown first gains delta.
2. Perception: x_k = u_k + delta [k = 0] + T * g_k with g_k standard Gumbel. Sorting by x draws a
   Plackett-Luce ranking with weights exp(u / T) (Luce 1959, Yellott 1977); for two answers that is
   Bradley and Terry (1952), P(1 > 2) = sigmoid((u_1 + delta - u_2) / T). T = 0 sorts by utility.
3. Ties (Rao and Kupper 1967): an answer whose x is within tau of the best x of its rank shares that rank.
   For a pair P(1 > 2) = sigmoid((d - tau) / T), P(2 > 1) = sigmoid((-d - tau) / T), d = u_1 + delta - u_2.
4. Intransitivity: two answers next to each other in the ranking with |u_i - u_j| < `near_tie` (bias apart)
   are, with probability rho, ranked by a cyclic rule on their kinds 0, 1, 2: kind 1 beats 0, 2 beats 1 and
   0 beats 2. No scalar reward can express it. Equal kinds keep the order drawn. An answer's kind is its
   number of words modulo 3.
5. Flips: with probability epsilon the whole ranking is turned round, so each pair is flipped with
   probability epsilon. Ties remain.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from jrlhf.config import Labeler, UserError, did_you_mean
from jrlhf.lab.larder import gold_scores

if TYPE_CHECKING:
    from jrlhf.types import PreferenceRow

GROUP_WEIGHTS = {"A": (1.3, 0.5), "B": (0.6, 1.6), "C": (1.3, -0.6)}  # (helpful, harmless)
POOLS = {"pooled": "AB", "opposed": "BC"} | {group: group for group in GROUP_WEIGHTS}


def rank_by_utility(
    utilities: Sequence[float],
    rng: np.random.Generator,
    *,
    temperature: float = 1.0,
    position_bias: float = 0.0,
    tie_threshold: float = 0.0,
    intransitive: float = 0.0,
    near_tie: float = 0.0,
    kinds: Sequence[int] | None = None,
    flip: float = 0.0,
) -> list[int]:
    """One noisy ranking of K answers by their utilities: ranks [K], 1 is best, equal ranks are ties.

    The module's docstring gives the law. `kinds` [K], each 0, 1 or 2, are what the cyclic rule reads; an
    `intransitive` labeller needs them (ValueError).
    """
    u = np.asarray(utilities, np.float64)
    perceived = u + temperature * rng.gumbel(size=len(u))
    perceived[:1] += position_bias
    order = [int(k) for k in np.argsort(-perceived, kind="stable")]
    level = perceived[order]  # the perceived utility at each place

    decided = [False] * len(order)  # place p and p+1 were ranked by the cyclic rule
    if intransitive:
        for p in range(len(order) - 1):
            winner = _cyclic_winner(u, kinds, order[p], order[p + 1], near_tie)
            if rng.random() < intransitive and winner is not None:
                decided[p] = True
                if winner == order[p + 1]:
                    order[p], order[p + 1] = order[p + 1], order[p]

    ranks = np.empty(len(order), np.int64)
    rank, best = 1, 0  # of the group of ties being filled, and the place of its first answer
    for p, k in enumerate(order):
        if p and (decided[p - 1] or level[best] - level[p] > tie_threshold):
            rank, best = rank + 1, p
        ranks[k] = rank
    if rng.random() < flip:
        ranks = rank + 1 - ranks
    return ranks.tolist()


def pair_probabilities(
    utilities: Sequence[float],
    *,
    temperature: float = 1.0,
    position_bias: float = 0.0,
    tie_threshold: float = 0.0,
    intransitive: float = 0.0,
    near_tie: float = 0.0,
    kinds: Sequence[int] | None = None,
    flip: float = 0.0,
) -> tuple[float, float, float]:
    """The exact law of `rank_by_utility` on two answers: P(first wins), P(tie), P(second wins)."""
    gap = float(utilities[0]) - float(utilities[1]) + position_bias
    if temperature > 0:
        win, lose = (
            _sigmoid((gap - tie_threshold) / temperature),
            _sigmoid((-gap - tie_threshold) / temperature),
        )
    else:
        win, lose = float(gap > tie_threshold), float(-gap > tie_threshold)
    if intransitive:
        winner = _cyclic_winner(utilities, kinds, 0, 1, near_tie)
        if winner is not None:
            win = (1 - intransitive) * win + intransitive * (winner == 0)
            lose = (1 - intransitive) * lose + intransitive * (winner == 1)
    tie = max(1 - win - lose, 0.0)
    return (1 - flip) * win + flip * lose, tie, (1 - flip) * lose + flip * win


def _cyclic_winner(
    utilities: Sequence[float] | np.ndarray, kinds: Sequence[int] | None, i: int, j: int, near_tie: float
) -> int | None:
    """i or j, whichever the cyclic rule prefers; None where the rule is silent."""
    if kinds is None:
        raise ValueError("an intransitive labeller needs `kinds`, which its cyclic rule reads")
    if abs(utilities[i] - utilities[j]) >= near_tie or kinds[i] == kinds[j]:
        return None
    return i if (kinds[i] - kinds[j]) % 3 == 1 else j


def _sigmoid(x: float) -> float:
    return float(0.5 * (1 + np.tanh(0.5 * x)))


@dataclass(frozen=True)
class LarderLabelers(Labeler):
    """A pool of simulated labellers; each prompt goes to one of them, drawn uniformly.

    `pooled` is half group A, half group B (the first has the odd one): both want what is helpful and harmless, in
    other proportions. `opposed` is half B, half C, who would rather hear about a hazard than be refused: no answer
    pleases both. `A`, `B` and `C` are one group only. `scale` is the median of s and `scale_spread` the standard
    deviation of log s. `seed` draws the labellers' s; the labels are drawn from the seed given to `label`. The noise
    fields are the module docstring's: `position_bias` delta, `tie_threshold` tau, `intransitive` rho and `flip`
    epsilon, in units of utility or probabilities; `length_bias` b is utility per word and `flattery` c the utility of
    a "great".
    """

    labelers: int = 20
    group: Literal["pooled", "opposed", "A", "B", "C"] = "pooled"
    scale: float = 2.0
    scale_spread: float = 0.3
    length_bias: float = 0.0
    flattery: float = 0.0
    position_bias: float = 0.0
    tie_threshold: float = 0.0
    intransitive: float = 0.0
    near_tie: float = 0.5
    flip: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if self.group not in POOLS:
            raise UserError(
                f"LarderLabelers.group: no group {self.group!r}.{did_you_mean(self.group, POOLS)}"
            )
        fewest = len(POOLS[self.group])
        if self.labelers < fewest:
            raise UserError(
                f"LarderLabelers.labelers is at least {fewest} in group {self.group!r}, got {self.labelers}."
            )
        for field in ("flip", "intransitive"):
            if not 0 <= getattr(self, field) <= 1:
                raise UserError(f"LarderLabelers.{field} is a probability, got {getattr(self, field)}.")
        for field in ("scale", "scale_spread", "tie_threshold", "near_tie"):
            if not getattr(self, field) >= 0:
                raise UserError(f"LarderLabelers.{field} must not be negative, got {getattr(self, field)}.")

    # Who the labellers are

    @cached_property
    def names(self) -> list[str]:
        """The labellers' ids, such as "A03": the group and the number in the pool."""
        first, last = POOLS[self.group][0], POOLS[self.group][-1]
        first_half = (self.labelers + 1) // 2
        groups = first * first_half + last * (self.labelers - first_half)
        return [f"{group}{number:02d}" for number, group in enumerate(groups)]

    @cached_property
    def weights(self) -> np.ndarray:
        """(w_H, w_S) of each labeller, [L, 2]."""
        return np.asarray([GROUP_WEIGHTS[name[0]] for name in self.names])

    @cached_property
    def scales(self) -> np.ndarray:
        """s of each labeller, [L]."""
        draws = np.random.default_rng([self.seed, 3]).standard_normal(self.labelers)
        return self.scale * np.exp(self.scale_spread * draws)

    def utilities(self, responses: Sequence[str], criteria: Mapping[str, Sequence[float]]) -> np.ndarray:
        """Every labeller's noiseless utility of every answer, [L, K]."""
        helpful, harmless, style = (np.asarray(criteria[c]) for c in ("helpful", "harmless", "style"))
        rubric = self.weights[:, :1] * helpful + self.weights[:, 1:] * harmless + style  # [L, K]
        words = np.asarray([len(r.split()) for r in responses])
        flatters = np.asarray(["great" in r.split() for r in responses])
        return self.scales[:, None] * rubric + self.length_bias * words + self.flattery * flatters

    def _noise(self, responses: Sequence[str]) -> dict:
        return {
            "position_bias": self.position_bias,
            "tie_threshold": self.tie_threshold,
            "intransitive": self.intransitive,
            "near_tie": self.near_tie,
            "kinds": [len(r.split()) % 3 for r in responses],
            "flip": self.flip,
        }

    # What they say

    def label(self, rows: list[dict], responses: list[list[str]], seed: int) -> "list[PreferenceRow]":
        """One PreferenceRow per prompt: `ranks`, the labeller's noiseless utilities as `scores`, the gold
        `criteria` (helpful, harmless, style and their sum gold), and the `labeler`.

        `rows[i]["ended"]`, where given, is a list with one bool per answer: whether it ended. The draws of
        row i depend on (seed, i) alone, so a different answer elsewhere changes nothing here.
        """
        names = self.names
        labelled: list[PreferenceRow] = []
        for i, (row, answers) in enumerate(zip(rows, responses, strict=True)):
            ended = row.get("ended", [True] * len(answers))
            if not isinstance(ended, list | tuple | np.ndarray) or len(ended) != len(answers):
                raise UserError(
                    f"row {i}: 'ended' must be a list of {len(answers)} bools, one per answer, got {ended!r}."
                )
            scores = gold_scores(
                [row["prompt"]] * len(answers), answers, [{"ended": bool(end)} for end in ended]
            )
            criteria = {name: values.tolist() for name, values in scores.items()}
            helpful, harmless, style = scores.values()
            criteria["gold"] = (helpful + harmless + style).tolist()
            rng = np.random.default_rng([seed, 4, i])
            who = int(rng.integers(self.labelers))
            utilities = self.utilities(answers, criteria)[who]
            labelled.append(
                {
                    "prompt": row["prompt"],
                    "responses": list(answers),
                    "ranks": rank_by_utility(utilities, rng, **self._noise(answers)),
                    "scores": utilities.tolist(),
                    "criteria": criteria,
                    "labeler": names[who],
                }
            )
        return labelled

    # How well their labels can be predicted

    def bayes_accuracy(
        self, rows: "Sequence[PreferenceRow]", *, knows_labeler: bool = True, knows_position: bool = True
    ) -> dict[str, float]:
        """The accuracy of the best possible predictor of these labellers' pairwise labels.

        `label`: its expected agreement with a label, given the two answers and that the label is no tie,
        max(P(1 > 2), P(2 > 1)) / (P(1 > 2) + P(2 > 1)) by `pair_probabilities`, averaged over the pairs of
        `rows` whose ranks differ. `gold`: the share of those pairs (equal gold apart) that the same
        predictor orders as the gold reward does.

        The predictor always knows the utilities and the noise. Without `knows_labeler` it does not know who
        labels, and takes the side with the higher probability over the whole pool: the ceiling of a reward
        model that reads text only. Without `knows_position` it does not know which answer was shown first.
        Where it sees two equal probabilities it guesses, and scores a half.

        The rows are pairs or rankings that `label` of this same pool has made. A ranking of more than two
        has exact pairwise probabilities only without ties and intransitivity; else a UserError.
        """
        names = self.names
        label_hits, gold_hits = [], []
        for number, row in enumerate(rows):
            ranks, gold = row["ranks"], row["criteria"]["gold"]
            if len(ranks) > 2 and (self.tie_threshold or self.intransitive):
                raise UserError(
                    f"row {number} ranks {len(ranks)} answers: with tie_threshold or intransitive the Bayes "
                    "accuracy is known for pairs only."
                )
            if row["labeler"] not in names:
                raise UserError(
                    f"row {number}: no labeller {row['labeler']!r} in this pool."
                    f"{did_you_mean(row['labeler'], names)}"
                )
            who = names.index(row["labeler"])
            answers = [str(r) for r in row["responses"]]
            utilities = self.utilities(answers, row["criteria"])  # [L, K]
            believers = utilities[[who]] if knows_labeler else utilities
            for i, j in itertools.combinations(range(len(ranks)), 2):
                if ranks[i] == ranks[j]:
                    continue
                pair = [answers[i], answers[j]]
                bias = self.position_bias if i == 0 else 0.0
                win, lose = self._chances(utilities[[who]][:, [i, j]], pair, bias)
                believed = self._chances(believers[:, [i, j]], pair, bias)
                if not knows_position:
                    believed += self._chances(believers[:, [i, j]], pair, -bias)
                lean = believed[0] - believed[1]
                picks_i = 0.5 if abs(lean) < 1e-9 else float(lean > 0)
                label_hits.append((picks_i * win + (1 - picks_i) * lose) / (win + lose))
                if abs(gold[i] - gold[j]) > 1e-6:
                    gold_hits.append(picks_i if gold[i] > gold[j] else 1 - picks_i)
        if not label_hits or not gold_hits:
            raise UserError(
                "the Bayes accuracy needs at least one pair that is no tie and whose gold differs."
            )
        return {"label": float(np.mean(label_hits)), "gold": float(np.mean(gold_hits))}

    def _chances(self, utilities: np.ndarray, pair: Sequence[str], bias: float) -> np.ndarray:
        """(P(first wins), P(second wins)) of a pair, summed over the labellers of `utilities` [L, 2]."""
        noise = self._noise(pair) | {"position_bias": bias}
        chances = [pair_probabilities(own, **noise) for own in utilities]
        return np.asarray(chances).sum(axis=0)[[0, 2]]


def group_gold(
    group: Literal["A", "B", "C"], prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict]
) -> np.ndarray:
    """A group's own gold reward, w_H * helpful + w_S * harmless + style, [N] float32."""
    if group not in GROUP_WEIGHTS:
        raise UserError(f"group_gold: no group {group!r}.{did_you_mean(group, GROUP_WEIGHTS)}")
    w_helpful, w_harmless = GROUP_WEIGHTS[group]
    scores = gold_scores(prompts, completions, rows)
    return w_helpful * scores["helpful"] + w_harmless * scores["harmless"] + scores["style"]
