"""B3: best-of-n and its over-optimisation: gold reward against n, for a learned reward and for gold itself.

The learned reward is a proxy: choosing harder by it raises gold reward first and lowers it later (Gao et al. 2022), as
R(d) = d(a - b d) with d the square root of the KL. Choosing by gold itself only rises.

Command    jrlhf run experiments/larder/best_of_n.py --seeds 0 1 2 3 4 --seed_from preferences
Hardware   two CPU cores, 3 GiB of memory
Time       about 10 minutes with five seeds
Expected   peak at n in 4 to 32; gold at 256 at most 0.8 of it; R(d) fits with R² >= 0.97, better than d(a - b log d)
"""

from dataclasses import replace

from ppo_vs_dpo import answers, evaluation_prompts
from ppo_vs_dpo import experiment as base

from jrlhf.experiment import Experiment
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import BestOfN, Preferences

# Four thousand comparisons of two answers: a proxy that is right in most pairs, and wrong often enough.
preferences = base.stages["preferences"]
assert isinstance(preferences, Preferences)
weak = {
    "preferences": replace(preferences, responses=2),
    "reward_model": replace(base.stages["reward_model"], loop=LoopConfig(epochs=3, batch_size=32)),
}


def best_of(reward: str) -> BestOfN:
    return BestOfN(
        start="sft",
        reward=reward,
        gold="larder_gold",
        prompts=evaluation_prompts["eval"],
        samples=256,
        sampling=answers,
    )


experiment = Experiment(
    name="larder-best-of-n",
    stages={
        "pretrain": base.stages["pretrain"],
        "sft": base.stages["sft"],
        **weak,
        "by_reward_model": best_of("reward_model"),
        "by_gold": best_of("larder_gold"),
    },
)
