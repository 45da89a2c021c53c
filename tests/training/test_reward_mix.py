"""Rewards of several parts as stages: what trains on them, what is logged, what is refused."""

import asyncio
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console
from tiny_runs import QUIET, best_of_two, folders, jsonl, one_device, only, rloo, some_answers

from jrlhf.config import MeshConfig, UserError
from jrlhf.data.sources import FileSource
from jrlhf.experiment import Experiment, fingerprint, run
from jrlhf.rewards.verifiers import Number
from jrlhf.sharding import make_mesh
from jrlhf.training.evaluation import Sampler, score
from jrlhf.training.rewards import (
    REWARDS,
    Texts,
    checked,
    fault_rates,
    group_numbers,
    make_reward,
    on_host_scores,
    score_metrics,
    stage_reward,
    whole_parts,
)
from jrlhf.training.stages import Evaluate, Part, RewardMix, StepLabels, Verifier
from jrlhf.types import Rollout, Scores

LENGTHS = Part("words", weight=0.5)


def words(prompts, completions, rows):
    """Each answer's number of words; those that begin with a comma cannot be counted."""
    counts = np.array([len(text.split()) for text in completions], np.float32)
    failed = np.array([text.startswith(",") for text in completions])
    return Scores(np.where(failed, 0.0, counts), failed=failed, timed_out=np.zeros(len(counts), bool))


async def ended(prompts, completions, rows):
    return [float(row["ended"]) for row in rows]


@pytest.fixture(scope="module", autouse=True)
def known():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REWARDS, "words", words)
        patch.setitem(REWARDS, "ended", ended)
        yield


@pytest.fixture(scope="module")
def left(one_device_runs):
    stages = {
        "sum": RewardMix(parts={"length": LENGTHS, "learned": Part("reward_model", weight=-2.0)}),
        "normal": RewardMix(
            parts={"length": LENGTHS, "learned": Part("reward_model")},
            start="sft",
            prompts=tiny.prompts,
            samples=4,
            sampling=tiny.answers,
        ),
        "gated": RewardMix(parts={"ends": Part("ended", gate=0.5), "gold": Part("larder_gold")}, how="gates"),
        "signed": RewardMix(parts={"ends": Part("ended"), "learned": Part("reward_model")}, how="product"),
        "grouped": RewardMix(parts={"A": Part("larder_gold_A"), "B": Part("larder_gold_B")}, how="by_group"),
        "nested": RewardMix(parts={"inner": Part("sum"), "gold": Part("larder_gold")}),
        "rloo": rloo("sum", "gated"),
        "best": best_of_two("sum", "gated"),
        "compared": Evaluate(
            policies=("sft", "rloo"),
            gold="gated",
            proxy="sum",
            prompts={"main": tiny.prompts},
            samples=2,
            sampling=tiny.answers,
        ),
    }
    with one_device():
        kept = only("pretrain", "sft", "preferences", "reward_model", **stages)
        return folders(run(kept, one_device_runs, console=QUIET))


