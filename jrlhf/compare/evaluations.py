"""Reads what the `evaluate` stages of finished runs measured, and puts it together policy by policy.

A policy is known by the stage folders that made it. One folder is one training run, however many evaluations
looked at it: a policy that does not depend on the seed is evaluated once per seed and is still one run, and a
stage that two runs share is one policy.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from jrlhf import remote
from jrlhf.compare.runs import Run, Stage
from jrlhf.compare.statistics import Scores
from jrlhf.config import UserError, read_json


@dataclass(frozen=True)
class Split:
    """Scores of one policy's answers to one set of prompts, each [S][P][N] (training runs, prompts, answers)."""

    gold: Scores
    length: Scores  # response tokens
    ended: Scores  # 1 where the answer ended by itself
    proxy: Scores | None = None
    kl: Scores | None = None  # nats; log(policy / baseline) of each whole answer
    criteria: Mapping[str, Scores] = field(default_factory=dict)
    groups: Mapping[str, Scores] = field(default_factory=dict)  # by the gold reward of a group of people


@dataclass(frozen=True)
class Policy:
    """A policy and its training runs, in the order of the scores' first axis.

    `kl_exact` (nats) stands in for the measured KL where it is known, as for best-of-n. `aliases` are other names
    under which the same training runs were evaluated.
    """

    name: str
    label: str  # the name, and the run where the name alone is not enough
    folders: tuple[str, ...]  # names of the stage folders, one per training run
    seeds: tuple[str, ...]
    stages: tuple[Stage, ...]  # those of `folders` that are still there
    splits: Mapping[str, Split]
    kl_exact: float | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class BestOfN:
    """Best-of-n by the proxy, one entry per n; rows are seeds: [S, len(n)]. `low`, `high` bound gold."""

    label: str  # "" when there is only one
    n: np.ndarray
    gold: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    proxy: np.ndarray | None
    kl: np.ndarray | None


@dataclass(frozen=True)
class Evaluation:
    """Policies that answered the same prompts and have the same baseline, which is the first of them."""

    label: str  # "" when the report holds only one evaluation
    reward_name: str
    gold_max: float | None
    policies: tuple[Policy, ...]
    prompts: Mapping[str, tuple[str, ...]]  # by split; a split whose prompts were not recorded is absent
    sources: Mapping[str, Any]  # by split: where its prompts came from
    samples: tuple[Mapping[str, Any], ...]  # `answers` by the policies' labels
    best_of_n: tuple[BestOfN, ...]
    mixed_proxies: bool  # the runs' learned rewards differ, so `proxy` has no common scale
    merged: tuple[str, ...] = ()  # labels of policies that more than one run evaluated

    @property
    def baseline(self) -> Policy:
        return self.policies[0]

    @property
    def main_split(self) -> str:
        return next(iter(self.baseline.splits))

    def same_prompts(self, other: "Evaluation", split: str) -> bool:
        """Whether the two put the same prompts in the same order: by their text, else by their source."""
        if split in self.prompts and split in other.prompts:
            return self.prompts[split] == other.prompts[split]
        return split in self.sources and self.sources[split] == other.sources.get(split)


def read_evaluations(runs: Sequence[Run]) -> list[Evaluation]:
    """What the `evaluate` stages of all runs measured, labelled as briefly as keeps them apart.

    Stages that asked the same prompts in the same way and share their baseline are one evaluation. UserError
    when a run has none, or when the runs do not share a gold reward (no axis could hold both).
    """
    sheets: list[_Sheet] = []
    for run in runs:
        evaluated = [stage for stage in run.stages if (stage.folder / "evaluation.json").is_file()]
        if not evaluated:
            waiting = ", ".join(f"{name} (seed {seed})" for name, seed in run.unfinished)
            hint = f" Unfinished: {waiting}." if waiting else " Add an evaluate stage to the experiment."
            raise UserError(
                f"{remote.shown(run.folder)} has no finished evaluate stage, so there is nothing to compare.{hint}"
            )
        for name in dict.fromkeys(stage.name for stage in evaluated):
            sheets.append(_sheet(run, name, [stage for stage in evaluated if stage.name == name]))
    rewards = sorted({sheet.first.reward_name for sheet in sheets})
    if len(rewards) > 1:
        raise UserError(
            f"the runs are judged by different gold rewards ({', '.join(rewards)}); report them apart"
        )
    groups: list[list[_Sheet]] = []
    for sheet in sheets:
        group = next((group for group in groups if _belong_together(group[0], sheet)), None)
        if group is None:
            groups.append([sheet])
        else:
            group.append(sheet)
    labels = _labels([(sheet.run.name, sheet.name) for sheet in sheets])
    named = {id(sheet): label for sheet, label in zip(sheets, labels, strict=True)}
    return [
        _evaluation(group, [named[id(sheet)] for sheet in group], alone=len(groups) == 1) for group in groups
    ]


