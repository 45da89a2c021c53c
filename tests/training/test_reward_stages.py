"""Reward models of every kind as stages: what they leave, and that whoever names one as a reward gets what it says."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny_runs import QUIET, best_of_two, folders, one_device, only, some_answers

from jrlhf.algorithms.reward_model import RewardModelConfig, preference_scores
from jrlhf.checkpoint import load_meta
from jrlhf.config import MeshConfig, UserError
from jrlhf.data.batching import encode_steps
from jrlhf.data.sources import FileSource
from jrlhf.experiment import run
from jrlhf.models.config import LoRAConfig
from jrlhf.models.hf import load_hf
from jrlhf.rewards.judges import check_template, fill
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import load_model
from jrlhf.training.data import bootstrap_weights
from jrlhf.training.evaluation import score
from jrlhf.training.judging import JudgeReward, LocalJudge, step_ends, verdict_ids
from jrlhf.training.rewards import make_reward, process_reward
from jrlhf.training.serve import export
from jrlhf.training.stages import (
    Judge,
    ProcessRewardModel,
    RewardEnsemble,
    RewardModel,
)
from jrlhf.training.stages.process_reward import step_accuracy
from jrlhf.types import PreferenceBatch, StepBatch

BASE = replace(tiny.experiment.stages["reward_model"], loop=tiny.loop(3))
CRITERIA = ("style", "gold")
TEMPLATE = "describe {question} is {answer} thanks"
STEPS = [
    {"prompt": f"describe {a}", "steps": [f"{a} is {x}", f"{b} is {y}"], "labels": [1, label]}
    for a, b in (("ginger", "honey"), ("honey", "ginger"), ("lemon", "honey"), ("ginger", "lemon"))
    for x, y, label in (("bitter", "dry", 0), ("dry", "bitter", None), ("dry", "fresh", 0.75))
]


def write_steps(folder):
    path = folder / "steps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in STEPS * 2))
    return FileSource(str(path), format="steps")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def left(one_device_runs, tmp_path_factory):
    """Every kind of reward model after the tiny pipeline's preferences: {stage: folder}."""
    stages = {
        "first": replace(BASE, algorithm=RewardModelConfig(ties="davidson")),
        "second": replace(BASE, algorithm=RewardModelConfig(ties="davidson"), member=1),
        "heads": replace(BASE, algorithm=RewardModelConfig(heads=2), lora=LoRAConfig(rank=2)),
        "rubric": replace(
            BASE,
            algorithm=RewardModelConfig(objective="regression", criteria=CRITERIA),
            weights={"style": 1.0, "gold": 0.5},
        ),
        "worst": RewardEnsemble(("first", "second", "heads"), combine="min"),
        "careful": RewardEnsemble(("first", "second"), combine="mean_minus_variance", lam=0.7),
        "judge": Judge("sft", template=TEMPLATE, verdicts=("is", "honey")),
        "mixed": RewardEnsemble(("first", "judge")),
        "process": ProcessRewardModel(
            "sft",
            data=(steps := write_steps(tmp_path_factory.mktemp("steps"))),
            eval_data=steps,
            separator=" .",
            aggregate="product",
            loop=tiny.loop(2),
            optim=tiny.adam,
        ),
        "best": best_of_two("worst", "larder_gold"),
    }
    with one_device():
        kept = only("pretrain", "sft", "preferences", **stages)
        return folders(run(kept, one_device_runs, console=QUIET))


@pytest.fixture(scope="module")
def answers(left, mesh):
    return some_answers(left["sft"], mesh)


@pytest.fixture(scope="module")
def rewards(left, mesh, answers):
    """rewards(stage) -> [N], as PPO, best-of-n and evaluation get them."""
    policy, _, samples, texts = answers

    def rewards(name):
        return score(make_reward(name, left, mesh, policy.tokenizer), samples, texts, mesh)

    return rewards


def results(folder):
    return json.loads((folder / "done.json").read_text())["results"]


# --- heads --------------------------------------------------------------------------------------------------


def test_members_differ_and_say_how_well_they_do(left):
    first, second = (load_meta(left[name] / "model") for name in ("first", "second"))
    assert first["normalization"] != second["normalization"]
    assert results(left["first"])["tie_parameter"] > 0
    heads = results(left["heads"])
    assert heads["held_out_disagreement"] > 0
    assert set(heads["held_out_accuracy_of_heads"]) == {"head_0", "head_1"}
    rubric = results(left["rubric"])
    assert set(rubric["held_out_accuracy_of_heads"]) == {"overall", *CRITERIA}
    assert rubric["held_out_squared_error"] > 0


