"""Agreement against published examples and by counting; reliability against planted labellers."""

import math

import numpy as np
import pytest

from jrlhf.ops.agreement import (
    alpha_of_counts,
    category_counts,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    pairwise_kappa,
    raw_agreement,
    retest,
    transitivity,
)
from jrlhf.ops.reliability import bradley_terry, dawid_skene

_ = math.nan
# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: four observers, twelve units.
PUBLISHED = np.asarray(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
        [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
    ]
)


@pytest.mark.parametrize(
    ("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_alpha_is_krippendorffs(level, published):
    assert round(krippendorff_alpha(PUBLISHED, level), 3) == published
    shuffled = PUBLISHED[::-1, np.random.default_rng(0).permutation(12)]
    assert krippendorff_alpha(shuffled, level) == pytest.approx(krippendorff_alpha(PUBLISHED, level))


def test_alpha_of_pairs_by_hand():
    """Krippendorff 2011, section A: two observers, ten units of 0 and 1."""
    first, second = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert round(krippendorff_alpha(np.asarray([first, second], float)), 3) == 0.095


def test_agreement_where_there_is_nothing_to_compare():
    assert math.isnan(krippendorff_alpha(np.asarray([[1.0, _], [_, 2.0]])))
    assert math.isnan(krippendorff_alpha(np.ones((2, 4))))
    assert math.isnan(cohen_kappa([1, 1], [1, 1]))
    assert math.isnan(cohen_kappa([1.0, _], [_, 1.0]))
    assert math.isnan(raw_agreement(np.asarray([[1, 0]])))
    assert krippendorff_alpha(np.asarray([[1.0, 2, 3], [1, 2, 3]])) == 1
    assert math.isnan(alpha_of_counts(np.zeros((0, 3)), np.arange(3)))


def test_cohens_kappa():
    """20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: (0.7 - 0.5) / (1 - 0.5) = 0.4. Three classes: Cohen 1968 weights."""
    a = np.repeat([1, 1, 0, 0], [20, 5, 10, 15])
    b = np.repeat([1, 0, 1, 0], [20, 5, 10, 15])
    assert cohen_kappa(a, b) == pytest.approx(0.4)
    assert cohen_kappa(a, b, "linear") == pytest.approx(0.4)  # two classes have one distance
    a, b = np.asarray([0, 1, 2, 0, 1, 2]), np.asarray([0, 1, 2, 1, 2, 0])
    # Of six, three differ by 1, 1, 2. Chance: every cell 1/9, whose mean distance is 8/9, squared 12/9.
    assert cohen_kappa(a, b, "linear") == pytest.approx(1 - (4 / 6) / (8 / 9))
    assert cohen_kappa(a, b, "quadratic") == pytest.approx(1 - (6 / 6) / (12 / 9))


def test_pairwise_kappa_leaves_out_what_one_did_not_see():
    kappa = pairwise_kappa(PUBLISHED)
    both = [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert kappa[0, 1] == kappa[1, 0] == pytest.approx(cohen_kappa(PUBLISHED[0, both], PUBLISHED[1, both]))
    np.testing.assert_array_equal(np.diag(kappa), 1)


def test_fleiss_kappa_is_the_published_example():
    """Fleiss 1971's method on the ten subjects and fourteen raters that textbooks use: 0.210."""
    counts = np.asarray(
        [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
         [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]
    )  # fmt: skip
    assert round(fleiss_kappa(counts), 3) == 0.210
    assert round(raw_agreement(counts), 3) == 0.378
    with pytest.raises(ValueError, match="the same number of ratings"):
        fleiss_kappa(category_counts(PUBLISHED)[1])


def choices(**said):
    table = np.full((4, 4), math.nan)
    for pair, choice in said.items():
        i, j = int(pair[1]), int(pair[2])
        table[i, j], table[j, i] = choice, -choice
    return table


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"p01": 1, "p12": 1, "p02": 1}, (1, 0, 0)),
        ({"p01": 1, "p12": 1, "p02": -1}, (1, 1, 1)),
        ({"p01": -1, "p12": -1, "p02": 1}, (1, 1, 1)),
        ({"p01": 1, "p12": 1, "p02": 0}, (1, 0, 1)),
        ({"p01": 0, "p12": 0, "p02": 1}, (1, 0, 1)),
        ({"p01": 0, "p12": 1, "p02": 0}, (1, 0, 1)),
        ({"p01": 1, "p12": 0, "p02": 1}, (1, 0, 0)),
        ({"p01": 1, "p12": -1, "p02": 0}, (1, 0, 0)),
        ({"p01": 1, "p12": 1}, (0, 0, 0)),
    ],
)
def test_triples_that_fit_no_ranking(said, expected):
    assert transitivity(choices(**said)) == expected


def test_triples_of_a_ranking_and_whatever_the_answers_are_called():
    """A weak order has no violation; renaming the answers changes nothing."""
    rng = np.random.default_rng(0)
    ranks = rng.integers(0, 3, 6)
    assert transitivity(np.sign(ranks[None] - ranks[:, None]).astype(float)) == (20, 0, 0)
    upper = np.triu(rng.integers(-1, 2, (7, 7)), 1).astype(float)
    table, order = upper - upper.T, rng.permutation(7)
    assert transitivity(table[order][:, order]) == transitivity(table)
    assert transitivity(table).violations > transitivity(table).cycles > 0


