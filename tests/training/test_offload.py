"""What lies in the host's memory between its uses, the optimiser's state or the reference: the same numbers, and
nothing of it on the devices."""

import gc
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from helpers import AXES, MESHES, MODEL, lm_params
from tiny_runs import evaluated, lasting, trained

from jrlhf import sharding
from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.grpo import GRPOConfig, make_grpo
from jrlhf.algorithms.kto import KTOConfig
from jrlhf.algorithms.raft import RAFTConfig
from jrlhf.algorithms.sft import SFTConfig, make_sft
from jrlhf.algorithms.simpo import SimPOConfig
from jrlhf.checkpoint import Checkpointer, load_params
from jrlhf.config import MeshConfig, UserError
from jrlhf.lab import LarderPrompts
from jrlhf.models.config import LoRAConfig
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.sharding import HOST, make_mesh, on_host, placed, put_batch, replicated
from jrlhf.training.loop import LoopConfig, fetched, guarded, sharded_state
from jrlhf.training.rewards import REWARDS
from jrlhf.training.stages import Distill, OnPolicy, UnpairedAlignment
from jrlhf.training.stages.preferences import with_references
from jrlhf.types import Plan, Rollout, SequenceBatch, TrainState

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


# --- the reference ------------------------------------------------------------------------------------------

