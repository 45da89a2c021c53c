"""Algorithms without a critic: losses against TRL's, advantages against plain loops, updates on any mesh.

Where only arithmetic is at stake the policy is a table: one distribution over tokens, whatever came before.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import DESCENT, MODEL, assert_close, largest_difference, lm_params, one_step

from jrlhf.algorithms import FROM_ROLLOUTS
from jrlhf.algorithms.cispo import CISPOConfig
from jrlhf.algorithms.dapo import DAPOConfig
from jrlhf.algorithms.dr_grpo import DrGRPOConfig
from jrlhf.algorithms.grpo import GRPOConfig
from jrlhf.algorithms.gspo import GSPOConfig
from jrlhf.algorithms.online_dpo import OnlineDPOConfig
from jrlhf.algorithms.raft import RAFTConfig
from jrlhf.algorithms.reinforce import REINFORCEConfig
from jrlhf.algorithms.reinforce_plus_plus import REINFORCEPlusPlusConfig
from jrlhf.algorithms.remax import ReMaxConfig
from jrlhf.algorithms.rloo import RLOOConfig
from jrlhf.config import UserError
from jrlhf.metrics import check_name
from jrlhf.ops.kl import full_kl
from jrlhf.ops.on_policy import OnPolicyConfig, Policy, PolicyBatch, policy_objective, shares_of
from jrlhf.ops.policy_losses import cispo_loss, clipped_loss, gspo_loss, sequence_clipped_loss
from jrlhf.optim import Optimizer
from jrlhf.rollout.rollout import pad_prompts, rollout
from jrlhf.rollout.sampling import SamplingConfig, make_sampling
from jrlhf.types import Rollout

KEY = jax.random.key(0)
VOCAB, ROWS, PROMPT, RESPONSE, GROUP = 6, 8, 2, 5, 4
STEEP = Optimizer(optax.sgd(3.0), lambda updates: jnp.float32(3.0), None)

# --- losses and gradients are TRL's -----------------------------------------------------------------------------

GOLDEN = np.load(Path(__file__).parent.parent / "golden" / "trl_policies.npz")
CLIP = functools.partial(clipped_loss, clip=0.2)
DAPO_CLIP = functools.partial(clipped_loss, clip=(0.2, 0.28))
K3 = {"kl": "k3", "beta": 0.3}
# name there: (loss, config, what TRL's number is multiplied by)
SAME_AS_TRL = {
    "grpo": (CLIP, OnPolicyConfig(normalise="sequence"), 1.0),
    "grpo_k3": (CLIP, OnPolicyConfig(normalise="sequence", **K3), 1.0),
    "grpo_k3_ratio": (CLIP, OnPolicyConfig(normalise="sequence", kl_ratio=True, **K3), 1.0),
    "grpo_entropy": (CLIP, OnPolicyConfig(normalise="sequence", entropy_coef=0.2), 1.0),
    "bnpo_k3": (CLIP, OnPolicyConfig(normalise="token", **K3), 1.0),
    "dr_grpo": (CLIP, OnPolicyConfig(normalise="constant"), 9 / 5),  # TRL's slots and the rollout's
    "dapo": (DAPO_CLIP, OnPolicyConfig(normalise="token"), 1.0),
    "dapo_weighted": (DAPO_CLIP, OnPolicyConfig(normalise="token"), 1.0),
    "gspo": (functools.partial(gspo_loss, clip=(0.03, 0.04)), OnPolicyConfig(normalise="sequence"), 1.0),
    # TRL's epsilon_high bounds the weight itself, the paper's 1 + epsilon_high does.
    "cispo": (functools.partial(cispo_loss, clip=(1.0, 0.5)), OnPolicyConfig(normalise="token"), 1.0),
    "rloo": (functools.partial(sequence_clipped_loss, clip=0.2), OnPolicyConfig(normalise="sequence"), 1.0),
}


@pytest.mark.parametrize("name", SAME_AS_TRL)
def test_losses_and_gradients_are_those_of_trl(name):
    loss, config, scale = SAME_AS_TRL[name]
    config = replace(
        config, minibatches=2, importance_cap=1e3 if "weighted" in name else 0.0
    )  # old ones are read
    given = {
        k: GOLDEN[k].astype(np.float32)
        for k in ("logprobs", "old_logprobs", "ref_logprobs", "entropy", "weights")
    }
    mask = GOLDEN["mask"]
    rows = len(mask)
    batch = PolicyBatch(
        tokens=np.zeros((rows, 2 + mask.shape[1]), np.int32),
        mask=np.ones((rows, 2 + mask.shape[1]), bool),
        response_mask=mask,
        kept=np.ones(rows, bool),
        # What is masked must not be read, whatever it is.
        sampler_logprobs=np.where(mask, given["old_logprobs"] - np.log(given["weights"]), np.nan),
        logprobs=np.where(mask, given["old_logprobs"], np.nan),
        ref_logprobs=np.where(mask, given["ref_logprobs"], np.inf),
        rewards=np.ones_like(given["weights"]),
        advantages=np.where(mask, GOLDEN["advantages"].astype(np.float32)[:, None], np.nan),
        extra=(),
        metrics={},
    )
    shares = shares_of(config.normalise, mask, batch.kept)
    policy = Policy(lambda params, *_: (params["logprobs"], params["entropy"], ()), lambda *_: None)

    def objective(params):
        return policy_objective(config, loss, policy, params, batch, shares, jnp.float32(config.beta), 1.0)[0]

    params = {
        "logprobs": jnp.where(mask, given["logprobs"], 50.0),
        "entropy": jnp.where(mask, given["entropy"], jnp.nan),
    }
    value, gradient = jax.value_and_grad(objective)(params)
    np.testing.assert_allclose(value, scale * GOLDEN[f"{name}/loss"], atol=1e-5)
    np.testing.assert_allclose(gradient["logprobs"], scale * GOLDEN[f"{name}/grad"], atol=1e-5)
    np.testing.assert_allclose(gradient["entropy"], scale * GOLDEN[f"{name}/entropy_grad"], atol=1e-5)


# --- a table for a policy -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A language model whose parameters are one row of logits."""

    @property
    def base(self):
        return self

    def whole(self, trained, frozen):
        return trained

    def logprobs(self, params, tokens, mask, start=1, temperature=1.0):
        logps = jax.nn.log_softmax(params / temperature)
        entropy = -jnp.sum(jnp.exp(logps) * logps)
        return logps[tokens[:, start:]], jnp.full(tokens[:, start:].shape, entropy)

    def divergence(self, params, other, tokens, mask, start=1, temperature=1.0):
        return jnp.full(tokens[:, start:].shape, full_kl(params / temperature, other / temperature))


