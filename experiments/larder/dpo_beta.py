"""B7: DPO over its beta on Larder, next to PPO on the reward model trained from the same preferences.

An offline method has no KL penalty to hold it back: every arm is shown with the KL of its own samples.

Command    jrlhf run experiments/larder/dpo_beta.py --seeds 0 1 2 3 4 --seed_from preferences
Hardware   two CPU cores, 2 GiB of memory
Time       about 6 minutes a seed
Expected   implicit-reward accuracy against gold of at least 0.83; some beta within 0.1 of PPO's gold reward
Measured   five seeds of everything after SFT, 256 prompts x 4 answers. Accuracy of beta 0.3, against gold on held-out
           pairs: 0.851 [0.845, 0.857]; the noisy labels themselves agree with gold 75% of the time. Beta 0.03 collapses
           on one seed.

           policy        gold                 KL
           SFT           0.56 [0.52, 0.60]    0
           PPO           1.18 [1.08, 1.28]    2.14
           DPO 0.03      0.70 [-0.27, 1.66]   11.6
           DPO 0.1       1.22 [1.14, 1.29]    2.24
           DPO 0.3       1.23 [1.17, 1.29]    1.11
           DPO 1.0       1.04 [0.99, 1.09]    0.36
"""

from dataclasses import replace

from ppo_vs_dpo import experiment as base

from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.experiment import Experiment
from jrlhf.training.loop import LoopConfig

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
        "evaluate": replace(base.stages["evaluate"], policies=("sft", "ppo", *arms), best_of_n=""),
    },
)
