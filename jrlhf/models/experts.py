"""Mixture of experts: every token goes to its experts, none is dropped."""

import math
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
    if x_BTD.shape[0] % math.prod(mesh.shape[name] for name in batch[0]):
        # A few rows that do not divide (an initialisation, one prompt): every device has them all.
        batch = P()
    axis = experts[0]

    def on_device(x, weights, chosen, gate, up, down):
        # Said aloud: a gather by this device's own order does not tell by itself that its derivative is to be summed.
        x, weights = (jax.lax.pcast(v, axis, to="varying") for v in (x, weights))
        first = jax.lax.axis_index(axis) * gate.shape[0]
        return jax.lax.psum(_own_experts(x, weights, chosen, gate, up, down, first, activation), axis)

    return jax.shard_map(
        on_device, in_specs=(batch, batch, batch, experts, experts, experts), out_specs=batch
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
    # What a ragged product and its derivative leave beyond their groups is not defined: masked on the way in and out.
    own_n1 = own_n[order_n][:, None]
    mask = lambda x: jnp.where(own_n1, x, jnp.zeros((), x.dtype))  # noqa: E731
    rows_nD = mask(x_BTD.reshape(b * t, d)[order_n // k])
    h_nF = activation(jax.lax.ragged_dot(rows_nD, gate_EDF, sizes_E)) * jax.lax.ragged_dot(
        rows_nD, up_EDF, sizes_E
    )
    y_nD = mask(jax.lax.ragged_dot(h_nF, down_EFD, sizes_E)) * weights_BTk.reshape(-1)[order_n][:, None]
    return jnp.zeros((b * t, d), y_nD.dtype).at[order_n // k].add(y_nD).reshape(b, t, d)
