"""Duplicates, contamination, similarity, generated tasks and the order of a curriculum."""

import numpy as np
import pytest

from jrlhf.config import UserError
from jrlhf.data.batching import EasyFirst
from jrlhf.data.curation import (
    Curriculum,
    Duplicate,
    competence,
    contaminated,
    exact_duplicates,
    few_shot,
    is_unfinished,
    longest_common_subsequence,
    near_duplicates,
    ngrams,
    parse_tasks,
    rouge_l,
    row_texts,
    task_fault,
    tokens,
    words,
)

# --- duplicates ---------------------------------------------------------------------------------------------


def test_exact_duplicates_differ_in_nothing_that_the_eye_heeds():
    texts = ["Sort  3 + 4", "sort 3 - 4", "\uff33ort 3 + 4\n", "sort 3 + 4 .", "Sort 3 - 4"]
    assert exact_duplicates(texts) == [Duplicate(2, 0, 1.0), Duplicate(4, 1, 1.0)]


def jaccard(a: str, b: str, n: int) -> float:
    x, y = (set(ngrams(tokens(text), n)) for text in (a, b))
    return len(x & y) / len(x | y) if x and y else 0.0


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 1.0])
def test_no_near_duplicate_is_missed_and_none_is_invented(threshold):
    """Against every pair being compared, on texts of six words that are often alike; some are empty."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdef"), rng.integers(0, 9))) for _ in range(120)]
    for n in (1, 2, 5):
        kept, expected = [], []
        for i, text in enumerate(texts):
            nearest = max(((jaccard(text, texts[j], n), -j) for j in kept), default=(0.0, 0))
            if nearest[0] >= threshold:
                expected.append(Duplicate(i, -nearest[1], nearest[0]))
            else:
                kept.append(i)
        assert expected
        assert near_duplicates(texts, threshold, n) == expected


def test_planted_near_duplicates_are_found_among_many():
    rng = np.random.default_rng(1)
    vocabulary = [f"w{i}" for i in range(200)]
    texts = [" ".join(rng.choice(vocabulary, 40)) for _ in range(300)]
    planted = {}
    for of in range(0, 300, 10):  # one word of forty replaced: 31 to 35 of 36 + 5 five-grams are shared
        changed = texts[of].split()
        changed[int(rng.integers(40))] = "other"
        planted[len(texts)] = of
        texts.append(" ".join(changed))
    found = near_duplicates(texts, 0.7, 5)
    assert {d.row: d.of for d in found} == planted
    assert all(0.7 <= d.similarity < 1 for d in found)


def test_a_symbol_makes_a_short_text_another_one():
    assert near_duplicates(["what is 3 + 4 ?", "what is 3 - 4 ?"], 0.9, 5) == []


# --- contamination ------------------------------------------------------------------------------------------

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def test_thirteen_words_in_a_row_are_too_many_and_twelve_are_not():
    thirteen = " ".join(LONG.split()[1:])
    prompts = [f"Well, {thirteen.title()}!", " ".join(LONG.split()[:12]), "of something else"]
    found = contaminated(prompts, ["", "", f"so {LONG}"], {"eval": ["hello there", LONG]})
    assert [(c.row, c.split, c.prompt, c.how) for c in found] == [
        (0, "eval", 1, "ngram"),
        (2, "eval", 1, "ngram"),
    ]
    assert found[0].shared == thirteen


def test_an_evaluation_prompt_that_is_shorter_must_be_whole_and_a_very_short_one_must_be_the_prompt():
    nine = "a b c d e f g h i"
    asked = {"nine": [nine], "two": ["Name it!"]}
    prompts = [f"x {nine} y", "a b c d e f g h", "please name it", "name it"]
    found = contaminated(prompts, ["", "", "name it", ""], asked)
    assert [(c.row, c.split, c.how) for c in found] == [(0, "nine", "contains"), (3, "two", "same")]


def test_ngrams_do_not_reach_from_the_prompt_into_the_answer():
    first, second = LONG.split()[:7], LONG.split()[7:]
    assert contaminated([" ".join(first)], [" ".join(second)], {"eval": [LONG]}) == []
    assert contaminated([LONG], [""], {"eval": [LONG]})


def test_a_prompt_without_words_is_no_reason():
    assert contaminated(["?!"], [""], {"eval": ["..."]}) == []


def test_what_a_row_says_is_the_same_as_text_and_as_messages():
    asked, answered = [{"role": "user", "content": "Who?"}], [{"role": "assistant", "content": "I."}]
    assert row_texts({"prompt": "Who?", "completion": "I."}) == ["Who?", "I."]
    assert row_texts({"prompt": asked, "completion": answered}) == ["Who?", "I."]
    assert row_texts({"messages": asked + answered}) == ["Who?", "I."]
    assert row_texts({"prompt": asked, "responses": [answered, "You."], "ranks": [1, 2]}) == [
        "Who?",
        "I.",
        "You.",
    ]
    assert row_texts({"prompt": "Who?", "steps": ["I", "think"], "labels": [1, 0]}) == ["Who?", "I", "think"]
    assert row_texts({"text": "Who?"}) == ["Who?"]


# --- similarity and generated tasks -------------------------------------------------------------------------


def lcs_by_table(a, b):
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def test_the_longest_common_subsequence_is_that_of_the_table():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (rng.choice(list("abcd"), rng.integers(0, 12)).tolist() for _ in range(2))
        assert longest_common_subsequence(a, b) == lcs_by_table(a, b)


def test_rouge_l_is_that_of_the_package_rouge_score():
    """rouge_score 0.1.2, RougeScorer(["rougeL"], use_stemmer=False), fmeasure."""
    dog, cat = (
        "Write a short story about a dog that learns to fly.",
        "Write a short poem about a cat who learns to swim.",
    )
    for a, b, expected in [(dog, cat, 0.636364), (dog, "a a b a", 0.266667), ("a a b a", "b a a", 0.571429)]:
        assert rouge_l(words(a), words(b)) == pytest.approx(expected, abs=1e-6)
    assert rouge_l(words(dog), words(dog)) == 1.0
    assert rouge_l([], []) == rouge_l([], ["a"]) == 0.0


def test_a_reply_goes_on_with_the_list():
    assert few_shot(["Sort  it:", "Name\nit"]).endswith("1. Sort it\n2. Name it\n3.")
    reply = " Write a poem\nof four lines.\n4. Add 2 and 3.5\n5) Say why.\n7. Out of order\n8. x"
    assert parse_tasks(reply, 3) == ["Write a poem of four lines.", "Add 2 and 3.5", "Say why."]
    assert parse_tasks(" ", 3) == []


def test_a_task_that_ends_in_the_middle_is_unfinished():
    texts = [
        "Name a city.",
        "Why?",
        'He said "no."',
        "\u4ee5\u4e0b\u3002",
        "Sort it (now.)",
        "Name a ci",
        'Say "no',
        "",
    ]
    assert [is_unfinished(text) for text in texts] == [False] * 5 + [True] * 3


@pytest.mark.parametrize(
    ("task", "fault"),
    [
        ("Write a story about a dog", ""),
        ("Write a story", "too short"),
        (" ".join(["word"] * 151), "too long"),
        ("Describe the Picture of a dog", "keyword"),
        ("Then go to the next shop", "keyword"),
        ("Describe a photographic memory", ""),  # "graph" is only a part of a word
        ("- write a story about a dog", "punctuation first"),
        ("", "too short"),
    ],
)
def test_what_is_no_task_for_a_language_model(task, fault):
    assert task_fault(task) == fault


# --- curriculum ---------------------------------------------------------------------------------------------


def test_competence_is_that_of_platanios():
    """Equations 6 and 7: c0 = 0.1, T = 100; by hand at t = 50."""
    assert competence(50, 100, 0.1, "linear") == pytest.approx(0.55)
    assert competence(50, 100, 0.1) == pytest.approx(((1 - 0.01) * 0.5 + 0.01) ** 0.5)
    for pace in ("linear", "root", "stages"):
        shares = [competence(t, 100, 0.1, pace) for t in range(120)]
        assert shares[0] == pytest.approx(0.1)
        assert shares[100] == shares[-1] == 1.0
        assert shares == sorted(shares)
    assert sorted({competence(t, 100, 0.1, "stages", 4) for t in range(120)}) == pytest.approx(
        [0.1, 0.4, 0.7, 1.0]
    )


def test_a_curriculum_asks_the_easiest_first_and_then_all():
    """Each batch is a function of (seed, step), holds no prompt twice, and none beyond the share of its step."""
    curriculum = Curriculum(by="solve_rate", steps=20, start=0.1)
    rows = [{"solve_rate": rate} for rate in np.random.default_rng(0).permutation(200) / 200]
    difficulty = curriculum.difficulty(rows)
    rank = np.empty(200, int)
    rank[np.argsort(difficulty)] = np.arange(200)
    batches, again = (EasyFirst(difficulty, 8, seed=3, share=curriculum.share) for _ in range(2))
    drawn = [batches.indices(step) for step in range(60)]
    assert rows[int(np.argmin(rank))]["solve_rate"] == max(row["solve_rate"] for row in rows)
    for step in reversed(range(60)):  # in any order: a resumed run draws what an uninterrupted one does
        np.testing.assert_array_equal(again.indices(step), drawn[step])
        assert len(set(drawn[step].tolist())) == 8
        assert rank[drawn[step]].max() < np.ceil(curriculum.share(step) * 200)
    assert max(rank[drawn[0]]) < 20 < max(rank[drawn[5]])
    assert len(set(np.concatenate(drawn[20:]).tolist())) > 150
    other = EasyFirst(difficulty, 8, seed=4, share=curriculum.share)
    assert any((other.indices(step) != drawn[step]).any() for step in range(60))


def test_prompts_of_equal_difficulty_come_in_random_order():
    share = lambda step: 0.5  # noqa: E731
    by_seed = [
        set(np.concatenate([EasyFirst(np.zeros(40), 10, s, share).indices(t) for t in range(20)]))
        for s in (0, 1)
    ]
    assert len(by_seed[0]) == len(by_seed[1]) == 20
    assert by_seed[0] != by_seed[1]


def test_there_are_always_enough_prompts_for_a_batch():
    assert len(EasyFirst(np.arange(16.0), 8, 0, lambda step: 0.01).indices(0)) == 8
    with pytest.raises(UserError, match="do not fill one batch"):
        EasyFirst(np.arange(4.0), 8, 0, lambda step: 1.0)


def test_difficulty_is_a_number_of_the_row_or_the_length_of_a_list_or_text():
    rows = [{"n": 2, "items": ["a", "b"], "answer": "1 2 3"}, {"n": 0.5, "items": ["a"], "answer": "1"}]
    for by, easy, expected in [
        ("n", "low", [2, 0.5]),
        ("items", "low", [2, 1]),
        ("answer", "high", [-3, -1]),
    ]:
        np.testing.assert_array_equal(Curriculum(by=by, steps=1, easy=easy).difficulty(rows), expected)
    with pytest.raises(
        UserError, match=r"curriculum\.by: prompt 1 has no field 'item'\. Did you mean 'items'\?"
    ):
        Curriculum(by="item", steps=1).difficulty(rows)
    with pytest.raises(UserError, match="prompt 2 has 'n' True"):
        Curriculum(by="n", steps=1).difficulty([rows[0], {"n": True}])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"by": ""}, "curriculum.by"), ({"steps": 0}, "curriculum.steps"), ({"start": 0.0}, "curriculum.start")],
)
def test_a_wrong_curriculum_is_told(wrong, message):
    with pytest.raises(UserError, match=message):
        Curriculum(**({"by": "n", "steps": 2} | wrong))
