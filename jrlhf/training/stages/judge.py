"""A judge: who is asked about answers, and how. Its verdicts as a reward."""

import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jrlhf.config import (
    LANGUAGE_MODEL,
    REWARD_MODEL,
    MeshConfig,
    Stage,
    StageContext,
    UserError,
    stage_ref,
    to_dict,
)
from jrlhf.data.tokenizer import load_tokenizer
from jrlhf.rewards.endpoint import Endpoint
from jrlhf.rewards.judges import Program, check_template
from jrlhf.training.artifacts import model_meta
from jrlhf.training.judging import Asked, Respondent, Value, verdict_ids
from jrlhf.training.rewards import JUDGE
from jrlhf.training.stages.common import write_text


@dataclass(frozen=True)
class Judge(Stage):
    """Someone is asked about each answer: the language model of `start`, which replies by the odds of one token, or
    `by`: a model behind HTTP (`Endpoint`) or a program. Used as a reward this is direct RLAIF (Lee et al. 2023); the
    stage `AILabels` has it label preferences.

    A `template` with {question} and {answer} asks about an answer alone; one with {question}, {answer_a} and
    {answer_b} compares two: as a reward, with the `answer` of the prompt's row. A local tokenizer that wraps strings
    makes the template a user's turn. Leaves `judge.json`; no parameter is copied.
    """

    artifact: ClassVar[str] = REWARD_MODEL
    only_notes: ClassVar[bool] = True

    start: str = stage_ref("", LANGUAGE_MODEL)
    by: Respondent | None = None  # instead of start
    template: str = field(kw_only=True)
    verdicts: tuple[str, ...] = (
        "yes",
        "no",
    )  # what may be replied; of two answers: A is better, B, perhaps a tie
    value: Value = "log_odds"
    both_orders: bool = True  # two answers are asked about in either order, and averaged
    fallback: float | None = None  # the reward where `by` has no verdict; None: that is an error

    def validate(self, stages):
        two = check_template(self.template)
        if bool(self.start) == (self.by is not None):
            raise UserError("give either start (a language model's stage) or by (an Endpoint or a program)")
        for n, verdict in enumerate(self.verdicts):
            if verdict in self.verdicts[:n]:
                raise UserError(f"verdicts must differ, got {verdict!r} twice")
        if two and len(self.verdicts) not in (2, 3):
            raise UserError(
                f"verdicts: on two answers there are 2 (A, B) or 3 (A, B, a tie), got {len(self.verdicts)}"
            )
        if len(self.verdicts) < 2:
            raise UserError(f"verdicts: there must be at least 2, got {len(self.verdicts)}")
        if not two and not self.both_orders:
            raise UserError("both_orders is about templates of two answers, and the template has one")
        if self.value == "expected":
            if two or not all(_is_number(verdict) for verdict in self.verdicts):
                raise UserError(
                    "value 'expected' is the mean of numeric verdicts on one answer, such as ('1', '2', '3', '4', '5')"
                )
        elif not two and len(self.verdicts) > 2 and self.value == "log_odds":
            raise UserError(
                f"value 'log_odds' compares 2 verdicts, and there are {len(self.verdicts)}; use 'expected' or "
                "'probability'"
            )
        if isinstance(self.by, Endpoint) and self.value == "log_odds":
            raise UserError(
                "value 'log_odds': an endpoint may be certain, which has no finite log-odds; use 'probability' or "
                "'expected'"
            )
        if self.fallback is not None and (self.by is None or not math.isfinite(self.fallback)):
            raise UserError(
                "fallback is the finite reward of answers on which `by` has no verdict; the model of `start` always "
                f"has one (got {self.fallback})"
            )

    def check_mesh(self, mesh: MeshConfig) -> None:
        if isinstance(self.by, Endpoint):
            self.by.check_key()

    def files(self) -> tuple[str, ...]:
        return (*super().files(), *(self.by.files() if isinstance(self.by, Program) else ()))

    def run(self, ctx: StageContext) -> dict:
        note: dict[str, Any] = {
            "template": self.template,
            "verdicts": list(self.verdicts),
            "value": self.value,
            "both_orders": self.both_orders,
            "fallback": self.fallback,
        }
        results: dict[str, Any] = {}
        if self.by is None:
            folder = ctx.parents[self.start]
            model_meta(folder, "lm")
            results["verdict_ids"] = list(verdict_ids(load_tokenizer(folder / "tokenizer"), self.verdicts))
            note |= {"model": folder.name, "labeler": folder.name}
        else:
            name = self.by.model if isinstance(self.by, Endpoint) else type(self.by).__name__
            note |= {"asked": to_dict(Asked(self.by)), "labeler": name}
        write_text(ctx.folder / JUDGE, json.dumps(note))
        return results


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
