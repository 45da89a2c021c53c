"""Reads finished runs: which stages and seeds there are, and their curves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jrlhf.config import UserError, did_you_mean, read_json
from jrlhf.metrics import read_metrics


@dataclass(frozen=True)
class Stage:
    """One finished stage of one seed. `parents`: stage name -> its folder's name. `curves`: metric name ->
    (steps [N], values [N])."""

    name: str
    seed: str
    folder: Path
    config: Mapping[str, Any]  # the stage's own, with its "type"
    environment: Mapping[str, Any]
    seconds: float | None
    parents: Mapping[str, str]
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(repr=False)


@dataclass(frozen=True)
class Run:
    """A run folder. `unfinished` names each (stage, seed) that was listed but is not done."""

    folder: Path
    config: Mapping[str, Any]
    stages: tuple[Stage, ...]
    unfinished: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def read_run(folder: Path) -> Run:
    """A run folder with its `stages.json`. UserError when it is no run folder or a file is broken."""
    folder = Path(folder)
    if not (folder / "stages.json").is_file():
        known = [p.parent.name for p in folder.parent.glob("*/stages.json")]
        raise UserError(
            f"{folder}: not a run folder, it has no stages.json.{did_you_mean(folder.name, known)}"
        )
    stages, unfinished = [], []
    for name, seeds in read_json(folder / "stages.json").items():
        for seed, where in seeds.items():
            stage = folder.parent / where  # the paths are relative to the runs folder
            if (stage / "done.json").is_file():
                stages.append(_read_stage(name, seed, stage))
            else:
                unfinished.append((name, seed))
    return Run(folder, read_json(folder / "config.json"), tuple(stages), tuple(unfinished))


def _read_stage(name: str, seed: str, folder: Path) -> Stage:
    environment, record = folder / "environment.json", read_json(folder / "config.json")
    return Stage(
        name=name,
        seed=seed,
        folder=folder,
        config=record["stage"],
        environment=read_json(environment) if environment.is_file() else {},
        seconds=read_json(folder / "done.json").get("seconds"),
        parents={name: parent["folder"] for name, parent in record["parents"].items()},
        curves=_read_curves(folder),
    )


def _read_curves(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metric name -> (steps, values), finite values only. Of a step that was logged twice the last counts."""
    values: dict[str, dict[int, float]] = {}
    for row in read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []:
        step = row.pop("step")
        for name, value in row.items():
            if math.isfinite(value):
                values.setdefault(name, {})[step] = value
    return {
        name: (np.array(sorted(at)), np.array([at[step] for step in sorted(at)], float))
        for name, at in values.items()
    }
