"""What the workers of all libraries share: when they start and stop the clock. Needs nothing but Python.

A worker is one process: one library at one workload. It trains in the library's own loop and comes to `Gate.passed`
after every segment of so many steps, when nothing is under way any more. There it says what the segment took and waits
until it is told to go on: the workers of other libraries run meanwhile, one at a time.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

WARM_UP = 2  # segments before the first that counts: one that compiles and one to settle


class Stop(Exception):
    """The benchmark is over; it leaves the library's loop."""


class NotOffered(Exception):
    """The library has no such thing."""


class Gate:
    """Between segments. `answer` are lines to the parent, `told` lines from it."""

    def __init__(self, versions: dict[str, str], settings: str, answer: Any, told: Any):
        self._about = {"versions": versions, "settings": settings}
        self._answer, self._told = answer, told
        self._segments: list[float] = []
        self._began = time.perf_counter()

    def passed(self, tokens: int) -> None:
        """The end of a segment that was of use for so many tokens. Raises Stop at the last."""
        self._segments.append(time.perf_counter() - self._began)
        if len(self._segments) == WARM_UP:
            self._say({"ready": self._about | {"warm_up_s": self._segments}})
        elif len(self._segments) > WARM_UP:
            self._say({"seconds": self._segments[-1], "tokens": int(tokens), "peak_rss_mb": peak_rss_mb()})
        if len(self._segments) >= WARM_UP and self._told.readline().strip() != "go":
            raise Stop
        self._began = time.perf_counter()

    def _say(self, what: dict) -> None:
        self._answer.write(json.dumps(what) + "\n")
        self._answer.flush()


def peak_rss_mb() -> float:
    """Of this process so far. Linux counts a new program anew in VmHWM, but not in what getrusage tells."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


def use_cores(threads: int) -> None:
    """This process and its threads on so many cores. Before numerical libraries are imported."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)


def main(run: Callable[[dict, Callable[..., Gate]], None]) -> None:
    """`worker.py SPEC`: what a library's script does. run: (spec, gate of (versions, settings)); it ends by Stop."""
    answer, told = os.fdopen(os.dup(1), "w"), sys.stdin
    os.dup2(2, 1)  # what libraries print goes to the log
    spec = json.loads(Path(sys.argv[1]).read_text())
    use_cores(spec["threads"])
    code = 0
    try:
        run(spec, lambda versions, settings="": Gate(versions, settings, answer, told))
    except Stop:
        pass
    except NotOffered as error:
        answer.write(json.dumps({"error": str(error)}) + "\n")
    except BaseException as error:
        import traceback

        traceback.print_exc()
        answer.write(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}) + "\n")
        code = 1
    answer.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a library may wait for work that will never come


def data_of(spec: dict) -> dict:
    return json.loads(Path(spec["data"]).read_text())


def variety(completions: Iterable[str]) -> list[float]:
    """A reward that costs nothing: the share of an answer's words that are different ones."""
    return [len(set(words)) / max(len(words), 1) for words in map(str.split, completions)]


def useful(ids: Sequence[int], stops: set[int]) -> int:
    """Tokens up to the first stop token, itself included."""
    return next((n for n, token in enumerate(ids, 1) if token in stops), len(ids))


def words(ids: Iterable[int]) -> str:
    """Text that the tokenizer of words (`w17`) turns into these ids."""
    return " ".join(f"w{i}" for i in ids)
