"""Several real processes, as hosts of a cluster: the whole pipeline, one that is asked to stop, one that dies or hangs.

What is drawn, learned and written must be what one process with as many devices draws, learns and writes.
"""

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from chat_server import completion, serving

from jrlhf.experiment import stage_folders
from jrlhf.metrics import read_metrics
from jrlhf.training.rewards import joined_scores, own_rows, packed_scores
from jrlhf.types import Scores

REPOSITORY = Path(__file__).resolve().parent.parent
PIPELINE = '''
from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.experiment import Experiment
from jrlhf.lab import LarderDemonstrations, LarderLabelers, LarderPrompts, LarderText, LarderVocabulary
from jrlhf.models.config import ModelConfig
from jrlhf.optim import OptimConfig
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import (
    PPO, SFT, BestOfN, DirectAlignment, Evaluate, Preferences, Pretrain, RewardModel, TokenizerConfig
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
        "dpo": DirectAlignment(
            start="sft", preferences="preferences", algorithm=DPOConfig(), eval_prompts=prompts, gold="larder_gold",
            sampling=answers, optim=optim, loop=loop,
        ),
        "best_of_n": BestOfN(
            start="sft", reward="reward_model", gold="larder_gold", prompts=prompts, samples=2, sampling=answers
        ),
        "evaluate": Evaluate(
            policies=("sft", "ppo", "dpo"), gold="larder_gold", proxy="reward_model", best_of_n="best_of_n",
            prompts={"eval": prompts}, sampling=answers,
        ),
    },
)
'''  # fmt: skip
# A judge behind a server, and a reward that takes its time, or for ever on one host, so that a signal finds the run in
# the midst of it.
SLOW = '''
import os, time
from pathlib import Path
import jax
from jrlhf import hosts
from jrlhf.algorithms.grpo import GRPOConfig
from jrlhf.data.sources import FileSource
from jrlhf.experiment import Experiment
from jrlhf.lab import LarderPrompts, LarderText, LarderVocabulary
from jrlhf.models.config import ModelConfig
from jrlhf.rewards.endpoint import Endpoint
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.training.loop import LoopConfig
from jrlhf.training.rewards import REWARDS
from jrlhf.training.stages import AILabels, Judge, OnPolicy, Pretrain, TokenizerConfig, ai_labels

hosts.LOOK = 3
ai_labels.AT_ONCE = 4

def slow(prompts, completions, rows):
    process = jax.process_index()
    asked = Path("asked.%d" % process)
    with asked.open("a") as file:
        file.write("%d\\n" % len(prompts))
    if os.environ.get("HANG") == str(process) and len(asked.read_text().split()) > 2:
        time.sleep(3600)
    if os.environ.get("FAIL") == str(process):
        raise ValueError("the judge is out")
    time.sleep(0.1 + 0.5 * process)
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
        "judge": Judge(
            by=Endpoint(os.environ["SERVER"], "m", concurrency=1, retries=0), verdicts=("A", "B"),
            template="{question}: {answer_a} or {answer_b}?", value="probability",
        ),
        "labels": AILabels(judge="judge", data=FileSource("pairs.jsonl", kind="preference")),
        "grpo": OnPolicy(
            start="pretrain", reward="slow", prompts=LarderPrompts(size=32), algorithm=GRPOConfig(group_size=2),
            sampling=SamplingConfig(max_new_tokens=4),
            loop=LoopConfig(steps=8, batch_size=4, checkpoint_every=2),
        ),
    },
)
'''  # fmt: skip
PAIRS = [{"prompt": f"p{n}", "responses": [f"x{n}", f"y{n}"], "ranks": [1, 2]} for n in range(12)]
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


def run_of(folder: Path) -> Path:
    (run,) = (p for p in (folder / "runs").iterdir() if p.is_dir() and (p / "stages.json").exists())
    return run


def learned(folder: Path) -> dict[str, list[dict]]:
    """Every stage's metrics, without what is the machine's."""
    found = {}
    for stage, seeds in stage_folders(run_of(folder)).items():
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


@pytest.fixture(scope="module")
def server():
    """Says that the first answer is better, after a while."""

    def reply(question, n):
        time.sleep(0.1)
        return completion("A")

    with serving() as serve:
        yield serve(reply)


@pytest.fixture(scope="module")
def slow(server, tmp_path_factory):
    """A folder with the experiment."""

    def made(name: str, *finished: Path) -> Path:
        folder = tmp_path_factory.mktemp(name)
        (folder / "experiment.py").write_text(SLOW)
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
        for stage in finished:
            shutil.copytree(stage, folder / "runs" / "stages" / stage.name)
        return folder

    return made


@pytest.fixture(scope="module")
def uninterrupted(slow, server):
    """(folder, questions that the server was asked)"""
    folder = slow("uninterrupted")
    results = ended(start(folder, 2, 1, SERVER=server.url))
    assert [code for code, _ in results] == [0, 0], results
    return folder, server.asked.copy()


def stages_of(folder: Path, *names: str) -> list[Path]:
    return [seeds["0"] for name, seeds in stage_folders(run_of(folder)).items() if name in names]


def wait(processes: list[subprocess.Popen], condition: Callable[[], bool]) -> None:
    """While all of them run."""
    limit = time.monotonic() + 200
    while time.monotonic() < limit and all(p.poll() is None for p in processes):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(ended(processes, 5))


