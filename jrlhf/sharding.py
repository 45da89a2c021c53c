"""Mesh, logical axis rules, and the way from host rows to global arrays.

Weights and activations carry *logical* axis names ("embed", "heads", ...); the one table `RULES` says which
mesh axis each is split over. The resolver is strict: an unknown name or an axis that does not divide is an
error that names the array, never a silent replication.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jrlhf.config import MeshConfig, UserError, did_you_mean

MESH_AXES = ("data", "fsdp", "tensor")

# logical axis -> mesh axes that it is split over
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": (),
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "act_embed": (),
    "norm": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("tensor",),
    "expert_mlp": (),
    "router": (),
    "rank": (),
    "scalar": (),
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over all devices; one device is a 1x1x1 mesh.

    Raises UserError when the axes do not multiply to the number of devices.
    """
    devices = list(devices) if devices is not None else jax.devices()
    # Auto: the partitioner completes the constraints that the model gives at layer boundaries.
    types = (AxisType.Auto,) * 3
    return jax.make_mesh(mesh_sizes(config, len(devices)), MESH_AXES, axis_types=types, devices=devices)


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """(data, fsdp, tensor) of so many devices; UserError where they do not multiply to that."""
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"mesh: sizes must be positive and at most one may be -1, got {_shown(config)}")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        needs = f"a multiple of {known}" if -1 in sizes else str(known)
        raise UserError(
            f"mesh: {_shown(config)} needs {needs} devices, but there are {devices}. Change the mesh, or "
            f"try it on virtual CPU devices: --devices {known}"
        )
    return tuple(sizes)


def _shown(config: MeshConfig) -> str:
    return f"data {config.data} x fsdp {config.fsdp} x tensor {config.tensor}"


def logical_spec(axes: tuple[str | None, ...]) -> P:
    """Logical axis names to a PartitionSpec. Raises UserError on a name that has no rule."""
    for a in axes:
        if a is not None and a not in RULES:
            raise UserError(f"unknown logical axis {a!r}.{did_you_mean(a, RULES)}")
    split = [RULES[a] if a is not None else () for a in axes]
    return P(*[s[0] if len(s) == 1 else (s or None) for s in split])


def checked_sharding(
    mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str
):
    """NamedSharding of an array; UserError naming array and axis where the mesh does not divide it."""
    spec = logical_spec(axes)
    for axis, size, split in zip(axes, shape, spec, strict=True):
        parts = split if isinstance(split, tuple) else (split,) if split else ()
        ways = math.prod(mesh.shape[p] for p in parts)
        if size % ways:
            raise UserError(
                f"{name}: axis {axis!r} of size {size} is not divisible by {ways} (mesh axes {', '.join(parts)}). "
                f"Change the mesh or the model's size."
            )
    return NamedSharding(mesh, spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Sharding constraint on an activation under the mesh of `jax.set_mesh`; nothing without a mesh.

    Inside a `shard_map` the axes that it splits by hand are left out.
    """
    spec = logical_spec(axes)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _free(mesh, spec))


def _free(mesh: Any, spec: P) -> P:
    """The spec without the axes that a `shard_map` around splits by hand."""
    if not mesh.manual_axes:
        return spec
    free = lambda split: tuple(a for a in split if a not in mesh.manual_axes) or None  # noqa: E731
    return P(*[s and free(s if isinstance(s, tuple) else (s,)) for s in spec])


def map_shards(
    f: Callable, in_axes: tuple[tuple[str | None, ...], ...], out_axes: tuple[str | None, ...], *args: Any
) -> Any:
    """`f(*args)` on each device's own part of the arguments, split as their logical axes say; without a mesh, `f` once.

    For what the partitioner cannot split: a kernel. Rows that do not divide (one prompt) are on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    by_hand = set(mesh.axis_names) - set(mesh.manual_axes)
    if mesh.empty or mesh.size == 1 or not by_hand:
        return f(*args)
    *inside, outside = (_free(mesh, logical_spec(axes)) for axes in (*in_axes, out_axes))
    ways = math.prod(mesh.shape[a] for a in RULES["batch"] if a in by_hand)
    if any(axes[0] == "batch" and len(x) % ways for axes, x in zip(in_axes, args, strict=True)):
        whole = lambda axes, spec: P(None, *spec[1:]) if axes[0] == "batch" else spec  # noqa: E731
        inside = [whole(axes, spec) for axes, spec in zip(in_axes, inside, strict=True)]
        outside = whole(out_axes, outside)
    return jax.shard_map(f, in_specs=tuple(inside), out_specs=outside, axis_names=by_hand, check_vma=False)(
        *args
    )


def constrain_rows(tree: Any) -> Any:
    """Every array split over the batch axis by its leading dimension (a gather of rows loses it)."""
    return jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), tree)


