"""The stages of the pipeline, in the order of InstructGPT. Each says what it starts from and what it leaves behind.

    Pretrain (or Checkpoint) -> SFT -> Preferences -> RewardModel -> PPO, OnPolicy, DirectAlignment, BestOfN -> Evaluate

A stage's `run` is glue: it reads its parents' folders, calls a driver, and saves a model or a table. The algorithms
are in `jrlhf/algorithms`, one file each.
"""

from jrlhf.training.stages.ai_labels import AILabels
from jrlhf.training.stages.best_of_n import BestOfN
from jrlhf.training.stages.curate import (
    CurateDemonstrations,
    CuratePreferences,
    CuratePrompts,
    SelectDemonstrations,
    SelectPreferences,
)
from jrlhf.training.stages.direct_alignment import DirectAlignment
from jrlhf.training.stages.distillation import Distill
from jrlhf.training.stages.evaluate import Evaluate
from jrlhf.training.stages.generate import BestAnswers, SelfInstruct
from jrlhf.training.stages.judge import Judge
from jrlhf.training.stages.language_model import (
    SFT,
    Checkpoint,
    Pretrain,
    RewardCheckpoint,
    TokenizerConfig,
)
from jrlhf.training.stages.length_corrected import LengthCorrected
from jrlhf.training.stages.on_policy import PPO, OnPolicy
from jrlhf.training.stages.people import AggregateLabels
from jrlhf.training.stages.preferences import Preferences
from jrlhf.training.stages.process_reward import ProcessRewardModel, StepReward
from jrlhf.training.stages.revise import PrincipleLabels, Revise
from jrlhf.training.stages.reward_ensemble import RewardEnsemble
from jrlhf.training.stages.reward_mix import Part, RewardMix
from jrlhf.training.stages.reward_model import RewardModel
from jrlhf.training.stages.rubric import RubricLabels, RubricReward
from jrlhf.training.stages.shaped import Shaped
from jrlhf.training.stages.solve_rate import SolveRate
from jrlhf.training.stages.step_labels import StepLabels
from jrlhf.training.stages.unpaired import UnpairedAlignment
from jrlhf.training.stages.verifier import Verifier

__all__ = [
    "PPO",
    "SFT",
    "AILabels",
    "AggregateLabels",
    "BestAnswers",
    "BestOfN",
    "Checkpoint",
    "CurateDemonstrations",
    "CuratePreferences",
    "CuratePrompts",
    "DirectAlignment",
    "Distill",
    "Evaluate",
    "Judge",
    "LengthCorrected",
    "OnPolicy",
    "Part",
    "Preferences",
    "Pretrain",
    "PrincipleLabels",
    "ProcessRewardModel",
    "Revise",
    "RewardCheckpoint",
    "RewardEnsemble",
    "RewardMix",
    "RewardModel",
    "RubricLabels",
    "RubricReward",
    "SelectDemonstrations",
    "SelectPreferences",
    "SelfInstruct",
    "Shaped",
    "SolveRate",
    "StepLabels",
    "StepReward",
    "TokenizerConfig",
    "UnpairedAlignment",
    "Verifier",
]
