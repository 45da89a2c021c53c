"""The built-in world: a text generator, its gold reward and simulated labellers, all of known truth."""

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

if TYPE_CHECKING:
    from jrlhf.types import RewardFn

# The rewards that the lab offers by name: each a `jrlhf.types.RewardFn`.
REWARDS: "dict[str, RewardFn]" = {
    "larder_gold": larder_gold,
    "larder_gold_A": partial(group_gold, "A"),
    "larder_gold_B": partial(group_gold, "B"),
}

# What is known of some rewards: the mean over prompts of the best possible value, and the criteria they sum.
MAXIMA = {"larder_gold": gold_maximum}
CRITERIA = {"larder_gold": gold_scores}

__all__ = [
    "CRITERIA",
    "MAXIMA",
    "REWARDS",
    "LarderDemonstrations",
    "LarderLabelers",
    "LarderPrompts",
    "LarderText",
    "LarderVocabulary",
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
    "vocabulary",
]