@pytest.fixture(scope="module")
def tables():
    """policy, reference policy."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(VOCAB), jnp.float32) for _ in range(2)]


@pytest.fixture(scope="module")
def samples(tables):
    """(rollout, scores): two groups of four answers of 1 to 5 tokens; two did not end."""
    rng = np.random.default_rng(1)
    lengths = np.array([1, 2, 3, 5, 4, 5, 2, 5])
    ended = np.array([True, True, True, False, True, False, True, True])
    tokens = rng.integers(0, VOCAB, (ROWS, PROMPT + RESPONSE)).astype(np.int32)
    response = np.arange(RESPONSE) < lengths[:, None]
    mask = np.concatenate([np.ones((ROWS, PROMPT), bool), response], axis=1)
    logprobs = np.where(response, jax.nn.log_softmax(tables[0])[tokens[:, PROMPT:]], 0.0).astype(np.float32)
    scores = rng.standard_normal(ROWS).astype(np.float32)
    return jax.tree.map(jnp.asarray, (Rollout(tokens, mask, response, logprobs, ended), scores))


jitted = functools.cache(jax.jit)


@functools.cache
def make(config, optimizer=DESCENT, model=Table(), temperature=1.0):
    return FROM_ROLLOUTS[type(config)](config, model, optimizer, temperature)


def scored_before(config, monkeypatch, optimizer=DESCENT, model=Table(), temperature=1.0):
    """The same algorithm, jitted, which scores its samples before the update even where the update could tell."""
    made = make.__wrapped__(config, optimizer, model, temperature)

    def before(function):
        def traced(*args):
            with monkeypatch.context() as patch:
                patch.setattr(OnPolicyConfig, "scored_in_update", False)
                return function(*args)

        return jax.jit(traced)

    return made._replace(make_batch=before(made.make_batch), train_step=before(made.train_step))


def batch_of(config, tables, samples, *more):
    algorithm = make(config)
    return jax.device_get(jitted(algorithm.make_batch)(algorithm.init(*tables, KEY), *samples, *more))


def log_ratio(tables, samples):
    """log(π/ref) of every token, 0 where masked."""
    policy, ref = (np.asarray(jax.nn.log_softmax(t)) for t in tables)
    tokens = np.asarray(samples[0].tokens)[:, PROMPT:]
    return np.where(samples[0].response_mask, policy[tokens] - ref[tokens], 0.0)


def test_group_algorithms_compare_an_answer_with_the_others(tables, samples):
    scores = np.asarray(samples[1]).reshape(-1, GROUP)
    centred = scores - scores.mean(axis=1, keepdims=True)
    scaled = centred / (scores.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    mask = np.asarray(samples[0].response_mask)
    expected = {
        GRPOConfig(group_size=GROUP): scaled,
        GRPOConfig(group_size=GROUP, scale="none"): centred,
        GRPOConfig(group_size=GROUP, scale="batch"): centred / (scores.std(ddof=1) + 1e-4),
        DrGRPOConfig(group_size=GROUP): centred,
        GSPOConfig(group_size=GROUP): scaled,
        CISPOConfig(group_size=GROUP): scaled,
        DAPOConfig(group_size=GROUP, overlong_buffer=0.0): scaled,
    }
    for config, advantages in expected.items():
        got = batch_of(config, tables, samples).advantages
        np.testing.assert_allclose(got, advantages.reshape(-1, 1) * mask, atol=1e-5, err_msg=str(config))


def test_the_penalty_in_the_reward_comes_before_the_baseline(tables, samples):
    """RLOO, REINFORCE, REINFORCE++ and ReMax, row by row and token by token."""
    beta = 0.3
    ratio, mask = log_ratio(tables, samples), np.asarray(samples[0].response_mask)
    scores = np.asarray(samples[1])
    total = scores - beta * ratio.sum(axis=1)
    others = np.array(
        [
            np.mean([total[j] for j in range(i - i % GROUP, i - i % GROUP + GROUP) if j != i])
            for i in range(ROWS)
        ]
    )
    got = batch_of(RLOOConfig(group_size=GROUP, beta=beta), tables, samples).advantages
    np.testing.assert_allclose(got, (total - others)[:, None] * mask, atol=1e-5)

    got = batch_of(REINFORCEConfig(beta=beta), tables, samples).advantages
    others = (total.sum() - total) / (ROWS - 1)
    np.testing.assert_allclose(got, (total - others)[:, None] * mask, atol=1e-5)
    got = batch_of(REINFORCEConfig(beta=beta, baseline="none"), tables, samples).advantages
    np.testing.assert_allclose(got, total[:, None] * mask, atol=1e-5)

    to_go = np.array([[scores[i] - beta * ratio[i, t:].sum() for t in range(RESPONSE)] for i in range(ROWS)])
    greedy = np.linspace(-1, 1, ROWS).astype(np.float32)
    got = batch_of(ReMaxConfig(beta=beta), tables, samples, jnp.asarray(greedy)).advantages
    np.testing.assert_allclose(got, (to_go - greedy[:, None]) * mask, atol=1e-5)

    got = batch_of(REINFORCEPlusPlusConfig(beta=beta), tables, samples).advantages
    whitened = (to_go - to_go[mask].mean()) / np.sqrt(to_go[mask].var() + 1e-8)
    np.testing.assert_allclose(got, whitened * mask, atol=1e-5)
    config = REINFORCEPlusPlusConfig(beta=beta, group_size=GROUP, group_baseline=True)
    got = batch_of(config, tables, samples).advantages
    to_go = to_go - np.repeat(total.reshape(-1, GROUP).mean(axis=1), GROUP)[:, None]
    whitened = (to_go - to_go[mask].mean()) / np.sqrt(to_go[mask].var() + 1e-8)
    np.testing.assert_allclose(got, whitened * mask, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        GRPOConfig(group_size=GROUP),
        RLOOConfig(group_size=GROUP),
        REINFORCEPlusPlusConfig(group_size=GROUP, group_baseline=True, minibatches=1),
    ],
    ids=lambda config: type(config).__name__,
)
def test_the_order_of_answers_in_a_group_is_irrelevant(config, tables, samples):
    order = np.array([2, 0, 3, 1, 5, 4, 7, 6])
    moved = jax.tree.map(lambda x: x[order], samples)
    before, after = batch_of(config, tables, samples), batch_of(config, tables, moved)
    np.testing.assert_allclose(after.advantages, before.advantages[order], atol=1e-6)
    assert_close(gradient(config, tables, after)[0], gradient(config, tables, before)[0])


def test_scores_are_clipped_and_punished_for_length(tables, samples):
    """Clipped first; then -1 for not ending, and a line over the last share of the slots (DAPO, eq. 13)."""
    config = REINFORCEConfig(
        beta=0.0,
        baseline="none",
        score_clip=0.5,
        missing_eos_penalty=1.0,
        overlong_buffer=0.6,
        overlong_penalty=2.0,
    )
    lengths = np.asarray(samples[0].response_mask).sum(axis=1)
    late = np.clip((lengths - 2) / 3, 0, 1)  # 0.6 of 5 slots: full score up to 2 tokens
    wanted = np.clip(np.asarray(samples[1]), -0.5, 0.5) - ~np.asarray(samples[0].ended) - 2.0 * late
    np.testing.assert_allclose(batch_of(config, tables, samples).advantages[:, 0], wanted, atol=1e-6)


def test_raft_takes_the_best_and_expert_iteration_what_is_good_enough(tables, samples):
    scores = np.asarray(samples[1])
    best = scores.reshape(-1, GROUP).argmax(axis=1) + np.array([0, GROUP])
    batch = batch_of(RAFTConfig(group_size=GROUP), tables, samples)
    np.testing.assert_array_equal(batch.tokens, np.asarray(samples[0].tokens)[best])
    np.testing.assert_array_equal(batch.response_mask, np.asarray(samples[0].response_mask)[best])
    assert batch.metrics["reward/score/mean"] == pytest.approx(scores.mean(), abs=1e-6)  # of all answers
    batch = batch_of(RAFTConfig(group_size=1, accept="above", threshold=0.3), tables, samples)
    np.testing.assert_array_equal(batch.kept, scores >= 0.3)
    assert batch.metrics["rollout/accepted"] == pytest.approx(np.mean(scores >= 0.3))


def test_raft_takes_the_best_of_those_that_may_be_learned_from(tables, samples):
    """With truncated answers left out, the best of those that ended; a prompt without any teaches nothing."""
    scores = np.asarray(samples[1]).copy()
    ended = np.array([True, True, False, False, False, False, False, False])
    scores[2] = 9.0  # the best, and cut off
    rollout_ = samples[0]._replace(ended=jnp.asarray(ended))
    batch = batch_of(
        RAFTConfig(group_size=GROUP, mask_truncated=True), tables, (rollout_, jnp.asarray(scores))
    )
    np.testing.assert_array_equal(batch.tokens[0], np.asarray(samples[0].tokens)[scores[:2].argmax()])
    np.testing.assert_array_equal(batch.kept, [True, False])
    assert batch.metrics["rollout/accepted"] == pytest.approx(1 / ROWS)


def test_online_dpo_pairs_the_best_with_the_worst(tables, samples):
    config = OnlineDPOConfig(group_size=GROUP)
    scores = samples[1].at[GROUP:].set(0.5)  # the second prompt's answers are all alike
    batch = batch_of(config, tables, (samples[0], scores))
    first = np.asarray(scores)[:GROUP]
    wanted = np.asarray(samples[0].tokens)[[first.argmax(), first.argmin()]]
    np.testing.assert_array_equal(batch.tokens[0], wanted)
    np.testing.assert_array_equal(batch.kept, [[True, True], [False, False]])
    algorithm = make(config)
    state = algorithm.init(tables[0], tables[0], KEY)  # the policy is the reference
    _, metrics = jitted(algorithm.train_step)(state, batch._replace(ref_logprobs=batch.logprobs))
    assert metrics["pref/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert metrics["pref/ordered"] == 0.5


# --- the update -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        GRPOConfig(group_size=GROUP, epochs=2),
        DrGRPOConfig(group_size=GROUP, epochs=2),
        GSPOConfig(group_size=GROUP, epochs=2, minibatches=1),
        CISPOConfig(group_size=GROUP, epochs=2, minibatches=1, clip_high=0.1),
        RLOOConfig(group_size=GROUP, epochs=2),
        REINFORCEPlusPlusConfig(epochs=2, minibatches=1),
    ],
    ids=lambda config: type(config).__name__,
)
def test_old_log_probabilities_are_old_so_that_the_second_epoch_is_clipped(
    config, tables, samples, monkeypatch
):
    """The first epoch's ratios are all 1. In the second the policy has moved, and the clip binds somewhere."""
    batch = batch_of(config, tables, samples)
    first, both = scored_before(replace(config, epochs=1), monkeypatch, STEEP), make(config, STEEP)
    runs = {
        "first": jax.device_get(first.train_step(first.init(*tables, KEY), batch)[1]),
        "both": jax.device_get(jitted(both.train_step)(both.init(*tables, KEY), batch)[1]),
    }
    assert runs["first"]["policy/clip_frac"] == 0
    assert runs["first"]["policy/ratio_max"] == pytest.approx(1, abs=1e-6)
    assert runs["both"]["policy/clip_frac"] > 0.05
    assert runs["both"]["policy/ratio_max"] > 1.05


