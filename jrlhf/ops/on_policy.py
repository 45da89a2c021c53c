"""What algorithms that learn from their own samples share: PPO, GRPO, RLOO and their relatives.

The driver samples responses and scores them. `score_rollout` turns scores into rewards per token, in numbered stages;
an algorithm turns those into advantages; `run_updates` goes over the batch in epochs of minibatches, each minimising
`policy_objective`: the algorithm's own surrogate, a KL penalty and an entropy bonus.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jrlhf.config import UserError, no_fingerprint
from jrlhf.ops.advantages import overlong_penalty
from jrlhf.ops.kl import kl_k1, kl_k2, kl_k3
from jrlhf.ops.masking import last_token_index, lengthened, masked_mean, masked_sum
from jrlhf.ops.microbatch import (
    Lengths,
    bucket_sizes,
    by_length,
    flat,
    in_groups,
    map_rows,
    taken,
    value_and_grad_rows,
)
from jrlhf.ops.reference import refreshed_reference
from jrlhf.types import Algorithm, Array, Params, Rollout, TrainState

KL = Literal["reward", "k1", "k2", "k3", "full", "implicit"]
Normalise = Literal["token", "sequence", "sum", "constant"]
ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}

# Options that mean nothing without another.
READ_WITH = {
    "overlong_penalty": "overlong_buffer",
    "importance_level": "importance_cap",
    "kl_horizon": "target_kl",
    "ref_mixup": "ref_update_every",
}


@dataclass(frozen=True)
class OnPolicyConfig:
    """What the configs of these algorithms begin with; an algorithm overrides the defaults that its paper has."""

    abstract: ClassVar[bool] = True
    greedy_baseline: ClassVar[bool] = False  # make_batch also wants the scores of greedy answers
    implicit_kl: ClassVar[bool] = False  # the loss itself is a KL-regularised one, with this beta
    grouped: ClassVar[bool] = False  # an answer is compared with others to the same prompt
    whole_answers: ClassVar[bool] = False  # the loss is one of whole answers, each of which counts once
    token_rewards: ClassVar[bool] = False  # single tokens may be rewarded: each has its own advantage
    critic: ClassVar[bool] = False  # advantages need values, which a pass before the update computes

    _: KW_ONLY

    beta: float = 0.05  # coefficient of the KL penalty (the first one, when adaptive); 0: no penalty
    # Where the penalty stands. "reward": -beta·k1 per token in the reward, which optimises E[r] - beta·KL(π‖ref).
    # Others put an estimator into the loss, and optimise what its gradient says (docs/algorithms.md). "implicit": the
    # algorithm's own loss has it.
    kl: KL = "reward"
    kl_level: Literal["token", "sequence"] = "token"  # of an estimator in the loss
    # k1 or k3 times the ratio to the policy that sampled: the gradient is then that of KL(π‖ref) (DeepSeek-V3.2, 2025,
    # eq. 7), at the level that it is taken at. (k2 has that gradient by itself.)
    kl_ratio: bool = False
    target_kl: float = 0.0  # > 0: adapt beta towards this KL per sequence, in nats
    kl_horizon: int = 10_000  # sequences over which the adaptive coefficient moves
    ref_update_every: int = 0  # steps between updates of the reference; 0: it is frozen
    ref_mixup: float = 1.0  # share of the policy in an update of the reference; 1: a copy

    group_size: int = 1  # answers to each prompt, in consecutive rows
    resample_rounds: int = 0  # of fresh prompts, at most, that replace groups of equal scores (DAPO); 0: off
    missing_eos_penalty: float = 0.0  # off the score of an answer that did not end
    score_clip: float = 0.0  # clip scores to +- this; 0: off
    overlong_buffer: float = 0.0  # last share of the slots in which length is punished (DAPO); 0: off
    overlong_penalty: float = 1.0  # of an answer that fills all its slots
    mask_truncated: bool = False  # learn nothing from answers that did not end

    epochs: int = 1  # passes over each batch of rollouts
    minibatches: int = 1  # optimiser steps per pass
    microbatches: int = 1  # pieces of a minibatch that are in memory one after the other
    # A prompt goes through the model once for its whole group: the same gradient for a part of the work. Minibatches
    # are then made of whole groups.
    share_prompts: bool = False
    # Lengths of which each microbatch gets the shortest that holds its longest answer, in place of all slots for an
    # answer: the same gradient for less work. Minibatches are cut into microbatches by length. Each is compiled.
    length_buckets: int = no_fingerprint(1)
    stop_kl: float = 0.0  # skip the rest of an iteration's updates once approx_kl passes this; 0: off
    # What a token's loss is divided by. "token": the minibatch's tokens; "sequence": its answer's tokens and the
    # number of answers; "sum": the number of answers; "constant": that times the slots for an answer.
    normalise: Normalise = "token"
    entropy_coef: float = 0.0  # weight of the entropy, a mean over tokens
    importance_cap: float = 0.0  # truncate trainer / sampler here, times which a token's loss counts; 0: off
    importance_level: Literal["token", "sequence"] = "token"  # of these weights (Yao et al. 2025)

    def __post_init__(self):
        positive = ("kl_horizon", "group_size", "epochs", "minibatches", "microbatches", "length_buckets")
        not_negative = ("beta", "target_kl", "ref_update_every", "resample_rounds", "missing_eos_penalty")
        not_negative += (
            "score_clip",
            "overlong_buffer",
            "overlong_penalty",
            "stop_kl",
            "entropy_coef",
            "importance_cap",
        )
        for name in positive + not_negative:
            value = getattr(self, name)
            if value < 0 or (name in positive and value == 0):
                rule = "positive" if name in positive else "zero or more"
                raise UserError(f"{name} must be {rule}, got {value}")
        if self.stop_kl and self.epochs * self.minibatches == 1:
            raise UserError("stop_kl skips updates of an iteration after the first, and there is only one")
        if self.target_kl and not self.beta:
            raise UserError("target_kl adapts beta by factors, so beta must start above 0")
        if self.kl_level == "sequence" and self.kl not in ESTIMATORS:
            raise UserError(
                f"kl_level 'sequence' is for the estimators k1, k2 and k3 in the loss, not for kl {self.kl!r}"
            )
        if self.kl_ratio and self.kl not in ("k1", "k3"):
            raise UserError(f"kl_ratio is for the estimators k1 and k3 in the loss, not for kl {self.kl!r}")
        if (self.kl == "implicit") != self.implicit_kl:
            raise UserError(f"kl {self.kl!r} is not possible in {type(self).__name__}")
        if self.overlong_buffer > 1:
            raise UserError(
                f"overlong_buffer is a share of an answer's slots, at most 1, got {self.overlong_buffer}"
            )
        if not 0 < self.ref_mixup <= 1:
            raise UserError(f"ref_mixup must be in (0, 1], got {self.ref_mixup}")
        for name in ("clip", "clip_low", "clip_high"):
            if getattr(self, name, 1.0) <= 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        if self.grouped and self.group_size < 2:
            raise UserError(f"group_size must be at least 2 in {type(self).__name__}, got {self.group_size}")
        if self.whole_answers and self.normalise != "sequence":
            raise UserError(f"normalise must be 'sequence' in {type(self).__name__}, got {self.normalise!r}")
        of_class = {f.name: f.default for f in fields(self)}
        if not self.beta and self.kl != of_class["kl"]:
            raise UserError(f"kl {self.kl!r} has no weight: beta is 0")
        for name, needed in READ_WITH.items():
            default = next(f.default for f in fields(OnPolicyConfig) if f.name == name)
            if getattr(self, name) != default and not getattr(self, needed):
                raise UserError(f"{name} is only read where {needed} is set")
        if self.share_prompts and self.shared_group == 1:
            raise UserError("share_prompts: group_size is 1, so that no two answers have a prompt in common")
        if self.share_prompts and self.learned_per_group != self.group_size:
            raise UserError(
                f"share_prompts: {type(self).__name__} does not learn from all answers to a prompt as it is configured "
                "here, so that they are not side by side in the update; leave it off"
            )
        if self.resample_rounds and self.group_size < 2:
            raise UserError("resample_rounds replaces groups of equal scores: group_size must be at least 2")
        if self.resample_rounds and self.greedy_baseline:
            raise UserError(f"resample_rounds is not possible in {type(self).__name__}: it has no groups")

    @property
    def learned_per_group(self) -> int:
        """Rows that the update has for each prompt."""
        return self.group_size

    @property
    def shared_group(self) -> int:
        """Rows whose prompt goes through the model once."""
        return self.group_size if self.share_prompts else 1

    @property
    def sample_from(self) -> Literal["policy", "reference"]:
        """Whose answers are learned from; the reference is the frozen start."""
        return "policy"

    @property
    def scored_in_update(self) -> bool:
        """Whether the update's own forward pass tells the old log-probabilities: it is the only one, so that they are
        the same numbers, and nothing before it needs them. (An update may leave out answers that teach nothing.)"""
        once = self.epochs * self.minibatches == 1 and self.learned_per_group == self.group_size
        needed = self.critic or (self.kl == "reward" and self.beta > 0)
        return once and not needed and not self.mask_truncated

    @property
    def parts(self) -> int:
        """Pieces in which a batch goes through the model."""
        return self.minibatches * self.microbatches


class LanguageModel(Protocol):
    """What these algorithms ask of a model (`jrlhf.models.transformer.Model`)."""

    @property
    def base(self) -> "LanguageModel": ...

    def whole(self, trained: Params, frozen: Params | None) -> Params: ...

    def logprobs(
        self, params, tokens, mask, start=1, temperature=1.0, /, *, group: int = 1
    ) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities and entropies of tokens [start, T), each [B, T - start]. `group` rows next to each other
        may share their prompt."""

    def divergence(
        self, params, other_params, tokens, mask, start=1, temperature=1.0, /, *, group: int = 1
    ) -> jax.Array:
        """KL to the base model with other_params over the whole vocabulary at each position, [B, T - start]."""


