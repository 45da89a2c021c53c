"""What is made of judges' answers: verdicts, comparisons in both orders, the bias of places."""

import json
import signal
from dataclasses import dataclass, field

import numpy as np
import pytest

from jrlhf.config import UserError
from jrlhf.ops.agreement import cohen_kappa
from jrlhf.ops.intervals import bootstrap_interval
from jrlhf.rewards.judges import (
    Program,
    StoredVerdicts,
    checked,
    compare_pairs,
    decide,
    expected_score,
    parse_verdict,
    position_bias,
)

AB, YES_NO = ("A", "B"), ("yes", "no")
TEN = tuple(str(n) for n in range(1, 11))
FIVE = TEN[:5]
TEMPLATE = "{question} | {answer_a} | {answer_b}"


@pytest.mark.parametrize(
    ("reply", "options", "option"),
    [
        ("A", AB, "A"),
        (" a better answer is B.", AB, "B"),  # an article is no verdict
        ("First I liked A, but B it is", AB, None),
        ("A is better than B.", AB, None),
        ("I think A is better.", AB, "A"),
        ("A better answer would name its source.", AB, None),
        ("It is not A.", AB, None),
        ("A because B is worse", AB, "A"),
        ("A, B: neither is good", AB, None),
        ("A: right.\nB: wrong.\n\n**Final answer: A**", AB, "A"),
        ("B says more than A does.\n\nA\n", AB, "A"),
        ("A\nsays this.\nB\nsays that.", AB, None),
        ("Yes. There are no errors in it.", YES_NO, "yes"),
        ("No, yes would be wrong", YES_NO, "no"),
        ("There are no errors in it.", YES_NO, None),
        ("No errors, so yes", YES_NO, None),
        ("it is NOT met", ("met", "not met"), "not met"),
        ("it is not met", ("met", "missed"), None),
        ("a 4 on a scale from 1 to 5.", FIVE, "4"),
        ("4 on the 1-5 scale", FIVE, "4"),
        ("between 1 and 5: 3", FIVE, "3"),
        ("It makes 2 mistakes.", FIVE, None),
        ("1. It is clear.\n2. It is short.\nI would say 4.", FIVE, None),
        ("Feedback: 2 of the 3 steps are right. [RESULT] 4", FIVE, "4"),
        ("4\n\nIt makes 2 mistakes.", FIVE, "4"),
        ("[[A]] rather than B", AB, "A"),
        ("[[A]] ... no, [[ B ]]", AB, "B"),
        ("**B**", AB, "B"),
        ("(A)", AB, "A"),
        ("A/B", AB, None),
        ("ABBA", AB, None),
        ("neither", AB, None),
        ("", AB, None),
        ("Yes.", ("yes", "no"), "yes"),
        ("nothing, nobody, not", ("yes", "no"), None),
        ("It is a TIE", ("A", "B", "tie"), "tie"),
        ('{"verdict": "A", "reason": "B is worse"}', AB, "A"),
        ('```json\n{"reason": "B is worse",\n "verdict": "A"}\n```', AB, "A"),
        ('{"score": 7}', TEN, "7"),
        ('{"verdict": "unclear", "reason": "A or B"}', AB, None),
        ('{"first": "A", "second": "B"}', AB, None),
        ('{"verdict": true}', ("True", "False"), None),
        ("{not json} B", AB, "B"),
        ("I give it 8/10", TEN, "8"),
        ("clarity 3, overall 8/10", TEN, None),
        ("8 out of 10", TEN, "8"),
        ("8 of 10", TEN, "8"),
        ("8 / 10", TEN, "8"),
        ("**8** / 10", TEN, "8"),
        ("a mark of 8", TEN, "8"),
        ("Rating: 10", TEN, "10"),
        ("a 3.", TEN, "3"),
        ("8.5", TEN, None),
        ("1,000 words", TEN, None),
        ("-3", TEN, None),
        ("100", TEN, None),
        ("50%", ("50",), None),
        ("[RESULT] 4", TEN, "4"),
        ("c++ (x)", ("c++", "(x)"), None),
        ("so (x)", ("c++", "(x)"), "(x)"),
        ("[" * 5000 + "{" * 5000 + "}" * 5000, AB, None),
    ],
)  # fmt: skip
def test_the_verdict_of_a_reply(reply, options, option):
    named = parse_verdict(reply, options)
    assert (named and options[named.option]) == option
    if named:
        assert reply[named.start : named.stop].lower() == option.lower()


