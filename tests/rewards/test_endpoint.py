"""An endpoint is asked through a real server, which answers, fails, stalls and lies."""

import asyncio
import json
import logging
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing, contextmanager
from dataclasses import replace
from email.utils import formatdate

import numpy as np
import pytest
from chat_server import completion, serving

from jrlhf.config import UserError
from jrlhf.rewards.endpoint import Endpoint, EndpointJudge, Reply, retry_after, soft_verdict
from jrlhf.rewards.judges import parse_verdict

AB = ("A", "B")
KEY = "sk-0123456789-very/secret+key"


@pytest.fixture
def serve():
    with serving() as serve:
        yield serve


@pytest.fixture
def judge(tmp_path):
    """judge(server, ...) -> an EndpointJudge that neither waits nor tries long."""

    def judge(server, file="answers.sqlite", **changes):
        quick = {"timeout": 5.0, "retries": 2, "backoff": 0.001, "concurrency": 4, "give_up_after": 100}
        return EndpointJudge(Endpoint(server.url, "m", **(quick | changes)), tmp_path / file)

    return judge


@contextmanager
def at_most(seconds):
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


# --- verdicts -----------------------------------------------------------------------------------------------


def test_a_verdict_is_what_the_reply_names_and_a_reply_without_one_abstains(serve, judge):
    server = serve(lambda q, n: completion({"q1": "[[A]]", "q2": "B, clearly", "q3": "neither"}[q]))
    asking = judge(server, input_price=3.0, output_price=15.0)
    said = asking.verdicts(["q1", "q2", "q3", "q1"], AB)
    np.testing.assert_array_equal(said, [[1, 0], [0, 1], [np.nan, np.nan], [1, 0]])
    assert server.asked == {"q1": 1, "q2": 1, "q3": 1}
    counts = asking.counts()
    assert counts == {
        "requests": 3,
        "retries": 0,
        "timeouts": 0,
        "failures": 0,
        "prompt_tokens": 30,
        "completion_tokens": 6,
        "cost": pytest.approx((30 * 3 + 6 * 15) / 1e6),
        "abstentions": 1,
        "cut_off": 0,
        "hard_verdicts": 0,
    }
    assert server.bodies[0] == {
        "model": "m",
        "messages": [{"role": "user", "content": server.bodies[0]["messages"][0]["content"]}],
        "temperature": 0.0,
        "max_tokens": 512,
    }
    assert "Authorization" not in server.headers[0]


def cut(text, reason="length"):
    whole = completion(text)
    return whole | {"choices": [whole["choices"][0] | {"finish_reason": reason}]}


def test_a_thought_that_was_cut_short_is_no_verdict(serve, judge):
    replies = {
        "half": cut("Answer A is right. Now let me look at B"),
        "filtered": cut("I think A is better.", "content_filter"),
        "marked": cut("[[A]] because"),
        "short": cut("A"),
        "whole": cut("I think A is better.", "stop"),
    }
    server = serve(lambda q, n: replies[q])
    for _ in range(2):  # the second time from the disk
        asking = judge(server)
        said = asking.verdicts(list(replies), AB)
        np.testing.assert_array_equal(said[:, 0], [np.nan, np.nan, 1, 1, 1])
        assert (asking.counts()["abstentions"], asking.counts()["cut_off"]) == (2, 2)
    assert {*server.asked.values()} == {1}


def test_votes_are_averaged_without_those_that_abstain(serve, judge):
    replies = iter(["A", "B", "A", "I cannot say"])
    server = serve(lambda q, n: completion(next(replies)))
    asking = judge(server, votes=4, temperature=1.0, concurrency=1, limit_field="max_completion_tokens")
    np.testing.assert_allclose(asking.verdicts(["q"], AB), [[2 / 3, 1 / 3]])
    assert server.asked["q"] == 4
    assert server.bodies[0]["max_completion_tokens"] == 512
    assert asking.counts()["abstentions"] == 1


def logprobs(*tokens):
    return {
        "content": [
            {"token": t, "logprob": 0.0, "top_logprobs": [{"token": o, "logprob": p} for o, p in top.items()]}
            for t, top in tokens
        ]
    }


