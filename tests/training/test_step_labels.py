"""Labels of steps by Monte Carlo, and a process reward's ways to pay for steps."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import fake_params
from tiny_runs import QUIET, folders, one_device

from jrlhf.algorithms.dr_grpo import DrGRPOConfig
from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.algorithms.rloo import RLOOConfig
from jrlhf.config import MeshConfig, UserError
from jrlhf.experiment import Experiment, dry_run, run
from jrlhf.lab import SorterDemonstrations, SorterPrompts, SorterText, SorterVocabulary, step_labels
from jrlhf.metrics import read_metrics
from jrlhf.models.config import ModelConfig
from jrlhf.models.transformer import Model
from jrlhf.optim import OptimConfig
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training import stages
from jrlhf.training.artifacts import load_model
from jrlhf.training.evaluation import Sampler
from jrlhf.training.loop import LoopConfig
from jrlhf.training.rewards import make_reward, process_reward, read_texts
from jrlhf.training.stages import (
    PPO,
    SFT,
    BestOfN,
    OnPolicy,
    Pretrain,
    ProcessRewardModel,
    StepLabels,
    StepReward,
    TokenizerConfig,
)
from jrlhf.training.stages.step_labels import Prefix, against_truth, continued, cut, label_of
from jrlhf.types import Rollout


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


# --- a step's label is the probability to be right from there -------------------------------------------------------

EOS, PAD, SLOTS = 3, 0, 4
TOY = Model(ModelConfig(4, 16, 1, 2, 2, d_ff=16, context=8))
PROMPTS = [[1, 2], [2, 2, 1]]
ANSWERS = [[1, 2, 1, EOS], [2, 1, 1, 2]]  # the second is cut off by its length


def answers_of(prompts, answers) -> Rollout:
    """As the sampler returns them, prompts in 4 slots."""
    tokens, mask = (
        np.full((len(prompts), 4 + SLOTS), PAD, np.int32),
        np.zeros((len(prompts), 4 + SLOTS), bool),
    )
    for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        for first, row in ((4 - len(prompt), prompt), (4, answer)):
            tokens[n, first : first + len(row)], mask[n, first : first + len(row)] = row, True
    logprobs = np.where(mask[:, 4:], np.float32(-1.5), np.float32(0))
    return Rollout(tokens, mask, mask[:, 4:], logprobs, np.array([a[-1] == EOS for a in answers]))


def is_right(answer: list[int]) -> bool:
    return answer[-1] == EOS and answer.count(1) % 2 == 0


def exact_probability(params, prompt, prefix) -> float:
    """Of a right answer among all that begin so, by the probabilities of all 121 answers of at most SLOTS tokens."""
    tails = itertools.product(range(4), repeat=SLOTS)
    every = sorted({(*itertools.takewhile(lambda t: t != EOS, x), EOS)[:SLOTS] for x in tails})
    space = answers_of([prompt] * len(every), every)
    logprobs = TOY.logprobs(params, space.tokens, space.mask, 4)[0]
    mass = np.exp(np.where(space.response_mask, logprobs, 0.0).sum(axis=1))
    assert mass.sum() == pytest.approx(1, abs=1e-5)
    begin = np.array([list(x[: len(prefix)]) == prefix for x in every])
    right = np.array([is_right(list(x)) for x in every])
    return mass[begin & right].sum() / mass[begin].sum()


@pytest.fixture
def together(monkeypatch):
    """Prefixes of all lengths go on together, so that shorter ones run past their budget."""
    monkeypatch.setattr(stages.step_labels, "BUCKETS", 1)


def test_the_share_of_right_continuations_is_the_probability_to_be_right(mesh, together):
    params, n = fake_params(TOY, 3), 1024
    tokenizer = SimpleNamespace(eos_ids=(EOS,), pad_id=PAD)
    prefixes = [Prefix(0, 1), Prefix(1, 1), Prefix(0, 2), Prefix(1, 3)]
    repeated = [p for p in prefixes for _ in range(n)]
    with jax.set_mesh(mesh):
        more = continued(
            TOY, params, tokenizer, mesh, SamplingConfig(max_new_tokens=SLOTS), PROMPTS,
            answers_of(PROMPTS, ANSWERS), repeated, jax.random.key(0),
        )  # fmt: skip
    assert more.tokens.shape == (len(repeated), 4 + SLOTS)
    written = [row[4:][m].tolist() for row, m in zip(more.tokens, more.response_mask, strict=True)]
    for prefix, answer, ended in zip(repeated, written, more.ended, strict=True):
        assert answer[: prefix.length] == ANSWERS[prefix.answer][: prefix.length]
        assert ended == (answer[-1] == EOS)
        assert EOS not in answer[:-1]
    right = np.array([is_right(answer) for answer in written]).reshape(len(prefixes), n).mean(axis=1)
    exact = np.array(
        [exact_probability(params, PROMPTS[p.answer], ANSWERS[p.answer][: p.length]) for p in prefixes]
    )
    assert np.ptp(exact) > 0.1  # a label of another step would be seen
    np.testing.assert_array_less(np.abs(right - exact), 3.5 * np.sqrt(exact * (1 - exact) / n) + 1e-9)


def test_log_probabilities_are_those_of_the_whole_answer(mesh, together):
    """What was kept keeps its own, what is new has the policy's; masks are those of the tokens that stand there."""
    params, tokenizer = fake_params(TOY, 3), SimpleNamespace(eos_ids=(EOS,), pad_id=PAD)
    prefixes = [Prefix(n % 2, 1 + n % 3) for n in range(24)]
    with jax.set_mesh(mesh):
        more = continued(
            TOY, params, tokenizer, mesh, SamplingConfig(max_new_tokens=SLOTS), PROMPTS,
            answers_of(PROMPTS, ANSWERS), prefixes, jax.random.key(1),
        )  # fmt: skip
    expected, _ = TOY.logprobs(params, more.tokens, more.mask, 4)
    kept = np.arange(SLOTS) < np.array([[p.length] for p in prefixes])
    expected = np.where(kept, -1.5, np.where(more.response_mask, expected, 0.0))
    np.testing.assert_allclose(more.logprobs, expected, atol=1e-5)
    np.testing.assert_array_equal(more.mask[:, 4:], more.response_mask)
    assert np.all(more.tokens[:, 4:][~more.response_mask] == PAD)


