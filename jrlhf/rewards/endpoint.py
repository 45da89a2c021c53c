"""A judge behind HTTP: any server that speaks OpenAI's chat completions.

Nothing that the server sends is trusted: a reply is bounded in size and time, its shape is checked, and the key, which
comes from the environment and is never stored, is blotted out of whatever comes back. Every answer is written to disk
as it arrives, so that a run that was killed asks nothing twice.
"""

import asyncio
import hashlib
import json
import logging
import math
import os
import random
import re
import sqlite3
import time
import urllib.parse
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx2
import numpy as np

from jrlhf.config import UserError, no_fingerprint
from jrlhf.rewards.judges import Named, begins, one_hot, parse_verdict

# At level DEBUG it logs the headers of responses, where a server may have echoed the key.
logging.getLogger("httpcore2").setLevel(logging.INFO)

RETRIED = {408, 409, 425, 429}  # and all of 5xx: what may be otherwise in a moment
HINTS = {
    400: "the request does not suit this server or model",
    401: "the key is missing or wrong: see api_key_env",
    403: "the key may not use this model",
    404: "url or model is not known there; url ends where /chat/completions follows, often in /v1",
    413: "the request is too large for this server",
    422: "the request does not suit this server or model",
}
OF_ONE = {400, 413, 422}  # also said of a single question, such as one too long for the model
SECRET = 8  # characters; a shorter key is a placeholder ("EMPTY"), and blotting it out would spoil answers


@dataclass(frozen=True)
class Endpoint:
    """Where a model is asked, and how. Fields that cannot change an answer have no part in the fingerprint."""

    url: str  # up to where /chat/completions follows
    model: str
    api_key_env: str = no_fingerprint(
        ""
    )  # the NAME of the environment variable that holds the key; "": no key
    temperature: float = 0.0
    max_tokens: int = 512
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # as the server calls it
    votes: int = (
        1  # replies to each question, whose verdicts are averaged (self-consistency: Wang et al. 2022)
    )
    top_logprobs: int = 0  # ask for so many: a verdict is then the distribution at the token that gives it
    concurrency: int = no_fingerprint(16)  # requests under way at the same time
    timeout: float = no_fingerprint(120.0)  # seconds for one request, its whole reply included
    retries: int = no_fingerprint(5)
    backoff: float = no_fingerprint(1.0)  # seconds before the first retry; doubled each time, with jitter
    max_wait: float = no_fingerprint(60.0)  # seconds at most before a retry, whatever the server asks for
    give_up_after: int = no_fingerprint(20)  # questions in a row without an answer: the run stops
    input_price: float = no_fingerprint(0.0)  # per million tokens
    output_price: float = no_fingerprint(0.0)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"endpoint.url must begin with http:// or https:// and name a host, got {self._host()!r}"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError(
                "endpoint.url must hold no name, password or query (they would be stored): the key goes into the "
                "environment variable that endpoint.api_key_env names"
            )
        if not self.model:
            raise UserError("endpoint.model must not be empty")
        if self.api_key_env and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", self.api_key_env):
            raise UserError(
                "endpoint.api_key_env must be the name of an environment variable, in capitals (such as "
                "JUDGE_API_KEY), not the key itself"
            )
        checks = {
            "temperature": (self.temperature >= 0, "zero or more"),
            "max_tokens": (self.max_tokens > 0, "positive"),
            "votes": (self.votes > 0, "positive"),
            "top_logprobs": (0 <= self.top_logprobs <= 20, "from 0 to 20"),
            "concurrency": (self.concurrency > 0, "positive"),
            "timeout": (self.timeout > 0, "positive"),
            "retries": (self.retries >= 0, "zero or more"),
            "backoff": (self.backoff >= 0, "zero or more"),
            "max_wait": (self.max_wait >= 0, "zero or more"),
            "give_up_after": (self.give_up_after > 0, "positive"),
            "input_price": (self.input_price >= 0, "zero or more"),
            "output_price": (self.output_price >= 0, "zero or more"),
        }
        for name, (ok, rule) in checks.items():
            if not ok or not math.isfinite(getattr(self, name)):
                raise UserError(f"endpoint.{name} must be {rule}, got {getattr(self, name)}")
        if self.votes > 1 and self.temperature == 0:
            raise UserError(
                f"endpoint.votes is {self.votes}, and endpoint.temperature 0 makes all votes alike; raise one, or "
                "lower the other"
            )

    def _host(self) -> str:
        """The url without what may be secret."""
        return self.url.rpartition("@")[2].partition("?")[0]

    def check_key(self) -> None:
        """UserError unless the environment has a key that can be sent."""
        if not self.api_key_env:
            return
        key = os.environ.get(self.api_key_env, "")
        if not key:
            raise UserError(
                f"endpoint.api_key_env: the environment variable {self.api_key_env} is not set; set it to the key of "
                f"{self.url}"
            )
        if not re.fullmatch(r"[\x21-\x7e]+", key):
            raise UserError(
                f"endpoint.api_key_env: the environment variable {self.api_key_env} holds spaces, line breaks or "
                "other characters that no key has"
            )


