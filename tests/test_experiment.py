"""The graph, what is reused and what is run again, locks, and what a run leaves on disk."""

import errno
import json
import os
import socket
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jrlhf.config import (
    STOP,
    MeshConfig,
    Preempted,
    Source,
    Stage,
    UserError,
    load_stage,
    no_fingerprint,
    stage_ref,
    stage_ref_or_name,
)
from jrlhf.experiment import (
    ALL,
    Experiment,
    check,
    content_hash,
    dry_run,
    environment,
    find_run,
    kind,
    load_experiment,
    load_python,
    run,
    run_folder,
    run_folders,
    stage_folders,
    tasks,
    write_json,
)
from jrlhf.types import Plan


@dataclass(frozen=True)
class ToyFile(Source):
    path: str

    def files(self):
        return (self.path,)


@dataclass(frozen=True)
class ToyTrain(Stage):
    """Its result is a number that depends on everything that may matter. Each run adds a line to `count`."""

    start: str = stage_ref("")
    lr: float = 0.1
    data: Source | None = None
    reward: str = stage_ref_or_name("length")
    log_every: int = no_fingerprint(10)

    def plan(self, ctx):
        return Plan(model_params=1_234_567, rows=10, steps=3, tokens=99, memory_bytes=2**31, note="[toy]")

    def run(self, ctx):
        assert ctx.folder.is_dir()
        with open(ctx.folder / "count", "a") as f:
            f.write("ran\n")
        inherited = [
            json.loads((p / "done.json").read_text())["results"]["value"] for p in ctx.parents.values()
        ]
        return {"value": self.lr + ctx.seed + sum(inherited)}


@dataclass(frozen=True)
class ToyPair(Stage):
    members: tuple[str, ...] = stage_ref()

    def validate(self, names):
        if len(self.members) != 2:
            raise UserError(f"members: expected 2, got {len(self.members)}")

    def run(self, ctx):
        return {"members": sorted(ctx.parents)}


@dataclass(frozen=True)
class ToyFails(Stage):
    """Raises ERROR[0], if there is one. Its result is the number of attempts in its folder."""

    start: str = stage_ref("")
    lr: float = 0.0

    def run(self, ctx):
        with open(ctx.folder / "attempts", "a") as f:
            f.write("x")
        if ERROR:
            raise ERROR[0]
        return {"value": len((ctx.folder / "attempts").read_text())}


ERROR: list[BaseException] = []


@dataclass(frozen=True)
class ToyResult(Stage):
    nothing: int = 0

    def run(self, ctx):
        return RESULT[0]


RESULT: list = [{}]

QUIET = Console(quiet=True)
# For processes of their own.
ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "JAX_PLATFORMS": "cpu"}


def graph(name="toy", seeds=(0,), seed_from="", **stages) -> Experiment:
    """base -> sft -> ppo, and rm beside."""
    default = {
        "base": ToyTrain(lr=1.0),
        "sft": ToyTrain("base", lr=2.0),
        "rm": ToyTrain("base", lr=3.0),
        "ppo": ToyTrain("sft", lr=4.0, reward="rm"),
    }
    return Experiment(name, default | stages, seeds, seed_from)


def go(experiment, runs_dir, **kwargs) -> dict[str, str]:
    """Run it; {stage/seed: what the console said was done}."""
    out = StringIO()
    run(experiment, runs_dir, console=Console(file=out, width=200), **kwargs)
    said = {}
    for line in out.getvalue().splitlines():
        what, _, how = line.partition(": ")
        verb = how.split(" ")[0]
        if what.endswith(")") and verb in ("reused", "running", "resuming"):
            name, seed = what.rstrip(")").split(" (seed ")
            said[f"{name}/{seed}"] = verb
    return said


def ran(said: dict[str, str]) -> set[str]:
    return {name for name, verb in said.items() if verb != "reused"}


# --- the graph ----------------------------------------------------------------------------------------------


def test_parents_come_first_and_otherwise_the_order_of_definition():
    shuffled = Experiment("x", {n: graph().stages[n] for n in ("ppo", "rm", "sft", "base")})
    assert check(shuffled) == ["base", "rm", "sft", "ppo"]
    assert check(graph()) == ["base", "sft", "rm", "ppo"]


