"""Distillation: its loss and gradient, that the teacher is the fixed point, and layout changes nothing."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DESCENT, MODEL, TINY, assert_close, fake_params, lm_params, one_step

from jrlhf.algorithms.distillation import DistillationConfig, divergence_of, make_distillation
from jrlhf.config import UserError
from jrlhf.metrics import check_name
from jrlhf.models.config import LoRAConfig
from jrlhf.models.lora import join
from jrlhf.models.transformer import Model
from jrlhf.ops.masking import positions_from_mask
from jrlhf.types import Rollout, SequenceBatch

ROWS, LENGTH = 16, 10
KEY = jax.random.key(0)
TEACHER = Model(replace(TINY, d_model=24, n_layers=1))  # of another size
make = functools.cache(make_distillation)
divergences = jax.jit(MODEL.divergence, static_argnums=(4, 5, 6, 7))


@functools.cache
def teacher_params():
    return fake_params(TEACHER, 3)


def make_batch(side="right", pad_id=0, extra=0) -> SequenceBatch:
    rng = np.random.default_rng(0)
    length = LENGTH + extra
    tokens = np.full((ROWS, length), pad_id, np.int32)
    mask, targets = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for row in range(ROWS):
        prompt, answer = rng.integers(0, 32, rng.integers(1, 4)), rng.integers(0, 32, rng.integers(1, 7))
        text = np.concatenate([prompt, answer])
        start = length - len(text) if side == "left" else 0
        tokens[row, start : start + len(text)], mask[row, start : start + len(text)] = text, True
        targets[row, start + len(prompt) : start + len(text)] = True
    return SequenceBatch(tokens, mask.astype(np.int32), np.asarray(positions_from_mask(mask)), targets)


def step(batch, mesh=None, **config):
    algorithm = make(DistillationConfig(**config), MODEL, TEACHER, DESCENT)
    return one_step(algorithm, (lm_params(), teacher_params(), KEY), batch, mesh)


@pytest.fixture(scope="module")
def whole():
    return step(make_batch(), divergence="jsd", temperature=0.8)


@pytest.mark.parametrize("config", [{"divergence": "jsd", "temperature": 0.8}, {"divergence": "reverse_kl"}])
def test_loss_is_the_mean_divergence_over_the_answers_tokens(whole, config):
    batch, config_ = make_batch(), DistillationConfig(**config)
    values = np.asarray(
        divergences(
            lm_params(), teacher_params(), batch.tokens, batch.segment_ids, 1, config_.temperature,
            divergence_of(config_), TEACHER,
        )
    )  # fmt: skip
    found = whole if config["divergence"] == "jsd" else step(batch, **config)
    assert found.metrics["train/loss"] == pytest.approx(values[batch.loss_mask[:, 1:]].mean(), rel=1e-5)
    assert found.metrics["train/tokens"] == batch.loss_mask.sum()
    for name in found.metrics:
        check_name(name)


def test_layout_is_irrelevant(whole):
    order = np.random.default_rng(0).permutation(ROWS)
    moved = jax.tree.map(lambda x: x[order], make_batch("left", 21, extra=2))
    other = step(moved, divergence="jsd", temperature=0.8)
    names = whole.metrics.keys() - {"perf/pad_frac"}
    assert_close(*(({n: s.metrics[n] for n in names}, s.gradient) for s in (other, whole)))


def test_packed_texts_are_learned_as_if_apart(whole):
    """Two texts to a row; the other rows are empty."""
    apart = make_batch()
    packed = SequenceBatch(*(np.zeros((ROWS, 2 * LENGTH), x.dtype) for x in apart[:4]))
    for row in range(ROWS):
        real = apart.segment_ids[row].astype(bool)
        n, second = int(real.sum()), row % 2
        begin = int(apart.segment_ids[row - 1].sum()) if second else 0
        slots = slice(begin, begin + n)
        for into, of in zip(packed[:4], apart[:4], strict=True):
            into[row // 2, slots] = of[row, real]
        packed.segment_ids[row // 2, slots] = 1 + second
    found = step(packed, divergence="jsd", temperature=0.8)
    names = whole.metrics.keys() - {"perf/pad_frac"}
    assert_close(*(({n: s.metrics[n] for n in names}, s.gradient) for s in (found, whole)))


def test_microbatches_accumulate_the_same_gradient(whole):
    parts = step(make_batch(), divergence="jsd", temperature=0.8, microbatches=4)
    assert_close((parts.metrics, parts.gradient), (whole.metrics, whole.gradient))
    assert f"f32[{ROWS},{LENGTH}," not in parts.hlo


@pytest.mark.parametrize("mesh", ["long", "all"])
def test_a_mesh_gives_the_same_gradient(whole, mesh):
    """The teacher's parameters are whole on every device here: a stage shards them as it loaded them."""
    algorithm = make(DistillationConfig(divergence="jsd", temperature=0.8), MODEL, TEACHER, DESCENT)
    spread = one_step(algorithm, (lm_params(), teacher_params(), KEY), make_batch(), mesh)
    assert_close((spread.metrics, spread.gradient), (whole.metrics, whole.gradient))


