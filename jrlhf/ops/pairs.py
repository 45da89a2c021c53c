"""What algorithms that learn from pairs of answers share: DPO and its relatives differ in one function of arrays."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp

from jrlhf.ops.microbatch import map_rows, value_and_grad_rows
from jrlhf.types import Algorithm, Array, PairBatch, Params, PreferenceBatch, TrainState

# (policy [N, 2], reference [N, 2]) -> (loss, implicit reward of the chosen, of the rejected), each [N] float32.
# The inputs are log-probabilities of whole answers, the chosen one first.
PairLoss = Callable[[Array, Array], tuple[Array, Array, Array]]


class LanguageModel(Protocol):
    """What these algorithms ask of a model."""

    @property
    def base(self) -> "LanguageModel":
        """Without adapters: the reference."""

    def whole(self, trained: Params, frozen: Params | None) -> Params:
        """All parameters, of which some may be frozen."""

    def logprobs(self, params: Params, tokens_BT: Array, mask_BT: Array) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities and entropies of tokens [1, T) given what precedes them, each [B, T - 1]."""


class Optimizer(Protocol):
    """What they ask of an optimiser (`jrlhf.optim.Optimizer`)."""

    @property
    def learning_rate(self) -> Callable[[Any], jax.Array]: ...

    def init(self, params: Params) -> Any: ...

    def apply(self, grads: Params, opt_state: Any, params: Params) -> tuple[Params, Any, jax.Array]: ...


@dataclass(frozen=True)
class PairConfig:
    """What the configs of these algorithms begin with."""

    # memory against time: the frozen start's log-probabilities computed once, or its parameters kept
    reference: Literal["precomputed", "on_the_fly"] = field(default="precomputed", kw_only=True)
    microbatches: int = field(default=1, kw_only=True)


def pair_logprobs(model: LanguageModel, params: Params, batch: PairBatch | PreferenceBatch) -> jax.Array:
    """Log-probability of each answer given its prompt, summed over its tokens, [B, K] float32.

    Both (all K) answers go through the model in one forward pass.
    """
    b, k, t = batch.tokens.shape
    logprobs, _ = model.logprobs(params, batch.tokens.reshape(b * k, t), batch.mask.reshape(b * k, t))
    mask = batch.response_mask.reshape(b * k, t)[:, 1:].astype(jnp.float32)
    return jnp.sum(logprobs * mask, axis=1).reshape(b, k)


def pair_algorithm(
    pair_loss: PairLoss, config: PairConfig, model: LanguageModel, optimizer: Optimizer
) -> Algorithm:
    """The algorithm that minimises the mean of `pair_loss` over pairs, as `Algorithm` of PairBatches.

    `init(params, ref_params, key)`: parameters of the policy, those of the reference, and the base key.
    """

    def init(params, ref_params, key) -> TrainState:
        """`ref_params` are kept only where the reference is scored on the fly, or `params` are adapters beside it."""
        params = {"policy": params}
        adapters = model.base != model
        ref_params = ref_params if config.reference == "on_the_fly" or adapters else None
        return TrainState(jnp.int32(0), params, optimizer.init(params), ref_params, key)

    def train_step(state: TrainState, batch: PairBatch):
        if config.reference == "on_the_fly":
            score = lambda rows: pair_logprobs(model.base, state.ref_params, rows)  # noqa: E731
            batch = batch._replace(ref_logprobs=map_rows(score, batch, config.microbatches))
        pairs = jnp.float32(batch.tokens.shape[0])

        def loss(params, rows: PairBatch):
            logp = pair_logprobs(model, model.whole(params["policy"], state.ref_params), rows)
            losses, chosen, rejected = pair_loss(logp, rows.ref_logprobs)
            mean = lambda x: jnp.sum(x, dtype=jnp.float32) / pairs  # noqa: E731
            sums = {
                "pref/loss": mean(losses),
                "pref/acc": mean(chosen > rejected),
                "pref/margin": mean(chosen - rejected),
                "pref/logp_chosen": mean(logp[:, 0]),
                "pref/logp_rejected": mean(logp[:, 1]),
            }
            return mean(losses), (sums, {})

        metrics, _, grads = value_and_grad_rows(loss, state.params, batch, config.microbatches)
        params, opt_state, grad_norm = optimizer.apply(grads, state.opt_state, state.params)
        metrics |= {"policy/grad_norm": grad_norm, "policy/lr": optimizer.learning_rate(state.step)}
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return Algorithm(init, None, train_step)
