"""What an experiment needs of accelerators that are not here: its programs, compiled by the real compiler for them.

Memory is the compiler's own. Time is predicted: what products, memory traffic and collectives take at the rates of
`jrlhf.hardware`, as often as they run (`jrlhf.hlo`).
"""

import importlib.util
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jrlhf.config import MeshConfig, Stage, UserError, did_you_mean
from jrlhf.hardware import Hardware, hardware_of
from jrlhf.hlo import Module, Rates, Walk
from jrlhf.models.config import ModelConfig
from jrlhf.models.transformer import kept_of_layers
from jrlhf.sharding import MESH_AXES, make_mesh, mesh_sizes
from jrlhf.training.programs import Held, Lengths, Program, programs_of
from jrlhf.training.stages.common import FineTuningStage
from jrlhf.training.stages.language_model import Checkpoint, Pretrain

# What programs reach of a chip's peak: docs/plans.md says how they were chosen.
PRODUCTS, MEMORY, LINKS = 0.8, 0.85, 0.8


def rates_of(hardware: Hardware) -> Rates:
    return Rates(
        PRODUCTS * hardware.peak_bf16, MEMORY * hardware.hbm_bandwidth, LINKS * hardware.ici_bandwidth
    )


class Moved(NamedTuple):
    """A collective."""

    kind: str
    bytes: int  # of its result or its argument, whichever is more
    devices: int  # that take part
    overlapped: bool  # with what is computed
    times: float  # that it runs


@dataclass(frozen=True)
class Planned:
    """A program compiled for a mesh. Numbers are of one device, but for `useful_flops`."""

    stage: str
    program: str
    often: float  # runs in a training step; 0: once, before the first
    capacity: int  # bytes of HBM
    parts: dict[str, int]  # bytes of HBM while it runs: what the stage holds there, and its own
    useful_flops: float  # of all devices: what the algorithm asks for
    compiles: bool = True  # or the compiler refuses, for want of memory
    refused_bytes: int = 0  # what it then says that it wants
    flops: float = 0.0
    hbm_traffic: float = 0.0
    collectives: tuple[Moved, ...] = ()
    kernels: dict[str, float] = field(default_factory=dict)  # name -> how often
    seconds: float = 0.0  # predicted
    mfu: float = 0.0  # predicted: useful FLOPs over those that the devices could do in that time
    compile_seconds: float = 0.0

    @property
    def needed(self) -> int:
        return max(sum(self.parts.values()), self.refused_bytes)

    @property
    def fits(self) -> bool:
        return self.compiles and self.needed <= self.capacity


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """Devices of a TPU topology ("v5p:4x4x8") to compile for. UserError where there is none such, or no compiler."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is missing: pip install 'jrlhf[plan]' (or libtpu)")
    alone = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    for variable, value in (alone | {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}).items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    more = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **more).devices)
    except Exception as error:  # the compiler's own kinds differ from version to version
        raise UserError(
            f"--topology {name}: the TPU compiler knows no such topology ({str(error).splitlines()[0]}). It is a chip "
            "and its torus, such as v5e:4x4, v5p:2x2x2 or v6e:8x8"
        ) from error


def device_bytes(tree: Any) -> int:
    """On each device, of shapes with shardings; what lies in the host's memory takes none."""
    total = 0
    for x in jax.tree.leaves(tree):
        if x.sharding.memory_kind in (None, "device"):
            shard = x.sharding.shard_shape(x.shape)
            itemsize = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
            total += int(np.prod(shard)) * itemsize
    return total


def device_bytes_of(held: Sequence[Held], program: Program) -> dict[str, int]:
    return {h.name: device_bytes(h.tree) for h in held} | {"other arguments": device_bytes(program.given)}


def known_hardware(mesh: Mesh) -> Hardware:
    kind = mesh.devices.flat[0].device_kind
    if (hardware := hardware_of(kind)) is None:
        raise UserError(f"nothing is known of a {kind}: add it to jrlhf/hardware.py")
    return hardware


# --- compiling, in processes of their own -------------------------------------------------------------------