class Reply(NamedTuple):
    text: str
    # each with its likeliest alternatives' log-probabilities
    tokens: list[tuple[str, dict[str, float]]] | None
    cut: bool = False  # by a limit or a filter of the server, so that its end is missing


class Usage(NamedTuple):
    prompt_tokens: int
    completion_tokens: int


class Malformed(Exception):
    """A reply that is none."""


class Refused(UserError):
    """What no retry mends. `of_one`: it may be about this question alone."""

    def __init__(self, message: str, of_one: bool) -> None:
        super().__init__(message)
        self.of_one = of_one


def read_reply(data: str) -> tuple[Reply, Usage]:
    """The first choice of a chat completion. Malformed unless the text is one; an absent text (a refusal) is empty.

    Log-probabilities that make no sense (NaN, above 0, another shape) count as absent.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise Malformed("not JSON") from None
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Malformed("no choices")
    message = choices[0].get("message")
    if not isinstance(message, dict) or not isinstance(message.get("content"), (str, type(None))):
        raise Malformed("no message")
    usage = body.get("usage") if isinstance(body.get("usage"), dict) else {}
    count = lambda name: n if type(n := usage.get(name)) is int and 0 <= n < 2**31 else 0  # noqa: E731
    # Half a surrogate pair is no text, and could not be kept.
    text = (message.get("content") or "").encode("utf-8", "replace").decode()
    cut = choices[0].get("finish_reason") in ("length", "content_filter")
    reply = Reply(text, _tokens(choices[0].get("logprobs")), cut)
    return reply, Usage(count("prompt_tokens"), count("completion_tokens"))


def _tokens(logprobs: Any) -> list[tuple[str, dict[str, float]]] | None:
    try:
        tokens = [
            (
                str(entry["token"]),
                {str(top["token"]): float(top["logprob"]) for top in entry["top_logprobs"]},
            )
            for entry in logprobs["content"]
        ]
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
    sound = all(value <= 1e-3 for _, top in tokens for value in top.values())  # NaN is not
    return tokens if sound else None


def soft_verdict(reply: Reply, named: Named, options: Sequence[str]) -> np.ndarray | None:
    """[K]: how likely each option was at the token that gave the verdict; None where that cannot be told: without
    log-probabilities, when one token begins several options, or when the option that the text names is not among the
    likeliest."""
    if reply.tokens is None or "".join(token for token, _ in reply.tokens) != reply.text:
        return None
    stops = np.cumsum([len(token) for token, _ in reply.tokens])
    at = int(
        np.searchsorted(stops, named.start, "right")
    )  # the token that holds the option's first character
    token, top = reply.tokens[at]
    before = token[: named.start - (stops[at] - len(token))].strip()
    mass = np.zeros(len(options))
    for other, logprob in top.items():
        word = other.strip().removeprefix(before).strip(" \t\n\"'*.,:;()[]{}")
        meant = [i for i, option in enumerate(options) if word and begins(option, word)]
        if len(meant) > 1:
            return None
        mass[meant] += math.exp(min(logprob, 0.0))
    return mass / mass.sum() if mass[named.option] > 0 else None


# --- answers on disk ----------------------------------------------------------------------------------------


# SQLite's troubles that are not the file's own.
PASSING = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_IOERR,
}


class Answers:
    """Replies by the hash of what was asked, and what they cost, in one SQLite file that outlives a killed run.

    UserError, with the file's name, where it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._named():
            # Made in one thread and used in another (`_run`), never in two at a time.
            self._db = sqlite3.connect(path, timeout=60.0, isolation_level=None, check_same_thread=False)
        try:
            with self._named():
                self._db.execute(
                    "CREATE TABLE IF NOT EXISTS answers (asked TEXT PRIMARY KEY, text TEXT, tokens TEXT)"
                )
                # A table of its own, so that files from before it was kept can be read.
                self._db.execute("CREATE TABLE IF NOT EXISTS cut (asked TEXT PRIMARY KEY)")
                self._db.execute("CREATE TABLE IF NOT EXISTS counts (name TEXT PRIMARY KEY, n INTEGER)")
        except UserError:
            self.close()
            raise

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the details
            advice = "" if code in PASSING else "; move it away, and what it holds is asked again"
            raise UserError(f"{self._path}: stored answers that cannot be read ({error}){advice}") from error

    def close(self) -> None:
        self._db.close()

    def find(self, keys: Sequence[str]) -> dict[str, Reply]:
        found = {}
        for key in keys:
            with self._named():
                row = self._db.execute(
                    "SELECT text, tokens, EXISTS (SELECT 1 FROM cut WHERE asked = ?1) FROM answers WHERE asked = ?1",
                    (key,),
                ).fetchone()
                if row is not None:
                    found[key] = _kept(*row)
        return found

    def any(self) -> bool:
        with self._named():
            return self._db.execute("SELECT 1 FROM answers LIMIT 1").fetchone() is not None

    def keep(self, key: str, reply: Reply, counts: Counter) -> None:
        """One transaction: an answer is never paid for and lost, nor counted twice."""
        tokens = json.dumps(reply.tokens) if reply.tokens is not None else None
        with self._named(), self._transaction():
            self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, reply.text, tokens))
            self._db.execute("DELETE FROM cut WHERE asked = ?", (key,))
            if reply.cut:
                self._db.execute("INSERT INTO cut VALUES (?)", (key,))
            self._add(counts)

    def add(self, counts: Counter) -> None:
        with self._named(), self._transaction():
            self._add(counts)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        with self._db:
            yield

    def _add(self, counts: Counter) -> None:
        for name, n in counts.items():
            self._db.execute(
                "INSERT INTO counts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET n = n + excluded.n",
                (name, n),
            )
        counts.clear()

    def counts(self) -> dict[str, int]:
        with self._named():
            return {str(name): int(n) for name, n in self._db.execute("SELECT name, n FROM counts")}


