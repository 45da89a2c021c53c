"""Rubrics: a judge goes through a file of criteria, as a reward and as labels of preferences."""

import json
import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

import jrlhf.training.lab_judges  # noqa: F401  # so that a config.json may name its judge
from jrlhf import hosts
from jrlhf.config import (
    LANGUAGE_MODEL,
    PREFERENCES,
    REWARD_MODEL,
    MeshConfig,
    Source,
    StageContext,
    UserError,
    read_json,
    stage_ref,
    to_dict,
)
from jrlhf.data.chat import prompt_text
from jrlhf.metrics import DRIVER_REWARDS, progress
from jrlhf.rewards.endpoint import Endpoint
from jrlhf.rewards.judges import Judge, Program
from jrlhf.rewards.rubrics import (
    EXPLICIT,
    HOLISTIC,
    MARKS,
    How,
    RubricScorer,
    check_rubric_template,
    load_rubric,
)
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import load_model, model_meta
from jrlhf.training.judging import ANSWERS, Asked, LocalJudge, Respondent, judge_costs, make_judge
from jrlhf.training.rewards import RUBRIC, checked
from jrlhf.training.rubrics import rubric_scorer
from jrlhf.training.stages.common import MeshStage, write_text
from jrlhf.training.stages.preferences import check_one_of, preference_rows
from jrlhf.types import Scores

AT_ONCE = 512  # rows between two looks at whether to stop


@dataclass(frozen=True)
class AskingStage(MeshStage):
    """A stage that asks someone about texts: a language model of the experiment, or `by`."""

    abstract: ClassVar[bool] = True

    _: KW_ONLY
    judge: str = stage_ref("", LANGUAGE_MODEL)
    by: Respondent | None = None  # a model behind HTTP, or a program

    def check_judge(self) -> None:
        if bool(self.judge) == (self.by is not None):
            raise UserError("give either judge (a language model's stage) or by (an Endpoint or a program)")

    def check_mesh(self, mesh: MeshConfig) -> None:
        super().check_mesh(mesh)
        if isinstance(self.by, Endpoint):
            self.by.check_key()

    def files(self) -> tuple[str, ...]:
        return (*super().files(), *(self.by.files() if isinstance(self.by, Program) else ()))

    def labeler(self, ctx: StageContext) -> str:
        """A name for who is asked."""
        if self.by is None:
            return ctx.parents[self.judge].name
        return self.by.model if isinstance(self.by, Endpoint) else type(self.by).__name__

    def asked(self, ctx: StageContext, mesh: Mesh) -> Judge:
        """Who is asked, ready to reply."""
        if self.by is not None:
            return make_judge(self.by, ctx.folder / ANSWERS)
        return LocalJudge(self.judge, load_model(ctx.parents[self.judge], mesh), mesh)


@dataclass(frozen=True)
class RubricReward(AskingStage):
    """A judge goes through the criteria of a rubric, one question for each (`how="explicit"`: sum_i w_i c_i over the
    positive weights; HealthBench: Arora et al. 2025), or makes one mark of the rubric as a whole (`"holistic"`); both
    are in Rubrics as Rewards (Gunjal et al. 2025). Every criterion is a part of the reward.

    A prompt's row may have a `rubric` of its own, or name one of `rubrics` (docs/rubrics.md). Leaves `rubric.json`.
    """

    artifact: ClassVar[str] = REWARD_MODEL
    only_notes: ClassVar[bool] = True

    rubric: str = ""  # a TOML or JSON file, for the prompts whose row has none
    rubrics: dict[str, str] = field(default_factory=dict)  # more files, by the name that a row may give
    how: How = "explicit"
    template: str = ""  # "": `rewards.rubrics.EXPLICIT` or `HOLISTIC`
    marks: tuple[str, ...] = ()  # of how "holistic", the worst first; (): 1 to 5
    clip: bool = True  # faults take the score to 0, and no lower
    # how far (from 0 to 1) a criterion is met on which there is no verdict; None: that is an error
    fallback: float | None = None

    def validate(self, stages):
        self.check_judge()
        for path in self._paths:
            if taken := sorted({*load_rubric(path).names} & {*DRIVER_REWARDS}):
                raise UserError(
                    f"{path}: {taken[0]!r} cannot name a criterion, for reward/{taken[0]}/mean is something else"
                )
        if self.template:
            check_rubric_template(self.template, self.how)
        if self.how == "explicit" and self.marks:
            raise UserError("marks are the replies of how 'holistic'; criteria have `levels`, in their file")
        if self.how == "holistic" and not self.clip:
            raise UserError("clip is about how 'explicit': a mark is from 0 to 1 anyhow")
        if self.marks and (len({*self.marks}) < 2 or not all(_is_number(mark) for mark in self.marks)):
            raise UserError(f"marks must be at least 2 different numbers as text, got {self.marks}")
        if self.fallback is not None and (self.by is None or not 0 <= self.fallback <= 1):
            raise UserError(
                "fallback, from 0 to 1, is for criteria on which `by` has no verdict; a model of the experiment always "
                f"has one (got {self.fallback})"
            )

    def files(self) -> tuple[str, ...]:
        return (*super().files(), *self._paths)

    @property
    def _paths(self) -> tuple[str, ...]:
        return tuple(path for path in (self.rubric, *self.rubrics.values()) if path)

    def run(self, ctx: StageContext) -> dict:
        read = lambda path: load_rubric(path).as_json()  # noqa: E731
        note: dict[str, Any] = {
            "rubric": read(self.rubric) if self.rubric else None,
            "rubrics": {name: read(path) for name, path in self.rubrics.items()},
            "how": self.how,
            "template": self.template or (EXPLICIT if self.how == "explicit" else HOLISTIC),
            "marks": list(self.marks or MARKS),
            "clip": self.clip,
            "fallback": self.fallback,
            "labeler": self.labeler(ctx),
        }
        if self.by is None:
            model_meta(ctx.parents[self.judge], "lm")
            note["model"] = ctx.parents[self.judge].name
        else:
            note["asked"] = to_dict(Asked(self.by))
        write_text(ctx.folder / RUBRIC, json.dumps(note, ensure_ascii=False))
        return {}


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


