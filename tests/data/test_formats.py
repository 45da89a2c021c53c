"""Every format of the table in docs/data.md, on small records and on the real files."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jrlhf.config import Source, Stage, UserError
from jrlhf.data.formats import FORMATS, KINDS_FROM, copeland_ranks, guess_format
from jrlhf.data.report import Report
from jrlhf.data.sources import FileSource, HHSource, HubSource, TextFileSource, check_row, load, read

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def user(text):
    return {"role": "user", "content": text}


def says(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


CALL = '{"name": "look_up", "arguments": {"key": "tea"}}'
CALLED = [{"type": "function", "function": {"name": "look_up", "arguments": {"key": "tea"}}}]
FUNCTION = {"name": "look_up", "parameters": {}}
QA = {
    "question": "Why?",
    "passages": [["Title", "One.", "Two."]],
    **{f"prediction {k}": f"answer {k}" for k in (1, 2, 3, 4)},
    "preference": [1, 1, 1, 0, 1, 1],  # 1 > (2 = 3) > 4, but 2 > 4 and 3 > 4
}
QA_PROMPT = [user("question: Why? context: wikipage: Title text: One. Two.")]
VOTES = {"instruction": "Say", "input": "hi", "response1": "a", "response2": "b"}
PROMETHEUS = (
    "###Task Description:\nJudge.\n\n###The instruction to evaluate:\n{}\n\n###Response to evaluate:\nmeh\n\n"
    "###Reference Answer (Score 5):\ngood\n\n###Score Rubrics:\n[Is it kind?]\nScore 1: no.\nScore 5: yes.\n\n"
    "###Feedback: "
)
DIALOGUE = (
    "Here is a previous dialogue between an assistant and an user. Generate a human preferable response by the "
    "assistant.\nUser: q1\n\nAssistant:a1\n\nUser: q2\n\nAssistant: "
)

# format -> a record in it, and the rows that it must give, written out by hand
EXAMPLES = {
    "text": ({"text": "a story"}, [{"text": "a story"}]),
    "prompt": (
        {"prompt": "q", "answer": 7, "level": "hard"},
        [{"prompt": "q", "answer": "7"}],
    ),
    "prompt_completion": (
        {"prompt": [user("q")], "completion": "a"},
        [{"prompt": [user("q")], "completion": [says("a")]}],
    ),
    "messages": (
        {"messages": [user("q"), says("a")], "tools": [FUNCTION]},
        [{"messages": [user("q"), says("a")], "tools": [{"type": "function", "function": FUNCTION}]}],
    ),
    "sharegpt": (
        {
            "system": "s",
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": CALL},
                {"from": "observation", "value": "42"},
                {"from": "gpt", "value": "a"},
            ],
            "tools": json.dumps([FUNCTION]),
        },
        [
            {
                "messages": [
                    system("s"),
                    user("q"),
                    {"role": "assistant", "content": "", "tool_calls": CALLED},
                    {"role": "tool", "content": "42"},
                    says("a"),
                ],
                "tools": [{"type": "function", "function": FUNCTION}],
            }
        ],
    ),
    "alpaca": (
        {"instruction": "Add", "input": "1 1", "output": "2", "system": "s", "history": [["q", "a"]]},
        [{"prompt": [system("s"), user("q"), says("a"), user("Add\n1 1")], "completion": [says("2")]}],
    ),
    "self_instruct": (
        {"instruction": "Add", "instances": [{"input": "", "output": "x"}, {"input": "1", "output": "y"}]},
        [
            {"prompt": [user("Add")], "completion": [says("x")]},
            {"prompt": [user("Add\n1")], "completion": [says("y")]},
        ],
    ),
    "gsm8k": (
        {"question": "q", "answer": "1 + 1 = 2\n#### 1,002"},
        [{"prompt": [user("q")], "answer": "1002"}],
    ),
    "preference": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 4, "score_rejected": 1.5},
        [{"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2], "scores": [4.0, 1.5]}],
    ),
    "hh": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        [{"prompt": [user("q")], "responses": [[says("a")], [says("b")]], "ranks": [1, 2]}],
    ),
    "sharegpt_preference": (
        {
            "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        [{"prompt": [system("s"), user("q")], "responses": [[says("a")], [says("b")]], "ranks": [1, 2]}],
    ),
    "ranking": (
        {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, 1, 2], "labeler": "x"},
        [{"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, 1, 2], "labeler": "x"}],
    ),
    "binary": (
        {"prompt": "q", "completion": "a", "label": False},
        [{"prompt": "q", "completion": "a", "label": False}],
    ),
    "messages_binary": (
        {"messages": [user("q"), says("a"), user("r"), says("b")], "label": True},
        [{"prompt": [user("q"), says("a"), user("r")], "completion": [says("b")], "label": True}],
    ),
    "stepwise": (
        {"prompt": "q\n", "completions": ["one", "two"], "labels": [True, False]},
        [
            {"prompt": "q\n", "completion": "one", "label": True},
            {"prompt": "q\none\n", "completion": "two", "label": False},
        ],
    ),
    "steps": (
        {"prompt": "q\n", "steps": ["one", "two", "three"], "labels": [1, None, 0.25]},
        [{"prompt": "q\n", "steps": ["one", "two", "three"], "labels": [1.0, None, 0.25]}],
    ),
    "qa_feedback": (
        QA,
        [
            {
                "prompt": QA_PROMPT,
                "responses": [[says(f"answer {k}")] for k in (1, 2, 3, 4)],
                "ranks": [1, 2, 2, 3],
            }
        ],
    ),
    "qa_feedback_pairs": (
        QA,
        [
            {"prompt": QA_PROMPT, "responses": [[says(f"answer {i}")], [says(f"answer {j}")]], "ranks": ranks}
            for i, j, ranks in [
                (1, 2, [1, 2]),
                (1, 3, [1, 2]),
                (1, 4, [1, 2]),
                (2, 3, [1, 1]),
                (2, 4, [1, 2]),
                (3, 4, [1, 2]),
            ]
        ],
    ),
    "pandalm": (
        {**VOTES, "annotator1": 2, "annotator2": 0, "annotator3": 2},
        [{"prompt": [user("Say\nhi")], "responses": [[says("a")], [says("b")]], "ranks": [2, 1]}],
    ),
    "pandalm_annotators": (
        {**VOTES, "annotator1": 2, "annotator2": 0, "annotator3": 1},
        [
            {
                "prompt": [user("Say\nhi")],
                "responses": [[says("a")], [says("b")]],
                "ranks": ranks,
                "labeler": f"annotator{k}",
            }
            for k, ranks in [(1, [2, 1]), (2, [1, 1]), (3, [1, 2])]
        ],
    ),
    "prometheus": (
        {"instruction": PROMETHEUS.format(DIALOGUE), "gpt4_score": [2, 3, 4]},
        [
            {
                "prompt": [user("q1"), says("a1"), user("q2")],
                "responses": [[says("meh")], [says("good")]],
                "ranks": [2, 1],
                "scores": [3.0, 5.0],
                "criteria": {"Is it kind?": [3.0, 5.0]},
                "labeler": "gpt-4",
                "answer": "good",
                "rubric": "[Is it kind?]\nScore 1: no.\nScore 5: yes.",
            }
        ],
    ),
}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def rows_of(tmp_path, format, *records, **options):
    return load(FileSource(write(tmp_path / "data.jsonl", *records), format=format, **options))


def documented():
    """format -> (its line's fields, its example) in the table of docs/data.md."""
    lines = re.findall(
        r"^\| `(\w+)` \| (.*?) \| .*? \| `(\w+Source\(.*\))` \|$", DOCS.read_text(), re.MULTILINE
    )
    return {name: (fields, example) for name, fields, example in lines}


# --- the table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_record_becomes_the_rows_that_the_documentation_says(tmp_path, monkeypatch, format):
    fields, example = documented()[format]
    required, _, optional = fields.partition("(")
    assert tuple(re.findall(r"`([^`]+)`", required)) == FORMATS[format].fields
    assert tuple(re.findall(r"`([^`]+)`", optional)) == FORMATS[format].optional
    record, expected = EXAMPLES[format]
    monkeypatch.chdir(tmp_path)
    source = eval(example, {"FileSource": FileSource})
    write(tmp_path / source.path, record)
    assert source.format == format
    rows, report = load(source)
    assert rows == expected
    assert report.kept == len(expected)
    assert not report.dropped
    kind = FORMATS[format].default or FORMATS[format].kind
    for row in rows:
        check_row(row, kind, "row")


def test_every_documented_source_can_be_made():
    assert {*documented()} == {*FORMATS} == {*EXAMPLES}
    for block in re.findall(r"```python\n(from jrlhf.*?)```", DOCS.read_text(), re.DOTALL):
        lines = [line for line in block.splitlines() if re.match(r"\w+Source\(", line)]
        assert lines
        for line in lines:
            names = (FileSource, HHSource, HubSource, TextFileSource)
            eval(line, {source.__name__: source for source in names})


@pytest.mark.parametrize("format", [name for name in FORMATS if FORMATS[name].guess])
def test_auto_finds_the_format_and_says_so(tmp_path, format):
    record, expected = EXAMPLES[format]
    rows, report = rows_of(tmp_path, "auto", record)
    assert rows == expected
    assert f"data.jsonl: format {format!r} by the fields {FORMATS[format].fields[0]}" in str(report)


def test_auto_does_not_guess_between_two(tmp_path):
    with pytest.raises(
        UserError, match="line 1: format='auto': prompt and messages fit the fields prompt, mess"
    ):
        rows_of(tmp_path, "auto", {"prompt": "q", "messages": [user("q"), says("a")]})
    with pytest.raises(
        UserError, match=r"line 1: format='auto': no format fits the fields q, a\. Map them by `col"
    ):
        rows_of(tmp_path, "auto", {"q": "q", "a": "a"})
    columns = {"instruction": "q", "output": "a"}
    rows, report = rows_of(tmp_path, "auto", {"q": "q", "a": "a"}, columns=columns)
    assert rows == [{"prompt": [user("q")], "completion": [says("a")]}]
    assert "format 'alpaca'" in str(report)
    record = {"prompt": "q", "messages": [user("q"), says("a")]}
    assert guess_format(record, "demonstration", "here") == "messages"  # the kind decides


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_in_another_format_is_an_error_that_names_the_right_one(tmp_path, format):
    other = next(f for f in ("self_instruct", "stepwise") if f != format)
    record, _ = EXAMPLES[other]
    found, expected = ", ".join(record), ", ".join(FORMATS[format].fields)
    if {*FORMATS[format].fields} <= {*record}:  # all of its fields are there, and more
        _, report = rows_of(tmp_path, format, record)
        assert f"format {other!r} would also use {', '.join(FORMATS[other].fields)}" in str(report)
        return
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path, format, record)
    message = str(caught.value)
    assert "data.jsonl line 1: no field " in message
    assert f"format={format!r} expects {expected}" in message
    assert f"found {found}. format={other!r} would fit." in message
    with pytest.raises(UserError, match=f"line 1: no field .* format={other!r} would fit"):
        load(FileSource(str(tmp_path / "data.jsonl"), "preference"))


