"""Rubrics: criteria in a file, a judge's word on each of them, and one score of an answer (docs/rubrics.md)."""

import json
import math
import re
import tomllib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jrlhf.config import UserError, did_you_mean, read_json
from jrlhf.rewards.judges import Judge, checked, expected_score, fill, filled
from jrlhf.types import Scores

How = Literal["explicit", "holistic"]

YES_NO = ("yes", "no")
MARKS = ("1", "2", "3", "4", "5")  # what a judge of a whole rubric may reply, the worst first
EXPLICIT = """Question:
{question}

Answer:
{answer}

Criterion: {criterion}

Judge the answer by this criterion alone. Reply with {options}."""
HOLISTIC = """Question:
{question}

Answer:
{answer}

Rubric, with the points that each item is worth (items with a minus are faults):
{rubric}

How good is the answer by all of the rubric, from the worst mark to the best? Reply with {options}."""


class Level(NamedTuple):
    name: str  # what the judge replies
    points: float
    description: str = ""


class Criterion(NamedTuple):
    """Something about an answer that a judge is asked: `yes` or `no`, or which of the `levels`, the worst first."""

    name: str
    question: str
    weight: float = 1.0  # negative: a fault
    levels: tuple[Level, ...] = ()
    must: bool = False  # an answer that does not meet it (or has the fault) earns nothing

    @property
    def options(self) -> tuple[str, ...]:
        return tuple(level.name for level in self.levels) or YES_NO

    @property
    def text(self) -> str:
        """The question with its levels, as a judge reads it."""
        lines = [f"{n}: {said}" if said else n for n, _, said in self.levels]
        return "\n".join([self.question, *lines])

    def met(self, verdicts: np.ndarray) -> np.ndarray:
        """[N] in [0, 1]: the probability of `yes`, or the expected points between the worst and the best level, of
        verdicts [N, K]; NaN where there is none."""
        if not self.levels:
            return verdicts[:, 0]
        points = np.asarray([level.points for level in self.levels])
        return (verdicts @ points - points[0]) / (points[-1] - points[0])


class Rubric(NamedTuple):
    criteria: tuple[Criterion, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.criteria)

    @property
    def text(self) -> str:
        """All of it, as a judge reads it, a line for each criterion with its points."""
        lines = []
        for c in self.criteria:
            levels = f" ({', '.join(level.name for level in c.levels)})" if c.levels else ""
            lines.append(f"- [{c.weight:+g}] {c.question}{levels}{' (required)' if c.must else ''}")
        return "\n".join(lines)

    def score(self, met: np.ndarray, clip: bool = True) -> np.ndarray:
        """[N] of how far each criterion is met [N, C]: sum_i w_i c_i / sum_{w_i > 0} w_i, at most 1 (HealthBench:
        Arora et al. 2025, section 3; explicit aggregation in Rubrics as Rewards: Gunjal et al. 2025, equation 1).

        Faults may take it below 0; `clip` stops it there. Where a `must` is not met the score is at most 0.
        """
        weights = np.asarray([c.weight for c in self.criteria])
        score = met @ weights / weights[weights > 0].sum()
        must = np.asarray([c.must for c in self.criteria])
        failed = np.any(must & (np.where(weights > 0, met, 1 - met) < 0.5), axis=1)
        score = np.where(failed, np.minimum(score, 0.0), score)
        return np.clip(score, 0.0, 1.0) if clip else score

    def as_json(self) -> dict[str, Any]:
        """What `parse_rubric` reads."""
        return {
            "criteria": [{**c._asdict(), "levels": [x._asdict() for x in c.levels]} for c in self.criteria]
        }


# --- reading ------------------------------------------------------------------------------------------------


def load_rubric(path: str) -> Rubric:
    """The rubric in a TOML or JSON file; UserError names the file and the criterion that is wrong."""
    if Path(path).suffix not in (".toml", ".json"):
        raise UserError(f"{path}: a rubric is a .toml or a .json file")
    return parse_rubric(_read(path), path)


