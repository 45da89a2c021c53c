"""Traces of some steps of a training loop."""

import os
import signal

import jax.numpy as jnp
import pytest

from jrlhf import cli
from jrlhf.config import UserError
from jrlhf.training import profiling
from jrlhf.training.profiling import Profiling


@pytest.fixture
def traced(monkeypatch):
    """[(first step, step before which it ended)], in place of traces."""
    seen = []
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda folder: seen.append(str(folder)))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: seen.append("end"))
    return seen


def steps(asked: Profiling, traced: list, folder, n=8, ask_before=-1):
    """The steps (from 0) that were run within a trace."""
    inside = []
    for step in range(n):
        if step == ask_before:
            asked.ask()
        asked.before(step, folder, jnp.zeros(()))
        if traced and traced[-1] != "end":
            inside.append(step)
    asked.end()
    assert traced.count("end") == len(traced) / 2  # every trace has ended
    return inside


@pytest.mark.parametrize("written", ["3:4", "steps=3:4"])
def test_the_planned_steps_of_every_loop_are_traced(written, traced, tmp_path):
    asked = Profiling()
    asked.plan(written)
    assert steps(asked, traced, tmp_path / "a") == [2, 3]
    assert steps(asked, traced, tmp_path / "b") == [2, 3]
    assert traced == [str(tmp_path / "a"), "end", str(tmp_path / "b"), "end"]


def test_a_loop_that_ends_within_a_trace_ends_it(traced, tmp_path):
    asked = Profiling()
    asked.plan("7:20")
    assert steps(asked, traced, tmp_path) == [6, 7]


def test_who_asks_gets_the_next_five_steps_once(traced, tmp_path):
    assert steps(Profiling(), traced, tmp_path, ask_before=2) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("written", ["3", "0:4", "5:4", "a:b", "3:4:5"])
def test_steps_that_are_none_are_named(written):
    with pytest.raises(UserError, match="--profile: expected FIRST:LAST"):
        Profiling().plan(written)


def test_sigusr1_asks(monkeypatch):
    asked = []
    monkeypatch.setattr(profiling.PROFILING, "ask", lambda: asked.append(True))
    before = signal.getsignal(signal.SIGUSR1)
    with cli._trace_on_sigusr1():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert asked == [True]
    assert signal.getsignal(signal.SIGUSR1) == before