def test_samples_are_learned_from_their_responses_alone():
    """The batch of a rollout has its loss on response tokens, and the loss of the same text laid out otherwise."""
    flat = make_batch("right")
    prompts, responses = 4, 7
    tokens = np.zeros((ROWS, prompts + responses), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row in range(ROWS):
        real, answer = flat.segment_ids[row].astype(bool), flat.loss_mask[row]
        n_prompt, n_answer = int((real & ~answer).sum()), int(answer.sum())
        tokens[row, prompts - n_prompt : prompts + n_answer] = flat.tokens[row, real]
        mask[row, prompts - n_prompt : prompts + n_answer] = True
    response_mask = mask[:, prompts:]
    samples = Rollout(tokens, mask, response_mask, np.zeros(response_mask.shape, np.float32), mask[:, 0])
    algorithm = make(DistillationConfig(), MODEL, TEACHER, DESCENT)
    batch = algorithm.make_batch(algorithm.init(lm_params(), teacher_params(), KEY), samples)
    expected, found = step(flat), step(jax.device_get(batch))
    assert found.metrics["train/loss"] == pytest.approx(expected.metrics["train/loss"], rel=1e-5)
    assert_close(found.gradient, expected.gradient)


def test_an_adapter_learns_beside_a_frozen_base():
    model = Model(replace(TINY, lora=LoRAConfig(rank=2)))
    algorithm = make_distillation(DistillationConfig(), model, TEACHER, DESCENT)
    adapter = model.fresh_adapter(jax.random.key(1))
    state = algorithm.init(adapter, teacher_params(), KEY, lm_params())
    new, metrics = jax.jit(algorithm.train_step)(state, make_batch())
    assert metrics["train/loss"] == pytest.approx(step(make_batch()).metrics["train/loss"], rel=1e-5)
    assert_close(new.ref_params["base"], lm_params(), 0, 0)
    assert jax.tree.structure(join(lm_params(), new.params["policy"])) == jax.tree.structure(
        jax.eval_shape(model.init, KEY)
    )


@pytest.mark.parametrize(
    ("divergence", "beta"), [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1)]
)
def test_the_teacher_is_the_fixed_point(divergence, beta):
    """A softmax table of states and tokens reaches the teacher's, at the states that the answers visit."""
    of = divergence_of(DistillationConfig(divergence, beta))
    rng = np.random.default_rng(1)
    teacher, start = (jnp.asarray(2 * rng.standard_normal((4, 6)), jnp.float32) for _ in range(2))
    visits = jnp.asarray([0.6, 0.3, 0.1, 0.0])

    @jax.jit
    def learn(logits):
        loss = lambda x: jnp.sum(visits * of(x, teacher))  # noqa: E731
        return jax.lax.fori_loop(0, 30_000, lambda _, x: x - 2.0 * jax.grad(loss)(x), logits)

    found, wanted = jax.nn.softmax(learn(start)), jax.nn.softmax(teacher)
    np.testing.assert_allclose(found[:3], wanted[:3], atol=1e-3)
    np.testing.assert_allclose(found[3], jax.nn.softmax(start)[3], atol=1e-6)


def test_forward_covers_and_reverse_seeks_where_the_student_cannot_be_the_teacher():
    """A student with one probability p for the first three tokens alike, and 1 - 3p for the last."""
    teacher = jnp.log(jnp.asarray([0.79, 0.01, 0.1, 0.1]))

    def best(divergence):
        of = divergence_of(DistillationConfig(divergence))
        student = lambda x: jnp.concatenate([jnp.broadcast_to(x, (3,)), jnp.zeros(1)])  # noqa: E731
        learn = lambda _, x: x - 0.5 * jax.grad(lambda y: of(student(y), teacher))(x)  # noqa: E731
        x = jax.lax.fori_loop(0, 5000, learn, jnp.float32(0.0))
        return float(jax.nn.softmax(student(x))[0])

    # Forward: moments match, 3p = 0.9. Reverse: log p - mean log of the three = log (1 - 3p) - log 0.1.
    assert best("forward_kl") == pytest.approx(0.3, abs=1e-3)
    geometric = float(np.exp(np.mean(np.log([0.79, 0.01, 0.1]))))
    assert best("reverse_kl") == pytest.approx(geometric / (3 * geometric + 0.1), abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, "beta must be between 0 and 1"),
        ({"beta": 1.0}, "reverse_kl"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"on_policy": 1.5}, "on_policy is a probability"),
    ],
)
def test_mistakes_in_the_config(fields, message):
    with pytest.raises(UserError, match=message):
        DistillationConfig(**fields)
