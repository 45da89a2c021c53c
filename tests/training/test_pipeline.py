"""Every stage on Larder, from raw text to the report: what it leaves, what is reused, and one device against eight."""

import itertools
import json
from io import StringIO
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from helpers import assert_close
from rich.console import Console
from tiny_runs import QUIET, assert_close_metrics, evaluated, folders, jsonl, trained

from jrlhf.checkpoint import load_meta, load_params
from jrlhf.cli import main
from jrlhf.compare.report import write_report
from jrlhf.experiment import run
from jrlhf.metrics import check_name, read_metrics
from jrlhf.models.hf import load_hf
from jrlhf.models.transformer import fold_normalization
from jrlhf.training.serve import load_any

STEPS = {"pretrain": 6, "sft": 4, "reward_model": 5, "ppo": 5, "dpo": 4}
POLICIES = ("sft", "ppo", "dpo")


# --- what it leaves -----------------------------------------------------------------------------------------


def test_every_stage_finishes_and_leaves_its_files(pipeline):
    left = folders(pipeline)
    assert set(left) == set(tiny.experiment.stages)
    for name, folder in left.items():
        assert (folder / "done.json").is_file(), name
        assert not list(folder.rglob("*.partial")), name
    for name in STEPS:
        assert {"model", "tokenizer", "tb"} <= {path.name for path in left[name].iterdir()}, name
    assert (left["preferences"] / "preferences.jsonl").is_file()
    assert (left["ppo"] / "samples.jsonl").is_file()
    assert load_meta(left["reward_model"] / "model")["head"] == "scalar"


def test_every_step_has_one_line_of_known_metrics(pipeline):
    for name, folder in folders(pipeline).items():
        if name not in STEPS:
            assert not (folder / "metrics.jsonl").exists()
            continue
        assert [row["step"] for row in trained(folder)] == list(range(1, STEPS[name] + 1)), name
        for row in read_metrics(folder):
            assert all(np.isfinite(v) for v in row.values()), (name, row)
            for metric in row.keys() - {"step"}:
                check_name(metric)


def test_evaluations_come_when_asked_and_after_the_last_step(pipeline):
    steps = {name: [row["step"] for row in evaluated(folders(pipeline)[name])] for name in STEPS}
    assert steps == {"pretrain": [2, 4, 6], "sft": [4], "reward_model": [2, 4, 5], "ppo": [3, 5], "dpo": [4]}
    last = evaluated(folders(pipeline)["ppo"])[-1]
    assert {"eval/reward_model/mean", "eval/larder_gold/mean", "eval/kl/mean", "eval/ended/mean"} < set(last)
    written = jsonl(folders(pipeline)["ppo"] / "samples.jsonl")
    assert [row["step"] for row in written] == [3] * 8 + [5] * 8


def test_training_learns(pipeline):
    first, *_, last = evaluated(folders(pipeline)["pretrain"])
    assert last["eval/loss"] < first["eval/loss"]
    losses = [row["train/loss"] for row in trained(folders(pipeline)["sft"])]
    assert losses[-1] < losses[0]


def test_preferences_are_k_wise(pipeline):
    rows = jsonl(folders(pipeline)["preferences"] / "preferences.jsonl")
    assert len(rows) == 32
    assert all(len(row["responses"]) == 3 and sorted(row["ranks"]) == [1, 2, 3] for row in rows)
    # The tiny answers run out of their 8 tokens, which reward models and DPO are told.
    assert any(not all(row["ended"]) for row in rows)
    assert all(len(row["ended"]) == 3 for row in rows)


