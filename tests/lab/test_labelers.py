"""The simulated labellers' noise against its closed forms, and the Bayes accuracy against Monte Carlo."""

import itertools
import json
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from jrlhf.config import UserError
from jrlhf.lab import LarderLabelers, LarderPrompts, demonstrate, pair_probabilities, rank_by_utility

PROMPT = "describe tea , bleach and honey :"
GOOD = "tea is bitter . sorry bleach . honey is golden . thanks"
PLAIN = "tea is bitter . honey is golden . thanks"
HARMFUL = "tea is bitter . bleach is white . honey is golden ."
FLATTERING = "great tea is bitter . thanks"


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def outcomes(utilities, draws=20_000, seed=0, **noise) -> np.ndarray:
    """The share of (first wins, tie, second wins) in many rankings of two."""
    rng = np.random.default_rng(seed)
    ranks = np.asarray([rank_by_utility(utilities, rng, **noise) for _ in range(draws)])
    gap = ranks[:, 1] - ranks[:, 0]
    return np.asarray([(gap > 0).mean(), (gap == 0).mean(), (gap < 0).mean()])


# Closed forms


def test_bradley_terry():
    assert pair_probabilities([1.3, 0.2]) == pytest.approx((sigmoid(1.1), 0, sigmoid(-1.1)))
    assert pair_probabilities([1.3, 0.2], temperature=0.5)[0] == pytest.approx(sigmoid(2.2))
    assert pair_probabilities([1.3, 0.2], position_bias=0.4)[0] == pytest.approx(sigmoid(1.5))
    assert pair_probabilities([1.3, 0.2], flip=0.1)[0] == pytest.approx(
        0.9 * sigmoid(1.1) + 0.1 * sigmoid(-1.1)
    )


def test_ties_are_rao_and_kuppers():
    """Rao and Kupper (1967): P(i wins) = p_i / (p_i + theta p_j), p = exp(u), theta = exp(tau)."""
    first, second, theta = math.exp(0.7), math.exp(0.1), math.exp(0.4)
    win, tie, lose = pair_probabilities([0.7, 0.1], tie_threshold=0.4)
    assert win == pytest.approx(first / (first + theta * second))
    assert lose == pytest.approx(second / (second + theta * first))
    assert win + tie + lose == pytest.approx(1)


def test_the_cyclic_rule():
    noise = {"intransitive": 1.0, "near_tie": 0.5}
    for winner, loser in ((1, 0), (2, 1), (0, 2)):
        assert pair_probabilities([0, 0.4], kinds=[winner, loser], **noise) == (1, 0, 0)
        assert pair_probabilities([0.4, 0], kinds=[loser, winner], **noise) == (0, 0, 1)
    assert pair_probabilities([0, 0.6], kinds=[1, 0], **noise)[0] == pytest.approx(sigmoid(-0.6))  # far apart
    assert pair_probabilities([0, 0.4], kinds=[1, 1], **noise)[0] == pytest.approx(sigmoid(-0.4))  # one kind
    half = pair_probabilities([0, 0.4], kinds=[1, 0], intransitive=0.5, near_tie=0.5)
    assert half[0] == pytest.approx(0.5 + 0.5 * sigmoid(-0.4))
    with pytest.raises(ValueError, match="kinds"):
        pair_probabilities([0, 0], intransitive=0.5)


@pytest.mark.parametrize(
    "noise",
    [
        {},
        {"temperature": 2.0},
        {"temperature": 0.0, "tie_threshold": 0.5},
        {"flip": 0.25},
        {"position_bias": 0.8},
        {"tie_threshold": 0.6},
        {"intransitive": 0.4, "near_tie": 1.0, "kinds": [1, 2]},
        {
            "temperature": 0.7,
            "flip": 0.1,
            "position_bias": -0.5,
            "tie_threshold": 0.3,
            "intransitive": 0.3,
            "near_tie": 0.5,
            "kinds": [0, 2],
        },
    ],
)
@pytest.mark.parametrize("utilities", [(0.3, 0.0), (-1.0, 0.2)])
def test_draws_follow_the_closed_form(utilities, noise):
    expected = np.asarray(pair_probabilities(utilities, **noise))
    error = np.sqrt(expected * (1 - expected) / 20_000)
    assert (np.abs(outcomes(utilities, **noise) - expected) <= 4 * error + 1e-9).all()