class Policy(NamedTuple):
    """Functions of params and "reference" (the frozen start), tokens and mask [B, P + R], start = P, temperature; and
    `group`, where that many rows next to each other share their prompt."""

    forward: Callable[
        ..., tuple[jax.Array, jax.Array, Any]
    ]  # -> log-probs, entropy [B, R], and what a critic adds
    reference: Callable[..., jax.Array]  # of the reference's own params -> log-probs [B, R]
    divergence: Callable[..., jax.Array] | None = None  # -> full-vocabulary KL to the reference [B, R]

    def of_groups(self, group: int) -> "Policy":
        """The same where the prompt of `group` rows next to each other goes through the model once."""
        if group == 1:
            return self
        divergence = self.divergence and partial(self.divergence, group=group)
        return Policy(partial(self.forward, group=group), partial(self.reference, group=group), divergence)


def policy_of(model: LanguageModel) -> Policy:
    def forward(params, tokens, mask, start, temperature, **group):
        whole = model.whole(params["policy"], params["reference"])
        return *model.logprobs(whole, tokens, mask, start, temperature, **group), ()

    return Policy(forward, reference_of(model), divergence_of(model))


def reference_of(model: LanguageModel) -> Callable[..., jax.Array]:
    def reference(ref_params, tokens, mask, start, temperature, **group):
        return model.base.logprobs(ref_params, tokens, mask, start, temperature, **group)[0]

    return reference