def test_a_misspelt_field_is_suggested(tmp_path):
    with pytest.raises(UserError, match=r"found instruction, outputs\. Did you mean 'outputs'"):
        rows_of(tmp_path, "alpaca", {"instruction": "q", "outputs": "a"})


@pytest.mark.parametrize("format", FORMATS)
def test_every_kind_that_a_format_offers_is_a_row_of_that_kind(tmp_path, format):
    record, _ = EXAMPLES[format]
    if format in ("binary", "stepwise"):
        record = {**record, **({"label": True} if "label" in record else {"labels": [True, True]})}
    for kind in KINDS_FROM[FORMATS[format].kind]:
        rows, report = rows_of(tmp_path, format, record, kind=kind)
        ties = kind == "demonstration" and format in ("pandalm_annotators", "qa_feedback_pairs")
        assert report.dropped == ({"no single best answer to demonstrate": 1} if ties else {})
        for row in rows:
            check_row(row, kind, "row")
            assert not {"responses", "ranks", "label"} & {*row} or kind in ("preference", "binary")


def test_kinds_of_one_record(tmp_path):
    (best,), _ = rows_of(tmp_path, "pandalm", EXAMPLES["pandalm"][0], kind="demonstration")
    assert best == {"prompt": [user("Say\nhi")], "completion": [says("b")]}
    steps, report = rows_of(tmp_path, "stepwise", EXAMPLES["stepwise"][0], kind="demonstration")
    assert steps == [{"prompt": "q\n", "completion": "one"}]  # the other step is labelled wrong
    assert report.dropped == {"an undesirable answer is no demonstration": 1}
    (prompt,), _ = rows_of(tmp_path, "prometheus", EXAMPLES["prometheus"][0], kind="prompt")
    assert {*prompt} == {"prompt", "answer", "rubric"}
    (prompt,), _ = rows_of(tmp_path, "sharegpt", EXAMPLES["sharegpt"][0], kind="prompt")
    assert [m["role"] for m in prompt["prompt"]] == ["system", "user", "assistant", "tool"]
    assert prompt["tools"]
    gsm8k = EXAMPLES["gsm8k"][0]
    (row,), _ = rows_of(tmp_path, "gsm8k", {**gsm8k, "level": 3}, kind="demonstration", columns={})
    assert row == {"prompt": [user("q")], "completion": [says(gsm8k["answer"])], "answer": "1002"}
    (row,), _ = rows_of(tmp_path, "gsm8k", {**gsm8k, "level": 3}, kind="prompt", columns={"grade": "level"})
    assert row == {"prompt": [user("q")], "answer": "1002", "grade": 3}


