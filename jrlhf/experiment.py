"""An experiment is a graph of stages and the seeds to run them with; equal stages are computed once.

    experiment = Experiment(
        name="ppo_vs_dpo",
        stages={"base": Pretrain(...), "sft": SFT(start="base", ...), "ppo": PPO(start="sft", ...)},
        seeds=(0, 1, 2),
        seed_from="ppo",
    )

`run` goes through the graph for each seed. A (stage, seed) lives in one folder whose name carries its
fingerprint: the hash of its resolved config, its seed and its parents' fingerprints. A finished folder is
reused, whichever experiment made it. The layout is described in docs/experiments.md.
"""

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jrlhf import remote
from jrlhf.config import (
    FILE_MODULE,
    STOP,
    MeshConfig,
    Preempted,
    Reference,
    Stage,
    StageContext,
    UserError,
    bytes_text,
    did_you_mean,
    from_dict,
    read_json,
    to_dict,
    with_stage_rows,
)

# Raise it when the same config would give other results (a fixed bug, a changed default meaning): finished
# stages of the older format are then not reused.
FORMAT = 1

ALL = "all"  # `force=ALL`: re-run every stage

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_WHOLE_FILE = 64 * 2**20  # bytes; a larger file is hashed by its size and both ends
_END = 2**20


@dataclass(frozen=True)
class Experiment:
    """Stages by name, and the seeds to run them with."""

    name: str
    stages: dict[str, Stage]
    seeds: tuple[int, ...] = (0,)
    seed_from: str | tuple[str, ...] = ""
    """The first stage whose seed varies, or several: it and what depends on it run once per seed, every other stage
    once with seeds[0]. Empty: every stage runs once per seed."""
    mesh: MeshConfig = field(default_factory=MeshConfig)


@dataclass(frozen=True)
class Task:
    """One stage under one seed: what is run, or found finished."""

    name: str
    stage: Stage
    seed: int
    fingerprint: str
    folder: Path
    parents: dict[str, "Task"]

    @property
    def status(self) -> str:
        """`finished`, `partial` (a run was interrupted; it will be resumed) or `to do`."""
        if (self.folder / "done.json").exists():
            return "finished"
        return "partial" if self.folder.exists() else "to do"


# --- reading an experiment ----------------------------------------------------------------------------------


def load_experiment(path: Path | str) -> Experiment:
    """The experiment of a `.py` file (its module-level `experiment`) or of a run folder's `config.json`.

    The file is executed. Raises UserError with file and line for a mistake in it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json":
        data = read_json(path)
        if not isinstance(data, dict) or "stages" not in data:
            raise UserError(f"{path}: not an experiment's config (it has no 'stages')")
        experiment = from_dict(Experiment, data, str(path))
    elif path.suffix == ".py":
        module = load_python(path)
        if not hasattr(module, "experiment"):
            raise UserError(f"{path}: defines no `experiment = Experiment(...)` at module level")
        experiment = module.experiment
        if not isinstance(experiment, Experiment):
            raise UserError(f"{path}: `experiment` must be an Experiment, got {type(experiment).__name__}")
        experiment = _resolved(experiment, str(path))
    else:
        if not path.exists():
            raise UserError(f"{path}: no such file.{_files_near(path)}")
        raise UserError(f"{path}: an experiment is a .py file or a config.json")
    return experiment


def load_python(path: Path) -> Any:
    """Execute a Python file as a module of its own. Its folder is importable, as it is for `python FILE`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file.{_files_near(path)}")
    full = path.resolve()
    # The module's name depends on the path alone, so that reading a file twice defines its classes anew
    # instead of giving each a twin.
    name = f"{FILE_MODULE}{re.sub(r'[^0-9A-Za-z_]', '_', full.stem)}_{_sha(str(full))[:8]}"
    spec = importlib.util.spec_from_file_location(name, full)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(full.parent) not in sys.path:
        sys.path.insert(0, str(full.parent))
    try:
        spec.loader.exec_module(module)
    except SyntaxError as e:
        file = path if e.filename == str(full) else e.filename
        raise UserError(f"{file}:{e.lineno}: {type(e).__name__}: {e.msg}") from e
    except (Exception, SystemExit) as e:
        frames = [f for f in traceback.extract_tb(e.__traceback__) if f.filename == str(full)]
        lines = [
            f.lineno for f in frames if f.name != "__post_init__"
        ]  # where a config is made, not its checks
        where = f"{path}:{lines[-1]}" if lines else str(path)
        what = (
            _wrong_field(e)
            or _unknown_field(e)
            or (str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}")
        )
        raise UserError(f"{where}: {what}") from e
    return module