def divergence_of(model: LanguageModel) -> Callable[..., jax.Array]:
    def divergence(params, tokens, mask, start, temperature, **group):
        whole = model.whole(params["policy"], params["reference"])
        return model.divergence(whole, params["reference"], tokens, mask, start, temperature, **group)

    return divergence


class PolicyBatch(NamedTuple):
    tokens: Array  # [B, P+R]
    mask: Array  # [B, P+R]
    response_mask: Array  # [B, R]
    kept: Array  # [B] bool: rows that are learned from
    sampler_logprobs: Array  # [B, R] of the policy that sampled, as the sampler computed them
    logprobs: Array  # [B, R] the same by the trainer; where `scored_in_update` the sampler's again, not read
    ref_logprobs: Array  # [B, R]
    rewards: Array  # [B, R] per token, the KL penalty included
    advantages: Array  # [B, R]
    extra: Any  # an algorithm's own arrays, a row each
    metrics: Any  # of the batch's making; passed on by train_step


def reference_params(state: TrainState) -> Params:
    """Those of the reference that the penalty is to: the frozen start, or its refreshed successor."""
    return state.extra.get("reference", state.ref_params)


def initial_extra(config: OnPolicyConfig, policy_params: Params, ref_params: Params) -> tuple[dict, Params]:
    """(`TrainState.extra`, `ref_params`). A reference that is refreshed is part of the state that is trained."""
    extra = {"kl_coef": jnp.float32(config.beta)}
    if not config.ref_update_every:
        return extra, ref_params
    if jax.tree.map(jnp.shape, policy_params) != jax.tree.map(jnp.shape, ref_params):
        raise UserError("ref_update_every is not possible with adapters (lora): their reference is the base")
    return extra | {"reference": ref_params}, None


def policy_init(config: OnPolicyConfig, optimizer: Any) -> Callable[[Params, Params, jax.Array], TrainState]:
    """`init(params, ref_params, key)` of an algorithm whose only parameters are the policy's."""

    def init(params: Params, ref_params: Params, key: jax.Array) -> TrainState:
        extra, ref_params = initial_extra(config, params, ref_params)
        params = {"policy": params}
        return TrainState(jnp.int32(0), params, optimizer.init(params), ref_params, key, extra)

    return init


