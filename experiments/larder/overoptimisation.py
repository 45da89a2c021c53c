"""B4: PPO without a KL penalty against a learned reward: gold rises and falls, the reward model goes on praising.

Goodhart's law with a known truth (Gao et al. 2022): R(d) = d(a - b log d), with d the square root of the KL to SFT.

Command    jrlhf run experiments/larder/overoptimisation.py --seeds 0 1 2 3 4 --seed_from preferences
Hardware   two CPU cores, 3 GiB of memory
Time       about 8 minutes with five seeds
Expected   gold rises to at least 1.8 times that of SFT before KL 3 and falls to at most half of its peak by KL 12,
           the learned reward does not fall; R(d) fits with R² >= 0.95, better than d(a - b d). An alarm is raised
           before gold has fallen by a fifth of its peak, without a look at gold
Measured   five seeds: 1.89 times SFT, then 0.43 of the peak at KL 12; R² 0.91, near the other; the alarm comes 3 to 6
           steps before the fall on all five (docs/lab.md)
"""

from dataclasses import replace

from ppo_vs_dpo import answers
from ppo_vs_dpo import experiment as base

from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.experiment import Experiment
from jrlhf.lab import LarderPrompts
from jrlhf.optim import OptimConfig
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import PPO

experiment = Experiment(
    name="larder-overoptimisation",
    stages={
        **{name: base.stages[name] for name in ("pretrain", "sft", "preferences", "reward_model")},
        # Labels of the same people on other prompts, for a reward model that the policy never sees.
        "held_out_preferences": replace(
            base.stages["preferences"], prompts=LarderPrompts(size=4_000, split="reward_model", seed=2)
        ),
        "held_out": replace(base.stages["reward_model"], preferences="held_out_preferences", member=1),
        "ppo": PPO(
            start="sft",
            reward="reward_model",
            watch=("held_out",),
            prompts=LarderPrompts(size=12_800),
            gold="larder_gold",
            algorithm=PPOConfig(beta=0.0, missing_eos_penalty=0.0),
            sampling=answers,
            optim=OptimConfig(lr=1e-4, eps=1e-5, warmup_steps=16),
            critic_optim=OptimConfig(lr=1e-3, eps=1e-5, warmup_steps=16),
            loop=LoopConfig(steps=80, batch_size=128),
        ),
    },
)
