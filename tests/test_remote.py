"""Runs in a bucket, which here is a small server of this machine: what lies where, what is committed when, and that a
run which is killed goes on from the bucket alone."""

import contextlib
import io
import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import bucket as fake
import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from test_hosts import NOT_THE_SAME, assert_same, ended, start

from jrlhf import checkpoint, remote
from jrlhf.checkpoint import Checkpointer, load_meta, load_params, save_params
from jrlhf.cli import _report, main
from jrlhf.config import Stage, UserError
from jrlhf.experiment import (
    Experiment,
    find_run,
    is_finished,
    load_experiment,
    run,
    run_folders,
    stage_folders,
)


@pytest.fixture(scope="module")
def shelf():
    """The bucket, for this process too."""
    patch = pytest.MonkeyPatch()
    with fake.served() as bucket:
        for name, value in bucket.env().items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        remote._files.cache_clear()
        yield bucket
        patch.undo()
        remote._files.cache_clear()


@pytest.fixture
def url(shelf, request):
    """A folder of runs of its own for each test."""
    shelf.refused = lambda method, name: False
    return f"gs://{fake.BUCKET}/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}"


@pytest.fixture
def runs(url):
    with remote.working_folder(url, writes=True) as folder:
        yield folder


def below(url: str, *parts: str) -> str:
    return "/".join([url.removeprefix(f"gs://{fake.BUCKET}/"), *parts])


# --- small files ------------------------------------------------------------------------------------------------


def test_what_is_small_goes_up_and_comes_down_as_it_was(shelf, url, runs):
    stage = runs / "stages" / "sft-1"
    (stage / "tb").mkdir(parents=True)
    files = {"metrics.jsonl": b"1\n", "tb/events": bytes(range(256)), "empty": b""}
    for name, data in files.items():
        (stage / name).write_bytes(data)
    (stage / ".config.json.12").write_text("half")
    (stage / "samples.jsonl.partial").write_text("half")
    remote.push(stage)
    assert {name: shelf.read(below(url, "stages/sft-1", name)) for name in files} == files
    assert shelf.names(below(url)) == sorted(below(url, "stages/sft-1", name) for name in files)
    with remote.working_folder(url) as other:
        copy = other / "stages" / "sft-1"
        remote.pull(copy)
        found = {p.relative_to(copy).as_posix(): p.read_bytes() for p in copy.rglob("*") if p.is_file()}
        assert found == files
    assert not other.exists()


def test_only_what_changed_is_copied(shelf, url, runs):
    stage = runs / "stages" / "sft-1"
    stage.mkdir(parents=True)
    for name in ("a", "b"):
        (stage / name).write_text("one")
    remote.push(stage)
    (stage / "b").write_text("two")  # as long as before
    shelf.requests.clear()
    remote.push(stage)
    assert [name for method, name in shelf.requests if method == "POST"] == [below(url, "stages/sft-1/b")]
    assert shelf.read(below(url, "stages/sft-1/b")) == b"two"
    shelf.write(below(url, "stages/sft-1/a"), b"six")  # as another process would
    shelf.requests.clear()
    remote.pull(stage)
    assert (stage / "a").read_text() == "six"
    read = [name for method, name in shelf.requests if method == "GET" and name]
    assert set(read) == {below(url, "stages/sft-1/a")}


def test_large_files_are_not_fetched(shelf, url, runs):
    for name in ("model/model.json", "model/params/d/1", "checkpoints/step-00000002/state/d/1", "params.txt"):
        shelf.write(below(url, "stages/sft-1", name), b"x")
    stage = runs / "stages" / "sft-1"
    remote.pull(stage)
    assert sorted(str(p.relative_to(stage)) for p in stage.rglob("*") if p.is_file()) == [
        "model/model.json",
        "params.txt",
    ]