def test_log_probabilities_make_a_soft_verdict(serve, judge):
    top = {" A": np.log(0.6), "A": np.log(0.1), " B": np.log(0.2), " the": np.log(0.1)}
    server = serve(
        lambda q, n: completion(
            "Best: A", logprobs(("Best", {}), (":", {}), (" A", top)) if q == "soft" else None
        )
    )
    asking = judge(server, top_logprobs=5)
    np.testing.assert_allclose(asking.verdicts(["soft", "hard"], AB), [[7 / 9, 2 / 9], [1, 0]])
    assert server.bodies[0]["logprobs"] is True
    assert server.bodies[0]["top_logprobs"] == 5
    assert asking.counts()["hard_verdicts"] == 1
    again = judge(server, top_logprobs=5)  # from the disk
    np.testing.assert_allclose(again.verdicts(["soft"], AB), [[7 / 9, 2 / 9]])
    assert server.asked["soft"] == 1


@pytest.mark.parametrize(
    ("options", "text", "tokens", "expected"),
    [
        (AB, "[[A]]", [("[[", {}), ("A", {"A": -0.1, "B": -2.0}), ("]]", {})], "A over B"),
        (AB, "[[A]]", [("[[A", {"[[A": -0.1, "[[B": -2.0}), ("]]", {})], "A over B"),
        (("yes", "no"), "Yes.", [("Yes", {"Yes": -0.1, "no": -2.0}), (".", {})], "A over B"),
        (("1", "10"), "1", [("1", {"1": -0.1, "2": -2.0})], None),  # one token begins both
        (AB, "A", [("A", {"C": -0.1})], None),  # no option among the likeliest
        (AB, "A", [("A", {"B": -2.0, "x": -0.1})], None),  # not the one that the text names
        (AB, "A", [("B", {"A": -0.1})], None),  # tokens of another text
        (AB, "A", None, None),
    ],
)
def test_a_soft_verdict_is_read_at_the_token_that_gives_it(options, text, tokens, expected):
    found = soft_verdict(Reply(text, tokens), parse_verdict(text, options), options)
    if expected is None:
        assert found is None
    else:
        mass = np.exp([-0.1, -2.0])
        np.testing.assert_allclose(found, mass / mass.sum())


def test_texts_differ_by_seed_and_place_and_are_asked_for_once(serve, judge):
    lock = threading.Lock()
    count = iter(range(100))

    def reply(q, n):
        with lock:
            return completion(f"text {next(count)}" if q != "mute" else "")

    server = serve(reply)
    asking = judge(server, temperature=1.0)
    first = asking.write(["q", "q", "mute"], seed=1)
    assert first[2] is None
    assert len({*first}) == 3
    assert asking.write(["q", "q", "mute"], seed=1) == first
    assert server.asked["q"] == 2
    assert not {*asking.write(["q", "q"], seed=2)} & {*first}


def test_it_can_be_asked_from_a_running_event_loop(serve, judge):
    server = serve(lambda q, n: completion("A"))

    async def inside():
        return judge(server).verdicts(["q"], AB)

    np.testing.assert_array_equal(asyncio.run(inside()), [[1, 0]])


# --- a server that fails ------------------------------------------------------------------------------------


def reset(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    raise ConnectionResetError


@pytest.mark.parametrize(
    "trouble",
    [(500, {}, b"oops"), (503, {}, b""), (429, {"Retry-After": "0"}, b"{}"), (408, {}, b""), reset],
    ids=["500", "503", "429", "408", "reset"],
)
def test_what_may_pass_is_tried_again(serve, judge, trouble):
    server = serve(lambda q, n: trouble if n < 3 else completion("B"))
    asking = judge(server)
    np.testing.assert_array_equal(asking.verdicts(["q"], AB), [[0, 1]])
    counts = asking.counts()
    assert (counts["requests"], counts["retries"], counts["failures"]) == (3, 2, 0)


def test_the_server_says_how_long_to_wait(serve, judge):
    server = serve(lambda q, n: (429, {"Retry-After": "0.4"}, b"") if n == 1 else completion("A"))
    start = time.monotonic()
    judge(server).verdicts(["q"], AB)
    assert time.monotonic() - start >= 0.4
    greedy = serve(lambda q, n: (429, {"Retry-After": "86400"}, b"") if n == 1 else completion("A"))
    with at_most(5):
        judge(greedy, file="greedy.sqlite", max_wait=0.01).verdicts(["q"], AB)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("0.5", 0.5), ("", None), ("soon", None), ("-3", None), ("nan", None), ("1e9", None)],
)
def test_retry_after_is_seconds(header, seconds):
    assert retry_after(header) == seconds