@pytest.mark.parametrize(
    ("reply", "options", "option"),
    [
        ("Answer A is right. Now let me look at", AB, None),
        ("Answer: A\nNow let me look at", AB, None),
        ("Yes. There are no", YES_NO, None),
        ("Answer A is right: [[A]]. As to", AB, "A"),
        ("I am to end with [[A]] or [[B]]. Now", AB, None),
        ('{"verdict": "B"} since', AB, "B"),
        (" A", AB, "A"),  # a limit of one token
        ("Yes.", YES_NO, "yes"),
        ("1", FIVE, "1"),
        ("1", TEN, None),  # or 10
        ("**", AB, None),
    ],
)
def test_of_a_reply_that_is_cut_short_only_what_is_certain_counts(reply, options, option):
    named = parse_verdict(reply, options, cut=True)
    assert (named and options[named.option]) == option


@pytest.mark.parametrize(
    "reply",
    [
        '{"b": ' + " " * 2**18 + '1.5, "a": "A"}',
        "[[" * 2**17,
        "A " * 2**17 + "{",
        ": " * 2**17,
        "not 1 to 2 of " * 2**14,
        "\n" * 2**18,
    ],
)
def test_a_long_reply_takes_no_longer_than_it_is_long(reply):
    """A second or two; hours, if the square of the length were to count."""

    def give_up(*_):
        raise AssertionError("the reply is not read in linear time")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(120)
    try:
        for options in (TEN, AB):
            parse_verdict(reply, options)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- comparing ----------------------------------------------------------------------------------------------


@dataclass
class Scripted:
    """P(first place) by (answer in the first place, answer in the second)."""

    says: dict
    asked: list = field(default_factory=list)

    def verdicts(self, questions, options):
        self.asked += questions
        rows = [self.says[tuple(q.split(" | ")[1:])] for q in questions]
        if len(options) == 3:
            return np.asarray(rows, np.float64)
        return np.asarray([[p, 1 - p] for p in rows])


def test_both_orders_are_averaged_so_that_a_liking_for_a_place_cancels():
    judge = Scripted({("x", "y"): 0.9, ("y", "x"): 0.7})
    said = compare_pairs(judge, TEMPLATE, AB, ["q"], ["x"], ["y"])
    assert judge.asked == ["q | x | y", "q | y | x"]
    np.testing.assert_allclose(said.shown, [[0.9, 0.1, 0]])
    np.testing.assert_allclose(said.turned, [[0.3, 0.7, 0]])
    np.testing.assert_allclose(said.probabilities, [[0.6, 0.4, 0]])
    other = compare_pairs(judge, TEMPLATE, AB, ["q"], ["y"], ["x"])
    np.testing.assert_allclose(other.probabilities[:, [1, 0, 2]], said.probabilities)
    one = compare_pairs(judge, TEMPLATE, AB, ["q"], ["x"], ["y"], both_orders=False)
    np.testing.assert_allclose(one.probabilities, [[0.9, 0.1, 0]])
    assert position_bias(one) == (0, 0, 0, 0)


def test_a_tie_is_no_place_and_a_verdict_in_one_order_alone_is_none():
    nan = [np.nan] * 3
    judge = Scripted(
        {("x", "y"): [0.2, 0.5, 0.3], ("y", "x"): [0.1, 0.6, 0.3], ("u", "v"): nan, ("v", "u"): [1, 0, 0]}
    )
    said = compare_pairs(judge, TEMPLATE, ("A", "B", "tie"), ["q", "q"], ["x", "u"], ["y", "v"])
    np.testing.assert_allclose(said.probabilities, [[0.4, 0.3, 0.3], nan])


def test_choices():
    p = np.asarray(
        [[0.6, 0.4, 0], [0.4, 0.6, 0], [0.5, 0.5, 0], [0.3, 0.2, 0.5], [0.45, 0.1, 0.45], [np.nan] * 3]
    )
    np.testing.assert_array_equal(decide(p), [1, -1, 0, 0, 1, np.nan])
    np.testing.assert_array_equal(decide(p, margin=0.2), [0, 0, 0, 0, 1, np.nan])
    np.testing.assert_array_equal(decide(p[:, [1, 0, 2]]), -decide(p))


def test_position_bias_counts_what_the_places_did():
    judge = Scripted(
        {
            ("a", "b"): 1.0, ("b", "a"): 0.0,  # always a
            ("c", "d"): 1.0, ("d", "c"): 1.0,  # always the first place
            ("e", "f"): 0.0, ("f", "e"): 0.0,  # always the second
            ("g", "h"): 0.5, ("h", "g"): 0.9,  # tied, then the first place
            ("k", "l"): 0.8, ("l", "k"): 0.7,  # always the first place
            ("i", "j"): np.nan, ("j", "i"): 1.0,
        }
    )  # fmt: skip
    said = compare_pairs(judge, TEMPLATE, AB, ["q"] * 6, [*"acegki"], [*"bdfhlj"])
    bias = position_bias(said)
    assert bias == (5, 4, 9, 6)
    assert (bias.flipped, bias.first_place) == (4, 6)