def test_that_a_stage_is_done_goes_up_last(shelf, url, runs):
    stage = runs / "stages" / "sft-1"
    stage.mkdir(parents=True)
    for name in ("a", "done.json", "z"):
        (stage / name).write_text(name)
    shelf.refused = lambda method, name: method != "GET" and name.endswith("/z")
    with pytest.raises(OSError, match=r"no permission|Forbidden|403"):
        remote.push(stage)
    assert below(url, "stages/sft-1/done.json") not in shelf
    shelf.refused = lambda method, name: False
    remote.push(stage)
    assert below(url, "stages/sft-1/done.json") in shelf


def test_of_two_starts_the_later_one_goes_on(shelf, url, runs):
    stage = runs / "stages" / "sft-1"
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").write_text("first")
    remote.claim(stage)
    with remote.working_folder(url, writes=True) as later:
        remote.pull(later / "stages" / "sft-1")
        remote.claim(later / "stages" / "sft-1")
        (stage / "metrics.jsonl").write_text("still first")
        with pytest.raises(
            UserError, match=f"{url}/stages/sft-1: another start of this stage has taken it over"
        ):
            remote.push(stage)
        checkpointer = Checkpointer(stage / "checkpoints")
        checkpointer.save(1, {"w": jnp.ones(3)}, {}, {})
        with pytest.raises(UserError, match="has taken it over"):
            checkpointer.close()
        assert Checkpointer(later / "stages" / "sft-1" / "checkpoints").steps() == []
        remote.push(later / "stages" / "sft-1")
    assert shelf.read(below(url, "stages/sft-1/metrics.jsonl")) == b"first"


def test_a_folder_is_kept_up_while_it_is_written(shelf, url, runs, monkeypatch, capsys):
    monkeypatch.setattr(remote, "EVERY", 0.05)
    stage = runs / "stages" / "labels-1"
    stage.mkdir(parents=True)
    shelf.refused = lambda method, name: method != "GET"  # at first
    shelf.requests.clear()
    with pytest.raises(ValueError, match="stopped"), remote.kept(stage):  # noqa: PT012
        (stage / "answers.jsonl").write_text("1")
        fake.wait_for(lambda: any(method != "GET" for method, _ in shelf.requests))
        shelf.refused = lambda method, name: False
        fake.wait_for(lambda: below(url, "stages/labels-1/answers.jsonl") in shelf)
        (stage / "answers.jsonl").write_text("1 2")
        raise ValueError("stopped")
    assert shelf.read(below(url, "stages/labels-1/answers.jsonl")) == b"1 2"
    assert "could not be brought up to date" in capsys.readouterr().err


def test_moving_and_removing(shelf, url, runs):
    stage, old = runs / "stages" / "sft-1", runs / "stages" / "sft-1.old-1"
    for name in ("done.json", "model/params/d/1"):
        shelf.write(below(url, "stages/sft-1", name), name.encode())
    shelf.write(below(url, "stages/sft-12/done.json"), b"another")
    remote.move_folder(stage, old)
    assert remote.names(stage) == set()
    assert remote.names(old) == {"done.json", "model"}
    assert shelf.read(below(url, "stages/sft-1.old-1/model/params/d/1")) == b"model/params/d/1"
    remote.remove_folder(old)
    assert shelf.names(below(url)) == [below(url, "stages/sft-12/done.json")]


def test_a_folder_of_this_machine_is_none_of_a_bucket(tmp_path):
    assert remote.url_of(tmp_path) is None
    assert remote.shown(tmp_path) == str(tmp_path)
    with remote.working_folder(tmp_path, writes=True) as folder, remote.kept(folder):
        assert folder == tmp_path
    assert list(tmp_path.iterdir()) == []


# --- what is said before anything runs ----------------------------------------------------------------------------


def run_nothing(url: str, capsys) -> str:
    assert main(["run", "no-such-file.py", "--runs-dir", url]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("s3://shelf/runs", r"in a folder or in gs://BUCKET/FOLDER. Mount other storage"),
        ("gs://", "names no bucket"),
        ("gs:///runs", "names no bucket"),
        ("gs://nowhere/runs", r"gs://nowhere/runs cannot be written: .*\. Does the bucket exist"),
    ],
)
def test_urls_that_do_not_do(given, told, shelf, capsys):
    assert re.search(told, run_nothing(given, capsys))


