"""The dry run's counts are those of the run, or say that they are bounds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from tiny_runs import QUIET, one_device, only

from jrlhf.config import LANGUAGE_MODEL, MeshConfig, StageContext, UserError
from jrlhf.data.chat import ChatConfig
from jrlhf.data.sources import FileSource, HubSource
from jrlhf.experiment import dry_run, run, tasks
from jrlhf.lab import LarderDemonstrations, LarderPrompts
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import (
    SFT,
    DirectAlignment,
    RewardModel,
    direct_alignment,
    language_model,
    reward_model,
)
from jrlhf.training.stages.common import ModelStage
from jrlhf.training.stages.sizes import UNKNOWN, Count, count_rows
from jrlhf.types import Plan

STAGES = tiny.experiment.stages
EPOCHS = LoopConfig(epochs=3, batch_size=8)
BY_EPOCHS = {
    "sft": replace(STAGES["sft"], loop=EPOCHS),
    "reward_model": replace(STAGES["reward_model"], loop=EPOCHS),
    "dpo": replace(STAGES["dpo"], loop=EPOCHS, eval_prompts=None, gold=""),
    "dpo of the best and worst": replace(
        STAGES["dpo"], loop=EPOCHS, eval_prompts=None, gold="", pairs="best_worst"
    ),
}


def plan(stage, runs_dir: Path) -> Plan:
    """Of a stage after the tiny experiment's."""
    experiment = only("pretrain", "sft", "preferences", "reward_model", last=stage)
    (task,) = (t for t in tasks(experiment, runs_dir) if t.name == "last")
    parents = {name: t.folder for name, t in task.parents.items()}
    stages = experiment.stages
    return stage.plan(
        StageContext("last", stage, task.folder, parents, stages, 0, MeshConfig(), QUIET, runs_dir)
    )


class Reached(Exception):
    """Training would begin, with so many steps."""


@pytest.fixture
def real(one_device_run, one_device_runs, monkeypatch):
    """real(stage) -> the steps that its run would make after its finished parents."""

    def reached(ctx, mesh, loop, steps, *rest, **more):
        raise Reached(steps)

    for module in (language_model, reward_model, direct_alignment):
        monkeypatch.setattr(module, "train_offline", reached)

    def real(stage) -> int:
        experiment = only("pretrain", "sft", "preferences", "reward_model", last=stage)
        with pytest.raises(Reached) as steps, one_device():
            run(experiment, one_device_runs, console=QUIET)
        return steps.value.args[0]

    return real


@pytest.mark.parametrize("name", BY_EPOCHS)
def test_steps_are_exact_after_the_parents_and_bounded_before(name, real, one_device_runs, tmp_path):
    stage = BY_EPOCHS[name]
    steps = real(stage)
    after = plan(stage, one_device_runs)
    assert after.steps == steps
    assert "steps" not in after.at_most
    before = plan(stage, tmp_path)
    exact = name == "reward_model"  # nothing is packed, and the held-out share goes by the prompts
    assert ("steps" not in before.at_most) == exact
    assert before.steps > steps if name == "sft" else before.steps == steps  # these labellers know no ties


