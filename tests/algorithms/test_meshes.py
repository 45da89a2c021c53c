"""What one device computes, meshes with split lengths and experts compute, and how: of the model as a whole, of
algorithms, and of sampling. (The files of the algorithms hold most of them to it on the meshes "all" and "long".)"""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DESCENT, MESHES, TINY, assert_close, fake_params

from jrlhf.algorithms import FROM_PAIRS, FROM_ROLLOUTS
from jrlhf.algorithms.cispo import CISPOConfig
from jrlhf.algorithms.cpo import CPOConfig
from jrlhf.algorithms.dr_grpo import DrGRPOConfig
from jrlhf.algorithms.grpo import GRPOConfig
from jrlhf.algorithms.raft import RAFTConfig
from jrlhf.algorithms.reinforce import REINFORCEConfig
from jrlhf.algorithms.reinforce_plus_plus import REINFORCEPlusPlusConfig
from jrlhf.algorithms.remax import ReMaxConfig
from jrlhf.algorithms.sft import SFTConfig, make_sft
from jrlhf.algorithms.simpo import SimPOConfig
from jrlhf.config import MeshConfig
from jrlhf.models.config import MoEConfig
from jrlhf.models.transformer import Model
from jrlhf.ops.masking import positions_from_mask
from jrlhf.rollout.rollout import rollout
from jrlhf.rollout.sampling import SamplingConfig, make_sampling
from jrlhf.sharding import make_mesh, put_batch, state_shardings
from jrlhf.types import PairBatch, Prompts, Rollout, SequenceBatch

KEY, TEMPERATURE = jax.random.key(0), 0.8
ROWS, PROMPT, ANSWER = 8, 4, 7  # 11 tokens, which do not divide
LENGTH, VOCAB = PROMPT + ANSWER, 602  # 301 on each of two devices: more than a block that is drawn from
SHALLOW = Model(replace(TINY, n_layers=1))  # one layer compiles faster
WIDE = Model(replace(TINY, vocab_size=VOCAB))
MIXTURE = Model(replace(TINY, moe=MoEConfig(experts=4, per_token=2)))
LONG = MESHES["long"]
LONGER = MeshConfig(1, 2, sequence=4)  # there are two heads of keys
EXPERTS = MeshConfig(1, 1, 2, expert=2, sequence=2)


def texts(seed: int, *more: int):
    """(tokens, mask, of the answers), [ROWS, *more, LENGTH]: prompts are padded on the left, answers on the right."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, *more, LENGTH)
    slots = np.arange(LENGTH)
    start, end = rng.integers(0, PROMPT, shape[:-1]), rng.integers(PROMPT + 1, LENGTH + 1, shape[:-1])
    mask = (slots >= start[..., None]) & (slots < end[..., None])
    return rng.integers(0, 32, shape).astype(np.int32), mask, mask & (slots >= PROMPT)


def shapes_in(hlo: str, operation: str = r"[\w-]+") -> set[tuple[int, ...]]:
    """Of the arrays on one device that are results of an operation."""
    results = re.findall(rf"= (.*?) {operation}\(", hlo)
    return {
        tuple(map(int, dims.split(","))) for result in results for dims in re.findall(r"\[([\d,]+)\]", result)
    }


# --- the model ------------------------------------------------------------------------------------------------------


def everything(model: Model):
    """A loss of all that the model says of texts, and what it says: log-probabilities and entropies of answers, and the
    balance of experts."""

    def loss(params, tokens, mask):
        hidden, balance = model.hidden_and_balance(params, tokens, mask)
        before, targets, real = hidden[:, PROMPT - 1 : -1], tokens[:, PROMPT:], mask[:, PROMPT:]
        logprobs, entropy = model.logprobs_of_hidden(params, before, targets, TEMPERATURE, real)
        said = jnp.where(real, logprobs + 0.1 * entropy, 0.0)
        return jnp.sum(said) / jnp.sum(real, dtype=jnp.float32) + balance, (said, balance)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def on_mesh(model: Model, config: MeshConfig):
    """(what comes out, the compiled program's text)"""
    mesh, params = make_mesh(config), fake_params(model)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, state_shardings(mesh, params, model.logical_axes()))
        rows = put_batch(mesh, texts(0)[:2])
        program = everything(model).lower(params, *rows).compile()
        return jax.device_get(program(params, *rows)), program.as_text()


@pytest.mark.parametrize(
    ("model", "config", "chunk"),
    [(WIDE, LONG, 2), (WIDE, LONG, LENGTH), (SHALLOW, LONGER, 1), (MIXTURE, EXPERTS, 2)],
    ids=["vocabulary", "all logits", "more devices than keys", "experts"],
)
def test_a_model_says_and_learns_the_same(model, config, chunk):
    """With the logits of some positions (of each device) at a time, and of all."""
    model = replace(model, config=replace(model.config, logits_chunk=chunk))
    expected = everything(model)(fake_params(model), *texts(0)[:2])
    assert_close(on_mesh(model, config)[0], expected)