@pytest.mark.parametrize("refused", ["POST", "GET", "DELETE"])
def test_a_bucket_that_may_not_be_written_read_or_cleared(refused, shelf, url, capsys):
    shelf.refused = lambda method, name: method == refused and ".try-" in name
    assert "cannot be written" in (told := run_nothing(url, capsys))
    assert "role Storage Object User" in told
    shelf.refused = lambda method, name: False
    assert "no-such-file.py: no such file" in run_nothing(url, capsys)


def test_the_package_that_is_missing_is_named(url, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    remote._files.cache_clear()
    assert "needs gcsfs: pip install 'jrlhf[gcs]'" in run_nothing(url, capsys)
    remote._files.cache_clear()


def test_a_run_is_not_named_by_a_url(url, capsys):
    assert main(["show", f"{url}/sft-1", "--runs-dir", url]) == 2
    assert f"name a run in a bucket by --runs-dir {url} and sft-1" in capsys.readouterr().err
    assert main(["list", "--runs-dir", url]) == 0
    assert f"no runs in {url}" in capsys.readouterr().out


# --- checkpoints ------------------------------------------------------------------------------------------------


@pytest.fixture
def open_checkpointer(runs):
    opened = []

    def make(**options):
        reports = []
        checkpointer = Checkpointer(runs / "stages/sft-1/checkpoints", report=reports.append, **options)
        checkpointer.reports = reports
        opened.append(checkpointer)
        return checkpointer

    yield make
    for checkpointer in opened:
        checkpointer.close()


def split(shape: tuple[int, int]) -> NamedSharding:
    return NamedSharding(
        jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2), P("data", "tensor")
    )


def state(step: int, shape=(4, 2)) -> dict:
    large = jnp.arange(512 * 256, dtype=jnp.float32).reshape(512, 256) + step
    return {
        "large": jax.device_put(large, split(shape)),
        "small": jnp.full(7, step),
        "key": jax.random.key(step),
    }


def assert_state(found: dict, step: int) -> None:
    for name, value in state(step).items():
        data = jax.random.key_data if name == "key" else lambda x: x
        np.testing.assert_array_equal(data(found[name]), data(value))


def test_a_checkpoint_in_a_bucket_goes_onto_any_mesh(shelf, url, runs, open_checkpointer):
    checkpointer = open_checkpointer(keep_last=2, best="score")
    for step, score in ((1, 0.5), (2, 0.9), (3, 0.1), (4, 0.2)):
        checkpointer.save(step, state(step), {"row": step}, {"score": score})
    checkpointer.wait()
    assert checkpointer.steps() == [2, 3, 4]
    assert checkpointer.best_step() == 2
    assert not any("/step-00000001/" in name for name in shelf.names(below(url)))
    assert not (runs / "stages/sft-1/checkpoints").exists()  # nothing of it is here
    for shape in ((8, 1), (1, 1)):
        template = state(0, shape)
        step, found, position = open_checkpointer().restore(template)
        assert (step, position) == (4, {"row": 4})
        assert found["large"].sharding == template["large"].sharding
        assert_state(found, 4)
    assert_state(open_checkpointer().restore(state(0), step=2)[1], 2)
    with pytest.raises(UserError, match=f"{url}/stages/sft-1/checkpoints holds no checkpoint of step 1"):
        open_checkpointer().restore(state(0), step=1)


def test_what_a_stage_has_written_is_there_before_its_checkpoint(shelf, url, runs, open_checkpointer):
    (runs / "stages/sft-1").mkdir(parents=True)
    (runs / "stages/sft-1/metrics.jsonl").write_text("line of step 1\n")
    shelf.refused = lambda method, name: method != "GET" and name.endswith("manifest.json")
    checkpointer = open_checkpointer()
    checkpointer.save(1, state(1), {}, {})
    with pytest.raises(OSError, match=r"no permission|Forbidden|403"):
        checkpointer.wait()
    shelf.refused = lambda method, name: False
    assert shelf.read(below(url, "stages/sft-1/metrics.jsonl")) == b"line of step 1\n"
    assert checkpointer.steps() == []


