"""Where rows come from, and what a row must look like.

A source is a frozen dataclass. Iterating it gives rows of one kind (`SCHEMAS`), always the same rows in the
same order; a row that does not fit stops the run with the file and line. `load` also gives the `Report`.
"""

import csv
import gzip
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from jrlhf.config import Source, UserError, did_you_mean
from jrlhf.data.report import Report

# kind -> the fields that a row must have (jrlhf.types holds the same as TypedDicts)
SCHEMAS: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "demonstration": ("prompt", "completion"),
    "preference": ("prompt", "responses", "ranks"),
    "prompt": ("prompt",),
}
_OPTIONAL = {"preference": ("scores", "criteria", "labeler", "chosen", "rejected"), "prompt": ("answer",)}
_TEXT_FIELDS = ("text", "prompt", "completion", "answer", "labeler")
_SPEAKERS = {
    "user": "Human",
    "human": "Human",
    "assistant": "Assistant",
    "gpt": "Assistant",
    "system": "System",
}


# --- the schema -------------------------------------------------------------------------------------------


def check_row(row: Any, kind: str, place: str) -> dict:
    """Return `row` if it is a row of `kind`, else raise a UserError that starts with `place`."""
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object with fields, got {type(row).__name__}.")
    for name in SCHEMAS[kind]:
        _require(row, name, place)
    for name in _TEXT_FIELDS:
        if name in row and (name in SCHEMAS[kind] or name in _OPTIONAL.get(kind, ())):
            _check_text(row[name], name, place)
    if kind == "preference":
        _check_preference(row, place)
    return row


def validate(rows: Iterable[dict], kind: str, where: str) -> Iterator[dict]:
    """Pass `rows` on, each checked; UserError on the first bad one, or when there is none at all."""
    n = 0
    for n, row in enumerate(rows, 1):
        yield check_row(row, kind, f"{where} row {n}")
    if n == 0:
        raise UserError(f"{where}: no rows.")


def _require(row: dict, name: str, place: str) -> Any:
    if name not in row:
        raise UserError(f"{place}: no field {name!r}.{did_you_mean(name, row)} `columns` maps fields.")
    return row[name]


def _check_text(value: Any, name: str, place: str) -> None:
    if not isinstance(value, str):
        raise UserError(f"{place}: field {name!r} is {type(value).__name__}, expected text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: field {name!r} holds half of a character ({error.reason}).") from error


