"""Every stage on Larder, as small as it can be: the experiment that the tests of this folder run."""

from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.config import MeshConfig
from jrlhf.experiment import Experiment
from jrlhf.lab import LarderDemonstrations, LarderLabelers, LarderPrompts, LarderText, LarderVocabulary
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

answers = SamplingConfig(max_new_tokens=8)
prompts = LarderPrompts(size=16, split="eval", seed=1)
adam = OptimConfig(lr=1e-2, schedule="cosine")


def loop(steps: int, batch_size: int = 8, **more) -> LoopConfig:
    return LoopConfig(steps=steps, batch_size=batch_size, checkpoint_every=2, **more)


experiment = Experiment(
    name="tiny",
    mesh=MeshConfig(data=-1, fsdp=2),
    stages={
        "pretrain": Pretrain(
            data=LarderText(documents=96),
            tokenizer=TokenizerConfig(model_type="word", vocab_size=128, texts=(LarderVocabulary(),)),
            model=ModelConfig(d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=32, context=40),
            optim=adam,
            loop=loop(6, eval_every=2),
            eval_rows=8,
        ),
        "sft": SFT(
            start="pretrain", data=LarderDemonstrations(size=96), optim=adam, loop=loop(4), eval_rows=8
        ),
        "preferences": Preferences(
            start="sft",
            prompts=LarderPrompts(size=32, split="reward_model"),
            labeler=LarderLabelers(),
            responses=3,
            sampling=answers,
        ),
        "reward_model": RewardModel(
            start="sft",
            preferences="preferences",
            optim=adam,
            loop=loop(5, eval_every=2),
            eval_fraction=0.25,
        ),
        "ppo": PPO(
            start="sft",
            reward="reward_model",
            prompts=LarderPrompts(size=64),
            gold="larder_gold",
            eval_prompts=prompts,
            algorithm=PPOConfig(epochs=2, minibatches=2, target_kl=0.1, kl_horizon=100),
            sampling=answers,
            optim=adam,
            critic_optim=adam,
            loop=loop(5, eval_every=3),
        ),
        "dpo": DirectAlignment(
            start="sft",
            preferences="preferences",
            algorithm=DPOConfig(beta=0.1),
            optim=adam,
            eval_prompts=prompts,
            gold="larder_gold",
            sampling=answers,
            loop=loop(4),
            eval_fraction=0.25,
        ),
        "best_of_n": BestOfN(
            start="sft",
            reward="reward_model",
            gold="larder_gold",
            prompts=prompts,
            samples=4,
            sampling=answers,
        ),
        "evaluate": Evaluate(
            policies=("sft", "ppo", "dpo"),
            gold="larder_gold",
            proxy="reward_model",
            best_of_n="best_of_n",
            prompts={"eval": prompts, "four": LarderPrompts(size=8, split="held_out_four")},
            sampling=answers,
            samples=2,
        ),
    },
)
