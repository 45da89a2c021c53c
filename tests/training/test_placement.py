"""Where parameters would lie on a mesh whose devices are not there, held against arrays on devices that are."""

from pathlib import Path

import jax
import pytest
from helpers import AXES, MODEL

from jrlhf import cli
from jrlhf.config import MeshConfig, UserError
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.sharding import make_mesh, state_shardings
from jrlhf.training.placement import abstract_mesh, optimizer_bytes, placed

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "larder" / "ppo_vs_dpo.py"


def on_first_device(tree) -> int:
    """Bytes that arrays take on one device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("config", [MeshConfig(8, 1, 1), MeshConfig(2, 2, 2), MeshConfig(1, 4, 2)], ids=str)
def test_bytes_are_those_of_arrays_on_devices(config):
    mesh, real = abstract_mesh(config), make_mesh(config)
    params = jax.jit(MODEL.init)(jax.random.key(0))
    params = jax.device_put(params, state_shardings(real, params, AXES))
    rows = placed(MODEL, mesh)
    assert sum(row.bytes_each for row in rows) == on_first_device(params)
    assert sum(row.bytes for row in rows) == sum(x.nbytes for x in jax.tree.leaves(params))
    optim = OptimConfig()
    state = jax.jit(build_optimizer(optim, 1).init)({"policy": params})
    state = jax.device_put(state, state_shardings(real, state, AXES))
    assert optimizer_bytes(MODEL, optim, mesh) == on_first_device(state)


def test_a_thousand_devices_need_not_be_there():
    mesh = abstract_mesh(MeshConfig(-1, 2, 2), 1024)
    assert dict(mesh.shape) == {"data": 256, "fsdp": 2, "expert": 1, "sequence": 1, "tensor": 2}
    embedding = next(row for row in placed(MODEL, mesh) if row.name == "embed/embedding")
    assert embedding.bytes_each * 4 == embedding.bytes
    assert "/ tensor x" in embedding.split
    assert embedding.split.endswith("/ fsdp")


def test_an_axis_that_does_not_divide_is_named_with_its_parameter():
    with pytest.raises(UserError, match="embed/embedding: axis 'vocab' of size"):
        placed(MODEL, abstract_mesh(MeshConfig(1, 1, 64)))
    with pytest.raises(UserError, match="needs a multiple of 6 devices, but there are 8"):
        abstract_mesh(MeshConfig(-1, 3, 2), 8)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["mesh", str(EXPERIMENT), "--chips", "64", "--mesh.fsdp", "4"]) == 0
    out = capsys.readouterr().out
    assert "the model of pretrain, sft, reward_model, ppo, dpo on data 16 x fsdp 4 x tensor 1" in out
    assert "embed 64 / fsdp" in out
    assert not list(tmp_path.iterdir())  # it leaves nothing
    assert cli.main(["mesh", str(EXPERIMENT), "--chips", "0"]) == 2
