"""GKE: manifests that parse and agree with themselves, commands that jrlhf takes, and one submission of each name."""

import argparse
import importlib.util
import math
import shlex
from pathlib import Path

import pytest
import yaml

from jrlhf.cli import _parse

GKE = Path(__file__).resolve().parents[2] / "tpu_scripts" / "gke"
_spec = importlib.util.spec_from_file_location("render", GKE / "render.py")
assert _spec is not None
assert _spec.loader is not None
render = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(render)

SET = ["--name", "ppo", "--image", "me/jrlhf:tpu", "--claim", "runs"]
TPU = ["tpu", *SET, "--accelerator", "tpu-v5-lite-podslice", "--topology", "4x4"]
GPU = ["gpu", *SET, "--accelerator", "nvidia-h100-80gb", "--hosts", "2"]
XPK = [
    *("--name", "ppo", "--cluster", "c", "--tpu-type", "v5litepod-16", "--image", "me/jrlhf:tpu"),
    *("--runs-dir", "/runs", "a.py"),
]


def rendered(capsys, *args: str) -> dict:
    """The manifest's only document."""
    assert render.main(list(args)) == 0
    return yaml.safe_load(capsys.readouterr().out)


def refused(capsys, *args: str) -> str:
    assert render.main(list(args)) == 2
    out, err = capsys.readouterr()
    assert not out
    return err


def job_of(manifest: dict) -> dict:
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod_of(manifest: dict) -> dict:
    return job_of(manifest)["template"]["spec"]


def container_of(manifest: dict) -> dict:
    (container,) = pod_of(manifest)["containers"]
    return container


def parsed(manifest: dict) -> argparse.Namespace:
    """What jrlhf makes of a pod's command, of which Kubernetes replaces the pod's index (here 1)."""
    program, *args = (a.replace("$(JOB_COMPLETION_INDEX)", "1") for a in container_of(manifest)["command"])
    assert program == "jrlhf"
    return _parse(args)


# --- slices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accelerator", "topology", "given", "hosts"),
    [  # the hosts of Google's tables
        ("tpu-v5-lite-podslice", "1x1", None, 1),
        ("tpu-v5-lite-podslice", "2x2", None, 1),
        ("tpu-v5-lite-podslice", "2x4", None, 2),
        ("tpu-v5-lite-podslice", "2x4", "8", 1),
        ("tpu-v5-lite-podslice", "16x16", None, 64),
        ("tpu-v6e-slice", "4x4", None, 4),
        ("tpu-v5p-slice", "2x2x1", None, 1),
        ("tpu-v5p-slice", "2x2x2", None, 2),
        ("tpu-v5p-slice", "4x4x8", None, 32),
        ("tpu-v4-podslice", "2x2x4", None, 4),
        ("tpu7x", "4x4x4", None, 16),
    ],
)
def test_hosts_times_chips_are_the_topology(capsys, accelerator, topology, given, hosts):
    chips = ["--chips-per-host", given] if given else []
    args = (
        "tpu",
        *SET,
        "--accelerator",
        accelerator,
        "--topology",
        topology,
        *chips,
        "--slices",
        "3",
        "a.py",
    )
    made = rendered(capsys, *args)
    job, resources = job_of(made), container_of(made)["resources"]
    assert job["completions"] == job["parallelism"] == hosts
    assert resources["limits"] == resources["requests"]
    assert hosts * resources["limits"]["google.com/tpu"] == math.prod(int(n) for n in topology.split("x"))
    assert pod_of(made)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert made["spec"]["replicatedJobs"][0]["replicas"] == 3


