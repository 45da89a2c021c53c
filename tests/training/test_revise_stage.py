"""Constitutional AI as stages: answers revised by principles, SFT on them, labels by principles."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from tiny_runs import QUIET, folders, jsonl, one_device, only

from jrlhf.config import MeshConfig, Source, StageRows, UserError, from_dict, to_dict
from jrlhf.data.mixture import Mixture
from jrlhf.experiment import Experiment, dry_run, fingerprint, run
from jrlhf.lab import LarderDemonstrations, LarderPrompts, gold_scores
from jrlhf.lab.judges import read_answer, without_harm
from jrlhf.lab.larder import FACTS
from jrlhf.rewards.endpoint import Endpoint
from jrlhf.rewards.judges import Program, StoredVerdicts
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.training.lab_judges import LarderJudge
from jrlhf.training.stages import SFT, PrincipleLabels, Revise
from jrlhf.training.stages.revise import drawn

LARDER = str(Path(__file__).parents[2] / "experiments" / "larder" / "constitution.txt")
PROMPTS = LarderPrompts(size=24, seed=4)


@dataclass(frozen=True)
class Echo(Program):
    """Writes what it was asked, in one line; of every fifth question nothing."""

    def write(self, questions, seed):
        flat = [q.replace("\n", " ") for q in questions]
        return [None if n % 5 == 4 else f"{seed % 7} {q}" for n, q in enumerate(flat)]


@dataclass(frozen=True)
class FirstPlace(Program):
    """Prefers the answer shown first, and says nothing of questions by the second principle."""

    def verdicts(self, questions, options):
        return np.array([[np.nan, np.nan] if "helpful" in q else [1.0, 0.0] for q in questions])


@dataclass(frozen=True)
class Dilemmas(Source):
    """Two answers each: the first does no harm, the second helps; people like them the same."""

    def rows(self):
        for safe in ("tea", "honey", "salt", "rice", "milk", "bread"):
            for hazard in ("bleach", "ammonia"):
                harmless, helpful = (
                    f"sorry {hazard} .",
                    f"{safe} is {FACTS[safe]} . {hazard} is {FACTS[hazard]} .",
                )
                yield {
                    "prompt": f"describe {safe} and {hazard} :", "responses": [harmless, helpful], "ranks": [1, 1]
                }  # fmt: skip


REVISE = Revise(start="sft", prompts=PROMPTS, principles=LARDER, by=LarderJudge(1.0), sampling=tiny.answers)
TWO = """Be kind.

critique: What lacks?
revise: Mend it.
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("principles") / "two.txt"
    path.write_text(TWO)
    return str(path)


@pytest.fixture(scope="module")
def left(one_device_runs, two):
    stages = {
        "revise": REVISE,
        "echo": replace(REVISE, by=Echo(), principles=two, rounds=2),
        "own": replace(REVISE, by=None, principles=two, max_prompt=8, too_long="drop",
                       prompts=LarderPrompts(size=64, seed=4),
                       writing=SamplingConfig(max_new_tokens=4)),
        "revised": SFT(
            start="pretrain",
            data=Mixture((StageRows("revise"), LarderDemonstrations(size=64, seed=5))),
            optim=tiny.adam,
            loop=tiny.loop(2),
            eval_rows=4,
        ),
        "labels": PrincipleLabels(data=Dilemmas(), principles=LARDER, by=LarderJudge(1.0)),
        "biased": PrincipleLabels(preferences="preferences", principles=LARDER, by=FirstPlace(), soft=False),
    }  # fmt: skip
    experiment = only("pretrain", "sft", "preferences", **stages)
    with one_device():
        return folders(run(experiment, one_device_runs, console=QUIET))


def results(folder: Path) -> dict:
    return json.loads((folder / "done.json").read_text())["results"]


def test_revisions_are_demonstrations_without_harm(left):
    rows, traces = jsonl(left["revise"] / "demonstrations.jsonl"), jsonl(left["revise"] / "trace.jsonl")
    assert [t["prompt"] for t in traces] == [row["prompt"] for row in PROMPTS.rows()]
    whole = [t for t in traces if t["answers"][-1] is not None]
    assert rows == [{"prompt": t["prompt"], "completion": t["answers"][-1]} for t in whole]
    for t in whole:
        first, last = t["answers"]
        assert last == without_harm(read_answer(t["prompt"], first))
        assert len(t["critiques"]) == 1
        assert t["principles"] == [0]  # the only one with a critique
    prompts = [t["prompt"] for t in whole]
    before, after = (
        gold_scores(prompts, [t["answers"][n] for t in whole], [{}] * len(whole))["harmless"] for n in (0, 1)
    )
    assert after.mean() > before.mean()
    found = results(left["revise"])
    assert found["rows"] == len(rows)
    assert found["of_prompts"] == len(traces)
    assert found["revised"] == pytest.approx(np.mean([t["answers"][0] != t["answers"][1] for t in whole]))


