"""One tiny pipeline, run once for all tests of this folder: on eight devices, and again on one."""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))  # the experiment file is a module of its own

import tiny

from jrlhf.config import MeshConfig
from jrlhf.experiment import run, stage_folders
from jrlhf.metrics import read_metrics
from jrlhf.sharding import make_mesh
from jrlhf.training import stages

QUIET = Console(quiet=True)


@contextmanager
def quick_compilation():
    """These models take longer to compile than to train: leave out what the compiler need not do."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def _quick_compilation():
    with quick_compilation():
        yield


@contextmanager
def one_device():
    """Stages make their mesh of the first device alone, whatever their config says."""
    patch = pytest.MonkeyPatch()
    patch.setattr(stages, "make_mesh", lambda config: make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    yield
    patch.undo()


def only(*names: str, **changed):
    """The tiny experiment with these stages, some of them changed."""
    kept = {name: tiny.experiment.stages[name] for name in names}
    return replace(tiny.experiment, stages=kept | changed)


def folders(run_folder: Path, seed: str = "0") -> dict[str, Path]:
    return {name: seeds[seed] for name, seeds in stage_folders(run_folder).items()}


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tiny") / "runs"


@pytest.fixture(scope="session")
def pipeline(runs_dir) -> Path:
    """The run folder of the whole experiment on eight devices: data 4, fsdp 2."""
    with quick_compilation():
        return run(tiny.experiment, runs_dir, console=QUIET)


@pytest.fixture(scope="session")
def one_device_runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("one") / "runs"


@pytest.fixture(scope="session")
def one_device_run(one_device_runs) -> Path:
    """The run folder of the experiment's training stages on one device."""
    with quick_compilation(), one_device():
        kept = only("pretrain", "sft", "preferences", "reward_model", "ppo", "dpo")
        return run(kept, one_device_runs, console=QUIET)


@pytest.fixture
def train(one_device_run, one_device_runs):
    """train(name=stage, ...): these stages after the finished ones, on one device -> {name: folder}."""

    def train(**stages) -> dict[str, Path]:
        before = only("pretrain", "sft", "preferences", "reward_model", **stages)
        with one_device():
            return folders(run(before, one_device_runs, console=QUIET))

    return train


def trained(folder: Path) -> list[dict]:
    """The lines of the train steps, without those of evaluations."""
    return [row for row in read_metrics(folder) if "time/step" in row]


def evaluated(folder: Path) -> list[dict]:
    return [row for row in read_metrics(folder) if "time/step" not in row]
