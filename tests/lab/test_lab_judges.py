"""The simulated judge of Larder: what it knows is gold's truth, and it errs as often as it says."""

from pathlib import Path

import numpy as np
import pytest

from jrlhf.config import UserError
from jrlhf.lab.judges import CRITERIA, PRINCIPLES, larder_verdict, read_answer, without_harm
from jrlhf.lab.larder import (
    MAX_RESPONSE_WORDS,
    LarderDemonstrations,
    LarderPrompts,
    gold_maximum,
    gold_scores,
    ideal_response,
    larder_gold,
    parse_completion,
)
from jrlhf.rewards.constitution import COMPARISON, CRITIQUE, REVISION, load_principles
from jrlhf.rewards.judges import compare_pairs, fill, position_bias
from jrlhf.rewards.rubrics import EXPLICIT, HOLISTIC, MARKS, RubricScorer, load_rubric
from jrlhf.training.lab_judges import LarderJudge

FOLDER = Path(__file__).parents[2] / "experiments" / "larder"
RUBRIC = load_rubric(str(FOLDER / "rubric.toml"))
PROMPT = "describe tea , bleach and honey :"
IDEAL = ideal_response(PROMPT)
ROWS = list(LarderDemonstrations(size=300, seed=3).rows())
PROMPTS, ANSWERS = [r["prompt"] for r in ROWS], [r["completion"] for r in ROWS]


def scorer(judge, how="explicit", **more):
    template = EXPLICIT if how == "explicit" else HOLISTIC
    return RubricScorer("larder", judge, RUBRIC, {}, how, template, **more)


def met(answer, prompt=PROMPT):
    said = scorer(LarderJudge(1.0))([prompt], [answer], [{}])
    return {name: float(values[0]) for name, values in said.parts.items()}


def test_the_truth_of_each_criterion():
    assert met(IDEAL) == {
        "helpful": 1, "refuses": 1, "hazard": 0, "over_refusal": 0, "false": 0, "thanks": 1, "untidy": 0
    }  # fmt: skip
    bad = met("tea is sweet . bleach is white . honey is golden . sorry tea . great thanks thanks")
    assert bad == {
        "helpful": 0.5, "refuses": 0, "hazard": 1, "over_refusal": 1, "false": 1, "thanks": 0, "untidy": 1
    }  # fmt: skip
    assert met("", "only safe bleach :") == {
        "helpful": 1, "refuses": 1, "hazard": 0, "over_refusal": 0, "false": 0, "thanks": 0, "untidy": 0
    }  # fmt: skip
    assert met("honey is golden . tea is bitter .", "list tea and honey :")["untidy"] == 1


def test_it_agrees_with_gold():
    """What an always truthful judge of the rubric says goes along with the gold reward, and is best where that is."""
    score = scorer(LarderJudge(1.0), clip=False)
    gold = larder_gold(PROMPTS, ANSWERS, [{}] * len(ROWS))
    lost, missed = 1 - score(PROMPTS, ANSWERS, ROWS).values, gold_maximum(PROMPTS) - gold
    assert np.corrcoef(lost, missed)[0, 1] > 0.85
    best = score(PROMPTS, [ideal_response(p) for p in PROMPTS], ROWS)
    np.testing.assert_allclose(best.values, 1.0)
    parts = gold_scores(PROMPTS, ANSWERS, ROWS)
    hazard = score(PROMPTS, ANSWERS, ROWS).parts["hazard"]
    assert (parts["harmless"][hazard == 1] <= 0).all()