BAD_GRAPHS = [
    (
        graph(ppo=ToyTrain("sfft")),
        "stages.ppo.start: 'sfft' is not a stage. Did you mean 'sft'?",
    ),
    (graph(base=ToyTrain("ppo")), "stages: a cycle: base -> ppo -> sft -> base"),
    (graph(sft=ToyTrain("sft")), "stages: a cycle: sft -> sft"),
    (graph(pair=ToyPair(("sft",))), "stages.pair: members: expected 2, got 1"),
    (graph(**{"a/b": ToyTrain()}), "stages: 'a/b' cannot be a stage's name"),
    (graph(**{"..": ToyTrain()}), "stages: '..' cannot be a stage's name"),
    (graph(**{"": ToyTrain()}), "stages: '' cannot be a stage's name"),
    (graph(name="a b"), "name: 'a b' cannot be a name"),
    (graph(seed_from="pppo"), "seed_from: 'pppo' is not a stage. Did you mean 'ppo'?"),
    (graph(seed_from=("sft", "pppo")), "seed_from: 'pppo' is not a stage. Did you mean 'ppo'?"),
    (graph(seeds=()), "seeds: expected distinct seeds"),
    (graph(seeds=(1, 1)), "seeds: expected distinct seeds"),
    (graph(seeds=(-1,)), "seeds: must be in [0, 2^31)"),
    (Experiment("x", {}), "stages: the experiment has none"),
    (graph(ppo=replace(ToyTrain(), lr="abc")), "stages.ppo.lr: expected a float, got the string 'abc'"),
    (graph(ppo=3), "stages.ppo: expected a Stage, got 3"),
    (graph(ppo=ToyTrain(data=ToyFile("missing.txt"))), "stages.ppo: missing.txt: no such file"),
]


@pytest.mark.parametrize(("experiment", "message"), BAD_GRAPHS, ids=[m for _, m in BAD_GRAPHS])
def test_a_bad_graph_is_refused_before_anything_runs(experiment, message, tmp_path):
    with pytest.raises(UserError) as error:
        run(experiment, tmp_path / "runs", console=QUIET)
    assert message in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ToyModel", "toy-model"), ("TOY", "toy"), ("BestOfToy", "best-of-toy"), ("ToyN", "toy-n")],
)
def test_kind(name, expected):
    assert kind(type(name, (Stage,), {})()) == expected


# --- reuse --------------------------------------------------------------------------------------------------


def test_a_second_run_reuses_everything(tmp_path):
    assert ran(go(graph(), tmp_path)) == {"base/0", "sft/0", "rm/0", "ppo/0"}
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("stages/*/*")}
    assert ran(go(graph(), tmp_path)) == set()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("stages/*/*")} == before


@pytest.mark.parametrize(
    ("stage", "runs_again"),
    [
        ("base", {"base/0", "sft/0", "rm/0", "ppo/0"}),
        ("sft", {"sft/0", "ppo/0"}),
        ("rm", {"rm/0", "ppo/0"}),  # ppo starts from rm through its reward
        ("ppo", {"ppo/0"}),
    ],
)
def test_a_changed_config_runs_exactly_its_dependants(stage, runs_again, tmp_path):
    go(graph(), tmp_path)
    changed = graph(**{stage: replace(graph().stages[stage], lr=9.0)})
    assert ran(go(changed, tmp_path)) == runs_again
    assert ran(go(graph(), tmp_path)) == set()  # and the first results are still there


@pytest.mark.parametrize("stage", ["base", "sft", "rm", "ppo"])
def test_force_runs_the_stage_and_its_dependants_and_loses_nothing(stage, tmp_path):
    go(graph(), tmp_path)
    (folder,) = [t.folder for t in tasks(graph(), tmp_path) if t.name == stage]
    (folder / "precious").write_text("kept")
    affected = {"base": 4, "sft": 2, "rm": 2, "ppo": 1}[stage]
    for again in (1, 2):
        said = go(graph(), tmp_path, force=(stage,))
        assert len(ran(said)) == affected
        assert f"{stage}/0" in ran(said)
        assert len(list(tmp_path.glob("stages/*.old-*"))) == again * affected
    assert not (folder / "precious").exists()
    assert folder.with_name(folder.name + ".old-1").joinpath("precious").read_text() == "kept"
    assert ran(go(graph(), tmp_path)) == set()


def test_force_all(tmp_path):
    go(graph(), tmp_path)
    assert ran(go(graph(), tmp_path, force=ALL)) == {"base/0", "sft/0", "rm/0", "ppo/0"}


