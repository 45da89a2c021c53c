"""What algorithms on ranked answers share: DPO and its relatives differ in one function of arrays."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jrlhf.config import UserError
from jrlhf.ops.masking import masked_sum
from jrlhf.ops.microbatch import map_rows, value_and_grad_rows
from jrlhf.ops.reference import refreshed_reference
from jrlhf.ops.reward_losses import ordered_pairs
from jrlhf.types import (
    Algorithm,
    Array,
    PackedAnswers,
    PairBatch,
    Params,
    PreferenceBatch,
    RankedBatch,
    TrainState,
)

When = Literal["never", "precomputed", "on_the_fly"]


class Answers(NamedTuple):
    """What a loss may read of K answers to each of B prompts. Pairs are K = 2, the chosen answer first."""

    logps: jax.Array  # [B, K] float32, log-probabilities of whole answers: sums over their tokens
    ref_logps: jax.Array  # [B, K] float32, the same under the reference; zeros without one
    lengths: jax.Array  # [B, K] float32, tokens of each answer
    ranks: jax.Array  # [B, K] int32; 1 is best, equal ranks are ties, 0 is no answer (of pairs: 1, 2)
    mean_lengths: jax.Array  # [K] float32, over the *global* batch, of which this may be a microbatch
    weights: jax.Array | float = 1.0  # [B] float32, how much each row counts
    certainty: jax.Array | float = (
        1.0  # [B] float32, that the first answer of a pair is the better; 1/2 is a tie
    )

    @property
    def mean_logps(self) -> jax.Array:
        """[B, K], per token."""
        return self.logps / jnp.maximum(self.lengths, 1.0)

    @property
    def ratios(self) -> jax.Array:
        """log(π/π_ref), [B, K]; log π without a reference."""
        return self.logps - self.ref_logps

    @property
    def token_nll(self) -> jax.Array:
        """Negative log-likelihood of the first answers, [B], so scaled that its mean over the global batch is the mean
        over *tokens*, as in supervised fine-tuning: long answers weigh more."""
        return -self.logps[:, 0] / jnp.maximum(self.mean_lengths[0], 1.0)


# Answers -> [B] float32, of which the mean over the global batch, weighted by `Answers.weights`, is minimised.
PreferenceLoss = Callable[[Answers], jax.Array]


class LanguageModel(Protocol):
    """What these algorithms ask of a model."""

    @property
    def base(self) -> "LanguageModel":
        """Without adapters: the reference."""

    def whole(self, trained: Params, frozen: Params | None) -> Params:
        """All parameters, of which some may be frozen."""

    def logprobs(self, params: Params, tokens_BT: Array, mask_BT: Array) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities and entropies of tokens [1, T) given what precedes them, each [B, T - 1].

        Where batches are packed, also `packed_logprobs(params, rows: PackedAnswers)`: [N, A] of the answers' tokens.
        """


class Optimizer(Protocol):
    """What they ask of an optimiser (`jrlhf.optim.Optimizer`)."""

    @property
    def learning_rate(self) -> Callable[[Any], jax.Array]: ...

    def init(self, params: Params) -> Any: ...

    def apply(self, grads: Params, opt_state: Any, params: Params) -> tuple[Params, Any, jax.Array]: ...


@dataclass(frozen=True)
class PairConfig:
    """What the configs of these algorithms begin with. This one is for those that know no reference."""

    abstract: ClassVar[bool] = True
    learns_from: ClassVar[Literal["pairs", "rankings"]] = "pairs"

    microbatches: int = field(default=1, kw_only=True)  # of a train step, one after the other, to save memory

    @property
    def reference_scored(self) -> When:
        """When the reference's log-probabilities are computed."""
        return "never"

    @property
    def tail_weight(self) -> float:
        """`tail_weight` of `answer_logprobs`."""
        return 1.0

    @property
    def reads_weights(self) -> bool:
        """Whether pairs may count differently (`PairBatch.weights`)."""
        return self.learns_from == "pairs"

    @property
    def reads_certainty(self) -> bool:
        """Whether a pair may say how surely its first answer is the better (`PairBatch.certainty`)."""
        return False

    def implicit_reward(self, answers: Answers) -> jax.Array:
        """The reward that the policy implies for each answer, [B, K]: what accuracies and margins are measured by."""
        raise TypeError(f"{type(self).__name__} does not define implicit_reward()")


