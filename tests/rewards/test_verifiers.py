"""What every check says of right answers, of wrong ones, and of strings that nobody should write."""

import dataclasses
import json
import re
import subprocess
import sys
import time
import urllib.request
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from jrlhf.config import UserError, from_dict, to_dict
from jrlhf.lab import SorterDemonstrations, sorter_answer
from jrlhf.rewards import verifiers
from jrlhf.rewards.programs import Program
from jrlhf.rewards.verifiers import (
    JSON,
    Check,
    Countdown,
    ExactMatch,
    Format,
    Mathematics,
    MultipleChoice,
    Number,
    Regex,
    Sorting,
    Within,
    arithmetic,
    chosen_letter,
    last_fence,
    last_number,
    marked,
    only_number,
)


def right(check: Check, completion: str, prompt: str = "", **row) -> bool:
    value = check.score(prompt, completion, row)
    assert value in (0.0, 1.0)
    return value == 1.0


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so she has 18.", 18),
        ("it is 18.00 in all", 18),
        ("$1,234.50", "1234.5"),
        ("1,000,000", 1_000_000),
        ("1,2,3", 3),  # a list, not thousands
        ("is -7", -7),
        ("is \u22127", -7),
        ("-$5", -5),
        ("$-5", -5),
        ("5-3", 3),
        ("5 - 3", 3),
        ("10 - 3 = 7", 7),
        ("<<48/2=24>>24", 24),
        ("48/2", 24),
        ("3/4", "3/4"),
        ("2 1/2 hours", "5/2"),
        (".5", "1/2"),
        ("1e3", 1000),
        ("2.5E-1", "1/4"),
        (r"3 \times 10^8", 300_000_000),
        (r"3\times10^{-2}", "3/100"),
        ("3 x 10^2", 300),
        (r"\frac{1}{2}", "1/2"),
        (r"-\frac12", "-1/2"),
        (r"1\frac{1}{2}", "3/2"),
        ("50%", 50),
        ("18km", 18),
        ("**18**", 18),
        ("x=5", 5),
        ("007", 7),
        (r"$1{,}250$", 1250),  # thousands in LaTeX
        (r"1,\!250", 1250),
        (r"12\,500", 12_500),
        (r"3 \cdot 10^{4}", 30_000),
        ("3 \u00b7 10^4", 30_000),
        # what is no number on its own is not read as one
        ("2^10", None),
        ("23^2", None),
        ("1.5^2", None),
        ("1,000^2", None),
        ("2**10", None),
        ("2^{10}", None),
        ("10^{-3}", None),
        ("10^-3", None),
        ("x_{5}", None),
        ("H2O", None),
        ("5\u00b2", None),
        ("\uff11\uff12", None),  # full-width digits
        ("\u0661\u0662", None),  # Arabic digits
        ("NaN", None),
        ("inf", None),
        ("1e999", None),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        (r"\frac{1.2.3}{4}", None),
        ("9" * 401, None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, value):
    assert last_number(text) == (None if value is None else Fraction(value))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        (" 18. ", 18),
        ("x = 18", 18),
        ("$18$", 18),
        (r"\$18", 18),
        ("18 dollars per day", 18),
        (r"18 \text{ dollars}", 18),
        ("5 km^2", 5),
        (r"5 \mathrm{cm}^{2}", 5),
        (r"5\ \mathrm{cm^2}", 5),
        (r"1{,}250 \text{ dollars}", 1250),
        (r"90^\circ", 90),
        (r"50\%", 50),
        ("**18**", 18),
        (r"x = -\frac{3}{4}", "-3/4"),
        ("5m", 5),
        ("5 m^2", 5),
        ("3 m/s", 3),
        ("3 m/s^2", 3),
        ("3 m s^{-1}", 3),
        ("10 km/h", 10),
        ("5 cm\u00b2", 5),
        ("98.6\u00b0F", "98.6"),
        ("50%", 50),
        ("12 apples", 12),
        ("5 sq. ft.", 5),
        (r"5\,\text{km}/\text{h}", 5),
        ("5 cups of flour per batch.", 5),
        ("$5$ dollars", 5),
        ("**18** dollars", 18),
        # another number, or a way out
        ("2!", None),
        ("2 m!", None),
        ("2/n", None),
        ("2x", None),
        ("2 x", None),
        ("2i", None),
        ("2e^2", None),
        ("2g^2", None),
        ("2 m^9", None),
        ("(2)^2", None),
        ("2$^2$", None),
        ("2pi", None),
        ("2 pi", None),
        (r"2\text{pi}", None),
        ("2xy", None),
        ("2theta", None),
        ("2*x", None),
        ("2_8", None),
        ("2 million", None),
        ("2 Thirds", None),
        ("2 squared", None),
        ("2 or three", None),
        ("2 maybe", None),
        (r"2\text{, maybe more}", None),
        ("2, three", None),
        # several numbers, or a number that is only a part
        ("18 or 19", None),
        ("(1, 2)", None),
        (r"2\pi", None),
        (r"\sqrt{2}", None),
        ("2 + 3", None),
        ("2^10", None),
        ("about", None),
    ],
)
def test_a_marked_answer_is_one_number(text, value):
    assert only_number(text) == (None if value is None else Fraction(value))


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{4} then 5", "4"),
        (r"\boxed{4} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{4", None),
        (r"\boxed", None),
        ("<answer>4</answer>", "4"),
        ("<answer>4</answer> <answer>5</answer>", "5"),
        ("</answer>4<answer>", None),
        ("#### 72\n\nQuestion: more\nAnswer: ... #### 5", "72"),  # GSM8K's first
        ("#### Step 1\nso\n#### 72", "72"),  # a heading
        ("#### 1. First\nso\n#### **2.** Then\nso\n#### 72", "72"),
        ("#### 1. First\nso it is 72", None),
        ("#### 1.5", "1.5"),
        ("#### 18 dollars", "18 dollars"),
        ("####-3", "-3"),
        (r"\frac{1}{2}", None),
        (r"\text{18} and 19", None),
        ("x = 1{", None),
        (r"<answer>1</answer> \boxed{2}", "2"),
        ("18", None),
    ],
)
def test_where_an_answer_is_marked(text, inside):
    assert marked(text) == inside


