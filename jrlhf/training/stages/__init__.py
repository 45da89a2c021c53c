"""The stages of the pipeline, in the order of InstructGPT. Each says what it starts from and what it leaves behind.

    Pretrain (or Checkpoint) -> SFT -> Preferences -> RewardModel -> PPO, DPO, BestOfN -> Evaluate

A stage's `run` is glue: it reads its parents' folders, calls a driver, and saves a model or a table. The algorithms
are in `jrlhf/algorithms`, one file each.
"""

from jrlhf.training.stages.best_of_n import BestOfN
from jrlhf.training.stages.dpo import DPO
from jrlhf.training.stages.evaluate import Evaluate
from jrlhf.training.stages.language_model import (
    SFT,
    Checkpoint,
    Pretrain,
    RewardCheckpoint,
    TokenizerConfig,
)
from jrlhf.training.stages.ppo import PPO
from jrlhf.training.stages.preferences import Preferences
from jrlhf.training.stages.reward_model import RewardModel

__all__ = [
    "DPO",
    "PPO",
    "SFT",
    "BestOfN",
    "Checkpoint",
    "Evaluate",
    "Preferences",
    "Pretrain",
    "RewardCheckpoint",
    "RewardModel",
    "TokenizerConfig",
]
