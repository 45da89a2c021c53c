"""FLOPs of train steps: which tokens count, which passes there are, and what is logged of them."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from tiny_runs import folders, trained

from jrlhf.config import MeshConfig, UserError, from_dict
from jrlhf.models.config import ModelConfig
from jrlhf.models.flops import forward_flops, rows_passed, train_flops
from jrlhf.models.transformer import Model
from jrlhf.ops.on_policy import OnPolicyConfig
from jrlhf.sharding import make_mesh
from jrlhf.training import loop, utilisation
from jrlhf.training.artifacts import model_meta
from jrlhf.training.loop import LoopConfig, Phases, performance
from jrlhf.training.utilisation import OnlineFlops, Pass, flops_of_passes, passed, peak_flops
from jrlhf.types import PackedAnswers, Rollout, SequenceBatch

CONFIG = ModelConfig(
    vocab_size=50, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, context=32, remat="none"
)


def rollout(prompts, answers, slots=4, room=5) -> Rollout:
    """Answers of these lengths to prompts of those, in `slots` for a prompt and `room` for an answer."""
    mask = np.zeros((len(prompts), slots + room), bool)
    for row, p, a in zip(mask, prompts, answers, strict=True):
        row[slots - p : slots + a] = True
    return Rollout(mask.astype(np.int32), mask, mask[:, slots:], mask[:, slots:] * 0.5, mask[:, -1])


def counts(part):
    return tuple(float(x) for x in part)


# --- which tokens count -------------------------------------------------------------------------------------


def test_prompts_count_and_padding_does_not():
    real, padded = passed(CONFIG, rollout([2, 4], [3, 1]))
    # Two texts of five tokens: each token sees itself and those before it.
    assert counts(real) == (10, 15 + 15, 4)
    assert counts(padded) == (18, 2 * 9 * 9, 10)  # XLA computes what is masked


def test_a_prompt_that_goes_through_once_counts_once():
    real, padded = passed(CONFIG, rollout([2, 2], [3, 1]), group=2)
    assert counts(real) == (2 + 4, (1 + 2) + (3 + 4 + 5) + 3, 4)
    assert counts(padded) == (4 + 10, 4 * 9 + 10 * 9, 10)


def test_texts_in_one_row_do_not_see_each_other():
    segments = np.asarray([[1, 1, 1, 2, 2, 0]])
    positions = np.asarray([[0, 1, 2, 0, 1, 0]])
    mask = np.asarray([[False, True, True, False, True, False]])
    real, padded = passed(CONFIG, SequenceBatch(np.ones_like(segments), segments, positions, mask))
    assert counts(real) == (5, 6 + 3, 3)
    assert counts(padded) == (6, 36, 6)
    targets = np.asarray([[1, 2, 4]])
    _, padded = passed(CONFIG, SequenceBatch(np.ones_like(segments), segments, positions, mask, targets))
    assert padded.predicted == 3


def test_packed_answers_see_their_prompt_and_themselves():
    # A prompt of two tokens and answers of two and one.
    rows = PackedAnswers(
        tokens=np.ones((1, 6), np.int32),
        segment_ids=np.asarray([[1, 1, 1, 1, 1, 0]]),
        branches=np.asarray([[0, 0, 1, 1, 2, 0]]),
        positions=np.asarray([[0, 1, 2, 3, 2, 0]]),
        before=np.asarray([[1, 2, 1, 0]]), targets=np.ones((1, 4), np.int32), places=np.asarray([[1, 2, 1, 0]]),
        owners=np.asarray([[0, 0, 1, -1]]), ends=np.asarray([[3, 4]]), answers=np.asarray([[0, 1]]),
        lengths=np.asarray([[2, 1]]),
    )  # fmt: skip
    batch = type("Batch", (), {"tokens": rows})()
    real, padded = passed(CONFIG, batch)
    assert counts(real) == (5, 1 + 2 + 3 + 4 + 3, 3)
    assert counts(padded) == (6, 36, 4)


def test_a_window_bounds_what_a_token_attends_to(monkeypatch):
    config = replace(CONFIG, window=2, windowed=(True, False))
    real, padded = passed(config, rollout([2], [3]))
    assert real.keys == ((1 + 2 + 2 + 2 + 2) + 15) / 2
    assert padded.keys == 81  # XLA
    monkeypatch.setattr(utilisation, "attention_implementation", lambda *_: "splash")
    _, padded = passed(config, rollout([2], [3]))
    assert padded.keys == ((1 + 8 * 2) + 45) / 2


# --- which passes there are ---------------------------------------------------------------------------------


def test_a_whole_row_is_what_the_arithmetic_says():
    model = Model(CONFIG)
    ones = np.ones((3, 8), np.int32)
    batch = SequenceBatch(ones, ones, np.tile(np.arange(8), (3, 1)), ones.astype(bool))
    needed, done = flops_of_passes((Pass(model),), batch)
    assert needed == pytest.approx(train_flops(CONFIG, 24, 8), rel=1e-6)
    assert done > needed  # the masked half
    remat = Model(replace(CONFIG, remat="full"))
    again = flops_of_passes((Pass(remat),), batch)
    assert again.needed == needed
    assert again.done > done
    scored = flops_of_passes((Pass(model), Pass(model, False, 2.0)), batch)
    forward = forward_flops(CONFIG, rows_passed(CONFIG, 24, 8))
    assert float(scored.needed) == pytest.approx(float(needed) + 2 * forward, rel=1e-6)


def iteration(critic=None, updates=2.0, rounds=1, **options) -> tuple[float, dict]:
    """FLOPs of an iteration in forward passes of its answers, and what is logged."""
    model = Model(CONFIG)
    config = OnPolicyConfig(**options)
    samples = rollout([4, 4], [5, 5])
    batch = type("Batch", (), {"tokens": samples.tokens, "mask": samples.mask, "extra": ()})()
    batch.response_mask = samples.response_mask
    flops = OnlineFlops(model, critic, config)
    update = flops.of_update(batch).metrics() | {"policy/updates": updates}
    logged = flops.metrics(update, samples, rounds)
    forward = float(forward_flops(CONFIG, passed(CONFIG, samples)[0]))
    return float(logged["perf/model_flops"]) / forward, logged


def test_the_passes_of_an_iteration():
    # Drawn, scored by the reference and by the policy, and learned from (three forward passes) in each epoch.
    assert iteration(epochs=2, minibatches=1)[0] == pytest.approx(1 + 2 + 6)
    # Scored in the only update.
    assert iteration(kl="k3")[0] == pytest.approx(1 + 1 + 3)
    assert iteration(epochs=2, minibatches=1, rounds=3)[0] == pytest.approx(3 + 2 + 6)
    assert iteration(epochs=2, minibatches=1, stop_kl=0.1, updates=1.0)[0] == pytest.approx(1 + 2 + 3)
    # A critic of the same size, but for its head.
    assert iteration(Model(CONFIG, "scalar"), epochs=2)[0] == pytest.approx(1 + 3 + 12, rel=0.15)
    # A group's prompt is read once where it is drawn, and with `share_prompts` everywhere.
    alone, shared = iteration(group_size=2)[0], iteration(group_size=2, share_prompts=True)[0]
    assert shared < alone < iteration()[0]


def test_hardware_flops_are_not_logged_where_they_are_not_known():
    assert set(iteration()[1]) == {"perf/model_flops", "perf/hardware_flops"}
    assert set(iteration(length_buckets=2)[1]) == {"perf/model_flops"}


# --- what is logged -----------------------------------------------------------------------------------------


def test_utilisation_is_a_share_of_what_the_devices_can_do():
    metrics = {"perf/model_flops": 4e12, "perf/hardware_flops": 6e12}
    told = performance(metrics, 2.0, 0.5, peak=1e13)
    assert (told["perf/mfu"], told["perf/hfu"]) == (0.2, 0.3)
    assert not {"perf/mfu", "perf/hfu"} & set(performance(metrics, 2.0, 0.5))
    assert "perf/mfu" not in performance({}, 2.0, 0.5, peak=1e13)


def test_the_peak_is_of_all_devices_or_not_known(monkeypatch):
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    assert peak_flops(mesh, Model(CONFIG)) == 0.0  # a CPU
    from jrlhf.hardware import HARDWARE

    monkeypatch.setattr(utilisation, "hardware_of", lambda kind: HARDWARE["h100"])
    assert peak_flops(mesh, Model(CONFIG)) == 2 * HARDWARE["h100"].peak_f32
    half = Model(replace(CONFIG, dtype="bfloat16"))
    assert peak_flops(mesh, half) == 2 * HARDWARE["h100"].peak_bf16
    assert peak_flops(mesh, half, Model(CONFIG)) == 0.0  # there is no one peak


@pytest.mark.parametrize("name", ["pretrain", "sft", "reward_model", "ppo", "dpo"])
def test_every_stage_tells_its_flops(one_device_run, name):
    rows = trained(folders(one_device_run)[name])
    assert rows
    for row in rows:
        assert 0 < row["perf/model_flops"] < row["perf/hardware_flops"]
        assert "perf/mfu" not in row  # of a CPU nothing is known


def test_the_flops_of_pretraining(one_device_run):
    """Its rows are packed full: what a step needs lies between texts of one token and of whole rows."""
    folder = folders(one_device_run)["pretrain"]
    config = from_dict(ModelConfig, model_meta(folder, "lm")["model"])
    row = trained(folder)[0]
    tokens = round(8 * 40 * (1 - row["perf/pad_frac"]))
    predicted = row["train/tokens"]
    # Not every token is predicted, so that the head is counted apart.
    head = 6 * config.d_model * (tokens - predicted)
    low, high = (train_flops(config, tokens, length) - head for length in (1, 40))
    assert low < row["perf/model_flops"] < high


# --- phases ---------------------------------------------------------------------------------------------------


def test_a_breakdown_waits_in_every_so_many_steps_alone(monkeypatch):
    waited, finished = [], []
    monkeypatch.setattr(loop.jax, "block_until_ready", waited.append)
    config = LoopConfig(steps=6, breakdown_every=3)
    for step in range(6):
        phases = Phases(config, step, "state", lambda step=step: finished.append(step))
        phases.begin()
        phases.end("rollout", "answers", known=step == 0)
        phases.end("update", "new state")
        whole = {"time/rollout", "time/update"}
        assert set(phases.metrics) == (whole if step in (2, 5) else {"time/rollout"} if step == 0 else set())
    assert finished == [2, 5]
    assert waited == ["state", "answers", "new state"] * 2


def test_phases_that_come_again_are_added_up(monkeypatch):
    now = [1.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    phases = Phases(LoopConfig(steps=1, breakdown_every=1), 0, None, lambda: None)
    for seconds, phase in ((1.0, "rollout"), (0.5, "reward"), (2.0, "rollout")):
        now[0] += seconds
        phases.end(phase, None)
    assert phases.metrics == {"time/rollout": 3.0, "time/reward": 0.5}


def test_the_phases_of_an_iteration_with_a_reward_model(train):
    """Its own reward needs no text, so that nothing is timed where nothing waits."""
    ppo = replace(
        tiny.experiment.stages["ppo"], gold="", eval_prompts=None, loop=tiny.loop(4, breakdown_every=2)
    )
    rows = trained(train(timed=ppo)["timed"])
    phases = ("time/rollout", "time/reward", "time/make_batch", "time/update")
    for row in rows:
        assert all((phase in row) == (row["step"] % 2 == 0) for phase in phases)
    for row in rows[1::2]:
        assert sum(row[phase] for phase in phases) < row["time/step"]
        assert min(row[phase] for phase in phases) > 0


def test_breakdown_every_is_a_number_of_steps():
    with pytest.raises(UserError, match="breakdown_every must be zero or more"):
        LoopConfig(steps=1, breakdown_every=-1)


# --- several hosts --------------------------------------------------------------------------------------------


def test_the_slowest_host_is_found_and_named(monkeypatch):
    """Three hosts of which the second takes half a second longer in the steps of the second look."""
    lines = []
    console = type("Console", (), {"print": lambda self, line: lines.append(line)})()
    said = [np.zeros((3, 3)), np.asarray([[0.1, 0.0, 5.0], [0.6, 0.4, 9.0], [0.2, 0.1, 7.0]])]
    report = loop.HostReport(console)
    monkeypatch.setattr(report._times, "step", lambda own, data, peak: said.pop() if own == 0.25 else None)
    quiet = report.step({"time/step": 1.0, "perf/hbm_peak": 5.0}, own=0.5)
    assert quiet == {}
    found = report.step({"time/step": 1.0, "time/data": 0.0, "perf/hbm_peak": 5.0}, own=0.25)
    assert found == {
        "time/step_max_host": 0.6,
        "time/skew": pytest.approx(0.45),
        "time/data_max_host": 0.4,
        "perf/slowest_host": 1.0,
        "perf/hbm_peak": 9.0,
    }
    assert len(lines) == 1
    assert "process 1 of 3 takes 0.45 s" in lines[0]
    after = report.step({"time/step": 1.0, "perf/hbm_peak": 5.0}, own=0.5)
    assert after == {"perf/hbm_peak": 9.0}  # the others' is remembered


def test_hosts_tell_their_means_after_so_many_steps(monkeypatch):
    from jrlhf import hosts

    monkeypatch.setattr(hosts, "LOOK", 3)
    times = hosts.HostTimes()
    told = [
        times.step(own, 0.5, peak) for own, peak in ((1, 1), (2, 9), (6, 2), (1, 1), (1, 1), (1, 1), (0, 0))
    ]
    assert [x is None for x in told] == [True, True, True, False, True, True, False]
    np.testing.assert_allclose(told[3], [[3.0, 0.5, 9.0]])
    np.testing.assert_allclose(told[6], [[1.0, 0.5, 9.0]])
