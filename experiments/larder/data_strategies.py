"""Better data or more of it: the same updates on plain, doubled, filtered, ordered and distilled data.

Each learner (SFT, PPO, DPO) makes as many updates as in `ppo_vs_dpo.py`, whose start and reward model all share. What
differs is the data: twice as much of it; without duplicates; what the reward model finds best of it; for PPO the
prompts that SFT solves neither always nor never, or these from easy to hard; and for SFT the best of eight answers of
its own. Filters and distillation ask the reward model, so that they cost samples and no further labels. Where twice
the data gains nothing there was enough of it, and a filter can only win by quality.

Command    jrlhf run experiments/larder/data_strategies.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 15 minutes more than ppo_vs_dpo.py, of which it uses all stages
Expected   more demonstrations gain nothing (they are of one quality), better ones much; PPO had prompts enough
Measured   one seed, gold. SFT 0.54: twice the data 0.54, without duplicates 0.47, the best quarter 1.06, the best of 8
           own answers 1.16 (intervals ± 0.06). PPO 1.28: twice the prompts 1.26, filtered 1.23, easy first 1.26. DPO
           1.08: twice the labels 1.13, the half that the reward model agrees with 0.96 at KL 2.2
"""

from dataclasses import replace

from ppo_vs_dpo import answers, evaluation_prompts
from ppo_vs_dpo import experiment as base

from jrlhf.config import Source, StageRows
from jrlhf.data.curation import Between, Curriculum
from jrlhf.experiment import Experiment
from jrlhf.lab import LarderDemonstrations, LarderPrompts
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import (
    SFT,
    BestAnswers,
    CurateDemonstrations,
    SelectDemonstrations,
    SelectPreferences,
    SolveRate,
)

sft, ppo, dpo = (base.stages[name] for name in ("sft", "ppo", "dpo"))
demonstrations, prompts = LarderDemonstrations(size=8_000), LarderPrompts(size=8_000)


def imitate(data: Source, start: str = "pretrain") -> SFT:
    """As many updates as two epochs of the plain demonstrations."""
    return replace(sft, start=start, data=data, loop=LoopConfig(steps=SFT_UPDATES, batch_size=64))


SFT_UPDATES = 108

data = {
    "unique": CurateDemonstrations(demonstrations, near=0.8, ngram=3, against=evaluation_prompts),
    "best_quarter": SelectDemonstrations(demonstrations, reward="reward_model", start="sft", keep=0.25),
    "best_of_8": BestAnswers(
        start="sft", reward="reward_model", prompts=LarderPrompts(size=4_000), samples=8, sampling=answers
    ),
    "twice_preferences": replace(
        base.stages["preferences"], prompts=LarderPrompts(size=8_000, split="reward_model")
    ),
    # The half of the labels with which the reward model that learned from all of them agrees most.
    "agreed": SelectPreferences(StageRows("preferences"), reward="reward_model", start="sft", keep=0.5),
    # Solved: a reward of half a standard deviation above the mean of SFT's answers.
    "solve_rates": SolveRate(
        start="sft", reward="reward_model", prompts=prompts, samples=8, sampling=answers, right_at=0.5
    ),
}

arms = {
    "sft_twice": imitate(LarderDemonstrations(size=16_000)),
    "sft_unique": imitate(StageRows("unique")),
    "sft_best_quarter": imitate(StageRows("best_quarter")),
    "sft_distilled": imitate(StageRows("best_of_8"), start="sft"),
    "ppo": ppo,
    "ppo_twice": replace(ppo, prompts=LarderPrompts(size=16_000)),
    "ppo_filtered": replace(ppo, prompts=Between(StageRows("solve_rates"), "solve_rate", 0.1, 0.9)),
    "ppo_easy_first": replace(
        ppo, prompts=StageRows("solve_rates"), curriculum=Curriculum(by="solve_rate", steps=25)
    ),
    "dpo": dpo,
    "dpo_twice": replace(dpo, preferences="twice_preferences"),
    "dpo_agreed": replace(dpo, preferences="agreed"),
}

experiment = Experiment(
    name="larder-data-strategies",
    stages={
        **{name: base.stages[name] for name in ("pretrain", "sft", "preferences", "reward_model")},
        **data,
        **arms,
        "evaluate": replace(base.stages["evaluate"], policies=("sft", *arms), best_of_n=""),
    },
)