@dataclass(frozen=True)
class ReferencedPairConfig(PairConfig):
    """What the configs of algorithms against a reference begin with."""

    abstract: ClassVar[bool] = True

    # the frozen start's log-probabilities: computed once, before training, or again in every step
    reference: Literal["precomputed", "on_the_fly"] = field(default="precomputed", kw_only=True)
    ref_update_every: int = field(default=0, kw_only=True)  # TR-DPO: updates between refreshes; 0: frozen
    ref_mixup: float = field(default=1.0, kw_only=True)  # the policy's share in a refresh; 1 replaces

    def __post_init__(self):
        if self.ref_update_every < 0:
            raise UserError(f"ref_update_every must be zero or more, got {self.ref_update_every}")
        if not 0 < self.ref_mixup <= 1:
            raise UserError(f"ref_mixup must be in (0, 1], got {self.ref_mixup}")
        if self.ref_mixup != 1 and not self.ref_update_every:
            raise UserError("ref_mixup is read where ref_update_every is set: the reference is frozen")
        if self.ref_update_every and self.reference != "on_the_fly":
            raise UserError(
                "a reference that is refreshed cannot be precomputed: set reference to 'on_the_fly'"
            )

    @property
    def reference_scored(self) -> When:
        return self.reference


def pair_logprobs(
    model: LanguageModel,
    params: Params,
    batch: PairBatch | RankedBatch | PreferenceBatch,
    tail_weight: float = 1.0,
) -> jax.Array:
    """Log-probability of each answer given its prompt, summed over its tokens, [B, K] float32.

    Both (all K) answers go through the model in one forward pass. `tail_weight` multiplies the tokens beyond the length
    of the prompt's shortest answer (LD-DPO's alpha, Liu et al. 2024, eq. 8; 1: an ordinary sum).
    """
    if isinstance(batch.tokens, PackedAnswers):
        return _packed_logprobs(model, params, batch, tail_weight)
    b, k, t = batch.tokens.shape
    logprobs, _ = model.logprobs(params, batch.tokens.reshape(b * k, t), batch.mask.reshape(b * k, t))
    logprobs, mask = logprobs.reshape(b, k, t - 1), batch.response_mask[:, :, 1:].astype(bool)
    if tail_weight != 1.0:
        place = jnp.cumsum(mask, axis=2, dtype=jnp.float32)
        logprobs = logprobs * jnp.where(place <= _shortest(batch)[:, None, None], 1.0, tail_weight)
    return masked_sum(logprobs, mask, axis=2)


def _shortest(batch: PairBatch | RankedBatch | PreferenceBatch) -> jax.Array:
    """Tokens of each prompt's shortest answer, [B] float32."""
    lengths = answer_lengths(batch)
    return jnp.min(jnp.where(lengths > 0, lengths, jnp.inf), axis=1)


