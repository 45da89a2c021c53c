"""Worker processes: nothing that an answer does to a check stalls the others, or costs more than its own score."""

import ctypes
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass

import numpy as np
import pytest

from jrlhf.config import UserError
from jrlhf.rewards.pool import CHUNK, CheckPool, Verified
from jrlhf.rewards.verifiers import Check, Mathematics, Number, Regex, Within


@dataclass(frozen=True)
class Hostile(Check):
    """Does what the answer says."""

    def needs(self):
        return ()

    def score(self, prompt, completion, row):
        what, _, number = completion.partition(" ")
        if what == "sleep":
            time.sleep(60)
        elif what == "backtrack":
            import re

            re.fullmatch("(a+)+b", "a" * 60)  # C code: no signal handler and no thread of Python's ends it
        elif what == "exit":
            os._exit(0)
        elif what == "sys.exit":
            sys.exit(0)
        elif what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif what == "crash":
            ctypes.string_at(0)
        elif what == "raise":
            raise RuntimeError("no idea")
        elif what == "nan":
            return float("nan")
        elif what == "memory":
            return len(b"a" * 10**10)
        elif what == "recursion":
            return self.score(prompt, completion, row)
        elif what == "print":
            print('["score", 100]\n' * 10, flush=True)
            os.write(1, b'["score", 100]\n')
        elif what == "mistake":
            raise UserError("the row is wrong")
        return float(number or 0)


def run(pool: CheckPool, answers: list[str], rows: list[dict] | None = None):
    return pool(["p"] * len(answers), answers, rows or [{}] * len(answers))


@pytest.fixture(scope="module")
def hostile():
    pool = CheckPool(Hostile(), workers=2, seconds=1.0)
    yield pool
    pool.close()


@pytest.mark.parametrize("bad", ["exit", "kill", "crash", "raise", "nan", "memory", "recursion", "sys.exit"])
def test_an_answer_that_breaks_its_worker_failed_alone(hostile, bad):
    answers = [f"fine {i}" for i in range(10)]
    answers[3] = bad
    found = run(hostile, answers)
    failed = np.arange(10) == 3
    np.testing.assert_array_equal(found.failed, failed)
    np.testing.assert_array_equal(found.timed_out, np.zeros(10, bool))
    np.testing.assert_array_equal(found.values, np.where(failed, np.nan, np.arange(10)).astype(np.float32))
    assert len(found.faults) == 1


@pytest.mark.parametrize("slow", ["sleep", "backtrack"])
def test_an_answer_that_never_ends_is_given_up_alone(hostile, slow):
    answers = [f"fine {i}" for i in range(10)]
    answers[3] = slow  # others come after it in its chunk
    began = time.monotonic()
    found = run(hostile, answers)
    assert 1.0 <= time.monotonic() - began < 30
    late = np.arange(10) == 3
    np.testing.assert_array_equal(found.timed_out, late)
    np.testing.assert_array_equal(found.failed, np.zeros(10, bool))
    np.testing.assert_array_equal(found.values, np.where(late, np.nan, np.arange(10)).astype(np.float32))


def test_a_worker_outlives_a_signal_to_stop(hostile):
    """A cluster may send it to every process of a job; the run saves, and its scores are those of any other."""
    found = run(hostile, ["fine 1", "term 2", "fine 3"])
    np.testing.assert_array_equal(found.values, [1, 2, 3])
    assert not found.failed.any()


def test_what_a_check_prints_is_no_score(hostile):
    np.testing.assert_array_equal(run(hostile, ["print 2", "fine 3"]).values, [2, 3])


def test_every_answer_may_be_bad(hostile):
    found = run(hostile, ["exit"] * 4)
    assert found.failed.all()
    assert np.isnan(found.values).all()


def test_a_users_mistake_is_raised_and_the_pool_goes_on(hostile):
    with pytest.raises(UserError, match="the row is wrong"):
        run(hostile, ["fine 1", "mistake", "fine 2"])
    time.sleep(1.5)  # what a worker was at then is not late now
    found = run(hostile, [f"fine {i}" for i in range(20)])  # nor is any score of then among these
    np.testing.assert_array_equal(found.values, np.arange(20))
    assert not found.timed_out.any()


def test_a_worker_that_was_killed_while_idle_costs_no_answer(hostile):
    run(hostile, ["fine 1"] * 4)
    idle = [worker.process for worker in hostile._workers if worker.ready]
    assert idle
    for process in idle:
        process.kill()
        process.wait()
    found = run(hostile, ["fine 1"] * 4)
    assert not found.failed.any()


def test_nothing_to_score(hostile):
    found = run(hostile, [])
    assert found.values.shape == found.failed.shape == found.timed_out.shape == (0,)


def test_workers_start_with_the_first_answers_and_end_with_the_pool():
    pool = CheckPool(Number(), workers=2)
    assert pool._workers == []
    run(pool, ["1", "2", "3", "4"], [{"answer": "1"}] * 4)
    processes = [w.process for w in pool._workers]
    assert len(processes) == 2
    run(pool, ["1", "2", "3", "4"], [{"answer": "1"}] * 4)
    assert [w.process for w in pool._workers] == processes  # reused
    del pool
    gc.collect()
    assert all(p.poll() is not None for p in processes)


def test_scores_do_not_depend_on_workers_or_order():
    rng = np.random.default_rng(0)
    answers = [str(n) for n in rng.integers(0, 10, 3 * CHUNK)]
    rows = [{"answer": str(n)} for n in rng.integers(0, 10, 3 * CHUNK)]
    one, three = CheckPool(Number(), workers=1), CheckPool(Number(), workers=3)
    expected = np.array([a == row["answer"] for a, row in zip(answers, rows, strict=True)], np.float32)
    order = rng.permutation(len(answers))
    np.testing.assert_array_equal(run(one, answers, rows).values, expected)
    np.testing.assert_array_equal(run(three, answers, rows).values, expected)
    shuffled = run(three, [answers[i] for i in order], [rows[i] for i in order]).values
    np.testing.assert_array_equal(shuffled, expected[order])