def _labels(keys: list[tuple[str, str]]) -> list[str]:
    """The shortest of: nothing, experiment name, stage name, run's hash, run folder, run folder and stage."""
    candidates = (
        [""] * len(keys),
        [run.rpartition("-")[0] or run for run, _ in keys],
        [stage for _, stage in keys],
        [run.rpartition("-")[2] for run, _ in keys],
        [run for run, _ in keys],
        [f"{run} {stage}" for run, stage in keys],
    )
    return next((names for names in candidates if len(set(names)) == len(keys)), candidates[-1])


# --- one evaluate stage ---------------------------------------------------------------------------------

Column = Sequence[Sequence[float]]  # [P][N]: prompts, answers
Answers = Mapping[str, Column | None]  # by measure; criteria as "criterion NAME", groups as "group NAME"


@dataclass(frozen=True)
class _File:
    """One `evaluation.json`, checked, with the folder of the stage that made each policy."""

    stage: Stage
    reward_name: str
    gold_max: float | None
    folders: Mapping[str, str]
    policies: Mapping[str, Mapping[str, Answers]]  # by name and split
    kl_exact: Mapping[str, float | None]
    prompts: Mapping[str, tuple[str, ...]]
    samples: Sequence[Mapping[str, Any]]
    best_of_n: Mapping[str, Any] | None


@dataclass(frozen=True)
class _Sheet:
    """An evaluate stage of a run, under each of its seeds."""

    run: Run
    name: str
    files: tuple[_File, ...]

    @property
    def first(self) -> _File:
        return self.files[0]

    @property
    def proxies(self) -> frozenset[str]:
        """The folders of the learned rewards that scored the answers."""
        found = (f.stage.parents.get(f.stage.config.get("proxy") or "") for f in self.files)
        return frozenset(folder for folder in found if folder)

    @property
    def sources(self) -> dict[str, Any]:
        """By split what decides its prompts, as far as the config says."""
        config = self.first.stage.config
        limits = [config.get(key) for key in ("max_prompt", "too_long", "sampling")]
        return {split: [source, *limits] for split, source in (config.get("prompts") or {}).items()}


def _sheet(run: Run, name: str, stages: list[Stage]) -> _Sheet:
    files = tuple(_file(stage) for stage in stages)
    outline = lambda file: (  # noqa: E731
        file.reward_name,
        [(p, [(s, len(a["gold"] or ())) for s, a in splits.items()]) for p, splits in file.policies.items()],
    )
    for stage, file in zip(stages, files, strict=True):
        if outline(file) != outline(files[0]) or file.prompts != files[0].prompts:
            raise UserError(
                f"{stage.folder / 'evaluation.json'}: its policies, splits and prompts are not those of "
                f"{stages[0].folder / 'evaluation.json'}; seeds of one stage must match"
            )
    return _Sheet(run, name, files)


