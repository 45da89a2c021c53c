"""What would be compiled for devices that are not there, held against what is compiled for devices that are."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jrlhf import cli
from jrlhf.algorithms.grpo import GRPOConfig
from jrlhf.algorithms.kto import KTOConfig
from jrlhf.compare.plans import memory_picture
from jrlhf.config import MeshConfig
from jrlhf.experiment import load_experiment
from jrlhf.hardware import HARDWARE
from jrlhf.hlo import Module, Walk
from jrlhf.models.config import LoRAConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.planning import (
    Change,
    Tried,
    assigned_bytes,
    compile_here,
    device_bytes,
    neighbours,
    planned,
    rates_of,
    root_of,
    written,
)
from jrlhf.training.programs import Lengths, programs_of
from jrlhf.training.stages import PPO, DirectAlignment, OnPolicy, UnpairedAlignment

FILE = Path(__file__).parents[2] / "experiments" / "larder" / "ppo_vs_dpo.py"
LENGTHS = Lengths(prompt=16, answer=8)


@pytest.fixture(scope="module")
def stages():
    """The quickstart's, small, and stages of other kinds."""
    found = dict(load_experiment(FILE).stages)
    model = replace(
        found["pretrain"].model, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=64, vocab_size=64
    )
    found["pretrain"] = replace(found["pretrain"], model=model)
    for name, stage in found.items():
        if hasattr(stage, "loop"):
            found[name] = replace(stage, loop=replace(stage.loop, batch_size=16))
    ppo, dpo = found["ppo"], found["dpo"]
    assert isinstance(ppo, PPO)
    assert isinstance(dpo, DirectAlignment)
    common = {"start": ppo.start, "reward": ppo.reward, "prompts": ppo.prompts, "loop": ppo.loop}
    found["grpo"] = OnPolicy(algorithm=GRPOConfig(group_size=4), sampling=ppo.sampling, **common)
    found["adapter"] = replace(found["grpo"], lora=LoRAConfig(rank=2))
    found["kto"] = UnpairedAlignment(
        start=dpo.start, preferences=dpo.preferences, algorithm=KTOConfig(), loop=dpo.loop
    )
    return found


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def lowered(program, mesh):
    with jax.set_mesh(mesh):
        return program.lower()


def everywhere(leaves) -> int:
    """Bytes of whole arrays."""
    of_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return sum(math.prod(x.shape) * (8 if of_key(x) else x.dtype.itemsize) for x in leaves)


@pytest.fixture
def uncached():
    """What is found in the cache leaves no text."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("name", ["pretrain", "reward_model", "dpo", "kto", "ppo", "adapter"])
def test_arguments_that_are_planned_for_are_those_of_the_program(name, stages, mesh):
    """The driver's own function takes what the stage is said to hold, and the rest."""
    found = programs_of(name, stages, mesh, LENGTHS)
    update = found.programs[-1]
    assert update.name == "update"
    holds = [h.tree for h in found.held if h.name in ("train state", "reference", "frozen")]
    if name in ("dpo", "kto"):
        holds = holds[:2]  # their reference is scored beforehand
    arguments = jax.tree.leaves(lowered(update, mesh).args_info)
    assert everywhere(arguments) == everywhere(jax.tree.leaves((holds, update.given)))


def test_the_programs_of_stages(stages, mesh):
    names = lambda name: [p.name for p in programs_of(name, stages, mesh, LENGTHS).programs]  # noqa: E731
    assert names("sft") == ["update"]
    assert names("dpo") == ["reference", "update"]
    assert names("ppo") == names("grpo") == ["rollout", "score by reward_model", "batch", "update"]
    held = {h.name for h in programs_of("ppo", stages, mesh, LENGTHS).held}
    assert held == {"train state", "reference", "critic's start", "reward model reward_model"}
    assert programs_of("preferences", stages, mesh, LENGTHS) is None