STAGES = tiny.experiment.stages
ROLLS = OnPolicy(
    start="sft",
    reward="watching",
    prompts=LarderPrompts(size=64),
    algorithm=RAFTConfig(group_size=2, samples="reference"),
    sampling=tiny.answers,
    optim=tiny.adam,
    loop=tiny.loop(3),
)
LEARNERS = {
    "ppo": replace(STAGES["ppo"], reward="watching", critic="policy", gold="", loop=tiny.loop(3, eval_every=2)),
    "raft": ROLLS,
    "dpo": replace(STAGES["dpo"], gold="watching", loop=tiny.loop(4, eval_every=2)),
    "kto": UnpairedAlignment(
        start="sft", preferences="preferences", eval_prompts=tiny.prompts, gold="watching", sampling=tiny.answers,
        algorithm=KTOConfig(), optim=tiny.adam, eval_fraction=0.25, loop=tiny.loop(4, eval_every=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
def test_between_its_uses_nothing_of_the_reference_is_on_the_devices(name, train, monkeypatch):
    """Once what is trained has moved, arrays with the start's own values are the reference's. (The critic of this PPO
    begins with the same arrays; DPO and KTO score the reference before they train, and evaluations measure the KL to
    it.)"""
    seen: list[list[str]] = []
    start: list[np.ndarray] = []

    def copies() -> list[str]:
        gc.collect()
        alike = [x for x in jax.live_arrays() if x.shape == start[0].shape and x.dtype == start[0].dtype]
        return sorted(x.sharding.memory_kind for x in alike if np.array_equal(np.asarray(x), start[0]))

    def watching(prompts, answers, rows):
        if start:
            seen.append(copies())
        return np.array([len(answer) % 5 for answer in answers], np.float64)

    monkeypatch.setitem(REWARDS, "watching", watching)
    found = {}
    for offload in (False, True):
        stage = replace(LEARNERS[name], loop=replace(LEARNERS[name].loop, offload_reference=offload))
        if not start:
            start.append(load_params(train()["sft"] / "model")[0]["layers"]["mlp"]["up"])
        seen.clear()
        left = train(**{name: stage})[name]
        found[offload] = [lasting(m) for m in (*trained(left), *evaluated(left))], seen[-1], copies()
        shutil.rmtree(left)  # where it lies is no part of the fingerprint
    (lines, during, _), (same_lines, offloaded, after) = found[False], found[True]
    assert same_lines == lines
    assert during == ["device"]
    assert offloaded == ["pinned_host"]
    assert after == []


def test_an_init_may_compute_with_a_start_that_is_on_the_host():
    def init(params, ref_params, key):
        policy = {"w": params["w"] + jax.random.normal(key, (4,))}
        return TrainState(jnp.int32(0), {"policy": policy}, (), ref_params, key)

    mesh, found = make_mesh(MeshConfig(data=1), jax.devices()[:1]), []
    start = {"w": jnp.arange(4.0)}
    where = lambda x: x["w"].unsafe_buffer_pointer()  # noqa: E731
    for offload, given in ((False, start), (True, start), (True, placed(start, HOST))):
        _, make, frozen = sharded_state(
            mesh, {}, init, given, given, jax.random.key(0), offload_reference=offload
        )
        assert frozen["w"].sharding.memory_kind == ("pinned_host" if offload else "device")
        if given["w"].sharding.memory_kind == frozen["w"].sharding.memory_kind:
            assert where(frozen) == where(given)  # not copied
        found.append(make().params["policy"]["w"])
        assert found[-1].sharding.memory_kind == "device"
    same(found[0], found[1])
    same(found[0], found[2])


def grpo(kl: str):
    config = GRPOConfig(group_size=2, kl=kl, beta=0.5)
    return make_grpo(config, MODEL, build_optimizer(OptimConfig(lr=0.1), 10), 1.0)


def batch_maker(algorithm, loop: LoopConfig):
    """As the driver has it."""
    return jax.jit(
        lambda state, frozen, *rollout: algorithm.make_batch(
            state._replace(ref_params=fetched(frozen, loop)), *rollout
        )
    )


def test_a_reference_that_every_update_reads_is_fetched_in_it():
    rng, mesh, found = np.random.default_rng(0), make_mesh(MESHES["all"]), []
    algorithm, ones = grpo("full"), np.ones((8, 10), bool)
    rollout = Rollout(
        rng.integers(1, 32, (8, 10)).astype(np.int32), ones, ones[:, 4:], np.zeros((8, 6), np.float32), ones[:, 0]
    )  # fmt: skip
    scores = rng.standard_normal(8).astype(np.float32)
    with jax.set_mesh(mesh):
        for offload in (False, True):
            loop = LoopConfig(steps=3, offload_reference=offload)
            start = (*jax.device_put((lm_params(), lm_params(1)), replicated(mesh)), jax.random.key(0))
            _, make, frozen = sharded_state(mesh, AXES, algorithm.init, *start, offload_reference=offload)
            state, given = make(), put_batch(mesh, (rollout, scores))
            batch = batch_maker(algorithm, loop)(state, frozen, *given)
            state, metrics = jax.jit(guarded(algorithm.train_step, loop))(state, frozen, batch)
            assert {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {"device"}
            assert {x.sharding.memory_kind for x in jax.tree.leaves(frozen)} == {
                "pinned_host" if offload else "device"
            }
            found.append(jax.device_get((state.params, metrics)))
    same(*found)
    assert found[0][1]["kl/loss"] > 0.1  # the reference is another model than the policy


@pytest.mark.parametrize(("kl", "reads"), [("k3", False), ("full", True)])
def test_an_update_fetches_the_reference_only_where_it_reads_it(kl, reads):
    """Lowered only: of the arguments of a jitted function those that it does not read are left out."""
    algorithm = grpo(kl)
    loop = LoopConfig(steps=3, offload_reference=True)
    frozen = placed(lm_params(1), HOST)
    state = algorithm.init(lm_params(), frozen, jax.random.key(0))._replace(ref_params=None)
    shape = lambda dtype, *size: jax.ShapeDtypeStruct(size, dtype)  # noqa: E731
    rollout = Rollout(
        shape(jnp.int32, 8, 10), shape(jnp.bool_, 8, 10), shape(jnp.bool_, 8, 6), shape(jnp.float32, 8, 6),
        shape(jnp.bool_, 8),
    )  # fmt: skip

    given = (state, frozen, rollout, shape(jnp.float32, 8))
    make_batch = batch_maker(algorithm, loop)
    assert "pinned_host" in make_batch.lower(*given).as_text()
    batch = jax.eval_shape(make_batch, *given)
    step = jax.jit(guarded(algorithm.train_step, loop)).lower(state, frozen, batch)
    assert ("pinned_host" in step.as_text()) == reads


def test_a_plan_counts_the_reference_where_it_is_on_the_devices_in_updates():
    config = replace(STAGES["pretrain"].model, vocab_size=32)
    size = lambda stage: with_references(Plan(), stage, config).memory_bytes  # noqa: E731
    moved = replace(ROLLS.loop, offload_reference=True)
    assert size(ROLLS) == 4 * config.n_params
    assert size(replace(ROLLS, loop=moved)) == 0
    assert size(replace(STAGES["dpo"], loop=moved)) == 0
    full = GRPOConfig(group_size=2, kl="full")
    assert size(replace(ROLLS, algorithm=full, loop=moved)) == 4 * config.n_params


# --- mistakes -----------------------------------------------------------------------------------------------

HERE = MeshConfig(data=8)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (STAGES["sft"], "SFT has no reference"),
        (Distill(start="sft", teacher="dpo", data=tiny.prompts, loop=tiny.loop(2)), "Distill has no reference"),
        (replace(STAGES["dpo"], algorithm=SimPOConfig()), "SimPOConfig has no reference"),
        (replace(STAGES["ppo"], lora=LoRAConfig(rank=2)), r"with adapters \(lora\) the reference is their base"),
        (replace(LEARNERS["kto"], lora=LoRAConfig(rank=2)), r"with adapters \(lora\) the reference is their base"),
        (replace(STAGES["dpo"], algorithm=DPOConfig(reference="on_the_fly")), "'on_the_fly' reads it in every step"),
        (replace(ROLLS, algorithm=GRPOConfig(ref_update_every=2)), r"refreshed \(algorithm.ref_update_every\)"),
    ],
)  # fmt: skip
def test_a_stage_without_a_reference_to_move_says_so(stage, message):
    stage.check_mesh(HERE)
    with pytest.raises(UserError, match=rf"loop\.offload_reference: .*{message}.*; leave it off"):
        replace(stage, loop=replace(stage.loop, offload_reference=True)).check_mesh(HERE)


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_reference"])
@pytest.mark.parametrize("stage", [STAGES["dpo"], ROLLS])
def test_it_is_told_before_anything_runs(stage, name, monkeypatch):
    stage = replace(stage, loop=replace(stage.loop, **{name: True}))
    stage.check_mesh(HERE)
    monkeypatch.setattr(sharding, "HOST", "attic")
    with pytest.raises(UserError, match=rf"loop\.{name}: a cpu has no attic memory, only device"):
        stage.check_mesh(HERE)
