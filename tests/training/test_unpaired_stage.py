"""Learning from single labelled answers: the arrays, and the stage from start to report on the tiny pipeline."""

import json
from dataclasses import dataclass, replace
from io import StringIO

import numpy as np
import pytest
import tiny
from rich.console import Console
from tiny_runs import QUIET, evaluated, folders, one_device, only, trained

from jrlhf.algorithms.bco import BCOConfig
from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.kto import KTOConfig
from jrlhf.config import Source, UserError
from jrlhf.data.tokenizer import load_tokenizer
from jrlhf.experiment import run
from jrlhf.models.config import LoRAConfig
from jrlhf.training.data import best_and_worst, other_answers, unpaired_arrays
from jrlhf.training.stages import UnpairedAlignment

# --- arrays -------------------------------------------------------------------------------------------------


def test_of_ranked_answers_the_best_are_desirable_and_the_worst_not():
    rows = [
        {"prompt": "a", "responses": ["1", "2", "3", "4"], "ranks": [2, 1, 3, 1], "ended": [True, False, True, True]},
        {"prompt": "b", "responses": ["5", "6"], "ranks": [1, 1]},
        {"prompt": "c", "responses": ["7", "8"], "ranks": [2, 1]},
    ]  # fmt: skip
    found = [(r["prompt"], r["completion"], r["label"], r["ended"]) for r in best_and_worst(rows)]
    assert found == [
        ("a", "2", True, False), ("a", "3", False, True), ("a", "4", True, True),
        ("c", "7", False, True), ("c", "8", True, True),
    ]  # fmt: skip


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2, 1), (4, 1, 1, 1, 1), (2, 2, 2, 2, 2)])
def test_every_answer_is_given_once_to_another_prompt(sizes):
    rng = np.random.default_rng(0)
    prompts = rng.permutation([f"p{i}" for i, n in enumerate(sizes) for _ in range(n)]).tolist()
    others = other_answers(prompts, seed=3)
    assert sorted(others) == list(range(len(prompts)))
    assert all(prompts[i] != prompts[j] for i, j in enumerate(others))
    np.testing.assert_array_equal(others, other_answers(prompts, seed=3))
    if len(sizes) == 5:
        assert any(np.any(others != other_answers(prompts, seed=s)) for s in range(5))


def test_a_prompt_with_most_of_the_answers_is_an_error():
    with pytest.raises(UserError, match="3 of the 5 answers"):
        other_answers(["a", "b", "a", "c", "a"], 0)


def test_arrays_hold_prompt_answer_and_another_ones_answer(runs):
    tokenizer = load_tokenizer(runs[0]["sft"] / "tokenizer")
    words = [tokenizer.decode([i]).strip() for i in range(8, 20)]
    rows = [
        {"prompt": " ".join(words[:2]), "completion": " ".join(words[2:5]), "label": True},
        {"prompt": words[5], "completion": " ".join(words[6:8]), "label": False, "ended": False},
    ]
    batch, prompts = unpaired_arrays(rows, tokenizer, 7, "error", QUIET, seed=0)
    assert prompts == [row["prompt"] for row in rows]
    np.testing.assert_array_equal(batch.labels, [True, False])

    def texts(answers):
        return [
            (tokenizer.decode(t[m & ~r].tolist()), tokenizer.decode(t[r].tolist()), int(r.sum()))
            for t, m, r in zip(answers.tokens, answers.mask, answers.response_mask, strict=True)
        ]

    first, second = rows
    # The first ended (one token more), the second was cut off.
    assert texts(batch.answers) == [
        (first["prompt"], first["completion"], 4),
        (second["prompt"], second["completion"], 2),
    ]
    assert texts(batch.mismatched) == [
        (first["prompt"], second["completion"], 2),
        (second["prompt"], first["completion"], 4),
    ]
    assert unpaired_arrays(rows, tokenizer, 7, "error", QUIET)[0].mismatched is None
    # An answer that is too long for the other prompt loses its end.
    longer = [dict(rows[0], prompt=" ".join(words[:3])), dict(rows[1], completion=" ".join(words[5:11]))]
    cut, _ = unpaired_arrays(longer, tokenizer, 8, "error", QUIET, seed=0)
    assert cut.mismatched.tokens.shape[1] == 8
    assert cut.mismatched.mask.sum(axis=1).max() == 8


