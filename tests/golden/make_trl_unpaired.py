"""TRL's losses on single labelled answers and for distillation, with their gradients: trl_unpaired.npz.

    pip install trl==1.5.0 torch==2.13 transformers==5.23        (trl 1.16 has no BCO any more)
    python tests/golden/make_trl_unpaired.py

Random log-probabilities and logits go through TRL's own functions: `KTOTrainer.kto_loss` ("kto" with weights, and
"apo_zero_unpaired"), `BCOTrainer.bco_loss` with its `RunningMoments` over three batches, and
`GKDTrainer.generalized_jsd_loss`. Gradients are of the mean loss of a batch (KTO, BCO), or of the loss itself (GKD).
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
import trl
from trl.experimental.bco.bco_trainer import BCOTrainer, RunningMoments
from trl.experimental.gkd import GKDTrainer
from trl.experimental.kto.kto_trainer import KTOTrainer

BETA, WEIGHTS, BATCHES, ROWS = 0.3, (1.3, 0.7), 3, 10
accelerator = SimpleNamespace(
    gather_for_metrics=lambda x: x, device=torch.device("cpu"), use_distributed=False
)
draw = np.random.default_rng(0)
out: dict[str, np.ndarray] = {"beta": np.float32(BETA), "weights": np.asarray(WEIGHTS, np.float32)}


def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (scale * draw.standard_normal(shape)).astype(np.float32)


# --- single labelled answers --------------------------------------------------------------------------------

labels = draw.random((BATCHES, ROWS)) < 0.6
ref = -20 + normal(BATCHES, ROWS, scale=5)
policy = ref + normal(BATCHES, ROWS, scale=4)
kl_ref = -20 + normal(BATCHES, ROWS, scale=5)
kl_policy = kl_ref + normal(BATCHES, ROWS, scale=2) + np.asarray([[1.5], [0.8], [-2.0]], np.float32)
out |= {"labels": labels, "ref": ref, "policy": policy, "kl_ref": kl_ref, "kl_policy": kl_policy}


def in_order(wanted: np.ndarray, of_desirable: np.ndarray, of_undesirable: np.ndarray) -> np.ndarray:
    """TRL keeps the two labels apart: back to the rows' own order."""
    rows = np.empty(len(wanted), np.float32)
    rows[wanted], rows[~wanted] = of_desirable, of_undesirable
    return rows


def both(loss, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(losses, gradient of their mean) of batch n, in the rows' order. loss(policy's desirable, undesirable)."""
    wanted = labels[n]
    chosen, rejected = (torch.tensor(policy[n][w], requires_grad=True) for w in (wanted, ~wanted))
    losses = loss(chosen, rejected)
    losses.mean().backward()
    values = losses.detach().numpy()
    first = int(wanted.sum())
    return in_order(wanted, values[:first], values[first:]), in_order(wanted, chosen.grad, rejected.grad)


def references(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(ref[n][labels[n]]), torch.tensor(ref[n][~labels[n]])


for loss_type in ("kto", "apo_zero_unpaired"):
    trainer = SimpleNamespace(
        accelerator=accelerator, beta=BETA, loss_type=loss_type, calculate_KL=loss_type == "kto",
        desirable_weight=WEIGHTS[0], undesirable_weight=WEIGHTS[1],
    )  # fmt: skip
    found, z0 = [], []
    for n in range(BATCHES):

        def loss(chosen, rejected, n=n, trainer=trainer, z0=z0):
            losses, _, _, kl = KTOTrainer.kto_loss(
                trainer, chosen, rejected, torch.tensor(kl_policy[n]), *references(n), torch.tensor(kl_ref[n])
            )
            z0.append(float(kl))
            return losses

        found.append(both(loss, n))
    out[f"{loss_type}/loss"], out[f"{loss_type}/grad"] = (np.stack(x) for x in zip(*found, strict=True))
    out[f"{loss_type}/z0"] = np.asarray(z0, np.float32)

trainer = SimpleNamespace(
    accelerator=accelerator,
    beta=BETA,
    running=RunningMoments(accelerator),
    match_underlying_distribution=False,
)
found, deltas = [], []
for n in range(BATCHES):

    def loss(chosen, rejected, n=n):
        losses, _, _, delta = BCOTrainer.bco_loss(trainer, chosen, rejected, *references(n), None, None)
        deltas.append(float(delta))
        return losses

    found.append(both(loss, n))
out["bco/loss"], out["bco/grad"] = (np.stack(x) for x in zip(*found, strict=True))
out["bco/delta"] = np.asarray(deltas, np.float32)

# --- distillation -------------------------------------------------------------------------------------------

student, teacher = normal(3, 5, 17, scale=2), normal(3, 5, 17, scale=2)
mask = draw.random((3, 5)) < 0.7
out |= {"student": student, "teacher": teacher, "mask": mask}
targets = torch.where(torch.tensor(mask), 1, -100)
for beta in (0.0, 0.1, 0.5, 1.0):
    for temperature in (1.0, 0.7):
        logits = torch.tensor(student, requires_grad=True)
        value = GKDTrainer.generalized_jsd_loss(
            logits, torch.tensor(teacher), targets, beta=beta, temperature=temperature
        )
        value.backward()
        out[f"jsd/{beta}/{temperature}/loss"] = np.asarray(value.item(), np.float32)
        out[f"jsd/{beta}/{temperature}/grad"] = logits.grad.numpy()

out["versions"] = np.array([f"{m.__name__} {m.__version__}" for m in (trl, torch, transformers)])
np.savez_compressed(Path(__file__).with_name("trl_unpaired.npz"), **out)
