"""Reads finished runs: which stages and seeds there are, their curves, and what `evaluate` wrote."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jrlhf.compare.statistics import Scores
from jrlhf.config import UserError, did_you_mean, read_json
from jrlhf.metrics import read_metrics


@dataclass(frozen=True)
class Stage:
    """One finished stage of one seed. `curves`: metric name -> (steps [N], values [N])."""

    name: str
    seed: str
    folder: Path
    config: Mapping[str, Any]  # the stage's own, with its "type"
    environment: Mapping[str, Any]
    seconds: float | None
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


@dataclass(frozen=True)
class Split:
    """Scores of one policy's answers to one set of prompts, each [S][P][N] (seeds, prompts, answers)."""

    gold: Scores
    length: Scores  # response tokens
    ended: Scores  # 1 where the answer ended by itself
    proxy: Scores | None = None
    kl: Scores | None = None  # nats; log(policy / baseline) of each whole answer
    criteria: Mapping[str, Scores] = field(default_factory=dict)


@dataclass(frozen=True)
class Policy:
    """`kl_exact` (nats) stands in for the measured KL where it is known, as for best-of-n."""

    name: str
    splits: Mapping[str, Split]
    kl_exact: float | None = None


@dataclass(frozen=True)
class BestOfN:
    """Best-of-n by the proxy, one entry per n; rows are seeds: [S, len(n)]. `low`, `high` bound gold."""

    n: np.ndarray
    gold: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    proxy: np.ndarray | None
    kl: np.ndarray | None


@dataclass(frozen=True)
class Evaluation:
    """What one `evaluate` stage found, all seeds together. The first policy is the baseline."""

    label: str  # "" when the report holds only one evaluation
    run: Run
    reward_name: str
    gold_max: float | None
    seeds: tuple[str, ...]
    policies: tuple[Policy, ...]
    samples: tuple[Mapping[str, Any], ...]
    best_of_n: BestOfN | None

    @property
    def baseline(self) -> Policy:
        return self.policies[0]

    @property
    def main_split(self) -> str:
        return next(iter(self.baseline.splits))


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


def read_evaluations(runs: Sequence[Run]) -> list[Evaluation]:
    """One entry for each `evaluate` stage of each run, labelled as briefly as keeps them apart.

    UserError when a run has none, or when the runs do not share a gold reward (no axis could hold both).
    """
    groups: list[tuple[Run, str, list[Stage]]] = []
    for run in runs:
        evaluated = [stage for stage in run.stages if (stage.folder / "evaluation.json").is_file()]
        if not evaluated:
            waiting = ", ".join(f"{name} (seed {seed})" for name, seed in run.unfinished)
            hint = f" Unfinished: {waiting}." if waiting else " Add an evaluate stage to the experiment."
            raise UserError(
                f"{run.folder} has no finished evaluate stage, so there is nothing to compare.{hint}"
            )
        for name in dict.fromkeys(stage.name for stage in evaluated):
            groups.append((run, name, [stage for stage in evaluated if stage.name == name]))
    labels = _labels([(run.name, name) for run, name, _ in groups])
    evaluations = [
        _evaluation(label, run, stages) for label, (run, _, stages) in zip(labels, groups, strict=True)
    ]
    rewards = sorted({evaluation.reward_name for evaluation in evaluations})
    if len(rewards) > 1:
        raise UserError(
            f"the runs are judged by different gold rewards ({', '.join(rewards)}); report them apart"
        )
    return evaluations


def _labels(keys: list[tuple[str, str]]) -> list[str]:
    """The shortest of: nothing, experiment name, stage name, run folder, run folder and stage."""
    candidates = (
        [""] * len(keys),
        [run.rpartition("-")[0] or run for run, _ in keys],
        [stage for _, stage in keys],
        [run for run, _ in keys],
        [f"{run} {stage}" for run, stage in keys],
    )
    return next((names for names in candidates if len(set(names)) == len(keys)), candidates[-1])


