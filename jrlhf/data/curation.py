"""Which rows to keep: duplicates, what evaluations ask too, what is alike, and which prompts come when.

Pure functions on texts and numbers; the stages that apply them are in `jrlhf/training/stages/curate.py` and
`generate.py`. All are exact: nothing is found by hashing that is not there, and nothing above a threshold is missed.
"""

import math
import re
import string
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jrlhf.config import Source, UserError, did_you_mean
from jrlhf.types import Spoken

# Chinese, Japanese and Korean are written without spaces: each of their characters is a word.
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD = re.compile(f"[{_IDEOGRAPHS}]|[^\\W{_IDEOGRAPHS}]+")
_WORD_OR_SYMBOL = re.compile(f"[{_IDEOGRAPHS}]|[^\\W{_IDEOGRAPHS}]+|[^\\w\\s]")


def normalized(text: str) -> str:
    """Text without what the eye does not see or heed: compatibility forms (NFKC), case, and how much space there is."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """Its words, normalised, without punctuation."""
    return _WORD.findall(normalized(text))


def tokens(text: str) -> list[str]:
    """Its words and symbols, normalised: `3 + 4` and `3 - 4` differ."""
    return _WORD_OR_SYMBOL.findall(normalized(text))


def ngrams(sequence: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Every n neighbours; the whole where it is shorter, none of nothing."""
    if len(sequence) < n:
        return [tuple(sequence)] if sequence else []
    return [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]


def row_texts(row: dict) -> list[str]:
    """What a row of any kind says: its prompt, then its answers; or its `text`, or its conversation's turns."""
    if "text" in row:
        return [row["text"]]
    if "messages" in row:
        return [spoken([message]) for message in row["messages"]]
    answers = [row["completion"]] if "completion" in row else row.get("responses", row.get("steps", []))
    return [spoken(row["prompt"]), *map(spoken, answers)]


def spoken(said: Spoken) -> str:
    """A text as it is, messages as what they say, so that a prompt in either form is the same."""
    return said if isinstance(said, str) else "\n".join(message.get("content") or "" for message in said)


# --- duplicates ---------------------------------------------------------------------------------------------


class Duplicate(NamedTuple):
    """A row that says what an earlier row said."""

    row: int
    of: int  # the earlier row, which is kept
    similarity: float


def exact_duplicates(texts: Iterable[str]) -> list[Duplicate]:
    """Texts that are an earlier one's but for case, space and compatibility forms."""
    first: dict[str, int] = {}
    found = []
    for n, text in enumerate(texts):
        if (earlier := first.setdefault(normalized(text), n)) != n:
            found.append(Duplicate(n, earlier, 1.0))
    return found


