"""B1: PPO on Larder's gold reward. With no reward model in between, PPO must nearly reach the rubric's maximum.

Command    jrlhf run experiments/larder/ppo_gold.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 4 minutes; with `--seeds 0 1 2 3 4 --seed_from ppo` about 10
Expected   at least 88% of the maximum at KL <= 2.5 nats within 100 updates of 128 answers; no alarm, although a reward
           model is watched
Measured   five seeds: gold 1.48 [1.42, 1.54], 95% [91%, 98%] of the maximum (SFT: 0.55, 35%), at KL 1.94 [1.83, 2.04]
"""

from ppo_vs_dpo import answers, evaluation_prompts
from ppo_vs_dpo import experiment as base

from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.experiment import Experiment
from jrlhf.lab import LarderPrompts
from jrlhf.optim import OptimConfig
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import PPO, Evaluate

experiment = Experiment(
    name="larder-ppo-gold",
    stages={
        **{name: base.stages[name] for name in ("pretrain", "sft", "preferences", "reward_model")},
        "ppo": PPO(
            start="sft",
            reward="larder_gold",
            watch=("reward_model",),
            critic="policy",
            prompts=LarderPrompts(size=12_800),
            algorithm=PPOConfig(beta=0.05),
            sampling=answers,
            optim=OptimConfig(lr=3e-4, eps=1e-5),
            critic_optim=OptimConfig(lr=1e-3, eps=1e-5),
            loop=LoopConfig(steps=100, batch_size=128),
        ),
        "evaluate": Evaluate(
            policies=("sft", "ppo"), gold="larder_gold", prompts=evaluation_prompts, sampling=answers
        ),
    },
)