def _wrong_field(error: BaseException) -> str:
    """Of an error in a config's own checks: which of its fields holds a value of the wrong type, if one does."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        config = frame.f_locals.get("self")
        if frame.f_code.co_name == "__post_init__" and dataclasses.is_dataclass(config):
            try:
                to_dict(config, where=type(config).__name__)
            except UserError as wrong:
                return str(wrong)
    return ""


def _unknown_field(error: BaseException) -> str:
    """Of a config that was given a field which it does not have: the one that was perhaps meant."""
    found = re.match(r"(?:\w+\.)*(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not isinstance(error, TypeError) or not found:
        return ""
    name, field = found.groups()
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)  # where it was called
    config = frame.f_globals.get(name)
    if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
        return ""
    return (
        f"{name} has no field {field!r}.{did_you_mean(field, [f.name for f in dataclasses.fields(config)])}"
    )


def _files_near(path: Path) -> str:
    """A suggestion for a file that is not there."""
    if not path.parent.is_dir():
        return f" There is no folder {path.parent}."
    return did_you_mean(path.name, (p.name for p in path.parent.iterdir() if p.suffix == path.suffix))


def _resolved(experiment: Experiment, where: str = "") -> Experiment:
    """With every field checked against its annotation, and brought to it (a list to a tuple, 1 to 1.0)."""
    return from_dict(Experiment, to_dict(experiment, where=where), where)


# --- the graph ----------------------------------------------------------------------------------------------


def check(experiment: Experiment) -> list[str]:
    """The stage names, parents first. Raises UserError for a mistake in the graph or in a stage."""
    stages, known = experiment.stages, tuple(experiment.stages)
    if not stages:
        raise UserError("stages: the experiment has none")
    for name in known:
        if not _NAME.fullmatch(name):
            raise UserError(f"stages: {name!r} cannot be a stage's name; use letters, digits, '_' and '-'")
    if not _NAME.fullmatch(experiment.name):
        raise UserError(f"name: {experiment.name!r} cannot be a name; use letters, digits, '_' and '-'")
    if not experiment.seeds or len(set(experiment.seeds)) < len(experiment.seeds):
        raise UserError(f"seeds: expected distinct seeds, at least one, got {experiment.seeds}")
    if min(experiment.seeds) < 0 or max(experiment.seeds) >= 2**31:
        raise UserError(f"seeds: must be in [0, 2^31), got {experiment.seeds}")
    for name in first_seeded(experiment):
        if name not in stages:
            raise UserError(f"seed_from: {name!r} is not a stage.{did_you_mean(name, known)}")
    for name, stage in stages.items():
        for ref in stage.references():
            if ref.name not in stages and not ref.optional:
                hint = did_you_mean(ref.name, _fitting(experiment, name, ref))
                raise UserError(f"stages.{name}.{ref.field}: {ref.name!r} is not a stage.{hint}")
    order = _topological(experiment)
    for name, stage in stages.items():
        _check_artifacts(experiment, name, stage)
        try:
            stage.validate(stages)
        except UserError as e:
            raise UserError(f"stages.{name}: {e}") from e
    return order


def _check_artifacts(experiment: Experiment, name: str, stage: Stage) -> None:
    """That each stage that a field names leaves what the field needs."""
    for ref in stage.references():
        if ref.name in experiment.stages:
            named = experiment.stages[ref.name]
            if not ref.fits(named):
                fitting = ", ".join(_fitting(experiment, name, ref)) or "(none)"
                needed = ref.artifact if isinstance(ref.artifact, str) else " or ".join(ref.artifact)
                raise UserError(
                    f"stages.{name}.{ref.field}: needs {needed}, but {ref.name!r} ({type(named).__name__}) "
                    f"leaves {named.artifact or 'nothing (it sets no `artifact`)'}. Stages that fit: {fitting}."
                )


def _fitting(experiment: Experiment, name: str, ref: Reference) -> list[str]:
    """The stages that a field of stage `name` could name."""
    stages = experiment.stages
    return [n for n, s in stages.items() if n != name and ref.fits(s)]


def _topological(experiment: Experiment) -> list[str]:
    """Parents first, otherwise in the order of definition."""
    order: list[str] = []
    waiting = {n: s.parents(experiment.stages) for n, s in experiment.stages.items()}
    while waiting:
        ready = next((n for n, ps in waiting.items() if all(p in order for p in ps)), None)
        if ready is None:
            raise UserError(f"stages: a cycle: {' -> '.join(_cycle(waiting))}")
        order.append(ready)
        del waiting[ready]
    return order


def _cycle(waiting: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Follow unfinished parents until one comes again."""
    path = [next(iter(waiting))]
    while path.count(path[-1]) == 1:
        path.append(next(p for p in waiting[path[-1]] if p in waiting))
    return path[path.index(path[-1]) :]


