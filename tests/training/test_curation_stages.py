"""Stages that choose or make rows, and stages that read the rows of others."""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
from tiny_runs import QUIET, folders, jsonl, lasting, one_device, only, trained

from jrlhf.algorithms.rloo import RLOOConfig
from jrlhf.config import (
    STOP,
    LeftRows,
    MeshConfig,
    Preempted,
    StageRows,
    UserError,
    from_dict,
    to_dict,
    with_stage_rows,
)
from jrlhf.data.curation import Between, Curriculum
from jrlhf.data.sources import FileSource
from jrlhf.experiment import Experiment, check, dry_run, run, tasks
from jrlhf.lab import LarderDemonstrations, LarderPrompts, larder_gold
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import load_model
from jrlhf.training.data import preference_arrays
from jrlhf.training.loop import LoopConfig
from jrlhf.training.rewards import REWARDS, jitted_scores
from jrlhf.training.stages import (
    SFT,
    BestAnswers,
    CurateDemonstrations,
    CuratePreferences,
    CuratePrompts,
    Evaluate,
    OnPolicy,
    SelectDemonstrations,
    SelectPreferences,
    SelfInstruct,
    SolveRate,
)

SOLVED = SolveRate(
    start="sft",
    reward="larder_gold",
    prompts=LarderPrompts(size=24),
    samples=4,
    sampling=tiny.answers,
    right_at=0.2,
)
RLOO = OnPolicy(
    start="sft",
    reward="larder_gold",
    prompts=StageRows("solved"),
    algorithm=RLOOConfig(group_size=2),
    sampling=tiny.answers,
    optim=tiny.adam,
    loop=tiny.loop(3),
)


@pytest.fixture
def start(one_device_run, one_device_runs):
    """start(name=stage, ...): these after what they need of the tiny experiment -> ({name: folder}, results)."""

    def start(**stages):
        with one_device():
            folder = run(
                only("pretrain", "sft", "preferences", "reward_model", **stages),
                one_device_runs,
                console=QUIET,
            )
        results = json.loads((folder / "results.json").read_text())
        return folders(folder), {name: results[name]["0"] for name in stages}

    return start


# --- rows of other stages -----------------------------------------------------------------------------------


def small(**stages) -> Experiment:
    return only("pretrain", "sft", "preferences", **stages)


def test_rows_of_a_stage_make_it_a_parent_and_a_part_of_the_fingerprint(tmp_path):
    experiment = small(solved=SOLVED, rloo=RLOO)
    assert check(experiment).index("solved") < check(experiment).index("rloo")
    assert experiment.stages["rloo"].parents(experiment.stages) == ("sft", "solved")
    assert from_dict(Experiment, json.loads(json.dumps(to_dict(experiment)))) == experiment

    def rloo(experiment):
        return next(t.fingerprint for t in tasks(experiment, tmp_path) if t.name == "rloo")

    other = small(solved=replace(SOLVED, low=0.1), rloo=RLOO)
    renamed = small(other=SOLVED, rloo=replace(RLOO, prompts=StageRows("other")))
    assert rloo(other) != rloo(experiment) == rloo(renamed)


def test_rows_inside_dicts_tuples_and_other_sources_are_found(tmp_path):
    @dataclass(frozen=True)
    class Nested:
        parts: tuple
        by_name: dict
        plain: LarderPrompts

    stages = {"solved": SOLVED, "preferences": tiny.experiment.stages["preferences"]}
    parents = {name: tmp_path / name for name in stages}
    plain = LarderPrompts(size=3)
    value = Nested((StageRows("solved"), plain), {"a": StageRows("preferences"), "b": plain}, plain)
    found = with_stage_rows(value, parents, stages)
    assert found.parts[0].path == str(tmp_path / "solved" / "prompts.jsonl")
    assert found.by_name["a"].path == str(tmp_path / "preferences" / "preferences.jsonl")
    assert found.plain is found.parts[1] is found.by_name["b"] is plain
    assert with_stage_rows(SOLVED, parents, stages) is SOLVED


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            "sft",
            r"stages\.rloo\.prompts\.stage: needs prompts or demonstrations or .*'sft' \(SFT\) leaves a language",
        ),
        ("solve", r"stages\.rloo\.prompts\.stage: 'solve' is not a stage\. Did you mean 'solved'"),
    ],
)
def test_rows_of_what_leaves_none_are_refused(rows, message):
    with pytest.raises(UserError, match=message):
        check(small(solved=SOLVED, rloo=replace(RLOO, prompts=StageRows(rows))))
    with pytest.raises(UserError, match="name the stage"):
        StageRows("")