def steps_done(folder: Path) -> int:
    """Steps of learning that are in the log."""
    logs = folder.glob("runs/stages/on-policy-*/metrics.jsonl")
    return max((len(log.read_text().splitlines()) for log in logs), default=0)


def asked(folder: Path, process: int) -> list[str]:
    """How many answers a process was asked about, each time."""
    return (folder / f"asked.{process}").read_text().split()


def test_each_host_scores_answers_of_its_own(uninterrupted):
    folder, _ = uninterrupted
    assert asked(folder, 0) == asked(folder, 1) == ["2"] * 8


def test_each_host_asks_a_server_its_own_questions(uninterrupted):
    folder, questions = uninterrupted
    assert len(questions) == 2 * len(PAIRS)  # in both orders
    assert set(questions.values()) == {1}
    (labels,) = stages_of(folder, "labels")
    assert json.loads((labels / "done.json").read_text())["results"]["costs"]["requests"] == len(questions)
    replies = []
    for name in ("answers.sqlite", "answers-1.sqlite"):
        with closing(sqlite3.connect(labels / name)) as db:
            replies += db.execute("SELECT COUNT(*) FROM answers").fetchone()
    assert replies == [len(PAIRS)] * 2


def test_the_host_that_the_others_wait_for_is_found(uninterrupted):
    folder, _ = uninterrupted
    (grpo,) = stages_of(folder, "grpo")
    told = [row for row in read_metrics(grpo) if "time/skew" in row]
    assert [row["step"] for row in told] == [4, 7]  # what three steps took comes a step later
    assert told[-1]["perf/slowest_host"] == 1  # its reward takes half a second longer
    assert 0.1 < told[-1]["time/skew"] <= told[-1]["time/step_max_host"]


@pytest.fixture(scope="module")
def story(slow, server, uninterrupted):
    """A run that is stopped while it labels and while it learns, and whose hosts die, first one, then the other:
    [(what each process ended with and said)] and the folder."""
    finished, _ = uninterrupted
    folder, told = slow("story", *stages_of(finished, "pretrain")), []
    server.asked.clear()

    def meanwhile(condition: Callable[[], bool], process: int, number: signal.Signals) -> None:
        processes = start(folder, 2, 1, SERVER=server.url)
        wait(processes, condition)
        os.kill(processes[process].pid, number)
        told.append(ended(processes, 100))

    meanwhile(lambda: len(server.asked) > 5, 1, signal.SIGTERM)
    meanwhile(lambda: steps_done(folder) >= 1, 0, signal.SIGTERM)
    meanwhile(lambda: steps_done(folder) >= 4, 1, signal.SIGKILL)
    meanwhile(lambda: steps_done(folder) >= 6, 0, signal.SIGKILL)
    told.append(ended(start(folder, 1, 2, SERVER=server.url)))
    return told, folder


def test_labelling_ends_on_all_hosts_and_asks_nothing_twice(story, server):
    told, _ = story
    assert [code for code, _ in told[0]] == [75, 75], told[0]
    assert f"of {len(PAIRS)} pairs are judged" in told[0][0][1]
    assert len(server.asked) == 2 * len(PAIRS)
    assert set(server.asked.values()) == {1}


def test_a_host_that_is_preempted_stops_all(story):
    told, _ = story
    assert [code for code, _ in told[1]] == [75, 75], told[1]
    assert "saved at step" in told[1][0][1]
    saved = re.search(r"saved at step (\d+) of 8", told[1][0][1])
    assert f"resuming at step {saved[1]} of 8" in told[2][0][1]


def test_a_host_that_dies_ends_all(story):
    told, _ = story
    (code, said), (killed, _) = told[2]
    assert killed == -signal.SIGKILL
    assert code == 75, said
    assert "one of them may be gone. The same command, on all hosts, goes on" in said
    (killed, _), (code, said) = told[3]
    assert killed == -signal.SIGKILL
    # It coordinates the others, which jax itself ends, unless they notice first.
    why = {-signal.SIGABRT: "the leader task was preempted/died", 75: "one of them may be gone"}
    assert why[code] in said


def test_after_all_that_the_run_is_that_of_hosts_that_nothing_happened_to(story, uninterrupted):
    """Its last start was on one host with as many devices."""
    told, folder = story
    ((code, said),) = told[4]
    assert code == 0, said
    assert "resuming at step" in said
    assert_same(learned(folder), learned(uninterrupted[0]))


def test_a_host_that_hangs_ends_all(slow, server, uninterrupted):
    folder = slow("hangs", *stages_of(uninterrupted[0], "pretrain", "judge", "labels"))
    processes = start(folder, 2, 1, "--stall-timeout", "12", HANG="1", SERVER=server.url)
    results = ended(processes, 200)
    assert all(code != 0 for code, _ in results), results
    assert 75 in [code for code, _ in results]
    said = "".join(out for _, out in results)
    assert "nothing has moved for 12 s since step 2 of grpo" in said
    assert "in slow" in said  # where it stands


def test_a_reward_that_fails_on_one_host_is_an_error_on_all(slow, server, uninterrupted):
    folder = slow("fails", *stages_of(uninterrupted[0], "pretrain", "judge", "labels"))
    results = ended(start(folder, 2, 1, FAIL="1", SERVER=server.url), 200)
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