def test_a_beginning_has_not_ended():
    begun = cut(answers_of(PROMPTS, ANSWERS), [Prefix(0, 2), Prefix(0, 4), Prefix(1, 4)])
    assert begun.ended.tolist() == [False, True, False]
    assert begun.response_mask.sum(axis=1).tolist() == [2, 4, 4]
    assert begun.mask.sum(axis=1).tolist() == [4, 6, 7]


def test_a_label_is_the_share_that_came_right_or_whether_any_did():
    came_right = np.array([[True, False, False, False], [False] * 4, [True] * 4])
    assert label_of(came_right, "soft").tolist() == [0.25, 0, 1]
    assert label_of(came_right, "hard").tolist() == [1, 0, 1]


def test_labels_are_held_against_the_truth():
    labels, truth = np.array([0.9, 0.2, 0.6, 0.6]), np.array([True, False, False, True])
    found = against_truth(labels, truth, np.array([0, 0, 1, 1]))
    assert found["truth_agreement"] == 0.75
    assert found["truth_auc"] == pytest.approx(3.5 / 4)
    assert "truth_auc" not in against_truth(labels, np.ones(4, bool), np.arange(4))


# --- the stage, and what learns from it -----------------------------------------------------------------------------

SHORT = SamplingConfig(max_new_tokens=24)
adam = OptimConfig(lr=1e-2, schedule="cosine")
loop = LoopConfig(steps=2, batch_size=4)
LABELS = StepLabels(
    start="sft",
    reward="sorter_answer",
    prompts=SorterPrompts(size=4, task="parity"),
    separator=" ;",
    responses=2,
    continuations=3,
    truth="sorter_so_far",
    sampling=SHORT,
)
MODEL = ProcessRewardModel("sft", steps="labels", separator=" ;", eval_fraction=0.3, loop=loop, optim=adam)
STAGES = {
    "pretrain": Pretrain(
        data=SorterText(documents=256, task="parity"),
        tokenizer=TokenizerConfig(model_type="word", vocab_size=64, texts=(SorterVocabulary(),)),
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=32, context=92),
        optim=adam,
        loop=LoopConfig(steps=20, batch_size=16),
        eval_rows=8,
    ),
    "sft": SFT(
        start="pretrain",
        data=SorterDemonstrations(size=64, task="parity"),
        optim=adam,
        loop=loop,
        eval_rows=8,
    ),
    "labels": LABELS,
    "hard": replace(LABELS, label="hard"),
    "outcome": MODEL,
    "steps": StepReward("outcome", as_reward="steps"),
    "differences": StepReward("outcome"),
    "product": StepReward("outcome", as_reward="outcome", aggregate="product"),
    "best": BestOfN(
        "sft", reward="outcome", gold="sorter_gold", prompts=LABELS.prompts, samples=4, sampling=SHORT
    ),
    "ppo": PPO(
        "sft",
        reward="steps",
        gold="differences",
        critic="policy",
        prompts=LABELS.prompts,
        algorithm=PPOConfig(epochs=1, minibatches=1),
        sampling=SHORT,
        loop=loop,
    ),
    "dr_grpo": OnPolicy(
        "sft",
        reward="differences",
        prompts=LABELS.prompts,
        algorithm=DrGRPOConfig(group_size=2, beta=0.1),
        sampling=SHORT,
        loop=loop,
    ),
}


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """{stage: folder} of the experiment."""
    with one_device():
        experiment = Experiment(name="steps", stages=STAGES)
        return folders(run(experiment, tmp_path_factory.mktemp("steps") / "runs", console=QUIET))


