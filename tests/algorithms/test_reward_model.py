"""The reward model: pairs of K ranked answers against a plain loop, whatever the layout or the devices."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DESCENT, SCALAR, TINY, assert_close, fake_params, one_step, scalar_params

from jrlhf.algorithms.reward_model import (
    RewardModelConfig,
    head_labels,
    initial_tie_parameter,
    log_tie_parameter,
    make_reward_model,
    preference_scores,
    reward_model_loss,
    usable_prompts,
)
from jrlhf.config import UserError
from jrlhf.metrics import check_name
from jrlhf.models.hf import save_hf
from jrlhf.models.transformer import Model, combine_heads, fold_normalization
from jrlhf.ops.reward_losses import davidson_logprobs, rao_kupper_logprobs
from jrlhf.types import PreferenceBatch

ROWS, LENGTH = 16, 10
KEY = jax.random.key(0)
RANKS = (
    [1, 2, 0, 0],
    [2, 1, 3, 3],
    [1, 1, 1, 0],
    [3, 4, 2, 1],
    [1, 0, 0, 0],
    [1, 1, 2, 2],
    [2, 1, 0, 1],
    [0, 0, 0, 0],
)


def make_batch(k: int, length=LENGTH, side="right", pad_id=0) -> PreferenceBatch:
    """Answers of different lengths. With K = 4 also ties, missing answers and prompts that teach nothing."""
    rng = np.random.default_rng(k)
    ranks = np.array(RANKS * (ROWS // 8) if k == 4 else [[1, 2], [2, 1]] * (ROWS // 2), np.int32)
    tokens = np.full((ROWS, k, length), pad_id, np.int32)
    mask, response = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for row, answer in np.argwhere(ranks > 0):
        n = rng.integers(4, LENGTH + 1)
        start = length - n if side == "left" else 0
        tokens[row, answer, start : start + n] = rng.integers(0, 32, n)
        mask[row, answer, start : start + n] = True
        response[row, answer, start + 3 : start + n] = True
    margins = rng.standard_normal(ranks.shape).astype(np.float32)
    return PreferenceBatch(tokens, mask, response, ranks, margins)


make = functools.cache(make_reward_model)
answer_scores = jax.jit(lambda p, b: preference_scores(SCALAR, p, b)[..., 0])


def step(batch, mesh=None, **config):
    return one_step(make(RewardModelConfig(**config), SCALAR, DESCENT), (scalar_params(), KEY), batch, mesh)


@pytest.fixture(scope="module")
def batches():
    return {k: make_batch(k) for k in (2, 4)}


@pytest.fixture(scope="module")
def whole(batches):
    return {k: step(batches[k], margins=k == 2, centering=0.1) for k in (2, 4)}


def plain_loss(scores, batch, margins, ties=True):
    """Equation 1 of Ouyang et al. by a loop: mean over a prompt's pairs, then over prompts that have one."""
    losses, accuracies = [], []
    for s, ranks, m in zip(scores.astype(np.float64), batch.ranks, batch.margins, strict=True):
        terms, right = [], []
        for i, j in np.argwhere(np.triu(np.ones((len(s), len(s))), 1)):
            if ranks[i] and ranks[j] and (ties or ranks[i] != ranks[j]):
                if ranks[i] > ranks[j]:
                    i, j = j, i
                gap = s[i] - s[j] - (m[i] - m[j] if margins and ranks[i] != ranks[j] else 0.0)
                tied = ranks[i] == ranks[j]
                terms.append(
                    0.5 * np.logaddexp(0, gap) + 0.5 * np.logaddexp(0, -gap)
                    if tied
                    else np.logaddexp(0, -gap)
                )
                right.append(0.5 if tied else float(s[i] > s[j]))
        if terms:
            losses.append(np.mean(terms))
            accuracies.append(np.mean(right))
    return np.mean(losses), np.mean(accuracies)


@pytest.mark.parametrize("k", [2, 4])
def test_loss_is_a_plain_loop_over_pairs(whole, batches, k):
    scores = answer_scores(scalar_params(), batches[k])
    loss, accuracy = plain_loss(np.asarray(scores), batches[k], margins=k == 2)
    assert whole[k].metrics["rm/loss"] == pytest.approx(loss, rel=1e-5)
    assert whole[k].metrics["rm/acc"] == pytest.approx(accuracy, rel=1e-5)
    for name in whole[k].metrics:
        check_name(name)