def dependants(experiment: Experiment, names: tuple[str, ...]) -> set[str]:
    """`names` and every stage that starts from one of them, directly or not."""
    found = set(names)
    for name in _topological(experiment):
        if found.intersection(experiment.stages[name].parents(experiment.stages)):
            found.add(name)
    return found


def first_seeded(experiment: Experiment) -> tuple[str, ...]:
    """The stages that `seed_from` names."""
    given = experiment.seed_from
    return given if isinstance(given, tuple) else (given,) if given else ()


# --- fingerprints -------------------------------------------------------------------------------------------


def tasks(experiment: Experiment, runs_dir: Path) -> list[Task]:
    """Every (stage, seed) once, parents first, seed by seed. Hashes the local files that stages read."""
    order = check(experiment)
    varying = dependants(experiment, first) if (first := first_seeded(experiment)) else set(order)
    made: dict[tuple[str, int], Task] = {}
    for run_seed in experiment.seeds:
        for name in order:
            seed = run_seed if name in varying else experiment.seeds[0]
            if (name, seed) in made:
                continue
            stage = experiment.stages[name]
            parents = {
                p: made[p, run_seed if p in varying else experiment.seeds[0]]
                for p in stage.parents(experiment.stages)
            }
            fp = fingerprint(stage, seed, {p: t.fingerprint for p, t in parents.items()}, f"stages.{name}")
            folder = runs_dir / "stages" / f"{kind(stage)}-{fp[:12]}"
            made[name, seed] = Task(name, stage, seed, fp, folder, parents)
    return list(made.values())


def fingerprint(stage: Stage, seed: int, parents: Mapping[str, str], where: str = "stage") -> str:
    """sha256 (hex) of what decides the stage's results.

    That is: its config with the names of other stages replaced by their fingerprints (`parents`), its seed,
    the content of the local files that it reads, and FORMAT. Its own name, the mesh and the fields made by
    `no_fingerprint` have no part in it.
    """
    try:
        files = {f: content_hash(Path(f)) for f in stage.files()}
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    what = {"format": FORMAT, "stage": _identity(stage, parents), "seed": seed, "files": files}
    return _sha(json.dumps(what, sort_keys=True))


def _identity(value: Any, parents: Mapping[str, str]) -> Any:
    """The part of a config that can change results, as JSON."""
    if dataclasses.is_dataclass(value):
        out: dict[str, Any] = {"type": type(value).__name__}
        for f in dataclasses.fields(value):
            item = getattr(value, f.name)
            if f.metadata.get("stage_ref"):
                one = isinstance(item, str)
                item = parents.get(item, item) if one else [parents.get(n, n) for n in item or ()]
            if f.metadata.get("fingerprint", True):
                out[f.name] = _identity(item, parents)
                if f.metadata.get("ordered"):  # or the hash would sort its keys
                    out[f.name] = list(out[f.name].items())
        return out
    if isinstance(value, (tuple, list)):
        return [_identity(v, parents) for v in value]
    if isinstance(value, Mapping):
        return {k: _identity(v, parents) for k, v in value.items()}
    return value


