"""Program rewards: functions `(prompts, completions, rows) -> [N] float32`, by name."""

from jrlhf.types import RewardFn

REWARDS: dict[str, RewardFn] = {}