def test_an_unfinished_checkpoint_is_passed_over_and_removed(shelf, url, open_checkpointer):
    checkpointer = open_checkpointer()
    for step in (1, 2):
        checkpointer.save(step, state(step), {}, {})
    checkpointer.wait()
    shelf.objects.pop(below(url, "stages/sft-1/checkpoints/step-00000002/manifest.json"))
    again = open_checkpointer()
    assert again.restore(state(0))[0] == 1
    again.save(2, state(2), {}, {})
    (report,) = again.reports
    unfinished = f"{url}/stages/sft-1/checkpoints/step-00000002"
    assert report == f"Removing {unfinished}: its run was stopped before this checkpoint was complete."
    step, found, _ = open_checkpointer().restore(state(0))
    again.wait()
    step, found, _ = open_checkpointer().restore(state(0))
    assert step == 2
    assert_state(found, 2)


def cut(shelf, name):
    shelf.write(name, shelf.read(name)[:-1])


def flip(shelf, name):
    data = bytearray(shelf.read(name))
    data[len(data) // 2] ^= 1
    shelf.write(name, bytes(data))


def lose(shelf, name):
    shelf.objects.pop(name)


@pytest.mark.parametrize("damage", [cut, flip, lose])
def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(damage, shelf, url, open_checkpointer):
    checkpointer = open_checkpointer()
    for step in (1, 2):
        checkpointer.save(step, state(step), {}, {})
    checkpointer.wait()
    place = below(url, "stages/sft-1/checkpoints/step-00000002")
    damage(shelf, max(shelf.names(f"{place}/state"), key=lambda name: len(shelf.read(name))))
    again = open_checkpointer()
    step, found, _ = again.restore(state(0))
    assert step == 1
    assert_state(found, 1)
    (report,) = again.reports
    assert f"{url}/stages/sft-1/checkpoints/step-00000002 is damaged" in report
    assert f"{place}/damaged.json" in shelf
    again.save(2, state(2), {}, {})  # its step is free again
    again.wait()
    assert again.reports == [report]
    assert_state(open_checkpointer().restore(state(0))[1], 2)
    assert f"{place}/damaged.json" not in shelf


def test_a_model_in_a_bucket(shelf, url, runs):
    folder = runs / "stages" / "sft-1" / "model"
    for value in (1.0, 2.0):
        params = {"w": jax.device_put(jnp.full((512, 256), value), split((4, 2))), "b": jnp.full(3, value)}
        save_params(folder, params, {"value": value})
    assert [p.name for p in folder.iterdir()] == ["model.json"]
    with remote.working_folder(url) as other:
        copy = other / "stages" / "sft-1" / "model"
        with pytest.raises(UserError, match=f"there is no model in {url}/stages/sft-1/model"):
            load_meta(copy)
        remote.pull(copy.parent)
        assert load_meta(copy) == {"value": 2.0}
        np.testing.assert_array_equal(load_params(copy)[0]["w"], 2.0)
        found, _ = load_params(copy, {"w": jax.device_put(params["w"], split((8, 1))), "b": params["b"]})
        np.testing.assert_array_equal(found["w"], 2.0)
        flip(
            shelf, max(shelf.names(below(url, "stages/sft-1/model/params")), key=lambda n: len(shelf.read(n)))
        )
        with pytest.raises(
            UserError, match=f"the model in {url}/stages/sft-1/model is damaged: the checksum of"
        ):
            load_params(copy)


def test_a_model_that_is_replaced_is_not_there_meanwhile(shelf, url, runs, monkeypatch):
    folder = runs / "stages" / "sft-1" / "model"
    save_params(folder, {"w": jnp.ones(3)}, {})

    def broken(*args):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(checkpoint, "_write_manifest", broken)
    with pytest.raises(RuntimeError, match="no such luck"):
        save_params(folder, {"w": jnp.ones(3)}, {})
    assert below(url, "stages/sft-1/model/model.json") not in shelf


# --- runs -------------------------------------------------------------------------------------------------------

EXPERIMENT = '''
from jrlhf.experiment import Experiment
from jrlhf.lab import LarderDemonstrations, LarderText, LarderVocabulary
from jrlhf.models.config import ModelConfig
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import SFT, Pretrain, TokenizerConfig

experiment = Experiment(
    name="kept",
    stages={
        "pretrain": Pretrain(
            data=LarderText(documents=128), eval_rows=8, loop=LoopConfig(steps=4, batch_size=8, checkpoint_every=1),
            tokenizer=TokenizerConfig(model_type="word", vocab_size=128, texts=(LarderVocabulary(),)),
            model=ModelConfig(d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=32, context=40),
        ),
        "sft": SFT(
            start="pretrain", data=LarderDemonstrations(size=128), eval_rows=8,
            loop=LoopConfig(steps=5, batch_size=8, checkpoint_every=1),
        ),
    },
)
'''  # fmt: skip
# A process that kills itself before the checkpoint of the third step of fine-tuning is committed.
KILLED = """
import os, signal
from jrlhf import checkpoint
write = checkpoint._write_manifest

def kill(path, content):
    if content.get("step") == 3 and "/sft-" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)

checkpoint._write_manifest = kill
"""
UNFINISHED = "step-00000003: its run was stopped before this checkpoint was complete"


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The experiment, and the runs folder in which it ran without an interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "experiment.py").write_text(EXPERIMENT)
    experiment = load_experiment(folder / "experiment.py")
    run(experiment, folder / "runs", console=Console(quiet=True))
    return experiment, folder / "runs"