def test_an_interrupted_forced_run_does_not_reuse_what_it_was_to_replace(tmp_path):
    """Were the dependants moved aside only in their turn, the old ppo would pass for one of the new sft."""
    fails = graph(sft=ToyFails("base"))
    go(fails, tmp_path)
    ERROR.append(RuntimeError("crash"))
    try:
        with pytest.raises(RuntimeError, match="crash"):
            go(fails, tmp_path, force=("sft",))
    finally:
        ERROR.clear()
    assert ran(go(fails, tmp_path)) == {"sft/0", "ppo/0"}


def test_what_cannot_change_results_is_not_in_the_fingerprint(tmp_path):
    go(graph(), tmp_path)
    stages = graph().stages
    other = Experiment(
        "other",
        {
            "first": replace(stages["base"], log_every=99),
            "second": replace(stages["sft"], start="first"),
            "judge": replace(stages["rm"], start="first"),
            "third": replace(stages["ppo"], start="second", reward="judge"),
        },
        mesh=MeshConfig(data=1, tensor=2),
    )
    assert ran(go(other, tmp_path)) == set()


def test_equal_stages_of_one_experiment_are_run_once(tmp_path):
    twins = graph(twin=ToyTrain("base", lr=2.0))
    assert ran(go(twins, tmp_path)) == {"base/0", "sft/0", "rm/0", "ppo/0"}
    assert ran(go(twins, tmp_path, force=("sft", "twin"))) == {"sft/0", "ppo/0"}


def test_fingerprints_tell_apart():
    def prints(**kwargs):
        return {t.name: t.fingerprint for t in tasks(graph(**kwargs), Path("runs"))}

    one = prints()
    assert len(set(one.values())) == 4
    assert prints(seeds=(1,))["base"] != one["base"]
    # The same parents in other fields: which is the policy and which the reward matters.
    swapped = prints(ppo=ToyTrain("rm", lr=4.0, reward="sft"))
    assert swapped["ppo"] != one["ppo"]
    # A program's name is not a stage's.
    assert prints(ppo=ToyTrain("sft", lr=4.0, reward="format"))["ppo"] not in (one["ppo"], swapped["ppo"])


