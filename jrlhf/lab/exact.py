"""A space of answers small enough to enumerate, where the optimum of every objective is a known vector.

By default three symbols and EOS, at most four tokens. An answer is a node of the ternary tree of depth four: a
prefix of fewer than four symbols (1 + 3 + 9 + 27 = 40 of them) is an answer when EOS follows it, and one of four
symbols (81) is ended by its length. That makes 121 answers, numbered as a heap: the root is the empty answer
0, and symbol a leads from node s to node 3s + 1 + a. Nodes 0 to 39 are also the states in which a token is
chosen, so a tabular policy is one row of four logits per state, [40, 4], and a tabular critic is one value
per state, [40]. Another vocabulary or length is another tree: `Space(symbols, length)`.

Shapes: N answers, L tokens at most, S all answers, M states, V tokens of the vocabulary.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.config import UserError
from jrlhf.ops.best_of_n import best_of_n_distribution
from jrlhf.ops.kl import kl_k1
from jrlhf.ops.logprobs import token_logprobs
from jrlhf.types import Array


class Samples(NamedTuple):
    """Answers as a sampler returns them; what follows EOS is masked and holds EOS."""

    tokens: jax.Array  # [N, L] int32
    mask: jax.Array  # [N, L] bool, EOS included
    logprobs: jax.Array  # [N, L] float32 under the policy that was sampled, 0 where masked


@dataclass(frozen=True)
class Space:
    """All answers of at most `length` tokens over `symbols` symbols and EOS. Hashable, so it may be static."""

    symbols: int = 3
    length: int = 4  # tokens at most, EOS included

    def __post_init__(self):
        for name in ("symbols", "length"):
            if getattr(self, name) < 1:
                raise UserError(f"Space.{name} must be at least 1, got {getattr(self, name)}")

    @property
    def eos(self) -> int:
        """The token after the symbols 0, 1, ..."""
        return self.symbols

    @property
    def vocabulary(self) -> int:
        """V: the symbols and EOS."""
        return self.symbols + 1

    @property
    def states(self) -> int:
        """M: prefixes after which a token is chosen."""
        return sum(self.symbols**t for t in range(self.length))

    @property
    def sequences(self) -> int:
        """S: answers."""
        return self.states + self.symbols**self.length

    def all_sequences(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens [S, L] int32, mask [S, L] bool) of every answer, in the order of their numbers; read-only."""
        return _all_sequences(self)

    def _nodes(self, tokens: Array) -> tuple[jax.Array, jax.Array]:
        """(the state in which each token was chosen [N, L], the answer's number [N])."""
        node = jnp.zeros(tokens.shape[:-1], jnp.int32)
        ended = jnp.zeros(tokens.shape[:-1], bool)
        states = []
        for t in range(self.length):
            states.append(node)
            ended = ended | (tokens[..., t] == self.eos)
            node = jnp.where(ended, node, self.symbols * node + 1 + tokens[..., t])
        return jnp.stack(states, axis=-1), node

    def sequence_number(self, tokens: Array) -> jax.Array:
        """The number of each answer, [N, L] -> [N] int32; what follows EOS is not read."""
        return self._nodes(tokens)[1]

    def rows(self, table: Array, tokens: Array) -> jax.Array:
        """The table's row of the state in which each token was chosen, [M, ...], [N, L] -> [N, L, ...].

        Of a policy [M, V] these are logits, of a tabular critic [M] the values before each token.
        """
        return jnp.asarray(table)[self._nodes(tokens)[0]]

    def logprobs(self, params: Array, tokens: Array, mask: Array) -> jax.Array:
        """Log-probability of each token, params [M, V], tokens and mask [N, L] -> [N, L], 0 where masked."""
        return jnp.where(mask, token_logprobs(self.rows(params, tokens), jnp.asarray(tokens)), 0.0)

    def sequence_logprobs(self, params: Array) -> jax.Array:
        """Log-probability of all answers, [M, V] -> [S]; exp of it sums to 1. Differentiable."""
        return jnp.sum(self.logprobs(params, *self.all_sequences()), axis=-1)

    def probabilities(self, params: Array) -> jax.Array:
        """Of all answers, [M, V] -> [S]."""
        return jnp.exp(self.sequence_logprobs(params))

    def policy_with(self, probabilities: Array) -> jax.Array:
        """The table that gives each answer its probability, [S] (positive) -> [M, V] logits.

        Every distribution over answers is a product of next-token distributions: P(token | prefix) is the mass of
        the answers that continue so, over the mass of those that start with the prefix.
        """
        k = self.symbols
        mass = list(np.asarray(probabilities, np.float64))  # of the whole subtree, built from the leaves up
        for node in reversed(range(1, self.sequences)):
            mass[(node - 1) // k] += mass[node]
        rows = [[*mass[k * s + 1 : k * (s + 1) + 1], float(probabilities[s])] for s in range(self.states)]
        return jnp.asarray(np.log(rows), jnp.float32)

    def draw(self, logprobs: Array, key: jax.Array, n: int) -> Samples:
        """`n` independent answers, given the log-probability of each token of every answer, [S, L]."""
        tokens, mask = (jnp.asarray(x) for x in self.all_sequences())
        logprobs = jnp.where(mask, logprobs, 0.0)
        number = draw_numbers(jnp.exp(jnp.sum(logprobs, axis=1)), jax.random.uniform(key, (n,)))
        return Samples(tokens[number], mask[number], logprobs[number])

    def sample(self, params: Array, key: jax.Array, n: int) -> Samples:
        """`n` independent answers of the policy."""
        return self.draw(self.logprobs(params, *self.all_sequences()), key, n)


DEFAULT = Space()


@cache
def _all_sequences(space: Space) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((space.sequences, space.length), space.eos, np.int32)
    mask = np.zeros((space.sequences, space.length), bool)
    for number in range(space.sequences):
        symbols: list[int] = []
        node = number
        while node:
            node, symbol = divmod(node - 1, space.symbols)
            symbols.insert(0, symbol)
        tokens[number, : len(symbols)] = symbols
        mask[number, : len(symbols) + 1] = True  # EOS too, where there is room for it
    tokens.flags.writeable = mask.flags.writeable = False
    return tokens, mask


def draw_numbers(probabilities: Array, uniform: Array) -> jax.Array:
    """Inverse CDF: probabilities [S], uniform numbers [N] in [0, 1) -> [N] int32 in [0, S)."""
    cumulative = jnp.cumsum(probabilities)
    # The sum is 1 up to rounding; the last entry is left out, so that what remains is the last answer's.
    return jnp.searchsorted(cumulative[:-1], uniform * cumulative[-1], side="right").astype(jnp.int32)


@partial(
    jax.tree_util.register_dataclass, data_fields=["ref_params", "reward", "beta"], meta_fields=["space"]
)
@dataclass(frozen=True)
class World:
    """A reference policy, a reward for each answer, and the weight of the KL penalty, in a space."""

    ref_params: jax.Array  # [M, V] logits
    reward: jax.Array  # [S], by answer number
    beta: float
    space: Space = DEFAULT

    def ref_logprobs(self) -> jax.Array:
        """log π_ref of all answers, [S]."""
        return self.space.sequence_logprobs(self.ref_params)


def make_world(seed: int, beta: float = 0.5, space: Space = DEFAULT) -> World:
    """Reference logits ~ 0.7·N(0, 1), rewards ~ N(0, 1). Drawn by NumPy, so alike on every jax version."""
    rng = np.random.default_rng(seed)
    ref_params = 0.7 * rng.standard_normal((space.states, space.vocabulary))
    reward = rng.standard_normal(space.sequences)
    return World(jnp.asarray(ref_params, jnp.float32), jnp.asarray(reward, jnp.float32), beta, space)


def preferences(world: World, flips: float = 0.0, ties: float = 0.0) -> jax.Array:
    """p(row ≻ column), [S, S]: Bradley and Terry's law, and what is done to the labels.

    `ties`: Davidson's (1970) weight of a tie, ties·√(e^{r_i} e^{r_j}) beside e^{r_i} and e^{r_j}; a tie is decided
    by a coin. `flips`: the probability that the label is then turned round.
    """
    half = 0.5 * (world.reward[:, None] - world.reward[None, :])
    # e^{r_i} / (e^{r_i} + e^{r_j} + tie), all divided by √(e^{r_i} e^{r_j}), and half of the ties
    prefers = (jnp.exp(half) + 0.5 * ties) / (jnp.exp(half) + jnp.exp(-half) + ties)
    return (1.0 - flips) * prefers + flips * prefers.T


# --- optima -----------------------------------------------------------------------------------------------


def optimum(world: World) -> jax.Array:
    """π* ∝ π_ref·exp(r/β): the maximiser of E_π[r] - β·KL(π‖π_ref), probabilities [S]."""
    return jax.nn.softmax(world.ref_logprobs() + world.reward / world.beta)


def entropy_optimum(world: World, entropy: float) -> jax.Array:
    """π ∝ (π_ref^β·exp(r))^{1/(β + h)}: the maximiser of E_π[r] - β·KL(π‖π_ref) + h·H(π), [S].

    H is the entropy of whole answers and h is `entropy` (Ziebart 2010 for β = 0): this is where a bonus
    -h log π in the *reward* leads. For one in the loss see `token_level_optimum`.
    """
    return jax.nn.softmax((world.beta * world.ref_logprobs() + world.reward) / (world.beta + entropy))


def token_level_optimum(
    world: World, *, in_reward: float = 0.0, in_loss: float = 0.0, entropy: float = 0.0
) -> jax.Array:
    """Where the policy gradient leads when penalties on *tokens* stand in the loss, probabilities [S].

    `in_reward`: the weight of -log(π/π_ref) in the reward; `in_loss`: of KL(π(·|s)‖π_ref(·|s)) in the loss, in full
    or as k2; `entropy`: of an entropy bonus in the loss. Of what stands in the loss only the gradient at the states
    that were reached is taken, so that no state is avoided for what its successors cost: each state solves

        max_π  Σ_a π(a) Q(a) - (in_reward + in_loss)·KL(π‖π_ref) + entropy·H(π),

    by π ∝ (π_ref^(in_reward + in_loss)·exp(Q))^(1 / sum of weights), and hands down a value in which only
    `in_reward` is charged. With `in_reward` alone this is `optimum`.
    """
    kl = in_reward + in_loss

    def solve(ref: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, float]:
        logits = (kl * np.log(ref) + q) / (kl + entropy)
        p = np.exp(logits - logits.max())
        p = p / p.sum()
        return p, float(p @ q - in_reward * _kl(p, ref))

    return _backwards(world, solve)


def token_level_forward_kl_optimum(world: World) -> jax.Array:
    """Where β·k3 on *tokens* in the loss leads, [S]: each state solves max_π Σ_a π(a) Q(a) - β·KL(π_ref‖π)."""

    def solve(ref: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, float]:
        p = _forward_kl(ref, q, float(world.beta))
        return p, float(p @ q)

    return _backwards(world, solve)


def _backwards(world: World, solve) -> jax.Array:
    """Backward induction in float64: `solve(π_ref(·|s) [V], Q(s, ·) [V]) -> (π(·|s) [V], value of s)`."""
    space, k = world.space, world.space.symbols
    logits = np.asarray(world.ref_params, np.float64)
    ref = np.exp(logits - logits.max(axis=1, keepdims=True))
    ref = ref / ref.sum(axis=1, keepdims=True)
    reward = np.asarray(world.reward, np.float64)
    values, policy = reward.copy(), np.zeros_like(ref)  # a node's value; at a leaf the answer's reward
    for s in reversed(range(space.states)):
        policy[s], values[s] = solve(ref[s], np.append(values[k * s + 1 : k * (s + 1) + 1], reward[s]))
    return space.probabilities(jnp.asarray(np.log(policy), jnp.float32))


def forward_kl_optimum(world: World) -> jax.Array:
    """π = β·π_ref/(λ - r) with λ > max r such that it sums to 1: the maximiser of E_π[r] - β·KL(π_ref‖π).

    This is where a k3 penalty in the *loss*, on whole answers, leads; λ by bisection in float64.
    """
    ref = np.exp(np.asarray(world.ref_logprobs(), np.float64))
    reward = np.asarray(world.reward, np.float64)
    return jnp.asarray(_forward_kl(ref, reward, float(world.beta)), jnp.float32)


def _forward_kl(ref: np.ndarray, value: np.ndarray, beta: float) -> np.ndarray:
    """The maximiser of E_π[value] - β·KL(π_ref‖π)."""
    low, high = value.max(), value.max() + beta  # the sum is infinite at low and at most 1 at high
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if np.sum(beta * ref / (middle - value)) > 1 else (low, middle)
    return beta * ref / (high - value)


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.sum(p * (np.log(np.where(p > 0, p, 1.0)) - np.log(q))))