def test_thousands_of_short_answers_are_quick():
    pool = CheckPool(Number(), workers=2)
    run(pool, ["1"] * 8, [{"answer": "1"}] * 8)
    answers = [f"so the answer is {i}" for i in range(2000)]
    took = []
    for _ in range(3):
        began = time.perf_counter()
        assert run(pool, answers, [{"answer": str(i)} for i in range(2000)]).values.all()
        took.append(time.perf_counter() - began)
    assert min(took) < 1.0


STRANGE = [
    "\0",
    "\ud800",
    '"\n["score", 1]\n',
    "\u2028",
    "9" * 10**6,
    "(" * 10**5,
    "\\boxed{" * 10**4,
    "1e999",
]


def test_any_text_reaches_a_worker_and_comes_back():
    texts = [*STRANGE, "7"]
    found = run(CheckPool(Number()), texts, [{"answer": "7"}] * len(texts))
    np.testing.assert_array_equal(found.values, [0] * len(STRANGE) + [1])
    assert not found.failed.any()
    assert not found.timed_out.any()


def test_sympy_and_regular_expressions_may_run_wild():
    blown = CheckPool(Mathematics(), workers=2, seconds=2.0)
    found = run(blown, ["$9^{9^{9^{9}}}$", "$\\frac{2}{4}$", "$10^{10^{10^{10}}}$"], [{"answer": "0.5"}] * 3)
    assert found.values[1] == 1
    assert ((found.values == 0) | found.failed | found.timed_out)[[0, 2]].all()
    pattern = CheckPool(Regex(pattern="(a+)+b"), workers=1, seconds=0.5)
    found = run(pattern, ["aab", "a" * 60, "b", "ab"])
    np.testing.assert_array_equal(found.timed_out, [False, True, False, False])
    np.testing.assert_array_equal(found.values[[0, 2, 3]], [1, 0, 1])


def test_a_row_without_what_the_check_needs():
    with pytest.raises(UserError, match="needs the field 'answer' in every row"):
        run(CheckPool(Number()), ["1"], [{"question": "q"}])
    with pytest.raises(UserError, match="'answer' 'none' has no number"):
        run(CheckPool(Number()), ["1"], [{"answer": "none"}])


def test_a_check_of_an_experiment_file(tmp_path):
    """Its class is defined in a file that was run, not in a module that could be imported."""
    from jrlhf.experiment import load_python

    path = tmp_path / "mine.py"
    path.write_text(
        textwrap.dedent("""
        from dataclasses import dataclass
        from jrlhf.rewards.verifiers import Check

        @dataclass(frozen=True)
        class HowManyLetters(Check):
            letter: str = "r"

            def needs(self):
                return ()

            def score(self, prompt, completion, row):
                return completion.count(self.letter)
        """)
    )
    check = load_python(path).HowManyLetters()
    assert run(CheckPool(Within(check=check)), ["<answer>strawberry</answer>"]).values == [3]


def test_a_check_of_the_script_itself_cannot_be_imported(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        from dataclasses import dataclass
        from jrlhf.config import UserError
        from jrlhf.rewards.pool import CheckPool
        from jrlhf.rewards.verifiers import Check

        @dataclass(frozen=True)
        class Mine(Check):
            pass

        try:
            CheckPool(Mine())(["p"], ["a"], [{"answer": "a"}])
        except UserError as error:
            print(error)
        """)
    )
    out = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert "define it in an experiment file" in out.stdout


def test_workers_end_with_the_process_that_began_them(tmp_path):
    """Even when that was killed in the middle of an answer that does not end."""
    script = (
        "import sys\n"
        "from jrlhf.rewards.pool import CheckPool\n"
        "from jrlhf.rewards.verifiers import Regex\n"
        "pool = CheckPool(Regex(pattern='(a+)+b'), workers=1, seconds=0.1)\n"
        "pool._listen = lambda job, listen=pool._listen: (listen(job), print(*(w.process.pid for w in pool._workers),"
        " flush=True), sys.stdin.read() if pool._workers[0].items else None)\n"
        "pool(['p'], ['b'], [{}])\n"
        "pool.seconds = 1000.0\n"
        "pool(['p'], ['a' * 60], [{}])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        time.sleep(1.0)
        parent.kill()
    for _ in range(300):
        if not _alive(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived the process that began it")


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_scores_are_worth(caplog):
    worth = Verified(CheckPool(Hostile(), seconds=0.5), right=2.0, wrong=-1.0, failed=-3.0, timed_out=-4.0)
    answers = ["fine 1", "fine 0", "fine 0.5", "raise", "sleep"]
    scores = worth(["p"] * 5, answers, [{}] * 5)
    np.testing.assert_array_equal(scores.values, np.array([2, -1, 0.5, -3, -4], np.float32))
    assert scores.values.dtype == np.float32
    np.testing.assert_array_equal(scores.failed, [False, False, False, True, False])
    np.testing.assert_array_equal(scores.timed_out, [False, False, False, False, True])
    worth(["p"], ["raise"], [{}])
    assert [r.getMessage() for r in caplog.records] == ["Hostile failed on an answer: RuntimeError: no idea"]


def test_a_row_that_no_worker_can_be_sent():
    pool = CheckPool(Number())
    with pytest.raises(UserError, match=r"the check Number takes text, numbers and lists .*bytes"):
        run(pool, ["4"], [{"answer": b"4"}])
    assert not pool._workers
