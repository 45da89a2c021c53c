"""Where rows come from: files, the hub, HH dialogues.

A source is a frozen dataclass. Iterating it gives rows of one kind (`SCHEMAS`), always the same rows in the
same order. What a row must look like is in `schema.py`, how public formats become rows in `formats.py`.
`load` also gives the `Report`.
"""

import csv
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from jrlhf.config import Source, UserError, did_you_mean
from jrlhf.data.formats import (
    Records,
    check_format,
    dialogue_text,
    hh_messages,
    pick,
    read_records,
    split_dialogues,
    to_row,
)
from jrlhf.data.report import Report
from jrlhf.data.schema import SCHEMAS, check_row, validate

__all__ = [
    "SCHEMAS",
    "DataSource",
    "FileSource",
    "HHSource",
    "HubSource",
    "TextFileSource",
    "check_row",
    "dialogue_text",
    "in_test_split",
    "load",
    "read",
    "split_dialogues",
    "to_row",
    "validate",
]


# --- reading files ----------------------------------------------------------------------------------------


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

    abstract: ClassVar[bool] = True

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


def _check_max_rows(max_rows: int | None, where: str) -> None:
    if max_rows is not None and max_rows < 1:
        raise UserError(f"{where}: max_rows is {max_rows}; give a positive number, or None for all rows.")


Chat = Literal["messages", "dialogue", "bare"]


@dataclass(frozen=True)
class FileSource(DataSource):
    """Rows of one kind in a local .jsonl (or .jsonl.gz), .json, .csv or .parquet file.

    `format` names a public format (`formats.FORMATS`), of which `kind` chooses the rows where it has several;
    "rows" is our own schema, "auto" goes by the first record's fields and says so in the report. `columns`
    maps fields of the format onto the file's, e.g. `{"prompt": "question", "completion": "answer"}`. `chat`
    keeps messages, or makes them text: "dialogue" as in the HH data, "bare" (one question) with nothing added.
    """

    path: str
    kind: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    max_rows: int | None = None
    format: str = "rows"
    chat: Chat = "messages"

    def __post_init__(self) -> None:
        check_format(self.format, self.kind, self.chat, self.columns, self.path)
        _check_max_rows(self.max_rows, self.path)

    def read(self, report: Report, start: int = 0) -> Iterator[dict]:
        records = _records(self.path)
        rows = read_records(records, self.format, self.kind, self.chat, self.columns, report)
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
    """Rows of one kind from the Hugging Face hub, through `datasets.load_dataset`; formats as in FileSource.

    `name` may also be one of its builders ("json", "parquet") with `data_files`. Pin `revision` for a run
    that others should repeat. With `streaming` nothing is downloaded ahead.
    """

    name: str
    kind: str = ""
    split: str = "train"
    config_name: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    data_files: tuple[str, ...] = ()
    revision: str | None = None
    streaming: bool = False
    max_rows: int | None = None
    format: str = "rows"
    chat: Chat = "messages"

    def __post_init__(self) -> None:
        check_format(self.format, self.kind, self.chat, self.columns, self.name)
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
        # Where a record is a row, `skip` avoids reading what it can: resuming far into a stream is cheap.
        skip = start if self.format == "rows" else 0
        records = ((f"{place} row {n}", record) for n, record in enumerate(dataset.skip(skip), skip + 1))
        rows = read_records(records, self.format, self.kind, self.chat, self.columns, report)
        stop = None if self.max_rows is None else max(self.max_rows - skip, 0)
        return _count(islice(rows, start - skip, stop), report, place, start)

    def files(self) -> tuple[str, ...]:
        return tuple(f for f in (self.name, *self.data_files) if Path(f).exists())


@dataclass(frozen=True)
class HHSource(DataSource):
    """Anthropic's HH preference dialogues (Bai et al. 2022, arXiv:2204.05862), `chosen` and `rejected`.

    `path` is a local file or a hub name ("Anthropic/hh-rlhf", with `data_dir` for a subset). The prompt is
    what both dialogues share, up to and with the last `\\n\\nAssistant:`; prompt + answer is the dialogue
    unchanged. A row where that fails is dropped and counted. `kind` "demonstration" gives the chosen answer,
    "prompt" the prompts alone. `split` is by a hash of the prompt and `seed`, so no prompt is in both. With
    `chat` "messages" the dialogue's turns become messages.
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
    chat: Literal["dialogue", "messages"] = "dialogue"

    def __post_init__(self) -> None:
        if self.split not in ("train", "test"):
            raise UserError(f"{self.path}: unknown split {self.split!r}; there are 'train' and 'test'.")
        if self.kind not in ("preference", "demonstration", "prompt"):
            raise UserError(f"{self.path}: HH data has no {self.kind!r} rows.")
        if self.chat not in ("dialogue", "messages"):
            raise UserError(f"{self.path}: unknown chat {self.chat!r}; there are 'dialogue' and 'messages'.")
        if not 0 <= self.test_fraction <= 1:
            raise UserError(f"{self.path}: test_fraction is {self.test_fraction}, expected 0 to 1.")
        _check_max_rows(self.max_rows, self.path)

    def read(self, report: Report, start: int = 0) -> Iterator[dict]:
        rows = islice(self._pairs(report), start, self.max_rows)
        return _count(rows, report, f"{self.path}[{self.split}]", start)

    def _pairs(self, report: Report) -> Iterator[dict]:
        for place, record in self._raw():
            chosen = pick(record, "chosen", place) if isinstance(record, dict) else None
            rejected = pick(record, "rejected", place) if isinstance(record, dict) else None
            pair, why = split_dialogues(chosen, rejected)
            if pair is None:
                report.drop(why, place)
                continue
            if in_test_split(pair["prompt"], self.test_fraction, self.seed) != (self.split == "test"):
                report.dropped["in the other split"] += 1
                continue
            row = {
                "preference": pair,
                "demonstration": {"prompt": pair["prompt"], "completion": pair["responses"][0]},
                "prompt": {"prompt": pair["prompt"]},
            }[self.kind]
            yield hh_messages(row, place) if self.chat == "messages" else row

    def _raw(self) -> Records:
        if _suffix(self.path) in _READERS:
            return _records(self.path)
        options = {"data_dir": self.data_dir, "revision": self.revision, "streaming": self.streaming}
        dataset = _open_hub(self.path, self.path, split="train", **options)
        return ((f"{self.path} row {n}", record) for n, record in enumerate(dataset, 1))

    def files(self) -> tuple[str, ...]:
        return (self.path,) if _suffix(self.path) in _READERS or Path(self.path).is_dir() else ()


def in_test_split(prompt: str, test_fraction: float, seed: int) -> bool:
    """Whether `prompt` belongs to the test split: a pure function of its text, so of no other row."""
    digest = hashlib.blake2b(f"{seed}:{prompt}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < test_fraction * 2**64
