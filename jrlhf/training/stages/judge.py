"""A language model as a judge: its verdict's odds as a reward."""

import json
from dataclasses import dataclass, field
from typing import ClassVar

from jrlhf.config import LANGUAGE_MODEL, REWARD_MODEL, Stage, StageContext, UserError, stage_ref
from jrlhf.data.tokenizer import load_tokenizer
from jrlhf.training.artifacts import model_meta
from jrlhf.training.judging import Value, check_template, verdict_ids
from jrlhf.training.rewards import JUDGE
from jrlhf.training.stages.common import write_text


@dataclass(frozen=True)
class Judge(Stage):
    """The language model of `start` is asked about each answer; the reward is the log-odds that its next token begins
    the first verdict rather than the second (Zheng et al. 2023; Lee et al. 2023, RLAIF).

    A `template` with {question} and {answer} asks about an answer alone; one with {question}, {answer_a} and
    {answer_b} compares it with the `answer` of the prompt's row, in both orders. A tokenizer that wraps strings makes
    the template a user's turn. Leaves `judge.json`; no parameter is copied.
    """

    artifact: ClassVar[str] = REWARD_MODEL

    start: str = stage_ref(artifact=LANGUAGE_MODEL)
    template: str = field(kw_only=True)
    verdicts: tuple[str, str] = ("yes", "no")  # for and against; of two answers, that A or that B is better
    value: Value = "log_odds"  # or the probability of the first verdict among the two

    def validate(self, stages):
        check_template(self.template)
        if self.verdicts[0] == self.verdicts[1]:
            raise UserError(f"verdicts must differ, got {self.verdicts[0]!r} twice")

    def run(self, ctx: StageContext) -> dict:
        folder = ctx.parents[self.start]
        model_meta(folder, "lm")
        ids = verdict_ids(load_tokenizer(folder / "tokenizer"), self.verdicts)
        note = {
            "model": folder.name,
            "template": self.template,
            "verdicts": list(self.verdicts),
            "value": self.value,
        }
        write_text(ctx.folder / JUDGE, json.dumps(note))
        return {"verdict_ids": list(ids)}