def results(folder):
    return json.loads((folder / "done.json").read_text())["results"]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def test_steps_are_labelled_by_what_comes_of_them(left):
    soft, hard, found = rows_of(left["labels"]), rows_of(left["hard"]), results(left["labels"])
    assert found["steps"] == sum(len(row["steps"]) for row in soft)
    inner = sum(len(row["steps"]) - 1 for row in soft)
    assert found["continuations"] == 3 * inner > 0
    assert found["answers"] == 8 == len(soft) + found["without_steps"]
    for a, b in zip(soft, hard, strict=True):
        assert (a["prompt"], a["steps"]) == (b["prompt"], b["steps"])
        assert set(np.round(np.array(a["labels"]) * 3, 6)) <= {0, 1, 2, 3}
        assert b["labels"] == [float(label > 0) for label in a["labels"]]
        assert a["labels"][-1] in (0, 1)
    known = [label for row in soft for label in step_labels(row["prompt"], ";".join(row["steps"]))]
    assert found["truth_mean"] == pytest.approx(np.mean(known))
    given = [label for row in soft for label in row["labels"]]
    agree = (np.array(given) > 0.5) == np.array(known, bool)
    assert found["truth_agreement"] == pytest.approx(agree.mean())


@pytest.fixture(scope="module")
def answers(left, mesh):
    """(policy, rollout, texts) of a few answers, some in several steps."""
    policy = load_model(left["sft"], mesh)
    rows = list(LABELS.prompts.rows())
    ids = [policy.tokenizer.encode(row["prompt"]) for row in rows]
    samples = Sampler(policy.model, policy.tokenizer, mesh, SHORT, 12).sample(
        policy.params, ids, jax.random.key(5)
    )
    return policy, samples, read_texts(samples, rows, policy.tokenizer)


def test_each_way_to_pay_is_made_of_the_steps_probabilities(left, mesh, answers):
    policy, samples, texts = answers
    said = {
        name: make_reward(name, left, mesh, policy.tokenizer).score(samples, texts)
        for name in ("outcome", "steps", "differences", "product")
    }
    of_steps = process_reward("outcome", left["outcome"], mesh).step_scores(texts.completions, texts.rows)
    assert max(map(len, of_steps)) > 2
    assert said["outcome"].tokens is None
    np.testing.assert_allclose(said["outcome"].values, [min(s) for s in of_steps], atol=1e-5)
    np.testing.assert_allclose(said["product"].values, [np.prod(s) for s in of_steps], atol=1e-5)
    parts = {"step_min": min, "step_product": np.prod, "step_mean": np.mean, "step_last": lambda s: s[-1]}
    for name, how in parts.items():
        for scores in said.values():
            np.testing.assert_allclose(scores.parts[name], [how(s) for s in of_steps], atol=1e-5)
    # Sums: of all steps, and of the last one alone, however many there are.
    np.testing.assert_allclose(said["steps"].total, [sum(s) for s in of_steps], atol=1e-5)
    np.testing.assert_allclose(said["differences"].total, [s[-1] for s in of_steps], atol=1e-5)
    for name, pays in (("steps", np.asarray), ("differences", lambda s: np.diff(s, prepend=0.0))):
        tokens = said[name].tokens
        assert tokens.shape == samples.response_mask.shape
        for row, mask, scores in zip(tokens, samples.response_mask, of_steps, strict=True):
            np.testing.assert_allclose(row[~np.isnan(row)], pays(scores), atol=1e-5)
            assert not np.isnan(row[mask.sum() - 1])  # the answer's end is a step's
            assert np.all(np.isnan(row[~mask]))
        np.testing.assert_array_equal(said[name].values, 0)


