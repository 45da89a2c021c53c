"""Rubrics as stages: what trains on them, what is logged, labelled and refused."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from tiny_runs import QUIET, best_of_two, folders, jsonl, one_device, only, rloo

from jrlhf.algorithms.reward_model import RewardModelConfig
from jrlhf.config import MeshConfig, UserError, from_dict, to_dict
from jrlhf.experiment import Experiment, fingerprint, run
from jrlhf.metrics import check_name
from jrlhf.rewards.endpoint import Endpoint
from jrlhf.rewards.judges import Program
from jrlhf.rewards.rubrics import load_rubric
from jrlhf.sharding import make_mesh
from jrlhf.training.lab_judges import LarderJudge
from jrlhf.training.rewards import Texts, make_reward, score_metrics
from jrlhf.training.stages import Evaluate, RewardModel, RubricLabels, RubricReward
from jrlhf.training.stages import rubric as rubric_module

LARDER = str(Path(__file__).parents[2] / "experiments" / "larder" / "rubric.toml")
CRITERIA = load_rubric(LARDER).names
TRUTH = RubricReward(by=LarderJudge(1.0), rubric=LARDER, clip=False)
# A local judge of one layer knows the words of Larder alone.
LOCAL = {"criteria": [{"name": "local", "question": "thanks", "levels": [
    {"name": "is", "points": 1}, {"name": "honey", "points": 2}]}]}  # fmt: skip
TERSE = "{question} {answer} {criterion}"


@dataclass(frozen=True)
class Shy(Program):
    """Cannot decide, and has nothing to say of answers that thank."""

    def verdicts(self, questions, options):
        answers = [q.partition("Answer:\n")[2].partition("\n\n")[0] for q in questions]
        silent = np.array([["thanks" in answer] for answer in answers])
        return np.where(silent, np.nan, np.full((len(questions), len(options)), 1 / len(options)))


@pytest.fixture(scope="module")
def local_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("rubrics") / "local.json"
    path.write_text(json.dumps(LOCAL))
    return str(path)


@pytest.fixture(scope="module")
def left(one_device_runs, local_file):
    stages = {
        "rubric": TRUTH,
        "shy": replace(TRUTH, by=Shy(), fallback=0.0),
        "local": RubricReward(judge="sft", rubric=local_file, template=TERSE),
        "labels": RubricLabels(rubric="rubric", preferences="preferences"),
        "heads": RewardModel(
            start="sft",
            preferences="labels",
            optim=tiny.adam,
            loop=tiny.loop(2),
            eval_fraction=0.25,
            algorithm=RewardModelConfig(criteria=("helpful", "hazard"), overall=False),
            weights={"helpful": 1.0, "hazard": -1.0},
        ),
        "rloo": rloo("rubric", "larder_gold"),
        "best": best_of_two("rubric", "larder_gold"),
        "compared": Evaluate(
            policies=("sft", "rloo"),
            gold="rubric",
            prompts={"main": tiny.prompts},
            samples=2,
            sampling=tiny.answers,
        ),
    }
    with one_device(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(rubric_module, "AT_ONCE", 10)  # rows, so that labelling takes several rounds
        return folders(run(only("pretrain", "sft", "preferences", **stages), one_device_runs, console=QUIET))


def test_every_criterion_is_logged_while_training(left):
    first = jsonl(left["rloo"] / "metrics.jsonl")[0]
    rubric = load_rubric(LARDER)
    parts = np.array([[first[f"reward/{name}/mean"] for name in CRITERIA]])
    for name in CRITERIA:
        check_name(f"reward/{name}/mean")
    # A score that is not clipped is linear in the criteria, so that the means have the score's formula.
    assert first["reward/score/mean"] == pytest.approx(rubric.score(parts, clip=False)[0], abs=1e-4)
    assert "reward/rubric/fail_rate" not in first  # it cannot fail


def test_labels_fill_in_the_criteria(left):
    rows, before = (
        jsonl(left["labels"] / "preferences.jsonl"),
        jsonl(left["preferences"] / "preferences.jsonl"),
    )
    assert [row["responses"] for row in rows] == [row["responses"] for row in before]
    score = load_rubric(LARDER).score
    for row in rows:
        assert tuple(row["criteria"]) == CRITERIA
        assert row["criteria"]["thanks"] == [float(r.split().count("thanks") == 1) for r in row["responses"]]
        expected = score(np.array(list(row["criteria"].values())).T, clip=False)
        np.testing.assert_allclose(row["scores"], expected, atol=1e-5)
        assert row["ranks"] == [1 + int(np.sum(np.array(row["scores"]) > s)) for s in row["scores"]]
        assert row["labeler"] == "LarderJudge"
        assert "probability" not in row
    results = json.loads((left["labels"] / "done.json").read_text())["results"]
    assert results["rows"] == len(rows)
    assert results["failed"] == 0
    same, pairs = 0, 0
    for new, old in zip(rows, before, strict=True):
        for i in range(3):
            for j in range(i):
                a, b = (row["ranks"][i] - row["ranks"][j] for row in (new, old))
                same, pairs = same + (a * b > 0), pairs + (a * b != 0)
    assert results["agreement"] == pytest.approx(same / pairs)
    heads = json.loads((left["heads"] / "done.json").read_text())["results"]["held_out_accuracy_of_heads"]
    assert {*heads} <= {"helpful", "hazard"}


def test_an_evaluation_keeps_the_parts_of_the_gold_reward(left):
    found = json.loads((left["compared"] / "evaluation.json").read_text())
    rubric = load_rubric(LARDER)
    for policy in ("sft", "rloo"):
        gold = np.array(found["policies"][policy]["splits"]["main"]["gold"])
        parts = np.stack([found["criteria"][policy]["main"][name] for name in CRITERIA], axis=-1)
        assert parts.shape == (*gold.shape, len(CRITERIA))
        expected = rubric.score(parts.reshape(-1, len(CRITERIA)), clip=False)
        np.testing.assert_allclose(gold.ravel(), expected, atol=1e-5)
    best = json.loads((left["best"] / "done.json").read_text())["results"]
    assert {*best["gold_by"]} == {*CRITERIA}


def test_who_is_asked(left):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    tokenizer = None  # rewards of text do not need the policy's
    texts = (["describe tea :"] * 2, ["tea is bitter . thanks", "tea is"], [{}, {}])

    def ask(name):
        reward = make_reward(name, left, mesh, tokenizer)
        assert reward.needs_text
        return reward, reward.score(None, Texts(*texts, [[], []]))

    reward, scores = ask("rubric")
    assert reward.on_host
    np.testing.assert_allclose(scores.values, [1.0, 0.0 + 2 / 4.5 - 0.5 / 4.5], atol=1e-6)
    assert scores.failed is None
    _, shy = ask("shy")
    np.testing.assert_array_equal(shy.failed, [True, False])
    assert score_metrics("shy", shy)["reward/shy/fail_rate"] == 0.5
    np.testing.assert_array_equal(shy.parts["helpful"], [0, 0.5])
    local, scores = ask("local")
    assert not local.on_host
    assert (scores.values > 0).all()
    assert (scores.values < 1).all()
    np.testing.assert_allclose(scores.parts["local"], scores.values, atol=1e-6)


def test_the_rubric_is_part_of_the_fingerprint(tmp_path):
    path = tmp_path / "rubric.toml"
    path.write_text(Path(LARDER).read_text())
    stage = replace(TRUTH, rubric=str(path))
    named = replace(TRUTH, rubric="", rubrics={"one": str(path)})
    before = [fingerprint(s, 0, {}) for s in (stage, named)]
    assert before == [fingerprint(s, 0, {}) for s in (stage, named)]
    path.write_text(Path(LARDER).read_text().replace("weight = 0.5", "weight = 0.75"))
    assert all(a != b for a, b in zip(before, [fingerprint(s, 0, {}) for s in (stage, named)], strict=True))


def test_configs_survive_json():
    experiment = only("pretrain", "sft", rubric=replace(TRUTH, rubrics={"other": LARDER}))
    assert from_dict(Experiment, json.loads(json.dumps(to_dict(experiment)))) == experiment


URL = Endpoint("http://localhost:1", "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by": None}, "give either judge .* or by"),
        ({"judge": "sft"}, "give either judge .* or by"),
        ({"rubric": "nowhere.toml"}, "nowhere.toml: no such file"),
        ({"rubrics": {"a": "nowhere.toml"}}, "nowhere.toml: no such file"),
        ({"marks": ("1", "2")}, "marks are the replies of how 'holistic'"),
        ({"how": "holistic"}, "clip is about how 'explicit'"),
        ({"how": "holistic", "clip": True, "marks": ("1", "one")}, "at least 2 different numbers"),
        ({"template": "{question} {answer}"}, r"\{criterion\} is missing"),
        ({"fallback": 2.0}, "fallback, from 0 to 1"),
        ({"by": None, "judge": "sft", "fallback": 0.5}, "a model of the experiment always"),
    ],
)
def test_mistakes_are_told_before_anything_runs(change, message):
    with pytest.raises(UserError, match=message):
        replace(TRUTH, **change).validate(tiny.experiment.stages)


def test_more_mistakes(tmp_path, monkeypatch):
    path = tmp_path / "taken.json"
    path.write_text(json.dumps({"criteria": [{"name": "score", "question": "?"}]}))
    with pytest.raises(UserError, match="'score' cannot name a criterion"):
        replace(TRUTH, rubric=str(path)).validate(tiny.experiment.stages)
    stages = {**tiny.experiment.stages, "rubric": TRUTH}
    labels = RubricLabels(rubric="reward_model", preferences="preferences")
    with pytest.raises(UserError, match="'reward_model' is RewardModel; it must be a RubricReward"):
        labels.validate(stages)
    with pytest.raises(UserError, match="margin must be"):
        replace(labels, rubric="rubric", margin=-1.0).validate(stages)
    with pytest.raises(UserError, match="either preferences"):
        replace(labels, rubric="rubric", preferences="").validate(stages)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UserError, match="NO_SUCH_KEY is not set"):
        replace(TRUTH, by=replace(URL, api_key_env="NO_SUCH_KEY")).check_mesh(MeshConfig())
