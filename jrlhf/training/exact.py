"""Algorithms run on the exact space (`jrlhf.lab.exact`), where it is known what each of them should reach.

    learner = tabular(make_world(11))
    algorithm = make_dpo(DPOConfig(beta=learner.world.beta), learner.model, optimizer)
    reached = run_from_pairs(algorithm, (learner.params, learner.params), learner, key)
    measure(learner.world, reached, optimum(learner.world)).distance

What runs is the `Algorithm` that the stages run, from `init` to `train_step`, with a table of logits or a small
transformer as its model. There is one prompt: a single EOS token, which begins a text as it does in GPT-2.

Everything is a pure function, so that seeds (`jax.vmap` over keys) and tabular worlds are run side by side.
Shapes: N answers, L tokens at most, S all answers, M states, V tokens of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jrlhf.lab.exact import (
    DEFAULT,
    Samples,
    Space,
    World,
    draw_numbers,
    kl_divergence,
    make_world,
    preferences,
    total_variation,
)
from jrlhf.models.config import ModelConfig
from jrlhf.models.transformer import Model, with_scalar_head
from jrlhf.ops.kl import full_kl
from jrlhf.ops.logprobs import logprobs_and_entropy
from jrlhf.ops.masking import Places, at_places
from jrlhf.ops.pairs import Answers, PreferenceLoss
from jrlhf.types import (
    Algorithm,
    AnswerBatch,
    Array,
    Metrics,
    PairBatch,
    Params,
    RankedBatch,
    Rollout,
    TrainState,
    UnpairedBatch,
)

PROMPT = 1  # tokens


@dataclass(frozen=True)
class TableModel:
    """A table in the decoder's place, with `jrlhf.models.transformer.Model`'s functions.

    Parameters are the table itself: logits [M, V] of a policy, values [M] of a critic. The hidden state of a position
    is the table's row for what has been read up to there. Tokens are [B, 1 + L]: the prompt and an answer.
    """

    space: Space = DEFAULT

    @property
    def base(self) -> "TableModel":
        return self

    def whole(self, trained: Params, frozen: Params | None) -> Params:
        return trained

    def hidden(self, params: Array, tokens: Array, mask: Array, at: Places = None) -> jax.Array:
        """[B, 1 + L, V] logits of what follows each position; after the last one nothing does, and zeros stand.
        `at` some places, [B, A, V]."""
        if tokens.shape[1] != PROMPT + self.space.length:
            raise ValueError(
                f"tokens {tokens.shape} are not a prompt of {PROMPT} and {self.space.length} more"
            )
        rows = self.space.rows(params, tokens[:, PROMPT:])
        return at_places(jnp.concatenate([rows, jnp.zeros_like(rows[:, :1])], axis=1), at)

    def logits(self, params: Array, hidden: jax.Array) -> jax.Array:
        return hidden

    def logprobs_of_hidden(self, params, hidden, targets, temperature=1.0) -> tuple[jax.Array, jax.Array]:
        return logprobs_and_entropy(hidden, targets, temperature)

    def logprobs(self, params, tokens, mask, start: int = 1, temperature=1.0) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities and entropies of tokens [start, 1 + L), each [B, 1 + L - start]."""
        hidden = self.hidden(params, tokens, mask, at=slice(start - 1, -1))
        return self.logprobs_of_hidden(params, hidden, tokens[:, start:], temperature)

    def divergence(
        self,
        params,
        other_params,
        tokens,
        mask,
        start: int = 1,
        temperature=1.0,
        of: Callable[[jax.Array, jax.Array], jax.Array] = full_kl,
        other: "TableModel | None" = None,
    ) -> jax.Array:
        """`of` the two next-token distributions at each position, [B, 1 + L - start]."""
        at = slice(start - 1, -1)
        hidden = self.hidden(params, tokens, mask, at)
        constant = (other or self).hidden(jax.lax.stop_gradient(other_params), tokens, mask, at)
        return of(hidden / temperature, constant / temperature)

    def scores(self, params: Array, tokens: Array, mask: Array, at: Places = None) -> jax.Array:
        """A tabular critic's value of what has been read at each position, [B, 1 + L], or `at` some, [B, A]."""
        return self.hidden(params, tokens, mask, at)