@pytest.mark.parametrize("header", ["0", "0.01", "Wed, 21 Oct 2015 07:28:00 GMT", "soon", "-3"])
def test_no_server_can_ask_for_a_flood(judge, serve, header):
    asking = judge(serve(lambda q, n: completion("A")), backoff=1.0, max_wait=5.0)
    assert min(asking._wait(3, retry_after(header)) for _ in range(50)) >= 2.0
    assert asking._wait(1, 4.0) == 4.0
    assert asking._wait(1, 86400.0) == 5.0


def test_retry_after_may_be_a_date():
    assert retry_after(formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60, abs=2)
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_waits_double_with_jitter_and_have_an_end(judge, serve):
    asking = judge(serve(lambda q, n: completion("A")), backoff=1.0, max_wait=5.0)
    for attempt, whole in ((1, 1.0), (2, 2.0), (3, 4.0), (9, 10.0)):
        waits = [asking._wait(attempt, None) for _ in range(50)]
        assert 0.5 * whole <= min(waits)
        assert max(waits) <= min(whole, 5.0)
    assert len(set(waits[:1])) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 307])
def test_what_no_retry_mends_is_an_error_at_once(serve, judge, status):
    server = serve(lambda q, n: (status, {"Location": "http://127.0.0.1:1/"}, b'{"error": "because"}'))
    asking = judge(server, concurrency=1)
    with pytest.raises(UserError, match=f"HTTP {status}, .*because"):
        asking.verdicts([f"q{n}" for n in range(20)], AB)
    assert sum(server.asked.values()) == 1
    assert asking.counts()["requests"] == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_question_that_is_refused_while_others_are_answered_has_no_verdict(serve, judge, status):
    no = (status, {}, b'{"error": "too long"}')
    server = serve(lambda q, n: no if q.startswith("long") else completion("A"))
    asking = judge(server, concurrency=2, give_up_after=3)
    said = asking.verdicts(["long", "q1", "q2"], AB)  # whichever comes first
    np.testing.assert_array_equal(said, [[np.nan, np.nan], [1, 0], [1, 0]])
    assert asking.counts()["failures"] == 1
    asking = judge(server, concurrency=1, give_up_after=3)  # as a later process knows from the file
    assert np.isnan(asking.verdicts(["long", "long 2"], AB)).all()
    assert server.asked == {"long": 2, "q1": 1, "q2": 1, "long 2": 1}  # none is tried again at once
    with pytest.raises(UserError, match=r"3 questions in a row had no answer .*too long"):
        asking.verdicts(["long 3"], AB)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_key_that_is_refused_stops_the_run_whatever_was_answered(serve, judge, status):
    server = serve(lambda q, n: completion("A") if q == "q" else (status, {}, b""))
    asking = judge(server)
    asking.verdicts(["q"], AB)
    with pytest.raises(UserError, match=f"HTTP {status}"):
        asking.verdicts(["r"], AB)


def test_questions_that_fail_have_no_verdict_and_the_others_do(serve, judge):
    server = serve(lambda q, n: (500, {}, b"") if q == "bad" else completion("A"))
    asking = judge(server)
    np.testing.assert_array_equal(asking.verdicts(["q", "bad"], AB), [[1, 0], [np.nan, np.nan]])
    counts = asking.counts()
    assert (counts["requests"], counts["retries"], counts["failures"]) == (4, 2, 1)
    assert asking.write(["bad"], 0) == [None]


def test_a_dead_endpoint_stops_the_run(serve, judge):
    server = serve(lambda q, n: (500, {}, b""))
    asking = judge(server, retries=0, give_up_after=3, concurrency=1)
    with pytest.raises(UserError, match=r"3 questions in a row had no answer \(the last: HTTP 500\)"):
        asking.verdicts([f"q{n}" for n in range(50)], AB)
    assert sum(server.asked.values()) == 3
    asking = judge(server, retries=0, give_up_after=3)
    assert np.isnan(asking.verdicts(["a1", "b1"], AB)).all()
    with pytest.raises(UserError, match="3 questions in a row"):  # also over small batches
        asking.verdicts(["a2", "b2"], AB)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        server.url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(UserError, match="the connection failed"):
            judge(server, retries=0, give_up_after=1).verdicts(["q"], AB)


# --- a server that stalls -----------------------------------------------------------------------------------


