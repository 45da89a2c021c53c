"""Simulated labellers whose taste is any program reward."""

from dataclasses import dataclass

import numpy as np

from jrlhf.config import Labeler, UserError
from jrlhf.data.chat import prompt_text
from jrlhf.lab import rank_by_utility
from jrlhf.training.rewards import program_reward
from jrlhf.types import PreferenceRow


@dataclass(frozen=True)
class RewardLabeler(Labeler):
    """Ranks answers by a reward with Plackett-Luce noise (Bradley-Terry for pairs).

    An answer of reward r is preferred with odds exp(r / temperature); `flip` is the share of labels turned round;
    pairs of rewards closer than `tie_threshold` are ties.
    """

    reward: str
    temperature: float = 0.25
    flip: float = 0.0
    tie_threshold: float = 0.0

    def __post_init__(self):
        if self.temperature <= 0:
            raise UserError(f"RewardLabeler.temperature must be positive, got {self.temperature}")
        if not 0 <= self.flip <= 0.5:
            raise UserError(f"RewardLabeler.flip must be in [0, 0.5], got {self.flip}")

    def label(self, rows: list[dict], responses: list[list[str]], seed: int) -> list[PreferenceRow]:
        reward, rng = program_reward(self.reward), np.random.default_rng(seed)
        k = len(responses[0])
        flat = [dict(row, ended=end) for row in rows for end in row.get("ended", [True] * k)]
        scores = reward(
            [prompt_text(row["prompt"]) for row in flat],
            [text for group in responses for text in group],
            flat,
        )
        out: list[PreferenceRow] = []
        for row, group, values in zip(rows, responses, np.asarray(scores).reshape(-1, k), strict=True):
            ranks = rank_by_utility(
                values.tolist(),
                rng,
                temperature=self.temperature,
                tie_threshold=self.tie_threshold,
                flip=self.flip,
            )
            out.append(
                {
                    "prompt": row["prompt"],
                    "responses": group,
                    "ranks": [int(r) for r in ranks],
                    "scores": [float(v) for v in values],
                    "labeler": self.reward,
                }
            )
        return out
