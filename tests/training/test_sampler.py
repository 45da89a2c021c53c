"""What the sampler makes of a mesh: which rows it takes, and how many at a time."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import MESHES, MODEL, lm_params
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from jrlhf.config import MeshConfig, UserError
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import MESH_AXES, make_mesh
from jrlhf.training import evaluation
from jrlhf.training.evaluation import Sampler

TOKENS = SimpleNamespace(eos_ids=(1,), pad_id=0)
PROMPT = [[3, 4, 5]]


def sampler(mesh, **config) -> Sampler:
    return Sampler(MODEL, TOKENS, mesh, SamplingConfig(max_new_tokens=2, **config), 4)  # type: ignore[arg-type]


def test_rows_that_do_not_divide_over_the_mesh():
    mesh = make_mesh(MESHES["all"])
    message = (
        r"answers to draw \(3 prompts x 2\): 6 rows do not divide over the mesh's 4 batch shards \(data 2 x fsdp 2\)\. "
        "Use a positive multiple of 4"
    )
    with jax.set_mesh(mesh):
        with pytest.raises(UserError, match=message):
            sampler(mesh).draw(lm_params(), PROMPT * 3, jax.random.key(0), group=2)
        filled = sampler(mesh).sample(lm_params(), PROMPT * 3, jax.random.key(0), group=2)
        drawn = jax.device_get(sampler(mesh).draw(lm_params(), PROMPT * 4, jax.random.key(0), group=2))
    assert filled.tokens.shape == (6, 6)
    np.testing.assert_array_equal(filled.tokens, drawn.tokens[:6])


@pytest.mark.parametrize(("platform", "slots"), [("cpu", 16), ("gpu", 256), ("tpu", 256)])
def test_the_slots_are_those_of_the_platform_which_is_compiled_for(monkeypatch, platform, slots):
    given = []
    monkeypatch.setattr(evaluation, "rollout", lambda *args, **_: given.append(args[6]))
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    there = AbstractMesh((2, 1, 1, 1, 1), MESH_AXES, (AxisType.Auto,) * 5, abstract_device=device)
    few, many = sampler(mesh, slots=7), sampler(mesh)
    with use_abstract_mesh(there):
        for one in (few, many):
            one.draw({}, PROMPT * 600, jax.random.key(0))
    assert given == [6, 2 * slots]