@pytest.mark.parametrize(
    ("format", "changes", "why"),
    [
        ("alpaca", {"output": ""}, "an answer is empty"),
        ("alpaca", {"output": None}, "'output' is null"),
        ("prompt_completion", {"completion": None}, "'completion' is null"),
        ("alpaca", {"output": 3}, "'output' is int, not text"),
        ("alpaca", {"history": [["q"]]}, "'history' is not a list of [question, answer]"),
        ("messages", {"messages": [says("a"), user("q")]}, "the dialogue begins with the assistant"),
        ("messages", {"messages": [system("s"), says("a")]}, "the dialogue begins with the assistant"),
        ("messages", {"messages": [user("q")]}, "the assistant says nothing"),
        ("messages", {"messages": [user("q"), says(" ")]}, "an answer is empty"),
        ("messages", {"messages": []}, "there are no messages"),
        ("messages", {"messages": "hello"}, "messages are str, not a list"),
        ("messages", {"tools": "none"}, "'tools' is not a list of functions"),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"}]},
            "a function call is not JSON with 'name' and 'arguments'",
        ),
        ("gsm8k", {"answer": "seven"}, "the answer has no '#### N'"),
        ("preference", {"rejected": "a"}, "the answers are equal"),
        ("preference", {"rejected": " "}, "an answer is empty"),
        ("preference", {"prompt": [user("q"), says("a")]}, "a prompt ends with the assistant"),
        ("preference", {"rejected": [says("b")]}, "one answer is text and the other messages"),
        (
            "messages_binary",
            {"messages": [user("q"), says("a"), user("r")]},
            "the dialogue ends with the user",
        ),
        ("binary", {"label": "maybe"}, "'label' is 'maybe', not true or false"),
        ("stepwise", {"labels": [True]}, "'completions' and 'labels' are not lists of one length"),
        ("steps", {"labels": [1]}, "'steps' and 'labels' are not lists of one length"),
        ("steps", {"labels": [1, 2, 0]}, "a label is 2.0, not 0 to 1"),
        ("steps", {"steps": ["one", " ", "three"]}, "a step is empty"),
        ("qa_feedback", {"preference": [1, 1]}, "'preference' is not six times 0, 1 or 2"),
        ("pandalm", {"annotator2": 3}, "'annotator2' is 3, not 0, 1 or 2"),
        ("prometheus", {"gpt4_score": [6]}, "'gpt4_score' is not a list of 1 to 5"),
        ("prometheus", {"instruction": "Judge."}, "the instruction does not have Prometheus' sections"),
        ("self_instruct", {"instances": []}, "there are no instances"),
        ("self_instruct", {"instances": [{"input": ""}]}, "'instances' is not a list of objects with"),
    ],
)
def test_an_unusable_record_is_dropped_counted_and_shown(tmp_path, format, changes, why):
    good, expected = EXAMPLES[format]
    rows, report = rows_of(tmp_path, format, good, {**good, **changes}, {**good, **changes})
    assert rows == expected
    (reason,) = report.dropped
    assert reason.startswith(why)
    assert report.dropped[reason] == 2
    assert f"dropped 2: {reason} (first: line 2)" in str(report)


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"from": "humann", "value": "q"}, "unknown role 'humann'. Did you mean 'human'"),
        ({"from": "human"}, "a message needs 'role' and 'content' .* got from"),
        ("hello", "a message is str, expected an object"),
    ],
)
def test_a_message_of_another_make_stops_the_run(tmp_path, message, fault):
    good = EXAMPLES["sharegpt"][0]
    with pytest.raises(UserError, match=f"data.jsonl line 2: {fault}"):
        rows_of(tmp_path, "sharegpt", good, {"conversations": [message]})