def test_a_number_is_read_where_the_config_says():
    both = r"\boxed{4}, I checked 5 times"
    assert right(Number(), both, answer="4")
    assert not right(Number(), both, answer="5")
    assert right(Number(read="last"), both, answer="5")
    assert right(Number(), "it is 5", answer="5")
    assert not right(Number(read="marked"), "it is 5", answer="5")
    assert right(Number(), r"\boxed{0.75}", answer=r"\frac{3}{4}")
    assert not right(Number(), r"\boxed{3}", answer=r"\frac{3}{4}")
    assert not right(Number(), r"\boxed{I do not know} 5", answer="5")  # a mark is taken at its word
    assert not right(Number(), r"\boxed{2\pi}", answer="2")
    assert not right(Number(), r"\boxed{4 or 5}", answer="5")


def test_numbers_compare_exactly_or_within_a_share_of_the_reference():
    assert right(Number(), "0.5", answer="1/2")
    assert right(Number(), "12345678", answer="12,345,678")
    assert not right(Number(), "12345679", answer="12345678")
    assert not right(Number(), "9007199254740993", answer="9007199254740992")  # one double, two numbers
    assert not right(Number(), "0.333", answer="1/3")
    assert right(Number(tolerance=0.01), "0.333", answer="1/3")
    assert not right(Number(tolerance=0.01), "0.3", answer="1/3")
    assert not right(Number(tolerance=0.5), "1e-9", answer="0")
    assert right(Number(), "50%", answer="50")
    assert right(Number(percent="hundredths"), "50%", answer="0.5")
    assert not right(Number(percent="hundredths"), "50%", answer="50")
    assert right(Number(), "so 72", answer="48+24 = <<48+24=72>>72\n#### 72")  # GSM8K's own column


def test_gsm8k_agrees_with_itself(shared_data):
    """All 7,473 worked solutions are right, and none is once its number is another."""
    path = shared_data / "gsm8k" / "train.jsonl"
    solutions = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(solutions) == 7473
    check = Number()
    for solution in solutions:
        worked, _, number = solution.rpartition("#### ")
        wrong = str(int(number.replace(",", "")) + 1)
        assert right(check, solution, answer=number)
        assert right(check, number, answer=solution)
        assert not right(check, f"{worked}#### {wrong}", answer=number)
        assert not right(check, worked.replace(number, wrong) + "#### ", answer=f"{wrong}.5")


