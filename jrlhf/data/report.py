"""What became of the rows: a small count that every reader and encoder fills and the caller logs."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """`kept` rows went on, `dropped` counts the others by reason, `changed` kept rows that were cut."""

    where: str = ""
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    @property
    def read(self) -> int:
        return self.kept + self.dropped.total()

    def __str__(self) -> str:
        parts = [f"{self.kept} of {self.read} rows kept"]
        parts += [f"dropped {n}: {why}" for why, n in self.dropped.most_common()]
        parts += [f"changed {n}: {why}" for why, n in self.changed.most_common()]
        return (f"{self.where}: " if self.where else "") + "; ".join(parts)