def slots_used(mask: Array) -> jax.Array:
    """The slots [B] up to the last that any of a row's (or group's) answers needs; mask [B, ..., R]."""
    number = jnp.broadcast_to(jnp.arange(1, mask.shape[-1] + 1, dtype=jnp.int32), mask.shape)
    return jnp.max(jnp.where(mask, number, 0), axis=tuple(range(1, mask.ndim)))


def learned_slots(rows: PolicyBatch) -> jax.Array:
    """`slots_used` of the answers that are learned from."""
    return slots_used(rows.response_mask & rows.kept[..., None])


def update_lengths(config: OnPolicyConfig, batch: PolicyBatch) -> Lengths | None:
    """How an update's pieces (rows, their shares) are shortened; `extra` is the algorithm's own affair."""

    def cut(piece: tuple[PolicyBatch, Any], size: int):
        rows, shares = piece
        start = rows.tokens.shape[-1] - rows.response_mask.shape[-1]
        first = lambda tree, *names: {name: getattr(tree, name)[..., :size] for name in names}  # noqa: E731
        of_answers = (
            "response_mask",
            "sampler_logprobs",
            "logprobs",
            "ref_logprobs",
            "rewards",
            "advantages",
        )
        whole = {"tokens": rows.tokens[..., : start + size], "mask": rows.mask[..., : start + size]}
        rows = rows._replace(**whole, **first(rows, *of_answers))
        return rows, shares and shares._replace(**first(shares, "loss", "tokens"))

    if config.length_buckets == 1:
        return None
    sizes = bucket_sizes(batch.response_mask.shape[-1], config.length_buckets)
    return Lengths(sizes, lambda piece: learned_slots(piece[0]), cut)


def shaped_scores(config: OnPolicyConfig, rollout: Rollout, scores: jax.Array) -> jax.Array:
    """Scores [B] clipped, less penalties for never ending and for length."""
    response = rollout.response_mask
    shaped = jnp.clip(scores, -config.score_clip, config.score_clip) if config.score_clip else scores
    shaped = shaped - config.missing_eos_penalty * (~rollout.ended).astype(jnp.float32)
    if not config.overlong_buffer:
        return shaped
    slots = response.shape[1]
    length = jnp.sum(response, axis=1, dtype=jnp.float32)
    return shaped - config.overlong_penalty * overlong_penalty(length, slots, config.overlong_buffer * slots)


