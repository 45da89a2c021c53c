"""B9: best-of-n against ensembles of five reward models, where a quarter of the labels is turned round.

One reward model overrates some answers, and choosing the best of many finds them. Five that differ in their first head
and the order of the data overrate different ones: the worst of five, or their mean less λ times their variance, is
harder to fool (Coste et al. 2023; Eisenstein et al. 2023).

Command    jrlhf run experiments/larder/ensembles.py --seeds 0 1 2 3 4 --seed_from preferences
Hardware   two CPU cores, 3 GiB of memory
Time       about 25 minutes with five seeds
Expected   gold falls from its peak to n = 256 by at most half as much with one of the two as with a single reward model
Measured   five seeds: by 0.86 as much: members that share their labels share their errors (docs/lab.md)
"""

from dataclasses import replace

from best_of_n import best_of
from ppo_vs_dpo import experiment as base

from jrlhf.experiment import Experiment
from jrlhf.lab import LarderLabelers, LarderPrompts
from jrlhf.training.stages import Preferences, RewardEnsemble, RewardModel
from jrlhf.training.stages.reward_ensemble import reward_members

preferences, model = base.stages["preferences"], base.stages["reward_model"]
assert isinstance(preferences, Preferences)
assert isinstance(model, RewardModel)
members = {f"member_{n}": member for n, member in enumerate(reward_members(model, 5))}
ensembles = {
    "mean": RewardEnsemble(tuple(members), combine="mean"),
    "worst": RewardEnsemble(tuple(members), combine="min"),
    "careful": RewardEnsemble(tuple(members), combine="mean_minus_variance", lam=1.0),
}

experiment = Experiment(
    name="larder-ensembles",
    stages={
        "pretrain": base.stages["pretrain"],
        "sft": base.stages["sft"],
        "preferences": replace(
            preferences,
            prompts=LarderPrompts(size=2_000, split="reward_model"),
            labeler=LarderLabelers(flip=0.25),
        ),
        **members,
        **ensembles,
        "by_one": best_of("member_0"),
        **{f"by_{name}": best_of(name) for name in ensembles},
    },
)
