"""Constitutions: principles in a text file, and what is asked of a model by each (Bai et al. 2022)."""

import re
from pathlib import Path
from typing import NamedTuple

from jrlhf.config import UserError, did_you_mean

# What is asked of a bare principle.
CRITIQUE_BY = "Say in what the answer falls short of this principle: {principle}"
REVISE_BY = (
    "Rewrite the answer so that it follows this principle: {principle} Reply with the new answer alone."
)
CHOOSE_BY = "Which answer follows this principle better? {principle}"
KEYS = ("critique", "revise", "choose")

SHOWN = "Question:\n{question}\n\nAnswer:\n{answer}\n\n"
CRITIQUE = SHOWN + "{request}"
REVISION = SHOWN + "Critique:\n{critique}\n\n{request}"
# {principle} is filled first: what is left compares two answers (`judges.check_template`).
COMPARISON = "Question:\n{question}\n\nAnswer A:\n{answer_a}\n\nAnswer B:\n{answer_b}\n\n{principle} Reply with A or B."


class Principle(NamedTuple):
    """Requests; an empty one is not made by this principle."""

    critique: str  # of an answer
    revise: str  # of the answer, after the critique
    choose: str  # between two answers


def load_principles(path: str) -> tuple[Principle, ...]:
    """The principles in a text file. Paragraphs are apart by blank lines; `#` begins a comment line.

    A bare paragraph is a principle (or each of its lines that begin with `- ` is one), of which requests are made. One
    of `critique:` and `revise:`, of `choose:`, or of all three gives the requests themselves; lines in between go on.
    UserError names file and line.
    """
    try:
        # Some editors put a mark before the first line.
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        near = [p.name for p in Path(path).parent.glob("*.txt")]
        raise UserError(f"{path}: no such file of principles.{did_you_mean(Path(path).name, near)}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    found: list[Principle] = []
    paragraph: list[str] = []
    begin = 1
    for n, line in enumerate([*lines, ""], 1):
        line = line.strip()
        if line.startswith("#"):
            continue
        if paragraph and (not line or line.startswith("- ")):
            found.append(_principle(paragraph, f"{path} line {begin}"))
            paragraph = []
        if line:
            begin = begin if paragraph else n
            paragraph.append(line.removeprefix("- "))
    if not found:
        raise UserError(f"{path}: there is no principle")
    return tuple(found)


def _principle(lines: list[str], place: str) -> Principle:
    if place_holder := re.search(r"\{\w+\}", " ".join(lines)):
        raise UserError(f"{place}: {place_holder[0]} would be read as a place to fill; leave out the braces")
    keyed = [re.match(r"(\w+):(?: |$)(.*)", line) for line in lines]
    if not any(match and match[1].lower() in KEYS for match in keyed):
        text = " ".join(lines)
        return Principle(*(how.format(principle=text) for how in (CRITIQUE_BY, REVISE_BY, CHOOSE_BY)))
    said: dict[str, str] = {}
    key = ""
    for line, match in zip(lines, keyed, strict=True):
        if match and match[1].islower():
            key = match[1]
            if key not in KEYS:
                raise UserError(f"{place}: no such request {key!r}.{did_you_mean(key, KEYS)}")
            if key in said:
                raise UserError(f"{place}: {key!r} stands there twice; a blank line begins another principle")
            said[key] = match[2].strip()
        elif not key:
            raise UserError(f"{place}: begins with neither of {', '.join(f'{k}:' for k in KEYS)}")
        else:
            said[key] = f"{said[key]} {line}".strip()
    for key, text in said.items():
        if not text:
            raise UserError(f"{place}: {key!r} is empty")
    for key, other in (("critique", "revise"), ("revise", "critique")):
        if key in said and other not in said:
            raise UserError(f"{place}: {key!r} without {other!r}: an answer is criticised, then revised")
    return Principle(*(said.get(key, "") for key in KEYS))
