"""Alarms: each rule at the step that its definition says, quiet on what is healthy, the same after a kill, and what
they do to training."""

import json
import math
import shutil
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rich.console import Console
from tiny_runs import QUIET, folders, jsonl, lasting, one_device, only

from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.checkpoint import Checkpointer, load_params
from jrlhf.config import MeshConfig, StageContext, UserError
from jrlhf.data.tokenizer import load_tokenizer
from jrlhf.experiment import run
from jrlhf.metrics import MetricLogger
from jrlhf.optim import OptimConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.data import preference_arrays, split_by_prompt
from jrlhf.training.loop import LoopConfig
from jrlhf.training.loop import train as run_loop
from jrlhf.training.monitors import RULES, Alarms, Monitor
from jrlhf.training.online import compared, share_outside
from jrlhf.training.rewards import disagreement, make_reward, on_host_scores, trained_range
from jrlhf.training.stages.length_corrected import as_samples
from jrlhf.types import TrainState

HEALTHY = {
    "kl/ref_k1": 0.5,
    "rollout/len_mean": 10.0,
    "reward/score/mean": 0.0,
    "reward/gold/mean": 0.0,
    "reward/gold/std": 1.0,
    "policy/entropy": 0.6,
    "rollout/eos_rate": 1.0,
    "rollout/repeat_rate": 0.02,
    "reward/out_of_range": 0.02,
    "reward/disagreement/mean": 0.3,
}


def steps(count: int, **courses) -> list[dict]:
    """Rows of metrics, healthy but for these: {metric's last part before /mean: values, the last of them lasting}."""
    rows = []
    for n in range(count):
        changed = {name: course[min(n, len(course) - 1)] for name, course in courses.items()}
        rows.append(HEALTHY | changed)
    return rows


def watch(rows: list[dict], **changed) -> tuple[Monitor, list[dict]]:
    """(the monitor after these steps, what it logged at each)"""
    monitor = Monitor(Alarms(**{"window": 2, "patience": 2} | changed), "gold")
    return monitor, [monitor.observe(n, row) for n, row in enumerate(rows, 1)]


# --- the rules ----------------------------------------------------------------------------------------------


def test_nothing_is_said_of_a_run_that_only_gets_better():
    rng = np.random.default_rng(0)
    rows = [
        {name: value * (1 + 0.1 * rng.standard_normal()) for name, value in HEALTHY.items()}
        | {
            "reward/score/mean": 0.05 * n + 0.1 * rng.standard_normal(),
            "reward/gold/mean": 0.04 * n + 0.1 * rng.standard_normal(),
        }
        for n in range(60)
    ]
    monitor = Monitor(Alarms(), "gold")
    said = [monitor.observe(n, row) for n, row in enumerate(rows, 1)]
    assert monitor.raised == []
    assert set(said[0]) == {f"alarm/{rule}" for rule in RULES if rule != "kl"}  # off by default
    assert all(value == 0.0 for row in said for value in row.values())


def test_length_is_held_against_the_first_batch():
    """Answers that grow from the first update on: the mean over the first steps would hide it."""
    monitor, _ = watch(steps(12, **{"rollout/len_mean": [10.0, 14.0, 17.0, 18.0]}), window=5)
    assert [(alarm.rule, alarm.step) for alarm in monitor.raised] == [("length", 6)]  # 15.4 and 17 after 13.4