class Learner(NamedTuple):
    """A policy and a critic where training starts, in a world whose reference is that policy."""

    world: World
    model: Any  # TableModel or Model
    params: Params
    critic: Any
    critic_params: Params


def tabular(world: World) -> Learner:
    """The table of the world's reference, and a critic of zeros."""
    model = TableModel(world.space)
    return Learner(world, model, world.ref_params, model, jnp.zeros(world.space.states))


def transformer(seed: int, beta: float = 0.5, space: Space = DEFAULT, d_model: int = 32) -> Learner:
    """A random two-layer decoder and the world whose reference it is; rewards are those of `make_world`.

    The head is scaled, so that the logits spread as those of the tables do. Not to be traced.
    """
    config = ModelConfig(
        vocab_size=space.vocabulary,
        d_model=d_model,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        d_ff=2 * d_model,
        context=PROMPT + space.length,
        tie_embeddings=False,  # tied, a random model mostly says again what it has just read
    )
    model, critic = Model(config), Model(config, "scalar")
    params = jax.jit(model.init)(jax.random.key(seed))
    # The kernel is drawn from N(0, 1/d) and hidden states have norm √d: logits of spread 0.7.
    params["lm_head"]["kernel"] = 0.7 * params["lm_head"]["kernel"]
    world = make_world(seed, beta, space)
    learner = Learner(world, model, params, critic, with_scalar_head(params, jax.random.key(seed + 1)))
    reference = jax.jit(lambda params: probabilities(learner, params))(params)
    return learner._replace(world=replace(world, ref_params=space.policy_with(reference)))


def after_prompt(space: Space, tokens: Array, mask: Array) -> tuple[jax.Array, jax.Array]:
    """The prompt before each answer, [..., L] twice -> [..., 1 + L] twice."""
    before = [(0, 0)] * (tokens.ndim - 1) + [(PROMPT, 0)]
    return jnp.pad(tokens, before, constant_values=space.eos), jnp.pad(mask, before, constant_values=True)


def answer_logprobs(learner: Learner, params: Params) -> jax.Array:
    """Log-probability of each token of every answer, [S, L], 0 where masked: one pass over the whole space."""
    space = learner.world.space
    tokens, mask = space.all_sequences()
    logprobs, _ = learner.model.logprobs(params, *after_prompt(space, tokens, mask), start=PROMPT)
    return jnp.where(mask, logprobs, 0.0)


def probabilities(learner: Learner, params: Params) -> jax.Array:
    """Of all answers, [S]."""
    return jnp.exp(jnp.sum(answer_logprobs(learner, params), axis=1))


# --- training --------------------------------------------------------------------------------------------------


def run(
    algorithm: Algorithm,
    start: tuple,
    key: jax.Array,
    draw: Callable[[TrainState, jax.Array], Any],
    updates: int,
) -> tuple[TrainState, Metrics]:
    """`updates` train steps in one scan, from `algorithm.init(*start, key)`: the last state, and each step's metrics.

    `draw(state, key)` gives a step's batch.
    """
    key, drawing = jax.random.split(key)

    def update(state, step):
        return algorithm.train_step(state, draw(state, jax.random.fold_in(drawing, step)))

    return jax.lax.scan(update, algorithm.init(*start, key), jnp.arange(updates))


def as_rollout(space: Space, samples: Samples) -> Rollout:
    """Every answer is complete, also those that are ended by their length."""
    tokens, mask = after_prompt(space, samples.tokens, samples.mask)
    return Rollout(tokens, mask, samples.mask, samples.logprobs, jnp.ones(len(tokens), bool))


def greedy_answer(mask: Array, logprobs: Array) -> jax.Array:
    """Number of the answer whose tokens are each the likeliest one, from [S, L] `answer_logprobs` -> [] int32."""
    still = jnp.ones(len(mask), bool)
    for t in range(mask.shape[1]):
        here = jnp.where(still, logprobs[:, t], -jnp.inf)
        still = still & (here == jnp.max(here))
    return jnp.argmax(still)