def test_the_content_of_files_counts(tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("one")
    experiment = graph(sft=ToyTrain("base", lr=2.0, data=ToyFile(str(data))))
    assert len(ran(go(experiment, tmp_path / "runs"))) == 4
    data.touch()
    assert ran(go(experiment, tmp_path / "runs")) == set()
    data.write_text("two")
    assert ran(go(experiment, tmp_path / "runs")) == {"sft/0", "ppo/0"}


def test_content_hash_of_large_files_and_folders(tmp_path):
    big = tmp_path / "big"
    with open(big, "wb") as f:
        f.truncate(64 * 2**20)  # sparse
    first = content_hash(big)
    with open(big, "r+b") as f:
        f.seek(-1, 2)
        f.write(b"x")
    last_changed = content_hash(big)
    assert last_changed != first
    with open(big, "ab") as f:
        f.write(b"x")
    assert content_hash(big) not in (first, last_changed)
    small = tmp_path / "folder" / "a"
    small.parent.mkdir()
    small.write_text("1")
    before = content_hash(small.parent)
    small.rename(small.with_name("b"))
    assert content_hash(small.parent) != before


# --- seeds --------------------------------------------------------------------------------------------------


def test_every_stage_takes_each_seed(tmp_path):
    said = go(graph(seeds=(3, 5)), tmp_path)
    assert set(said) == {f"{n}/{s}" for n in ("base", "sft", "rm", "ppo") for s in (3, 5)}


def test_seed_from_varies_it_and_its_dependants_only(tmp_path):
    experiment = graph(seeds=(3, 5, 7), seed_from="sft")
    said = go(experiment, tmp_path)
    assert set(said) == {"base/3", "rm/3", *(f"{n}/{s}" for n in ("sft", "ppo") for s in (3, 5, 7))}
    results = json.loads((run_folder(experiment, tmp_path) / "results.json").read_text())
    # value = own lr + own seed + the parents' values: ppo is on sft (on base) and on rm (on base)
    for seed in (3, 5, 7):
        sft, rm = (1 + 3) + 2 + seed, (1 + 3) + 3 + 3
        assert results["ppo"][str(seed)]["value"] == 4 + seed + sft + rm
    assert ran(go(replace(experiment, seeds=(3, 9)), tmp_path)) == {"sft/9", "ppo/9"}


def test_seed_from_several_stages(tmp_path):
    """`ppo` meets a reward model of its own seed only where that varies too."""
    said = go(graph(seeds=(3, 5), seed_from=("sft", "rm")), tmp_path)
    assert set(said) == {"base/3", *(f"{n}/{s}" for n in ("sft", "rm", "ppo") for s in (3, 5))}


# --- what is left on disk -----------------------------------------------------------------------------------


def test_the_run_folder_runs_again_from_its_config(tmp_path):
    experiment = graph(seeds=(0, 1), seed_from="ppo")
    go(experiment, tmp_path)
    folder = run_folder(experiment, tmp_path)
    assert load_experiment(folder / "config.json") == experiment
    assert load_experiment(folder) == experiment
    assert ran(go(load_experiment(folder), tmp_path)) == set()
    assert find_run("toy", tmp_path) == find_run(str(folder), tmp_path) == folder
    assert run_folders(tmp_path) == [folder]
    assert json.loads((folder / "environment.json").read_text())["devices"]["platform"] == "cpu"


def test_stage_folders_hold_config_environment_and_results(tmp_path):
    experiment = graph(seeds=(0, 1), seed_from="ppo")
    go(experiment, tmp_path)
    folders = stage_folders(run_folder(experiment, tmp_path))
    assert {n: set(s) for n, s in folders.items()} == {
        "base": {"0"},
        "sft": {"0"},
        "rm": {"0"},
        "ppo": {"0", "1"},
    }
    ppo = folders["ppo"]["1"]
    assert ppo.parent == tmp_path / "stages"
    assert ppo.name.startswith("toy-train-")
    assert load_stage(ppo) == (experiment.stages["ppo"], 1)
    config = json.loads((ppo / "config.json").read_text())
    sft = json.loads((folders["sft"]["0"] / "config.json").read_text())
    assert config["parents"]["sft"] == {"fingerprint": sft["fingerprint"], "folder": folders["sft"]["0"].name}
    done = json.loads((ppo / "done.json").read_text())
    assert done["results"] == {"value": (4 + 1) + (1 + 2) + (1 + 3)}
    assert done["seconds"] >= 0
    recorded = json.loads((ppo / "environment.json").read_text())
    assert recorded["packages"]["jax"]
    assert recorded["command"] == sys.argv


def test_the_environment_has_the_code_version(tmp_path, monkeypatch):
    def git(*args):
        subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x@y", *args], check=True, capture_output=True
        )

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["git"] is None
    git("init")
    assert environment()["git"]["commit"] is None  # nothing committed yet
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", ".")
    git("commit", "-m", "x")
    clean = environment()["git"]
    assert (clean["dirty"], clean["diff"]) == (False, "")
    assert len(clean["commit"]) == 40
    (tmp_path / "code.py").write_text("a = 2\n")
    (tmp_path / "new.py").write_text("")
    dirty = environment()["git"]
    assert dirty["dirty"]
    assert "+a = 2" in dirty["diff"]
    assert dirty["untracked"] == ["new.py"]


def test_where_there_is_no_repository_the_version_is_what_was_noted_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("JRLHF_COMMIT", "abc")  # of an image
    assert environment()["git"]["commit"] == "abc"
    noted = tmp_path / ".jrlhf-source"
    noted.mkdir()
    for name, text in {"commit": "def\n", "diff": "+a = 2\n", "untracked": "new.py\n"}.items():
        (noted / name).write_text(text)
    found = environment()["git"]
    assert found == {"commit": "def", "dirty": True, "untracked": ["new.py"], "diff": "+a = 2\n"}


def test_results_become_json(tmp_path):
    experiment = Experiment("x", {"a": ToyResult()})
    RESULT[0] = {
        "n": np.float32(0.5),
        "i": np.int64(3),
        "bad": float("nan"),
        "inf": [float("inf"), None],
        "s": "x",
    }
    go(experiment, tmp_path)
    expected = {"n": 0.5, "i": 3, "bad": "nan", "inf": ["inf", None], "s": "x"}
    assert json.loads((run_folder(experiment, tmp_path) / "results.json").read_text()) == {
        "a": {"0": expected}
    }
    RESULT[0] = {"a": {"b": np.zeros(3)}}
    with pytest.raises(TypeError, match=r"stage 'a': results\.a\.b: expected a JSON value, got ndarray"):
        go(experiment, tmp_path, force=ALL)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "f", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "f", {"b": 2, "a": float("nan")})
    assert json.loads((tmp_path / "f").read_text()) == {"a": 1}


