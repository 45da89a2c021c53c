"""A reward seen from the start policy's own answers: the formulas in NumPy, and what the stage leaves as a reward."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from tiny_runs import QUIET, best_of_two, folders, jsonl, one_device, only, rloo, some_answers

from jrlhf.config import MeshConfig, UserError
from jrlhf.experiment import run
from jrlhf.lab import LarderPrompts
from jrlhf.sharding import make_mesh
from jrlhf.training.rewards import REWARDS, make_reward, on_host_scores, reference_key, shape_scores
from jrlhf.training.stages import Shaped
from jrlhf.training.stages.shaped import share_between
from jrlhf.types import Scores

SHAPED = Shaped("reward_model", "sft", prompts=tiny.prompts, samples=3, sampling=tiny.answers)
asked: list[tuple[str, str]] = []  # (prompt, answer) of all that `spoken` was asked


def count(text: str) -> float:
    """Words of an answer; a comma among the first three makes it impossible to tell."""
    return 0.0 if fails(text) else float(len(text.split()))


def fails(text: str) -> bool:
    return "," in text.split()[:3]


def spoken(prompts, completions, rows):
    asked.extend(zip(prompts, completions, strict=True))
    return Scores(
        np.array([count(text) for text in completions]),
        failed=np.array([fails(text) for text in completions]),
    )


def spoken_and_prompt(prompts, completions, rows):
    """The same, and what a prompt is worth."""
    return spoken(prompts, completions, rows).values + np.array([7.0 * len(p.split()) for p in prompts])


@pytest.fixture(scope="module", autouse=True)
def known():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REWARDS, "spoken", spoken)
        patch.setitem(REWARDS, "spoken_and_prompt", spoken_and_prompt)
        yield


def finish(runs, **stages):
    with one_device():
        kept = only("pretrain", "sft", "preferences", "reward_model", **stages)
        return folders(run(kept, runs, console=QUIET))


@pytest.fixture(scope="module")
def of_references(one_device_runs, one_device_run):
    """{prompt: the references that `spoken` was asked about}, of a stage that asked nothing else."""
    asked.clear()
    finish(one_device_runs, words=replace(SHAPED, reward="spoken"))
    found: dict[str, list[str]] = {}
    for prompt, answer in asked:
        found.setdefault(prompt, []).append(answer)
    return found


@pytest.fixture(scope="module")
def left(one_device_runs, of_references):
    return finish(
        one_device_runs,
        shaped=SHAPED,
        words=replace(SHAPED, reward="spoken"),
        log_words=replace(SHAPED, reward="spoken", shape="log_sigmoid"),
        worth=replace(SHAPED, reward="spoken_and_prompt"),
        one=replace(SHAPED, reward="spoken", samples=1),
        rloo=rloo("shaped", "words"),
        best=best_of_two("log_words", "shaped"),
    )


@pytest.fixture(scope="module")
def answers(left):
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    return *some_answers(left["sft"], mesh), mesh


@pytest.fixture(scope="module")
def say(left, answers):
    """say(reward) -> Scores of other answers of the start policy to the same prompts."""
    policy, _, samples, texts, mesh = answers
    return lambda name, texts=texts: on_host_scores(
        make_reward(name, left, mesh, policy.tokenizer), samples, texts, mesh
    )


def results(folder):
    return json.loads((folder / "done.json").read_text())["results"]


# --- the formulas -------------------------------------------------------------------------------------------


def test_shapes_are_means_over_the_references():
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 3, 20)
    references = [rng.normal(0, 3, n) for n in rng.integers(1, 6, 20)]
    chance = [1 / (1 + np.exp(-(r - some))) for r, some in zip(scores, references, strict=True)]
    for shape, by_hand in {
        "sigmoid": [p.mean() for p in chance],
        "log_sigmoid": [np.log(p).mean() for p in chance],
    }.items():
        shaped = shape_scores(scores, references, shape)
        assert shaped.dtype == np.float32
        np.testing.assert_allclose(shaped, by_hand, rtol=1e-6)


def test_shapes_are_monotone_and_bounded_and_know_no_constant():
    scores, reference = np.linspace(-6, 6, 50), np.array([-1.0, 0.5, 2.0])
    for shape, low, high in (("sigmoid", 0, 1), ("log_sigmoid", -np.inf, 0)):
        shaped = shape_scores(scores, [reference] * 50, shape)
        assert np.all(np.diff(shaped) > 0)
        assert np.all((low < shaped) & (shaped < high))
        moved = shape_scores(scores + 100, [reference + 100] * 50, shape)
        np.testing.assert_allclose(moved, shaped, rtol=1e-5)
    far = np.array([-1e6, 1e6])
    assert shape_scores(far, [reference] * 2, "sigmoid").tolist() == [0, 1]
    np.testing.assert_allclose(shape_scores(far, [reference] * 2, "log_sigmoid"), [-1e6, 0], rtol=1e-5)


def test_the_share_between_prompts_is_the_intraclass_correlation():
    """By one-way analysis of variance, (F - 1) / (F - 1 + M)."""
    rng = np.random.default_rng(1)
    scores = rng.normal(0, 2, (300, 1)) + rng.normal(0, 1, (300, 4))
    means = scores.mean(axis=1)
    between = 4 * np.sum((means - scores.mean()) ** 2) / 299
    ratio = between / (np.sum((scores - means[:, None]) ** 2) / 900)
    share = share_between(scores)
    np.testing.assert_allclose(share, (ratio - 1) / (ratio + 3))
    assert abs(share - 0.8) < 0.05
    assert share_between(rng.normal(0, 1, (5000, 4))) < 0.05
    assert share_between(np.ones((3, 2))) == 0


def test_what_makes_a_prompt():
    """Whatever the order of the fields; what other stages add is nothing, what is answered or checked is something."""
    said = [{"role": "user", "content": "hello"}]
    key = reference_key({"prompt": said, "answer": "4", "tools": None})
    assert key == reference_key(
        {"ended": True, "solve_rate": 0.5, "answer": "4", "prompt": [dict(reversed(said[0].items()))]}
    )
    others = [{"prompt": "hello"}, {"prompt": said}, {"prompt": said, "answer": "5"}]
    others += [{"prompt": said, "answer": "4", "group": "A"}, {"prompt": said, "answer": "4", "tools": [{}]}]
    assert len({key, *map(reference_key, others)}) == 6


# --- the stage ----------------------------------------------------------------------------------------------


def by_hand(scores, references, shape):
    """[B] float64, of float scores [B] and a list of references for each."""
    margins = [r - np.asarray(some, np.float64) for r, some in zip(scores, references, strict=True)]
    chances = [1 / (1 + np.exp(-m)) for m in margins]
    return np.array([np.mean(p) if shape == "sigmoid" else np.mean(np.log(p)) for p in chances])


@pytest.mark.parametrize(("name", "shape"), [("words", "sigmoid"), ("log_words", "log_sigmoid")])
def test_an_answer_is_measured_by_the_references_of_its_own_prompt(
    left, answers, say, of_references, name, shape
):
    """Those that the wrapped reward was asked about with that prompt."""
    _, rows, _, texts, _ = answers
    # Two rows of the tiny prompts come twice.
    assert {len(some) for some in of_references.values()} == {3, 6}
    references = [[count(answer) for answer in of_references[row["prompt"]]] for row in rows]
    assert len({tuple(some) for some in references}) > len(references) // 2
    unshaped = np.array([count(text) for text in texts.completions])
    assert len(set(unshaped)) > 2
    scores = say(name)
    np.testing.assert_allclose(scores.values, by_hand(unshaped, references, shape), rtol=1e-5)
    np.testing.assert_array_equal(scores.parts["unshaped"], unshaped)
    assert scores.failed.any()
    np.testing.assert_array_equal(scores.failed, [fails(text) for text in texts.completions])


def test_a_learned_reward_is_shaped_too(left, answers, say):
    policy, rows, samples, texts, mesh = answers
    note = json.loads((left["shaped"] / "shaped.json").read_text())
    assert note["stage"] == left["reward_model"].name
    references = [note["references"][reference_key(row)] for row in rows]
    before = np.asarray(say("reward_model").values, np.float64)
    scores = say("shaped")
    np.testing.assert_allclose(scores.parts["unshaped"], before, atol=1e-6)
    np.testing.assert_allclose(scores.values, by_hand(before, references, "sigmoid"), rtol=1e-4)
    assert np.std(scores.values) > 1e-3
    # Of a rollout that is still on the devices, as in training.
    on_devices = make_reward("shaped", left, mesh, policy.tokenizer).score(
        jax.tree.map(jax.numpy.asarray, samples), texts
    )
    np.testing.assert_allclose(on_devices.values, scores.values, rtol=1e-5)


def test_what_a_prompt_is_worth_changes_nothing(say):
    plain, worth = say("words"), say("worth")
    assert np.std(np.subtract(worth.parts["unshaped"], plain.parts["unshaped"])) > 1
    np.testing.assert_allclose(worth.values, plain.values, rtol=1e-5)


def test_results(left, of_references):
    found = results(left["words"])
    counted = [count(answer) for some in of_references.values() for answer in some]
    assert found["prompts"] == len(of_references) < 16
    np.testing.assert_allclose((found["mean"], found["std"]), (np.mean(counted), np.std(counted)))
    assert 0 <= found["between_prompts"] < 1
    assert "spoken/fail_rate" in found["unscored"]
    assert results(left["worth"])["between_prompts"] > max(found["between_prompts"], 0.8)
    assert "between_prompts" not in results(left["one"])
    assert {len(s) for s in json.loads((left["one"] / "shaped.json").read_text())["references"].values()} == {
        1,
        2,
    }


def test_a_policy_learns_from_it_and_both_are_logged(left):
    for row in jsonl(left["rloo"] / "metrics.jsonl"):
        assert 0 < row["reward/score/mean"] < 1
        assert np.isfinite(row["reward/unshaped/mean"])
        assert row["reward/unshaped/mean"] != row["reward/score/mean"]
        assert 0 <= row["reward/words/mean"] <= 1  # watched


def test_the_best_of_two_is_chosen_by_it(left):
    """Its proxy is below 0, its gold (the other stage) a mean chance."""
    best = results(left["best"])
    assert best["proxy"]["1"] < best["proxy"]["2"] < 0
    assert 0 < best["gold"]["2"] < 1


def test_a_prompt_without_references_is_refused(say, answers):
    texts = answers[3]
    other = texts._replace(rows=[*texts.rows[:-1], {**texts.rows[-1], "prompt": "describe " * 30}])
    with pytest.raises(
        UserError, match=r"'shaped' has no references for the prompt 'describe .{60,68}\.\.\.'"
    ):
        say("shaped", other)
    other = texts._replace(rows=[*texts.rows[:-1], {**texts.rows[-1], "group": "A"}])
    with pytest.raises(UserError, match=r"`prompts` must have every row .* the same `answer`, `group`"):
        say("shaped", other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": "larder_glod"}, "Did you mean 'larder_gold'"),
        ({"samples": 0}, "samples must be positive, got 0"),
        ({"max_prompt": 39}, "do not fit the context of 40"),
        ({"shape": "sigmoyd"}, "expected one of 'sigmoid', 'log_sigmoid'"),
        ({"start": "reward_model"}, "start"),
    ],
)
def test_mistakes_are_told_before_anything_runs(change, message):
    wrong = replace(SHAPED, prompts=LarderPrompts(size=4), **change)
    with pytest.raises(UserError, match=message):
        run(only("pretrain", "sft", "preferences", "reward_model", wrong=wrong), None)
