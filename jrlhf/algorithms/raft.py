"""Learning from the best of one's own answers: RAFT, expert iteration, best-of-n distillation.

    L = -1/Σ|y_i| Σ_i over accepted answers Σ_t log π(y_it)

- `accept="best"`: the best of each prompt's `group_size` answers (RAFT, Dong et al. 2023). Each step moves towards
  the best-of-n policy of the present one, without end: with `beta` answers are ranked by the score less beta
  log(π/ref), as the paper has it.
- `accept="above"`: every answer that scores at least `threshold` (expert iteration, Anthony et al. 2017;
  rejection-sampling fine-tuning, Yuan et al. 2023): filtered imitation, whose fixed points are the policies that are
  always accepted.
- `samples="reference"`: the answers come from the reference, the frozen start. With "best" this is best-of-n
  distillation: the forward KL from the best-of-n law of the start, which is its fixed point (at a KL of
  log n - (n-1)/n at most).

Ties for the best are broken by the order of rows.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from jrlhf.config import UserError
from jrlhf.ops.on_policy import (
    LanguageModel,
    OnPolicyConfig,
    PolicyBatch,
    policy_gradient,
    take_rows,
)
from jrlhf.ops.policy_losses import reinforce_loss
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm


@dataclass(frozen=True)
class RAFTConfig(OnPolicyConfig):
    """The KL, penalties on scores, epochs and means are options of `OnPolicyConfig` (jrlhf/ops/on_policy.py)."""

    group_size: int = 8
    beta: float = 0.0
    accept: Literal["best", "above"] = "best"
    threshold: float = 1.0  # for accept "above"
    samples: Literal["policy", "reference"] = "policy"

    def __post_init__(self):
        super().__post_init__()
        if self.kl != "reward":
            raise UserError(
                f"kl {self.kl!r} is not possible here: accepted answers are no samples of the policy"
            )
        if self.samples == "reference" and self.beta:
            raise UserError(
                "beta holds the policy to the reference; samples 'reference' do so by themselves: set it to 0"
            )
        if self.samples == "reference" and self.importance_cap:
            raise UserError(
                "importance_cap corrects samples of the policy; with samples 'reference' leave it 0"
            )
        if self.accept == "best":
            if self.group_size < 2:
                raise UserError(
                    f"group_size must be at least 2 where the best is accepted, got {self.group_size}"
                )
            if self.threshold != 1.0:
                raise UserError("threshold is only read where accept is 'above'")

    @property
    def learned_per_group(self) -> int:
        return 1 if self.accept == "best" else self.group_size

    @property
    def sample_from(self) -> Literal["policy", "reference"]:
        return self.samples


def make_raft(
    config: RAFTConfig, model: LanguageModel, optimizer: Optimizer, temperature: float = 1.0
) -> Algorithm:
    # Every accepted answer has advantage 1: REINFORCE's loss is then that of imitation, -log π.
    alike = lambda rewards_BR, mask_BR, greedy_B: jnp.ones_like(rewards_BR)  # noqa: E731
    imitation = policy_gradient(config, alike, reinforce_loss, model, optimizer, temperature)
    imitated = imitation.make_batch
    assert imitated is not None

    def make_batch(state, rollout, scores_B) -> PolicyBatch:
        batch = imitated(state, rollout, scores_B)
        total_B = batch.rewards.sum(axis=1)
        if config.samples == "reference":  # what is measured on samples of the policy cannot be measured here
            of_policy = lambda name: name.startswith(("mismatch/", "kl/"))  # noqa: E731
            batch = batch._replace(metrics={k: v for k, v in batch.metrics.items() if not of_policy(k)})
        if config.accept == "above":
            batch = batch._replace(kept=batch.kept & (total_B >= config.threshold))
        else:  # only the best rows go through the update: a group_size-th of the batch
            usable_GK = jnp.where(batch.kept, total_B, -jnp.inf).reshape(-1, config.group_size)
            best_G = jnp.argmax(usable_GK, axis=1)
            batch = take_rows(batch, jnp.arange(best_G.shape[0]) * config.group_size + best_G)
        accepted = jnp.sum(batch.kept, dtype=jnp.float32) / len(scores_B)
        return batch._replace(metrics=batch.metrics | {"rollout/accepted": accepted})

    return imitation._replace(make_batch=make_batch)