# --- mathematics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text", "equal"),
    [
        (r"\frac{1}{2}", r"So the answer is $\frac{2}{4}$.", True),
        (r"\frac{1}{2}", r"\boxed{0.5}", True),
        (r"2\sqrt{3}", r"\boxed{\sqrt{12}}", True),
        (r"2\sqrt{3}", r"\boxed{\sqrt{13}}", False),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}", True),
        (r"(0, 1]", r"\boxed{(0, 1]}", True),
        (r"(0, 1]", r"\boxed{[0, 1]}", False),
        (r"x^2 + 2x + 1", r"\boxed{(x+1)^2}", True),
        ("worked out\n#### 1,000", "1000", True),
        (r"\$32,\!500", r"\boxed{32500}", True),
        ("5", r"First \boxed{4}. No, wait: \boxed{5}.", True),
        ("4", r"First \boxed{4}. No, wait: \boxed{5}.", False),
        ("4", "I do not know", False),
    ],
)
def test_mathematics(answer, text, equal):
    assert right(Mathematics(), text, answer=answer) == equal


def test_mathematics_may_want_a_box():
    assert right(Mathematics(), "the answer is $4$", answer="4")
    assert not right(Mathematics(read="marked"), "the answer is $4$", answer="4")
    assert right(Mathematics(read="marked"), r"the answer is \boxed{4}", answer="4")


# --- text ---------------------------------------------------------------------------------------------------


def test_exact_match():
    assert right(ExactMatch(), " Paris\n", answer="Paris")
    assert not right(ExactMatch(whitespace="keep"), " Paris", answer="Paris")
    assert not right(ExactMatch(), "New  York", answer="New York")
    assert right(ExactMatch(whitespace="collapse"), "New \n York", answer="New York")
    assert not right(ExactMatch(), "paris", answer="Paris")
    assert right(ExactMatch(ignore_case=True), "STRASSE", answer="Stra\u00dfe")
    assert not right(ExactMatch(), "Paris!", answer="Paris")


def test_regex():
    assert right(Regex(pattern=r"\bcat\b"), "a cat sat")
    assert not right(Regex(pattern=r"\bcat\b"), "a category")
    assert not right(Regex(pattern="cat", where="fullmatch"), "a cat")
    grouped = Regex(pattern=r"Answer:(?P<said>.*)", group="said")
    assert right(grouped, "Answer: 42 \nmore", answer="42")
    assert not right(grouped, "Answer: 43", answer="42")
    assert not right(Regex(pattern="(a)|b", group="1"), "b", answer="b")  # a group that took no part
    assert grouped.needs() == ("answer",)
    assert Regex(pattern="x").needs() == ()


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("<think>hm</think><answer>4</answer>", True),
        (" <think>\nhm\n</think>\n<answer>4</answer>\n", True),
        ("<think>hm</think><answer>4</answer> bye", False),
        ("hi <think>hm</think><answer>4</answer>", False),
        ("<think>hm</think> so <answer>4</answer>", False),
        ("<think></think><answer>4</answer>", False),
        ("<think>hm</think><answer> </answer>", False),
        ("<think>hm</think><think>hm</think><answer>4</answer>", False),
        ("<think>hm<answer>4</answer></think>", False),
        ("<answer>4</answer><think>hm</think>", False),
        ("<think>hm</think><answer>4", False),
        ("<think>hm</think><answer>4</answer></answer>", False),
        ("", False),
    ],
)
def test_format(text, fits):
    assert right(Format(), text) == fits
    assert right(Format(opened=True), text.lstrip().removeprefix("<think>")) == (fits and True)


def test_format_with_more_behind_the_last_tag():
    thought = Format(tags=("think",), more=True)
    assert right(thought, "<think>hm</think> It is 4.")
    assert not right(thought, "<think>hm</think> ")
    assert right(Format(tags=("think",)), "<think>hm</think> ")