def run_from_rollouts(
    algorithm: Algorithm,
    start: tuple,
    learner: Learner,
    key: jax.Array,
    *,
    updates: int = 1500,
    answers: int = 256,
    sample_from: Literal["policy", "reference"] = "policy",
    greedy_baseline: bool = False,
) -> jax.Array:
    """An on-policy algorithm given `answers` fresh answers per update: the final policy's probabilities, [S].

    start: what `algorithm.init` takes before the key: (params, ref_params), or with a critic (params, critic_params,
    ref_params). Groups are consecutive rows, as there is one prompt. `greedy_baseline`: the algorithm's `make_batch`
    also wants the rewards of greedy answers.
    """
    world, space = learner.world, learner.world.space
    _, mask = space.all_sequences()
    make_batch = algorithm.make_batch
    if make_batch is None:
        raise ValueError("this algorithm learns from a dataset: it has no make_batch")

    def draw(state: TrainState, key: jax.Array):
        params = state.params["policy"] if sample_from == "policy" else learner.params
        logprobs = answer_logprobs(learner, params)
        samples = space.draw(logprobs, key, answers)
        scores = world.reward[space.sequence_number(samples.tokens)]
        if not greedy_baseline:
            return make_batch(state, as_rollout(space, samples), scores)
        greedy = jnp.broadcast_to(world.reward[greedy_answer(mask, logprobs)], (answers,))
        return make_batch(state, as_rollout(space, samples), scores, greedy)

    state, _ = run(algorithm, start, key, draw, updates)
    return probabilities(learner, state.params["policy"])


def pair_law(world: World, preference: Array | None = None) -> jax.Array:
    """Probability that a pair is (chosen, rejected), [S, S], when both answers are from the reference.

    preference [S, S]: p(row ≻ column); None: Bradley and Terry's.
    """
    ref = jnp.exp(world.ref_logprobs())
    preference = preferences(world) if preference is None else preference
    return 2.0 * ref[:, None] * ref[None, :] * preference


def even_grid(key: jax.Array, n: int) -> jax.Array:
    """Systematic sampling's n numbers in [0, 1), [n]: evenly spaced, shifted by one random number."""
    return (jnp.arange(n, dtype=jnp.float32) + jax.random.uniform(key)) / n


def run_from_pairs(
    algorithm: Algorithm,
    start: tuple,
    learner: Learner,
    key: jax.Array,
    *,
    preference: Array | None = None,
    updates: int = 1500,
    pairs: int = 1024,
) -> jax.Array:
    """An algorithm that learns from pairs, given fresh ones each update: the final policy's probabilities, [S].

    Pairs are drawn systematically: one random number shifts an even grid on the cumulated `pair_law`. Each pair has its
    probability, and a batch is nearer to the population than as many independent pairs would be.
    """
    world, space = learner.world, learner.world.space
    tokens, mask = after_prompt(space, *space.all_sequences())
    response = mask.at[:, :PROMPT].set(False)
    ref = world.ref_logprobs()
    law = pair_law(world, preference).reshape(-1)

    def draw(state: TrainState, key: jax.Array) -> PairBatch:
        cell = draw_numbers(law, even_grid(key, pairs))
        number = jnp.stack(jnp.divmod(cell, space.sequences), axis=1)
        return PairBatch(tokens[number], mask[number], response[number], ref[number])

    state, _ = run(algorithm, start, key, draw, updates)
    return probabilities(learner, state.params["policy"])


def run_from_rankings(
    algorithm: Algorithm,
    start: tuple,
    learner: Learner,
    key: jax.Array,
    *,
    updates: int = 1500,
    rankings: int = 512,
    answers: int = 3,
) -> jax.Array:
    """An algorithm that learns from rankings of `answers` answers of the reference, ranked by Plackett and Luce's law
    with the world's rewards (Gumbel noise on the rewards, then sorted): the final policy's probabilities, [S]."""
    world, space = learner.world, learner.world.space
    tokens, mask = after_prompt(space, *space.all_sequences())
    response = mask.at[:, :PROMPT].set(False)
    ref = world.ref_logprobs()

    def draw(state: TrainState, key: jax.Array) -> RankedBatch:
        which, noise = jax.random.split(key)
        shape = (rankings, answers)
        number = draw_numbers(jnp.exp(ref), jax.random.uniform(which, shape))
        utility = world.reward[number] + jax.random.gumbel(noise, shape)
        ranks = 1 + jnp.sum(utility[:, None, :] > utility[:, :, None], axis=2, dtype=jnp.int32)
        return RankedBatch(tokens[number], mask[number], response[number], ref[number], ranks)

    state, _ = run(algorithm, start, key, draw, updates)
    return probabilities(learner, state.params["policy"])


