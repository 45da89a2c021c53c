"""Learning from comparisons of one's own answers: DPO once, DPO in rounds, online DPO, and imitation of the best.

All learn from the same reward model. Offline DPO sees only SFT's answers; iterative DPO has each round's policy
answer again (Xiong et al. 2024), online DPO does so in every step; RAFT imitates the best of its own answers,
best-of-n distillation the best of SFT's.

Command    jrlhf run experiments/larder/iterative.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 10 minutes
Expected   online and iterative DPO above DPO in gold; best-of-n distillation near the best of 8 of SFT, at a KL near
1.2
"""

from dataclasses import replace

from ppo_vs_dpo import answers, evaluation_prompts
from ppo_vs_dpo import experiment as base

from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.online_dpo import OnlineDPOConfig
from jrlhf.algorithms.raft import RAFTConfig
from jrlhf.experiment import Experiment
from jrlhf.lab import LarderPrompts
from jrlhf.ops.on_policy import OnPolicyConfig
from jrlhf.optim import OptimConfig
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import DirectAlignment, Evaluate, OnPolicy, Preferences

ROUNDS = 3


def compared(start: str, of_round: int) -> Preferences:
    """Answers of the policy `start` to the round's own prompts, ranked by the reward model."""
    prompts = LarderPrompts(size=1_300, split="reward_model", seed=10 + of_round)
    return Preferences(start=start, reward="reward_model", prompts=prompts, responses=4, sampling=answers)


def aligned(start: str, preferences: str) -> DirectAlignment:
    return DirectAlignment(
        start=start,
        preferences=preferences,
        pairs="best_worst",
        algorithm=DPOConfig(beta=0.1),
        optim=OptimConfig(lr=3e-4, schedule="cosine", warmup_steps=10),
        loop=LoopConfig(steps=40, batch_size=64),
    )


def online(algorithm: OnPolicyConfig, batch_size: int = 128) -> OnPolicy:
    return OnPolicy(
        start="sft",
        reward="reward_model",
        prompts=LarderPrompts(size=8_000),
        gold="larder_gold",
        algorithm=algorithm,
        sampling=answers,
        optim=OptimConfig(lr=3e-4, eps=1e-5, warmup_steps=16),
        loop=LoopConfig(steps=50, batch_size=batch_size),
    )


rounds = {}
for n in range(1, ROUNDS + 1):
    before = f"round_{n - 1}" if n > 1 else "sft"
    rounds[f"compared_{n}"] = compared(before, n)
    rounds[f"round_{n}"] = aligned(before, f"compared_{n}")

arms = {
    "dpo": replace(aligned("sft", "compared_1"), loop=LoopConfig(steps=40 * ROUNDS, batch_size=64)),
    "online_dpo": online(OnlineDPOConfig(beta=0.1, group_size=4, epochs=2, missing_eos_penalty=1.0)),
    "raft": online(RAFTConfig(group_size=4)),
    "best_of_8_distilled": online(RAFTConfig(group_size=8, samples="reference"), batch_size=512),
}

experiment = Experiment(
    name="larder-iterative",
    stages={
        **{name: base.stages[name] for name in ("pretrain", "sft", "preferences", "reward_model")},
        **rounds,
        **arms,
        "best_of_n": replace(base.stages["best_of_n"], samples=16),
        "evaluate": Evaluate(
            policies=("sft", *(f"round_{n}" for n in range(1, ROUNDS + 1)), *arms),
            gold="larder_gold",
            proxy="reward_model",
            best_of_n="best_of_n",
            prompts=evaluation_prompts,
            sampling=answers,
        ),
    },
)
