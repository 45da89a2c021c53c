"""The loop itself: how long it runs, what it does with a loss that is not finite, and that it compiles once."""

import itertools
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from helpers import assert_close
from tiny_runs import QUIET, evaluated, folders, trained

from jrlhf.checkpoint import load_params
from jrlhf.config import MeshConfig, StageContext, UserError
from jrlhf.data.batching import Batches
from jrlhf.metrics import read_metrics
from jrlhf.optim import OptimConfig
from jrlhf.sharding import make_mesh
from jrlhf.training import loop, online
from jrlhf.training.data import BatchFeed, demonstration_batch
from jrlhf.training.loop import LoopConfig, guarded, is_finite
from jrlhf.training.loop import train as run_loop
from jrlhf.training.rewards import read_texts
from jrlhf.training.serve import load_any
from jrlhf.training.stages.language_model import hold_out
from jrlhf.types import TrainState

EXPLODING = OptimConfig(lr=1e30)


# --- steps and epochs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "rows", "steps"),
    [
        (LoopConfig(steps=7), 1000, 7),
        (LoopConfig(epochs=1, batch_size=32), 100, 3),
        (LoopConfig(epochs=2.5, batch_size=32), 100, 7),
        (LoopConfig(epochs=0.5, batch_size=32), 10, 1),  # at least one
    ],
)
def test_total_steps(config, rows, steps):
    assert config.total_steps(rows) == steps


def test_any_step_can_be_the_first_of_a_feed():
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    arrays = {"x": np.arange(20)}
    feed = BatchFeed(arrays, 4, 0, mesh)
    try:
        in_order = [np.asarray(feed(n)["x"]).tolist() for n in range(8)]
        assert [np.asarray(feed(n)["x"]).tolist() for n in (6, 7, 2, 2)] == [
            in_order[n] for n in (6, 7, 2, 2)
        ]
    finally:
        feed.close()
    assert sorted(itertools.chain(*in_order[:5])) == list(range(20))  # an epoch has every row once


# --- a loss that is not finite ------------------------------------------------------------------------------


def test_an_exploding_run_stops_and_leaves_the_batch(train, one_device_run, one_device_runs):
    sft = replace(tiny.experiment.stages["sft"], optim=EXPLODING)
    with pytest.raises(UserError) as error:
        train(explodes=sft)
    message = str(error.value)
    step = int(message.split(":")[0].removeprefix("step "))
    assert step > 1  # the first loss is that of sound parameters
    assert "on_nonfinite" in message
    (file,) = one_device_runs.glob(f"stages/sft-*/nonfinite_step_{step}.npz")
    assert str(file) in message
    assert f"the last checkpoint is of step {2 if step > 2 else 0}." in message
    rows = read_metrics(file.parent)
    assert rows[-1]["step"] == step  # the bad step is on record
    assert not np.isfinite([rows[-1]["train/loss"], rows[-1]["train/grad_norm"]]).all()
    with np.load(file, allow_pickle=False) as batch:
        assert set(batch) == {"tokens", "segment_ids", "positions", "loss_mask", "targets"}
        assert {batch[name].shape for name in batch if name != "targets"} == {(8, 40)}
        assert batch["loss_mask"].dtype == bool
        data = demonstration_batch(
            sft.data, load_any(folders(one_device_run)["sft"]).tokenizer, 40, "error", QUIET
        )
        kept, _ = hold_out(data, sft.eval_rows)
        index = Batches(len(kept.tokens), 8, 0).indices(step - 1)
        np.testing.assert_array_equal(batch["tokens"], kept.tokens[index])


def test_an_exploding_ppo_run_stops_too(train, one_device_runs):
    ppo = replace(tiny.experiment.stages["ppo"], optim=EXPLODING, eval_prompts=None)
    with pytest.raises(UserError, match=r"step \d: .*(loss|norm) is (nan|inf)"):
        train(explodes=ppo)
    (file,) = one_device_runs.glob("stages/ppo-*/nonfinite_step_*.npz")
    with np.load(file, allow_pickle=False) as batch:
        assert {"tokens", "logprobs", "advantages", "metrics/kl/ref_k1"} <= set(batch)


