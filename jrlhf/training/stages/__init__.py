"""The stages of the pipeline, in the order of InstructGPT. Each says what it starts from and what it leaves behind.

    Pretrain (or Checkpoint) -> SFT -> Preferences -> RewardModel -> PPO, OnPolicy, DirectAlignment, BestOfN -> Evaluate

A stage's `run` is glue: it reads its parents' folders, calls a driver, and saves a model or a table. The algorithms
are in `jrlhf/algorithms`, one file each.
"""

from jrlhf.training.stages.best_of_n import BestOfN
from jrlhf.training.stages.direct_alignment import DirectAlignment
from jrlhf.training.stages.distillation import Distill
from jrlhf.training.stages.evaluate import Evaluate
from jrlhf.training.stages.judge import Judge
from jrlhf.training.stages.language_model import (
    SFT,
    Checkpoint,
    Pretrain,
    RewardCheckpoint,
    TokenizerConfig,
)
from jrlhf.training.stages.on_policy import PPO, OnPolicy
from jrlhf.training.stages.preferences import Preferences
from jrlhf.training.stages.process_reward import ProcessRewardModel
from jrlhf.training.stages.reward_ensemble import RewardEnsemble
from jrlhf.training.stages.reward_mix import Part, RewardMix
from jrlhf.training.stages.reward_model import RewardModel
from jrlhf.training.stages.unpaired import UnpairedAlignment

__all__ = [
    "PPO",
    "SFT",
    "BestOfN",
    "Checkpoint",
    "DirectAlignment",
    "Distill",
    "Evaluate",
    "Judge",
    "OnPolicy",
    "Part",
    "Preferences",
    "Pretrain",
    "ProcessRewardModel",
    "RewardCheckpoint",
    "RewardEnsemble",
    "RewardMix",
    "RewardModel",
    "TokenizerConfig",
    "UnpairedAlignment",
]