def compile_here(program: Program, mesh: Mesh, folder: Path) -> None:
    """Compiles a program and leaves what the compiler writes of it in `folder`.

    (A compiled program hands back its text too, but not that of all programs of TPUs: `as_text` then fails.)
    """
    with jax.set_mesh(mesh):
        program.lower().compile(compiler_options={"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True})


class Compiler(NamedTuple):
    """How programs are compiled: each by a command of its own, for the compiler knows no other way to be stopped, and
    where it fails it takes its process along."""

    command: Callable[[str, str, Sequence[str], Path], list[str]]  # (stage, program, further options, folder)
    quick: bool  # stop it once it knows what it will do, before it writes that down as machine code
    at_once: int  # processes

    def compiled(self, stage: str, program: str, options: Sequence[str] = ()) -> "Written":
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as name, tempfile.TemporaryFile("w+") as told:
            folder = Path(name)
            running = subprocess.Popen(
                self.command(stage, program, options, folder), stdout=told, stderr=subprocess.STDOUT
            )
            while running.poll() is None and not (self.quick and _settled(folder)):
                time.sleep(0.3)
            stopped = running.poll() is None
            running.kill()
            running.wait()
            seconds = time.perf_counter() - began
            told.seek(0)
            output = told.read()
            if stopped or running.returncode == 0:
                return written(folder, seconds)
        if (wanted := re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", output)) is not None:
            used = int(float(wanted[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[wanted[2]])
            return Written("", 0, 0, seconds, refused=used)
        said = [line for line in output.splitlines() if line.strip()][-12:]
        raise UserError(f"{stage}: {program} does not compile:\n" + "\n".join(said))


class Written(NamedTuple):
    """What a compiler has left of a program."""

    text: str
    temporaries: int  # bytes on a device
    results: int  # beside those that take the place of an argument
    seconds: float
    refused: int = 0  # bytes that it would have wanted, where it gave up


AFTER = "after_optimizations"


def _settled(folder: Path) -> bool:
    """Whether all that `written` reads is there, and whole."""
    names = (f"*{AFTER}.txt", f"*{AFTER}-buffer-assignment.txt", f"*{AFTER}-memory-usage-report.txt")
    sizes = lambda: [sorted(p.stat().st_size for p in folder.glob(name)) for name in names]  # noqa: E731
    before = sizes()
    if not all(before):
        return False
    time.sleep(1.0)
    return sizes() == before


def written(folder: Path, seconds: float) -> Written:
    texts = folder.glob(f"*{AFTER}.txt")
    of_memory = {
        p: p.with_name(p.name.replace(f"{AFTER}.txt", f"{AFTER}-buffer-assignment.txt")) for p in texts
    }
    whole = [p for p, memory in of_memory.items() if memory.is_file()]
    if not whole:
        left = sorted(p.name for p in folder.iterdir())
        raise UserError(f"the compiler left no text of its program, only {left}")
    text = max(whole, key=lambda p: p.stat().st_size)
    temporaries, results = assigned_bytes(of_memory[text].read_text())
    return Written(text.read_text(), temporaries, results, seconds)


def assigned_bytes(text: str) -> tuple[int, int]:
    """(temporaries, results of their own) of the memory in which arguments lie, by a buffer assignment."""
    temporaries = results = 0
    for line in text.splitlines():
        if not line.startswith("allocation ") or ", color " in line or "parameter " in line:
            continue  # another memory, or an argument
        size = re.search(r": size (\d+)", line)
        if size and "preallocated-temp" in line:
            temporaries += int(size[1])
        elif size and ("maybe-live-out" in line or "output shape" in line):
            results += int(size[1])
    return temporaries, results


def planned_stage(
    name: str,
    stages: Mapping[str, Stage],
    mesh: Mesh,
    lengths: Lengths,
    compiler: Compiler,
    options: Sequence[str] = (),
    only: Sequence[str] = (),
    told: Callable[[str], None] = lambda _: None,
) -> list[Planned]:
    """A stage's programs, each compiled for the mesh; [] of a stage that is not planned for. options: those by which
    the compiler's command makes these `stages`. only: of these names."""
    hardware, found = known_hardware(mesh), programs_of(name, stages, mesh, lengths)
    programs = [p for p in (found.programs if found else ()) if not only or p.name in only]
    with ThreadPoolExecutor(compiler.at_once) as pool:
        made = [pool.submit(compiler.compiled, name, p.name, options) for p in programs]
        plans = []
        for program, future in zip(programs, made, strict=True):
            parts = device_bytes_of(found.held, program)  # type: ignore[union-attr]
            plans.append(planned(program, parts, future.result(), hardware, mesh.size))
            told(f"{name}: {program.name}, {plans[-1].compile_seconds:.0f} s")
    return plans


def planned(
    program: Program, parts: dict[str, int], made: Written, hardware: Hardware, devices: int
) -> Planned:
    plan = Planned(program.stage, program.name, program.often, hardware.hbm_bytes, parts, program.useful)
    plan = replace(plan, compile_seconds=made.seconds)
    if made.refused:
        return replace(plan, compiles=False, refused_bytes=made.refused)
    cost = Walk(Module(made.text), rates_of(hardware), program.loops).cost()
    by_size = sorted(cost.collectives.items(), key=lambda item: -item[0].bytes * item[1])
    return replace(
        plan,
        parts=parts | {"temporaries": made.temporaries, "results": made.results},
        flops=cost.flops,
        hbm_traffic=cost.bytes,
        collectives=tuple(Moved(c.kind, c.bytes, c.devices, c.overlapped, count) for c, count in by_size),
        kernels=dict(cost.kernels),
        seconds=cost.seconds,
        mfu=program.useful / devices / hardware.peak_bf16 / cost.seconds,
    )


# --- what to change -----------------------------------------------------------------------------------------


class Change(NamedTuple):
    """A variant of an experiment, and how to ask for it on the command line."""

    options: tuple[str, ...]
    mesh: MeshConfig
    stages: Mapping[str, Stage]


class Tried(NamedTuple):
    change: Change
    plans: list[Planned]
    refused: str = ""  # why it is not possible

    @property
    def fits(self) -> bool:
        return bool(self.plans) and all(plan.fits for plan in self.plans)

    @property
    def needed(self) -> int:
        return max((plan.needed for plan in self.plans), default=0)

    @property
    def seconds(self) -> float:
        return sum(plan.seconds * plan.often for plan in self.plans)


def search(
    name: str,
    stages: Mapping[str, Stage],
    mesh: MeshConfig,
    devices: Sequence[jax.Device],
    lengths: Lengths,
    compiler: Compiler,
    tries: int,
    told: Callable[[str], None] = lambda _: None,
) -> list[Tried]:
    """At most `tries` variants of a stage's update, the best first: those that fit by their predicted time, then the
    others by what they need.

    From the best so far the next ones differ in one thing: the mesh, what is kept for the backward pass, microbatches,
    what lies in the host's memory. Numbers of a run differ by rounding alone.
    """
    found: dict[tuple[str, ...], Tried] = {}
    rank = lambda t: (bool(t.refused), not t.fits, t.seconds if t.fits else t.needed)  # noqa: E731
    waiting = [Change((), mesh, stages)]
    while waiting and sum(not t.refused for t in found.values()) < tries:
        change = waiting.pop(0)
        if change.options in found:
            continue
        told(" ".join(change.options) or "as it is")
        try:
            made = make_mesh(change.mesh, list(devices))
            plans = planned_stage(name, change.stages, made, lengths, compiler, change.options, ("update",))
            found[change.options] = Tried(change, plans)
        except UserError as error:
            found[change.options] = Tried(change, [], str(error))
        best = min(found.values(), key=rank)
        waiting = [c for c in neighbours(name, best, devices) if c.options not in found]
    return sorted(found.values(), key=rank)


def neighbours(name: str, tried: Tried, devices: Sequence[jax.Device]) -> Iterator[Change]:
    """Variants of one that differ in one thing, the likeliest to help first: less memory where it does not fit, less
    to compute again where it does."""
    change = tried.change
    stage: Any = change.stages[name]  # every kind has a loop and an algorithm of its own
    root, config = root_of(name, change.stages)
    given = dict(zip(change.options[::2], change.options[1::2], strict=True))

    def variant(option: str, value: Any, **changed: Any) -> Change:
        options = {**given, option: str(value)}
        flat = tuple(x for pair in sorted(options.items()) for x in pair)
        return change._replace(options=flat, **changed)

    def of_stage(which: str, path: str, new: Stage, value: Any) -> Change:
        return variant(f"--stages.{which}.{path}", value, stages={**change.stages, which: new})

    def remat(kind: Any) -> Iterator[Change]:
        if isinstance(root[1], Pretrain):
            new: Stage = replace(root[1], model=replace(root[1].model, remat=kind))
            yield of_stage(root[0], "model.remat", new, kind)
        elif isinstance(root[1], Checkpoint):
            yield of_stage(root[0], "remat", replace(root[1], remat=kind), kind)

    def microbatches(parts: int) -> Iterator[Change]:
        new = replace(stage, algorithm=replace(stage.algorithm, microbatches=parts))
        yield of_stage(name, "algorithm.microbatches", new, parts)

    def offload(what: str) -> Iterator[Change]:
        if not getattr(stage.loop, what):
            new = replace(stage, loop=replace(stage.loop, **{what: True}))
            yield of_stage(name, f"loop.{what}", new, "True")

    parts = stage.algorithm.microbatches
    kinds = ("full", "attention", "mlp", "attention_mlp") if not config.moe.experts else ("full", "attention")
    order = list(kinds)
    at = order.index(kept) if (kept := kept_of_layers(config)) in order else len(order)
    if tried.fits:
        for kind in order[at + 1 :][:2]:
            yield from remat(kind)
        if parts > 1:
            yield from microbatches(parts // 2)
        yield from meshes(change, len(devices), variant)
    else:
        yield from microbatches(parts * 2)
        for kind in reversed(order[:at]):
            yield from remat(kind)
        yield from meshes(change, len(devices), variant)
        yield from offload("offload_reference")
        yield from offload("offload_optimizer")


def meshes(change: Change, devices: int, variant: Callable[..., Change]) -> Iterator[Change]:
    """Meshes in which one axis is two or four times as long at the cost of another. (Not all suit a torus.)"""
    sizes = dict(zip(MESH_AXES, mesh_sizes(change.mesh, devices), strict=True))
    for grown, shrunk, factor in product(("fsdp", "tensor", "data"), ("data", "fsdp", "tensor"), (2, 4)):
        if shrunk == grown or sizes[shrunk] % factor:
            continue
        new = {**sizes, grown: factor * sizes[grown], shrunk: sizes[shrunk] // factor}
        first = variant(f"--mesh.{grown}", new[grown], mesh=replace(change.mesh, **new))
        given = dict(zip(first.options[::2], first.options[1::2], strict=True))
        given |= {f"--mesh.{axis}": str(n) for axis, n in new.items() if n > 1 or sizes[axis] > 1}
        yield first._replace(options=tuple(x for pair in sorted(given.items()) for x in pair))


def root_of(name: str, stages: Mapping[str, Stage]) -> tuple[tuple[str, Stage], ModelConfig]:
    """The stage that a model comes from, with the model's config."""
    stage = stages[name]
    config = stage.model_config(stages)  # type: ignore[attr-defined]
    while isinstance(stage, FineTuningStage):
        name, stage = stage.start, stages[stage.start]
    return (name, stage), config


# --- a whole experiment ------------------------------------------------------------------------------------


class ExperimentPlan(NamedTuple):
    sizes: str  # of the mesh
    programs: list[Planned]
    searches: dict[str, list[Tried]]  # by stage


def plan_experiment(
    stages: Mapping[str, Stage],
    config: MeshConfig,
    names: Sequence[str],
    devices: Sequence[jax.Device],
    lengths: Lengths,
    compiler: Compiler,
    tries: int,
    told: Callable[[str], None] = lambda _: None,
) -> ExperimentPlan:
    """tries: of a search for each stage."""
    asked: dict[str, list[str]] = {}  # stage -> programs, all for none
    for name in names or stages:
        stage, _, program = name.partition(":")
        if stage not in stages:
            raise UserError(f"{stage}: the experiment has no such stage.{did_you_mean(stage, stages)}")
        asked.setdefault(stage, []).extend([program] if program else [])
    mesh = make_mesh(config, list(devices))
    sizes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
    programs: list[Planned] = []
    searches = {}
    for name, only in asked.items():
        own = planned_stage(name, stages, mesh, lengths, compiler, only=only, told=told)
        programs += own
        if own and tries:
            searches[name] = search(name, stages, config, devices, lengths, compiler, tries, told)
    if not programs:
        raise UserError("no such program: none of these stages trains a model in a way that can be planned")
    return ExperimentPlan(sizes, programs, searches)


def with_cards(stages: Mapping[str, Stage], cards: Mapping[str, str]) -> dict[str, Stage]:
    """The stages, of which those that start from a checkpoint of the hub read its config from a folder."""
    made = dict(stages)
    for name, stage in stages.items():
        if isinstance(stage, Checkpoint) and stage.path in cards:
            made[name] = replace(stage, path=cards[stage.path])
    named = {stage.path for stage in stages.values() if isinstance(stage, Checkpoint)}
    for name in cards:
        if name not in named:
            raise UserError(f"--card {name}: no stage starts from it.{did_you_mean(name, named)}")
    return made
