import itertools
import json

import numpy as np
import pytest

from jrlhf.config import UserError
from jrlhf.data.schema import check_row
from jrlhf.lab import (
    CRITERIA,
    MAXIMA,
    REWARDS,
    SorterDemonstrations,
    SorterPrompts,
    SorterSteps,
    SorterText,
    SorterVocabulary,
    sorter_answer,
    sorter_gold,
    sorter_scores,
    sorter_steps,
    step_labels,
)
from jrlhf.lab.sorter import (
    TASKS,
    demonstrate,
    format_prompt,
    ideal_response,
    is_reserved,
    parse_prompt,
    parse_response,
    vocabulary,
)

SPLITS = ("train", "eval", "held_out_length")
SORT, PARITY = "sort 3 1 2 :", "parity 3 1 2 :"
RIGHT = "3 ; 1 3 ; 1 2 3 = 1 2 3"
RIGHT_PARITY = "3 even ; 1 3 odd ; 1 2 3 even = even"


def prompts_of(split: str, size: int = 2_000, task: str = "both", seed: int = 0) -> list[str]:
    return [row["prompt"] for row in SorterPrompts(size, split, task, seed).rows()]


def score(prompt: str, completion: str, ended: bool = True) -> tuple[float, ...]:
    """(format, answer, steps, gold)"""
    return tuple(float(v[0]) for v in sorter_scores([prompt], [completion], [{"ended": ended}]).values())


def inversions(digits) -> int:
    return sum(a > b for a, b in itertools.combinations(digits, 2))


# By hand: (prompt, completion, format, answer, steps, gold)
HAND_SCORED = [
    (SORT, RIGHT, 1, 1, 1, 1),
    (SORT, "  3 ; 1  3 ;\n1 2 3 = 1 2 3 ", 1, 1, 1, 1),
    (SORT, "3 ; 1 3 ; 1 2 3 = 1 3 2", 1, 0, 1, 0),  # right steps, wrong answer
    (SORT, "3 ; 1 3 ; 1 2 3 = 1 2", 1, 0, 1, 0),
    (SORT, "3 ; 3 1 ; 1 2 3 = 1 2 3", 1, 1, 1 / 3, 0),  # a wrong step; the recovery earns nothing
    (SORT, "1 ; 1 3 ; 1 2 3 = 1 2 3", 1, 1, 0, 0),
    (SORT, "3 ; 1 3 = 1 2 3", 1, 1, 2 / 3, 0),  # a step is missing
    (SORT, "3 ; 1 3 ; 1 2 3 ; 1 2 3 = 1 2 3", 1, 1, 3 / 4, 0),  # one too many
    (SORT, "1 2 3 = 1 2 3", 1, 1, 0, 0),
    (SORT, "= 1 2 3", 0, 0, 0, 0),
    (SORT, "1 2 3", 0, 0, 0, 0),
    (SORT, "", 0, 0, 0, 0),
    (SORT, "3 ; 1 3 ; 1 2 3 =", 0, 0, 1, 0),
    (SORT, "3 ; 1 3 ; 1 2 3", 0, 0, 1, 0),
    (SORT, "3 ; ; 1 3 ; 1 2 3 = 1 2 3", 0, 0, 1 / 4, 0),
    (SORT, "; 3 ; 1 3 ; 1 2 3 = 1 2 3", 0, 0, 0, 0),
    (SORT, "3 ; 1 3 ; 1 2 3 = 1 2 3 = 1 2 3", 0, 0, 1, 0),
    (SORT, "3 ; 1 3 ; 1 2 3 = 1 2 3 ;", 0, 0, 1, 0),
    (SORT, "3 ; 1 3 odd ; 1 2 3 = 1 2 3", 0, 0, 1 / 3, 0),  # a word of the other task
    (SORT, "3 ; 1 3 ; 1 2 3 = 1 2 3 odd", 0, 0, 1, 0),
    (SORT, "3 ; 1 3 ; 1 2 3 = 123", 0, 0, 1, 0),
    (SORT, RIGHT + " <pad> ☃", 0, 0, 1, 0),
    (PARITY, RIGHT_PARITY, 1, 1, 1, 1),
    (PARITY, "3 even ; 1 3 odd ; 1 2 3 even = odd", 1, 0, 1, 0),
    (PARITY, "3 odd = even", 1, 1, 0, 0),  # a guess
    (PARITY, "3 even ; 1 3 even ; 1 2 3 even = even", 1, 1, 1 / 3, 0),
    (PARITY, "3 even ; 1 3 ; 1 2 3 even = even", 0, 0, 1 / 3, 0),
    (PARITY, "3 even ; odd ; 1 2 3 even = even", 0, 0, 1 / 3, 0),
    (PARITY, "3 even ; 1 3 odd ; 1 2 3 even = even even", 0, 0, 1, 0),
    (PARITY, "3 even ; 1 3 odd ; 1 2 3 even = 1 2 3", 0, 0, 1, 0),
]


