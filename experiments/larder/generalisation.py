"""What carries over to prompts of families that training never saw: few, many, and more diverse prompts.

The report's tables of the held-out splits (four items, new pairs of items, a new instruction) give each policy's gain
over SFT there, and its `gap`: its own gold on the prompts of the training distribution less that on these. A split may
be harder for everyone, and its maximum another: SFT's gap tells. What PPO and DPO learned carries over as far as their
gain does, or in other words as far as their gap is no larger than SFT's.

PPO asks few prompts again and again, many, or many that also name two further items. DPO learns from few prompts with
nine answers to each, or many with four: the same number of pairs. All else, the updates included, is equal.

Command    jrlhf run experiments/larder/generalisation.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 10 minutes more than ppo_vs_dpo.py, of which it uses the first stages
Expected   gains on held-out prompts about as large as on those of the training distribution; few prompts cost gold
Measured   one seed, gain over SFT on prompts like those of training / four items / new pairs / a new instruction:
           PPO 0.74 / 0.74 / 0.83 / 0.82, with 128 prompts 0.64 / 0.57 / 0.71 / 0.76, with further items 0.74 / 0.69 /
           0.85 / 0.76; DPO 0.54 / 0.52 / 0.62 / 0.52, with 667 prompts 0.55 / 0.57 / 0.65 / 0.56 (intervals ± 0.1).
           All of it carries over: no policy's gap is larger than SFT's (0.16 / 0.19 / 0.20) by more than chance
"""

from dataclasses import replace

from ppo_vs_dpo import experiment as base

from jrlhf.experiment import Experiment
from jrlhf.lab import LarderPrompts

ppo, dpo = base.stages["ppo"], base.stages["dpo"]

arms = {
    "ppo_few": replace(ppo, prompts=LarderPrompts(size=128)),
    "ppo": ppo,
    "ppo_diverse": replace(ppo, prompts=LarderPrompts(size=8_000, split="reward_model")),
    "dpo_few": replace(dpo, preferences="few_preferences"),
    "dpo": dpo,
}

experiment = Experiment(
    name="larder-generalisation",
    stages={
        **{name: base.stages[name] for name in ("pretrain", "sft", "preferences", "reward_model")},
        # 667 x 36 pairs, of 4,000 x 6.
        "few_preferences": replace(
            base.stages["preferences"], prompts=LarderPrompts(size=667, split="reward_model"), responses=9
        ),
        **arms,
        "evaluate": replace(base.stages["evaluate"], policies=("sft", *arms), best_of_n=""),
    },
)