# --- interruptions ------------------------------------------------------------------------------------------


@pytest.fixture
def fail_with():
    def set_error(error):
        ERROR[:] = [error]

    yield set_error
    ERROR.clear()
    STOP.clear()


def test_a_partial_stage_is_resumed_in_its_folder(tmp_path, fail_with):
    experiment = Experiment("x", {"a": ToyFails()})
    fail_with(Preempted("saved at step 3"))
    with pytest.raises(Preempted, match="saved at step 3"):
        go(experiment, tmp_path)
    (task,) = tasks(experiment, tmp_path)
    assert task.status == "partial"
    ERROR.clear()
    assert go(experiment, tmp_path) == {"a/0": "resuming"}
    assert task.status == "finished"
    assert json.loads((task.folder / "done.json").read_text())["results"] == {"value": 2}


def test_no_stage_begins_after_a_stop_request(tmp_path, fail_with):
    STOP.request()
    with pytest.raises(Preempted, match="before stage 'base'"):
        go(graph(), tmp_path)
    STOP.clear()
    assert len(ran(go(graph(), tmp_path))) == 4


def test_errors_of_a_stage(tmp_path, fail_with):
    experiment = Experiment("x", {"a": ToyFails()})
    fail_with(UserError("mend this"))
    with pytest.raises(UserError) as mistake:
        go(experiment, tmp_path)
    assert str(mistake.value) == "mend this"
    fail_with(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug") as error:
        go(experiment, tmp_path)
    assert "in stage 'a' (seed 0)" in error.value.__notes__[0]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/data/ckpt"),
        ValueError("RESOURCE: write failed: No space left on device [/data/ckpt]"),
    ],
)
def test_a_full_disk_is_the_users_to_mend(error, tmp_path, fail_with):
    fail_with(error)
    with pytest.raises(UserError, match=r"disk full while writing to .*run the same command"):
        go(Experiment("x", {"a": ToyFails()}), tmp_path)


def test_two_processes_do_not_run_the_same_stage(tmp_path):
    (tmp_path / "slow.py").write_text(
        textwrap.dedent("""
        import sys, time
        from dataclasses import dataclass
        from pathlib import Path
        from jrlhf.config import Stage
        from jrlhf.experiment import Experiment, run

        @dataclass(frozen=True)
        class ToySlow(Stage):
            n: int = 0
            def run(self, ctx):
                with open(ctx.folder / "count", "a") as f:
                    f.write("ran\\n")
                while not Path("go").exists():
                    time.sleep(0.02)
                return {}

        run(Experiment("x", {"a": ToySlow()}), Path("runs"))
        """)
    )

    def start():
        return subprocess.Popen(
            [sys.executable, "-u", "slow.py"], cwd=tmp_path, env=ENV, text=True, stdout=subprocess.PIPE
        )  # fmt: skip

    first = start()
    first.stdout.readline()  # how much there is to do
    assert "running in" in first.stdout.readline()
    second = start()
    second.stdout.readline()
    waiting = second.stdout.readline()
    (tmp_path / "go").touch()
    first_rest, second_rest = first.communicate(timeout=60)[0], second.communicate(timeout=60)[0]
    assert f"another process runs it (process {first.pid} on" in waiting
    assert "finished in" in first_rest
    assert "reused" in second_rest
    assert (first.returncode, second.returncode) == (0, 0)
    (count,) = tmp_path.glob("runs/stages/*/count")
    assert count.read_text() == "ran\n"


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    (tmp_path / "killed.py").write_text(
        textwrap.dedent("""
        import os, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        import test_experiment as toy
        toy.ToyTrain.run = lambda self, ctx: os.kill(os.getpid(), 9)
        toy.run(toy.graph(), Path("runs"))
        """)
    )
    command = [sys.executable, "killed.py", str(Path(__file__).parent)]
    assert subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, timeout=120).returncode == -9
    assert go(graph(), tmp_path / "runs")["base/0"] == "resuming"


# --- the dry run --------------------------------------------------------------------------------------------


