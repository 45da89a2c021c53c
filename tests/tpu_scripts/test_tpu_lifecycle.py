"""create.sh, queue.sh and delete.sh against a cloud that works, and one that does not."""

import pytest
from fake_pod import failure

WHERE = ["--project=my-project", "--zone=us-west4-a"]
NO_CAPACITY = failure("tpu-vm", "create", code=5, message="ERROR: no more capacity in the zone")


def test_create_creates_what_was_asked_for_and_then_nothing(pod):
    pod(
        "create",
        "--spot",
        TPU_NETWORK="net",
        TPU_SUBNETWORK="sub",
        TPU_SERVICE_ACCOUNT="me",
        TPU_INTERNAL_IP="1",
    )
    (call,) = pod.calls("create")
    assert call == [
        "compute", "tpus", "tpu-vm", "create", "pod", *WHERE, "--accelerator-type=v5litepod-16",
        "--version=v2-alpha-tpuv5-lite", "--spot", "--network=net", "--subnetwork=sub", "--service-account=me",
        "--internal-ips",
    ]  # fmt: skip
    assert "exists and is READY" in pod("create", "--spot").stderr
    assert len(pod.calls("create")) == 1


def test_create_passes_its_failure_on(pod):
    error = pod("create", code=5, FAKE_FAIL=NO_CAPACITY).stderr
    assert "no more capacity in the zone" in error
    assert "queue.sh waits for it" in error


@pytest.mark.parametrize(
    ("state", "advice"),
    [("PREEMPTED", "delete.sh"), ("CREATING", "wait"), ("STOPPED", "tpu-vm start pod"), ("DELETING", "wait")],
)
def test_create_says_what_to_do_about_another_state(pod, state, advice):
    error = pod.exists(state)("create", code=1).stderr
    assert f"pod is {state}" in error
    assert advice in error
    assert pod.calls("create") == []


def test_create_does_not_take_another_accelerator_for_it(pod):
    assert "exists as v4-8" in pod.exists(kind="v4-8")("create", code=1).stderr


def test_a_state_that_gcloud_cannot_say_is_not_no_tpu(pod):
    rule = failure("tpu-vm", "describe", code=1, message="ERROR: PERMISSION_DENIED")
    error = pod("create", code=1, FAKE_FAIL=rule).stderr
    assert "PERMISSION_DENIED" in error
    assert "could not say what state pod is in" in error
    assert pod.calls("create") == []


def test_queue_waits_until_it_is_there_and_then_does_nothing(pod):
    done = pod("queue", "--reserved", "--poll", "0")
    (call,) = pod.calls("create")
    assert call == [
        "compute", "tpus", "queued-resources", "create", "pod-queue", *WHERE, "--node-id=pod",
        "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--reserved",
    ]  # fmt: skip
    states = [line.split()[-1] for line in done.stderr.splitlines() if "pod-queue is" in line]
    assert states == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert "pod is READY" in pod("queue", "--reserved").stderr
    assert len(pod.calls("create")) == 1


def test_queue_gives_up_in_time_and_goes_on_when_asked_again(pod):
    waits = {"FAKE_QUEUE_STATES": "WAITING_FOR_RESOURCES"}
    assert "still WAITING_FOR_RESOURCES after 0 s" in pod("queue", "--limit", "0", code=124, **waits).stderr
    pod("queue", "--limit", "0", code=124, **waits)
    assert len(pod.calls("create")) == 1


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_queue_says_what_to_do_when_it_has_failed(pod, state):
    error = pod("queue", "--poll", "0", code=1, FAKE_QUEUE_STATES=f"PROVISIONING {state}").stderr
    assert state in error
    assert "delete.sh" in error


def test_queue_passes_its_failure_on(pod):
    rule = failure("queued-resources", "create", code=3, message="ERROR: quota")
    assert "ERROR: quota" in pod("queue", code=3, FAKE_FAIL=rule).stderr


def test_delete_asks_unless_told(pod):
    assert "pass --yes" in pod.exists()("delete", code=2).stderr
    assert pod.calls("delete") == []
    pod("delete", "--yes")
    assert pod.calls("delete") == [["compute", "tpus", "tpu-vm", "delete", "pod", *WHERE, "--quiet"]]
    assert "nothing to delete" in pod("delete", "--yes").stderr


def test_delete_takes_the_queue_with_it(pod):
    pod("queue", "--poll", "0")
    pod("delete", "--yes")
    assert pod.calls("delete") == [
        ["compute", "tpus", "queued-resources", "delete", "pod-queue", *WHERE, "--force", "--quiet"]
    ]
    assert "nothing to delete" in pod("delete", "--yes").stderr
