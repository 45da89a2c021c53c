"""From source on the workers to results here. What is sent to a worker is really run, in a home folder of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_pod import executable, failure, wait_for

WORKERS = range(4)


# --- source -------------------------------------------------------------------------------------------------


def test_sync_copies_the_working_tree_and_says_what_it_is(pod):
    pod.exists().with_git()
    (pod.repository / "ignored").mkdir()
    (pod.repository / "ignored" / "big").touch()
    (pod.repository / "new file.py").write_text("new")
    (pod.repository / "pyproject.toml").write_text("changed\n")
    (pod.repository / "constraints.txt").unlink()
    pod("sync")
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=pod.repository, text=True)
    for n in WORKERS:
        tree = pod.worker(n) / "jrlhf"
        assert (tree / "new file.py").read_text() == "new"
        assert (tree / "tpu_scripts" / "env.sh").stat().st_mode & 0o111
        assert not (tree / "ignored").exists()
        assert not (tree / "constraints.txt").exists()
        assert (tree / ".jrlhf-source" / "commit").read_text() == commit
        assert "+changed" in (tree / ".jrlhf-source" / "diff").read_text()
        assert (tree / ".jrlhf-source" / "untracked").read_text() == "new file.py\n"
    assert len(pod.calls("scp")) == 4


def test_sync_again_sends_only_what_has_changed_to_who_has_it_not(pod):
    pod.exists().with_git()("sync")
    pod.forget_calls()
    assert "is on all 4 workers" in pod("sync").stderr
    assert pod.calls("scp") == []
    (pod.worker(2) / "jrlhf" / ".jrlhf-source" / "id").write_text("older\n")
    pod("sync")
    assert len(pod.calls("scp")) == len(pod.calls("scp", "--worker=2")) == 1
    (pod.repository / "pyproject.toml").unlink()
    pod("sync")
    assert len(pod.calls("scp")) == 5
    assert not (pod.worker(0) / "jrlhf" / "pyproject.toml").exists()


def test_sync_sends_an_archive_as_it_was_packed(pod, tmp_path):
    pod.exists().with_git()
    pod("sync", "--pack", tmp_path / "then.tgz")
    assert pod.calls() == []
    (pod.repository / "pyproject.toml").write_text("later")
    pod("sync", "--archive", tmp_path / "then.tgz")
    assert (pod.worker(3) / "jrlhf" / "pyproject.toml").read_text() == "# pyproject.toml\n"


def test_sync_leaves_a_running_runs_source_alone(pod):
    pod.exists().with_git()("sync")
    pod("run", "--", "sleep", "60")
    pod("sync")
    (pod.repository / "pyproject.toml").write_text("changed")
    assert "run main is running on worker 0" in pod("sync", code=1).stderr
    assert (pod.worker(0) / "jrlhf" / "pyproject.toml").read_text() == "# pyproject.toml\n"


def test_the_first_connection_makes_the_key_alone(pod):
    (pod.home / ".ssh" / "google_compute_engine").unlink()
    pod.exists().with_source()("status", "--id", "main")
    assert "--worker=0" in pod.calls("ssh")[0]


def test_workers_that_fail_are_named(pod):
    pod.exists().with_git()
    rules = [failure("ssh", f"--worker={n}", code=255, message=f"no route to {n}") for n in (1, 3)]
    error = pod("sync", code=1, FAKE_FAIL="\n".join(rules)).stderr
    assert "worker 1: looking at the source failed with exit code 255:\n  no route to 1" in error
    assert "failed on 2 of 4 workers of pod: 1 3" in error
    assert pod.calls("scp") == []


# --- environment --------------------------------------------------------------------------------------------


def installs(pod, n: int) -> list[str]:
    calls = (pod.worker(n) / "python-calls").read_text().splitlines()
    return [call for call in calls if "-e" in call.split()]


def test_setup_makes_the_environment_on_all_workers(pod):
    pod.exists().with_git()("setup")
    for n in WORKERS:
        assert installs(pod, n) == ["-m pip install -q -c constraints.txt -e .[tpu]"]
        assert (pod.worker(n) / "jrlhf-venv" / "bin" / "jrlhf").exists()
        assert (pod.worker(n) / "jrlhf-runs").is_dir()
    assert pod("setup").stdout.count("is there") == 4


def test_setup_makes_the_environment_once_for_what_it_is_made_of(make_pod):
    pod = make_pod("v5p-8").exists().with_git()
    assert "is made" in pod("setup").stdout
    (pod.repository / "tpu_scripts" / "more.py").touch()
    assert "is there" in pod("setup").stdout
    (pod.repository / "constraints.txt").write_text("jax==0\n")
    assert "is made" in pod("setup").stdout
    assert "is made" in pod("setup", TPU_PYTHON="3.13").stdout
    assert len(installs(pod, 0)) == 3


def test_setup_tries_again_and_in_the_end_gives_up(make_pod):
    pod = make_pod("v5p-8").exists().with_git()
    broken = pod.cloud / "broken-installs"
    broken.write_text("x\n" * 2)
    pod("setup", "--pause", "0", "--tries", "3")
    assert len(installs(pod, 0)) == 3
    (pod.repository / "constraints.txt").write_text("jax==0\n")
    broken.write_text("x\n" * 9)
    error = pod("setup", "--pause", "0", "--tries", "2", code=1).stderr
    assert "worker 0: setting up failed" in error
    assert "no route to host" in error
    assert "failed 2 times" in error
    broken.write_text("")
    assert "is made" in pod("setup").stdout, "half an environment is none"


def test_setup_runs_the_hook_and_mounts_what_is_not_mounted(make_pod, tmp_path):
    pod = make_pod("v5p-8").exists().with_git()
    hook, runs = tmp_path / "hook.sh", tmp_path / "mounted runs"
    hook.write_text('echo "it\'s $HOME" >>~/hooked\n')
    executable(pod.cloud / "bin" / "sudo", '#!/bin/sh\nexec "$@"\n')
    executable(pod.cloud / "bin" / "mountpoint", '#!/bin/sh\ntest -e "$HOME/mounts"\n')
    executable(pod.cloud / "bin" / "gcsfuse", '#!/bin/sh\necho "$*" >>"$HOME/mounts"\n')
    settings = {"TPU_SETUP_HOOK": str(hook), "TPU_STORAGE": "gs://bucket", "TPU_RUNS_DIR": str(runs)}
    pod("setup", **settings)
    pod("setup", **settings)
    assert (pod.worker(0) / "hooked").read_text() == f"it's {pod.worker(0)}\n" * 2
    assert (
        pod.worker(0) / "mounts"
    ).read_text() == f"--implicit-dirs --rename-dir-limit 1000000 bucket {runs}\n"
    hook.write_text("exit 9\n")
    assert "TPU_SETUP_HOOK failed" in pod("setup", code=1, **settings).stderr


# --- runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(pod):
    return pod.exists().with_source()


def states(pod, run: str = "main") -> list[str]:
    lines = pod("status", "--id", run).stdout.splitlines()
    return [line.split(": ")[1] for line in lines if line.startswith("[worker")]


def ended(pod, run: str = "main") -> None:
    wait_for(lambda: all((pod.job(n, run) / "exit").exists() for n in WORKERS), "the end of the run")


def test_a_command_reaches_the_workers_word_for_word(ready):
    words = ["a b", "it's", '"$HOME"', "x;y", "*", "`z`", "new\nline", "", "ü"]
    ready(
        "run",
        "--id",
        "q",
        "--",
        "X=1 2",
        "bash",
        "-c",
        'printf "<%s>" "$X" "$JRLHF_RUNS" "$PWD" "$@"',
        "-",
        *words,
    )
    ended(ready, "q")
    for n in WORKERS:
        home = ready.worker(n)
        said = (ready.job(n, "q") / "log").read_text().split("\n", 1)[1]
        assert said.endswith(
            "".join(f"<{w}>" for w in ["1 2", f"{home}/jrlhf-runs", f"{home}/jrlhf", *words])
        )
    assert states(ready, "q") == ["exit 0"] * 4


@pytest.mark.parametrize(
    ("accelerator", "command", "added"),
    [
        ("v5e-16", ["jrlhf", "run", "x.py"], True),
        ("v5e-16", ["FLAGS=a b", "jrlhf", "run", "x.py", "--seeds", "0", "1"], True),
        ("v5e-16", ["jrlhf", "run", "x.py", "--distributed"], False),
        ("v5e-16", ["jrlhf", "list"], False),
        ("v5e-16", ["python", "run", "x.py"], False),
        ("v5p-8", ["jrlhf", "run", "x.py"], False),
    ],
)
def test_distributed_is_added_to_a_run_on_several_workers(make_pod, accelerator, command, added):
    shown = make_pod(accelerator)("run", "--dry-run", "--", *command).stdout
    (line,) = [line for line in shown.splitlines() if line.endswith(" &") and not line.startswith("setsid")]
    assert line.count("--distributed") == (added or "--distributed" in command)
    assert not added or line.endswith(" --distributed &")


def test_a_run_is_watched_by_its_own_process(ready):
    ready("run", "--", "sleep", "61")
    pids = [ready.pid(n) for n in WORKERS]
    assert states(ready) == [f"running {pid}" for pid in pids]
    for pid in pids:
        assert Path(f"/proc/{pid}/cmdline").read_text() == "sleep\x0061\x00", (
            "the command's own, not a shell's"
        )
        assert os.getsid(pid) != os.getsid(0), "it outlives the connection"
    assert "pod (v5e-16, us-west4-a): READY" in ready("status").stdout


def test_a_run_that_is_running_is_not_started_again_anywhere(ready):
    ready("run", "--", "sleep", "60")
    for n in (0, 1, 3):
        os.kill(ready.pid(n), signal.SIGKILL)
    error = ready("run", "--", "true", code=1).stderr
    assert f"run main is still running, PID {ready.pid(2)} on worker 2" in error
    assert (ready.job(0) / "command").read_text() == "sleep 60\n"
    ready("run", "--id", "other", "--", "true")


def test_a_run_that_has_ended_runs_again_and_its_log_goes_on(ready):
    ready("run", "--", "bash", "-c", "echo first; exit 75")
    ended(ready)
    assert states(ready) == ["exit 75"] * 4
    ready("run", "--", "sleep", "60")
    assert states(ready)[0].startswith("running ")
    log = (ready.job(0) / "log").read_text()
    assert log.index("first") < log.index(": sleep 60")


def test_a_run_says_which_source_it_had(pod):
    pod.exists().with_git()("sync")
    pod("run", "--", "true")
    source = (pod.worker(1) / "jrlhf" / ".jrlhf-source" / "id").read_text()
    assert (pod.job(1) / "source" / "id").read_text() == source


def test_run_needs_the_source_and_a_command(pod):
    pod.exists()
    error = pod("run", "--", "true", code=1).stderr
    assert "there is no ~/jrlhf: setup.sh first" in error
    assert "workers of pod: 0 1 2 3" in error
    assert "no command" in pod("run", "--id", "x", code=2).stderr
    assert "no command after A=1" in pod("run", "--", "A=1", code=2).stderr
    assert "--id: letters" in pod("run", "--id", "a b", "--", "true", code=2).stderr


def test_a_worker_that_did_not_start_is_named(ready):
    rule = failure("ssh", "--worker=2", code=255, message="reset by peer", nth=2)
    error = ready("run", "--", "sleep", "60", code=1, FAKE_FAIL=rule).stderr
    assert "worker 2: starting the run failed with exit code 255:\n  reset by peer" in error
    assert "stop.sh --id main" in error


def test_dead_is_gone_without_an_exit_code_also_if_its_number_lives_on(ready):
    ready("run", "--", "sleep", "60")
    os.killpg(os.getpgid(ready.pid(1)), signal.SIGKILL)  # with what waits for it: as if the machine had gone
    os.kill(ready.pid(2), signal.SIGKILL)
    pid, start, launcher = (ready.job(3) / "pid").read_text().split()
    # As if other processes had the numbers now.
    (ready.job(3) / "pid").write_text(f"{pid} {int(start) - 1} {2**22 + 1}\n")
    wait_for(lambda: (ready.job(2) / "exit").exists(), "the exit code")
    assert states(ready)[1:] == ["dead", "exit 137", "dead"]
    assert ready("stop").stdout.count("not running: dead") == 2
    (ready.job(3) / "pid").write_text(f"{pid} {start} {launcher}\n")
    assert states(ready)[3] == f"running {pid}", "stop.sh did not touch a process that is not the run's"


def test_stop_asks_and_waits_for_what_was_recorded_only(ready):
    saves = "trap 'echo saved; exit 75' TERM; echo up; while :; do sleep 0.05; done"
    ready("run", "--", "bash", "-c", saves)
    ready("run", "--id", "other", "--", "sleep", "60")
    wait_for(lambda: all("\nup\n" in (ready.job(n) / "log").read_text() for n in WORKERS), "the trap")
    assert ready("stop").stdout.count("stopped: exit 75") == 4
    assert (ready.job(0) / "log").read_text().endswith("saved\n")
    assert states(ready, "other")[0].startswith("running ")
    assert ready("stop").stdout.count("not running: exit 75") == 4
    assert ready("stop", "--id", "never").stdout.count("not running: none") == 4


def test_stop_kills_what_does_not_end_in_time(ready):
    ready("run", "--", "bash", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done")
    wait_for(lambda: all("\nup\n" in (ready.job(n) / "log").read_text() for n in WORKERS), "the trap")
    assert ready("stop", "--limit", "0").stdout.count("killed after 0 s: exit 137") == 4


def test_status_of_a_tpu_that_is_not_ready(pod):
    assert pod("status").stdout == "pod (v5e-16, us-west4-a): ABSENT\n"
    assert "PREEMPTED" in pod.exists("PREEMPTED")("status").stdout
    assert pod.calls("ssh") == []


def test_logs_of_one_and_of_all(ready):
    ready("run", "--", "bash", "-c", "seq 100; basename $(dirname $PWD)")
    ended(ready)
    assert ready("logs", "--lines", "2", "--no-follow").stdout == "[worker 0] 100\n[worker 0] worker-0\n"
    lines = ready("logs", "--lines", "1", "--no-follow", "--worker", "all").stdout.splitlines()
    assert lines == [f"[worker {n}] worker-{n}" for n in WORKERS]
    assert "no run x here" in ready("logs", "--id", "x", "--no-follow", code=1).stderr
    assert "--worker: expected all, or numbers below 4" in ready("logs", "--worker", "4", code=2).stderr


@pytest.mark.parametrize("which", ["0", "all"])
def test_logs_follow_until_interrupted_and_leave_nothing_behind(ready, which, tmp_path):
    ready("run", "--", "bash", "-c", "echo here; sleep 60")
    shown = tmp_path / "shown"
    with shown.open("w") as out:
        follow = subprocess.Popen(
            ["bash", str(ready.repository / "tpu_scripts" / "logs.sh"), "--worker", which],
            env=ready.env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    wait_for(lambda: shown.read_text().count("here\n") == (4 if which == "all" else 1), "the log")
    if which == "all":
        os.kill(follow.pid, signal.SIGINT)  # to it alone: it has to end what it has started in the background
    else:
        os.killpg(follow.pid, signal.SIGINT)
    follow.wait(timeout=10)
    wait_for(lambda: not tails(ready.cloud), "the end of tail")
    assert states(ready)[0].startswith("running ")


def tails(cloud: Path) -> list[str]:
    """Processes `tail` that this cloud's workers have started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"FAKE_CLOUD={cloud}".encode() in (process / "environ").read_bytes()
            if ours and (process / "comm").read_text() == "tail\n":
                found.append(process.name)
        except OSError:  # it has ended
            continue
    return found