def test_a_server_that_never_answers_takes_no_longer_than_its_limits(serve, judge):
    server = serve(lambda q, n: lambda handler: server.over.wait(30))
    asking = judge(server, timeout=0.15, retries=1)
    with at_most(5):
        assert np.isnan(asking.verdicts(["a", "b", "c"], AB)).all()
    counts = asking.counts()
    assert (counts["requests"], counts["timeouts"], counts["failures"]) == (6, 6, 3)


def test_a_reply_that_never_ends_is_cut_off(serve, judge):
    def drip(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while not server.over.wait(0.02):  # each piece comes sooner than any time-out of a read
            handler.wfile.write(b"1\r\n \r\n")

    server = serve(lambda q, n: drip)
    asking = judge(server, timeout=0.3, retries=0)
    with at_most(5):
        assert np.isnan(asking.verdicts(["q"], AB)).all()
    assert asking.counts()["timeouts"] == 1


def test_a_flood_is_cut_off(serve, judge):
    sent = Counter()

    def flood(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(10**12))
        handler.end_headers()
        while not server.over.is_set():
            handler.wfile.write(b" " * 2**16)
            sent["bytes"] += 2**16

    server = serve(lambda q, n: flood)
    with at_most(10):
        assert np.isnan(judge(server, timeout=30.0, retries=0).verdicts(["q"], AB)).all()
    assert sent["bytes"] < 64 * 2**20


def test_no_more_requests_than_allowed_are_under_way(serve, judge):
    def slow(q, n):
        time.sleep(0.02)
        return completion("A")

    server = serve(slow)
    judge(server, concurrency=3).verdicts([f"q{n}" for n in range(24)], AB)
    assert server.most == 3


# --- a server that lies -------------------------------------------------------------------------------------

LIES = {
    "html": (200, {"Content-Type": "text/html"}, b"<html>Sign in</html>"),
    "empty": b"",
    "number": b"5",
    "list": [],
    "no choices": {"choices": []},
    "null choices": {"choices": None},
    "choice": {"choices": ["A"]},
    "no message": {"choices": [{"text": "A"}]},
    "content": {"choices": [{"message": {"content": ["A"]}}]},
    "deep": b"[" * 200_000,
    "not utf-8": b"\xff\xfe\x00",
    "long number": b'{"choices": ' + b"9" * 10_000 + b"}",
    "half": (200, {"Content-Length": "1000"}, b'{"choices": ['),
    "packed": (200, {"Content-Encoding": "gzip"}, b"\x1f\x8b\x08\x00garbage"),
}


def test_half_a_surrogate_pair_is_kept_as_a_question_mark(serve, judge):
    asking = judge(serve(lambda q, n: completion("A \ud800")))
    assert asking.write(["q"], 0) == ["A ?"]
    assert asking.write(["q"], 0) == ["A ?"]


@pytest.mark.parametrize("lie", LIES)
def test_a_reply_that_is_none_is_a_failure(serve, judge, lie):
    def send(handler):
        handler.close_connection = True
        handler.send(LIES[lie])

    server = serve(lambda q, n: send)
    asking = judge(server, retries=1)
    with at_most(10):
        assert np.isnan(asking.verdicts(["q"], AB)).all()
    counts = asking.counts()
    assert (counts["requests"], counts["failures"], counts["abstentions"]) == (2, 1, 0)


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        (completion(None), np.nan),  # a refusal
        (completion("A", prompt_tokens="many", completion_tokens=-5), 1.0),
        (completion("A", prompt_tokens=True, completion_tokens=1e400), 1.0),
        ({"choices": completion("A")["choices"]}, 1.0),
        (completion("A", logprobs(("A", {"A": float("nan"), "B": -1.0}))), 1.0),
        (completion("A", logprobs(("A", {"A": 3.0, "B": -1.0}))), 1.0),
        (completion("A", logprobs(("A", {"A": -(10**400)}))), 1.0),
        (completion("A", {"content": "A"}), 1.0),
        (completion("A", {"content": [{"token": "A", "top_logprobs": {"A": 1}}]}), 1.0),
        (completion("A", ["no"]), 1.0),
    ],
)  # fmt: skip
def test_what_is_wrong_beside_the_text_is_left_out(serve, judge, wrong, verdict):
    asking = judge(serve(lambda q, n: wrong), top_logprobs=5)
    np.testing.assert_array_equal(asking.verdicts(["q"], AB)[0, 0], verdict)
    counts = asking.counts()
    assert counts["prompt_tokens"] in (0, 10)
    assert counts["completion_tokens"] in (0, 2)
    assert counts["abstentions"] + counts["hard_verdicts"] == 1


