import gzip
import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jrlhf.config import Source, UserError
from jrlhf.data.report import Report
from jrlhf.data.sources import (
    FileSource,
    HHSource,
    HubSource,
    TextFileSource,
    check_row,
    dialogue_text,
    in_test_split,
    load,
    read,
    split_dialogues,
    validate,
)


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


PAIR = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}
DEMONSTRATION = {"prompt": "p", "completion": "c"}
ASKS, SAYS = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TOOL = {"role": "tool", "content": "t"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


# --- rows that do not fit -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "bad", "message"),
    [
        ("preference", {**PAIR, "ranks": [1, 2, 3]}, "field 'ranks' has 3 entries for 2 responses"),
        ("preference", {**PAIR, "ranks": [0, 1]}, "1 is the best rank"),
        ("preference", {**PAIR, "ranks": [2, 3]}, "1 is the best rank"),
        ("preference", {**PAIR, "ranks": [1, 1.5]}, "'ranks' holds 1.5, expected ints"),
        ("preference", {**PAIR, "ranks": [True, 2]}, "'ranks' holds True"),
        ("preference", {**PAIR, "ranks": "12"}, "'ranks' must be a list, got str"),
        ("preference", {**PAIR, "responses": ["a"]}, "'responses' must be a list of at least 2"),
        ("preference", {**PAIR, "responses": ["a", None]}, r"'responses\[1\]' is NoneType, expected text"),
        ("preference", {**PAIR, "scores": [1.0]}, "'scores' has 1 entries for 2"),
        ("preference", {**PAIR, "scores": [1.0, float("nan")]}, "'scores' holds nan, expected floats"),
        ("preference", {**PAIR, "criteria": {"kind": [1, "x"]}}, "'criteria.kind' holds 'x'"),
        ("preference", {**PAIR, "criteria": [1, 2]}, "'criteria' must map"),
        ("preference", {**PAIR, "labeler": 7}, "'labeler' is int, expected text"),
        ("preference", {"prompt": "p", "chosen": "a"}, "no field 'rejected'"),
        ("demonstration", {"promt": "p", "completion": "c"}, "no field 'prompt'. Did you mean 'promt'"),
        ("demonstration", {"prompt": 3, "completion": "c"}, "'prompt' is int, expected text"),
        ("demonstration", {"prompt": "\ud800", "completion": "c"}, "'prompt' holds half of a character"),
        (
            "demonstration",
            {"prompt": [{"role": "usr", "content": "x"}], "completion": "c"},
            "Did you mean 'user'",
        ),
        ("demonstration", {"prompt": [{"role": "user"}], "completion": "c"}, "a message needs 'role' and"),
        ("demonstration", {"prompt": [], "completion": "c"}, "there are no messages"),
        (
            "demonstration",
            {"prompt": [SAYS], "completion": "c"},
            "'prompt': the dialogue begins with the ass",
        ),
        (
            "demonstration",
            {"prompt": [ASKS, SAYS], "completion": "c"},
            "'prompt': a prompt ends with the ass",
        ),
        (
            "demonstration",
            {"prompt": "p", "completion": [ASKS]},
            "'completion': an answer begins with the user",
        ),
        (
            "demonstration",
            {"prompt": "p", "completion": [SAYS, ASKS]},
            "'completion': .* message of the user",
        ),
        (
            "demonstration",
            {"prompt": "p", "completion": [SAYS, TOOL]},
            "'completion': an answer ends with the t",
        ),
        ("demonstration", {"messages": [ASKS]}, "'messages': the assistant says nothing"),
        ("demonstration", {"messages": "x"}, "'messages' is str, expected text or messages"),
        ("demonstration", {"messages": [ASKS, SAYS], "completion": "c"}, "has 'messages' and 'completion'"),
        (
            "demonstration",
            {"messages": [ASKS, {"role": "assistant", "content": 3}]},
            "'content' is int, not text",
        ),
        ("demonstration", {"messages": [ASKS, SAYS], "tools": "x"}, "'tools' is not a list of functions"),
        (
            "preference",
            {**PAIR, "responses": ["a", [ASKS]]},
            r"responses\[1\]': an answer begins with the user",
        ),
        (
            "preference",
            {"chosen": [ASKS, SAYS], "rejected": [ASKS, SAYS], "prompt": "p"},
            "answer begins with the user. format='preference' would fit",
        ),
        ("binary", {**DEMONSTRATION, "label": 1}, "field 'label' is 1, expected true or false"),
        ("binary", DEMONSTRATION, "no field 'label'"),
        ("text", {"texts": "x"}, "no field 'text'. Did you mean 'texts'"),
        ("prompt", {"prompt": "p", "answer": 4}, "'answer' is int"),
        ("prompt", ["p"], "expected an object with fields, got list"),
        ("prompt", '{"prompt": "p"', "not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, kind, bad, message):
    good = {"text": "t", **DEMONSTRATION, **PAIR, "label": True}
    path = write_jsonl(tmp_path / "rows.jsonl", [good, "", bad, good])  # the blank line counts as a line
    with pytest.raises(UserError, match=message) as caught:
        load(FileSource(path, kind))
    assert str(caught.value).startswith(f"{path} line 3: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: no rows"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl: not UTF-8"),
        ("a.json", b'[\n{"text": "x"},\n{"text" 1}]', "a.json line 3: not JSON"),
        ("a.json", b'{"text": "x"}\n{"text": "y"}', "line 2: not JSON .*One object per line is .jsonl"),
        ("a.json", b'{"text": "x"}', "expected a list of objects, got dict"),
        ("a.json", b'[{"text": "x"}, {}]', "a.json item 2: no field 'text'"),
        ("a.csv", b"text,more\nx,1\ny\n", "a.csv line 3: the number of cells differs"),
        ("a.csv", b'text\n"x\n', "a.csv line 2: not CSV"),
        ("a.parquet", b"text", "a.parquet: not Parquet"),
        ("a.jsonl.gz", b"text", "a.jsonl.gz: Not a gzipped file"),
        ("a.jsonn", b"", "unknown file type. Did you mean '.json"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(FileSource(str(tmp_path / name), "text"))


def test_mistakes_in_a_source_show_before_anything_is_read(tmp_path):
    for build, message in [
        (lambda: FileSource("x.jsonl", "demonstratoin"), "Did you mean 'demonstration'"),
        (lambda: FileSource("x.jsonl", "demonstration", {"promt": "q"}), "Did you mean 'prompt'"),
        (lambda: FileSource("x.jsonl", "text", max_rows=0), "max_rows is 0"),
        (lambda: TextFileSource("x.txt", separator=""), "separator is empty"),
        (lambda: HubSource("x", "pairs"), "unknown kind 'pairs'"),
        (lambda: FileSource("x.jsonl"), r"name the kind of rows \(text, .*, or a format \(auto, text, "),
        (lambda: FileSource("x.jsonl", format="alpacca"), "unknown format 'alpacca'. Did you mean 'alpaca'"),
        (
            lambda: FileSource("x.jsonl", "preference", format="alpaca"),
            "has no 'preference' rows. It has: demon",
        ),
        (lambda: FileSource("x.jsonl", "text", chat="plain"), "unknown chat 'plain'"),
        (
            lambda: FileSource("x", format="alpaca", columns={"inputs": "a"}),
            "of format 'alpaca'.* mean 'input'",
        ),
        (lambda: HHSource("x", chat="bare"), "unknown chat 'bare'"),
        (lambda: HHSource("x", split="valid"), "unknown split 'valid'"),
        (lambda: HHSource("x", test_fraction=5), "test_fraction is 5"),
        (lambda: HHSource("x", kind="text"), "no 'text' rows"),
    ]:
        with pytest.raises(UserError, match=message):
            build()
    write_jsonl(tmp_path / "pairs.jsonl", [PAIR])
    with pytest.raises(UserError, match=r"pair.jsonl: no such file. Did you mean 'pairs.jsonl'"):
        load(FileSource(str(tmp_path / "pair.jsonl"), "preference"))


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("demonstration", {"prompt": [ASKS, SAYS, ASKS], "completion": [CALL, TOOL, SAYS]}),
        ("demonstration", {"prompt": [ASKS], "completion": "a"}),
        (
            "demonstration",
            {"messages": [{"role": "system", "content": "s"}, ASKS, CALL, TOOL, SAYS], "tools": []},
        ),
        ("preference", {**PAIR, "prompt": [ASKS], "responses": [[SAYS], "b"]}),
        ("binary", {"prompt": [ASKS, CALL, TOOL], "completion": [SAYS], "label": False}),
        ("prompt", {"prompt": [ASKS], "answer": "7", "tools": [{"type": "function"}]}),
    ],
)
def test_messages_may_stand_where_text_does(kind, row):
    assert check_row(row, kind, "here") is row


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "critic", "content": "x"}, r"'messages\[1\]': unknown role 'critic'"),
        ({"role": "assistant"}, r"'messages\[1\]': a message needs 'role' and 'content'"),
        ({"role": "assistant", "content": None}, r"'messages\[1\].content' is NoneType, expected text"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "'messages.*content' is NoneType"),
        ("hello", r"'messages\[1\]': a message needs"),
    ],
)
def test_a_bad_message_is_named(message, fault):
    with pytest.raises(UserError, match=f"^pairs row 3: field {fault}"):
        check_row({"messages": [ASKS, message]}, "demonstration", "pairs row 3")