# --- implicit prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),  # not "The sky is bl"
        ("the cat sat", "the catalog", ("the", " cat sat", " catalog")),
        ("Name two. One", "Name two. One two", ("Name two.", " One", " One two")),
        ("Sum:\n2", "Sum: 3", ("Sum:", "\n2", " 3")),
    ],
)
def test_texts_are_cut_between_words(tmp_path, chosen, rejected, expected):
    for a, b, order in [(chosen, rejected, (0, 1)), (rejected, chosen, (1, 0))]:
        (row,), _ = rows_of(tmp_path, "preference", {"chosen": a, "rejected": b})
        assert row["prompt"] + row["responses"][0] == a
        assert row["prompt"] + row["responses"][1] == b
        assert (row["prompt"], *(row["responses"][i] for i in order)) == expected


def test_conversations_share_their_prompt(tmp_path):
    shared = [system("s"), user("q"), says("a"), user("r")]
    record = {"chosen": [*shared, says("good")], "rejected": [*shared, says("bad")]}
    expected = {"prompt": shared, "responses": [[says("good")], [says("bad")]], "ranks": [1, 2]}
    # Without a prompt, with it as messages, and with the last question as text (UltraFeedback).
    for prompt in ({}, {"prompt": shared}, {"prompt": "r"}):
        assert rows_of(tmp_path, "preference", {**record, **prompt})[0] == [expected]
    call = {"role": "assistant", "content": "", "tool_calls": CALLED}
    tool = {"role": "tool", "content": "42"}
    record = {name: [user("q"), call, tool, says(name)] for name in ("chosen", "rejected")}
    (row,), _ = rows_of(tmp_path, "preference", record)
    assert (row["prompt"], row["responses"][0]) == ([user("q"), call, tool], [says("chosen")])
    for bad, why in [
        ({"chosen": "yes", "rejected": "no"}, "the answers share no beginning"),
        (
            {"chosen": [user("q"), says("a")], "rejected": [user("r"), says("b")]},
            "the answers share no beginning",
        ),
        ({"chosen": [says("a")], "rejected": [says("b")]}, "the answers share no beginning"),
        (
            {"prompt": "x", "chosen": [user("q"), says("a")], "rejected": [user("q"), says("b")]},
            "the prompt is not",
        ),
    ]:
        with pytest.raises(UserError, match=f"No row is left.*dropped 1: {why}"):
            rows_of(tmp_path, "preference", bad)
    hh = EXAMPLES["hh"][0]
    with pytest.raises(UserError, match="line 1: these are HH dialogues: format='hh'"):
        rows_of(tmp_path, "preference", hh)


