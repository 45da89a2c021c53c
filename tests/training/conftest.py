"""One tiny pipeline, run once for all tests of this folder: on eight devices, and again on one."""

from pathlib import Path

import pytest
import tiny
from tiny_runs import QUIET, folders, one_device, only

from jrlhf.experiment import run


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tiny") / "runs"


@pytest.fixture(scope="session")
def pipeline(runs_dir) -> Path:
    """The run folder of the whole experiment on eight devices: data 4, fsdp 2."""
    return run(tiny.experiment, runs_dir, console=QUIET)


@pytest.fixture(scope="session")
def one_device_runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("one") / "runs"


@pytest.fixture(scope="session")
def one_device_run(one_device_runs) -> Path:
    """The run folder of the experiment's training stages on one device."""
    with one_device():
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