def test_each_round_asks_for_a_critique_and_then_a_revision(left):
    traces = jsonl(left["echo"] / "trace.jsonl")
    lost = [t for t in traces if t["answers"][-1] is None]
    assert 0 < len(lost) < len(traces)
    assert len(jsonl(left["echo"] / "demonstrations.jsonl")) == len(traces) - len(lost)
    requests = (("Say in what the answer falls short", "Rewrite the answer"), ("What lacks?", "Mend it."))
    drawn_ones = set()
    for t in traces:
        if t in lost:
            continue
        for r in range(2):
            which = t["principles"][r]
            drawn_ones.add(which)
            critique, revision = t["critiques"][r], t["answers"][r + 1]
            shown = " ".join(f"Question: {t['prompt']} Answer: {t['answers'][r]}".split())
            assert shown in " ".join(critique.split())
            assert requests[which][0] in critique
            assert f"Critique: {critique}" in revision
            assert requests[which][1] in revision
    assert drawn_ones == {0, 1}


def test_a_model_writes_for_itself(left):
    traces = jsonl(left["own"] / "trace.jsonl")
    assert len(traces) > 3
    assert all(isinstance(t["critiques"][0], str) for t in traces)
    assert results(left["own"])["revised"] > 0


def test_sft_learns_from_what_was_revised(left):
    assert results(left["revised"])["eval_loss"] > 0
    config = json.loads((left["revised"] / "config.json").read_text())
    assert left["revise"].name in json.dumps(config["parents"])


def test_labels_follow_the_principle_that_was_drawn(left):
    rows = jsonl(left["labels"] / "preferences.jsonl")
    assert [row["responses"] for row in rows] == [row["responses"] for row in Dilemmas().rows()]
    which = drawn(len(rows), 2, "0 principles").tolist()
    assert {*which} == {0, 1}
    # The first principle is about harm, the second about help; both orders are asked, and the judge is sure.
    assert [row["probability"] for row in rows] == [1.0 - p for p in which]
    assert [row["ranks"] for row in rows] == [[1 + p, 2 - p] for p in which]
    found = results(left["labels"])
    assert found["flipped"]["mean"] == 0
    assert found["agreement"]["pairs"] == 0  # people were not sure


def test_a_liking_for_a_place_is_told_and_cancels(left):
    found = results(left["biased"])
    assert found["first_place"]["mean"] == 1
    assert found["tied"]["mean"] == 1
    assert 0 < found["abstained"]["mean"] < 1
    assert found["rows"] < found["of_rows"]


def test_principles_are_drawn_alike_and_by_seed():
    draws = drawn(3000, 3, "0")
    assert np.bincount(draws).tolist() == pytest.approx([1000] * 3, abs=120)
    np.testing.assert_array_equal(draws, drawn(3000, 3, "0"))
    assert (draws != drawn(3000, 3, "1")).mean() > 0.5


def test_the_principles_are_part_of_the_fingerprint(tmp_path, two):
    path = tmp_path / "principles.txt"
    labels = PrincipleLabels(preferences="preferences", principles=str(path), by=LarderJudge())
    path.write_text(TWO)
    before = [fingerprint(s, 0, {}) for s in (replace(REVISE, principles=str(path)), labels)]
    path.write_text(TWO + "\nBe brief.\n")
    after = [fingerprint(s, 0, {}) for s in (replace(REVISE, principles=str(path)), labels)]
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_the_dry_run_and_json(tmp_path):
    data = Mixture((StageRows("revise"), LarderDemonstrations(size=64)))
    sft = replace(tiny.experiment.stages["sft"], data=data)
    experiment = only("pretrain", "sft", revise=REVISE, again=sft)
    assert dry_run(experiment, tmp_path / "runs").row_count == 4
    assert from_dict(Experiment, json.loads(json.dumps(to_dict(experiment)))) == experiment


def test_a_mixture_is_one_source_after_another():
    parts = (LarderDemonstrations(size=3, seed=1), LarderDemonstrations(size=2, seed=2))
    rows = list(Mixture(parts).rows())
    assert rows == [*parts[0].rows(), *parts[1].rows()]
    with pytest.raises(UserError, match="must not be empty"):
        Mixture(())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"judge": "sft"}, "give judge .* or by, or neither"),
        ({"by": StoredVerdicts("x")}, "StoredVerdicts gives verdicts, but it does not write"),
        ({"writing": SamplingConfig()}, "writing is how a model of the experiment is sampled"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"principles": "nowhere.txt"}, "nowhere.txt: no such file of principles"),
        ({"sampling": SamplingConfig(max_new_tokens=64)}, "do not fit the context"),
    ],
)
def test_mistakes_are_told_before_anything_runs(change, message):
    with pytest.raises(UserError, match=message):
        replace(REVISE, **change).validate(tiny.experiment.stages)


def test_principles_that_lack_what_is_asked(tmp_path, monkeypatch):
    path = tmp_path / "principles.txt"
    path.write_text("choose: Which is kinder?")
    with pytest.raises(UserError, match="no principle has 'critique' and 'revise'"):
        replace(REVISE, principles=str(path)).validate(tiny.experiment.stages)
    path.write_text("critique: What?\nrevise: So.")
    labels = PrincipleLabels(preferences="preferences", principles=str(path), by=LarderJudge())
    with pytest.raises(UserError, match="no principle has 'choose'"):
        labels.validate(tiny.experiment.stages)
    with pytest.raises(UserError, match="give either judge"):
        replace(labels, by=None).validate(tiny.experiment.stages)
    by = Endpoint("http://localhost:1", "m", api_key_env="NO_SUCH_KEY")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UserError, match="NO_SUCH_KEY is not set"):
        replace(REVISE, by=by).check_mesh(MeshConfig())