SCHEMA = json.dumps(
    {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer", "minimum": 1}}}
)


@pytest.mark.parametrize(
    ("text", "parses", "valid"),
    [
        ('{"n": 1}', True, True),
        ('  {"n": 1}\n', True, True),
        ('{"n": 0}', True, False),
        ('{"n": "1"}', True, False),
        ("[1, 2]", True, False),
        ("4", True, False),
        ('{"n": 1', False, False),
        ("{'n': 1}", False, False),
        ('{"n": NaN}', False, False),
        ('{"n": 1} bye', False, False),
        ('Here:\n```json\n{"n": 1}\n```\nbye', True, True),
        ("```\n1\n```\n```\n{}\n```", True, False),
        ("", False, False),
        ("[" * 100_000, False, False),
        ("[" * 100_000 + "]" * 100_000, False, False),  # no reader of JSON goes that deep
        ('{"n": ' + "9" * 5000 + "}", False, False),
    ],
)
def test_json(text, parses, valid):
    assert right(JSON(), text) == parses
    assert right(JSON(schema=SCHEMA), text) == valid
    assert right(JSON(fenced=False), text) == (parses and "```" not in text)


def test_a_schema_never_fetches(monkeypatch):
    fetched = []
    monkeypatch.setattr(urllib.request, "urlopen", fetched.append)
    away = JSON(schema=json.dumps({"$ref": "http://127.0.0.1:9/schema.json"}))
    with pytest.raises(UserError, match="which is not in it; nothing is ever fetched"):
        away.validate()
    with pytest.raises(Exception, match="schema"):  # in a worker: a failure, which is counted
        away.score("", "{}", {})
    assert not fetched


@pytest.mark.parametrize(
    ("schema", "text", "valid"),
    [
        ('{"items": {"$ref": "#"}}', "[" * 50 + "]" * 50, True),
        ('{"items": {"$ref": "#"}}', "[" * 250 + "]" * 250, False),  # deeper than jsonschema goes
        ('{"multipleOf": 0.1}', "1" + "0" * 400, False),  # it divides doubles
        ('{"multipleOf": 0.1}', "1e999", False),
        ("{}", "1e999", False),  # no double holds it
        ("{}", '{"n": [-1e999]}', False),
        ("{}", "1e308", True),
        ("true", "1", True),
    ],
)
def test_what_a_schema_cannot_take_is_wrong(schema, text, valid):
    check = JSON(schema=schema)
    check.validate()
    assert right(check, text) == valid


@pytest.mark.parametrize(
    "schema",
    [
        {"items": {"$ref": "#"}},
        {"properties": {"$ref": {"type": "string"}}},  # a name, no reference
        {"enum": [{"$ref": "#/nowhere"}]},  # a value
        {"$ref": "https://json-schema.org/draft/2020-12/schema"},
        {"$id": "http://a/b", "items": {"$ref": "c"}, "$defs": {"c": {"$id": "c", "type": "array"}}},
        {"$dynamicAnchor": "n", "items": {"$dynamicRef": "#n"}},
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "definitions": {"a": {"id": "#q"}},
            "items": {"$ref": "#q"},
        },
    ],
)
def test_a_reference_that_leads_somewhere(schema):
    JSON(schema=json.dumps(schema)).validate()


def test_the_last_fenced_block():
    assert last_fence("no block") is None
    assert last_fence("```python\na\nb\n```") == "a\nb"
    assert last_fence("```\na\n```\n text\n```\nb\n```\nbye") == "b"
    assert last_fence("```\na\n```\n```\nunclosed") == "a"
    assert last_fence("```") is None