# --- what is kept -------------------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
from jrlhf.rewards.endpoint import Endpoint, EndpointJudge
judge = EndpointJudge(Endpoint(sys.argv[1], "m", concurrency=2, timeout=60.0), Path(sys.argv[2]))
judge.verdicts([f"q{n}" for n in range(12)], ("A", "B"))
"""


def test_a_killed_run_asks_nothing_twice(serve, judge, tmp_path):
    killed = threading.Event()
    waiting = threading.Semaphore(0)

    def reply(q, n):
        if int(q[1:]) >= 6 and not killed.is_set():
            waiting.release()
            killed.wait(60)
        return completion("A")

    server = serve(reply)
    child = subprocess.Popen([sys.executable, "-c", CHILD, server.url, str(tmp_path / "answers.sqlite")])
    for _ in range(2):  # both of its workers wait for an answer that does not come
        assert waiting.acquire(timeout=60)
    child.send_signal(signal.SIGKILL)
    child.wait()
    killed.set()
    assert sum(server.asked.values()) == 8
    asking = judge(server)
    np.testing.assert_array_equal(asking.verdicts([f"q{n}" for n in range(12)], AB), [[1, 0]] * 12)
    assert server.asked == {f"q{n}": 1 + (n in (6, 7)) for n in range(12)}
    # The two that the killed run had under way were never answered, and are in no count.
    assert asking.counts()["requests"] == 12
    assert asking.counts()["prompt_tokens"] == 120
    asking.verdicts([f"q{n}" for n in range(12)], AB)
    assert sum(server.asked.values()) == 14


def test_another_question_model_or_temperature_is_asked_anew(serve, judge):
    server = serve(lambda q, n: completion("A"))
    asking = judge(server)
    asking.verdicts(["q"], AB)
    asking.verdicts(["q"], ("A", "B", "tie"))  # the same question, read for other options
    assert server.asked["q"] == 1
    for n, change in enumerate(
        ({"temperature": 0.5}, {"max_tokens": 9}, {"model": "n"}, {"top_logprobs": 2}), 2
    ):
        EndpointJudge(replace(asking.endpoint, **change), asking.answers).verdicts(["q"], AB)
        assert server.asked["q"] == n


def test_a_file_that_is_no_store_of_answers_is_named(serve, judge, tmp_path):
    (tmp_path / "answers.sqlite").write_text("certainly no database, nor anything like it" * 100)
    with pytest.raises(UserError, match=r"answers\.sqlite: stored answers that cannot be read"):
        judge(serve(lambda q, n: completion("A"))).verdicts(["q"], AB)


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE answers SET text = NULL",
        "UPDATE answers SET text = x'ff'",
        "UPDATE answers SET text = CAST(x'ff' AS TEXT)",
        "UPDATE answers SET tokens = '{'",
        "UPDATE answers SET tokens = 5",
        "UPDATE answers SET tokens = '[5]'",
        "UPDATE answers SET tokens = '[[\"A\", 5]]'",
        'UPDATE answers SET tokens = \'[["A", {"A": 1' + "0" * 400 + "}]]'",
        "DROP TABLE answers; CREATE TABLE answers (other TEXT)",
    ],
)
def test_stored_answers_that_are_none_are_named(serve, judge, tmp_path, harm):
    asking = judge(serve(lambda q, n: completion("A")))
    asking.verdicts(["q"], AB)
    with closing(sqlite3.connect(tmp_path / "answers.sqlite")) as db:
        db.executescript(harm)
    with pytest.raises(
        UserError, match=r"answers\.sqlite: stored answers that cannot be read .*; move it away"
    ):
        asking.verdicts(["q"], AB)


def test_a_damaged_file_of_answers_is_named(serve, judge, tmp_path):
    asking = judge(serve(lambda q, n: completion("A")))
    asking.verdicts([f"q{n}" for n in range(200)], AB)
    path = tmp_path / "answers.sqlite"
    path.write_bytes(path.read_bytes()[:4096] + bytes(path.stat().st_size - 4096))
    with pytest.raises(
        UserError, match=r"answers\.sqlite: stored answers that cannot be read .*; move it away"
    ):
        asking.verdicts(["q1", "q150"], AB)
    with pytest.raises(UserError, match=r"answers\.sqlite: stored answers"):
        asking.counts()


def test_counts_that_are_none_are_named(serve, judge, tmp_path):
    asking = judge(serve(lambda q, n: completion("A")))
    asking.verdicts(["q"], AB)
    with closing(sqlite3.connect(tmp_path / "answers.sqlite")) as db:
        db.executescript("UPDATE counts SET n = 'many'")
    with pytest.raises(UserError, match=r"answers\.sqlite: stored answers"):
        asking.counts()


def test_answers_from_before_cut_replies_were_noted_can_be_read(serve, judge, tmp_path):
    server = serve(lambda q, n: completion("A"))
    judge(server).verdicts(["q"], AB)
    with closing(sqlite3.connect(tmp_path / "answers.sqlite")) as db:
        db.executescript("DROP TABLE cut")
    np.testing.assert_array_equal(judge(server).verdicts(["q"], AB), [[1, 0]])
    assert server.asked["q"] == 1


# --- the key ------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_appears_nowhere_else(serve, judge, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("TEST_JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def reply(q, n):
        echo = f"you sent Bearer {KEY}, in a URL sk-0123456789-very%2Fsecret%2Bkey"
        if q == "denied":
            return 401, {}, echo.encode()
        if q == "escaped":
            body = json.dumps(completion(f"A {KEY}"))
            return 200, {}, body.replace("/", "\\/").replace("+", "\\u002B").encode()
        if q == "fails":
            return reset if n == 1 else (500, {"X-Echo": echo}, echo.encode())
        return completion(f"A {echo}", logprobs((f"A {echo}", {echo: -1.0})))

    server = serve(reply)
    asking = judge(server, api_key_env="TEST_JUDGE_KEY", top_logprobs=1, give_up_after=2)
    asking.verdicts(["good"], AB)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    shown = [repr(asking), repr(asking.endpoint), repr(vars(asking)), *asking.write(["good", "escaped"], 1)]
    for questions in (["denied"], ["fails", "fails too"]):
        try:
            asking.write(questions, 0)
        except UserError as error:
            while error is not None:
                shown.append(repr(error))
                error = error.__cause__ or error.__context__
    said = capfd.readouterr()
    shown += [caplog.text, said.out, said.err]
    assert "HTTP 401" in "".join(shown)
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    with sqlite3.connect(tmp_path / "answers.sqlite") as db:
        assert db.execute("SELECT count(*) FROM answers").fetchone()[0] >= 2
    db.close()
    for secret in (KEY, "very%2Fsecret"):
        assert secret not in "".join(shown)
        assert secret.encode() not in kept


@pytest.mark.parametrize("key", ["two\nlines: of-a-header", "spa ces", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch, key):
    monkeypatch.setenv("TEST_JUDGE_KEY", key)
    with pytest.raises(UserError, match="TEST_JUDGE_KEY holds") as error:
        Endpoint("http://x/v1", "m", api_key_env="TEST_JUDGE_KEY").check_key()
    assert key not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "x.org/v1"}, "endpoint.url must begin with"),
        ({"url": "http://me:hush@x.org/v1"}, "must hold no name, password"),
        ({"url": "https://x.org/v1?key=hush"}, "must hold no name, password"),
        ({"url": "ftp://me:hush@x.org?hush"}, "endpoint.url must begin with"),
        ({"model": ""}, "endpoint.model"),
        ({"api_key_env": "sk-hush"}, "must be the name of an environment variable"),
        ({"api_key_env": "gsk_0123456789hush"}, "must be the name of an environment variable"),
        ({"votes": 3}, "endpoint.votes is 3, and endpoint.temperature 0"),
        ({"timeout": float("inf")}, "endpoint.timeout"),
        ({"timeout": 0.0}, "endpoint.timeout"),
        ({"retries": -1}, "endpoint.retries"),
        ({"concurrency": 0}, "endpoint.concurrency"),
        ({"top_logprobs": 21}, "endpoint.top_logprobs"),
        ({"temperature": float("nan")}, "endpoint.temperature"),
    ],
)
def test_mistakes_are_named_when_it_is_written(change, message):
    with pytest.raises(UserError) as error:
        Endpoint(**({"url": "http://x/v1", "model": "m"} | change))
    assert message in str(error.value)
    assert "hush" not in str(error.value)


def test_a_missing_key_is_named(monkeypatch):
    monkeypatch.delenv("TEST_JUDGE_KEY", raising=False)
    with pytest.raises(UserError, match="the environment variable TEST_JUDGE_KEY is not set"):
        Endpoint("http://x/v1", "m", api_key_env="TEST_JUDGE_KEY").check_key()
