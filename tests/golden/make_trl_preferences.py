"""Makes the losses and gradients of TRL's preference trainers that `tests/ops/test_preference_losses.py` reads.

    python tests/golden/make_trl_preferences.py [FOLDER]

Needs torch, transformers and trl, which the tests do not. Writes, beside this file unless FOLDER is named,

    trl_preferences.npz   policy, ref: log-probabilities of tokens [pairs, 2, T - 1], the chosen answer first
                          mask: tokens of the answers [pairs, 2, T], of varying lengths and places
                          <case>/loss, <case>/grad: TRL's loss, and its gradient with respect to `policy`
                          versions: of what made them

The trainers' own methods are called on a stand-in for the trainer and for its model: DPOTrainer._compute_loss,
CPOTrainer.get_batch_loss_metrics and ORPOTrainer.get_batch_loss_metrics, from log-probabilities of tokens to the loss.
"""

import collections
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
import trl
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer

PAIRS, T = 6, 9
BETA = 0.3


class Accelerator:
    device = torch.device("cpu")

    def gather_for_metrics(self, x):
        return x

    gather = gather_for_metrics


def dpo(loss_type="sigmoid", weights=None, **config):
    """`config` replaces attributes of the trainer."""

    def case(policy, ref, mask):
        rows = lambda x: torch.cat([x[:, 0], x[:, 1]])  # TRL's order: all chosen, then all rejected  # noqa: E731
        completion = rows(mask)

        class Model:
            training = True

            def __init__(self, logps):
                self.logps = rows(logps) * completion[:, 1:]

            def __call__(self, **inputs):
                zeros = torch.zeros_like(self.logps)
                return SimpleNamespace(
                    log_probs=self.logps, log_sum_sq_probs=zeros, entropy=zeros, mean_logits=zeros,
                    is_top1=zeros.bool(), hidden_states=None, logits=None,
                )  # fmt: skip

        trainer = SimpleNamespace(
            model=torch.nn.Module(), accelerator=Accelerator(), aux_loss_enabled=False, ld_alpha=None,
            precompute_ref_logps=False, ref_model=Model(ref), f_divergence_type="reverse_kl", beta=BETA,
            loss_types=loss_type if isinstance(loss_type, list) else [loss_type], label_smoothing=0.0,
            use_weighting=False, args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
            _metrics=collections.defaultdict(lambda: collections.defaultdict(list)), _total_train_tokens=0, _tp_size=1,
        )  # fmt: skip
        trainer.model.is_gradient_checkpointing = False
        trainer.loss_weights = weights or [1.0]
        for name, value in config.items():
            assert hasattr(trainer, name), name
            setattr(trainer, name, value)
        inputs = {
            "input_ids": torch.zeros_like(completion),
            "attention_mask": torch.ones_like(completion),
            "completion_mask": completion,
        }
        return DPOTrainer._compute_loss(trainer, Model(policy), inputs, False)

    return case


def without_reference(cls, **config):
    """Of CPOTrainer or ORPOTrainer. Its model has a vocabulary of two ids, and the answers are written in the first:
    logits (x - log(1 - e^x), 0) give it the log-probability x."""

    def case(policy, ref, mask):
        trainer = SimpleNamespace(
            accelerator=Accelerator(), aux_loss_enabled=False, is_encoder_decoder=False, pad_token_id=1,
            padding_value=1, beta=BETA, label_smoothing=0.0, alpha=0.0, simpo_gamma=0.5, loss_type="sigmoid",
            cpo_alpha=0.0, concatenated_inputs=cls.concatenated_inputs, get_batch_logps=cls.get_batch_logps,
        )  # fmt: skip
        for name in ("cpo_loss", "odds_ratio_loss", "concatenated_forward"):
            if hasattr(cls, name):
                setattr(trainer, name, getattr(cls, name).__get__(trainer))
        for name, value in config.items():
            assert hasattr(trainer, name), name
            setattr(trainer, name, value)

        def model(input_ids, **inputs):
            x = torch.cat([policy[:, 0], policy[:, 1]])
            logits = torch.stack([x - torch.log(-torch.expm1(x)), torch.zeros_like(x)], dim=-1)
            return SimpleNamespace(logits=torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1))

        batch = {}
        for n, name in enumerate(("chosen", "rejected")):
            answer = mask[:, n]
            batch[f"{name}_input_ids"] = torch.zeros_like(answer)
            # ORPO's NLL is over all that is attended to, the prompt included: here that is the answer alone.
            batch[f"{name}_attention_mask"] = answer
            batch[f"{name}_labels"] = torch.where(answer == 1, 0, -100)
        return cls.get_batch_loss_metrics(trainer, model, batch)[0]

    return case


