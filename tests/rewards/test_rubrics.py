"""Rubrics and principles: files, the score, what is asked, what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from jrlhf.config import UserError
from jrlhf.data.sources import FileSource, load
from jrlhf.ops.agreement import krippendorff_alpha
from jrlhf.rewards.constitution import CHOOSE_BY, COMPARISON, load_principles
from jrlhf.rewards.judges import check_template
from jrlhf.rewards.rubrics import (
    EXPLICIT,
    HOLISTIC,
    MARKS,
    Level,
    RubricScorer,
    check_rubric_template,
    load_rubric,
    parse_rubric,
    prometheus_rubric,
    stored_ratings,
)

DATA = Path(os.environ.get("JRLHF_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")
GUIDES = Path(__file__).parents[2] / "docs"
STORED = DATA / "rubrics" / "mt_bench_eval.json"
real_data = pytest.mark.skipif(not STORED.exists(), reason="no shared data")

TOML = """
[[criteria]]
name = "right"
question = "Is it right?"
weight = 5
must = true

[[criteria]]
name = "clear"
question = "How clear is it?"
weight = 3
levels = [
    { name = "muddled", points = 0, description = "One has to guess." },
    { name = "plain", points = 3 },
    { name = "lucid", points = 4 },
]

[[criteria]]
name = "rude"
question = "Is it rude?"
weight = -4
"""


@pytest.fixture
def rubric(tmp_path):
    path = tmp_path / "rubric.toml"
    path.write_text(TOML)
    return load_rubric(str(path))


class Scripted:
    """A judge whose replies are given: question -> option, or probabilities; it notes what it was asked."""

    def __init__(self, reply):
        self.reply, self.asked = reply, []

    def verdicts(self, questions, options):
        self.asked.append((list(questions), tuple(options)))
        rows = []
        for question in questions:
            said = self.reply(question, options)
            rows.append(
                np.full(len(options), np.nan) if said is None
                else np.asarray(said, float) if not isinstance(said, str)
                else np.eye(len(options))[options.index(said)]
            )  # fmt: skip
        return np.stack(rows)


def scorer(rubric, reply, **more):
    settings = {"rubrics": {}, "how": "explicit", "template": EXPLICIT} | more
    return RubricScorer("mine", Scripted(reply), rubric, **settings)


# --- the score ----------------------------------------------------------------------------------------------


def test_a_score_is_the_share_of_the_points_that_could_be_earned(rubric):
    # By hand: (5*1 + 3*0.5) / 8; with the fault (6.5 - 4) / 8; nothing but the fault -4/8.
    met = np.array([[1, 0.5, 0], [1, 0.5, 1], [1, 1, 0]])
    np.testing.assert_allclose(rubric.score(met), [6.5 / 8, 2.5 / 8, 1.0])
    optional = rubric._replace(criteria=tuple(c._replace(must=False) for c in rubric.criteria))
    np.testing.assert_allclose(optional.score(np.array([[0, 0, 1.0]])), [0.0])
    np.testing.assert_allclose(optional.score(np.array([[0, 0, 1.0]]), clip=False), [-0.5])


def test_what_must_be_met_is_a_gate(rubric):
    met = np.array([[0.6, 1, 0], [0.4, 1, 0], [0.4, 1, 1]])
    np.testing.assert_allclose(rubric.score(met, clip=False), [6 / 8, 0.0, min((2 + 3 - 4) / 8, 0)])
    fault = rubric._replace(criteria=(*rubric.criteria[:2], rubric.criteria[2]._replace(must=True)))
    np.testing.assert_allclose(fault.score(np.array([[1, 1, 0.4], [1, 1, 0.6]])), [6.4 / 8, 0.0])


def test_levels_are_expected_points_between_worst_and_best(rubric):
    clear = rubric.criteria[1]
    np.testing.assert_allclose(clear.met(np.array([[1, 0, 0], [0, 1, 0], [0.5, 0, 0.5]])), [0, 0.75, 0.5])
    assert np.isnan(clear.met(np.full((1, 3), np.nan))).all()
    five = clear._replace(levels=(Level("2", 2.0), Level("5", 5.0), Level("6", 6.0)))
    np.testing.assert_allclose(five.met(np.eye(3)), [0, 0.75, 1])


# --- files --------------------------------------------------------------------------------------------------


def test_toml_and_json_say_the_same(rubric, tmp_path):
    path = tmp_path / "rubric.json"
    path.write_text(json.dumps(rubric.as_json()))
    assert load_rubric(str(path)) == rubric
    assert parse_rubric(rubric.as_json()["criteria"], "a row") == rubric
    numbers = [{"name": "x", "question": "?", "levels": [{"name": "1"}, {"name": "5"}]}]
    assert [level.points for level in parse_rubric(numbers, "a row").criteria[0].levels] == [1.0, 5.0]


GOOD = {"name": "a", "question": "Is it?"}
PAIR = [{"name": "low", "points": 0}, {"name": "high", "points": 1}]


@pytest.mark.parametrize(
    ("criteria", "message"),
    [
        ([], "at least one criterion"),
        ([{**GOOD, "wieght": 1}], r"rubric.json: criterion 1: no such key 'wieght'. Did you mean 'weight'"),
        ([GOOD, GOOD], "two criteria are called 'a'"),
        ([{**GOOD, "weight": 0}], "criterion 'a': its weight is 0"),
        ([{**GOOD, "weight": True}], "'weight' is True, expected a finite number"),
        ([{**GOOD, "weight": -1}], "every weight is negative"),
        ([{"name": "a"}], "'question' must be text"),
        ([{**GOOD, "name": "a/b"}], "holds a '/'"),
        ([{**GOOD, "must": 1}], "'must' is 1, expected true or false"),
        ([{**GOOD, "levels": PAIR[:1]}], "at least 2 levels"),
        ([{**GOOD, "levels": PAIR[::-1]}], "'low' has 0 points after 'high' with 1"),
        ([{**GOOD, "levels": [{"name": "low"}, PAIR[1]]}], "level 1: 'low' needs its 'points'"),
        ([{**GOOD, "levels": [PAIR[0], {"name": "low", "points": 2}]}], "two levels are called 'low'"),
        (["a"], "criterion 1: expected name, question"),
    ],
)
def test_a_faulty_rubric_names_file_and_criterion(criteria, message, tmp_path):
    path = tmp_path / "rubric.json"
    path.write_text(json.dumps({"criteria": criteria}))
    with pytest.raises(UserError, match=message) as error:
        load_rubric(str(path))
    assert str(error.value).startswith(str(path))


def test_the_files_in_the_guides_can_be_read(tmp_path):
    for guide, language, name in (
        ("rubrics.md", "toml", "rubric.toml"),
        ("constitution.md", "", "principles.txt"),
    ):
        text = (GUIDES / guide).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.split(f"```{language}\n")[1].split("```")[0], encoding="utf-8")
    rubric = load_rubric(str(tmp_path / "rubric.toml"))
    assert rubric.names == ("right", "clear", "rude")
    assert [level.points for level in rubric.criteria[1].levels] == [1, 2, 3]
    principles = load_principles(str(tmp_path / "principles.txt"))
    assert [bool(p.critique) and bool(p.choose) for p in principles] == [True] * 4


def test_a_mark_before_the_first_line_is_no_text(rubric, tmp_path):
    for name, text in (("bom.toml", TOML), ("bom.json", json.dumps(rubric.as_json()))):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_rubric(str(tmp_path / name)) == rubric
    path = tmp_path / "principles.txt"
    path.write_text("# Ours.\n\nBe kind.\n", encoding="utf-8-sig")
    (kind,) = load_principles(str(path))
    assert kind.choose == CHOOSE_BY.format(principle="Be kind.")


def test_files_that_are_none(tmp_path):
    (tmp_path / "rubric.toml").write_text("[[criteria]\n")
    with pytest.raises(UserError, match=r"rubric.toml: not valid TOML .*line 1"):
        load_rubric(str(tmp_path / "rubric.toml"))
    with pytest.raises(UserError, match=r"rubrik.toml: no such file. Did you mean 'rubric.toml'"):
        load_rubric(str(tmp_path / "rubrik.toml"))
    (tmp_path / "rubric.json").write_text("{\n'")
    with pytest.raises(UserError, match=r"rubric.json: not valid JSON .*line 2"):
        load_rubric(str(tmp_path / "rubric.json"))
    with pytest.raises(UserError, match=r"a .toml or a .json file"):
        load_rubric("rubric.yaml")


# --- asking -------------------------------------------------------------------------------------------------


def reply(question, options):
    if "How clear" in question:
        return "plain"
    return "yes" if "Is it right?" in question and "good" in question else "no"


def test_each_criterion_is_asked_and_is_a_part(rubric):
    ask = scorer(rubric, reply)
    scores = ask(["p", "q"], ["good {answer}", "bad"], [{}, {}])
    np.testing.assert_allclose(scores.values, [(5 + 3 * 0.75) / 8, 0.0])
    np.testing.assert_allclose(scores.parts["right"], [1, 0])
    np.testing.assert_allclose(scores.parts["clear"], [0.75, 0.75])
    np.testing.assert_allclose(scores.parts["rude"], [0, 0])
    assert list(scores.parts) == ["right", "clear", "rude"]
    assert scores.failed is None
    # One call for all questions with the same options.
    assert [(len(q), options) for q, options in ask.judge.asked] == [
        (4, ("yes", "no")),
        (2, ("muddled", "plain", "lucid")),
    ]
    first = ask.judge.asked[0][0][0]
    assert first.startswith("Question:\np\n\nAnswer:\ngood {answer}\n\nCriterion: Is it right?")
    assert "muddled: One has to guess.\nplain\n" in ask.judge.asked[1][0][0]


def test_a_missing_verdict_is_an_error_or_the_fallback(rubric):
    silent = lambda q, o: None if "rude" in q and "odd" in q else reply(q, o)  # noqa: E731
    with pytest.raises(UserError, match="no verdict on 1 of 6 questions; give the stage a `fallback`"):
        scorer(rubric, silent)(["p", "p"], ["good", "odd good"], [{}, {}])
    scores = scorer(rubric, silent, fallback=1.0)(["p", "p"], ["good", "odd good"], [{}, {}])
    np.testing.assert_array_equal(scores.failed, [False, True])
    np.testing.assert_allclose(scores.values, [7.25 / 8, 3.25 / 8])
    np.testing.assert_allclose(scores.parts["rude"], [0, 1])


def test_a_prompt_may_have_a_rubric_of_its_own(rubric):
    own = [{"name": "right", "question": "Is it right?", "weight": 2}, {"name": "more", "question": "More?"}]
    rows = [{}, {"rubric": own}, {"rubric": "other"}]
    ask = scorer(rubric, reply, rubrics={"other": parse_rubric(own[:1], "other")})
    scores = ask(["p"] * 3, ["good"] * 3, rows)
    np.testing.assert_allclose(scores.values, [7.25 / 8, 2 / 3, 1])
    assert list(scores.parts) == ["right"]  # what they have in common
    with pytest.raises(
        UserError, match=r"prompt 1: rubric 'othr' is none of `rubrics`. Did you mean 'other'"
    ):
        ask(["p"], ["good"], [{"rubric": "othr"}])
    with pytest.raises(UserError, match="prompt 1: rubric: criterion 1: no such key 'points'"):
        ask(["p"], ["good"], [{"rubric": [{"name": "a", "points": 1}]}])
    with pytest.raises(UserError, match="its row has none"):
        scorer(None, reply)(["p"], ["good"], [{}])
    taken = scorer(rubric, reply, taken=("score", "more"))
    with pytest.raises(UserError, match="prompt 2: rubric: 'more' cannot name a criterion"):
        taken.check_rows(rows)


@pytest.mark.parametrize("how", ["explicit", "holistic"])
def test_options_are_marked_for_a_judge_whose_text_is_parsed(rubric, how):
    template = EXPLICIT if how == "explicit" else HOLISTIC
    option = lambda q, o: o[0]  # noqa: E731
    plain, marked = (scorer(rubric, option, how=how, template=template, marked=m) for m in (False, True))
    for ask in (plain, marked):
        ask(["p"], ["good"], [{}])
    said = [
        [q.rpartition("Reply with ")[2] for qs, _ in ask.judge.asked for q in qs] for ask in (plain, marked)
    ]
    if how == "explicit":
        assert said == [
            ["yes or no."] * 2 + ["muddled, plain or lucid."],
            ["[[yes]] or [[no]]."] * 2 + ["[[muddled]], [[plain]] or [[lucid]]."],
        ]
    else:
        assert said == [["1, 2, 3, 4 or 5."], ["[[1]], [[2]], [[3]], [[4]] or [[5]]."]]


@pytest.mark.parametrize("how", ["explicit", "holistic"])
def test_no_answers_have_no_scores(rubric, how):
    scores = scorer(rubric, reply, how=how, template=EXPLICIT if how == "explicit" else HOLISTIC)([], [], [])
    assert scores.values.shape == (0,)
    assert not scores.parts


def test_one_mark_of_the_whole_rubric(rubric):
    marks = {"p": "1", "q": "4", "r": [0, 0, 0.5, 0, 0.5]}
    ask = scorer(rubric, lambda q, o: marks[q.split("\n")[1]], how="holistic", template=HOLISTIC)
    scores = ask(["p", "q", "r"], ["x"] * 3, [{}] * 3)
    np.testing.assert_allclose(scores.values, [0, 0.75, 0.75])
    ((questions, options),) = ask.judge.asked
    assert options == MARKS
    assert (
        "- [+5] Is it right? (required)\n- [+3] How clear is it? (muddled, plain, lucid)\n- [-4] Is it rude?"
        in (questions[0])
    )


def test_templates_are_checked():
    for how, template in (("explicit", EXPLICIT), ("holistic", HOLISTIC)):
        check_rubric_template(template, how)
    with pytest.raises(UserError, match=r"\{rubric\} with how 'explicit'"):
        check_rubric_template(HOLISTIC, "explicit")
    with pytest.raises(UserError, match=r"\{answer\} is missing"):
        check_rubric_template("{question} {criterion}", "explicit")


# --- stored judgements --------------------------------------------------------------------------------------


def test_a_rubric_in_the_words_of_prometheus():
    rubric = prometheus_rubric("[Is it polite?]\nScore 1: Not at all.\nScore 2: Yes: very.\n\n", "here")
    (criterion,) = rubric.criteria
    assert criterion.question == "Is it polite?"
    assert criterion.options == ("1", "2")
    assert criterion.text.endswith("1: Not at all.\n2: Yes: very.")
    with pytest.raises(UserError, match="here: not a rubric"):
        prometheus_rubric("Is it\npolite?", "here")


@real_data
def test_a_judge_of_stored_scores_is_scored_as_stored():
    """Prompts with their own rubric in the public format, and a judge that gives the stored score."""
    rows, _ = load(FileSource(str(STORED), format="prometheus", kind="prompt"))
    assert len(rows) == 320
    ratings = stored_ratings(str(STORED))
    assert ratings.shape == (3, 320)
    stored = iter(ratings[0].astype(int).astype(str))
    scores = scorer(None, lambda q, o: next(stored))(["p"] * 320, ["a"] * 320, rows)
    np.testing.assert_allclose(scores.values, (ratings[0] - 1) / 4, atol=1e-6)
    np.testing.assert_allclose(scores.parts["rubric"], scores.values)


@real_data
def test_three_judgements_of_one_judge_agree():
    alpha = krippendorff_alpha(stored_ratings(str(STORED)), "interval")
    same = krippendorff_alpha(stored_ratings(str(STORED))[[0, 0]], "interval")
    assert same == pytest.approx(1.0)
    assert 0.8 < alpha < 1.0


def test_stored_scores_that_are_none(tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps([{"gpt4_score": [1, 2]}, {"gpt4_score": [3]}]))
    np.testing.assert_array_equal(stored_ratings(str(path)), [[1, 3], [2, np.nan]])
    path.write_text(json.dumps([{"gpt4_score": [1]}, {"score": 1}]))
    with pytest.raises(UserError, match="item 2: no list 'gpt4_score'"):
        stored_ratings(str(path))


# --- principles ---------------------------------------------------------------------------------------------

PRINCIPLES = """# Ours.
Be kind, and
be brief.