def metrics(runs: Path) -> dict[str, list[dict]]:
    """Of every stage, and its results, without what is the machine's; as they stand in the files."""
    found = {}
    for name, seeds in stage_folders(find_run("kept", runs)).items():
        lines = (seeds["0"] / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines] + [
            json.loads((seeds["0"] / "done.json").read_text())["results"]
        ]
        found[name] = [{k: v for k, v in row.items() if not k.startswith(NOT_THE_SAME)} for row in rows]
    return found


def params(runs: Path) -> dict:
    folders = stage_folders(find_run("kept", runs))
    return {name: load_params(seeds["0"] / "model")[0] for name, seeds in folders.items()}


def go_on(url: str, experiment: Experiment, killed_at: tuple[str, int] | None = None) -> str:
    """One start in this process, on a machine that knows nothing; what it said.

    killed_at: kind of stage and step of the checkpoint before whose commit it is killed: nothing more is copied."""
    write = checkpoint._write_manifest

    def kill(path, content):
        if (content.get("step"), f"/{killed_at[0]}-" in str(path)) == (killed_at[1], True):
            raise Killed
        write(path, content)

    out = Console(file=io.StringIO(), width=400)
    with pytest.MonkeyPatch.context() as patch, remote.working_folder(url, writes=True) as runs:
        if killed_at:
            patch.setattr(checkpoint, "_write_manifest", kill)
            patch.setattr(remote, "kept", lambda folder: contextlib.nullcontext())
        with pytest.raises(Killed) if killed_at else contextlib.nullcontext():
            run(experiment, runs, console=out)
    assert not runs.exists()
    return out.file.getvalue()


def test_a_killed_run_goes_on_from_the_bucket_alone(url, kept, capsys):
    experiment, uninterrupted = kept
    go_on(url, experiment, killed_at=("sft", 3))
    said = go_on(url, experiment)
    assert "resuming at step 2 of 5" in said
    assert UNFINISHED in said
    assert f"pretrain (seed 0): reused {url}/stages/pretrain-" in said
    assert f"results in {url}/kept-" in said
    with remote.working_folder(url) as runs:
        assert metrics(runs) == metrics(uninterrupted)
        jax.tree.map(np.testing.assert_array_equal, params(runs), params(uninterrupted))
        assert any((stage_folders(find_run("kept", runs))["sft"]["0"] / "tb").iterdir())
    for command, told in ((["list"], "2/2"), (["show", "kept"], f"{url}/kept-")):
        assert main([*command, "--runs-dir", url]) == 0
        assert told in capsys.readouterr().out


