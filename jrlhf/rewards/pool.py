"""Checks in worker processes, with a time limit that holds for every answer.

An answer is any string that a model may write. A regular expression that backtracks for ever, an expression that
sympy cannot simplify, a crash of the interpreter: each costs its own answer and no other, and never the training. So
a worker is a process that can be killed (a thread cannot, and a signal does not reach C code), and it reports every
score as soon as there is one, so that it is known which answer it was at.

Workers are fresh interpreters, no forks of a process that holds an accelerator; they speak JSON, a line per chunk of
answers and a line per score. They begin with the first answers and end with the pool, or with this process.
"""

import contextlib
import importlib
import importlib.util
import json
import logging
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jrlhf.config import FILE_MODULE, UserError, from_dict, to_dict
from jrlhf.rewards.verifiers import Check

if TYPE_CHECKING:
    from jrlhf.types import Scores

CHUNK = 64  # answers that a worker is given at a time: few enough to spread, many enough to be quick
CHUNK_BYTES = 1 << 20
START_SECONDS = 300.0  # for a worker to import what it needs; a busy machine is slow
FAULTS = 10  # kinds of faults that are logged
_LOG = logging.getLogger(__name__)
_WORKER = "from jrlhf.rewards.pool import work; work()"


class Checked(NamedTuple):
    """What became of N answers."""

    values: np.ndarray  # [N] float32; NaN where there is none
    failed: np.ndarray  # [N] bool: the check raised, or its process died
    timed_out: np.ndarray  # [N] bool: the process was killed for want of time
    faults: list[str]  # what the failed ones died of, each once


@dataclass
class _Worker:
    process: subprocess.Popen
    deadline: float  # by which the next line must come
    ready: bool = False
    items: deque[int] = field(default_factory=deque)  # answers that it was given and has not scored
    buffer: bytes = b""