def test_scores_are_read_at_the_last_real_token(batches):
    batch = batches[2]
    scores = np.asarray(answer_scores(scalar_params(), batch))
    flat = [x.reshape(-1, LENGTH) for x in (batch.tokens, batch.mask)]
    every = np.asarray(jax.jit(SCALAR.scores)(scalar_params(), *flat))
    last = every[np.arange(len(every)), np.sum(flat[1], axis=1) - 1]
    np.testing.assert_allclose(scores.reshape(-1), last, atol=1e-6)


def test_layout_is_irrelevant(whole):
    order = np.random.default_rng(0).permutation(ROWS)
    batch = jax.tree.map(lambda x: x[order], make_batch(4, side="left", pad_id=17))
    other = step(batch, centering=0.1)
    assert_close((other.metrics, other.gradient), (whole[4].metrics, whole[4].gradient))


def test_microbatches_accumulate_the_same_gradient(whole, batches):
    parts = step(batches[4], centering=0.1, microbatches=4)
    assert_close((parts.metrics, parts.gradient), (whole[4].metrics, whole[4].gradient))


@pytest.mark.parametrize(("mesh", "k"), [("long", 4), ("all", 2)])
def test_a_mesh_gives_the_same_gradient(whole, batches, mesh, k):
    spread = step(batches[k], mesh, margins=k == 2, centering=0.1)
    assert_close((spread.metrics, spread.gradient), (whole[k].metrics, whole[k].gradient))


def test_tied_pairs_can_be_left_out(batches):
    """The value alone; their gradient is that of the loss."""
    config, batch = RewardModelConfig(ties="drop"), batches[4]
    prompts = jnp.sum(usable_prompts(config, head_labels(config, batch)), axis=0)
    value = jax.jit(lambda p: reward_model_loss(config, SCALAR, p, batch, prompts))
    loss, (sums, _) = value(scalar_params())
    expected = plain_loss(np.asarray(answer_scores(scalar_params(), batch)), batch, margins=False, ties=False)
    assert (float(loss), float(sums["rm/acc"])) == pytest.approx(expected, rel=1e-5)


def test_a_step_moves_scores_as_the_labels_say(whole, batches):
    """Along the gradient, by a little: chosen scores rise over rejected ones; centering alone shrinks them."""
    params = scalar_params()
    moved = jax.tree.map(lambda p, g: p - 0.01 * g, params, whole[2].gradient["policy"])
    before, after = (np.asarray(answer_scores(p, batches[2])) for p in (params, moved))
    chosen = np.where(batches[2].ranks[:, 0] == 1, 1.0, -1.0)
    assert np.mean(chosen * (after[:, 0] - after[:, 1])) > np.mean(chosen * (before[:, 0] - before[:, 1]))


# --- several heads ------------------------------------------------------------------------------------------

TWO, THREE = Model(TINY, "scalar", 2), Model(TINY, "scalar", 3)
ENSEMBLE = RewardModelConfig(heads=3, ties="davidson", centering=0.1)
RUBRIC = RewardModelConfig(criteria=("honest", "brief"), objective="regression")
ONLY_CRITERIA = RewardModelConfig(criteria=("honest", "brief"), overall=False)
single_loss = jax.jit(lambda config, p, b, n: reward_model_loss(config, SCALAR, p, b, n)[0], static_argnums=0)
several_losses = jax.jit(
    lambda config, model, p, b, n: reward_model_loss(config, model, p, b, n), static_argnums=(0, 1)
)


def with_heads(batch, config):
    """Resamples of the prompts for an ensemble, and two criteria of which some rows lack one."""
    rng = np.random.default_rng(9)
    criteria = rng.integers(0, 3, (*batch.ranks.shape, 2)).astype(np.float32)
    criteria[::5, :, 0] = np.nan
    criteria[batch.ranks == 0] = np.nan
    draws = rng.poisson(1.0, (ROWS, config.heads)).astype(np.float32)
    return batch._replace(weights=draws if config.heads > 1 else (), criteria=criteria)