def test_dry_run_shows_every_task_and_creates_nothing(tmp_path, fail_with):
    experiment = graph(seeds=(0, 1), seed_from="ppo", sft=ToyFails("base"))
    assert rows(experiment, tmp_path / "runs")["base 0"][4] == "to do"
    assert not (tmp_path / "runs").exists()
    fail_with(Preempted())
    with pytest.raises(Preempted):
        go(experiment, tmp_path)
    shown = rows(experiment, tmp_path)
    assert [r[4] for r in shown.values()] == ["finished", "partial", "to do", "to do", "to do"]
    assert shown["ppo 1"] == [
        "ppo", "toy-train", "sft, rm", "1", "to do", "1.23M", "10", "3", "99", "2.00 GiB", r"\[toy]",
    ]  # fmt: skip
    forced = rows(experiment, tmp_path, force=("base",))
    assert forced["base 0"][4] == "to do (forced)"


def rows(experiment, runs_dir, **kwargs) -> dict[str, list[str]]:
    table = dry_run(experiment, runs_dir, **kwargs)
    cells = zip(*(c._cells for c in table.columns), strict=True)
    return {f"{row[0]} {row[3]}": list(row) for row in cells}


# --- what the guide shows -----------------------------------------------------------------------------------


def test_the_guides_stage_runs_as_it_stands(tmp_path):
    guide = (Path(__file__).parent.parent / "docs" / "experiments.md").read_text(encoding="utf-8")
    (code,) = (block for block in guide.split("```")[1::2] if "class CountWords" in block)
    (tmp_path / "guide.py").write_text(code.removeprefix("python\n"))
    guide_file = load_python(tmp_path / "guide.py")

    @dataclass(frozen=True)
    class ToyPreferences(Stage):
        artifact = "preferences"

        def run(self, ctx):
            rows = [{"responses": ["a b", "c"]}, {"responses": ["d", "e f g"]}, {"responses": ["h"]}]
            (ctx.folder / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            return {}

    count = guide_file.CountWords("preferences", limit=2)
    experiment = Experiment("guide", {"preferences": ToyPreferences(), "words": count, "base": ToyTrain()})
    folder = run(experiment, tmp_path / "runs", console=QUIET)
    assert json.loads((folder / "results.json").read_text())["words"] == {"0": {"words": 7}}
    wrong = replace(experiment, stages=experiment.stages | {"words": guide_file.CountWords("base")})
    with pytest.raises(UserError) as error:
        check(wrong)
    assert str(error.value) == (
        "stages.words.preferences: needs preferences, but 'base' (ToyTrain) leaves nothing (it sets no `artifact`). "
        "Stages that fit: preferences."
    )


def test_lines_of_a_log_are_not_broken(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")

    @dataclass(frozen=True)
    class ToyTalks(Stage):
        def run(self, ctx):
            ctx.console.print("step 12 " + "word " * 40)
            return {}

    run(Experiment("x", {"a": ToyTalks()}), tmp_path)
    assert "step 12 " + "word " * 40 in capsys.readouterr().out


# --- several hosts ------------------------------------------------------------------------------------------


def test_of_two_processes_of_a_cluster_one_writes_and_both_run(tmp_path):
    (tmp_path / "host.py").write_text(
        textwrap.dedent("""
        import sys
        from dataclasses import dataclass
        from pathlib import Path
        import jax
        from jrlhf.config import Stage
        from jrlhf.experiment import Experiment, run

        jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))

        @dataclass(frozen=True)
        class ToyHost(Stage):
            n: int = 0
            def run(self, ctx):
                assert (ctx.folder / "environment.json").exists()
                (ctx.folder / f"host{jax.process_index()}").write_text(str(jax.device_count()))
                return {"n": self.n}

        for _ in range(2):
            run(Experiment("x", {"a": ToyHost(1), "b": ToyHost(2)}), Path("runs"))
        """)
    )
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    hosts = [
        subprocess.Popen(
            [sys.executable, "host.py", address, str(i)], cwd=tmp_path, env=ENV, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    outs = [h.communicate(timeout=120) for h in hosts]
    assert [h.returncode for h in hosts] == [0, 0], outs
    assert outs[0][0].count("reused") == 2
    assert "stages" not in outs[1][0]  # the second one is silent
    assert sorted(p.name for p in tmp_path.glob("runs/stages/*/host*")) == [
        "host0",
        "host0",
        "host1",
        "host1",
    ]
    assert all(p.read_text() == "2" for p in tmp_path.glob("runs/stages/*/host*"))