def content_hash(path: Path) -> str:
    """sha256 (hex) of a file, or of a folder's files and their names.

    Of a file of 64 MB and more: of its size, first MB and last MB. Raises UserError if it is missing.
    """
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.is_file())
        return _sha(json.dumps([(str(p.relative_to(path)), content_hash(p)) for p in inside]))
    if not path.is_file():
        raise UserError(f"{path}: no such file.{_files_near(path)}")
    stat = path.stat()
    return _file_hash(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _file_hash(path: str, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        if size < _WHOLE_FILE:
            while block := f.read(_END):
                digest.update(block)
        else:
            digest.update(str(size).encode())
            digest.update(f.read(_END))
            f.seek(-_END, os.SEEK_END)
            digest.update(f.read(_END))
    return digest.hexdigest()


def kind(stage: Stage) -> str:
    """The class name in kebab case: RewardModel -> reward-model, PPO -> ppo."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", type(stage).__name__).lower()


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- running ------------------------------------------------------------------------------------------------


def default_runs_dir() -> Path | str:
    """`$JRLHF_RUNS`, or `runs` in the current folder."""
    return remote.runs_dir(os.environ.get("JRLHF_RUNS") or "runs")


def run_folder(experiment: Experiment, runs_dir: Path) -> Path:
    """`<runs_dir>/<name>-<hash of the whole resolved experiment>`."""
    whole = json.dumps(to_dict(experiment), sort_keys=True)
    return runs_dir / f"{experiment.name}-{_sha(whole)[:8]}"


def run(
    experiment: Experiment,
    runs_dir: Path,
    *,
    force: tuple[str, ...] | str = (),
    console: Console | None = None,
) -> Path:
    """Run or reuse every (stage, seed), parents first; returns the run folder.

    `force` names stages to run again, with all that depends on them (ALL: every stage). Their folders are
    first renamed to `<folder>.old-<n>`, all of them, so that a forced run that is interrupted goes on
    without `force`. An interrupted stage is resumed in its folder. Two processes that want the same stage
    take turns: the second finds it finished. (Where `runs_dir` stands for a bucket, `remote.working_folder`, the later
    one takes it over, and the other ends.)

    Raises UserError for the user's mistakes and a full disk, Preempted when asked to stop (`STOP`).
    """
    from jrlhf import hosts  # imports jax

    keep_memory()
    console = console or Console(
        quiet=not _leads(), soft_wrap=not sys.stdout.isatty()
    )  # lines of a log stay whole
    experiment = _resolved(experiment)
    todo = tasks(experiment, runs_dir)  # checks the graph
    _pull(todo)
    forced = _forced(experiment, force)
    _check_mesh(experiment, todo, forced)
    keep_compiled(runs_dir)
    folder = run_folder(experiment, runs_dir)
    env = environment()
    results: dict[str, dict[str, Any]] = {}
    _say(console, f"{experiment.name}: {_amount(todo, forced)}")
    with _disk_full_is_a_user_error(runs_dir), _no_run_of_nothing(folder, todo):
        if _leads():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", to_dict(experiment))
            write_json(folder / "environment.json", env)
            write_json(folder / "stages.json", _stage_index(todo))
            for task in todo:
                if task.name in forced:
                    _move_aside(task, console)
            remote.push(folder)
        else:
            for task in todo:
                if task.name in forced and remote.url_of(task.folder):
                    shutil.rmtree(task.folder, ignore_errors=True)  # this process's copy
        hosts.agreed(True)  # nobody looks for what is being moved aside
        for task in todo:
            hosts.WATCH.moved(f"the stage before {_label(task)}")
            if hosts.stop_requested():
                raise Preempted(f"before stage {task.name!r}")
            results.setdefault(task.name, {})[str(task.seed)] = _run_task(
                task, experiment, runs_dir, env, console
            )
            if _leads():
                write_json(folder / "results.json", results)
                remote.push(folder)
    _say(console, f"{experiment.name}: all stages finished, results in {remote.shown(folder)}")
    return folder


def keep_compiled(runs_dir: Path) -> None:
    """Compiled programs are kept in `<runs_dir>/.jax_cache`, unless jax has been told where. All of them are, for a
    stage has many small ones, unless the environment says how long compiling must have taken.

    In a bucket so many small files would take longer than compiling: they are in `~/.cache/jrlhf` of the machine."""
    import jax

    config = jax.config
    if config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    folder = runs_dir.absolute() if remote.url_of(runs_dir) is None else Path.home() / ".cache" / "jrlhf"
    config.update("jax_compilation_cache_dir", str(folder / ".jax_cache"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def keep_memory() -> None:
    """Under glibc, and where jax will run on a CPU, the process keeps the memory that it frees. For before jax starts.

    XLA asks for room for all temporaries anew at every call of a program. By default glibc gets that from the system
    and hands it back each time, and touching so many new pages takes up to a fifth of a train step. Threads that are
    there already go on as before.
    """
    if platform.libc_ver()[0] != "glibc" or not _on_cpu():
        return
    most, trim_above, arenas = -4, -1, -8  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
    for option, value in ((most, 0), (trim_above, 2**31 - 1), (arenas, 1)):
        ctypes.CDLL(None).mallopt(option, value)


def _on_cpu() -> bool:
    """Whether jax will run on a CPU, as far as can be told without starting it."""
    import jax

    named = jax.config.jax_platforms  # type: ignore[attr-defined]
    if named:
        return named.split(",")[0] == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None


def _check_mesh(experiment: Experiment, todo: list[Task], forced: set[str]) -> None:
    """That every stage that will run can run on the devices."""
    for name in dict.fromkeys(t.name for t in todo if t.status != "finished" or t.name in forced):
        try:
            experiment.stages[name].check_mesh(experiment.mesh)
            experiment.stages[name].check_model(experiment.mesh, experiment.stages)
        except UserError as e:
            raise UserError(f"stages.{name}: {e}") from e


def _amount(todo: list[Task], forced: set[str]) -> str:
    """How much is to be done. A stage counts once for each of its seeds."""
    different = {t.folder: t for t in todo}.values()  # equal stages share a folder
    reused = sum(t.status == "finished" and t.name not in forced for t in different)
    return f"stages to run: {len(different) - reused}, to reuse: {reused}"


@contextlib.contextmanager
def _no_run_of_nothing(folder: Path, todo: list[Task]) -> Iterator[None]:
    """Within it, a new run that fails before any of its stages has done something leaves no folder.

    (A run that is stopped or killed goes on, and so it stays.)
    """
    new = not folder.exists() and not remote.names(folder)
    unfinished = [t.folder for t in todo if t.status != "finished"]
    try:
        yield
    except Preempted:
        raise
    except Exception:
        if new and _leads() and not any(f.exists() for f in unfinished):
            shutil.rmtree(folder, ignore_errors=True)
            remote.remove_folder(folder)
        raise


def _forget_if_empty(folder: Path) -> None:
    """Remove a stage's folder that holds nothing but the records of its start."""
    held = {p.name for p in folder.iterdir()} | remote.names(folder)
    if held <= {"config.json", "environment.json"}:
        shutil.rmtree(folder)
        remote.remove_folder(folder)


def _pull(todo: list[Task]) -> None:
    """What a bucket holds of the stages, where the folder of runs is one."""
    for folder in {task.folder: None for task in todo}:
        remote.pull(folder)


def _stage_index(todo: list[Task]) -> dict[str, dict[str, str]]:
    """{stage name: {seed: stage folder relative to the runs folder}}"""
    out: dict[str, dict[str, str]] = {}
    for task in todo:
        out.setdefault(task.name, {})[str(task.seed)] = f"stages/{task.folder.name}"
    return out


def _forced(experiment: Experiment, force: tuple[str, ...] | str) -> set[str]:
    if force == ALL:
        return set(experiment.stages)
    names = (force,) if isinstance(force, str) else force
    for name in names:
        if name not in experiment.stages:
            raise UserError(f"--force {name}: not a stage.{did_you_mean(name, experiment.stages)}")
    return dependants(experiment, names)


def _run_task(
    task: Task, experiment: Experiment, runs_dir: Path, env: Mapping[str, Any], console: Console
) -> dict[str, Any]:
    """The task's results, from its folder if it is finished there."""
    from jrlhf import hosts

    label = _label(task)
    done_file = task.folder / "done.json"
    with contextlib.ExitStack() as stack:
        if _leads():
            stack.enter_context(_locked(task.folder, label, console))
        remote.pull(task.folder)  # another start may have gone on with it
        if hosts.agreed(task.status == "finished"):
            if task.stage.only_notes:
                if _leads():
                    task.stage.run(_context(task, experiment, runs_dir, console))
                    remote.claim(task.folder)
                hosts.agreed(True)
            remote.pull(task.folder)  # as the first process has found it
            done = read_json(done_file)
            saved = _duration(done["seconds"])
            _say(console, f"{label}: reused {remote.shown(task.folder)} (saves {saved})")
            return done["results"]
        if _leads():
            verb = "resuming" if task.status == "partial" else "running"
            _say(console, f"{label}: {verb} in {remote.shown(task.folder)}")
            task.folder.mkdir(parents=True, exist_ok=True)
            write_json(task.folder / "config.json", _stage_record(task))
            write_json(task.folder / "environment.json", {**env, "date": _now()})
            remote.claim(task.folder)
        hosts.agreed(True)  # no process enters the folder before it is ready
        start = time.monotonic()
        try:
            ctx = _context(task, experiment, runs_dir, console)
            with remote.kept(task.folder if _leads() else task.folder / "profile"):
                results = ctx.stage.run(ctx)
        except Exception as e:
            where = remote.shown(task.folder)
            e.add_note(f"in stage {task.name!r} (seed {task.seed}), folder {where}")
            if _leads() and not isinstance(e, Preempted):
                _forget_if_empty(task.folder)
            raise
        seconds = time.monotonic() - start  # of this process; what an interrupted one spent is not in it
        results = _plain(results, f"stage {task.name!r}: results")
        if _leads():
            write_json(done_file, {"results": results, "seconds": round(seconds, 3)})
            remote.push(task.folder)
        hosts.agreed(True)
        remote.pull(task.folder)  # what the first process alone has written
        _say(console, f"{label}: finished in {_duration(seconds)}")
        return results


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _label(task: Task) -> str:
    return f"{task.name} (seed {task.seed})"


def _stage_record(task: Task) -> dict[str, Any]:
    return {
        "stage": to_dict(task.stage, Stage),
        "seed": task.seed,
        "fingerprint": task.fingerprint,
        "parents": {
            n: {"fingerprint": t.fingerprint, "folder": t.folder.name} for n, t in task.parents.items()
        },
        "format": FORMAT,
    }


def _context(task: Task, experiment: Experiment, runs_dir: Path, console: Console) -> StageContext:
    parents = {n: t.folder for n, t in task.parents.items()}
    return StageContext(
        name=task.name,
        stage=with_stage_rows(task.stage, parents, experiment.stages),
        folder=task.folder,
        parents=parents,
        stages=experiment.stages,
        seed=task.seed,
        mesh=experiment.mesh,
        console=console,
        runs_dir=runs_dir,
    )


def _move_aside(task: Task, console: Console) -> None:
    """Rename the task's folder, if there is one, to the first free `<folder>.old-<n>`."""
    with _locked(task.folder, _label(task), console):
        if task.folder.exists():
            named = (task.folder.with_name(f"{task.folder.name}.old-{n}") for n in itertools.count(1))
            old = next(f for f in named if not f.exists() and not remote.names(f))
            remote.move_folder(task.folder, old)
            task.folder.rename(old)
            _say(console, f"{_label(task)}: the former run is kept as {remote.shown(old)}")


@contextlib.contextmanager
def _locked(folder: Path, label: str, console: Console) -> Iterator[None]:
    """Hold the stage's lock; the operating system releases it if the process dies.

    The lock file lies beside the folder, because the folder can be renamed.
    """
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as f:
        told = False
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    f.seek(0)
                    _say(console, f"{label}: another process runs it ({f.read().strip()}); waiting")
                    told = True
                if STOP.requested:
                    raise Preempted(f"while waiting for {folder}") from None
                time.sleep(0.2)
        f.truncate(0)
        f.write(f"process {os.getpid()} on {platform.node()}")
        f.flush()
        yield


@contextlib.contextmanager
def _disk_full_is_a_user_error(runs_dir: Path) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        cause: BaseException | None = e
        while cause is not None:
            # Libraries that write from C++ (tensorstore under Orbax) report it in the text of another error.
            number = cause.errno if isinstance(cause, OSError) else None
            if number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(cause):
                where = getattr(cause, "filename", None) or runs_dir
                raise UserError(
                    f"disk full while writing to {where}; free some space and run the same command to go on"
                ) from e
            cause = cause.__cause__ or cause.__context__
        raise


def _leads() -> bool:
    """Whether this process writes the folders: of several (one per host), the first."""
    jax = sys.modules.get("jax")  # without it there is only one process
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def _plain(value: Any, where: str) -> Any:
    """Results as JSON values: 0-d arrays become numbers; NaN and infinities become strings."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v, f"{where}.{i}") for i, v in enumerate(value)]
    if getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{where}: expected a JSON value, got {type(value).__name__}")


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as f:
        json.dump(value, f, indent=2, allow_nan=False)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def environment() -> dict[str, Any]:
    """What a run happened on: Python, packages, devices, code version (with its diff), command, date."""
    import jax

    devices = jax.devices()
    # Each look at `metadata` reads the file anew.
    installed = (d.metadata for d in importlib.metadata.distributions())
    packages = {m["Name"]: m["Version"] for m in installed if m["Name"]}
    return {
        "date": _now(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": {"kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices)},
        "processes": jax.process_count(),
        "git": _git_state(),
        "packages": dict(sorted(packages.items())),
    }


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _git_state() -> dict[str, Any] | None:
    """Commit and uncommitted changes of the repository around the current folder; None if there is none."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *args], capture_output=True, text=True, errors="replace", check=False
            )
        except FileNotFoundError:  # git is not installed
            return None
        return done.stdout if done.returncode == 0 else None

    status = git("status", "--porcelain")
    if status is None:
        return _shipped_state()
    commit = git("rev-parse", "HEAD")  # none before the first commit
    return {
        "commit": commit and commit.strip(),
        "dirty": bool(status.strip()),
        "untracked": [line[3:] for line in status.splitlines() if line.startswith("??")],
        "diff": git("diff", "HEAD") if commit else None,
    }


def _shipped_state() -> dict[str, Any] | None:
    """The same of a tree that was copied without its repository: what tpu_scripts/sync.sh noted in `.jrlhf-source`, or
    the commit that an image was built from (JRLHF_COMMIT)."""
    noted = Path(".jrlhf-source")
    if not (noted / "commit").is_file():
        commit = os.environ.get("JRLHF_COMMIT")
        return {"commit": commit, "dirty": None, "untracked": [], "diff": None} if commit else None
    read = lambda name: (noted / name).read_text(encoding="utf-8", errors="replace")  # noqa: E731
    untracked, diff = read("untracked").splitlines(), read("diff")
    return {
        "commit": read("commit").strip(),
        "dirty": bool(untracked or diff),
        "untracked": untracked,
        "diff": diff,
    }


# --- showing ------------------------------------------------------------------------------------------------


def dry_run(
    experiment: Experiment, runs_dir: Path, *, force: tuple[str, ...] | str = (), whole_mesh: bool = True
) -> Table:
    """A table of what `run` would do: one row per (stage, seed). Creates nothing.

    Raises UserError for all that `run` would refuse before it begins. whole_mesh: the devices of the mesh are all here,
    so that it is checked.
    """
    experiment = _resolved(experiment)
    todo = tasks(experiment, runs_dir)  # checks the graph
    _pull(todo)
    forced = _forced(experiment, force)
    if whole_mesh:
        _check_mesh(experiment, todo, forced)
    console = Console(quiet=True)
    title = f"{experiment.name}: {remote.shown(run_folder(experiment, runs_dir))}"
    caption = f"{_amount(todo, forced)} (≤: at most, as far as can be told before the stages it starts from have run)"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in ("stage", "kind", "starts from", "seed", "status"):
        table.add_column(column)
    for column in ("params", "rows", "steps", "tokens", "memory"):
        table.add_column(column, justify="right")
    table.add_column("note")
    for task in todo:
        try:
            ctx = _context(task, experiment, runs_dir, console)
            plan = ctx.stage.plan(ctx)
        except UserError as e:
            raise UserError(f"stages.{task.name}: {e}") from e
        status = "to do (forced)" if task.name in forced else task.status
        counts = {"rows": plan.rows, "steps": plan.steps, "tokens": plan.tokens}
        table.add_row(
            task.name, kind(task.stage), ", ".join(task.parents) or "-", str(task.seed), status,
            _count(plan.model_params),
            *("≤ " * (name in plan.at_most) + _count(n) for name, n in counts.items()),
            bytes_text(plan.memory_bytes) if plan.memory_bytes else "-", escape(plan.note),
        )  # fmt: skip
    return table


def find_run(name: str, runs_dir: Path, tell: Callable[[str], None] = lambda line: None) -> Path:
    """A run folder by its path (or its config.json's), or by its name, or the beginning of it, in `runs_dir`.

    Of several runs of one experiment the newest finished one is taken (where none is, the newest), and `tell` is
    called with a line that says so.
    """
    path = Path(name)
    path = path.parent if path.name == "config.json" else path
    if (path / "stages.json").is_file():
        return path
    if remote.is_url(name):
        parent, _, own = name.rstrip("/").rpartition("/")
        raise UserError(f"{name}: name a run in a bucket by --runs-dir {parent} and {own or 'RUN'}")
    runs = run_folders(runs_dir)
    known = [p.name for p in runs]
    if name in known:
        return _pulled(runs_dir / name)
    found = [p for p in runs if experiment_name(p) == name] or [p for p in runs if p.name.startswith(name)]
    names = dict.fromkeys(map(experiment_name, found))
    if len(names) > 1:
        raise UserError(f"{name}: runs of several experiments have names that begin so: {', '.join(names)}")
    if not found:
        where = remote.shown(runs_dir)
        missing = f"neither a folder, nor a run in {where}" if "/" in name else f"no such run in {where}"
        raise UserError(f"{name}: {missing}.{did_you_mean(name, map(experiment_name, runs))}")
    finished = [p for p in found if is_finished(p)]
    chosen = (finished or found)[-1]
    if len(found) > 1:
        which = "the newest finished" if finished else "the newest"
        tell(f"{name}: {chosen.name}, {which} of {len(found)} runs (`jrlhf list` tells how they differ)")
    return _pulled(chosen)


def _pulled(run: Path) -> Path:
    """A run folder, with the small files of its stages where it lies in a bucket."""
    remote.pull(run)
    for seeds in stage_folders(run).values():
        for folder in seeds.values():
            remote.pull(folder)
    return run


def experiment_name(run: Path) -> str:
    """The experiment's name in that of its run folder."""
    return run.name.rpartition("-")[0]


def is_finished(run: Path) -> bool:
    """Whether every stage of a run folder is."""
    return all((f / "done.json").is_file() for seeds in stage_folders(run).values() for f in seeds.values())


def differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What two experiments' configs (as JSON) do not share: `path=value` as in `other`, `-path` where it has none."""
    ours, theirs = dict(_settings(first)), dict(_settings(other))
    changed = [f"{path}={value}" for path, value in theirs.items() if ours.get(path, ...) != value]
    gone = dict.fromkeys(_part(path, theirs) for path in ours if path not in theirs)
    return changed + [f"-{path}" for path in gone]


def _settings(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path as on the command line, value) of every field; those of a stage without the leading `stages.`."""
    if isinstance(data, list) and any(isinstance(v, dict) for v in data):
        data = dict(enumerate(data))
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from _settings(value, f"{path}.{key}" if path else str(key))
    else:
        value = " ".join(map(str, data)) if isinstance(data, list) else data
        yield path.removeprefix("stages."), value


def _part(path: str, others: Mapping[str, Any]) -> str:
    """The whole of `path` that is missing in `others`: a stage, rather than each of its fields."""
    words = path.split(".")
    for n in range(1, len(words)):
        beginning = ".".join(words[:n])
        if not any(other == beginning or other.startswith(beginning + ".") for other in others):
            return beginning
    return path


def run_folders(runs_dir: Path) -> list[Path]:
    """Every run folder, oldest first."""
    remote.pull_index(runs_dir)
    if not runs_dir.is_dir():
        return []
    found = [p for p in runs_dir.iterdir() if (p / "stages.json").is_file()]
    return sorted(found, key=lambda p: ((p / "stages.json").stat().st_mtime, p.name))


def stage_folders(run: Path) -> dict[str, dict[str, Path]]:
    """{stage name: {seed: stage folder}} of a run folder."""
    listed = read_json(run / "stages.json")
    return {name: {seed: run.parent / f for seed, f in seeds.items()} for name, seeds in listed.items()}


def _count(n: float) -> str:
    """1234567 as 1.23M; nothing as a dash."""
    if n < 10_000:
        return str(n) if n else "-"
    for unit in ("k", "M", "G"):
        n /= 1000
        if n < 1000:
            return f"{n:.3g}{unit}"
    return f"{n / 1000:.3g}T"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"
