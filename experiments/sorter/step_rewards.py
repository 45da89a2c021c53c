"""Rewards of outcomes and of steps, where right answers with wrong steps are common: at parities, half of which are
guessed right.

Six policies of one SFT model and one PPO: paid by a checker for the answer alone ("outcome") and for the steps beside
it ("process"); by a process reward model from exact labels of steps for its weakest step at the end ("min"), for each
step as it ends, and for what each step adds to the one before; and the last of these by a model from Monte-Carlo
labels, for which nobody looked at a step. The first two numbers of each model are in the results of the stages
`monte_carlo_labels` (agreement and AUC of the labels with the truth), `exact_model` and `monte_carlo_model`; those of
`exact_best` and `monte_carlo_best` tell which aggregate of steps chooses best.

Command    jrlhf run experiments/sorter/step_rewards.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 50 minutes
Expected   the outcome arm has right answers with wrong steps, the process arm fewer, and models of steps are between
           SFT and their checker. Labels by Monte Carlo say how likely the answer comes right: after a wrong step that
           is a half, so that they are worse at finding it. The sum of steps pays for more steps
Measured   one seed. Gold (answer and all steps right) / answer / steps: SFT 0.26 / 0.57 / 0.60, outcome 0.45 / 0.68 /
           0.74, process 0.52 / 0.71 / 0.81, min 0.45 / 0.64 / 0.78, differences 0.47 / 0.65 / 0.79, Monte Carlo
           0.28 / 0.58 / 0.63, steps 0.01 at KL 21, with alarms from update 16 on. The exact model is right about 0.99
           of held-out steps; Monte-Carlo labels agree with the truth on 0.58 [0.57, 0.58] of the steps, AUC 0.63
           [0.62, 0.64], and their model on 0.61. Best of n = 1, 4, 8, 16 by the weakest step: exact 0.26, 0.47, 0.48,
           0.43; Monte Carlo 0.26, 0.24, 0.15, 0.08
"""

from dataclasses import replace

from right_answers import answers, longer_answers, ppo, start

from jrlhf.experiment import Experiment
from jrlhf.lab import SorterPrompts, SorterSteps
from jrlhf.optim import OptimConfig
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import (
    BestOfN,
    Evaluate,
    Part,
    ProcessRewardModel,
    RewardMix,
    StepLabels,
    StepReward,
)

labels = StepLabels(
    start="sft",
    reward="sorter_answer",
    prompts=SorterPrompts(size=3_000, task="parity", seed=2),
    separator=" ;",
    continuations=8,
    truth="sorter_so_far",
    sampling=answers,
)
exact = ProcessRewardModel(
    start="sft",
    data=SorterSteps(size=16_000, task="parity"),
    separator=" ;",
    optim=OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=20),
    loop=LoopConfig(epochs=4, batch_size=64),
)
models = {
    "monte_carlo_labels": labels,
    "exact_model": exact,
    "monte_carlo_model": replace(exact, data=None, steps="monte_carlo_labels"),
    "checked": RewardMix(parts={"answer": Part("sorter_answer"), "steps": Part("sorter_steps")}),
    "exact_steps": StepReward("exact_model", as_reward="steps"),
    "exact_differences": StepReward("exact_model", as_reward="differences"),
    "monte_carlo_differences": StepReward("monte_carlo_model", as_reward="differences"),
}
arms = {
    "outcome": ppo("sorter_answer", "parity"),
    "process": ppo("checked", "parity"),
    "min": ppo("exact_model", "parity"),
    "steps": ppo("exact_steps", "parity"),
    "differences": ppo("exact_differences", "parity"),
    "monte_carlo": ppo("monte_carlo_differences", "parity"),
}
best = BestOfN(
    start="sft",
    reward="exact_model",
    gold="sorter_gold",
    prompts=SorterPrompts(size=128, split="eval", task="parity", seed=1),
    samples=16,
    sampling=answers,
)

experiment = Experiment(
    name="sorter-step-rewards",
    stages={
        **start,
        **models,
        **arms,
        "exact_best": best,
        "monte_carlo_best": replace(best, reward="monte_carlo_model"),
        "evaluate": Evaluate(
            policies=("sft", *arms),
            gold="sorter_gold",
            prompts={"parity": SorterPrompts(size=256, split="eval", task="parity", seed=1)},
            samples=8,
            sampling=longer_answers,
        ),
    },
)