def test_a_text_that_is_json_stays_a_text(tmp_path):
    for prompt in ('["a"]', '[{"a": 1}]', "[1, 2", "{}", "[]", "7"):
        record = {"prompt": prompt, "completion": '{"role": "x"}'}
        assert rows_of(tmp_path, "prompt_completion", record)[0] == [record]


def test_a_row_without_its_chat(tmp_path):
    long = {"messages": [system("s"), user("q"), says("a"), user("r"), says("b")]}
    (row,), _ = rows_of(tmp_path, "messages", long, chat="dialogue")
    prompt = "\n\nSystem: s\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
    assert row == {"prompt": prompt, "completion": " b"}
    (row,), _ = rows_of(tmp_path, "messages", {"messages": long["messages"][:3]}, chat="bare")
    assert row == {"prompt": "s\n\nq", "completion": "a"}
    calls = EXAMPLES["sharegpt"][0]
    for format, record, chat, message in [
        ("messages", long, "bare", "a dialogue of several turns is not bare text"),
        ("sharegpt", calls, "bare", "tools have no place in text"),
        ("prompt", {"prompt": [user("q")], "tools": [FUNCTION]}, "bare", "tools have no place in text"),
        ("sharegpt", {**calls, "tools": None}, "dialogue", "tools have no place in a plain dialogue"),
    ]:
        with pytest.raises(UserError, match=f"data.jsonl line 1: {message}"):
            rows_of(tmp_path, format, record, chat=chat)


# --- rankings out of choices ----------------------------------------------------------------------------

