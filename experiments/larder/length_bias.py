"""B6: labellers who like length: PPO writes ever longer answers, and a reward with length regressed out mends it.

The labels pay `length_bias` for every word, whatever it says. Three arms differ in their reward alone: from clean
labels, from biased ones, and from the biased ones corrected for length.

Command    jrlhf run experiments/larder/length_bias.py --seeds 0 1 2 3 4 --seed_from preferences biased_preferences
Hardware   two CPU cores, 3 GiB of memory
Time       about 25 minutes with five seeds
Expected   from biased labels at least twice the length, and gold below SFT's; an alarm before gold has fallen by a
           fifth of its peak; with the correction at least 70% of the clean arm's peak
Measured   five seeds: 2.26 times the length and gold 0.34 below SFT's; 81% [41%, 121%] with the correction; the alarm
           comes in time on all, and on five further seeds (docs/reward-hacking.md)
"""

from dataclasses import replace

from ppo_vs_dpo import answers, evaluation_prompts
from ppo_vs_dpo import experiment as base

from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.experiment import Experiment
from jrlhf.lab import LarderLabelers, LarderPrompts
from jrlhf.optim import OptimConfig
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import PPO, Evaluate, LengthCorrected


def trained_on(reward: str) -> PPO:
    return PPO(
        start="sft",
        reward=reward,
        critic="policy",
        prompts=LarderPrompts(size=12_800),
        gold="larder_gold",
        algorithm=PPOConfig(beta=0.03),
        sampling=answers,
        optim=OptimConfig(lr=1e-4, eps=1e-5, warmup_steps=16),
        critic_optim=OptimConfig(lr=1e-3, eps=1e-5, warmup_steps=16),
        loop=LoopConfig(steps=80, batch_size=128),
    )


experiment = Experiment(
    name="larder-length-bias",
    stages={
        **{name: base.stages[name] for name in ("pretrain", "sft", "preferences", "reward_model")},
        "biased_preferences": replace(base.stages["preferences"], labeler=LarderLabelers(length_bias=0.4)),
        "biased_model": replace(base.stages["reward_model"], preferences="biased_preferences"),
        "corrected": LengthCorrected(reward="biased_model", start="sft", preferences="biased_preferences"),
        "clean": trained_on("reward_model"),
        "biased": trained_on("biased_model"),
        "restored": trained_on("corrected"),
        "evaluate": Evaluate(
            policies=("sft", "clean", "biased", "restored"),
            gold="larder_gold",
            proxy="biased_model",
            prompts={"eval": evaluation_prompts["eval"]},
            sampling=answers,
        ),
    },
)
