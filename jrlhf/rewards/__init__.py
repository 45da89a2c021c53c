"""Program rewards: functions `(prompts, completions, rows) -> [N] float32`, by name.

`rows` are the prompts' own rows, with `ended` (bool) added: whether the completion ended by a stop token. To add a
reward: one function, and its line here.
"""

from jrlhf.rewards.stories import happy_ending, happy_story_with_word
from jrlhf.types import RewardFn

REWARDS: dict[str, RewardFn] = {
    "happy_ending": happy_ending,
    "happy_story_with_word": happy_story_with_word,
}