# --- choices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B)", "B"),
        ("The answer is B.", "B"),
        ("the correct option is: **B**", "B"),
        ("Answer: B\n", "B"),
        ("The final answer is $\\boxed{B}$.", "B"),
        (r"\boxed{\text{B}}", "B"),
        ("<answer>B) Paris</answer>", "B"),
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("B) Paris", "B"),
        ("(b)", "B"),
        ("I would say (A), no, (C)", "C"),
        ("The answer is A. Wait. The answer is D.", "D"),
        ("The answer is A because it is cheap.", "A"),
        ("Let me see.\nB. Paris\n", "B"),
        ("It must be **C**.", "C"),
        ('The answer is "C".', "C"),
        ("The answer is `C`", "C"),
        # no choice at all
        ("A cat sat on the mat and was happy.", None),
        ("The answer is A cat.", None),
        ("The answer is a big one.", None),
        ("The answer is Because", None),
        ("The answer is E", None),
        ("A. London\nB. Paris", None),  # only lists them
        ("Answer: A\u00e9rien", None),
        ("I", None),
        ("", None),
    ],
)
def test_multiple_choice(text, letter):
    assert chosen_letter(text, "ABCD") == letter
    for other in "ABCD":
        assert right(MultipleChoice(), text, answer=other) == (other == letter)


def test_the_reference_of_a_choice():
    assert right(MultipleChoice(), "B", answer="(B)")
    assert right(MultipleChoice(), "B", answer="b")
    assert right(MultipleChoice(letters="ABCDE"), "The answer is E", answer="E")
    with pytest.raises(UserError, match="none of the letters ABCD"):
        MultipleChoice().score("", "B", {"answer": "Paris"})


# --- within -------------------------------------------------------------------------------------------------


def test_another_check_within_a_tag():
    check = Within(check=Number(read="last"), tag="answer")
    assert right(check, "<think>5</think><answer>it is 4</answer> 6", answer="4")
    assert not right(check, "4", answer="4")
    assert from_dict(Check, json.loads(json.dumps(to_dict(check, Check)))) == check


# --- puzzles ------------------------------------------------------------------------------------------------


def test_sorting():
    assert right(Sorting(), "1 2 3", prompt="sort 3 1 2 :")
    assert right(Sorting(), "[1, 2, 3]", prompt="sort 3 1 2 :")
    assert right(Sorting(), "-1, 2.5, 10", prompt="10 2.5 -1")
    assert right(Sorting(reverse=True), "3 2 1", prompt="sort 3 1 2 :")
    assert not right(Sorting(), "3 1 2", prompt="sort 3 1 2 :")
    assert not right(Sorting(), "1 2", prompt="sort 3 1 2 :")
    assert not right(Sorting(), "1 2 2 3", prompt="sort 3 1 2 :")
    assert not right(Sorting(), "1 2 3 ok", prompt="sort 3 1 2 :")
    assert not right(Sorting(after="="), "1 2 3", prompt="sort 3 1 2 :")
    assert right(Sorting(prompt_after="Input:"), "1 2", prompt="e.g. 9 8 -> 8 9. Input: 2 1")
    with pytest.raises(UserError, match="no numbers"):
        Sorting().score("hello", "1", {})


def test_sorting_agrees_with_the_lab():
    rows = list(SorterDemonstrations(size=200, task="sort", step_error=0.1, answer_error=0.2).rows())
    prompts, completions = ([row[name] for row in rows] for name in ("prompt", "completion"))
    ours = [Sorting(after="=").score(p, c, {}) for p, c in zip(prompts, completions, strict=True)]
    lab = sorter_answer(prompts, completions, rows)
    np.testing.assert_array_equal(ours, lab)
    assert 0 < np.mean(lab) < 1


@pytest.mark.parametrize(
    ("text", "solves"),
    [
        ("<answer>(10 + 2) * 3 - 12</answer>", True),
        ("<answer>(10 + 2) * 3 - 12 = 24</answer>", True),
        (r"\boxed{(10 + 2) \times 3 - 12}", True),
        ("first I try\n3*(10+2)-12", True),
        ("<answer>-12 + (2+10)\u00d73</answer>", True),
        ("<answer>12 * 2</answer>", False),  # not every number
        ("<answer>12 + 12</answer>", False),  # one twice
        ("<answer>24</answer>", False),
        ("<answer>(10 + 2) * 3 - 12 = 25</answer>", False),
        ("<answer>10 + 2 + 3 + 12</answer>", False),
        ("<answer>10 / (12 - 10 - 2) + 3</answer>", False),
        ("<answer>9**9**9**9</answer>", False),
        ("<answer>10 // 2 * 3 + 12</answer>", False),
        ("<answer>__import__('os').getpid()</answer>", False),
        ("<answer>1_0 + 2 + 12 + 3</answer>", False),
        ("<answer>" + "(" * 100_000 + "</answer>", False),
        ("<answer>" + "-" * 400 + "12</answer>", False),
        ("", False),
    ],
)
def test_countdown(text, solves):
    row = {"nums": [10, 2, 3, 12], "target": 24}
    assert right(Countdown(), text, **row) == solves


