"""A reward with length regressed out: the fit against known numbers, and what the stage leaves as a reward."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from tiny_runs import QUIET, folders, one_device, only, some_answers

from jrlhf.config import MeshConfig, UserError
from jrlhf.experiment import run
from jrlhf.sharding import make_mesh
from jrlhf.training.data import preference_arrays
from jrlhf.training.evaluation import score
from jrlhf.training.rewards import make_reward, read_texts
from jrlhf.training.stages import Judge, LengthCorrected
from jrlhf.training.stages.length_corrected import as_samples, fit_length
from jrlhf.types import PreferenceBatch

CORRECTED = LengthCorrected(reward="reward_model", start="sft", preferences="preferences")
JUDGE = Judge("sft", template="describe {question} is {answer} thanks", verdicts=("is", "honey"))


# --- the fit ------------------------------------------------------------------------------------------------


def test_the_slope_is_that_within_prompts():
    """A reward that pays 0.5 a token, plus what the prompt is worth, which goes against length."""
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(40), 4)
    lengths = rng.integers(3, 20, 160) + prompt
    worth = -2.0 * prompt
    fit = fit_length(0.5 * lengths + worth, lengths, prompt)
    assert np.isclose(fit.slope, 0.5)
    assert np.isclose(fit.explained, 1.0)
    assert np.isclose(fit.length, lengths.mean())


def test_the_fit_is_least_squares_with_a_constant_for_each_prompt():
    rng = np.random.default_rng(1)
    prompt = rng.integers(0, 12, 60)
    lengths = rng.integers(2, 28, 60).astype(float)
    scores = 0.2 * lengths + rng.standard_normal(60) + prompt
    fit = fit_length(scores, lengths, prompt)
    constants = np.equal.outer(prompt, np.unique(prompt)).astype(float)
    (slope, *_), *_ = np.linalg.lstsq(np.column_stack([lengths, constants]), scores, rcond=None)
    assert np.isclose(fit.slope, slope)
    corrected = scores - slope * (lengths - lengths.mean())
    assert np.allclose((fit.mean, fit.std), (corrected.mean(), corrected.std()))


def test_answers_of_one_length_tell_nothing():
    with pytest.raises(UserError, match="no prompt has answers of different lengths"):
        fit_length(np.arange(4.0), np.asarray([3, 3, 5, 5]), np.asarray([0, 0, 1, 1]))


def test_answers_as_samples():
    """Two prompts; the second has one answer only, and its prompt is shorter."""
    tokens = np.asarray([[[5, 6, 7, 2, 0], [5, 6, 8, 9, 2]], [[4, 3, 3, 0, 0], [0, 0, 0, 0, 0]]])
    mask = tokens > 0
    response = mask & (np.arange(5) >= np.asarray([2, 1])[:, None, None])
    batch = PreferenceBatch(tokens, mask, response, np.asarray([[1, 2], [1, 0]]), np.zeros((2, 2)))
    samples, row_of = as_samples(batch, pad_id=0, eos_ids=(2,))
    assert row_of.tolist() == [0, 0, 1]
    assert samples.tokens[:, :4].tolist() == [[0, 0, 5, 6], [0, 0, 5, 6], [0, 0, 0, 4]]
    assert samples.tokens[:, 4:].tolist() == [[7, 2, 0], [8, 9, 2], [3, 3, 0]]
    assert samples.response_mask.sum(axis=1).tolist() == [2, 3, 2]
    assert samples.mask.sum(axis=1).tolist() == [4, 5, 3]
    assert samples.ended.tolist() == [True, True, False]


# --- the stage ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def left(one_device_runs, one_device_run):
    stages = {
        "judge": JUDGE,
        "corrected": CORRECTED,
        "judge_corrected": replace(CORRECTED, reward="judge"),
        "ppo": replace(
            tiny.experiment.stages["ppo"], reward="corrected", critic="policy", gold="", eval_prompts=None,
            loop=tiny.loop(1),
        ),
    }  # fmt: skip
    with one_device():
        kept = only("pretrain", "sft", "preferences", "reward_model", **stages)
        return folders(run(kept, one_device_runs, console=QUIET))


@pytest.fixture(scope="module")
def answers(left, mesh):
    """Of the start policy: (tokenizer, rollout, texts)."""
    policy, _, samples, texts = some_answers(left["sft"], mesh)
    return policy.tokenizer, samples, texts


@pytest.mark.parametrize(("name", "inner"), [("corrected", "reward_model"), ("judge_corrected", "judge")])
def test_it_takes_the_fitted_line_off_the_reward(left, mesh, answers, name, inner):
    tokenizer, samples, texts = answers
    reward = make_reward(name, left, mesh, tokenizer)
    assert reward.needs_text == (inner == "judge")  # a learned reward stays on the devices
    before = score(make_reward(inner, left, mesh, tokenizer), samples, texts, mesh)
    lengths = np.asarray([len(ids) for ids in texts.ids])  # in tokens, the stop token included
    assert len(set(lengths.tolist())) > 1
    note = json.loads((left[name] / "length.json").read_text())
    assert note["reward"] == left[inner].name
    assert note["slope"] != 0
    expected = (before - note["slope"] * (lengths - note["length"]) - note["mean"]) / note["std"]
    after = score(reward, samples, texts, mesh)
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(after - before).max() > 1e-3


def test_on_the_answers_that_it_was_fitted_on_length_earns_nothing(left, mesh, answers):
    """Scored by the stage's own reward: mean 0, std 1, and no slope within prompts."""
    tokenizer, *_ = answers
    rows = [json.loads(line) for line in (left["preferences"] / "preferences.jsonl").read_text().splitlines()]
    arrays = preference_arrays(rows, tokenizer, 40, "error", QUIET)
    samples, prompt_of = as_samples(arrays, tokenizer.pad_id, tokenizer.eos_ids)
    after = score(make_reward("corrected", left, mesh, tokenizer), samples, None, mesh)
    assert np.allclose((after.mean(), after.std()), (0, 1), atol=1e-3)
    again = fit_length(after, samples.response_mask.sum(axis=1), prompt_of)
    assert abs(again.slope) < 1e-4
    assert again.explained < 1e-6


