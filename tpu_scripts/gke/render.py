#!/usr/bin/env python3
"""Fills the manifests of this folder and prints them: a JobSet of TPU slices, a JobSet of GPU hosts, or a Kueue queue.

    render.py tpu --name ppo --image IMAGE --claim runs --accelerator tpu-v5-lite-podslice --topology 4x4 EXPERIMENT
    render.py gpu --name ppo --image IMAGE --claim runs --accelerator nvidia-h100-80gb --hosts 2 EXPERIMENT -- OPTIONS
    render.py queue --name tpus --accelerator tpu-v5-lite-podslice --topology 4x4 --slices 2

Values are put in as JSON, which is YAML. Needs nothing but Python.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from string import Template
from typing import Any

HERE = Path(__file__).resolve().parent

# The label's value -> (axes of a topology, chips that a host may have). Hosts of slices of several have 4.
TPUS = {
    "tpu-v4-podslice": (3, (4,)),
    "tpu-v5-lite-podslice": (2, (1, 4, 8)),
    "tpu-v5p-slice": (3, (4,)),
    "tpu-v6e-slice": (2, (1, 4, 8)),
    "tpu7x": (3, (4,)),
}
MULTI_HOST = 4
PORT = 8476  # of process 0 of a GPU job
LONGEST = 63  # characters of a DNS label
SET_HERE = ("--runs-dir", "--distributed", "--coordinator", "--processes", "--process")


class Mistake(Exception):
    """What the user has to mend."""


def slice_hosts(accelerator: str, topology: str, chips: int | None) -> tuple[int, int]:
    """(hosts, chips of each) of a slice. chips: of a host, None for what the accelerator's slices usually have."""
    if accelerator not in TPUS:
        raise Mistake(f"--accelerator {accelerator}: known are {', '.join(TPUS)}")
    axes, sizes = TPUS[accelerator]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", topology) or topology.count("x") != axes - 1:
        example = "x".join(["4"] * axes)
        raise Mistake(f"--topology {topology}: {accelerator} has {axes} axes, for example {example}")
    total = math.prod(int(n) for n in topology.split("x"))
    chips = min(total, MULTI_HOST) if chips is None else chips
    if chips not in sizes:
        raise Mistake(f"--chips-per-host {chips}: a host of {accelerator} has {' or '.join(map(str, sizes))}")
    if total % chips or (total > chips and chips != MULTI_HOST):
        raise Mistake(
            f"--topology {topology}: {total} chips do not make hosts of {chips}"
            + (f"; slices of several hosts have {MULTI_HOST} on each" if total > chips else "")
        )
    return total // chips, chips


def label(option: str, text: str, suffix: str = "") -> str:
    """`text` as a name in Kubernetes; `suffix` is what the longest name made of it has behind it."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", text):
        raise Mistake(f"{option} {text}: use small letters, digits and '-', beginning with a letter")
    if len(text + suffix) > LONGEST:
        raise Mistake(f"{option} {text}: with {suffix} it has over {LONGEST} characters; shorten it")
    return text


def jrlhf_command(args: argparse.Namespace, join: list[str]) -> list[str]:
    """What each pod runs. join: the options by which its process finds the others."""
    for option in args.options:
        if option.partition("=")[0] == "--force":
            raise Mistake("--force: every restart would throw away what the one before saved")
        if option.partition("=")[0] in SET_HERE:
            raise Mistake(f"{option}: render.py sets it")
    return ["jrlhf", "run", args.experiment, *join, "--runs-dir", args.runs_dir, *args.options]


def common(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that both JobSets have."""
    if not args.runs_dir.startswith("/"):
        raise Mistake(f"--runs-dir {args.runs_dir}: a path in the container, from /")
    return {
        "namespace": label("--namespace", args.namespace),
        "labels": {"kueue.x-k8s.io/queue-name": label("--queue", args.queue)} if args.queue else {},
        "image": args.image,
        "claim": label("--claim", args.claim),
        "runs_dir": args.runs_dir,
        "max_restarts": args.max_restarts,
        "grace": args.grace,
    }


