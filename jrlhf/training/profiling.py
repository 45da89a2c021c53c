"""Traces of some steps of a training loop, for XProf (`tensorboard --logdir`) or Perfetto: a command line or a signal
asks for them."""

import re
from pathlib import Path
from typing import Any

import jax

from jrlhf.config import UserError
from jrlhf.sharding import leads

STEPS = 5  # that a signal asks for


class Profiling:
    """What is asked of the loops of this process: steps by number, and the next ones."""

    def __init__(self) -> None:
        self._steps = range(0)
        self._asked = False
        self._until = 0  # the step before which the trace under way ends; 0: none is
        self._folder = Path()

    def plan(self, steps: str) -> None:
        """steps: FIRST:LAST of every loop, counted from 1; UserError unless it is so written."""
        found = re.fullmatch(r"(?:steps=)?(\d+):(\d+)", steps)
        if not found or not 0 < int(found[1]) <= int(found[2]):
            raise UserError(
                f"--profile: expected FIRST:LAST, two steps counted from 1, such as 10:15; got {steps!r}"
            )
        self._steps = range(int(found[1]) - 1, int(found[2]))

    def ask(self) -> None:
        """Of a signal: the next steps are traced, unless some are already."""
        self._asked = True

    def before(self, step: int, folder: Path, state: Any) -> str:
        """Called before each step (counted from 0). Begins or ends a trace where that is due; what to tell of it."""
        if self._until and step >= self._until:
            return self.end(state)
        if self._until or not (self._asked or step in self._steps):
            return ""
        self._until = step + STEPS if self._asked else self._steps.stop
        self._asked = False
        jax.block_until_ready(state)  # what went before is no part of it
        # Processes on one host, or with one shared folder, must not write the same files.
        self._folder = folder if leads() else folder / f"process-{jax.process_index()}"
        jax.profiler.start_trace(self._folder)
        return f"tracing steps {step + 1} to {self._until}"

    def end(self, state: Any = None) -> str:
        """Ends a trace that is under way, once `state` is there; what to tell of it."""
        if not self._until:
            return ""
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        self._until = 0
        return f"the trace is in {self._folder}"


PROFILING = Profiling()
