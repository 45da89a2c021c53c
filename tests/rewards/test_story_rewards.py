"""The story rewards, scored by hand."""

import numpy as np
import pytest

from jrlhf.rewards import REWARDS, happy_ending, happy_story_with_word

FILLER = "the dog ran over the hill and saw a big tree near the old house by the lake today . "  # 20 words


def score(reward, text: str, **row) -> float:
    values = reward(["Once upon a time"], [text], [row])
    assert values.shape == (1,)
    assert values.dtype == np.float32
    return float(values[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("The cat sat on the mat.", 0.0),
        ("Tom was happy.", 0.5),
        ("Tom was HAPPY.", 0.5),
        ("They hugged and smiled.", 1.0),
        ("They hugged, laughed and smiled.", 1.0),  # three halves, clipped
        ("Tom was sad.", -0.5),
        ("Tom was sad, lonely and lost.", -1.0),
        ("Tom was sad, but then he was happy.", 0.0),
        ("Tom was unhappy.", 0.0),  # a word of its own, in neither list
        ("Tom was sad and scared, then happy.", -0.5),
        ("happy " + FILLER, 0.0),  # the happy word is the 21st from the end
        ("sad " * 5 + FILLER + "Tom smiled.", 0.5),
        ("They had fun!", 0.5),
    ],
)
def test_happy_ending(text, expected):
    assert score(happy_ending, text) == pytest.approx(expected)
    assert score(happy_ending, text, ended=True) == pytest.approx(expected)
    assert score(happy_ending, text, ended=False) == pytest.approx(expected - 0.5)


def test_the_filler_is_twenty_words_long():
    assert len(FILLER.split()) == 20


@pytest.mark.parametrize(
    ("text", "word", "expected"),
    [
        ("Tom saw a boat.", "boat", 1.0),
        ("Tom saw a Boat.", "boat", 1.0),
        ("Tom saw a boat.", "BOAT", 1.0),
        ("Tom saw two boats.", "boat", 1.0),  # its forms count: the word begins there
        ("Tom saw a sailboat.", "boat", 0.0),
        ("Tom saw a boat and was happy.", "boat", 1.5),
        ("Tom was sad.", "boat", -0.5),
        ("Tom saw a boat.", "", 0.0),
        ("What is c++ for?", "c++", 1.0),  # no pattern, only text
        ("What is ccc for?", "c++", 0.0),
    ],
)
def test_happy_story_with_word(text, word, expected):
    assert score(happy_story_with_word, text, word=word) == pytest.approx(expected)


def test_a_row_without_a_word_gets_no_point_for_one():
    assert score(happy_story_with_word, "Tom saw a boat.") == 0.0
    assert score(happy_story_with_word, "Tom saw a boat.", ended=False) == -0.5


def test_the_prompt_does_not_count():
    for reward in REWARDS.values():
        values = reward(["happy happy boat"], ["Tom sat."], [{"word": "boat"}])
        np.testing.assert_array_equal(values, [0.0])


def test_every_reward_scores_each_answer_by_itself():
    texts = ["Tom was happy.", "Tom was sad.", "A boat."]
    rows = [{"word": "boat"}, {"word": "boat", "ended": False}, {"word": "boat"}]
    for reward in REWARDS.values():
        together = reward(["p"] * 3, texts, rows)
        alone = [reward(["p"], [text], [row])[0] for text, row in zip(texts, rows, strict=True)]
        np.testing.assert_array_equal(together, np.asarray(alone, np.float32))
        assert reward([], [], []).shape == (0,)


def test_rows_and_answers_must_be_as_many():
    with pytest.raises(ValueError, match="zip"):
        happy_ending(["p"], ["a", "b"], [{}])