def test_plackett_luce_frequencies():
    utilities, draws = np.asarray([0.9, 0.0, -0.6, 0.4]), 24_000
    rng = np.random.default_rng(0)
    counts = Counter(tuple(rank_by_utility(utilities, rng)) for _ in range(draws))
    chi_square = 0.0
    for order in itertools.permutations(range(4)):
        weights = np.exp(utilities[list(order)])
        expected = draws * math.prod(weights[k] / weights[k:].sum() for k in range(4))
        ranks = tuple(order.index(k) + 1 for k in range(4))
        chi_square += (counts[ranks] - expected) ** 2 / expected
    assert chi_square < 49.7  # the 0.999 quantile for 23 degrees of freedom


def test_flips_reverse_exactly_their_share_of_certain_labels():
    rng = np.random.default_rng(0)
    ranks = [tuple(rank_by_utility([3, 2, 1, 0], rng, temperature=0, flip=0.1)) for _ in range(20_000)]
    assert set(ranks) == {(1, 2, 3, 4), (4, 3, 2, 1)}
    assert np.mean([r[0] == 4 for r in ranks]) == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 20_000))


def test_ranks_without_noise():
    rng = np.random.default_rng(0)
    assert rank_by_utility([0.1, 0.9, 0.5], rng, temperature=0) == [3, 1, 2]
    assert rank_by_utility([0.5, 0.5, 0.9], rng, temperature=0) == [2, 2, 1]  # dense ranks, equal are ties
    # an answer ties with the best of its rank, not with a chain of neighbours
    assert rank_by_utility([0.0, 0.3, 0.6, 0.9], rng, temperature=0, tie_threshold=0.4) == [2, 2, 1, 1]
    assert rank_by_utility([0.0, 0.3, 0.6], rng, temperature=0, tie_threshold=0.4, flip=1.0) == [1, 2, 2]
    assert rank_by_utility([0.2, 0.0], rng, temperature=0, position_bias=-0.3) == [2, 1]
    assert rank_by_utility([0.7], rng) == [1]


def test_a_cycle_of_three():
    """Three answers of one utility and three kinds: each beats one and loses to one."""
    rng = np.random.default_rng(0)
    always = {"temperature": 0.0, "intransitive": 1.0, "near_tie": 0.1}
    beats = {
        (i, j): rank_by_utility([0, 0], rng, kinds=[i, j], **always) == [1, 2]
        for i, j in itertools.permutations(range(3), 2)
    }
    assert [i for (i, j), won in beats.items() if won] == [0, 1, 2]
    assert rank_by_utility([0.05, 0.0, -0.05], rng, kinds=[0, 1, 0], **always) == [2, 1, 3]


# The pool


@pytest.mark.parametrize(
    ("group", "names"),
    [("pooled", ["A00", "A01", "A02", "B03", "B04"]), ("opposed", ["B00", "B01", "B02", "C03", "C04"])],
)
def test_utilities_are_the_formula(group, names):
    pool = LarderLabelers(labelers=5, group=group, length_bias=0.1, flattery=0.7, seed=3)
    criteria = {"helpful": [1.0, 0.5], "harmless": [1.0, -1.0], "style": [0.2, 0.1]}
    utilities = pool.utilities([GOOD, FLATTERING], criteria)
    assert pool.names == names
    s = pool.scales
    for l, name in enumerate(pool.names):
        w_helpful, w_harmless = {"A": (1.3, 0.5), "B": (0.6, 1.6), "C": (1.3, -0.6)}[name[0]]
        assert utilities[l, 0] == pytest.approx(s[l] * (w_helpful + w_harmless + 0.2) + 0.1 * 12)
        assert utilities[l, 1] == pytest.approx(s[l] * (0.5 * w_helpful - w_harmless + 0.1) + 0.1 * 6 + 0.7)


def test_scales_are_log_normal():
    logs = np.log(LarderLabelers(labelers=4_000, scale=1.5, scale_spread=0.4).scales)
    assert logs.mean() == pytest.approx(math.log(1.5), abs=0.03)
    assert logs.std() == pytest.approx(0.4, abs=0.03)


def test_rows_hold_what_was_said_and_why():
    rows = [{"prompt": PROMPT, "ended": [True, True, False]}, {"prompt": PROMPT}]
    pool = LarderLabelers(group="B")
    first, second = pool.label(rows, [[GOOD, HARMFUL, PLAIN], [GOOD, PLAIN, HARMFUL]], seed=0)
    assert first["criteria"]["helpful"] == [1, 1, 1]
    assert first["criteria"]["harmless"] == [1, -1, 0]
    assert first["criteria"]["style"] == pytest.approx([0.2, 0.0, -0.3])
    assert first["criteria"]["gold"] == pytest.approx([2.2, 0.0, 0.7])
    assert second["criteria"]["style"] == pytest.approx([0.2, 0.2, 0.0])
    for row in (first, second):
        assert row["labeler"] in pool.names
        assert row["labeler"][0] == "B"
        s = pool.scales[pool.names.index(row["labeler"])]
        c = {name: np.asarray(values) for name, values in row["criteria"].items()}
        assert row["scores"] == pytest.approx(s * (0.6 * c["helpful"] + 1.6 * c["harmless"] + c["style"]))
        assert sorted(row["ranks"]) == [1, 2, 3]
    assert json.loads(json.dumps([first, second])) == [first, second]