def test_a_dry_run_counts_the_rows_once_they_are_there(start, one_device_runs, tmp_path):
    def counted(runs_dir):
        table = dry_run(only("pretrain", "sft", "preferences", solved=SOLVED, rloo=RLOO), runs_dir)
        names, rows = list(table.columns[0].cells), list(table.columns[6].cells)
        return rows[names.index("rloo")]

    assert counted(tmp_path / "nothing") == "-"
    _, results = start(solved=SOLVED)
    assert counted(one_device_runs) == str(results["solved"]["kept"])


# --- solve rates and curricula ------------------------------------------------------------------------------


def planned(prompts, completions, rows):
    """Of four answers to each prompt 0, 1, 2, 3, 4 are right, then 0 again."""
    n = np.arange(len(prompts))
    return (n % 4 < n // 4 % 5).astype(np.float32)


def test_solve_rates_are_those_of_the_samples_and_filter_the_prompts(start, monkeypatch):
    monkeypatch.setitem(REWARDS, "planned", planned)
    stage = replace(SOLVED, reward="planned", right_at=1.0, prompts=LarderPrompts(size=10, seed=5))
    left, results = start(every=stage, some=replace(stage, low=0.25, high=0.75))
    every, some = jsonl(left["every"] / "prompts.jsonl"), jsonl(left["some"] / "prompts.jsonl")
    assert [row["solve_rate"] for row in every] == [0.0, 0.25, 0.5, 0.75, 1.0] * 2
    assert some == [row for row in every if 0.25 <= row["solve_rate"] <= 0.75]
    assert [row["prompt"] for row in every] == [row["prompt"] for row in stage.prompts.rows()]
    assert [row["items"] for row in every] == [row["items"] for row in stage.prompts.rows()]
    assert results["some"] | {"histogram": 0} == {
        "prompts": 10, "kept": 6, "too_hard": 2, "too_easy": 2, "solve_rate": 0.5, "all_alike": 0.4, "histogram": 0,
    }  # fmt: skip
    assert results["every"]["histogram"]["counts"] == [2, 0, 2, 0, 0, 2, 0, 2, 0, 2]
    with pytest.raises(UserError, match=r"keep none of 10 prompts: their rates go from 0 to 1"):
        start(none=replace(stage, low=0.3, high=0.4))


def test_without_a_bound_the_rate_is_the_mean_reward(start):
    left, results = start(mean=replace(SOLVED, right_at=None, low=-9.0, high=9.0))
    rows = jsonl(left["mean"] / "prompts.jsonl")
    assert len(rows) == 24
    assert results["mean"]["solve_rate"] == pytest.approx(np.mean([row["solve_rate"] for row in rows]))
    assert len({row["solve_rate"] for row in rows}) > 5


def test_a_curriculum_asks_easy_prompts_first_and_resumes_as_if_never_stopped(start, monkeypatch):
    curriculum = Curriculum(by="solve_rate", steps=3, start=0.3)
    annotated = replace(SOLVED, right_at=None, low=-9.0, high=9.0)
    asked, stop_at = [], [0]

    def recorded(prompts, completions, rows):
        asked.append([row["solve_rate"] for row in rows])
        if len(asked) == stop_at[0]:
            STOP.request()
        return larder_gold(prompts, completions, rows)

    monkeypatch.setitem(REWARDS, "recorded", recorded)
    stage = replace(
        RLOO, reward="recorded", prompts=StageRows("mean"), curriculum=curriculum, loop=tiny.loop(4)
    )
    left, _ = start(mean=annotated, rloo=stage)
    whole, rates = trained(left["rloo"]), [r["solve_rate"] for r in jsonl(left["mean"] / "prompts.jsonl")]
    shares = [curriculum.share(n) for n in range(4)]
    assert [row["rollout/competence"] for row in whole] == pytest.approx(shares)
    assert len(asked) == 4
    for n, share in enumerate(shares):
        assert min(asked[n]) >= sorted(rates, reverse=True)[int(np.ceil(share * len(rates))) - 1]
    before, asked[:], stop_at[0] = list(asked), [], 2
    again = {
        "again": replace(stage, loop=replace(stage.loop, eval_every=7))
    }  # another fingerprint, the same run
    try:
        with pytest.raises(Preempted):
            start(mean=annotated, **again)
    finally:
        STOP.clear()
    assert len(asked) < 4
    resumed, _ = start(mean=annotated, **again)
    assert asked == before
    assert [lasting(m) for m in trained(resumed["again"])] == [lasting(m) for m in whole]


def test_a_curriculum_by_a_field_that_no_row_has_is_told_before_anything_runs(tmp_path):
    wrong = replace(RLOO, prompts=LarderPrompts(size=16), curriculum=Curriculum(by="item", steps=2))
    with pytest.raises(UserError, match=r"stages\.rloo: curriculum\.by: prompt 1 has no field 'item'"):
        dry_run(small(rloo=wrong), tmp_path)


def test_rows_between_two_values_of_a_field_need_no_new_samples(start, monkeypatch):
    monkeypatch.setitem(REWARDS, "planned", planned)
    middle = Between(StageRows("rates"), "solve_rate", 0.25, 0.75)
    left, _ = start(
        rates=replace(SOLVED, reward="planned", right_at=1.0),
        middle=replace(RLOO, prompts=middle, loop=tiny.loop(1)),
    )
    rows = LeftRows(str(left["rates"] / "prompts.jsonl"))
    kept = [row["solve_rate"] for row in Between(rows, "solve_rate", 0.25, 0.75).rows()]
    assert kept == [0.25, 0.5, 0.75] * 5
    with pytest.raises(UserError, match=r"Between\.by: row 1 has no field 'rate'"):
        list(Between(rows, "rate").rows())
    with pytest.raises(UserError, match="no row has 'solve_rate' from 2 to 3"):
        list(Between(rows, "solve_rate", 2.0, 3.0).rows())
    with pytest.raises(UserError, match="no row would be left"):
        Between(rows, "solve_rate", 1.0, 0.0)


# --- duplicates and contamination ---------------------------------------------------------------------------


def test_curation_drops_planted_rows_and_says_why(start, tmp_path):
    prompts = list(dict.fromkeys(row["prompt"] for row in LarderPrompts(size=60, seed=9).rows()))[:20]
    held = list(dict.fromkeys(row["prompt"] for row in LarderPrompts(size=40, split="eval").rows()))[:2]
    rows = [
        {"prompt": text, "number": n} for n, text in enumerate([*prompts, held[1].upper(), prompts[3] + " "])
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluated = tmp_path / "eval.jsonl"
    evaluated.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in held))
    curated = CuratePrompts(
        FileSource(str(path), "prompt"), against={"eval": FileSource(str(evaluated), "prompt")}
    )
    left, results = start(curated=curated)
    assert jsonl(left["curated"] / "prompts.jsonl") == rows[:20]
    contaminated, repeated = jsonl(left["curated"] / "dropped.jsonl")
    assert contaminated["row"] == 21
    assert (contaminated["split"], contaminated["prompt"], contaminated["how"]) == ("eval", held[1], "same")
    assert (repeated["row"], repeated["of"], repeated["why"]) == (22, 4, "exact duplicate")
    assert results["curated"] == {
        "rows": 22, "kept": 20, "exact_duplicates": 1, "near_duplicates": 0, "contaminated": 1, "by_split": {"eval": 1},
    }  # fmt: skip