def best_of_n_optimum(world: World, n: int) -> jax.Array:
    """Fⁿ - F₋ⁿ, [S]: the law of the best of n answers of the reference (`ops.best_of_n_distribution`).

    It is the minimiser of KL(best-of-n‖π), so imitating such answers (best-of-n distillation, rejection sampling)
    leads here.
    """
    ref = np.exp(np.asarray(world.ref_logprobs(), np.float64))
    return jnp.asarray(best_of_n_distribution(ref, np.asarray(world.reward), n), jnp.float32)


def dpo_optimum(world: World, preference: Array) -> jax.Array:
    """The minimiser of DPO's population loss for *any* preferences, with pairs drawn from μ = π_ref, [S].

    preference [S, S]: p(row ≻ column). DPO fits Bradley-Terry scores s = β log(π/π_ref) by maximum likelihood, so
    π ∝ π_ref·exp(s/β) with s such that every answer wins as often as it should:

        Σ_j μ_j (p(i ≻ j) - sigmoid(s_i - s_j)) = 0   for all i.

    Unflipped Bradley-Terry preferences give s = r up to a constant, hence π*; flips at rate ε (also those that label
    smoothing assumes, Mitchell 2023) and ties shrink s, but to no multiple of r. Newton's method in float64.
    """
    mu = np.exp(np.asarray(world.ref_logprobs(), np.float64))
    wins = mu[:, None] * mu[None, :] * np.asarray(preference, np.float64)
    met = wins + wins.T
    scores = np.zeros_like(mu)

    def loss(s: np.ndarray) -> float:
        return float(np.sum(wins * np.logaddexp(0.0, s[None, :] - s[:, None])))

    for _ in range(30):
        wins_by_model = 1.0 / (1.0 + np.exp(scores[None, :] - scores[:, None]))
        gradient = np.sum(met * wins_by_model - wins, axis=1)
        curvature = met * wins_by_model * wins_by_model.T
        np.fill_diagonal(curvature, 0.0)
        hessian = np.diag(curvature.sum(axis=1)) - curvature + np.outer(mu, mu)  # the last term fixes Σ μ s
        step = np.linalg.solve(hessian, gradient)
        while loss(scores - step) > loss(scores) + 1e-15:
            step = 0.5 * step
        scores = scores - step
        if np.abs(step).max() < 1e-10:
            return jax.nn.softmax(world.ref_logprobs() + jnp.asarray(scores, jnp.float32) / world.beta)
    raise ValueError("these preferences have no finite Bradley-Terry scores (an answer always wins?)")


