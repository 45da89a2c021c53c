"""Stages on preferences, run again with padded rows: what they learn and find is the same."""

import shutil
from dataclasses import replace

import pytest
import tiny
from tiny_runs import QUIET, assert_close_metrics, evaluated, folders, one_device, only, trained

from jrlhf.config import UserError
from jrlhf.experiment import dry_run, run
from jrlhf.models.config import ModelConfig
from jrlhf.training.stages import RewardModel

QUICK = replace(tiny.experiment.stages["dpo"], eval_prompts=None, gold="", loop=tiny.loop(3, eval_every=1))
BEFORE = ("pretrain", "sft", "preferences")


def test_packing_changes_no_run(train, one_device_runs, tmp_path):
    """Neither losses nor gradients nor what is found on held-out pairs; so it has no part in the fingerprint."""
    packed = train(dpo=QUICK)
    names = ("reward_model", "dpo")
    runs = shutil.copytree(one_device_runs, tmp_path / "runs")
    for name in names:
        shutil.rmtree(runs / "stages" / packed[name].name)
    stages = {"reward_model": tiny.experiment.stages["reward_model"], "dpo": QUICK}
    with one_device():
        apart = {name: replace(stage, packing=False) for name, stage in stages.items()}
        padded = folders(run(only(*BEFORE, **apart), runs, console=QUIET))
    for name in names:
        assert padded[name].name == packed[name].name
        for rows in (trained, evaluated):
            assert_close_metrics(rows(padded[name]), rows(packed[name]), rtol=1e-3, atol=1e-4)


def test_a_window_that_packed_rows_would_miscount_is_an_error(tmp_path):
    stages = tiny.experiment.stages
    windowed = replace(stages["pretrain"], model=replace(stages["pretrain"].model, window=8))
    assert isinstance(windowed.model, ModelConfig)
    assert isinstance(stages["reward_model"], RewardModel)
    for name, changed in (("reward_model", {}), ("dpo", {"eval_prompts": None, "gold": ""})):
        stage = replace(stages[name], **changed)
        with pytest.raises(UserError, match=f"{name}.*packing"):
            dry_run(only("sft", "preferences", pretrain=windowed, **{name: stage}), tmp_path)
        fits = replace(stage, packing=False)
        dry_run(only("sft", "preferences", pretrain=windowed, **{name: fits}), tmp_path)
