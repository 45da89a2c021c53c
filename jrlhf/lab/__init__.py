"""The built-in worlds: text generators, their gold rewards and simulated labellers, all of known truth."""

from functools import partial
from typing import TYPE_CHECKING

from jrlhf.lab.labelers import LarderLabelers, group_gold, pair_probabilities, rank_by_utility
from jrlhf.lab.larder import (
    LarderDemonstrations,
    LarderPrompts,
    LarderText,
    LarderVocabulary,
    demonstrate,
    gold_maximum,
    gold_scores,
    ideal_response,
    larder_gold,
    parse_completion,
    parse_prompt,
    vocabulary,
)
from jrlhf.lab.sorter import (
    SorterDemonstrations,
    SorterPrompts,
    SorterSteps,
    SorterText,
    SorterVocabulary,
    sorter_answer,
    sorter_gold,
    sorter_maximum,
    sorter_scores,
    sorter_so_far,
    sorter_steps,
    step_labels,
)

if TYPE_CHECKING:
    from jrlhf.types import RewardFn

# The rewards that the lab offers by name: each a `jrlhf.types.RewardFn`.
REWARDS: "dict[str, RewardFn]" = {
    "larder_gold": larder_gold,
    "larder_gold_A": partial(group_gold, "A"),
    "larder_gold_B": partial(group_gold, "B"),
    "larder_gold_C": partial(group_gold, "C"),
    "sorter_answer": sorter_answer,
    "sorter_gold": sorter_gold,
    "sorter_so_far": sorter_so_far,
    "sorter_steps": sorter_steps,
}

# What is known of some rewards: the mean over prompts of the best possible value, and the criteria behind them.
_SORTER = ("sorter_answer", "sorter_gold", "sorter_steps")
MAXIMA = {"larder_gold": gold_maximum, **dict.fromkeys(_SORTER, sorter_maximum)}
CRITERIA = {"larder_gold": gold_scores, **dict.fromkeys(_SORTER, sorter_scores)}

__all__ = [
    "CRITERIA",
    "MAXIMA",
    "REWARDS",
    "LarderDemonstrations",
    "LarderLabelers",
    "LarderPrompts",
    "LarderText",
    "LarderVocabulary",
    "SorterDemonstrations",
    "SorterPrompts",
    "SorterSteps",
    "SorterText",
    "SorterVocabulary",
    "demonstrate",
    "gold_maximum",
    "gold_scores",
    "group_gold",
    "ideal_response",
    "larder_gold",
    "pair_probabilities",
    "parse_completion",
    "parse_prompt",
    "rank_by_utility",
    "sorter_answer",
    "sorter_gold",
    "sorter_maximum",
    "sorter_scores",
    "sorter_so_far",
    "sorter_steps",
    "step_labels",
    "vocabulary",
]
