"""B10: whose values? Two groups of labellers who want different things; one reward model for all, or one for each.

Group A weighs (helpful, harmless) by (1.3, 0.5), group B by (0.6, 1.6), and half of the labellers are of each. Pooled,
their labels are the average of two peoples and nobody's wish. Reward models that are told the groups, or find them by
themselves, are put together by their mean, by a vote, or by the group that is worst off (MaxMin-RLHF, Chakraborty et
al. 2024); every policy is judged by the gold reward of either group.

Command    jrlhf run experiments/larder/diverse_values.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 15 minutes; pretraining and SFT are those of ppo_vs_dpo.py, and found where that has run
Expected   each group's own model predicts its held-out labels better than the pooled one does; the mixture's `types`
           tell A00 to A09 from B10 to B19 without being told; a policy for one group has less gold of the other; the
           policies for the worst-off group have at least the pooled one's gold of the worse-off group
Measured   one seed: the mixture tells all 20 labellers apart, but the pooled policy has the most gold of either group
           (A 1.19, B 1.23; worst of the mixture 1.17 and 1.19, others 0.89 to 1.15): with 4,000 prompts half of the
           labels costs a group more than the other group's votes do
"""

from dataclasses import replace

from ppo_vs_dpo import experiment as base

from jrlhf.algorithms.reward_model import RewardModelConfig
from jrlhf.experiment import Experiment
from jrlhf.training.stages import RewardEnsemble

pooled = base.stages["reward_model"]

reward_models = {
    "rm_A": replace(pooled, labelers=("A*",)),
    "rm_B": replace(pooled, labelers=("B*",)),
    "rm_heads": replace(pooled, algorithm=RewardModelConfig(groups=("A*", "B*"))),
    "rm_mixture": replace(pooled, algorithm=RewardModelConfig(mixture=2)),  # nobody says who belongs together
}
rewards = {
    "mean": RewardEnsemble(("rm_A", "rm_B")),
    "vote": RewardEnsemble(("rm_A", "rm_B"), combine="vote"),
    "worst": RewardEnsemble(("rm_A", "rm_B"), combine="min"),
    "worst_of_heads": RewardEnsemble(("rm_heads",), combine="min"),
    "worst_of_mixture": RewardEnsemble(("rm_mixture",), combine="min"),
}
# Several reward models have no parameters for the critic to start from, so that all start from the policy's.
ppo = replace(base.stages["ppo"], critic="policy")
policies = {
    "ppo_pooled": ppo,
    "ppo_A": replace(ppo, reward="rm_A"),
    "ppo_B": replace(ppo, reward="rm_B"),
    **{f"ppo_{name}": replace(ppo, reward=name) for name in rewards},
}

experiment = Experiment(
    name="larder-diverse-values",
    stages={
        **{name: base.stages[name] for name in ("pretrain", "sft", "preferences", "reward_model")},
        **reward_models,
        **rewards,
        **policies,
        "evaluate": replace(
            base.stages["evaluate"],
            policies=("sft", *policies),
            groups=("larder_gold_A", "larder_gold_B"),
            best_of_n="",
        ),
    },
)