def _kept(text: Any, tokens: Any, cut: int) -> Reply:
    if not isinstance(text, str):
        raise ValueError(f"an answer is {type(text).__name__}, not text")
    if tokens is None:
        return Reply(text, None, bool(cut))
    listed = [(str(token), {str(t): float(p) for t, p in top.items()}) for token, top in json.loads(tokens)]
    return Reply(text, listed, bool(cut))


# --- asking -------------------------------------------------------------------------------------------------


class EndpointJudge:
    """A `Judge` and a `Writer`. `answers` is the file that keeps replies and counts (see `Answers`)."""

    def __init__(self, endpoint: Endpoint, answers: Path) -> None:
        endpoint.check_key()
        self.endpoint, self.answers = endpoint, answers
        # Of the replies that this process read: abstentions, hard_verdicts, cut_off.
        self.read: Counter[str] = Counter()
        self._in_a_row = 0  # questions without an answer, over all calls

    def verdicts(self, questions: Sequence[str], options: Sequence[str]) -> np.ndarray:
        """[N, K] float64, the mean over `votes` that named an option; NaN where none did.

        UserError when the server turns a request down for good, or answers nothing any more.
        """
        votes, soft = self.endpoint.votes, self.endpoint.top_logprobs > 0
        bodies = [self._body(question, soft) for question in questions]
        replies = iter(self._ask([(body, f"vote {v}") for body in bodies for v in range(votes)]))
        rows = []
        for _ in questions:
            each = [self._verdict(reply, options) for reply in islice(replies, votes) if reply is not None]
            said = [row for row in each if row is not None]
            rows.append(np.mean(said, axis=0) if said else np.full(len(options), np.nan))
        return np.asarray(rows, np.float64).reshape(len(questions), len(options))

    def write(self, questions: Sequence[str], seed: int) -> list[str | None]:
        """A reply to each; None where there is none. Equal questions of one call get replies of their own; what was
        asked before with the same seed is not asked again."""
        seen: Counter = Counter()
        asked = []
        for question in questions:
            asked.append((self._body(question, False), f"text {seed} {seen[question]}"))
            seen[question] += 1
        return [reply.text or None if reply else None for reply in self._ask(asked)]

    def counts(self) -> dict[str, float]:
        """Since the file of answers began: requests, retries, timeouts, failures (questions without an answer),
        prompt_tokens, completion_tokens, cost; by this process: abstentions (replies that name no option), cut_off
        (those of them whose end is missing) and hard_verdicts (read from the text although log-probabilities were asked
        for)."""
        with closing(Answers(self.answers)) as answers:
            kept = answers.counts()
        names = ("requests", "retries", "timeouts", "failures", "prompt_tokens", "completion_tokens")
        total: dict[str, float] = {name: kept.get(name, 0) for name in names}
        tokens_in, tokens_out = total["prompt_tokens"], total["completion_tokens"]
        total["cost"] = (
            tokens_in * self.endpoint.input_price + tokens_out * self.endpoint.output_price
        ) / 1e6
        return total | {name: self.read[name] for name in ("abstentions", "cut_off", "hard_verdicts")}

    def _verdict(self, reply: Reply, options: Sequence[str]) -> np.ndarray | None:
        named = parse_verdict(reply.text, options, reply.cut)
        if named is None:
            self.read["abstentions"] += 1
            self.read["cut_off"] += reply.cut
            return None
        if self.endpoint.top_logprobs:
            if (soft := soft_verdict(reply, named, options)) is not None:
                return soft
            self.read["hard_verdicts"] += 1
        return one_hot(named.option, len(options))

    def _body(self, question: str, logprobs: bool) -> str:
        e = self.endpoint
        body: dict[str, Any] = {"model": e.model, "messages": [{"role": "user", "content": question}]}
        body |= {"temperature": e.temperature, e.limit_field: e.max_tokens}
        if logprobs:
            body |= {"logprobs": True, "top_logprobs": e.top_logprobs}
        return json.dumps(body, sort_keys=True)

    def _ask(self, asked: Sequence[tuple[str, str]]) -> list[Reply | None]:
        """(request, sample) -> replies, those that are on disk from there."""
        keys = [hashlib.sha256(json.dumps([self.endpoint.url, *a]).encode()).hexdigest() for a in asked]
        with closing(Answers(self.answers)) as answers:
            found = answers.find(list(dict.fromkeys(keys)))
            for file in self._others():
                with closing(Answers(file)) as others:
                    found |= others.find([key for key in dict.fromkeys(keys) if key not in found])
            missing = {key: body for key, (body, _) in zip(keys, asked, strict=True) if key not in found}
            if missing:
                _run(self._fetch(missing, answers, found))
        return [found.get(key) for key in keys]

    def _others(self) -> list[Path]:
        """The files beside its own: of other processes, which may have asked when there were more or fewer of them."""
        stem, suffix = re.sub(r"-\d+$", "", self.answers.stem), self.answers.suffix
        named = re.compile(re.escape(stem) + r"(-\d+)?" + re.escape(suffix))
        beside = (file for file in self.answers.parent.iterdir() if named.fullmatch(file.name))
        return sorted(file for file in beside if file != self.answers)

    async def _fetch(self, missing: Mapping[str, str], answers: Answers, found: dict[str, Reply]) -> None:
        """Ask what is `missing`, and put it into `found`."""
        todo = iter(missing.items())
        secret = os.environ.get(self.endpoint.api_key_env, "") if self.endpoint.api_key_env else ""
        # A reply is read as it comes over the wire: one that unpacks to gigabytes is not JSON.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if secret:
            headers["Authorization"] = f"Bearer {secret}"
        refused: list[Refused] = []

        async def work(client: httpx2.AsyncClient) -> None:
            for key, body in todo:
                counts: Counter = Counter()
                try:
                    reply, trouble = await self._one(client, body, secret, counts)
                    if reply is not None:
                        answers.keep(key, reply, counts)
                except Refused as error:
                    if not error.of_one:
                        raise
                    reply, trouble = None, str(error)
                    counts["failures"] += 1
                    if not answers.any():  # a config that is wrong, unless the others have answers
                        refused.append(error)
                        return
                finally:
                    if counts:
                        answers.add(counts)
                if reply is not None:
                    found[key], self._in_a_row = reply, 0
                    continue
                self._in_a_row += 1
                if self._in_a_row >= self.endpoint.give_up_after:
                    raise UserError(
                        f"endpoint {self.endpoint.url}: {self._in_a_row} questions in a row had no answer (the last: "
                        f"{trouble}); the answers so far are kept, and the same command goes on from there"
                    )

        wide = httpx2.Limits(max_connections=self.endpoint.concurrency)
        async with httpx2.AsyncClient(headers=headers, timeout=self.endpoint.timeout, limits=wide) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.endpoint.concurrency, len(missing))):
                        group.create_task(work(client))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        if refused and not answers.any():
            raise refused[0]

    async def _one(
        self, client: httpx2.AsyncClient, body: str, secret: str, counts: Counter
    ) -> tuple[Reply | None, str]:
        """A reply, or why there is none after all retries. UserError for what no retry can mend."""
        trouble, wanted = "", None
        for attempt in range(self.endpoint.retries + 1):
            if attempt:
                counts["retries"] += 1
                await asyncio.sleep(self._wait(attempt, wanted))
            counts["requests"] += 1
            wanted = None
            try:
                status, after, text = await self._post(client, body)
            except (TimeoutError, httpx2.TimeoutException):
                counts["timeouts"] += 1
                trouble = f"no whole reply within {self.endpoint.timeout:g} s"
                continue
            except Malformed as error:
                trouble = f"a reply that is none: {error}"
                continue
            except (httpx2.HTTPError, OSError) as error:
                trouble = f"the connection failed ({type(error).__name__})"  # its text may hold what was sent
                continue
            text = _blot(text, secret)
            if status == 200:
                try:
                    reply, usage = read_reply(text)
                except Malformed as error:
                    trouble = f"a reply that is none: {error}"
                    continue
                counts.update(usage._asdict())
                return reply, ""
            if status not in RETRIED and status < 500:
                hint = HINTS.get(
                    status, "it is not a chat completions endpoint" if status < 400 else "refused"
                )
                shown = " ".join(text[:300].split())
                raise Refused(
                    f"endpoint {self.endpoint.url}: HTTP {status}, {hint}. It says: {shown!r}",
                    status in OF_ONE,
                )
            trouble, wanted = f"HTTP {status}", retry_after(after)
        counts["failures"] += 1
        return None, trouble

    async def _post(self, client: httpx2.AsyncClient, body: str) -> tuple[int, str, str]:
        """(status, the header Retry-After, text). Redirects are not followed: the key is for this host."""
        limit = 2**22 + 4096 * self.endpoint.max_tokens  # bytes; log-probabilities take most of them
        url = self.endpoint.url.rstrip("/") + "/chat/completions"
        data = bytearray()
        async with (
            asyncio.timeout(self.endpoint.timeout),
            client.stream("POST", url, content=body) as response,
        ):
            async for piece in response.aiter_raw():
                data += piece
                if len(data) > limit:
                    raise Malformed(f"more than {limit} bytes")
        return response.status_code, response.headers.get("Retry-After", ""), data.decode("utf-8", "replace")

    def _wait(self, attempt: int, wanted: float | None) -> float:
        """Seconds before a retry: doubling each time, by up to half shorter; longer where the server asks for it."""
        own = self.endpoint.backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
        return min(self.endpoint.max_wait, max(own, wanted or 0.0))


def retry_after(header: str) -> float | None:
    """Seconds, of a number or an HTTP date; None when it is neither."""
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", header.strip()):
        return float(header)
    try:
        return max(parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _blot(text: str, secret: str) -> str:
    if len(secret) < SECRET:
        return text
    # Each character may have been escaped, as JSON or a URL does.
    each = (rf"(?:\\?{re.escape(c)}|\\u{ord(c):04x}|%{ord(c):02x})" for c in secret)
    return re.sub("".join(each), "[key]", text, flags=re.IGNORECASE)


def _run(work: Coroutine[Any, Any, None]) -> None:
    """To its end, also from within a running event loop (a notebook, an async reward)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()
