"""Judges: whoever answers questions about text, and what is made of the answers.

A judge is a local language model (`jrlhf/training/judging.py`), a model behind HTTP (`jrlhf/rewards/endpoint.py`), or
a program. All are asked in the same way: a question, and the options of which one is the answer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from jrlhf.config import UserError, did_you_mean

ONE_ANSWER, TWO_ANSWERS = ("question", "answer"), ("question", "answer_a", "answer_b")
FIRST, TIE, SECOND = 1.0, 0.0, -1.0  # a choice between two answers, as `ops.agreement` has it; NaN is none


class Judge(Protocol):
    def verdicts(self, questions: Sequence[str], options: Sequence[str]) -> np.ndarray:
        """[N, K] float64: the probability of each option. A row sums to 1, or is NaN: no verdict (the judge
        abstained, or could not be reached)."""
        ...


class Writer(Protocol):
    def write(self, questions: Sequence[str], seed: int) -> list[str | None]:
        """Free text in reply to each question, None where there is none. The draws depend on `seed`."""
        ...


# --- programs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A judge that is a program. To add one: a frozen dataclass with the one method `verdicts` (see `Judge`)."""

    abstract: ClassVar[bool] = True

    def verdicts(self, questions: Sequence[str], options: Sequence[str]) -> np.ndarray:
        raise TypeError(f"{type(self).__name__} does not define verdicts()")

    def files(self) -> tuple[str, ...]:
        """Local files whose content is part of a stage's fingerprint."""
        return ()


@dataclass(frozen=True)
class StoredVerdicts(Program):
    """Verdicts that were made before: a file of JSON lines `{"question": ..., "verdict": "<option>" | [p, ...]}`.

    A question that the file lacks has no verdict, nor has one whose verdict is null; a verdict that is none of the
    options is an error.
    """

    path: str

    def verdicts(self, questions: Sequence[str], options: Sequence[str]) -> np.ndarray:
        known = _stored(self.path, Path(self.path).stat().st_mtime_ns) if Path(self.path).is_file() else None
        if known is None:
            raise UserError(f"{self.path}: no such file of stored verdicts")
        rows = [_stored_row(known.get(q), options, self.path) for q in questions]
        return np.asarray(rows, np.float64).reshape(len(questions), len(options))

    def files(self) -> tuple[str, ...]:
        return (self.path,)


@cache
def _stored(path: str, changed: int) -> Mapping[str, object]:
    found = {}
    with open(path, encoding="utf-8-sig") as lines:  # some editors put a mark before the first line
        for n, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                found[row["question"]] = row["verdict"]
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{path} line {n}: expected an object with 'question' and 'verdict'"
                ) from error
    return found


def _stored_row(verdict: object, options: Sequence[str], path: str) -> np.ndarray:
    if verdict is None:
        return np.full(len(options), np.nan)
    if isinstance(verdict, list):
        return checked(np.asarray([verdict], np.float64), 1, options, path)[0]
    if str(verdict) not in options:
        raise UserError(f"{path}: the verdict {verdict!r} is none of the options {', '.join(options)}")
    return one_hot(list(options).index(str(verdict)), len(options))


def one_hot(option: int, count: int) -> np.ndarray:
    """[count] float64."""
    return np.eye(count)[option]


def checked(verdicts: np.ndarray, n: int, options: Sequence[str], who: str) -> np.ndarray:
    """`verdicts` as [N, K] float64; UserError unless every row is NaN or a distribution."""
    verdicts = np.asarray(verdicts, np.float64)
    if verdicts.shape != (n, len(options)):
        raise UserError(f"{who}: verdicts of shape {verdicts.shape}, expected {(n, len(options))}")
    silent = np.isnan(verdicts).all(axis=1)
    proper = (verdicts >= 0).all(axis=1) & (np.abs(verdicts.sum(axis=1) - 1.0) < 1e-3)
    if not (silent | proper).all():
        bad = int(np.argmin(silent | proper))
        raise UserError(
            f"{who}: verdict {bad + 1} is {verdicts[bad].tolist()}, not probabilities that sum to 1"
        )
    return verdicts


