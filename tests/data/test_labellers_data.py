"""Votes in preference rows: who said what of which pair, and the rows that come of them."""

import numpy as np
import pytest

from jrlhf.config import UserError
from jrlhf.data.batching import encode_preference, stack_preferences
from jrlhf.data.labelers import aggregated, of_labelers, raters_of, votes_of
from jrlhf.data.schema import check_row
from jrlhf.data.sources import FileSource, load
from jrlhf.data.tokenizer import load_tokenizer


def row(ranks, labeler="x", responses=("a", "b"), prompt="q", **more):
    return {"prompt": prompt, "responses": [*responses], "ranks": ranks, "labeler": labeler, **more}


def test_the_order_of_the_answers_does_not_matter():
    votes = votes_of(
        [row([1, 2]), row([1, 2], "y", ("b", "a")), row([1, 1], "z"), row([2, 1], "x", prompt="r")]
    )
    assert votes.pair.tolist() == [0, 0, 0, 1]
    assert votes.choice.tolist() == [1, -1, 0, -1]
    assert votes.names == ("x", "y", "z")
    assert votes.counts().tolist() == [[1, 1, 1], [1, 0, 0]]  # second, tie, first
    assert votes.answers[0].tolist() != votes.answers[1].tolist()  # the same words to another prompt


def test_a_ranking_is_a_vote_on_each_of_its_pairs():
    votes = votes_of([row([2, 1, 2], responses="abc", ended=[True, False, True])])
    assert votes.choice.tolist() == [-1, 0, 1]
    assert [r["responses"] for r in votes.rows] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert [r["ended"] for r in votes.rows] == [[True, False], [True, True], [False, True]]


def test_messages_are_compared_by_what_they_say():
    said = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
    asked = [{"role": "user", "content": "q"}]
    votes = votes_of(
        [row([1, 2], "x", (said("a"), said("b")), asked), row([1, 2], "y", (said("b"), said("a")), asked)]
    )
    assert votes.choice.tolist() == [1, -1]


def test_one_row_for_each_pair():
    votes = votes_of([row([1, 2]), row([1, 2], "y"), row([2, 1], "z"), row([1, 1], "x", prompt="r")])
    soft = aggregated(votes, np.asarray([2 / 3, 0.5]), soft=True, by_votes=True)
    assert soft[0] == {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2], "votes": [2, 0, 1],
                       "probability": 2 / 3, "weight": 3.0}  # fmt: skip
    assert soft[1]["ranks"] == [1, 1]
    for found in soft:
        check_row(found, "preference", "here")
    hard = aggregated(votes, np.asarray([1.0, 0.5]), soft=False, by_votes=False)
    assert [set(r) for r in hard] == [{"prompt", "responses", "ranks", "votes"}] * 2
    with pytest.raises(UserError, match="preferences row 1 has 'probability': it is an aggregate already"):
        votes_of(soft)
    with pytest.raises(UserError, match="no two different answers"):
        votes_of([row([1, 1], responses="aa")])


def test_labelers_by_pattern():
    rows = [row([1, 2], name) for name in ("A00", "B01", "A07")]
    assert [r["labeler"] for r in of_labelers(rows, ("A*",), "here")] == ["A00", "A07"]
    assert of_labelers(rows, ("A0[0-3]", "B*"), "here") == rows[:2]
    with pytest.raises(
        UserError, match=r"labelers: nobody matches 'A0'. Did you mean 'A0[07]'\? Labellers: A00, B01"
    ):
        of_labelers(rows, ("B*", "A0"), "here")
    with pytest.raises(UserError, match="here row 1: no field 'labeler', which labelers needs"):
        of_labelers([{"prompt": "q"}], ("A*",), "here")


def test_raters_are_labellers_or_prompts():
    assert raters_of([row([1, 2], "x"), row([1, 2], "y")]) == ["x", "y"]
    bare = {"prompt": "q"}
    assert raters_of([bare, {"prompt": "r"}, bare]) == ["q", "r", "q"]
    with pytest.raises(UserError, match="preferences row 2: no field 'labeler', which other rows have"):
        raters_of([row([1, 2]), bare])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"weight": -1}, "field 'weight' is -1, expected a number of at least 0"),
        ({"weight": float("inf")}, "field 'weight' is inf"),
        ({"weight": True}, "field 'weight' is True"),
        ({"probability": 1.5}, "field 'probability' is 1.5, expected a number from 0 to 1"),
        ({"probability": "0.7"}, "field 'probability' is '0.7'"),
        ({"probability": 0.4}, r"contradicts 'ranks' \[1, 2\]: they must be its rounding, \[2, 1\]"),
        ({"probability": 0.5}, r"must be its rounding, \[1, 1\]"),
        (
            {"probability": 0.9, "responses": ["a", "b", "c"], "ranks": [1, 2, 3]},
            "first of two answers is preferred",
        ),
    ],
)
def test_a_weight_or_soft_label_that_cannot_be(more, message):
    with pytest.raises(UserError, match=message):
        check_row(row([1, 2]) | more, "preference", "here")


def test_weights_and_certainties_in_a_batch(tmp_path, shared_data):
    """Both directions of a soft label are the certainty of whoever is better; rows that say nothing count once."""
    tokenizer = load_tokenizer(shared_data / "stories260K")
    rows = [row([1, 2], probability=0.75), row([2, 1], probability=0.25, weight=2), row([1, 2])]
    examples = [encode_preference(check_row(r, "preference", "here"), tokenizer, 64) for r in rows]
    batch = stack_preferences(examples, 16, 2)
    np.testing.assert_array_equal(batch.certainty, np.float32([0.75, 0.75, 1]))
    np.testing.assert_array_equal(batch.weights, np.float32([[1], [2], [1]]))
    plain = stack_preferences(examples[2:], 16, 2)
    assert (plain.weights, plain.certainty) == ((), ())


def test_rows_of_a_file_with_both(tmp_path):
    path = tmp_path / "votes.jsonl"
    path.write_text(
        '{"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2], "probability": 0.8, "weight": 3}\n'
    )
    for format in ("ranking", "rows"):
        rows, _ = load(FileSource(str(path), format=format, kind="preference"))
        assert (rows[0]["probability"], rows[0]["weight"]) == (0.8, 3)
    rows, _ = load(FileSource(str(path), format="ranking", kind="demonstration"))
    assert rows[0].keys() == {"prompt", "completion"}
