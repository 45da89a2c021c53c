"""Sorter: digits to sort in steps that a program can check, so every reward is verifiable.

A prompt gives three to eight digits (nine or ten in the held-out split), repeats allowed::

    sort 3 1 2 :                    parity 3 1 2 :

An answer writes one insertion step per digit (the digits so far, in order), then the answer and ends::

    3 ; 1 3 ; 1 2 3 = 1 2 3         3 even ; 1 3 odd ; 1 2 3 even = even

`parity` asks only for the parity of the inversions, the pairs of digits in the wrong order; its steps carry the
parity so far, for a digit that is inserted passes those with which it makes an inversion. It is a trap for
outcome rewards: half of all guesses are right, whatever the steps say.

**Checkers**, all exact and computed from the text alone:

* *format*: `<step> ; ... ; <step> = <answer>`, and the answer ends. A step is one or more digits, and for
  `parity` then `even` or `odd`; the answer is digits, or one of the two words. Nothing else passes.
* *answer*: 1 if the format holds and the answer is right, else 0. Steps are not looked at.
* *steps*: the insertion steps before the first wrong one as a share of those there should be (or of those that
  are written, if that is more). What follows a wrong step earns nothing, even where it recovers: that is how
  people label steps (Lightman et al. 2023, "Let's Verify Step by Step"). The answer is not looked at.
* *gold*: 1 if the answer is right and every step is, else 0.

The best value of each is 1; `ideal_response` attains it. Every word stands between single spaces, so each is one
token: a prompt has at most 12 words, a right answer at most 53 at training lengths and 76 at held-out lengths.

**Splits.** `train` and `eval` share a distribution and no sequence of digits, whichever task is asked: one
sequence in eight is reserved for evaluation. `held_out_length` has nine or ten digits, which no training text has.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from jrlhf.config import Source, UserError, did_you_mean

Task = Literal["sort", "parity", "both"]
Split = Literal["train", "eval", "held_out_length"]

TASKS = ("sort", "parity")
DIGITS = tuple("0123456789")
PARITIES = ("even", "odd")
RESERVED_ONE_IN = 8  # sequences of digits kept for evaluation
_LENGTHS = {"train": range(3, 9), "eval": range(3, 9), "held_out_length": range(9, 11)}


# Language --------------------------------------------------------------------------------------------------


class Question(NamedTuple):
    """What a prompt asks."""

    task: str  # sort or parity
    digits: tuple[str, ...]


class Response(NamedTuple):
    """An answer cut at each `;` and at the first `=`; `answer` is None where there is no `=`."""

    steps: tuple[tuple[str, ...], ...]
    answer: tuple[str, ...] | None


def vocabulary() -> list[str]:
    """Every word of the language, sorted."""
    return sorted({*TASKS, *DIGITS, *PARITIES, ":", ";", "="})


def format_prompt(task: str, digits: Sequence[str]) -> str:
    """`<task> <digit> ... <digit> :`"""
    return f"{task} {' '.join(digits)} :"


def parse_prompt(prompt: str) -> Question:
    """The question in a prompt; UserError when the text is not a Sorter prompt."""
    words = prompt.split()
    task, digits = "".join(words[:1]), words[1:-1]
    shortest, longest = _LENGTHS["train"][0], _LENGTHS["held_out_length"][-1]
    fits = task in TASKS and set(digits) <= set(DIGITS) and shortest <= len(digits) <= longest
    if not fits or words[-1] != ":":
        raise UserError(
            f"not a Sorter prompt: {prompt!r}. Expected '<task> <digit> ... <digit> :' with a task of "
            f"{', '.join(TASKS)} and {shortest} to {longest} digits."
        )
    return Question(task, tuple(digits))


def parse_response(completion: str) -> Response:
    """The steps and the answer. Any string can be cut: whether they are well-formed is for the checkers."""
    words = completion.split()
    equals = words.index("=") if "=" in words else len(words)
    steps: list[list[str]] = [[]]
    for word in words[:equals]:
        if word == ";":
            steps.append([])
        else:
            steps[-1].append(word)
    written = tuple(map(tuple, steps)) if words[:equals] else ()
    return Response(written, tuple(words[equals + 1 :]) if equals < len(words) else None)


# Truth -----------------------------------------------------------------------------------------------------


def right_response(question: Question) -> Response:
    """The one response that is right in every step."""
    done: list[str] = []
    odd = False
    steps = []
    for digit in question.digits:
        done, passed = _insert(done, digit)
        odd ^= passed % 2 == 1
        steps.append(_step(question.task, done, odd))
    return Response(tuple(steps), _answer(question.task, done, odd))


def _insert(done: Sequence[str], digit: str) -> tuple[list[str], int]:
    """`done` with `digit` before its trailing larger digits, and how many those are (its inversions)."""
    place = len(done)
    while place and done[place - 1] > digit:
        place -= 1
    return [*done[:place], digit, *done[place:]], len(done) - place


def _step(task: str, done: Sequence[str], odd: bool) -> tuple[str, ...]:
    return (*done, PARITIES[odd]) if task == "parity" else tuple(done)


def _answer(task: str, done: Sequence[str], odd: bool) -> tuple[str, ...]:
    return (PARITIES[odd],) if task == "parity" else tuple(done)


def _write(response: Response) -> str:
    return " ; ".join(map(" ".join, response.steps)) + " = " + " ".join(response.answer or ())


def ideal_response(prompt: str) -> str:
    """The answer that every checker gives 1."""
    return _write(right_response(parse_prompt(prompt)))


# Checkers --------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What the checkers say of one answer; the module's docstring defines them."""

    format: bool
    answer: bool
    steps: float
    gold: bool