@pytest.mark.parametrize(("prompt", "completion", "form", "answer", "steps", "gold"), HAND_SCORED)
def test_checkers_by_hand(prompt, completion, form, answer, steps, gold):
    assert score(prompt, completion) == pytest.approx((form, answer, steps, gold))


def test_an_answer_that_never_ends_is_not_right():
    assert score(SORT, RIGHT, ended=False) == (0, 0, 1, 0)
    assert score(PARITY, RIGHT_PARITY, ended=np.bool_(False)) == (0, 0, 1, 0)


def test_they_are_reward_functions():
    prompts, completions = [SORT, PARITY, SORT], [RIGHT, "3 odd = even", "3 ; 1 3 = 1 2 3"]
    expected = {"sorter_answer": [1, 1, 1], "sorter_steps": [1, 0, 2 / 3], "sorter_gold": [1, 0, 0]}
    for name, values in expected.items():
        rewards = REWARDS[name](prompts, completions, [{}] * 3)
        assert rewards.dtype == np.float32
        assert rewards == pytest.approx(values)
        assert MAXIMA[name](prompts).tolist() == [1, 1, 1]
        assert CRITERIA[name](prompts, completions, [{}] * 3)["gold"].tolist() == [1, 0, 0]
        assert REWARDS[name]([], [], []).shape == (0,)
        with pytest.raises(ValueError, match="shorter"):
            REWARDS[name](prompts, completions, [{}])


def test_a_beginning_is_right_while_every_step_is():
    so_far = REWARDS["sorter_so_far"]
    wrong_end = RIGHT_PARITY.replace("= even", "= odd")
    texts = {
        "3 ;": 1,
        "3 ; 1 3 ; ": 1,
        "3 ; 1 3": 1,
        "3 ; 3 1": 0,
        "3 ; 3 1 ; 1 2 3 = 1 2 3": 0,
        RIGHT: 1,
        "": 0,
    }
    assert so_far([SORT] * len(texts), list(texts), [{}] * len(texts)).tolist() == list(texts.values())
    assert so_far([PARITY] * 2, [RIGHT_PARITY, wrong_end], [{}] * 2).tolist() == [1, 0]


# Properties


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_the_ideal_response_passes_every_checker(split, task):
    prompts = prompts_of(split, 500, task)
    ideal = [ideal_response(prompt) for prompt in prompts]
    for values in sorter_scores(prompts, ideal, [{}] * 500).values():
        assert values.tolist() == [1] * 500
    longest = 53 if split != "held_out_length" else 76  # words, as the module says
    assert max(len(text.split()) for text in ideal) == longest - (task == "sort")


@pytest.mark.parametrize("split", SPLITS)
def test_the_truth_by_other_means(split):
    """Each step is `sorted` of the digits so far, each parity that of the inversions, by brute force."""
    for prompt in prompts_of(split, 500):
        task, digits = parse_prompt(prompt)
        response = parse_response(ideal_response(prompt))
        for i, step in enumerate(response.steps, 1):
            listed = step if task == "sort" else step[:-1]
            assert list(listed) == sorted(digits[:i])
            if task == "parity":
                assert step[-1] == ("odd" if inversions(digits[:i]) % 2 else "even")
        expected = tuple(sorted(digits)) if task == "sort" else (response.steps[-1][-1],)
        assert response.answer == expected
    rows = SorterPrompts(200, split).rows()
    assert all(ideal_response(row["prompt"]).partition(" = ")[2] == row["answer"] for row in rows)