def gradient(config, tables, batch, optimizer=DESCENT):
    """Under descent at rate 1, the gradient of one update."""
    algorithm = make(config, optimizer)
    state, metrics = jitted(algorithm.train_step)(algorithm.init(*tables, KEY), batch)
    return np.asarray(tables[0] - state.params["policy"]), metrics


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "full"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_penalty_in_the_loss_has_the_gradient_of_its_estimator(kl, level, tables, samples):
    if (kl, level) == ("full", "sequence"):
        with pytest.raises(UserError, match="kl_level"):
            GRPOConfig(kl="full", kl_level="sequence")
        return
    config = GRPOConfig(group_size=GROUP, beta=0.7, kl=kl, kl_level=level)
    batch = batch_of(config, tables, samples)
    mask = np.asarray(samples[0].response_mask, np.float32)
    tokens = np.asarray(samples[0].tokens)[:, PROMPT:]
    estimators = {
        "k1": lambda p, r: p - r,
        "k2": lambda p, r: (p - r) ** 2 / 2,
        "k3": lambda p, r: jnp.exp(r - p) - 1 - (r - p),
    }

    def penalty(policy):
        logps, ref = jax.nn.log_softmax(policy), jax.nn.log_softmax(tables[1])
        if kl == "full":
            return jnp.sum(jnp.exp(logps) * (logps - ref))  # alike in every state of the table
        logp, ref = logps[tokens] * mask, ref[tokens] * mask
        if level == "sequence":
            return jnp.mean(estimators[kl](logp.sum(axis=1), ref.sum(axis=1)))
        return jnp.mean(jnp.sum(estimators[kl](logp, ref) * mask, axis=1) / mask.sum(axis=1))

    with_it, metrics = gradient(config, tables, batch)
    without, _ = gradient(GRPOConfig(group_size=GROUP, beta=0.0), tables, batch)
    np.testing.assert_allclose(with_it - without, 0.7 * jax.grad(penalty)(tables[0]), atol=2e-6)
    assert metrics["kl/loss"] == pytest.approx(float(penalty(tables[0])), abs=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3])  # without a penalty in the reward the update tells the weights
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_importance_weights(beta, level, tables, samples):
    """The sampler was another policy by up to 0.6 nats a token: every weight is exp of it, up to the cap."""
    sampled = samples[0]
    shift = np.where(sampled.response_mask, np.linspace(-0.6, 0.6, RESPONSE)[None], 0.0).astype(np.float32)
    other = (sampled._replace(logprobs=sampled.logprobs - shift), samples[1])
    plain = REINFORCEConfig(beta=beta)
    weighted = replace(plain, importance_cap=1.2, importance_level=level)
    assert weighted.scored_in_update == (beta == 0.0)
    log_weight = shift if level == "token" else np.sum(shift, axis=1, keepdims=True) + np.zeros_like(shift)
    batch = batch_of(plain, tables, other)
    by_hand = batch._replace(advantages=batch.advantages * np.minimum(np.exp(log_weight), 1.2))
    expected = gradient(plain, tables, by_hand)[0]
    assert_close(gradient(weighted, tables, batch_of(weighted, tables, other))[0], expected)
    assert largest_difference(gradient(plain, tables, batch)[0], expected) > 0.01


