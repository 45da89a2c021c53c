"""Judges as stages note them: what they are asked, and rows that they cannot judge."""

import numpy as np
import pytest
from chat_server import completion, serving

from jrlhf.config import UserError, to_dict
from jrlhf.rewards.endpoint import Endpoint
from jrlhf.rewards.judges import StoredVerdicts
from jrlhf.rewards.rubrics import EXPLICIT, parse_rubric
from jrlhf.training.judging import Asked, JudgeReward
from jrlhf.training.lab_judges import LarderJudge
from jrlhf.training.rubrics import rubric_scorer

TWO = "{question} {answer_a} {answer_b}"


def comparing(tmp_path):
    path = tmp_path / "none.jsonl"
    path.write_text("")
    return JudgeReward("judge", StoredVerdicts(str(path)), TWO, ("A", "B"), "probability", fallback=0.5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 5}, "prompt 2 has 5 as its 'answer'"),
        ({"answer": None}, "prompt 2 has None as its 'answer'"),
        ({}, "prompt 2 has no field 'answer'"),
    ],
)
def test_a_reference_that_is_no_text_is_named(tmp_path, row, message):
    judge = comparing(tmp_path)
    with pytest.raises(UserError, match=f"reward 'judge': {message}"):
        judge(["p", "p"], ["a", "a"], [{"answer": "text"}, row])
    with pytest.raises(UserError, match=f"reward 'judge': {message}"):
        judge.check_rows([{"answer": "text"}, row])  # as before anything runs


def test_no_answers_have_no_values(tmp_path):
    assert comparing(tmp_path)([], [], []).values.shape == (0,)


def noted(by):
    rubric = parse_rubric([{"name": "right", "question": "Is it right?"}], "here")
    note = {"asked": to_dict(Asked(by)), "rubric": rubric.as_json(), "rubrics": {}, "how": "explicit"}
    return note | {"template": EXPLICIT, "marks": ["1", "2"], "clip": True, "fallback": None}


def test_an_endpoint_is_asked_for_a_marked_verdict_and_a_program_in_plain_words(tmp_path):
    with serving() as serve:
        server = serve(lambda q, n: completion("No errors here, and none is made. [[yes]]"))
        scorer = rubric_scorer("rubric", noted(Endpoint(server.url, "m")), tmp_path, None)
        np.testing.assert_array_equal(scorer(["p"], ["a"], [{}]).values, [1.0])
    (question,) = server.asked
    assert question.endswith("Reply with [[yes]] or [[no]].")
    assert not rubric_scorer("rubric", noted(LarderJudge(1.0)), tmp_path, None).marked


def test_a_rubric_of_a_row_takes_no_name_of_the_driver(tmp_path):
    scorer = rubric_scorer("rubric", noted(LarderJudge(1.0)), tmp_path, None)
    own = [{"name": "score", "question": "Is it?"}]
    with pytest.raises(UserError, match="prompt 2: rubric: 'score' cannot name a criterion"):
        scorer.check_rows([{}, {"rubric": own}])