@pytest.fixture(scope="module")
def said(left):
    """said(reward) -> Scores of the start policy's answers; and the texts."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    rows = [{**row, "group": "AB"[i % 2]} for i, row in enumerate(tiny.prompts.rows())]
    policy, _, samples, texts = some_answers(left["sft"], mesh, rows)

    def ask(name, texts=texts):
        reward = make_reward(name, left, mesh, policy.tokenizer)
        scores = on_host_scores(reward, samples, texts, mesh)
        np.testing.assert_array_equal(scores.values, score(reward, samples, texts, mesh))
        return scores

    return ask, texts


def test_a_sum_weighs_its_parts_and_says_what_failed(said):
    ask, texts = said
    scores = ask("sum")
    counts = words(texts.prompts, texts.completions, texts.rows)
    np.testing.assert_allclose(scores.parts["length"], counts.values)
    np.testing.assert_allclose(scores.parts["learned"], ask("reward_model").values, atol=1e-6)
    expected = 0.5 * counts.values - 2 * np.asarray(ask("reward_model").values)
    np.testing.assert_allclose(scores.values, expected, atol=1e-5)
    np.testing.assert_array_equal(scores.failed, counts.failed)
    assert not scores.timed_out.any()
    nested = ask("nested")
    np.testing.assert_allclose(nested.parts["inner"], expected, atol=1e-5)
    np.testing.assert_array_equal(nested.failed, counts.failed)


def test_parts_are_normalised_on_answers_of_the_reference(left, said):
    ask, _ = said
    noted = json.loads((left["normal"] / "mix.json").read_text())["parts"]
    assert noted["learned"]["stage"] == left["reward_model"].name
    assert noted["length"]["program"] == "words"
    scores = ask("normal")
    by_hand = sum(
        rule["weight"] * (np.asarray(scores.parts[name]) - rule["mean"]) / rule["std"]
        for name, rule in noted.items()
    )
    np.testing.assert_allclose(scores.values, by_hand, atol=1e-4)
    for name, rule in noted.items():  # other answers of the same policy
        assert abs(np.mean(scores.parts[name]) - rule["mean"]) < rule["std"]
        assert 0.4 < np.std(scores.parts[name]) / rule["std"] < 2.5


def test_a_gate_and_groups_read_the_answers(said):
    ask, texts = said
    ends = np.array([row["ended"] for row in texts.rows])
    assert ends.any()
    assert not ends.all()
    gold = ask("larder_gold").values
    np.testing.assert_allclose(ask("gated").values, np.where(ends, 1 + gold, 0), atol=1e-6)
    a, b = ask("larder_gold_A").values, ask("larder_gold_B").values
    np.testing.assert_allclose(ask("grouped").values, np.where(np.arange(len(a)) % 2, b, a), atol=1e-6)
    nameless = texts._replace(rows=[{**row, "group": "a"} for row in texts.rows])
    with pytest.raises(UserError, match=r"prompt 1 has the group 'a'. Known: A, B"):
        ask("grouped", nameless)
    with pytest.raises(UserError, match="only rewards that are never negative"):
        ask("signed")


def test_a_part_by_group_is_asked_about_its_own_rows_alone(tmp_path, monkeypatch):
    """The rows of other groups may lack what it reads (a problem's answer, say)."""
    asked = []

    def marked(prompts, completions, rows):
        asked.append([row["answer"] for row in rows])
        return Scores(np.arange(len(rows), dtype=np.float32), parts={"inner": np.ones(len(rows), np.float32)},
                      failed=np.ones(len(rows), bool), timed_out=np.zeros(len(rows), bool))  # fmt: skip

    def has_answer(rows):
        for n, row in enumerate(rows, 1):
            if "answer" not in row:
                raise UserError(f"prompt {n} has no field 'answer'")

    marked.check_rows = has_answer
    monkeypatch.setitem(REWARDS, "marked", marked)
    part = lambda program: {"program": program, "weight": 2.0, "gate": None, "mean": 1.0, "std": 0.5}  # noqa: E731
    (tmp_path / "mix.json").write_text(
        json.dumps(
            {
                "how": "by_group",
                "parts": {"math": part("marked"), "chat": part("words"), "code": part("ended")},
            }
        )
    )
    reward = stage_reward("mix", tmp_path, None, None)
    rows = [{"group": g} | ({"answer": "1"} if g == "math" else {}) for g in ("chat", "math", "chat", "math")]
    reward.check(rows)
    with pytest.raises(UserError, match="no field 'answer'"):
        reward.check([*rows, {"group": "math"}])
    nothing = np.zeros((4, 2))
    rollout = Rollout(nothing, nothing, nothing, nothing, np.zeros(4, bool))
    texts = Texts(["p"] * 4, ["a b", "x", "a", "y"], rows, [[1]] * 4)
    said = reward.score(rollout, texts)
    assert asked == [["1", "1"]]
    np.testing.assert_allclose(said.values, [2 * (2 - 1) / 0.5, 2 * (0 - 1) / 0.5, 0.0, 0.0])
    assert said.failed.tolist() == [False, True, False, True]
    assert {"math", "chat", "math.inner"} == set(said.parts)  # nobody asked about code
    np.testing.assert_array_equal(np.isnan(said.parts["math"]), [True, False, True, False])
    metrics = score_metrics("mix", said)
    assert metrics["reward/chat/mean"] == pytest.approx(1.5)
    assert metrics["reward/math/mean"] == pytest.approx(0.5)
    assert metrics["reward/math/fail_rate"] == 1  # of those that it was asked about
    assert whole_parts(said) == {}


def test_a_part_by_group_is_normalised_on_its_own_rows(one_device_runs, tmp_path):
    prompts = [row["prompt"] for row in tiny.prompts.rows()]
    lines = [{"prompt": p, "group": "long" if n % 2 else "gold"} for n, p in enumerate(prompts)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mix = RewardMix(
        parts={"long": Part("words"), "gold": Part("larder_gold")},
        how="by_group",
        start="sft",
        prompts=FileSource(str(tmp_path / "p.jsonl"), "prompt"),
        samples=2,
        sampling=tiny.answers,
    )
    whole = replace(mix, how="sum")
    with one_device():
        found = folders(run(only("pretrain", "sft", mix=mix, whole=whole), one_device_runs, console=QUIET))
    own, of_all = (json.loads((found[name] / "mix.json").read_text())["parts"] for name in ("mix", "whole"))
    assert own["long"]["mean"] != of_all["long"]["mean"]
    assert own["gold"]["std"] > 0
    nobody = replace(mix, parts=mix.parts | {"code": Part("ended")})
    with one_device(), pytest.raises(UserError, match=r"parts.code: no prompt has this group"):
        run(only("pretrain", "sft", mix=nobody), one_device_runs, console=QUIET)


def test_what_learns_from_a_mix_logs_every_part(left):
    first = jsonl(left["rloo"] / "metrics.jsonl")[0]
    total = 0.5 * first["reward/length/mean"] - 2 * first["reward/learned/mean"]
    assert first["reward/score/mean"] == pytest.approx(total, abs=1e-4)
    assert 0 <= first["reward/sum/fail_rate"] < 1
    assert first["reward/sum/timeout_rate"] == 0
    assert first["reward/length/fail_rate"] == first["reward/sum/fail_rate"]
    assert "reward/learned/fail_rate" not in first
    assert first["reward/gated.ends/mean"] == pytest.approx(first["rollout/eos_rate"])
    assert np.isfinite(first["reward/gated.gold/mean"])
    found = json.loads((left["best"] / "done.json").read_text())["results"]
    assert found["unscored"].keys() == {
        f"{n}/{w}" for n in ("sum", "length") for w in ("fail_rate", "timeout_rate")
    }
    assert found["unscored"]["sum/fail_rate"] == found["unscored"]["length/fail_rate"]
    assert found["proxy"]["2"] >= found["proxy"]["1"]
    assert json.loads((left["compared"] / "evaluation.json").read_text())["reward_name"] == "gated"


def test_the_order_of_gates_is_part_of_the_fingerprint():
    parts = {"ends": Part("ended", gate=0.5), "gold": Part("larder_gold", gate=0.0)}
    turned = dict(reversed(parts.items()))
    prints = {fingerprint(RewardMix(parts=p, how="gates"), 0, {}) for p in (parts, turned, dict(parts))}
    assert len(prints) == 2


def test_answers_without_a_score_of_their_own_are_told(capsys):
    flags = np.array([True, False, False, False])
    scores = Scores(np.ones(4), failed=flags, timed_out=np.zeros(4, bool), unscored={"inner": (flags, None)})
    rates = fault_rates("mix", scores, Console())
    assert rates == {"mix/fail_rate": 0.25, "mix/timeout_rate": 0.0, "inner/fail_rate": 0.25}
    assert "mix/fail_rate: 25.0% of 4 answers" in capsys.readouterr().out


def test_an_error_says_which_reward_raised_it(monkeypatch, said):
    ask, _ = said
    monkeypatch.setitem(REWARDS, "broken", lambda prompts, completions, rows: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        ask("broken")
    assert "by the reward 'broken'" in error.value.__notes__[0]


def test_an_async_reward_within_a_running_event_loop(said):
    """A notebook has one."""
    ask, _ = said

    async def cell():
        return ask("ended").values

    np.testing.assert_array_equal(asyncio.run(cell()), ask("ended").values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones(2), r"shape \(2,\)"),
        (np.array([1, np.nan, 2]), r"1 of 3 values that are not finite, the first \(nan\) for answer 2"),
        (Scores(np.ones(3), {"p": np.ones((3, 1))}), "part 'p' of reward 'mine'"),
        (Scores(np.ones(3), failed=np.zeros(2, bool)), "'failed' has shape"),
        (Scores(np.ones(3), tokens=np.zeros((1, 5))), r"must be \[3, R\], .* got \(1, 5\)"),
        (["a", "b", "c"], "reward 'mine' returned something else than numbers"),
        ([[1], [1, 2], [1]], "reward 'mine' returned something else than numbers"),
    ],
)
def test_what_a_reward_returns_is_checked(values, message):
    with pytest.raises(UserError, match=message):
        checked("mine", values if isinstance(values, Scores) else Scores(values), 3)


def test_a_reused_note_says_what_this_experiment_says(tmp_path):
    """`workers` is in no fingerprint: the stage is not another, but its note is."""
    with_workers = lambda n: Experiment("noted", {"check": Verifier(Number(), workers=n)})  # noqa: E731
    first, second = (folders(run(with_workers(n), tmp_path, console=QUIET))["check"] for n in (1, 3))
    assert first == second
    assert json.loads((second / "verifier.json").read_text())["workers"] == 3


def test_groups_are_numbered_in_the_order_of_the_parts():
    np.testing.assert_array_equal(group_numbers("m", ["x", "y"], [{"group": "y"}, {"group": "x"}]), [1, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": {"length": LENGTHS}}, "at least 2"),
        ({"parts": {"a": Part("wrods"), "b": LENGTHS}}, r"parts.a.reward 'wrods' .*Did you mean 'words'"),
        ({"parts": {"score": LENGTHS, "b": LENGTHS}}, "'score' cannot name a part"),
        ({"parts": {"a": replace(LENGTHS, gate=1.0), "b": LENGTHS}}, "only read with how 'gates'"),
        ({"parts": {"a": replace(LENGTHS, weight=0.0), "b": LENGTHS}}, "a finite number, not 0"),
        ({"how": "gates"}, "no part has a gate"),
        ({"how": "product", "parts": {"a": Part("words", -1.0), "b": LENGTHS}}, "exponent above 0"),
        ({"start": "sft"}, "go together"),
        ({"start": "sft", "prompts": tiny.prompts, "how": "product"}, "leave start and prompts out"),
    ],
)
def test_mistakes_are_told_before_anything_runs(change, message):
    mix = RewardMix(parts={"a": LENGTHS, "b": Part("larder_gold")})
    with pytest.raises(UserError, match=message):
        replace(mix, **change).validate(tiny.experiment.stages)


@pytest.mark.parametrize("what", ["rloo", "best", "compared", "steps"])
def test_prompts_that_lack_what_a_reward_reads_are_told_before_anything_is_sampled(
    left, one_device_runs, monkeypatch, what
):
    """A mix by group inside another reward: the prompts have no group."""

    def sampled(*_, **__):
        raise AssertionError("answers were sampled")

    monkeypatch.setattr(Sampler, "sample", sampled)
    monkeypatch.setattr(Sampler, "draw", sampled)
    by_group = RewardMix(parts={"A": Part("larder_gold_A"), "B": Part("larder_gold_B")}, how="by_group")
    inside = RewardMix(parts={"inner": Part("grouped"), "gold": Part("larder_gold")})
    evaluation = Evaluate(
        policies=("sft",), gold="inside", prompts={"main": tiny.prompts}, sampling=tiny.answers
    )
    steps = StepLabels("sft", reward="words", prompts=tiny.prompts, truth="inside", sampling=tiny.answers)
    readers = {
        "rloo": rloo("inside", ""),
        "best": best_of_two("inside", ""),
        "compared": evaluation,
        "steps": steps,
    }
    stages = {"grouped": by_group, "inside": inside, what: readers[what]}
    with one_device(), pytest.raises(UserError, match="'inner' goes by group: prompt 1 has the group None"):
        run(only("pretrain", "sft", **stages), one_device_runs, console=QUIET)
