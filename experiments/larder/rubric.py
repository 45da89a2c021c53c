"""A rubric as a reward: one question for each criterion, one mark for the whole, and a reward model with a head each.

The same judge, right in 85% of its replies, is asked three ways (Rubrics as Rewards: Gunjal et al. 2025). `explicit`
adds up its words on the criteria; `holistic` asks for one mark of
the whole rubric; `heads` has it label answers criterion by criterion, and weighs the heads of a reward model that
learned these labels (ArmoRM: Wang et al. 2024). The report draws the criteria's curves.

Command    jrlhf run experiments/larder/rubric.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 8 minutes
Expected   the learned heads, whose labels err once and for all, end below the judge that is asked in every update
Measured   one seed, gold at KL: SFT 0.54, explicit 1.28 at 1.9, holistic 1.31 at 2.0 (not to be told apart), heads 0.90
           at 2.8 with an alarm (`kl_per_token`): they learned to refuse (harmless 0.05 to 0.46) and not what is true
           (helpful 0.42 to 0.37; explicit 0.76)
"""

from dataclasses import replace
from pathlib import Path

from ppo_vs_dpo import evaluation_prompts
from ppo_vs_dpo import experiment as base

from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.algorithms.reward_model import RewardModelConfig
from jrlhf.experiment import Experiment
from jrlhf.rewards.rubrics import load_rubric
from jrlhf.training.lab_judges import LarderJudge
from jrlhf.training.stages import Evaluate, RubricLabels, RubricReward

RUBRIC = str(Path(__file__).with_name("rubric.toml"))
WEIGHTS = {criterion.name: criterion.weight for criterion in load_rubric(RUBRIC).criteria}
judge = LarderJudge(accuracy=0.85)
direct = replace(base.stages["ppo"], critic="policy", algorithm=PPOConfig(beta=0.03))

experiment = Experiment(
    name="larder-rubric",
    stages={name: base.stages[name] for name in ("pretrain", "sft", "preferences")}
    | {
        "by_criteria": RubricReward(by=judge, rubric=RUBRIC, clip=False),
        "by_mark": RubricReward(by=judge, rubric=RUBRIC, how="holistic"),
        "labels": RubricLabels(rubric="by_criteria", preferences="preferences"),
        "reward_model": replace(
            base.stages["reward_model"],
            preferences="labels",
            algorithm=RewardModelConfig(criteria=tuple(WEIGHTS), overall=False),
            weights=WEIGHTS,
        ),
        "explicit": replace(direct, reward="by_criteria"),
        "holistic": replace(direct, reward="by_mark"),
        "heads": replace(base.stages["ppo"], reward="reward_model"),
        "evaluate": Evaluate(
            policies=("sft", "explicit", "holistic", "heads"),
            gold="larder_gold",
            proxy="by_criteria",
            prompts={"eval": evaluation_prompts["eval"]},
            sampling=base.stages["evaluate"].sampling,
        ),
    },
)
