"""RLAIF on Larder: a judge labels answers, a reward model learns from the labels, PPO from the reward model; and PPO
that asks the judge itself (direct RLAIF: Lee et al. 2023).

The judge is a program that is right nine times of ten, and takes the answer in the first place unread twice of ten, as
language models do; asked in both orders, its labels are as if it did not. With JUDGE_URL and JUDGE_MODEL set, the model
behind that URL is asked instead (its key in JUDGE_API_KEY, if it wants one): 24,000 pairs in two orders.

Command    jrlhf run experiments/ai_feedback/rlaif.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 8 minutes with the program
Expected   not yet measured
"""

import os

from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.experiment import Experiment
from jrlhf.lab import (
    LarderDemonstrations,
    LarderLabelers,
    LarderPrompts,
    LarderText,
    LarderVocabulary,
)
from jrlhf.models.config import ModelConfig
from jrlhf.optim import OptimConfig
from jrlhf.rewards.endpoint import Endpoint
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.training.lab_judges import LarderJudge
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import (
    PPO,
    SFT,
    AILabels,
    Evaluate,
    Judge,
    Preferences,
    Pretrain,
    RewardModel,
    TokenizerConfig,
)

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

answers = SamplingConfig(max_new_tokens=28)


def ppo(reward: str) -> PPO:
    return PPO(
        start="sft",
        reward=reward,
        critic="policy",  # a judge has no parameters to start a critic from
        prompts=LarderPrompts(size=8_000),
        gold="larder_gold",
        algorithm=PPOConfig(beta=0.1),
        sampling=answers,
        optim=OptimConfig(lr=3e-4, eps=1e-5, warmup_steps=16),
        critic_optim=OptimConfig(lr=1e-3, eps=1e-5, warmup_steps=16),
        loop=LoopConfig(steps=50, batch_size=128),
    )


experiment = Experiment(
    name="larder-rlaif",
    stages={
        "pretrain": Pretrain(
            data=LarderText(documents=40_000),
            tokenizer=TokenizerConfig(model_type="word", vocab_size=128, texts=(LarderVocabulary(),)),
            model=ModelConfig(
                d_model=64, n_layers=3, n_heads=4, n_kv_heads=4, d_ff=192, context=40, remat="full"
            ),
            optim=OptimConfig(lr=3e-3, schedule="cosine", warmup_steps=20, weight_decay=0.01),
            loop=LoopConfig(steps=450, batch_size=128),
        ),
        "sft": SFT(
            start="pretrain",
            data=LarderDemonstrations(size=8_000),
            optim=OptimConfig(lr=1e-3, schedule="cosine"),
            loop=LoopConfig(epochs=2, batch_size=64),
        ),
        # What simulated people say of the answers; the judge's agreement with them is among the results of `labels`.
        "preferences": Preferences(
            start="sft",
            prompts=LarderPrompts(size=4_000, split="reward_model"),
            labeler=LarderLabelers(),
            responses=4,
            sampling=answers,
        ),
        "judge": Judge(by=by, template=WHICH, verdicts=("A", "B"), value="probability"),
        "labels": AILabels("judge", preferences="preferences", rank_by="borda"),
        "reward_model": RewardModel(
            start="sft",
            preferences="labels",
            optim=OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=50),
            loop=LoopConfig(epochs=3, batch_size=16),
        ),
        "marks": Judge(
            by=by, template=HOW_GOOD, verdicts=("1", "2", "3", "4", "5"), value="expected", fallback=0.0
        ),
        "rlaif": ppo("reward_model"),
        "direct_rlaif": ppo("marks"),
        "evaluate": Evaluate(
            policies=("sft", "rlaif", "direct_rlaif"),
            gold="larder_gold",
            proxy="reward_model",
            prompts={"eval": LarderPrompts(size=256, split="eval", seed=1)},
            sampling=answers,
        ),
    },
)