class CheckPool:
    """`workers` processes that score answers by one check.

    seconds: the most that one answer may take. memory: MiB that a worker may use beyond what it starts with (Linux).
    Scores do not depend on the number of workers nor on the order of the answers.
    """

    def __init__(self, check: Check, workers: int = 2, seconds: float = 5.0, memory: int = 2048) -> None:
        self.check, self.size, self.seconds, self.memory = check, workers, seconds, memory
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._close = weakref.finalize(self, _kill_all, self._workers)  # also when the interpreter ends

    def close(self) -> None:
        """End the workers; the next answers would start new ones."""
        _kill_all(self._workers)

    def start(self) -> None:
        """Begin one worker now, so that a check that cannot work here (UserError) is known before any answer is."""
        with self._lock:
            try:
                self._start(1)
                while not self._workers[0].ready:
                    self._listen(_Job([]))
            except BaseException:
                self.close()
                raise

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict]) -> Checked:
        """Score N answers. UserError when a row has not what the check needs, or the check raises a UserError."""
        items = [
            self._packed([prompt, completion, self.check.reads(row)])
            for prompt, completion, row in zip(prompts, completions, rows, strict=True)
        ]
        job = _Job(items)
        with self._lock:
            try:
                self._finish(job)
            except BaseException:  # an error, a Ctrl-C: scores that are still to come belong to no one
                self.close()
                raise
        return Checked(job.values, job.failed, job.timed_out, list(job.faults))

    def _packed(self, item: list[Any]) -> str:
        try:
            return json.dumps(item)
        except (TypeError, ValueError) as error:  # bytes; a list that holds itself
            raise UserError(
                f"the check {type(self.check).__name__} takes text, numbers and lists of such from a row: {error}"
            ) from None

    def _finish(self, job: "_Job") -> None:
        chunk = max(1, min(CHUNK, -(-len(job.items) // (2 * self.size))))
        while job.left:
            if job.waiting:
                self._discard_dead()
                self._start(min(self.size, -(-len(job.waiting) // chunk)))
            for worker in self._workers:
                if worker.ready and not worker.items and job.waiting:
                    self._give(worker, job, chunk)
            self._listen(job)

    def _discard_dead(self) -> None:
        """Those that died while idle (somebody killed them): that is no answer's fault."""
        for worker in [w for w in self._workers if not w.items and w.process.poll() is not None]:
            if not worker.ready:
                continue  # its last words say why
            self._workers.remove(worker)
            _kill(worker)

    def _start(self, wanted: int) -> None:
        while len(self._workers) < wanted:
            self._workers.append(_start_worker(self.check, self.seconds, self.memory))

    def _give(self, worker: _Worker, job: "_Job", chunk: int) -> None:
        size = 0
        while job.waiting and len(worker.items) < chunk and size < CHUNK_BYTES:
            worker.items.append(job.waiting.popleft())
            size += len(job.items[worker.items[-1]])
        line = "[" + ",".join(job.items[i] for i in worker.items) + "]\n"
        with contextlib.suppress(BrokenPipeError):  # it died over these: `_listen` sees the end of its output
            _pipe(worker.process.stdin).write(line.encode())  # ASCII: json escapes the rest
            _pipe(worker.process.stdin).flush()
        worker.deadline = time.monotonic() + self.seconds

    def _listen(self, job: "_Job") -> None:
        """Wait for scores, deaths and deadlines."""
        busy = [w for w in self._workers if w.items or not w.ready]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(_pipe(worker.process.stdout), selectors.EVENT_READ, worker)
            wait = min(w.deadline for w in busy) - time.monotonic()
            heard = [key.data for key, _ in selector.select(max(wait, 0.0))]
        for worker in heard:  # before any deadline: this process may have been away, the worker in time
            self._hear(worker, job)
        for worker in busy:
            if worker not in heard and time.monotonic() >= worker.deadline:
                if not worker.ready:
                    raise RuntimeError(f"a worker process did not start within {START_SECONDS:.0f} seconds")
                job.timed_out[worker.items[0]] = True
                self._replace(worker, job)

    def _hear(self, worker: _Worker, job: "_Job") -> None:
        data = os.read(_pipe(worker.process.stdout).fileno(), 1 << 16)
        if not data:
            if not worker.ready:
                raise RuntimeError(f"a worker process ended with code {worker.process.wait()} at its start")
            job.fail(worker.items[0], f"the process ended with code {worker.process.wait()}")
            self._replace(worker, job)
            return
        *lines, worker.buffer = (worker.buffer + data).split(b"\n")
        for line in lines:
            kind, said = json.loads(line)
            if kind == "user_error":
                raise UserError(said)
            if kind == "broken":
                raise RuntimeError(f"a worker process could not start:\n{said}")
            if kind == "ready":
                worker.ready = True
                continue
            item = worker.items.popleft()
            job.left -= 1
            if kind == "score":
                job.values[item] = said
            else:
                job.fail(item, said)
        worker.deadline = time.monotonic() + self.seconds if worker.ready else worker.deadline

    def _replace(self, worker: _Worker, job: "_Job") -> None:
        """The answer that it was at is lost; those that follow are given to another."""
        worker.items.popleft()
        job.left -= 1
        job.waiting.extendleft(reversed(worker.items))
        self._workers.remove(worker)
        _kill(worker)


class _Job:
    """Answers on their way."""

    def __init__(self, items: list[str]) -> None:
        n = len(items)
        self.items, self.waiting, self.left = items, deque(range(n)), n
        self.values = np.full(n, np.nan, np.float32)
        self.failed, self.timed_out = np.zeros(n, bool), np.zeros(n, bool)
        self.faults: dict[str, None] = {}

    def fail(self, item: int, fault: str) -> None:
        self.failed[item] = True
        self.faults[fault] = None


def _start_worker(check: Check, seconds: float, memory: int) -> _Worker:
    modules = _modules(check)
    order = {
        "check": to_dict(check, Check),
        "modules": modules,
        # The checks of an experiment file: the worker runs the file, too, for their definitions.
        "files": {m: sys.modules[m].__file__ for m in modules if m.startswith(FILE_MODULE)},
        "seconds": seconds,
        "memory": memory,
    }
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path),
        "JAX_PLATFORMS": "cpu",  # where a user's check imports jax: the accelerator is this process's
        "OPENBLAS_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", _WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # Ctrl-C is for this process alone; and what a worker starts is killed with it
    )
    _pipe(process.stdin).write(json.dumps(order).encode() + b"\n")
    _pipe(process.stdin).flush()
    return _Worker(process, time.monotonic() + START_SECONDS)


def _modules(check: Check) -> list[str]:
    """Where a check and those inside it are defined."""
    inside = (getattr(check, f.name) for f in fields(check))
    found = {
        type(check).__module__,
        *(m for part in inside if isinstance(part, Check) for m in _modules(part)),
    }
    if "__main__" in found:
        raise UserError(
            f"the check {type(check).__name__} is defined in the script that is being run, from where a worker process "
            "cannot import it; define it in an experiment file or a module of its own"
        )
    return sorted(found)


def _pipe(stream: Any) -> Any:
    assert stream is not None  # every worker has both
    return stream


def _kill(worker: _Worker) -> None:
    """The process and all that it started."""
    with contextlib.suppress(ProcessLookupError):  # it is gone, and had started nothing that is left
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    for stream in (worker.process.stdin, worker.process.stdout):
        with contextlib.suppress(BrokenPipeError):  # what was not written any more
            _pipe(stream).close()


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        _kill(workers.pop())


class Verified:
    """A check as a reward: `right` and `wrong` are the values of the scores 1 and 0, those between lie between."""

    def __init__(self, pool: CheckPool, right: float, wrong: float, failed: float, timed_out: float) -> None:
        self.pool, self.right, self.wrong, self.failed, self.timed_out = pool, right, wrong, failed, timed_out
        self._told: set[str] = set()

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict]) -> "Scores":
        """[N] float32, and which answers failed and which timed out."""
        from jrlhf.types import Scores  # imports jax

        checked = self.pool(prompts, completions, rows)
        for fault in checked.faults:  # a rate does not say why
            if fault not in self._told and len(self._told) < FAULTS:
                self._told.add(fault)
                _LOG.warning("%s failed on an answer: %s", type(self.pool.check).__name__, fault)
        values, failed, timed_out = checked.values, checked.failed, checked.timed_out
        values = np.float32(self.wrong) + np.float32(self.right - self.wrong) * values
        values = np.where(failed, np.float32(self.failed), values)
        values = np.where(timed_out, np.float32(self.timed_out), values)
        return Scores(values, failed=failed, timed_out=timed_out)

    def check_rows(self, rows: Sequence[dict]) -> None:
        """UserError for a row that lacks what the check needs."""
        for row in rows:
            self.pool.check.reads(row)


def verifier_of(noted: dict[str, Any]) -> Verified:
    """The reward that a stage Verifier noted."""
    pool = CheckPool(from_dict(Check, noted["check"]), noted["workers"], noted["seconds"], noted["memory"])
    return Verified(pool, noted["right"], noted["wrong"], noted["failed"], noted["timed_out"])


# --- in the worker ---------------------------------------------------------------------------------------------


def work() -> None:
    """The life of a worker: an order, then chunks of answers until the pipe is closed."""
    # A cluster that asks a job to stop may tell all of its processes. The one that trains saves, and scores until then.
    signal.signal(signal.SIGTERM, lambda *_: None)
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a check prints is not an answer

    def say(kind: str, what: Any = None) -> None:
        answers.write(json.dumps([kind, what]) + "\n")
        answers.flush()

    order = json.loads(sys.stdin.readline())
    try:
        check = _prepared(order)
    except UserError as error:
        return say("user_error", str(error))
    except BaseException:
        return say("broken", traceback.format_exc(limit=-3))
    say("ready")
    # Should the process that would kill this one be gone, then the kernel ends an answer that never ends.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin:
        for prompt, completion, row in json.loads(line):
            signal.setitimer(signal.ITIMER_REAL, 2 * order["seconds"] + 10)
            say(*_scored(check, prompt, completion, row))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _prepared(order: dict) -> Check:
    for module in order["modules"]:
        if module not in order["files"]:
            importlib.import_module(module)
            continue
        spec = importlib.util.spec_from_file_location(module, order["files"][module])
        if spec is None or spec.loader is None:
            raise ImportError(f"{order['files'][module]} is no Python file")
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])
    check = from_dict(Check, order["check"])
    check.prepare()
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as sizes:
            now = int(sizes.read().split()[0]) * resource.getpagesize()
        limit, (_, most) = now + order["memory"] * 2**20, resource.getrlimit(resource.RLIMIT_AS)
        # The hard limit stays: a process that a check starts may have more than the worker.
        resource.setrlimit(resource.RLIMIT_AS, (limit if most < 0 else min(limit, most), most))
    return check


def _scored(check: Check, prompt: str, completion: str, row: dict) -> tuple[str, Any]:
    try:
        value = float(check.score(prompt, completion, row))
    except UserError as error:
        return "user_error", str(error)
    except (
        BaseException
    ) as error:  # a check's own mistake, no memory, sys.exit: counted, and the next one is scored
        return "failed", f"{type(error).__name__}: {str(error)[:200]}"
    return ("score", value) if math.isfinite(value) else ("failed", f"the score is {value}")