def test_demonstrations_are_alike_by_all_that_they_say_or_by_their_prompt():
    row = lambda prompt, said: {"prompt": prompt, "completion": said}  # noqa: E731
    rows = [
        row("a b c d", "x y z w"),
        row("a b c d", "x y z v"),
        row("a b c d", "other"),
        row("e f", "x y z w"),
    ]
    whole = CurateDemonstrations(LarderDemonstrations(), near=0.5, ngram=2)
    kept, dropped = whole.curated(rows, {})
    assert kept == [rows[0], rows[2], rows[3]]
    assert [(d["row"], d["of"], d["why"], d["similarity"]) for d in dropped] == [
        (2, 1, "near duplicate", 0.75)
    ]
    kept, dropped = replace(whole, compare="prompt").curated(rows, {})
    assert kept == [rows[0], rows[3]]
    assert [(d["row"], d["of"], d["why"]) for d in dropped] == [
        (2, 1, "exact duplicate"),
        (3, 1, "exact duplicate"),
    ]


def test_rows_are_numbered_as_in_the_source_after_others_were_dropped():
    """Contamination takes rows 1 and 3, an exact duplicate row 4: the near duplicate is row 6 of row 5."""
    texts = ["held one", "a b c d e", "held one", "a b c d e", "p q r s t u v w x y", "p q r s t u v w x z"]
    stage = CuratePrompts(LarderPrompts(size=1), near=0.5, ngram=3)
    kept, dropped = stage.curated([{"prompt": text} for text in texts], {"eval": ["held one"]})
    assert [row["prompt"] for row in kept] == [texts[1], texts[4]]
    assert [(d["row"], d["why"], d.get("of")) for d in dropped] == [
        (1, "contaminated", None), (3, "contaminated", None), (4, "exact duplicate", 2), (6, "near duplicate", 5),
    ]  # fmt: skip
    assert [d["text"] for d in dropped] == [texts[i] for i in (0, 2, 3, 5)]