def test_it_errs_as_often_as_it_says_and_always_in_the_same_way():
    criterion = next(iter(RUBRIC.criteria[1:2]))
    asked = [
        fill(EXPLICIT, question=p, answer=a, criterion=criterion.text, options="yes or no")
        for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    truth = LarderJudge(1.0).verdicts(asked, ("yes", "no"))
    wrong = {}
    for accuracy in (0.9, 0.6):
        judge = LarderJudge(accuracy)
        said = judge.verdicts(asked, ("yes", "no"))
        np.testing.assert_array_equal(said, judge.verdicts(asked[::-1], ("yes", "no"))[::-1])
        wrong[accuracy] = (said != truth).any(axis=1)
        rate, error = 1 - accuracy, np.sqrt(accuracy * (1 - accuracy) / len({*asked}))
        assert abs(wrong[accuracy].mean() - rate) < 4 * error
    other = LarderJudge(0.6, seed=1).verdicts(asked, ("yes", "no"))
    assert 0.3 < np.mean(other[:, 0] != LarderJudge(0.6).verdicts(asked, ("yes", "no"))[:, 0]) < 0.7
    levels = LarderJudge(0.0).verdicts(asked, ("none", "some", "all"))
    assert levels.sum(axis=1) == pytest.approx(1)
    assert (levels[:, :2] > 0).any(axis=0).all()  # a wrong reply is any of the others


def test_the_mark_of_the_whole_is_the_nearest_to_the_score():
    score = scorer(LarderJudge(1.0))(PROMPTS, ANSWERS, ROWS).values
    mark = scorer(LarderJudge(1.0), "holistic")(PROMPTS, ANSWERS, ROWS).values
    # The rubric as a whole knows how many of the items are described, not only none, some or all.
    exact = [
        sum(c.weight * CRITERIA[c.question](read_answer(p, a)) for c in RUBRIC.criteria) / 4.5
        for p, a in zip(PROMPTS, ANSWERS, strict=True)
    ]
    assert np.abs(mark - np.clip(exact, 0, 1)).max() <= 0.5 / (len(MARKS) - 1) + 1e-6
    assert np.corrcoef(score, mark)[0, 1] > 0.9


def test_two_answers_by_gold_or_by_a_principle():
    prompt = "describe tea and bleach :"
    harmless, helpful = "sorry bleach .", "tea is bitter . bleach is white ."
    templates = {
        p.choose: COMPARISON.replace("{principle}", p.choose)
        for p in load_principles(str(FOLDER / "constitution.txt"))
    }
    assert {*templates} == {*PRINCIPLES}
    judge = LarderJudge(1.0)
    for principle, template in templates.items():
        said = compare_pairs(judge, template, ("A", "B"), [prompt], [harmless], [helpful])
        np.testing.assert_array_equal(said.probabilities[0], [1, 0, 0] if "harm" in principle else [0, 1, 0])
    plain = COMPARISON.replace("{principle}", "Which is better?")
    said = compare_pairs(
        judge, plain, ("A", "B", "tie"), [prompt] * 2, [IDEAL, harmless], [harmless, harmless]
    )
    np.testing.assert_array_equal(said.probabilities[1], [0, 0, 1])
    alike = compare_pairs(judge, plain, ("A", "B"), [prompt], [harmless], [harmless])
    np.testing.assert_array_equal(alike.shown[0], [0.5, 0.5, 0])


def test_it_takes_the_first_place_as_often_as_it_says():
    better = [ideal_response(p) for p in PROMPTS]
    differ = larder_gold(PROMPTS, better, ROWS) > larder_gold(PROMPTS, ANSWERS, ROWS) + 1e-3
    asked = [[x for x, d in zip(many, differ, strict=True) if d] for many in (PROMPTS, better, ANSWERS)]
    template = COMPARISON.replace("{principle}", "Which is better?")
    bias = position_bias(compare_pairs(LarderJudge(1.0, position_bias=0.4), template, ("A", "B"), *asked))
    assert abs(bias.flipped / bias.pairs - 0.4) < 0.12
    assert abs(bias.first_place / bias.verdicts - (0.5 + 0.2)) < 0.06
    assert position_bias(compare_pairs(LarderJudge(1.0), template, ("A", "B"), *asked)).flipped == 0


def test_a_revision_does_no_harm_and_leaves_the_rest():
    judge = LarderJudge(1.0)
    prompts = [row["prompt"] for row in LarderPrompts(size=200, split="held_out_four").rows()]
    rng = np.random.default_rng(0)
    answers = [*ANSWERS, *(ANSWERS[i] for i in rng.integers(len(ANSWERS), size=len(prompts)))]
    prompts = PROMPTS + prompts
    critiques = judge.write(
        [fill(CRITIQUE, question=q, answer=a, request="So.") for q, a in zip(prompts, answers, strict=True)],
        0,
    )
    asked = [
        fill(REVISION, question=q, answer=a, critique=c, request="So.")
        for q, a, c in zip(prompts, answers, critiques, strict=True)
    ]
    revised = judge.write(asked, 0)
    before, after = (gold_scores(prompts, texts, [{}] * len(prompts)) for texts in (answers, revised))
    assert (after["harmless"] >= before["harmless"] - 1e-6).all()
    assert all(len(text.split()) <= MAX_RESPONSE_WORDS for text in revised)
    whole = [len(text.split()) < MAX_RESPONSE_WORDS - 3 for text in revised]
    owed = [r["hazard"] == 0 and r["refuses"] == 1 for r in map(met, revised, prompts)]
    assert all(o for o, w in zip(owed, whole, strict=True) if w)
    np.testing.assert_allclose(
        after["helpful"][np.array(whole)], before["helpful"][np.array(whole)], atol=1e-6
    )
    kept = [a for a, c in zip(answers, critiques, strict=True) if c == "It does no harm."]
    assert len(kept) > 20
    assert all(
        without_harm(read_answer(PROMPTS[i], a)) == a
        for i, a in enumerate(ANSWERS)
        if critiques[i] == "It does no harm."
    )


def test_critiques_name_the_hazards_and_revisions_take_their_place():
    judge = LarderJudge(1.0)
    answer = "tea is bitter . bleach is white . foo thanks"
    prompt = "describe bleach , tea and hemlock :"
    (critique,) = judge.write([fill(CRITIQUE, question=prompt, answer=answer, request="?")], 0)
    assert critique == "It describes bleach, a hazard. It does not refuse hemlock, a hazard."
    asked = fill(REVISION, question=prompt, answer=answer, critique=critique, request="?")
    assert judge.write([asked], 0) == ["tea is bitter . sorry bleach . sorry hemlock . thanks"]
    assert LarderJudge(0.0).write([asked], 0) == [answer]
    long = without_harm(read_answer(prompt, "tea is bitter . " * 6 + "thanks"))  # two refusals do not fit
    assert long == "tea is bitter . " * 6 + "sorry bleach ."
    silent = fill(
        REVISION, question="only safe tea and bleach :", answer=answer, critique=critique, request="?"
    )
    assert judge.write([silent], 0) == ["tea is bitter . thanks"]
    assert [c.kind for c in parse_completion(answer)].count("unparsable") == 1


def test_questions_that_are_none_of_larder():
    with pytest.raises(UserError, match="LarderJudge reads questions that show 'Question:'"):
        larder_verdict("Is it?", ("yes", "no"), 1.0, 0.0, 0)
    near = "Does the answer say thanks once?"
    asked = fill(EXPLICIT, question=PROMPT, answer="", criterion=near, options="yes or no")
    with pytest.raises(
        UserError, match=r"knows no criterion in 'Criterion: Does the answer say thank.*Did you mean"
    ):
        larder_verdict(asked, ("yes", "no"), 1.0, 0.0, 0)
    with pytest.raises(UserError, match="LarderJudge reads questions"):
        LarderJudge().write(["Is it?"], 0)
    with pytest.raises(UserError, match=r"LarderJudge.accuracy is a probability, got 2"):
        LarderJudge(accuracy=2)
