"""Stages of algorithms without a critic: groups, dynamic sampling, greedy baselines, samples of the reference."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from helpers import MESHES
from tiny_runs import QUIET, jsonl, lasting, only

from jrlhf.algorithms.dapo import DAPOConfig
from jrlhf.algorithms.online_dpo import OnlineDPOConfig
from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.algorithms.raft import RAFTConfig
from jrlhf.algorithms.remax import ReMaxConfig
from jrlhf.algorithms.rloo import RLOOConfig
from jrlhf.config import STOP, Preempted, UserError
from jrlhf.experiment import run
from jrlhf.lab import LarderPrompts
from jrlhf.sharding import make_mesh
from jrlhf.training import online
from jrlhf.training.online import Scored, resampled
from jrlhf.training.rewards import REWARDS, Texts
from jrlhf.training.stages import OnPolicy
from jrlhf.types import Rollout, Scores

STAGE = OnPolicy(
    start="sft",
    reward="larder_gold",
    prompts=LarderPrompts(size=64),
    algorithm=RLOOConfig(group_size=4),
    sampling=tiny.answers,
    optim=tiny.adam,
    loop=tiny.loop(4),
)


def numbered(scores: list[float], first: int) -> Scored:
    """Answers whose only token is their number, with these scores."""
    n = len(scores)
    number = np.arange(first, first + n)
    ones = np.ones((n, 1), bool)
    samples = Rollout(number[:, None].astype(np.int32), ones, ones, np.zeros((n, 1), np.float32), ones[:, 0])
    texts = Texts(
        *([f"{part}{i}" for i in number] for part in "pc"),
        [{"row": i} for i in number],
        [[i] for i in number],
    )
    values = np.asarray(scores, np.float32)
    return Scored(samples, Scores(values, {"twice": 2 * values}), texts)


ROUNDS = [[0, 0, 1, 0, 5, 5, 2, 3], [7, 7, 7, 7, 1, 2, 3, 3], [4, 4, 4, 5, 0, 1, 6, 6]]


def test_dynamic_sampling_fills_the_batch_with_groups_that_differ():
    """Groups of two. Of round 0 the second and fourth differ, of round 1 the third, of round 2 the second and third:
    four of them make the batch, in this order; the rest of the last round is dropped."""
    mesh, asked = make_mesh(MESHES["data"]), []

    def draw(number):
        asked.append(number)
        return numbered(ROUNDS[number - 10], 100 * (number - 10))

    config = DAPOConfig(group_size=2, resample_rounds=5)
    (samples, scores, texts), used, metrics = resampled(draw, 10, config, 8, mesh)
    assert asked == [10, 11, 12]
    assert used == 3
    wanted = [2, 3, 6, 7, 104, 105, 202, 203]
    np.testing.assert_array_equal(samples.tokens[:, 0], wanted)
    np.testing.assert_array_equal(scores.values, [1, 0, 2, 3, 1, 2, 4, 5])
    np.testing.assert_array_equal(scores.parts["twice"], 2 * np.asarray(scores.values))
    assert texts.completions == [f"c{i}" for i in wanted]
    assert [row["row"] for row in texts.rows] == wanted
    assert metrics["rollout/rounds"] == 3
    assert metrics["rollout/informative"] == pytest.approx(10 / 24)
    assert metrics["reward/sampled/mean"] == pytest.approx(np.mean(ROUNDS))


def test_where_rounds_run_out_equal_groups_fill_the_batch():
    config = DAPOConfig(group_size=2, resample_rounds=2)
    draw = lambda n: numbered(ROUNDS[n], 100 * n)  # noqa: E731
    (samples, _, _), used, _ = resampled(draw, 0, config, 8, make_mesh(MESHES["data"]))
    assert used == 2
    np.testing.assert_array_equal(samples.tokens[:, 0], [2, 3, 6, 7, 104, 105, 0, 1])


def test_a_stopped_run_with_dynamic_sampling_goes_on_as_if_it_had_not_been(train, monkeypatch):
    """The number of rounds so far is saved: the prompts and draws that follow are those that would have been."""
    coarse = lambda prompts, answers, rows: np.array([float(len(a) % 5 == 0) for a in answers])  # noqa: E731
    monkeypatch.setitem(REWARDS, "coarse", coarse)
    config = DAPOConfig(group_size=2, resample_rounds=3)
    dapo = replace(STAGE, reward="coarse", algorithm=config, loop=tiny.loop(4, 16))
    logged = jsonl(train(dapo=dapo)["dapo"] / "metrics.jsonl")
    rounds = [m["rollout/rounds"] for m in logged if "rollout/rounds" in m]
    assert len(rounds) == 4
    assert max(rounds) > 1

    original = online.resampled

    def stopping(draw, first, *rest):
        if first >= rounds[0]:
            STOP.request()
        return original(draw, first, *rest)

    monkeypatch.setattr(online, "resampled", stopping)
    again = {
        "again": replace(dapo, loop=replace(dapo.loop, eval_every=7))
    }  # another fingerprint, the same run
    with pytest.raises(Preempted):
        train(**again)
    STOP.clear()
    monkeypatch.setattr(online, "resampled", original)
    resumed = jsonl(train(**again)["again"] / "metrics.jsonl")
    assert [lasting(m) for m in resumed] == [lasting(m) for m in logged]


def test_greedy_baselines_and_samples_of_the_reference(train):
    """ReMax scores greedy answers beside its own; best-of-n distillation never samples from the policy it trains."""
    left = train(
        remax=replace(STAGE, algorithm=ReMaxConfig()),
        distilled=replace(
            STAGE, algorithm=RAFTConfig(group_size=4, samples="reference"), loop=tiny.loop(4, 16)
        ),
        frozen=replace(
            STAGE,
            algorithm=RAFTConfig(group_size=4, samples="reference"),
            loop=tiny.loop(4, 16),
            optim=replace(tiny.adam, lr=1e-12),
        ),
    )
    logged = {
        name: jsonl(folder / "metrics.jsonl")
        for name, folder in left.items()
        if name in ("remax", "distilled", "frozen")
    }
    assert all("reward/greedy/mean" in m for m in logged["remax"])
    scores = lambda name: [m["reward/score/mean"] for m in logged[name]]  # noqa: E731
    assert scores("distilled") == scores("frozen")
    assert logged["distilled"][-1]["policy/loss"] < logged["frozen"][-1]["policy/loss"] - 0.01
    assert "kl/ref_k1" not in logged["distilled"][0]  # its samples are not the policy's


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": PPOConfig()}, "use the stage PPO"),
        ({"algorithm": RLOOConfig(group_size=3)}, "algorithm.group_size 3"),
        ({"algorithm": RLOOConfig(group_size=4, minibatches=3)}, "minibatches x microbatches = 3"),
        ({"algorithm": OnlineDPOConfig(group_size=4, minibatches=4)}, "of which 2 rows are learned from"),
        ({"sampling": replace(tiny.answers, top_k=3)}, "OnPolicy trains the distribution"),
        ({"loop": replace(tiny.loop(4), steps=0, epochs=1.0)}, "loop.epochs"),
    ],
)
def test_mistakes_are_named_before_anything_runs(change, message, tmp_path):
    stage = replace(STAGE, **change)
    with pytest.raises(UserError, match=message):
        run(only("pretrain", "sft", rl=stage), tmp_path, console=QUIET)
    assert not jax.tree.leaves(list(tmp_path.rglob("metrics.jsonl")))