# --- results ------------------------------------------------------------------------------------------------


def test_fetch_brings_results_and_leaves_the_heavy(ready, tmp_path):
    runs = ready.worker(0) / "jrlhf-runs"
    for name in (
        "run-1/config.json",
        ".jax_cache/x",
        *(f"stages/s/{f}" for f in HEAVY),
        "stages/s/metrics.jsonl",
    ):
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).write_text(name)
    ready("run", "--", "echo", "hello")

    def fetched(*options: str) -> set[str]:
        ready("fetch", "--to", tmp_path / "-".join(("to", *options)), *options)
        folder = tmp_path / "-".join(("to", *options))
        return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}

    light = {"run-1/config.json", "stages/s/metrics.jsonl"}
    got = fetched()
    assert light <= got
    assert "jobs/main/log" in got
    assert not any("jax_cache" in name or name.removeprefix("stages/s/") in HEAVY for name in got)
    assert {name for name in fetched("--models") if "/s/" in name} - light == {
        f"stages/s/{f}" for f in HEAVY[:2]
    }
    assert "stages/s/checkpoints/step-1/state" in fetched("--checkpoints")
    assert not (ready.worker(0) / "jrlhf-fetch.tgz").exists()


HEAVY = ("model/model.json", "adapter/model.json", "checkpoints/step-1/state")