def only_head(params, head):
    one = {
        "kernel": params["score"]["kernel"][:, head : head + 1],
        "bias": params["score"]["bias"][head : head + 1],
    }
    return params | {"score": one}


def prompts_of(config, batch):
    return np.maximum(np.sum(np.asarray(usable_prompts(config, head_labels(config, batch))), axis=0), 1.0)


def test_each_head_of_an_ensemble_learns_its_own_resample(batches):
    """The ensemble's loss is the mean over heads of a single model's on the rows as often as they were drawn."""
    config, single = RewardModelConfig(heads=2, centering=0.1), RewardModelConfig(centering=0.1)
    batch, params = with_heads(batches[4], config), fake_params(TWO)
    expected = []
    for head in range(2):
        rows = np.repeat(np.arange(ROWS), batch.weights[:, head].astype(int))
        drawn = jax.tree.map(lambda x, rows=rows: x[rows], batch)._replace(weights=(), criteria=())
        expected.append(single_loss(single, only_head(params, head), drawn, prompts_of(single, drawn)))
    loss, (sums, _) = several_losses(config, TWO, params, batch, prompts_of(config, batch))
    assert float(loss) == pytest.approx(float(np.mean(expected)), rel=1e-5)
    assert sums["rm/disagreement"] > 0
    alike = params | {"score": jax.tree.map(lambda x: x[..., :1].repeat(2, axis=-1), params["score"])}
    _, (sums, _) = several_losses(config, TWO, alike, batch, prompts_of(config, batch))
    assert float(sums["rm/disagreement"]) == pytest.approx(0, abs=1e-6)


def test_each_criterion_has_a_head_that_learns_its_order(batches):
    batch, params = with_heads(batches[4], ONLY_CRITERIA), fake_params(TWO)
    expected = []
    for c in range(2):
        known = ~np.isnan(batch.criteria[..., c])
        values = np.where(known, batch.criteria[..., c], -1)
        order = 1 + np.sum(values[:, None] > values[:, :, None], axis=2)
        alone = batch._replace(ranks=np.where(known, order, 0).astype(np.int32), weights=(), criteria=())
        plain = RewardModelConfig()
        expected.append(single_loss(plain, only_head(params, c), alone, prompts_of(plain, alone)))
    loss, _ = several_losses(ONLY_CRITERIA, TWO, params, batch, prompts_of(ONLY_CRITERIA, batch))
    assert float(loss) == pytest.approx(float(np.mean(expected)), rel=1e-5)


def test_regression_is_the_mean_squared_error_of_known_ratings(batches):
    batch, params = with_heads(batches[4], RUBRIC), fake_params(THREE)
    loss, _ = several_losses(RUBRIC, THREE, params, batch, prompts_of(RUBRIC, batch))
    scores = np.asarray(jax.jit(lambda p, b: preference_scores(THREE, p, b))(params, batch))
    targets = np.concatenate([batch.margins[..., None], batch.criteria], axis=-1)
    known = (batch.ranks > 0)[..., None] & ~np.isnan(targets)
    heads = []
    for h in range(3):
        rows = [
            np.mean((scores[b, k, h] - targets[b, k, h]) ** 2) for b, k in enumerate(known[..., h]) if k.any()
        ]
        heads.append(np.mean(rows))
    assert float(loss) == pytest.approx(np.mean(heads), rel=1e-5)


@pytest.fixture(scope="module")
def several(batches):
    return {config: several_step(config, with_heads(batches[4], config)) for config in (ENSEMBLE, RUBRIC)}


def several_step(config, batch, mesh=None):
    return one_step(make(config, THREE, DESCENT), (fake_params(THREE), KEY), batch, mesh)


@pytest.mark.parametrize("config", [ENSEMBLE, RUBRIC], ids=["ensemble", "rubric"])
def test_several_heads_do_not_depend_on_the_layout(several, config):
    order = np.random.default_rng(0).permutation(ROWS)
    batch = jax.tree.map(lambda x: x[order], with_heads(make_batch(4), config))
    left = make_batch(4, side="left", pad_id=17)
    batch = batch._replace(
        tokens=left.tokens[order], mask=left.mask[order], response_mask=left.response_mask[order]
    )
    other = several_step(config, batch)
    assert_close((other.metrics, other.gradient), (several[config].metrics, several[config].gradient))
    for name in other.metrics:
        check_name(name)


