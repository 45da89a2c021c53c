"""B5: algorithms without a critic next to PPO, at equal KL coefficient and budget, against the same reward model.

With -beta·k1 in the reward PPO, RLOO and REINFORCE maximise one objective, and end near one another. GRPO as
published divides by the group's spread and has k3 in the loss: the same beta holds it far less.

Command    jrlhf run experiments/larder/rl_family.py --seeds 0 1 2 3 4 --seed_from preferences
Hardware   two CPU cores, 2 GiB of memory
Time       about 30 minutes with five seeds
Expected   RLOO's KL within 15% of PPO's and gold within 0.15; both keep at least 90% of their own peak; GRPO's KL at
           least 1.5 times theirs
Measured   five seeds: gold 1.19 PPO, 1.21 RLOO, 1.20 Dr. GRPO at KL 1.9, 1.9 and 1.7; GRPO 0.69 at KL 7.3 (SFT 0.56)
"""

from dataclasses import replace

from ppo_vs_dpo import answers
from ppo_vs_dpo import experiment as base

from jrlhf.algorithms.dr_grpo import DrGRPOConfig
from jrlhf.algorithms.grpo import GRPOConfig
from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.algorithms.rloo import RLOOConfig
from jrlhf.experiment import Experiment
from jrlhf.lab import LarderPrompts
from jrlhf.ops.on_policy import OnPolicyConfig
from jrlhf.optim import OptimConfig
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import PPO, OnPolicy

# The same for all: coefficient, penalty, and optimiser steps per batch of answers.
shared = {"beta": 0.1, "missing_eos_penalty": 1.0, "epochs": 2, "minibatches": 2}
algorithms: dict[str, OnPolicyConfig] = {
    "rloo": RLOOConfig(group_size=4, **shared),
    "dr_grpo": DrGRPOConfig(group_size=4, **shared),  # with its penalty in the reward
    "grpo": GRPOConfig(group_size=4, **shared),
}


def critic_free(algorithm: OnPolicyConfig) -> OnPolicy:
    return OnPolicy(
        start="sft",
        reward="reward_model",
        prompts=LarderPrompts(size=12_800),
        gold="larder_gold",
        algorithm=algorithm,
        sampling=answers,
        optim=OptimConfig(lr=3e-4, eps=1e-5, warmup_steps=16),
        loop=LoopConfig(steps=100, batch_size=128),
    )


ppo = base.stages["ppo"]
assert isinstance(ppo, PPO)
arms = {
    "ppo": replace(
        ppo,
        algorithm=PPOConfig(**shared),
        prompts=LarderPrompts(size=12_800),
        loop=LoopConfig(steps=100, batch_size=128),
    ),
    **{name: critic_free(algorithm) for name, algorithm in algorithms.items()},
}

experiment = Experiment(
    name="larder-rl-family",
    stages={
        **{name: base.stages[name] for name in ("pretrain", "sft", "preferences", "reward_model")},
        **arms,
        "evaluate": replace(base.stages["evaluate"], policies=("sft", *arms), best_of_n=""),
    },
)
