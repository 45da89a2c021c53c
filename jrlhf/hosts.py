"""The processes that run one experiment together, one on each host of a cluster: how they join, stop and fail together.

jax's own runtime does the work (`jax.distributed`): it finds the others, tells all when one is to be preempted, and
ends a process whose peers are gone.
"""

import faulthandler
import functools
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jrlhf.config import STOP, Preempted, UserError

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
    check_cluster(coordinator, processes, process)
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except ValueError as e:
        raise UserError(f"--distributed: jax found no cluster to join ({e})") from e
    except RuntimeError as e:
        if not is_loss(e):
            raise UserError(f"--distributed: jax could not join the others ({e})") from e
        print(f"the other hosts did not come in time ({e})", file=sys.stderr)
        raise SystemExit(os.EX_TEMPFAIL) from e


def check_cluster(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """UserError for arguments of `join` that do not go together."""
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < 3:
        raise UserError(f"{', '.join(given)} go together: {', '.join(missing)} is missing")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(
            f"--process: {process} is none of the {processes} processes, which are numbered from 0"
        )


def is_loss(error: Exception) -> bool:
    """Whether an error says that another process is gone. (An exchange raises a ValueError or a RuntimeError.)"""
    said = str(error).lower()
    return isinstance(error, (ValueError, RuntimeError)) and any(word in said for word in LOSSES)


def exchanged(data: bytes) -> list[bytes]:
    """What every process says, in the order of their numbers, on all of them; all must call it."""
    from jax.experimental import multihost_utils

    with WAITS:
        lengths = multihost_utils.process_allgather(np.int32(len(data)))
        padded = np.zeros(int(lengths.max()), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        rows = multihost_utils.process_allgather(padded)
    return [row[:n].tobytes() for row, n in zip(rows, lengths, strict=True)]


def told_by_all(who: str, say: Callable[[], bytes]) -> list[bytes]:
    """What `say` returns on each process, on all of them: `exchanged`, but a trouble of one is an error on all."""
    said, trouble = b"", None
    try:
        said = say()
    except Exception as error:  # the others wait for this one
        trouble = error
    told = exchanged(b"!" + str(trouble).encode() if trouble is not None else b"." + said)
    if trouble is not None:
        raise trouble
    for process, what in enumerate(told):
        if what[:1] == b"!":
            raise UserError(f"{who} failed on process {process}: {what[1:].decode()}")
    return [what[1:] for what in told]


def own_share(count: int, processes: int, process: int) -> tuple[int, int]:
    """Which [first, last) of `count` things in a row are a process's own: about as many as anybody's."""
    return round(count * process / processes), round(count * (process + 1) / processes)


def agreed(decision: bool) -> bool:
    """What the first process decided, on every process; they wait for each other. (Of several, sums may differ in the
    last bit, and a file may be there for one before it is for another.)"""
    if jax.process_count() == 1:
        return decision
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(decision)))


# --- how long each takes ----------------------------------------------------------------------------------------


class Waits:
    """Seconds that this process has waited, within `with`, for its devices or for other processes."""

    def __init__(self) -> None:
        self.seconds = self._since = 0.0

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._since


WAITS = Waits()
LOOK = 20  # steps between two looks at how long each host takes


class HostTimes:
    """How long a step takes each of several hosts by itself. All of them wait for the slowest, so that the time of a
    whole step tells nothing; what a host did not wait tells which it is.

    What each says goes to all as an array that is fetched a step later: nothing waits for it.
    """

    def __init__(self) -> None:
        self._sum, self._steps, self._peak = np.zeros(2, np.float32), 0, 0.0
        self._coming: jax.Array | None = None

    def step(self, own: float, data: float, peak: float) -> np.ndarray | None:
        """Takes in a step: seconds that it took this process by itself, those that it waited for its batch, and the
        most memory in use on its fullest device. [hosts, 3] of the same, means of the last LOOK steps (memory: the
        most), in a step in which they have come. All processes must call it equally often."""
        coming, self._coming = self._coming, None
        told = None if coming is None else np.asarray(coming)
        self._sum += (own, data)
        self._steps, self._peak = self._steps + 1, max(self._peak, peak)
        if self._steps == LOOK:
            self._coming = by_host(np.asarray([*self._sum / LOOK, self._peak], np.float32))
            self._sum, self._steps = np.zeros(2, np.float32), 0
        return told


def by_host(row: np.ndarray) -> jax.Array:
    """[hosts, n] of every process's [n], on each of them when it has come; all must call it."""
    split, gather = _host_mesh()
    return gather(jax.make_array_from_process_local_data(split, row[None]))


@functools.cache
def _host_mesh() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """A row on the first device of each process, and a program, compiled once, that gives all of them to each."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.asarray([first[i] for i in sorted(first)]), ("host",))
    return NamedSharding(mesh, P("host")), jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))


# --- stopping ---------------------------------------------------------------------------------------------------


_calls = itertools.count(1)


def heed_stop(done: str) -> None:
    """Within work that can be ended between two parts of it: Preempted where it is to stop now; `done` says how far it
    has come. All processes must call it equally often."""
    WATCH.moved(done)
    if stop_requested():
        raise Preempted(done)


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