# Five healthy steps, then for good: the mean over 2 steps passes at step 6 or 7, for the second time a step later.
@pytest.mark.parametrize(
    ("rule", "metric", "before", "after", "step", "value"),
    [
        ("kl", "kl/ref_k1", 0.5, 1.6, 8, 1.6),  # 1.05 at step 6, 1.6 at steps 7 and 8
        ("kl_per_token", "kl/ref_k1", 0.5, 4.9, 7, 0.49),  # 0.27 at step 6
        ("length", "rollout/len_mean", 10.0, 21.0, 7, 2.1),  # 1.55 times at step 6
        ("repeats", "rollout/repeat_rate", 0.02, 0.2, 8, 0.18),
        ("endless", "rollout/eos_rate", 1.0, 0.7, 7, 0.3),
        ("entropy", "policy/entropy", 0.6, 0.006, 8, 0.01),
        ("out_of_range", "reward/out_of_range", 0.02, 0.5, 8, 0.5),
        ("disagreement", "reward/disagreement/mean", 0.3, 0.75, 8, 2.5),
    ],
)
def test_a_rule_is_raised_by_its_metric_alone(rule, metric, before, after, step, value):
    monitor, said = watch(steps(12, **{metric: [before] * 5 + [after]}), kl=1.2)
    (alarm,) = (a for a in monitor.raised if a.rule == rule)
    assert {a.rule for a in monitor.raised} <= {rule, "kl", "kl_per_token"}  # kl has two
    assert (alarm.step, alarm.threshold) == (step, getattr(monitor.alarms, rule))
    assert math.isclose(alarm.value, value, rel_tol=1e-6)
    assert [row[f"alarm/{rule}"] for row in said] == [0.0] * (step - 1) + [1.0] * (12 - step + 1)
    off, _ = watch(steps(12, **{metric: [before] * 5 + [after]}), **{rule: 0.0})
    assert rule not in {a.rule for a in off.raised}


GOLD = [0.0, 0.0, 0.5, 1.0, 1.0, 0.6]  # rises by 1 and falls to 0.6: four tenths of its rise


@pytest.mark.parametrize(
    ("gold", "proxy", "threshold", "raised"),
    [
        (GOLD, [0.0, 0.5, 1.0], 0.3, [8]),  # means of two: 1, 0.8, 0.6, 0.6: a fall of 0.4 at steps 7 and 8
        (GOLD, [0.0, 0.5, 1.0], 0.45, []),
        (GOLD, [0.0, 0.5, 1.0, 1.0, 1.0, 0.6], 0.3, []),  # the reward fell as well: no hacking
        # It never rose: the scale is half of the standard deviation at the start, 0.5.
        ([0.0, 0.0, 0.0, 0.0, 0.0, -0.1], [0.0, 0.5, 1.0], 0.3, []),
        ([0.0, 0.0, 0.0, 0.0, 0.0, -0.2], [0.0, 0.5, 1.0], 0.3, [8]),
    ],
)
def test_the_held_out_reward_falls_while_the_reward_does_not(gold, proxy, threshold, raised):
    courses = {"reward/gold/mean": gold, "reward/score/mean": proxy}
    monitor, _ = watch(steps(12, **courses), held_out=threshold)
    assert [a.step for a in monitor.raised if a.rule == "held_out"] == raised


def test_an_alarm_ends_and_is_told_once():
    course = [10.0] * 4 + [30.0] * 4 + [10.0] * 4 + [30.0] * 4
    said: list[str] = []
    console = Console(width=500, file=type("To", (), {"write": said.append, "flush": lambda self: None})())
    monitor = Monitor(Alarms(window=1, patience=2), "gold", console)
    rows = steps(16, **{"rollout/len_mean": course})
    on = [monitor.observe(n, row)["alarm/length"] for n, row in enumerate(rows, 1)]
    # Two steps running to begin, and two to end.
    assert on == [0.0] * 5 + [1.0] * 4 + [0.0] * 4 + [1.0] * 3
    assert [(a.step, a.rule) for a in monitor.raised] == [(6, "length")]
    text = "".join(said)
    assert text.count("alarm at step") == 1
    assert "alarm at step 6: length is 3, above 1.35" in text
    assert "LengthCorrected" in text  # what to try


def test_one_wild_step_is_no_alarm():
    monitor, _ = watch(steps(12, **{"rollout/len_mean": [10.0] * 5 + [28.0, 10.0]}), window=1, patience=2)
    assert monitor.raised == []


def test_a_metric_that_is_not_there_or_not_finite_says_nothing():
    rows = steps(12, **{"rollout/len_mean": [10.0] * 5 + [math.inf, 10.0]})
    monitor, said = watch([{k: v for k, v in row.items() if "gold" not in k} for row in rows])
    assert monitor.raised == []
    assert "alarm/held_out" not in said[-1]
    assert said[-1]["alarm/length"] == 0.0


def test_a_step_without_a_number_does_not_count_the_one_before_again():
    rows = steps(12, **{"rollout/len_mean": [10.0] * 5 + [28.0, math.nan, math.nan, 10.0]})
    monitor, _ = watch(rows, window=1, patience=2)
    assert monitor.raised == []