def path_names(path: tuple) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def state_shardings(
    mesh: Mesh | AbstractMesh, state: Any, axes: Mapping[tuple[str, ...], tuple[str | None, ...]]
) -> Any:
    """Shardings for any tree that contains model parameters: params, reference, optimiser moments.

    `axes` maps a parameter's path inside the model (`("layers", "attn", "q")`) to its logical axes. A leaf
    takes the axes of the longest suffix of its own path found there (Adam's moments mirror the parameters'
    paths). Leaves of at most one dimension without a rule (counts, keys) are replicated; any other is an error.
    """

    def one(path, leaf):
        names = path_names(path)
        for i in range(len(names)):
            rule = axes.get(names[i:])
            if rule is not None and len(rule) == len(leaf.shape):
                return checked_sharding(mesh, rule, leaf.shape, "/".join(names))
        if len(leaf.shape) > 1:
            raise UserError(f"parameter {'/'.join(names)} {leaf.shape} has no logical axes")
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(one, state)


DEVICE = "device"  # the devices' own memory
HOST = "pinned_host"  # the host's memory that devices reach


def on_host(mesh: Mesh, shardings: Any, field: str) -> Any:
    """The shardings in the host's memory. UserError naming the field where the devices reach none."""
    for device in mesh.local_devices:
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST not in kinds:
            raise UserError(f"{field}: a {device.device_kind} has no {HOST} memory, only {', '.join(kinds)}")
    return jax.tree.map(lambda s: s.with_memory_kind(HOST), shardings)


def moved(tree: Any, space: Any) -> Any:
    """Arrays moved, within a jitted function, to the devices' memory or the host's (a `jax.memory.Space`)."""
    return jax.tree.map(lambda x: jax.device_put(x, space), tree)


def placed(tree: Any, kind: str) -> Any:
    """Arrays in this kind of memory (DEVICE, HOST), split as they were; those that lie there are not copied."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), tree)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(RULES["batch"]))


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Over how many devices the batch axis is split."""
    return math.prod(mesh.shape[a] for a in RULES["batch"])


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Rows (all of them, on every host) to global arrays split over the batch axis; each host copies its own."""
    sharding = batch_sharding(mesh)

    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, batch)


def take_batch(mesh: Mesh, arrays: Any, rows: np.ndarray) -> Any:
    """`put_batch` of the numbered rows of in-memory arrays: each host reads only those of its own devices."""
    sharding = batch_sharding(mesh)

    def put(x):
        shape = (len(rows), *x.shape[1:])
        return jax.make_array_from_callback(shape, sharding, lambda index: x[rows[index[0]]])

    return jax.tree.map(put, arrays)


def fetch(tree: Any) -> Any:
    """Global arrays as numpy, whole on every host (a collective when there are several: all must call it)."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    # A host's own arrays are whole already: gathering them would join every host's copy.
    gather = lambda x: multihost_utils.process_allgather(x, tiled=True)  # noqa: E731
    return jax.tree.map(lambda x: gather(x) if isinstance(x, jax.Array) else x, tree)


def leads() -> bool:
    """Whether this process is the one that writes files."""
    return jax.process_index() == 0


def check_batch(mesh: Mesh, size: int, field: str) -> None:
    """UserError at config time when a batch does not split evenly over the mesh."""
    ways = batch_ways(mesh)
    if size <= 0 or size % ways:
        raise UserError(
            f"{field}: {size} rows do not divide over the mesh's {ways} batch shards (data {mesh.shape['data']} x "
            f"fsdp {mesh.shape['fsdp']}). Use a positive multiple of {ways}."
        )
