"""An optimiser whose state lies in the host's memory between steps: the same numbers, also after a resumption."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import AXES, MESHES, MODEL, lm_params

from jrlhf.algorithms.sft import SFTConfig, make_sft
from jrlhf.checkpoint import Checkpointer
from jrlhf.config import UserError
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.sharding import make_mesh, on_host, put_batch
from jrlhf.training.loop import LoopConfig, guarded, sharded_state
from jrlhf.types import SequenceBatch

SFT = make_sft(SFTConfig(), MODEL, build_optimizer(OptimConfig(lr=0.1, weight_decay=0.1), 10))


def batch(mesh, n: int) -> SequenceBatch:
    tokens = np.random.default_rng(n).integers(1, 32, (8, 12)).astype(np.int32)
    positions = np.tile(np.arange(12, dtype=np.int32), (8, 1))
    return put_batch(mesh, SequenceBatch(tokens, np.ones_like(tokens), positions, positions > 0))


def kinds(state) -> set[str]:
    """The memories of the optimiser's state."""
    return {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state)}


@pytest.fixture(scope="module")
def runs():
    """Of each place: mesh, template, step, and the states after 0, 1, 2 and 3 steps, on the host."""
    found = {}
    for offload in (False, True):
        mesh, loop = (
            make_mesh(MESHES["all"]),
            LoopConfig(steps=3, offload_optimizer=offload, on_nonfinite="skip"),
        )
        with jax.set_mesh(mesh):
            start = (lm_params(), jax.random.key(0))
            template, make, _ = sharded_state(mesh, AXES, SFT.init, *start, offload_optimizer=offload)
            step = jax.jit(guarded(SFT.train_step, loop), donate_argnums=0)
            state, states = make(), []
            for n in range(4):
                assert kinds(state) == {"pinned_host" if offload else "device"}
                states.append(jax.device_get((state.params, state.opt_state)))
                state, _ = step(state, None, batch(mesh, n))
        found[offload] = mesh, template, step, states
    return found


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_step_is_the_same(runs):
    plain, offloaded = runs[False][3], runs[True][3]
    same(plain, offloaded)
    assert not np.array_equal(
        plain[1][0]["policy"]["embed"]["embedding"], plain[0][0]["policy"]["embed"]["embedding"]
    )


def test_it_is_saved_and_restored_to_the_host(runs, tmp_path):
    mesh, template, step, states = runs[True]
    with jax.set_mesh(mesh):
        state = sharded_state(mesh, AXES, SFT.init, lm_params(), jax.random.key(0), offload_optimizer=True)[
            1
        ]()
        for n in (0, 1):
            state, _ = step(state, None, batch(mesh, n))
        checkpointer = Checkpointer(tmp_path, 1, "", "max", print)
        checkpointer.save(2, state, {"step": 2}, {})
        checkpointer.close()
        again = Checkpointer(tmp_path, 1, "", "max", print)
        at, state, _ = again.restore(template)
        again.close()
        assert (at, kinds(state)) == (2, {"pinned_host"})
        same(jax.device_get((state.params, state.opt_state)), states[2])
        state, _ = step(state, None, batch(mesh, 2))
        same(jax.device_get((state.params, state.opt_state)), states[3])


def test_a_step_that_is_skipped_keeps_it(runs):
    mesh, _, step, states = runs[True]
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), lm_params())
        state = sharded_state(mesh, AXES, SFT.init, params, jax.random.key(0), offload_optimizer=True)[1]()
        state, metrics = step(state, None, batch(mesh, 0))
    assert float(metrics["train/skipped"]) == 1.0
    assert kinds(state) == {"pinned_host"}
    same(jax.device_get(state.opt_state), states[0][1])


def test_devices_without_such_a_memory_are_named():
    device = SimpleNamespace(
        device_kind="toaster", addressable_memories=lambda: [SimpleNamespace(kind="device")]
    )
    with pytest.raises(
        UserError, match=r"loop\.offload_optimizer: a toaster has no pinned_host memory, only device"
    ):
        on_host(SimpleNamespace(local_devices=[device]), None, "loop.offload_optimizer")