@pytest.mark.parametrize("too_long", ["drop", "truncate_left"])
def test_rows_that_are_too_long_are_left_out_together_with_their_prompts(
    left, mesh, answers, one_device_runs, too_long
):
    """The judge reads prompts: each must be beside its own answers."""
    tokenizer, *_ = answers
    rows = [json.loads(line) for line in (left["preferences"] / "preferences.jsonl").read_text().splitlines()]
    arrays_of = lambda rows, limit=40: preference_arrays(rows, tokenizer, limit, "error", QUIET)  # noqa: E731
    sizes = [int(arrays_of([row]).mask.sum(axis=2).max()) for row in rows]
    limit = int(np.median(sizes))
    stage = replace(CORRECTED, reward="judge", max_length=limit, too_long=too_long)
    with one_device():
        found = folders(
            run(
                only("pretrain", "sft", "preferences", judge=JUDGE, short=stage),
                one_device_runs,
                console=QUIET,
            )
        )
    note = json.loads((found["short"] / "length.json").read_text())
    if too_long == "truncate_left":
        assert np.isfinite(note["slope"])
        return
    kept = [row for row, size in zip(rows, sizes, strict=True) if size <= limit]
    assert kept != rows[: len(kept)]
    samples, row_of = as_samples(arrays_of(kept), tokenizer.pad_id, tokenizer.eos_ids)
    texts = read_texts(samples, [kept[i] for i in row_of], tokenizer)
    scores = score(make_reward("judge", left, mesh, tokenizer), samples, texts, mesh)
    fit = fit_length(scores, samples.response_mask.sum(axis=1), row_of)
    assert np.isclose(note["slope"], fit.slope, rtol=1e-4)
    assert np.isclose(note["mean"], fit.mean, rtol=1e-4)


def test_a_policy_learns_from_it_and_both_are_logged(left):
    row = json.loads((left["ppo"] / "metrics.jsonl").read_text().splitlines()[0])
    assert np.isfinite(row["reward/uncorrected/mean"])
    assert row["reward/uncorrected/mean"] != row["reward/score/mean"]
    results = json.loads((left["corrected"] / "done.json").read_text())["results"]
    assert 0 < results["explained"] < 1


def test_it_needs_answers():
    with pytest.raises(UserError, match="either preferences"):
        run(
            only("pretrain", "sft", "preferences", "reward_model", bad=replace(CORRECTED, preferences="")),
            None,
        )
