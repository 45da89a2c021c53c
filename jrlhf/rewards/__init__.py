"""Program rewards: functions `(prompts, completions, rows) -> [N] float32`, by name.

`rows` are the prompts' own rows, with `ended` (bool) added: whether the completion ended by a stop token. To add a
reward: one function, and its line here.
"""

from typing import TYPE_CHECKING

from jrlhf.rewards.stories import happy_ending, happy_story_with_word

if TYPE_CHECKING:  # it imports jax, and the worker processes of `pool` import this file
    from jrlhf.types import RewardFn

REWARDS: "dict[str, RewardFn]" = {
    "happy_ending": happy_ending,
    "happy_story_with_word": happy_story_with_word,
}