def test_parity_is_that_of_the_permutation():
    """A transposition of distinct digits flips it; every order has the same sorted answer."""
    for order in itertools.permutations("2579"):
        swapped = (order[1], order[0], *order[2:])
        answers = {ideal_response(format_prompt("parity", d)).partition(" = ")[2] for d in (order, swapped)}
        assert answers == {"even", "odd"}
        assert ideal_response(format_prompt("sort", order)).endswith("= 2 5 7 9")


def corruptions(words: list[str], at: int) -> list[list[str]]:
    """The words with the one at `at` changed to another of its kind."""
    kind = ("even", "odd") if words[at] in ("even", "odd") else "0123456789"
    return [[*words[:at], other, *words[at + 1 :]] for other in kind if other != words[at]]


@pytest.mark.parametrize("task", TASKS)
def test_corrupting_a_word_lowers_its_criterion_alone(task):
    for prompt in prompts_of("train", 40, task):
        words = ideal_response(prompt).split()
        equals, n = words.index("="), len(parse_prompt(prompt).digits)
        for at, word in enumerate(words):
            if word in (";", "="):
                continue
            step = words[:at].count(";")
            for changed in corruptions(words, at):
                verdict = score(prompt, " ".join(changed))
                expected = (1, 0, 1, 0) if at > equals else (1, 1, step / n, 0)
                assert verdict == pytest.approx(expected), (prompt, changed)


@pytest.mark.parametrize("task", TASKS)
def test_a_broken_format_is_never_right(task):
    rng = np.random.default_rng(0)
    for prompt in prompts_of("eval", 60, task):
        words = ideal_response(prompt).split()
        at = int(rng.integers(len(words)))
        for broken in ([*words[:at], "☃", *words[at:]], [w for w in words if w != "="], [*words, "="]):
            verdict = score(prompt, " ".join(broken))
            assert verdict[:2] == (0, 0)
            assert verdict[3] == 0


def test_swapping_steps_or_permuting_a_step_is_seen():
    for prompt in prompts_of("train", 100, "sort"):
        steps = ideal_response(prompt).partition(" = ")[0].split(" ; ")
        answer = " ".join(sorted(parse_prompt(prompt).digits))
        swapped = [steps[1], steps[0], *steps[2:]]
        assert score(prompt, f"{' ; '.join(swapped)} = {answer}") == (1, 1, 0, 0)
        backwards = " ".join(reversed(steps[-1].split()))
        if backwards != steps[-1]:
            verdict = score(prompt, f"{' ; '.join([*steps[:-1], backwards])} = {answer}")
            assert verdict == pytest.approx((1, 1, 1 - 1 / len(steps), 0))


def test_any_string_scores():
    rng = np.random.default_rng(1)
    words = [*vocabulary(), "☃"]
    for prompt in (SORT, PARITY):
        for _ in range(500):
            text = " ".join(rng.choice(words, size=rng.integers(0, 12)))
            form, answer, steps, gold = score(prompt, text)
            assert 0 <= steps <= 1
            assert gold <= answer <= form
            assert len(step_labels(prompt, text)) == text.count(";") + 1


# Labels of steps


@pytest.mark.parametrize(
    ("completion", "labels"),
    [
        (RIGHT, [1, 1, 1]),
        ("3 ; 1 3 ; 1 2 3 = 1 3 2", [1, 1, 0]),
        ("3 ; 1 3 ; 1 2 3", [1, 1, 0]),  # no answer
        ("3 ; 3 1 ; 1 2 3 = 1 2 3", [1, 0, 0]),
        ("2 ; 1 3 ; 1 2 3 = 1 2 3", [0, 0, 0]),
        ("3 ; 1 3 = 1 2 3", [1, 0]),  # the answer came too early
        ("3 ; 1 3 ; 1 2 3 ; 1 2 3 = 1 2 3", [1, 1, 0, 0]),
        ("3 ; 1 3", [1, 1]),  # cut off
        ("3 ; ; 1 3", [1, 0, 0]),
        ("= 1 2 3", [0]),
        ("", [0]),
    ],
)
def test_labels_by_hand(completion, labels):
    assert step_labels(SORT, completion) == labels