def _check_preference(row: dict, place: str) -> None:
    responses, ranks = row["responses"], row["ranks"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise UserError(f"{place}: field 'responses' must be a list of at least 2 texts.")
    for i, response in enumerate(responses):
        _check_text(response, f"responses[{i}]", place)
    _check_numbers(ranks, "ranks", len(responses), place, (int,))
    if min(ranks) != 1:
        raise UserError(f"{place}: field 'ranks' is {ranks}; 1 is the best rank and someone must have it.")
    criteria = row.get("criteria", {})
    if not isinstance(criteria, dict):
        raise UserError(f"{place}: field 'criteria' must map a name to one number per response.")
    scores = {"scores": row["scores"]} if "scores" in row else {}
    for name, values in {**scores, **{f"criteria.{k}": v for k, v in criteria.items()}}.items():
        _check_numbers(values, name, len(responses), place, (int, float))


def _check_numbers(values: Any, name: str, count: int, place: str, types: tuple[Any, ...]) -> None:
    if not isinstance(values, list):
        raise UserError(f"{place}: field {name!r} must be a list, got {type(values).__name__}.")
    if len(values) != count:
        raise UserError(f"{place}: field {name!r} has {len(values)} entries for {count} responses.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, types) or not math.isfinite(value):
            raise UserError(f"{place}: field {name!r} holds {value!r}, expected {types[-1].__name__}s.")


# --- public formats onto the schema -----------------------------------------------------------------------


def to_row(record: Any, kind: str, columns: Mapping[str, str], place: str) -> dict:
    """Turn a foreign record into a row of `kind`; its other fields stay.

    `columns` maps our field to theirs; `a.b.0` reaches into objects and lists. `chosen` and `rejected`
    become `responses` and `ranks`. A list of chat messages (`role`/`content` or `from`/`value`) becomes text.
    """
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected an object with fields, got {type(record).__name__}.")
    row = dict(record)
    for ours, theirs in columns.items():
        row[ours] = _pick(record, theirs, place)
    if kind == "preference" and "responses" not in row and ("chosen" in row or "rejected" in row):
        pair = [_require(row, "chosen", place), _require(row, "rejected", place)]
        row["responses"], row["ranks"] = [_answer_text(a, place) for a in pair], [1, 2]
        del row["chosen"], row["rejected"]
    if isinstance(row.get("prompt"), list):
        row["prompt"] = dialogue_text(row["prompt"], place) + "\n\nAssistant:"
    if isinstance(row.get("text"), list):
        row["text"] = dialogue_text(row["text"], place)
    if "completion" in row:
        row["completion"] = _answer_text(row["completion"], place)
    return check_row(row, kind, place)


def dialogue_text(messages: list[dict], place: str = "messages") -> str:
    """Chat messages in the plain form of Anthropic's HH data: `\\n\\nHuman: ...\\n\\nAssistant: ...`."""
    return "".join(f"\n\n{speaker}:{text}" for speaker, text in (_message(m, place) for m in messages))


def _answer_text(answer: Any, place: str) -> Any:
    """An answer given as one message (or a list of one) as the text that follows `Assistant:`."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    return _message(answer, place)[1] if isinstance(answer, dict) else answer


def _message(message: Any, place: str) -> tuple[str, str]:
    role_key, text_key = (
        ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
    )
    if not isinstance(message, dict) or not isinstance(message.get(text_key), str):
        raise UserError(f"{place}: a message needs 'role' and 'content' (or 'from' and 'value'), both text.")
    role = message.get(role_key)
    if role not in _SPEAKERS:
        raise UserError(f"{place}: unknown role {role!r}.{did_you_mean(str(role), _SPEAKERS)}")
    return _SPEAKERS[role], " " + message[text_key]


def _pick(record: dict, path: str, place: str) -> Any:
    if path in record:  # a field whose own name holds a dot
        return record[path]
    value: Any = record
    for key in path.split("."):
        if isinstance(value, list) and key.lstrip("-").isdigit():
            if not -len(value) <= int(key) < len(value):
                raise UserError(f"{place}: column {path!r}: a list of {len(value)} has no entry {key}.")
            value = value[int(key)]
        elif isinstance(value, dict) and key in value:
            value = value[key]
        else:
            known = value if isinstance(value, dict) else ()
            raise UserError(f"{place}: no column {path!r}.{did_you_mean(key, known)}")
    return value


# --- reading files ----------------------------------------------------------------------------------------

Records = Iterator[tuple[str, Any]]  # (where it stands, the record)


def _open(path: str) -> Any:
    return (
        gzip.open(path, "rt", encoding="utf-8-sig")
        if path.endswith(".gz")
        else open(path, encoding="utf-8-sig")
    )


def _read_jsonl(path: str) -> Records:
    with _open(path) as lines:
        for n, line in enumerate(lines, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{path} line {n}: not JSON ({error.msg} at column {error.colno})."
                    ) from error
                yield f"{path} line {n}", record


def _read_json(path: str) -> Records:
    with _open(path) as file:
        try:
            records = json.load(file)
        except json.JSONDecodeError as error:
            hint = " One object per line is .jsonl." if error.msg == "Extra data" else ""
            raise UserError(f"{path} line {error.lineno}: not JSON ({error.msg}).{hint}") from error
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a list of objects, got {type(records).__name__}.")
    yield from ((f"{path} item {n}", record) for n, record in enumerate(records, 1))


def _read_csv(path: str) -> Records:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for record in reader:
                place = f"{path} line {reader.line_num}"
                if None in record or None in record.values():
                    raise UserError(f"{place}: the number of cells differs from the header's.")
                yield place, record
        except csv.Error as error:
            raise UserError(f"{path} line {reader.reader.line_num}: not CSV ({error}).") from error


def _read_parquet(path: str) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            n = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    n += 1
                    yield f"{path} row {n}", record
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not Parquet ({error}).") from error


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def _suffix(path: str) -> str:
    return Path(path.removesuffix(".gz")).suffix


def _records(path: str) -> Records:
    if _suffix(path) not in _READERS:
        raise UserError(f"{path}: unknown file type.{did_you_mean(_suffix(path), _READERS)}")
    _check_exists(path)
    try:
        yield from _READERS[_suffix(path)](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except gzip.BadGzipFile as error:
        raise UserError(f"{path}: {error}.") from error


def _check_exists(path: str) -> None:
    if not Path(path).is_file():
        folder = Path(path).parent
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        raise UserError(f"{path}: no such file.{did_you_mean(Path(path).name, names)}")


def _open_hub(place: str, path: str, **options: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, **{k: v for k, v in options.items() if v})
    except Exception as error:  # network, spelling, split, access: many types, all for the user to mend
        raise UserError(
            f"{place}: cannot load this dataset ({type(error).__name__}: {error}). Check the name, split and "
            "network, or download it and use FileSource."
        ) from error


# --- sources ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSource(Source):
    """A source that counts. Subclasses define `read`."""

    def read(self, report: Report, start: int = 0) -> Iterator[dict]:
        """Yield the rows after the first `start` (how a stream resumes) and count them in `report`."""
        raise TypeError(f"{type(self).__name__} does not define read()")

    def rows(self) -> Iterator[dict]:
        return self.read(Report())


def read(source: Source, report: Report, start: int = 0) -> Iterator[dict]:
    """Rows of any source after the first `start`, counted in `report`; UserError when there is none."""
    if isinstance(source, DataSource):
        return source.read(report, start)
    return _count(islice(source.rows(), start, None), report, type(source).__name__, start)


def load(source: Source) -> tuple[list[dict], Report]:
    """All rows of a source, and what became of the rest; the caller logs the report."""
    report = Report()
    return list(read(source, report)), report


def _count(rows: Iterable[dict], report: Report, where: str, start: int) -> Iterator[dict]:
    """Pass rows on, counted; a dataset with none is an error (but not the end of one that was resumed)."""
    report.where = where
    for row in rows:
        report.kept += 1
        yield row
    if not report.kept and not start:
        raise UserError(f"{where}: no rows." if not report.read else f"No row is left. {report}.")


def _check_kind(kind: str, columns: Mapping[str, str], where: str) -> None:
    if kind not in SCHEMAS:
        raise UserError(f"{where}: unknown kind {kind!r}.{did_you_mean(kind, SCHEMAS)}")
    fields = (*SCHEMAS[kind], *_OPTIONAL.get(kind, ()))
    for name in columns:
        if name not in fields and kind != "prompt":  # a reward may want any further field of a prompt row
            raise UserError(
                f"{where}: columns: {name!r} is no field of a {kind}.{did_you_mean(name, fields)}"
            )


def _check_max_rows(max_rows: int | None, where: str) -> None:
    if max_rows is not None and max_rows < 1:
        raise UserError(f"{where}: max_rows is {max_rows}; give a positive number, or None for all rows.")


@dataclass(frozen=True)
class FileSource(DataSource):
    """Rows of one kind in a local .jsonl (or .jsonl.gz), .json, .csv or .parquet file.

    `columns` maps our fields onto the file's, e.g. `{"prompt": "question", "completion": "answer"}`.
    """

    path: str
    kind: str
    columns: dict[str, str] = field(default_factory=dict)
    max_rows: int | None = None

    def __post_init__(self) -> None:
        _check_kind(self.kind, self.columns, self.path)
        _check_max_rows(self.max_rows, self.path)

    def read(self, report: Report, start: int = 0) -> Iterator[dict]:
        rows = (to_row(record, self.kind, self.columns, place) for place, record in _records(self.path))
        return _count(islice(rows, start, self.max_rows), report, self.path, start)

    def files(self) -> tuple[str, ...]:
        return (self.path,)


@dataclass(frozen=True)
class TextFileSource(DataSource):
    """Texts in one file, divided by `separator`. Outer whitespace is stripped, empty pieces dropped."""

    path: str
    separator: str = "<|endoftext|>"
    max_rows: int | None = None

    def __post_init__(self) -> None:
        if not self.separator:
            raise UserError(f"{self.path}: separator is empty.")
        _check_max_rows(self.max_rows, self.path)

    def read(self, report: Report, start: int = 0) -> Iterator[dict]:
        return _count(islice(self._texts(report), start, self.max_rows), report, self.path, start)

    def _texts(self, report: Report) -> Iterator[dict]:
        _check_exists(self.path)
        try:
            with open(self.path, encoding="utf-8-sig") as file:
                rest = ""
                while chunk := file.read(1 << 20):
                    *texts, rest = (rest + chunk).split(self.separator)
                    yield from self._kept(texts, report)
                yield from self._kept([rest], report)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path}: not UTF-8 text ({error.reason}).") from error

    def _kept(self, texts: list[str], report: Report) -> Iterator[dict]:
        for text in texts:
            if text.strip():
                yield {"text": text.strip()}
            else:
                report.dropped["empty text"] += 1

    def files(self) -> tuple[str, ...]:
        return (self.path,)


@dataclass(frozen=True)
class HubSource(DataSource):
    """Rows of one kind from the Hugging Face hub, through `datasets.load_dataset`.

    `name` may also be one of its builders ("json", "parquet") with `data_files`. Pin `revision` for a run
    that others should repeat. With `streaming` nothing is downloaded ahead.
    """

    name: str
    kind: str
    split: str = "train"
    config_name: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    data_files: tuple[str, ...] = ()
    revision: str | None = None
    streaming: bool = False
    max_rows: int | None = None

    def __post_init__(self) -> None:
        _check_kind(self.kind, self.columns, self.name)
        _check_max_rows(self.max_rows, self.name)

    def read(self, report: Report, start: int = 0) -> Iterator[dict]:
        place = f"{self.name}[{self.split}]"
        dataset = _open_hub(
            place,
            self.name,
            name=self.config_name,
            split=self.split,
            data_files=list(self.data_files),
            revision=self.revision,
            streaming=self.streaming,
        )
        # `skip` avoids reading what it can, so resuming far into a stream is cheap.
        rows = (
            to_row(record, self.kind, self.columns, f"{place} row {n}")
            for n, record in enumerate(dataset.skip(start), start + 1)
        )
        stop = None if self.max_rows is None else max(self.max_rows - start, 0)
        return _count(islice(rows, stop), report, place, start)

    def files(self) -> tuple[str, ...]:
        return tuple(f for f in self.data_files if Path(f).is_file())


@dataclass(frozen=True)
class HHSource(DataSource):
    """Anthropic's HH preference dialogues (Bai et al. 2022, arXiv:2204.05862), `chosen` and `rejected`.

    `path` is a local file or a hub name ("Anthropic/hh-rlhf", with `data_dir` for a subset). The prompt is
    what both dialogues share, up to and with the last `\\n\\nAssistant:`; prompt + answer is the dialogue
    unchanged. A row where that fails is dropped and counted. `kind` "demonstration" gives the chosen answer,
    "prompt" the prompts alone. `split` is by a hash of the prompt and `seed`, so no prompt is in both.
    """

    path: str
    split: str = "train"
    test_fraction: float = 0.1
    kind: str = "preference"
    data_dir: str | None = None
    revision: str | None = None
    streaming: bool = False
    max_rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in ("train", "test"):
            raise UserError(f"{self.path}: unknown split {self.split!r}; there are 'train' and 'test'.")
        if self.kind not in ("preference", "demonstration", "prompt"):
            raise UserError(f"{self.path}: HH data has no {self.kind!r} rows.")
        if not 0 <= self.test_fraction <= 1:
            raise UserError(f"{self.path}: test_fraction is {self.test_fraction}, expected 0 to 1.")
        _check_max_rows(self.max_rows, self.path)

    def read(self, report: Report, start: int = 0) -> Iterator[dict]:
        rows = islice(self._pairs(report), start, self.max_rows)
        return _count(rows, report, f"{self.path}[{self.split}]", start)

    def _pairs(self, report: Report) -> Iterator[dict]:
        for place, record in self._raw():
            chosen = _pick(record, "chosen", place) if isinstance(record, dict) else None
            rejected = _pick(record, "rejected", place) if isinstance(record, dict) else None
            pair, why = split_dialogues(chosen, rejected)
            if pair is None:
                report.dropped[why] += 1
            elif in_test_split(pair["prompt"], self.test_fraction, self.seed) != (self.split == "test"):
                report.dropped["in the other split"] += 1
            elif self.kind == "demonstration":
                yield {"prompt": pair["prompt"], "completion": pair["responses"][0]}
            else:
                yield pair if self.kind == "preference" else {"prompt": pair["prompt"]}

    def _raw(self) -> Records:
        if _suffix(self.path) in _READERS:
            return _records(self.path)
        options = {"data_dir": self.data_dir, "revision": self.revision, "streaming": self.streaming}
        dataset = _open_hub(self.path, self.path, split="train", **options)
        return ((f"{self.path} row {n}", record) for n, record in enumerate(dataset, 1))

    def files(self) -> tuple[str, ...]:
        return (self.path,) if _suffix(self.path) in _READERS else ()


def split_dialogues(chosen: Any, rejected: Any) -> tuple[dict | None, str]:
    """A preference row from two dialogues that differ in their last answer, or None and the reason."""
    mark = "\n\nAssistant:"
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return None, "not text"
    if any(not text.startswith("\n\nHuman:") or mark not in text for text in (chosen, rejected)):
        return None, "not a dialogue"
    (prompt, _, good), (other, _, bad) = chosen.rpartition(mark), rejected.rpartition(mark)
    if prompt != other:
        return None, "the dialogues differ before the last answer"
    if not good.strip() or not bad.strip():
        return None, "an answer is empty"
    if "\n\nHuman:" in good + bad:
        return None, "a dialogue ends with the human"
    if good == bad:
        return None, "the answers are equal"
    return {"prompt": prompt + mark, "responses": [good, bad], "ranks": [1, 2]}, ""


def in_test_split(prompt: str, test_fraction: float, seed: int) -> bool:
    """Whether `prompt` belongs to the test split: a pure function of its text, so of no other row."""
    digest = hashlib.blake2b(f"{seed}:{prompt}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < test_fraction * 2**64
