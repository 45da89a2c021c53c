"""Direct and distilled RLAIF (Lee et al. 2023), with a judge that is right in 95% or in 75% of its replies.

The judge goes through a rubric (rubric.toml). Direct: its score of each answer is PPO's reward. Distilled: it labels
answers of SFT, a reward model learns from the labels, and PPO from the reward model, which averages the judge's errors
away. Both are measured by gold, which neither sees.

Command    jrlhf run experiments/larder/rlaif.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 10 minutes
Expected   direct_95 has gold 1.34 at KL 1.5 after 24 of the 50 updates (seed 0; SFT 0.57); the rest is not yet measured
"""

from dataclasses import replace
from pathlib import Path

from ppo_vs_dpo import evaluation_prompts
from ppo_vs_dpo import experiment as base

from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.experiment import Experiment
from jrlhf.training.lab_judges import LarderJudge
from jrlhf.training.stages import Evaluate, RubricLabels, RubricReward

RUBRIC = str(Path(__file__).with_name("rubric.toml"))
ACCURACIES = (0.95, 0.75)


def arm(accuracy: float) -> dict:
    judge, labels, model = (f"{part}_{round(100 * accuracy)}" for part in ("judge", "labels", "reward_model"))
    return {
        # Unclipped: else all bad answers are alike, and there is nothing to climb.
        judge: RubricReward(by=LarderJudge(accuracy), rubric=RUBRIC, clip=False),
        # Scores of a rubric have a smaller spread than the normalised ones of a reward model.
        judge.replace("judge", "direct"): replace(
            base.stages["ppo"], reward=judge, critic="policy", algorithm=PPOConfig(beta=0.03)
        ),
        labels: RubricLabels(rubric=judge, preferences="preferences"),
        model: replace(base.stages["reward_model"], preferences=labels),
        judge.replace("judge", "distilled"): replace(base.stages["ppo"], reward=model),
    }


arms = {name: stage for accuracy in ACCURACIES for name, stage in arm(accuracy).items()}

experiment = Experiment(
    name="larder-rlaif-accuracy",
    stages={name: base.stages[name] for name in ("pretrain", "sft", "preferences")}
    | arms
    | {
        "evaluate": Evaluate(
            policies=("sft", *(name for name in arms if name.startswith(("direct", "distilled")))),
            gold="larder_gold",
            proxy="judge_95",
            prompts={"eval": evaluation_prompts["eval"]},
            sampling=base.stages["evaluate"].sampling,
        )
    },
)
