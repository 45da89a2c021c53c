"""What all cluster scripts have in common, and the container images, read from their files."""

import fnmatch
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "tpu_scripts"
SHELL = ["slurm/submit.sh", "slurm/jrlhf.sbatch", "gke/apply.sh", "gke/xpk.sh"]
FILES = sorted(p for room in ("slurm", "gke", "docker") for p in (SCRIPTS / room).iterdir() if p.is_file())


@pytest.mark.parametrize("script", SHELL)
def test_help_names_every_option_and_calls_nothing(cluster, script):
    done = cluster.run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    text = (SCRIPTS / script).read_text()
    cases = re.findall(r"^ {8}(--[a-z][a-z |-]*)\)", text, re.MULTILINE)
    taken = {option for case in cases for option in re.findall("--[a-z-]+", case)} - {
        "--force",
        "--distributed",
    }
    assert len(taken) >= 3
    assert {o for o in taken if o not in done.stdout} == set()
    assert not cluster.calls()


@pytest.mark.parametrize("script", SHELL)
def test_shell_scripts_stop_at_the_first_error(script):
    text = (SCRIPTS / script).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert "|| true" not in text
    assert (SCRIPTS / script).stat().st_mode & 0o111


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_no_file_names_a_registry(path):
    hosts = re.findall(r"\b[\w-]+(?:\.[\w-]+)*\.(?:io|dev|com)/[\w./-]+", path.read_text())
    labels = (
        r"(kueue\.x-k8s|.*jobset\.(x-k8s|sigs\.k8s)|batch\.kubernetes)\.io/|((cloud\.)?google|nvidia)\.com/"
    )
    assert [h for h in hosts if not re.match(labels, h)] == []


# --- images -------------------------------------------------------------------------------------------------------


def instructions(kind: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile."""
    text = (SCRIPTS / "docker" / f"Dockerfile.{kind}").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def of(kind: str, name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions(kind) if instruction == name]


def ignored(kind: str, path: str) -> bool:
    """Whether the build's context lacks `path`: the last rule that fits it or a folder above it decides."""
    out = False
    for rule in (SCRIPTS / "docker" / f"Dockerfile.{kind}.dockerignore").read_text().split("\n"):
        pattern = rule.removeprefix("!").removeprefix("**/")
        parts = Path(path).parts
        above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        names = parts if rule.startswith("**/") else above
        if rule and not rule.startswith("#") and any(fnmatch.fnmatch(n, pattern) for n in names):
            out = not rule.startswith("!")
    return out


@pytest.mark.parametrize(("kind", "extra"), [("tpu", "tpu"), ("gpu", "cuda")])
def test_an_image_installs_this_package_with_its_constraints(kind, extra):
    assert of(kind, "FROM") == ["python:3.12-slim"]
    install = next(a for a in of(kind, "RUN") if "pip install" in a)
    assert f'".[{extra}]"' in install
    assert "--constraint constraints.txt" in install
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert extra in project["optional-dependencies"]
    copied = [source for arguments in of(kind, "COPY") for source in shlex.split(arguments)[:-1]]
    assert {"pyproject.toml", "constraints.txt", "jrlhf", "experiments", project["readme"]} <= set(copied)
    for source in copied:
        assert (REPOSITORY / source).exists()
        assert not ignored(kind, source)
    assert not ignored(kind, "jrlhf/ops/kl.py")


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_an_image_leaves_out_what_a_checkout_collects(kind):
    for path in (
        "runs/x",
        ".venv/bin/python",
        ".git/config",
        ".jax_cache/x",
        "jrlhf/__pycache__/cli.pyc",
        "tests/a.py",
    ):
        assert ignored(kind, path), path


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_an_image_does_not_run_as_root_by_default(kind):
    *_, user = of(kind, "USER")
    assert user.isdecimal()  # a number: Kubernetes cannot tell whether a name is root
    assert int(user) > 0
    assert any(f"useradd --uid {user} " in a for a in of(kind, "RUN"))


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_an_image_says_which_commit_it_is(kind):
    assert of(kind, "ARG") == ["COMMIT"]
    assert "org.opencontainers.image.revision=$COMMIT" in of(kind, "LABEL")
    assert "JRLHF_COMMIT=$COMMIT" in of(kind, "ENV")
    check = next(a for a in of(kind, "RUN") if "COMMIT" in a)
    for commit, code in (("", 1), ("abc", 0)):
        done = subprocess.run(
            ["sh", "-c", check], env={"COMMIT": commit, "PATH": "/usr/bin:/bin"}, capture_output=True
        )
        assert done.returncode == code
        assert (b"--build-arg COMMIT=" in done.stderr) == bool(code)