def ipo_optimum(world: World, preference: Array, tau: float) -> jax.Array:
    """π ∝ π_ref·exp(E_{y'~μ}[p(y ≻ y')]/τ), with pairs drawn from μ = π_ref (Azar et al. 2023, eq. 7).

    preference [S, S]: p(row ≻ column).
    """
    ref = world.ref_logprobs()
    return jax.nn.softmax(ref + preference @ jnp.exp(ref) / tau)


def exponential_optimum(world: World) -> jax.Array:
    """π ∝ π_ref·exp(r/(2β)), [S]: the minimiser of the exponential loss exp(-m), m = β·h, on Bradley-Terry pairs.

    p·exp(-m) + (1 - p)·exp(m) is least at m = ½ log(p/(1 - p)), half the difference of rewards (Friedman et al. 2000,
    lemma 1, of AdaBoost): as if β were twice what it is.
    """
    return jax.nn.softmax(world.ref_logprobs() + 0.5 * world.reward / world.beta)


def sppo_optimum(world: World, preference: Array, beta: float) -> jax.Array:
    """The minimiser of SPPO's loss with winning probabilities taken as 1 and 0, pairs from μ = π_ref, [S].

    (h_w - 1/(2β))² + (h_l + 1/(2β))² with h = log(π/π_ref) asks each answer for h = (P - ½)/β, P = E_{y'~μ}[p(y ≻ y')]
    (Wu et al. 2024, eq. 4.7). No policy has all of these, as Σ π_ref·exp(h) > 1; the nearest one has
    h + c·exp(h) = (P - ½)/β with c such that it sums to 1 (Lagrange), that is h = (P - ½)/β - W(c·exp((P - ½)/β)).
    """
    from scipy.special import lambertw  # slow to import

    ref = np.exp(np.asarray(world.ref_logprobs(), np.float64))
    ref = ref / ref.sum()
    wanted = (np.asarray(preference, np.float64) @ ref - 0.5) / beta
    policy = lambda c: ref * np.exp(wanted - lambertw(c * np.exp(wanted)).real)  # noqa: E731
    low, high = 0.0, 1.0
    while policy(high).sum() > 1:
        high = 2 * high
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if policy(middle).sum() > 1 else (low, middle)
    return jnp.asarray(policy(high), jnp.float32)


