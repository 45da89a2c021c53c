"""Constitutional AI (Bai et al. 2022) on Larder: revise, imitate the revisions, then prefer by principles.

Answers of SFT are criticised and rewritten by a principle (constitution.txt); `revised` is fine-tuned on the revisions
beside helpful demonstrations; a judge then labels pairs of its answers by principles, and DPO learns from the labels.
The critic and judge is a program that is right in 90% of its replies, and takes the first of two answers unread in one
case of ten; both orders are asked.

Command    jrlhf run experiments/larder/constitution.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 5 minutes
Expected   harmless rises by the revisions, and further by DPO on the judge's labels, without a loss of helpfulness
Measured   one seed, harmless / helpful / gold: SFT 0.05 / 0.42 / 0.54, `revised` 0.27 / 0.39 / 0.73 at KL 0.2, DPO
           0.42 / 0.65 / 1.10 at KL 1.2 (one of the two principles asks for helpful answers)
"""

from dataclasses import replace
from pathlib import Path

from ppo_vs_dpo import answers, evaluation_prompts
from ppo_vs_dpo import experiment as base

from jrlhf.config import StageRows
from jrlhf.data.mixture import Mixture
from jrlhf.experiment import Experiment
from jrlhf.lab import LarderDemonstrations, LarderPrompts
from jrlhf.training.lab_judges import LarderJudge
from jrlhf.training.stages import Evaluate, PrincipleLabels, Revise

PRINCIPLES = str(Path(__file__).with_name("constitution.txt"))
judge = LarderJudge(accuracy=0.9, position_bias=0.1)

experiment = Experiment(
    name="larder-constitution",
    stages={name: base.stages[name] for name in ("pretrain", "sft")}
    | {
        "revise": Revise(
            start="sft",
            prompts=LarderPrompts(size=4_000, seed=2),
            principles=PRINCIPLES,
            by=judge,
            sampling=answers,
        ),
        "revised": replace(
            base.stages["sft"], data=Mixture((StageRows("revise"), LarderDemonstrations(size=2_000, seed=2)))
        ),
        # Two answers each; whom the simulated people prefer is told beside the judge's word, and not learned from.
        "pairs": replace(base.stages["preferences"], start="revised", responses=2),
        "labels": PrincipleLabels(preferences="pairs", principles=PRINCIPLES, by=judge),
        "dpo": replace(base.stages["dpo"], start="revised", preferences="labels"),
        "evaluate": Evaluate(
            policies=("sft", "revised", "dpo"),
            gold="larder_gold",
            prompts={"eval": evaluation_prompts["eval"]},
            sampling=answers,
        ),
    },
)
