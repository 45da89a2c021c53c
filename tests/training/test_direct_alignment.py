"""The stage on ranked answers: any algorithm of FROM_PAIRS is one field, whatever it learns from and against."""

import shutil
from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
import tiny
from tiny_runs import QUIET, evaluated, folders, jsonl, lasting, one_device, only, trained

from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.ranked_dpo import RankedDPOConfig
from jrlhf.algorithms.simpo import SimPOConfig
from jrlhf.checkpoint import load_params
from jrlhf.config import STOP, MeshConfig, Preempted, UserError, from_dict, to_dict
from jrlhf.experiment import dry_run, run
from jrlhf.metrics import MetricLogger
from jrlhf.models.config import LoRAConfig
from jrlhf.ops.pairs import PairConfig
from jrlhf.training.stages import DirectAlignment

DPO = tiny.experiment.stages["dpo"]
QUICK = replace(DPO, eval_prompts=None, gold="", loop=tiny.loop(3))
BEFORE = ("pretrain", "sft", "preferences")


def test_another_algorithm_is_another_dataclass(train, one_device_run):
    """SimPO's implicit reward knows no reference, so that its margin is not 0 at the start."""
    left = train(simpo=replace(QUICK, algorithm=SimPOConfig(beta=1.0, gamma=0.5)))
    rows = trained(left["simpo"])
    assert rows[0]["pref/margin"] != pytest.approx(0, abs=1e-3)
    dpo = trained(folders(one_device_run)["dpo"])
    assert rows[0]["pref/logp_chosen"] == pytest.approx(
        dpo[0]["pref/logp_chosen"], rel=1e-5
    )  # the same batch
    assert 0 <= evaluated(left["simpo"])[-1]["eval/pref_acc/mean"] <= 1


def test_rankings_are_learned_from_whole_and_measured_by_pairs(train, one_device_run):
    """Bradley-Terry over all pairs of a prompt begins at ln 2, Plackett-Luce of three at ln 3!."""
    loop = replace(tiny.loop(2), batch_size=8)
    left = train(ranked=replace(QUICK, loop=loop, algorithm=RankedDPOConfig(0.1)))
    rows = trained(left["ranked"])
    preferences = jsonl(folders(one_device_run)["preferences"] / "preferences.jsonl")
    assert all(sorted(row["ranks"]) == [1, 2, 3] for row in preferences)  # these labellers know no ties
    assert rows[0]["pref/loss"] == pytest.approx(np.log(6), abs=1e-5)
    assert rows[-1]["pref/loss"] != pytest.approx(np.log(6), abs=1e-4)
    assert "eval/pref_acc/mean" in evaluated(left["ranked"])[-1]


def test_a_refreshed_reference_survives_an_interruption(
    train, one_device_run, one_device_runs, tmp_path, monkeypatch
):
    """TR-DPO, stopped and started again after every step: metrics and policy are those of one start."""
    algorithm = DPOConfig(0.1, reference="on_the_fly", ref_update_every=2, ref_mixup=0.6)
    stage = replace(QUICK, algorithm=algorithm, loop=tiny.loop(4))
    original = train(moving=stage)["moving"]
    frozen = trained(folders(one_device_run)["dpo"])
    rows = trained(original)
    assert rows[1]["pref/loss"] == pytest.approx(frozen[1]["pref/loss"], rel=1e-4)  # until the refresh
    assert rows[3]["pref/loss"] != pytest.approx(frozen[3]["pref/loss"], rel=1e-3)

    runs = shutil.copytree(one_device_runs, tmp_path / "runs")
    shutil.rmtree(runs / "stages" / original.name)
    make = MetricLogger.__init__

    def make_and_ask_to_stop(*args, **kwargs):
        make(*args, **kwargs)
        STOP.request()

    monkeypatch.setattr(MetricLogger, "__init__", make_and_ask_to_stop)
    stops = 0
    with one_device():
        for _ in range(4):
            try:
                again = run(only(*BEFORE, "reward_model", moving=stage), runs, console=QUIET)
            except Preempted:
                stops += 1
            finally:
                STOP.clear()
    assert stops == 3
    ours = folders(again)["moving"]
    assert [lasting(row) for row in trained(ours)] == [lasting(row) for row in rows]
    a, b = (load_params(folder / "model")[0] for folder in (ours, original))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_config_of_any_algorithm_survives_json():
    for algorithm in (
        DPOConfig(0.2, loss="aot"),
        SimPOConfig(alpha=0.1),
        RankedDPOConfig(likelihood="davidson"),
    ):
        stage = replace(DPO, algorithm=algorithm)
        assert from_dict(DirectAlignment, to_dict(stage)) == stage


@dataclass(frozen=True)
class StrayConfig(PairConfig):
    """Derived, but not in the table."""


MISTAKES = {
    "an algorithm that is in no table": (
        {"algorithm": StrayConfig()},
        "algorithm: StrayConfig is none that learns from pairs of answers",
    ),
    "pairs of rankings": (
        {"algorithm": RankedDPOConfig(), "pairs": "best_worst"},
        "pairs: RankedDPOConfig learns from whole rankings, not from 'best_worst' pairs",
    ),
    "a refresh beside adapters": (
        {"algorithm": DPOConfig(reference="on_the_fly", ref_update_every=2), "lora": LoRAConfig(rank=2)},
        r"algorithm\.ref_update_every: with adapters",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_anything_runs(name, tmp_path):
    changes, message = MISTAKES[name]
    experiment = replace(only(*BEFORE, bad=replace(QUICK, **changes)), mesh=MeshConfig())
    with pytest.raises(UserError, match=rf"stages\.bad: {message}"):
        dry_run(experiment, tmp_path)
