"""Grade-school maths (Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems"): the answer is a number."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from jrlhf.config import UserError
from jrlhf.data.report import Report
from jrlhf.data.sources import DataSource, FileSource, HubSource, in_test_split

_CALCULATOR = re.compile(r"<<[^<>]*>>")
_TEMPLATES = {
    "messages": "{question}\nThink step by step, and write the number alone after '####' at the end.",
    "text": "Question: {question}\nAnswer:",
}


@dataclass(frozen=True)
class GSM8K(DataSource):
    """Rows `{"prompt", "answer"}` with the number that is right as text; kind "demonstration" adds the `completion`,
    the worked solution that ends in `#### <number>`.

    `path` is a local file ("train.jsonl") or a hub name ("openai/gsm8k"). Both splits are of that file, by a hash of
    the question and `seed`: no question is in both. `shots` worked examples come before every question, as earlier
    turns or earlier text; they are the first rows of the train split, which leaves them out. `template` is a user's
    turn or the whole text, as `chat` says; "" is a default.
    """

    path: str
    split: Literal["train", "test"] = "train"
    test_fraction: float = 0.1
    kind: Literal["prompt", "demonstration"] = "prompt"
    chat: Literal["messages", "text"] = "messages"
    template: str = ""
    shots: int = 0
    calculator: bool = False  # keep the annotations <<48/2=24>> of worked solutions
    revision: str | None = None
    max_rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.template and "{question}" not in self.template:
            raise UserError(f"GSM8K.template has no {{question}}: {self.template!r}")
        if not 0 <= self.test_fraction < 1:
            raise UserError(
                f"GSM8K.test_fraction is {self.test_fraction}, expected at least 0 and less than 1"
            )
        if self.shots < 0:
            raise UserError(f"GSM8K.shots is a count, got {self.shots}")
        if self.max_rows is not None and self.max_rows < 1:
            raise UserError(f"GSM8K.max_rows is {self.max_rows}; give a positive number, or None for all")

    def files(self) -> tuple[str, ...]:
        return (self.path,) if self._is_file else ()

    @property
    def _is_file(self) -> bool:
        return Path(self.path.removesuffix(".gz")).suffix in (".jsonl", ".json", ".csv", ".parquet")

    def read(self, report: Report, start: int = 0) -> Iterator[dict]:
        report.where = f"{self.path}[{self.split}]"
        for row in islice(self._rows(report), start, self.max_rows):
            report.kept += 1
            yield row
        if not report.kept and not start:
            raise UserError(f"{report.where}: no rows")

    def _rows(self, report: Report) -> Iterator[dict]:
        train = (row for row in self._all(Report()) if not self._in_test(row))
        shots = list(islice(train, self.shots))
        for row in self._all(report):
            if self._in_test(row) != (self.split == "test"):
                report.dropped["in the other split"] += 1
            elif self.split == "train" and row in shots:
                report.dropped["a worked example of the prompts"] += 1
            else:
                yield self._row(row, shots)

    def _in_test(self, row: dict) -> bool:
        return in_test_split(row["question"], self.test_fraction, self.seed)

    def _all(self, report: Report) -> Iterator[dict]:
        """{"question", "solution", "answer"} of every row; those that are unfit are counted."""
        read = Report()
        source: DataSource
        if self._is_file:
            source = FileSource(self.path, "demonstration", format="gsm8k", chat="bare")
        else:
            source = HubSource(
                self.path,
                "demonstration",
                config_name="main",
                format="gsm8k",
                chat="bare",
                revision=self.revision,
            )
        for row in source.read(read):
            solution = row["completion"] if self.calculator else _CALCULATOR.sub("", row["completion"])
            yield {"question": row["prompt"], "solution": solution, "answer": row["answer"]}
        report.dropped.update(read.dropped)

    def _row(self, row: dict, shots: list[dict]) -> dict:
        asked = [self._asked(shot["question"]) for shot in shots]
        question = self._asked(row["question"])
        if self.chat == "text":
            examples = (f"{ask} {shot['solution']}\n\n" for ask, shot in zip(asked, shots, strict=True))
            made = {"prompt": "".join(examples) + question, "answer": row["answer"]}
            return made if self.kind == "prompt" else {**made, "completion": f" {row['solution']}"}
        turns = [
            turn
            for ask, shot in zip(asked, shots, strict=True)
            for turn in (_said("user", ask), _said("assistant", shot["solution"]))
        ]
        made = {"prompt": [*turns, _said("user", question)], "answer": row["answer"]}
        return (
            made if self.kind == "prompt" else {**made, "completion": [_said("assistant", row["solution"])]}
        )

    def _asked(self, question: str) -> str:
        return (self.template or _TEMPLATES[self.chat]).replace("{question}", question)


def _said(role: str, text: str) -> dict:
    return {"role": role, "content": text}
