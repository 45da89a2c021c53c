"""Several real processes, as hosts of a cluster: the whole pipeline, one that is asked to stop, one that dies or hangs.

What is drawn, learned and written must be what one process with as many devices draws, learns and writes.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from jrlhf.experiment import stage_folders
from jrlhf.metrics import read_metrics
from jrlhf.training.rewards import joined_scores, own_rows, packed_scores
from jrlhf.types import Scores

REPOSITORY = Path(__file__).resolve().parent.parent
PIPELINE = '''
from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.grpo import GRPOConfig
from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.experiment import Experiment
from jrlhf.lab import LarderDemonstrations, LarderLabelers, LarderPrompts, LarderText, LarderVocabulary
from jrlhf.models.config import ModelConfig
from jrlhf.optim import OptimConfig
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import (
    PPO, SFT, BestOfN, DirectAlignment, Evaluate, OnPolicy, Preferences, Pretrain, RewardModel, TokenizerConfig
)

answers, optim = SamplingConfig(max_new_tokens=6), OptimConfig(lr=1e-3)
loop = LoopConfig(steps=2, batch_size=8, checkpoint_every=1)
prompts = LarderPrompts(size=8, split="eval")
learning = dict(start="sft", prompts=LarderPrompts(size=32), sampling=answers, optim=optim, loop=loop)
experiment = Experiment(
    name="tiny",
    stages={
        "pretrain": Pretrain(
            data=LarderText(documents=256), eval_rows=8,
            tokenizer=TokenizerConfig(model_type="word", vocab_size=128, texts=(LarderVocabulary(),)),
            model=ModelConfig(d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=32, context=40),
            optim=optim, loop=loop,
        ),
        "sft": SFT(start="pretrain", data=LarderDemonstrations(size=64), eval_rows=8, optim=optim, loop=loop),
        "preferences": Preferences(
            start="sft", prompts=LarderPrompts(size=24, split="reward_model"), labeler=LarderLabelers(), responses=2,
            sampling=answers,
        ),
        "reward_model": RewardModel(start="sft", preferences="preferences", optim=optim, loop=loop),
        "ppo": PPO(
            reward="reward_model", gold="larder_gold", algorithm=PPOConfig(epochs=1, minibatches=2),
            critic_optim=optim, **learning
        ),
        "grpo": OnPolicy(reward="larder_gold", algorithm=GRPOConfig(group_size=2), **learning),
        "dpo": DirectAlignment(
            start="sft", preferences="preferences", algorithm=DPOConfig(), eval_prompts=prompts, gold="larder_gold",
            sampling=answers, optim=optim, loop=loop,
        ),
        "best_of_n": BestOfN(
            start="sft", reward="reward_model", gold="larder_gold", prompts=prompts, samples=2, sampling=answers
        ),
        "evaluate": Evaluate(
            policies=("sft", "ppo", "grpo", "dpo"), gold="larder_gold", proxy="reward_model", best_of_n="best_of_n",
            prompts={"eval": prompts}, sampling=answers,
        ),
    },
)
'''  # fmt: skip
# A reward that takes its time, or for ever on one host, so that a signal finds the run in the midst of it.
SLOW = '''
import os, time
from pathlib import Path
import jax
from jrlhf.algorithms.grpo import GRPOConfig
from jrlhf.experiment import Experiment
from jrlhf.lab import LarderPrompts, LarderText, LarderVocabulary
from jrlhf.models.config import ModelConfig
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.training.loop import LoopConfig
from jrlhf.training.rewards import REWARDS
from jrlhf.training.stages import OnPolicy, Pretrain, TokenizerConfig

def slow(prompts, completions, rows):
    asked = Path("asked.%d" % jax.process_index())
    with asked.open("a") as file:
        file.write("%d\\n" % len(prompts))
    if os.environ.get("HANG") == str(jax.process_index()) and len(asked.read_text().split()) > 2:
        time.sleep(3600)
    if os.environ.get("FAIL") == str(jax.process_index()):
        raise ValueError("the judge is out")
    time.sleep(0.3)
    return [len(c) / 10 for c in completions]

REWARDS["slow"] = slow
experiment = Experiment(
    name="slow",
    stages={
        "pretrain": Pretrain(
            data=LarderText(documents=256), eval_rows=8,
            tokenizer=TokenizerConfig(model_type="word", vocab_size=128, texts=(LarderVocabulary(),)),
            model=ModelConfig(d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=32, context=40),
            loop=LoopConfig(steps=1, batch_size=4),
        ),
        "grpo": OnPolicy(
            start="pretrain", reward="slow", prompts=LarderPrompts(size=32), algorithm=GRPOConfig(group_size=2),
            sampling=SamplingConfig(max_new_tokens=4),
            loop=LoopConfig(steps=8, batch_size=4, checkpoint_every=2),
        ),
    },
)
'''  # fmt: skip
# Of a run, not of what it learned.
NOT_THE_SAME = ("time/", "perf/")


def start(folder: Path, processes: int, devices: int, *options: str, **env: str) -> list[subprocess.Popen]:
    """`jrlhf run experiment.py` in a folder, as so many processes with so many devices each."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    command = [sys.executable, "-m", "jrlhf.cli", "run", "experiment.py", "--devices", str(devices), *options]
    started = []
    for i in range(processes):
        of_cluster = ["--coordinator", address, "--processes", str(processes), "--process", str(i)]
        whole = command + (of_cluster if processes > 1 else [])
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(
            subprocess.Popen(whole, cwd=folder, env=os.environ | ENV | env, start_new_session=True, **pipes)
        )
    return started