CASES = {
    "sigmoid": dpo(),
    "hinge": dpo("hinge"),
    "ipo": dpo("ipo"),
    "discopop": dpo("discopop"),
    "robust": dpo("robust", label_smoothing=0.1),
    "exo_pair": dpo("exo_pair", label_smoothing=0.1),
    "nca_pair": dpo("nca_pair"),
    "sppo_hard": dpo("sppo_hard"),
    "aot": dpo("aot"),
    "aot_smoothed": dpo("aot", label_smoothing=0.1),
    "aot_unpaired": dpo("aot_unpaired"),
    "aot_unpaired_smoothed": dpo("aot_unpaired", label_smoothing=0.1),
    "apo_zero": dpo("apo_zero"),
    "apo_down": dpo("apo_down"),
    "sigmoid_norm": dpo("sigmoid_norm"),
    "sft": dpo("sft"),
    "sigmoid_and_sft": dpo(["sigmoid", "sft"], weights=[1.0, 0.7]),
    "ld": dpo(ld_alpha=0.4),
    "wpo": dpo(use_weighting=True),  # with log_sum_sq_probs 0: the weight without the paper's alignment term
    "forward_kl": dpo(f_divergence_type="forward_kl"),
    "js_divergence": dpo(f_divergence_type="js_divergence"),
    "cpo": without_reference(CPOTrainer, cpo_alpha=0.5),
    "cpo_smoothed": without_reference(CPOTrainer, label_smoothing=0.1),
    "cpo_hinge": without_reference(CPOTrainer, loss_type="hinge", cpo_alpha=1.0),
    "cpo_ipo": without_reference(CPOTrainer, loss_type="ipo"),
    "simpo": without_reference(CPOTrainer, loss_type="simpo"),
    "cpo_simpo": without_reference(CPOTrainer, loss_type="simpo", cpo_alpha=0.4, label_smoothing=0.1),
    "alphapo": without_reference(CPOTrainer, loss_type="simpo", alpha=0.25),
    "orpo": without_reference(ORPOTrainer),
}


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((PAIRS, 2, T), np.int64)
    for pair in range(PAIRS):
        start = rng.integers(1, 4)
        for answer in range(2):
            mask[pair, answer, start : start + rng.integers(1, T - start + 1)] = 1
    policy, ref = (-np.abs(rng.normal(size=(PAIRS, 2, T - 1))).astype(np.float32) - 0.05 for _ in range(2))
    arrays = {"policy": policy, "ref": ref, "mask": mask.astype(bool), "beta": np.float32(BETA)}
    for name, case in CASES.items():
        leaf = torch.tensor(policy, requires_grad=True)
        loss = case(leaf, torch.tensor(ref), torch.tensor(mask))
        loss.backward()
        arrays[f"{name}/loss"], arrays[f"{name}/grad"] = loss.detach().numpy(), leaf.grad.numpy()
    versions = [f"{m.__name__} {m.__version__}" for m in (torch, transformers, trl)]
    np.savez_compressed(folder / "trl_preferences.npz", versions=np.array(versions), **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
