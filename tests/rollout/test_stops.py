"""The automaton of stop strings against a plain search of the text."""

import numpy as np
import pytest

from jrlhf.rollout.stops import ACCEPTED, TokenBytes, byte_table, cut_at_stop, stop_table

STOPS = [
    ("ab",),
    ("aab", "ab"),
    ("abab", "ba"),
    ("aaa",),
    ("a",),
    ("bca", "ca", "abcb"),
    ("é", "ébé"),
    ("c\nb", "c\nc"),
]


def plain(stops, texts):
    """After how many of the texts, written one after another, one of `stops` is there; None for never."""
    return next((n for n in range(1, len(texts) + 1) if any(s in b"".join(texts[:n]) for s in stops)), None)


def read(table, ids):
    state = 0
    for n, i in enumerate(ids, 1):
        state = table[state, i]
        if state == ACCEPTED:
            return n
    return None


@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_bytes_are_accepted_where_a_search_finds_a_stop_string(stops):
    stops, rng = [s.encode() for s in stops], np.random.default_rng(0)
    table, letters, found = byte_table(stops), [*"abc\né".encode()], 0
    assert len(table) <= sum(map(len, stops))
    for _ in range(200):
        row = rng.choice(letters, 14).tolist()
        expected = plain(stops, [bytes([b]) for b in row])
        assert read(table, row) == expected
        found += expected is not None
    assert found > 8


TEXTS = [
    b"",
    b"a",
    b"b",
    b"c",
    b"ab",
    b"abca",
    b"bcab",
    b"\xc3",
    b"\xa9",
    b" a",
    b"aa",
    "cébé".encode(),
    b"\n",
    b"c\nb",
]


@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_tokens_are_accepted_where_a_search_finds_a_stop_string(stops):
    """Stop strings begin, end and lie anywhere in tokens; the first token that writes something loses its space."""
    first = [text.removeprefix(b" ") for text in TEXTS]
    tokens = TokenBytes(TEXTS, first, [not text for text in first])
    table = stop_table(stops, tokens, len(TEXTS) + 3)
    assert (table.dtype, table.shape[1], table.shape[0] % 8) == (np.int16, len(TEXTS) + 3, 0)
    rng, found = np.random.default_rng(1), []
    for _ in range(400):
        row = rng.integers(0, table.shape[1], 9).tolist()  # also ids that the tokenizer does not have
        texts = [TEXTS[i] if i < len(TEXTS) else b"" for i in row]
        begun = next((n for n, text in enumerate(texts) if text), 0)
        texts[begun] = texts[begun].removeprefix(b" ")
        found.append(plain([s.encode() for s in stops], texts))
        assert read(table, row) == found[-1]
    assert len({*found}) > 4


def test_the_space_that_the_first_token_does_not_write_is_no_part_of_a_stop_string():
    tokens = TokenBytes([b" a", b"b", b" "], [b"a", b"b", b""], [False, False, True])
    table = stop_table((" a",), tokens, 3)
    assert [read(table, ids) for ids in ([0, 1], [0, 0], [1, 0], [2, 0, 0], [1, 2, 1, 0])] == [
        None,
        2,
        2,
        3,
        4,
    ]
    kept = stop_table((" a",), tokens._replace(begins=[False] * 3), 3)
    assert read(kept, [2, 0]) == 2  # a text has begun, if by nothing


def test_a_table_has_the_size_of_its_vocabulary_and_not_of_its_strings():
    tokens = TokenBytes([b"a"] * 5, [b"a"] * 5, [False] * 5)
    assert {stop_table((s,), tokens, 4).shape for s in ("a", "b\n", "seven l")} == {(8, 4)}


def test_text_is_cut_before_the_stop_string_that_was_complete_first():
    assert cut_at_stop("one two", ()) == "one two"
    assert cut_at_stop("one two one", ("one", " two")) == ""
    assert cut_at_stop("one two three", (" three", "two")) == "one "
    assert cut_at_stop("abcd", ("abcd", "bc")) == "a"  # "abc" ended it
    assert cut_at_stop("abc", ("bc", "abc", "c")) == ""  # of those that end at once, the longest
