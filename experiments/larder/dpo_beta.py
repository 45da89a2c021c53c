"""B7: DPO over its beta on Larder, next to PPO on the reward model trained from the same preferences.

An offline method has no KL penalty to hold it back: every arm is shown with the KL of its own samples.

Command    jrlhf run experiments/larder/dpo_beta.py
Hardware   two CPU cores, 2 GiB of memory
Expected   implicit-reward accuracy against gold of at least 0.83; some beta within 0.1 of PPO's gold reward
"""

from dataclasses import replace

from ppo_vs_dpo import answers, evaluation_prompts
from ppo_vs_dpo import experiment as base

from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.experiment import Experiment
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import Evaluate

arms = {
    f"dpo_{beta}".replace(".", "_"): replace(
        base.stages["dpo"],
        algorithm=DPOConfig(beta=beta),
        loop=LoopConfig(epochs=1, batch_size=64, eval_every=100),
    )
    for beta in (0.03, 0.1, 0.3, 1.0)
}

experiment = Experiment(
    name="larder-dpo-beta",
    stages={
        **{name: base.stages[name] for name in ("pretrain", "sft", "preferences", "reward_model", "ppo")},
        **arms,
        "evaluate": Evaluate(
            policies=("sft", "ppo", *arms),
            gold="larder_gold",
            proxy="reward_model",
            prompts=evaluation_prompts,
            sampling=answers,
        ),
    },
)
