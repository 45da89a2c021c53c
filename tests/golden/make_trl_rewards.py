"""Makes the values of reward-model losses that `tests/ops/test_reward_losses.py` compares with.

    python tests/golden/make_trl_rewards.py [FOLDER]

Needs torch, transformers and trl, which the tests do not. Writes `trl_rewards.npz` beside this file, or into FOLDER:
losses and gradients of trl's RewardTrainer on given scores of chosen and rejected answers (plain, with margins, with
centering), and those of transformers' token classification, with which trl's PRMTrainer trained process reward models
of two labels, -100 being no label; `versions` of what made them.
"""

import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
import trl
from transformers.loss.loss_utils import ForTokenClassification
from trl import RewardTrainer

PAIRS, ROWS, LENGTH = 7, 4, 9
CENTERING = 0.03


def reward_loss(scores: torch.Tensor, margin: torch.Tensor | None, centering: float | None) -> torch.Tensor:
    """RewardTrainer's own `compute_loss`, with a model whose scores are given. scores [2 N], chosen ones first."""
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centering),
        accelerator=same,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {} if margin is None else {"margin": margin}

    def model(**inputs):
        return SimpleNamespace(logits=scores[:, None])

    return RewardTrainer.compute_loss(trainer, model, inputs)


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    scores = torch.tensor(2 * rng.standard_normal(2 * PAIRS), dtype=torch.float32, requires_grad=True)
    margin = torch.tensor(np.abs(rng.standard_normal(PAIRS)), dtype=torch.float32)
    out = {"scores": scores.detach().numpy(), "margin": margin.numpy(), "centering": np.float32(CENTERING)}
    for name, settings in {
        "plain": (None, None),
        "margin": (margin, None),
        "centered": (margin, CENTERING),
    }.items():
        loss = reward_loss(scores, *settings)
        (gradient,) = torch.autograd.grad(loss, scores)
        out |= {f"{name}_loss": loss.detach().numpy(), f"{name}_gradient": gradient.numpy()}

    logits = torch.tensor(2 * rng.standard_normal((ROWS, LENGTH, 2)), dtype=torch.float32, requires_grad=True)
    labels = torch.tensor(rng.choice([-100, -100, 0, 1], (ROWS, LENGTH)))
    loss = ForTokenClassification(logits, labels, SimpleNamespace(num_labels=2))
    (gradient,) = torch.autograd.grad(loss, logits)
    out |= {
        "step_logits": logits.detach().numpy(),
        "step_labels": labels.numpy(),
        "step_loss": loss.detach().numpy(),
        "step_gradient": gradient.numpy(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}",
    }
    np.savez(folder / "trl_rewards.npz", **out)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