def score_rollout(
    config: OnPolicyConfig,
    policy: Policy,
    state: TrainState,
    rollout: Rollout,
    scores: jax.Array,
    temperature: float,
    token_rewards: Array | None = None,
) -> PolicyBatch:
    """A batch without advantages yet. scores [B]: the reward of each whole response.

    token_rewards [B, R]: what single tokens earn beside it, NaN where nothing is said of one (`Scores.tokens`). What
    stands on masked tokens is not read. `score_clip` and the penalties are of the scores alone.

    The old log-probabilities are the trainer's own, by the same function that is trained: the first ratio is exactly 1.
    Where they are `scored_in_update`, they and what they tell (`sample_metrics`) are left to the update.
    """
    tokens, mask, response = rollout.tokens, rollout.mask, jnp.asarray(rollout.response_mask)
    start, sampler_logprobs = tokens.shape[1] - response.shape[1], jnp.asarray(rollout.logprobs)
    kl_coef = state.extra["kl_coef"]
    group, policy = config.shared_group, policy.of_groups(config.shared_group)
    if tokens.shape[0] % (config.parts * group):
        raise ValueError(
            f"{tokens.shape[0] // group} rows (or groups that share a prompt) do not divide into minibatches x "
            f"microbatches = {config.parts}"
        )

    # 1. Old log-probabilities (and a critic's values), and those of the reference.
    reference = reference_params(state)
    params = state.params | {"reference": reference}
    forward = lambda rows: in_groups(policy.forward(params, *flat(rows), start, temperature), group)  # noqa: E731
    of_reference = lambda rows: in_groups(policy.reference(reference, *flat(rows), start, temperature), group)  # noqa: E731
    rows, lengths = in_groups((tokens, mask), group), None
    if config.length_buckets > 1:
        lengths = Lengths(
            bucket_sizes(response.shape[1], config.length_buckets),
            used=lambda rows: slots_used(rows[1][..., start:]),
            cut=lambda rows, size: jax.tree.map(lambda x: x[..., : start + size], rows),
        )
    ref_logprobs = flat(map_rows(of_reference, rows, config.parts, lengths))
    if config.scored_in_update:
        logprobs, extra, told = sampler_logprobs, (), {}
    else:
        logprobs, entropy, extra = flat(map_rows(forward, rows, config.parts, lengths))
        told = sample_metrics(response, sampler_logprobs, logprobs, entropy, ref_logprobs)
    # 2. The score, with its penalties, at the last response token.
    length = jnp.sum(response, axis=1, dtype=jnp.float32)
    final = shaped_scores(config, rollout, scores)
    at_last = jax.nn.one_hot(last_token_index(response), response.shape[1], dtype=jnp.float32)
    # 3. Per-token reward: -beta * (log pi - log ref), what the token earns by itself, and the score at the end. No
    # gradient goes through it.
    rewards = at_last * final[:, None]
    earned = {}
    if token_rewards is not None:
        said = said_of(token_rewards, response)
        of_tokens = jnp.where(said, token_rewards, 0.0)
        rewards, scores = rewards + of_tokens, scores + jnp.sum(of_tokens, axis=1)
        steps = jnp.sum(said, axis=1, dtype=jnp.float32)
        earned = {
            "reward/tokens/mean": jnp.mean(jnp.sum(of_tokens, axis=1)),
            "reward/tokens/count": jnp.mean(steps),
        }
    if config.kl == "reward" and config.beta:
        rewards = rewards - kl_coef * jnp.where(response, kl_k1(logprobs, ref_logprobs), 0.0)
    kept = rollout.ended if config.mask_truncated else jnp.ones_like(rollout.ended)

    total = jnp.sum(rewards, axis=1)
    metrics = {
        "reward/total/mean": jnp.mean(total),
        "reward/total/std": jnp.std(total),
        "reward/score/mean": jnp.mean(scores),
        "reward/score/std": jnp.std(scores),
        "reward/length_corr": _correlation(length, scores),
        "kl/coef": kl_coef,
        "rollout/len_mean": jnp.mean(length),
        "rollout/len_max": jnp.max(length),
        "rollout/eos_rate": jnp.mean(rollout.ended, dtype=jnp.float32),
        "rollout/trunc_rate": jnp.mean(~rollout.ended, dtype=jnp.float32),
        "perf/pad_frac": 1.0 - jnp.mean(mask, dtype=jnp.float32),
    } | earned | told  # fmt: skip
    if config.group_size > 1:
        groups = scores.reshape(-1, config.group_size)
        equal = jnp.max(groups, axis=1) == jnp.min(groups, axis=1)
        metrics["reward/frac_zero_std_groups"] = jnp.mean(equal, dtype=jnp.float32)
    return PolicyBatch(
        tokens, mask, response, kept, sampler_logprobs, logprobs, ref_logprobs, rewards, jnp.zeros_like(rewards), extra,
        metrics,
    )  # fmt: skip


def sample_metrics(
    response: jax.Array,
    sampler_logprobs: jax.Array,
    logprobs: jax.Array,
    entropy: jax.Array,
    ref_logprobs: jax.Array,
) -> dict[str, jax.Array]:
    """What the trainer's log-probabilities of samples say: how far the policy is from the reference, its entropy, and
    how much more likely it finds the samples than the sampler did. Arrays [B, R]; `response` is the mask."""
    of_rows = lambda kl: jnp.mean(masked_sum(kl, response, axis=1))  # noqa: E731
    mismatch = jnp.where(response, logprobs - sampler_logprobs, 0.0)
    log_weight = jnp.sum(mismatch, axis=1)
    sequence_weight = jnp.exp(log_weight - jnp.max(log_weight))  # the effective sample size has no scale
    return {
        "kl/ref_k1": of_rows(kl_k1(logprobs, ref_logprobs)),
        "kl/ref_k3": of_rows(kl_k3(logprobs, ref_logprobs)),
        "policy/entropy": masked_mean(entropy, response),
        "mismatch/kl": masked_mean(-mismatch, response),
        "mismatch/logp_diff_max": jnp.max(jnp.abs(mismatch)),
        "mismatch/ess": jnp.square(jnp.sum(sequence_weight))
        / jnp.sum(jnp.square(sequence_weight))
        / sequence_weight.shape[0],
    }


def said_of(token_rewards: Array, response_mask: Array) -> jax.Array:
    """[B, R] bool: tokens of the response that have a reward of their own. ValueError where shapes differ."""
    if token_rewards.shape != response_mask.shape:
        raise ValueError(f"token rewards {token_rewards.shape} of responses {response_mask.shape}")
    return jnp.logical_and(response_mask, ~jnp.isnan(token_rewards))


def with_advantages(batch: PolicyBatch, advantages: Array) -> PolicyBatch:
    """advantages [B, R], or [B] for whole answers; their mean and spread over tokens are logged."""
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], batch.response_mask.shape)
    advantages = jnp.where(batch.response_mask, advantages, 0.0)
    mean = masked_mean(advantages, batch.response_mask)
    spread = jnp.sqrt(masked_mean(jnp.square(advantages - mean), batch.response_mask))
    metrics = batch.metrics | {"adv/mean": mean, "adv/std": spread}
    return batch._replace(advantages=advantages, metrics=metrics)


