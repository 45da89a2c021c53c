"""B3: best-of-n and its over-optimisation: gold reward against n, for a learned reward and for gold itself.

The learned reward is a proxy: choosing harder by it raises gold reward first and lowers it later (Gao et al. 2022), as
R(d) = d(a - b d) with d the square root of the KL. Choosing by gold itself only rises.

Command    jrlhf run experiments/larder/best_of_n.py --seeds 0 1 2 3 4 --seed_from preferences
Hardware   two CPU cores, 3 GiB of memory
Time       about 10 minutes with five seeds
Expected   peak at n in 4 to 32; gold at 256 at most 0.8 of it; R(d) fits with R² >= 0.97, better than d(a - b log d)
Measured   five seeds: peak at n 8 to 16, gold at 256 0.75 of it; R² 0.95, against 0.80 of the other form (docs/lab.md)
"""

from ppo_vs_dpo import answers, evaluation_prompts
from ppo_vs_dpo import experiment as base

from jrlhf.experiment import Experiment
from jrlhf.training.stages import BestOfN


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
        **{name: base.stages[name] for name in ("pretrain", "sft", "preferences", "reward_model")},
        "by_reward_model": best_of("reward_model"),
        "by_gold": best_of("larder_gold"),
    },
)