def nca_optimum(world: World, preference: Array) -> jax.Array:
    """π = π_ref·2·E_{y'~μ}[p(y ≻ y')], [S]: the minimiser of NCA's pairwise loss at β = 1, pairs from μ = π_ref.

    Noise contrastive alignment (Chen et al. 2024), for a pair: -log sigmoid(s_w) - ½ log sigmoid(-s_w)
    - ½ log sigmoid(-s_l) with s = β log(π/π_ref). An answer's terms do not meet another's, and
    sigmoid(s) = 2P/(2P + 1) is best where it wins with probability P. The mean of 2P being 1, the policy sums to 1
    at β = 1; at another β normalisation gets in the way.
    """
    ref = jnp.exp(world.ref_logprobs())
    return 2.0 * ref * (preference @ ref)


def kto_optimum(world: World, desirable: Array) -> jax.Array:
    """The maximiser of KTO's value with the reference point 0 and equal weights, answers from μ = π_ref, [S].

    Kahneman-Tversky optimisation (Ethayarajh et al. 2024, eq. 8): with h = log(π/π_ref) and an answer desirable with
    probability q [S], the value is Σ μ (2q - 1)·sigmoid(β·h) up to a constant. An answer of q < ½ loses all its
    probability; the others have (2q - 1)·sigmoid'(β·h)·exp(-h) = c with c such that they sum to 1 (Lagrange). For
    β < 1, where the left side falls with h; both by bisection. ValueError at another β.
    """
    beta = float(world.beta)
    if beta >= 1:
        raise ValueError(f"KTO's optimum is only known to be unique below beta 1, not at {beta}")
    ref = np.exp(np.asarray(world.ref_logprobs(), np.float64))
    gain = 2.0 * np.asarray(desirable, np.float64) - 1.0
    wanted = gain > 0

    def log_ratio(log_c: float) -> np.ndarray:
        low, high = np.full(ref.shape, -700.0), np.full(ref.shape, 700.0)
        for _ in range(100):
            h = 0.5 * (low + high)
            log_slope = -np.logaddexp(0.0, beta * h) - np.logaddexp(0.0, -beta * h)  # log sigmoid'
            above = np.log(np.where(wanted, gain, 1.0)) + log_slope - h > log_c
            low, high = np.where(above, h, low), np.where(above, high, h)
        return np.where(wanted, low, -np.inf)

    low, high = -50.0, 50.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        too_much = np.sum(ref * np.exp(log_ratio(middle))) > 1
        low, high = (middle, high) if too_much else (low, middle)
    return jnp.asarray(ref * np.exp(log_ratio(high)), jnp.float32)


# --- distances ----------------------------------------------------------------------------------------------


def total_variation(p: Array, q: Array) -> jax.Array:
    """½ Σ|p - q| over the last axis: the largest difference in the probability of any event."""
    return 0.5 * jnp.sum(jnp.abs(p - q), axis=-1)


def kl_divergence(p: Array, q: Array) -> jax.Array:
    """KL(p‖q) in nats over the last axis; q must be positive where p is."""
    return jnp.sum(jnp.where(p > 0, p * kl_k1(jnp.log(jnp.where(p > 0, p, 1.0)), jnp.log(q)), 0.0), axis=-1)