# --- questions ----------------------------------------------------------------------------------------------


def check_template(template: str) -> bool:
    """Whether it compares two answers; UserError unless it has the places of one answer, or of two, and no others."""
    found = set(re.findall(r"\{(\w+)\}", template))
    known = {*ONE_ANSWER, *TWO_ANSWERS}
    if unknown := sorted(found - known):
        raise UserError(f"template: unknown placeholder {{{unknown[0]}}}.{did_you_mean(unknown[0], known)}")
    if found not in ({*ONE_ANSWER}, {*TWO_ANSWERS}):
        raise UserError(
            "template must have {question} and {answer}, or {question}, {answer_a} and {answer_b}; it has "
            + (", ".join(f"{{{name}}}" for name in sorted(found)) or "none of them")
        )
    return found == {*TWO_ANSWERS}


def fill(template: str, **parts: str) -> str:
    """The template with its places filled; braces inside the parts stay what they are."""
    return re.sub(r"\{(\w+)\}", lambda place: parts[place[1]], template)


# --- replies ------------------------------------------------------------------------------------------------


class Named(NamedTuple):
    """An option that a reply names, and where."""

    option: int
    start: int  # characters of the reply
    stop: int


def parse_verdict(reply: str, options: Sequence[str], cut: bool = False) -> Named | None:
    """The option that a reply names; None: it names none, or which one it means cannot be told. In this order:

    1. the last in double brackets (`[[A]]`, as MT-Bench asks for it) or after `[RESULT]` (as Prometheus writes it);
    2. the only one among the values of a JSON object;
    3. the one on a line of its own (`**A**`, `Rating: 4/5`), if all such lines name the same;
    4. the one that the reply begins with (`Yes. There are ...`, `A because ...`);
    5. the only one that is named at all. Where several are, a verdict would be a guess.

    `cut`: the reply was cut short. What stands in the middle of a thought is no verdict, so that only brackets that
    agree count, JSON, or a reply that is nothing but an option.

    Words are matched in any case, single letters in their own. A letter, a number and `no` before a noun may be its
    article or count and are no verdict ("A better answer", "2 mistakes", "no errors"), nor is what follows "not". A
    number is not taken out of a larger one (`8` in `8.5`) nor out of a scale (`10` in `8/10`, `1` in `1-5`).
    """
    if marked := _named(reply, options, before=r"\[\[\s*", after=r"\s*\]\]"):
        return marked[-1] if not cut or _agree(marked) else None
    begin, end = reply.find("{"), reply.rfind("}")
    try:
        values = json.loads(reply[begin : end + 1]) if 0 <= begin < end else None
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, dict):
        said = [v for v in values.values() if isinstance(v, (str, int)) and not isinstance(v, bool)]
        named = {i for v in said for i, o in enumerate(options) if _same(str(v), o)}
        if len(named) != 1:
            return None
        (option,) = named
        only = {option: options[option]}
        found = _named(reply, only, before=r':\s{0,9}"?\s{0,9}', after=r'\s{0,9}"?\s{0,9}[,}]')
        return found[-1] if found else None
    if cut:
        whole = _named(reply, options, rf"\A\s{{0,9}}{_OPEN}", rf"{_CLOSE}\s{{0,9}}\Z")
        # The end may be missing: `1` of `10`.
        begun = [o for o in options if whole and begins(o, options[whole[0].option])]
        return whole[0] if len(begun) == 1 else None
    return _unmarked(_SCALE.sub(lambda scale: " " * len(scale[0]), reply), options)


