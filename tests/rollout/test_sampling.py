"""Filters keep exactly the sets that a plain sort gives; draws follow the probabilities exactly."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MESHES
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from jrlhf.config import UserError
from jrlhf.rollout.sampling import (
    CANDIDATES,
    SamplingConfig,
    _filter_by_bits,
    draw,
    filter_logits,
    inverse_cdf,
    make_sampling,
    row_keys,
)
from jrlhf.sharding import MESH_AXES, make_mesh

filtered = jax.jit(filter_logits)


@pytest.fixture(scope="module")
def logits():
    """Rows of 23 logits: plain ones, many ties, all equal, one token with nearly everything, negative ones."""
    rng = np.random.default_rng(0)
    rows = 2.0 * rng.standard_normal((40, 23))
    rows[10:20] = np.round(rows[10:20])  # ties
    rows[20] = 1.0
    rows[21, 5] = 60.0
    rows[22:30] -= 30.0
    return rows.astype(np.float32)


def softmax(x):
    p = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return p / np.sum(p, axis=-1, keepdims=True)


def kept(logits, **config):
    result = np.asarray(filtered(logits, make_sampling(SamplingConfig(**config), (1,), 0)))
    keep = result > -1e29
    temperature = config.get("temperature") or 1.0
    np.testing.assert_allclose(result[keep], (logits / np.float32(temperature))[keep], rtol=1e-6)
    return keep


def plain_top_k(x, k):
    return x >= np.sort(x)[::-1][min(k, len(x)) - 1]


def plain_top_p(p, top_p):
    """The smallest set of most likely tokens with at least `top_p`; its last token's equals come along."""
    descending = np.sort(p)[::-1]
    last = np.argmax(np.cumsum(descending) >= top_p - 1e-7) if np.sum(p) >= top_p else len(p) - 1
    return p >= descending[last]


@pytest.mark.parametrize("k", [1, 2, 7, 23, 100])
def test_top_k_keeps_the_k_largest_and_their_equals(logits, k):
    expected = np.stack([plain_top_k(row, k) for row in logits])
    np.testing.assert_array_equal(kept(logits, top_k=k), expected)
    assert np.any(np.sum(expected, axis=1) > k) == (k < 23)  # some tie was at the edge


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set(logits, top_p):
    probabilities = softmax(logits.astype(np.float64)).round(9)
    result = kept(logits, top_p=top_p)
    np.testing.assert_array_equal(result, np.stack([plain_top_p(p, top_p) for p in probabilities]))
    assert np.all(np.sum(probabilities * result, axis=1) >= top_p - 1e-6)


# --- more tokens than candidates ---------------------------------------------------------------------------------

WIDE = 600
assert WIDE > 2 * CANDIDATES


@pytest.fixture(scope="module")
def wide():
    """Rows of 600 logits: those that the candidates decide, flat ones that they do not, ties, padded vocabularies."""
    rng = np.random.default_rng(1)
    rows = 4.0 * rng.standard_normal((24, WIDE))
    rows[4:8] = 0.1 * rng.standard_normal((4, WIDE))  # 0.9 of the mass is in some 530 tokens
    rows[8:12] = np.round(rows[8:12])
    rows[12] = 0.0
    rows[13, ::2], rows[13, 1::2] = 0.0, -0.0
    rows[14, :400], rows[14, 400:] = 1.0, -5.0  # more equals at the edge than candidates
    rows[15:18, 30:] = -np.inf
    rows[18:20, 30:] = -1e30
    rows[20, 7] = 80.0
    return rows.astype(np.float32)


@pytest.mark.parametrize("k", [1, 40, 256, 257, 599, 600, 1000])
def test_candidates_keep_the_top_k_of_many(wide, k):
    expected = np.stack([plain_top_k(row, k) for row in wide]) & (wide > -1e29)
    np.testing.assert_array_equal(kept(wide, top_k=k), expected)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("k", [0, 50, 300])
def test_candidates_keep_the_top_p_of_many(wide, top_p, k):
    expected = []
    for row in wide.astype(np.float64):
        keep = plain_top_k(row, k or WIDE) & (row > -1e29)
        expected.append(keep & plain_top_p(softmax(np.where(keep, row, -np.inf)), top_p))
    np.testing.assert_array_equal(kept(wide, top_k=k, top_p=top_p), np.stack(expected))


@pytest.mark.parametrize("config", [{"top_k": 40}, {"top_k": 300, "top_p": 0.9}, {"top_p": 0.95}], ids=str)
def test_passes_over_the_vocabulary_keep_the_same(wide, config):
    """What a TPU does, and a mesh that splits the vocabulary: bit by bit, also for rows beside which all is decided."""
    sampling = make_sampling(SamplingConfig(**config), (1,), 0)
    by_bits = np.asarray(jax.jit(_filter_by_bits)(wide, sampling))
    np.testing.assert_array_equal(by_bits, np.asarray(filtered(wide, sampling)))
    easy = wide[:4]
    np.testing.assert_array_equal(np.asarray(filtered(easy, sampling)), by_bits[:4])


def test_a_split_vocabulary_is_not_sorted():
    sampling = make_sampling(SamplingConfig(top_k=5, top_p=0.9), (1,), 0)
    x = jax.ShapeDtypeStruct((2, WIDE), jnp.float32)

    def sorts(mesh):
        with jax.set_mesh(make_mesh(mesh)):
            return "top_k" in str(jax.make_jaxpr(filter_logits)(x, sampling))

    assert [sorts(MESHES["data"]), sorts(MESHES["all"])] == [True, False]


