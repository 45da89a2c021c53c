"""The decoder's invariants: what a token may see, what padding and packing may change (nothing), one function
for sampling and training."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    MODEL,
    SCALAR,
    TINY,
    assert_close,
    fake_params,
    largest_difference,
    lm_params,
    scalar_params,
)

from jrlhf.config import UserError
from jrlhf.models.config import ModelConfig
from jrlhf.models.transformer import Model, fold_normalization, with_scalar_head
from jrlhf.ops.masking import last_token_index

ROWS, LENGTH = 4, 12
REAL = (12, 9, 7, 3)  # real tokens of each row
logprobs = jax.jit(lambda p, t, s, x: MODEL.logprobs(p, t, s, positions_BT=x))
scores = jax.jit(SCALAR.scores)
hidden = jax.jit(MODEL.hidden)


@pytest.fixture(scope="module")
def params():
    return lm_params()


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, TINY.vocab_size, n) for n in REAL]


def padded(texts, side: str, pad_id: int, length: int = LENGTH):
    """(tokens, mask, positions) with padding before, after, or (both) on either side."""
    tokens = np.full((len(texts), length), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    positions = np.zeros(tokens.shape, np.int32)
    for i, text in enumerate(texts):
        spare = length - len(text)
        start = {"left": spare, "right": 0, "both": spare // 2}[side]
        tokens[i, start : start + len(text)] = text
        mask[i, start : start + len(text)] = True
        positions[i, start : start + len(text)] = np.arange(len(text))
    return tokens, mask, positions


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - np.max(x, axis=-1, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def real_logprobs(params, tokens, mask, positions):
    """Each text's (log-probabilities, entropies) of all tokens but its first."""
    result = jax.device_get(logprobs(params, tokens, mask, positions))
    return [[x[i, :][m[1:] & m[:-1]] for x in result] for i, m in enumerate(mask)]


def test_no_token_sees_a_later_one_and_each_sees_all_earlier_ones():
    tokens = jnp.arange(LENGTH, dtype=jnp.int32)[None]  # all different, so that a table's row is a position
    params = lm_params()

    def outputs(table):
        hidden = MODEL.hidden(params | {"embed": {"embedding": table}}, tokens, jnp.ones_like(tokens))
        return jnp.sum(jnp.square(hidden[0] - 0.3), axis=-1)

    jacobian = jax.jit(jax.jacrev(outputs))(params["embed"]["embedding"])[:, :LENGTH]  # [out, in, D]
    influence = np.linalg.norm(np.asarray(jacobian), axis=-1)
    assert np.all(influence[np.triu_indices(LENGTH, 1)] == 0)
    assert np.all(influence[np.tril_indices(LENGTH)] > 1e-5)


def test_padding_changes_nothing(params, texts):
    expected = real_logprobs(params, *padded(texts, "right", 0))
    assert_close(real_logprobs(params, *padded(texts, "left", 7)), expected)
    assert_close(real_logprobs(params, *padded(texts, "both", 31)), expected)


def test_positions_count_real_tokens_when_none_are_given(params, texts):
    """Rotary positions are relative, so padding at the ends could not tell: here it is amid the text."""
    tokens, mask, _ = padded(texts, "right", 7)
    whole = np.asarray(hidden(params, tokens, mask))
    for row, text in enumerate(texts):
        spare, cut = LENGTH - len(text), len(text) // 2
        tokens[row, cut + spare :] = text[cut:]
        mask[row] = (np.arange(LENGTH) < cut) | (np.arange(LENGTH) >= cut + spare)
    holed = np.asarray(hidden(params, tokens, mask))
    for row, text in enumerate(texts):
        assert_close(holed[row, mask[row]], whole[row, : len(text)])


def test_a_packed_row_is_its_texts_apart(params, texts):
    """Three texts in one row, in an order and with padding that their own rows do not have."""
    order = (2, 3)  # 7 + 3 tokens of 12
    tokens, segments, positions = (np.zeros((ROWS, LENGTH), np.int32) for _ in range(3))
    where, at = {}, 1
    for number, i in enumerate(order, start=1):
        end = at + len(texts[i])
        tokens[1, at:end], segments[1, at:end], positions[1, at:end] = texts[i], number, np.arange(end - at)
        where[i], at = slice(at, end - 1), end
    packed = jax.device_get(logprobs(params, tokens, segments, positions))
    apart = real_logprobs(params, *padded(texts, "right", 0))
    for i in order:
        assert_close([x[1, where[i]] for x in packed], apart[i])