def near_duplicates(texts: Sequence[str], threshold: float, n: int = 5) -> list[Duplicate]:
    """Texts whose n-grams (of words and symbols) have a Jaccard similarity of at least `threshold` in (0, 1] with
    those of an earlier text that is kept; of several such the most similar, then the first, is named.

    Every such pair is found: two sets of similarity t share one of the |x| - ceil(t |x|) + 1 rarest n-grams of each
    (prefix filtering: Bayardo, Ma & Srikant 2007), so that only texts which do are compared. Deduplication by the
    Jaccard similarity of n-grams: Lee et al. 2022 (arXiv:2107.06499), there by MinHash with verification.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold {threshold} is not in (0, 1]")
    grams = [set(ngrams(tokens(text), n)) for text in texts]
    count = Counter(gram for found in grams for gram in found)
    rarest = sorted(count, key=lambda gram: (count[gram], gram))
    number = {gram: i for i, gram in enumerate(rarest)}
    sets = [sorted(number[gram] for gram in found) for found in grams]  # rare ones first
    holders: dict[int, list[int]] = defaultdict(list)  # kept texts by the n-grams of their prefixes
    found = []
    for i, mine in enumerate(sets):
        least = math.ceil(threshold * len(mine) - 1e-9)  # n-grams that a text as similar must share
        prefix = mine[: len(mine) - least + 1] if mine else []
        whole, best = set(mine), (0.0, -1)
        for j in sorted({j for gram in prefix for j in holders[gram]}):
            if least <= len(sets[j]) and threshold * len(sets[j]) <= len(mine) + 1e-9:
                shared = len(whole.intersection(sets[j]))
                similarity = shared / (len(mine) + len(sets[j]) - shared)
                if similarity >= threshold and similarity > best[0]:
                    best = (similarity, j)
        if best[1] >= 0:
            found.append(Duplicate(i, best[1], best[0]))
        else:
            for gram in prefix:
                holders[gram].append(i)
    return found


# --- what evaluations ask too -------------------------------------------------------------------------------


class Contamination(NamedTuple):
    """A row that holds something of an evaluation prompt."""

    row: int
    split: str  # of the evaluation prompts
    prompt: int  # which of them
    shared: str  # the words that both hold
    how: Literal["ngram", "contains", "same"]


def contaminated(
    prompts: Sequence[str],
    answers: Sequence[str],
    evaluation: Mapping[str, Sequence[str]],
    n: int = 13,
    contained: int = 8,
) -> list[Contamination]:
    """Rows that share something with an evaluation prompt, each with the first that was found.

    prompts and answers: what each row says, [N] each. Texts are compared as words, without case and punctuation. A row
    is dropped if it holds n neighbouring words of an evaluation prompt (GPT-3, Brown et al. 2020, appendix C: n = 13),
    in its prompt or its answers; or the whole of one of `contained` to n - 1 words; or if its prompt is the same as
    a still shorter one, for a few words are in many texts by chance.
    """
    if not 1 <= contained <= n:
        raise ValueError(f"contained {contained} is not in 1 to n = {n}")
    found_in: dict[int, dict[tuple[str, ...], tuple[str, int]]] = defaultdict(dict)
    same: dict[tuple[str, ...], tuple[str, int]] = {}
    for split, texts in evaluation.items():
        for i, text in enumerate(texts):
            if not (asked := words(text)):
                continue
            same.setdefault(tuple(asked), (split, i))
            if len(asked) >= contained:
                for gram in ngrams(asked, n):
                    found_in[len(gram)].setdefault(gram, (split, i))
    found = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        said = [words(prompt), words(answer)]
        if (whole := tuple(said[0])) in same:
            found.append(Contamination(row, *same[whole], " ".join(whole), "same"))
            continue
        grams = (
            (gram, length) for length in sorted(found_in) for text in said for gram in ngrams(text, length)
        )
        for gram, length in grams:
            if gram in found_in[length]:
                how: Literal["ngram", "contains"] = "ngram" if length == n else "contains"
                found.append(Contamination(row, *found_in[length][gram], " ".join(gram), how))
                break
    return found


# --- similarity of instructions, and which of them to keep --------------------------------------------------


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length, with the rows of the table as the bits of one number (Hyyrö 2004)."""
    places: dict[str, int] = defaultdict(int)
    for i, word in enumerate(a):
        places[word] |= 1 << i
    whole = free = (1 << len(a)) - 1
    for word in b:
        matched = free & places.get(word, 0)
        free = ((free + matched) | (free - matched)) & whole
    return len(a) - free.bit_count()


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """ROUGE-L of two lists of words in [0, 1]: F1 of the longest common subsequence (Lin 2004)."""
    common = longest_common_subsequence(a, b)
    return 2.0 * common / (len(a) + len(b)) if common else 0.0


# What a language model cannot do with text alone (Wang et al. 2023, appendix A.1).
BEYOND_TEXT = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
    "go to", "video", "audio", "music", "flowchart", "diagram",
)  # fmt: skip
OPENING = "Come up with a series of tasks:"


def few_shot(examples: Sequence[str], opening: str = OPENING) -> str:
    """A prompt that a model goes on with further tasks (Wang et al. 2023, table 5): a numbered list, and a number."""
    lines = [f"{n}. {' '.join(task.split()).rstrip(':')}" for n, task in enumerate(examples, 1)]
    return "\n".join([opening, *lines, f"{len(examples) + 1}."])


def parse_tasks(reply: str, first: int) -> list[str]:
    """The tasks of a reply that goes on with a numbered list at number `first`. One that the reply ends in is taken
    too; what follows a number that is out of order is not."""
    pieces = re.split(r"(?:^|\n)\s*(\d+)\s*[.)]\s+", f"{first}. {reply.lstrip()}")
    tasks = []
    for wanted, number, text in zip(
        range(first, first + len(pieces)), pieces[1::2], pieces[2::2], strict=False
    ):
        if int(number) != wanted:
            break
        tasks.append(" ".join(text.split()))
    return [task for task in tasks if task]


