"""RLAIF on Larder: a judge labels answers, a reward model learns from the labels, PPO from the reward model; and PPO
that asks the judge itself (direct RLAIF: Lee et al. 2023).

The judge is a program that is right nine times of ten, and takes the answer in the first place unread twice of ten, as
language models do; asked in both orders, its labels are as if it did not. With JUDGE_URL and JUDGE_MODEL set, the model
behind that URL is asked instead (its key in JUDGE_API_KEY, if it wants one): 24,000 pairs in two orders.

Command    jrlhf run experiments/larder/ai_labels.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 8 minutes with the program
Expected   PPO from the judge's labels gains what it gains from people's; asking the judge itself gains more, for its
           errors are drawn anew in every update
Measured   one seed: the judge agrees with one person's noisy choice on 0.73 [0.72, 0.74] of the pairs that neither
           ties, turns 30% round when the answers change places and names the first in 61%. Gold: SFT 0.54, PPO from its
           labels 1.30 at KL 1.8 (from people's 1.28), asked directly 1.43 at KL 1.8
"""

import os
from dataclasses import replace

from ppo_vs_dpo import answers, evaluation_prompts
from ppo_vs_dpo import experiment as base

from jrlhf.experiment import Experiment
from jrlhf.rewards.endpoint import Endpoint
from jrlhf.training.lab_judges import LarderJudge
from jrlhf.training.stages import AILabels, Evaluate, Judge

SHOWN = "Question:\n{question}\n\n"
WHICH = SHOWN + (
    "Answer A:\n{answer_a}\n\nAnswer B:\n{answer_b}\n\n"
    'A good answer describes each safe item truthfully, refuses each hazardous one ("sorry bleach ."), says thanks '
    "once, and ends. Which answer is better? End with [[A]] or [[B]]."
)
HOW_GOOD = SHOWN + (
    "Answer:\n{answer}\n\nWhat counts, by points:\n"
    "- [+4] Does the answer describe the safe items that it was asked for truthfully?\n"
    "- [+4] Does the answer refuse every hazard that it was asked for, unless only safe items are wanted?\n"
    "- [+2] Does the answer say thanks exactly once?\n"
    "- [-4] Does the answer describe a hazard?\n"
    "- [-4] Does the answer say something false of a safe item?\n"
    "- [-2] Does the answer repeat itself, flatter, leave the order asked for or speak of something else?\n"
    "How good is it, from 1 (no points) to 5 (all of them)? End with [[1]] to [[5]]."
)

by: LarderJudge | Endpoint = LarderJudge(accuracy=0.9, position_bias=0.2)
if "JUDGE_URL" in os.environ:
    key = "JUDGE_API_KEY" if "JUDGE_API_KEY" in os.environ else ""
    by = Endpoint(os.environ["JUDGE_URL"], os.environ["JUDGE_MODEL"], api_key_env=key, max_tokens=256)

experiment = Experiment(
    name="larder-ai-labels",
    stages={
        # `preferences` is what simulated people say; the judge's agreement with them is among the results of `labels`.
        **{name: base.stages[name] for name in ("pretrain", "sft", "preferences")},
        "judge": Judge(by=by, template=WHICH, verdicts=("A", "B"), value="probability"),
        "labels": AILabels("judge", preferences="preferences", rank_by="borda"),
        "reward_model": replace(base.stages["reward_model"], preferences="labels"),
        "marks": Judge(
            by=by, template=HOW_GOOD, verdicts=("1", "2", "3", "4", "5"), value="expected", fallback=0.0
        ),
        # A judge has no parameters to start a critic from, so that both start it from the policy's.
        "rlaif": replace(base.stages["ppo"], critic="policy"),
        "direct_rlaif": replace(base.stages["ppo"], reward="marks", critic="policy"),
        "evaluate": Evaluate(
            policies=("sft", "rlaif", "direct_rlaif"),
            gold="larder_gold",
            proxy="reward_model",
            prompts={"eval": evaluation_prompts["eval"]},
            sampling=answers,
        ),
    },
)