def _evaluation(label: str, run: Run, stages: list[Stage]) -> Evaluation:
    files = [stage.folder / "evaluation.json" for stage in stages]
    seeds = [read_json(file) for file in files]
    first = seeds[0]
    for file, other in zip(files, seeds, strict=True):
        if _outline(other) != _outline(first):
            raise UserError(
                f"{file}: its policies and splits are not those of {files[0]}; seeds of one stage must match"
            )
    try:
        policies = tuple(_policy(name, seeds) for name in first["policies"])
        return Evaluation(
            label=label,
            run=run,
            reward_name=first["reward_name"],
            gold_max=None
            if first.get("gold_max") is None
            else float(np.mean([s["gold_max"] for s in seeds])),
            seeds=tuple(stage.seed for stage in stages),
            policies=policies,
            samples=tuple(first.get("samples") or ()),
            best_of_n=_best_of_n([s.get("best_of_n") for s in seeds]),
        )
    except KeyError as error:
        raise UserError(f"{files[0]}: field {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{files[0]}: {error}") from error


def _outline(evaluation: Mapping) -> Any:
    policies = evaluation.get("policies", {})
    return (
        evaluation.get("reward_name"),
        [(name, [(s, len(v["gold"])) for s, v in p["splits"].items()]) for name, p in policies.items()],
    )


def _policy(name: str, seeds: list[Mapping]) -> Policy:
    def scores(split: str, measure: str) -> Scores | None:
        columns = [s["policies"][name]["splits"][split].get(measure) for s in seeds]
        if any(column is None for column in columns):
            return None
        return _finite(columns, f"policy {name!r}, split {split!r}, {measure!r}")

    def required(split: str, measure: str) -> Scores:
        found = scores(split, measure)
        if found is None:
            raise ValueError(f"policy {name!r}, split {split!r} has no {measure!r}")
        return found

    splits = {}
    for split in seeds[0]["policies"][name]["splits"]:
        criteria = (seeds[0].get("criteria") or {}).get(name, {}).get(split, {})
        splits[split] = Split(
            gold=required(split, "gold"),
            proxy=scores(split, "proxy"),
            kl=scores(split, "kl"),
            length=required(split, "length"),
            ended=required(split, "ended"),
            criteria={
                key: _finite(
                    [s["criteria"][name][split][key] for s in seeds], f"criterion {key!r} of {name!r}"
                )
                for key in criteria
            },
        )
    exact = [s["policies"][name].get("kl_exact") for s in seeds]
    return Policy(name, splits, None if None in exact else float(np.mean(exact)))


def _finite(columns: list, where: str) -> Scores:
    for seed in columns:
        for prompt, answers in enumerate(seed):
            if not answers or not np.all(np.isfinite(np.asarray(answers, float))):
                raise ValueError(f"{where}: prompt {prompt} has no answers or a score that is not finite")
    return columns


def _best_of_n(found: list[Mapping | None]) -> BestOfN | None:
    seeds = [seed for seed in found if seed is not None]
    if len(seeds) < len(found):
        return None

    def rows(key: str) -> np.ndarray | None:
        values = [seed.get(key) for seed in seeds]
        return None if any(v is None for v in values) else np.array(values, float)

    return BestOfN(
        n=np.array(seeds[0]["n"]),
        gold=np.array([seed["gold"] for seed in seeds], float),
        low=rows("gold_low"),
        high=rows("gold_high"),
        proxy=rows("proxy"),
        kl=rows("kl"),
    )


def _read_stage(name: str, seed: str, folder: Path) -> Stage:
    environment = folder / "environment.json"
    return Stage(
        name=name,
        seed=seed,
        folder=folder,
        config=read_json(folder / "config.json")["stage"],
        environment=read_json(environment) if environment.is_file() else {},
        seconds=read_json(folder / "done.json").get("seconds"),
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
