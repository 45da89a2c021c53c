"""The mesh, the strict resolver of logical axes, and host rows on their way to devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import AXES, MESHES, MODEL, SCALAR
from jax.sharding import PartitionSpec as P

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
    state_shardings,
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MESHES["all"])


def test_make_mesh_fills_in_the_open_axis():
    assert dict(make_mesh(MeshConfig(-1, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(MeshConfig(2, -1, 1)).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(3, 1, 1), "8"),
        (MeshConfig(-1, 3, 1), "multiple of 3"),
        (MeshConfig(-1, -1, 1), "at most one"),
        (MeshConfig(0, 1, 1), "positive"),
    ],
)
def test_make_mesh_says_what_does_not_fit(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config)


def test_logical_names_become_mesh_axes():
    assert logical_spec(("batch", "length", "act_embed")) == P(("data", "fsdp"), None, None)
    assert logical_spec(("layers", "embed", "heads", None)) == P(None, "fsdp", "tensor", None)


def test_a_misspelt_axis_is_an_error_with_a_suggestion(mesh):
    with pytest.raises(UserError, match=r"'hedas'.*Did you mean 'heads'"):
        logical_spec(("embed", "hedas"))
    with pytest.raises(UserError, match="Did you mean 'length'"):  # with and without a mesh
        constrain(jnp.zeros((2, 2)), "batch", "lenght")


def test_an_axis_that_does_not_divide_is_named(mesh):
    with pytest.raises(UserError, match=r"layers/attn/q: axis 'heads' of size 3 .* by 2 .*tensor"):
        checked_sharding(mesh, ("embed", "heads", "head_dim"), (4, 3, 2), "layers/attn/q")
    with pytest.raises(UserError, match=r"x: axis 'batch' of size 6 .* by 4 .*data, fsdp"):
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


def test_constrain_splits_under_a_mesh_and_is_nothing_without(mesh):
    x = jnp.zeros((8, 4, 6))
    assert constrain(x, "batch", "length", "mlp") is x
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: constrain(x, "batch", "length", "mlp"))(x)
        rows = jax.jit(constrain_rows)({"a": x, "b": jnp.zeros(8)})
    assert out.addressable_shards[0].data.shape == (2, 4, 3)
    assert rows["a"].addressable_shards[0].data.shape == (2, 4, 6)
    assert rows["b"].addressable_shards[0].data.shape == (2,)
