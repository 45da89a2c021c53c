"""Mesh, logical axis rules, and the way from host rows to global arrays.

Weights and activations carry *logical* axis names ("embed", "heads", ...); the one table `RULES` says which
mesh axis each is split over. The resolver is strict: an unknown name or an axis that does not divide is an
error that names the array, never a silent replication.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jrlhf.config import MeshConfig, UserError, did_you_mean

MESH_AXES = ("data", "fsdp", "expert", "sequence", "tensor")  # the last ones communicate most

# logical axis -> mesh axes that it is split over
RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("sequence",),  # of activations
    "stretches": ("sequence", "data", "fsdp", "expert"),  # parts of rows: `in_stretches`
    "layers": (),
    "context": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "act_embed": (),
    "norm": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "attention_heads": ("tensor", "sequence"),  # where each head sees whole lengths
    "head_dim": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "expert_mlp": ("tensor",),
    "router": (),
    "rank": (),
    "scalar": (),
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices with the axes of MESH_AXES; one device is a 1 x 1 x 1 x 1 x 1 mesh.

    Of several slices only one axis crosses from one to another: `data`, or `fsdp` where there is no `data`. Raises
    UserError when the axes do not multiply to the number of devices.
    """
    devices = list(devices) if devices is not None else jax.devices()
    sizes, slices = mesh_sizes(config, len(devices)), _slices(config, devices)
    # Auto: the partitioner completes the constraints that the model gives at layer boundaries.
    types = (AxisType.Auto,) * len(MESH_AXES)
    if len(slices) == 1:
        return Mesh(_arranged(sizes, devices), MESH_AXES, axis_types=types)
    axis = MESH_AXES.index(_crossing(sizes, len(slices)))
    within = [n // len(slices) if i == axis else n for i, n in enumerate(sizes)]
    parts = [_arranged(within, part) for part in slices]
    return Mesh(np.concatenate(parts, axis=axis), MESH_AXES, axis_types=types)


def _arranged(sizes: Sequence[int], devices: list[jax.Device]) -> np.ndarray:
    """Devices in an array of this shape, neighbours in it near one another. UserError where their torus has no such."""
    try:
        return jax.make_mesh(
            tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices
        ).devices
    except NotImplementedError as error:
        raise UserError(
            f"mesh: {shown(sizes)} does not fit the torus of these {devices[0].device_kind} chips. Each axis must be a "
            f"product of whole physical axes ({str(error).split('.')[0]}); take other sizes"
        ) from error


def reshaped(mesh: Mesh, config: MeshConfig) -> Mesh:
    """Another mesh of the same devices in the same order: one program may read arrays of one and leave them on the
    other."""
    sizes = mesh_sizes(config, mesh.size)
    if (slices := len(_slices(config, list(mesh.devices.flat)))) > 1:
        _crossing(sizes, slices)  # the order of the devices has one slice behind the other
    return Mesh(mesh.devices.reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """The axes' sizes of so many devices; UserError where they do not multiply to that."""
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise UserError(f"mesh: sizes must be positive and at most one may be -1, got {shown(sizes)}")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        needs = f"a multiple of {known}" if -1 in sizes else str(known)
        said = shown([getattr(config, axis) for axis in MESH_AXES])
        raise UserError(
            f"mesh: {said} needs {needs} devices, but there are {devices}. Change the mesh, or "
            f"try it on virtual CPU devices: --devices {known}"
        )
    if config.slices > 1:
        _crossing(sizes, config.slices)
    return tuple(sizes)


def shown(sizes: Sequence[int], axes: tuple[str, ...] = MESH_AXES) -> str:
    """data 2 x fsdp 4 x tensor 1; axes that are seldom used only where they are."""
    seldom = ("expert", "sequence")
    return " x ".join(f"{a} {n}" for a, n in zip(axes, sizes, strict=True) if n != 1 or a not in seldom)


def slice_of(device: jax.Device) -> int:
    """The number of a device's slice: of chips with a fast network between them."""
    return getattr(device, "slice_index", 0) or 0


def _slices(config: MeshConfig, devices: list[jax.Device]) -> list[list[jax.Device]]:
    """The devices of each slice: as they say, or, where they know of one only, equal parts in their order."""
    own: dict[int, list[jax.Device]] = {}
    for device in devices:
        own.setdefault(slice_of(device), []).append(device)
    if config.slices < 0:
        raise UserError(f"mesh.slices must be zero or more, got {config.slices}")
    if len(own) > 1 and config.slices not in (0, len(own)):
        raise UserError(f"mesh.slices {config.slices}: the devices are of {len(own)} slices; leave it 0")
    parts = [own[i] for i in sorted(own)]
    if len(own) == 1 and config.slices > 1:
        size = len(devices) // config.slices
        parts = [devices[i : i + size] for i in range(0, len(devices), size)]
    if len({len(part) for part in parts}) > 1:
        raise UserError(
            f"mesh: slices of {', '.join(str(len(part)) for part in parts)} devices; they must be equal"
        )
    return parts


def _crossing(sizes: Sequence[int], slices: int) -> str:
    """The axis that goes from slice to slice: where the network is slow, the axis that communicates least."""
    of = dict(zip(MESH_AXES, sizes, strict=True))
    axis = "data" if of["data"] > 1 else "fsdp"
    if of[axis] % slices:
        raise UserError(
            f"mesh: {axis} {of[axis]} is not divisible by {slices}, the number of slices. Only data, or fsdp where "
            f"data is 1, goes from slice to slice: make it a multiple of {slices}"
        )
    return axis


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
    # Lengths that do not divide (a last token, a decode step) stay whole; models make theirs even (`even_lengths`).
    whole = [
        axis == "length" and n % mesh.shape["sequence"] > 0 for axis, n in zip(axes, x.shape, strict=True)
    ]
    spec = P(*[None if short else split for short, split in zip(whole, spec, strict=True)])
    return jax.lax.with_sharding_constraint(x, _free(mesh, spec))


def by_hand_ways(axis: str) -> int:
    """Over how many devices a `shard_map` around splits by hand what has this mesh axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def sequence_ways() -> int:
    """Over how many devices lengths are split here, by the partitioner."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or "sequence" in mesh.manual_axes:
        return 1
    return mesh.shape["sequence"]


def even_lengths(tree: Any) -> Any:
    """Arrays [B, T, ...], split over the sequence axis, with zeros behind the last position where T does not divide."""
    if (ways := sequence_ways()) == 1:
        return tree

    def even(x):
        x = jnp.pad(x, [(0, -x.shape[1] % ways) if i == 1 else (0, 0) for i in range(x.ndim)])
        return constrain(x, "batch", "length", *(None,) * (x.ndim - 2))

    return jax.tree.map(even, tree)


def whole_lengths(tree: Any) -> Any:
    """Arrays [B, T, ...] with lengths that are not split any more: what is of one number a token."""
    if sequence_ways() == 1:
        return tree
    return jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), tree)