def test_tools_are_objects():
    for tools in ("f", ["f"]):
        with pytest.raises(UserError, match=r"^here: field 'tools' must be a list of objects"):
            check_row({"prompt": "p", "tools": tools}, "prompt", "here")


def test_validate_passes_rows_on_and_names_the_first_bad_one():
    assert list(validate([PAIR, PAIR], "preference", "world")) == [PAIR, PAIR]
    with pytest.raises(UserError, match="world row 2: no field 'ranks'"):
        list(validate([PAIR, {"prompt": "p", "responses": ["a", "b"]}], "preference", "world"))
    with pytest.raises(UserError, match="world: no rows"):
        list(validate([], "text", "world"))


# --- formats --------------------------------------------------------------------------------------------


def test_every_file_format_gives_the_same_rows(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": 'a "quoted",\nline'} for i in range(5)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    cells = [f'{r["prompt"]},"{r["completion"].replace(chr(34), chr(34) * 2)}"' for r in rows]
    (tmp_path / "a.csv").write_text("\n".join(["prompt,completion", *cells]))
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.csv"):
        source = FileSource(str(tmp_path / name), "demonstration")
        found, report = load(source)
        assert found == rows
        assert (report.read, report.kept) == (5, 5)
        assert list(source.rows()) == rows  # the same again
        assert list(read(source, Report(), start=3)) == rows[3:]
        assert source.files() == (str(tmp_path / name),)
    assert load(FileSource(str(tmp_path / "a.jsonl"), "demonstration", max_rows=2))[0] == rows[:2]


def test_columns_reach_into_nested_records_and_pairs_become_ranks(tmp_path):
    record = {
        "q.a": "dotted",
        "turns": [{"value": "hi"}, {"value": "there"}],
        "good": "A",
        "bad": "B",
        "id": 7,
    }
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    columns = {"prompt": "turns.-1.value", "chosen": "good", "rejected": "bad"}
    (row,) = load(FileSource(path, "preference", columns))[0]
    assert (row["prompt"], row["responses"], row["ranks"], row["id"]) == ("there", ["A", "B"], [1, 2], 7)
    assert load(FileSource(path, "text", {"text": "q.a"}))[0][0]["text"] == "dotted"
    for column, message in [
        ("turns.2.value", "a list of 2 has no entry 2"),
        ("turns.0.valeu", "no column 'turns.0.valeu'. Did you mean 'value'"),
        ("turn", "Did you mean 'turns'"),
    ]:
        with pytest.raises(UserError, match=f"a.jsonl line 1: .*{message}"):
            load(FileSource(path, "text", {"text": column}))


def test_chat_messages_stay_or_become_text(tmp_path):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert dialogue_text(messages) == "\n\nSystem: Be kind.\n\nHuman: Hi"
    answer = {"role": "assistant", "content": "Hello"}
    rows = [{"prompt": messages, "completion": [answer], "chosen": answer, "rejected": "x"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    ((demonstration,), _) = load(FileSource(path, "demonstration"))
    assert (demonstration["prompt"], demonstration["completion"]) == (messages, [answer])
    preference = load(FileSource(path, "preference"))[0][0]
    assert preference["responses"] == [[answer], [{"role": "assistant", "content": "x"}]]
    (demonstration,), _ = load(FileSource(path, "demonstration", chat="dialogue"))
    assert demonstration["prompt"] == "\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant:"
    assert demonstration["completion"] == " Hello"
    assert load(FileSource(path, "preference", chat="dialogue"))[0][0]["responses"] == [" Hello", " x"]
    (demonstration,), _ = load(FileSource(path, "demonstration", chat="bare"))
    assert (demonstration["prompt"], demonstration["completion"]) == ("Be kind.\n\nHi", "Hello")
    (text,), _ = load(FileSource(path, "text", {"text": "prompt"}, chat="dialogue"))
    assert text["text"] == dialogue_text(messages)


def test_text_file_is_split_across_chunk_borders(tmp_path):
    texts = [f"story {i} " + "x" * 700 for i in range(4000)]  # 2.8 MB, several chunks
    (tmp_path / "a.txt").write_text("<|endoftext|>\n".join([*texts[:10], " \n", *texts[10:], ""]))
    rows, report = load(TextFileSource(str(tmp_path / "a.txt")))
    assert [row["text"] for row in rows] == texts
    assert report.dropped == {"empty text": 2}
    assert str(report).endswith("a.txt: 4000 of 4002 rows kept; dropped 2: empty text")


def test_any_source_can_be_loaded():
    @dataclass(frozen=True)
    class Count(Source):
        n: int

        def rows(self):
            yield from ({"text": str(i)} for i in range(self.n))

    rows, report = load(Count(3))
    assert ([row["text"] for row in rows], report.kept, report.where) == (["0", "1", "2"], 3, "Count")
    assert list(read(Count(3), Report(), start=2)) == [{"text": "2"}]
    with pytest.raises(UserError, match="Count: no rows"):
        load(Count(0))


# --- hub ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_source_through_a_local_builder(tmp_path, monkeypatch, streaming):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": f"p{i}", "a": "c"} for i in range(6)])
    columns = {"prompt": "q", "completion": "a"}
    source = HubSource("json", "demonstration", columns=columns, data_files=(path,), streaming=streaming)
    rows, report = load(source)
    assert [row["prompt"] for row in rows] == [f"p{i}" for i in range(6)]
    assert (report.kept, report.where) == (6, "json[train]")
    assert list(read(source, Report(), start=4)) == rows[4:]
    assert source.files() == (path,)
    few = HubSource(
        "json", "prompt", columns={"prompt": "q"}, data_files=(path,), streaming=streaming, max_rows=2
    )
    assert len(load(few)[0]) == 2
    assert [row["prompt"] for row in read(few, Report(), start=1)] == ["p1"]
    bad = HubSource("json", "prompt", columns={"prompt": "qq"}, data_files=(path,), streaming=streaming)
    with pytest.raises(UserError, match=r"json\[train\] row 1: no column 'qq'"):
        load(bad)
    with pytest.raises(UserError, match=r"json\[tain\]: cannot load .*'train'"):
        load(HubSource("json", "prompt", split="tain", data_files=(path,), streaming=streaming))


def test_an_unreachable_hub_is_a_user_error(tmp_path):
    program = """
from jrlhf.config import UserError
from jrlhf.data.sources import HHSource, HubSource, load
for source in HubSource("nobody/nothing", "text"), HHSource("nobody/nothing"):
    try:
        load(source)
    except UserError as error:
        print(str(error).splitlines()[0])
"""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=offline, capture_output=True, text=True, check=True
    )
    lines = run.stdout.splitlines()
    assert lines[0].startswith("nobody/nothing[train]: cannot load this dataset (")
    assert lines[1].startswith("nobody/nothing: cannot load this dataset (")


def test_importing_the_readers_starts_neither_jax_nor_datasets():
    heavy = "{'jax', 'datasets', 'pyarrow'}"
    program = (
        f"import sys, jrlhf.data.sources, jrlhf.data.tokenizer; print(sorted({heavy} & {{*sys.modules}}))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# --- HH -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "why"),
    [
        (
            "\n\nHuman: q\n\nAssistant: a",
            "\n\nHuman: r\n\nAssistant: b",
            "the dialogues differ before the last answer",
        ),
        ("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: ", "an answer is empty"),
        ("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: a", "the answers are equal"),
        (
            "\n\nHuman: q\n\nAssistant: a",
            "\n\nHuman: q\n\nAssistant: a\n\nHuman: b",
            "a dialogue ends with the human",
        ),
        ("\n\nHuman: q\n\nAssistant: a", "q", "not a dialogue"),
        ("\n\nHuman: q\n\nAssistant: a", None, "not text"),
    ],
)
def test_malformed_dialogues_have_a_reason(chosen, rejected, why):
    assert split_dialogues(chosen, rejected) == (None, why)


def test_hh_rows_are_dropped_with_counts_and_a_wrong_file_is_an_error(tmp_path):
    good = [
        {"chosen": f"\n\nHuman: q{i}\n\nAssistant: a", "rejected": f"\n\nHuman: q{i}\n\nAssistant: b"}
        for i in range(4)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [*good, {"chosen": "x", "rejected": "y"}, ["x"]])
    rows, report = load(HHSource(path, test_fraction=0.0))
    assert len(rows) == 4
    assert report.dropped == {"not a dialogue": 1, "not text": 1}
    with pytest.raises(UserError, match=r"No row is left\. .*dropped 4: in the other split"):
        load(HHSource(path, split="test", test_fraction=0.0))
    with pytest.raises(UserError, match=r"a.jsonl line 1: no column 'chosen'. Did you mean 'chosn'"):
        load(HHSource(write_jsonl(tmp_path / "a.jsonl", [{"chosn": "x", "rejected": "y"}])))


def test_hh_real_pairs(shared_data):
    path = str(shared_data / "hh-harmless-base" / "pairs.jsonl")
    originals = {(r["chosen"], r["rejected"]) for r in map(json.loads, Path(path).read_text().splitlines())}
    train, train_report = load(HHSource(path, "train", test_fraction=0.2))
    test, test_report = load(HHSource(path, "test", test_fraction=0.2))
    assert train_report.read == test_report.read == 1800
    malformed = {"an answer is empty": 4, "the dialogues differ before the last answer": 2}
    for report, kept, other in [(train_report, train, test), (test_report, test, train)]:
        assert report.dropped == Counter(malformed) + Counter({"in the other split": len(other)})
        assert report.kept == len(kept)
    assert len(train) + len(test) == 1794
    assert 0.15 < len(test) / 1794 < 0.25
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    for row in train + test:  # prompt + answer is the dialogue, unchanged
        assert tuple(row["prompt"] + answer for answer in row["responses"]) in originals
        assert row["prompt"].endswith("\n\nAssistant:")
    again = HHSource(path, "train", test_fraction=0.2, max_rows=7)
    assert load(again)[0] == train[:7]
    assert load(HHSource(path, "train", 0.2, seed=1))[0] != train
    assert load(HHSource(path, "train", 0.2, kind="prompt"))[0][0] == {"prompt": train[0]["prompt"]}
    demonstration = load(HHSource(path, "train", 0.2, kind="demonstration"))[0][0]
    assert demonstration == {"prompt": train[0]["prompt"], "completion": train[0]["responses"][0]}


def test_hh_in_messages_is_the_same_dialogue(shared_data):
    path = str(shared_data / "hh-harmless-base" / "pairs.jsonl")
    for kind in ("preference", "demonstration", "prompt"):
        texts, chats = (load(HHSource(path, kind=kind, chat=chat))[0] for chat in ("dialogue", "messages"))
        for text, chat in zip(texts, chats, strict=True):
            check_row(chat, kind, "row")
            assert dialogue_text(chat["prompt"]) + "\n\nAssistant:" == text["prompt"]
            assert chat["prompt"][0]["role"] == "user"
            if kind == "preference":
                spoken = [dialogue_text(a).removeprefix("\n\nAssistant:") for a in chat["responses"]]
                assert spoken == text["responses"]
    again, _ = load(FileSource(path, format="hh", chat="dialogue"))  # the same, without a split
    assert all(row in again for row in load(HHSource(path, max_rows=20))[0])


def test_the_split_is_a_function_of_prompt_and_seed():
    prompts = [f"prompt {i}" for i in range(2000)]
    chosen = [in_test_split(p, 0.3, 0) for p in prompts]
    assert 0.27 < sum(chosen) / 2000 < 0.33
    assert chosen != [in_test_split(p, 0.3, 1) for p in prompts]
    wider = [in_test_split(p, 0.6, 0) for p in prompts]
    assert all(w for c, w in zip(chosen, wider, strict=True) if c)  # a larger test split contains the smaller


# --- other real files -----------------------------------------------------------------------------------


def test_tinystories(shared_data):
    rows, report = load(TextFileSource(str(shared_data / "tinystories" / "tinystories_sample.txt")))
    assert len(rows) == report.read == 2317
    assert rows[0]["text"].startswith("One day, a little girl named Lily found a needle")
    assert not any("<|endoftext|>" in row["text"] for row in rows)


def test_gsm8k_columns(shared_data):
    path = str(shared_data / "gsm8k" / "train.jsonl")
    rows, report = load(FileSource(path, "demonstration", {"prompt": "question", "completion": "answer"}))
    assert len(rows) == report.kept == 7473
    assert rows[0]["prompt"].startswith("Natalia sold clips")
    assert rows[0]["completion"].endswith("#### 72")
    prompts, _ = load(FileSource(path, "prompt", {"prompt": "question"}, max_rows=3))
    assert [p["answer"] for p in prompts] == [r["completion"] for r in rows[:3]]
    with pytest.raises(UserError, match=r"train.jsonl line 1: no column 'quesion'. Did you mean 'question'"):
        load(FileSource(path, "prompt", {"prompt": "quesion"}))


def test_llamafactory_sharegpt_pairs(shared_data):
    path = str(shared_data / "llamafactory-demo" / "dpo_en_demo.json")
    records = json.loads(Path(path).read_text())
    rows, _ = load(FileSource(path, "preference", {"prompt": "conversations"}, chat="dialogue"))
    assert len(rows) == 300
    for row, record in zip(rows, records, strict=True):
        assert row["responses"] == [" " + record["chosen"]["value"], " " + record["rejected"]["value"]]
        assert row["ranks"] == [1, 2]
        assert row["prompt"].endswith(f"Human: {record['conversations'][-1]['value']}\n\nAssistant:")
        humans = sum(turn["from"] == "human" for turn in record["conversations"])
        assert row["prompt"].count("\n\nHuman:") >= humans
