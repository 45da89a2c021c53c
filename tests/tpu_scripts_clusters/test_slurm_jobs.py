"""SLURM: what is submitted, and that a job that was stopped saves and comes back, and no other."""

import shlex
import signal
import time
from collections.abc import Callable

import pytest

BATCH = "slurm/jrlhf.sbatch"
SUBMIT = "slurm/submit.sh"
JOB = {
    **{"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "ppo", "SLURM_JOB_NUM_NODES": "2"},
    **{"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32", "SQUEUE_PRINTS": "RUNNING"},
}
ARRAY = JOB | {
    "SLURM_ARRAY_JOB_ID": "14",
    "SLURM_ARRAY_TASK_ID": "3",
}  # its last task may have the array's own id


def options(call: list[str]) -> dict[str, str]:
    """The `--name=value` options of a call, up to the script or program that it runs."""
    own = call[1 : next((i for i, a in enumerate(call) if i and not a.startswith("--")), len(call))]
    return dict(a.partition("=")[::2] for a in own)


def until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it never came")


def all_ready(cluster) -> bool:
    """Whether the program runs on both nodes."""
    noted = cluster.left("ready")
    return noted.exists() and len(noted.read_text().split()) == 2


def stopped(cluster, number: signal.Signals) -> tuple[int, str]:
    """(exit code, output) of a batch script that got a signal while its program ran."""
    process = cluster.start(BATCH, "--runs-dir", "runs", "a.py", **JOB, JRLHF_EXITS="wait")
    until(lambda: all_ready(cluster))
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    return process.returncode, out + err


# --- the batch script -----------------------------------------------------------------------------------------


def test_it_runs_one_process_per_node_with_all_gpus_of_the_node(cluster):
    done = cluster.run(BATCH, "--runs-dir", "runs", "a.py", "--", "--mesh.fsdp", "8", **JOB)
    assert done.returncode == 0, done.stderr
    (call,) = cluster.calls("srun")
    assert call[-8:] == ["jrlhf", "run", "a.py", "--distributed", "--runs-dir", "runs", "--mesh.fsdp", "8"]
    given = options(call)
    assert (given["--ntasks"], given["--ntasks-per-node"], given["--cpus-per-task"]) == ("2", "1", "32")
    assert cluster.left("devices").read_text() == "0,1,2,3\n"


def test_a_process_that_has_stopped_does_not_end_one_that_still_saves(cluster):
    cluster.run(BATCH, "--runs-dir", "runs", "a.py", **JOB)
    given = options(cluster.calls("srun")[0])
    assert given["--kill-on-bad-exit"] == "0"
    assert int(given["--wait"]) > 0


def test_each_attempt_and_process_has_a_log_of_its_own(cluster):
    for attempt in ("0", "1"):
        cluster.run(BATCH, "--runs-dir", "runs", "a.py", **JOB, SLURM_RESTART_COUNT=attempt)
    logs = [options(call)["--output"] for call in cluster.calls("srun")]
    assert logs == ["runs/slurm/ppo-17-attempt0-%t.log", "runs/slurm/ppo-17-attempt1-%t.log"]
    assert (cluster.folder / "runs" / "slurm").is_dir()


@pytest.mark.parametrize("code", [0, 1, 2, 130, 137])
def test_what_ends_by_itself_is_not_requeued(cluster, code):
    done = cluster.run(BATCH, "--runs-dir", "runs", "a.py", **JOB, JRLHF_EXITS=str(code))
    assert done.returncode == code
    assert not cluster.calls("scontrol")
    assert ("finished" if code == 0 else f"exit code {code}") in done.stdout


def test_what_was_stopped_is_requeued(cluster):
    done = cluster.run(BATCH, "--runs-dir", "runs", "a.py", **JOB, JRLHF_EXITS="75")
    assert done.returncode == 75
    assert cluster.calls("scontrol") == [["scontrol", "requeue", "17"]]


@pytest.mark.parametrize(
    ("codes", "code", "requeued"),
    [
        ("75 1", 1, False),  # one failed; the other lost it
        ("1 134", 1, False),  # the first failed; jax ended the other
        ("2 75", 2, False),
        ("134 75", 134, False),  # it aborted by itself
        ("75 134", 75, True),
        ("lost 134", 75, True),  # the first is gone
        ("75 0", 75, True),
        ("137 134", 137, False),
    ],
)
def test_an_error_of_one_process_is_not_requeued_for_the_others(cluster, codes, code, requeued):
    done = cluster.run(BATCH, "--runs-dir", "runs", "a.py", **JOB, JRLHF_EXITS=codes)
    assert done.returncode == code, done.stdout
    assert bool(cluster.calls("scontrol")) == requeued


def test_only_the_own_task_of_an_array_is_requeued(cluster):
    cluster.run(BATCH, "--runs-dir", "runs", "--seeds", "0,1", "a.py", "b.py", **ARRAY, JRLHF_EXITS="75")
    assert cluster.calls("scontrol") == [["scontrol", "requeue", "14_3"]]
    assert "--jobs=14_3" in cluster.calls("squeue")[0]


@pytest.mark.parametrize(("restarts", "requeued"), [("1", True), ("2", False), ("3", False)])
def test_it_is_requeued_so_often_and_no_more(cluster, restarts, requeued):
    done = cluster.run(
        *(BATCH, "--runs-dir", "runs", "--max-restarts", "2", "a.py"),
        **JOB,
        SLURM_RESTART_COUNT=restarts,
        JRLHF_EXITS="75",
    )
    assert bool(cluster.calls("scontrol")) == requeued
    assert ("--max-restarts 2" in done.stdout) != requeued
    assert done.returncode == 75


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_a_cancelled_job_does_not_come_back(cluster, state):
    done = cluster.run(
        BATCH, "--runs-dir", "runs", "a.py", **(JOB | {"SQUEUE_PRINTS": state, "JRLHF_EXITS": "75"})
    )
    assert not cluster.calls("scontrol")
    assert "not requeued" in done.stdout


@pytest.mark.parametrize("command", ["SQUEUE", "SCONTROL"])
def test_a_requeue_that_fails_is_said(cluster, command):
    done = cluster.run(
        BATCH, "--runs-dir", "runs", "a.py", **JOB, JRLHF_EXITS="75", **{f"{command}_EXITS": "1"}
    )
    assert done.returncode == 75
    assert command.lower() in done.stdout
    assert "not requeued" in done.stdout
    assert "goes on from what was saved" in done.stdout


def test_sigterm_lets_the_run_save_and_requeues_it(cluster):
    code, output = stopped(cluster, signal.SIGTERM)
    assert code == 75, output
    # On both, and was not killed by srun, to which a SIGTERM is that.
    assert cluster.left("saved").read_text().split() == ["saved", "saved"]
    assert cluster.calls("scancel") == [["scancel", "--signal=TERM", "17"]]
    assert cluster.calls("scontrol") == [["scontrol", "requeue", "17"]]


def test_sigusr1_lets_the_run_save_and_ends_it(cluster):
    code, output = stopped(cluster, signal.SIGUSR1)
    assert code == 75, output
    assert cluster.left("saved").exists()
    assert not cluster.calls("scontrol")


def test_a_second_sigterm_is_not_passed_on(cluster):
    """The run's second SIGTERM kills it, and it may still be saving."""
    slow = cluster.folder / "bin" / "jrlhf"
    slow.write_text(slow.read_text().replace("echo saved", "sleep 0.5; echo saved"))
    process = cluster.start(BATCH, "--runs-dir", "runs", "a.py", **JOB, JRLHF_EXITS="wait")
    until(lambda: all_ready(cluster))
    process.send_signal(signal.SIGTERM)
    until(lambda: cluster.calls("scancel"))
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75, out
    assert cluster.left("saved").exists()
    assert len(cluster.calls("scancel")) == 1


def test_each_task_of_an_array_runs_its_experiment_and_seed(cluster):
    for task in range(4):
        env = ARRAY | {"SLURM_ARRAY_TASK_ID": str(task)}
        done = cluster.run(
            BATCH, "--runs-dir", "runs", "--seeds", "3,5", "a.py", "b.py", "--", "--x", "1", **env
        )
        assert done.returncode == 0, done.stdout + done.stderr
    ran = [call[-call[::-1].index("jrlhf") - 1 :] for call in cluster.calls("srun")]
    assert [(c[2], c[c.index("--seeds") + 1]) for c in ran] == [
        *[("a.py", "3"), ("a.py", "5")],
        *[("b.py", "3"), ("b.py", "5")],
    ]
    assert all(c[-2:] == ["--x", "1"] for c in ran)


@pytest.mark.parametrize(
    ("args", "env", "message"),
    [
        (["--runs-dir", "runs"], {}, "expected an experiment"),
        (["--runs-dir", "runs", "c.py"], {}, "c.py: no such file"),
        (["a.py"], {}, "--runs-dir: name a folder"),
        (["--runs-dir", "elsewhere", "a.py"], {}, "--runs-dir elsewhere: no folder"),
        (["--runs-dir", "runs", "--seeds", "0,x", "a.py"], {}, "--seeds: expected numbers"),
        (["--runs-dir", "runs", "--seeds"], {}, "--seeds: expected a value"),
        (["--runs-dir", "runs", "--max-restarts", "-1", "a.py"], {}, "--max-restarts: expected a number"),
        (["--runs-dir", "runs", "--jrlhf", "jrlfh", "a.py"], {}, "no such program"),
        (["--runs-dir", "runs", "--bogus", "a.py"], {}, "--bogus: no such option"),
        (["--runs-dir", "runs", "a.py", "--", "--force"], {}, "every restart would throw away"),
        (["--runs-dir", "runs", "a.py", "--", "--runs-dir=x"], {}, "this script sets it"),
        (["--runs-dir", "runs", "--seeds", "0", "a.py", "--", "--seeds", "1"], {}, "before and after"),
        (["--runs-dir", "runs", "a.py"], {"SLURM_JOB_ID": ""}, "no SLURM job"),
        (["--runs-dir", "runs", "a.py"], {"SLURM_GPUS_ON_NODE": ""}, "no GPUs"),
        (["--runs-dir", "runs", "a.py", "b.py"], {}, "need an array job"),
        (["--runs-dir", "runs", "a.py"], {"SLURM_ARRAY_TASK_ID": "1"}, "only 1"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(cluster, args, env, message):
    done = cluster.run(BATCH, *args, **(JOB | env))
    assert done.returncode == 2
    assert message in done.stderr
    assert not cluster.calls()


# --- submitting -----------------------------------------------------------------------------------------------

TO_SUBMIT = ("--name", "ppo", "--runs-dir", "runs", "--jrlhf", "jrlhf")


def test_a_job_is_submitted_as_asked(cluster):
    done = cluster.run(
        *(SUBMIT, *TO_SUBMIT, "--nodes", "4", "--gpus", "2", "--time", "1:00:00", "--grace", "60"),
        *("--partition", "fast", "--max-restarts", "3", "a.py", "--", "--mesh.fsdp", "8"),
        SBATCH_PRINTS="99;big",
    )
    assert done.returncode == 0, done.stderr
    assert "job 99:" in done.stdout
    (call,) = cluster.calls("sbatch")
    runs = str(cluster.folder / "runs")
    assert options(call) | {"--parsable": ""} == {
        "--parsable": "",
        "--job-name": "ppo",
        "--nodes": "4",
        "--ntasks-per-node": "1",
        "--gpus-per-node": "2",
        "--cpus-per-task": "16",
        "--time": "1:00:00",
        "--signal": "B:TERM@60",
        "--output": f"{runs}/slurm/ppo-%j.out",
        "--partition": "fast",
    }
    assert (cluster.folder / "runs" / "slurm").is_dir()  # where SLURM writes, and makes no folder
    # What it submits is what the batch script understands.
    script = next(i for i, a in enumerate(call) if a.endswith(".sbatch"))
    assert cluster.run(BATCH, *call[script + 1 :], **JOB).returncode == 0
    ran = cluster.calls("srun")[0]
    assert ran[-8:] == [
        "jrlhf",
        "run",
        "a.py",
        "--distributed",
        "--runs-dir",
        runs,
        "--mesh.fsdp",
        "8",
    ]


def test_the_batch_script_asks_to_be_told_before_the_time_limit_and_to_be_requeued(cluster):
    lines = (
        (cluster.scripts / BATCH).read_text().split("\nset -")[0].splitlines()
    )  # where sbatch looks for directives
    given = dict(line[len("#SBATCH ") :].partition("=")[::2] for line in lines if line.startswith("#SBATCH "))
    assert {"--requeue", "--open-mode", "--signal", "--time"} <= set(given)
    assert given["--signal"].startswith("B:TERM@")  # B: to this script, which passes it on once
    assert given["--open-mode"] == "append"  # a restart keeps what was written before
    assert given["--ntasks-per-node"] == "1"


def test_experiments_and_seeds_are_an_array(cluster):
    done = cluster.run(SUBMIT, *TO_SUBMIT, "--seeds", "0,1,2", "--parallel", "4", "a.py", "b.py")
    assert done.returncode == 0, done.stderr
    given = options(cluster.calls("sbatch")[0])
    assert given["--array"] == "0-5%4"
    assert given["--output"].endswith("ppo-%A_%a.out")


def test_a_name_that_is_queued_is_not_submitted_again(cluster):
    done = cluster.run(SUBMIT, *TO_SUBMIT, "a.py", SQUEUE_PRINTS="12 PENDING")
    assert done.returncode == 0
    assert "12 PENDING" in done.stdout
    assert "--name=ppo" in cluster.calls("squeue")[0]
    assert not cluster.calls("sbatch")


def test_nothing_is_submitted_where_the_queue_cannot_be_read(cluster):
    done = cluster.run(SUBMIT, *TO_SUBMIT, "a.py", SQUEUE_EXITS="1")
    assert done.returncode == 2
    assert "squeue failed" in done.stderr
    assert not cluster.calls("sbatch")


def test_a_submission_that_fails_is_said(cluster):
    done = cluster.run(SUBMIT, *TO_SUBMIT, "a.py", SBATCH_EXITS="1")
    assert done.returncode == 2
    assert "sbatch failed" in done.stderr
    assert "submitted" not in done.stdout


def test_a_dry_run_calls_nothing_and_prints_what_would_run(cluster):
    done = cluster.run(SUBMIT, "--dry-run", *TO_SUBMIT, "--seeds", "0,1", "a.py")
    assert done.returncode == 0, done.stderr
    command, *tasks = done.stdout.splitlines()
    assert shlex.split(command)[0] == "sbatch"
    assert [shlex.split(t)[-1] for t in tasks] == ["0", "1"]
    assert not cluster.calls()
    assert not (cluster.folder / "runs" / "slurm").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--runs-dir", "runs", "a.py"], "--name"),
        (["--name", "a,b", "--runs-dir", "runs", "a.py"], "--name"),
        ([*TO_SUBMIT, "--nodes", "0", "a.py"], "--nodes"),
        ([*TO_SUBMIT, "--gpus", "x", "a.py"], "--gpus"),
        ([*TO_SUBMIT, "--grace", "1.5", "a.py"], "--grace"),
        ([*TO_SUBMIT, "--parallel", "0", "a.py"], "--parallel"),
        ([*TO_SUBMIT, "--bogus", "a.py"], "--bogus: no such option"),
        ([*TO_SUBMIT, "a.py", "--account"], "--account: expected a value"),
        ([*TO_SUBMIT, "c.py"], "c.py: no such file"),
        ([*TO_SUBMIT, "a.py", "--", "--force"], "--force"),
    ],
)
def test_a_mistake_is_said_before_anything_is_submitted(cluster, args, message):
    done = cluster.run(SUBMIT, *args)
    assert done.returncode == 2
    assert message in done.stderr
    assert not cluster.calls()