def test_the_way_is_that_of_the_platform_which_is_compiled_for():
    """Of a mesh whose devices are not here, too: within the function that each of its shards runs."""
    sampling = make_sampling(SamplingConfig(top_k=5), (1,), 0)
    x = jax.ShapeDtypeStruct((4, WIDE), jnp.float32)

    def token(x):
        return draw(
            filter_logits(x, sampling), row_keys(jax.random.key(0), len(x)), jnp.zeros(len(x), jnp.int32)
        )

    def ways(platform):
        """(whether it sorts, whether it draws by sums)"""
        device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
        mesh = AbstractMesh((2, 1, 1, 1, 1), MESH_AXES, (AxisType.Auto,) * 5, abstract_device=device)
        with use_abstract_mesh(mesh):
            here = jax.shard_map(token, in_specs=P("data"), out_specs=P("data"), check_vma=False)
            jaxpr = str(jax.make_jaxpr(here)(x))
        return "top_k" in jaxpr, "cumsum" in jaxpr

    assert [ways("tpu"), ways("gpu"), ways("cpu")] == [(False, False), (True, True), (True, True)]


@pytest.mark.parametrize("min_p", [0.01, 0.3])
def test_min_p_keeps_a_share_of_the_most_likely(logits, min_p):
    probabilities = softmax(logits.astype(np.float64))
    expected = probabilities >= min_p * np.max(probabilities, axis=1, keepdims=True)
    np.testing.assert_array_equal(kept(logits, min_p=min_p), expected)


def test_filters_apply_after_the_temperature_and_one_after_another(logits):
    """top-p counts what top-k left, renormalised; min-p looks at the tempered probabilities."""
    temperature, k, top_p, min_p = 0.7, 6, 0.8, 0.2
    expected = []
    for row in logits.astype(np.float64) / temperature:
        keep = plain_top_k(row, k)
        keep &= plain_top_p(softmax(np.where(keep, row, -np.inf)), top_p)
        keep &= softmax(row) >= min_p * np.max(softmax(row))
        expected.append(keep)
    result = kept(logits, temperature=temperature, top_k=k, top_p=top_p, min_p=min_p)
    np.testing.assert_array_equal(result, np.stack(expected))


def test_zero_temperature_is_the_first_of_the_largest(logits):
    keep = kept(logits, temperature=0.0)
    np.testing.assert_array_equal(np.argmax(keep, axis=1), np.argmax(logits, axis=1))
    assert np.all(np.sum(keep, axis=1) == 1)


@pytest.mark.parametrize("vocab", [7, 256, 700])
def test_inverse_cdf_draws_in_proportion(vocab):
    """Evenly spaced uniform numbers must hit each token in proportion, up to one at either end."""
    n = 4096
    rng = np.random.default_rng(vocab)
    logits = (2.0 * rng.standard_normal(vocab)).astype(np.float32)
    logits[::3] = -1e30  # filtered tokens
    uniform = ((np.arange(n) + 0.5) / n).astype(np.float32)
    drawn = np.asarray(jax.jit(inverse_cdf)(np.broadcast_to(logits, (n, vocab)), uniform))
    counts = np.bincount(drawn, minlength=vocab)
    assert np.all(counts[::3] == 0)
    assert len(counts) == vocab
    assert np.max(np.abs(counts - n * softmax(logits.astype(np.float64)))) < 1.05
    assert np.all(np.diff(drawn) >= 0)


def test_the_ends_of_the_uniform_range_hit_tokens_with_mass():
    vocab = 700
    logits = np.full((2, vocab), -1e30, np.float32)
    logits[:, [300, 301, 650]] = 0.0
    ends = np.array([0.0, np.nextafter(np.float32(1), np.float32(0))], np.float32)
    assert np.asarray(inverse_cdf(logits, ends)).tolist() == [300, 650]


def test_draws_follow_the_distribution_and_change_with_step_and_row():
    n, vocab = 20_000, 40
    logits = np.broadcast_to(np.random.default_rng(1).standard_normal(vocab).astype(np.float32), (n, vocab))
    keys = row_keys(jax.random.key(3), n)
    step = jax.jit(draw)
    first, second = (np.asarray(step(logits, keys, jnp.full(n, t))) for t in (0, 1))
    p = softmax(logits[0].astype(np.float64))
    for drawn in (first, second):
        chi_square = np.sum((np.bincount(drawn, minlength=vocab) - n * p) ** 2 / (n * p))
        assert chi_square < 39 + 4 * np.sqrt(2 * 39)
    chance = np.sum(p * p)  # that two independent draws agree
    for a, b in ((first, second), (first[1:], first[:-1])):
        assert abs(np.mean(a == b) - chance) < 4 * np.sqrt(chance / n)


def test_row_keys_are_the_same_for_a_longer_batch():
    short, long = (jax.random.key_data(row_keys(jax.random.key(0), n)) for n in (3, 5))
    np.testing.assert_array_equal(short, long[:3])
    assert len(np.unique(np.asarray(long), axis=0)) == 5


def test_mistakes_are_named():
    for field, value in {
        "temperature": -1.0,
        "top_p": 0.0,
        "min_p": 1.0,
        "top_k": -1,
        "max_new_tokens": 0,
        "stop": "Human:",
    }.items():
        with pytest.raises(UserError, match=f"sampling.{field}"):
            replace(SamplingConfig(), **{field: value})


@pytest.mark.parametrize("text", ["", "a\ufffd"])
def test_a_stop_string_that_cannot_be_written_is_refused(text):
    with pytest.raises(UserError, match=r"sampling\.stop: a stop string must not be empty"):
        SamplingConfig(stop=("fine", text))


def test_filtered_says_whether_the_policy_itself_is_sampled():
    assert not SamplingConfig(temperature=0.5).filtered
    assert all(
        SamplingConfig(**c).filtered
        for c in ({"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.0})
    )