@pytest.mark.parametrize(
    ("accelerator", "topology", "chips", "message"),
    [
        ("tpu-v5e", "4x4", None, "--accelerator tpu-v5e: known are"),
        ("tpu-v5-lite-podslice", "4x4x4", None, "has 2 axes"),
        ("tpu-v5p-slice", "4x4", None, "has 3 axes"),
        ("tpu-v5p-slice", "4x4xa", None, "has 3 axes"),
        ("tpu-v5p-slice", "0x4x4", None, "has 3 axes"),
        ("tpu-v5-lite-podslice", "4x4", "8", "several hosts have 4"),
        ("tpu-v5-lite-podslice", "1x1", "4", "1 chips do not make hosts of 4"),
        ("tpu-v5-lite-podslice", "4x4", "3", "has 1 or 4 or 8"),
        ("tpu-v5p-slice", "2x2x1", "1", "has 4"),
        ("tpu-v5p-slice", "1x1x1", None, "has 4"),
    ],
)
def test_a_slice_that_does_not_exist_is_refused(capsys, accelerator, topology, chips, message):
    more = ["--chips-per-host", chips] if chips else []
    args = ("tpu", *SET, "--accelerator", accelerator, "--topology", topology, *more, "a.py")
    assert message in refused(capsys, *args)


# --- what all JobSets have ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [TPU, GPU], ids=["tpu", "gpu"])
def test_it_restarts_after_75_and_not_after_a_bug_or_a_mistake(capsys, args):
    made = rendered(capsys, *args, "--max-restarts", "7", "--grace", "120", "a.py")
    policy = made["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    job, pod = job_of(made), pod_of(made)
    assert job["backoffLimit"] == 0
    first, final = job["podFailurePolicy"]["rules"]  # the first that fits decides
    assert (first["action"], first["onPodConditions"]) == (
        "Count",
        [{"type": "DisruptionTarget", "status": "True"}],
    )
    assert final["action"] == "FailJob"
    assert final["onExitCodes"] == {
        "containerName": container_of(made)["name"],
        "operator": "In",
        "values": [1, 2],
    }
    assert pod["restartPolicy"] == "Never"  # which a podFailurePolicy needs
    assert pod["terminationGracePeriodSeconds"] == 120


@pytest.mark.parametrize("args", [TPU, GPU], ids=["tpu", "gpu"])
def test_its_hosts_find_one_another_and_share_the_runs(capsys, args):
    made = rendered(
        capsys, *args, "--namespace", "team", "--queue", "slices", "--runs-dir", "/shared", "a.py"
    )
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert made["spec"]["network"] == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}
    assert job_of(made)["completionMode"] == "Indexed"
    assert made["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "slices"}
    assert made["metadata"]["namespace"] == "team"
    container = container_of(made)
    volumes = {v["name"]: v for v in pod_of(made)["volumes"]}
    mounts = {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"]}
    assert mounts["/shared"]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert parsed(made).runs_dir == Path("/shared")


def test_the_manifests_say_nothing_that_is_not_filled(capsys):
    for args in (TPU, GPU):
        assert render.main([*args, "a.py"]) == 0
        out = capsys.readouterr().out
        left = [line for line in out.splitlines() if "$" in line and "$(JOB_COMPLETION_INDEX)" not in line]
        assert left == []


@pytest.mark.parametrize("value", ['a: "b" # c', "it's $(here) ${x} $$", "- x\ny: z"])
def test_values_arrive_as_they_are(capsys, value):
    made = rendered(capsys, *TPU, "a.py", "--", "--note", value)
    assert container_of(made)["command"][-1] == value


# --- the command --------------------------------------------------------------------------------------------------


def test_jrlhf_takes_the_command_of_a_slice_and_jax_finds_the_rest(capsys):
    several = parsed(rendered(capsys, *TPU, "a.py", "--", "--mesh.fsdp", "16"))
    assert several.distributed
    assert several.overrides == ["--mesh.fsdp", "16"]
    one_host = [*TPU[:-1], "2x2"]
    assert not parsed(rendered(capsys, *one_host, "a.py")).distributed
    assert parsed(rendered(capsys, *one_host, "--slices", "2", "a.py")).distributed


def test_jrlhf_takes_the_command_of_a_gpu_host_and_is_told_who_it_is(capsys):
    made = rendered(capsys, *GPU, "a.py")
    several = parsed(made)
    assert (several.processes, several.process) == (job_of(made)["completions"], 1)
    host, _, port = several.coordinator.partition(":")
    (replicated,) = made["spec"]["replicatedJobs"]
    assert host == f"ppo-{replicated['name']}-0-0.ppo"  # pod 0 of job 0, in the JobSet's own domain
    assert port.isdecimal()
    assert container_of(made)["resources"] == {k: {"nvidia.com/gpu": 8} for k in ("requests", "limits")}
    alone = parsed(rendered(capsys, *GPU[:-1], "1", "a.py"))
    assert (alone.coordinator, alone.distributed) == (None, False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*TPU, "a.py", "--", "--force", "ppo"], "every restart would throw away"),
        ([*TPU, "a.py", "--", "--distributed"], "render.py sets it"),
        ([*GPU, "a.py", "--", "--coordinator=x"], "render.py sets it"),
        ([*TPU, "--runs-dir", "runs", "a.py"], "from /"),
        ([*TPU, "--queue", "My_queue", "a.py"], "--queue My_queue: use small letters"),
        (["tpu", "--name", "P", *TPU[3:], "a.py"], "--name P: use small letters"),
        (["tpu", "--name", "p" * 54, *TPU[3:], "a.py"], "over 63 characters"),
        (["queue", "--name", "q", *TPU[-4:], "--", "x"], "a queue has no command"),
    ],
)
def test_a_mistake_is_refused(capsys, args, message):
    assert message in refused(capsys, *args)


