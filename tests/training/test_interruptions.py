"""Kill a run anywhere, run the same command again: what it leaves is what an uninterrupted run would have left.

One run of the command line is struck six times in its own process, by SIGKILL at moments that leave the worst behind,
and once by SIGTERM. It is then compared with a run of the same command that nothing interrupted.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import tiny
from tiny_runs import QUIET, assert_close_metrics, folders, jsonl, lasting, one_device, only

from jrlhf.checkpoint import Checkpointer, load_params
from jrlhf.cli import EXIT_PREEMPTED
from jrlhf.config import STOP, MeshConfig, Preempted
from jrlhf.experiment import run, run_folder
from jrlhf.metrics import MetricLogger
from jrlhf.models.config import LoRAConfig

HERE = Path(__file__).parent
KILLED = -9
BEFORE = ("pretrain", "sft", "preferences")

STRIKES = (
    ("SIGKILL pretrain saving 4", KILLED),
    ("SIGKILL any sampled 1", KILLED),  # of the preferences
    ("SIGKILL reward-model logged 5", KILLED),
    ("SIGTERM ppo logged 2", EXIT_PREEMPTED),
    ("SIGKILL ppo evaluated 5", KILLED),
    ("SIGKILL any sampled 6", KILLED),  # of the second policy that is evaluated
    ("", 0),
)
"""The moment (see interrupted.py) at which each start of the run is struck, and its exit code."""


class Struck(NamedTuple):
    folders: dict[str, Path]
    output: list[str]  # of each start


def start(runs: Path, moment: str) -> subprocess.CompletedProcess:
    env = os.environ | {
        "MOMENT": moment,
        "PYTHONPATH": str(HERE.parent.parent),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = ["-m", "jrlhf.cli", "run", "interrupted.py", "--devices", "8", "--runs-dir", str(runs)]
    return subprocess.run(
        [sys.executable, *command],
        cwd=HERE,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def struck(tmp_path_factory) -> Struck:
    runs = tmp_path_factory.mktemp("struck") / "runs"
    output = []
    for moment, code in STRIKES:
        done = start(runs, moment)
        output.append(done.stdout + done.stderr)
        assert done.returncode == code, (moment, output[-1])
        if "reward-model" in moment:
            newest = max(runs.glob("stages/reward-model-*/checkpoints/step-*"))
            damage(newest)
    return Struck(folders(run_folder(tiny.experiment, runs)), output)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """The run folder of the same command, let alone."""
    runs = tmp_path_factory.mktemp("uninterrupted") / "runs"
    done = start(runs, "")
    assert done.returncode == 0, done.stdout + done.stderr
    return run_folder(tiny.experiment, runs)


def damage(checkpoint: Path) -> None:
    """Cut the largest file of a checkpoint in half."""
    file = max(checkpoint.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def metrics(folder: Path) -> list[dict]:
    """As they stand in the file. JSON keeps every digit, so equal lines are equal bits."""
    return [lasting(row) for row in jsonl(folder / "metrics.jsonl")]


def assert_same(ours: Path, theirs: Path) -> None:
    assert metrics(ours) == metrics(theirs)
    a, b = (load_params(folder / "model")[0] for folder in (ours, theirs))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_strike_hit_the_stage_it_was_meant_for(struck):
    expected = ("pretrain", "preferences", "reward_model", "ppo", "ppo", "evaluate")
    for name, output in zip(expected, struck.output, strict=False):
        last = [line for line in output.splitlines() if ": running in" in line or ": resuming in" in line][-1]
        assert last.startswith(name), output
        assert "all stages finished" not in output


@pytest.mark.parametrize("name", ["pretrain", "sft", "reward_model", "ppo", "dpo"])
def test_metrics_and_parameters_are_those_of_an_uninterrupted_run(struck, uninterrupted, name):
    assert_same(struck.folders[name], folders(uninterrupted)[name])


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("preferences", "preferences.jsonl"),
        ("ppo", "samples.jsonl"),
        ("dpo", "samples.jsonl"),
        ("best_of_n", "best_of_n.json"),
        ("evaluate", "evaluation.json"),
    ],
)
def test_tables_are_those_of_an_uninterrupted_run(struck, uninterrupted, name, file):
    assert (struck.folders[name] / file).read_bytes() == (folders(uninterrupted)[name] / file).read_bytes()


def test_a_checkpoint_that_was_being_written_is_not_used(struck):
    """Killed between the arrays and the manifest of step 4: step 2 is what there is."""
    after = " ".join(struck.output[1].split())
    assert "pretrain (seed 0): resuming" in after
    assert "resuming at step 2 of 6" in after
    assert "stopped before this checkpoint was complete" in after


def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(struck):
    after = " ".join(struck.output[3].split())
    assert "is damaged" in after
    assert "resuming at step 2 of 5" in after
    assert list(struck.folders["reward_model"].glob("checkpoints/damaged-step-00000004"))


def test_sigterm_saves_where_it_stands(struck):
    """Metrics of step 2 are written while step 3 runs; 3 is no step at which it would have saved anyway."""
    assert "SIGTERM: will save and stop" in struck.output[3]
    assert "ppo: saved at step 3 of 5" in struck.output[3]
    assert "resuming at step 3 of 5" in struck.output[4]


def test_finished_stages_are_not_run_again(struck):
    amount, *lines = struck.output[-1].splitlines()
    assert amount == "tiny: stages to run: 1, to reuse: 7"
    for name, output in zip(tiny.experiment.stages, lines, strict=False):
        assert output.startswith(f"{name} (seed 0): reused") or name == "evaluate"


# --- within one process -------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_after_every_step(one_device_run, tmp_path, monkeypatch):
    """Each start does one step, saves and stops: after five the reward model is that of one start."""
    original = folders(one_device_run)["reward_model"]
    runs = shutil.copytree(one_device_run.parent, tmp_path / "runs")
    shutil.rmtree(runs / "stages" / original.name)
    make = MetricLogger.__init__

    def make_and_ask_to_stop(*args, **kwargs):
        make(*args, **kwargs)
        STOP.request()

    monkeypatch.setattr(MetricLogger, "__init__", make_and_ask_to_stop)
    stopped = []
    with one_device():
        for _ in range(5):
            try:
                folder = run(only(*BEFORE, "reward_model"), runs, console=QUIET)
            except Preempted as stop:
                stopped.append(str(stop))
            finally:
                STOP.clear()
    assert stopped == [f"reward_model: saved at step {n} of 5" for n in (1, 2, 3, 4)]
    assert_same(folders(folder)["reward_model"], original)


@pytest.fixture
def moved_states(monkeypatch):
    """[(step, state as it was saved, state as it was restored)], on the host, of every restore."""
    saved, found = {}, []
    save, restore = Checkpointer.save, Checkpointer.restore

    def to_host(state):
        return [np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
                for x in jax.tree.leaves(state)]  # fmt: skip

    def keep(self, step, state, *args):
        saved[self.folder, step] = to_host(state)
        save(self, step, state, *args)

    def compare(self, template, step=None):
        restored = restore(self, template, step)
        if restored is not None:
            found.append((restored[0], saved[self.folder, restored[0]], to_host(restored[1])))
        return restored

    monkeypatch.setattr(Checkpointer, "save", keep)
    monkeypatch.setattr(Checkpointer, "restore", compare)
    return found


@pytest.mark.parametrize("name", ["ppo", "adapted"])
def test_a_run_that_moves_to_other_devices_goes_on_with_its_bits_and_its_batches(
    name, one_device_run, tmp_path, monkeypatch, moved_states
):
    """A step on eight devices; one on 4 x 2 with the optimiser (and PPO's reference) on the host; the rest on one."""
    runs = shutil.copytree(one_device_run.parent, tmp_path / "runs")
    if name == "ppo":
        before, stage = (*BEFORE, "reward_model"), tiny.experiment.stages["ppo"]
        at_once = folders(one_device_run)[name]
        shutil.rmtree(runs / "stages" / at_once.name)
    else:
        before = BEFORE[:2]
        stage = replace(
            tiny.experiment.stages["sft"], start="sft", lora=LoRAConfig(rank=2, alpha=8.0), loop=tiny.loop(3)
        )
        with one_device():
            at_once = folders(run(only(*before, adapted=stage), runs, console=QUIET))[name]
        at_once = at_once.rename(tmp_path / "at_once")
    on_host = replace(stage.loop, offload_optimizer=True, offload_reference=name == "ppo")
    starts = (
        (MeshConfig(data=8), stage.loop),
        (MeshConfig(data=1, fsdp=4, tensor=2), on_host),
        (None, stage.loop),
    )
    make = MetricLogger.__init__

    def make_and_ask_to_stop(*args, **kwargs):
        make(*args, **kwargs)
        STOP.request()

    for mesh, loop in starts:
        with contextlib.ExitStack() as stack:
            experiment = only(*before, **{name: replace(stage, loop=loop)})
            if mesh is None:
                stack.enter_context(one_device())
            else:
                experiment = replace(experiment, mesh=mesh)
                monkeypatch.setattr(MetricLogger, "__init__", make_and_ask_to_stop)
                stack.callback(monkeypatch.setattr, MetricLogger, "__init__", make)
                stack.enter_context(pytest.raises(Preempted))
            stack.callback(STOP.clear)
            folder = run(experiment, runs, console=QUIET)
    found = folders(folder)[name]
    assert [step for step, _, _ in moved_states] == [1, 2]
    for _, saved, restored in moved_states:
        for a, b in zip(saved, restored, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert a.tobytes() == b.tobytes()
    assert_close_metrics(metrics(found), metrics(at_once), rtol=2e-3, atol=2e-4)
    ours, theirs = (load_params(f / "model")[0] for f in (found, at_once))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), ours, theirs)