def test_what_devices_tell_one_another():
    """Weights are gathered over fsdp. Activations go from lengths to heads and back, and are gathered nowhere. No
    device has an array of the whole vocabulary, not even of two positions."""
    hlo = on_mesh(replace(WIDE, config=replace(WIDE.config, logits_chunk=2)), LONG)[1]
    gathered, exchanged = shapes_in(hlo, "all-gather"), shapes_in(hlo, "all-to-all")
    assert (1, 16, 12) in gathered, "gate [D, F / 2] of a layer"
    rows, part = ROWS // 2, (LENGTH + 1) // 2
    assert not [s for s in gathered if len(s) > 2 and s[0] == rows], "an activation"
    assert any(np.prod(s) == rows * part * 4 for s in exchanged), (
        "one head of four of a part, with one of the other"
    )
    assert not [s for s in exchanged if sum(n in (part, LENGTH + 1) for n in s) > 1], "scores or a mask"
    everywhere = shapes_in(hlo)
    assert (rows, 2, VOCAB // 2) in everywhere, "logits of two positions"
    assert not [s for s in everywhere if VOCAB in s]


# --- algorithms -----------------------------------------------------------------------------------------------------


def learned(made, config: MeshConfig | None = None):
    """(parameters after an update, metrics), where a batch that is made of samples is made on the devices, too."""
    algorithm, model, start, given = made

    def step(state, *given):
        batch = algorithm.make_batch(state, *given) if algorithm.make_batch else given[0]
        state, metrics = algorithm.train_step(state, batch)
        return state.params, metrics

    state = algorithm.init(*start)
    if config is None:
        return jax.device_get(jax.jit(step)(state, *given))
    mesh = make_mesh(config)
    state = jax.device_put(state, state_shardings(mesh, state, model.logical_axes()))
    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(step)(state, *put_batch(mesh, given)))


def of_rollouts(config, model=SHALLOW):
    tokens, mask, answers = texts(1)
    for x in (tokens, mask):  # two prompts
        x[:, :PROMPT] = np.repeat(x[::4, :PROMPT], 4, axis=0)
    rng = np.random.default_rng(2)
    logprobs = np.where(answers[:, PROMPT:], -3 - rng.random((ROWS, ANSWER)), 0.0).astype(np.float32)
    drawn = Rollout(tokens, mask, answers[:, PROMPT:], logprobs, np.arange(ROWS) % 3 > 0)
    scores = rng.standard_normal(ROWS).astype(np.float32)
    greedy = (np.roll(scores, 1),) if config.greedy_baseline else ()
    algorithm = FROM_ROLLOUTS[type(config)](config, model, DESCENT, TEMPERATURE)
    return algorithm, model, (fake_params(model), fake_params(model, 1), KEY), (drawn, scores, *greedy)


def of_pairs(config):
    references = np.random.default_rng(4).standard_normal((ROWS, 2)).astype(np.float32) - 5
    algorithm = FROM_PAIRS[type(config)](config, SHALLOW, DESCENT)
    start = (fake_params(SHALLOW), fake_params(SHALLOW, 1), KEY)
    return algorithm, SHALLOW, start, (PairBatch(*texts(3, 2), references),)


def of_texts(model):
    tokens, mask, answers = texts(0)
    batch = SequenceBatch(tokens, mask.astype(np.int32), np.asarray(positions_from_mask(mask)), answers)
    return make_sft(SFTConfig(balance_coef=0.1), model, DESCENT), model, (fake_params(model), KEY), (batch,)


OTHERS = {
    **{
        type(config).__name__: functools.partial(of_rollouts, replace(config, epochs=1, minibatches=1))
        for config in (
            DrGRPOConfig(group_size=4), CISPOConfig(group_size=4), RAFTConfig(group_size=4), REINFORCEConfig(),
            REINFORCEPlusPlusConfig(), ReMaxConfig(),
        )
    },
    "simpo": functools.partial(of_pairs, SimPOConfig()),
    "cpo": functools.partial(of_pairs, CPOConfig()),
}  # fmt: skip
# Of shared prompts, both of whose lengths are odd.
SHARED = GRPOConfig(group_size=4, share_prompts=True)


@pytest.mark.parametrize("name", OTHERS)
def test_algorithms_learn_the_same_where_lengths_are_split(name):
    made = OTHERS[name]()
    assert_close(learned(made, LONG), learned(made), atol=3e-5)


@pytest.mark.parametrize("made", [of_rollouts(SHARED, MIXTURE), of_texts(MIXTURE)], ids=["grpo", "sft"])
def test_and_where_experts_are(made):
    assert_close(learned(made, EXPERTS), learned(made), atol=3e-5)


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "config", "slots"),
    [(WIDE, MeshConfig(2, 1, 2, sequence=2), 8), (MIXTURE, MeshConfig(1, 1, 2, expert=4), 0)],
    ids=["vocabulary", "experts"],
)
def test_tokens_are_the_same_and_no_device_has_all_logits(model, config, slots):
    tokens, mask, _ = texts(5)
    prompts, params = Prompts(tokens[:, :PROMPT], mask[:, :PROMPT]), fake_params(model)
    rule = make_sampling(SamplingConfig(max_new_tokens=6, temperature=0.9), (3, 7), 0)
    one = jax.device_get(rollout(model, params, prompts, KEY, rule, group=2, slots=slots))
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, state_shardings(mesh, params, model.logical_axes()))
        args = (params, put_batch(mesh, prompts), KEY, rule)
        program = rollout.lower(model, *args, group=2, slots=slots).compile()
        spread = jax.device_get(program(*args))
    np.testing.assert_array_equal(spread.tokens, one.tokens)
    assert_close(spread, one)
    if model is WIDE:  # of two rows that a device samples at a time; one block of 256 logits of each is told
        told = shapes_in(program.as_text(), "(?:all-gather|all-reduce|all-to-all|collective-permute)")
        assert 2 * 256 in map(np.prod, told)
        assert max(map(np.prod, told)) < VOCAB
