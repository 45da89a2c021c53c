"""Groups of people: reward models of one group or with a head for each, what is made of them, and who is measured."""

import json
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from tiny_runs import QUIET, folders, one_device, only

from jrlhf.algorithms.reward_model import RewardModelConfig
from jrlhf.checkpoint import load_meta
from jrlhf.compare.report import write_report
from jrlhf.config import MeshConfig, UserError
from jrlhf.data.batching import encode_prompt
from jrlhf.experiment import run
from jrlhf.lab import group_gold
from jrlhf.ops.reward_losses import combine_scores
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import load_model
from jrlhf.training.data import group_weights
from jrlhf.training.evaluation import Sampler, score
from jrlhf.training.rewards import make_reward, read_texts
from jrlhf.training.stages import AggregateLabels, Evaluate, RewardEnsemble

BASE = replace(tiny.experiment.stages["reward_model"], loop=tiny.loop(3))
GROUPS = ("A*", "B*")
STAGES = {
    "of_A": replace(BASE, labelers=("A*",), loop=tiny.loop(3, 4)),
    "of_B": replace(BASE, labelers=("B*",), loop=tiny.loop(3, 4)),
    "heads": replace(BASE, algorithm=RewardModelConfig(groups=GROUPS)),
    "only_A": replace(BASE, algorithm=RewardModelConfig(groups=GROUPS), weights={"A*": 1.0}),
    "mixture": replace(BASE, algorithm=RewardModelConfig(mixture=2)),
    "worst": RewardEnsemble(("heads",), combine="min"),
    "vote": RewardEnsemble(("of_A", "of_B"), combine="vote", weights=(1.0, 3.0)),
    "first_head": RewardEnsemble(("heads",), weights=(1.0, 0.0)),
    "votes": AggregateLabels("preferences", weight="votes"),
    "of_votes": replace(BASE, preferences="votes"),
    "dpo_of_votes": replace(tiny.experiment.stages["dpo"], preferences="votes", loop=tiny.loop(2)),
    "evaluate": Evaluate(
        ("sft", "dpo_of_votes"),
        "larder_gold",
        groups=("larder_gold_A", "of_B"),
        prompts={"eval": tiny.prompts},
        sampling=tiny.answers,
        samples=2,
    ),
}


@pytest.fixture(scope="module")
def finished(one_device_runs):
    """The run's folder."""
    with one_device():
        kept = only("pretrain", "sft", "preferences", **STAGES)
        return run(kept, one_device_runs, console=QUIET)


@pytest.fixture(scope="module")
def left(finished):
    return folders(finished)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def rewards(left, mesh):
    """rewards(stage) -> [N] of the start policy's answers."""
    policy = load_model(left["sft"], mesh)
    rows = list(tiny.prompts.rows())
    ids = [encode_prompt(row, policy.tokenizer, 20).tolist() for row in rows]
    sampler = Sampler(policy.model, policy.tokenizer, mesh, tiny.answers, 20)
    samples = sampler.sample(policy.params, ids, jax.random.key(5))
    texts = read_texts(samples, rows, policy.tokenizer)
    return lambda name: score(make_reward(name, left, mesh, policy.tokenizer), samples, texts, mesh)


def results(folder):
    return json.loads((folder / "done.json").read_text())["results"]


def test_a_model_of_one_group_learns_from_its_labellers_alone(left):
    rows = [json.loads(line) for line in (left["preferences"] / "preferences.jsonl").read_text().splitlines()]
    assert 0 < sum(row["labeler"][0] == "A" for row in rows) < len(rows)
    held = {name: results(left[name])["held_out_pairs"] for name in ("of_A", "of_B", "heads")}
    assert held["of_A"] + held["of_B"] == held["heads"]
    each = {name: results(left[name])["held_out_accuracy_of_labelers"] for name in ("of_A", "of_B", "heads")}
    assert {who[0] for who in each["of_A"]} == {"A"}
    assert each["of_A"].keys() | each["of_B"].keys() == each["heads"].keys()
    told = [(of["accuracy"], of["pairs"]) for of in each["of_A"].values()]
    right = sum(accuracy * pairs for accuracy, pairs in told)
    assert right / held["of_A"] == pytest.approx(results(left["of_A"])["held_out_accuracy"])
    norms = [load_meta(left[name] / "model")["normalization"]["std"] for name in ("of_A", "of_B", "heads")]
    assert len({*norms}) == 3