def test_the_policies_start_equal_and_part(pipeline):
    """PPO's first rollout is of the reference itself; DPO's loss begins at ln 2; both then move."""
    ppo, dpo = (trained(folders(pipeline)[name]) for name in ("ppo", "dpo"))
    assert ppo[0]["kl/ref_k1"] == 0
    assert abs(ppo[-1]["kl/ref_k1"]) > 1e-4
    assert dpo[0]["pref/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert dpo[-1]["pref/loss"] != pytest.approx(np.log(2), abs=1e-4)


def test_the_adaptive_kl_coefficient_is_carried_from_step_to_step(pipeline):
    """Ziegler et al. 2019, section 2.2, by hand from the logged KL."""
    rows = trained(folders(pipeline)["ppo"])
    for before, after in itertools.pairwise(rows):
        error = np.clip(before["kl/ref_k1"] / 0.1 - 1, -0.2, 0.2)
        assert after["kl/coef"] == pytest.approx(before["kl/coef"] * (1 + error * 8 / 100), rel=1e-5)


# --- the evaluation and the report --------------------------------------------------------------------------


def test_the_evaluation_agrees_with_the_gold_reward(pipeline):
    from jrlhf.lab import gold_maximum, larder_gold

    table = json.loads((folders(pipeline)["evaluate"] / "evaluation.json").read_text())
    assert list(table["policies"]) == [*POLICIES, "best_of_4"]
    split = table["policies"]["sft"]["splits"]["eval"]
    np.testing.assert_allclose(split["kl"], 0, atol=1e-5)  # the first policy is the reference
    prompts = [row["prompt"] for row in tiny.prompts.rows()]
    assert table["gold_max"] == pytest.approx(float(gold_maximum(prompts).mean()))
    for i, sample in enumerate(table["samples"]):
        for name, answer in sample["answers"].items():
            ended = bool(table["policies"][name]["splits"]["eval"]["ended"][i][0])
            gold = larder_gold([sample["prompt"]], [answer["text"]], [{"ended": ended}])[0]
            assert answer["gold"] == pytest.approx(float(gold), abs=1e-5)
    total = sum(np.asarray(v) for v in table["criteria"]["sft"]["eval"].values())
    np.testing.assert_allclose(total, split["gold"], atol=1e-5)


def test_best_of_n_grows_with_n_and_begins_at_the_policy(pipeline):
    table = json.loads((folders(pipeline)["best_of_n"] / "best_of_n.json").read_text())
    proxy = {n: np.mean(values) for n, values in table["per_prompt"]["proxy"].items()}
    assert list(proxy) == ["1", "2", "4"]
    assert proxy["1"] < proxy["2"] < proxy["4"]
    assert table["kl"] == pytest.approx([0.0, np.log(2) - 1 / 2, np.log(4) - 3 / 4])


def test_the_report_accepts_the_run(pipeline, tmp_path):
    page = write_report([pipeline], tmp_path / "report", QUIET)
    text = page.read_text()
    assert all(name in text for name in (*POLICIES, "best_of_4"))


# --- reuse --------------------------------------------------------------------------------------------------


def test_a_second_run_reuses_everything(pipeline, runs_dir):
    before = {path: path.stat().st_mtime_ns for path in runs_dir.glob("stages/*/*") if path.is_file()}
    out = StringIO()
    assert run(tiny.experiment, runs_dir, console=Console(file=out, width=200)) == pipeline
    assert out.getvalue().count("): reused") == len(tiny.experiment.stages)
    after = {path: path.stat().st_mtime_ns for path in runs_dir.glob("stages/*/*") if path.is_file()}
    assert after == before


# --- the commands on a finished run -------------------------------------------------------------------------


@pytest.fixture
def call(runs_dir, pipeline, capsys):
    def call(*args: str) -> str:
        code = main([args[0], "--runs-dir", str(runs_dir), *args[1:]])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    return call


def test_list_and_show(call, pipeline):
    assert pipeline.name in call("list")
    shown = call("show", pipeline.name)
    assert "held_out_accuracy" in shown
    assert shown.count("finished") >= len(tiny.experiment.stages)


def test_generate_answers_with_every_policy(call, pipeline):
    prompt = next(tiny.prompts.rows())["prompt"]
    options = ("--prompt", prompt, "--n", "2", "--max-new-tokens", "8")
    out = call("generate", pipeline.name, *options)
    assert [line for line in out.splitlines() if line in (*POLICIES, "pretrain")] == ["pretrain", *POLICIES]
    assert call("generate", pipeline.name, *options) == out
    assert call("generate", pipeline.name, *options, "--seed", "1") != out


def test_an_exported_policy_gives_the_same_log_probabilities(call, pipeline, tmp_path):
    call("export", f"{pipeline.name}:ppo", str(tmp_path / "hf"))
    model, params = load_hf(tmp_path / "hf")
    loaded = load_any(folders(pipeline)["ppo"])
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, (4, 20))
    mask = np.ones((4, 20), bool)
    ours, theirs = (
        m.logprobs(p, jax.numpy.asarray(tokens), jax.numpy.asarray(mask))[0]
        for m, p in ((loaded.model, loaded.params), (model, params))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert load_any(tmp_path / "hf").tokenizer.fingerprint() == loaded.tokenizer.fingerprint()


# --- one device and eight -----------------------------------------------------------------------------------


def test_sampled_answers_do_not_depend_on_the_mesh(pipeline, one_device_run):
    """Byte for byte: draws are by row, and log-probabilities differ by rounding only."""
    one, eight = (folders(r)["preferences"] / "preferences.jsonl" for r in (one_device_run, pipeline))
    assert one.read_bytes() == eight.read_bytes()


@pytest.mark.parametrize("name", STEPS)
def test_metrics_do_not_depend_on_the_mesh(pipeline, one_device_run, name):
    one, eight = (read_metrics(folders(r)[name]) for r in (one_device_run, pipeline))
    assert_close_metrics(one, eight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", STEPS)
def test_parameters_do_not_depend_on_the_mesh(pipeline, one_device_run, name):
    one, eight = (parameters(folders(r)[name]) for r in (one_device_run, pipeline))
    assert_close(one, eight, atol=1e-4, rtol=1e-3)


def parameters(folder: Path):
    """A reward model's are normalised: its loss knows no bias, so Adam makes steps of its gradient's rounding."""
    params, meta = load_params(folder / "model")
    if "normalization" not in meta:
        return params
    return fold_normalization(params, meta["normalization"]["mean"], meta["normalization"]["std"])
