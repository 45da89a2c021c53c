"""The tiny experiment in a process that a signal reaches at one chosen moment.

The environment variable MOMENT is "<signal> <kind of stage> <when> <number>":

    logged n      after the metrics of step n were written
    evaluated n   after its evaluation was written as well, before anything is saved
    saving n      in the middle of the checkpoint of step n: the arrays are there, the manifest is not
    sampled n     after the n-th rollout of many rows, before anything of it is written
"""

import os
import signal
import time
from pathlib import Path

from tiny import experiment

from jrlhf import checkpoint, metrics
from jrlhf.training import evaluation

__all__ = ["experiment"]


moment = os.environ.get("MOMENT", "").split()


def strike(kind: str, when: str, number: int) -> None:
    if moment[1:] == [kind, when, str(number)]:
        os.kill(os.getpid(), getattr(signal, moment.pop(0)))


def kind_of(folder: Path) -> str:
    return folder.name.rpartition("-")[0]


log, write_manifest, sample = metrics.MetricLogger.log, checkpoint._write_manifest, evaluation.Sampler.sample
sampled = 0


def log_and_strike(self, step, values, always=False):
    log(self, step, values, always)
    when = "evaluated" if any(name.startswith("eval/") for name in values) else "logged"
    folder = Path(self._file.name).parent
    while list(folder.glob("checkpoints/saving-*")) and moment[2:3] == [when]:
        time.sleep(0.01)  # checkpoints are written in the background: let the one before be complete
    strike(kind_of(folder), when, step)


def strike_and_write_manifest(path, content):
    if path.parent.name.startswith("saving-step-"):
        strike(kind_of(path.parent.parent.parent), "saving", content["step"])
    write_manifest(path, content)


def sample_and_strike(*args, **options):
    global sampled
    out = sample(*args, **options)
    sampled += 1
    strike("any", "sampled", sampled)
    return out


metrics.MetricLogger.log = log_and_strike
checkpoint._write_manifest = strike_and_write_manifest
evaluation.Sampler.sample = sample_and_strike