def _file(stage: Stage) -> _File:
    path = stage.folder / "evaluation.json"
    content = read_json(path)
    try:
        criteria = content.get("criteria") or {}
        policies = {
            name: {
                split: _answers(name, split, scores, criteria.get(name, {}).get(split, {}))
                for split, scores in measured["splits"].items()
            }
            for name, measured in content["policies"].items()
        }
        prompts = {split: tuple(texts) for split, texts in (content.get("prompts") or {}).items()}
        if not policies:
            raise ValueError("there is no policy in it")
        for name, splits in policies.items():
            if not splits:
                raise ValueError(f"policy {name!r} has no split")
            for split, answers in splits.items():
                scored = len(answers["gold"] or ())
                if split in prompts and scored != len(prompts[split]):
                    raise ValueError(
                        f"policy {name!r}, split {split!r}: {scored} prompts are scored of {len(prompts[split])}"
                    )
        return _File(
            stage=stage,
            reward_name=content["reward_name"],
            gold_max=content.get("gold_max"),
            folders={name: _made_by(stage, name) for name in policies},
            policies=policies,
            kl_exact={name: measured.get("kl_exact") for name, measured in content["policies"].items()},
            prompts=prompts,
            samples=content.get("samples") or (),
            best_of_n=content.get("best_of_n"),
        )
    except KeyError as error:
        raise UserError(f"{path}: field {error} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from error


def _made_by(stage: Stage, policy: str) -> str:
    """The stage folder behind a policy: a parent of that name, or the answers that best-of-n chose from."""
    parent = stage.parents.get(policy) or stage.parents.get(stage.config.get("best_of_n") or "")
    if parent is None:
        raise ValueError(f"config.json beside it does not say which stage made policy {policy!r}")
    return parent


def _answers(policy: str, split: str, scores: Mapping, criteria: Mapping) -> Answers:
    found: dict[str, Column | None] = {}
    for measure in ("gold", "length", "ended", "proxy", "kl"):
        column = scores.get(measure)
        if column is None and measure in ("gold", "length", "ended"):
            raise ValueError(f"policy {policy!r}, split {split!r} has no {measure!r}")
        found[measure] = column and _finite(column, f"policy {policy!r}, split {split!r}, {measure!r}")
    for name, column in criteria.items():
        found[f"criterion {name}"] = _finite(column, f"criterion {name!r} of {policy!r}")
    for name, column in (scores.get("groups") or {}).items():
        found[f"group {name}"] = _finite(column, f"group {name!r} of {policy!r}")
    return found


def _finite(column: Column, where: str) -> Column:
    for prompt, answers in enumerate(column):
        if not answers or not np.all(np.isfinite(np.asarray(answers, float))):
            raise ValueError(f"{where}: prompt {prompt} has no answers or a score that is not finite")
    return column


# --- several, put together ------------------------------------------------------------------------------


def _belong_together(a: _Sheet, b: _Sheet) -> bool:
    """Whether rows of the two can stand in one table: the same prompts, sampling and baseline."""
    x, y = a.first, b.first
    main = next(iter(x.policies[_baseline(x)]))
    if main != next(iter(y.policies[_baseline(y)])):
        return False
    if x.stage.config.get("sampling") != y.stage.config.get("sampling"):
        return False
    if not {f.folders[_baseline(f)] for f in a.files} & {f.folders[_baseline(f)] for f in b.files}:
        return False
    for split in x.policies[_baseline(x)].keys() & y.policies[_baseline(y)].keys():
        if split in x.prompts and split in y.prompts:
            if x.prompts[split] != y.prompts[split]:
                return False
        elif split not in a.sources or a.sources[split] != b.sources.get(split):
            return False
    return True


def _baseline(file: _File) -> str:
    return next(iter(file.policies))


@dataclass
class _Arm:
    """A policy while it is put together: the files that hold each of its training runs."""

    name: str
    sheet: int  # that of its first mention
    runs: dict[str, list[tuple[_File, str]]]  # folder -> files, and the policy's name there
    sheets: set[int]
    aliases: dict[str, None]


def _evaluation(sheets: Sequence[_Sheet], labels: Sequence[str], alone: bool) -> Evaluation:
    arms: list[_Arm] = []
    for i, sheet in enumerate(sheets):
        for name in sheet.first.policies:
            runs: dict[str, list[tuple[_File, str]]] = {}
            for file in sheet.files:
                runs.setdefault(file.folders[name], []).append((file, name))
            made = name in sheet.first.stage.parents  # else chosen from other policies' answers
            arm = next(
                (a for a in arms if a.runs.keys() & runs.keys() and (made or a.name == name)),
                None,
            )
            if arm is None:
                arms.append(_Arm(name, i, runs, {i}, {}))
            else:  # of a training run that two stages evaluated the first counts
                arm.runs |= {folder: files for folder, files in runs.items() if folder not in arm.runs}
                arm.sheets.add(i)
                if name != arm.name:
                    arm.aliases[name] = None
    names = [arm.name for arm in arms]
    stages = {stage.folder.name: stage for sheet in sheets for stage in sheet.run.stages}
    policies = {}
    for arm in arms:
        clear = names.count(arm.name) == 1 and alone
        label = arm.name if clear or not labels[arm.sheet] else f"{arm.name} ({labels[arm.sheet]})"
        policies[label] = _policy(arm, label, stages)
    maxima = [file.gold_max for sheet in sheets for file in sheet.files]
    return Evaluation(
        label="" if alone else labels[0],
        reward_name=sheets[0].first.reward_name,
        gold_max=None if None in maxima else float(np.mean([m for m in maxima if m is not None])),
        policies=tuple(policies.values()),
        prompts={split: texts for sheet in sheets for split, texts in sheet.first.prompts.items()},
        sources={split: source for sheet in sheets for split, source in sheet.sources.items()},
        samples=_samples(sheets, dict(zip(policies, arms, strict=True))),
        best_of_n=tuple(_best_of_n(sheets, labels)),
        mixed_proxies=len({sheet.proxies for sheet in sheets if sheet.proxies}) > 1,
        merged=tuple(label for label, arm in zip(policies, arms, strict=True) if len(arm.sheets) > 1),
    )


def _policy(arm: _Arm, label: str, stages: Mapping[str, Stage]) -> Policy:
    def scores(split: str, measure: str) -> Any:  # [S][P][N], or None
        runs = [
            [file.policies[name][split].get(measure) for file, name in files] for files in arm.runs.values()
        ]
        if any(column is None for columns in runs for column in columns):
            return None
        # Evaluations of one training run under several seeds are more answers to each of its prompts.
        return [
            [list(chain(*answers)) for answers in zip(*columns, strict=True)]  # type: ignore[arg-type]
            for columns in runs
        ]

    every = [file.policies[name] for files in arm.runs.values() for file, name in files]
    splits = {}
    for split in every[0]:
        if all(split in there for there in every):
            named = {
                kind: {
                    key.removeprefix(kind): found
                    for key in every[0][split]
                    if key.startswith(kind) and (found := scores(split, key)) is not None
                }
                for kind in ("criterion ", "group ")
            }
            splits[split] = Split(
                **{measure: scores(split, measure) for measure in ("gold", "length", "ended", "proxy", "kl")},
                criteria=named["criterion "],
                groups=named["group "],
            )
    exact = [file.kl_exact[name] for files in arm.runs.values() for file, name in files]
    return Policy(
        name=arm.name,
        label=label,
        folders=tuple(arm.runs),
        seeds=tuple(
            stages[folder].seed if folder in stages else files[0][0].stage.seed
            for folder, files in arm.runs.items()
        ),
        stages=tuple(stages[folder] for folder in arm.runs if folder in stages),
        splits=splits,
        kl_exact=None if None in exact else float(np.mean([value for value in exact if value is not None])),
        aliases=tuple(arm.aliases),
    )


def _samples(sheets: Sequence[_Sheet], arms: Mapping[str, _Arm]) -> tuple[Mapping[str, Any], ...]:
    """The prompts of the first stage, with the answers of every policy to them: the first seed's of its run."""
    by_prompt = [{sample["prompt"]: sample["answers"] for sample in sheet.first.samples} for sheet in sheets]
    shown = []
    for sample in sheets[0].first.samples:
        answers = {}
        for label, arm in arms.items():
            answer = by_prompt[arm.sheet].get(sample["prompt"], {}).get(arm.name)
            if answer is not None:
                answers[label] = answer
        shown.append({"prompt": sample["prompt"], "answers": answers})
    return tuple(shown)


def _best_of_n(sheets: Sequence[_Sheet], labels: Sequence[str]) -> Iterable[BestOfN]:
    """One curve for each best-of-n stage; the same table of several evaluations is taken once."""
    found: dict[tuple[str, ...], tuple[str, list[Mapping[str, Any]]]] = {}
    for sheet, label in zip(sheets, labels, strict=True):
        tables = {
            file.stage.parents.get(
                file.stage.config.get("best_of_n") or "", file.stage.folder.name
            ): file.best_of_n
            for file in sheet.files
        }
        rows = [table for table in tables.values() if table is not None]
        if len(rows) == len(tables):
            found.setdefault(tuple(tables), (label, rows))
    for label, rows in found.values():

        def column(key: str, rows: list[Mapping[str, Any]] = rows) -> np.ndarray | None:
            values = [row.get(key) for row in rows]
            return None if any(v is None for v in values) else np.array(values, float)

        yield BestOfN(
            label=label if len(found) > 1 else "",
            n=np.array(rows[0]["n"]),
            gold=np.array([row["gold"] for row in rows], float),
            low=column("gold_low"),
            high=column("gold_high"),
            proxy=column("proxy"),
            kl=column("kl"),
        )
