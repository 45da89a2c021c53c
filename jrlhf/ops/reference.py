"""A reference policy that follows the policy (TR-DPO)."""

import jax
import jax.numpy as jnp

from jrlhf.types import Params


def refreshed_reference(ref: Params, policy: Params, step: jax.Array, every: int, mixup: float) -> Params:
    """The reference after `step` updates of the policy, two trees of one structure -> the same.

    Gorbatovski et al. 2024 ("Learn your reference model", TR-DPO, eq. 6 and 7): after every `every` updates
    ref <- mixup · policy + (1 - mixup) · ref. `mixup` 1 replaces it (their hard update); a smaller one, often, is
    their soft update. At `step` 0 nothing moves. Mixed in float32, kept in the reference's own dtype; no gradient.
    """
    due = (step > 0) & (step % every == 0)

    def mix(r: jax.Array, p: jax.Array) -> jax.Array:
        p = jax.lax.stop_gradient(p)
        mixed = mixup * p.astype(jnp.float32) + (1.0 - mixup) * r.astype(jnp.float32)
        return jnp.where(due, mixed.astype(r.dtype), r)

    return jax.tree.map(mix, ref, policy)