def _unmarked(reply: str, options: Sequence[str]) -> Named | None:
    scale = r"(?!(?:(?<=out of )|(?<=\d of )|(?<=/ ))\d)"  # "a mark of 4" is no scale's end
    before, after = rf"(?<![\w./-]){scale}", r"(?!\w)(?![.,]\d)(?!%)(?!/\D)"
    if results := _named(reply, options, r"\[RESULT\]\s{0,9}", after):
        return results[-1]
    if alone := _named(reply, options, rf"^{_OPEN}(?:{_LABEL}{_OPEN})?", rf"{_OUT_OF}{_CLOSE}$"):
        return alone[-1] if _agree(alone) else None
    for first in _named(reply, options, rf"\A\s{{0,9}}{_OPEN}", after):
        option = options[first.option]
        # "A, B: ..." and "1. ..." may begin a list.
        if (_BECAUSE if len(option) == 1 or option.isdigit() else _PAUSE).match(reply, first.stop):
            return first
    named = _named(reply, options, before, after)
    sure = [
        n
        for n in named
        if not _before_noun(reply, n, options) and not _NOT.search(reply, n.start - 20, n.start)
    ]
    return sure[-1] if sure and _agree(named) else None


# What may stand around an option: the decoration of `**A**.`, whose it is, of how many it is.
_OPEN, _CLOSE = r"[ \t\"'*_`#>(\[]{0,20}", r"[ \t\"'*_`)\].!,]{0,20}"
_LABEL = (
    r"(?i:(?:(?:my|the|so|final|overall|better|best)\s){0,3}"
    r"(?:answer|verdict|rating|score|mark|grade|result|choice|decision|winner)[ *_]{0,4}(?::|\sis:?))"
)
_OUT_OF = r"(?:\s{0,3}(?:/|out of|of)\s{0,3}\d{1,4})?"
_SCALE = re.compile(
    r"(?<![\w.,/-])(?:\d{1,4}\s{0,3}[-\u2013\u2014]\s{0,3}\d{1,4}|\d{1,4}[\s-]{1,3}(?:to|through)[\s-]{1,3}\d{1,4}"
    r"|(?<=between )\d{1,4}\s{1,3}and\s{1,3}\d{1,4})(?![\w/])(?![.,]\d)"
)
_PAUSE = re.compile(r"[*_\"'`)]{0,4}(?:[.,;!\n]|\s{0,3}[\u2013\u2014]|\s{1,3}-)")
_BECAUSE = re.compile(r"[*_\"'`)]{0,4}[.,;]?\s{0,3}(?:[-\u2013\u2014]\s{0,3})?(?:because|since)\b", re.I)
_NOT = re.compile(r"(?:\bnot|n't)\s{1,3}[\"'*_(]{0,4}\Z", re.I)
# A word, but for those that may follow a verdict and are no noun.
_NOUN = re.compile(
    r"\s{1,3}(?!(?:is|was|wins|because|since|as|on|out of|overall|stars?)\b|of \d)[^\W\d_]", re.I
)


def _before_noun(reply: str, named: Named, options: Sequence[str]) -> bool:
    """Whether the option may be the article or the count of the word that follows."""
    option = options[named.option]
    counts = len(option) == 1 or option.isdigit() or option.lower() == "no"
    return counts and _NOUN.match(reply, named.stop) is not None


def _agree(named: Sequence[Named]) -> bool:
    return len({n.option for n in named}) == 1


def begins(option: str, word: str) -> bool:
    """Whether what a judge wrote is the option, or the first of it."""
    return option.startswith(word) or (len(option) > 1 and option.lower().startswith(word.lower()))


def _same(said: str, option: str) -> bool:
    said = said.strip()
    return said == option or (len(option) > 1 and said.lower() == option.lower())


def _named(reply: str, options: Sequence[str] | Mapping[int, str], before: str, after: str) -> list[Named]:
    """Where options stand between these patterns, in order; not those inside a longer one (`good` in `very good`)."""
    found = []
    for i, option in enumerate(options) if not isinstance(options, Mapping) else options.items():
        word = re.escape(option) if len(option) == 1 else f"(?i:{re.escape(option)})"
        pattern = f"{before}(?P<option>{word}){after}"
        found += [Named(i, *match.span("option")) for match in re.finditer(pattern, reply, re.M)]
    whole: list[Named] = []
    for named in sorted(found, key=lambda n: (n.start, -n.stop)):
        if not whole or named.stop > whole[-1].stop:
            whole.append(named)
    return whole


