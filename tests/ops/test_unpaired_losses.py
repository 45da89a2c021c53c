"""KTO and BCO against TRL's own functions, and where gradient descent on them comes to rest.

The fixed points are of a plain softmax over a handful of answers to one prompt, of which a share D(y) of the data is
labelled desirable and U(y) undesirable.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.ops.unpaired_losses import bco_loss, kto_loss, kto_reference_point, running_mean

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "trl_unpaired.npz")
BATCHES = range(len(GOLDEN["labels"]))


def value_and_gradient(loss, n):
    """Losses of the rows of a batch, and the gradient of their mean with respect to the policy's log-probabilities."""

    def mean(policy):
        losses = loss(policy - GOLDEN["ref"][n], GOLDEN["labels"][n])
        return jnp.mean(losses), losses

    (_, losses), gradient = jax.value_and_grad(mean, has_aux=True)(jnp.asarray(GOLDEN["policy"][n]))
    return losses, gradient


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("n", BATCHES)
def test_kto_is_trls(name, n):
    z0 = jnp.float32(0.0)
    if name == "kto":
        z0 = kto_reference_point(jnp.asarray(GOLDEN["kl_policy"][n] - GOLDEN["kl_ref"][n]))
    np.testing.assert_allclose(z0, GOLDEN[f"{name}/z0"][n], atol=1e-6)
    weights = map(float, GOLDEN["weights"])
    loss = lambda ratios, labels: kto_loss(ratios, labels, z0, float(GOLDEN["beta"]), *weights)  # noqa: E731
    losses, gradient = value_and_gradient(loss, n)
    np.testing.assert_allclose(losses, GOLDEN[f"{name}/loss"][n], atol=1e-6)
    np.testing.assert_allclose(gradient, GOLDEN[f"{name}/grad"][n], atol=1e-6)


def test_bco_is_trls_with_its_running_mean():
    mean, count, beta = jnp.float32(0.0), jnp.float32(0.0), float(GOLDEN["beta"])
    for n in BATCHES:
        rewards = beta * (GOLDEN["policy"][n] - GOLDEN["ref"][n])
        mean, count = running_mean(mean, count, rewards)
        np.testing.assert_allclose(mean, GOLDEN["bco/delta"][n], atol=1e-6)
        losses, gradient = value_and_gradient(partial(bco_loss, delta=mean, beta=beta), n)
        np.testing.assert_allclose(losses, GOLDEN["bco/loss"][n], atol=1e-6)
        np.testing.assert_allclose(gradient, GOLDEN["bco/grad"][n], atol=1e-6)


def test_what_an_answer_is_compared_with_is_a_constant():
    ratios, labels = jnp.asarray([0.5, -0.3, 1.0]), jnp.asarray([True, False, True])
    through = jax.grad(lambda r: jnp.sum(kto_loss(r, labels, kto_reference_point(r), 0.3)))(ratios)
    fixed = jax.grad(lambda r: jnp.sum(kto_loss(r, labels, 0.4, 0.3)))(ratios)
    np.testing.assert_allclose(through, fixed, atol=1e-7)
    through = jax.grad(lambda r: jnp.sum(bco_loss(r, labels, jnp.mean(0.3 * r), 0.3)))(ratios)
    fixed = jax.grad(lambda r: jnp.sum(bco_loss(r, labels, 0.12, 0.3)))(ratios)
    np.testing.assert_allclose(through, fixed, atol=1e-7)


def test_extreme_log_ratios_overflow_nothing():
    ratios, labels = jnp.asarray([1e4, 1e4, -1e4, -1e4]), jnp.asarray([True, False, True, False])
    for loss, expected in (
        (partial(kto_loss, z0=0.0, beta=1.0), [0, 1, 1, 0]),
        (partial(bco_loss, delta=0.0, beta=1.0), [0, 1e4, 1e4, 0]),
    ):
        value, gradient = jax.value_and_grad(lambda r, loss=loss: jnp.sum(loss(r, labels)))(ratios)
        np.testing.assert_allclose(loss(ratios, labels), expected)
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))


# --- fixed points -------------------------------------------------------------------------------------------

REF = np.asarray([0.1, 0.2, 0.3, 0.15, 0.25], np.float32)
BETA = 0.5
both = np.asarray([True, False])[:, None]


def descend(loss, steps=20_000, rate=4.0):
    """The policy [Y] at which gradient descent rests. loss(log-ratios [2, Y], labels [2, Y]) is weighted by (D, U)."""

    def objective(logits):
        ratios = jnp.broadcast_to(jax.nn.log_softmax(logits) - jnp.log(REF), (2, len(REF)))
        return loss(ratios, jnp.broadcast_to(both, ratios.shape))

    @jax.jit
    def run(logits):
        step = lambda _, x: x - rate * jax.grad(objective)(x)  # noqa: E731
        return jax.nn.softmax(jax.lax.fori_loop(0, steps, step, logits))

    return np.asarray(run(jnp.log(REF)), np.float64)