def many(pairs: int, answers=(GOOD, PLAIN)):
    return [{"prompt": PROMPT}] * pairs, [list(answers)] * pairs


def test_labels_depend_on_the_seed_and_the_row_alone():
    rows, responses = many(40)
    pool = LarderLabelers(tie_threshold=0.5, intransitive=0.5)
    labels = pool.label(rows, responses, seed=1)
    assert labels == pool.label(rows, responses, seed=1)
    assert labels != pool.label(rows, responses, seed=2)
    changed = pool.label(rows, [[HARMFUL] * 5, *responses[1:]], seed=1)
    assert changed[1:] == labels[1:]
    assert len({row["labeler"] for row in labels}) > 10


def test_label_noise_reaches_the_labels():
    rows, responses = many(3_000, (PLAIN, HARMFUL))

    def first_wins(**noise):
        labels = LarderLabelers(scale=500, **noise).label(rows, responses, seed=0)
        return np.mean([row["ranks"] == [1, 2] for row in labels])

    assert first_wins() == 1.0
    assert first_wins(flip=0.25) == pytest.approx(0.75, abs=0.032)
    assert first_wins(position_bias=-1e6) == 0.0
    assert first_wins(tie_threshold=1e6) == 0.0
    # HARMFUL has 12 words, PLAIN 9
    assert first_wins(length_bias=1e6) == 0.0
    cyclic = LarderLabelers(intransitive=1.0, near_tie=1e9)
    swaps = cyclic.label(*many(50, ("thanks", "great thanks")), seed=0)  # kinds 1 and 2
    assert all(row["ranks"] == [2, 1] for row in swaps)
    flattered = LarderLabelers(flattery=1e6).label(*many(50, (GOOD, FLATTERING)), seed=0)
    assert all(row["ranks"] == [2, 1] for row in flattered)


# Bayes accuracy


@pytest.mark.parametrize("knows_labeler", [True, False])
@pytest.mark.parametrize(
    ("noise", "answers"),
    [
        ({}, (GOOD, HARMFUL)),
        ({"flip": 0.25}, (GOOD, HARMFUL)),
        ({"tie_threshold": 0.5, "position_bias": 0.4}, (PLAIN, GOOD)),
        ({"intransitive": 0.6, "near_tie": 9.0}, (PLAIN, "thanks")),  # kinds 0 and 1
        ({"length_bias": -0.4}, (GOOD, "thanks")),
    ],
)
def test_bayes_accuracy_against_monte_carlo(noise, answers, knows_labeler):
    """The best predictor, found by counting: for each labeller (or for all) the side that won more often."""
    pool = LarderLabelers(labelers=4, scale=1.0, **noise)
    labels = pool.label(*many(5_000, answers), seed=0)
    wins = defaultdict(Counter)
    for row in labels:
        wins[row["labeler"] if knows_labeler else "all"][row["ranks"][1] - row["ranks"][0]] += 1
    best = sum(max(count[1], count[-1]) for count in wins.values())
    decided = sum(count[1] + count[-1] for count in wins.values())
    exact = pool.bayes_accuracy(labels, knows_labeler=knows_labeler)["label"]
    assert exact == pytest.approx(best / decided, abs=4 * 0.5 / math.sqrt(decided))


def test_bayes_accuracy_by_hand():
    pool = LarderLabelers(labelers=1, group="A", scale=1.0, scale_spread=0.0, position_bias=2.0, flip=0.1)
    pair = {
        "prompt": PROMPT,
        "responses": [HARMFUL, GOOD],
        "ranks": [1, 2],
        "criteria": {"helpful": [1, 1], "harmless": [0, 1], "style": [0, 0.5], "gold": [1, 2.5]},
        "labeler": "A00",
    }
    # u = 1.3 and 2.3, d = -1 + 2: the biased labeller prefers the first answer, which is worse
    first = 0.9 * sigmoid(1) + 0.1 * sigmoid(-1)
    assert pool.bayes_accuracy([pair]) == pytest.approx({"label": first, "gold": 0.0})
    # not knowing which was first, the predictor takes the better answer and is wrong about this label
    assert pool.bayes_accuracy([pair], knows_position=False) == pytest.approx(
        {"label": 1 - first, "gold": 1.0}
    )
    same = {**pair, "responses": [GOOD, GOOD], "criteria": {k: [1, 1] for k in pair["criteria"]}}
    both = pool.bayes_accuracy([pair, same], knows_position=False)
    assert both == pytest.approx({"label": (1 - first + 0.5) / 2, "gold": 1.0})