def test_truncated_answers_can_be_left_out(tables, samples):
    """Their tokens have no gradient and do not count in any mean: the same as a batch without them."""
    config = REINFORCEConfig(beta=0.2, kl="k2", mask_truncated=True, entropy_coef=0.1)
    batch = batch_of(config, tables, samples)
    ended = np.flatnonzero(np.asarray(samples[0].ended))
    alone = jax.tree.map(lambda x: x[ended], batch._replace(metrics=None))._replace(metrics=batch.metrics)
    assert_close(gradient(config, tables, batch)[0], gradient(config, tables, alone)[0])
    everything = replace(config, mask_truncated=False)
    assert (
        largest_difference(
            gradient(everything, tables, batch_of(everything, tables, samples))[0],
            gradient(config, tables, batch)[0],
        )
        > 0.01
    )


@pytest.mark.parametrize("mixup", [1.0, 0.25])
def test_the_reference_follows_the_policy(mixup, tables, samples):
    """Every second step it is moved towards the policy; the penalty is to the moved one, the start stays as it was."""
    config = REINFORCEConfig(ref_update_every=2, ref_mixup=mixup)
    algorithm = make(config)
    state = algorithm.init(*tables, KEY)
    assert state.ref_params is None
    references = [np.asarray(state.extra["reference"])]
    for _ in range(3):
        batch = jitted(algorithm.make_batch)(state, *samples)
        state, _ = jitted(algorithm.train_step)(state, batch)
        references.append(np.asarray(state.extra["reference"]))
        if state.step == 2:
            moved = mixup * np.asarray(state.params["policy"]) + (1 - mixup) * references[0]
    np.testing.assert_array_equal(references[1], references[0])
    np.testing.assert_allclose(references[2], moved, atol=1e-6)
    np.testing.assert_array_equal(references[3], references[2])
    expected = np.asarray(jax.nn.log_softmax(references[3]))[np.asarray(samples[0].tokens)[:, PROMPT:]]
    got = jitted(algorithm.make_batch)(state, *samples).ref_logprobs
    np.testing.assert_allclose(got, expected, atol=1e-5)


