"""What algorithms that learn from single labelled answers share: KTO and BCO differ in a loss and in what an answer
is compared with."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jrlhf.ops.masking import masked_mean, masked_sum
from jrlhf.ops.microbatch import map_rows, value_and_grad_rows
from jrlhf.ops.pairs import LanguageModel, Optimizer
from jrlhf.types import Algorithm, AnswerBatch, Array, Params, TrainState, UnpairedBatch


@dataclass(frozen=True)
class UnpairedConfig:
    """What the configs of these algorithms begin with."""

    # the frozen start's log-probabilities: computed once, before training, or again in every step
    reference: Literal["precomputed", "on_the_fly"] = field(default="precomputed", kw_only=True)
    microbatches: int = field(default=1, kw_only=True)

    @property
    def mismatched(self) -> bool:
        """Whether batches hold answers to other prompts beside each prompt's own."""
        return False


class UnpairedRule(NamedTuple):
    """What tells these algorithms apart."""

    beta: float  # implicit reward = beta * log(pi / ref)
    # (log-ratios [N], labels [N], shift) -> losses [N]
    loss: Callable[[Array, Array, Array], Array]
    # (extra, log-ratios of a batch of answers: AnswerBatch -> [B], batch) -> (shift, new extra). Of the whole batch,
    # before any of it is learned from.
    shift: Callable[[Any, Callable[[AnswerBatch], Array], UnpairedBatch], tuple[Array, Any]]
    reward_of_shift: float  # times the shift: the implicit reward at which an answer counts as neither
    extra: Callable[[], Any] = tuple  # the state that the shift begins with


def answer_logprobs(model: LanguageModel, params: Params, answers: AnswerBatch) -> jax.Array:
    """Log-probability of each answer given its prompt, summed over its tokens, [B] float32."""
    logprobs, _ = model.logprobs(params, answers.tokens, answers.mask)
    return masked_sum(logprobs, answers.response_mask[:, 1:], axis=1)


def unpaired_algorithm(
    rule: UnpairedRule, config: UnpairedConfig, model: LanguageModel, optimizer: Optimizer
) -> Algorithm:
    """The algorithm that minimises the mean of `rule.loss` over answers, as `Algorithm` of UnpairedBatches.

    `init(params, ref_params, key)`: parameters of the policy, those of the reference, and the base key. The shift is
    computed from the whole batch (over all devices) by a forward pass of its own, so that neither microbatches nor
    devices change anything; it costs about a third of the step beside it.
    """

    def init(params, ref_params, key) -> TrainState:
        """`ref_params` are kept only where the reference is scored on the fly, or `params` are adapters beside it."""
        params = {"policy": params}
        adapters = model.base != model
        ref_params = ref_params if config.reference == "on_the_fly" or adapters else None
        return TrainState(jnp.int32(0), params, optimizer.init(params), ref_params, key, rule.extra())

    def with_reference(state: TrainState, answers: AnswerBatch) -> AnswerBatch:
        score = lambda rows: answer_logprobs(model.base, state.ref_params, rows)  # noqa: E731
        return answers._replace(ref_logprobs=map_rows(score, answers, config.microbatches))

    def train_step(state: TrainState, batch: UnpairedBatch):
        if config.reference == "on_the_fly":
            mismatched = None if batch.mismatched is None else with_reference(state, batch.mismatched)
            batch = batch._replace(answers=with_reference(state, batch.answers), mismatched=mismatched)

        def log_ratios(params, rows: AnswerBatch):
            whole = model.whole(params["policy"], state.ref_params)
            return answer_logprobs(model, whole, rows) - rows.ref_logprobs

        before = lambda rows: log_ratios(state.params, rows)  # noqa: E731
        shift, extra = rule.shift(
            state.extra, lambda answers: map_rows(before, answers, config.microbatches), batch
        )
        count = lambda labels: jnp.maximum(jnp.sum(labels, dtype=jnp.float32), 1.0)  # noqa: E731
        labels = batch.labels.astype(bool)
        answers = jnp.float32(labels.shape[0])
        desirable, undesirable = count(labels), count(~labels)

        def loss(params, rows: tuple[AnswerBatch, Array]):
            answered, wanted = rows
            ratios = log_ratios(params, answered)
            mean = lambda x: jnp.sum(x, dtype=jnp.float32) / answers  # noqa: E731
            value = mean(rule.loss(ratios, wanted, shift))
            rewards = jax.lax.stop_gradient(rule.beta * ratios)
            above = rewards > rule.reward_of_shift * shift
            sums = {
                "pref/loss": value,
                "pref/label_acc": mean(above == wanted),
                "pref/reward_desirable": masked_mean(rewards, wanted, denominator=desirable),
                "pref/reward_undesirable": masked_mean(rewards, ~wanted, denominator=undesirable),
                "pref/desirable_frac": mean(wanted),
            }
            return value, (sums, {})

        metrics, _, grads = value_and_grad_rows(
            loss, state.params, (batch.answers, labels), config.microbatches
        )
        params, opt_state, grad_norm = optimizer.apply(grads, state.opt_state, state.params)
        metrics |= {
            "pref/shift": rule.reward_of_shift * shift,
            "policy/grad_norm": grad_norm,
            "policy/lr": optimizer.learning_rate(state.step),
        }
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state, extra=extra)
        return state, metrics

    return Algorithm(init, None, train_step)