# --- the stage ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled(Source):
    """Answers of few words, wanted where they name the first word of the prompt."""

    size: int = 40

    def rows(self):
        prompts = list(tiny.prompts.rows())
        for i in range(self.size):
            prompt = prompts[i % len(prompts)]["prompt"]
            words = prompt.split()
            yield {"prompt": prompt, "completion": words[i % 2], "label": i % 2 == 0}


kto = UnpairedAlignment(
    start="sft",
    preferences="preferences",
    algorithm=KTOConfig(beta=0.1),
    optim=tiny.adam,
    eval_prompts=tiny.prompts,
    gold="larder_gold",
    sampling=tiny.answers,
    loop=tiny.loop(4, eval_every=2),
    eval_fraction=0.25,
)


@pytest.fixture(scope="module")
def runs(one_device_runs):
    """The stages' folders, and what was said."""
    said = Console(file=StringIO(), width=250)
    stages = {
        "kto": kto,
        "bco": replace(
            kto, preferences="", data=Labelled(), algorithm=BCOConfig(), eval_prompts=None, gold="",
            lora=LoRAConfig(rank=2), loop=tiny.loop(3),
        ),
    }  # fmt: skip
    before = only("pretrain", "sft", "preferences", **stages)
    with one_device():
        return folders(run(before, one_device_runs, console=said)), said.file.getvalue()


def test_kto_begins_at_one_half_and_moves(runs):
    rows = trained(runs[0]["kto"])
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["pref/loss"] == pytest.approx(0.5, abs=1e-5)
    assert rows[0]["pref/shift"] == pytest.approx(0, abs=1e-5)
    assert max(abs(row["pref/loss"] - 0.5) for row in rows) > 1e-3
    assert 0 < np.mean([row["pref/desirable_frac"] for row in rows]) < 1


def test_held_out_answers_are_measured_with_an_interval(runs):
    rows = evaluated(runs[0]["kto"])
    assert [row["step"] for row in rows] == [2, 4]
    last = rows[-1]
    assert (
        0
        <= last["eval/label_auc/ci_low"]
        <= last["eval/label_auc/mean"]
        <= last["eval/label_auc/ci_high"]
        <= 1
    )
    assert {"eval/larder_gold/mean", "eval/kl/mean"} < set(last)
    result = json.loads((runs[0]["kto"] / "done.json").read_text())["results"]
    assert result["implicit_auc"] == pytest.approx(last["eval/label_auc/mean"])
    assert result["desirable"] == result["undesirable"] > 8


def test_labels_are_counted_in_the_log(runs):
    assert "desirable" in runs[1]
    assert "undesirable" in runs[1]


def test_an_adapter_learns_from_binary_rows(runs):
    folder = runs[0]["bco"]
    assert (folder / "adapter").is_dir()
    rows = trained(folder)
    assert rows[0]["pref/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert rows[-1]["pref/shift"] != 0
    assert (folder / "model").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": Labelled()}, "give either preferences"),
        ({"preferences": ""}, "give either preferences"),
        ({"eval_fraction": 0.0}, "eval_fraction must be between 0 and 1"),
        ({"eval_prompts": None}, "gold is measured on samples"),
        ({"algorithm": replace(KTOConfig(), microbatches=3)}, "not divisible by algorithm.microbatches 3"),
    ],
)
def test_mistakes_are_found_before_anything_runs(changes, message):
    with pytest.raises(UserError, match=message):
        replace(kto, **changes).validate(tiny.experiment.stages)


def test_another_kind_of_algorithm_is_refused():
    with pytest.raises(UserError, match="DPOConfig is none that learns from single labelled answers"):
        replace(kto, algorithm=DPOConfig()).validate(tiny.experiment.stages)