def file(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_of_files_are_counted_and_their_mistakes_told(tmp_path, real, one_device_runs):
    prefer = [
        {
            "prompt": f"describe tea {'thanks ' * (n % 6)}:",
            "responses": ["a", "b", "c"],
            "ranks": [1, 2, 2 + n % 2],
        }
        for n in range(40)
    ]
    source = FileSource(file(tmp_path / "preferences.jsonl", prefer), "preference")
    assert count_rows(source) == Count(40)
    assert count_rows(replace(source, max_rows=7)) == Count(7)
    assert count_rows(replace(source, max_rows=70)) == Count(40)
    for stage in (
        DirectAlignment("sft", loop=EPOCHS, data=source, eval_fraction=0.5),
        RewardModel("sft", loop=EPOCHS, data=source, eval_fraction=0.5),
    ):
        known = plan(stage, one_device_runs)
        assert (known.steps, known.at_most) == (real(stage), ("tokens",))
        assert plan(replace(stage, too_long="drop"), one_device_runs).at_most == ("rows", "steps", "tokens")
    with open(source.path, "a") as f:
        f.write('{"prompt": "x"}\n')
    assert count_rows(replace(source, max_rows=40)) == Count(40)
    experiment = only("pretrain", "sft", last=DirectAlignment("sft", loop=EPOCHS, data=source))
    with pytest.raises(UserError, match=r"^stages\.last: .*preferences\.jsonl line 41: no field"):
        dry_run(replace(experiment, mesh=MeshConfig()), tmp_path / "runs")


def test_rows_of_another_kind_are_told_by_the_dry_run(tmp_path):
    binary = file(tmp_path / "b.jsonl", [{"prompt": "x", "completion": "y", "label": True}])
    for stage, kind in (
        (RewardModel("sft", loop=EPOCHS, data=FileSource(binary, "binary")), "preference"),
        (
            SFT("sft", loop=EPOCHS, data=FileSource(file(tmp_path / "p.jsonl", [{"prompt": "x"}]), "prompt")),
            "demonstration",
        ),
    ):
        with pytest.raises(UserError) as error:
            plan(stage, tmp_path)
        assert str(error.value).startswith("data: FileSource row 1: ")
        assert f"Its rows must be of the kind '{kind}'" in str(error.value)


def test_a_stage_with_a_template_is_counted_with_it(one_device_run, one_device_runs, tmp_path):
    said = [{"role": "user", "content": "describe tea"}, {"role": "assistant", "content": "tea is bitter ."}]
    source = FileSource(file(tmp_path / "m.jsonl", [{"messages": said}] * 40), "demonstration")
    stage = replace(BY_EPOCHS["sft"], data=source, chat=ChatConfig("plain"), too_long="drop", eval_rows=1)
    assert plan(stage, one_device_runs).rows == 40
    with pytest.raises(UserError, match="no chat template"):
        plan(replace(stage, chat=None), one_device_runs)


def test_what_only_a_download_would_tell_is_not_made_up(tmp_path):
    assert count_rows(HubSource("org/data", "demonstration")) == UNKNOWN
    assert count_rows(HubSource("org/data", "demonstration", max_rows=100)) == Count(100, False)
    unknown = plan(replace(BY_EPOCHS["sft"], data=HubSource("org/data", "demonstration")), tmp_path)
    assert (unknown.rows, unknown.steps, unknown.note) == (0, 0, "steps depend on the data")
    known = plan(SFT("sft", data=HubSource("org/data", "demonstration"), loop=LoopConfig(steps=9)), tmp_path)
    assert (known.steps, known.at_most) == (9, ())


def test_tokens_of_ppo_hold_the_prompt(tmp_path, one_device_run):
    ppo = replace(STAGES["ppo"], loop=LoopConfig(steps=10, batch_size=8))
    assert plan(ppo, tmp_path).tokens == 10 * 8 * 40  # prompts may fill what answers leave of the context
    assert plan(replace(ppo, max_prompt=20), tmp_path).tokens == 10 * 8 * (20 + 8)
    assert plan(ppo, tmp_path).at_most == ("tokens",)
    longer = replace(ppo, max_prompt=20, sampling=SamplingConfig(max_new_tokens=11))
    assert plan(longer, tmp_path).tokens == 10 * 8 * 31


def test_the_dry_run_marks_bounds(tmp_path):
    experiment = only(
        "pretrain", "sft", "preferences", dpo=BY_EPOCHS["dpo"], reward_model=BY_EPOCHS["reward_model"]
    )
    table = dry_run(experiment, tmp_path)
    cells = dict(
        zip(table.columns[0]._cells, zip(*(c._cells for c in table.columns[6:9]), strict=True), strict=True)
    )
    assert cells["pretrain"] == ("96", "6", "1920")
    assert cells["dpo"][0].startswith("≤ ")
    rows, steps, _ = cells["reward_model"]
    assert int(steps) == 3 * int(rows) // 8
    assert cells["preferences"] == ("32", "-", "≤ 768")


def test_a_source_is_counted_by_what_it_says():
    assert count_rows(LarderDemonstrations(size=5)) == Count(5)
    assert count_rows(LarderPrompts(size=10**12)) == Count(10**12)  # not by making them
    assert count_rows(None) == Count()


def test_a_stage_that_leaves_a_model_has_a_config_for_those_that_start_from_it(tmp_path):
    for name, stage in STAGES.items():
        if stage.artifact == LANGUAGE_MODEL:
            assert isinstance(stage, ModelStage)
            assert stage.model_config(STAGES).context == 40, name
