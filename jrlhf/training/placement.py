"""Where the parameters of an experiment's models would lie on a mesh, and how much of each device they take. Nothing is
allocated, and the devices need not be there."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType
from rich.table import Table

from jrlhf.config import MeshConfig, Stage, UserError, bytes_text
from jrlhf.models.config import ModelConfig
from jrlhf.models.transformer import Model
from jrlhf.optim import build_optimizer
from jrlhf.sharding import MESH_AXES, checked_sharding, mesh_sizes, path_names, shown, state_shardings
from jrlhf.training.stages.common import ModelStage, TrainingStage


class Placed(NamedTuple):
    """One array of a model."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    split: str  # by which mesh axes each of its axes is split
    bytes: int
    bytes_each: int  # on a device


def abstract_mesh(config: MeshConfig, devices: int | None = None) -> AbstractMesh:
    """A mesh of devices that need not be there: so many, or (None) as many as its axes say, or (-1) those that there
    are. UserError where they are not its axes' product."""
    if devices is None:
        said = [getattr(config, axis) for axis in MESH_AXES]
        devices = jax.device_count() if -1 in said else math.prod(said)
    return AbstractMesh(mesh_sizes(config, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def placed(model: Model, mesh: AbstractMesh) -> list[Placed]:
    """Every parameter. UserError that names the first that the mesh does not divide."""
    axes = model.logical_axes()
    leaves = jax.tree_util.tree_flatten_with_path(jax.eval_shape(model.init, jax.random.key(0)))[0]
    found = []
    for path, leaf in leaves:
        names = path_names(path)
        sharding = checked_sharding(mesh, axes[names], leaf.shape, "/".join(names))
        own = zip(axes[names], leaf.shape, sharding.spec, strict=True)
        split = " x ".join(
            f"{axis or '-'} {size}" + (f" / {_axes(by)}" if by else "") for axis, size, by in own
        )
        size = leaf.dtype.itemsize
        each = math.prod(sharding.shard_shape(leaf.shape)) * size
        found.append(
            Placed("/".join(names), leaf.shape, str(leaf.dtype), split, math.prod(leaf.shape) * size, each)
        )
    return found


def _axes(by: Any) -> str:
    return "+".join(by) if isinstance(by, tuple) else by


def optimizer_bytes(model: Model, optim: Any, mesh: AbstractMesh) -> int:
    """What the optimiser's state takes on each device."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(build_optimizer(optim, 1).init, {"policy": params})
    shardings = state_shardings(mesh, state, model.logical_axes())  # type: ignore[arg-type]
    shards = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, state, shardings)
    return sum(jax.tree.leaves(shards))


def models_of(stages: Mapping[str, Stage]) -> Iterator[tuple[str, Stage, ModelConfig]]:
    """The training stages of an experiment, each with the config of its model."""
    for name, stage in stages.items():
        if isinstance(stage, ModelStage) and isinstance(stage, TrainingStage):
            yield name, stage, stage.model_config(stages)


def placement_tables(stages: Mapping[str, Stage], mesh: AbstractMesh) -> Iterator[tuple[str, Table]]:
    """A table of each different model's parameters, and one of what every stage that trains one keeps on a device, each
    with what it is."""
    found = list(models_of(stages))
    if not found:
        raise UserError("no stage of this experiment trains a model")
    sizes = shown(mesh.axis_sizes)
    by_config: dict[ModelConfig, list[str]] = {}
    for name, _, config in found:
        by_config.setdefault(config, []).append(name)
    params_of: dict[ModelConfig, int] = {}
    for config, names in by_config.items():
        table = Table()
        for column in ("parameter", "axes, and by what they are split", "dtype"):
            table.add_column(column)
        for column in ("bytes", "on each device"):
            table.add_column(column, justify="right")
        rows = placed(Model(config), mesh)
        for row in rows:
            table.add_row(row.name, row.split, row.dtype, bytes_text(row.bytes), bytes_text(row.bytes_each))
        params_of[config] = sum(row.bytes_each for row in rows)
        table.add_section()
        table.add_row(
            "all", "", "", bytes_text(sum(row.bytes for row in rows)), bytes_text(params_of[config])
        )
        yield f"the model of {', '.join(names)} on {sizes}", table
    kept = Table()
    kept.add_column("stage")
    for column in ("parameters", "gradient", "optimiser", "together"):
        kept.add_column(column, justify="right")
    for name, stage, config in found:
        params = params_of[config]
        state = optimizer_bytes(Model(config), stage.optim, mesh)  # type: ignore[attr-defined]
        kept.add_row(name, *map(bytes_text, (params, params, state, 2 * params + state)))
    what = "of the model that it trains, all parameters; a reference, a critic and activations come to it"
    yield f"on each device while a stage trains, on {sizes} ({what})", kept