# --- the queue ----------------------------------------------------------------------------------------------------


def test_a_queue_admits_whole_slices_of_its_kind(capsys):
    assert render.main(["queue", "--name", "tpus", *TPU[-4:], "--slices", "3"]) == 0
    flavor, cluster_queue, local_queue = yaml.safe_load_all(capsys.readouterr().out)
    assert [d["kind"] for d in (flavor, cluster_queue, local_queue)] == [
        "ResourceFlavor",
        "ClusterQueue",
        "LocalQueue",
    ]
    assert flavor["spec"]["nodeLabels"] == pod_of(rendered(capsys, *TPU, "a.py"))["nodeSelector"]
    (group,) = cluster_queue["spec"]["resourceGroups"]
    (offered,) = group["flavors"]
    assert offered["name"] == flavor["metadata"]["name"]
    assert offered["resources"] == [{"name": "google.com/tpu", "nominalQuota": 3 * 16}]
    assert group["coveredResources"] == ["google.com/tpu"]
    assert local_queue["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]


# --- submitting ---------------------------------------------------------------------------------------------------


def test_apply_gives_the_manifest_to_the_cluster(cluster):
    done = cluster.run("gke/apply.sh", "--context", "mine", *TPU, "a.py")
    assert done.returncode == 0, done.stderr
    asked, made = cluster.calls("kubectl")
    assert asked[1:3] == ["--context=mine", "get"]
    assert made[1:3] == ["--context=mine", "create"]
    assert yaml.safe_load(cluster.left("stdin").read_text())["metadata"]["name"] == "ppo"


def test_apply_submits_no_name_twice(cluster):
    done = cluster.run("gke/apply.sh", *TPU, "a.py", KUBECTL_PRINTS="default ppo ")
    assert done.returncode == 0, done.stderr
    assert "not submitted again" in done.stdout
    done = cluster.run("gke/apply.sh", *TPU, "a.py", KUBECTL_PRINTS="default ppo Completed")
    assert done.returncode == 0, done.stderr
    assert "has finished" in done.stdout
    done = cluster.run("gke/apply.sh", *TPU, "a.py", KUBECTL_PRINTS="default ppo Failed")
    assert done.returncode == 1
    assert "delete jobset ppo" in done.stderr
    assert all("get" in call for call in cluster.calls())


def test_apply_stops_where_the_cluster_cannot_be_asked(cluster):
    done = cluster.run("gke/apply.sh", *TPU, "a.py", KUBECTL_EXITS="1")
    assert done.returncode != 0
    assert len(cluster.calls()) == 1


def test_apply_of_a_queue_can_be_repeated(cluster):
    done = cluster.run("gke/apply.sh", "queue", "--name", "tpus", *TPU[-4:])
    assert done.returncode == 0, done.stderr
    assert [call[1] for call in cluster.calls()] == ["apply"]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--dry-run", *TPU, "a.py"], 0, "kind: JobSet"),
        ([], 2, "expected tpu, gpu or queue"),
        (["cpu"], 2, "cpu: expected tpu, gpu or queue"),
        (["--context"], 2, "--context: expected a name"),
        ([*TPU[:-1], "5x", "a.py"], 2, "--topology 5x"),
        (["tpu", "--help"], 0, "--topology"),
    ],
)
def test_apply_asks_the_cluster_nothing_where_it_need_not(cluster, args, code, said):
    done = cluster.run("gke/apply.sh", *args)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert not cluster.calls()


