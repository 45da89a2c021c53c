"""Online DPO: direct preference optimisation on the policy's own answers (Guo et al. 2024, "OAIF").

    L = mean f(beta (h(y_w) - h(y_l))),   h(y) = log(π(y)/ref(y)),   y_w, y_l the best and the worst answer to a prompt
    f(m) = -log sigmoid(m), (m - 1)² for "square" (IPO), max(0, 1 - m) for "hinge" (SLiC)

Prompts whose answers all score the same teach nothing. The reward decides only the order, never how much better; unlike
offline DPO, whose pairs are the reference's, labels follow the policy. With deterministic labels no finite policy is
optimal for the logistic link (docs/algorithms.md).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jrlhf.config import UserError
from jrlhf.ops.masking import masked_sum
from jrlhf.ops.microbatch import value_and_grad_rows
from jrlhf.ops.on_policy import (
    KL,
    LanguageModel,
    OnPolicyConfig,
    PolicyBatch,
    next_extra,
    policy_init,
    policy_of,
    reference_params,
    run_updates,
    score_rollout,
    update_lengths,
)
from jrlhf.ops.preference_losses import LINKS, link_loss
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm, TrainState


@dataclass(frozen=True)
class OnlineDPOConfig(OnPolicyConfig):
    """The KL, penalties on scores, epochs and means are options of `OnPolicyConfig` (jrlhf/ops/on_policy.py)."""

    grouped: ClassVar[bool] = True
    implicit_kl: ClassVar[bool] = True

    group_size: int = 2
    beta: float = 0.1  # strength of the KL constraint that the loss implies
    kl: KL = "implicit"
    loss: Literal["sigmoid", "square", "hinge"] = "sigmoid"
    label_smoothing: float = 0.0  # probability that a comparison is wrong

    def __post_init__(self):
        super().__post_init__()
        if self.beta <= 0:
            raise UserError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        unread = ("entropy_coef", "importance_cap", "target_kl")
        if used := [name for name in unread if getattr(self, name)]:
            raise UserError(f"{used[0]}: online DPO has no such term")
        if self.normalise != "token":
            raise UserError("normalise: online DPO compares whole answers; its loss is a mean over pairs")

    @property
    def learned_per_group(self) -> int:
        return 1  # a pair


def make_online_dpo(
    config: OnlineDPOConfig, model: LanguageModel, optimizer: Optimizer, temperature: float = 1.0
) -> Algorithm:
    policy = policy_of(model)

    def make_batch(state: TrainState, rollout, scores_B) -> PolicyBatch:
        """Rows [M, 2, ...]: the best and the worst answer to each prompt. `kept` [M, 2]: whether they differ."""
        batch = score_rollout(config, policy, state, rollout, scores_B, temperature)
        total_MG = batch.rewards.sum(axis=1).reshape(-1, config.group_size)
        usable_MG = batch.kept.reshape(-1, config.group_size)
        best_M = jnp.argmax(jnp.where(usable_MG, total_MG, -jnp.inf), axis=1)
        worst_M = jnp.argmin(jnp.where(usable_MG, total_MG, jnp.inf), axis=1)
        pair_M2 = jnp.stack([best_M, worst_M], axis=1)
        total_M2 = jnp.take_along_axis(total_MG, pair_M2, axis=1)
        index_M2 = jnp.arange(len(total_MG))[:, None] * config.group_size + pair_M2
        pairs = jax.tree.map(lambda x: x[index_M2], batch._replace(metrics=None))
        ordered_M2 = pairs.kept & (total_M2[:, :1] > total_M2[:, 1:])
        return pairs._replace(kept=ordered_M2, metrics=batch.metrics)

    def train_step(state: TrainState, batch: PolicyBatch):
        frozen = reference_params(state)
        lengths = update_lengths(config, batch)

        def update(learned, rows: PolicyBatch):
            params, opt_state = learned
            pairs = jnp.maximum(jnp.sum(rows.kept[:, 0], dtype=jnp.float32), 1.0)
            tokens = jnp.maximum(jnp.sum(rows.response_mask & rows.kept[..., None], dtype=jnp.float32), 1.0)

            def loss(params, piece):
                rows, _ = piece
                answers = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)  # [2M, ...]
                start = answers.tokens.shape[1] - answers.response_mask.shape[1]
                logprobs, *_ = policy.forward(
                    params | {"reference": frozen}, answers.tokens, answers.mask, start, temperature
                )
                total = lambda x: masked_sum(x, answers.response_mask, axis=1).reshape(-1, 2)  # noqa: E731
                logp_M2, ref_M2 = total(logprobs), total(answers.ref_logprobs)
                reward_M2 = config.beta * (logp_M2 - ref_M2)
                margin_M = reward_M2[:, 0] - reward_M2[:, 1]
                ordered_M = rows.kept[:, 0]
                mean = lambda x: masked_sum(x, ordered_M) / pairs  # noqa: E731
                value = mean(link_loss(margin_M, LINKS[config.loss], config.label_smoothing))
                learned = answers.response_mask & answers.kept[:, None]
                log_ratio = jax.lax.stop_gradient(jnp.where(learned, logprobs - answers.logprobs, 0.0))
                sums = {
                    "pref/loss": value,
                    "pref/acc": mean(margin_M > 0),
                    "pref/margin": mean(margin_M),
                    "pref/logp_chosen": mean(logp_M2[:, 0]),
                    "pref/logp_rejected": mean(logp_M2[:, 1]),
                    "policy/approx_kl": jnp.sum(jnp.expm1(log_ratio) - log_ratio) / tokens,
                }
                return value, (sums, {})

            sums, maxima, grads = value_and_grad_rows(
                loss, params, (rows, None), config.microbatches, lengths
            )
            params, opt_state, norm = optimizer.apply(grads, opt_state, params)
            return (params, opt_state), sums | {"policy/grad_norm": norm}, maxima

        (params, opt_state), metrics = run_updates(config, update, state, batch._replace(metrics=None))
        metrics |= batch.metrics | {"pref/ordered": jnp.mean(batch.kept[:, 0], dtype=jnp.float32)}
        metrics["policy/lr"] = optimizer.learning_rate(state.step * config.epochs * config.minibatches)
        rows = batch.tokens.shape[0] * config.group_size
        extra = next_extra(config, state, params["policy"], metrics, rows)
        return TrainState(state.step + 1, params, opt_state, state.ref_params, state.key, extra), metrics

    return Algorithm(policy_init(config, optimizer), make_batch, train_step)
