"""Mixture of experts: every token goes to its experts, none is dropped."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jrlhf.ops.masking import lengthened
from jrlhf.sharding import RULES, batch_ways

# Logical axes of the experts' weights.
INTO, OUT = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")


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

    On a mesh the experts are split over the expert axis, which splits rows too, and each one's middle layer over the
    tensor axis. The rows of a group of experts are gathered, each of its devices computes its own experts' share of all
    of them, and the sum of the shares goes back to where the rows are from. (While they are sampled, the rows are the
    same in a whole group: the shares are summed.)
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _own_experts(
            x_BTD, weights_BTk, chosen_BTk, gate_EDF, up_EDF, down_EFD, jnp.int32(0), activation
        )

    def shares(x, weights, chosen, gate, up, down):
        first = jax.lax.axis_index("expert") * gate.shape[0]
        return _own_experts(x, weights, chosen, gate, up, down, first, activation)

    if "expert" in mesh.manual_axes:
        split, down_split = P(None, None, "tensor"), P(None, "tensor", None)
        return jax.shard_map(
            lambda *args: jax.lax.psum(shares(*args), ("expert", "tensor")), axis_names={"tensor"}, check_vma=False,
            in_specs=(P(), P(), P(), split, split, down_split), out_specs=P(),
        )(x_BTD, weights_BTk, chosen_BTk, gate_EDF, up_EDF, down_EFD)  # fmt: skip

    length = x_BTD.shape[1]
    # A few rows that do not divide (an initialisation, one prompt): every device has them all.
    apart = x_BTD.shape[0] % batch_ways(mesh) == 0
    tokens = P(RULES["batch"] if apart else None, "sequence", None)
    into, out = P("expert", None, "tensor"), P("expert", "tensor", None)

    def on_device(x, weights, chosen, gate, up, down):
        # Said aloud: a gather by this device's own order does not tell by itself that its derivative is to be summed.
        alike = "tensor" if apart else ("expert", "tensor")
        x, weights = (jax.lax.pcast(v, alike, to="varying") for v in (x, weights))
        if not apart:
            return jax.lax.psum(shares(x, weights, chosen, gate, up, down), ("expert", "tensor"))
        x, weights, chosen = (jax.lax.all_gather(v, "expert", tiled=True) for v in (x, weights, chosen))
        y = jax.lax.psum(shares(x, weights, chosen, gate, up, down), "tensor")
        return jax.lax.psum_scatter(y, "expert", tiled=True)

    x_BTD, weights_BTk, chosen_BTk = (
        lengthened(v, 1, -length % mesh.shape["sequence"]) for v in (x_BTD, weights_BTk, chosen_BTk)
    )
    run = jax.shard_map(on_device, in_specs=(tokens, tokens, tokens, into, into, out), out_specs=tokens)
    return run(x_BTD, weights_BTk, chosen_BTk, gate_EDF, up_EDF, down_EFD)[:, :length]


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
