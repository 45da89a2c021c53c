"""The pipeline on real human preferences: Anthropic's HH dialogues (Bai et al. 2022).

The base model is whatever checkpoint `base.path` names. With a 260K-parameter story model the numbers are modest: its
reward model is little better than chance on held-out pairs, and the policies write no sense. What this file shows at
that size is that every stage works on real dialogues; the same file with an 8B checkpoint is the real experiment.

Command    JRLHF_DATA=<folder with stories260K/ and hh-harmless-base/> jrlhf run experiments/hh/helpful_harmless.py
           with a network: HH_DATA=Anthropic/hh-rlhf HH_MODEL=<checkpoint or hub name> jrlhf run ...
Hardware   two CPU cores, 6 GiB of memory, for the 260K model
Measured   with the 260K story model on 1,800 pairs of hh-harmless-base. Half of the dialogues are longer than 384 of
           its short tokens and are dropped. Reward model: 66% [55%, 76%] of 77 held-out pairs. DPO's implicit accuracy:
           47% [36%, 57%] of 86, which is chance. PPO (KL 11.7) raises that reward model's score from -0.42
           [-0.76, -0.10] to 2.12 [1.98, 2.26] by answering "I don't know." to everything; best of 16 has 2.85
           [2.51, 3.30].
"""

import os

from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.data.sources import HHSource
from jrlhf.experiment import Experiment
from jrlhf.optim import OptimConfig
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import PPO, SFT, BestOfN, Checkpoint, DirectAlignment, Evaluate, RewardModel

data = os.environ.get("JRLHF_DATA", "data")
model = os.environ.get("HH_MODEL", f"{data}/stories260K")
hh = os.environ.get("HH_DATA", f"{data}/hh-harmless-base/pairs.jsonl")

answers = SamplingConfig(max_new_tokens=64)
max_length, max_prompt = 384, 256
test_prompts = HHSource(hh, split="test", kind="prompt", max_rows=128)

experiment = Experiment(
    name="hh",
    stages={
        "base": Checkpoint(path=model, remat="full"),
        "sft": SFT(
            start="base",
            data=HHSource(hh, kind="demonstration"),
            length=max_length,
            too_long="drop",
            optim=OptimConfig(lr=5e-4, schedule="cosine"),
            loop=LoopConfig(epochs=2, batch_size=8),
            eval_rows=16,
        ),
        "reward_model": RewardModel(
            start="sft",
            data=HHSource(hh),
            eval_data=HHSource(hh, split="test"),
            max_length=max_length,
            too_long="drop",
            optim=OptimConfig(lr=3e-4, schedule="cosine"),
            loop=LoopConfig(epochs=1, batch_size=8),
        ),
        "ppo": PPO(
            start="sft",
            reward="reward_model",
            prompts=HHSource(hh, kind="prompt"),
            algorithm=PPOConfig(beta=0.05, epochs=2, minibatches=2),
            sampling=answers,
            optim=OptimConfig(lr=3e-4, eps=1e-5),
            critic_optim=OptimConfig(lr=3e-4, eps=1e-5),
            loop=LoopConfig(steps=30, batch_size=32),
            max_prompt=max_prompt,
            too_long="drop",
        ),
        "dpo": DirectAlignment(
            start="sft",
            data=HHSource(hh),
            max_length=max_length,
            too_long="drop",
            algorithm=DPOConfig(beta=0.1),
            optim=OptimConfig(lr=2e-4, schedule="cosine"),
            loop=LoopConfig(epochs=1, batch_size=8),
        ),
        "best_of_n": BestOfN(
            start="sft",
            reward="reward_model",
            prompts=test_prompts,
            samples=16,
            sampling=answers,
            max_prompt=max_prompt,
            too_long="drop",
        ),
        "evaluate": Evaluate(
            policies=("sft", "ppo", "dpo"),
            gold="reward_model",  # there is no gold here: the reward model is all that can be reported
            best_of_n="best_of_n",
            prompts={"test dialogues": test_prompts},
            sampling=answers,
            samples=2,
            max_prompt=max_prompt,
            too_long="drop",
        ),
    },
)