ENV = {
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JRLHF_RUNS": "runs",
    "PYTHONPATH": str(REPOSITORY),
}


def ended(processes: list[subprocess.Popen], seconds: float = 240) -> list[tuple[int, str]]:
    """(exit code, what it printed) of each; none is left behind."""
    try:
        outs = [p.communicate(timeout=seconds)[0] for p in processes]
    finally:
        for p in processes:
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)
    return [(p.returncode, out) for p, out in zip(processes, outs, strict=True)]


def learned(folder: Path) -> dict[str, list[dict]]:
    """Every stage's metrics, without what is the machine's."""
    (run,) = (p for p in (folder / "runs").iterdir() if p.is_dir() and (p / "stages.json").exists())
    found = {}
    for stage, seeds in stage_folders(run).items():
        left = seeds["0"]
        rows = read_metrics(left) if (left / "metrics.jsonl").exists() else []
        rows.append(json.loads((left / "done.json").read_text())["results"])
        found[stage] = [{k: v for k, v in row.items() if not k.startswith(NOT_THE_SAME)} for row in rows]
    return found


def assert_same(found, expected, where=""):
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_same(found[i], value, f"{where}[{i}]")
    elif isinstance(expected, (int, float)) and not isinstance(expected, bool):
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5, err_msg=where)
    else:
        assert found == expected, where


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The pipeline in one process with two devices."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "experiment.py").write_text(PIPELINE)
    ((code, out),) = ended(start(folder, 1, 2))
    assert code == 0, out
    return learned(folder)


def test_the_pipeline_on_two_hosts_is_that_of_one(alone, tmp_path):
    (tmp_path / "experiment.py").write_text(PIPELINE)
    (first, said), (second, silent) = ended(start(tmp_path, 2, 1))
    assert (first, second) == (0, 0), said + silent
    assert "all stages finished" in said
    assert "stage" not in silent  # one writes
    assert_same(learned(tmp_path), alone)


# --- stopping, dying, hanging -----------------------------------------------------------------------------------


@pytest.fixture
def slow(tmp_path):
    (tmp_path / "experiment.py").write_text(SLOW)
    return tmp_path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "experiment.py").write_text(SLOW)
    results = ended(start(folder, 2, 1))
    assert [code for code, _ in results] == [0, 0], results
    return learned(folder), (folder / "asked.0").read_text().split(), (folder / "asked.1").read_text().split()


def wait_for_steps(folder: Path, steps: int, processes: list[subprocess.Popen]) -> None:
    """Until so many steps of learning are in the log."""
    limit = time.monotonic() + 200
    while time.monotonic() < limit and all(p.poll() is None for p in processes):
        logs = folder.glob("runs/stages/on-policy-*/metrics.jsonl")
        if any(len(log.read_text().splitlines()) >= steps for log in logs):
            return
        time.sleep(0.1)
    raise AssertionError(ended(processes, 5))