def _read(path: str) -> Any:
    kind = Path(path).suffix
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors put a mark before the first line
        return tomllib.loads(text) if kind == ".toml" else json.loads(text)
    except FileNotFoundError:
        near = [p.name for p in Path(path).parent.glob(f"*{kind}")]
        raise UserError(f"{path}: no such file.{did_you_mean(Path(path).name, near)}") from None
    except (ValueError, RecursionError) as error:  # a text of the language, and of UTF-8
        raise UserError(f"{path}: not valid {kind[1:].upper()} ({error})") from None


def parse_rubric(data: Any, where: str) -> Rubric:
    """A rubric of plain values: `{"criteria": [...]}`, or the list alone (as a row's `rubric` has it)."""
    if isinstance(data, list):
        data = {"criteria": data}
    _check_keys(data, ("criteria",), where)
    listed = data.get("criteria")
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{where}: 'criteria' must be a list of at least one criterion")
    criteria: list[Criterion] = []
    for n, given in enumerate(listed, 1):
        criterion = _criterion(given, f"{where}: criterion {n}", where)
        if criterion.name in [c.name for c in criteria]:
            raise UserError(f"{where}: two criteria are called {criterion.name!r}; rename one")
        criteria.append(criterion)
    if all(c.weight < 0 for c in criteria):
        raise UserError(
            f"{where}: every weight is negative; a score is a share of what can be earned, so that at least one "
            "criterion needs a positive weight"
        )
    return Rubric(tuple(criteria))


def _criterion(given: Any, place: str, where: str) -> Criterion:
    _check_keys(given, Criterion._fields, place)
    name = _text(given, "name", place)
    if "/" in name:
        raise UserError(
            f"{place}: the name {name!r} holds a '/', which cannot stand in reward/<criterion>/mean"
        )
    place = f"{where}: criterion {name!r}"
    weight = _number(given.get("weight", 1.0), "weight", place)
    if weight == 0:
        raise UserError(f"{place}: its weight is 0, so that it counts for nothing; leave it out")
    must = given.get("must", False)
    if not isinstance(must, bool):
        raise UserError(f"{place}: 'must' is {must!r}, expected true or false")
    levels = _levels(given.get("levels", []), place)
    return Criterion(name, _text(given, "question", place), weight, levels, must)


def _levels(given: Any, place: str) -> tuple[Level, ...]:
    if not isinstance(given, list) or len(given) == 1:
        raise UserError(f"{place}: 'levels' must be a list of at least 2 levels, the worst first")
    levels: list[Level] = []
    for n, one in enumerate(given, 1):
        inside = f"{place}: level {n}"
        _check_keys(one, Level._fields, inside)
        name, description = _text(one, "name", inside), one.get("description", "")
        if "points" not in one and not re.fullmatch(r"-?\d+(\.\d+)?", name):
            raise UserError(
                f"{inside}: {name!r} needs its 'points' (a level whose name is a number has that many)"
            )
        points = _number(one["points"], "points", inside) if "points" in one else float(name)
        if not isinstance(description, str):
            raise UserError(f"{inside}: 'description' is {type(description).__name__}, expected text")
        if name in [level.name for level in levels]:
            raise UserError(f"{place}: two levels are called {name!r}")
        if levels and points <= levels[-1].points:
            raise UserError(
                f"{place}: levels go from the worst to the best, but {name!r} has {points:g} points after "
                f"{levels[-1].name!r} with {levels[-1].points:g}"
            )
        levels.append(Level(name, points, description))
    return tuple(levels)


def _check_keys(given: Any, known: Sequence[str], place: str) -> None:
    if not isinstance(given, dict):
        raise UserError(f"{place}: expected {', '.join(known)} by name, got {type(given).__name__}")
    for key in given:
        if key not in known:
            raise UserError(f"{place}: no such key {key!r}.{did_you_mean(key, known)}")


