"""Divergences between a student's and a teacher's next-token distributions over the whole vocabulary.

Each takes the student's logits and the teacher's, [..., V] twice -> [...] nats, in float32; a temperature divides the
logits beforehand. Gradients reach whichever of the two is differentiated: hold the teacher constant. A logit of -inf
in both is no token.

| divergence | what it asks of a student that cannot be the teacher | gradient with respect to the student's logits |
|---|---|---|
| forward KL(T‖S) | probability wherever the teacher has some (mass-covering) | p_S - p_T |
| reverse KL(S‖T) | none where the teacher has none (mode-seeking) | p_S·(log p_S/p_T - KL) |
| JSD(β) | between the two; never more than H(β) ≤ log 2 | p_S·((1-β)·log p_S/m - its p_S-mean), m = β·p_T + (1-β)·p_S |
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jrlhf.ops.kl import full_kl
from jrlhf.ops.logprobs import in_chunks_of_positions, project

Divergence = Callable[[jax.Array, jax.Array], jax.Array]  # (student's logits, teacher's) [..., V] -> [...]


def forward_kl(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(teacher ‖ student) (Hinton et al. 2015, but for the teacher's entropy, a constant)."""
    return full_kl(teacher, student)


def reverse_kl(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(student ‖ teacher) (Gu et al. 2024, "MiniLLM")."""
    return full_kl(student, teacher)


def generalized_jsd(student: jax.Array, teacher: jax.Array, beta: float = 0.5) -> jax.Array:
    """β·KL(teacher ‖ m) + (1-β)·KL(student ‖ m), m = β·p_teacher + (1-β)·p_student, 0 < β < 1.

    Agarwal et al. 2024, "On-policy distillation of language models", eq. 1 (P the teacher, Q the student). Divided
    by β it tends to the forward KL as β → 0; divided by 1-β to the reverse KL as β → 1. At the ends it is 0.
    """
    log_t = jax.nn.log_softmax(teacher.astype(jnp.float32), axis=-1)
    log_s = jax.nn.log_softmax(student.astype(jnp.float32), axis=-1)
    possible_t, possible_s = ~jnp.isneginf(log_t), ~jnp.isneginf(log_s)
    # Where a token is impossible its log-probability is replaced before it meets a subtraction: -inf - -inf is NaN.
    both = possible_t | possible_s
    log_m = jnp.logaddexp(
        jnp.where(both, log_t, 0.0) + math.log(beta), jnp.where(both, log_s, 0.0) + math.log1p(-beta)
    )
    of_teacher = jnp.exp(log_t) * (jnp.where(possible_t, log_t, 0.0) - jnp.where(possible_t, log_m, 0.0))
    of_student = jnp.exp(log_s) * (jnp.where(possible_s, log_s, 0.0) - jnp.where(possible_s, log_m, 0.0))
    return jnp.sum(beta * of_teacher + (1.0 - beta) * of_student, axis=-1)


def chunked_divergence(
    of: Divergence,
    hidden: tuple[jax.Array, jax.Array],
    kernels: tuple[jax.Array, jax.Array],
    *,
    chunk: int,
) -> jax.Array:
    """`of(logits, other logits)` of two heads, logits = hidden @ kernel, without ever holding all the logits.

    hidden: [B, T, D] and [B, T, E], kernels: [D, V] and [E, W] -> [B, T] float32. `chunk` positions at a time,
    forward and backward, so that two [B, chunk, V] float32 are the largest arrays.
    """

    def one_chunk(kernels, hidden, other):
        return of(project(hidden, kernels[0]), project(other, kernels[1]))

    return in_chunks_of_positions(one_chunk, kernels, hidden, chunk)
