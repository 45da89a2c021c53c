"""Makes trl_policies.npz: TRL's own GRPO and RLOO losses, and their gradients, on random log-probabilities.

    pip install trl torch transformers accelerate datasets
    python tests/golden/make_trl_policies.py

Each case calls `GRPOTrainer._compute_loss` or `RLOOTrainer._compute_loss` itself, on a stand-in that has the few
attributes it reads and whose "model" gives back the log-probabilities. Versions are written beside the arrays.
"""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
import trl
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

ROWS, TOKENS, SLOTS = 6, 5, 9  # SLOTS: the length that Dr. GRPO divides by
CASES = {
    "grpo": {"loss_type": "grpo"},
    "grpo_k3": {"loss_type": "grpo", "beta": 0.3},
    "grpo_k3_ratio": {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": True},
    "grpo_entropy": {"loss_type": "grpo", "entropy_coef": 0.2},
    "bnpo_k3": {"loss_type": "bnpo", "beta": 0.3},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dapo_weighted": {"loss_type": "dapo", "epsilon_high": 0.28, "weighted": True},
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon_low": 0.03,
        "epsilon_high": 0.04,
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.5},
}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    old = rng.normal(-1.5, 0.5, (ROWS, TOKENS))
    lengths = np.array([5, 1, 3, 4, 2, 5])
    return {
        "old_logprobs": old,
        "logprobs": old + rng.normal(0.0, 0.4, old.shape),
        "ref_logprobs": old + rng.normal(0.0, 0.5, old.shape),
        "entropy": rng.uniform(0.1, 2.0, old.shape),
        "advantages": rng.normal(0.0, 1.0, ROWS),
        "weights": rng.uniform(0.5, 2.0, old.shape),
        "mask": np.arange(TOKENS) < lengths[:, None],
    }


class Accelerator:
    num_processes, sync_gradients = 1, False
    gather = gather_for_metrics = staticmethod(lambda x: x)
    reduce = staticmethod(lambda x, reduction: x)


def trainer(logprobs, entropies, **case) -> SimpleNamespace:
    """What the two `_compute_loss` read of a trainer."""
    args = SimpleNamespace(
        use_bias_correction_kl=case.get("use_bias_correction_kl", False), delta=None, steps_per_generation=1
    )
    coef = case.get("entropy_coef", 0.0)
    return SimpleNamespace(
        args=args, accelerator=Accelerator(), model=SimpleNamespace(training=True),
        beta=case.get("beta", 0.0), loss_type=case.get("loss_type"),
        importance_sampling_level=case.get("importance_sampling_level", "token"),
        epsilon_low=case.get("epsilon_low", 0.2), epsilon_high=case.get("epsilon_high", 0.2),
        max_completion_length=SLOTS, current_gradient_accumulation_steps=1, off_policy_mask_threshold=None,
        top_entropy_quantile=1.0, use_vllm="weighted" in case, vllm_importance_sampling_correction="weighted" in case,
        _entropy_bonus_enabled=bool(coef), use_adaptive_entropy=False, entropy_coef=coef,
        aux_loss_enabled=False, _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, entropies, None),
    )  # fmt: skip


def main() -> None:
    given = arrays()
    out = dict(given)
    tensor = lambda name: torch.tensor(given[name], dtype=torch.float64)  # noqa: E731
    mask = torch.tensor(given["mask"], dtype=torch.long)
    for name, case in {**CASES, "rloo": {}}.items():
        logprobs, entropies = tensor("logprobs").requires_grad_(), tensor("entropy").requires_grad_()
        stand_in = trainer(logprobs, entropies, **case)
        prompt = torch.ones((ROWS, 2), dtype=torch.long)
        inputs = {
            "prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": torch.zeros_like(mask),
            "completion_mask": mask, "advantages": tensor("advantages"), "old_per_token_logps": tensor("old_logprobs"),
            "ref_per_token_logps": tensor("ref_logprobs"), "importance_sampling_ratio": tensor("weights"),
            "old_logps": (tensor("old_logprobs") * mask).sum(1), "num_items_in_batch": mask.sum(),
        }  # fmt: skip
        loss = (RLOOTrainer if name == "rloo" else GRPOTrainer)._compute_loss(stand_in, None, inputs)
        loss.backward()
        out[f"{name}/loss"] = loss.detach().numpy()
        out[f"{name}/grad"] = logprobs.grad.numpy()
        out[f"{name}/entropy_grad"] = (
            np.zeros_like(given["entropy"]) if entropies.grad is None else entropies.grad.numpy()
        )
    out["versions"] = np.array(
        [f"trl {trl.__version__}", f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    )
    np.savez(Path(__file__).with_name("trl_policies.npz"), **out)
    for name in (*CASES, "rloo"):
        print(f"{name:16}{float(out[name + '/loss']):10.6f}")


if __name__ == "__main__":
    main()