# --- the decoder --------------------------------------------------------------------------------------------------

DECODER_ROWS, TEMPERATURE = 16, 0.8


@pytest.fixture(scope="module")
def decoded():
    rng = np.random.default_rng(3)
    ids = [rng.integers(4, 30, n).tolist() for n in rng.integers(2, 6, DECODER_ROWS // 4) for _ in range(4)]
    sampling = make_sampling(SamplingConfig(max_new_tokens=6, temperature=TEMPERATURE), (1, 2, 3), 0)
    samples = rollout(MODEL, lm_params(0), pad_prompts(ids, 5, 0), jax.random.key(5), sampling)
    scores = jnp.asarray(rng.standard_normal(DECODER_ROWS), jnp.float32)
    return jax.device_get((samples, scores))


DECODER_CONFIGS = [
    GRPOConfig(group_size=4, entropy_coef=0.01),
    DAPOConfig(group_size=4, beta=0.1, kl="full", minibatches=1),
    GSPOConfig(group_size=4, minibatches=1),
    RLOOConfig(group_size=4),
    OnlineDPOConfig(group_size=4),
]


def padded(batch: PolicyBatch, before: int, after: int) -> PolicyBatch:
    """More slots before the prompts and after the answers, with other tokens in all that is padding."""

    def pad(x, first):
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(first, after)])

    of_tokens = ("response_mask", "sampler_logprobs", "logprobs", "ref_logprobs", "rewards", "advantages")
    mask = pad(batch.mask, before)
    return batch._replace(
        tokens=np.where(mask, pad(batch.tokens, before), 19),
        mask=mask,
        **{name: pad(getattr(batch, name), 0) for name in of_tokens},
    )