def test_retest_counts_pairs_of_answers_to_one_question():
    share, pairs = retest(np.asarray([1, 1, 0, 1, -1, -1]), np.asarray([7, 3, 7, 7, 5, 5]))
    assert (share, pairs) == (pytest.approx(2 / 4), 4)  # 7: {1, 0}, {1, 1}, {0, 1}; 5: {-1, -1}
    assert math.isnan(retest(np.asarray([1, 0]), np.asarray([0, 1]))[0])


# --- who is to be believed ------------------------------------------------------------------------------------

CONFUSION = np.asarray(
    [
        [[0.95, 0.03, 0.02], [0.05, 0.9, 0.05], [0.02, 0.03, 0.95]],
        [[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]],
        [[0.4, 0.3, 0.3], [0.3, 0.4, 0.3], [0.3, 0.3, 0.4]],
        [[0.34, 0.33, 0.33]] * 3,
        [[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.7, 0.1, 0.2]],  # likes the first
    ]
)


def test_dawid_skene_finds_planted_confusions_and_beats_the_majority():
    rng = np.random.default_rng(1)
    n, (people, classes) = 10_000, CONFUSION.shape[:2]
    truth = rng.choice(classes, n, p=[0.5, 0.3, 0.2])
    item, labeler = (x.ravel() for x in np.meshgrid(np.arange(n), np.arange(people), indexing="ij"))
    chances = np.cumsum(CONFUSION[labeler, truth[item]], axis=1)
    said = np.sum(rng.random((len(item), 1)) > chances, axis=1)
    fit = dawid_skene(item, labeler, said, (n, people, classes))
    assert np.max(np.abs(fit.confusion - CONFUSION)) < 0.05
    assert fit.prior == pytest.approx([0.5, 0.3, 0.2], abs=0.02)
    np.testing.assert_allclose(fit.posterior.sum(axis=1), 1)
    assert fit.reliability[0] > fit.reliability[1] > fit.reliability[2] > fit.reliability[3]
    votes = np.zeros((n, classes))
    np.add.at(votes, (item, said), 1)
    majority = np.mean(np.argmax(votes + 1e-6 * rng.random(votes.shape), axis=1) == truth)
    assert np.mean(np.argmax(fit.posterior, axis=1) == truth) > majority + 0.1
    # Probabilities mean what they say.
    right = np.mean(np.argmax(fit.posterior, axis=1) == truth)
    assert right == pytest.approx(np.mean(fit.posterior.max(axis=1)), abs=0.02)


def test_dawid_skene_climbs():
    rng = np.random.default_rng(2)
    item, labeler, said = rng.integers(0, 30, 200), rng.integers(0, 6, 200), rng.integers(0, 3, 200)
    found = [dawid_skene(item, labeler, said, (30, 6, 3), iterations=k).log_likelihood for k in (1, 2, 5, 20)]
    assert found == sorted(found)
    assert found[-1] > found[0]


def test_bradley_terry_finds_planted_temperatures_and_beats_the_majority():
    rng = np.random.default_rng(3)
    sharpness = np.asarray([4.0, 2.0, 1.0, 0.0, -1.0])
    utility = rng.standard_normal(60)
    first, second = np.asarray([(i, j) for i in range(60) for j in range(i)]).T
    kept = rng.random(len(first)) < 0.5
    first, second = first[kept], second[kept]
    n, people = len(first), len(sharpness)
    pair, who = (x.ravel() for x in np.meshgrid(np.arange(n), np.arange(people), indexing="ij"))
    logit = sharpness[who] * (utility[first] - utility[second])[pair]
    share = (rng.random(len(pair)) < 1 / (1 + np.exp(-logit))).astype(float)
    fit = bradley_terry(first[pair], second[pair], who, share, (60, people))
    np.testing.assert_allclose(fit.sharpness, sharpness / sharpness.mean(), atol=0.35)
    assert np.corrcoef(fit.utility, utility)[0, 1] > 0.98
    right = utility[first] > utility[second]
    votes = share.reshape(n, people).mean(axis=1)
    assert np.mean((fit.probability(first, second) > 0.5) == right) > np.mean((votes > 0.5) == right) + 0.08


def test_bradley_terry_of_ties_and_of_one_vote():
    """Ties make equals; one vote moves two answers apart, as far to either side."""
    fit = bradley_terry(
        np.asarray([0, 0]), np.asarray([1, 1]), np.zeros(2, int), np.asarray([0.5, 0.5]), (2, 1)
    )
    np.testing.assert_allclose(fit.utility, 0, atol=1e-6)
    one = bradley_terry(np.asarray([0]), np.asarray([1]), np.zeros(1, int), np.ones(1), (2, 1))
    assert one.utility[1] == pytest.approx(-one.utility[0])
    assert one.probability(np.asarray([0]), np.asarray([1]))[0] > 0.6