def test_countdown_with_some_of_the_numbers():
    row = {"nums": [10, 2, 3, 12], "target": 24}
    some = Countdown(use="some")
    assert right(some, "<answer>12 * 2</answer>", **row)
    assert not right(some, "<answer>12 + 12</answer>", **row)
    assert not right(some, "<answer>24</answer>", **row)
    assert not right(some, "<answer>10 / (12 - 10 - 2)</answer>", **row)
    assert right(Countdown(), "1/3*9", nums=[1, 3, 9], target=3)  # exact
    for signs in (0, 2, 400, 1000, 4000, 100_000):  # nobody writes that many
        assert right(Countdown(), "-" * signs + "12", nums=[12], target=12) == (signs <= 400)
    with pytest.raises(UserError, match="list of numbers"):
        Countdown().score("", "1", {"nums": "ten", "target": 1})


def test_arithmetic_is_never_evaluated():
    for text in ("2**3", "2//3", "a+b", "f(1)", "1,2", "[1]", "1 if 1 else 2", "1.5", "2 3", "", "\0"):
        assert arithmetic(text) is None, text
    assert arithmetic("1+(2*3)") is not None


# --- any string at all --------------------------------------------------------------------------------------

HOSTILE = [
    "",
    "\0",
    "\ud800",
    "\u202e12",
    "NaN",
    "1e999",
    "-inf",
    "\uff11\uff12",
    "9" * 200_000,
    "1," * 100_000,
    "1 " * 100_000,
    "1/" * 100_000,
    "-" * 100_000,
    "$" * 100_000,
    "(" * 100_000,
    "\\boxed{" * 30_000,
    "\\boxed{" + "{" * 100_000,
    "\\frac{" * 30_000,
    "<answer>" * 30_000,
    "<answer>" + "(" * 100_000 + "</answer>",
    "<answer>" + "9" * 100_000 + "</answer>",
    "#### " * 30_000,
    "#### " + "*" * 100_000,
    "answer is " * 20_000,
    "```\n" * 30_000,
    "x = " * 50_000,
    " " * 200_000,
    "\n" * 200_000,
    "<answer>2" + " " * 100_000 + "!</answer>",
    "<answer>2 " + "m " * 50_000 + "</answer>",
    "<answer>2 m" + "." * 100_000 + "!</answer>",
    "[" * 250 + "]" * 250,
    "A" * 200_000,
]
ROW = {"answer": "4", "nums": [1, 2], "target": 3}
CHECKS = [
    Number(),
    Number(read="last", percent="hundredths"),
    ExactMatch(whitespace="collapse", ignore_case=True),
    Regex(pattern="^four$"),
    Format(),
    JSON(schema=json.dumps({"type": "object"})),
    MultipleChoice(),
    Sorting(),
    Countdown(),
    Within(check=Number()),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: type(check).__name__)
def test_any_string_has_a_score_and_soon(check):
    row = {**ROW, "answer": "A"} if isinstance(check, MultipleChoice) else ROW
    for text in HOSTILE:
        began = time.perf_counter()
        assert right(check, text, prompt="sort 2 1", **row) in (False, True), text[:20]
        assert time.perf_counter() - began < 3, text[:20]  # what is quadratic takes minutes


