"""The scripts of tpu_scripts/, run as a user does, on a pod that is a folder (fake_gcloud.sh)."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parent.parent / "tpu_scripts"

# What a worker has for python3: makes an environment whose pip "installs" a jrlhf, and notes what it was asked for.
FAKE_PYTHON = """#!/bin/bash
echo "$*" >>"$HOME/python-calls"
case "$*" in
  '-m uv venv'*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
  '-m pip install'*-e*)
    if [[ -s $FAKE_CLOUD/broken-installs ]]; then
      sed -i 1d "$FAKE_CLOUD/broken-installs"
      echo 'no route to host' >&2
      exit 1
    fi
    printf '#!/bin/sh\\necho jrlhf 0.1.0\\n' >"$(dirname "$0")/jrlhf"
    chmod +x "$(dirname "$0")/jrlhf"
    ;;
esac
"""


class Pod:
    """A user's machine with the scripts and a fake gcloud, and the cloud behind it."""

    def __init__(self, folder: Path, accelerator: str = "v5e-16"):
        self.home, self.cloud, self.repository = folder / "home", folder / "cloud", folder / "repository"
        for made in (self.home / ".ssh", self.cloud / "bin", folder / "bin", self.repository):
            made.mkdir(parents=True)
        (self.home / ".ssh" / "google_compute_engine").touch()
        (folder / "bin" / "gcloud").symlink_to(HERE / "fake_gcloud.sh")
        executable(self.cloud / "bin" / "python3", FAKE_PYTHON)
        self.env = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "FAKE_CLOUD": str(self.cloud),
            "TPU_PROJECT": "my-project",
            "TPU_ZONE": "us-west4-a",
            "TPU_NAME": "pod",
            "TPU_ACCELERATOR": accelerator,
        }
        shutil.copytree(SCRIPTS, self.repository / "tpu_scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            (self.repository / name).write_text(f"# {name}\n")

    def __call__(self, script: str, *arguments: object, code: int = 0, **env: str):
        """Runs a script; its exit code is `code`."""
        done = subprocess.run(
            ["bash", str(self.repository / "tpu_scripts" / f"{script}.sh"), *map(str, arguments)],
            env=self.env | env,
            cwd=self.repository,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def calls(self, *words: str) -> list[list[str]]:
        """gcloud's arguments at each call that had all these words."""
        record = self.cloud / "calls"
        calls = record.read_text().split("\x1f\x1e")[:-1] if record.exists() else []
        calls = [call.split("\x1f") for call in calls]
        return [call for call in calls if set(words) <= set(call)]

    def forget_calls(self) -> None:
        (self.cloud / "calls").unlink(missing_ok=True)

    def exists(self, state: str = "READY", kind: str | None = None) -> "Pod":
        kinds = {"v5e-16": "v5litepod-16"}
        accelerator = self.env["TPU_ACCELERATOR"]
        (self.cloud / "tpu").write_text(f"{state} {kind or kinds.get(accelerator, accelerator)}")
        return self

    def with_git(self) -> "Pod":
        """The repository is one, with one commit."""
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
        (self.repository / ".gitignore").write_text("ignored/\n")
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
            subprocess.run(["git", *identity, *command], cwd=self.repository, check=True, env=self.env)
        return self

    def with_source(self) -> "Pod":
        """As after setup.sh, as far as run.sh looks."""
        for n in range(4 if self.env["TPU_ACCELERATOR"] == "v5e-16" else 1):
            (self.worker(n) / "jrlhf").mkdir(parents=True)
        return self

    def worker(self, n: int) -> Path:
        return self.cloud / f"worker-{n}"

    def job(self, n: int, run: str = "main") -> Path:
        return self.worker(n) / "jrlhf-jobs" / run

    def pid(self, n: int, run: str = "main") -> int:
        return int((self.job(n, run) / "pid").read_text().split()[0])

    def end(self) -> None:
        """Kills what is left, and only what this pod has started."""
        for file in self.cloud.glob("worker-*/jrlhf-jobs/*/pid"):
            pid = int(file.read_text().split()[0])
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if f"FAKE_CLOUD={self.cloud}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    os.kill(pid, signal.SIGKILL)


def failure(*words: str, code: int, message: str, nth: int = 0) -> str:
    """A line of FAKE_FAIL: the nth call with these words (0: every one) ends with this code and message."""
    return f"{','.join(words)}|{nth}|{code}|{message}"


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def wait_for(condition, what: str) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, f"{what}: not within 20 s"
        time.sleep(0.05)