def run_from_labels(
    algorithm: Algorithm,
    start: tuple,
    learner: Learner,
    key: jax.Array,
    *,
    desirable: Array | None = None,
    updates: int = 1500,
    answers: int = 1024,
) -> jax.Array:
    """An algorithm that learns from single labelled answers of the reference: the final policy's probabilities, [S].

    desirable [S]: the probability that an answer is called desirable; None: sigmoid of its reward. Drawn as the pairs
    of `run_from_pairs` are. The answer to "another" prompt is the next row's: there is one prompt.
    """
    world, space = learner.world, learner.world.space
    tokens, mask = after_prompt(space, *space.all_sequences())
    response = mask.at[:, :PROMPT].set(False)
    ref = world.ref_logprobs()
    desirable = jax.nn.sigmoid(world.reward) if desirable is None else jnp.asarray(desirable)
    law = jnp.concatenate([jnp.exp(ref) * (1.0 - desirable), jnp.exp(ref) * desirable])

    def draw(state: TrainState, key: jax.Array) -> UnpairedBatch:
        label, number = jnp.divmod(draw_numbers(law, even_grid(key, answers)), space.sequences)
        rows = AnswerBatch(tokens[number], mask[number], response[number], ref[number])
        return UnpairedBatch(rows, label == 1, jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), rows))

    state, _ = run(algorithm, start, key, draw, updates)
    return probabilities(learner, state.params["policy"])


# --- losses without sampling -----------------------------------------------------------------------------------


def minimise(
    loss: Callable[[Params], jax.Array], params: Params, steps: int = 3000, learning_rate: float = 0.05
) -> Params:
    """Parameters after `steps` of Adam with a cosine schedule on a loss that has no noise."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def step(carry, _):
        params, opt_state = carry
        grads = jax.grad(loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            changes, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, changes), opt_state), None

    @jax.jit
    def run(params):
        return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]

    return run(params)


def all_pairs(world: World, params: Array, law: Array) -> Answers:
    """What a tabular policy gives a loss to read of all ordered pairs of answers, [S·S, 2]; `law` is `pair_law`."""
    space = world.space
    _, mask = space.all_sequences()
    pairs = np.stack(np.divmod(np.arange(space.sequences**2), space.sequences), axis=1)
    of_answers = lambda table: space.sequence_logprobs(table)[pairs]  # noqa: E731
    lengths = mask.sum(axis=1).astype(np.float32)[pairs]
    mean_lengths = jnp.sum(law.reshape(-1, 1) * lengths, axis=0)
    ranks = jnp.broadcast_to(jnp.array([1, 2], jnp.int32), pairs.shape)
    return Answers(
        of_answers(params), of_answers(world.ref_params), jnp.asarray(lengths), ranks, mean_lengths
    )


def population_fixed_point(
    loss: PreferenceLoss, world: World, preference: Array | None = None, **how: Any
) -> jax.Array:
    """Probabilities [S] of the table that minimises a loss on pairs in the population, found numerically.

    For losses whose minimiser has no closed form, or to hold a loss to the one it has. The loss must not couple rows.
    `how` goes to `minimise`.
    """
    law = pair_law(world, preference)
    mean = lambda params: jnp.sum(law.reshape(-1) * loss(all_pairs(world, params, law)))  # noqa: E731
    return world.space.probabilities(minimise(mean, world.ref_params, **how))


# --- results ---------------------------------------------------------------------------------------------------


class Reached(NamedTuple):
    """What a run came to; arrays of the seeds' shape."""

    distance: jax.Array  # total variation from the target, in [0, 1]
    reward: jax.Array  # E_π[r]
    kl: jax.Array  # KL(π‖π_ref) in nats


def measure(world: World, reached: Array, target: Array) -> Reached:
    """Of probabilities [..., S] against a target [S].

    They must be normalised: a model that is altered for a control (means in place of sums) belongs into the algorithm
    alone, not into the learner that the policy is read from.
    """
    ref = jnp.exp(world.ref_logprobs())
    shape = jnp.broadcast_shapes(reached.shape, ref.shape)
    target, ref, reward = (jnp.broadcast_to(x, shape) for x in (target, ref, world.reward))
    return Reached(
        total_variation(reached, target), jnp.sum(reached * reward, axis=-1), kl_divergence(reached, ref)
    )
