"""A program that says whether answers are right, as a reward."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import jrlhf.rewards.programs  # noqa: F401  # so that a config.json may name its check
from jrlhf.config import REWARD_MODEL, Source, Stage, StageContext, UserError, no_fingerprint, to_dict
from jrlhf.rewards.pool import CheckPool
from jrlhf.rewards.verifiers import Check
from jrlhf.training.rewards import VERIFIER
from jrlhf.training.stages.common import write_text


@dataclass(frozen=True)
class Verifier(Stage):
    """The reward is what `check` (a Number, a Program, ...; docs/verifiers.md) says of each answer.

    Answers are checked in `workers` processes. One that takes longer than `seconds` is given up, its worker killed, and
    earns `timed_out`; one over which the check or its process breaks earns `failed`. Both are logged as rates. Neither
    may be more than `wrong`, or a policy would learn to break its checks. Leaves `verifier.json`.
    """

    artifact: ClassVar[str] = REWARD_MODEL
    only_notes: ClassVar[bool] = True

    check: Check
    seconds: float = 5.0  # for one answer, all its tests included
    workers: int = no_fingerprint(2)
    memory: int = 2048  # MiB that a worker may use beyond what it starts with (Linux)
    right: float = 1.0
    wrong: float = 0.0
    failed: float | None = None  # None: as `wrong`
    timed_out: float | None = None

    def validate(self, stages):
        for field in ("seconds", "workers", "memory"):
            if not 0 < getattr(self, field) < math.inf:
                raise UserError(f"{field} must be positive, got {getattr(self, field)}")
        rewards = {"right": self.right, "wrong": self.wrong, **self._broken()}
        for field, value in rewards.items():
            if not math.isfinite(value):
                raise UserError(f"{field} is a reward and must be finite, got {value}")
        for field, value in self._broken().items():
            if value > self.wrong:
                raise UserError(
                    f"{field} {value} must not be more than wrong {self.wrong}: it would pay to break the check. "
                    "Leave it out to make them equal"
                )
        if self.right <= self.wrong:
            raise UserError(f"right {self.right} must be more than wrong {self.wrong}")
        self.check.validate()
        for where, source in self._prompts(stages):
            row = next(iter(source.rows()), None)
            if row is not None:
                try:
                    self.check.reads(row)
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None

    def _broken(self) -> dict[str, float]:
        given = {"failed": self.failed, "timed_out": self.timed_out}
        return {name: self.wrong if value is None else value for name, value in given.items()}

    def _prompts(self, stages: Mapping[str, Stage]) -> Iterator[tuple[str, Source]]:
        """Prompts in local files whose answers this stage is named to score."""
        mine = [name for name, stage in stages.items() if stage is self]
        for name, stage in stages.items():
            if not any(reference.name in mine for reference in stage.references()):
                continue
            for field in ("prompts", "eval_prompts"):
                given = getattr(stage, field, None)
                for source in given.values() if isinstance(given, Mapping) else [given]:
                    if isinstance(source, Source) and _is_local(source):
                        yield f"stages.{name}.{field}", source

    def run(self, ctx: StageContext) -> dict:
        pool = CheckPool(self.check, 1, self.seconds, self.memory)
        pool.start()  # not here: this process holds an accelerator, and what a check tries may fork
        pool.close()
        fields = asdict(self) | self._broken() | {"check": to_dict(self.check, Check)}
        write_text(ctx.folder / VERIFIER, json.dumps(fields))
        return {}


def _is_local(source: Source) -> bool:
    files = source.files()
    return bool(files) and all(Path(f).is_file() for f in files)