def test_kto_rests_where_the_majority_is_and_nowhere_else():
    """π(y) ∝ c(y)·s'(β(log π/ref - z0)), c = λ_D·D - λ_U·U, on the answers with c > 0; the others get nothing, those
    without labels (the last) included."""
    D = np.asarray([0.25, 0.2, 0.05, 0.05, 0.0])
    U = np.asarray([0.05, 0.1, 0.15, 0.15, 0.0])
    data, z0, weights = jnp.asarray(np.stack([D, U]), jnp.float32), 0.3, (1.2, 0.9)

    def loss(ratios, labels):
        return jnp.sum(data * kto_loss(ratios, labels, z0, BETA, *weights))

    policy = descend(loss)
    c = weights[0] * D - weights[1] * U
    assert np.all(policy[2:4] < 1e-6)
    assert policy[4] < 1e-3  # it goes as 1/steps
    kept = policy[:2] / policy[:2].sum()
    gain = 1 / (1 + np.exp(-BETA * (np.log(policy[:2] / REF[:2]) - z0)))
    expected = c[:2] * gain * (1 - gain)
    np.testing.assert_allclose(kept, expected / expected.sum(), atol=2e-3)
    assert abs(kept[0] - 0.25 / 0.45) > 0.02  # not merely the share of desirable answers


def test_bco_with_a_fixed_delta_recovers_the_density_ratio():
    """β·log(π/ref) = δ + log(D/U) on labelled answers; the one without labels takes the rest."""
    D = np.asarray([0.2, 0.1, 0.05, 0.15, 0.0])
    U = np.asarray([0.1, 0.1, 0.2, 0.1, 0.0])
    data, delta = jnp.asarray(np.stack([D, U]), jnp.float32), -0.2

    def loss(ratios, labels):
        return jnp.sum(data * bco_loss(ratios, labels, delta, BETA))

    policy = descend(loss)
    rewards = BETA * np.log(policy / REF)
    np.testing.assert_allclose(rewards[:4], delta + np.log(D[:4] / U[:4]), atol=1e-3)
    expected = REF[:4] * (D[:4] / U[:4]) ** (1 / BETA) * np.exp(delta / BETA)
    assert expected.sum() < 0.9
    np.testing.assert_allclose(policy[4], 1 - expected.sum(), atol=1e-3)


def test_bco_without_unseen_answers_is_the_regularised_optimum_where_delta_fits():
    """δ = -β log Σ ref·(D/U)^(1/β) makes it exact: π ∝ ref·(D/U)^(1/β)."""
    D = np.asarray([0.15, 0.1, 0.05, 0.1, 0.1])
    U = np.asarray([0.05, 0.1, 0.15, 0.1, 0.1])
    data = jnp.asarray(np.stack([D, U]), jnp.float32)
    tilted = REF * (D / U) ** (1 / BETA)
    delta = float(-BETA * np.log(tilted.sum()))

    def loss(ratios, labels):
        return jnp.sum(data * bco_loss(ratios, labels, delta, BETA))

    np.testing.assert_allclose(descend(loss), tilted / tilted.sum(), atol=1e-4)


@pytest.mark.parametrize("desirable", [0.4, 0.6])
def test_bcos_delta_drifts_where_labels_are_out_of_balance(desirable):
    """Its mean reward is δ plus the data's mean log-odds: with more undesirable answers it falls on and on."""
    D, U = desirable * np.full(5, 0.2), (1 - desirable) * np.full(5, 0.2)
    D[4] = U[4] = 0
    data = jnp.asarray(np.stack([D, U]) / (D + U).sum(), jnp.float32)

    @jax.jit
    def run(logits):
        def step(carry, _):
            logits, delta, count = carry

            def objective(x):
                ratios = jnp.broadcast_to(jax.nn.log_softmax(x) - jnp.log(REF), (2, 5))
                labels = jnp.broadcast_to(both, ratios.shape)
                rewards = BETA * jax.lax.stop_gradient(ratios)
                now = delta + (jnp.sum(data * rewards) - delta) / (count + 1.0)
                return jnp.sum(data * bco_loss(ratios, labels, now, BETA)), now

            gradient, now = jax.grad(objective, has_aux=True)(logits)
            return (logits - 4.0 * gradient, now, count + 1.0), now

        return jax.lax.scan(step, (logits, jnp.float32(0), jnp.float32(0)), None, 4000)

    (logits, _, _), deltas = run(jnp.log(REF))
    labelled = float(jnp.sum(jax.nn.softmax(logits)[:4]))
    if desirable < 0.5:
        assert deltas[-1] < deltas[400] - 0.3 < deltas[0]
        assert labelled < 0.2  # of 0.75 in the reference
    else:
        assert deltas[-1] > 0.1
        assert labelled > 0.99