@pytest.mark.parametrize(
    "config",
    [
        GRPOConfig(group_size=4, microbatches=2, length_buckets=2, kl_ratio=True),
        GRPOConfig(group_size=4, share_prompts=True, microbatches=2, importance_cap=1.1, entropy_coef=0.1),
        DAPOConfig(group_size=4, minibatches=1, importance_cap=1.1, importance_level="sequence"),
    ],
    ids=["buckets", "shared", "sequences"],
)
def test_the_only_update_of_a_batch_scores_it_as_a_pass_before_it_would(config, decoded, monkeypatch):
    """One forward pass less: the same step, and the same numbers about the samples."""
    shift = np.random.default_rng(0).normal(0.0, 0.3, decoded[0].logprobs.shape).astype(np.float32)
    samples = (decoded[0]._replace(logprobs=decoded[0].logprobs + shift), decoded[1])
    runs = []
    plain = make(config, DESCENT, MODEL, TEMPERATURE)
    plain = plain._replace(make_batch=jitted(plain.make_batch), train_step=jitted(plain.train_step))
    for algorithm in (plain, scored_before(config, monkeypatch, DESCENT, MODEL, TEMPERATURE)):
        state = algorithm.init(lm_params(0), lm_params(1), KEY)
        batch = algorithm.make_batch(state, *samples)
        runs.append((batch, *algorithm.train_step(state, batch)))
    (batch, state, metrics), (_, other_state, other_metrics) = jax.device_get(runs)
    assert_close(state.params, other_state.params)
    ratios = {
        "policy/approx_kl",
        "policy/clip_frac",
        "policy/ratio_max",
    }  # all 1, which the second run confirms
    assert set(other_metrics) - set(metrics) == ratios
    assert other_metrics["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert_close(metrics, {name: x for name, x in other_metrics.items() if name not in ratios})
    np.testing.assert_array_equal(batch.logprobs, samples[0].logprobs)  # nothing was scored


def test_stop_kl_needs_a_second_update():
    with pytest.raises(UserError, match="stop_kl skips updates of an iteration after the first"):
        GRPOConfig(stop_kl=0.1)


@pytest.mark.parametrize("config", DECODER_CONFIGS, ids=lambda config: type(config).__name__)
def test_pieces_padding_order_and_devices_change_nothing(config, decoded):
    """Microbatches, what stands in padding, the order of rows, and all three mesh axes: one gradient."""
    algorithm = make(config, DESCENT, MODEL, TEMPERATURE)
    start = (lm_params(0), lm_params(1), KEY)
    batch = jax.device_get(jitted(algorithm.make_batch)(algorithm.init(*start), *decoded))
    for name in batch.metrics:
        check_name(name)
    batch = batch._replace(metrics={})
    whole = one_step(algorithm, start, batch)
    assert whole.metrics["policy/grad_norm"] > 1e-3
    for name in whole.metrics:
        check_name(name)

    pieces = make(replace(config, microbatches=2), DESCENT, MODEL, TEMPERATURE)
    order = np.random.default_rng(0).permutation(len(batch.tokens))
    moved = jax.tree.map(lambda x: x[order], padded(batch, before=3, after=2))
    spread = one_step(pieces, start, moved, "all")
    assert_close((spread.metrics, spread.gradient), (whole.metrics, whole.gradient), atol=2e-5)


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (GRPOConfig, {"group_size": 1}),
        (GRPOConfig, {"beta": -1.0}),
        (GRPOConfig, {"kl": "implicit"}),
        (OnlineDPOConfig, {"kl": "reward"}),
        (OnlineDPOConfig, {"entropy_coef": 0.1}),
        (RLOOConfig, {"kl_level": "sequence"}),
        (RLOOConfig, {"kl_ratio": True}),
        (GRPOConfig, {"kl_ratio": True, "kl": "k2"}),
        (GRPOConfig, {"clip": -0.2}),
        (CISPOConfig, {"clip_high": 0.0}),
        (RLOOConfig, {"normalise": "sum"}),
        (GSPOConfig, {"normalise": "token"}),
        (GRPOConfig, {"overlong_penalty": 2.0}),
        (GRPOConfig, {"importance_level": "sequence"}),
        (GRPOConfig, {"kl_horizon": 5}),
        (ReMaxConfig, {"resample_rounds": 2, "group_size": 2}),
        (OnlineDPOConfig, {"normalise": "sequence"}),
        (RAFTConfig, {"importance_cap": 2.0, "samples": "reference"}),
        (RAFTConfig, {"threshold": 0.5}),
        (RLOOConfig, {"ref_mixup": 0.5}),
        (RLOOConfig, {"overlong_buffer": 1.5}),
        (REINFORCEConfig, {"epochs": 2}),
        (REINFORCEConfig, {"resample_rounds": 2}),
        (RAFTConfig, {"kl": "k3"}),
        (RAFTConfig, {"samples": "reference", "beta": 0.1}),
    ],
)
def test_mistakes_are_named(config, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        config(**wrong)
