"""The reward that a RubricReward noted."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jrlhf.config import from_dict
from jrlhf.metrics import DRIVER_REWARDS
from jrlhf.rewards.endpoint import Endpoint
from jrlhf.rewards.judges import Judge
from jrlhf.rewards.rubrics import RubricScorer, parse_rubric
from jrlhf.training.artifacts import load_model
from jrlhf.training.judging import ANSWERS, Asked, LocalJudge, make_judge


def rubric_scorer(
    name: str, noted: dict[str, Any], folder: Path, mesh: Mesh, answers: Path | None = None
) -> RubricScorer:
    """Of the stage of `folder`. Its model's folder lies beside; an endpoint's replies are kept in `answers`, by default
    in its own folder."""
    judge: Judge
    # A local model replies by one token, which is no bracket; a program is asked in plain words.
    marked = False
    if "model" in noted:
        judge = LocalJudge(name, load_model(folder.parent / noted["model"], mesh), mesh)
    else:
        by = from_dict(Asked, noted["asked"]).by
        judge, marked = make_judge(by, answers or folder / ANSWERS), isinstance(by, Endpoint)
    read = lambda data: None if data is None else parse_rubric(data, str(folder))  # noqa: E731
    return RubricScorer(
        name,
        judge,
        rubric=read(noted["rubric"]),
        rubrics={key: parse_rubric(data, str(folder)) for key, data in noted["rubrics"].items()},
        how=noted["how"],
        template=noted["template"],
        marks=tuple(noted["marks"]),
        clip=noted["clip"],
        fallback=noted["fallback"],
        marked=marked,
        taken=DRIVER_REWARDS,
    )
