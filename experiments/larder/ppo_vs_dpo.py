"""PPO, DPO and best-of-n on Larder, from raw text to a comparison.

A small language model is pretrained on pantry sentences, fine-tuned on mediocre demonstrations, and improved from the
preferences of twenty simulated labellers. The gold reward is known exactly, so the comparison can be believed.

Command    jrlhf run experiments/larder/ppo_vs_dpo.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 5 minutes
Expected   gold (seed 0): SFT 0.54, PPO 1.28 at KL 1.8, DPO 1.08 at KL 1.0, best-of-16 1.26; the maximum is 1.57
"""

from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.experiment import Experiment
from jrlhf.lab import (
    LarderDemonstrations,
    LarderLabelers,
    LarderPrompts,
    LarderText,
    LarderVocabulary,
)
from jrlhf.models.config import ModelConfig
from jrlhf.optim import OptimConfig
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import (
    PPO,
    SFT,
    BestOfN,
    DirectAlignment,
    Evaluate,
    Preferences,
    Pretrain,
    RewardModel,
    TokenizerConfig,
)

answers = SamplingConfig(max_new_tokens=28)
evaluation_prompts = {
    "eval": LarderPrompts(size=256, split="eval", seed=1),
    "held_out_four": LarderPrompts(size=128, split="held_out_four", seed=1),
    "held_out_pairs": LarderPrompts(size=128, split="held_out_pairs", seed=1),
    "held_out_instruction": LarderPrompts(size=128, split="held_out_instruction", seed=1),
}

experiment = Experiment(
    name="larder-ppo-vs-dpo",
    stages={
        "pretrain": Pretrain(
            data=LarderText(documents=40_000),
            tokenizer=TokenizerConfig(model_type="word", vocab_size=128, texts=(LarderVocabulary(),)),
            model=ModelConfig(
                d_model=64, n_layers=3, n_heads=4, n_kv_heads=4, d_ff=192, context=40, remat="full"
            ),
            optim=OptimConfig(lr=3e-3, schedule="cosine", warmup_steps=20, weight_decay=0.01),
            loop=LoopConfig(steps=450, batch_size=128),
        ),
        "sft": SFT(
            start="pretrain",
            data=LarderDemonstrations(size=8_000),
            optim=OptimConfig(lr=1e-3, schedule="cosine"),
            loop=LoopConfig(epochs=2, batch_size=64),
        ),
        "preferences": Preferences(
            start="sft",
            prompts=LarderPrompts(size=4_000, split="reward_model"),
            labeler=LarderLabelers(),
            responses=4,
            sampling=answers,
        ),
        "reward_model": RewardModel(
            start="sft",
            preferences="preferences",
            # Without a warm-up the fresh head's first gradients undo what the model knows: truth is then learned late.
            optim=OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=50),
            loop=LoopConfig(epochs=3, batch_size=16),
        ),
        "ppo": PPO(
            start="sft",
            reward="reward_model",
            prompts=LarderPrompts(size=8_000),
            gold="larder_gold",
            algorithm=PPOConfig(beta=0.1),
            sampling=answers,
            optim=OptimConfig(lr=3e-4, eps=1e-5, warmup_steps=16),
            critic_optim=OptimConfig(lr=1e-3, eps=1e-5, warmup_steps=16),
            loop=LoopConfig(steps=50, batch_size=128),
        ),
        "dpo": DirectAlignment(
            start="sft",
            preferences="preferences",
            algorithm=DPOConfig(beta=0.1),
            optim=OptimConfig(lr=3e-4, schedule="cosine", warmup_steps=20),
            eval_prompts=LarderPrompts(size=256, split="eval"),
            gold="larder_gold",
            sampling=answers,
            loop=LoopConfig(steps=120, batch_size=64, eval_every=40),
        ),
        "best_of_n": BestOfN(
            start="sft",
            reward="reward_model",
            gold="larder_gold",
            prompts=evaluation_prompts["eval"],
            samples=32,
            sampling=answers,
        ),
        "evaluate": Evaluate(
            policies=("sft", "ppo", "dpo"),
            gold="larder_gold",
            proxy="reward_model",
            best_of_n="best_of_n",
            prompts=evaluation_prompts,
            sampling=answers,
        ),
    },
)