def test_start_and_temperature(params, texts):
    tokens, mask, _ = padded(texts[:1] * ROWS, "right", 0)

    @jax.jit
    def both(params, temperature):
        logits = MODEL.logits(params, MODEL.hidden(params, tokens, mask))
        return logits, MODEL.logprobs(params, tokens, mask, start=5, temperature=temperature)

    logits, result = jax.device_get(both(params, 0.6))
    expected = log_softmax(logits[:, 4:-1] / 0.6)
    chosen = np.take_along_axis(expected, tokens[:, 5:, None], axis=-1)[..., 0]
    assert_close(result, (chosen, -np.sum(np.exp(expected) * expected, axis=-1)))


# --- options that must not change what is computed ------------------------------------------------------------


def loss_and_gradient(config: ModelConfig, texts):
    model, params = Model(config), lm_params()
    tokens, mask, _ = padded(texts, "right", 0)

    def loss(params):
        logps, entropy = model.logprobs(params, tokens, mask, temperature=0.8)
        return jnp.sum(jnp.where(mask[:, 1:], 0.1 * entropy - logps, 0.0)) / np.float32(np.sum(mask[:, 1:]))

    grad = jax.value_and_grad(loss)
    return jax.jit(grad)(params), str(jax.make_jaxpr(grad)(params))


@pytest.fixture(scope="module")
def plain(texts):
    return loss_and_gradient(replace(TINY, remat="none"), texts)


def logit_arrays(jaxpr: str) -> set[int]:
    """Over how many positions the arrays with the vocabulary as last axis extend."""
    return {int(n) for n in re.findall(rf"f32\[{ROWS},(\d+),{TINY.vocab_size}\]", jaxpr)}


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_recomputes_and_changes_nothing(plain, texts, remat):
    result, jaxpr = loss_and_gradient(replace(TINY, remat=remat), texts)
    assert_close(result, plain[0], atol=1e-6)
    assert "remat" in jaxpr
    assert "remat" not in plain[1]


def test_chunked_logits_change_nothing_and_are_never_whole(plain, texts):
    result, jaxpr = loss_and_gradient(
        replace(TINY, logits_chunk=4), texts
    )  # 11 positions: the last chunk is cut
    assert_close(result, plain[0], atol=1e-6)
    assert logit_arrays(jaxpr) == {4}
    assert logit_arrays(plain[1]) == {LENGTH - 1}


def test_bfloat16_is_near_float32(plain, texts):
    (loss, grads), _ = loss_and_gradient(replace(TINY, dtype="bfloat16", logits_chunk=4), texts)
    expected, expected_grads = plain[0]
    assert loss.dtype == jnp.float32
    assert 0 < abs(float(loss) - float(expected)) < 0.02 * float(expected)
    for (path, g), e in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected_grads), strict=True
    ):
        assert g.dtype == jnp.float32
        error = np.linalg.norm(np.asarray(g - e)) / np.linalg.norm(np.asarray(e))
        assert error < 0.05, (jax.tree_util.keystr(path), error)


def test_untied_head_predicts_with_its_own_kernel(texts):
    model = Model(replace(TINY, tie_embeddings=False))
    params = fake_params(model)
    tokens, mask, _ = padded(texts, "right", 0)
    logits, hidden = jax.jit(lambda p: (model.logits(p, h := model.hidden(p, tokens, mask)), h))(params)
    assert_close(logits, np.asarray(hidden) @ np.asarray(params["lm_head"]["kernel"]))


# --- decoding ---------------------------------------------------------------------------------------------------