def test_heads_of_groups(left):
    found = results(left["heads"])
    assert set(found["held_out_accuracy_of_heads"]) == {*GROUPS}
    assert found["held_out_disagreement"] > 0
    meta = load_meta(left["heads"] / "model")["heads"]
    assert (meta["ensemble"], meta["weights"]) == (True, [0.5, 0.5])
    assert load_meta(left["only_A"] / "model")["heads"]["weights"] == [1.0, 0.0]


def test_types_of_labellers_are_told(left):
    types = results(left["mixture"])["types"]
    assert sum(types["share"]) == pytest.approx(1, abs=1e-6)
    rows = [json.loads(line) for line in (left["preferences"] / "preferences.jsonl").read_text().splitlines()]
    assert {*types["of_raters"]} <= {row["labeler"] for row in rows}
    assert all(sum(each) == pytest.approx(1, abs=1e-6) for each in types["of_raters"].values())
    assert np.mean([max(each) for each in types["of_raters"].values()]) == pytest.approx(types["certainty"])
    assert set(results(left["mixture"])["held_out_accuracy_of_heads"]) == {"type_0", "type_1"}


def test_the_worst_group_the_vote_and_one_head(rewards):
    normal = lambda x: np.asarray(combine_scores(x[None], "vote"))  # noqa: E731
    vote = 0.25 * normal(rewards("of_A")) + 0.75 * normal(rewards("of_B"))
    np.testing.assert_allclose(rewards("vote"), vote, rtol=1e-4)
    np.testing.assert_allclose(rewards("first_head"), rewards("only_A"), rtol=1e-4, atol=1e-4)
    worst, first = rewards("worst"), rewards("first_head")
    assert np.all(worst <= first + 1e-4)
    assert np.any(worst < first - 1e-3)
    assert np.any(np.isclose(worst, first, atol=1e-4))


def test_training_on_votes(left):
    """Single votes are their own aggregate: each ranking of three is three pairs, with soft labels of 0, 1/2 and 1."""
    rows = [json.loads(line) for line in (left["votes"] / "preferences.jsonl").read_text().splitlines()]
    assert results(left["votes"])["pairs"] == len(rows) > 32
    assert {row["probability"] for row in rows} <= {0.0, 0.5, 1.0}
    assert 0 <= results(left["of_votes"])["held_out_accuracy"] <= 1
    assert 0 <= results(left["dpo_of_votes"])["implicit_accuracy"] <= 1


def test_every_group_is_measured_and_shown(left, finished, tmp_path):
    found = json.loads((left["evaluate"] / "evaluation.json").read_text())
    measured = found["policies"]["sft"]["splits"]["eval"]["groups"]
    assert np.shape(measured["larder_gold_A"]) == np.shape(measured["of_B"]) == (16, 2)
    sample = found["samples"][0]
    whole = group_gold("A", [sample["prompt"]], [sample["answers"]["sft"]["text"]], [{"ended": True}])[0]
    cut = group_gold("A", [sample["prompt"]], [sample["answers"]["sft"]["text"]], [{"ended": False}])[0]
    assert any(measured["larder_gold_A"][0][0] == pytest.approx(x, abs=1e-5) for x in (whole, cut))
    told = results(left["evaluate"])["dpo_of_votes"]["eval"]
    assert told["worst_group"] == min(told["groups"].values())
    report = write_report([finished], tmp_path, QUIET)
    text = (report if report.suffix == ".html" else tmp_path / "report.html").read_text()
    section = text[text.index("<h3>Groups</h3>") : text.index('<h2 id="figures">')]
    assert len(re.findall(r'<th scope="row">', section)) == 2
    assert f"({min(told['groups'], key=told['groups'].get)})" in section