def test_curated_preferences_train_a_reward_model(start):
    curated = CuratePreferences(StageRows("preferences"), near=0.9)
    reward_model = replace(tiny.experiment.stages["reward_model"], preferences="curated", loop=tiny.loop(2))
    left, _ = start(curated=curated, learned=reward_model)
    before, after = (jsonl(left[name] / "preferences.jsonl") for name in ("preferences", "curated"))
    assert all(row in before for row in after)
    assert trained(left["learned"])


# --- the best by a reward -----------------------------------------------------------------------------------


def test_demonstrations_are_selected_by_a_program(start):
    data = LarderDemonstrations(size=40)
    select = SelectDemonstrations(data, reward="larder_gold", keep=0.25)
    left, results = start(best=select, good=replace(select, keep=1.0, least=1.0))
    rows = list(data.rows())
    gold = larder_gold([r["prompt"] for r in rows], [r["completion"] for r in rows], [{} for _ in rows])
    best = jsonl(left["best"] / "demonstrations.jsonl")
    kept = {n for n, row in enumerate(rows) if row in best}
    assert len(best) == 10
    assert min(gold[n] for n in kept) >= max(gold[n] for n in range(40) if n not in kept)
    assert jsonl(left["good"] / "demonstrations.jsonl") == [
        r for r, g in zip(rows, gold, strict=True) if g >= 1.0
    ]
    assert results["best"]["value"] == pytest.approx(gold.mean(), abs=1e-6)
    assert results["best"]["value_kept"] == pytest.approx(np.sort(gold)[-10:].mean(), abs=1e-6)


