"""Direct and distilled RLAIF (Lee et al. 2023), with a judge that is right in 95% or in 75% of its replies.

The judge goes through a rubric (rubric.toml). Direct: its score of each answer is PPO's reward. Distilled: it labels
answers of SFT, a reward model learns from the labels, and PPO from the reward model. Both are measured by gold, which
neither sees.

Command    jrlhf run experiments/larder/rlaif.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 10 minutes
Expected   direct is better, and the more so the worse the judge: its errors are drawn anew in every update and average
           out, those in a fixed set of labels are learned and then exploited
Measured   one seed, gold at KL: SFT 0.54; judge right in 95%: direct 1.42 at 1.6, distilled 1.33 at 1.9; in 75%:
           direct 1.21 at 2.0, distilled 0.96 at 3.2, where an alarm (`kl_per_token`) was raised
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
