"""How far judges agree with people, and people with one another, on preferences that are public.

PandaLM's test set (Wang et al. 2023): pairs of answers with three votes each, and the stored verdicts of gpt-3.5-turbo
with the answers in one order. Fine-Grained RLHF's QA feedback (Wu et al. 2023): six pairs of each of 500 questions;
what a judge gets there that looks at the length alone is what a real one has to beat.

Command    JRLHF_DATA=<folder with pandalm-human/ and fine-grained-qa-feedback/>
           jrlhf run experiments/ai_feedback/agreement.py
Hardware   any; nothing is trained
Time       half a minute
Expected   Cohen's kappa of annotators 1-2, 1-3 and 2-3: 0.85, 0.88, 0.86, as PandaLM's authors publish. All numbers
           are in docs/ai-feedback.md
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jrlhf.config import Source
from jrlhf.data.chat import prompt_text
from jrlhf.data.formats import read_records
from jrlhf.data.report import Report
from jrlhf.data.sources import FileSource
from jrlhf.experiment import Experiment
from jrlhf.rewards.judges import Program, fill
from jrlhf.training.stages import AILabels, Judge

data = os.environ.get("JRLHF_DATA", "data")
votes = f"{data}/pandalm-human/testset-v1.json"
gpt = f"{data}/pandalm-human/gpt-3.5-turbo-testset-v1.json"
questions = f"{data}/fine-grained-qa-feedback/dev_feedback.json"

TEMPLATE = "{question}\n[first] {answer_a}\n[second] {answer_b}"
SAID = {"1": 0, "2": 1, "0": 2, "Tie": 2}  # as the files have it -> first, second, tie


def records(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


@dataclass(frozen=True)
class StoredVotes(Program):
    """Whoever wrote the field `field` of `path`, a file with the records of `pairs` in the same order."""

    path: str
    field: str
    pairs: str

    def verdicts(self, questions, options) -> np.ndarray:
        known = {}
        for record, said in zip(records(self.pairs), records(self.path), strict=True):
            # A row of the reader's, or none: it drops pairs in which an answer is empty.
            for row in read_records(iter([("", record)]), "pandalm", "", "messages", {}, Report()):
                a, b = map(prompt_text, row["responses"])
                asked = fill(TEMPLATE, question=prompt_text(row["prompt"]), answer_a=a, answer_b=b)
                vote = str(said[self.field])
                known[asked] = np.eye(3)[SAID[vote]] if vote in SAID else np.full(3, np.nan)
        return np.stack([known[question] for question in questions])

    def files(self) -> tuple[str, ...]:
        return (self.path, self.pairs)


@dataclass(frozen=True)
class Annotator(Source):
    """The rows of one annotator."""

    path: str
    name: str

    def rows(self) -> Iterator[dict]:
        every = FileSource(self.path, format="pandalm_annotators").rows()
        return (row for row in every if row["labeler"] == self.name)

    def files(self) -> tuple[str, ...]:
        return (self.path,)


@dataclass(frozen=True)
class Longer(Program):
    """The longer answer is the better one."""

    def verdicts(self, questions, options) -> np.ndarray:
        pairs = [question.rpartition("\n[first] ")[2].partition("\n[second] ") for question in questions]
        gap = np.asarray([np.sign(len(a) - len(b)) for a, _, b in pairs])
        return np.stack([gap > 0, gap < 0, gap == 0], axis=1).astype(np.float64)


def stored(path: str, field: str) -> Judge:
    """A judge that was asked with the answers in one order."""
    return Judge(
        by=StoredVotes(path, field, votes),
        template=TEMPLATE,
        verdicts=("1", "2", "tie"),
        value="probability",
        both_orders=False,
    )


one, two, three = (f"annotator{n}" for n in (1, 2, 3))
experiment = Experiment(
    name="agreement",
    stages={
        one: stored(votes, one),
        two: stored(votes, two),
        "gpt": stored(gpt, "gpt_result"),
        "longer": Judge(by=Longer(), template=TEMPLATE, verdicts=("1", "2", "tie"), value="probability"),
        "one_and_two": AILabels(one, data=Annotator(votes, two)),
        "one_and_three": AILabels(one, data=Annotator(votes, three)),
        "two_and_three": AILabels(two, data=Annotator(votes, three)),
        "gpt_and_one": AILabels("gpt", data=Annotator(votes, one)),
        "gpt_and_two": AILabels("gpt", data=Annotator(votes, two)),
        "gpt_and_three": AILabels("gpt", data=Annotator(votes, three)),
        "gpt_and_majority": AILabels("gpt", data=FileSource(votes, format="pandalm")),
        "longer_and_majority": AILabels("longer", data=FileSource(votes, format="pandalm")),
        "longer_and_people": AILabels("longer", data=FileSource(questions, format="qa_feedback_pairs")),
    },
)
