"""Right for the wrong reasons: outcome and process rewards on a question that can be guessed.

The parity of the inversions is even or odd, so that half of all guesses are right. A reward for the answer alone pays
for them; a reward for the steps does not. Gold asks for both: the answer and every step must be right.

Command    jrlhf run experiments/sorter/right_steps.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 15 minutes
Expected   the outcome arm has more right answers, the process arm more answers whose steps are all right
Measured   one seed, 256 parities and 128 sorts x 8 answers. `sort`: right answers to the task that neither arm was
           trained on. `right by luck`: of the right parities, those with a wrong step.

           policy     answer    all steps    gold    KL      sort    right by luck
           SFT        0.57      0.31         0.26    0       0.48    55%
           outcome    0.69      0.45         0.45    0.81    0.43    34%
           process    0.61      0.52         0.42    0.62    0.78    31%

           Nothing pays the process arm to read its answer off the last step, where demonstrators err 20% of the time.
"""

from right_answers import longer_answers, ppo, start

from jrlhf.experiment import Experiment
from jrlhf.lab import SorterPrompts
from jrlhf.training.stages import Evaluate

arms = {
    "outcome": ppo("sorter_answer", "parity"),
    "process": ppo("sorter_steps", "parity"),
}

experiment = Experiment(
    name="sorter-right-steps",
    stages={
        **start,
        **arms,
        "evaluate": Evaluate(
            policies=("sft", *arms),
            gold="sorter_gold",
            prompts={
                "parity": SorterPrompts(size=256, split="eval", task="parity", seed=1),
                "sort": SorterPrompts(size=128, split="eval", task="sort", seed=1),
            },
            samples=8,
            sampling=longer_answers,
        ),
    },
)
