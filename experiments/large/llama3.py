"""PPO, GRPO and DPO with Llama 3 8B on human preferences for harmlessness: the pipeline at the size of a pod.

The reward model starts from the language model, PPO's critic from the reward model, and all policies from the same
start. Without LLAMA it is the 260K story model, so that it can be tried on a laptop; what is here for the pod are
batches, lengths and what is kept in memory. docs/plans.md has what the TPU compiler says of it.

Command    LLAMA=meta-llama/Meta-Llama-3-8B-Instruct JRLHF_DATA=<folder with hh-harmless-base/>
           jrlhf run experiments/large/llama3.py --distributed --mesh.data 4 --mesh.fsdp 16
Hardware   64 chips of v5p; other meshes for 16 to 256 chips of v5e, v5p, v6e, and Llama 3 70B and Mixtral (LLAMA
           names them), are in docs/plans.md. The story model: two CPU cores, 4 GiB.
Measured   not at its size, for want of a pod. The story model shows that the parts fit together.
"""

import os

from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.grpo import GRPOConfig
from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.data.sources import HHSource
from jrlhf.experiment import Experiment
from jrlhf.optim import OptimConfig
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import PPO, Checkpoint, DirectAlignment, OnPolicy, RewardModel

data = os.environ.get("JRLHF_DATA", "data")
llama = os.environ.get("LLAMA", "")
hh = os.environ.get("HH_DATA", f"{data}/hh-harmless-base/pairs.jsonl")

max_prompt, max_answer = (1024, 1024) if llama else (256, 128)
max_length = max_prompt + max_answer
answers = SamplingConfig(max_new_tokens=max_answer)
rows = 256 if llama else 16
adam = OptimConfig(lr=1e-6, schedule="cosine", warmup_steps=10)
loop = LoopConfig(steps=500 if llama else 4, batch_size=rows)

base = Checkpoint(path=f"{data}/stories260K", remat="full")
if llama:
    base = Checkpoint(path=llama, dtype="bfloat16", remat="full", vocab_multiple=512)

experiment = Experiment(
    name="llama3",
    stages={
        "base": base,
        "reward_model": RewardModel(
            start="base",
            data=HHSource(hh),
            max_length=max_length,
            too_long="drop",
            optim=adam,
            loop=LoopConfig(epochs=1, batch_size=rows // 2),
        ),
        "ppo": PPO(
            start="base",
            reward="reward_model",
            prompts=HHSource(hh, kind="prompt"),
            algorithm=PPOConfig(beta=0.02, epochs=1, minibatches=2),
            sampling=answers,
            optim=adam,
            critic_optim=OptimConfig(lr=5e-6, warmup_steps=10),
            loop=loop,
            max_prompt=max_prompt,
            too_long="drop",
        ),
        "grpo": OnPolicy(
            start="base",
            reward="reward_model",
            prompts=HHSource(hh, kind="prompt"),
            algorithm=GRPOConfig(beta=0.02, group_size=8),
            sampling=answers,
            optim=adam,
            loop=loop,
            max_prompt=max_prompt,
            too_long="drop",
        ),
        "dpo": DirectAlignment(
            start="base",
            data=HHSource(hh),
            max_length=max_length,
            too_long="drop",
            algorithm=DPOConfig(beta=0.1),
            optim=adam,
            loop=LoopConfig(epochs=1, batch_size=rows // 2),
        ),
    },
)