def test_a_learned_reward_of_stored_answers_is_that_of_the_reward_models_own_batches(start):
    """There answers are padded on the right, here they stand where samples do."""
    select = SelectPreferences(StageRows("preferences"), reward="reward_model", start="sft", keep=0.5)
    left, results = start(selected=select, best=replace(select, by="best"))
    rows = jsonl(left["preferences"] / "preferences.jsonl")
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        loaded = load_model(left["reward_model"], mesh, "scalar")
        batch = preference_arrays(rows, loaded.tokenizer, 40, "error", QUIET)
        n, k, length = batch.tokens.shape
        flat = (x.reshape(n * k, length) for x in (batch.tokens, batch.mask))
        scores = np.asarray(jitted_scores(loaded.model, loaded.params, *flat)).reshape(n, k)
    top = np.asarray(
        [values[np.asarray(row["ranks"]) == 1].mean() for values, row in zip(scores, rows, strict=True)]
    )
    last = [
        values[np.asarray(row["ranks"]) == max(row["ranks"])].mean()
        for values, row in zip(scores, rows, strict=True)
    ]
    for name, values in (("selected", top - np.asarray(last)), ("best", top)):
        assert results[name]["value"] == pytest.approx(values.mean(), abs=1e-5)
        order = np.sort(np.argsort(-values, kind="stable")[:16])
        assert jsonl(left[name] / "preferences.jsonl") == [rows[i] for i in order]


def test_a_reward_model_needs_a_language_model_whose_tokens_it_reads():
    select = SelectDemonstrations(LarderDemonstrations(size=4), reward="reward_model", keep=0.5)
    with pytest.raises(UserError, match="start: name the language model"):
        check(only("pretrain", "sft", "preferences", "reward_model", select=select))


# --- the best of n as demonstrations ------------------------------------------------------------------------