# --- mistakes in configs and data ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (Number(tolerance=-1.0), r"Number\.tolerance"),
        (Number(tolerance=float("nan")), r"Number\.tolerance"),
        (Mathematics(digits=-1), r"Mathematics\.digits"),
        (Regex(), r"Regex\.pattern must not be empty"),
        (Regex(pattern="("), r"Regex\.pattern '\(' is no regular expression"),
        (Regex(pattern="(a)", group="2"), r"Regex\.group '2' is not in the pattern"),
        (Format(tags=()), r"Format\.tags"),
        (Format(tags=("a", "a")), r"Format\.tags"),
        (Format(tags=("<think>",)), r"Format\.tags are names without brackets"),
        (JSON(schema="{"), r"JSON\.schema is not JSON"),
        (JSON(schema='{"type": "sting"}'), r"JSON\.schema is no JSON Schema"),
        (JSON(schema="5"), r"JSON\.schema is no JSON Schema"),
        (JSON(schema='{"$schema": 5}'), r"JSON\.schema is no JSON Schema"),
        (JSON(schema='{"minimum": NaN}'), r"JSON\.schema is not JSON"),
        (JSON(schema="[" * 100_000), r"JSON\.schema is nested too deep"),
        (JSON(schema='{"not":' * 900 + "{}" + "}" * 900), r"JSON\.schema is nested too deep"),
        (JSON(schema='{"$ref": "#"}'), r"JSON\.schema refers to itself without an end"),
        (
            JSON(schema='{"items": {"$ref": "#/$defs/tpyo"}, "$defs": {"typo": {}}}'),
            "refers to '#/.defs/tpyo'",
        ),
        (JSON(schema='{"x": {"y": {"$ref": "#/no"}}, "items": {"$ref": "#/x/y"}}'), "refers to '#/no'"),
        (MultipleChoice(letters="AA"), r"MultipleChoice\.letters"),
        (MultipleChoice(letters="abc"), r"MultipleChoice\.letters"),
        (Within(check=Regex()), r"Regex\.pattern"),
        (Within(tag="<a>"), r"Within\.tag"),
    ],
)
def test_a_mistake_in_a_config(check, message):
    with pytest.raises(UserError, match=message):
        check.validate()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: type(check).__name__)
def test_checks_are_configs(check):
    check.validate()
    assert from_dict(Check, json.loads(json.dumps(to_dict(check, Check)))) == check


def test_a_row_at_fault():
    with pytest.raises(
        UserError, match="needs the field 'answer' in every row of the prompts; one has only prompt"
    ):
        Number().reads({"prompt": "q"})
    with pytest.raises(UserError, match="must be a text or a number, got the bytes b'4'"):
        Number().score("", "4", {"answer": b"4"})
    with pytest.raises(UserError, match="'answer' 'a lot' has no number"):
        Number().score("", "4", {"answer": "a lot"})
    assert Number().reads({"prompt": "q", "answer": "4", "ended": True}) == {"answer": "4", "ended": True}


@pytest.mark.parametrize(("check", "extra"), [(Mathematics(), "math"), (JSON(schema="{}"), "json")])
def test_a_missing_package_is_named(check, extra, monkeypatch):
    monkeypatch.setattr(verifiers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install 'jrlhf\[{extra}\]'"):
        check.validate()


def test_importing_checks_imports_no_jax():
    """They run in worker processes, which must start quickly and leave the accelerator alone."""
    modules = "import sys, jrlhf.rewards.pool, jrlhf.rewards.programs"
    code = f"{modules}; print(sorted({{'jax', 'sympy', 'scipy'}} & {{*sys.modules}}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


GUIDE = Path(__file__).parents[2] / "docs" / "verifiers.md"
EXAMPLE = re.compile(
    r"^\| `(\w+\(.*\))` \| `(.+?)` \| (?:the prompt `(.+?)`|`(.*)`)? ?\| ([01]) \|$", re.MULTILINE
)


def test_the_examples_of_the_guide_are_right():
    examples = EXAMPLE.findall(GUIDE.read_text(encoding="utf-8"))
    assert len(examples) > 10
    for check, completion, prompt, row, score in examples:
        # In a table's cell a text is written as it is, without the backslashes of a Python string.
        row = eval(f"dict({row})".replace("\\", "\\\\"))
        assert eval(check, vars(verifiers)).score(prompt, completion, row) == float(score), (
            check,
            completion,
        )


def test_the_guide_names_every_check_and_option():
    text = GUIDE.read_text(encoding="utf-8")
    for check in (*{type(check) for check in CHECKS}, Mathematics, Program):
        (line,) = re.findall(rf"^\| `{check.__name__}` \|.*$", text, re.MULTILINE)
        for field in dataclasses.fields(check):
            assert f"`{field.name}`" in line, (check.__name__, field.name)