@pytest.mark.parametrize(("config", "mesh"), [(ENSEMBLE, "all"), (RUBRIC, None)], ids=["ensemble", "rubric"])
def test_several_heads_in_microbatches_and_on_a_mesh(several, batches, config, mesh):
    parts = several_step(replace(config, microbatches=2), with_heads(batches[4], config), mesh)
    assert_close((parts.metrics, parts.gradient), (several[config].metrics, several[config].gradient))


def test_a_learned_tie_parameter_starts_at_the_share_of_ties_and_follows_its_gradient(several):
    """At equal scores a share of ties of one third is nu = 1."""
    assert several[ENSEMBLE].metrics["rm/tie_parameter"] == pytest.approx(1.0)
    assert several[ENSEMBLE].gradient["tie"]["bias"] != 0
    for ties, share in (("davidson", 0.2), ("rao_kupper", 0.2), ("rao_kupper", 0.6)):
        config = RewardModelConfig(ties=ties)
        params = {"tie": {"bias": jnp.float32(initial_tie_parameter(config, share))}}
        model = davidson_logprobs if ties == "davidson" else rao_kupper_logprobs
        tie = model(jnp.float32(0.0), log_tie_parameter(config, params))[1]
        assert float(jnp.exp(tie)) == pytest.approx(share, rel=1e-5)


def test_heads_are_combined_and_normalised(batches):
    params, batch = fake_params(THREE), batches[2]
    scores = np.asarray(jax.jit(lambda p, b: preference_scores(THREE, p, b))(params, batch))
    weights = [0.5, -1.0, 2.0]
    one = fold_normalization(combine_heads(params, weights), 0.3, 2.0)
    assert_close(answer_scores(one, batch), (scores @ np.float32(weights) - 0.3) / 2.0)
    each = fold_normalization(params, [0.1, 0.2, 0.3], [1.0, 2.0, 4.0])
    found = jax.jit(lambda p, b: preference_scores(THREE, p, b))(each, batch)
    assert_close(found, (scores - np.float32([0.1, 0.2, 0.3])) / np.float32([1, 2, 4]))
    with pytest.raises(ValueError, match="there are 3 scalar heads where one is wanted"):
        THREE.scores(params, batch.tokens[:, 0], batch.mask[:, 0])
    with pytest.raises(UserError, match="a reward model of 3 heads cannot be written: combine them"):
        save_hf("nowhere", THREE, params)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ties": "halve"}, "ties is 'halve'. Did you mean 'half'?"),
        ({"ties": True}, "ties is True"),
        ({"objective": "bradleyterry"}, "Did you mean 'bradley_terry'?"),
        ({"objective": "plackett_luce", "ties": "drop"}, "ties 'drop' is for pairs"),
        ({"objective": "regression", "margins": True}, "margins True is for pairs"),
        ({"objective": "plackett_luce", "label_smoothing": 0.1}, "label_smoothing 0.1 is for pairs"),
        ({"objective": "regression", "centering": 0.1}, "centering: regression"),
        ({"ties": "davidson", "margins": True}, "margins: ties 'davidson'"),
        ({"tie_parameter": 2.0}, "tie_parameter belongs to ties"),
        ({"ties": "rao_kupper", "tie_parameter": 1.0}, "it is above 1, or 0 to learn it"),
        ({"ties": "davidson", "tie_parameter": -1.0}, "it is above 0"),
        ({"heads": 0}, "heads must be positive"),
        ({"heads": 2, "criteria": ("a",)}, "heads and criteria"),
        ({"overall": False}, "there must be criteria"),
        ({"criteria": ("a", "a")}, "criteria must differ"),
        ({"criteria": ("overall",)}, "none be called 'overall'"),
    ],
)
def test_options_that_do_not_go_together(wrong, message):
    with pytest.raises(UserError) as error:
        RewardModelConfig(**wrong)
    assert message in str(error.value)
