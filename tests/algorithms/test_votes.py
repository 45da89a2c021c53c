"""Soft labels, weights and heads for groups: each is held to what it replaces, whatever the layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    DESCENT,
    MODEL,
    SCALAR,
    TINY,
    assert_close,
    fake_params,
    lm_params,
    one_step,
    scalar_params,
)

from jrlhf.algorithms.dpo import DPOConfig, make_dpo
from jrlhf.algorithms.orpo import ORPOConfig, make_orpo
from jrlhf.algorithms.reward_model import (
    RewardModelConfig,
    evidence_of,
    head_labels,
    make_reward_model,
    total_weight,
)
from jrlhf.metrics import check_name
from jrlhf.models.transformer import Model
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.types import PairBatch, PreferenceBatch

ROWS, LENGTH = 16, 10
KEY = jax.random.key(0)
TWO = Model(TINY, "scalar", 2)
reward_model = functools.cache(make_reward_model)
dpo = functools.cache(make_dpo)


def preferences(rows: int = ROWS) -> PreferenceBatch:
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 32, (rows, 2, LENGTH)).astype(np.int32)
    lengths = rng.integers(5, LENGTH + 1, (rows, 2, 1))
    mask = np.arange(LENGTH) < lengths
    response = mask & (np.arange(LENGTH) > 2)
    ranks = np.asarray([[1, 2], [2, 1]] * (rows // 2), np.int32)
    return PreferenceBatch(tokens, mask, response, ranks, np.zeros((rows, 2), np.float32))


def pairs() -> PairBatch:
    batch = preferences()
    ref = np.random.default_rng(4).normal(-20, 2, (ROWS, 2)).astype(np.float32)
    return PairBatch(batch.tokens, batch.mask, batch.response_mask, ref)


def rm_step(batch, mesh=None, model=SCALAR, params=None, raters=0, rows_each=1.0, **config):
    algorithm = reward_model(RewardModelConfig(**config), model, DESCENT, 1 / 3, raters, rows_each)
    return one_step(algorithm, (scalar_params() if params is None else params, KEY), batch, mesh)


def dpo_step(batch, mesh=None, **config):
    return one_step(
        dpo(DPOConfig(0.3, **config), MODEL, DESCENT), (lm_params(), lm_params(1), KEY), batch, mesh
    )


def alike(a, b):
    assert_close((a.metrics, a.gradient), (b.metrics, b.gradient))


def take(batch, index):
    return jax.tree.map(lambda x: np.asarray(x)[index], batch)


DOUBLED = np.asarray([0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 9, 10, 11])  # 12 rows, of which four twice
COUNTS = np.bincount(DOUBLED).astype(np.float32)


def test_a_certainty_is_label_smoothing_of_the_row():
    batch = preferences()
    sure = batch._replace(certainty=np.full(ROWS, 0.9, np.float32))
    alike(rm_step(sure), rm_step(batch, label_smoothing=0.1))
    of_pairs = pairs()
    sure = of_pairs._replace(certainty=np.full(ROWS, 0.9, np.float32))
    alike(dpo_step(sure), dpo_step(of_pairs, label_smoothing=0.1))


def test_certainties_differ_by_row():
    """A batch of two halves has the mean of their losses."""
    batch, certainty = preferences(), np.tile(np.float32([1.0, 0.6]), ROWS // 2)
    loss = rm_step(batch._replace(certainty=certainty)).metrics["rm/loss"]
    halves = [
        rm_step(
            batch._replace(
                certainty=np.full(ROWS, c, np.float32), weights=(certainty == c)[:, None] * np.float32(1)
            )
        )
        for c in np.float32([1.0, 0.6])
    ]
    assert loss == pytest.approx(np.mean([half.metrics["rm/loss"] for half in halves]), rel=1e-5)
    assert loss != pytest.approx(rm_step(batch).metrics["rm/loss"], rel=1e-3)


def test_a_weight_of_two_is_the_row_twice():
    twice = take(preferences(), DOUBLED)
    once = take(preferences(), np.arange(12))._replace(weights=COUNTS[:, None])
    alike(rm_step(once), rm_step(twice))
    twice = take(pairs(), DOUBLED)
    once = take(pairs(), np.arange(12))._replace(weights=COUNTS)
    alike(dpo_step(once, rpo_alpha=0.5), dpo_step(twice, rpo_alpha=0.5))
    by_tokens = make_orpo(ORPOConfig(), MODEL, DESCENT)  # whose likelihood is a mean over tokens
    alike(*(one_step(by_tokens, (lm_params(), lm_params(1), KEY), batch) for batch in (once, twice)))


@pytest.mark.parametrize("small", [False, True])
def test_weights_in_microbatches_and_on_a_mesh(small):
    """Means are over the global batch, also where its weights sum to less than 1."""
    weights = np.random.default_rng(0).gamma(1.0, 1.0, ROWS).astype(np.float32) / (50.0 if small else 1.0)
    certainty = np.tile(np.float32([1.0, 0.5, 0.8, 0.7]), ROWS // 4)
    batch = preferences()._replace(weights=weights[:, None], certainty=certainty)
    whole = rm_step(batch)
    alike(rm_step(batch, microbatches=4), whole)
    of_pairs = pairs()._replace(weights=weights, certainty=certainty)
    whole = dpo_step(of_pairs)
    alike(dpo_step(of_pairs, microbatches=4), whole)
    if small:  # a mean does not depend on the weights' scale
        alike(dpo_step(of_pairs._replace(weights=weights * 50)), whole)
    else:
        alike(rm_step(batch, "all"), rm_step(batch))
        alike(dpo_step(of_pairs, "all"), whole)


def test_an_even_pair_pulls_both_ways_and_has_no_accuracy():
    """p log s(m) + (1 - p) log s(-m) at p = 1/2, and the metrics of order are those of the other pairs."""
    batch = pairs()._replace(certainty=np.where(np.arange(ROWS) < 4, np.float32(0.5), np.float32(1)))
    found, rest = dpo_step(batch), dpo_step(take(pairs(), np.arange(4, ROWS)))
    for name in ("pref/acc", "pref/margin"):
        assert found.metrics[name] == pytest.approx(rest.metrics[name], rel=1e-5)
    exchanged = batch._replace(
        **{f: np.where((np.arange(ROWS) < 4).reshape(-1, *[1] * (x.ndim - 1)), x[:, ::-1], x)
           for f, x in zip(batch._fields[:4], batch[:4], strict=True)}
    )  # fmt: skip
    assert_close(dpo_step(exchanged).gradient, found.gradient)


# --- groups and mixtures --------------------------------------------------------------------------------------

GROUPS = {"groups": ("A*", "B*"), "model": TWO, "params": fake_params(TWO)}


def grouped(batch):
    member = np.arange(ROWS) % 4 == 0
    return batch._replace(weights=np.stack([member, ~member], axis=1).astype(np.float32))


def test_each_group_trains_its_own_head():
    """The loss is the mean of the heads', each on its own rows; a head's gradient knows no other group."""
    batch = grouped(preferences())
    found = rm_step(batch, **GROUPS)
    losses = []
    for head in range(2):
        params = GROUPS["params"] | {
            "score": jax.tree.map(lambda x, h=head: x[..., h : h + 1], GROUPS["params"]["score"])
        }
        own = preferences()._replace(weights=batch.weights[:, head : head + 1])
        losses.append(rm_step(own, params=params).metrics["rm/loss"])
    assert found.metrics["rm/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    one = rm_step(batch._replace(weights=batch.weights * np.float32([1, 0])), **GROUPS)
    assert np.max(np.abs(one.gradient["policy"]["score"]["kernel"][:, 1])) == 0
    assert np.max(np.abs(one.gradient["policy"]["score"]["kernel"][:, 0])) > 0


MIXTURE = {"mixture": 2, "model": TWO, "params": fake_params(TWO), "raters": 5, "rows_each": 4.0}


def rated():
    return preferences()._replace(raters=(np.arange(ROWS) % 5).astype(np.int32))


def test_a_mixture_is_groups_whose_members_are_guessed():
    """Its step is that of heads with the responsibilities as weights, and its evidence what each head makes of them."""
    batch = rated()
    found = rm_step(batch, **MIXTURE)
    algorithm = reward_model(RewardModelConfig(mixture=2), TWO, DESCENT, 1 / 3, 5, 4.0)
    guess = np.stack(algorithm.init(MIXTURE["params"], KEY).extra["evidence"], axis=1)
    types = np.exp(guess) / np.exp(guess).sum(axis=1, keepdims=True)
    same = rm_step(batch._replace(weights=types[batch.raters].astype(np.float32), raters=()), **GROUPS)
    assert_close(found.gradient, same.gradient)
    assert found.metrics["rm/loss"] == pytest.approx(same.metrics["rm/loss"], rel=1e-5)
    from_losses = np.zeros((5, 2))
    for head in range(2):
        alone = MIXTURE["params"] | {
            "score": jax.tree.map(lambda x, h=head: x[..., h : h + 1], MIXTURE["params"]["score"])
        }
        for who in range(5):
            own = preferences()._replace(weights=(batch.raters == who)[:, None].astype(np.float32))
            loss = rm_step(own, params=alone).metrics["rm/loss"]
            from_losses[who, head] = -loss * np.sum(batch.raters == who)
    rows = np.bincount(batch.raters)[:, None]
    expected = 0.75**rows * guess + from_losses
    evidence = np.stack(found.state.extra["evidence"], axis=1)
    np.testing.assert_allclose(evidence, expected, rtol=1e-4, atol=1e-5)
    for name in found.metrics:
        check_name(name)


def test_a_mixture_in_microbatches_and_on_a_mesh():
    whole = rm_step(rated(), **MIXTURE)
    for other in (rm_step(rated(), microbatches=4, **MIXTURE), rm_step(rated(), "all", **MIXTURE)):
        alike(other, whole)
        assert_close(jax.device_get(other.state.extra), jax.device_get(whole.state.extra))


def test_evidence_counts_a_row_as_much_as_it_weighs():
    losses = jnp.asarray([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    weights = jnp.asarray([[0.25, 0.75], [1.0, 1.0], [0.0, 0.0]])
    evidence, rows = evidence_of(losses, weights, jnp.asarray([1, 1, 0]), 2)
    np.testing.assert_allclose(evidence, [[0, 0], [-7, -10]])
    np.testing.assert_array_equal(rows, [0, 2])


def test_a_head_without_weight_divides_by_one():
    config = RewardModelConfig(groups=("A*", "B*"))
    labels = head_labels(config, grouped(preferences())._replace(weights=np.zeros((ROWS, 2), np.float32)))
    np.testing.assert_array_equal(total_weight(config, labels), [1, 1])


def test_a_mixture_finds_who_belongs_together():
    """Of six raters three want what the others abhor: one type each, whoever they are, and heads that disagree."""
    rng = np.random.default_rng(7)
    rows, raters = 96, 6
    tokens = rng.integers(4, 32, (rows, 2, 6)).astype(np.int32)
    tokens[:, 0, 4:], tokens[:, 1, 4:] = 1, 2  # the first answer ends on 1, the second on 2
    real = np.ones(tokens.shape, bool)
    who = (np.arange(rows) % raters).astype(np.int32)
    likes_first = who % 2 == 0
    ranks = np.where(likes_first[:, None], [1, 2], [2, 1]).astype(np.int32)
    batch = PreferenceBatch(tokens, real, real, ranks, np.zeros((rows, 2), np.float32), raters=who)
    adam = build_optimizer(OptimConfig(lr=3e-2, schedule="constant"), 30)
    config = RewardModelConfig(mixture=2)
    algorithm = make_reward_model(config, TWO, adam, 1 / 3, raters, rows / raters)
    train = jax.jit(algorithm.train_step)
    state = algorithm.init(fake_params(TWO), jax.random.key(3))
    for _ in range(30):
        state, metrics = train(state, batch)
    types = jax.nn.softmax(jnp.stack(state.extra["evidence"], axis=1), axis=1)
    assert metrics["rm/type_certainty"] > 0.99
    first = np.argmax(types, axis=1).tolist()
    assert len({*first[::2]}) == len({*first[1::2]}) == 1
    assert first[0] != first[1]
    assert metrics["rm/acc"] > 0.99
