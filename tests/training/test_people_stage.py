"""AggregateLabels: what comes of votes, what is said of those who cast them, and who refuses what it cannot use."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
from tiny_runs import QUIET, folders

from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.ranked_dpo import RankedDPOConfig
from jrlhf.algorithms.reward_model import RewardModelConfig
from jrlhf.config import UserError
from jrlhf.data.labelers import votes_of
from jrlhf.data.sources import FileSource, load
from jrlhf.experiment import Experiment, run
from jrlhf.training.data import best_and_worst, check_plain, pair_arrays
from jrlhf.training.stages import AggregateLabels, DirectAlignment, RewardModel
from jrlhf.training.stages.people import agreement
from jrlhf.types import PreferenceBatch


def write(folder, rows) -> FileSource:
    path = folder / "votes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileSource(str(path), format="ranking")


def vote(who, ranks, responses="ab", prompt="q"):
    return {"prompt": prompt, "responses": [*responses], "ranks": ranks, "labeler": who}


VOTES = [
    *(vote(who, ranks) for who, ranks in (("x", [1, 2]), ("y", [1, 2]), ("z", [2, 1]))),
    *(vote(who, ranks, "bc") for who, ranks in (("x", [1, 2]), ("y", [1, 1]))),
    *(vote(who, ranks, "ac") for who, ranks in (("x", [2, 1]), ("y", [1, 2]))),
    vote("x", [2, 1], "ba"),  # again, and the same as before
    vote("z", [1, 2], "ab"),  # again, and another
]


def aggregated(tmp_path, method, weight="one", rows=VOTES):
    """(rows, results) of the stage alone."""
    stage = AggregateLabels(data=write(tmp_path, rows), method=method, weight=weight)
    folder = folders(run(Experiment("votes", {"people": stage}), tmp_path / method / weight, console=QUIET))[
        "people"
    ]
    lines = (folder / "preferences.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((folder / "done.json").read_text())["results"]


def test_the_share_of_votes(tmp_path):
    rows, results = aggregated(tmp_path, "soft", "votes")
    assert [(r["responses"], r["votes"], r["weight"]) for r in rows] == [
        (["a", "b"], [4, 0, 1], 5), (["b", "c"], [1, 1, 0], 2), (["a", "c"], [1, 0, 1], 2)
    ]  # fmt: skip
    assert [r["probability"] for r in rows] == [0.8, 0.75, 0.5]
    assert [r["ranks"] for r in rows] == [[1, 2], [1, 2], [1, 1]]
    assert results["with_ties"] == 1


def test_the_majority_is_a_hard_label(tmp_path):
    rows, results = aggregated(tmp_path, "majority")
    assert [r["ranks"] for r in rows] == [[1, 2], [1, 1], [1, 1]]
    assert not any("probability" in r or "weight" in r for r in rows)
    assert results["votes"] == 9


def test_what_is_said_of_the_labellers(tmp_path):
    _, results = aggregated(tmp_path, "majority")
    assert results["transitivity"] == {"total": 2, "cycles": 1, "violations": 1}  # x: a > b > c > a
    assert results["retest"] == {"agreement": 0.5, "pairs": 2}
    assert results["labelers"]["x"]["retest"] == 1
    assert results["labelers"]["z"]["retest"] == 0
    assert (results["labelers"]["x"]["violations"], results["labelers"]["y"]["violations"]) == (1, 0)
    # The last votes: x and y agree on ab, differ on bc and ac; z, who saw ab alone, agrees with both.
    assert results["labelers"]["z"]["agreement"] == 1
    assert results["labelers"]["x"]["agreement"] == pytest.approx(2 / 4)
    assert results["seen_by_several"] == 3
    assert results["raw_agreement"] == pytest.approx(1 / 3)
    # x: first, first, second; y: first, tie, first. In both orders x says either half of the time, y all three alike.
    assert results["kappa"]["x and y"] == pytest.approx((1 / 3 - 1 / 3) / (1 - 1 / 3))
    assert results["kappa"]["x and z"] == 1


@pytest.mark.parametrize("method", ["soft", "dawid_skene", "bradley_terry"])
def test_the_order_of_answers_in_the_file_says_nothing(tmp_path, method):
    """Files that put the chosen answer first make everybody say "first": whom to believe, and how far people agree,
    must be what it is where the answers stand in any order."""
    rng = np.random.default_rng(1)
    shuffled, chosen_first = [], []
    for n in range(30):
        better = bool(rng.integers(2))
        for who, right in (("x", 0.95), ("y", 0.8), ("z", 0.6)):
            ranks = [1, 2] if better == (rng.random() < right) else [2, 1]
            shuffled.append(vote(who, ranks, prompt=f"q{n}"))
            a, b = shuffled[-1]["responses"]
            answers = (a, b) if ranks == [1, 2] else (b, a)
            chosen_first.append(vote(who, [1, 2], prompt=f"q{n}") | {"responses": [*answers]})
    told = []
    for name, rows in (("shuffled", shuffled), ("chosen", chosen_first)):
        (tmp_path / name).mkdir()
        found, results = aggregated(tmp_path / name, method, rows=rows)
        chance = {
            r["prompt"]: r["probability"] if r["responses"][0] == "a" else 1 - r["probability"] for r in found
        }
        told.append((chance, results["kappa"], results["alpha"], results["labelers"]))
    for one, other in zip(*told, strict=True):
        flat = lambda tree: dict(pairs_of(tree))  # noqa: E731
        assert flat(one) == pytest.approx(flat(other), abs=1e-4)
    assert told[0][1]["x and y"] > 0.2


def pairs_of(tree, path=()):
    """Numbers of a nested dict by their path."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from pairs_of(value, (*path, name))
        elif value is not None:
            yield (*path, name), value


