"""A space of answers small enough to enumerate, where the optimum of every objective is a known vector.

Three symbols and EOS, at most four tokens. An answer is a node of the ternary tree of depth four: a prefix
of fewer than four symbols (1 + 3 + 9 + 27 = 40 of them) is an answer when EOS follows it, and one of four
symbols (81) is ended by its length. That makes 121 answers, numbered as a heap: the root is the empty answer
0, and symbol a leads from node s to node 3s + 1 + a. Nodes 0 to 39 are also the states in which a token is
chosen, so a tabular policy is one row of four logits per state, [40, 4], and a tabular critic is one value
per state, [40].

`logprobs(params, tokens, mask)` and `values(params, tokens, mask)` have the form that an algorithm asks of
any model, so the table can be plugged in where a transformer would be.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.ops.kl import kl_k1
from jrlhf.ops.logprobs import token_logprobs

SYMBOLS = 3
EOS = SYMBOLS  # the token after the symbols 0, 1, 2
LENGTH = 4  # tokens at most, EOS included
STATES = (SYMBOLS**LENGTH - 1) // (SYMBOLS - 1)  # 40
SEQUENCES = (SYMBOLS ** (LENGTH + 1) - 1) // (SYMBOLS - 1)  # 121


class Samples(NamedTuple):
    """Answers as a sampler returns them; what follows EOS is masked and holds EOS."""

    tokens: jax.Array  # [N, 4] int32
    mask: jax.Array  # [N, 4] bool, EOS included
    logprobs: jax.Array  # [N, 4] float32 under the policy that was sampled, 0 where masked


class World(NamedTuple):
    """A reference policy, a reward for each answer, and the weight of the KL penalty."""

    ref_params: jax.Array  # [40, 4] logits
    reward: jax.Array  # [121], by answer number
    beta: float


def make_world(seed: int, beta: float = 0.5) -> World:
    """Reference logits ~ 0.7·N(0, 1), rewards ~ N(0, 1). Drawn by NumPy, so alike on every jax version."""
    rng = np.random.default_rng(seed)
    ref_params = 0.7 * rng.standard_normal((STATES, SYMBOLS + 1))
    reward = rng.standard_normal(SEQUENCES)
    return World(jnp.asarray(ref_params, jnp.float32), jnp.asarray(reward, jnp.float32), beta)


def all_sequences() -> tuple[jax.Array, jax.Array]:
    """(tokens [121, 4] int32, mask [121, 4] bool) of every answer, in the order of their numbers."""
    tokens = np.full((SEQUENCES, LENGTH), EOS, np.int32)
    mask = np.zeros((SEQUENCES, LENGTH), bool)
    for number in range(SEQUENCES):
        symbols: list[int] = []
        node = number
        while node:
            node, symbol = divmod(node - 1, SYMBOLS)
            symbols.insert(0, symbol)
        tokens[number, : len(symbols)] = symbols
        mask[number, : len(symbols) + 1] = True  # EOS too, where there is room for it
    return jnp.asarray(tokens), jnp.asarray(mask)


def _nodes(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the state in which each token was chosen [N, 4], the answer's number [N])."""
    node = jnp.zeros(tokens.shape[:-1], jnp.int32)
    ended = jnp.zeros(tokens.shape[:-1], bool)
    states = []
    for t in range(LENGTH):
        states.append(node)
        ended = ended | (tokens[..., t] == EOS)
        node = jnp.where(ended, node, SYMBOLS * node + 1 + tokens[..., t])
    return jnp.stack(states, axis=-1), node


def sequence_number(tokens: jax.Array) -> jax.Array:
    """The number of each answer, [N, 4] -> [N] int32; what follows EOS is not read."""
    return _nodes(tokens)[1]


def logits(params: jax.Array, tokens: jax.Array) -> jax.Array:
    """The policy's logits where each token was chosen, [40, 4], [N, 4] -> [N, 4, 4]."""
    return params[_nodes(tokens)[0]]