def _packed_logprobs(
    model: Any, params: Params, batch: PairBatch | RankedBatch | PreferenceBatch, tail_weight: float
) -> jax.Array:
    rows, (b, k) = batch.tokens, shape_of(batch)
    logprobs, owners = model.packed_logprobs(params, rows), jnp.asarray(rows.owners)
    if tail_weight != 1.0:
        shortest = _shortest(batch)[jnp.maximum(owners, 0) // k]
        logprobs = logprobs * jnp.where(jnp.asarray(rows.places, jnp.float32) <= shortest, 1.0, tail_weight)
    # What is nobody's goes to one more answer, which is left out.
    owners = jnp.where(owners < 0, b * k, owners)
    return jax.ops.segment_sum(logprobs.reshape(-1), owners.reshape(-1), b * k + 1)[:-1].reshape(b, k)


def shape_of(batch: PairBatch | RankedBatch | PreferenceBatch) -> tuple[int, int]:
    """Prompts, and answers to each."""
    if isinstance(batch.tokens, PackedAnswers):
        b, k = batch.tokens.answers.shape
    else:
        b, k, _ = batch.tokens.shape
    return b, k


def answer_lengths(batch: PairBatch | RankedBatch | PreferenceBatch) -> jax.Array:
    """Tokens of each answer, [B, K] float32; 0 of a padding answer."""
    if isinstance(batch.tokens, PackedAnswers):
        return jnp.asarray(batch.tokens.lengths, jnp.float32)
    return jnp.sum(batch.response_mask[:, :, 1:], axis=2, dtype=jnp.float32)


def ranks_of(batch: PairBatch | RankedBatch) -> jax.Array:
    """[B, K] int32; of pairs (1, 2), but (1, 1) of one on which the labels are evenly divided."""
    if isinstance(batch, RankedBatch):
        return jnp.asarray(batch.ranks)
    ranks = jnp.broadcast_to(jnp.array([1, 2], jnp.int32), shape_of(batch))
    if isinstance(batch.certainty, tuple):
        return ranks
    return jnp.where((batch.certainty == 0.5)[:, None], 1, ranks)


def weights_of(batch: PairBatch | RankedBatch) -> jax.Array:
    """How much each row counts, [B] float32."""
    if isinstance(batch, RankedBatch) or isinstance(batch.weights, tuple):
        return jnp.ones(shape_of(batch)[:1], jnp.float32)
    return jnp.asarray(batch.weights)


def certainty_of(batch: PairBatch | RankedBatch) -> jax.Array | float:
    """How surely each pair's first answer is the better, [B] float32, or 1."""
    if isinstance(batch, RankedBatch) or isinstance(batch.certainty, tuple):
        return 1.0
    return jnp.asarray(batch.certainty)


def answers_of(
    model: LanguageModel, params: Params, batch: PairBatch | RankedBatch, tail_weight: float = 1.0
) -> Answers:
    """What a loss would read of a whole batch whose reference is scored."""
    logps = pair_logprobs(model, params, batch, tail_weight)
    return read(logps, batch, mean_lengths(batch))


def mean_lengths(batch: PairBatch | RankedBatch) -> jax.Array:
    """Over the prompts of a batch, each as much as it counts, [K] float32; padding answers do not."""
    lengths, weights = answer_lengths(batch), weights_of(batch)[:, None]
    count = jnp.sum(jnp.where(lengths > 0, weights, 0.0), axis=0)
    return jnp.sum(lengths * weights, axis=0) / positive(count)


def positive(total: jax.Array) -> jax.Array:
    """A sum of weights to divide by: where it is 0, so is what it divides, and it is 1."""
    return jnp.where(total > 0, total, 1.0)


def read(logps: jax.Array, rows: PairBatch | RankedBatch, global_mean_lengths: jax.Array) -> Answers:
    ref_logps = jnp.asarray(rows.ref_logprobs)
    of_pairs = weights_of(rows), certainty_of(rows)
    return Answers(logps, ref_logps, answer_lengths(rows), ranks_of(rows), global_mean_lengths, *of_pairs)


def pair_algorithm(
    loss: PreferenceLoss,
    config: PairConfig,
    model: LanguageModel,
    optimizer: Optimizer,
    coupled: bool = False,
) -> Algorithm:
    """The algorithm that minimises the (weighted) mean of `loss` over the batch, as `Algorithm` of PairBatches (of
    RankedBatches, where the config learns from rankings).

    `init(params, ref_params, key)`: parameters of the policy, those of the reference, and the base key.

    `coupled` says that the loss of a row depends on other rows. Its microbatches are exact all the same, at the cost of
    one more forward pass: all log-probabilities first, then the loss's derivative with respect to them on the whole
    batch, then each microbatch's share of the gradient. Losses of single rows need no such pass.
    """
    when = config.reference_scored
    every, mixup = (0, 1.0)
    if isinstance(config, ReferencedPairConfig):
        every, mixup = config.ref_update_every, config.ref_mixup
    adapters = model.base != model
    if every and adapters:
        raise UserError("ref_update_every is not possible with adapters (lora): their reference is the base")

    def init(params, ref_params, key) -> TrainState:
        """`ref_params` are kept only where the reference is scored on the fly, or `params` are adapters beside it.
        A reference that is refreshed is part of the state that is trained."""
        params = {"policy": params}
        extra = {"reference": ref_params} if every else ()
        frozen = ref_params if adapters or (when == "on_the_fly" and not every) else None
        return TrainState(jnp.int32(0), params, optimizer.init(params), frozen, key, extra)

    def logps_of(params, state: TrainState, rows) -> jax.Array:
        return pair_logprobs(model, model.whole(params["policy"], state.ref_params), rows, config.tail_weight)

    def with_reference(state: TrainState, batch) -> tuple[TrainState, PairBatch | RankedBatch]:
        """The batch with the reference's log-probabilities, and the state with the reference that gave them."""
        if when == "precomputed":
            return state, batch
        if when == "never":
            return state, batch._replace(ref_logprobs=jnp.zeros(shape_of(batch), jnp.float32))
        ref = state.ref_params
        if every:
            # By the policy that begins the step. (Where a bad step is left out, so is the refresh that was due in it.)
            ref = refreshed_reference(
                state.extra["reference"], state.params["policy"], state.step, every, mixup
            )
            state = state._replace(extra={"reference": ref})
        score = lambda rows: pair_logprobs(model.base, ref, rows, config.tail_weight)  # noqa: E731
        return state, batch._replace(ref_logprobs=map_rows(score, batch, config.microbatches))

    def train_step(state: TrainState, batch: PairBatch | RankedBatch):
        state, batch = with_reference(state, batch)
        weights = weights_of(batch)
        prompts = positive(jnp.sum(weights))
        before, _ = ordered_pairs(ranks_of(batch))
        with_order = positive(jnp.sum(jnp.where(jnp.any(before, axis=(1, 2)), weights, 0.0)))
        over_tokens = mean_lengths(batch)

        def objective(logps: jax.Array, rows: PairBatch | RankedBatch) -> tuple[jax.Array, dict]:
            """(loss, metrics), each already divided by what the whole batch holds."""
            answers = read(logps, rows, over_tokens)
            value = jnp.sum(loss(answers) * answers.weights, dtype=jnp.float32) / prompts
            sums = pair_metrics(config.implicit_reward(answers), answers, with_order)
            return value, {"pref/loss": value} | sums

        if coupled and config.microbatches > 1:
            logps = map_rows(lambda rows: logps_of(state.params, state, rows), batch, config.microbatches)
            (_, metrics), slopes = jax.value_and_grad(objective, has_aux=True)(logps, batch)

            def linear(params, rows):
                """Its gradient is the objective's: the chain rule, a microbatch at a time."""
                part, slope = rows
                return jnp.sum(slope * logps_of(params, state, part)), ({}, {})

            _, _, grads = value_and_grad_rows(linear, state.params, (batch, slopes), config.microbatches)
        else:

            def whole(params, rows):
                value, sums = objective(logps_of(params, state, rows), rows)
                return value, (sums, {})

            metrics, _, grads = value_and_grad_rows(whole, state.params, batch, config.microbatches)
        params, opt_state, grad_norm = optimizer.apply(grads, state.opt_state, state.params)
        metrics |= {"policy/grad_norm": grad_norm, "policy/lr": optimizer.learning_rate(state.step)}
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return Algorithm(init, None, train_step)


def pair_metrics(rewards: jax.Array, answers: Answers, with_order: jax.Array) -> dict[str, jax.Array]:
    """Of implicit rewards [B, K]: each prompt's mean over its ordered pairs, summed over prompts by their weights and
    divided by `with_order`, the weight of the prompts that have such a pair."""
    before, _ = ordered_pairs(answers.ranks)
    pairs = jnp.maximum(jnp.sum(before, axis=(1, 2), dtype=jnp.float32), 1.0)

    def mean(x: jax.Array) -> jax.Array:  # [B, K, K], of (better answer, worse answer)
        of_prompt = jnp.sum(jnp.where(before, x.astype(jnp.float32), 0.0), axis=(1, 2)) / pairs
        return jnp.sum(of_prompt * answers.weights) / with_order

    better, worse = rewards[:, :, None], rewards[:, None, :]
    return jax.lax.stop_gradient(
        {
            "pref/acc": mean(better > worse),
            "pref/margin": mean(better - worse),
            "pref/logp_chosen": mean(jnp.broadcast_to(answers.logps[:, :, None], before.shape)),
            "pref/logp_rejected": mean(jnp.broadcast_to(answers.logps[:, None, :], before.shape)),
        }
    )