def tpu(args: argparse.Namespace) -> str:
    hosts, chips = slice_hosts(args.accelerator, args.topology, args.chips_per_host)
    return fill(
        "jobset-tpu.yaml",
        **common(args),
        name=label("--name", args.name, f"-slice-{args.slices - 1}-{hosts - 1}"),
        accelerator=args.accelerator,
        topology=args.topology,
        slices=args.slices,
        hosts=hosts,
        chips=chips,
        command=jrlhf_command(args, ["--distributed"] if hosts * args.slices > 1 else []),
    )


def gpu(args: argparse.Namespace) -> str:
    # A pod is called <JobSet>-<replicated job>-<job>-<pod>.<JobSet>. Kubernetes replaces $(...) by the pod's own index.
    join = [
        *("--coordinator", f"{args.name}-host-0-0.{args.name}:{PORT}"),
        *("--processes", str(args.hosts), "--process", "$(JOB_COMPLETION_INDEX)"),
    ]
    return fill(
        "jobset-gpu.yaml",
        **common(args),
        name=label("--name", args.name, f"-host-0-{args.hosts - 1}"),
        accelerator=args.accelerator,
        hosts=args.hosts,
        chips=args.gpus_per_host,
        command=jrlhf_command(args, join if args.hosts > 1 else []),
    )


def queue(args: argparse.Namespace) -> str:
    hosts, chips = slice_hosts(args.accelerator, args.topology, args.chips_per_host)
    return fill(
        "kueue.yaml",
        name=label("--name", args.name),
        namespace=label("--namespace", args.namespace),
        flavor=label("--accelerator", f"{args.accelerator}-{args.topology}"),
        accelerator=args.accelerator,
        topology=args.topology,
        quota=hosts * chips * args.slices,
    )


def fill(file: str, **fields: Any) -> str:
    """A manifest of this folder with its fields filled; every field must be in it."""
    template = Template((HERE / file).read_text())
    unused = set(fields) - set(template.get_identifiers())
    assert not unused, f"{file} has no {unused}"
    return template.substitute({k: json.dumps(v) for k, v in fields.items()})


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    kinds = p.add_subparsers(required=True, metavar="tpu|gpu|queue")

    def kind(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        q = kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
        q.set_defaults(function=function, options=[])
        q.add_argument("--name", required=True, help="its name in the cluster")
        q.add_argument("--namespace", default="default", help="default: default")
        return q

    def jobset(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        q = kind(name, function, text)
        q.usage = f"render.py {name} [option ...] EXPERIMENT [-- JRLHF OPTION ...]"
        q.add_argument("experiment", metavar="EXPERIMENT", help="experiment file, as the container finds it")
        q.add_argument("--image", required=True, help="container image (tpu_scripts/docker)")
        q.add_argument(
            "--claim", required=True, help="PersistentVolumeClaim of the runs, which all pods can write"
        )
        q.add_argument("--runs-dir", default="/runs", help="where it is in the container (default: /runs)")
        q.add_argument(
            "--queue", default="", help="Kueue LocalQueue to wait in (default: none, start at once)"
        )
        q.add_argument("--max-restarts", type=count, default=20, help="of all pods together (default: 20)")
        q.add_argument(
            "--grace", type=positive, default=300, help="seconds to save in when told to stop (300)"
        )
        return q

    def topology(q: argparse.ArgumentParser) -> None:
        q.add_argument("--accelerator", required=True, help=f"one of {', '.join(TPUS)}")
        q.add_argument("--topology", required=True, help="chips along each axis of a slice, for example 4x4")
        q.add_argument("--chips-per-host", type=positive, help="default: 4, or all of a smaller slice")
        q.add_argument("--slices", type=positive, default=1, help="default: 1")

    topology(jobset("tpu", tpu, "a JobSet of TPU slices"))
    g = jobset("gpu", gpu, "a JobSet of GPU hosts")
    g.add_argument("--accelerator", required=True, help="for example nvidia-h100-80gb")
    g.add_argument("--hosts", type=positive, default=1, help="default: 1")
    g.add_argument("--gpus-per-host", type=positive, default=8, help="default: 8")
    topology(kind("queue", queue, "a Kueue queue for slices of one kind"))
    return p


def main(argv: list[str]) -> int:
    own, options = argv, []
    if "--" in argv:
        at = argv.index("--")
        own, options = argv[:at], argv[at + 1 :]
    args = parser().parse_args(own)
    try:
        if options and args.function is queue:
            raise Mistake("--: a queue has no command")
        args.options = options
        print(args.function(args), end="")
    except Mistake as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