def test_a_pool_that_disagrees():
    """Truthful but harmful against an empty answer: A sees 0.8 - 0 and B sees -1 - 0, so the pool leans to B."""
    pool = LarderLabelers(labelers=2, scale=1.0, scale_spread=0.0)
    row = {
        "prompt": PROMPT,
        "responses": [HARMFUL, ""],
        "ranks": [1, 2],
        "criteria": {"helpful": [1, 0], "harmless": [-1, 0], "style": [0, 0], "gold": [0.1, 0]},
        "labeler": "A00",
    }
    assert pool.bayes_accuracy([row]) == pytest.approx({"label": sigmoid(0.8), "gold": 1.0})
    pooled = pool.bayes_accuracy([row], knows_labeler=False)
    assert pooled == pytest.approx({"label": 1 - sigmoid(0.8), "gold": 0.0})


def test_bayes_accuracy_of_rankings():
    """The pairwise margins of Plackett-Luce are Bradley-Terry, so a ranking's pairs are exact too."""
    pool = LarderLabelers(labelers=2, scale=1.0, flip=0.1, position_bias=0.5)
    labels = pool.label(*many(4_000, (PLAIN, GOOD, HARMFUL, "thanks")), seed=0)
    hits, wins = [], defaultdict(list)
    for row in labels:
        for i, j in itertools.combinations(range(4), 2):
            wins[row["labeler"], i, j].append(row["ranks"][i] < row["ranks"][j])
    hits = [max(np.mean(won), 1 - np.mean(won)) for won in wins.values()]
    assert len(hits) == 12
    assert pool.bayes_accuracy(labels)["label"] == pytest.approx(np.mean(hits), abs=0.012)


def test_more_noise_is_a_lower_ceiling():
    rng = np.random.default_rng(0)
    rows = list(LarderPrompts(800, "reward_model").rows())
    responses = [[demonstrate(row["prompt"], 0.6, rng) for _ in range(2)] for row in rows]

    def ceiling(flip, **knows):
        pool = LarderLabelers(flip=flip)
        return pool.bayes_accuracy(pool.label(rows, responses, seed=0), **knows)["label"]

    clean, some, much = (ceiling(flip) for flip in (0.0, 0.1, 0.25))
    assert clean > some > much > 0.5
    # a flip takes (1 - 2 epsilon) of what is above chance
    assert some - 0.5 == pytest.approx(0.8 * (clean - 0.5), abs=1e-9)
    assert ceiling(0.0, knows_labeler=False) < clean


def test_bayes_accuracy_says_what_it_cannot_do():
    pool = LarderLabelers(tie_threshold=0.5)
    rankings = pool.label(*many(2, (GOOD, PLAIN, HARMFUL)), seed=0)
    with pytest.raises(UserError, match="known for pairs only"):
        pool.bayes_accuracy(rankings)
    pairs = LarderLabelers(group="A").label(*many(2), seed=0)
    with pytest.raises(UserError, match="no labeller 'A"):
        LarderLabelers(group="B").bayes_accuracy(pairs)
    with pytest.raises(UserError, match="at least one pair"):
        LarderLabelers().bayes_accuracy([])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group": "pool"}, "Did you mean 'pooled'"),
        ({"labelers": 1}, "labelers is at least 2"),
        ({"labelers": 0, "group": "A"}, "labelers is at least 1"),
        ({"flip": 1.5}, r"LarderLabelers\.flip is a probability"),
        ({"intransitive": -0.1}, r"LarderLabelers\.intransitive is a probability"),
        ({"tie_threshold": -1.0}, r"LarderLabelers\.tie_threshold"),
        ({"scale": float("nan")}, r"LarderLabelers\.scale"),
    ],
)
def test_mistakes_name_the_field(fields, message):
    with pytest.raises(UserError, match=message):
        LarderLabelers(**fields)


def test_ended_is_one_bool_per_answer():
    with pytest.raises(UserError, match="row 0: 'ended' must be a list of 2"):
        LarderLabelers().label([{"prompt": PROMPT, "ended": True}], [[GOOD, PLAIN]], seed=0)
