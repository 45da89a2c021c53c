"""A program's verdict as the reward of every stage that can name one."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from tiny_runs import QUIET, best_of_two, folders, one_device, only, trained

from jrlhf.algorithms.grpo import GRPOConfig
from jrlhf.config import Stage, UserError, from_dict, load_stage, to_dict
from jrlhf.data.gsm8k import GSM8K
from jrlhf.data.sources import FileSource
from jrlhf.experiment import run
from jrlhf.rewards.pool import CheckPool
from jrlhf.rewards.programs import Program
from jrlhf.rewards.verifiers import Number, Regex, Within
from jrlhf.training.data import load_rows
from jrlhf.training.stages import Evaluate, OnPolicy, Verifier

WORD = Regex(pattern=r"\bis\b")
grpo = OnPolicy(
    start="sft",
    reward="word",
    gold="strict",
    prompts=tiny.prompts,
    algorithm=GRPOConfig(group_size=4, minibatches=1),
    sampling=tiny.answers,
    optim=tiny.adam,
    loop=tiny.loop(2),
)


@pytest.fixture(scope="module")
def left(one_device_runs):
    """Every stage that can name a reward, each with a verifier: {stage: folder}."""
    stages = {
        "word": Verifier(WORD),
        "strict": Verifier(Regex(pattern=r"(a+)+b"), right=2.0, wrong=-1.0, workers=1),
        "ppo": replace(tiny.experiment.stages["ppo"], reward="word", gold="strict", critic="policy"),
        "grpo": grpo,
        "best": best_of_two("word", "strict"),
        "evaluate": Evaluate(
            policies=("sft", "grpo"),
            gold="word",
            prompts={"eval": tiny.prompts},
            samples=4,
            sampling=tiny.answers,
        ),
    }
    with one_device():
        return folders(run(only("pretrain", "sft", **stages), one_device_runs, console=QUIET))


def test_evaluation_reports_what_the_check_says(left):
    evaluation = json.loads((left["evaluate"] / "evaluation.json").read_text())
    shown = [answer for sample in evaluation["samples"] for answer in sample["answers"].values()]
    assert shown
    for answer in shown:
        assert answer["gold"] == WORD.score("", answer["text"], {})
    results = json.loads((left["evaluate"] / "done.json").read_text())["results"]["sft"]["eval"]
    assert {"pass_at_1", "pass_at_2", "pass_at_4", "zero_variance"} <= set(results)
    gold = np.asarray(evaluation["policies"]["sft"]["splits"]["eval"]["gold"])
    assert gold.shape[1] == 4
    assert results["pass_at_1"] == pytest.approx(gold.mean())
    assert results["pass_at_4"] == pytest.approx(gold.max(axis=1).mean())


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_training_logs_the_reward_and_what_was_not_scored(left, name):
    for row in trained(left[name]):
        assert 0 <= row["reward/score/mean"] <= 1
        assert row["reward/strict/mean"] == -1
        for reward in ("word", "strict"):
            assert row[f"reward/{reward}/fail_rate"] == 0
            assert row[f"reward/{reward}/timeout_rate"] == 0


def test_best_of_n_chooses_by_it(left):
    table = json.loads((left["best"] / "best_of_n.json").read_text())
    assert np.mean(table["per_prompt"]["proxy"]["2"]) >= np.mean(table["per_prompt"]["proxy"]["1"])
    assert np.mean(table["per_prompt"]["gold"]["2"]) == -1


def test_a_check_that_forks_is_tried_apart_from_the_accelerator(tmp_path):
    """This process has a JAX backend, whose threads a fork would break: it warns, which is an error here."""
    jax.devices()
    check = Program(allow_execution=True)
    try:
        CheckPool(check, workers=1).start()
    except UserError as error:
        pytest.skip(str(error))
    ctx = SimpleNamespace(folder=tmp_path)
    assert Verifier(check).run(ctx) == {}
    assert json.loads((tmp_path / "verifier.json").read_text())["check"]["type"] == "Program"


def test_a_check_that_cannot_work_here_is_known_at_once(tmp_path):
    with pytest.raises(UserError, match=r"Program\.allow_execution is false"):
        Verifier(Program()).run(SimpleNamespace(folder=tmp_path))
    assert not list(tmp_path.iterdir())


def test_its_folder_says_all_there_is_to_know(left):
    stage, _ = load_stage(left["strict"])
    assert stage == Verifier(Regex(pattern=r"(a+)+b"), right=2.0, wrong=-1.0, workers=1)
    note = json.loads((left["strict"] / "verifier.json").read_text())
    assert note["check"] == {"type": "Regex", "pattern": "(a+)+b", "where": "search", "group": ""}
    assert (note["right"], note["wrong"], note["workers"]) == (2.0, -1.0, 1)
    assert (note["failed"], note["timed_out"]) == (
        -1.0,
        -1.0,
    )  # what breaks a check pays no more than what is wrong


def test_failing_may_cost_more_than_being_wrong(tmp_path):
    stage = Verifier(WORD, wrong=-1.0, failed=-2.0)
    stage.validate({})
    stage.run(SimpleNamespace(folder=tmp_path))
    note = json.loads((tmp_path / "verifier.json").read_text())
    assert (note["wrong"], note["failed"], note["timed_out"]) == (-1.0, -2.0, -1.0)


@pytest.mark.parametrize("check", [Number(), Within(check=Number(), tag="a"), Program(allow_execution=True)])
def test_a_config_names_checks(check):
    stage = Verifier(check, seconds=2.0)
    assert from_dict(Stage, json.loads(json.dumps(to_dict(stage, Stage)))) == stage


# --- mistakes, before anything runs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seconds": 0.0}, "seconds must be positive"),
        ({"seconds": float("inf")}, "seconds must be positive"),
        ({"workers": 0}, "workers must be positive"),
        ({"memory": -1}, "memory must be positive"),
        ({"failed": float("nan")}, "failed is a reward and must be finite"),
        ({"wrong": -1.0, "failed": 0.0}, r"failed 0.0 must not be more than wrong -1.0"),
        ({"timed_out": 0.5}, r"timed_out 0.5 must not be more than wrong 0.0"),
        ({"right": 0.0}, "right 0.0 must be more than wrong 0.0"),
        ({"check": Regex()}, r"Regex\.pattern must not be empty"),
        ({"check": Program()}, r"Program\.allow_execution is false"),
    ],
)
def test_a_mistake_in_a_field(changed, message):
    with pytest.raises(UserError, match=message):
        replace(Verifier(WORD), **changed).validate({})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileSource(str(path), kind="prompt")


def test_prompts_without_a_reference_are_found_before_anything_is_sampled(tmp_path, monkeypatch):
    without = write(tmp_path / "without.jsonl", [{"prompt": "1 + 1 ="}])
    fine = write(tmp_path / "fine.jsonl", [{"prompt": "1 + 1 =", "answer": "2"}])
    verifier = Verifier(Number())
    evaluate = Evaluate(policies=("sft",), gold="sums", prompts={"fine": fine, "other": without})
    for stage, where in (
        (replace(grpo, reward="sums", gold="", prompts=without), "rl.prompts"),
        (replace(grpo, reward="other", gold="sums", prompts=fine, eval_prompts=without), "rl.eval_prompts"),
        (evaluate, "rl.prompts"),
    ):
        with pytest.raises(UserError, match=f"stages.{where}: the check Number needs the field 'answer'"):
            verifier.validate({"sums": verifier, "rl": stage})
    verifier.validate({"sums": verifier, "rl": replace(grpo, reward="sums", gold="", prompts=fine)})
    verifier.validate({"sums": verifier, "rl": replace(grpo, reward="other", gold="", prompts=without)})
    gone = FileSource(str(tmp_path / "gone.jsonl"), kind="prompt")  # for the stage that reads it to say
    verifier.validate({"sums": verifier, "rl": replace(grpo, reward="sums", prompts=gone)})


# --- GSM8K --------------------------------------------------------------------------------------------------


def questions(folder, n=40):
    rows = [
        {"question": f"What is {i} times 1000?", "answer": f"It is <<{i}*1000={i}000>>{i},000.\n#### {i},000"}
        for i in range(n)
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_gsm8k_splits_by_question(tmp_path):
    path = questions(tmp_path)
    train, test = (list(GSM8K(path, split=s, test_fraction=0.3).rows()) for s in ("train", "test"))
    assert len(train) + len(test) == 40
    assert 4 < len(test) < 20
    ask = lambda rows: {row["prompt"][0]["content"] for row in rows}  # noqa: E731
    assert not ask(train) & ask(test)
    assert list(GSM8K(path, split="test", test_fraction=0.3, max_rows=3).rows()) == test[:3]
    assert list(GSM8K(path, test_fraction=0.3, seed=1).rows()) != train


def test_gsm8k_prompts(tmp_path):
    path = questions(tmp_path)
    (row,) = GSM8K(path, test_fraction=0.0, max_rows=1).rows()
    assert row["answer"] == "0000"
    (turn,) = row["prompt"]
    assert turn["role"] == "user"
    assert turn["content"].startswith("What is 0 times 1000?\n")
    (row,) = GSM8K(path, test_fraction=0.0, max_rows=1, chat="text", template="Q: {question} A:").rows()
    assert row == {"prompt": "Q: What is 0 times 1000? A:", "answer": "0000"}
    (row,) = GSM8K(path, test_fraction=0.0, max_rows=1, chat="text", kind="demonstration").rows()
    assert row["completion"] == " It is 0,000.\n#### 0,000"
    (row,) = GSM8K(path, test_fraction=0.0, max_rows=1, kind="demonstration", calculator=True).rows()
    assert row["completion"] == [{"role": "assistant", "content": "It is <<0*1000=0000>>0,000.\n#### 0,000"}]


@pytest.mark.parametrize("split", ["train", "test"])
def test_gsm8k_shots_are_training_questions_that_are_not_asked(tmp_path, split):
    path = questions(tmp_path)
    plain = list(GSM8K(path, split=split, chat="text", test_fraction=0.3).rows())
    train = list(GSM8K(path, chat="text", test_fraction=0.3, kind="demonstration").rows())
    shots = "".join(f"{row['prompt']}{row['completion']}\n\n" for row in train[:2])
    rows = list(GSM8K(path, split=split, chat="text", test_fraction=0.3, shots=2).rows())
    asked = plain[2:] if split == "train" else plain
    assert [row["prompt"] for row in rows] == [shots + row["prompt"] for row in asked]
    chat = list(GSM8K(path, split=split, test_fraction=0.3, shots=2).rows())
    assert [turn["role"] for turn in chat[0]["prompt"]] == ["user", "assistant", "user", "assistant", "user"]
    assert len(chat) == len(rows)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"template": "no place"}, r"GSM8K\.template has no \{question\}"),
        ({"test_fraction": 1.0}, r"GSM8K\.test_fraction"),
        ({"shots": -1}, r"GSM8K\.shots"),
        ({"max_rows": 0}, r"GSM8K\.max_rows"),
    ],
)
def test_gsm8k_mistakes(changed, message):
    with pytest.raises(UserError, match=message):
        GSM8K("train.jsonl", **changed)


def test_gsm8k_is_whole(shared_data):
    path = str(shared_data / "gsm8k" / "train.jsonl")
    train, test = (
        load_rows(GSM8K(path, split=split, shots=3), "prompt", QUIET) for split in ("train", "test")
    )
    assert len(train) + len(test) == 7473 - 3
    assert all(Number().score("", row["answer"], row) == 1 for row in (*train, *test))