def importance_weights(mismatch: Array, cap: float, level: str) -> jax.Array:
    """min(exp(mismatch), cap) of each token, or of whole answers, [B, R]; ones for cap 0 (Yao et al. 2025).

    mismatch: the trainer's log-probabilities less the sampler's, 0 where masked.
    """
    if not cap:
        return jnp.ones_like(mismatch)
    if level == "sequence":
        mismatch = jnp.broadcast_to(jnp.sum(mismatch, axis=1, keepdims=True), mismatch.shape)
    return jnp.minimum(jnp.exp(mismatch), cap)


class Shares(NamedTuple):
    """What each token, and each answer, counts in a minibatch's means; they are taken before it is cut in pieces."""

    loss: Array  # [B, R] in the loss (`OnPolicyConfig.normalise`)
    tokens: Array  # [B, R] in a mean over tokens
    rows: Array  # [B] in a mean over answers


def shares_of(normalise: str, response_mask: Array, kept: Array) -> Shares:
    """Shares of `response_mask` [B, R] in the rows that are `kept` [B]."""
    mask = (response_mask & kept[:, None]).astype(jnp.float32)
    kept = jnp.any(mask > 0, axis=1).astype(jnp.float32)
    rows = kept / jnp.maximum(jnp.sum(kept), 1.0)
    tokens = mask / jnp.maximum(jnp.sum(mask), 1.0)
    each = {
        "token": lambda: tokens,
        "sequence": lambda: mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0) * rows[:, None],
        "sum": lambda: mask * rows[:, None],
        "constant": lambda: mask * rows[:, None] / mask.shape[1],
    }
    return Shares(each[normalise](), tokens, rows)


# (log-probs, old log-probs, advantages, mask: each [B, R]) -> (loss of each token [B, R], those whose gradient
# is clipped away [B, R] bool, or None where nothing is). A loss of whole answers stands at each of their tokens.
TokenLoss = Callable[[Array, Array, Array, Array], tuple[Array, Array | None]]


def policy_objective(
    config: OnPolicyConfig,
    token_loss: TokenLoss,
    policy: Policy,
    params: Params,
    rows: PolicyBatch,
    shares: Shares,
    kl_coef: jax.Array,
    temperature: float,
) -> tuple[jax.Array, dict, dict, Any]:
    """(loss, sums, maxima, (log-probs, entropy, what the forward pass adds)) of a minibatch, or of a piece of it.

    Σ_t share_t · [ weight_t · surrogate_t + beta · KL_t ] - entropy_coef · mean over tokens of H_t
    """
    start = rows.tokens.shape[1] - rows.response_mask.shape[1]
    logprobs, entropy, extra = policy.forward(params, rows.tokens, rows.mask, start, temperature)
    if config.scored_in_update:
        rows = rows._replace(logprobs=jax.lax.stop_gradient(logprobs))
    # How much more likely the trainer finds the samples than the sampler did.
    mismatch = jnp.where(rows.response_mask, rows.logprobs - rows.sampler_logprobs, 0.0)
    weights = importance_weights(mismatch, config.importance_cap, config.importance_level)
    mask = rows.response_mask & rows.kept[:, None]
    mean = lambda x, share: masked_sum(x * share, share > 0)  # noqa: E731
    losses, clipped = token_loss(logprobs, rows.logprobs, rows.advantages, mask)
    surrogate = mean(losses * weights, shares.loss)
    sums, maxima = {"policy/loss": surrogate}, {}
    if not config.scored_in_update:  # in the only update of a batch every ratio is 1
        # A ratio is exp of this; masked before exp: an overflow on a masked token would reach the gradient as 0·inf.
        log_ratio = jax.lax.stop_gradient(jnp.where(mask, logprobs - rows.logprobs, 0.0))
        sums["policy/approx_kl"] = mean(jnp.expm1(log_ratio) - log_ratio, shares.tokens)
        if clipped is not None:
            sums["policy/clip_frac"] = mean(clipped.astype(jnp.float32), shares.tokens)
        maxima["policy/ratio_max"] = jnp.exp(jnp.max(log_ratio))
    loss = surrogate
    if config.kl in (*ESTIMATORS, "full") and config.beta:
        penalty = kl_penalty(config, policy, params, rows, logprobs, mask, shares, start, temperature)
        loss = loss + kl_coef * penalty
        sums["kl/loss"] = penalty
    if config.entropy_coef:
        loss = loss - config.entropy_coef * mean(entropy, shares.tokens)
    return loss, sums, maxima, (logprobs, entropy, extra)