def best_of(gold, **changed) -> list[int]:
    """The best step after each, where every step's policy is a candidate."""
    monitor = Monitor(Alarms(**{"window": 2, "on_alarm": "rollback"} | changed), "gold")
    found = []
    for n, row in enumerate(steps(len(gold), **{"reward/gold/mean": gold}), 1):
        monitor.observe(n, row)
        monitor.is_best(n)
        found.append(monitor.best_step)
    return found


def test_a_rollback_goes_to_the_best_policy_also_where_the_rule_of_the_held_out_reward_is_off():
    gold = [1.0, 1.0, 0.0, 3.0, 3.0, 0.0]  # means of two: 1, 0.5, 1.5, 3, 1.5
    assert best_of(gold) == best_of(gold, held_out=0.0) == [0, 0, 0, 4, 5, 5]


def test_nothing_but_the_start_is_gone_back_to_where_it_only_got_worse():
    assert best_of([1.0, 1.0, 0.8, 0.6]) == [0, 0, 0, 0]


def test_a_reward_that_was_not_finite_in_the_first_steps():
    rows = steps(12, **{"reward/gold/mean": GOLD, "reward/score/mean": [math.nan, 0.5, 1.0]})
    monitor, _ = watch(rows)
    assert [a.step for a in monitor.raised if a.rule == "held_out"] == [8]


def test_a_restored_monitor_goes_on_as_if_nothing_had_happened():
    """At every step the state goes through JSON into a fresh monitor."""
    courses = {
        "reward/gold/mean": GOLD,
        "reward/score/mean": [0.0, 0.3, 1.0],
        "rollout/len_mean": [10.0] * 8 + [20.0],
    }
    rows = steps(16, **courses)
    whole, said = watch(rows)
    again = Monitor(whole.alarms, "gold")
    for n, row in enumerate(rows, 1):
        after = Monitor(whole.alarms, "gold")
        after.restore(json.loads(json.dumps(again.state())))
        again = after
        assert again.observe(n, row) == said[n - 1]
    assert {a.rule for a in again.raised} == {"held_out", "length"}
    assert again.raised == whole.raised
    assert again.state() == whole.state()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"window": 0}, "alarms.window"),
        ({"kl": -1.0}, "alarms.kl"),
        ({"length": 0.5}, "alarms.length is a factor of growth"),
        ({"entropy": 1.5}, "alarms.entropy"),
        ({"held_out": math.inf}, "alarms.held_out"),
    ],
)
def test_thresholds_without_meaning(wrong, says):
    with pytest.raises(UserError, match=says):
        Alarms(**wrong)


# --- what they read -----------------------------------------------------------------------------------------


def test_two_rewards_side_by_side():
    rng = np.random.default_rng(1)
    scores, others = rng.standard_normal((2, 32)).astype(np.float32)
    others = 0.5 * scores + others
    beside = compared(scores, others)
    assert np.isclose(beside["corr"], np.corrcoef(scores, others)[0, 1], atol=1e-5)
    assert np.isclose(beside["mean"], others.mean(), atol=1e-6)
    assert np.isclose(beside["std"], others.std(), atol=1e-6)
    assert np.isclose(beside["gap"], scores.mean() - others.mean(), atol=1e-6)
    assert float(compared(scores, np.zeros_like(scores))["corr"]) == 0.0
    assert float(share_outside(np.asarray([-3.0, 0.0, 1.0, 2.5], np.float32), (-2.0, 2.0))) == 0.5


def test_an_ensemble_says_how_far_its_members_differ():
    rng = np.random.default_rng(2)
    one, heads = rng.standard_normal((1, 6)), rng.standard_normal((3, 6))
    said = disagreement((one.astype(np.float32), heads.astype(np.float32)))
    np.testing.assert_allclose(said, np.std(np.concatenate([one, heads]), axis=0), rtol=1e-5)