def test_fetch_without_runs_says_so(ready):
    assert "there is no folder" in ready("fetch", code=1).stderr


def test_profile_asks_and_fetches(ready, tmp_path):
    traces = "mkdir -p $JRLHF_RUNS/stages/s/profile; echo trace >$JRLHF_RUNS/stages/s/profile/t.xplane.pb"
    ready("run", "--", "bash", "-c", f"trap '{traces}' USR1; echo up; while :; do sleep 0.05; done")
    wait_for(lambda: all("\nup\n" in (ready.job(n) / "log").read_text() for n in WORKERS), "the trap")
    old = ready.worker(0) / "jrlhf-runs" / "stages" / "s" / "profile" / "older.xplane.pb"
    old.parent.mkdir(parents=True)
    old.touch()
    os.utime(old, (0, 0))
    ready("profile", "--worker", "0,2", "--to", tmp_path / "p")
    found = {str(p.relative_to(tmp_path / "p")) for p in (tmp_path / "p").rglob("*") if p.is_file()}
    assert found == {f"worker-{n}/stages/s/profile/t.xplane.pb" for n in (0, 2)}
    assert not list((ready.worker(0) / "jrlhf-runs").glob(".profile-asked*"))


def test_profile_does_not_kill_what_would_die_of_it(ready):
    assert "run main is not running: none" in ready("profile", code=1).stderr
    ready("run", "--", "sleep", "60")
    assert "does not handle SIGUSR1" in ready("profile", code=1).stderr
    assert states(ready)[0].startswith("running ")


