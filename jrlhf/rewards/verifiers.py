"""Checks that say of one answer whether it is right, each a small frozen dataclass, as configs name them.

A check is pure Python and imports nothing heavy, because it runs in worker processes (`jrlhf.rewards.pool`). It must
give a score to *any* string: what it cannot read is wrong (0.0), never an exception. A mistake in the data (a
reference that is no number) is a UserError.

Only ASCII digits are digits here: Python's `int` reads others too, but no reference is written so.
"""

import ast
import importlib.util
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

from jrlhf.config import UserError

RIGHT, WRONG = 1.0, 0.0


@dataclass(frozen=True)
class Check:
    """Whether an answer is right. To add one: a frozen dataclass with the method `score`."""

    abstract: ClassVar[bool] = True

    def needs(self) -> tuple[str, ...]:
        """Fields of the prompt's row that `score` reads: they must be there, and no others are given."""
        return ("answer",)

    def reads(self, row: dict) -> dict:
        """What `score` is given of a row. UserError when something that it needs is not there."""
        if missing := [name for name in self.needs() if row.get(name) is None]:
            raise UserError(
                f"the check {type(self).__name__} needs the field {missing[0]!r} in every row of the prompts; one has "
                f"only {', '.join(sorted(row))}"
            )
        return {name: row[name] for name in (*self.needs(), "ended") if name in row}

    def score(self, prompt: str, completion: str, row: dict) -> float:
        """1.0 for a right answer, 0.0 for a wrong one, or a share between. `row` has `ended`, too.

        Raises UserError where the row itself is at fault, and nothing else.
        """
        raise TypeError(f"{type(self).__name__} does not define score()")

    def validate(self) -> None:
        """UserError, at config time, when the fields do not fit together or a package is missing."""

    def prepare(self) -> None:
        """Once in every worker process, before its first answer: import what is slow to import."""


def _wrong_field(check: Check, field: str, message: str) -> UserError:
    return UserError(f"{type(check).__name__}.{field} {message}")