@dataclass(frozen=True)
class RubricLabels(MeshStage):
    """A rubric's judge labels preferences: how far each answer meets each criterion (`criteria`), its score (`scores`),
    and ranks by score. Leaves `preferences.jsonl`, from which a RewardModel may learn a head for each criterion.

    The rows' own ranks are what their labeller said; the results tell how far the rubric agrees with them.
    """

    artifact: ClassVar[str] = PREFERENCES

    rubric: str = stage_ref(artifact=REWARD_MODEL)
    preferences: str = stage_ref("", PREFERENCES)
    data: Source | None = None
    margin: float = 0.0  # answers whose scores differ by no more from a better one are tied with it

    def validate(self, stages):
        check_one_of(self)
        stage = stages[self.rubric]
        if not isinstance(stage, RubricReward):
            raise UserError(f"rubric {self.rubric!r} is {type(stage).__name__}; it must be a RubricReward")
        if not 0 <= self.margin < math.inf:
            raise UserError(f"margin must be a finite number of at least 0, got {self.margin}")

    def run(self, ctx: StageContext) -> dict:
        rows = preference_rows(self, ctx)
        folder, mesh = ctx.parents[self.rubric], make_mesh(ctx.mesh)
        noted = read_json(folder / RUBRIC)
        out: list[dict] = []
        failed = 0
        with jax.set_mesh(mesh), progress(ctx.console, len(rows), f"{ctx.name}: judging") as bar:
            scorer = rubric_scorer(self.rubric, noted, folder, mesh, ctx.folder / ANSWERS)
            while len(out) < len(rows):
                hosts.heed_stop(f"{len(out)} of {len(rows)} rows are judged")
                some = rows[len(out) : len(out) + AT_ONCE]
                said = self._scores(scorer, some)
                failed += 0 if said.failed is None else int(np.sum(said.failed))
                stops = np.cumsum([len(row["responses"]) for row in some])[:-1]
                values = np.split(said.values, stops)
                parts = {name: np.split(each, stops) for name, each in said.parts.items()}
                for n, row in enumerate(some):
                    criteria = {name: _plain(each[n]) for name, each in parts.items()}
                    out.append(self._labelled(row, values[n], criteria, noted["labeler"]))
                bar.update(len(out))
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in out)
        write_text(ctx.folder / "preferences.jsonl", "".join(lines))
        return {
            "rows": len(out),
            "failed": failed / sum(len(row["responses"]) for row in rows),
            "with_ties": sum(len({*row["ranks"]}) < len(row["ranks"]) for row in out),
            "agreement": agreement(rows, out),
            "costs": judge_costs(scorer.judge),
        }

    def _scores(self, scorer: RubricScorer, rows: list[dict]) -> Scores:
        """Of all the answers in `rows`, one after another."""
        answers = [(row, response) for row in rows for response in row["responses"]]
        prompts = [prompt_text(row["prompt"]) for row, _ in answers]
        texts = [prompt_text(response) for _, response in answers]
        return checked(self.rubric, scorer(prompts, texts, [row for row, _ in answers]), len(texts))

    def _labelled(self, row: dict, values: np.ndarray, criteria: dict, labeler: str) -> dict:
        kept = {name: row[name] for name in ("prompt", "responses", "ended", "tools") if name in row}
        scores = _plain(values)
        ranks = [1 + sum(other > score + self.margin for other in scores) for score in scores]
        return kept | {"ranks": ranks, "scores": scores, "criteria": criteria, "labeler": labeler}


def _plain(values: np.ndarray) -> list[float]:
    return np.round(np.asarray(values, np.float64), 6).tolist()


def agreement(rows: list[dict], labelled: list[dict]) -> float | None:
    """The share of pairs that are ranked the same way, of those that are a tie in neither; None without any."""
    same, pairs = 0, 0
    for one, other in zip(rows, labelled, strict=True):
        a, b = (np.sign(np.subtract.outer(row["ranks"], row["ranks"])) for row in (one, other))
        both = np.triu(a * b)
        same, pairs = same + int(np.sum(both > 0)), pairs + int(np.sum(both != 0))
    return same / pairs if pairs else None