def judge(question: Question, response: Response, ended: bool = True) -> Verdict:
    """The verdict on one answer; `ended` says whether it ended by itself."""
    right = right_response(question)
    well_formed = ended and _well_formed(question.task, response)
    answered = well_formed and response.answer == right.answer
    passed = sum(_labels(right.steps, response.steps))
    share = passed / max(len(right.steps), len(response.steps))
    return Verdict(well_formed, answered, share, answered and share == 1)


def _well_formed(task: str, response: Response) -> bool:
    def digits(words: tuple[str, ...]) -> bool:
        return bool(words) and set(words) <= set(DIGITS)

    def parity(words: tuple[str, ...]) -> bool:
        return len(words) == 1 and words[0] in PARITIES

    if not response.steps or response.answer is None:
        return False
    if task == "sort":
        return all(map(digits, response.steps)) and digits(response.answer)
    return all(digits(s[:-1]) and parity(s[-1:]) for s in response.steps) and parity(response.answer)


def _labels(right: Sequence, written: Sequence) -> list[int]:
    """One label for each of `written`: 1 until the first that is wrong (or one too many), then 0."""
    good = True
    labels = []
    for i, step in enumerate(written):
        good = good and i < len(right) and step == right[i]
        labels.append(int(good))
    return labels


def step_labels(prompt: str, completion: str) -> list[int]:
    """One label per piece between `;`, as a process reward model splits a completion: the last has the answer too.

    1 until the first wrong one, then 0, so that `labels.index(0)` is the first mistake; a completion of as many
    steps as there should be has its gold reward as its last label.
    """
    right, written = (
        [piece.split() for piece in text.split(";")] for text in (ideal_response(prompt), completion)
    )
    return _labels(right, written)


def sorter_scores(
    prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict]
) -> dict[str, np.ndarray]:
    """format, answer, steps and gold, each [N] float32. `rows[i].get("ended", True)`: whether answer i ended."""
    verdicts = [
        judge(parse_prompt(prompt), parse_response(completion), row.get("ended", True))
        for prompt, completion, row in zip(prompts, completions, rows, strict=True)
    ]
    columns = np.asarray(verdicts, np.float32).reshape(-1, len(Verdict._fields)).T
    return dict(zip(Verdict._fields, columns, strict=True))


def sorter_answer(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict]) -> np.ndarray:
    """The outcome reward [N] float32: 1 where the answer is right, whatever its steps say."""
    return sorter_scores(prompts, completions, rows)["answer"]