def in_stretches(tree: Any) -> Any:
    """[B, T, ...] -> [W B, T / W, ...] for the W devices of the sequence axis, zeros behind the last position.

    Each device's part of its rows becomes rows of its own: what goes along the length in steps then has all devices at
    work in each.
    """
    ways = sequence_ways()
    if ways == 1:
        return tree

    def cut(x):
        rows, _, *rest = x.shape
        x = x.reshape(rows, ways, -1, *rest).swapaxes(0, 1).reshape(ways * rows, -1, *rest)
        return constrain(x, "stretches", *(None,) * (x.ndim - 1))

    return jax.tree.map(cut, even_lengths(tree))


def out_of_stretches(tree: Any, length: int) -> Any:
    """The inverse of `in_stretches`; lengths are whole."""
    ways = sequence_ways()
    if ways == 1:
        return tree

    def join(x):
        rows, _, *rest = x.shape
        x = x.reshape(ways, rows // ways, -1, *rest).swapaxes(0, 1).reshape(rows // ways, -1, *rest)
        return x[:, :length]

    return whole_lengths(jax.tree.map(join, tree))


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


def on_own_rows(f: Callable, shared: Any, *rows: jax.Array) -> Any:
    """`f(shared, *rows)` on each device's own rows [B, ...], of which its results are rows too; the axes that split no
    rows are left to the partitioner.

    For sums over rows that a loop takes step by step, such as a gradient of what is shared: the devices add theirs up
    once, behind the loop, where the partitioner would do it in every step.
    """
    mesh = jax.sharding.get_abstract_mesh()
    by_hand = tuple(a for a in RULES["stretches"] if a in mesh.axis_names and a not in mesh.manual_axes)
    ways = math.prod(mesh.shape[a] for a in by_hand)
    if ways == 1 or any(len(x) % ways for x in rows):
        return f(shared, *rows)
    split = P(by_hand)
    return jax.shard_map(
        f, in_specs=(P(), *(split for _ in rows)), out_specs=split, axis_names=set(by_hand), check_vma=False
    )(shared, *rows)


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


def sampling_axes(mesh: Mesh | AbstractMesh, rows: int) -> tuple[str, ...]:
    """The axes over which so many rows are split while they are sampled. There is no length to split: where they
    divide, rows are split over the sequence axis too. Devices of the expert axis have other experts, and the same rows.
    """
    axes = ("data", "fsdp", "sequence")
    return axes if rows % math.prod(mesh.shape[a] for a in axes) == 0 else axes[:2]


def sampling_ways(mesh: Mesh | AbstractMesh, rows: int) -> int:
    """Over how many (groups of) devices so many rows are split while they are sampled."""
    return math.prod(mesh.shape[a] for a in sampling_axes(mesh, rows))


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
            f"{field}: {size} rows do not divide over the mesh's {ways} batch shards ({batch_shards(mesh)}). Use a "
            f"positive multiple of {ways}."
        )


def batch_shards(mesh: Mesh) -> str:
    """The axes that split a batch, with their sizes: data 2 x fsdp 4."""
    return shown([mesh.shape[a] for a in RULES["batch"]], RULES["batch"])
