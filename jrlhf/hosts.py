"""The processes that run one experiment together, one on each host of a cluster: how they join, stop and fail together.

jax's own runtime does the work (`jax.distributed`): it finds the others, tells all when one is to be preempted, and
ends a process whose peers are gone.
"""

import faulthandler
import itertools
import os
import sys
import threading
import time

import jax
import numpy as np

from jrlhf.config import STOP, UserError

AGAIN = "The same command, on all hosts, goes on from the last checkpoint."
# What jax and the libraries under it say where another process is no longer there.
LOSSES = (
    "gloo",
    "nccl",
    "connection",
    "unavailable",
    "deadline_exceeded",
    "heartbeat",
    "coordination service",
)


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the others. Without arguments jax asks the cluster who they are (SLURM, Cloud TPU, Kubernetes, MPI).

    coordinator: HOST:PORT of process 0, which the others reach. UserError where there is nobody to join.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < 3:
        raise UserError(f"{', '.join(given)} go together: {', '.join(missing)} is missing")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(
            f"--process: {process} is none of the {processes} processes, which are numbered from 0"
        )
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except ValueError as e:
        raise UserError(f"--distributed: jax found no cluster to join ({e})") from e
    except RuntimeError as e:
        if not is_loss(e):
            raise UserError(f"--distributed: jax could not join the others ({e})") from e
        print(f"the other hosts did not come in time ({e})", file=sys.stderr)
        raise SystemExit(os.EX_TEMPFAIL) from e


def is_loss(error: Exception) -> bool:
    """Whether an error says that another process is gone. (An exchange raises a ValueError or a RuntimeError.)"""
    said = str(error).lower()
    return isinstance(error, (ValueError, RuntimeError)) and any(word in said for word in LOSSES)


def exchanged(data: bytes) -> list[bytes]:
    """What every process says, in the order of their numbers, on all of them; all must call it."""
    from jax.experimental import multihost_utils

    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:n].tobytes() for row, n in zip(rows, lengths, strict=True)]


_calls = itertools.count(1)


def stop_requested() -> bool:
    """Whether to save and stop now, which all processes are told at the same call; all must call it equally often.

    Of one process: whether it was asked to. Of several, a SIGTERM to any is a notice to all, which jax passes on; they
    stop at the next call that all can still reach.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(next(_calls)):
            STOP.request()
    return STOP.requested


LAST = 15.0  # seconds that the first process waits longer


class Watch:
    """Ends the process when nothing has moved for too long: where one host hangs, the others wait for it for ever.

    It tells where every thread stands. All hosts wait for the one that hangs, so that all of them end; the first
    process last, for jax ends the others with it.
    """

    def __init__(self) -> None:
        self._limit = self._wait = 0.0
        self._moved = 0.0
        self._last = ""

    def start(self, limit: float) -> None:
        """limit: seconds without a call of `moved` that are too many."""
        self._limit, self._wait = limit, limit + (LAST if jax.process_index() == 0 else 0.0)
        self.moved("the start")
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def moved(self, what: str) -> None:
        """Something was done: `what` it was is said if nothing follows."""
        self._moved, self._last = time.monotonic(), what

    def _look(self) -> None:
        while time.monotonic() - self._moved < self._wait:
            time.sleep(min(self._limit / 10, 5.0))
        faulthandler.dump_traceback(all_threads=True)
        leave(
            f"nothing has moved for {self._limit:.0f} s since {self._last} (--stall-timeout): this host or another "
            f"hangs. What each thread of this one was doing is above. {AGAIN}"
        )


WATCH = Watch()


def leave(why: str, code: int = os.EX_TEMPFAIL) -> None:
    """Ends this process of several at once, without waiting for the others, which may never come."""
    print(f"process {jax.process_index()} of {jax.process_count()}: {why}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
