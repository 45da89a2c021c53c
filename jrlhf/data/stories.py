"""Story endings: the second half of a short story, given its first half and a word to use."""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jrlhf.config import UserError
from jrlhf.data.report import Report
from jrlhf.data.sources import DataSource, TextFileSource

_SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"']?\s*")
_WORD = re.compile(r"[a-z]{4,}")


@dataclass(frozen=True)
class StoryEndings(DataSource):
    """Rows `{"prompt", "completion", "word"}` of a file of stories (TinyStories, Eldan & Li 2023).

    The completion is a story's last sentences, at most `ending` characters; the prompt asks for one word of it and
    gives at most `beginning` characters before it. Stories are split into "train" and "test" by their text. `kind`
    "demonstration" teaches SFT, "prompt" leaves the completion out, "text" gives the whole as one text.
    """

    path: str
    kind: Literal["demonstration", "prompt", "text"] = "demonstration"
    split: Literal["train", "test"] = "train"
    beginning: int = 160
    ending: int = 160
    max_rows: int | None = None

    def __post_init__(self) -> None:
        if self.beginning < 20 or self.ending < 20:
            raise UserError("StoryEndings: beginning and ending are lengths in characters, at least 20")
        if self.max_rows is not None and self.max_rows < 1:
            raise UserError(
                f"StoryEndings.max_rows is {self.max_rows}; give a positive number, or None for all"
            )

    def files(self) -> tuple[str, ...]:
        return (self.path,)

    def read(self, report: Report, start: int = 0) -> Iterator[dict]:
        report.where = self.path
        found = 0
        for row in TextFileSource(self.path).rows():
            story = " ".join(row["text"].split())
            if (zlib.crc32(story.encode()) % 10 == 0) != (self.split == "test"):
                report.dropped["in the other split"] += 1
                continue
            made = self._row(story)
            if made is None:
                report.dropped["no ending that fits"] += 1
                continue
            if self.max_rows is not None and found >= self.max_rows:
                return
            found += 1
            if found <= start:
                continue
            report.kept += 1
            yield made
        if not found:
            raise UserError(f"{self.path}: no story has an ending of at most {self.ending} characters.")

    def _row(self, story: str) -> dict | None:
        sentences = _SENTENCE.findall(story)
        cut = len(sentences)
        while cut > 1 and sum(map(len, sentences[cut - 1 :])) <= self.ending:
            cut -= 1
        end = "".join(sentences[cut:]).strip()
        begin: list[str] = []
        for sentence in reversed(sentences[:cut]):
            if sum(map(len, begin)) + len(sentence) > self.beginning:
                break
            begin.insert(0, sentence)
        before = "".join(begin).strip()
        words = [w for w in _WORD.findall(end.lower()) if w not in before.lower()]
        if not end or not before or not words:
            return None
        word = words[zlib.crc32(story.encode()) // 10 % len(words)]
        row = {"prompt": f"Use the word {word}. {before}", "word": word}
        if self.kind == "text":
            return {"text": f"{row['prompt']} {end}"}
        return row if self.kind == "prompt" else {**row, "completion": f" {end}"}
