"""PPO with a KL penalty to the SFT policy, as InstructGPT has it (Ouyang et al. 2022, section 3.5, step 3).

The details follow Ziegler et al. 2019, Stiennon et al. 2020 and "The N implementation details of RLHF with PPO" (Huang
et al. 2023). One iteration: the driver samples responses and scores them; `make_batch` turns scores into
advantages in numbered stages; `train_step` runs all epochs and minibatches in one compiled call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jrlhf.config import UserError
from jrlhf.models.transformer import Model, scalar_head
from jrlhf.ops.advantages import gae
from jrlhf.ops.kl import kl_k1, kl_k3
from jrlhf.ops.losses import ppo_policy_loss, value_loss
from jrlhf.ops.masking import last_token_index, masked_mean, masked_var, masked_whiten
from jrlhf.ops.microbatch import map_rows, value_and_grad_rows
from jrlhf.optim import Optimizer
from jrlhf.sharding import constrain_rows
from jrlhf.types import Algorithm, Array, Rollout, SequenceBatch, TrainState


@dataclass(frozen=True)
class PPOConfig:
    """Defaults are those of Huang et al. 2023 where the papers agree."""

    beta: float = 0.05  # KL coefficient (the first one, when adaptive)
    target_kl: float = (
        0.0  # > 0: adapt the coefficient towards this KL per sequence, in nats (Ziegler et al. 2019)
    )
    kl_horizon: int = 10_000  # sequences over which the adaptive coefficient moves
    epochs: int = 4  # passes over each batch of rollouts
    minibatches: int = 4  # optimiser steps per pass
    clip: float = 0.2  # ratio clip
    value_clip: float = 0.2  # value clip around the old value; 0: none
    value_coef: float = (
        0.1  # weight of the value loss; matters only with a shared trunk and for gradient clipping
    )
    gamma: float = 1.0
    lam: float = 0.95
    missing_eos_penalty: float = 1.0  # subtracted from the score of a response that did not end
    score_clip: float = 0.0  # clip the reward model's score to +- this; 0: off
    whiten_rewards: bool = False  # divide per-token rewards by their std, keeping the mean
    whiten_advantages: bool = True  # zero mean, unit variance over the batch's tokens
    entropy_coef: float = 0.0
    stop_kl: float = 0.0  # skip the rest of an iteration's updates once approx_kl passes this; 0: off
    ptx_coef: float = 0.0  # weight of next-token loss on pretraining text (InstructGPT's gamma)
    microbatches: int = 1  # pieces of a minibatch that are in memory one after the other

    def __post_init__(self):
        positive = ("kl_horizon", "epochs", "minibatches", "clip", "microbatches")
        not_negative = ("beta", "target_kl", "value_clip", "value_coef", "missing_eos_penalty", "score_clip")
        not_negative += ("entropy_coef", "stop_kl", "ptx_coef")
        for name in positive + not_negative:
            value = getattr(self, name)
            if value < 0 or (name in positive and value == 0):
                rule = "positive" if name in positive else "zero or more"
                raise UserError(f"{name} must be {rule}, got {value}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.target_kl and not self.beta:
            raise UserError("target_kl adapts beta by factors, so beta must start above 0")


class ActorCritic(NamedTuple):
    """What PPO asks of models. tokens, mask [B, P + R]; `start` = P; results [B, R] for the R response tokens."""

    # (params and "reference", tokens, mask, start, temperature) -> (logprobs, entropy, values)
    forward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    # (ref_params, tokens, mask, start, temperature) -> logprobs
    reference: Callable[..., jax.Array]
    # (params, SequenceBatch, denominator) -> next-token loss; for the pretraining mix
    language_loss: Callable[..., jax.Array] | None = None


def actor_critic(model: Model, critic: Model | None, language_loss: Callable | None = None) -> ActorCritic:
    """A separate critic (params["critic"] is a whole scalar model), or, for None, a value head
    params["critic"] = {"score": ...} on the policy's trunk. Values are predicted before each token is chosen.

    With adapters, policy and critic are adapters beside params["reference"], and the reference is that base alone."""

    def forward(params, tokens, mask, start, temperature):
        policy = model.whole(params["policy"], params["reference"])
        hidden = model.hidden(policy, tokens, mask)[:, start - 1 : -1]
        logprobs, entropy = model.logprobs_of_hidden(policy, hidden, tokens[:, start:], temperature)
        if critic is None:
            values = scalar_head(params["critic"]["score"], hidden)
        else:
            whole = critic.whole(params["critic"], params["reference"])
            values = critic.scores(whole, tokens, mask)[:, start - 1 : -1]
        return logprobs, entropy, values

    def reference(ref_params, tokens, mask, start, temperature):
        return model.base.logprobs(ref_params, tokens, mask, start, temperature)[0]

    return ActorCritic(forward, reference, language_loss)


class PPOBatch(NamedTuple):
    tokens: Array  # [B, P+R]
    mask: Array  # [B, P+R]
    response_mask: Array  # [B, R]
    logprobs: Array  # [B, R] of the policy that sampled
    values: Array  # [B, R] of the critic at that time
    advantages: Array  # [B, R]
    returns: Array  # [B, R]
    ptx: SequenceBatch | None  # [B, ...] pretraining text, one row per rollout row
    metrics: Any  # of the batch's making; passed on by train_step


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

    def init(policy_params, critic_params, ref_params, key) -> TrainState:
        params = {"policy": policy_params, "critic": critic_params}
        opt_state = {
            "policy": policy_optimizer.init(policy_params),
            "critic": critic_optimizer.init(critic_params),
        }
        return TrainState(
            jnp.int32(0), params, opt_state, ref_params, key, {"kl_coef": jnp.float32(config.beta)}
        )

    def make_batch(
        state: TrainState, rollout: Rollout, scores: jax.Array, ptx: SequenceBatch | None = None
    ) -> PPOBatch:
        """scores [B]: the reward of each whole response."""
        tokens, mask, response = rollout.tokens, rollout.mask, rollout.response_mask
        start = tokens.shape[1] - response.shape[1]
        kl_coef = state.extra["kl_coef"]

        # 1. Old log-probabilities and values, by the same function that is trained: the first ratio is exactly 1.
        parts = config.minibatches * config.microbatches
        if tokens.shape[0] % parts:
            raise ValueError(
                f"{tokens.shape[0]} rows do not divide into minibatches x microbatches = {parts}"
            )
        params = state.params | {"reference": state.ref_params}
        logprobs, entropy, values = map_rows(
            lambda rows: models.forward(params, *rows, start, temperature), (tokens, mask), parts
        )
        # 2. Log-probabilities of the frozen reference.
        ref_logprobs = map_rows(
            lambda rows: models.reference(state.ref_params, *rows, start, temperature), (tokens, mask), parts
        )
        # 3. The score, less a penalty for never ending, at the last response token.
        clipped = jnp.clip(scores, -config.score_clip, config.score_clip) if config.score_clip else scores
        final = clipped - config.missing_eos_penalty * (~rollout.ended).astype(jnp.float32)
        last = last_token_index(response)
        at_last = jax.nn.one_hot(last, response.shape[1], dtype=jnp.float32)
        # 4. Per-token reward: -beta * (log pi - log ref), plus the score at the end. No gradient goes through it.
        kl = kl_k1(logprobs, ref_logprobs) * response.astype(jnp.float32)
        rewards = at_last * final[:, None] - kl_coef * kl
        total = jnp.sum(rewards, axis=1)
        # 5. Whitened rewards keep their mean: shifting it would pay for length.
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, response, shift_mean=False)
        # 6. Generalised advantage estimation; returns are targets of the critic.
        advantages, returns = gae(rewards, values, response, config.gamma, config.lam)
        # 7. Whitened advantages do lose their mean.
        adv_mean, adv_std = masked_mean(advantages, response), jnp.sqrt(masked_var(advantages, response))
        if config.whiten_advantages:
            advantages = masked_whiten(advantages, response, shift_mean=True)

        log_mismatch = jnp.where(response, logprobs - rollout.logprobs, 0.0)
        sequence_kl = jnp.sum(kl, axis=1)
        weight = jnp.exp(jnp.sum(log_mismatch, axis=1))
        length = jnp.sum(response, axis=1, dtype=jnp.float32)
        metrics = {
            "reward/total/mean": jnp.mean(total),
            "reward/total/std": jnp.std(total),
            "reward/score/mean": jnp.mean(scores),
            "reward/score/std": jnp.std(scores),
            "reward/length_corr": _correlation(length, scores),
            "kl/ref_k1": jnp.mean(sequence_kl),
            "kl/ref_k3": jnp.mean(
                jnp.sum(kl_k3(logprobs, ref_logprobs) * response.astype(jnp.float32), axis=1)
            ),
            "kl/coef": kl_coef,
            "policy/entropy": masked_mean(entropy, response),
            "adv/mean": adv_mean,
            "adv/std": adv_std,
            "value/explained_var": 1.0
            - masked_var(returns - values, response) / (masked_var(returns, response) + 1e-8),
            "rollout/len_mean": jnp.mean(length),
            "rollout/len_max": jnp.max(length),
            "rollout/eos_rate": jnp.mean(rollout.ended, dtype=jnp.float32),
            "rollout/trunc_rate": jnp.mean(~rollout.ended, dtype=jnp.float32),
            "perf/pad_frac": 1.0 - jnp.mean(mask, dtype=jnp.float32),
            "mismatch/kl": masked_mean(-log_mismatch, response),
            "mismatch/logp_diff_max": jnp.max(jnp.abs(log_mismatch)),
            "mismatch/ess": jnp.square(jnp.sum(weight)) / jnp.sum(jnp.square(weight)) / weight.shape[0],
        }
        return PPOBatch(tokens, mask, response, logprobs, values, advantages, returns, ptx, metrics)

    def minibatch_loss(params, rows: PPOBatch, denominator, ptx_denominator):
        start = rows.tokens.shape[1] - rows.response_mask.shape[1]
        logprobs, entropy, values = models.forward(params, rows.tokens, rows.mask, start, temperature)
        mask = rows.response_mask
        policy, stats = ppo_policy_loss(
            logprobs, rows.logprobs, rows.advantages, mask, config.clip, denominator
        )
        clip = config.value_clip or jnp.inf
        value, value_clipped = value_loss(values, rows.values, rows.returns, mask, clip, denominator)
        loss = policy + config.value_coef * value
        loss = loss - config.entropy_coef * masked_mean(entropy, mask, denominator=denominator)
        sums = {
            "policy/loss": policy,
            "policy/approx_kl": stats["approx_kl"],
            "policy/clip_frac": stats["clip_frac"],
            "value/loss": value,
            "value/clip_frac": value_clipped,
        }
        if language_loss is not None:
            ptx = language_loss(params["policy"], rows.ptx, ptx_denominator)
            loss = loss + config.ptx_coef * ptx
            sums["policy/ptx_loss"] = ptx
        return loss, (sums, {"policy/ratio_max": stats["ratio_max"]})

    def update(carry, rows: PPOBatch, frozen):
        """One optimiser step on one minibatch."""
        params, opt_state = carry
        tokens = jnp.maximum(jnp.sum(rows.response_mask, dtype=jnp.float32), 1.0)
        ptx_tokens = (
            jnp.maximum(jnp.sum(rows.ptx.loss_mask[:, 1:], dtype=jnp.float32), 1.0)
            if config.ptx_coef and rows.ptx is not None
            else None
        )
        with_frozen = lambda p: p | {"reference": frozen}  # noqa: E731
        loss = lambda p, r: minibatch_loss(with_frozen(p), r, tokens, ptx_tokens)  # noqa: E731
        sums, maxima, grads = value_and_grad_rows(loss, params, rows, config.microbatches)
        policy, policy_opt, norm = policy_optimizer.apply(
            grads["policy"], opt_state["policy"], params["policy"]
        )
        critic, critic_opt, critic_norm = critic_optimizer.apply(
            grads["critic"], opt_state["critic"], params["critic"]
        )
        carry = ({"policy": policy, "critic": critic}, {"policy": policy_opt, "critic": critic_opt})
        return carry, sums | {"policy/grad_norm": norm, "value/grad_norm": critic_norm}, maxima

    def train_step(state: TrainState, batch: PPOBatch):
        rows = batch._replace(metrics=None)
        size = batch.tokens.shape[0]
        key = jax.random.fold_in(state.key, state.step)
        order = jax.vmap(lambda k: jax.random.permutation(k, size))(jax.random.split(key, config.epochs))
        order = order.reshape(config.epochs * config.minibatches, -1)

        def step(carry, index):
            def run(carry):
                learned, sums, maxima, done, _ = carry
                learned, more, peak = update(
                    learned, constrain_rows(jax.tree.map(lambda x: x[index], rows)), state.ref_params
                )
                sums, maxima = jax.tree.map(jnp.add, sums, more), jax.tree.map(jnp.maximum, maxima, peak)
                stop = (more["policy/approx_kl"] > config.stop_kl) if config.stop_kl else jnp.bool_(False)
                return learned, sums, maxima, done + 1.0, stop

            if not config.stop_kl:
                return run(carry), None
            return jax.lax.cond(carry[-1], lambda carry: carry, run, carry), None

        learned = (state.params, state.opt_state)
        first = jax.tree.map(lambda x: x[order[0]], rows)
        _, sums, maxima = jax.eval_shape(update, learned, first, state.ref_params)
        filled = lambda tree, value: jax.tree.map(lambda s: jnp.full(s.shape, value, s.dtype), tree)  # noqa: E731
        start = (learned, filled(sums, 0.0), filled(maxima, -jnp.inf), jnp.float32(0.0), jnp.bool_(False))
        ((params, opt_state), sums, maxima, done, _), _ = jax.lax.scan(step, start, order)
        metrics = jax.tree.map(lambda x: x / done, sums) | maxima | batch.metrics
        metrics["policy/updates"] = done
        updates = state.step * config.epochs * config.minibatches
        metrics["policy/lr"] = policy_optimizer.learning_rate(updates)
        metrics["value/lr"] = critic_optimizer.learning_rate(updates)
        kl_coef = state.extra["kl_coef"]
        if config.target_kl:
            kl_coef = adapted_kl_coef(config, kl_coef, metrics["kl/ref_k1"], size)
        return TrainState(
            state.step + 1, params, opt_state, state.ref_params, state.key, {"kl_coef": kl_coef}
        ), metrics

    return Algorithm(init, make_batch, train_step)


def adapted_kl_coef(config: PPOConfig, kl_coef, kl, sequences: int):
    """Ziegler et al. 2019, section 2.2: a proportional controller on log beta with a clipped error."""
    error = jnp.clip(kl / config.target_kl - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * sequences / config.kl_horizon)


def _correlation(x, y):
    x, y = x - jnp.mean(x), y - jnp.mean(y)
    return jnp.mean(x * y) / jnp.maximum(jnp.sqrt(jnp.mean(x * x) * jnp.mean(y * y)), 1e-8)