def test_labels_agree_with_the_rewards():
    rows = list(SorterSteps(1_000, step_error=0.2, answer_error=0.3).rows())
    prompts = [row["prompt"] for row in rows]
    completions = [" ; ".join(row["steps"]) for row in rows]
    labels = [row["labels"] for row in rows]
    assert [step_labels(p, c) for p, c in zip(prompts, completions, strict=True)] == labels
    for row in rows:
        check_row(row, "steps", "SorterSteps")
    blank = [{}] * len(rows)
    assert sorter_gold(prompts, completions, blank).tolist() == [ls[-1] for ls in labels]
    # The share of right insertion steps is the labels' mean, but for the last step where the answer alone is wrong.
    steps, means = sorter_steps(prompts, completions, blank), np.array([np.mean(ls) for ls in labels])
    only_answer = (steps == 1) & (sorter_answer(prompts, completions, blank) == 0)
    assert only_answer.any()
    assert steps[~only_answer] == pytest.approx(means[~only_answer])
    assert all(sorted(ls, reverse=True) == ls for ls in labels)  # once wrong, wrong to the end
    assert {ls[-1] for ls in labels} == {0, 1}
    assert all(len(row["steps"]) == len(parse_prompt(row["prompt"]).digits) for row in rows)


# Demonstrator


@pytest.mark.parametrize("task", TASKS)
def test_a_demonstrators_rates(task):
    n, step_error, answer_error = 8_000, 0.1, 0.2
    rng = np.random.default_rng(0)
    prompts = [format_prompt(task, rng.choice(list("0123456789"), 5)) for _ in range(n)]
    shown = [demonstrate(prompt, step_error, answer_error, rng) for prompt in prompts]
    scores = sorter_scores(prompts, shown, [{}] * n)
    assert scores["format"].all()
    right_steps = np.round(scores["steps"] * 5)
    reached = 1.0
    for i in range(5):  # the first wrong step is the i-th with the geometric law
        assert np.mean(right_steps == i) == pytest.approx(reached * step_error, abs=0.01)
        reached *= 1 - step_error
    assert scores["gold"].mean() == pytest.approx(reached * (1 - answer_error), abs=0.015)


def test_what_a_mistake_is():
    rng = np.random.default_rng(0)
    sort = {demonstrate("sort 1 2 3 :", 1.0, 0.0, rng) for _ in range(500)}
    assert any(text.startswith("1 ;") is False for text in sort)
    firsts = {text.split(" ; ")[0] for text in sort}
    assert firsts == set("0123456789") - {"1"}  # misread: there is no wrong place for the first
    one_slip = [demonstrate("sort 1 2 3 :", 0.3, 0.0, rng) for _ in range(2_000)]
    seconds = {text.split(" ; ")[1] for text in one_slip if text.startswith("1 ;")}
    assert "2 1" in seconds  # misplaced
    assert {" ".join(sorted(["1", d])) for d in "013456789"} <= seconds  # misread
    carried = [text for text in one_slip if text.startswith("1 ; 2 1 ;")]
    assert any(text == "1 ; 2 1 ; 2 1 3 = 2 1 3" for text in carried)
    wrong_answers = {demonstrate(PARITY, 0.0, 1.0, rng) for _ in range(20)}
    assert wrong_answers == {RIGHT_PARITY.removesuffix("even") + "odd"}
    last = {demonstrate("sort 1 2 3 :", 0.0, 1.0, rng).partition(" = ")[2] for _ in range(500)}
    assert len(last) == 27  # one of three digits is one of nine others


def test_outcome_and_process_rewards_part_on_parity_alone():
    """The trap: with wrong steps a sorted answer is almost never right, a parity about half the time."""
    right_by_luck = {}
    for task in TASKS:
        rows = list(SorterDemonstrations(6_000, task, step_error=0.3, answer_error=0.0).rows())
        columns = [row["prompt"] for row in rows], [row["completion"] for row in rows], [{}] * len(rows)
        answer, steps = sorter_answer(*columns), sorter_steps(*columns)
        right_by_luck[task] = answer[steps < 1].mean()
        np.testing.assert_array_equal(sorter_gold(*columns), (answer == 1) & (steps == 1))
    assert right_by_luck["sort"] < 0.02
    assert 0.4 < right_by_luck["parity"] < 0.7