@pytest.mark.parametrize(("method", "told"), [("dawid_skene", "reliability"), ("bradley_terry", "sharpness")])
def test_whoever_disagrees_with_all_counts_less(tmp_path, method, told):
    rng = np.random.default_rng(0)
    rows = []
    for n in range(40):
        better = bool(rng.integers(2))
        for who in ("careful", "steady", "guessing", "contrary"):
            right = {"careful": 0.97, "steady": 0.9, "guessing": 0.5, "contrary": 0.1}[who]
            rows.append(vote(who, [1, 2] if better == (rng.random() < right) else [2, 1], prompt=f"q{n}"))
    found, results = aggregated(tmp_path, method, rows=rows)
    known = {name: each[told] for name, each in results["labelers"].items()}
    assert known["careful"] > known["guessing"] > known["contrary"]
    assert known["steady"] > known["guessing"]
    assert all(0 <= r["probability"] <= 1 for r in found)
    # Two against two, the careful and the steady are believed.
    split = [r for r in found if r["votes"] == [2, 0, 2]]
    careful = {r["prompt"]: r["ranks"] for r in rows if r["labeler"] == "careful"}
    agree = {r["prompt"] for r in rows if r["labeler"] == "steady" and r["ranks"] == careful[r["prompt"]]}
    assert sum(r["prompt"] in agree for r in split) > 5
    assert all(r["ranks"] == careful[r["prompt"]] for r in split if r["prompt"] in agree)


def test_methods_that_ask_who_it_was(tmp_path):
    rows = [{"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2]}] * 2
    _, results = aggregated(tmp_path, "soft", rows=rows)
    assert results["labelers"]["(no name)"]["votes"] == 2
    assert results["retest"]["pairs"] == 0
    assert results["raw_agreement"] == 1
    with pytest.raises(UserError, match="'dawid_skene' asks who labelled each row"):
        aggregated(tmp_path, "dawid_skene", rows=rows)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "dawid_skeen"}, "people.method: expected one of 'majority', 'soft', 'dawid_skene'"),
        ({"weight": "vote"}, "people.weight: expected one of 'one', 'votes'"),
        ({"data": None}, "give either preferences"),
    ],
)
def test_mistakes_at_config_time(tmp_path, wrong, message):
    stage = replace(AggregateLabels(data=write(tmp_path, VOTES)), **wrong)
    with pytest.raises(UserError, match=message):
        run(Experiment("votes", {"people": stage}), tmp_path / "runs", console=QUIET)


# --- real votes -----------------------------------------------------------------------------------------------


def test_pandalm_annotators(shared_data):
    rows, _ = load(
        FileSource(str(shared_data / "pandalm-human" / "testset-v1.json"), format="pandalm_annotators")
    )
    report, of_each = agreement(votes_of(rows))
    assert (report["votes"], report["pairs"]) == (2817, 837)
    assert report["alpha"]["nominal"] == pytest.approx(0.8618, abs=5e-5)
    assert report["kappa"]["annotator1 and annotator2"] == pytest.approx(0.846, abs=5e-4)
    assert report["transitivity"] == {"total": 1134, "cycles": 9, "violations": 17}
    assert of_each["annotator3"]["retest"] == 1


