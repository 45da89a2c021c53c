"""The mesh, the strict resolver of logical axes, and host rows on their way to devices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import AXES, MESHES, MODEL, SCALAR
from jax.sharding import PartitionSpec as P

from jrlhf import sharding
from jrlhf.config import MeshConfig, UserError
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.sharding import (
    batch_ways,
    check_batch,
    checked_sharding,
    constrain,
    constrain_rows,
    logical_spec,
    make_mesh,
    put_batch,
    reshaped,
    sampling_axes,
    state_shardings,
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MESHES["all"])


def test_make_mesh_fills_in_the_open_axis():
    assert make_mesh(MeshConfig(-1, 2, 2)).axis_sizes == (2, 2, 1, 1, 2)
    assert make_mesh(MeshConfig(2, -1, 1)).axis_sizes == (2, 4, 1, 1, 1)
    assert make_mesh(MeshConfig(1, 1, -1, expert=2, sequence=2)).axis_sizes == (1, 1, 2, 2, 2)
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(3, 1, 1), "8"),
        (MeshConfig(-1, 3, 1), "multiple of 3"),
        (MeshConfig(-1, -1, 1), "at most one"),
        (MeshConfig(0, 1, 1), "positive"),
        (MeshConfig(1, expert=3), "data 1 x fsdp 1 x expert 3 x tensor 1 needs 3 devices"),
        (MeshConfig(1, sequence=-2), "positive"),
        (MeshConfig(8, slices=-1), "mesh.slices must be zero or more"),
        (MeshConfig(8, slices=3), "data 8 is not divisible by 3, the number of slices"),
        (MeshConfig(1, 4, 2, slices=8), "fsdp 4 is not divisible by 8, the number of slices"),
        (
            MeshConfig(1, 1, 8, slices=2),
            "fsdp 1 is not divisible by 2, .* Only data, or fsdp where data is 1",
        ),
    ],
)
def test_make_mesh_says_what_does_not_fit(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config)


def test_logical_names_become_mesh_axes():
    assert logical_spec(("batch", "length", "act_embed")) == P(("data", "fsdp", "expert"), "sequence", None)
    assert logical_spec(("experts", "embed", "expert_mlp")) == P("expert", "fsdp", "tensor")
    assert logical_spec(("layers", "embed", "heads", None)) == P(None, "fsdp", "tensor", None)


def test_a_misspelt_axis_is_an_error_with_a_suggestion(mesh):
    with pytest.raises(UserError, match=r"'hedas'.*Did you mean 'heads'"):
        logical_spec(("embed", "hedas"))
    with pytest.raises(UserError, match="Did you mean 'length'"):  # with and without a mesh
        constrain(jnp.zeros((2, 2)), "batch", "lenght")


def test_an_axis_that_does_not_divide_is_named(mesh):
    with pytest.raises(UserError, match=r"layers/attn/q: axis 'heads' of size 3 .* by 2 .*tensor"):
        checked_sharding(mesh, ("embed", "heads", "head_dim"), (4, 3, 2), "layers/attn/q")
    with pytest.raises(UserError, match=r"x: axis 'batch' of size 6 .* by 4 .*data, fsdp, expert"):
        checked_sharding(mesh, ("batch",), (6,), "x")


def test_put_batch_keeps_the_order_of_rows(mesh):
    rows = np.arange(16 * 3, dtype=np.int32).reshape(16, 3)
    out = put_batch(mesh, {"a": rows, "b": rows[:, 0] > 20})
    np.testing.assert_array_equal(out["a"], rows)
    np.testing.assert_array_equal(out["b"], rows[:, 0] > 20)
    for shard in out["a"].addressable_shards:
        assert shard.data.shape == (4, 3)
        np.testing.assert_array_equal(shard.data, rows[shard.index])


def test_optimiser_moments_are_split_as_their_parameters(mesh):
    """For policy, critic and reference; small leaves are on every device."""
    optimizer = build_optimizer(OptimConfig(), 10)
    params = {"policy": MODEL, "critic": SCALAR}
    params = {name: jax.eval_shape(model.init, jax.random.key(0)) for name, model in params.items()}
    state = {
        "params": params,
        "opt_state": {name: jax.eval_shape(optimizer.init, p) for name, p in params.items()},
        "ref_params": params["policy"],
        "key": jax.random.key(0),
        "step": jnp.int32(0),
    }
    shardings = state_shardings(mesh, state, AXES)
    assert shardings["params"]["policy"]["layers"]["attn"]["q"].spec == P(None, "fsdp", "tensor", None)
    assert shardings["params"]["critic"]["score"]["kernel"].spec == P("fsdp", None)
    assert shardings["ref_params"] == shardings["params"]["policy"]
    assert shardings["key"].spec == shardings["step"].spec == P()
    for name, own in shardings["params"].items():
        (adam,) = [
            s
            for s in jax.tree.leaves(shardings["opt_state"][name], is_leaf=lambda x: hasattr(x, "mu"))
            if hasattr(s, "mu")
        ]
        assert adam.mu == adam.nu == own
        assert adam.count.spec == P()


def test_a_parameter_without_axes_is_an_error(mesh):
    with pytest.raises(UserError, match=r"policy/layers/attn/qq \(4, 4\) has no logical axes"):
        state_shardings(mesh, {"policy": {"layers": {"attn": {"qq": jnp.zeros((4, 4))}}}}, AXES)


def test_batches_that_do_not_divide_are_an_error(mesh):
    assert batch_ways(mesh) == 4
    check_batch(mesh, 8, "train.batch")
    for size in (6, 0):
        with pytest.raises(UserError, match=rf"train.batch: {size} rows .*multiple of 4"):
            check_batch(mesh, size, "train.batch")


def test_rows_of_a_batch_are_split_over_the_expert_axis_too():
    mesh = make_mesh(MeshConfig(2, expert=2, sequence=2))
    assert batch_ways(mesh) == 4
    with pytest.raises(UserError, match=r"rows: 6 rows .* 4 batch shards \(data 2 x fsdp 1 x expert 2\)"):
        check_batch(mesh, 6, "rows")
    # Sampling has no length to split, and a group of experts samples the same rows.
    assert [sampling_axes(mesh, n) for n in (8, 6)] == [("data", "fsdp", "sequence"), ("data", "fsdp")]


@pytest.mark.parametrize(
    ("config", "axis"),
    [
        (MeshConfig(4, 1, 2), 0),
        (MeshConfig(2, 4), 0),
        (MeshConfig(1, 4, sequence=2), 1),
        (MeshConfig(1, 8), 1),
    ],
    ids=str,
)
def test_one_axis_alone_goes_from_slice_to_slice(config, axis, monkeypatch):
    """As the devices say, whose order is another one; and of equal parts, where they say nothing."""
    of_parts = np.vectorize(lambda device: device.id // 4)(make_mesh(replace(config, slices=2)).devices)
    monkeypatch.setattr(sharding, "slice_of", lambda device: device.id % 2)
    of_devices = np.vectorize(sharding.slice_of)(make_mesh(config).devices)
    for slices in (of_parts, of_devices):
        first, second = np.split(slices, 2, axis=axis)
        assert (set(first.flat), set(second.flat)) == ({0}, {1})
    with pytest.raises(UserError, match=r"mesh\.slices 4: the devices are of 2 slices"):
        make_mesh(MeshConfig(8, slices=4))
    with pytest.raises(UserError, match="slices of 3, 4 devices; they must be equal"):
        make_mesh(MeshConfig(7), jax.devices()[1:])


def test_another_mesh_of_the_same_devices_keeps_their_order(monkeypatch):
    monkeypatch.setattr(sharding, "slice_of", lambda device: device.id % 2)
    mesh = make_mesh(MeshConfig(1, 8))
    other = reshaped(mesh, MeshConfig(2, 1, -1))
    assert other.axis_sizes == (2, 1, 1, 1, 4)
    assert list(other.devices.flat) == list(mesh.devices.flat)
    with pytest.raises(UserError, match="fsdp 1 is not divisible by 2, the number of slices"):
        reshaped(mesh, MeshConfig(1, 1, 8))


def test_constrain_splits_under_a_mesh_and_is_nothing_without(mesh):
    x = jnp.zeros((8, 4, 6))
    assert constrain(x, "batch", "length", "mlp") is x
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: constrain(x, "batch", "length", "mlp"))(x)
        rows = jax.jit(constrain_rows)({"a": x, "b": jnp.zeros(8)})
    assert out.addressable_shards[0].data.shape == (2, 4, 3)
    assert rows["a"].addressable_shards[0].data.shape == (2, 4, 6)
    assert rows["b"].addressable_shards[0].data.shape == (2,)
