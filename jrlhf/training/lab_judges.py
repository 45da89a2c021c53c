"""The laboratory's judges as configs name them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jrlhf.config import UserError
from jrlhf.lab.judges import larder_reply, larder_verdict
from jrlhf.rewards.judges import Program


@dataclass(frozen=True)
class LarderJudge(Program):
    """Replies on Larder, right with probability `accuracy` (`jrlhf.lab.judges`): a judge and a writer."""

    accuracy: float = 0.9
    position_bias: float = 0.0  # how often the first of two answers is taken unread
    seed: int = 0

    def __post_init__(self):
        for name in ("accuracy", "position_bias"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"LarderJudge.{name} is a probability, got {getattr(self, name)}")

    def verdicts(self, questions: Sequence[str], options: Sequence[str]) -> np.ndarray:
        said = [larder_verdict(q, options, self.accuracy, self.position_bias, self.seed) for q in questions]
        return np.asarray(said, np.float64).reshape(len(questions), len(options))

    def write(self, questions: Sequence[str], seed: int) -> list[str | None]:
        return [larder_reply(question, self.accuracy, self.seed + seed) for question in questions]
