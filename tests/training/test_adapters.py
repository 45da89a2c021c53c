"""Adapters in the stages that train: one frozen base, which no checkpoint holds; what is saved is a whole model."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny_runs import (
    QUIET,
    assert_close_metrics,
    evaluated,
    folders,
    lasting,
    one_device,
    only,
    trained,
)

from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.algorithms.sft import SFTConfig
from jrlhf.checkpoint import load_meta, load_params
from jrlhf.config import STOP, MeshConfig, Preempted, UserError, from_dict
from jrlhf.experiment import dry_run, run
from jrlhf.lab import LarderText
from jrlhf.metrics import MetricLogger, read_metrics
from jrlhf.models.config import LoRAConfig, ModelConfig
from jrlhf.models.lora import is_adapter, join, leaves
from jrlhf.models.transformer import Model, fold_normalization
from jrlhf.sharding import make_mesh
from jrlhf.training import online, rewards
from jrlhf.training.artifacts import load_model
from jrlhf.training.evaluation import Sampler
from jrlhf.training.loop import sharded_state
from jrlhf.types import TrainState

STAGES = tiny.experiment.stages
BEFORE = ("pretrain", "sft", "preferences", "reward_model")
SOME = LoRAConfig(rank=2, alpha=8.0, targets=("q", "down"))
ALL = LoRAConfig(rank=2, alpha=8.0)

ppo = replace(
    STAGES["ppo"],
    reward="rm",
    lora=ALL,
    algorithm=PPOConfig(epochs=1, minibatches=1),  # every ratio is a first one
    eval_prompts=None,
    loop=tiny.loop(3),
)
dpo = replace(STAGES["dpo"], lora=SOME, gold="", eval_prompts=None, loop=tiny.loop(3))
ADAPTED = {
    "tuned": replace(STAGES["sft"], start="sft", lora=SOME, loop=tiny.loop(4)),
    "rm": replace(STAGES["reward_model"], lora=ALL, loop=tiny.loop(3)),
    "dpo": dpo,
    "fly": replace(dpo, algorithm=DPOConfig(beta=0.1, reference="on_the_fly")),
    "ppo_reward": replace(ppo, eval_prompts=tiny.prompts),
    "ppo_policy": replace(ppo, critic="policy", lora=SOME),
    "ppo_shared": replace(ppo, critic="shared", reward="larder_gold", gold="", lora=SOME),
}


class Seen(NamedTuple):
    """What the stages of PPO handed to the driver, in their order."""

    starts: list[tuple]  # (policy adapter, critic's, loaded start, key)
    templates: list[Any]  # of the train state
    frozen: list[Any]
    rollouts: list[Any]  # parameters that were sampled from
    scorers: list[Any]  # parameters of the reward model


class Run(NamedTuple):
    runs: Path
    folders: dict[str, Path]
    seen: Seen


@pytest.fixture(scope="module")
def adapted(one_device_run, one_device_runs) -> Run:
    """Every stage that trains, with adapters beside the model of "sft", on one device."""
    seen = Seen([], [], [], [], [])
    draw, scores = Sampler.draw, rewards.jitted_scores

    def watch_state(mesh, axes, init, *args, **options):
        template, make, frozen = sharded_state(mesh, axes, init, *args, **options)
        seen.starts.append(args), seen.templates.append(template), seen.frozen.append(frozen)
        return template, make, frozen

    def watch_draw(sampler, params, *args):
        seen.rollouts.append(params)
        return draw(sampler, params, *args)

    def watch_scores(model, params, *args):
        seen.scorers.append(params)
        return scores(model, params, *args)

    with pytest.MonkeyPatch.context() as patch, one_device():
        patch.setattr(online, "sharded_state", watch_state)
        patch.setattr(Sampler, "draw", watch_draw)
        patch.setattr(rewards, "jitted_scores", watch_scores)
        folder = run(only(*BEFORE, **ADAPTED), one_device_runs, console=QUIET)
    return Run(one_device_runs, folders(folder), seen)


def params_of(folder: Path) -> dict:
    return load_params(folder / "model")[0]


def start_of(adapted: Run, name: str) -> dict:
    return params_of(adapted.folders[ADAPTED[name].start])


def models(folder: Path) -> tuple[Model, Model, dict]:
    """(the model with adapters, the model as it was saved, the adapter) of a stage."""
    meta = load_meta(folder / "model")
    config = from_dict(ModelConfig, meta["model"], "model")
    adapter, noted = load_params(folder / "adapter")
    lora = from_dict(LoRAConfig, noted["lora"], "adapter")
    assert config.lora == LoRAConfig()
    return Model(replace(config, lora=lora), meta["head"]), Model(config, meta["head"]), adapter


TOKENS = np.arange(24).reshape(2, 12) % 90 + 3


def outputs(model: Model, params) -> np.ndarray:
    """Logits or scores at every token."""
    params, ones = jax.tree.map(jnp.asarray, params), jnp.ones(TOKENS.shape, bool)
    if model.head == "scalar":
        return np.asarray(model.scores(params, jnp.asarray(TOKENS), ones))
    return np.asarray(model.logits(params, model.hidden(params, jnp.asarray(TOKENS), ones)))


# --- what is trained, and what is left ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTED)
def test_only_the_layers_that_have_an_adapter_change(adapted, name):
    start, whole = dict(leaves(start_of(adapted, name))), dict(leaves(params_of(adapted.folders[name])))
    targets = ADAPTED[name].lora.targets or ("q", "k", "v", "o", "gate", "up", "down")
    assert set(whole) - set(start) == ({("score", "kernel"), ("score", "bias")} if name == "rm" else set())
    for path, before in start.items():
        if path[-1] in targets:
            assert np.any(whole[path] != before), path
        else:
            np.testing.assert_array_equal(whole[path], before, err_msg=str(path))
            assert whole[path].dtype == before.dtype


@pytest.mark.parametrize("name", ADAPTED)
def test_the_saved_model_is_the_base_with_the_adapter_beside_it(adapted, name):
    folder, start = adapted.folders[name], start_of(adapted, name)
    with_adapter, plain, adapter = models(folder)
    assert all(is_adapter(path) for path, _ in leaves(adapter))
    assert all(np.any(x) for path, x in leaves(adapter) if path[-1].endswith("_lora_b"))  # zero at the start
    ours = outputs(plain, params_of(folder))
    np.testing.assert_allclose(ours, outputs(with_adapter, join(start, adapter)), rtol=0, atol=1e-5)
    if plain.head == "lm":
        assert np.abs(ours - outputs(plain, start)).max() > 1e-2


@pytest.mark.parametrize("name", ADAPTED)
def test_metrics_are_finite_and_so_are_evaluations(adapted, name):
    rows = read_metrics(adapted.folders[name])
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert len(trained(adapted.folders[name])) == ADAPTED[name].loop.steps


def test_supervised_tuning_lowers_the_held_out_loss(adapted):
    before, after = (evaluated(adapted.folders[name])[-1]["eval/loss"] for name in ("sft", "tuned"))
    assert after < before - 0.01


def test_the_first_loss_of_dpo_is_ln_2_and_both_references_are_one(adapted):
    rows, fly = trained(adapted.folders["dpo"]), trained(adapted.folders["fly"])
    assert rows[0]["pref/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert fly[0]["pref/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["pref/loss"] < math.log(2) - 1e-4
    assert_close_metrics(fly, rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ppo_reward", "ppo_policy", "ppo_shared"])
def test_the_ratios_of_ppo_are_1_and_it_begins_at_its_reference(adapted, name):
    rows = trained(adapted.folders[name])
    assert [row["policy/ratio_max"] for row in rows] == pytest.approx([1.0] * 3, abs=1e-5)
    assert rows[0]["kl/ref_k1"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["kl/ref_k3"] > 1e-4  # the reference stays where it was
    assert all(row["mismatch/logp_diff_max"] < 1e-4 for row in rows)  # the sampler has the adapter too


# --- one base in memory, and none in checkpoints --------------------------------------------------------------


def test_policy_reference_critic_and_reward_model_are_beside_the_same_arrays(adapted):
    (policy, critic, base, _), frozen = adapted.seen.starts[0], adapted.seen.frozen[0]
    where = lambda tree: {  # noqa: E731
        path: x.unsafe_buffer_pointer() for path, x in leaves(tree) if not is_adapter(path)
    }
    assert where(frozen) == where(base)
    assert len(set(where(base).values())) == len(where(base)) == len(list(leaves(base)))
    assert where(policy) == where(critic) == {}
    for params in (adapted.seen.rollouts[0], adapted.seen.scorers[0]):
        assert where(params) == where(base)
    # The critic starts as the reward model, whose score is normalised: its adapter has copies of its own.
    scorer = {path: np.asarray(x) for path, x in leaves(adapted.seen.scorers[0]) if is_adapter(path)}
    assert set(scorer) == {path for path, _ in leaves(critic)}
    for path, x in leaves(critic):
        np.testing.assert_array_equal(x, scorer[path])


def test_the_shared_reward_model_scores_as_its_saved_self(adapted):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    loaded = load_model(adapted.folders["rm"], mesh, "scalar")
    with_adapter, _, adapter = models(adapted.folders["rm"])
    norm = loaded.meta["normalization"]
    raw = join(start_of(adapted, "rm"), adapter)
    ours = outputs(with_adapter, jax.device_get(adapted.seen.scorers[0]))
    np.testing.assert_allclose(ours, outputs(loaded.model, jax.device_get(loaded.params)), rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        ours, outputs(with_adapter, fold_normalization(raw, norm["mean"], norm["std"])), rtol=0, atol=1e-5
    )
    assert np.abs(ours - outputs(with_adapter, raw)).max() > 1e-2


def test_frozen_parameters_that_an_algorithm_computes_are_refused():
    init = lambda x: TrainState(jnp.int32(0), {"w": x}, (), {"w": x + 1}, jax.random.key(0))  # noqa: E731
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with pytest.raises(ValueError, match="ref_params; they must be among its arguments"):
        sharded_state(mesh, {}, init, jnp.ones(3))


def size(tree) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_train_state_has_adapters_and_their_moments_only(adapted, which):
    template, start = adapted.seen.templates[which], adapted.seen.starts[which]
    assert template.ref_params is None
    assert all(is_adapter(path[1:]) for path, _ in leaves(template.params))
    assert size(template.params) == size(start[0]) + size(start[1])
    counts = 2  # Adam's and the schedule's, of each of two optimisers
    assert size(template.opt_state) == 2 * size(template.params) + 2 * counts


def saved(folder: Path) -> dict[str, int]:
    """Name -> number of elements of every leaf in the newest checkpoint of a stage."""
    manifest = max(folder.glob("checkpoints/step-*/manifest.json"))
    return {
        name: math.prod(leaf["shape"]) for name, leaf in json.loads(manifest.read_text())["leaves"].items()
    }


@pytest.mark.parametrize("name", ADAPTED)
def test_checkpoints_do_not_hold_the_base(adapted, name):
    held = saved(adapted.folders[name])
    parts = [part for part in held if part.startswith(("params", "opt_state")) and "count" not in part]
    assert parts
    assert all("_lora_" in part or "score" in part for part in parts), parts
    assert not any(part.startswith("ref_params") for part in held)
    assert 0 < sum(held.values()) < size(start_of(adapted, name))


def test_checkpoints_of_full_fine_tuning_do_not_hold_the_reference(one_device_run):
    left = folders(one_device_run)
    policy, critic = size(params_of(left["sft"])), size(params_of(left["reward_model"]))
    held = saved(left["ppo"])
    assert not any(part.startswith("ref_params") for part in held)
    assert 0 <= sum(held.values()) - 3 * (policy + critic) < 16


def test_full_fine_tuning_keeps_its_start_as_the_reference(one_device_run):
    """The policy's arrays are donated at every step; the reference's are not, and stay."""
    rows = trained(folders(one_device_run)["ppo"])
    assert rows[0]["kl/ref_k1"] == 0
    assert rows[-1]["kl/ref_k3"] > 1e-3


@pytest.mark.parametrize("name", ["ppo_reward", "fly"])
def test_a_run_with_adapters_that_is_stopped_after_every_step(adapted, name, tmp_path, monkeypatch):
    original, steps = adapted.folders[name], ADAPTED[name].loop.steps
    runs = Path(shutil.copytree(adapted.runs, tmp_path / "runs"))
    shutil.rmtree(runs / "stages" / original.name)
    make = MetricLogger.__init__

    def make_and_ask_to_stop(*args, **kwargs):
        make(*args, **kwargs)
        STOP.request()

    monkeypatch.setattr(MetricLogger, "__init__", make_and_ask_to_stop)
    stopped = []
    with one_device():
        for _ in range(steps):
            try:
                folder = run(only(*BEFORE, rm=ADAPTED["rm"], **{name: ADAPTED[name]}), runs, console=QUIET)
            except Preempted as stop:
                stopped.append(str(stop))
            finally:
                STOP.clear()
    assert stopped == [f"{name}: saved at step {n} of {steps}" for n in range(1, steps)]
    again = folders(folder)[name]
    ours, theirs = (list(map(lasting, read_metrics(f))) for f in (again, original))
    assert ours == theirs
    for part in ("model", "adapter"):
        a, b = (load_params(f / part)[0] for f in (again, original))
        jax.tree.map(np.testing.assert_array_equal, a, b)


# --- mistakes, before anything runs ---------------------------------------------------------------------------


def experiment(**stages):
    return lambda: only("pretrain", "sft", "preferences", **stages)


EARLY = {
    "layers that there are not": (
        experiment(bad=replace(ADAPTED["tuned"], lora=LoRAConfig(rank=2, targets=("q_proj",)))),
        "stages.bad: model.lora.targets: 'q_proj' is no linear layer of this model; there are attn/q, ",
    ),
    "layers that a reward model has not": (
        experiment(bad=replace(ADAPTED["rm"], lora=LoRAConfig(rank=2, targets=("score",)))),
        "stages.bad: model.lora.targets: 'score' is no linear layer",
    ),
    "layers that DPO's start has not": (
        experiment(bad=replace(dpo, lora=LoRAConfig(rank=2, targets=("router",)))),
        "stages.bad: model.lora.targets: 'router' is no linear layer",
    ),
    "a pretraining mix": (
        experiment(rm=ADAPTED["rm"], bad=replace(ppo, ptx=LarderText(8), algorithm=PPOConfig(ptx_coef=0.1))),
        "stages.bad: ptx: the pretraining mix is not possible with adapters",
    ),
    "a critic of a whole reward model": (
        experiment(rm=STAGES["reward_model"], bad=ppo),
        "stages.bad: critic 'reward' with adapters needs a reward model that is an adapter beside the same base: "
        "give 'rm' `lora` and start 'sft'",
    ),
    "a critic beside another base": (
        experiment(rm=replace(ADAPTED["rm"], start="pretrain"), bad=ppo),
        "stages.bad: critic 'reward' with adapters needs a reward model that is an adapter beside the same base",
    ),
    "a critic of a program": (
        experiment(bad=replace(ppo, reward="larder_gold", gold="")),
        "stages.bad: critic 'reward' needs a reward-model stage; 'larder_gold' is a program",
    ),
    "adapters in pretraining": (
        lambda: only(pretrain=replace(STAGES["pretrain"], model=replace(STAGES["pretrain"].model, lora=ALL))),
        "stages.pretrain: model.lora: pretraining trains all parameters; give `lora` to a stage that fine-tunes",
    ),
    "balance of a dense model": (
        lambda: only("pretrain", sft=replace(STAGES["sft"], algorithm=SFTConfig(balance_coef=0.1))),
        "stages.sft: algorithm.balance_coef is for a mixture of experts, and this model is dense",
    ),
    "balance of a dense model in pretraining": (
        lambda: only(pretrain=replace(STAGES["pretrain"], algorithm=SFTConfig(balance_coef=0.1))),
        "stages.pretrain: algorithm.balance_coef is for a mixture of experts, and this model is dense",
    ),
}


@pytest.mark.parametrize("name", EARLY)
def test_refused_before_anything_runs(name, tmp_path):
    make, expected = EARLY[name]
    with pytest.raises(UserError) as error:
        dry_run(make(), tmp_path / "runs")
    assert expected in " ".join(str(error.value).split())


def test_a_reward_model_without_an_adapter_is_scored_as_a_whole(adapted):
    """Critic "policy": the reward model may be any; this one was trained in full."""
    stage = replace(ADAPTED["ppo_policy"], reward="reward_model", loop=tiny.loop(1))
    with one_device():
        folder = folders(run(only(*BEFORE, whole=stage), adapted.runs, console=QUIET))["whole"]
    ours, theirs = trained(folder)[0], trained(adapted.folders["ppo_policy"])[0]
    assert ours["reward/larder_gold/mean"] == theirs["reward/larder_gold/mean"]  # the same samples
    assert ours["reward/score/mean"] != theirs["reward/score/mean"]
