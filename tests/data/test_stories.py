"""Story endings: what a row holds, the two splits, and that any row can be the first."""

import re
from contextlib import suppress
from dataclasses import replace
from itertools import islice

import pytest

from jrlhf.config import UserError
from jrlhf.data.report import Report
from jrlhf.data.sources import check_row, load, read
from jrlhf.data.stories import StoryEndings

STORY = (
    "Lily had a red ball. She lost it in the park. Her mom helped her look for it. "
    "They found the ball under a bench. Lily laughed and gave her mom a big hug."
)


@pytest.fixture
def stories(tmp_path):
    """stories(texts) -> the source of a file with these texts."""

    def stories(*texts: str, **fields) -> StoryEndings:
        path = tmp_path / "stories.txt"
        path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
        return StoryEndings(str(path), **fields)

    return stories


def both(source: StoryEndings) -> list[dict]:
    """The rows of the split that has any."""
    rows = []
    for split in ("train", "test"):
        with suppress(UserError):  # it says that this split has none
            rows += list(replace(source, split=split).rows())
    return rows


@pytest.fixture(scope="module")
def real(shared_data) -> StoryEndings:
    return StoryEndings(str(shared_data / "tinystories" / "tinystories_sample.txt"), max_rows=300)


def test_a_story_by_hand(stories):
    (row,) = both(stories(STORY, beginning=60, ending=60))
    word = row["word"]
    assert row["completion"] == " Lily laughed and gave her mom a big hug."
    assert row["prompt"] == f"Use the word {word}. They found the ball under a bench."
    assert word in ("lily", "laughed", "gave")  # of four letters or more, and not said before
    (longer,) = both(stories(STORY, beginning=160, ending=60))
    before = STORY.partition(" Lily laughed")[0]
    assert longer["prompt"] == f"Use the word {longer['word']}. {before}"
    assert longer["word"] in ("laughed", "gave")  # now Lily was there before


def test_line_breaks_and_runs_of_spaces_are_one_space(stories):
    (row,) = both(stories(STORY, beginning=60, ending=60))
    (same,) = both(stories(STORY.replace(". ", ".\n\n  "), beginning=60, ending=60))
    assert same == row


@pytest.mark.parametrize(
    "text",
    [
        "Only one sentence here.",
        "No sentence ends here",
        "The cat sat there. The cat sat there.",  # no new word
        "Short. " + "A very long sentence " * 20 + "ends.",  # the ending does not fit
        "A very long sentence " * 20 + "ends. Tom waved goodbye.",  # nor the beginning
    ],
)
def test_stories_without_an_ending_are_dropped_and_counted(stories, text):
    source = stories(text, STORY, beginning=60, ending=60)
    assert len(both(source)) == 1
    reports = []
    for split in ("train", "test"):
        report = Report()
        with suppress(UserError):
            list(replace(source, split=split).read(report))
        reports.append(report)
    assert sum(r.dropped["no ending that fits"] for r in reports) == 1
    assert sum(r.dropped["in the other split"] for r in reports) == 2
    assert sum(r.kept for r in reports) == 1


def test_kinds(stories):
    source = stories(STORY, beginning=60, ending=60)
    (row,) = both(source)
    assert set(row) == {"prompt", "completion", "word"}
    (prompt,) = both(replace(source, kind="prompt"))
    assert prompt == {"prompt": row["prompt"], "word": row["word"]}
    (text,) = both(replace(source, kind="text"))
    assert text == {"text": row["prompt"] + row["completion"]}


def test_bad_fields(stories):
    for fields in ({"beginning": 19}, {"ending": 3}):
        with pytest.raises(UserError, match="at least 20"):
            stories(STORY, **fields)
    with pytest.raises(UserError, match="max_rows is 0"):
        stories(STORY, max_rows=0)
    with pytest.raises(UserError, match="no such file"):
        list(StoryEndings("nowhere.txt").rows())


def test_no_story_at_all(stories):
    source = stories("No end")
    with pytest.raises(UserError, match=r"stories\.txt: no story has an ending of at most 160 characters"):
        list(source.rows())


# --- on real stories ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_row_of_real_stories_is_sound(real, split):
    rows, report = load(replace(real, split=split))
    assert len(rows) == report.kept > 50
    for n, row in enumerate(rows):
        check_row(row, "demonstration", f"row {n}")
        command, _, before = row["prompt"].partition(". ")
        word = command.removeprefix("Use the word ")
        assert word == row["word"]
        assert re.fullmatch("[a-z]{4,}", word)
        assert word in row["completion"].lower()
        assert word not in before.lower()
        assert 0 < len(before) <= real.beginning
        assert row["completion"].startswith(" ")
        assert 1 < len(row["completion"]) <= real.ending + 1
        assert row["completion"].rstrip("\"'")[-1] in ".!?"


def test_the_rows_are_the_same_every_time(real):
    assert list(real.rows()) == list(real.rows())


def test_the_splits_have_no_story_in_common(real):
    """And so no prompt: a story's ending is its own."""
    everything = replace(real, max_rows=None)
    train, test = (list(replace(everything, split=split).rows()) for split in ("train", "test"))
    assert 0.07 < len(test) / (len(train) + len(test)) < 0.13
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}


@pytest.mark.parametrize("start", [0, 1, 37, 299])
def test_reading_can_begin_at_any_row(real, start):
    rows = list(real.rows())
    assert len(rows) == 300
    assert list(read(real, Report(), start)) == rows[start:]


def test_max_rows_and_start_count_the_same_rows(real):
    first = list(replace(real, max_rows=5).rows())
    assert first == list(islice(real.rows(), 5))
    assert list(read(replace(real, max_rows=5), Report(), 5)) == []
    assert list(read(replace(real, max_rows=5), Report(), 9)) == []
