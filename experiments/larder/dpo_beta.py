"""B7: DPO over its beta on Larder, next to PPO on the reward model trained from the same preferences.

An offline method has no KL penalty to hold it back: every arm is shown with the KL of its own samples.

Command    jrlhf run experiments/larder/dpo_beta.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 6 minutes
Expected   implicit-reward accuracy against gold of at least 0.83; some beta within 0.1 of PPO's gold reward
Measured   one seed, 256 prompts x 4 answers. "Accuracy" is against gold on held-out pairs, which the noisy labels
           themselves agree with 75% of the time.

           policy        gold                 KL     accuracy
           SFT           0.56 [0.50, 0.62]    0
           PPO           1.18 [1.13, 1.25]    1.93
           DPO 0.03      0.95 [0.88, 1.01]    4.85   0.794
           DPO 0.1       1.26 [1.20, 1.33]    1.65   0.844
           DPO 0.3       1.23 [1.17, 1.29]    0.94   0.855
           DPO 1.0       1.05 [1.00, 1.11]    0.36   0.847
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