def test_a_reward_model_knows_the_range_of_its_training_answers(one_device_run):
    """Of the answers that it learned from 2% are outside; where a model says nothing of it there is no range."""
    left = folders(one_device_run)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    tokenizer = load_tokenizer(left["sft"] / "tokenizer")
    rows, _ = split_by_prompt(jsonl(left["preferences"] / "preferences.jsonl"), 0.25)
    samples, _ = as_samples(
        preference_arrays(rows, tokenizer, 40, "error", QUIET), tokenizer.pad_id, tokenizer.eos_ids
    )
    reward = make_reward("reward_model", left, mesh, tokenizer)
    low, high = reward.trained_on
    assert low < 0 < high  # normalised to mean 0
    scores = on_host_scores(reward, samples, None, mesh).values
    assert 0 < float(share_outside(scores, reward.trained_on)) <= 0.04  # one answer at either end, or two
    assert make_reward("larder_gold", left, mesh, tokenizer).trained_on is None
    assert trained_range({"normalization": {"mean": 0.0, "std": 1.0}}) is None
    assert trained_range({"normalization": {"mean": 1.0, "std": 2.0, "range": [-3.0, 5.0]}}) == (-2.0, 2.0)
    row = jsonl(left["ppo"] / "metrics.jsonl")[0]
    assert 0 <= row["reward/out_of_range"] <= 1


# --- in a stage ---------------------------------------------------------------------------------------------

STEADY = OptimConfig(lr=1e-2)  # the same updates, however many are planned
STAGE = replace(
    tiny.experiment.stages["ppo"],
    reward="larder_gold",
    critic="policy",
    gold="",
    watch=("reward_model",),
    algorithm=PPOConfig(epochs=1, minibatches=1),
    optim=STEADY,
    critic_optim=STEADY,
    eval_prompts=None,
    loop=tiny.loop(6),
)
# The KL is above nothing from step 2 on: the alarm is raised by step 3, known in step 4, which is the last.
SOON = Alarms(kl=1e-9, kl_per_token=0.0, window=1, patience=2)


def params(folder):
    return load_params(folder / "model")[0]


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def results(folder):
    return json.loads((folder / "done.json").read_text())["results"]


@pytest.fixture(scope="module")
def plain(one_device_run, one_device_runs):
    """{steps: folder} of runs that end by themselves."""
    stages = {f"after_{n}": replace(STAGE, alarms=SOON, loop=replace(STAGE.loop, steps=n)) for n in (2, 4, 6)}
    with one_device():
        left = folders(
            run(
                only("pretrain", "sft", "preferences", "reward_model", **stages),
                one_device_runs,
                console=QUIET,
            )
        )
    return {n: left[f"after_{n}"] for n in (2, 4, 6)}


def test_alarms_are_logged_and_kept(plain):
    rows = jsonl(plain[6] / "metrics.jsonl")
    assert [row["alarm/kl"] for row in rows] == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert len(rows) == 6  # "log" goes on
    (alarm,) = results(plain[6])["alarms"]
    assert (alarm["step"], alarm["rule"], alarm["threshold"]) == (3, "kl", 1e-9)
    assert np.isclose(alarm["value"], rows[2]["kl/ref_k1"])
    assert "ended_at" not in results(plain[6])
    # The watched reward model beside the reward.
    for name in ("mean", "std", "corr"):
        assert np.isfinite(rows[0][f"reward/reward_model/{name}"])
    gap = rows[0]["reward/score/mean"] - rows[0]["reward/reward_model/mean"]
    assert np.isclose(rows[0]["reward/gold_proxy_gap"], gap, atol=1e-5)


def test_stop_leaves_the_policy_of_that_step(plain, train):
    left = train(stopped=replace(STAGE, alarms=replace(SOON, on_alarm="stop")))["stopped"]
    assert results(left)["ended_at"] == results(left)["policy_of_step"] == 4
    assert [lasting(row) for row in jsonl(left / "metrics.jsonl")] == [
        lasting(row) for row in jsonl(plain[6] / "metrics.jsonl")[:4]
    ]
    assert_equal(params(left), params(plain[4]))


@pytest.fixture(scope="module")
def rolled_back(plain, one_device_runs):
    """A policy may be kept every second step."""
    alarms = replace(SOON, on_alarm="rollback", snapshot_every=2)
    stage = replace(STAGE, alarms=alarms, eval_prompts=tiny.prompts)
    before = only("pretrain", "sft", "preferences", "reward_model", rolled_back=stage)
    with one_device():
        return folders(run(before, one_device_runs, console=QUIET))["rolled_back"]