def sorter_steps(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict]) -> np.ndarray:
    """The process reward [N] float32 in [0, 1]: the share of steps before the first wrong one."""
    return sorter_scores(prompts, completions, rows)["steps"]


def sorter_gold(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict]) -> np.ndarray:
    """The gold reward [N] float32: 1 where the answer and every step are right."""
    return sorter_scores(prompts, completions, rows)["gold"]


def sorter_so_far(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict]) -> np.ndarray:
    """[N] float32, of the beginning of an answer: 1 where every step that is written is right (`step_labels`).

    What follows the last `;` is a step, unless it is blank. An answer's end counts as part of its last step.
    """
    written = [completion.rstrip().removesuffix(";") for completion in completions]
    labels = [step_labels(prompt, text)[-1] for prompt, text in zip(prompts, written, strict=True)]
    return np.asarray(labels, np.float32)


def sorter_maximum(prompts: Sequence[str]) -> np.ndarray:
    """The best value of each of these rewards, [N] float32: 1."""
    return np.ones(len(prompts), np.float32)


# Demonstrator ----------------------------------------------------------------------------------------------


def demonstrate(prompt: str, step_error: float, answer_error: float, rng: np.random.Generator) -> str:
    """One answer, always well-formed, by a demonstrator who errs at known rates.

    Each step goes wrong with probability `step_error`: the digit is misread as another one, or (even odds, where
    there is a wrong place) put into a wrong place. What went wrong is carried on: later steps insert into the
    list as it stands. With probability `answer_error` the answer is not the one that the last step shows: one of
    its digits is another, or the parity is the other.
    """
    task, digits = parse_prompt(prompt)
    done: list[str] = []
    odd = False
    steps = []
    for digit in digits:
        inserted, passed = _insert(done, digit)
        if rng.random() < step_error:
            wrong = [w for i in range(len(done) + 1) if (w := [*done[:i], digit, *done[i:]]) != inserted]
            if wrong and rng.random() < 0.5:
                inserted = _pick(wrong, rng)
            else:
                inserted, passed = _insert(done, _other(digit, DIGITS, rng))
        done = inserted
        odd ^= passed % 2 == 1
        steps.append(_step(task, done, odd))
    answer = list(_answer(task, done, odd))
    if rng.random() < answer_error:
        place = int(rng.random() * len(answer))
        answer[place] = _other(answer[place], PARITIES if task == "parity" else DIGITS, rng)
    return _write(Response(tuple(steps), tuple(answer)))


def _pick(options: Sequence, rng: np.random.Generator):
    return options[int(rng.random() * len(options))]


def _other(word: str, words: Sequence[str], rng: np.random.Generator) -> str:
    return _pick([w for w in words if w != word], rng)


# Sources ---------------------------------------------------------------------------------------------------


