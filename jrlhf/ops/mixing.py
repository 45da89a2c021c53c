"""Several rewards made into one number."""

from typing import Literal

import jax
import jax.numpy as jnp

from jrlhf.types import Array

Mixing = Literal["sum", "product", "min", "gates", "by_group"]


def mix_scores(
    scores: Array,
    how: Mixing,
    weights: Array,
    mean: Array | float = 0.0,
    std: Array | float = 1.0,
    gates: Array | None = None,
    chosen: Array | None = None,
) -> jax.Array:
    """One reward of M parts, scores [M, B] and weights [M] -> [B] float32; r_i = (score_i - mean_i) / std_i.

    "sum": Σ_i w_i r_i. "product": Π_i r_i^w_i, of rewards that are not negative. "min": the worst of w_i r_i, as
    max-min alignment has it (Chakraborty et al. 2024). "gates": the sum, in order, up to and including the first part
    whose score, as it came, is below its gate [M] (-inf: no gate): what comes after counts for nothing, so that right
    answers in the wrong form earn no more than their form. "by_group": w_i r_i of the part that `chosen` [B] numbers.
    """
    column = lambda x: jnp.asarray(x, jnp.float32).reshape(-1, 1)  # noqa: E731
    scores = jnp.asarray(scores, jnp.float32)
    rewards, weights = (scores - column(mean)) / column(std), column(weights)
    if how == "product":
        return jnp.prod(rewards**weights, axis=0)
    weighted = weights * rewards
    if how == "min":
        return jnp.min(weighted, axis=0)
    if how == "by_group":
        assert chosen is not None
        return jnp.take_along_axis(weighted, jnp.asarray(chosen)[None], axis=0)[0]
    if how == "gates":
        assert gates is not None
        passed = scores >= column(gates)
        before = jnp.cumprod(passed.astype(jnp.float32), axis=0)[:-1]
        weighted = weighted * jnp.concatenate([jnp.ones_like(weighted[:1]), before])
    return jnp.sum(weighted, axis=0)