def test_xpk_creates_a_workload_that_saves_and_restarts(cluster):
    done = cluster.run(
        *("gke/xpk.sh", "--slices", "2", "--max-restarts", "3", "--grace", "90", "--zone", "z", *XPK),
        *("--", "--note", "it's here"),
    )
    assert done.returncode == 0, done.stderr
    listed, created = cluster.calls("xpk")
    assert listed[1:3] == ["workload", "list"]
    given = dict(a.partition("=")[::2] for a in created[3:])
    assert created[1:3] == ["workload", "create"]
    command = given.pop("--command")
    assert given == {
        "--workload": "ppo",
        "--cluster": "c",
        "--tpu-type": "v5litepod-16",
        "--num-slices": "2",
        "--docker-image": "me/jrlhf:tpu",
        "--max-restarts": "3",
        "--restart-on-exit-codes": "75",
        "--termination-grace-period-seconds": "90",
        "--zone": "z",
    }
    first, *words = shlex.split(command)
    assert (first, words[0]) == ("exec", "jrlhf")  # so that a SIGTERM reaches jrlhf and not a shell before it
    parsed = _parse(words[1:])
    assert (parsed.distributed, parsed.runs_dir) == (True, Path("/runs"))
    assert parsed.overrides == ["--note", "it's here"]


def test_xpk_creates_no_workload_twice(cluster):
    table = "[XPK] Task: jobs=^ppo$\nJobset Name  Status\nppo  Running"
    done = cluster.run("gke/xpk.sh", *XPK, XPK_PRINTS=table)
    assert done.returncode == 0, done.stderr
    assert "not submitted again" in done.stdout
    assert [call[2] for call in cluster.calls("xpk")] == ["list"]
    # Another's name, or its own in a message, is not the workload.
    cluster.run("gke/xpk.sh", *XPK, XPK_PRINTS=table.replace("\nppo ", "\nppo-2 "))
    assert [call[2] for call in cluster.calls("xpk")] == ["list", "list", "create"]


def test_xpk_stops_where_the_cluster_cannot_be_asked(cluster):
    done = cluster.run("gke/xpk.sh", *XPK, XPK_EXITS="1")
    assert done.returncode == 2
    assert "nothing is submitted" in done.stderr
    assert len(cluster.calls()) == 1


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--dry-run", *XPK], 0, "'create'"),
        (XPK[2:], 2, "--name"),
        ([*XPK, "b.py"], 2, "expected one experiment"),
        ([*XPK, "--slices", "0"], 2, "--slices"),
        ([*XPK, "--max-restarts", "x"], 2, "--max-restarts"),
        ([*XPK, "--runs-dir", "runs"], 2, "from /"),
        ([*XPK, "--cluster"], 2, "--cluster: expected a value"),
        ([*XPK, "--", "--force"], 2, "--force"),
    ],
)
def test_xpk_calls_nothing_where_it_need_not(cluster, args, code, said):
    done = cluster.run("gke/xpk.sh", *args)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert not cluster.calls()
