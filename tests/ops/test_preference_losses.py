"""Losses on pairs: TRL's values and gradients, and what an equation says where TRL has none or differs."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jrlhf.algorithms import FROM_PAIRS
from jrlhf.algorithms.cpo import CPOConfig
from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.orpo import ORPOConfig
from jrlhf.algorithms.simpo import SimPOConfig
from jrlhf.ops.preference_losses import (
    DIVERGENCES,
    LINKS,
    aot_loss,
    aot_unpaired_loss,
    discopop_link,
    dpo_loss,
    exo_pair_loss,
    ipo_loss,
    link_loss,
    log_odds,
    robust_dpo_loss,
)
from jrlhf.optim import Optimizer
from jrlhf.types import PairBatch

RNG = np.random.default_rng(0)
LN2 = math.log(2)
PC, PR, RC, RR = (RNG.standard_normal(5).astype(np.float32) for _ in range(4))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# --- TRL ----------------------------------------------------------------------------------------------------------

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "trl_preferences.npz")
DESCENT = Optimizer(optax.sgd(1.0), lambda updates: jnp.float32(1.0), None)


class TokenModel:
    """A model whose parameters are the log-probabilities of the tokens: one number for each of the batch."""

    base = property(lambda self: self)

    def whole(self, trained, frozen):
        return trained

    def logprobs(self, params, tokens, mask):
        return params.reshape(tokens.shape[0], -1), None


def whole_step(config, junk=np.nan) -> tuple[float, np.ndarray, np.ndarray]:
    """(loss, its gradient with respect to the tokens' log-probabilities, which of these belong to answers) by the
    product's whole algorithm, with junk where there is no answer."""
    mask = GOLDEN["mask"]
    answer = mask[:, :, 1:]
    policy, ref = (np.where(answer, GOLDEN[name], np.float32(junk)) for name in ("policy", "ref"))
    nothing = np.zeros(mask.shape[:2], np.float32)
    batch = PairBatch(np.zeros(mask.shape, np.int32), np.ones_like(mask), mask, nothing)
    algorithm = FROM_PAIRS[type(config)](config, TokenModel(), DESCENT)
    state = algorithm.init(jnp.asarray(policy), jnp.asarray(ref), jax.random.key(0))
    after, metrics = jax.jit(algorithm.train_step)(state, jax.tree.map(jnp.asarray, batch))
    return float(metrics["pref/loss"]), policy - np.asarray(after.params["policy"]), answer


BETA = float(GOLDEN["beta"])
dpo = functools.partial(DPOConfig, BETA, reference="on_the_fly")
free = functools.partial(DPOConfig, BETA, reference_free=True)
OURS = {
    **{
        name: dpo(loss=name)
        for name in (
            "sigmoid", "hinge", "discopop", "nca_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
        )
    },
    "ipo": dpo(loss="ipo", length_normalized=True),  # TRL averages over tokens
    "robust": dpo(0.1, loss="robust"),
    "exo_pair": dpo(0.1, loss="exo_pair"),
    "aot_smoothed": dpo(0.1, loss="aot"),
    "aot_unpaired_smoothed": dpo(0.1, loss="aot_unpaired"),
    "sigmoid_norm": dpo(length_normalized=True),
    "ld": dpo(ld_alpha=0.4),
    "wpo": dpo(wpo=True),  # TRL's with its correction set to 0
    "forward_kl": dpo(divergence="forward_kl"),
    "js_divergence": dpo(divergence="jensen_shannon"),
    "cpo": CPOConfig(BETA, nll_coef=0.5),
    "cpo_smoothed": CPOConfig(BETA, nll_coef=0.0, label_smoothing=0.1),
    "cpo_hinge": CPOConfig(BETA, nll_coef=1.0, loss="hinge"),
    "cpo_ipo": free(loss="ipo", length_normalized=True),
    "simpo": SimPOConfig(BETA, 0.5),
    "cpo_simpo": SimPOConfig(BETA, 0.5, label_smoothing=0.1, nll_coef=0.4),
    "alphapo": SimPOConfig(BETA, 0.5, alpha=0.25),
    "orpo": ORPOConfig(BETA),
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_losses_and_gradients_are_those_of_trl(name):
    loss, gradient, answer = whole_step(OURS[name])
    assert loss == pytest.approx(float(GOLDEN[f"{name}/loss"]), abs=1e-5)
    np.testing.assert_allclose(gradient[answer], GOLDEN[f"{name}/grad"][answer], atol=1e-5)


@pytest.mark.parametrize("name", ["ld", "wpo", "orpo"])
def test_what_is_no_answer_gets_no_gradient(name):
    _, gradient, answer = whole_step(OURS[name], junk=-3.0)
    np.testing.assert_array_equal(gradient[~answer], 0)
    assert np.all(gradient[answer] != 0)


def test_every_case_of_trl_is_compared():
    cases = {key.split("/")[0] for key in GOLDEN.files if key.endswith("/loss")}
    assert cases - set(OURS) == {"sft", "sigmoid_and_sft"}  # below


def test_trls_sft_term_is_cpos_nll_and_rpos_is_a_mean_over_answers():
    """TRL's "sft" is a mean over the batch's tokens, as CPO's and ORPO's; RPO's own is a mean over each answer's."""
    contrast, _, answer = whole_step(CPOConfig(BETA, nll_coef=0.0))
    both, *_ = whole_step(CPOConfig(BETA, nll_coef=1.0))
    assert both - contrast == pytest.approx(float(GOLDEN["sft/loss"]), abs=1e-5)
    combined = float(GOLDEN["sigmoid/loss"] + 0.7 * GOLDEN["sft/loss"])
    assert float(GOLDEN["sigmoid_and_sft/loss"]) == pytest.approx(combined, abs=1e-5)

    rpo, *_ = whole_step(dpo(rpo_alpha=0.7))
    chosen = np.where(answer, GOLDEN["policy"], 0)[:, 0].sum(axis=1) / answer[:, 0].sum(axis=1)
    expected = float(GOLDEN["sigmoid/loss"]) - 0.7 * chosen.mean()
    assert rpo == pytest.approx(expected, abs=1e-5)
    assert abs(expected - combined) > 0.01


def test_ipo_of_whole_answers_is_another_objective_than_trls():
    loss, *_ = whole_step(dpo(loss="ipo"))
    logps = [np.where(GOLDEN["mask"][:, :, 1:], GOLDEN[name], 0).sum(axis=2) for name in ("policy", "ref")]
    ratio = logps[0] - logps[1]
    expected = np.mean((ratio[:, 0] - ratio[:, 1] - 1 / (2 * BETA)) ** 2)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert abs(loss - float(GOLDEN["ipo/loss"])) > 0.1


# --- equations ----------------------------------------------------------------------------------------------------


def test_dpo_loss_is_ln_2_at_the_reference_and_follows_its_equation():
    loss, chosen, rejected = dpo_loss(PC, PR, PC, PR, beta=0.3)
    np.testing.assert_allclose(loss, LN2, rtol=1e-6)
    np.testing.assert_array_equal(chosen, 0)
    loss, chosen, rejected = dpo_loss(PC, PR, RC, RR, beta=0.3)
    np.testing.assert_allclose(chosen, 0.3 * (PC - RC), atol=1e-6)
    np.testing.assert_allclose(rejected, 0.3 * (PR - RR), atol=1e-6)
    margins = [(a - c) - (b - d) for a, b, c, d in zip(PC, PR, RC, RR, strict=True)]
    np.testing.assert_allclose(loss, [-math.log(sigmoid(0.3 * m)) for m in margins], atol=1e-6)
    smooth, *_ = dpo_loss(PC, PR, RC, RR, beta=0.3, label_smoothing=0.1)
    swapped, *_ = dpo_loss(PR, PC, RR, RC, beta=0.3)
    np.testing.assert_allclose(smooth, 0.9 * loss + 0.1 * swapped, atol=1e-6)


def test_dpo_gradient_weighs_by_the_implicit_error():
    """Rafailov et al. 2023, below eq. 7: -beta·sigmoid(r_rejected - r_chosen)."""
    gradient = jax.grad(lambda x: jnp.sum(dpo_loss(x, PR, RC, RR, 0.3)[0]))(jnp.asarray(PC))
    margins = [(a - c) - (b - d) for a, b, c, d in zip(PC, PR, RC, RR, strict=True)]
    np.testing.assert_allclose(gradient, [-0.3 * sigmoid(-0.3 * m) for m in margins], atol=1e-6)


def test_ipo_loss_and_the_square_link_that_it_is():
    loss, chosen, rejected = ipo_loss(PC, PR, RC, RR, tau=0.25)
    h = (PC - RC) - (PR - RR)
    np.testing.assert_allclose(loss, (h - 2) ** 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(chosen - rejected, 0.25 * h, atol=1e-6)
    beta = 0.5  # 2 tau
    np.testing.assert_allclose(
        link_loss(jnp.asarray(beta * h), LINKS["square"]), beta**2 * loss, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("link", LINKS)
def test_links_fall_where_the_chosen_answer_is_not_yet_preferred(link):
    """Each is a loss of the margin: it and its slope are finite far out, and it falls around 0."""
    f = LINKS[link]
    slope = jax.vmap(jax.grad(f))
    # The bump of DiscoPOP's published loss: it rises by a little where its mixture changes sides.
    near = jnp.array([-1.0, 0.5]) if link == "discopop" else jnp.linspace(-1.0, 0.5, 9)
    assert np.all(slope(near) < 0)
    far = jnp.array([-80.0, 80.0])
    assert np.all(np.isfinite(f(far)))
    assert np.all(np.isfinite(slope(far)))


def test_discopop_is_finite_where_its_two_factors_are_0_and_infinite():
    margin = jnp.array([-200.0])
    np.testing.assert_allclose(discopop_link(margin), [200.0], rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(discopop_link))(margin), [-1.0], rtol=1e-6)


def test_the_robust_loss_is_unbiased_under_flipped_labels():
    """Chowdhury et al. 2024, eq. 12: its expectation over flips is the loss of the true labels."""
    flip = 0.2
    clean = dpo_loss(PC, PR, 0.0, 0.0, 0.3)[0]
    seen = (1 - flip) * robust_dpo_loss(PC, PR, 0.3, flip) + flip * robust_dpo_loss(PR, PC, 0.3, flip)
    np.testing.assert_allclose(seen, clean, rtol=1e-5)


def test_exo_is_a_kl_divergence():
    flip = 0.1
    p = np.array([sigmoid(0.3 * (a - b)) for a, b in zip(PC, PR, strict=True)])
    expected = p * np.log(p / (1 - flip)) + (1 - p) * np.log((1 - p) / flip)
    np.testing.assert_allclose(exo_pair_loss(PC, PR, 0.3, flip), expected, atol=1e-5)
    at_label = jnp.array([math.log((1 - flip) / flip) / 0.3])
    np.testing.assert_allclose(exo_pair_loss(at_label, jnp.zeros(1), 0.3, flip), 0, atol=1e-6)


def test_aot_couples_the_rows_and_ignores_their_order():
    order = np.array([3, 0, 4, 1, 2])
    four = PC, PR, RC, RR
    total = lambda *x: float(jnp.sum(aot_loss(*x, 0.3)))  # noqa: E731
    assert total(*[x[order] for x in four]) == pytest.approx(total(*four), rel=1e-6)
    assert total(PC, PR, RC[order], RR[order]) == pytest.approx(total(*four), rel=1e-6)
    unpaired = lambda a, b: float(jnp.sum(aot_unpaired_loss(a, b, 0.3)))  # noqa: E731
    assert unpaired(PC - RC, (PR - RR)[order]) == pytest.approx(unpaired(PC - RC, PR - RR), rel=1e-6)
    apart = float(jnp.sum(dpo_loss(*four, 0.3)[0]))
    assert abs(total(*four) - apart) > 1e-3
    assert abs(unpaired(PC - RC, PR - RR) - apart) > 1e-3


def test_log_odds_are_those_of_the_probability_and_finite_at_its_ends():
    x = np.array([-1e-4, -0.1, -0.69, -0.71, -3.0, -20.0])
    p = np.exp(x)
    np.testing.assert_allclose(
        log_odds(jnp.asarray(x, jnp.float32)), np.log(p / -np.expm1(x)), rtol=1e-5, atol=1e-5
    )
    ends = jnp.array([0.0, -1e-9, -1e4])
    assert np.all(np.isfinite(log_odds(ends)))
    assert np.all(np.isfinite(jax.vmap(jax.grad(log_odds))(ends)))


def test_forward_kl_is_finite_however_unlikely_an_answer_has_become():
    ratios = jnp.array([-300.0, -90.0, 0.0, 300.0])
    value, slope = jax.vmap(jax.value_and_grad(DIVERGENCES["forward_kl"]))(ratios)
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(slope))
    np.testing.assert_allclose(value[2:], [-1.0, 0.0], atol=1e-6)