@pytest.mark.parametrize("length", ["shape", "sum", "negative", "half"])
def test_verdicts_that_are_no_distributions_are_named(length):
    rows = {"shape": [[1.0]], "sum": [[0.5, 0.6]], "negative": [[1.5, -0.5]], "half": [[np.nan, 1.0]]}[length]
    with pytest.raises(UserError, match="somebody: verdict"):
        checked(np.asarray(rows), 1, AB, "somebody")


def test_the_expected_score_runs_from_minus_one_to_one():
    options = [str(n) for n in range(1, 11)]
    verdicts = np.stack([np.eye(10)[0], np.eye(10)[9], np.full(10, 0.1), np.full(10, np.nan)])
    np.testing.assert_allclose(expected_score(verdicts, options), [-1, 1, 0, np.nan], atol=1e-12)
    np.testing.assert_allclose(expected_score(np.asarray([[0.5, 0.5]]), ("2", "4")), [0.0])


# --- programs -----------------------------------------------------------------------------------------------


def test_stored_verdicts(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    rows = [("q1", "B"), ("q2", [0.25, 0.75]), ("q3", None), ("q4", "C"), ("q5", 1), ("q6", [2, 3])]
    path.write_text("".join(json.dumps({"question": q, "verdict": v}) + "\n" for q, v in rows))
    judge = StoredVerdicts(str(path))
    assert judge.files() == (str(path),)
    said = judge.verdicts(["q2", "q1", "q3", "unknown"], AB)
    np.testing.assert_array_equal(said, [[0.25, 0.75], [0, 1], [np.nan] * 2, [np.nan] * 2])
    np.testing.assert_array_equal(judge.verdicts(["q5"], ("1", "2")), [[1, 0]])
    assert judge.verdicts([], AB).shape == (0, 2)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    np.testing.assert_array_equal(judge.verdicts(["q1"], AB), [[0, 1]])
    with pytest.raises(UserError, match="the verdict 'C' is none of the options A, B"):
        judge.verdicts(["q4"], AB)
    with pytest.raises(UserError, match="sum to 1"):
        judge.verdicts(["q6"], AB)
    path.write_text('{"question": "q1", "verdict": "A"}\n{"question": "q2"}\n')  # changed: read again
    with pytest.raises(UserError, match="line 2: expected an object with 'question' and 'verdict'"):
        judge.verdicts(["q1"], AB)
    with pytest.raises(UserError, match="no such file of stored verdicts"):
        StoredVerdicts(str(tmp_path / "none.jsonl")).verdicts(["q"], AB)


def test_a_program_without_verdicts_says_so():
    with pytest.raises(TypeError, match="Program does not define verdicts"):
        Program().verdicts(["q"], AB)


# --- intervals ----------------------------------------------------------------------------------------------


def test_the_bootstrap_resamples_whole_clusters():
    rng = np.random.default_rng(0)
    of_cluster = rng.normal(size=100)
    values, clusters = np.repeat(of_cluster, 10), np.repeat(np.arange(100), 10)
    mean = lambda i: float(np.mean(values[i]))  # noqa: E731
    low, high = bootstrap_interval(mean, clusters)
    error = of_cluster.std() / 10  # of a mean of 100 independent clusters
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert low < values.mean() < high
    alone = bootstrap_interval(mean, np.arange(1000))
    assert alone[1] - alone[0] == pytest.approx((high - low) / np.sqrt(10), rel=0.15)
    assert np.isnan(bootstrap_interval(lambda i: float("nan"), clusters)).all()
    assert np.isnan(bootstrap_interval(mean, np.asarray([]))).all()


def test_kappa_of_choices_is_that_of_fleiss_1981():
    """Fleiss, Statistical Methods for Rates and Proportions (1981), table 13.1: two raters, 100 patients."""
    table = [[75, 1, 4], [5, 4, 1], [0, 0, 10]]
    pairs = [(i - 1, j - 1) for i in range(3) for j in range(3) for _ in range(table[i][j])]
    first, second = np.asarray(pairs, np.float64).T
    assert cohen_kappa(first, second) == pytest.approx(0.676, abs=5e-4)
    low, high = bootstrap_interval(lambda i: cohen_kappa(first[i], second[i]), np.arange(100))
    assert (low, high) == (pytest.approx(0.51, abs=0.04), pytest.approx(0.85, abs=0.04))
