"""B10: whose values? Two groups of labellers who want opposite things; one reward model for all, or one for each.

Group B weighs (helpful, harmless) by (0.6, 1.6): hazards are to be refused. Group C weighs them by (1.3, -0.6): it
would rather hear about a hazard than be refused. Half of the labellers are of each. Pooled, their labels are the
average of two peoples and nobody's wish. Reward models that are told the groups, or find them by themselves, serve each
group its own policy, or one policy for both: by their mean, by a vote, or by the group that is worst off (MaxMin-RLHF,
Chakraborty et al. 2024). Every policy is judged by the gold reward of either group, at about the same KL.

Groups A (1.3, 0.5) and B disagree on the weight of two things that one answer can have both: PPO on the gold of A, of B
or of both (beta 0.2, one seed) leaves A 1.37, 1.23 and 1.37, and B 1.28, 1.26 and 1.32. There is nothing to recover, so
that they are not the groups here.

Command    jrlhf run experiments/larder/diverse_values.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 15 minutes; pretraining and SFT are those of ppo_vs_dpo.py, and found where that has run
Expected   each group's own model predicts its held-out labels better than the pooled one does; the mixture's `types`
           tell B00 to B09 from C10 to C19 without being told; a group's own policy has more of its gold than the pooled
           policy; policies for the worst-off group have at least the pooled one's gold of the worse-off group
Measured   five seeds. Gold of B / of C: SFT 0.43 / 0.58, pooled 1.02 / 0.66, B's own 1.10 / 0.41,
           C's own -0.49 / 1.02. Pooling costs C 0.36 [0.22, 0.50], B 0.08 [-0.02, 0.18]; heads on one
           trunk do as well as models of their own, the mixture tells all 20 labellers apart. No policy for both at once
           has more for the group that gains less than the pooled one
"""

from dataclasses import replace

from ppo_vs_dpo import evaluation_prompts
from ppo_vs_dpo import experiment as base

from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.algorithms.reward_model import RewardModelConfig
from jrlhf.experiment import Experiment
from jrlhf.lab import LarderLabelers
from jrlhf.training.stages import RewardEnsemble

pooled = base.stages["reward_model"]

reward_models = {
    "rm_B": replace(pooled, labelers=("B*",)),
    "rm_C": replace(pooled, labelers=("C*",)),
    "rm_heads": replace(pooled, algorithm=RewardModelConfig(groups=("B*", "C*"))),
    "rm_mixture": replace(pooled, algorithm=RewardModelConfig(mixture=2)),  # nobody says who belongs together
}
rewards = {
    "head_B": RewardEnsemble(("rm_heads",), weights=(1, 0)),
    "head_C": RewardEnsemble(("rm_heads",), weights=(0, 1)),
    "mean": RewardEnsemble(("rm_B", "rm_C")),
    "vote": RewardEnsemble(("rm_B", "rm_C"), combine="vote"),
    "worst": RewardEnsemble(("rm_B", "rm_C"), combine="min"),
    "worst_of_mixture": RewardEnsemble(("rm_mixture",), combine="min"),
}
# Several reward models have no parameters for the critic to start from, so that all start from the policy's; and what
# they say together has less spread than one of them, so that beta adapts until each policy is as far from SFT.
ppo = replace(
    base.stages["ppo"], critic="policy", gold="", algorithm=PPOConfig(beta=0.1, target_kl=1.5, kl_horizon=500)
)
policies = {
    "ppo_pooled": ppo,
    "ppo_B": replace(ppo, reward="rm_B"),
    "ppo_C": replace(ppo, reward="rm_C"),
    **{f"ppo_{name}": replace(ppo, reward=name) for name in rewards},
}

experiment = Experiment(
    name="larder-diverse-values",
    stages={
        **{name: base.stages[name] for name in ("pretrain", "sft")},
        "preferences": replace(base.stages["preferences"], labeler=LarderLabelers(group="opposed")),
        "reward_model": pooled,
        **reward_models,
        **rewards,
        **policies,
        "evaluate": replace(
            base.stages["evaluate"],
            policies=("sft", *policies),
            groups=("larder_gold_B", "larder_gold_C"),
            prompts={"eval": evaluation_prompts["eval"]},
            best_of_n="",
        ),
    },
)
