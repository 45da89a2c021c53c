"""How the tests of this folder run the tiny experiment, and read what it left."""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh
from rich.console import Console

from jrlhf.algorithms.rloo import RLOOConfig
from jrlhf.config import MeshConfig
from jrlhf.data.batching import encode_prompt
from jrlhf.experiment import stage_folders
from jrlhf.metrics import read_metrics
from jrlhf.sharding import make_mesh
from jrlhf.training import stages
from jrlhf.training.artifacts import Loaded, load_model
from jrlhf.training.evaluation import Sampler
from jrlhf.training.rewards import Texts, read_texts
from jrlhf.training.stages import OnPolicy
from jrlhf.types import Rollout

QUIET = Console(quiet=True)


def use_mesh(patch: pytest.MonkeyPatch, make) -> None:
    """Every stage makes its mesh by `make(config)`."""
    for module in vars(stages).values():
        if hasattr(module, "make_mesh"):
            patch.setattr(module, "make_mesh", make)


@contextmanager
def one_device():
    """Stages make their mesh of the first device alone, whatever their config says."""
    patch = pytest.MonkeyPatch()
    use_mesh(patch, lambda config: make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    try:
        yield
    finally:
        patch.undo()


def only(*names: str, **changed):
    """The tiny experiment with these stages, some of them changed."""
    kept = {name: tiny.experiment.stages[name] for name in names}
    return replace(tiny.experiment, stages=kept | changed)


def rloo(reward: str, gold: str) -> OnPolicy:
    return OnPolicy(
        start="sft",
        reward=reward,
        gold=gold,
        prompts=tiny.prompts,
        algorithm=RLOOConfig(group_size=4),
        sampling=tiny.answers,
        optim=tiny.adam,
        loop=tiny.loop(2),
    )


def best_of_two(reward: str, gold: str):
    return replace(tiny.experiment.stages["best_of_n"], reward=reward, gold=gold, samples=2)


class Answers(NamedTuple):
    policy: Loaded
    rows: list[dict]
    samples: Rollout
    texts: Texts


def some_answers(folder: Path, mesh: Mesh, rows: list[dict] | None = None) -> Answers:
    """Of the policy that a stage left in `folder`, one to each of the tiny experiment's prompts (or `rows`)."""
    policy = load_model(folder, mesh)
    rows = list(tiny.prompts.rows()) if rows is None else rows
    ids = [encode_prompt(row, policy.tokenizer, 20).tolist() for row in rows]
    samples = Sampler(policy.model, policy.tokenizer, mesh, tiny.answers, 20).sample(
        policy.params, ids, jax.random.key(5)
    )
    return Answers(policy, rows, samples, read_texts(samples, rows, policy.tokenizer))


def folders(run_folder: Path, seed: str = "0") -> dict[str, Path]:
    return {name: seeds[seed] for name, seeds in stage_folders(run_folder).items()}


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def trained(folder: Path) -> list[dict]:
    """The lines of the train steps, without those of evaluations."""
    return [row for row in read_metrics(folder) if "time/step" in row]


def evaluated(folder: Path) -> list[dict]:
    return [row for row in read_metrics(folder) if "time/step" not in row]


def lasting(row: dict) -> dict:
    """A line of metrics without what depends on the clock, the process or the machine."""
    return {name: value for name, value in row.items() if not name.startswith(("time/", "perf/"))}


def assert_close_metrics(ours: list[dict], theirs: list[dict], rtol: float, atol: float) -> None:
    """The same lines within a tolerance. In a first step of DPO the policy is the reference, so that rounding decides
    which of two equal gains is larger."""
    assert len(ours) == len(theirs)
    for a, b in zip(map(lasting, ours), map(lasting, theirs), strict=True):
        assert list(a) == list(b)
        kept = [name for name in a if name != "pref/acc" or a["step"] > 1]
        np.testing.assert_allclose(
            [a[name] for name in kept], [b[name] for name in kept], rtol=rtol, atol=atol, err_msg=str(kept)
        )