def test_hosts_that_share_no_disk(shelf, url, kept, tmp_path):
    """Each has a folder of its own. They go on with the run of one process, the first is killed, and one goes on."""
    experiment, uninterrupted = kept
    go_on(url, experiment, killed_at=("pretrain", 2))
    (tmp_path / "experiment.py").write_text(KILLED + EXPERIMENT)
    (tmp_path / "tmp").mkdir()
    env = shelf.env() | {"TMPDIR": str(tmp_path / "tmp")}
    (code, said), (other, _) = results = ended(start(tmp_path, 2, 1, "--runs-dir", url, **env))
    assert code == -signal.SIGKILL, results
    assert other in (-signal.SIGABRT, 75), results
    assert "resuming at step 1 of 4" in said
    assert "pretrain (seed 0): finished" in said
    assert len(list((tmp_path / "tmp").glob("jrlhf-*"))) == 2
    assert not (tmp_path / "runs").exists()
    said = go_on(url, experiment)
    assert "resuming at step 2 of 5" in said
    assert UNFINISHED in said
    with remote.working_folder(url) as runs:
        assert_same(metrics(runs), metrics(uninterrupted))


def test_only_the_first_process_looks_for_what_to_report(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    _report(tmp_path / "a folder that the first process alone has")


@dataclass(frozen=True)
class Counted(Stage):
    """Leaves a number, and counts how often it ran on this machine."""

    number: int = 1
    runs: ClassVar[list] = []

    def run(self, ctx):
        self.runs.append(ctx.seed)
        if self.number < -1:
            raise UserError("far too small")
        (ctx.folder / "number.txt").write_text(str(self.number))
        if self.number < 0:
            raise UserError("too small")
        return {"number": self.number}


def go(url: str, number: int = 1, **options) -> str:
    """One start of an experiment on a machine of its own; what it said."""
    out = io.StringIO()
    with remote.working_folder(url, writes=True) as runs:
        run(
            Experiment("counted", {"one": Counted(number)}),
            runs,
            console=Console(file=out, width=300),
            **options,
        )
    return out.getvalue()


def test_a_finished_stage_is_found_in_the_bucket_and_force_keeps_it(shelf, url):
    Counted.runs.clear()
    assert "stages to run: 1, to reuse: 0" in go(url)
    assert "stages to run: 0, to reuse: 1" in (said := go(url))
    assert re.search(rf"one \(seed 0\): reused {url}/stages/counted-\w+ ", said)
    assert Counted.runs == [0]
    for n in (1, 2):
        assert f".old-{n}" in go(url, force="all")
    assert Counted.runs == [0, 0, 0]
    done = [name for name in shelf.names(below(url, "stages")) if name.endswith("/done.json")]
    assert [re.sub(r".*counted-\w+", "", name) for name in done] == [
        ".old-1/done.json",
        ".old-2/done.json",
        "/done.json",
    ]
    with remote.working_folder(url) as runs:
        (found,) = run_folders(runs)
        assert is_finished(found)


def test_what_fails_leaves_what_it_had(shelf, url):
    with pytest.raises(UserError, match="far too small"):
        go(url, -2)
    assert shelf.names(below(url)) == []
    with pytest.raises(UserError, match="too small") as error:
        go(url, -1)
    assert f"folder {url}/stages/counted-" in error.value.__notes__[0]
    assert any(name.endswith("number.txt") for name in shelf.names(below(url)))
    with remote.working_folder(url) as runs:
        (found,) = run_folders(runs)
        assert not is_finished(found)