critique: What is
  unkind?
revise: Make it kind.

choose: Which is kinder?
- Do no harm.
- Help.
"""


def test_principles_are_paragraphs_of_a_text(tmp_path):
    path = tmp_path / "principles.txt"
    path.write_text(PRINCIPLES)
    kind, asked, chosen, harm, helps = load_principles(str(path))
    assert kind.choose == CHOOSE_BY.format(principle="Be kind, and be brief.")
    assert "Be kind, and be brief." in kind.critique
    assert "Be kind, and be brief." in kind.revise
    assert asked == ("What is unkind?", "Make it kind.", "")
    assert chosen == ("", "", "Which is kinder?")
    assert "Do no harm." in harm.choose
    assert "Help." in helps.choose
    assert "Help." not in harm.choose
    assert check_template(COMPARISON.replace("{principle}", kind.choose))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing\n\n", "there is no principle"),
        ("Be kind.\n\ncritique: What?\n", r"principles.txt line 3: 'critique' without 'revise'"),
        ("revise: So.\n", "'revise' without 'critique'"),
        ("critique: What?\nrevize: So.\n", "no such request 'revize'. Did you mean 'revise'"),
        ("critique: What?\ncritique: What?\n", "stands there twice"),
        ("critique:\nrevise: So.\n", "'critique' is empty"),
        ("Be kind.\nchoose: Which?\n", "begins with neither of critique:"),
        ("Be kind to {name}.\n", r"\{name\} would be read as a place"),
    ],
)
def test_faulty_principles_name_the_line(text, message, tmp_path):
    path = tmp_path / "principles.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_principles(str(path))
    with pytest.raises(UserError, match=r"no such file of principles. Did you mean 'principles.txt'"):
        load_principles(str(tmp_path / "principle.txt"))