def test_a_plan_of_a_program(stages, mesh, tmp_path, uncached):
    """Its parts are those of the compiler, and its products those of arithmetic."""
    found = programs_of("sft", stages, mesh, LENGTHS)
    (update,) = found.programs
    compile_here(update, mesh, tmp_path)
    made = written(tmp_path, 1.0)
    memory = lowered(update, mesh).compile().memory_analysis()
    assert made.temporaries == pytest.approx(memory.temp_size_in_bytes, rel=0.02)
    parts = {h.name: device_bytes(h.tree) for h in found.held}
    plan = planned(update, parts, made, HARDWARE["v5p"], mesh.size)
    assert plan.fits
    assert plan.needed == sum(parts.values()) + made.temporaries + made.results
    # Every device does an eighth of them, and some (the last layer, the head's padding) again or needlessly.
    assert 1.0 < plan.flops * mesh.size / update.useful < 1.6
    assert plan.seconds == Walk(Module(made.text), rates_of(HARDWARE["v5p"])).cost().seconds
    assert plan.mfu == pytest.approx(update.useful / 8 / HARDWARE["v5p"].peak_bf16 / plan.seconds)
    small = replace(plan, capacity=1)
    assert not small.fits
    memory_picture([plan, small], tmp_path / "memory.png", "two")
    assert (tmp_path / "memory.png").stat().st_size > 5000


def test_bytes_of_a_buffer_assignment():
    text = """BufferAssignment:
allocation 0: size 100, page 0, parameter 1, shape |f32[25]| at ShapeIndex {}, maybe-live-out:
allocation 1: size 7, color 8, page 0, preallocated-temp:
allocation 2: size 30, page 0, maybe-live-out:
allocation 3: size 200, page 0, preallocated-temp:
allocation 4: size 50, page 0, thread-local:
"""
    assert assigned_bytes(text) == (200, 30)


# --- what to change -----------------------------------------------------------------------------------------


def tried(stages, plans, **mesh):
    return Tried(Change((), MeshConfig(**mesh), stages), plans)


def test_what_does_not_fit_is_given_less_memory_first(stages):
    options = [c.options for c in neighbours("grpo", tried(stages, [], data=4, fsdp=2), [None] * 8)]  # type: ignore[list-item]
    assert options[0] == ("--stages.grpo.algorithm.microbatches", "2")
    assert ("--mesh.data", "2", "--mesh.fsdp", "4") in options
    assert ("--stages.grpo.loop.offload_reference", "True") in options


def test_options_name_fields_of_the_experiment(stages):
    """Each variant is the one that its options make of the experiment on the command line."""
    from jrlhf.config import apply_overrides

    experiment = load_experiment(FILE)
    start = tried(experiment.stages, [], data=4, fsdp=2)
    for change in neighbours("ppo", start, [None] * 8):  # type: ignore[list-item]
        made = apply_overrides(replace(experiment, mesh=MeshConfig(data=4, fsdp=2)), list(change.options))
        assert made.stages == dict(change.stages)
        assert made.mesh == change.mesh


def test_the_model_comes_from_the_first_stage(stages):
    (name, _), config = root_of("ppo", stages)
    assert name == "pretrain"
    assert config == stages["pretrain"].model


# --- the command ----------------------------------------------------------------------------------------------


def test_mistakes_are_named(capsys):
    assert cli.main(["plan", str(FILE)]) == 2
    assert "--topology" in capsys.readouterr().err


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no TPU compiler: pip install 'jrlhf[plan]'"
)
def test_a_small_experiment_is_planned_for_tpus(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # those of a CPU's compiler
    argv = [
        "plan",
        str(FILE),
        "dpo",
        "--topology",
        "v5e:2x2",
        "--mesh.data",
        "2",
        "--mesh.fsdp",
        "2",
        "--quick",
    ]
    assert cli.main([*argv, "--answer", "16", "--prompt", "24", "--out", str(tmp_path)]) == 0
    made = json.loads((tmp_path / "plan.json").read_text())
    update = next(p for p in made["programs"] if p["program"] == "update")
    assert update["fits"]
    assert 0 < update["mfu"] < 1
    gathered = [c for c in update["collectives"] if c["kind"] == "all-gather"]
    assert gathered  # weights are gathered, not filled with zeros and summed
    assert {c["devices"] for c in gathered} == {2}
    assert "dpo: what the update sends" in capsys.readouterr().out
