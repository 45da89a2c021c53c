"""PPO with a KL penalty to the SFT policy, as InstructGPT has it (Ouyang et al. 2022, section 3.5, step 3).

The details follow Ziegler et al. 2019, Stiennon et al. 2020 and "The N implementation details of RLHF with PPO" (Huang
et al. 2023). One iteration: the driver samples responses and scores them; `make_batch` turns scores into
advantages in numbered stages; `train_step` runs all epochs and minibatches in one compiled call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jrlhf.config import UserError
from jrlhf.models.transformer import Model, scalar_head
from jrlhf.ops.advantages import gae
from jrlhf.ops.losses import value_loss
from jrlhf.ops.masking import masked_mean, masked_var, masked_whiten
from jrlhf.ops.microbatch import flat, in_groups, value_and_grad_rows
from jrlhf.ops.on_policy import (
    OnPolicyConfig,
    Policy,
    PolicyBatch,
    divergence_of,
    initial_extra,
    next_extra,
    policy_objective,
    reference_of,
    reference_params,
    run_updates,
    score_rollout,
    shares_of,
    update_lengths,
)
from jrlhf.ops.policy_losses import clipped_loss
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm, Array, Rollout, SequenceBatch, TrainState


@dataclass(frozen=True)
class PPOConfig(OnPolicyConfig):
    """Defaults are those of Huang et al. 2023 where the papers agree."""

    token_rewards: ClassVar[bool] = True
    critic: ClassVar[bool] = True

    beta: float = 0.05
    missing_eos_penalty: float = 1.0
    epochs: int = 4
    minibatches: int = 4
    clip: float = 0.2  # ratio clip
    value_clip: float = 0.2  # value clip around the old value; 0: none
    value_coef: float = (
        0.1  # weight of the value loss; matters only with a shared trunk and for gradient clipping
    )
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False  # divide per-token rewards by their std, keeping the mean
    whiten_advantages: bool = True  # zero mean, unit variance over the batch's tokens
    critic_warmup: int = 0  # first steps in which only the critic learns
    ptx_coef: float = 0.0  # weight of next-token loss on pretraining text (InstructGPT's gamma)

    def __post_init__(self):
        super().__post_init__()
        for name in ("value_clip", "value_coef", "critic_warmup", "ptx_coef"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be zero or more, got {getattr(self, name)}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be in [0, 1], got {getattr(self, name)}")


class ActorCritic(NamedTuple):
    """What PPO asks of models. tokens, mask [B, P + R]; `start` = P; results [B, R] for the R response tokens."""

    # (params and "reference", tokens, mask, start, temperature, group=1) -> (logprobs, entropy, values)
    forward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    # (ref_params, tokens, mask, start, temperature, group=1) -> logprobs
    reference: Callable[..., jax.Array]
    # (params, SequenceBatch, denominator) -> next-token loss; for the pretraining mix
    language_loss: Callable[..., jax.Array] | None = None
    # (params and "reference", tokens, mask, start, temperature, group=1) -> full-vocabulary KL to the reference; for
    # kl "full"
    divergence: Callable[..., jax.Array] | None = None


def actor_critic(model: Model, critic: Model | None, language_loss: Callable | None = None) -> ActorCritic:
    """A separate critic (params["critic"] is a whole scalar model), or, for None, a value head
    params["critic"] = {"score": ...} on the policy's trunk. Values are predicted before each token is chosen.

    With adapters, policy and critic are adapters beside params["reference"], and the reference is that base alone."""

    def forward(params, tokens, mask, start, temperature, group=1):
        policy = model.whole(params["policy"], params["reference"])
        if group > 1:
            hidden = model.predicting(policy, tokens, mask, start, group=group)
        else:
            hidden = model.hidden(policy, tokens, mask, at=slice(start - 1, -1))
        logprobs, entropy = model.logprobs_of_hidden(policy, hidden, tokens[:, start:], temperature)
        if critic is None:
            values = scalar_head(params["critic"]["score"], hidden)
        else:
            whole = critic.whole(params["critic"], params["reference"])
            if group > 1:
                hidden = critic.predicting(whole, tokens, mask, start, group=group)
                values = scalar_head(whole["score"], hidden)
            else:
                values = critic.scores(whole, tokens, mask, at=slice(start - 1, -1))
        return logprobs, entropy, values

    return ActorCritic(forward, reference_of(model), language_loss, divergence_of(model))


class Critique(NamedTuple):
    """What PPO adds to each row of a batch."""

    values: Array  # [B, R] of the critic when the responses were sampled
    returns: Array  # [B, R] its targets
    ptx: SequenceBatch | None  # [B, ...] pretraining text, one row per rollout row


def make_ppo(
    config: PPOConfig,
    models: ActorCritic,
    policy_optimizer: Optimizer,
    critic_optimizer: Optimizer,
    temperature: float = 1.0,
) -> Algorithm:
    """`temperature` is the one that responses are sampled at: it is part of the policy here too."""
    language_loss = models.language_loss if config.ptx_coef else None
    if config.ptx_coef and language_loss is None:
        raise UserError("ptx_coef needs a language_loss and pretraining text")
    policy, group = Policy(models.forward, models.reference, models.divergence), config.shared_group
    surrogate = partial(clipped_loss, clip=config.clip)

    def init(policy_params, critic_params, ref_params, key) -> TrainState:
        extra, ref_params = initial_extra(config, policy_params, ref_params)
        params = {"policy": policy_params, "critic": critic_params}
        opt_state = {
            "policy": policy_optimizer.init(policy_params),
            "critic": critic_optimizer.init(critic_params),
        }
        return TrainState(jnp.int32(0), params, opt_state, ref_params, key, extra)

    def make_batch(
        state: TrainState,
        rollout: Rollout,
        scores: jax.Array,
        ptx: SequenceBatch | None = None,
        token_rewards: Array | None = None,
    ) -> PolicyBatch:
        """scores [B]: the reward of each whole response; token_rewards [B, R]: of single tokens, NaN where none is."""
        # 1. Log-probabilities, values, and rewards per token: -beta * (log pi - log ref), what the token earns by
        # itself, and the score at the end.
        batch = score_rollout(config, policy, state, rollout, scores, temperature, token_rewards)
        response, rewards, values = batch.response_mask, batch.rewards, batch.extra
        # 2. Whitened rewards keep their mean: shifting it would pay for length.
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, response, shift_mean=False)
        # 3. Generalised advantage estimation; returns are targets of the critic.
        advantages, returns = gae(rewards, values, response, config.gamma, config.lam)
        # 4. Whitened advantages do lose their mean.
        metrics = {
            "adv/mean": masked_mean(advantages, response),
            "adv/std": jnp.sqrt(masked_var(advantages, response)),
            "value/explained_var": 1.0
            - masked_var(returns - values, response) / (masked_var(returns, response) + 1e-8),
        }
        if config.whiten_advantages:
            advantages = masked_whiten(advantages, response, shift_mean=True)
        extra = Critique(values, returns, ptx)
        return batch._replace(advantages=advantages, extra=extra, metrics=batch.metrics | metrics)

    def update(learned, groups: PolicyBatch, lengths, frozen, kl_coef, warm):
        """One optimiser step on one minibatch. Until the critic is `warm` the policy stays as it is."""
        params, opt_state = learned
        rows = flat(groups)
        shares = shares_of(config.normalise, rows.response_mask, rows.kept)
        mask = rows.response_mask & rows.kept[:, None]
        tokens = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
        ptx_tokens = None
        if language_loss is not None:
            ptx_tokens = jnp.maximum(jnp.sum(rows.extra.ptx.loss_mask[:, 1:], dtype=jnp.float32), 1.0)

        def loss(params, piece):
            rows, shares = flat(piece)
            whole = params | {"reference": frozen}
            value, sums, maxima, (_, _, values) = policy_objective(
                config, surrogate, policy.of_groups(group), whole, rows, shares, kl_coef, temperature
            )
            mask = rows.response_mask & rows.kept[:, None]
            old_values, returns = (x[:, : mask.shape[1]] for x in (rows.extra.values, rows.extra.returns))
            clip = config.value_clip or jnp.inf
            sums["value/loss"], sums["value/clip_frac"] = value_loss(
                values, old_values, returns, mask, clip, denominator=tokens
            )
            value = value + config.value_coef * sums["value/loss"]
            if language_loss is not None:
                ptx = language_loss(params["policy"], rows.extra.ptx, ptx_tokens)
                value = value + config.ptx_coef * ptx
                sums["policy/ptx_loss"] = ptx
            return value, (sums, maxima)

        pieces = (groups, in_groups(shares, group))
        sums, maxima, grads = value_and_grad_rows(loss, params, pieces, config.microbatches, lengths)
        actor, actor_opt, norm = policy_optimizer.apply(
            grads["policy"], opt_state["policy"], params["policy"]
        )
        critic, critic_opt, critic_norm = critic_optimizer.apply(
            grads["critic"], opt_state["critic"], params["critic"]
        )
        if config.critic_warmup:
            old = (params["policy"], opt_state["policy"])
            actor, actor_opt = jax.tree.map(
                lambda new, old: jnp.where(warm, new, old), (actor, actor_opt), old
            )
        learned = ({"policy": actor, "critic": critic}, {"policy": actor_opt, "critic": critic_opt})
        return learned, sums | {"policy/grad_norm": norm, "value/grad_norm": critic_norm}, maxima

    def train_step(state: TrainState, batch: PolicyBatch):
        frozen, kl_coef = reference_params(state), state.extra["kl_coef"]
        warm = state.step >= config.critic_warmup
        lengths = update_lengths(config, batch)
        one = lambda learned, groups: update(learned, groups, lengths, frozen, kl_coef, warm)  # noqa: E731
        # Rows that share a prompt stay together.
        groups = in_groups(batch._replace(metrics=None), group)
        (params, opt_state), metrics = run_updates(config, one, state, groups)
        metrics |= batch.metrics
        updates = state.step * config.epochs * config.minibatches
        metrics["policy/lr"] = policy_optimizer.learning_rate(updates)
        metrics["value/lr"] = critic_optimizer.learning_rate(updates)
        extra = next_extra(config, state, params["policy"], metrics, batch.tokens.shape[0])
        if config.critic_warmup:  # the KL of a policy that stands still says nothing of the coefficient
            extra["kl_coef"] = jnp.where(warm, extra["kl_coef"], kl_coef)
        return TrainState(state.step + 1, params, opt_state, state.ref_params, state.key, extra), metrics

    return Algorithm(init, make_batch, train_step)