def test_a_further_sure_step_pays_by_steps_and_not_by_differences(left, mesh, answers):
    """Summed probabilities reward the number of steps."""
    policy, _, texts = answers
    process = process_reward("steps", left["outcome"], mesh)
    text = "3 even ; " * 2 + "3 even"
    ids = [policy.tokenizer.encode(text), policy.tokenizer.encode(text + " ; 3 even")]
    rows = texts.rows[:1] * 2
    pay = lambda way: replace(process, as_reward=way).scores(  # noqa: E731
        ids, [policy.tokenizer.decode(row) for row in ids], rows, policy.tokenizer, 24
    )
    steps, differences = pay("steps"), pay("differences")
    last = steps.parts["step_last"]
    assert last.min() > 0
    np.testing.assert_allclose(steps.total[1] - steps.total[0], last[1], atol=1e-5)
    np.testing.assert_allclose(differences.total, last, atol=1e-5)


def test_best_of_n_tells_the_gold_of_every_aggregate(left):
    found = results(left["best"])
    assert set(found["gold_by"]) == {"step_min", "step_product", "step_mean", "step_last"}
    for by_n in found["gold_by"].values():
        assert by_n["1"] == pytest.approx(found["gold"]["1"])
    assert found["gold_by"]["step_min"] == found["gold"]  # by which it chooses


@pytest.mark.parametrize("name", ["ppo", "dr_grpo"])
def test_what_steps_earn_reaches_the_update(left, name):
    for row in read_metrics(left[name]):
        assert row["reward/tokens/count"] > 1
        assert row["reward/score/mean"] == pytest.approx(row["reward/tokens/mean"])
        if name == "ppo":  # gold, the differences, sums to the last step's score
            assert row["reward/differences/mean"] == pytest.approx(row["reward/step_last/mean"], abs=1e-5)
        else:
            assert row["reward/tokens/mean"] == pytest.approx(row["reward/step_last/mean"], abs=1e-5)
            assert row["reward/total/mean"] == pytest.approx(
                row["reward/tokens/mean"] - row["kl/coef"] * row["kl/ref_k1"], abs=1e-5
            )


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            replace(STAGES["dr_grpo"], algorithm=RLOOConfig(group_size=2)),
            "use CISPOConfig, DAPOConfig, DrGRPOConfig",
        ),
        (replace(MODEL, steps=""), "give either steps"),
        (replace(MODEL, data=SorterPrompts(size=4)), "give either steps"),
        (StepReward("outcome", aggregate="last"), "aggregate 'last' is only read"),
        (StepReward("best"), "'best' is no ProcessRewardModel"),
        (replace(MODEL, separator="\n"), "is not that of 'labels', ' ;'"),
        (replace(LABELS, continuations=0), "continuations must be positive"),
        (replace(LABELS, separator=""), "separator must not be empty"),
        (replace(LABELS, sampling=replace(SHORT, temperature=0)), "would be the same"),
        (replace(LABELS, truth="sorter_so_fra"), "Did you mean 'sorter_so_far'?"),
    ],
)
def test_mistakes_in_stages_of_steps_are_named(stage, message):
    with pytest.raises(UserError) as error:
        stage.validate(STAGES)
    assert message in str(error.value)


def test_the_guides_example_is_an_experiment(monkeypatch, tmp_path):
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(root / "experiments" / "sorter")
    guide = (root / "docs" / "step-rewards.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(guide.split("```python\n")[1].split("```")[0], names)
    table = dry_run(names["experiment"], tmp_path)
    assert table.row_count == 6
