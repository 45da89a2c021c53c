"""babysit.sh: what it does about preemptions, exit codes and processes that are gone."""

import pytest
from fake_pod import executable, failure

QUICK = ("--poll", "0.1", "--pause", "0")

# A run that ends as the n-th line of the file `fates` says, at its n-th start. The file is outside the TPU.
RUN = """
echo start >>"$FAKE_CLOUD/starts"
case $(sed -n "$(wc -l <"$FAKE_CLOUD/starts")p" "$FAKE_CLOUD/fates") in
  preempted) sed -i s/READY/PREEMPTED/ "$FAKE_CLOUD/tpu"; exec sleep 60 ;;
  gone) rm "$FAKE_CLOUD/tpu"; exec sleep 60 ;;
  dead) until [[ -e ~/jrlhf-jobs/main/pid ]]; do sleep 0.05; done; kill -KILL $PPID $$ ;;
  killed) kill -KILL $$ ;;
  [0-9]*) echo "its last words"; exit $(sed -n "$(wc -l <"$FAKE_CLOUD/starts")p" "$FAKE_CLOUD/fates") ;;
esac
"""
COMMAND = ("--", "bash", "-c", RUN)


@pytest.fixture
def single(make_pod):
    return make_pod("v5p-8").with_git()


def fates(pod, *lines: object) -> None:
    (pod.cloud / "fates").write_text("".join(f"{line}\n" for line in lines))


def starts(pod) -> int:
    return len((pod.cloud / "starts").read_text().splitlines())


def test_preempted_twice_then_fine(single):
    fates(single, "preempted", "gone", 0)
    said = single("babysit", "--spot", *QUICK, *COMMAND).stderr
    assert starts(single) == 3
    creations = single.calls("create")
    assert len(creations) == 3
    assert all("--spot" in call for call in creations)
    assert len(single.calls("delete")) == 1, "what is gone needs no deletion"
    assert "pod is PREEMPTED; restart 1 of at most 50" in said
    assert "pod is ABSENT; restart 2" in said
    assert "run main is done after 2 restarts" in said
    assert "warning: no TPU_STORAGE" in said


def test_with_a_queue(single):
    fates(single, "preempted", 0)
    single("babysit", "--queue", "--reserved", *QUICK, *COMMAND, FAKE_QUEUE_STATES="ACTIVE")
    assert [call[2] for call in single.calls("create")] == ["queued-resources"] * 2
    assert [call[2] for call in single.calls("delete")] == ["queued-resources"]


def test_a_run_that_was_stopped_or_is_dead_runs_again_on_the_same_tpu(single):
    fates(single, 75, "dead", "killed", 0)
    said = single.exists()("babysit", *QUICK, *COMMAND).stderr
    assert starts(single) == 4
    assert single.calls("create") == single.calls("delete") == []
    for state in ("at exit 75", "dead", "at exit 137"):
        assert f"run main: worker 0 is {state}" in said


def test_another_exit_code_ends_it_with_the_log(single):
    fates(single, 3, 0)
    said = single.exists()("babysit", *QUICK, *COMMAND, code=3).stderr
    assert starts(single) == 1
    assert "run main failed on worker 0 with exit code 3" in said
    assert "[worker 0] its last words" in said
    assert "is done after 0 restarts" in single("babysit", *QUICK, *COMMAND).stderr, "mended, it goes on"


def test_it_gives_up_after_too_many_restarts(single):
    fates(single, *[75] * 9)
    said = single.exists()("babysit", *QUICK, "--max-restarts", "2", *COMMAND, code=1).stderr
    assert starts(single) == 3
    assert "gives up after 2 restarts; the last reason: run main: worker 0 is at exit 75" in said


def test_pauses_double_up_to_the_longest(single):
    fates(single, *[75] * 9)
    skips = 'case $1 in [1-9]*) echo "$1" >>"$FAKE_CLOUD/slept" ;; *) exec /bin/sleep "$1" ;; esac'
    executable(single.cloud.parent / "bin" / "sleep", f"#!/bin/sh\n{skips}\n")
    pauses = ("--poll", "0.1", "--pause", "2", "--max-pause", "10")
    single.exists()("babysit", *pauses, "--max-restarts", "4", *COMMAND, code=1)
    slept = [line for line in (single.cloud / "slept").read_text().split() if line != "1"]
    assert slept == ["2", "4", "8", "10"]


def test_a_creation_that_fails_is_tried_again(single):
    fates(single, 0)
    rule = failure("tpu-vm", "create", code=1, message="ERROR: no capacity", nth=1)
    said = single("babysit", *QUICK, *COMMAND, FAKE_FAIL=rule).stderr
    assert "no capacity" in said
    assert "is done after 1 restarts" in said
    assert starts(single) == 1


def test_a_run_that_is_running_is_watched(single):
    single.exists()("setup")
    looks = '[[ -e $FAKE_CLOUD/go ]] && (($(grep -c state_of "$FAKE_CLOUD/calls") > 1))'
    single("run", "--", "bash", "-c", f"until {looks}; do sleep 0.05; done")
    single.forget_calls()
    (single.cloud / "go").touch()
    said = single("babysit", *QUICK, "--", "false").stderr
    assert "is running already: watching it" in said
    assert "is done after 0 restarts" in said


def test_source_is_what_it_was_at_the_beginning(single):
    fates(single, "preempted", 0)
    edit = f"echo later >{single.repository}/pyproject.toml;"
    single.exists()("babysit", *QUICK, "--", "bash", "-c", edit + RUN)
    assert (single.worker(0) / "jrlhf" / "pyproject.toml").read_text() == "# pyproject.toml\n"
    assert (single.repository / "pyproject.toml").read_text() == "later\n"


def test_a_tpu_that_somebody_has_stopped_is_not_deleted(single):
    assert "somebody has stopped pod" in single.exists("STOPPED")("babysit", *QUICK, *COMMAND, code=1).stderr
    assert single.calls("delete") == []


def test_one_worker_that_is_lost_takes_the_others_along(make_pod):
    """Worker 2 is killed, worker 1 fails for want of it, the others wait for ever: all are stopped and run again."""
    pod = make_pod().exists().with_git()
    run = """
    case $HOME in
      *worker-2) [[ -e $FAKE_CLOUD/once ]] && exit 0; touch "$FAKE_CLOUD/once"; kill -KILL $$ ;;
      *worker-1) [[ -e ~/again ]] && exit 0; touch ~/again; exit 1 ;;
      *) [[ -e ~/again ]] && exit 0; touch ~/again; exec sleep 60 ;;
    esac
    """
    said = pod("babysit", *QUICK, "--", "bash", "-c", run).stderr
    assert "worker 2 is at exit 137; restart 1" in said
    assert "is done after 1 restarts" in said
