"""Grade-school maths from a verifiable reward: GRPO on GSM8K (Cobbe et al. 2021), 1 where the last number is right.

No reward model stands between: `Verifier` compares the number of each answer with the row's, in worker processes. The
report's pass@k table says what was there to be found before training (pass@8 of the base) and what is left. One tenth
of the training questions, by a hash, is held out for evaluation.

Command    JRLHF_DATA=<folder with stories260K/ and gsm8k/> jrlhf run experiments/gsm8k/grpo.py
           with a network: GSM8K_MODEL=Qwen/Qwen2.5-0.5B-Instruct GSM8K_DATA=openai/gsm8k jrlhf run ...
Hardware   two CPU cores, 4 GiB of memory, for the 260K story model; one accelerator of 40 GiB for 0.5B parameters
Time       about 15 minutes with the story model
Measured   with the 260K story model, which has never seen a sum: 10 steps, every reward 0, pass@8 of 125 held-out
           questions 0 before and after. It shows that the parts fit together, no more. What a model that can count
           learns here has not been measured.
"""

import os

from jrlhf.algorithms.grpo import GRPOConfig
from jrlhf.data.gsm8k import GSM8K
from jrlhf.experiment import Experiment
from jrlhf.optim import OptimConfig
from jrlhf.rewards.verifiers import Number
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import Checkpoint, Evaluate, OnPolicy, Verifier

data = os.environ.get("JRLHF_DATA", "data")
questions = os.environ.get("GSM8K_DATA", f"{data}/gsm8k/train.jsonl")
model = os.environ.get("GSM8K_MODEL", "")

# The story model has no chat template, 512 tokens of context and a vocabulary of letters.
chat = "messages" if model else "text"
answers = SamplingConfig(max_new_tokens=400 if model else 64)
max_prompt = 300
prompts = GSM8K(questions, chat=chat)
held_out = GSM8K(questions, split="test", chat=chat, max_rows=128)

experiment = Experiment(
    name="gsm8k-grpo",
    stages={
        "base": Checkpoint(path=model or f"{data}/stories260K", remat="full"),
        "right": Verifier(check=Number()),
        "grpo": OnPolicy(
            start="base",
            reward="right",
            prompts=prompts,
            algorithm=GRPOConfig(beta=0.001, group_size=8, minibatches=2, microbatches=2),
            sampling=answers,
            optim=OptimConfig(lr=1e-6, eps=1e-8, schedule="cosine", warmup_steps=10),
            loop=LoopConfig(steps=200 if model else 10, batch_size=256 if model else 64),
            max_prompt=max_prompt,
            too_long="drop",
        ),
        "evaluate": Evaluate(
            policies=("base", "grpo"),
            gold="right",
            prompts={"held out": held_out},
            sampling=answers,
            samples=8,
            max_prompt=max_prompt,
            too_long="drop",
        ),
    },
)