def kl_penalty(config, policy, params, rows, logprobs, mask, shares, start, temperature) -> jax.Array:
    """The KL estimate in the loss, weighted like the surrogate (or, of whole sequences, a mean over answers)."""
    if config.kl == "full":
        full = policy.divergence(params, rows.tokens, rows.mask, start, temperature)
        return masked_sum(full * shares.loss, mask)
    # Masked before the estimators: k3 has an exp.
    logprobs, ref_logprobs, old_logprobs = (
        jnp.where(mask, x, 0.0) for x in (logprobs, rows.ref_logprobs, rows.logprobs)
    )
    share = shares.loss
    if config.kl_level == "sequence":
        logprobs, ref_logprobs, old_logprobs = (
            jnp.sum(x, axis=1) for x in (logprobs, ref_logprobs, old_logprobs)
        )
        share = shares.rows
    estimate = ESTIMATORS[config.kl](logprobs, ref_logprobs)
    if config.kl_ratio:
        estimate = estimate * jnp.exp(logprobs - old_logprobs)
    return jnp.sum(estimate * share)


def run_updates(
    config: OnPolicyConfig, update: Callable, state: TrainState, batch: PolicyBatch
) -> tuple[Any, dict]:
    """All epochs and minibatches of one iteration in a scan: (params and optimiser state, metrics).

    `update((params, opt_state), rows) -> ((params, opt_state), sums, maxima)`. Every epoch has its own order of rows.
    """
    size = jax.tree.leaves(batch)[0].shape[0]
    used = learned_slots(batch) if config.length_buckets > 1 else None
    key = jax.random.fold_in(state.key, state.step)
    order = jax.vmap(lambda k: jax.random.permutation(k, size))(jax.random.split(key, config.epochs))
    order = order.reshape(config.epochs * config.minibatches, -1)

    def run(learned, index):
        # Which rows a minibatch has is chance; by length is only how it is cut into microbatches.
        rows = index if used is None else index[by_length(used[index], config.microbatches)]
        learned, sums, maxima = update(learned, taken(batch, rows))
        return learned, (sums, maxima)

    learned = (state.params, state.opt_state)
    if not config.stop_kl:
        learned, (sums, maxima) = jax.lax.scan(run, learned, order)
        done = jnp.float32(len(order))
    else:
        learned, (sums, maxima), done = until_far(run, learned, order, config.stop_kl)
    sums = jax.tree.map(lambda x: jnp.sum(x, axis=0) / done, sums)
    maxima = jax.tree.map(lambda x: jnp.max(x, axis=0), maxima)
    return learned, sums | maxima | {"policy/updates": done}


def until_far(run: Callable, learned: Any, order: jax.Array, stop_kl: float) -> tuple[Any, Any, jax.Array]:
    """A scan of `run(learned, index) -> (learned, (sums, maxima))` that leaves out what follows an update whose
    approximate KL is above `stop_kl`: (learned, (sums, maxima), updates done)."""
    _, (sums, maxima) = jax.eval_shape(run, learned, order[0])
    filled = lambda tree, value: jax.tree.map(lambda s: jnp.full(s.shape, value, s.dtype), tree)  # noqa: E731
    nothing = filled(sums, 0.0), filled(maxima, -jnp.inf)

    def step(carry, index):
        def skip(carry):
            return carry, nothing

        def once(carry):
            learned, done, _ = carry
            learned, (sums, maxima) = run(learned, index)
            return (learned, done + 1.0, sums["policy/approx_kl"] > stop_kl), (sums, maxima)

        return jax.lax.cond(carry[-1], skip, once, carry)

    (learned, done, _), told = jax.lax.scan(step, (learned, jnp.float32(0.0), jnp.bool_(False)), order)
    return learned, told, done


def next_extra(
    config: OnPolicyConfig, state: TrainState, policy_params: Params, metrics: dict, sequences: int
) -> dict:
    """`TrainState.extra` after a step: the adapted KL coefficient, and the refreshed reference."""
    extra = dict(state.extra)
    if config.target_kl:
        extra["kl_coef"] = adapted_kl_coef(config, extra["kl_coef"], metrics["kl/ref_k1"], sequences)
    if config.ref_update_every:
        extra["reference"] = refreshed_reference(
            extra["reference"], policy_params, state.step + 1, config.ref_update_every, config.ref_mixup
        )
    return extra


