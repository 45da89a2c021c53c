"""Right for the wrong reasons: outcome and process rewards on a question that can be guessed.

The parity of the inversions is even or odd, so that half of all guesses are right. A reward for the answer alone pays
for them; a reward for the steps does not. Gold asks for both: the answer and every step must be right.

Command    jrlhf run experiments/sorter/right_steps.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 15 minutes
Expected   both arms answer better than SFT; of the answers that are right, the outcome arm has the larger share with a
           wrong step (answer minus gold, among the criteria of the report)
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
