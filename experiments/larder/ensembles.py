"""B9: best-of-n against ensembles of five reward models, where a quarter of the labels is turned round.

One reward model overrates some answers, and choosing the best of many finds them. Five that differ in their first head
and the order of the data overrate different ones: the worst of five, or their mean less λ times their variance, is
harder to fool (Coste et al. 2023; Eisenstein et al. 2023). Members that share their labels share the errors in them,
so that there are ensembles of members with labels of their own besides, as many to each.

Command    jrlhf run experiments/larder/ensembles.py --seeds 0 1 2 3 4
           --seed_from preferences labels_1 labels_2 labels_3 labels_4
Hardware   two CPU cores, 3 GiB of memory
Time       about 60 minutes with five seeds
Expected   gold falls from its peak to n = 256 by at most half as much with one of the two as with a single reward model
Measured   five seeds: by 0.86 as much: members that share their labels share their errors (docs/lab.md). Members with
           labels of their own are not measured yet
"""

from dataclasses import replace

from best_of_n import best_of
from ppo_vs_dpo import experiment as base

from jrlhf.experiment import Experiment
from jrlhf.lab import LarderLabelers, LarderPrompts
from jrlhf.training.stages import RewardEnsemble, RewardModel
from jrlhf.training.stages.reward_ensemble import reward_members

model = base.stages["reward_model"]
assert isinstance(model, RewardModel)
preferences = replace(
    base.stages["preferences"],
    prompts=LarderPrompts(size=2_000, split="reward_model"),
    labeler=LarderLabelers(flip=0.25),
)
members = {f"member_{n}": member for n, member in enumerate(reward_members(model, 5))}
ensembles = {
    "mean": RewardEnsemble(tuple(members), combine="mean"),
    "worst": RewardEnsemble(tuple(members), combine="min"),
    "careful": RewardEnsemble(tuple(members), combine="mean_minus_variance", lam=1.0),
}
more_labels = {
    f"labels_{n}": replace(preferences, prompts=LarderPrompts(size=2_000, split="reward_model", seed=n))
    for n in range(1, 5)
}
more_members = {f"own_{n}": replace(members[f"member_{n}"], preferences=f"labels_{n}") for n in range(1, 5)}
of_their_own = ("member_0", *more_members)
ensembles |= {
    "worst_of_own": RewardEnsemble(of_their_own, combine="min"),
    "careful_own": RewardEnsemble(of_their_own, combine="mean_minus_variance", lam=1.0),
}

experiment = Experiment(
    name="larder-ensembles",
    stages={
        "pretrain": base.stages["pretrain"],
        "sft": base.stages["sft"],
        "preferences": preferences,
        **more_labels,
        **members,
        **more_members,
        **ensembles,
        "by_one": best_of("member_0"),
        **{f"by_{name}": best_of(name) for name in ensembles},
    },
)