def adapted_kl_coef(config: OnPolicyConfig, kl_coef, kl, sequences: int) -> jax.Array:
    """Ziegler et al. 2019, section 2.2: a proportional controller on log beta with a clipped error."""
    error = jnp.clip(kl / config.target_kl - 1.0, -0.2, 0.2)
    return kl_coef * (1.0 + error * sequences / config.kl_horizon)


# (rewards per token [B, R], response mask [B, R], shaped scores of greedy answers [B] or None)
# -> advantages, [B] of whole answers or [B, R]
Advantages = Callable[[Array, Array, Array | None], Array]
# (rewards per token, response mask, tokens at which a step or the answer is rewarded: each [B, R]) -> advantages [B, R]
TokenAdvantages = Callable[[Array, Array, Array], Array]


def policy_gradient(
    config: OnPolicyConfig,
    advantages: Advantages,
    token_loss: TokenLoss,
    model: LanguageModel,
    optimizer: Any,
    temperature: float,
    token_advantages: TokenAdvantages | None = None,
) -> Algorithm:
    """The algorithm without a critic that has these advantages and this loss; `init(params, ref_params, key)`.

    `temperature` is the one that responses are sampled at: it is part of the policy here too. `token_advantages` stand
    in for `advantages` where tokens are rewarded by themselves; None: `advantages` are already each token's own.
    """
    group = config.shared_group
    policy = policy_of(model)

    def make_batch(
        state: TrainState,
        rollout: Rollout,
        scores: jax.Array,
        greedy: jax.Array | None = None,
        token_rewards: Array | None = None,
    ) -> PolicyBatch:
        if token_rewards is not None and not config.token_rewards:
            raise ValueError(f"{type(config).__name__} takes no token rewards: an answer has one advantage")
        batch = score_rollout(config, policy, state, rollout, scores, temperature, token_rewards)
        rewards, response = batch.rewards, batch.response_mask
        if token_rewards is None or token_advantages is None:
            return with_advantages(batch, advantages(rewards, response, greedy))
        last = jnp.arange(response.shape[1])[None] == last_token_index(response)[:, None]
        steps = said_of(token_rewards, response) | last & response
        return with_advantages(batch, token_advantages(rewards, response, steps))

    def train_step(state: TrainState, batch: PolicyBatch):
        frozen, kl_coef = reference_params(state), state.extra["kl_coef"]
        lengths, slots = update_lengths(config, batch), batch.response_mask.shape[1]

        def update(learned, groups: PolicyBatch):
            params, opt_state = learned
            rows = flat(groups)
            shares = shares_of(config.normalise, rows.response_mask, rows.kept)

            def loss(params, piece):
                rows, shares = flat(piece)
                whole = params | {"reference": frozen}
                value, sums, maxima, (logprobs, entropy, _) = policy_objective(
                    config, token_loss, policy.of_groups(group), whole, rows, shares, kl_coef, temperature
                )
                if not config.scored_in_update:
                    return value, (sums, maxima)
                left_out = slots - logprobs.shape[1]
                said = tuple(lengthened(x, 1, left_out) for x in (logprobs, entropy))
                return value, (sums, maxima, in_groups(said, group))

            pieces = (groups, in_groups(shares, group))
            sums, maxima, grads, *by_row = value_and_grad_rows(
                loss, params, pieces, config.microbatches, lengths
            )
            params, opt_state, norm = optimizer.apply(grads, opt_state, params)
            if config.scored_in_update:
                logprobs, entropy = flat(by_row[0])
                sums |= sample_metrics(
                    rows.response_mask, rows.sampler_logprobs, logprobs, entropy, rows.ref_logprobs
                )
            return (params, opt_state), sums | {"policy/grad_norm": norm}, maxima

        # Rows that share a prompt stay together.
        groups = in_groups(batch._replace(metrics=None), group)
        (params, opt_state), metrics = run_updates(config, update, state, groups)
        metrics |= batch.metrics
        metrics["policy/lr"] = optimizer.learning_rate(state.step * config.epochs * config.minibatches)
        extra = next_extra(config, state, params["policy"], metrics, batch.tokens.shape[0])
        return TrainState(state.step + 1, params, opt_state, state.ref_params, state.key, extra), metrics

    return Algorithm(policy_init(config, optimizer), make_batch, train_step)


def take_rows(batch: PolicyBatch, index: Array) -> PolicyBatch:
    """The rows `index` [M] of a batch, with the metrics of all."""
    taken = jax.tree.map(lambda x: x[index], batch._replace(metrics=None))
    return taken._replace(metrics=batch.metrics)


def _correlation(x, y):
    x, y = x - jnp.mean(x), y - jnp.mean(y)
    return jnp.mean(x * y) / jnp.maximum(jnp.sqrt(jnp.mean(x * x) * jnp.mean(y * y)), 1e-8)