def test_prefill_and_decode_are_one_forward_pass(params, texts):
    prompt = 6
    tokens, mask, positions = padded(texts[:2], "left", 9)
    mask[:, prompt:] = True  # a row's padding ends within the prompt
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    whole = np.asarray(hidden(params, tokens, mask))

    decode = jax.jit(MODEL.decode)
    decode_params = MODEL.decode_params(params)
    sees = np.tril(np.ones((LENGTH, LENGTH), bool))[None] & mask[:, None, :]
    first, cache = decode(
        decode_params,
        tokens[:, :prompt],
        positions[:, :prompt],
        sees[:, :prompt],
        MODEL.init_cache(2, LENGTH),
        jnp.int32(0),
    )
    decoded = [first]
    for t in range(prompt, LENGTH):
        one = slice(t, t + 1)
        step, cache = decode(
            decode_params, tokens[:, one], positions[:, one], sees[:, one], cache, jnp.int32(t)
        )
        decoded.append(step)
    assert_close(np.concatenate(decoded, axis=1)[mask], whole[mask])


# --- parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_n_params_is_the_number_of_parameters(tied):
    config = ModelConfig(
        vocab_size=29,
        d_model=12,
        n_layers=3,
        n_heads=6,
        n_kv_heads=2,
        head_dim=4,
        d_ff=20,
        tie_embeddings=tied,
    )
    shapes = jax.eval_shape(Model(config).init, jax.random.key(0))
    assert config.n_params == sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("model", [MODEL, SCALAR, Model(replace(TINY, tie_embeddings=False))])
def test_every_parameter_has_one_logical_axis_per_dimension(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    ranks = {
        tuple(k.key for k in path): len(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(shapes)
    }
    assert {path: len(names) for path, names in model.logical_axes().items()} == ranks


def test_initial_weights_have_variance_one_over_fan_in():
    config = ModelConfig(vocab_size=8, d_model=64, n_layers=4, n_heads=8, n_kv_heads=8, head_dim=16, d_ff=96)
    layers = jax.jit(Model(config).init)(jax.random.key(0))["layers"]
    inputs = {"q": 64, "k": 64, "v": 64, "o": 8 * 16}
    for name, fan_in in inputs.items():
        assert np.std(layers["attn"][name]) * fan_in**0.5 == pytest.approx(1.0, rel=0.03), name
    for name, fan_in in {"gate": 64, "up": 64, "down": 96}.items():
        assert np.std(layers["mlp"][name]) * fan_in**0.5 == pytest.approx(1.0, rel=0.03), name
    assert largest_difference(layers["attn"]["q"][0], layers["attn"]["q"][1]) > 0.1  # layers differ


def test_scalar_head_and_its_normalisation(texts):
    params = scalar_params()
    tokens, mask, _ = padded(texts, "left", 0)
    raw = np.asarray(scores(params, tokens, mask))
    hidden = np.asarray(jax.jit(SCALAR.hidden)(params, tokens, mask))
    assert_close(
        raw, hidden @ np.asarray(params["score"]["kernel"])[:, 0] + float(params["score"]["bias"][0])
    )
    folded = fold_normalization(params, mean=0.7, std=2.5)
    assert_close(scores(folded, tokens, mask), (raw - 0.7) / 2.5)


def test_scalar_head_replaces_the_language_head():
    model = Model(replace(TINY, tie_embeddings=False))
    params = with_scalar_head(fake_params(model), jax.random.key(0))
    expected = jax.eval_shape(replace(model, head="scalar").init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape, expected)


def test_scores_do_not_depend_on_padding(texts):
    def at_last(side, pad_id):
        tokens, mask, _ = padded(texts, side, pad_id)
        result = np.asarray(scores(scalar_params(), tokens, mask))
        return result[np.arange(ROWS), np.asarray(last_token_index(mask))]

    assert_close(at_last("left", 0), at_last("right", 5))


def test_config_mistakes_are_named():
    for wrong, message in (
        ({"d_model": 10, "n_heads": 4}, "d_model 10 is not divisible"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_heads 4 is not a multiple"),
        ({"head_dim": 5}, "head_dim 5 must be even"),
        ({"d_ff": 0}, "d_ff must be positive"),
    ):
        with pytest.raises(UserError, match=message):
            ModelConfig(**wrong)
