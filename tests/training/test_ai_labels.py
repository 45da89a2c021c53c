"""A judge labels preferences, and is a reward: a local model, a server, a program."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from chat_server import completion, serving
from tiny_runs import QUIET, folders, jsonl, one_device, only, trained

from jrlhf import hosts
from jrlhf.config import MeshConfig, UserError
from jrlhf.data.sources import FileSource
from jrlhf.experiment import run
from jrlhf.ops.agreement import cohen_kappa
from jrlhf.rewards.endpoint import Endpoint, EndpointJudge
from jrlhf.rewards.judges import Comparison, Program, StoredVerdicts
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import load_model
from jrlhf.training.judging import DividedJudge, JudgeReward, LocalJudge, judge_costs, make_judge
from jrlhf.training.stages import AILabels, Judge
from jrlhf.training.stages.ai_labels import every_pair, judge_report, labelled_rows

PAIR, ONE = "{question} => {answer_a} <or> {answer_b}", "{question}: {answer}?"


@dataclass(frozen=True)
class LongerIsBetter(Program):
    """P(A) by the difference of lengths, moved towards the first place; nothing to say on an empty answer."""

    bias: float = 0.0

    def verdicts(self, questions, options):
        rows = []
        for question in questions:
            a, b = (len(x) for x in question.partition(" => ")[2].split(" <or> "))
            p = 1 / (1 + np.exp(-(a - b) / 4 - self.bias))
            rows.append([p, 1 - p] if a and b else [np.nan, np.nan])
        return np.asarray(rows)


@dataclass(frozen=True)
class LikesThanks(Program):
    """Marks from 1 to 5: one for each word of thanks; silent on answers that are cut off."""

    silent: str = "~"

    def verdicts(self, questions, options):
        marks = [min(q.count("thanks"), len(options) - 1) for q in questions]
        rows = np.eye(len(options))[marks]
        rows[[self.silent in q for q in questions]] = np.nan
        return rows


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


@pytest.fixture
def after(one_device_run, one_device_runs):
    """after(name=stage, ...): these stages after the finished ones -> {name: folder}."""

    def after(**stages):
        with one_device():
            kept = only("pretrain", "sft", "preferences", **stages)
            return folders(run(kept, one_device_runs, console=QUIET))

    return after


def results(folder):
    return json.loads((folder / "done.json").read_text())["results"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileSource(str(path), kind="preference")


ROWS = [
    {"prompt": "p1", "responses": ["aaaa", "aa"], "ranks": [1, 2], "ended": [True, False], "labeler": "ann"},
    {"prompt": "p2", "responses": ["a", "aaa"], "ranks": [1, 2], "labeler": "ann"},
    {"prompt": "p3", "responses": ["aa", "bb"], "ranks": [1, 1], "scores": [3.0, 3.0]},
    {"prompt": "p4", "responses": ["", "bb"], "ranks": [2, 1]},
    {"prompt": "p5", "responses": ["aaaaa", "bb", "ccc"], "ranks": [1, 3, 2]},
]


# --- labels -------------------------------------------------------------------------------------------------


def test_a_program_labels_rows_and_the_results_say_how_far_it_agrees(after, tmp_path):
    judge = Judge(by=LongerIsBetter(bias=0.6), template=PAIR, verdicts=("A", "B"), value="probability")
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    found = after(judge=judge, labels=AILabels("judge", data=data))
    rows = jsonl(found["labels"] / "preferences.jsonl")
    assert [row["prompt"] for row in rows] == ["p1", "p2", "p3", "p5"]  # no verdict on p4
    assert [row["ranks"] for row in rows] == [[1, 2], [2, 1], [1, 1], [1, 3, 2]]
    # The bias towards a place is gone: tanh'd odds of both orders are averaged.
    p = lambda gap: 0.5 * sum(1 / (1 + np.exp(-gap / 4 + b)) for b in (0.6, -0.6))  # noqa: E731
    np.testing.assert_allclose([row["probability"] for row in rows[:3]], [p(2), p(-2), 0.5], atol=1e-6)
    assert rows[0]["ended"] == [True, False]
    assert {row["labeler"] for row in rows} == {"LongerIsBetter"}
    assert "scores" not in rows[2]
    told = results(found["labels"])
    assert (told["rows"], told["of_rows"], told["pairs"]) == (4, 5, 7)
    assert told["abstained"]["mean"] == 1 / 7
    assert told["abstained"]["low"] < 1 / 7 < told["abstained"]["high"]
    # p1, p5 thrice right; p2 wrong; p3 is tied.
    assert told["agreement"]["mean"] == 4 / 5
    assert told["agreement"]["pairs"] == 5
    # 5 of 6 pairs alike; in both orders either says first in 5/12 of them, second as often, and tie in 1/6.
    chance = 2 * (5 / 12) ** 2 + (1 / 6) ** 2
    assert told["kappa"]["mean"] == pytest.approx((5 / 6 - chance) / (1 - chance))
    assert told["kappa"]["low"] <= told["kappa"]["mean"] <= told["kappa"]["high"]
    # Gaps of 2, -2, 0, 3, 2, -1: the bias of 0.6 turns |gap| / 4 < 0.6 round, which are all but the 3.
    assert told["flipped"]["mean"] == 5 / 6
    assert told["first_place"]["mean"] == 11 / 12
    assert told["costs"] == {}


def test_hard_labels_tie_what_is_within_the_margin(after, tmp_path):
    judge = Judge(by=LongerIsBetter(), template=PAIR, verdicts=("A", "B"), value="probability")
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    found = after(judge=judge, labels=AILabels("judge", data=data, soft=False, margin=0.25))
    rows = jsonl(found["labels"] / "preferences.jsonl")
    # tanh(2/8) = 0.245, of lengths that differ by 2, is within; tanh(3/8) is not. Of the last row's three answers the
    # first beats the second alone.
    assert [row["ranks"] for row in rows] == [[1, 1], [1, 1], [1, 1], [1, 3, 2]]
    assert not any("probability" in row for row in rows)


def said_of(rows, wins):
    """A comparison in which the first of answers i < j wins with probability wins[i][j], in both orders."""
    pairs = every_pair(rows)
    p = np.asarray([[wins[i][j], 1 - wins[i][j], 0] for i, j in zip(pairs.first, pairs.second, strict=True)])
    return pairs, Comparison(p, p, p)


def test_several_answers_are_ranked_by_wins_or_by_chances():
    rows = [{"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 3]}]
    # a narrowly beats b and c; b beats c for certain, and has the best chances
    pairs, said = said_of(rows, [[0, 0.6, 0.6], [0, 0, 1.0], []])
    label = lambda by, soft=True: labelled_rows(rows, pairs, said.probabilities, "j", by, soft, 0.0)  # noqa: E731
    assert label("copeland")[0]["ranks"] == [1, 2, 3]
    assert label("borda")[0] == {
        "prompt": "p",
        "responses": ["a", "b", "c"],
        "labeler": "j",
        "ranks": [2, 1, 3],
        "scores": pytest.approx([0.6, 0.7, 0.2]),
    }
    both = label("pairs")
    assert [(row["responses"], row["ranks"], row["probability"]) for row in both] == [
        (["a", "b"], [1, 2], 0.6),
        (["a", "c"], [1, 2], 0.6),
        (["b", "c"], [1, 2], 1.0),
    ]
    # A cycle ties by wins.
    pairs, said = said_of(rows, [[0, 0.9, 0.1], [0, 0, 0.9], []])
    assert labelled_rows(rows, pairs, said.probabilities, "j", "copeland", True, 0.0)[0]["ranks"] == [1, 1, 1]
    # Without one verdict a ranking is none, but the other pairs are.
    said.probabilities[1] = np.nan
    assert labelled_rows(rows, pairs, said.probabilities, "j", "copeland", True, 0.0) == []
    assert len(labelled_rows(rows, pairs, said.probabilities, "j", "pairs", True, 0.0)) == 2


def test_a_judge_that_says_what_people_say_agrees_with_them():
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"p{n}", "responses": ["x", "y"], "ranks": [[1, 2], [2, 1], [1, 1]][n % 3]}
        for n in range(60)
    ]
    pairs = every_pair(rows)
    said = np.asarray([[[1, 0, 0], [0, 1, 0], [0, 0, 1]][n % 3] for n in range(60)], np.float64)
    same = judge_report(rows, pairs, Comparison(said, said, said), 0.0)
    for name in ("agreement", "kappa"):
        assert same[name]["mean"] == same[name]["low"] == same[name]["high"] == 1.0
    assert same["flipped"]["mean"] == 0
    guess = np.eye(3)[rng.integers(3, size=60)]
    chance = judge_report(rows, pairs, Comparison(guess, guess, guess), 0.0)
    assert chance["kappa"]["low"] < 0 < chance["kappa"]["high"]
    silent = np.full((60, 3), np.nan)
    nothing = judge_report(rows, pairs, Comparison(silent, silent, silent), 0.0)
    assert nothing["abstained"]["mean"] == 1
    assert nothing["kappa"] == {"mean": None, "low": None, "high": None, "pairs": 0}
    assert "flipped" not in nothing


def test_a_reward_model_and_ppo_learn_from_a_judge(after):
    """Distilled RLAIF, and direct RLAIF."""
    stages = tiny.experiment.stages
    judge = Judge(by=LongerIsBetter(), template=PAIR, verdicts=("A", "B"), value="probability")
    mark = Judge(
        by=LikesThanks(silent="describe"),
        template=ONE,
        verdicts=("1", "2", "3", "4", "5"),
        value="expected",
        fallback=-0.5,
    )
    found = after(
        judge=judge,
        labels=AILabels("judge", preferences="preferences", rank_by="pairs"),
        reward_model=replace(stages["reward_model"], preferences="labels", loop=tiny.loop(2)),
        mark=mark,
        ppo=replace(stages["ppo"], reward="mark", critic="policy", loop=tiny.loop(2)),
    )
    labels = jsonl(found["labels"] / "preferences.jsonl")
    assert len(labels) > 3 * 20
    assert all(len(row["responses"]) == 2 == len(row["ended"]) for row in labels)
    assert 0 <= results(found["reward_model"])["held_out_accuracy"] <= 1
    lines = trained(found["ppo"])
    assert len(lines) == 2
    # It is silent on one instruction of several.
    assert 0 < sum(line["reward/mark/fail_rate"] for line in lines) < 2
    assert all(np.isfinite(line["reward/total/mean"]) for line in lines)


# --- a server -----------------------------------------------------------------------------------------------


def test_a_server_labels_and_a_run_that_stops_goes_on_where_it_was(after, tmp_path):
    down = True

    def reply(question, n):
        if down and "p3" in question:
            return 401, {}, b"no credit"
        a, b = question.partition(" => ")[2].split(" <or> ")
        return completion(f"[[{'A' if len(a) >= len(b) else 'B'}]]")

    with serving() as serve:
        server = serve(reply)
        endpoint = Endpoint(server.url, "some-model", concurrency=1, input_price=1e6, retries=0, backoff=0.0)
        judge = Judge(by=endpoint, template=PAIR, verdicts=("A", "B"), value="probability")
        data = write_rows(tmp_path / "rows.jsonl", ROWS)
        stages = {"judge": judge, "labels": AILabels("judge", data=data)}
        with pytest.raises(UserError, match="HTTP 401, the key is missing or wrong"):
            after(**stages)
        asked = sum(server.asked.values())
        assert asked == 3
        down = False
        found = after(**stages)
        assert (
            sum(server.asked.values()) == 14 + 1
        )  # two orders of seven pairs; the one that was turned down again
        assert set(server.asked.values()) == {1, 2}
        told = results(found["labels"])
        assert told["costs"]["requests"] == 15
        assert told["costs"]["cost"] == 140
        assert told["flipped"]["mean"] == 1 / 7  # "aa" or "bb": whichever is first
        rows = jsonl(found["labels"] / "preferences.jsonl")
        assert {row["labeler"] for row in rows} == {"some-model"}
        assert [row["probability"] for row in rows[:4]] == [1, 0, 0.5, 0]
        # Other limits and prices are the same stage.
        cheaper = replace(judge, by=replace(endpoint, input_price=0.0, timeout=9.0, retries=1))
        again = after(**stages | {"judge": cheaper})
        assert again["labels"] == found["labels"]


# --- a local model ------------------------------------------------------------------------------------------


def test_a_local_judge_gives_the_softmax_over_the_options_and_writes(one_device_run, mesh):
    loaded = load_model(folders(one_device_run)["sft"], mesh)
    judge = LocalJudge("sft", loaded, mesh, SamplingConfig(max_new_tokens=6))
    options, questions = ("is", "honey", "dry"), ["describe ginger", "ginger honey is dry", "honey"]
    said = judge.verdicts(questions, options)
    for question, row in zip(questions, said, strict=True):
        ids = [1, *loaded.tokenizer.encode(question)]
        tokens = jnp.asarray([[*ids, loaded.tokenizer.encode(option)[0]] for option in options])
        logp, _ = loaded.model.logprobs(loaded.params, tokens, jnp.ones_like(tokens, bool))
        p = np.exp(np.asarray(logp)[:, -1])
        np.testing.assert_allclose(row, p / p.sum(), atol=1e-5)
    np.testing.assert_allclose(said.sum(axis=1), 1.0)
    first = judge.write(questions, seed=1)
    assert len(first) == 3
    assert all(first)
    assert judge.write(questions, seed=1) == first != judge.write(questions, seed=2)
    with pytest.raises(UserError, match="judge 'sft': the judge's context"):
        judge.verdicts(["ginger " * 60], options)


def test_a_local_judge_labels(after):
    judge = Judge("sft", template="describe {question} {answer_a} is {answer_b}", verdicts=("is", "honey"))
    found = after(judge=judge, labels=AILabels("judge", preferences="preferences", rank_by="borda"))
    rows = jsonl(found["labels"] / "preferences.jsonl")
    assert len(rows) == 32
    assert {row["labeler"] for row in rows} == {found["sft"].name}
    assert all(np.argsort(row["scores"])[-1] == row["ranks"].index(1) for row in rows)
    assert results(found["labels"])["flipped"]["mean"] is not None


# --- as a reward --------------------------------------------------------------------------------------------


def test_what_a_reward_is_made_of():
    prompts, rows = ["q", "q"], [{"answer": "xx"}, {"answer": "xx"}]
    judge = LongerIsBetter(bias=0.4)
    p = lambda gap, bias: 1 / (1 + np.exp(-gap / 4 - bias))  # noqa: E731
    both = JudgeReward("j", judge, PAIR, ("A", "B"), "probability")(prompts, ["xxxx", "x"], rows)
    np.testing.assert_allclose(both.values, [(p(g, 0.4) + p(g, -0.4)) / 2 for g in (2, -1)], rtol=1e-6)
    assert both.failed is None
    one = JudgeReward("j", judge, PAIR, ("A", "B"), "probability", both_orders=False)
    np.testing.assert_allclose(one(prompts, ["xxxx", "x"], rows).values, [p(2, 0.4), p(-1, 0.4)], rtol=1e-6)
    odds = JudgeReward("j", judge, PAIR, ("A", "B"), "log_odds")(prompts, ["xxxx", "x"], rows)
    np.testing.assert_allclose(odds.values, [0.5, -0.25], rtol=1e-6)
    silent = JudgeReward("j", judge, PAIR, ("A", "B"), "probability", fallback=0.25)
    found = silent(prompts, ["", "xx"], rows)
    np.testing.assert_allclose(found.values, [0.25, 0.5])
    np.testing.assert_array_equal(found.failed, [True, False])
    with pytest.raises(UserError, match="no verdict on 1 of 2 answers; give the judge a `fallback`"):
        replace(silent, fallback=None)(prompts, ["", "xx"], rows)
    marks = JudgeReward("j", LikesThanks(), ONE, ("1", "2", "3"), "expected")
    np.testing.assert_allclose(marks(["q"] * 3, ["", "thanks", "thanks thanks"], [{}] * 3).values, [-1, 0, 1])
    with pytest.raises(UserError, match="which has no finite log-odds; use value 'probability'"):
        JudgeReward("j", LikesThanks(), ONE, ("1", "2"), "log_odds")(["q"], ["x"], [{}])


def test_a_tie_is_half_a_win_as_a_reward():
    @dataclass(frozen=True)
    class Says(Program):
        def verdicts(self, questions, options):
            return np.asarray([[0.5, 0.1, 0.4]] * len(questions))

    reward = JudgeReward("j", Says(), PAIR, ("A", "B", "tie"), "probability", both_orders=False)
    np.testing.assert_allclose(reward(["q"], ["x"], [{"answer": "y"}]).values, [0.7], rtol=1e-6)


@pytest.fixture
def on_two(monkeypatch):
    """on_two(f) -> what f returns, or what UserError it raises, on each of two processes, which here are threads."""
    own, said, together = threading.local(), {}, threading.Barrier(2, timeout=10)

    def exchanged(data: bytes) -> list[bytes]:
        said[own.number] = data
        together.wait()
        everything = [said[0], said[1]]
        together.wait()
        return everything

    def on_two(f):
        def run(number: int):
            own.number = number
            try:
                return f()
            except UserError as error:
                return error

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, (0, 1)))

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: own.number)
    monkeypatch.setattr(hosts, "exchanged", exchanged)
    return on_two


def test_each_process_asks_its_share_and_all_know_all(on_two):
    asked = []

    @dataclass(frozen=True)
    class Lengths(Program):
        def verdicts(self, questions, options):
            asked.append(list(questions))
            if "fails" in questions:
                raise UserError("out of credit")
            return np.asarray([[len(q) / 10, 1 - len(q) / 10] for q in questions])

    questions = ["a", "bb", "a", "ccc", "dddd", "bb"]
    first, second = on_two(lambda: DividedJudge(Lengths()).verdicts(questions, ("A", "B")))
    np.testing.assert_array_equal(first, Lengths().verdicts(questions, ("A", "B")))
    np.testing.assert_array_equal(first, second)
    assert sorted(asked[:2]) == [["a", "bb"], ["ccc", "dddd"]]  # each once
    found = on_two(lambda: DividedJudge(Lengths()).verdicts(["x", "fails"], ("A", "B")))
    assert [str(error) for error in found] == [
        "the judge failed on process 1: out of credit",
        "out of credit",
    ]
    asked.clear()
    for one in on_two(lambda: DividedJudge(Lengths()).verdicts(["a"], ("A", "B"))):
        np.testing.assert_array_equal(one, [[0.1, 0.9]])
    assert asked == [["a"]]  # one question is no work for two


def test_replies_of_all_processes_are_kept_and_counted(on_two, tmp_path):
    with serving() as serve:
        server = serve(lambda question, n: completion("A" if question < "c" else "B"))
        by, questions = Endpoint(server.url, "m"), ["a", "b", "c", "d", "e"]

        def ask():
            judge = make_judge(by, tmp_path / "answers.sqlite")
            return judge.verdicts(questions, ("A", "B")).tolist(), judge_costs(judge)

        (said, costs), other = on_two(ask)
        assert (said, costs) == other
        assert said == [[1, 0], [1, 0], [0, 1], [0, 1], [0, 1]]
        assert costs["requests"] == 5
        assert sorted(path.name for path in tmp_path.iterdir()) == ["answers-1.sqlite", "answers.sqlite"]
        # One process alone finds what two have asked.
        assert EndpointJudge(by, tmp_path / "answers.sqlite").verdicts(questions, ("A", "B")).tolist() == said
        assert sum(server.asked.values()) == 5


# --- mistakes -----------------------------------------------------------------------------------------------

BY = StoredVerdicts("x.jsonl")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Judge(template=ONE), "give either start"),
        (Judge("sft", by=BY, template=ONE), "give either start"),
        (Judge("sft", template=ONE, verdicts=("yes",)), "at least 2, got 1"),
        (Judge("sft", template=PAIR, verdicts=("A", "B", "tie", "C")), "on two answers there are 2"),
        (
            Judge("sft", template=ONE, verdicts=("1", "2", "3")),
            "'log_odds' compares 2 verdicts, and there are 3",
        ),
        (Judge("sft", template=ONE, verdicts=("1", "b"), value="expected"), "mean of numeric verdicts"),
        (Judge("sft", template=PAIR, verdicts=("1", "2"), value="expected"), "mean of numeric verdicts"),
        (Judge("sft", template=ONE, both_orders=False), "both_orders is about templates of two"),
        (Judge("sft", template=ONE, fallback=0.0), "fallback is the finite reward"),
        (Judge(by=BY, template=ONE, fallback=float("nan")), "fallback is the finite reward"),
        (Judge(by=Endpoint("http://x/v1", "m"), template=ONE), "an endpoint may be certain"),
        (AILabels("judge"), "give either preferences (a stage) or data"),
        (AILabels("reward_model", preferences="preferences"), "is RewardModel; it must be a Judge"),
        (AILabels("one", preferences="preferences"), "is asked about one answer"),
        (AILabels("two", preferences="preferences", rank_by="elo"), "rank_by is 'elo'"),
        (AILabels("two", preferences="preferences", margin=0.1), "soft labels need none"),
        (AILabels("two", preferences="preferences", margin=1.5, soft=False), "less than 1"),
    ],
)
def test_mistakes_at_config_time(stage, message):
    stages = tiny.experiment.stages | {
        "one": Judge("sft", template=ONE),
        "two": Judge("sft", template=PAIR, verdicts=("A", "B")),
    }
    with pytest.raises(UserError) as error:
        stage.validate(stages)
    assert message in str(error.value)


def test_a_missing_key_is_named_before_anything_runs(monkeypatch):
    monkeypatch.delenv("TEST_JUDGE_KEY", raising=False)
    judge = Judge(
        by=Endpoint("http://x/v1", "m", api_key_env="TEST_JUDGE_KEY"), template=ONE, value="probability"
    )
    judge.validate({})
    with pytest.raises(UserError, match="TEST_JUDGE_KEY is not set"):
        judge.check_mesh(MeshConfig())


def test_a_judge_that_says_nothing_is_an_error(after, tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    judge = Judge(
        by=StoredVerdicts(str(tmp_path / "none.jsonl")),
        template=PAIR,
        verdicts=("A", "B"),
        value="probability",
    )
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match="'judge' has no verdict on any of the 5 rows"):
        after(judge=judge, labels=AILabels("judge", data=data))
    assert judge.files() == (str(tmp_path / "none.jsonl"),)


# --- public data --------------------------------------------------------------------------------------------


def records(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_kappa_of_pandalms_annotators_is_what_its_authors_publish(shared_data):
    """The README of PandaLM: 0.85, 0.88 and 0.86, and 105, 422 and 472 pairs by the majority."""
    rows = records(shared_data / "pandalm-human" / "testset-v1.json")
    votes = np.asarray([[row[f"annotator{n}"] for n in (1, 2, 3)] for row in rows], np.float64)
    kappas = [round(cohen_kappa(votes[:, i], votes[:, j]), 2) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert kappas == [0.85, 0.88, 0.86]
    counts = np.stack([(votes == choice).sum(axis=1) for choice in range(3)], axis=1)
    majority = np.where(counts.max(axis=1) > 1, counts.argmax(axis=1), 0)
    assert np.bincount(majority).tolist() == [105, 422, 472]


def test_a_stored_judge_is_held_against_pandalms_people(after, shared_data, tmp_path):
    """gpt-3.5-turbo's verdicts, with the answers in one order, beside those counted by hand."""
    folder = shared_data / "pandalm-human"
    said = {row["idx"]: row["gpt_result"] for row in records(folder / "gpt-3.5-turbo-testset-v1.json")}
    source, lines, seen = [], [], set()
    for row in records(folder / "testset-v1.json"):
        votes = [row[f"annotator{n}"] for n in (1, 2, 3)]
        vote = max({*votes}, key=votes.count) if len({*votes}) < 3 else 0
        asked = f"{row['instruction']} {row['input']}"
        if (asked, str(row["response1"]), str(row["response2"])) in seen or "" in (
            row["response1"],
            row["response2"],
        ):
            continue
        seen.add((asked, str(row["response1"]), str(row["response2"])))
        two = [str(row["response1"]), str(row["response2"])]
        source.append({"prompt": asked, "responses": two, "ranks": [[1, 1], [1, 2], [2, 1]][vote]})
        verdict = {"1": "A", "2": "B", "Tie": "tie"}.get(said[row["idx"]])
        question = PAIR.format(question=asked, answer_a=two[0], answer_b=two[1])
        lines.append((question, verdict, vote))
    (tmp_path / "gpt.jsonl").write_text(
        "".join(json.dumps({"question": q, "verdict": v}) + "\n" for q, v, _ in lines)
    )
    judge = Judge(
        by=StoredVerdicts(str(tmp_path / "gpt.jsonl")),
        template=PAIR,
        verdicts=("A", "B", "tie"),
        value="probability",
        both_orders=False,
    )
    found = after(
        gpt=judge, labels=AILabels("gpt", data=write_rows(tmp_path / "rows.jsonl", source), soft=False)
    )
    told = results(found["labels"])
    known = [({"A": 1, "B": 2, "tie": 0}[v], vote) for _, v, vote in lines if v]
    assert told["rows"] == len(known) < len(lines)
    assert told["agreement_with_ties"]["mean"] == pytest.approx(np.mean([v == vote for v, vote in known]))
    assert told["agreement"]["mean"] == pytest.approx(np.mean([v == vote for v, vote in known if v and vote]))
    assert 0.4 < told["kappa"]["low"] < told["kappa"]["mean"] < told["kappa"]["high"] < 0.6
    assert "flipped" not in told
    assert [row["ranks"] for row in jsonl(found["labels"] / "preferences.jsonl")] == [
        [[1, 1], [1, 2], [2, 1]][v] for v, _ in known
    ]


def test_gpt_4_agrees_with_itself_on_a_five_level_rubric(shared_data):
    """Three marks of each of 320 answers by the rubrics of Prometheus' MT-Bench set."""
    path = shared_data / "rubrics" / "mt_bench_eval.json"
    marks = np.asarray([json.loads(str(row["gpt4_score"])) for row in records(path)], np.float64)
    assert marks.shape == (320, 3)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert 0.83 < cohen_kappa(marks[:, i], marks[:, j], "quadratic") < 0.88