def is_reserved(digits: Sequence[str]) -> bool:
    """Whether the sequence is kept for evaluation, whatever the task."""
    hashed = hashlib.blake2s(" ".join(digits).encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") % RESERVED_ONE_IN == 0


def _draw_prompt(split: str, task: str, rng: np.random.Generator) -> str:
    """The length, each digit and, for "both", the task uniformly; drawn anew while it is another split's."""
    asked = _pick(TASKS, rng) if task == "both" else task
    length = _pick(_LENGTHS[split], rng)
    while True:
        digits = [_pick(DIGITS, rng) for _ in range(length)]
        if split == "held_out_length" or is_reserved(digits) == (split == "eval"):
            return format_prompt(asked, digits)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _check_task(source: Source, task: str) -> None:
    known = get_args(Task)
    _check(task in known, f"{type(source).__name__}.task: no task {task!r}.{did_you_mean(task, known)}")


def _check_rates(source: Source, **rates: float) -> None:
    for name, rate in rates.items():
        _check(0 <= rate <= 1, f"{type(source).__name__}.{name} is a probability, got {rate}.")


@dataclass(frozen=True)
class SorterText(Source):
    """Pretraining documents `{"text": "<prompt> <answer>"}` on training prompts; each has a demonstrator of its
    own, who errs in steps at a rate drawn from U(0, step_error) and in the answer from U(0, answer_error)."""

    documents: int = 40_000
    task: Task = "both"
    step_error: float = 0.1
    answer_error: float = 0.2
    seed: int = 0

    def __post_init__(self):
        _check(self.documents >= 0, f"SorterText.documents is a count, got {self.documents}.")
        _check_task(self, self.task)
        _check_rates(self, step_error=self.step_error, answer_error=self.answer_error)

    def rows(self) -> Iterator[dict]:
        rng = np.random.default_rng([self.seed, 0])
        for _ in range(self.documents):
            prompt = _draw_prompt("train", self.task, rng)
            rates = self.step_error * rng.random(), self.answer_error * rng.random()
            yield {"text": f"{prompt} {demonstrate(prompt, *rates, rng)}"}


@dataclass(frozen=True)
class SorterVocabulary(Source):
    """One document `{"text": <word>}` per word, for training a tokenizer beside `SorterText`: the words of a task
    that is left out there occur in no other text."""

    def rows(self) -> Iterator[dict]:
        yield from ({"text": word} for word in vocabulary())


@dataclass(frozen=True)
class SorterDemonstrations(Source):
    """Demonstrations `{"prompt", "completion"}` on training prompts, with mistakes at the given rates."""

    size: int = 8_000
    task: Task = "both"
    step_error: float = 0.1  # of each step
    answer_error: float = 0.2
    seed: int = 0

    def __post_init__(self):
        _check(self.size >= 0, f"SorterDemonstrations.size is a count, got {self.size}.")
        _check_task(self, self.task)
        _check_rates(self, step_error=self.step_error, answer_error=self.answer_error)

    def rows(self) -> Iterator[dict]:
        rng = np.random.default_rng([self.seed, 1])
        for _ in range(self.size):
            prompt = _draw_prompt("train", self.task, rng)
            yield {
                "prompt": prompt,
                "completion": demonstrate(prompt, self.step_error, self.answer_error, rng),
            }


@dataclass(frozen=True)
class SorterPrompts(Source):
    """Prompts `{"prompt", "answer"}` of one split, drawn with replacement; `answer` is the right one."""

    size: int
    split: Split = "train"
    task: Task = "both"
    seed: int = 0

    def __post_init__(self):
        _check(self.size >= 0, f"SorterPrompts.size is a count, got {self.size}.")
        _check(
            self.split in _LENGTHS,
            f"SorterPrompts.split: no split {self.split!r}.{did_you_mean(self.split, _LENGTHS)}",
        )
        _check_task(self, self.task)

    def rows(self) -> Iterator[dict]:
        rng = np.random.default_rng([self.seed, 2, list(_LENGTHS).index(self.split)])
        for _ in range(self.size):
            prompt = _draw_prompt(self.split, self.task, rng)
            answer = right_response(parse_prompt(prompt)).answer
            yield {"prompt": prompt, "answer": " ".join(answer or ())}


@dataclass(frozen=True)
class SorterSteps(Source):
    """Labelled steps `{"prompt", "steps", "labels"}` of demonstrations on training prompts, for process reward
    models whose separator is " ;": `steps` joined by " ; " are the completion. `labels` are those of `step_labels`."""

    size: int = 8_000
    task: Task = "both"
    step_error: float = 0.1
    answer_error: float = 0.2
    seed: int = 0

    def __post_init__(self):
        _check(self.size >= 0, f"SorterSteps.size is a count, got {self.size}.")
        _check_task(self, self.task)
        _check_rates(self, step_error=self.step_error, answer_error=self.answer_error)

    def rows(self) -> Iterator[dict]:
        rng = np.random.default_rng([self.seed, 3])
        for _ in range(self.size):
            prompt = _draw_prompt("train", self.task, rng)
            completion = demonstrate(prompt, self.step_error, self.answer_error, rng)
            labels = step_labels(prompt, completion)
            yield {"prompt": prompt, "steps": completion.split(" ; "), "labels": labels}
