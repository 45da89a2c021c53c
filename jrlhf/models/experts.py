"""Mixture of experts: every token goes to its experts, none is dropped."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jrlhf.sharding import logical_spec


def combine_experts(
    x_BTD: jax.Array,
    weights_BTk: jax.Array,
    chosen_BTk: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    activation: Callable,
) -> jax.Array:
    """Σ_k weight_k · expert_k(x) for the k experts chosen for each token, [B, T, D].

    On a mesh the experts are split over the axis of the logical name "experts". Activations are whole there, so each
    device computes its own experts' share of every token of its rows, and the shares are summed: no token travels.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _own_experts(
            x_BTD, weights_BTk, chosen_BTk, gate_EDF, up_EDF, down_EFD, jnp.int32(0), activation
        )
    batch, experts = logical_spec(("batch", None, None)), logical_spec(("experts", None, None))
    axis = experts[0]

    def on_device(x, weights, chosen, gate, up, down):
        first = jax.lax.axis_index(axis) * gate.shape[0]
        return jax.lax.psum(_own_experts(x, weights, chosen, gate, up, down, first, activation), axis)

    return jax.shard_map(
        on_device, in_specs=(batch, batch, batch, experts, experts, experts), out_specs=P(*batch)
    )(x_BTD, weights_BTk, chosen_BTk, gate_EDF, up_EDF, down_EFD)


def _own_experts(x_BTD, weights_BTk, chosen_BTk, gate_EDF, up_EDF, down_EFD, first, activation):
    """The part of the sum that experts [first, first + E) contribute."""
    b, t, d = x_BTD.shape
    e, k = gate_EDF.shape[0], chosen_BTk.shape[-1]
    expert_n = chosen_BTk.reshape(-1) - first  # n = B T k choices
    own_n = (expert_n >= 0) & (expert_n < e)
    # Choices sorted by expert make each expert's rows one block; those of other devices' experts come last.
    expert_n = jnp.where(own_n, expert_n, e)
    order_n = jnp.argsort(expert_n, stable=True)
    sizes_E = jnp.bincount(expert_n, length=e + 1)[:e].astype(jnp.int32)
    rows_nD = x_BTD.reshape(b * t, d)[order_n // k]
    h_nF = activation(jax.lax.ragged_dot(rows_nD, gate_EDF, sizes_E)) * jax.lax.ragged_dot(
        rows_nD, up_EDF, sizes_E
    )
    y_nD = jax.lax.ragged_dot(h_nF, down_EFD, sizes_E)
    # What a ragged product leaves beyond its groups is not defined.
    weight_n = jnp.where(own_n, weights_BTk.reshape(-1), jnp.zeros((), weights_BTk.dtype))[order_n]
    y_nD = jnp.where(own_n[order_n][:, None], y_nD, jnp.zeros((), y_nD.dtype)) * weight_n[:, None]
    return jnp.zeros((b * t, d), y_nD.dtype).at[order_n // k].add(y_nD).reshape(b, t, d)