def test_fine_grained_qa_choices(shared_data):
    path = shared_data / "fine-grained-qa-feedback" / "dev_feedback.json"
    rows, _ = load(FileSource(str(path), format="qa_feedback_pairs"))
    report, _ = agreement(votes_of(rows))
    assert report["transitivity"] == {"total": 2000, "cycles": 0, "violations": 29}
    assert report["alpha"]["nominal"] is None  # everybody saw something else
    # The same by another way: no weak ranking of the three answers gives the three choices.
    broken = 0
    for record in json.loads(path.read_text()):
        choice = dict(
            zip(((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)), record["preference"], strict=True)
        )
        for i, j, k in ((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)):
            said = [{0: 0, 1: 1, 2: -1}[choice[pair]] for pair in ((i, j), (j, k), (i, k))]
            weak = [
                [int(np.sign(b - a)), int(np.sign(c - b)), int(np.sign(c - a))]
                for a in range(3)
                for b in range(3)
                for c in range(3)
            ]
            broken += said not in weak
    assert broken == 29


# --- who uses what ----------------------------------------------------------------------------------------------

SOFT = {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2], "probability": 0.8}
HEAVY = {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 2], "weight": 2}


@pytest.mark.parametrize(
    ("algorithm", "weight", "probability"),
    [
        (DPOConfig(), True, True),
        (DPOConfig(loss="hinge"), True, False),
        (DPOConfig(rpo_alpha=0.1), True, False),
        (DPOConfig(loss="aot"), False, False),
        (RankedDPOConfig(), False, False),
    ],
)
def test_what_an_algorithm_cannot_use_it_refuses(tmp_path, algorithm, weight, probability):
    stage = DirectAlignment(start="sft", algorithm=algorithm, loop=tiny.loop(1))
    for row, name, reads in ((HEAVY, "weight", weight), (SOFT, "probability", probability)):
        assert (name not in stage.unread) == reads
        if not reads:
            with pytest.raises(UserError, match=f"preferences row 2 has '{name}' .*cannot use"):
                check_plain([vote("x", [1, 2]), row], stage.unread, "it")


def test_rows_that_say_nothing_new_are_fine():
    check_plain([SOFT | {"probability": 1.0}, HEAVY | {"weight": 1.0}], ("weight", "probability"), "it")
    with pytest.raises(UserError, match="single labelled answers cannot use"):
        best_and_worst([HEAVY])


@pytest.mark.parametrize("config", [{"objective": "plackett_luce"}, {"ties": "davidson"}, {"margins": True}])
def test_reward_models_without_a_place_for_soft_labels(config):
    stage = RewardModel(
        start="sft", preferences="p", algorithm=RewardModelConfig(**config), loop=tiny.loop(1)
    )
    row = SOFT | {"scores": [1.0, 0.0]}
    assert stage._usable([row | {"probability": 1.0}], "preferences")
    with pytest.raises(UserError, match=r"has 'probability' 0\.8, which algorithm as it is set cannot use"):
        stage._usable([row], "preferences")


def test_pairs_on_which_the_votes_are_even():
    """They are pairs for who reads certainties, in the order of the rows; a plain tie never is."""
    tokens = np.arange(4 * 2 * 3).reshape(4, 2, 3).astype(np.int32)
    real = np.ones(tokens.shape, bool)
    ranks = np.asarray([[2, 1], [1, 1], [1, 1], [1, 2]], np.int32)
    certainty, weights = np.float32([0.7, 0.5, 1, 0.9]), np.float32([[1], [2], [3], [4]])
    batch = PreferenceBatch(tokens, real, real, ranks, np.zeros((4, 2), np.float32), (), weights, certainty)
    hard, soft = pair_arrays(batch, "all"), pair_arrays(batch, "all", even=True)
    np.testing.assert_array_equal(hard.tokens, [tokens[0, ::-1], tokens[3]])
    np.testing.assert_array_equal(soft.tokens, [tokens[0, ::-1], tokens[1], tokens[3]])
    np.testing.assert_array_equal(soft.certainty, np.float32([0.7, 0.5, 0.9]))
    np.testing.assert_array_equal(soft.weights, [1, 2, 4])
    nearly = batch._replace(certainty=np.float32([0.5, 0.5, 1, 1]))  # of the first: 0.4999999999
    assert len(pair_arrays(nearly, "all", even=True).tokens) == 3
    assert math.isclose(float(hard.weights.sum()), 5)
    assert pair_arrays(batch._replace(weights=(), certainty=()), "all").weights == ()
