"""A real 260K-parameter story model learns to end stories happily, with a word that was asked for.

Checkpoint -> SFT on TinyStories endings -> simulated labels -> reward model -> PPO, DPO, best-of-n. The gold reward is
one that a person can check by reading: happy and sad words in the last 20 words, the requested word, and that the
story ends (`jrlhf/rewards/stories.py`).

Command    JRLHF_DATA=<folder with stories260K/ and tinystories/> jrlhf run experiments/stories/happy_endings.py
           or --stages.base.path <checkpoint folder> --stages.sft.data.path <stories file> ...
Hardware   two CPU cores, 4 GiB of memory
Time       about 9 minutes
Measured   one seed, 128 held-out stories, 2 samples each. The reward model orders 72% [69%, 74%] of held-out pairs as
           the noisy labels do. PPO finds that "They had a lot of fun." ends any story happily. The word that was
           asked for stays unused: the SFT model hardly ever writes it, so that there is little to reinforce.

           policy        gold                 KL     ended
           SFT           0.11 [0.05, 0.18]    0      69%
           PPO           0.92 [0.88, 0.98]    7.3    99%
           DPO           0.71 [0.66, 0.78]    8.3    67%
           best of 16    0.72 [0.65, 0.79]    1.8    92%
"""

import os

from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.data.stories import StoryEndings
from jrlhf.experiment import Experiment
from jrlhf.optim import OptimConfig
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.training.labelers import RewardLabeler
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import (
    PPO,
    SFT,
    BestOfN,
    Checkpoint,
    DirectAlignment,
    Evaluate,
    Preferences,
    RewardModel,
)

data = os.environ.get("JRLHF_DATA", "data")
stories = f"{data}/tinystories/tinystories_sample.txt"
gold = "happy_story_with_word"
short = {"beginning": 120, "ending": 100}  # characters
endings = SamplingConfig(max_new_tokens=48)
prompts = StoryEndings(stories, kind="prompt", **short)
test_prompts = StoryEndings(stories, kind="prompt", split="test", max_rows=128, **short)

experiment = Experiment(
    name="stories-happy-endings",
    stages={
        "base": Checkpoint(path=f"{data}/stories260K", remat="full"),
        "sft": SFT(
            start="base",
            data=StoryEndings(stories, **short),
            length=128,
            too_long="drop",
            optim=OptimConfig(lr=5e-4, schedule="cosine"),
            loop=LoopConfig(steps=100, batch_size=16),
        ),
        "preferences": Preferences(
            start="sft",
            prompts=prompts,
            labeler=RewardLabeler(reward=gold),
            responses=4,
            sampling=endings,
            max_prompt=80,
            too_long="drop",
        ),
        "reward_model": RewardModel(
            start="sft",
            preferences="preferences",
            optim=OptimConfig(lr=5e-4, schedule="cosine"),
            loop=LoopConfig(epochs=1, batch_size=16),
        ),
        "ppo": PPO(
            start="sft",
            reward="reward_model",
            prompts=prompts,
            gold=gold,
            eval_prompts=test_prompts,
            algorithm=PPOConfig(beta=0.1, epochs=2, minibatches=2),
            sampling=endings,
            optim=OptimConfig(lr=2e-4, eps=1e-5),
            critic_optim=OptimConfig(lr=5e-4, eps=1e-5),
            loop=LoopConfig(steps=40, batch_size=64, eval_every=20),
            max_prompt=80,
            too_long="drop",
        ),
        "dpo": DirectAlignment(
            start="sft",
            preferences="preferences",
            algorithm=DPOConfig(beta=0.1),
            optim=OptimConfig(lr=3e-4, schedule="cosine"),
            eval_prompts=test_prompts,
            gold=gold,
            sampling=endings,
            loop=LoopConfig(steps=100, batch_size=32, eval_every=50),
        ),
        "best_of_n": BestOfN(
            start="sft",
            reward="reward_model",
            gold=gold,
            prompts=test_prompts,
            samples=16,
            sampling=endings,
            max_prompt=80,
            too_long="drop",
        ),
        "evaluate": Evaluate(
            policies=("sft", "ppo", "dpo"),
            gold=gold,
            proxy="reward_model",
            best_of_n="best_of_n",
            prompts={"test stories": test_prompts},
            sampling=endings,
            samples=2,
            max_prompt=80,
            too_long="drop",
        ),
    },
)