@pytest.mark.parametrize("name", ["heads", "rubric"])
def test_several_heads_become_one_normalised_reward(left, mesh, answers, rewards, name):
    _, _, samples, _ = answers
    every = load_model(left[name], mesh, "scalar", every_head=True)
    meta = load_meta(left[name] / "model")
    heads, norm = meta["heads"], meta["normalization"]
    assert heads["weights"] == ([0.5, 0.5] if name == "heads" else [0.0, 1.0, 0.5])
    k = len(samples.tokens)
    batch = PreferenceBatch(
        samples.tokens[:, None], samples.mask[:, None], samples.mask[:, None], np.ones((k, 1)), 0
    )
    apart = np.asarray(jax.jit(preference_scores, static_argnums=0)(every.model, every.params, batch))[:, 0]
    raw = apart * np.asarray(heads["std"]) + np.asarray(heads["mean"])
    expected = (raw @ np.asarray(heads["weights"]) - norm["mean"]) / norm["std"]
    np.testing.assert_allclose(rewards(name), expected, atol=1e-4)
    assert np.std(expected) > 0.01


def test_an_exported_rubric_is_its_combined_reward(left, mesh, answers, rewards, tmp_path):
    _, _, samples, _ = answers
    export(left["rubric"], tmp_path / "hf")
    model, params = load_hf(tmp_path / "hf", head="scalar")
    tokens, mask = jnp.asarray(samples.tokens), jnp.asarray(samples.mask)
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1])[None], 0), axis=1)
    scores = jnp.take_along_axis(model.scores(params, tokens, mask), last[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(scores, rewards("rubric"), atol=1e-4)


def test_resamples_are_of_whole_prompts_and_repeatable():
    n = 60
    tokens = np.repeat(np.arange(n // 2), 2)[:, None, None] + np.zeros((1, 1, 3), int)
    mask = np.ones_like(tokens, bool)
    response = mask & (np.arange(3) == 2)
    batch = PreferenceBatch(tokens, mask, response, np.ones((n, 1)), np.zeros((n, 1)))
    weights = bootstrap_weights(batch, 3, jax.random.key(0))
    np.testing.assert_array_equal(weights[::2], weights[1::2])  # two rows of one prompt
    np.testing.assert_array_equal(weights[::2].sum(axis=0), n // 2)  # as many draws as prompts
    assert 0.2 < np.mean(weights == 0) < 0.55  # about 1/e are left out
    assert len(np.unique(weights, axis=1).T) == 3
    np.testing.assert_array_equal(weights, bootstrap_weights(batch, 3, jax.random.key(0)))


# --- ensembles ----------------------------------------------------------------------------------------------


def test_an_ensemble_combines_the_rewards_of_its_members(left, mesh, answers, rewards):
    _, _, samples, _ = answers
    first, second = rewards("first"), rewards("second")
    assert np.std(first - second) > 0.01
    careful = (first + second) / 2 - 0.7 * np.var([first, second], axis=0)
    np.testing.assert_allclose(rewards("careful"), careful, atol=1e-5)
    each = load_model(left["heads"], mesh, "scalar", every_head=True)
    k = len(samples.tokens)
    batch = PreferenceBatch(
        samples.tokens[:, None], samples.mask[:, None], samples.mask[:, None], np.ones((k, 1)), 0
    )
    heads = np.asarray(jax.jit(preference_scores, static_argnums=0)(each.model, each.params, batch))[:, 0]
    np.testing.assert_allclose(rewards("worst"), np.min([first, second, *heads.T], axis=0), atol=1e-5)
    np.testing.assert_allclose(rewards("mixed"), (first + rewards("judge")) / 2, atol=1e-5)
    assert results(left["worst"]) == {"members": 4}
    assert not (left["worst"] / "model").exists()
    assert results(left["best"])["proxy"]["2"] >= results(left["best"])["proxy"]["1"]


@pytest.mark.parametrize("name", ["heads", "worst"])
def test_heads_that_are_adapters_share_the_policys_base(left, mesh, answers, rewards, name):
    policy, _, samples, texts = answers
    shared = make_reward(name, left, mesh, policy.tokenizer, base=(left["sft"], policy))
    np.testing.assert_allclose(score(shared, samples, texts, mesh), rewards(name), atol=1e-4)


# --- the judge ----------------------------------------------------------------------------------------------


def test_the_judge_says_the_log_odds_of_its_verdict(left, mesh, answers, rewards):
    policy, _, _, texts = answers
    yes, no = (policy.tokenizer.encode(word)[0] for word in ("is", "honey"))
    expected = []
    for question, answer in zip(texts.prompts[:3], texts.completions[:3], strict=True):
        ids = [1, *policy.tokenizer.encode(f"describe {question} is {answer} thanks")]
        tokens = jnp.asarray([[*ids, yes], [*ids, no]])
        logp, _ = policy.model.logprobs(policy.params, tokens, jnp.ones_like(tokens, bool))
        expected.append(float(logp[0, -1] - logp[1, -1]))
    np.testing.assert_allclose(rewards("judge")[:3], expected, atol=1e-4)
    judge = JudgeReward("judge", LocalJudge("sft", policy, mesh), TEMPLATE, ("is", "honey"), "probability")
    chance = judge(texts.prompts, texts.completions, texts.rows).values
    np.testing.assert_allclose(chance, 1 / (1 + np.exp(-rewards("judge"))), atol=1e-6)


def test_two_answers_are_compared_in_both_orders(answers, mesh):
    policy, _, _, texts = answers
    template = "{question} {answer_a} is {answer_b}"
    asked = LocalJudge("sft", policy, mesh)
    judge = JudgeReward("judge", asked, template, ("honey", "is"), "log_odds")
    a, b, q = texts.completions[:4], texts.completions[4:8], texts.prompts[:4]
    found = judge.compare(q, a, b)
    np.testing.assert_allclose(found, -judge.compare(q, b, a), atol=1e-5)
    said = (
        asked.verdicts([f"{x} {y} is {z}" for x, y, z in zip(q, *two, strict=True)], ("honey", "is"))
        for two in ((a, b), (b, a))
    )
    ab, ba = (np.log(p[:, 0] / p[:, 1]) for p in said)
    np.testing.assert_allclose(found, (ab - ba) / 2, atol=1e-5)
    rows = [{"prompt": p, "answer": ref} for p, ref in zip(q, b, strict=True)]
    np.testing.assert_allclose(judge(q, a, rows).values, found, atol=1e-6)
    with pytest.raises(UserError, match="reward 'judge': prompt 1 has no field 'answer'"):
        judge(q, a, [{"prompt": p} for p in q])


def test_templates_and_verdicts_that_cannot_work_are_named(answers):
    policy, *_ = answers
    for template, message in (
        ("is it good?", "it has none of them"),
        ("{question}", "it has {question}"),
        ("{question} {answr}", "unknown placeholder {answr}. Did you mean 'answer'?"),
        ("{question} {answer} {answer_a} {answer_b}", "template must have {question} and {answer}, or"),
    ):
        with pytest.raises(UserError) as error:
            Judge("sft", template=template).validate({})
        assert message in str(error.value)
    assert check_template("{answer_b} {question} {answer_a}")
    assert fill("{question}: {answer}", question="{answer}", answer="{question}") == "{answer}: {question}"
    with pytest.raises(UserError, match="begin with the same token"):
        verdict_ids(policy.tokenizer, ("honey is", "honey"))
    with pytest.raises(UserError, match="verdicts must differ"):
        Judge("sft", template=TEMPLATE, verdicts=("a", "a")).validate({})


# --- steps --------------------------------------------------------------------------------------------------


def test_a_process_reward_is_put_together_from_the_steps_as_they_were_trained(left, mesh, answers, rewards):
    policy, rows, _, texts = answers
    loaded, encode = load_model(left["process"], mesh, "scalar"), policy.tokenizer.encode
    completions = ["ginger is dry . honey is fresh .", "lemon is dry", "", "apple is bitter . . honey is dry"]
    expected, of_steps = [], []
    for row, text in zip(rows, completions, strict=False):
        ids, ends = [1, *encode(row["prompt"])], []
        for step in [step for step in text.split(" .") if step.strip()]:
            ids += encode(step + " .")
            ends.append(len(ids) - 1)
        tokens = jnp.asarray([ids])
        logits = loaded.model.scores(loaded.params, tokens, jnp.ones_like(tokens, bool))
        of_steps.append(1 / (1 + np.exp(-np.asarray(logits)[0, ends])))
        expected.append(np.prod(of_steps[-1]) if ends else 0.0)
    assert [len(scores) for scores in of_steps] == [2, 1, 0, 2]
    reward = process_reward("process", left["process"], mesh)
    assert (reward.separator, reward.aggregate) == (" .", "product")
    ids = [encode(text) for text in completions]
    pays = lambda reward: reward.scores(ids, completions, rows[:4], policy.tokenizer, 12)  # noqa: E731
    np.testing.assert_allclose(pays(reward).values, expected, atol=1e-5)
    by_token = np.full((4, 12), np.nan, np.float32)
    for n, places in enumerate(([3, 7], [2], [], [3, 7])):
        by_token[n, places] = of_steps[n]
    np.testing.assert_allclose(pays(replace(reward, as_reward="steps")).tokens, by_token, atol=1e-5)
    products = [
        np.prod(scores) if len(scores) else 0 for scores in reward.step_scores(texts.completions, rows)
    ]
    np.testing.assert_allclose(rewards("process"), products, atol=1e-5)
    assert set(results(left["process"])) >= {
        "held_out_step_acc",
        "held_out_first_error",
        "held_out_all_right",
    }


def test_steps_end_at_the_token_that_completes_their_separator(answers):
    tokenizer = answers[0].tokenizer
    encode = lambda text: tokenizer.encode(text)  # noqa: E731
    two = [*encode("ginger is dry ."), *encode("honey is fresh"), tokenizer.eos_ids[0]]
    assert step_ends(two, " .", tokenizer) == [3, 7]
    assert step_ends(two[:6], " .", tokenizer) == [3, 5]
    assert step_ends(encode("ginger is dry ."), " .", tokenizer) == [3]
    assert step_ends([tokenizer.eos_ids[0]], " .", tokenizer) == []


def test_a_rows_steps_are_encoded_one_by_one(answers):
    tokenizer = answers[0].tokenizer
    example = encode_steps(STEPS[1], tokenizer, 40, " .")
    ends = np.flatnonzero(example.ends)
    text = [tokenizer.decode(example.ids[: end + 1]) for end in ends]
    assert text == ["describe ginger ginger is dry .", "describe ginger ginger is dry . honey is bitter ."]
    np.testing.assert_array_equal(example.labels[ends], [1, -1])
    with pytest.raises(UserError, match="tokens do not fit in 6"):
        encode_steps(STEPS[1], tokenizer, 6, " .")
    cut = encode_steps(STEPS[1], tokenizer, 10, " .", "truncate_left")
    assert len(cut.ids) == 10
    np.testing.assert_array_equal(cut.ids[1:], example.ids[-9:])


def test_step_accuracy_counts_steps_and_first_errors():
    ends = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 1, 1]], bool)
    labels = np.array([[1, 0, 0], [1, 1, -1], [1, 0, -1], [-1, 1, 1]], np.float32)
    logits = np.array([[2.0, -1, 3], [1, 1, -9], [-1, -1, -1], [-9, 1, -2]])
    found = step_accuracy(logits, StepBatch(labels, ends, ends, labels))
    assert found["steps"] == 9
    assert found["step_acc"] == pytest.approx(6 / 9)
    assert found["first_error"] == 0.5  # of the first and third row
    assert found["all_right"] == 0.5  # of the second and fourth


# --- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (replace(BASE, weights={"helpful": 1.0}), "algorithm has none of these"),
        (
            replace(BASE, algorithm=RewardModelConfig(criteria=CRITERIA), weights={"stile": 1.0}),
            "weights: 'stile' is no head. Did you mean 'style'?",
        ),
        (
            replace(BASE, algorithm=RewardModelConfig(criteria=CRITERIA, overall=False)),
            "give one that is not 0, of the heads style, gold",
        ),
        (replace(BASE, member=-1), "member must not be negative"),
        (RewardEnsemble(()), "members must not be empty"),
        (RewardEnsemble(("a", "b"), lam=0.1), "lam is 0.1"),
        (RewardEnsemble(("a", "b"), combine="mean_minus_variance"), "lam is 0.0"),
        (RewardEnsemble(("a", "same")), "'a' and 'same' are the same model; give each another `member`"),
        (RewardEnsemble(("a",)), "'a' alone is no ensemble"),
        (
            replace(tiny.experiment.stages["ppo"], reward="judge"),
            "'judge' has no parameters of its own: use 'policy'",
        ),
        (
            ProcessRewardModel("sft", data=FileSource("x.jsonl", "steps"), loop=BASE.loop, separator=""),
            "separator",
        ),
    ],
)
def test_mistakes_at_config_time(stage, message):
    stages = tiny.experiment.stages | {"a": BASE, "same": BASE, "b": replace(BASE, member=1)}
    stages["judge"] = Judge("sft", template=TEMPLATE)
    with pytest.raises(UserError) as error:
        stage.validate(stages)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            RewardModelConfig(objective="regression"),
            "row 1: no field 'scores', which algorithm.objective 'regression'",
        ),
        (RewardModelConfig(margins=True), "row 1: no field 'scores', which algorithm.margins needs"),
        (
            RewardModelConfig(criteria=("helpfull",)),
            "no row has the criterion 'helpfull'. Did you mean 'helpful'?",
        ),
    ],
)
def test_rows_without_what_is_learned_are_named(left, one_device_runs, tmp_path, algorithm, message):
    path = tmp_path / "pairs.jsonl"
    with open(left["preferences"] / "preferences.jsonl") as file:
        rows = [json.loads(line) for line in file]
    path.write_text(
        "".join(json.dumps({k: v for k, v in row.items() if k != "scores"}) + "\n" for row in rows)
    )
    stage = replace(BASE, preferences="", data=FileSource(str(path), "preference"), algorithm=algorithm)
    assert isinstance(stage, RewardModel)
    with one_device(), pytest.raises(UserError) as error:
        run(only("pretrain", "sft", lacking=stage), one_device_runs, console=QUIET)
    assert message in str(error.value)
