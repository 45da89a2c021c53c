"""Divergences over the vocabulary: against scipy, at forbidden tokens, in chunks, and from a model's parameters."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from helpers import TINY, assert_close, fake_params

from jrlhf.models.transformer import Model
from jrlhf.ops.distillation import chunked_divergence, forward_kl, generalized_jsd, reverse_kl
from jrlhf.ops.kl import full_kl
from jrlhf.ops.logprobs import project
from jrlhf.ops.masking import masked_mean

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "trl_unpaired.npz")
RNG = np.random.default_rng(0)
STUDENT = (2 * RNG.standard_normal((3, 4, 11))).astype(np.float32)
TEACHER = (2 * RNG.standard_normal((3, 4, 11))).astype(np.float32)
DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd_0.5": generalized_jsd,
    "jsd_0.1": partial(generalized_jsd, beta=0.1),
}


def in_float64(name: str, student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    s, t = (scipy.special.softmax(x.astype(np.float64), axis=-1) for x in (student, teacher))
    kl = lambda p, q: scipy.special.rel_entr(p, q).sum(-1)  # noqa: E731
    if name.startswith("jsd"):
        beta = float(name[4:])
        m = beta * t + (1 - beta) * s
        return beta * kl(t, m) + (1 - beta) * kl(s, m)
    return kl(t, s) if name == "forward_kl" else kl(s, t)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_against_scipy(name):
    found = DIVERGENCES[name](STUDENT, TEACHER)
    np.testing.assert_allclose(found, in_float64(name, STUDENT, TEACHER), atol=2e-6)
    np.testing.assert_allclose(DIVERGENCES[name](TEACHER, TEACHER + 3.0), 0, atol=2e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_are_those_of_the_table(name):
    s, t = (scipy.special.softmax(x.astype(np.float64), axis=-1) for x in (STUDENT, TEACHER))
    beta = {"jsd_0.5": 0.5, "jsd_0.1": 0.1}.get(name, 0.0)
    slope = (1 - beta) * np.log(s / (beta * t + (1 - beta) * s)) if beta else np.log(s / t)
    expected = s * (slope - np.sum(s * slope, axis=-1, keepdims=True))
    if name == "forward_kl":
        expected = s - t
    gradient = jax.grad(lambda x: jnp.sum(DIVERGENCES[name](x, TEACHER)))(jnp.asarray(STUDENT))
    np.testing.assert_allclose(gradient, expected, atol=2e-6)


def test_jsd_tends_to_the_divergences_at_its_ends():
    student, teacher = STUDENT / 2, TEACHER / 2
    near = lambda beta: np.asarray(generalized_jsd(student, teacher, beta))  # noqa: E731
    np.testing.assert_allclose(near(1e-3) / 1e-3, forward_kl(student, teacher), rtol=0.01)
    np.testing.assert_allclose(near(1 - 1e-3) / 1e-3, reverse_kl(student, teacher), rtol=0.01)
    assert np.all(near(0.5) < np.log(2))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_forbidden_tokens_count_nothing(name):
    """Those that pad a vocabulary (-inf for both), and for the mixture those of one side alone."""
    allowed = np.arange(11) < 7
    hide = lambda x: jnp.where(allowed, x, -jnp.inf)  # noqa: E731
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(DIVERGENCES[name](hide(x), hide(TEACHER))))(
        jnp.asarray(STUDENT)
    )
    expected = DIVERGENCES[name](STUDENT[..., :7], TEACHER[..., :7])
    np.testing.assert_allclose(value, np.sum(expected), rtol=1e-6)
    np.testing.assert_array_equal(gradient[..., 7:], 0)
    assert bool(jnp.all(jnp.isfinite(gradient)))
    if name.startswith("jsd"):
        for pair in ((hide(STUDENT), TEACHER), (STUDENT, hide(TEACHER))):
            value, gradients = jax.value_and_grad(
                lambda s, t: jnp.sum(DIVERGENCES[name](s, t)), argnums=(0, 1)
            )(*map(jnp.asarray, pair))
            np.testing.assert_allclose(value, in_float64(name, *map(np.asarray, pair)).sum(), rtol=1e-5)
            assert all(bool(jnp.all(jnp.isfinite(g))) for g in gradients)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_gkd_is_trls(beta, temperature):
    """Its mean over unmasked tokens; its ends are the two KLs."""
    ends = {0.0: forward_kl, 1.0: reverse_kl}
    of = ends.get(beta, partial(generalized_jsd, beta=beta))

    def loss(student):
        return masked_mean(of(student / temperature, GOLDEN["teacher"] / temperature), GOLDEN["mask"])

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(GOLDEN["student"]))
    np.testing.assert_allclose(value, GOLDEN[f"jsd/{beta}/{temperature}/loss"], rtol=1e-6)
    np.testing.assert_allclose(gradient, GOLDEN[f"jsd/{beta}/{temperature}/grad"], atol=1e-6)


@pytest.mark.parametrize("chunk", [3, 5])
def test_chunks_give_the_same_values_and_gradients(chunk):
    """Of heads of two sizes; 3 does not divide the 10 positions."""
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = (jax.random.normal(keys[0], (2, 10, 8)), jax.random.normal(keys[1], (2, 10, 6)))
    kernels = (jax.random.normal(keys[2], (8, 13)), jax.random.normal(keys[3], (6, 13)))
    weights = jax.random.normal(keys[4], (2, 10))

    def whole(hidden, kernels):
        return generalized_jsd(project(hidden[0], kernels[0]), project(hidden[1], kernels[1]))

    def weighted(f):
        return jax.jit(jax.value_and_grad(lambda h, k: jnp.sum(weights * f(h, k)), argnums=(0, 1)))

    chunked = partial(chunked_divergence, generalized_jsd, chunk=chunk)
    assert_close(weighted(chunked)(hidden, kernels), weighted(whole)(hidden, kernels))


def test_chunks_never_hold_all_the_logits():
    B, T, D, V = 4, 128, 16, 16_384
    hidden = (jax.ShapeDtypeStruct((B, T, D), jnp.float32),) * 2
    kernels = (jax.ShapeDtypeStruct((D, V), jnp.float32),) * 2

    def temporaries(chunk):
        def loss(hidden, kernels):
            return jnp.sum(chunked_divergence(generalized_jsd, hidden, kernels, chunk=chunk))

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, kernels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one_models = 4 * B * T * V
    assert temporaries(T) > 2 * one_models
    assert temporaries(8) < one_models


# --- of models ----------------------------------------------------------------------------------------------

P, R = 5, 6  # slots of the prompt and the response
VARIANTS = {
    "tied": TINY,
    "untied": replace(TINY, tie_embeddings=False, n_layers=1),
    "capped": replace(TINY, logits_softcap=2.0, vocab_multiple=64, n_layers=1),
}


def rollout_like():
    """Left-padded prompts and their responses: tokens, mask [B, P + R]."""
    tokens = RNG.integers(0, 32, (4, P + R)).astype(np.int32)
    slots = np.arange(P + R)
    mask = (slots >= np.array([[0], [2], [4], [1]])) & (slots < np.array([[11], [8], [11], [9]]))
    return np.where(mask, tokens, 0), mask


@pytest.mark.parametrize(
    ("name", "chunk"), [("tied", 0), ("tied", 4), ("untied", 4), ("capped", 0), ("capped", 4)]
)
def test_a_models_divergence_is_that_of_its_logits(name, chunk):
    model = Model(replace(VARIANTS[name], logits_chunk=chunk))
    params, ref = fake_params(model), fake_params(model, 1)
    tokens, mask = rollout_like()
    weights = np.where(mask[:, P:], RNG.standard_normal((4, R)), 0).astype(np.float32)
    temperature = jnp.float32(0.7)

    def ours(params):
        return model.divergence(params, ref, tokens, mask, P, temperature)

    def materialised(params):
        logits = [model.logits(p, model.hidden(p, tokens, mask))[:, P - 1 : -1] for p in (params, ref)]
        return full_kl(logits[0] / temperature, logits[1] / temperature)

    def weighted(f):
        def loss(params):
            values = f(params)
            return jnp.sum(weights * values), jnp.where(mask[:, P:], values, 0.0)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    found, expected = weighted(ours), weighted(materialised)
    assert_close(found, expected)
    assert float(jnp.max(found[0][1])) > 0.1
    assert found[0][1].dtype == jnp.float32


def test_a_model_of_another_size_and_a_larger_vocabulary():
    """The teacher's further ids are no tokens of the student: its distribution is over those that both have."""
    model = Model(replace(TINY, logits_chunk=4))
    teacher = Model(replace(TINY, d_model=24, n_layers=1, vocab_size=40, logits_softcap=3.0))
    params, theirs = fake_params(model), fake_params(teacher, 1)
    tokens, mask = rollout_like()

    def ours(params, theirs, model=model):
        return model.divergence(params, theirs, tokens, mask, P, of=forward_kl, other=teacher)

    logits = lambda m, p: m.logits(p, m.hidden(p, tokens, mask))[:, P - 1 : -1]  # noqa: E731
    expected = full_kl(logits(teacher, theirs)[..., :32], logits(model, params))
    for size in (0, 4):
        found = jax.jit(partial(ours, model=Model(replace(model.config, logits_chunk=size))))(params, theirs)
        keep = lambda x: np.where(mask[:, P:], np.asarray(x), 0)  # noqa: E731
        assert_close(keep(found), keep(expected))
    gradient = jax.jit(jax.grad(lambda t: jnp.sum(ours(params, t))))(theirs)
    assert all(not np.any(g) for g in jax.tree.leaves(gradient))  # the other model is a constant