PAIRS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_choices_that_fit_a_ranking_give_it_back():
    weak_orders = 0
    for code in range(4**4):
        ranks = [code // 4**k % 4 + 1 for k in range(4)]
        if {*ranks} != {*range(1, max(ranks) + 1)}:
            continue
        weak_orders += 1
        choices = [0 if ranks[i] == ranks[j] else 1 if ranks[i] < ranks[j] else 2 for i, j in PAIRS]
        assert copeland_ranks(4, zip(PAIRS, choices, strict=True)) == ranks
    assert weak_orders == 75  # ordered Bell number of 4


def test_a_cycle_is_a_tie_and_is_reported(tmp_path):
    # 1 > 2 > 3 > 1, and all of them > 4
    record = {**QA, "preference": [1, 2, 1, 1, 1, 1]}
    (row, _), report = rows_of(tmp_path, "qa_feedback", record, QA)
    assert row["ranks"] == [1, 1, 1, 2]
    assert str(report).endswith(
        "changed 1: the six choices fit no ranking: ranked by wins less losses (first: line 1)"
    )
    pairs, _ = rows_of(tmp_path, "qa_feedback_pairs", record)  # the choices themselves
    assert [pair["ranks"] for pair in pairs] == [[1, 2], [2, 1], [1, 2], [1, 2], [1, 2], [1, 2]]


def test_three_opinions_make_a_tie_that_is_reported(tmp_path):
    votes = EXAMPLES["pandalm_annotators"][0]
    (row,), report = rows_of(tmp_path, "pandalm", votes)
    assert row["ranks"] == [1, 1]
    assert report.changed == {"three annotators, three opinions: a tie": 1}


# --- every kind of file ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format", ["sharegpt", "alpaca", "messages_binary", "preference", "qa_feedback", "stepwise"]
)
def test_json_parquet_csv_and_the_hub_give_the_same_rows(tmp_path, monkeypatch, format):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    record, expected = EXAMPLES[format]
    records = [record] * 3
    lines = write(tmp_path / "a.jsonl", *records)
    (tmp_path / "a.json").write_text(json.dumps(records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    cells = [[v if isinstance(v, str) else json.dumps(v) for v in r.values()] for r in [record] * 3]
    quote = lambda cell: '"' + cell.replace('"', '""') + '"'  # noqa: E731
    csv = [",".join(map(quote, row)) for row in [list(record), *cells]]
    (tmp_path / "a.csv").write_text("\n".join(csv))
    sources = [
        FileSource(str(tmp_path / f"a.{end}"), format=format) for end in ("jsonl", "json", "parquet", "csv")
    ]
    sources += [
        HubSource("json", data_files=(lines,), streaming=streaming, format=format)
        for streaming in (True, False)
    ]
    for source in sources:
        rows, report = load(source)
        assert rows == expected * 3, source
        assert not report.dropped
        assert list(read(source, Report(), start=2)) == rows[2:]  # how a stream resumes
        assert source.files()


def test_a_table_with_null_columns_is_read_like_a_file_without_them(tmp_path):
    chats = [[user("q"), {**says(""), "tool_calls": CALLED}, says("a")], [user("q"), says("a")]]
    rows = [{"messages": chat} for chat in chats]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert load(FileSource(str(tmp_path / "a.parquet"), format="messages"))[0] == rows
    assert load(FileSource(str(tmp_path / "a.parquet"), "demonstration"))[0] == rows


def test_rows_are_counted_after_records_are_dropped_or_divided(tmp_path):
    good, bad = EXAMPLES["self_instruct"][0], {"instruction": "x", "instances": [{"input": "", "output": ""}]}
    path = write(tmp_path / "a.jsonl", bad, good, bad, good)
    for source in (
        FileSource(path, format="self_instruct"),
        HubSource("json", data_files=(path,), streaming=True, format="self_instruct"),
    ):
        rows = list(source.rows())
        assert len(rows) == 4
        assert list(read(source, Report(), start=1)) == rows[1:]


def test_a_changed_file_is_a_changed_experiment(tmp_path):
    from jrlhf.experiment import fingerprint

    @dataclass(frozen=True)
    class Reads(Stage):
        data: Source

    def print_of(record, **options):
        source = FileSource(write(tmp_path / "a.jsonl", record), format="alpaca", **options)
        return fingerprint(Reads(source), 0, {})

    record = EXAMPLES["alpaca"][0]
    first = print_of(record)
    assert print_of(record) == first
    prints = {
        first,
        print_of({**record, "output": "3"}),
        print_of(record, chat="dialogue"),
        print_of(record, kind="prompt"),
    }
    assert len(prints) == 4
    folder = tmp_path / "dataset"
    folder.mkdir()
    assert HubSource(str(folder), format="alpaca").files() == (str(folder),)


# --- the real files -------------------------------------------------------------------------------------


def raw(path):
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


# file, format, rows kept, records dropped by reason, rows changed
REAL = [
    ("gsm8k/train.jsonl", "gsm8k", 7473, {}, 0),
    ("self-instruct/seed_tasks.jsonl", "self_instruct", 175, {}, 0),
    ("llamafactory-demo/glaive_toolcall_en_demo.json", "sharegpt", 300, {}, 0),
    ("llamafactory-demo/dpo_en_demo.json", "sharegpt_preference", 300, {}, 0),
    ("llamafactory-demo/kto_en_demo.json", "messages_binary", 300, {}, 0),
    ("fine-grained-qa-feedback/dev_feedback.json", "qa_feedback", 500, {}, 22),
    ("fine-grained-qa-feedback/dev_feedback.json", "qa_feedback_pairs", 3000, {}, 0),
    (
        "pandalm-human/testset-v1.json",
        "pandalm",
        939,
        {"an answer is empty": 54, "'response1' is bool, not text": 4, "'response2' is bool, not text": 2},
        0,
    ),
    (
        "pandalm-human/testset-v1.json",
        "pandalm_annotators",
        2817,
        {"an answer is empty": 54, "'response1' is bool, not text": 4, "'response2' is bool, not text": 2},
        0,
    ),
    ("rubrics/mt_bench_eval.json", "prometheus", 320, {}, 0),
    (
        "hh-harmless-base/pairs.jsonl",
        "hh",
        1794,
        {"an answer is empty": 4, "the dialogues differ before the last answer": 2},
        0,
    ),
]


@pytest.mark.parametrize(("file", "format", "kept", "dropped", "changed"), REAL)
def test_real_file(shared_data, file, format, kept, dropped, changed):
    rows, report = load(FileSource(str(shared_data / file), format=format))
    assert (report.kept, report.dropped, report.changed.total()) == (kept, Counter(dropped), changed)
    kind = FORMATS[format].default or FORMATS[format].kind
    for n, row in enumerate(rows, 1):
        check_row(row, kind, f"{file} row {n}")
    if FORMATS[format].guess:
        again, report = load(FileSource(str(shared_data / file), format="auto"))
        assert again == rows
        assert f"format {format!r}" in str(report)


def test_every_real_file_is_tried(shared_data):
    files = {str(p.relative_to(shared_data)) for p in shared_data.glob("*/*.json*")}
    models = {f for f in files if f.startswith("stories260K/")}
    # Verdicts of a judge on testset-v1.json by row number: no prompt and no answers to learn from.
    verdicts = {"pandalm-human/gpt-3.5-turbo-testset-v1.json"}
    assert files - models - verdicts == {file for file, *_ in REAL}
    with pytest.raises(UserError, match="no format fits the fields idx, gpt_result, gpt_reason"):
        load(FileSource(str(shared_data / verdicts.pop()), format="auto"))


def test_real_answers_are_the_numbers(shared_data):
    path = shared_data / "gsm8k" / "train.jsonl"
    rows, _ = load(FileSource(str(path), format="gsm8k"))
    assert rows[0]["answer"] == "72"
    assert rows[0]["prompt"][0]["content"].startswith("Natalia sold clips to 48")
    for row, record in zip(rows, raw(path), strict=True):
        assert re.fullmatch(r"-?\d+", row["answer"])
        assert record["answer"].replace(",", "").endswith("#### " + row["answer"])
    bare, _ = load(FileSource(str(path), "demonstration", format="gsm8k", chat="bare", max_rows=3))
    assert [(r["prompt"], r["completion"]) for r in bare] == [
        (r["question"], r["answer"]) for r in raw(path)[:3]
    ]


def test_real_tool_calls(shared_data):
    path = shared_data / "llamafactory-demo" / "glaive_toolcall_en_demo.json"
    rows, _ = load(FileSource(str(path), format="sharegpt"))
    first = rows[0]["messages"]
    assert [m["role"] for m in first] == [
        *("user", "assistant", "user", "assistant", "tool", "assistant", "user", "assistant")
    ]
    (call,) = first[3]["tool_calls"]
    assert call["function"] == {
        "name": "search_recipes",
        "arguments": {"ingredients": ["chicken", "bell peppers", "rice"]},
    }
    assert rows[0]["tools"][0]["function"]["name"] == "search_recipes"
    roles = Counter(m["role"] for row in rows for m in row["messages"])
    assert roles == {"user": 746, "assistant": 746 + 211, "tool": 211}
    assert sum("tools" not in row for row in rows) == 109  # "[]" in the file
    # What is said is what the file says, in its order.
    for row, record in zip(rows, raw(path), strict=True):
        said = [t["value"] for t in record["conversations"] if t["from"] != "function_call"]
        assert [m["content"] for m in row["messages"] if "tool_calls" not in m] == said


def test_real_labels_and_pairs(shared_data):
    folder = shared_data / "llamafactory-demo"
    rows, _ = load(FileSource(str(folder / "kto_en_demo.json"), format="messages_binary"))
    assert Counter(row["label"] for row in rows) == {True: 150, False: 150}
    for row, record in zip(rows, raw(folder / "kto_en_demo.json"), strict=True):
        assert [*row["prompt"], *row["completion"]] == record["messages"]
        assert row["label"] == record["label"]
    rows, _ = load(FileSource(str(folder / "dpo_en_demo.json"), format="sharegpt_preference"))
    for row, record in zip(rows, raw(folder / "dpo_en_demo.json"), strict=True):
        assert [m["content"] for m in row["prompt"]] == [t["value"] for t in record["conversations"]]
        assert row["responses"] == [[says(record[which]["value"])] for which in ("chosen", "rejected")]
    assert sum(row["prompt"][0]["role"] == "system" for row in rows) == 80
    # The wrong format for this file keeps what it can, and says which would have been right.
    _, report = load(FileSource(str(folder / "dpo_en_demo.json"), format="sharegpt"))
    assert "format 'sharegpt_preference' would also use" in str(report)
    assert report.dropped == {"the assistant says nothing": 194}


def test_real_rankings_agree_with_the_choices(shared_data):
    path = shared_data / "fine-grained-qa-feedback" / "dev_feedback.json"
    rows, _ = load(FileSource(str(path), format="qa_feedback"))
    records = raw(path)
    # Item 1: 1=2, 1>3, 4>1, 2>3, 2=4, 4>3. Wins less losses: 0, 1, -3, 2.
    assert records[0]["preference"] == [0, 1, 2, 1, 0, 2]
    assert rows[0]["ranks"] == [3, 2, 4, 1]
    broken = set()
    for row, record in zip(rows, records, strict=True):
        assert [r[0]["content"] for r in row["responses"]] == [
            record[f"prediction {k}"] for k in (1, 2, 3, 4)
        ]
        for (i, j), choice in zip(PAIRS, record["preference"], strict=True):
            order = row["ranks"][i] - row["ranks"][j]
            assert choice == 0 or order * (1 if choice == 1 else -1) < 0  # no choice is turned round
            broken |= {id(row)} if choice == 0 and order else set()  # a tie that no ranking can keep
    assert len(broken) == 22
    assert sum(row["ranks"] == [1, 1, 1, 1] for row in rows) == 12


def test_real_votes(shared_data):
    path = shared_data / "pandalm-human" / "testset-v1.json"
    rows, _ = load(FileSource(str(path), format="pandalm"))
    each, _ = load(FileSource(str(path), format="pandalm_annotators"))
    assert rows[0]["ranks"] == [2, 1]
    assert rows[0]["responses"][1][0]["content"] == "If you have any questions, please let me know."
    assert Counter(row["labeler"] for row in each) == {f"annotator{k}": 939 for k in (1, 2, 3)}
    for n, row in enumerate(rows):
        votes = [tuple(each[3 * n + k]["ranks"]) for k in range(3)]
        assert votes.count(tuple(row["ranks"])) >= 2
        assert row["prompt"] == each[3 * n]["prompt"]


def test_real_judgements(shared_data):
    path = shared_data / "rubrics" / "mt_bench_eval.json"
    rows, _ = load(FileSource(str(path), format="prometheus"))
    for row, record in zip(rows, raw(path), strict=True):
        assert row["scores"] == [pytest.approx(sum(record["gpt4_score"]) / 3), 5.0]
        assert row["ranks"] == ([1, 1] if record["gpt4_score"] == [5, 5, 5] else [2, 1])
        assert [m["role"] for m in row["prompt"]] == ["user", "assistant", "user"]
        for text in (*(m["content"] for m in row["prompt"]), *(r[0]["content"] for r in row["responses"])):
            assert text in record["instruction"]
    assert rows[0]["responses"][0][0]["content"].startswith("Sure, here's a limerick")
    (criterion,) = rows[0]["criteria"]
    assert criterion.startswith("Does the response properly address the specific request")
    assert "Score 5: The response excellently addresses" in rows[0]["rubric"]