def is_unfinished(task: str) -> bool:
    """Whether a task that a reply ends in was probably cut off there: it does not end as a sentence does."""
    return not re.search("[.?!:;\u3002\uff1f\uff01][\"'\u201d\u2019)\\]]*$", task)


def task_fault(
    task: str, least_words: int = 4, most_words: int = 150, excluded: Sequence[str] = BEYOND_TEXT
) -> str:
    """Why an instruction that was generated is not kept, "" if it is (Wang et al. 2023, appendix A.1): its length in
    words, words for what is not text, or a beginning that no instruction has."""
    said = words(task)
    if len(said) < least_words:
        return "too short"
    if len(said) > most_words:
        return "too long"
    spoken = f" {' '.join(said)} "
    if any(f" {' '.join(words(word))} " in spoken for word in excluded):
        return "keyword"
    if task[0] in string.punctuation:
        return "punctuation first"
    return ""


# --- by a number of the row ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Between(Source):
    """The rows of a source whose field `by` is from `low` to `high`, the ends included."""

    source: Source
    by: str
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise UserError(f"Between: low {self.low} is above high {self.high}: no row would be left")

    def rows(self) -> Iterator[dict]:
        left = 0
        for n, row in enumerate(self.source.rows(), 1):
            if self.low <= number_of(row, self.by, f"Between.by: row {n}") <= self.high:
                left += 1
                yield row
        if not left:
            raise UserError(f"Between: no row has {self.by!r} from {self.low:g} to {self.high:g}")

    def files(self) -> tuple[str, ...]:
        return self.source.files()


def number_of(row: dict, by: str, place: str) -> float:
    """A number of a row, or the length of a list, or the words of a text. UserError where it has none."""
    if by not in row:
        raise UserError(f"{place} has no field {by!r}.{did_you_mean(by, row)}")
    value = row[by]
    value = value.split() if isinstance(value, str) else value
    value = len(value) if isinstance(value, list) else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{place} has {by!r} {value!r}, which is no number")
    return float(value)


# --- easy to hard -------------------------------------------------------------------------------------------

Pace = Literal["root", "linear", "stages"]


def competence(step: int, steps: int, start: float, pace: Pace = "root", stages: int = 4) -> float:
    """The share of the easiest prompts that are asked at `step`, from `start` in (0, 1] to 1 at `steps` and after.

    "linear" and "root" are equations 6 and 7 of Platanios et al. 2019 (arXiv:1903.09848); "root" adds prompts ever
    more slowly, so that each new one is asked as often as the last. "stages" goes up in equal steps, the last of which
    is 1.
    """
    done = min(step / steps, 1.0) if steps else 1.0
    if pace == "stages":
        part = min(math.floor(done * stages), stages - 1)
        return start + (1.0 - start) * part / (stages - 1) if stages > 1 else 1.0
    if pace == "linear":
        return start + (1.0 - start) * done
    return math.sqrt(start**2 + (1.0 - start**2) * done)


@dataclass(frozen=True)
class Curriculum:
    """Prompts from easy to hard, by a number of their rows."""

    by: str  # the rows' field: `solve_rate`, a number of their own, or a list or text, which counts as its length
    steps: int  # batches of prompts until all may be asked
    easy: Literal["high", "low"] = "high"  # which end of the field is easy
    start: float = 0.25  # the share of prompts that may be asked first
    pace: Pace = "root"
    stages: int = 4  # of the pace "stages"

    def __post_init__(self) -> None:
        if not self.by:
            raise UserError("curriculum.by: name a field of the prompts' rows, as 'solve_rate'")
        if self.steps < 1 or self.stages < 2:
            raise UserError(
                f"curriculum.steps is {self.steps} and stages {self.stages}; at least 1 and 2 are needed"
            )
        if not 0 < self.start <= 1:
            raise UserError(f"curriculum.start is {self.start}, a share of the prompts above 0 and at most 1")

    def share(self, step: int) -> float:
        """Of the prompts, the easiest first, that may be asked at `step` (from 0)."""
        return competence(step, self.steps, self.start, self.pace, self.stages)

    def difficulty(self, rows: Sequence[dict]) -> np.ndarray:
        """[N] float64, larger is harder. UserError names a row that has no such number."""
        values = [number_of(row, self.by, f"curriculum.by: prompt {n}") for n, row in enumerate(rows, 1)]
        found = np.asarray(values, np.float64)
        return -found if self.easy == "high" else found