def _need_package(check: Check, module: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{type(check).__name__} needs {module}: pip install 'jrlhf[{extra}]'")


# --- where in a text the answer stands -----------------------------------------------------------------------


def boxed(text: str) -> tuple[str, int] | None:
    r"""What the last `\boxed{...}` (or `\fbox{...}`) holds, and where that begins; None without one.

    The braces inside are counted; one that is never closed is none.
    """
    place, length = max((text.rfind(mark), len(mark)) for mark in ("\\boxed{", "\\fbox{"))
    if place < 0:
        return None
    start = place + length
    depth = 1
    for brace in re.compile(r"\\[{}]|[{}]").finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return text[start : brace.start()], start
    return None


def tagged(text: str, tag: str) -> tuple[str, int] | None:
    """What stands in the last `<tag>...</tag>`, and where it begins; None without one."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    if end < 0 or start < 0:
        return None
    start += len(tag) + 2
    return text[start:end], start


def hashed(text: str) -> tuple[str, int] | None:
    """The line of the first `####` before a number (GSM8K's mark), and where it begins; None without one.

    The first, as everybody reads GSM8K: a base model goes on with a question and an answer of its own. Other lines of
    `####` are headings, also those with a number (`#### 1. The first step`).
    """
    match = _HASHED.search(text)
    return (match[1], match.start(1)) if match else None


_HASHED = re.compile(
    r"####(?![ \t*]{0,5}[0-9]{1,2}[.):]\*{0,2}[ \t]+\*{0,2}[^\W\d_])"  # a numbered heading
    r"[ \t]{0,3}([*$\u20ac\u00a3\u00a5(+\-\u2212. ]{0,4}(?:[0-9]|\\[dt]?frac)[^\n]*)"
)


def marked(text: str) -> str | None:
    r"""What is marked as the answer by `\boxed{}`, `<answer></answer>` or `####`, whichever comes last."""
    found = [place for place in (boxed(text), tagged(text, "answer"), hashed(text)) if place]
    return max(found, key=lambda place: place[1])[0] if found else None


# --- numbers -------------------------------------------------------------------------------------------------

MOST_DIGITS = 400  # a number of more digits, or with a larger exponent, is no answer to anything

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])|[0-9]+)"
# (?>) does not backtrack, so that a number is taken whole or not at all: 23^2 has no 2.
_PLAIN = rf"(?>{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
_SIGN = r"[-+\u2212]"  # \u2212 is the typographic minus
_LATEX_INT = r"\{\s{0,3}([-+]?[0-9.]{1,420})\s{0,3}\}"
_NUMBER = re.compile(
    rf"""
    (?<![\w.^/])(?<!\w\*\*)(?<![\^_][-+{{])(?<![\^_]\{{[-+])        # an exponent, an index: no answer
    (?P<sign>(?<![\w)\]}}.%]){_SIGN})?                              # a minus after a number subtracts
    (?:\\?[$\u20ac\u00a3\u00a5]\s?(?P<inner>{_SIGN})?)?             # a currency
    (?:
        (?P<whole>[0-9]+\s?)?\\[dt]?frac(?:{_LATEX_INT}{_LATEX_INT}|(?P<top>[0-9])(?P<below>[0-9]))
      | (?:(?P<units>[0-9]+)[ ])?(?P<over>{_PLAIN})\s?/\s?(?P<under>{_PLAIN})
      | (?P<plain>{_PLAIN})
        (?:[eE](?P<e>[-+]?[0-9]+)(?!\w)
         | \s?(?:\\times|\\cdot|[\u00d7\u00b7\u22c5*x])\s?10\s?(?:\^|\*\*)\s?\{{?\s?(?P<ten>{_SIGN}?[0-9]+)\s?\}}?)?
    )
    (?P<percent>\s?\\?%)?
    (?!\s?\^(?!\{{?\\circ)|\*\*[\w(\-]|\s?/\s?[0-9])  # the base of a power, a date: no answer
    """,
    re.VERBOSE,
)
_LATEX_COMMA = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!])(?=[0-9]{3}(?![0-9]))")  # 1{,}250, 1,\!250, 1\,250
# What may stand around the only number of a marked answer: `x =` before it, a unit behind it.
_LEFT = re.compile(r"[\s~*$(]*(?:[A-Za-z]\w*\s*(?:=|\\approx|:)\s*)?[\s$]*")
# Units that may stand right behind the number, without a space. Single letters are few, so that 2x and 2i are none.
_LENGTHS = "nm|mm|cm|dm|km|m|ft|in|yd|mi|s"  # these and words may have a power: cm^2, m/s^2
_UNITS = (
    "kg|mg|g|lbs?|oz|L|m[Ll]|dL|cL|ms|secs?|mins?|hrs?|h|yrs?|am|pm|mph|kph|rpm|k?Hz|MHz|GHz|k?Pa|mol|k?cal|k?J|k?N|"
    "k?V|m?A|k?Wh?|MW|K|C|F|kB|MB|GB|TB|USD|EUR|GBP"
)
# Words that make another number of it, or leave open which one it is.
_NO_UNIT = (
    "pi|alpha|beta|gamma|delta|epsilon|theta|lambda|sigma|omega|phi|tau|rho|sin|cos|tan|cot|csc|log|exp|sqrt|mod|root|"
    "plus|minus|times|over|divided|multiplied|squared|cubed|factorial|power|"
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|sixty|seventy|eighty|"
    "ninety|(?:thir|four|fif|six|seven|eigh|nine)teen|dozens?|hundreds?|thousands?|[mbtr]+illions?|half|halves|thirds?|"
    "(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths?|"
    "and|but|not|nor|else|than|unless|maybe|perhaps|possibly|probably|either|neither"
)
_POWER = r"(?:\s?\^(?:-?[1-3](?![0-9])|\{-?[1-3]\})|[\u00b2\u00b3])?"
_UNIT = (
    rf"(?:(?:{_LENGTHS})(?![A-Za-z]){_POWER}|(?:{_UNITS})(?![A-Za-z])"
    rf"|(?<![0-9A-Za-z])(?!(?i:{_NO_UNIT})(?![A-Za-z]))(?:[A-Za-z]{{3,30}}|of|at|to|by|on|an|sq|cu)(?![A-Za-z]){_POWER})"
)
_RIGHT = re.compile(
    r"(?:[\s~$\u20ac\u00a3\u00a5\u00b0]|\\[,;:! $]|\^\{?\\circ\}?|\*{1,2}(?=\s))*+"
    rf"(?:{_UNIT}(?:(?:\s?/\s?|\.?(?:[\s~]|\\[,;:! ])++){_UNIT}){{0,6}})?"
    r"[\s~$*.,;:)]*+"
)
_UPRIGHT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\{([^{}]*)\}")


def last_number(text: str, hundredths: bool = False) -> Fraction | None:
    """The last number in a text, whatever stands around it; None without one.

    hundredths: 50% is 1/2; otherwise it is 50.
    """
    text, found = _LATEX_COMMA.sub(",", text), None
    for match in _NUMBER.finditer(text):
        if text[match.end() : match.end() + 1].isnumeric():
            continue  # a digit of another script, an exponent
        found = match
    return _value(found, hundredths) if found else None


def only_number(text: str, hundredths: bool = False) -> Fraction | None:
    """The number that a text consists of, but for `x =` before it and a unit behind it; None for anything else.

    A unit is made of up to seven symbols (5 km/h, 5m, 5 cm^2) and words of three letters or more.
    """
    text = _UPRIGHT.sub(r" \1", _LATEX_COMMA.sub(",", text))
    left = _LEFT.match(text)
    assert left is not None  # it may be empty
    for start in dict.fromkeys((left.end(), 0)):
        match = _NUMBER.match(text, start)
        if match and _RIGHT.fullmatch(text, match.end()):
            return _value(match, hundredths)
    return None


def _value(match: re.Match, hundredths: bool) -> Fraction | None:
    part = match.groupdict()
    top, below = match.group(4) or part["top"], match.group(5) or part["below"]
    if top is not None:
        number = _ratio(top, below, part["whole"])
    elif part["over"] is not None:
        number = _ratio(part["over"], part["under"], part["units"])
    else:
        number = _decimal(part["plain"])
        exponent = (part["e"] or part["ten"] or "0").replace("\u2212", "-")
        if number is None or len(exponent) > 4 or abs(int(exponent)) > MOST_DIGITS:
            return None
        number *= Fraction(10) ** int(exponent)
    if number is None:
        return None
    for sign in (part["sign"], part["inner"]):
        if sign and sign != "+":
            number = -number
    return number / 100 if hundredths and part["percent"] else number


def _decimal(text: str) -> Fraction | None:
    try:
        return None if len(text) > MOST_DIGITS else Fraction(text.replace(",", ""))
    except ValueError:  # `\frac{1.2.3}{4}`
        return None


def _ratio(top: str, below: str, whole: str | None) -> Fraction | None:
    over, under, units = _decimal(top), _decimal(below), _decimal((whole or "0").strip())
    if over is None or not under or units is None:
        return None
    return units + over / under


@dataclass(frozen=True)
class Number(Check):
    r"""The answer is the number of the row's `answer`.

    It reads signs, thousands commas, decimals, fractions (1/2, \frac{1}{2}, 1 1/2), 1e3, 3 \times 10^8, %, currencies
    and units, and compares exactly, as fractions. NaN, infinities and more than 400 digits are no numbers.
    """

    # What is marked by \boxed{}, <answer> or #### and, only where nothing is, the last number; one of the two alone
    read: Literal["marked_or_last", "marked", "last"] = "marked_or_last"
    tolerance: float = 0.0  # how far off the answer may be, as a share of the reference's size
    percent: Literal["as_written", "hundredths"] = "as_written"  # whether 50% is 50 or 1/2

    def validate(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise _wrong_field(self, "tolerance", f"is a share of the reference, got {self.tolerance}")

    def score(self, prompt: str, completion: str, row: dict) -> float:
        if isinstance(row["answer"], bytes):  # whose str() has a number, too
            raise UserError(
                f"the row's 'answer' must be a text or a number, got the bytes {_short(row['answer'])}"
            )
        wanted = self._number(str(row["answer"]), "marked_or_last")
        if wanted is None:
            raise UserError(f"the row's 'answer' {_short(row['answer'])} has no number to compare with")
        found = self._number(completion, self.read)
        if found is None:
            return WRONG
        return float(abs(found - wanted) <= Fraction(self.tolerance) * abs(wanted))

    def _number(self, text: str, read: str) -> Fraction | None:
        hundredths = self.percent == "hundredths"
        inside = marked(text) if read != "last" else None
        if inside is not None:
            return only_number(inside, hundredths)
        return last_number(text, hundredths) if read != "marked" else None


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


@dataclass(frozen=True)
class Mathematics(Check):
    r"""The answer is mathematically equal to the row's `answer`: math-verify decides (fractions, roots, sets,
    intervals, equations, matrices in LaTeX). `pip install 'jrlhf[math]'`.

    A reference without `$...$` or `\boxed{}` is taken as LaTeX.
    """

    # The last \boxed{} and, only where there is none, what math-verify finds; the box alone
    read: Literal["marked_or_last", "marked"] = "marked_or_last"
    digits: int = 6  # decimals to which numbers are compared

    def validate(self) -> None:
        _need_package(self, "math_verify", "math")
        if self.digits < 0:
            raise _wrong_field(self, "digits", f"counts decimals, got {self.digits}")

    def prepare(self) -> None:
        import math_verify

        half, also = (math_verify.parse(text, parsing_timeout=None) for text in ("$\\frac{1}{2}$", "0.5"))
        math_verify.verify(half, also, timeout_seconds=None)

    def score(self, prompt: str, completion: str, row: dict) -> float:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

        # The pool stops what takes too long; the library's own timer is a signal, which the pool need not trust.
        once: dict[str, Any] = {"parsing_timeout": None}
        both = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
        reference = str(row["answer"])
        held = hashed(reference)
        if held is not None:
            reference = held[0]
        if not re.search(r"(?<!\\)\$|\\boxed|\\\[", reference):  # \$5 is a price
            reference = f"\\boxed{{{reference}}}"
        wanted = parse(reference, extraction_config=both, **once)
        if not wanted:
            raise UserError(f"the row's 'answer' {_short(row['answer'])} is no mathematics to compare with")
        inside = boxed(completion)
        if inside is not None:  # math-verify would make a set of several boxes
            completion = f"\\boxed{{{inside[0]}}}"
        elif self.read == "marked":
            return WRONG
        found = parse(completion, extraction_config=both, **once)
        return float(verify(wanted, found, float_rounding=self.digits, timeout_seconds=None))


# --- text ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactMatch(Check):
    """The answer is the row's `answer`, letter by letter."""

    whitespace: Literal["keep", "strip", "collapse"] = (
        "strip"  # at the ends; runs of it anywhere as one space
    )
    ignore_case: bool = False

    def score(self, prompt: str, completion: str, row: dict) -> float:
        return float(self._plain(completion) == self._plain(str(row["answer"])))

    def _plain(self, text: str) -> str:
        if self.whitespace == "strip":
            text = text.strip()
        elif self.whitespace == "collapse":
            text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text


@dataclass(frozen=True)
class Regex(Check):
    """The pattern is found in the answer (or matches it whole); with `group`, what that group holds is the row's
    `answer`. Flags go into the pattern: `(?is)...`."""

    pattern: str = ""
    where: Literal["search", "fullmatch"] = "search"
    group: str = (
        ""  # a group's name or number, whose text (stripped) must equal `answer`; "": any match will do
    )

    def needs(self) -> tuple[str, ...]:
        return ("answer",) if self.group else ()

    def validate(self) -> None:
        if not self.pattern:
            raise _wrong_field(self, "pattern", "must not be empty: it would match everything")
        try:
            compiled = re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise _wrong_field(
                self, "pattern", f"{self.pattern!r} is no regular expression: {error}"
            ) from None
        known = [*map(str, range(compiled.groups + 1)), *compiled.groupindex]
        if self.group and self.group not in known:
            raise _wrong_field(self, "group", f"{self.group!r} is not in the pattern, which has {known}")

    def score(self, prompt: str, completion: str, row: dict) -> float:
        compiled = re.compile(self.pattern)
        match = compiled.fullmatch(completion) if self.where == "fullmatch" else compiled.search(completion)
        if match is None or not self.group:
            return float(match is not None)
        held = match[int(self.group) if self.group.isdecimal() else self.group]
        return float(held is not None and held.strip() == str(row["answer"]).strip())


@dataclass(frozen=True)
class Format(Check):
    """The answer is `<think>...</think>`, `<answer>...</answer>` in this order and nothing else but whitespace: each
    tag once, none of them empty. For any other pattern: `Regex`."""

    tags: tuple[str, ...] = ("think", "answer")
    opened: bool = False  # the prompt (a chat template) ends with the first tag: the answer begins inside it
    more: bool = (
        False  # text may follow the last tag: then `tags=("think",)` wants an answer behind the thought
    )

    def needs(self) -> tuple[str, ...]:
        return ()

    def validate(self) -> None:
        if not self.tags or len({*self.tags}) < len(self.tags):
            raise _wrong_field(self, "tags", f"must be different names, got {self.tags}")
        if bad := [tag for tag in self.tags if not re.fullmatch(r"[\w-]+", tag)]:
            raise _wrong_field(self, "tags", f"are names without brackets, got {bad[0]!r}")

    def score(self, prompt: str, completion: str, row: dict) -> float:
        rest = f"<{self.tags[0]}>{completion}" if self.opened else completion
        marks = [mark for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>")]
        if any(rest.count(mark) != 1 for mark in marks):
            return WRONG
        for i, mark in enumerate(marks):
            before, _, rest = rest.partition(mark)
            inside = i % 2 == 1
            if not rest and i + 1 < len(marks):
                return WRONG
            if inside != bool(before.strip()):
                return WRONG
        return float(bool(rest.strip()) if self.more else not rest.strip())


@dataclass(frozen=True)
class JSON(Check):
    """The answer is JSON: all of it, or its last fenced block. `schema` (JSON Schema, itself as JSON text) is what it
    must satisfy: `pip install 'jrlhf[json]'`; a remote `$ref` is never fetched.

    Numbers that no double holds (1e999) and values nested too deep for the schema's check (some 200 levels) are wrong.
    """

    schema: str = ""
    fenced: bool = True  # where there is a ``` block, that is meant

    def needs(self) -> tuple[str, ...]:
        return ()

    def validate(self) -> None:
        if not self.schema:
            return
        _need_package(self, "jsonschema", "json")
        import jsonschema

        try:
            schema = json.loads(self.schema, parse_constant=_no_constant)
            if not isinstance(schema, dict | bool) or not isinstance(_of(schema, "$schema", ""), str):
                raise _wrong_field(self, "schema", f"is no JSON Schema: {_short(self.schema)}")
            kind = _kind(schema)
            kind.check_schema(schema)
            if missing := _missing_reference(schema, kind):
                raise _wrong_field(
                    self, "schema", f"refers to {missing!r}, which is not in it; nothing is ever fetched"
                )
        except ValueError as error:
            raise _wrong_field(self, "schema", f"is not JSON ({error}); use json.dumps") from None
        except jsonschema.SchemaError as error:
            raise _wrong_field(self, "schema", f"is no JSON Schema: {error.message}") from None
        except RecursionError:
            raise _wrong_field(self, "schema", "is nested too deep") from None
        try:
            samples: tuple[Any, ...] = (None, 0, "", [], {})
            for value in samples:
                _fits(value, schema)
        except RecursionError:
            raise _wrong_field(self, "schema", "refers to itself without an end") from None

    def score(self, prompt: str, completion: str, row: dict) -> float:
        block = last_fence(completion) if self.fenced else None
        text = completion if block is None else block
        try:
            value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
            return float(not self.schema or _fits(value, json.loads(self.schema)))
        except (ValueError, RecursionError, OverflowError):  # too deep, or too large to be divided
            return WRONG


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def _of(schema: Any, key: str, default: Any) -> Any:
    return schema.get(key, default) if isinstance(schema, dict) else default


def _kind(schema: Any) -> Any:
    """The validator of its `$schema`."""
    import jsonschema

    return jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)


def _fits(value: Any, schema: Any) -> bool:
    import referencing

    nothing_is_fetched = referencing.Registry()
    return _kind(schema)(schema, registry=nothing_is_fetched).is_valid(value)


def _missing_reference(schema: Any, kind: Any) -> str | None:
    """The first `$ref` that leads nowhere, wherever it stands; None without one."""
    import jsonschema_specifications
    import referencing.jsonschema

    draft = referencing.jsonschema.specification_with(kind.META_SCHEMA["$schema"])
    root = draft.create_resource(schema)
    left, seen = [(root, jsonschema_specifications.REGISTRY.resolver_with_root(root))], set()
    while left:
        resource, resolver = left.pop()
        if id(resource.contents) in seen:
            continue
        seen.add(id(resource.contents))
        for key in ("$ref", "$dynamicRef"):
            if not isinstance(reference := _of(resource.contents, key, None), str):
                continue
            try:
                found = resolver.lookup(reference)
            except referencing.exceptions.Unresolvable:
                return reference
            left.append((draft.create_resource(found.contents), found.resolver))
        left.extend((part, resolver.in_subresource(part)) for part in resource.subresources())
    return None


def last_fence(text: str) -> str | None:
    """What the last closed block between ``` lines holds, without the language's name; None without one."""
    lines = text.split("\n")
    fences = [i for i, line in enumerate(lines) if line.lstrip().startswith("```")]
    if len(fences) < 2:
        return None
    first, last = fences[len(fences) // 2 * 2 - 2 : len(fences) // 2 * 2]
    return "\n".join(lines[first + 1 : last])


# --- choices -------------------------------------------------------------------------------------------------

_CONNECTING = r"(?:because|since|as|and|for|is|which|due)\b"


@dataclass(frozen=True)
class MultipleChoice(Check):
    r"""The answer names the letter of the row's `answer`: by \boxed{B} or <answer>, "the answer is B", "(B)", a line
    "B. ...", or nothing but "B". The first of these ways that is there counts, and in it the last letter."""

    letters: str = "ABCD"

    def validate(self) -> None:
        if not re.fullmatch(r"[A-Z]{2,26}", self.letters) or len({*self.letters}) < len(self.letters):
            raise _wrong_field(
                self, "letters", f"are different capitals, such as 'ABCD', got {self.letters!r}"
            )

    def score(self, prompt: str, completion: str, row: dict) -> float:
        wanted = str(row["answer"]).strip(" ().:\n").upper()
        if len(wanted) != 1 or wanted not in self.letters:
            raise UserError(
                f"the row's 'answer' {_short(row['answer'])} is none of the letters {self.letters}"
            )
        return float(chosen_letter(completion, self.letters) == wanted)


def chosen_letter(text: str, letters: str) -> str | None:
    """The letter that a text chooses, or None. "A" and "I" before a small word are words, not choices."""
    letter = rf"([{letters}])(?![\w'\u2019*]*\w)"
    spoken = rf"(?![AI][*_]*[ ]+(?!{_CONNECTING})[a-z]){letter}"  # "A cat" is no choice, "A because" is
    inside = boxed(text) or tagged(text, "answer")
    if inside is not None:
        content = re.sub(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}", r"\1", inside[0])
        return _leading_letter(content, letters)
    says = re.compile(
        rf"(?i:\b(?:answer|choice|option)\b)[\s:=*_]{{0,8}}(?i:(?:is|are|would be|should be)\b)?[\s:=*_]{{0,8}}"
        rf"(?i:(?:the\s)?(?:option|choice|letter)\b)?[\s:=*_(\[$\"'`\u201c\u2018]{{0,8}}{spoken}"
    )
    for pattern in (says, re.compile(rf"[(\[]\s?{letter}\s?[)\]]"), re.compile(rf"\*\*{letter}\*\*")):
        if found := pattern.findall(text):
            return found[-1]
    lines = re.findall(rf"(?m)^[ \t*]{{0,8}}([{letters}])[.):](?=\s|\*|$)", text)
    if lines:  # several lines "A. ...", "B. ..." only list the choices
        return lines[0] if len({*lines}) == 1 else None
    return _leading_letter(text, letters) if len(text) < 20 else None


def _leading_letter(text: str, letters: str) -> str | None:
    """The letter that a short text is: "B", "(b)", "B.", "B) Paris"; None for anything else."""
    text = text.strip().strip("*_$ ")
    match = re.match(rf"[(\[]?([{letters}{letters.lower()}])(?:[)\].:,]|\s*$)", text)
    return match[1].upper() if match else None


@dataclass(frozen=True)
class Within(Check):
    """Another check, of what stands in the last `<tag>...</tag>` alone; without it the answer is wrong."""

    check: Check = ExactMatch()
    tag: str = "answer"

    def needs(self) -> tuple[str, ...]:
        return self.check.needs()

    def prepare(self) -> None:
        self.check.prepare()

    def validate(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.tag):
            raise _wrong_field(self, "tag", f"is a name without brackets, got {self.tag!r}")
        self.check.validate()

    def score(self, prompt: str, completion: str, row: dict) -> float:
        inside = tagged(completion, self.tag)
        return WRONG if inside is None else self.check.score(prompt, inside[0], row)


# --- puzzles -------------------------------------------------------------------------------------------------

_SORTABLE = re.compile(r"(?<![\w.])-?[0-9]{1,18}(?:\.[0-9]{1,18})?(?!\w|\.[0-9])")


@dataclass(frozen=True)
class Sorting(Check):
    """The answer is the prompt's numbers in order, all of them and nothing else but separators (`, ; [ ] < >`)."""

    after: str = ""  # only what follows this text, where it comes last in the answer, counts ("=")
    prompt_after: str = ""  # the same of the prompt, whose earlier text holds other numbers
    reverse: bool = False

    def needs(self) -> tuple[str, ...]:
        return ()

    def score(self, prompt: str, completion: str, row: dict) -> float:
        if (asked := _behind(prompt, self.prompt_after)) is None:
            raise UserError(
                f"Sorting.prompt_after {self.prompt_after!r} is not in the prompt {_short(prompt)}"
            )
        given = [Fraction(n) for n in _SORTABLE.findall(asked)]
        if not given:
            raise UserError(f"the prompt {_short(prompt)} has no numbers to sort")
        text = _behind(completion, self.after)
        if text is None or _SORTABLE.sub("", text).strip(" \t\n,;[]<>."):
            return WRONG
        said = _SORTABLE.findall(text)
        if len(said) != len(given):
            return WRONG
        return float([Fraction(n) for n in said] == sorted(given, reverse=self.reverse))


def _behind(text: str, mark: str) -> str | None:
    if not mark:
        return text
    return text.rpartition(mark)[2] if mark in text else None


@dataclass(frozen=True)
class Countdown(Check):
    r"""The answer is an expression of + - * / and brackets that makes the row's target of the row's numbers, each used
    once. It is read from <answer>, \boxed{} or the last line; `... = target` may follow it."""

    numbers: str = "nums"  # the row's fields
    target: str = "target"
    use: Literal["all", "some"] = "all"  # each number exactly once, or at most once

    def needs(self) -> tuple[str, ...]:
        return (self.numbers, self.target)

    def score(self, prompt: str, completion: str, row: dict) -> float:
        try:
            given = Counter(Fraction(str(n)) for n in row[self.numbers])
            target = Fraction(str(row[self.target]))
        except (TypeError, ValueError, ZeroDivisionError):
            raise UserError(
                f"Countdown: the row's {self.numbers!r} must be a list of numbers and {self.target!r} a number, got "
                f"{_short(row[self.numbers])} and {_short(row[self.target])}"
            ) from None
        tree = arithmetic(self._expression(completion, target))
        if tree is None:
            return WRONG
        used = Counter(Fraction(str(n.value)) for n in ast.walk(tree) if isinstance(n, ast.Constant))
        if used != given if self.use == "all" else used - given:
            return WRONG
        try:
            return float(_evaluate(tree) == target)  # of the given numbers alone, each once: never large
        except ZeroDivisionError:
            return WRONG

    def _expression(self, text: str, target: Fraction) -> str:
        inside = tagged(text, "answer") or boxed(text)
        said = inside[0].strip() if inside else (text.strip().splitlines() or [""])[-1]
        left, equals, right = said.partition("=")
        return left if not equals or only_number(right) == target else ""


_TIMES = {"\u00d7": "*", "\u22c5": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-", "\\times": "*", "\\cdot": "*",
          "\\div": "/", "\\left": "", "\\right": "", "$": ""}  # fmt: skip


def arithmetic(text: str) -> ast.expr | None:
    """The syntax tree of + - * /, brackets and whole numbers; None for anything else. Nothing is evaluated."""
    for sign, plain in _TIMES.items():
        text = text.replace(sign, plain)
    text = text.strip()
    if len(text) > 500 or not re.fullmatch(r"[0-9+\-*/() \t]+", text):
        return None
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    allowed = (ast.BinOp, ast.UnaryOp, ast.Constant, *_OPERATIONS, ast.USub, ast.UAdd)
    return tree if all(isinstance(node, allowed) for node in ast.walk(tree)) else None


_OPERATIONS: Mapping[type, Any] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.UnaryOp):
        value = _evaluate(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    assert isinstance(node, ast.Constant)
    return Fraction(str(node.value))
