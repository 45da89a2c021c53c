"""Prompts that go through a model once for their answers, many in a row: the same scores, steps and metrics."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import DESCENT, MESHES, SCALAR, TINY, assert_close, fake_params, one_step

from jrlhf.algorithms.dpo import DPOConfig, make_dpo
from jrlhf.algorithms.orpo import ORPOConfig, make_orpo
from jrlhf.algorithms.ranked_dpo import RankedDPOConfig, make_ranked_dpo
from jrlhf.algorithms.reward_model import RewardModelConfig, make_reward_model, preference_scores
from jrlhf.config import MeshConfig, UserError
from jrlhf.models.packed import PackedModel, window_spans
from jrlhf.models.transformer import Model
from jrlhf.ops.pairs import pair_logprobs
from jrlhf.sharding import make_mesh
from jrlhf.training.data import Packing
from jrlhf.training.stages.common import check_packing
from jrlhf.types import PairBatch, PreferenceBatch, RankedBatch

ROWS, LENGTH = 16, 12
KEY = jax.random.key(0)
MODEL, HEADS = PackedModel(TINY), Model(TINY, "scalar", 3)
RANKS = (
    [1, 2, 0, 0],
    [2, 1, 3, 3],
    [1, 1, 1, 0],
    [3, 4, 2, 1],
    [1, 0, 0, 0],
    [1, 1, 2, 2],
    [0, 2, 0, 1],
    [2, 1, 1, 0],
)
ONE = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def preferences(k: int) -> PreferenceBatch:
    """Prompts of 1 to 5 tokens with answers of 1 to 7; of 4 answers some are missing, also the first."""
    rng = np.random.default_rng(k)
    ranks = np.array(RANKS * (ROWS // 8) if k == 4 else [[1, 2], [2, 1]] * (ROWS // 2), np.int32)
    tokens = np.full((ROWS, k, LENGTH), 7, np.int32)
    mask, response = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for row in range(ROWS):
        prompt = rng.integers(0, 32, rng.integers(1, 6))
        for answer in np.flatnonzero(ranks[row]):
            text = np.concatenate([prompt, rng.integers(0, 32, rng.integers(1, 8))])
            tokens[row, answer, : len(text)], mask[row, answer, : len(text)] = text, True
            response[row, answer, len(prompt) : len(text)] = True
    margins = rng.standard_normal(ranks.shape).astype(np.float32)
    return PreferenceBatch(tokens, mask, response, ranks, margins)


def pairs() -> PairBatch:
    rng, b = np.random.default_rng(5), preferences(2)
    weights = rng.random(ROWS).astype(np.float32)
    certainty = rng.choice([0.5, 0.7, 1.0], ROWS).astype(np.float32)
    return PairBatch(*b[:3], rng.standard_normal((ROWS, 2)).astype(np.float32) - 9.0, weights, certainty)


def rankings() -> RankedBatch:
    b = preferences(4)
    return RankedBatch(
        *b[:3], np.random.default_rng(6).standard_normal((ROWS, 4)).astype(np.float32), b.ranks
    )


def packed(batch, parts: int = 1, mesh=ONE, empty: int = 0):
    packing = Packing(batch, mesh, parts)
    index = np.arange(ROWS)
    rows = packing.rows(index) + empty * packing.unit(ROWS)
    return packing.batch(index, rows)


@pytest.mark.parametrize("k", [2, 4])
def test_scores_and_logprobs_are_those_of_padded_rows(k):
    """A row holds several prompts, and rows that hold none change nothing."""
    batch = preferences(k)
    within = packed(batch, empty=2)
    assert np.max(within.tokens.segment_ids) > 1
    params = fake_params(HEADS)
    scores = jax.jit(functools.partial(preference_scores, HEADS))
    real = batch.ranks > 0
    assert_close(np.asarray(scores(params, within))[real], np.asarray(scores(params, batch))[real])
    params = fake_params(MODEL)
    for tail_weight in (1.0, 0.3):
        logprobs = jax.jit(lambda p, b, w=tail_weight: pair_logprobs(MODEL, p, b, w))
        assert_close(logprobs(params, within), logprobs(params, batch), atol=1e-4)


def test_windows_that_span_every_answer_can_be_packed():
    """However long the packed rows are."""
    config = replace(TINY, window=LENGTH, windowed=(True, False), window_rope_theta=100.0)
    model, batch = Model(config, "scalar"), preferences(2)
    within = packed(batch)
    assert within.tokens.tokens.shape[1] > LENGTH
    scores = jax.jit(functools.partial(preference_scores, model))
    assert_close(scores(fake_params(model), within), scores(fake_params(model), batch))
    check_packing(True, config, LENGTH)
    check_packing(False, config, 0)
    assert window_spans(TINY, 64)
    with pytest.raises(UserError, match=r"packing: .* window of 12 tokens.* answers may have 13"):
        check_packing(True, config, LENGTH + 1)
    with pytest.raises(UserError, match=r"packing: .* answers may have 64"):
        check_packing(True, config, 0)


def learned(make, config, model, batch, args, mesh, parts):
    make = functools.cache(make)
    alone = one_step(make(config, model, DESCENT), args, batch)
    config = replace(config, microbatches=parts)
    devices = make_mesh(MESHES[mesh]) if mesh else ONE
    within = one_step(make(config, model, DESCENT), args, packed(batch, parts, devices, empty=1), mesh)
    assert within.metrics.keys() == alone.metrics.keys()
    assert_close((within.metrics, within.gradient), (alone.metrics, alone.gradient), atol=2e-5, rtol=1e-4)
    assert max(float(np.max(np.abs(g))) for g in jax.tree.leaves(alone.gradient)) > 1e-3
    return within


@pytest.mark.parametrize(
    ("k", "config", "mesh", "parts"),
    [
        (2, RewardModelConfig(margins=True, centering=0.1), None, 1),
        (4, RewardModelConfig(), "data", 2),
        (4, RewardModelConfig(heads=3), None, 4),
        (4, RewardModelConfig(ties="davidson"), "all", 1),
    ],
    ids=["pairs", "microbatches_on_a_mesh", "heads", "ties_on_all_axes"],
)
def test_a_reward_model_learns_the_same(k, config, mesh, parts):
    batch, model = preferences(k), SCALAR
    if config.heads > 1:
        weights = np.random.default_rng(0).integers(0, 3, (ROWS, 3)).astype(np.float32)
        batch, model = batch._replace(weights=weights), HEADS
    within = learned(make_reward_model, config, model, batch, (fake_params(model), KEY), mesh, parts)
    if mesh == "data":  # every device has rows of its own
        rows, length = packed(batch, parts, make_mesh(MESHES[mesh])).tokens.tokens.shape
        assert f"f32[{rows},{length}," not in within.hlo


@pytest.mark.parametrize(
    ("make", "config", "mesh", "parts"),
    [
        (make_dpo, DPOConfig(0.3), None, 1),
        (make_dpo, DPOConfig(0.3, reference="on_the_fly", ld_alpha=0.4), "all", 2),
        (make_dpo, DPOConfig(0.3, loss="aot"), None, 2),
        (make_dpo, DPOConfig(0.3, reference_free=True, rpo_alpha=0.5), "long", 1),
        (make_orpo, ORPOConfig(), None, 2),
        (make_ranked_dpo, RankedDPOConfig(0.3), "data", 2),
    ],
    ids=["votes", "reference_on_the_fly", "coupled_rows", "no_reference", "orpo", "rankings"],
)
def test_policies_learn_the_same(make, config, mesh, parts):
    batch = rankings() if make is make_ranked_dpo else pairs()
    if not (make is make_dpo and config.loss == "sigmoid"):
        batch = batch._replace(**{"weights": (), "certainty": ()} if make is not make_ranked_dpo else {})
    learned(make, config, MODEL, batch, (fake_params(MODEL), fake_params(MODEL, 1), KEY), mesh, parts)