# Sources and splits


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: SorterText(200, seed=seed),
        lambda seed: SorterDemonstrations(200, seed=seed),
        lambda seed: SorterSteps(200, seed=seed),
        lambda seed: SorterPrompts(200, "train", seed=seed),
        lambda seed: SorterPrompts(200, "held_out_length", seed=seed),
    ],
)
def test_rows_depend_on_the_seed_alone(make):
    rows = list(make(0).rows())
    assert len(rows) == 200
    assert rows == list(make(0).rows()) == json.loads(json.dumps(rows))
    assert rows != list(make(1).rows())


def test_more_rows_begin_with_the_same_rows():
    assert list(SorterPrompts(50).rows()) == list(SorterPrompts(80).rows())[:50]


def test_splits_share_no_digits():
    def digits(prompts):
        return {parse_prompt(prompt).digits for prompt in prompts}

    train, evaluated, longer = (digits(prompts_of(split, 8_000)) for split in SPLITS)
    sources = (SorterText(8_000, seed=3), SorterDemonstrations(4_000, seed=4), SorterSteps(4_000, seed=5))
    for source in sources:
        train |= digits((row.get("prompt") or row["text"].partition(" :")[0] + " :") for row in source.rows())
    assert not train & evaluated
    assert {len(d) for d in train} == {len(d) for d in evaluated} == set(range(3, 9))
    assert {len(d) for d in longer} == {9, 10}
    assert all(is_reserved(d) for d in evaluated)
    every = list(itertools.product("0123456789", repeat=4))
    assert np.mean([is_reserved(d) for d in every]) == pytest.approx(1 / 8, abs=0.02)


@pytest.mark.parametrize("split", SPLITS)
def test_lengths_and_tasks_are_uniform(split):
    questions = [parse_prompt(prompt) for prompt in prompts_of(split, 6_000)]
    lengths = [len(q.digits) for q in questions]
    _, counts = np.unique(lengths, return_counts=True)
    assert counts / 6_000 == pytest.approx([1 / len(counts)] * len(counts), abs=0.02)
    assert np.mean([q.task == "sort" for q in questions]) == pytest.approx(0.5, abs=0.02)
    assert {q.task for q in map(parse_prompt, prompts_of(split, 50, "parity"))} == {"parity"}


def test_every_word_is_in_the_vocabulary():
    seen = {word for row in SorterText(500).rows() for word in row["text"].split()}
    assert seen == set(vocabulary()) == {row["text"] for row in SorterVocabulary().rows()}


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        ":",
        "sort :",
        "sort 3 1 2",
        "sort 3 1 2 4",
        "sort 3 1 :",
        "sort 1 2 3 4 5 6 7 8 9 0 1 :",
        "sort 3 12 1 :",
        "order 3 1 2 :",
        "sort 3 x 2 :",
        "sort 3 1 2 : :",
        "please sort 3 1 2 :",
        "3 1 2 :",
    ],
)
def test_a_prompt_of_another_world_is_refused(prompt):
    with pytest.raises(UserError, match="not a Sorter prompt"):
        sorter_gold([prompt], [RIGHT], [{}])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SorterPrompts(5, "evals"), "Did you mean 'eval'"),
        (lambda: SorterPrompts(5, task="sorts"), r"SorterPrompts\.task: .* Did you mean 'sort'"),
        (lambda: SorterPrompts(-1), r"SorterPrompts\.size"),
        (lambda: SorterText(-1), r"SorterText\.documents"),
        (lambda: SorterText(task="count"), r"SorterText\.task"),
        (lambda: SorterText(step_error=1.5), r"SorterText\.step_error is a probability"),
        (lambda: SorterDemonstrations(-1), r"SorterDemonstrations\.size"),
        (lambda: SorterDemonstrations(answer_error=-0.1), r"SorterDemonstrations\.answer_error"),
        (lambda: SorterSteps(-1), r"SorterSteps\.size"),
        (lambda: SorterSteps(step_error=2), r"SorterSteps\.step_error"),
    ],
)
def test_mistakes_name_the_field(make, message):
    with pytest.raises(UserError, match=message):
        make()