def _text(given: dict, key: str, place: str) -> str:
    value = given.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: {key!r} must be text, got {value!r}")
    return value.strip()


def _number(value: Any, key: str, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{place}: {key!r} is {value!r}, expected a finite number")
    return float(value)


_PROMETHEUS = re.compile(r"\s*\[(?P<question>.+?)\]\s*\n(?P<levels>(?:Score \d+:.*\n?)+)\s*")


def prometheus_rubric(text: str, where: str) -> Rubric:
    """A rubric as Prometheus writes it (Kim et al. 2024): `[question]`, then `Score 1: ...` to `Score 5: ...`. Its one
    criterion is called `rubric`."""
    if not (found := _PROMETHEUS.fullmatch(text)):
        raise UserError(f"{where}: not a rubric: expected '[question]' and lines 'Score 1: ...', worst first")
    levels = re.findall(r"Score (\d+):(.*)", found["levels"])
    given = [{"name": name, "description": said.strip()} for name, said in levels]
    return parse_rubric([{"name": "rubric", "question": found["question"], "levels": given}], where)


def stored_ratings(path: str) -> np.ndarray:
    """[L, N]: the scores of L judgements of N answers that a file in Prometheus' format holds (`gpt4_score`), NaN where
    an answer has fewer; a table of raters, as `ops.agreement` reads it."""
    scores = []
    for n, record in enumerate(read_json(path), 1):
        said = record.get("gpt4_score") if isinstance(record, dict) else None
        if not isinstance(said, list) or not said:
            raise UserError(f"{path} item {n}: no list 'gpt4_score'")
        scores.append([_number(score, "gpt4_score", f"{path} item {n}") for score in said])
    ratings = np.full((max(map(len, scores)), len(scores)), np.nan)
    for n, said in enumerate(scores):
        ratings[: len(said), n] = said
    return ratings


# --- asking -------------------------------------------------------------------------------------------------


def check_rubric_template(template: str, how: How) -> None:
    """UserError unless it has the places that a question needs, and no others."""
    needed = {"question", "answer", "criterion" if how == "explicit" else "rubric"}
    found = set(re.findall(r"\{(\w+)\}", template))
    if unknown := sorted(found - needed - {"options"}):
        hint = did_you_mean(unknown[0], needed | {"options"})
        raise UserError(f"template: unknown placeholder {{{unknown[0]}}} with how {how!r}.{hint}")
    if missing := sorted(needed - found):
        raise UserError(f"template: {{{missing[0]}}} is missing, which how {how!r} needs")


def one_of(options: Sequence[str], marked: bool = False) -> str:
    """`yes or no`, `1, 2 or 3`; marked: `[[yes]] or [[no]]`."""
    if marked:
        options = [f"[[{option}]]" for option in options]
    return f"{', '.join(options[:-1])} or {options[-1]}"


@dataclass(frozen=True)
class RubricScorer:
    """What a judge says of answers by a rubric, as a reward.

    explicit: a question for each criterion, the sum by the rubric's weights. holistic: one question with the whole
    rubric, of which the judge makes one mark (implicit aggregation: Gunjal et al. 2025, equation 2), in [0, 1].
    A prompt's row may have a `rubric` of its own: a list of criteria, the name of one of `rubrics`, or the text that
    `prometheus_rubric` reads.
    """

    name: str
    judge: Judge
    rubric: Rubric | None  # of the prompts whose row has none
    rubrics: Mapping[str, Rubric]
    how: How
    template: str
    marks: tuple[str, ...] = MARKS
    clip: bool = True
    fallback: float | None = None  # how far what the judge has no verdict on is met; None: that is an error
    # {options} are asked for in double brackets: the judge replies in text that is parsed.
    marked: bool = False
    # Names that no criterion may have: as parts they would be taken for something else.
    taken: Collection[str] = ()

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict]) -> Scores:
        """[N] values; `parts` how far each criterion is met that all the answers have in common (explicit), `failed`
        where a verdict is missing."""
        rubrics = self.check_rows(rows)
        if not rubrics:
            return Scores(np.zeros(0, np.float32))
        if self.how == "holistic":
            met, failed = self._filled(self._marks(prompts, completions, rubrics))
            return Scores(met.astype(np.float32), failed=failed)
        asked = self._criteria(prompts, completions, rubrics)
        whole, failed = self._filled(np.concatenate(asked))
        stops = np.cumsum([len(a) for a in asked])
        each = np.split(whole, stops[:-1])
        silent = None if failed is None else np.asarray([f.any() for f in np.split(failed, stops[:-1])])
        values = [r.score(met[None], self.clip)[0] for r, met in zip(rubrics, each, strict=True)]
        shared = [name for name in rubrics[0].names if all(name in r.names for r in rubrics)]
        parts = {
            name: np.asarray([m[r.names.index(name)] for r, m in zip(rubrics, each, strict=True)], np.float32)
            for name in shared
        }
        return Scores(np.asarray(values, np.float32), parts, failed=silent)

    def check_rows(self, rows: Sequence[dict]) -> list[Rubric]:
        """The rubric of each row; UserError where there is none."""
        return [self.rubric_of(row, n) for n, row in enumerate(rows, 1)]

    def rubric_of(self, row: dict, n: int) -> Rubric:
        where = f"reward {self.name!r}: prompt {n}: rubric"
        own = row.get("rubric")
        if own is None:
            if self.rubric is None:
                raise UserError(f"{where}: its row has none, and the stage has no `rubric` for such prompts")
            return self.rubric
        if isinstance(own, str) and "\n" in own:
            return prometheus_rubric(own, where)
        if isinstance(own, str):
            if own not in self.rubrics:
                raise UserError(f"{where} {own!r} is none of `rubrics`.{did_you_mean(own, self.rubrics)}")
            return self.rubrics[own]
        rubric = parse_rubric(own, where)
        if taken := [name for name in rubric.names if name in self.taken]:
            raise UserError(
                f"{where}: {taken[0]!r} cannot name a criterion, for reward/{taken[0]}/mean is something else"
            )
        return rubric

    def _criteria(self, prompts, completions, rubrics) -> list[np.ndarray]:
        """How far each criterion of each answer is met, NaN where there is no verdict. Criteria with the same options
        are asked about together."""
        met = [np.full(len(r.criteria), np.nan) for r in rubrics]
        together: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        for n, rubric in enumerate(rubrics):
            for c, criterion in enumerate(rubric.criteria):
                together[criterion.options].append((n, c))
        for options, places in together.items():
            questions = [
                fill(
                    self.template,
                    question=prompts[n],
                    answer=completions[n],
                    criterion=rubrics[n].criteria[c].text,
                    options=one_of(options, self.marked),
                )
                for n, c in places
            ]
            said = checked(self.judge.verdicts(questions, options), len(questions), options, self.name)
            for (n, c), verdict in zip(places, said, strict=True):
                met[n][c] = rubrics[n].criteria[c].met(verdict[None])[0]
        return met

    def _marks(self, prompts, completions, rubrics) -> np.ndarray:
        questions = [
            fill(self.template, question=q, answer=a, rubric=r.text, options=one_of(self.marks, self.marked))
            for q, a, r in zip(prompts, completions, rubrics, strict=True)
        ]
        said = checked(self.judge.verdicts(questions, self.marks), len(questions), self.marks, self.name)
        return 0.5 + 0.5 * expected_score(said, self.marks)

    def _filled(self, met: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """With `fallback` where there is no verdict, and where that is; UserError without one."""
        advice = "give the stage a `fallback`, from 0 (not met) to 1 (met)"
        return filled(met, self.fallback, self.name, "questions", advice)