def test_rollback_leaves_the_policy_that_was_best_by_the_held_out_reward(plain, rolled_back):
    held = {row["step"]: row["reward/reward_model/mean"] for row in jsonl(plain[6] / "metrics.jsonl")}
    best = max((1, 2, 4), key=lambda step: held[step])  # the first batch is the start's
    best = 0 if best == 1 else best
    found = results(rolled_back)
    assert (found["ended_at"], found["policy_of_step"]) == (4, best)
    assert_equal(params(rolled_back), params(plain[best]))
    # It is what the last evaluation looked at.
    assert jsonl(rolled_back / "metrics.jsonl")[-1]["step"] == 4
    assert "eval/reward_model/mean" in jsonl(rolled_back / "metrics.jsonl")[-1]


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", [3, 4])
def test_killed_at_a_step_and_begun_again(rolled_back, one_device_runs, tmp_path, monkeypatch, moment):
    """Killed when the metrics of a step are written: after the checkpoint of step 2, in step 3, which raises the alarm,
    and in step 4, at which it ends."""
    runs = shutil.copytree(one_device_runs, tmp_path / "runs")
    mine = runs / "stages" / rolled_back.name
    shutil.rmtree(mine)
    log = MetricLogger.log

    def log_or_die(self, step, *args, **kwargs):
        if step == moment:
            raise Killed
        log(self, step, *args, **kwargs)

    stage = replace(
        STAGE, alarms=replace(SOON, on_alarm="rollback", snapshot_every=2), eval_prompts=tiny.prompts
    )
    again = only("pretrain", "sft", "preferences", "reward_model", rolled_back=stage)
    with one_device():
        with monkeypatch.context() as patch:
            patch.setattr(MetricLogger, "log", log_or_die)
            with pytest.raises(Killed):
                run(again, runs, console=QUIET)
        assert not (mine / "done.json").exists()
        run(again, runs, console=QUIET)
    ours, theirs = ([lasting(row) for row in jsonl(f / "metrics.jsonl")] for f in (mine, rolled_back))
    assert ours == theirs
    assert results(mine) == results(rolled_back)
    assert_equal(params(mine), params(rolled_back))


def test_a_checkpoint_comes_after_the_policy_that_it_would_go_back_to(tmp_path, monkeypatch):
    """A run killed between the two could not go back."""
    commit, committed = Checkpointer._commit, []

    def slow(self, *args):
        time.sleep(0.3 * (self.folder.name == "best"))
        commit(self, *args)
        committed.append((self.folder.name, args[0]["step"]))

    monkeypatch.setattr(Checkpointer, "_commit", slow)
    ctx = StageContext("x", STAGE, tmp_path, {}, {}, 0, MeshConfig(), QUIET, tmp_path)
    state = TrainState(jnp.int32(0), {"policy": {"w": jnp.zeros(())}}, (), None, jax.random.key(0))
    rows = steps(3, **{"reward/gold/mean": [0.0, 1.0, 2.0]})
    monitor = Monitor(Alarms(on_alarm="rollback", window=1, snapshot_every=2), "gold")
    step = lambda state, n, finish: (state, rows[n], {})  # noqa: E731
    loop = LoopConfig(steps=3, checkpoint_every=2, eval_every=0)
    run_loop(ctx, loop, 3, state, lambda: state, step, monitor=monitor)
    assert committed == [("best", 0), ("best", 2), ("checkpoints", 2)]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"watch": ("larder_gold",)}, "watch"),
        ({"watch": ("reward_model", "reward_model")}, "each once"),
        ({"watch": ("larder_gole",)}, "watch 'larder_gole' is neither a stage nor a known reward"),
        ({"watch": ("score",)}, "'score' cannot be watched by this name"),
        ({"watch": (), "gold": "score"}, "'score' cannot be watched by this name"),
        ({"watch": (), "alarms": Alarms(on_alarm="rollback")}, "name one in watch"),
    ],
)
def test_mistakes_are_told_before_anything_runs(changed, says, tmp_path):
    score = tiny.experiment.stages["reward_model"]
    wrong = only("pretrain", "sft", "preferences", "reward_model", score=score, ppo=replace(STAGE, **changed))
    with pytest.raises(UserError, match=says):
        run(wrong, tmp_path, console=QUIET)
