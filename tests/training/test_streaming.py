"""A source that is read as training goes: nothing is in memory, and the position is part of the checkpoint."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import tiny
from tiny_runs import QUIET, folders, only, trained

from jrlhf.config import STOP, Preempted, Source, UserError
from jrlhf.data.sources import HubSource
from jrlhf.experiment import check, run
from jrlhf.lab import LarderDemonstrations


@dataclass(frozen=True)
class Endless(Source):
    """Demonstrations without end, of which each is read once; counts what was read."""

    streaming: bool = True

    def rows(self) -> Iterator[dict]:
        for n, row in enumerate(LarderDemonstrations(size=10_000).rows()):
            Endless.furthest = max(Endless.furthest, n)
            yield row


Endless.furthest = 0


def streaming(**loop):
    sft = replace(
        tiny.experiment.stages["sft"], data=Endless(), loop=tiny.loop(6, **loop), length=32, too_long="error"
    )
    return only("pretrain", sft=sft)


def numbers(folder) -> list[dict]:
    """What training computed, without what the clock and the compiler say."""
    return [{k: v for k, v in row.items() if k[:5] not in ("time/", "perf/")} for row in trained(folder)]


def test_a_stream_is_read_only_as_far_as_it_is_needed_and_resumes_where_it_stopped(tmp_path, monkeypatch):
    whole = run(streaming(), tmp_path / "whole", console=QUIET)
    assert Endless.furthest < 2000  # eval rows, two blocks of the shuffle, and no more

    from jrlhf.training import loop

    class StopAfterThree(loop.MetricLogger):
        def log(self, step, metrics, **more):
            super().log(step, metrics, **more)
            if step == 3 and "train/loss" in metrics and self.folder.name.startswith("sft"):
                STOP.request()

        def __init__(self, folder, **more):
            self.folder = folder
            super().__init__(folder, **more)

    monkeypatch.setattr(loop, "MetricLogger", StopAfterThree)
    with pytest.raises(Preempted):
        run(streaming(), tmp_path / "stopped", console=QUIET)
    STOP.clear()
    monkeypatch.undo()
    resumed = run(streaming(), tmp_path / "stopped", console=QUIET)
    assert numbers(folders(resumed)["sft"]) == numbers(folders(whole)["sft"])


def test_a_hub_dataset_streams(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(r) + "\n" for r in LarderDemonstrations(size=64).rows()))
    source = HubSource("json", "demonstration", data_files=(str(rows),), streaming=True)
    sft = replace(tiny.experiment.stages["sft"], data=source, loop=tiny.loop(3), length=32)
    folder = folders(run(only("pretrain", sft=sft), tmp_path / "runs", console=QUIET))["sft"]
    assert [row["step"] for row in trained(folder)] == [1, 2, 3]


def test_the_length_of_a_stream_is_not_known():
    sft = streaming().stages["sft"]
    sft = replace(sft, loop=replace(sft.loop, steps=0, epochs=1.0))
    with pytest.raises(UserError, match="length of a stream is not known"):
        check(only("pretrain", sft=sft))


def test_a_tokenizer_is_not_trained_on_a_stream():
    pretrain = replace(tiny.experiment.stages["pretrain"], data=Endless())
    with pytest.raises(UserError, match=r"tokenizer\.path"):
        check(replace(only("pretrain"), stages={"pretrain": pretrain}))
