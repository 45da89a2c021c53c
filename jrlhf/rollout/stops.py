"""Stop strings: which token ends an answer because its text then has one of them.

Text is bytes here (UTF-8), which is what tokens write: a character may be spread over several of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ACCEPTED = -1  # in a table of next states: a stop string has been written


class TokenBytes(NamedTuple):
    """What each of V tokens writes. The first one of a text may write something else than later ones (without the
    space in front, say)."""

    later: list[bytes]
    first: list[bytes]
    begins: list[bool]  # after it, as the first one, the text still has to begin


def byte_table(stops: Sequence[bytes]) -> np.ndarray:
    """The automaton that reads bytes until one of `stops` has been seen (Aho & Corasick 1975): next state [S, 256].

    Its states are the beginnings of stop strings, by length, the empty one first: the longest that the bytes so far end
    with.
    """
    beginnings = sorted({text[:i] for text in stops for i in range(len(text))}, key=lambda b: (len(b), b))
    number = {b: i for i, b in enumerate(beginnings)}
    table = np.zeros((len(beginnings), 256), np.int32)
    for state, beginning in enumerate(beginnings):
        for byte in {*b"".join(stops)}:  # any other leads to the empty beginning
            text = beginning + bytes([byte])
            longest = next(text[i:] for i in range(len(text) + 1) if text[i:] in number)
            table[state, byte] = ACCEPTED if text.endswith(tuple(stops)) else number[longest]
    return table


def stop_table(stops: Sequence[str], tokens: TokenBytes, vocab_size: int) -> np.ndarray:
    """The same automaton reading tokens: next state [S, vocab_size] int16 (int32 where there are too many states).

    State 0 is the beginning of an answer, and ACCEPTED that one of `stops` has been written, also in the middle of a
    token. Ids beyond the tokenizer's write nothing. S is a multiple of 8, so that tables of like stop strings have one
    shape.
    """
    bytes_SC = byte_table([text.encode() for text in stops])
    last = len(bytes_SC)
    # Once accepted, it stays so.
    bytes_SC = np.concatenate([np.where(bytes_SC == ACCEPTED, last, bytes_SC), np.full((1, 256), last)])

    def read(texts: list[bytes], states: np.ndarray) -> np.ndarray:
        """From each state, after each text: [states, V]."""
        texts = (texts + [b""] * vocab_size)[:vocab_size]
        lengths = np.asarray([len(text) for text in texts])
        starts, flat = np.cumsum(lengths) - lengths, np.frombuffer(b"".join(texts), np.uint8)
        out = np.broadcast_to(states[:, None], (len(states), vocab_size)).copy()
        for i in range(max(lengths)):
            longer = np.flatnonzero(lengths > i)
            out[:, longer] = bytes_SC[out[:, longer], flat[starts[longer] + i][None]]
        return out

    # A state of the bytes has the next number here, after the beginning.
    at_first = read(tokens.first, np.zeros(1, np.int32)) + 1
    begins = np.ones(vocab_size, bool)
    begins[: len(tokens.begins)] = tokens.begins[:vocab_size]
    table = np.concatenate([np.where(begins[None], 0, at_first), read(tokens.later, np.arange(last)) + 1])
    table = np.where(table == last + 1, ACCEPTED, table)
    padded = np.pad(table, ((0, -len(table) % 8), (0, 0)))  # states that nothing leads to
    return padded.astype(np.int16 if len(padded) < 2**15 else np.int32)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the stop string that was complete first (the longest of those), or all of it without any."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else text
