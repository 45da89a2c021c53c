"""What became of the rows: a small count that every reader and encoder fills and the caller logs."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """`kept` rows went on, `dropped` counts the others by reason, `changed` kept rows that were cut or mended.

    `first` holds, for a reason, the place of the first such row; `notes` what else the reader decided.
    """

    where: str = ""
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def drop(self, why: str, place: str) -> None:
        """Count a row that does not go on, and remember where the first of its kind stands."""
        self.dropped[why] += 1
        self.first.setdefault(why, place)

    def change(self, why: str, place: str) -> None:
        """Count a row that goes on, but not as it was."""
        self.changed[why] += 1
        self.first.setdefault(why, place)

    @property
    def read(self) -> int:
        return self.kept + self.dropped.total()

    def __str__(self) -> str:
        parts = [*self.notes, f"{self.kept} of {self.read} rows kept"]
        parts += [f"dropped {n}: {why}{self._example(why)}" for why, n in self.dropped.most_common()]
        parts += [f"changed {n}: {why}{self._example(why)}" for why, n in self.changed.most_common()]
        return (f"{self.where}: " if self.where else "") + "; ".join(parts)

    def _example(self, why: str) -> str:
        """Where to look: a place ends with "line 3", "row 3" or "item 3" of the file that `where` names."""
        return f" (first: {' '.join(self.first[why].split()[-2:])})" if why in self.first else ""