# --- two answers --------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """N pairs of answers. Columns: the first answer is better, the second, a tie. Rows of NaN: no verdict."""

    shown: np.ndarray  # [N, 3] with the first answer in the first place
    turned: np.ndarray  # [N, 3] with the first answer in the second place; NaN when only one order was asked
    probabilities: np.ndarray  # [N, 3], the mean of both, in which a liking for a place cancels


def compare_pairs(
    judge: Judge,
    template: str,
    options: Sequence[str],
    questions: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    both_orders: bool = True,
) -> Comparison:
    """Ask about every pair, with the answers in either place (Zheng et al. 2023, section 3.4).

    options: that the answer in the first place is better, that in the second, and perhaps that neither is. A pair with
    no verdict in one order has none: the other order alone would carry the liking for a place.
    """
    n, triples = len(questions), list(zip(questions, first, second, strict=True))
    asked = [fill(template, question=q, answer_a=a, answer_b=b) for q, a, b in triples]
    if both_orders:
        asked += [fill(template, question=q, answer_a=b, answer_b=a) for q, a, b in triples]
    said = checked(judge.verdicts(asked, options), len(asked), options, "judge")
    if len(options) == 2:
        said = np.concatenate([said, np.where(np.isnan(said[:, :1]), np.nan, 0.0)], axis=1)
    shown = said[:n]
    if not both_orders:
        return Comparison(shown, np.full_like(shown, np.nan), shown)
    turned = said[n:][:, [1, 0, 2]]
    return Comparison(shown, turned, 0.5 * (shown + turned))


def decide(probabilities: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """[N] choices (FIRST, TIE, SECOND, NaN) of [N, 3] probabilities.

    A tie is what is likeliest, or two answers whose probabilities differ by no more than `margin`.
    """
    first, second, tie = probabilities.T
    level = (np.abs(first - second) <= margin + 1e-12) | (tie > np.maximum(first, second))
    choice = np.where(level, TIE, np.where(first > second, FIRST, SECOND))
    return np.where(np.isnan(first), np.nan, choice)


class PositionBias(NamedTuple):
    """What the places of two answers did to the verdicts (Zheng et al. 2023, table 2)."""

    pairs: int  # with a verdict in both orders
    flipped: int  # of them, those whose verdict is another in the other order
    verdicts: int  # single ones that chose one of the answers
    first_place: int  # of them, those that chose the one shown first


def position_bias(comparison: Comparison, margin: float = 0.0) -> PositionBias:
    """Of pairs that were asked about in both orders."""
    shown, turned = decide(comparison.shown, margin), decide(comparison.turned, margin)
    both = ~np.isnan(shown) & ~np.isnan(turned)
    shown, turned = shown[both], turned[both]
    return PositionBias(
        pairs=len(shown),
        flipped=int(np.sum(shown != turned)),
        verdicts=int(np.sum(shown != TIE) + np.sum(turned != TIE)),
        first_place=int(np.sum(shown == FIRST) + np.sum(turned == SECOND)),
    )


def filled(
    values: np.ndarray, fallback: float | None, reward: str, what: str, advice: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """Values [N] with `fallback` where the judge has no verdict (NaN), and where that is [N] bool. None is no fallback:
    then nothing is filled, and NaN is a UserError that names the reward, `what` was asked and the advice."""
    silent = np.isnan(values)
    if fallback is not None:
        return np.where(silent, fallback, values), silent
    if silent.any():
        raise UserError(
            f"reward {reward!r}: the judge has no verdict on {silent.sum()} of {len(silent)} {what}; {advice}"
        )
    return values, None


def expected_score(verdicts: np.ndarray, options: Sequence[str]) -> np.ndarray:
    """[N] float64 in [-1, 1]: the mean of numeric options under [N, K] probabilities, their range mapped to [-1, 1]
    (direct RLAIF: Lee et al. 2023, section 2.3.2, with the options 1 to 10). NaN where there is no verdict."""
    marks = np.asarray([float(option) for option in options])
    low, high = marks.min(), marks.max()
    return (2.0 * (verdicts @ marks) - low - high) / (high - low)