EVALUATE = replace(STAGES["evaluate"], policies=("sft",))


# --- mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"rm": replace(BASE, labelers=("C*",))}, r"preferences: labelers: nobody matches 'C\*'. .*Labellers: "),
        (
            {"rm": replace(BASE, algorithm=RewardModelConfig(groups=("A*", "B0*")))},
            r"the labeller 'B1\d' must match one of algorithm.groups \('A\*', 'B0\*'\), and matches none",
        ),
        ({"rm": replace(BASE, weights={"A*": 1.0})}, "weights are of heads for criteria, groups or a mixture"),
        (
            {"rm": replace(BASE, algorithm=RewardModelConfig(groups=GROUPS), weights={"A": 1.0})},
            r"weights: 'A' is no head. Did you mean 'A\*'",
        ),
        ({"rm": BASE, "both": RewardEnsemble(("rm", "heads"), weights=(1.0, 1.0))}, "2 are given for 3 scores"),
        ({"both": RewardEnsemble(("heads",), combine="min", weights=(1.0, 1.0))}, "not in 'min'"),
        ({"both": RewardEnsemble(("heads",), weights=(1.0, -1.0))}, "weights must not be negative"),
        ({"both": RewardEnsemble(("reward_model",))}, "is no ensemble; add members"),
        (
            {"judges": RewardEnsemble(("heads",), combine="min"), "both": RewardEnsemble(("judges", "heads"), "vote")},
            "'judges' is a RewardEnsemble; combine 'vote' reads scores that are normalised",
        ),
        ({"evaluate": replace(EVALUATE, groups=("larder_gold_A",))}, "two or more rewards"),
        (
            {"evaluate": replace(EVALUATE, groups=("larder_gold_A", "larder_gold_D"))},
            "groups 'larder_gold_D' is neither a stage nor a known reward. Did you mean",
        ),
    ],
)  # fmt: skip
def test_mistakes_have_one_message(left, one_device_runs, stages, message):
    kept = ("pretrain", "sft", "preferences", "reward_model")
    more = {name: STAGES[name] for name in ("heads",)} | stages
    with pytest.raises(UserError, match=message), one_device():
        run(only(*kept[: 4 if "reward_model" in str(stages) else 3], **more), one_device_runs, console=QUIET)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"groups": ("A*",)},
            "groups must be two or more patterns that differ, got 'A*'; for one group alone",
        ),
        ({"groups": GROUPS, "mixture": 2}, "groups and mixture: what the heads are for must be one of them"),
        ({"groups": GROUPS, "heads": 2}, "heads and groups"),
        ({"mixture": 1}, "mixture is 1: at least 2 heads"),
        ({"mixture": 2, "objective": "regression"}, "not by ratings"),
    ],
)
def test_heads_are_for_one_thing(wrong, message):
    with pytest.raises(UserError) as error:
        RewardModelConfig(**wrong)
    assert message in str(error.value)


def test_rows_weigh_in_their_own_group():
    rows = [{"labeler": "A1", "weight": 2.0}, {"labeler": "B7"}]
    np.testing.assert_array_equal(group_weights(rows, GROUPS, "here"), [[2, 0], [0, 1]])
    with pytest.raises(UserError, match=r"here row 1: the labeller 'A1' .* matches 'A\*' and '\*1'"):
        group_weights(rows, ("A*", "*1"), "here")
    with pytest.raises(UserError, match=r"no field 'labeler', which algorithm\.groups needs"):
        group_weights([{}], GROUPS, "here")