def logprobs(params: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Log-probability of each token, params [40, 4], tokens and mask [N, 4] -> [N, 4], 0 where masked."""
    return jnp.where(mask, token_logprobs(logits(params, tokens), tokens), 0.0)


def values(params: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """A tabular critic: the value of the state before each token, params [40] -> [N, 4], 0 where masked."""
    return jnp.where(mask, params[_nodes(tokens)[0]], 0.0)


def sequence_logprobs(params: jax.Array) -> jax.Array:
    """Log-probability of all answers, [40, 4] -> [121]; exp of it sums to 1. Differentiable."""
    return jnp.sum(logprobs(params, *all_sequences()), axis=-1)


def policy_with(probabilities: jax.Array) -> jax.Array:
    """The table that gives each answer its probability, [121] (positive) -> [40, 4] logits.

    Every distribution over answers is a product of next-token distributions: P(token | prefix) is the mass of
    the answers that continue so, over the mass of those that start with the prefix.
    """
    mass = list(np.asarray(probabilities, np.float64))  # of the whole subtree, built from the leaves up
    for node in reversed(range(1, SEQUENCES)):
        mass[(node - 1) // SYMBOLS] += mass[node]
    rows = [[*mass[SYMBOLS * s + 1 : SYMBOLS * (s + 1) + 1], float(probabilities[s])] for s in range(STATES)]
    return jnp.asarray(np.log(rows), jnp.float32)


def sample(params: jax.Array, key: jax.Array, n: int) -> Samples:
    """`n` independent answers of the policy."""
    cumulative = jnp.cumsum(jax.nn.softmax(params, axis=-1), axis=-1)
    uniform = jax.random.uniform(key, (LENGTH, n, 1))  # inverse CDF: one number per token
    node = jnp.zeros(n, jnp.int32)
    ended = jnp.zeros(n, bool)
    columns = []  # (token, mask), each [n]
    for t in range(LENGTH):
        # The last entry is 1 up to rounding; leaving it out gives EOS all that remains.
        token = jnp.sum(uniform[t] >= cumulative[node, :-1], axis=-1, dtype=jnp.int32)
        columns.append((jnp.where(ended, EOS, token), ~ended))
        ended = ended | (token == EOS)
        node = jnp.where(ended, node, jnp.minimum(SYMBOLS * node + 1 + token, STATES - 1))
    tokens, mask = (jnp.stack(column, axis=1) for column in zip(*columns, strict=True))
    return Samples(tokens, mask, logprobs(params, tokens, mask))


def optimum(world: World) -> jax.Array:
    """π* ∝ π_ref·exp(r/β): the maximiser of E_π[r] - β·KL(π‖π_ref), probabilities [121]."""
    return jax.nn.softmax(sequence_logprobs(world.ref_params) + world.reward / world.beta)


def ipo_optimum(world: World, preference: jax.Array, tau: float) -> jax.Array:
    """π ∝ π_ref·exp(E_{y'~μ}[p(y ≻ y')]/τ), with pairs drawn from μ = π_ref (Azar et al. 2023, eq. 7).

    preference [121, 121]: p(row ≻ column).
    """
    ref = sequence_logprobs(world.ref_params)
    return jax.nn.softmax(ref + preference @ jnp.exp(ref) / tau)


def forward_kl_optimum(world: World) -> jax.Array:
    """π = β·π_ref/(λ - r) with λ > max r such that it sums to 1: the maximiser of E_π[r] - β·KL(π_ref‖π).

    This is where a k3 penalty in the *loss*, on whole answers, leads; λ by bisection in float64.
    """
    ref = np.exp(np.asarray(sequence_logprobs(world.ref_params), np.float64))
    reward = np.asarray(world.reward, np.float64)
    low, high = reward.max(), reward.max() + world.beta  # the sum is infinite at low and at most 1 at high
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if np.sum(world.beta * ref / (middle - reward)) > 1 else (low, middle)
    return jnp.asarray(world.beta * ref / (high - reward), jnp.float32)


def total_variation(p: jax.Array, q: jax.Array) -> jax.Array:
    """½ Σ|p - q| over the last axis: the largest difference in the probability of any event."""
    return 0.5 * jnp.sum(jnp.abs(p - q), axis=-1)


def kl_divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """KL(p‖q) in nats over the last axis; q must be positive where p is."""
    return jnp.sum(jnp.where(p > 0, p * kl_k1(jnp.log(jnp.where(p > 0, p, 1.0)), jnp.log(q)), 0.0), axis=-1)
