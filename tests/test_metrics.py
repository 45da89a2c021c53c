"""Metrics: what is written is what was logged, and a resumed run's file is an uninterrupted run's."""

import io
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jrlhf.config import UserError
from jrlhf.metrics import NAMES, MetricLogger, check_name, progress, read_metrics

REPOSITORY = Path(__file__).resolve().parent.parent


def write(folder, steps, resume_step=None, **options):
    logger = MetricLogger(folder, resume_step=resume_step, **options)
    for step in steps:
        logger.log(step, {"train/loss": jnp.float32(1) / jnp.float32(step + 3), "time/step": 0.1 * step})
    logger.close()


def board_events(folder):
    """(step, tag, value) and ("start", step) of all event files, oldest file first."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted((folder / "tb").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its crc, the event, its crc
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.HasField("session_log") and event.session_log.status == 1:
                events.append(("start", event.step))
            events += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return events


def test_values_come_back_bit_for_bit(tmp_path):
    values = {
        "train/loss": jnp.float32(0.1),
        "policy/loss": 0.1,
        "value/loss": np.float64(1e-300) / 3,
        "kl/ref_k1": jnp.bfloat16(1 / 3),
        "train/tokens": jnp.int32(2**31 - 1),
        "train/lr": 5e-324,
    }
    logger = MetricLogger(tmp_path)
    logger.log(7, values)
    logger.close()
    (row,) = read_metrics(tmp_path)
    assert row == {"step": 7, **{name: float(v) for name, v in values.items()}}
    assert isinstance(row["train/tokens"], int)


def test_not_finite_values_are_strings_in_the_file_and_floats_when_read(tmp_path):
    logger = MetricLogger(tmp_path)
    logger.log(0, {"train/loss": jnp.float32(jnp.nan), "kl/coef": math.inf, "kl/ref_k1": -jnp.inf})
    logger.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["train/loss"] == "nan"
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["train/loss"])
    assert (row["kl/coef"], row["kl/ref_k1"]) == (math.inf, -math.inf)


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path):
    write(tmp_path / "whole", range(10))
    write(tmp_path / "killed", range(8))  # the last checkpoint was of step 5
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')
    assert [row["step"] for row in read_metrics(tmp_path / "killed")] == list(range(8))
    write(tmp_path / "killed", range(6, 10), resume_step=5)
    whole, killed = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed"))
    assert whole == killed


def test_tensorboard_is_purged_after_the_checkpoint(tmp_path):
    write(tmp_path, range(8))
    write(tmp_path, range(6, 10), resume_step=5)
    events = board_events(tmp_path)
    assert ("start", 6) in events
    later = events[events.index(("start", 6)) :]
    assert [e[0] for e in later if e[1] == "train/loss"] == [6, 7, 8, 9]
    assert (6, "train/loss", pytest.approx(1 / 9, rel=1e-6)) in later


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    write(tmp_path, range(4))
    write(tmp_path, range(2))
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def test_a_line_is_on_disk_when_log_returns(tmp_path):
    """A process that is killed right after `log` has lost nothing."""
    code = f"""
import os, signal
from jrlhf.metrics import MetricLogger
logger = MetricLogger({str(tmp_path)!r})
logger.log(1, {{"train/loss": 0.5}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert read_metrics(tmp_path) == [{"step": 1, "train/loss": 0.5}]


def test_every_thins_steps_but_not_evaluations(tmp_path):
    logger = MetricLogger(tmp_path, every=5)
    for step in range(12):
        logger.log(step, {"train/loss": 1.0})
    logger.log(7, {"eval/gold/mean": 1.0}, always=True)
    logger.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 5, 10, 7]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("train/lss", "train/loss"),
        ("wibble", "Known: adv/mean"),
        ("eval/", "NAMES"),
        ("policy/loss/x", "policy/loss"),
    ],
)
def test_an_unlisted_name_is_refused_with_a_suggestion(tmp_path, name, hint):
    logger = MetricLogger(tmp_path, every=10)
    with pytest.raises(ValueError, match=hint):
        logger.log(1, {name: 1.0})  # even at a step that is not written
    logger.close()


def test_names_of_the_patterns():
    for name in ("reward/total/mean", "reward/gold/std", "eval/gold/ci_low", "eval/pass@8", "time/rollout"):
        check_name(name)
    with pytest.raises(ValueError, match="is not a metric"):
        check_name("reward/a/b/mean")


def test_an_array_is_not_a_metric(tmp_path):
    logger = MetricLogger(tmp_path)
    with pytest.raises(ValueError, match=r"train/loss has shape \(2,\)"):
        logger.log(1, {"train/loss": jnp.ones(2)})
    logger.close()


def test_a_broken_line_in_the_middle_is_a_user_error_with_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="missing"):
        read_metrics(tmp_path / "nowhere")


def test_the_console_gets_a_line(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    logger = MetricLogger(tmp_path, console)
    logger.log(3, {"train/loss": 0.25})
    logger.close()
    assert console.file.getvalue() == "step 3  train/loss 0.25\n"


def test_the_guide_lists_the_same_names():
    rows = re.findall(
        r"^\| `(.+?)` \| (.+?) \| (.+?) \|$", (REPOSITORY / "docs/metrics.md").read_text(), re.M
    )
    listed = {
        name: ("" if unit == "none" else unit, meaning.replace("&#124;", "|")) for name, unit, meaning in rows
    }
    assert listed == {name: tuple(known) for name, known in NAMES.items()}


def test_progress_without_a_terminal_is_a_line_now_and_then():
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    with progress(console, 100, "sft", start=20, interval=3600) as bar:
        for step in range(21, 101):
            bar.update(step, {"loss": jnp.float32(step)})
    assert console.file.getvalue() == "sft 100/100 0:00:00 left  loss 100\n"
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    with progress(console, 3, "sft", interval=0) as bar:
        for step in (1, 2, 3):
            bar.update(step)
    assert console.file.getvalue().count("\n") == 3


def test_progress_on_a_terminal_shows_steps_and_metrics():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with progress(console, 10, "ppo", start=4) as bar:
        bar.update(10, {"reward": 0.5})
    shown = console.file.getvalue()
    assert "ppo" in shown
    assert "10/10" in shown
    assert "reward 0.5" in shown