def test_the_best_answers_that_ended_become_demonstrations_for_sft(start, monkeypatch):
    asked = SimpleNamespace(said=[])

    def by_length(prompts, completions, rows):
        asked.said = [(p, c, row["ended"]) for p, c, row in zip(prompts, completions, rows, strict=True)]
        return np.asarray([len(c) for c in completions], np.float32)

    monkeypatch.setitem(REWARDS, "length", by_length)
    best = BestAnswers(
        start="sft", reward="length", prompts=LarderPrompts(size=16), samples=4, sampling=tiny.answers, keep=2
    )
    sft = SFT(
        start="sft",
        data=StageRows("best"),
        optim=tiny.adam,
        loop=LoopConfig(steps=1, batch_size=2),
        eval_rows=1,
    )
    left, results = start(best=best, distilled=sft)
    rows = jsonl(left["best"] / "demonstrations.jsonl")
    expected = []
    for p in range(16):
        group = [(c, ended) for _, c, ended in asked.said[4 * p : 4 * p + 4]]
        texts = list(
            dict.fromkeys(sorted((c for c, ended in group if ended and c.strip()), key=len, reverse=True))
        )
        expected += [
            {"prompt": asked.said[4 * p][0], "completion": c, "reward": float(len(c))} for c in texts[:2]
        ]
    assert any(not ended for *_, ended in asked.said)
    assert rows == expected
    assert results["best"]["without_answer"] == 16 - len({n // 4 for n, s in enumerate(asked.said) if s[2]})
    assert trained(left["distilled"])


# --- prompts that a model makes -----------------------------------------------------------------------------


SEEDS = [f"write a number {n} and explain what it is about {word}" for n, word in enumerate("abcdefghij")]


class Writer:
    """Goes on with every list in the same way, and remembers what it was shown."""

    def __init__(self, reply: str):
        self.reply, self.asked = reply, []

    def write(self, questions, seed):
        self.asked.append((list(questions), seed))
        return [self.reply] * (len(questions) - 1) + [None]


def test_self_instruct_keeps_what_survives_each_filter_and_counts_the_rest():
    stage = SelfInstruct(start="sft", seeds=LarderPrompts(size=1), requests=3, rounds=2)
    new = "compose one quiet song for my grandmother"
    lines = [
        new,
        SEEDS[3] + " !",
        "too few",
        "draw me something nice now",
        "- begins with a dash here",
        new + " please",
        "Answer this question about the",  # cut off
    ]
    reply = "\n".join([lines[0], *(f"{n}. {line}" for n, line in enumerate(lines[1:], 10))])
    writer = Writer(reply)
    made, counts = stage.generated(writer, SEEDS, seed=0)
    assert [row["prompt"] for row in made] == [new]
    assert made[0]["similarity"] < 0.3
    # Two replies of seven tasks in each of two rounds; after its first coming `new` is too similar to itself.
    assert counts == {
        "replies": 4, "tasks": 28, "unfinished": 4, "too short": 4, "too long": 0, "keyword": 4, "punctuation first": 4,
        "too similar": 4 + 4 + 3,
    }  # fmt: skip
    (first, one), (second, other) = writer.asked
    assert one != other
    assert len(set(first)) == 3
    assert all(text.endswith("\n9.") and new not in text for text in first)
    assert all(text.count(new) == 1 for text in second)
    again = Writer(reply)
    assert stage.generated(again, SEEDS, seed=0) == (made, counts)
    assert again.asked == writer.asked
    stage.generated(different := Writer(reply), SEEDS, seed=1)
    assert different.asked != writer.asked


def test_self_instruct_runs_on_a_local_model(start):
    """The tiny model knows no lists: all that it writes is filtered or kept, and nothing is lost between."""
    stage = SelfInstruct(
        start="sft", seeds=LarderPrompts(size=8), requests=16, rounds=2, examples=2, own=1, least_words=1,
        similarity=1.0, sampling=tiny.answers,
    )  # fmt: skip
    left, results = start(made=stage)
    found, rows = results["made"], jsonl(left["made"] / "prompts.jsonl")
    assert found["kept"] == len(rows) > 0
    assert found["tasks"] == found["kept"] + sum(
        found[why]
        for why in ("unfinished", "too short", "too long", "keyword", "punctuation first", "too similar")
    )


# --- mistakes -----------------------------------------------------------------------------------------------

GOLD = {"start": "sft", "reward": "larder_gold", "prompts": LarderPrompts(size=4), "sampling": tiny.answers}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (SolveRate(**GOLD, low=0.8, high=0.2), "low 0.8 is above high 0.2"),
        (SolveRate(**(GOLD | {"reward": "larder_glod"})), "Did you mean 'larder_gold'"),
        (BestAnswers(**GOLD, samples=2, keep=3), "keep is 3; it must be from 1 to samples, 2"),
        (CuratePrompts(LarderPrompts(size=4), near=1.5), "near is 1.5"),
        (CuratePrompts(LarderPrompts(size=4), exact=False), "nothing would be dropped"),
        (CuratePrompts(LarderPrompts(size=4), contained=20), "contained 20 from 1 to overlap 13"),
        (SelectDemonstrations(LarderDemonstrations(size=4), reward="larder_gold"), "give keep or least"),
        (SelectDemonstrations(LarderDemonstrations(size=4), reward="larder_gold", keep=1.5), "keep is 1.5"),
        (SelfInstruct(seeds=LarderPrompts(size=4)), "give either start"),
        (SelfInstruct(start="sft", seeds=LarderPrompts(size=4), sampling=tiny.answers, own=8), "own is 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_told_before_anything_runs(wrong, message):
    with pytest.raises(UserError, match=message):
        check(small(wrong=wrong))


def test_prompts_of_a_stage_are_evaluated_too(start):
    evaluate = Evaluate(
        policies=("sft",),
        gold="larder_gold",
        prompts={"solved": StageRows("solved")},
        sampling=tiny.answers,
        samples=2,
    )
    left, _ = start(solved=SOLVED, looked=evaluate)
    asked = json.loads((left["looked"] / "evaluation.json").read_text())["prompts"]["solved"]
    assert asked == [row["prompt"] for row in jsonl(left["solved"] / "prompts.jsonl")]