def test_skipping_goes_on_with_the_last_sound_parameters(train):
    loop = replace(tiny.loop(5), on_nonfinite="skip")
    folder = train(skips=replace(tiny.experiment.stages["sft"], optim=EXPLODING, loop=loop))["skips"]
    assert all(0 <= row["time/data"] < row["time/step"] for row in trained(folder))
    skipped = [row["train/skipped"] for row in trained(folder)]
    assert len(skipped) == 5
    assert skipped[0] == 0
    assert skipped[-1] == 1
    params, _ = load_params(folder / "model")
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_a_skipped_step_leaves_parameters_and_optimiser_as_they_were():
    def step(state, batch):
        new = jax.tree.map(lambda p: p - batch, state.params)
        extra = {"mean": state.extra["mean"] + batch}
        return state._replace(step=state.step + 1, params=new, opt_state=state.opt_state + 1, extra=extra), {
            "train/loss": batch,
            "train/grad_norm": jnp.float32(1.0),
            "policy/ratio_max": jnp.float32(jnp.inf),
        }

    state = TrainState(
        jnp.int32(0),
        {"w": jnp.ones(3)},
        jnp.float32(0.0),
        None,
        jax.random.key(0),
        {"mean": jnp.float32(0.0)},
    )
    stop = LoopConfig(steps=1)
    safe = guarded(step, replace(stop, on_nonfinite="skip"))
    state, metrics = safe(state, None, jnp.float32(0.25))
    assert metrics["train/skipped"] == 0  # an infinite ratio is no loss
    assert_close(state.params, {"w": jnp.full(3, 0.75)})
    for bad in (jnp.nan, jnp.inf):
        after, metrics = safe(state, None, jnp.float32(bad))
        assert metrics["train/skipped"] == 1
        assert_close(after.params, state.params, atol=0)
        assert after.opt_state == state.opt_state == 1
        assert after.extra["mean"] == state.extra["mean"] == 0.25
        assert after.step == state.step + 1  # the data go on


@pytest.mark.parametrize("name", ["train/loss", "policy/grad_norm", "value/loss"])
def test_what_counts_as_not_finite(name):
    sound = {"train/loss": jnp.float32(1.0), "kl/ref_k1": jnp.float32(jnp.nan)}
    assert is_finite(sound)
    assert not is_finite(sound | {name: jnp.float32(jnp.nan)})


# --- compilation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pretrain", "sft", "reward_model", "ppo", "dpo"])
def test_nothing_is_compiled_after_the_first_step_and_the_first_evaluation(one_device_run, name):
    folder = folders(one_device_run)[name]
    counts = {row["step"]: row["perf/compile_count"] for row in trained(folder)}
    first = evaluated(folder)[0]["step"]
    assert len({count for step, count in counts.items() if step <= first}) == 1
    assert len({count for step, count in counts.items() if step > first}) <= 1


# --- time ---------------------------------------------------------------------------------------------------


def test_a_rollout_is_a_part_of_its_own_step(train, monkeypatch):
    """Every other rollout takes long: it is in the time of its own step, not in that of a neighbour."""
    calls = itertools.count()

    def slow(*args):
        time.sleep(0.4 * (next(calls) % 2))
        return read_texts(*args)

    monkeypatch.setattr(online, "read_texts", slow)
    ppo = replace(tiny.experiment.stages["ppo"], eval_prompts=None, loop=tiny.loop(6))
    rows = trained(train(timed=ppo)["timed"])
    assert [row["time/rollout"] > 0.4 for row in rows] == [False, True] * 3
    assert [row["time/step"] > 0.4 for row in rows[1:]] == [True, False] * 2 + [True]  # the first compiles
    assert all(0 < row["time/rollout"] < row["time/step"] for row in rows)


def test_an_evaluation_is_not_in_the_time_of_a_step(tmp_path, monkeypatch):
    slept = 0.5
    ctx = StageContext("x", tiny.experiment.stages["sft"], tmp_path, {}, {}, 0, MeshConfig(), QUIET, tmp_path)
    state = TrainState(np.int32(0), {"w": jax.numpy.zeros(())}, (), None, jax.random.key(0))
    step = lambda state, n, finish: (state, {"train/loss": jax.numpy.float32(n)}, {})  # noqa: E731

    def evaluate(state, step):
        time.sleep(slept)
        return {"eval/loss": 0.0}

    loop = LoopConfig(steps=4, eval_every=1, checkpoint_every=0)
    run_loop(ctx, loop, 4, state, lambda: state, step, evaluate)
    assert all(row["time/step"] < slept for row in trained(tmp_path))


# --- where the time went ----------------------------------------------------------------------------------------


def test_goodput_is_the_share_of_the_time_that_steps_took(monkeypatch):
    """Two seconds to restore, a step of three, an evaluation of one, and a step of two of which one was compiling."""
    now = [10.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    clock = loop.Clock()
    now[0] = 12.0
    clock.restart()
    now[0] = 15.0
    assert clock.lap() == (3.0, 3 / 5)
    now[0] = 16.0
    clock.restart()
    monkeypatch.setattr(loop.COMPILATIONS, "seconds", loop.COMPILATIONS.seconds + 1.0)
    now[0] = 18.0
    assert clock.lap() == (2.0, pytest.approx(4 / 8))
