"""Several sources as one."""

from collections.abc import Iterator
from dataclasses import dataclass

from jrlhf.config import Source, UserError


@dataclass(frozen=True)
class Mixture(Source):
    """The rows of several sources, one after another: demonstrations and what a stage revised (`StageRows`), say."""

    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("Mixture.sources must not be empty")
        for source in self.sources:
            if getattr(source, "streaming", False):
                raise UserError(
                    f"Mixture.sources: {type(source).__name__} is a stream, which has no end to go on from"
                )

    def rows(self) -> Iterator[dict]:
        for source in self.sources:
            yield from source.rows()

    # `files` stays empty: a stage looks into nested sources itself, and a dry run must not read what is yet to be left.
