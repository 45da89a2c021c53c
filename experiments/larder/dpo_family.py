"""Methods that learn directly from preferences: losses of DPO, without a reference, from rankings, from single labels.

One dataclass tells the arms apart. None has a reward model or samples; each is shown with the KL of its own answers.

Command    jrlhf run experiments/larder/dpo_family.py
Hardware   two CPU cores, 2 GiB of memory
Time       about 12 minutes
Expected   all above SFT in gold; their betas are those of the papers, and not tuned: compare at equal KL
"""

from dataclasses import replace

from ppo_vs_dpo import experiment as base

from jrlhf.algorithms.cpo import CPOConfig
from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.kto import KTOConfig
from jrlhf.algorithms.orpo import ORPOConfig
from jrlhf.algorithms.ranked_dpo import RankedDPOConfig
from jrlhf.algorithms.simpo import SimPOConfig
from jrlhf.experiment import Experiment
from jrlhf.optim import OptimConfig
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import DirectAlignment, UnpairedAlignment

optim = OptimConfig(lr=3e-4, schedule="cosine", warmup_steps=20)
pairs = DirectAlignment(
    start="sft", preferences="preferences", optim=optim, loop=LoopConfig(steps=200, batch_size=64)
)
algorithms = {
    "dpo": DPOConfig(beta=0.1),
    "ipo": DPOConfig(beta=0.1, loss="ipo"),
    "dpo_hinge": DPOConfig(beta=0.1, loss="hinge"),
    "dpo_robust": DPOConfig(beta=0.1, loss="robust", label_smoothing=0.1),
    "rpo": DPOConfig(beta=0.1, rpo_alpha=1.0),
    "simpo": SimPOConfig(),
    "cpo": CPOConfig(),
    "orpo": ORPOConfig(),
}
arms = {
    **{name: replace(pairs, algorithm=algorithm) for name, algorithm in algorithms.items()},
    # A row is a prompt with its four answers, as heavy as two pairs.
    "ranked_dpo": replace(
        pairs, algorithm=RankedDPOConfig(beta=0.1), loop=LoopConfig(steps=200, batch_size=32)
    ),
    "kto": UnpairedAlignment(
        start="sft",
        preferences="preferences",
        algorithm=KTOConfig(beta=0.1),
        optim=optim,
        loop=LoopConfig(steps=200, batch_size=64),
    ),
}

experiment = Experiment(
    name="larder-dpo-family",
    stages={
        **{name: base.stages[name] for name in ("pretrain", "sft", "preferences", "reward_model")},
        **arms,
        "evaluate": replace(base.stages["evaluate"], policies=("sft", *arms), best_of_n=""),
    },
)