# --- preflight ----------------------------------------------------------------------------------------------


def jax_of(pod, devices: int) -> None:
    """The worker's environment is this one, with so many devices."""
    place = pod.worker(0) / "jrlhf-venv" / "bin"
    place.mkdir(parents=True, exist_ok=True)
    flags = f"JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count={devices}"
    executable(place / "python", f'#!/bin/sh\n{flags} exec {sys.executable} "$@"\n')


def test_preflight_sums_over_all_devices(make_pod):
    pod = make_pod("v5p-8").exists().with_source()
    jax_of(pod, 4)
    said = pod("preflight")
    assert "devices: 4 x cpu, psum is right" in said.stdout
    assert "can be written, read and deleted" in said.stdout
    assert "pod is fit: 4 chips on 1 workers" in said.stderr
    assert list((pod.worker(0) / "jrlhf-runs").iterdir()) == []


def test_preflight_counts_devices_and_leaves_a_busy_tpu_alone(make_pod):
    pod = make_pod("v5p-8").exists().with_source()
    jax_of(pod, 2)
    error = pod("preflight", code=1).stderr
    assert "jax sees 2 devices of 1 workers (cpu); there should be 4 of 1" in error
    pod("run", "--", "sleep", "60")
    assert "run main is running and has the TPU" in pod("preflight", code=1).stderr


def test_preflight_finds_that_workers_do_not_share_a_folder(ready, tmp_path):
    for n in WORKERS:
        executable_folder = ready.worker(n) / "jrlhf-venv" / "bin"
        executable_folder.mkdir(parents=True)
        executable(executable_folder / "python", "#!/bin/sh\ncat >/dev/null\necho checked\n")
    error = ready("preflight", code=1).stderr
    assert "workers 1 2 3 do not see the runs folder of worker 0" in error
    assert "TPU_STORAGE" in error
    said = ready("preflight", TPU_RUNS_DIR=str(tmp_path / "shared")).stdout
    assert "all workers see the same folder" in said
    assert said.count("checked") == 4
    assert list((tmp_path / "shared").iterdir()) == []