def test_each_host_scores_answers_of_its_own(uninterrupted):
    _, first, second = uninterrupted
    assert first == second == ["2"] * 8


def test_a_host_that_is_preempted_stops_all_and_they_go_on(slow, uninterrupted):
    processes = start(slow, 2, 1)
    wait_for_steps(slow, 2, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    results = ended(processes)
    assert [code for code, _ in results] == [75, 75], results
    assert "saved at step" in results[0][1]
    done = len((slow / "asked.0").read_text().split())
    assert 2 <= done < 8
    results = ended(start(slow, 2, 1))
    assert [code for code, _ in results] == [0, 0], results
    assert f"resuming at step {done}" in results[0][1]
    assert_same(learned(slow), uninterrupted[0])
    assert len((slow / "asked.0").read_text().split()) == 8  # nothing was done twice


@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_dies_ends_all_and_they_go_on(victim, slow, uninterrupted):
    processes = start(slow, 2, 1)
    wait_for_steps(slow, 3, processes)
    os.killpg(processes[victim].pid, signal.SIGKILL)
    results = ended(processes, 100)
    assert results[victim][0] == -signal.SIGKILL
    code, said = results[1 - victim]
    if victim == 0:  # it coordinates the others, which jax itself ends
        assert code == -signal.SIGABRT, said
        assert "the leader task was preempted/died" in said
    else:
        assert code == 75, said
        assert "one of them may be gone. The same command, on all hosts, goes on" in said
    again = (2, 1) if victim == 0 else (1, 2)  # the same hosts, or one with as many devices
    results = ended(start(slow, *again))
    assert {code for code, _ in results} == {0}, results
    assert "resuming at step" in results[0][1]
    assert_same(learned(slow), uninterrupted[0])


def test_a_host_that_hangs_ends_all(slow):
    results = ended(start(slow, 2, 1, "--stall-timeout", "20", HANG="1"), 200)
    assert all(code != 0 for code, _ in results), results
    assert 75 in [code for code, _ in results]
    said = "".join(out for _, out in results)
    assert "nothing has moved for 20 s since step 2 of grpo" in said
    assert "in slow" in said  # where it stands


def test_a_reward_that_fails_on_one_host_is_an_error_on_all(slow):
    results = ended(start(slow, 2, 1, FAIL="1"), 200)
    assert [code for code, _ in results] == [2, 1], results
    assert "reward 'slow' failed on process 1: the judge is out" in results[0][1]


# --- who scores what --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_answer_is_scored_once_and_groups_stay_together(processes):
    prompts = [name for name, n in (("a", 3), ("b", 1), ("c", 4), ("a", 2)) for _ in range(n)]
    parts = [own_rows(prompts, processes, i) for i in range(processes)]
    assert parts[0][0] == 0
    assert parts[-1][1] == len(prompts)
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    assert all(prompts[cut - 1] != prompts[cut] for _, cut in parts[:-1] if 0 < cut < len(prompts))


def test_scores_survive_the_way_to_other_hosts():
    rng = np.random.default_rng(0)

    def scores(n):
        flags = rng.random(n) < 0.5
        tokens = np.where(rng.random((n, 3)) < 0.5, np.nan, 1.5).astype(np.float32)
        return Scores(
            rng.random(n, np.float32),
            {"style": rng.random(n, np.float32)},
            flags,
            None,
            {"x/y": (None, ~flags)},
            tokens,
        )

    first, second = scores(2), scores(3)
    whole = joined_scores([packed_scores(first), packed_scores(second)])
    np.testing.assert_array_equal(whole.values, np.concatenate([first.values, second.values]))
    np.testing.assert_array_equal(
        whole.parts["style"], np.concatenate([first.parts["style"], second.parts["style"]])
    )
    np.testing.assert_array_equal(whole.failed, np.concatenate([first.failed, second.failed]))
    assert whole.timed_out is None
    assert set(whole.unscored) == {"x/y"}
    assert whole.unscored["x/y"][0] is None
    np.testing.assert_array_equal(whole.unscored["x/y"][1], ~whole.failed)
    np.testing.assert_array_equal(whole.tokens, np.concatenate([first.tokens, second.tokens]))
    assert whole.tokens.dtype == np.float32
