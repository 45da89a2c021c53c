"""Clusters that are not there: commands that note how they were called, and do as the test says."""

import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "tpu_scripts"

# Each call is a line of $CALLS. It prints $<NAME>_PRINTS and ends with $<NAME>_EXITS.
FAKE = r"""#!/usr/bin/env bash
name=$(basename "$0")
printf '%q ' "$name" "$@" >>"$CALLS"
echo >>"$CALLS"
[[ /dev/stdin -ef /dev/null ]] || cat >"$CALLS.stdin"
prints=${name^^}_PRINTS exits=${name^^}_EXITS
[[ -z ${!prints:-} ]] || echo "${!prints}"
exit "${!exits:-0}"
"""

# Like the real one it runs a task on each node, ends with the highest of their exit codes, and does not pass a SIGTERM
# on: it kills its tasks.
SRUN = r"""#!/usr/bin/env bash
printf '%q ' srun "$@" >>"$CALLS"
echo >>"$CALLS"
while [[ $1 == --* ]]; do shift; done
set -m # each task is a group of its own
tasks=()
for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do
    SLURM_PROCID=$i "$@" &
    tasks+=($!)
done
echo "${tasks[@]}" >"$CALLS.tasks"
trap 'kill -KILL "${tasks[@]/#/-}"' TERM
code=0
for task in "${tasks[@]}"; do
    own=0
    wait "$task" || own=$?
    ((own <= code)) || code=$own
done
exit "$code"
"""

# Like the real one it signals all processes of a task, a shell around the program too.
SCANCEL = r"""#!/usr/bin/env bash
printf '%q ' scancel "$@" >>"$CALLS"
echo >>"$CALLS"
for task in $(<"$CALLS.tasks"); do kill -TERM -- "-$task"; done
"""

# The program: notes its variables, then ends as told, with several codes each process with its own. `wait`: until a
# SIGTERM, and then it saves. `lost`: with all that is around it, as on a node that fails.
JRLHF = r"""#!/usr/bin/env bash
echo "$JAX_LOCAL_DEVICE_IDS" >"$CALLS.devices"
codes=(${JRLHF_EXITS:-0})
code=${codes[SLURM_PROCID]:-${codes[0]}}
if [[ $code == wait ]]; then
    trap 'echo saved >>"$CALLS.saved"; exit 75' TERM
    echo "$SLURM_PROCID" >>"$CALLS.ready"
    while :; do sleep 0.02; done
fi
[[ $code != lost ]] || kill -KILL -- "-$(ps -o pgid= $$ | tr -d ' ')"
exit "$code"
"""


@dataclass
class Cluster:
    """Runs scripts with the fakes in front of every other command."""

    folder: Path
    env: dict[str, str]
    scripts: Path = SCRIPTS

    def start(self, script: str, *args: str | Path, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", SCRIPTS / script, *args],
            cwd=self.folder,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *args: str | Path, **env: str) -> subprocess.CompletedProcess:
        process = self.start(script, *args, **env)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self, command: str = "") -> list[list[str]]:
        """What the fakes were called with, oldest first: those named `command`, or all."""
        log = self.folder / "calls"
        made = [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [call for call in made if not command or call[0] == command]

    def left(self, name: str) -> Path:
        """A file that the fakes leave."""
        return self.folder / f"calls.{name}"


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    fakes = dict.fromkeys(("sbatch", "squeue", "scontrol", "kubectl", "xpk"), FAKE)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {**fakes, "srun": SRUN, "scancel": SCANCEL, "jrlhf": JRLHF}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "runs").mkdir()
    for name in ("a.py", "b.py"):
        (tmp_path / name).touch()
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "JRLHF_"))}
    env = keep | {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    return Cluster(tmp_path, env)
