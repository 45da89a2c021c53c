"""Every algorithm on ranked answers: how a batch is laid out, divided or spread changes nothing."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DESCENT, MODEL, assert_close, lm_params, one_step

from jrlhf.algorithms import FROM_PAIRS
from jrlhf.algorithms.cpo import CPOConfig
from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.orpo import ORPOConfig
from jrlhf.algorithms.ranked_dpo import RankedDPOConfig
from jrlhf.algorithms.simpo import SimPOConfig
from jrlhf.config import UserError
from jrlhf.metrics import check_name
from jrlhf.models.config import LoRAConfig
from jrlhf.models.transformer import Model
from jrlhf.ops.pairs import pair_logprobs
from jrlhf.ops.reference import refreshed_reference
from jrlhf.types import PairBatch, RankedBatch

KEY = jax.random.key(0)
ROWS = 8
VOCABULARY = 32


class Bigrams:
    """A model small enough to be compiled at once: the logits of a token are a row of its predecessor."""

    base = property(lambda self: self)

    def whole(self, trained, frozen):
        return trained

    def logprobs(self, params, tokens, mask):
        logps = jax.nn.log_softmax(params["table"])[tokens[:, :-1], tokens[:, 1:]]
        # What precedes an answer is of no account, padding least of all.
        return jnp.where(mask[:, :-1] & mask[:, 1:], logps, jnp.nan), None


BIGRAMS = Bigrams()


def bigrams(seed: int):
    rng = np.random.default_rng(seed)
    return {"table": jnp.asarray(rng.standard_normal((VOCABULARY, VOCABULARY)), jnp.float32)}


START = {BIGRAMS: (bigrams(0), bigrams(1)), MODEL: (lm_params(), lm_params(1))}
scored = {
    BIGRAMS: jax.jit(lambda batch: pair_logprobs(BIGRAMS, START[BIGRAMS][1], batch)),
    MODEL: jax.jit(lambda batch: pair_logprobs(MODEL, START[MODEL][1], batch)),
}


def make_batch(k=2, model=BIGRAMS, side="right", length=9, pad_id=0):
    """Pairs (k 2), or rankings of up to k answers with ties and padding answers among them."""
    rng = np.random.default_rng(0)
    tokens = np.full((ROWS, k, length), pad_id, np.int32)
    mask, response = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    ranks = rng.integers(1, k + 1, (ROWS, k)).astype(np.int32)
    ranks[0] = 1  # all tied
    ranks[1, -1] = 0
    for row in range(ROWS):
        prompt = rng.integers(0, VOCABULARY, rng.integers(1, 4))
        for answer in range(k):
            text = np.concatenate([prompt, rng.integers(0, VOCABULARY, rng.integers(1, 6))])
            if k > 2 and not ranks[row, answer]:
                continue
            start = length - len(text) if side == "left" else 0
            end = start + len(text)
            tokens[row, answer, start:end], mask[row, answer, start:end] = text, True
            response[row, answer, start + len(prompt) : end] = True
    nothing = np.zeros((ROWS, k), np.float32)
    batch = PairBatch(tokens, mask, response, nothing)
    batch = RankedBatch(*batch[:4], ranks) if k > 2 else batch
    return batch._replace(ref_logprobs=np.asarray(scored[model](batch)))


@functools.cache
def algorithm(config, model):
    return FROM_PAIRS[type(config)](config, model, DESCENT)


def step(config, batch, model=BIGRAMS, mesh=None):
    return one_step(algorithm(config, model), (*START[model], KEY), batch, mesh)


CONFIGS = {
    "sigmoid": DPOConfig(0.3),
    "rpo and wpo": DPOConfig(0.3, loss="ipo", length_normalized=True, rpo_alpha=0.5, wpo=True),
    "ld": DPOConfig(0.3, ld_alpha=0.5, reference="on_the_fly"),
    "aot": DPOConfig(0.3, loss="aot"),
    "aot_unpaired": DPOConfig(0.3, 0.1, loss="aot_unpaired", reference="on_the_fly"),
    "tr-dpo": DPOConfig(0.3, loss="apo_zero", reference="on_the_fly", ref_update_every=2, ref_mixup=0.5),
    "simpo": SimPOConfig(nll_coef=0.2),
    "orpo": ORPOConfig(0.5),
    "cpo": CPOConfig(),
    "plackett-luce": RankedDPOConfig(0.3),
    "bradley-terry": RankedDPOConfig(0.3, "bradley_terry", reference="on_the_fly"),
    "rao-kupper": RankedDPOConfig(0.3, "rao_kupper"),
    "davidson": RankedDPOConfig(0.3, "davidson"),
}


def batch_of(config, **layout):
    return make_batch(4 if config.learns_from == "rankings" else 2, **layout)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_microbatches_add_up_to_the_whole_batch(name, parts):
    config = CONFIGS[name]
    whole = step(config, batch_of(config))
    assert max(np.abs(x).max() for x in jax.tree.leaves(whole.gradient)) > 1e-3
    divided = step(replace(config, microbatches=parts), batch_of(config))
    assert_close((divided.metrics, divided.gradient), (whole.metrics, whole.gradient))
    for metric in whole.metrics:
        check_name(metric)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_and_the_order_of_rows_are_irrelevant(name):
    config = CONFIGS[name]
    whole = step(config, batch_of(config))
    order = np.random.default_rng(1).permutation(ROWS)
    for layout in (
        {"side": "left", "pad_id": 21},
        {"side": "left", "length": 12},
        {"length": 15, "pad_id": 3},
    ):
        other = step(config, jax.tree.map(lambda x: x[order], batch_of(config, **layout)))
        assert_close((other.metrics, other.gradient), (whole.metrics, whole.gradient))


DECODER = ("aot", "orpo", "plackett-luce")  # a coupled loss, one without a reference, rankings


@pytest.fixture(scope="module")
def decoded():
    """name -> (batch, what a whole step of the decoder does)"""

    @functools.cache
    def decoded(name):
        batch = batch_of(CONFIGS[name], model=MODEL)
        return batch, step(CONFIGS[name], batch, MODEL)

    return decoded


@pytest.mark.parametrize("name", DECODER)
def test_the_decoders_step_is_divided_and_laid_out_at_will(name, decoded):
    batch, whole = decoded(name)
    divided = step(replace(CONFIGS[name], microbatches=4), batch, MODEL)
    assert_close((divided.metrics, divided.gradient), (whole.metrics, whole.gradient))
    moved = step(CONFIGS[name], batch_of(CONFIGS[name], model=MODEL, side="left", pad_id=21), MODEL)
    assert_close((moved.metrics, moved.gradient), (whole.metrics, whole.gradient))
    rows = ROWS * batch.tokens.shape[1]
    assert f"f32[{rows},9," in whole.hlo
    assert f"f32[{rows},9," not in divided.hlo  # of a coupled loss neither


@pytest.mark.parametrize(
    ("name", "mesh"), [("aot", "long"), ("aot", "all"), ("orpo", "all"), ("plackett-luce", "all")]
)
def test_a_mesh_gives_the_same_gradient(name, mesh, decoded):
    batch, whole = decoded(name)
    spread = step(CONFIGS[name], batch, MODEL, mesh)
    assert_close((spread.metrics, spread.gradient), (whole.metrics, whole.gradient))


# --- the reference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [SimPOConfig(), ORPOConfig(), CPOConfig(), DPOConfig(reference_free=True)],
    ids=lambda c: type(c).__name__,
)
def test_no_reference_is_kept_or_read(config):
    state = algorithm(config, BIGRAMS).init(*START[BIGRAMS], KEY)
    assert state.ref_params is None
    assert state.extra == ()
    batch = make_batch()
    whole = step(config, batch)
    junk = step(config, batch._replace(ref_logprobs=np.full((ROWS, 2), np.nan, np.float32)))
    assert_close((junk.metrics, junk.gradient), (whole.metrics, whole.gradient))


@pytest.mark.parametrize("name", ["sigmoid", "rao-kupper"])
def test_scored_on_the_fly_or_before_the_reference_is_the_same(name):
    config, batch = CONFIGS[name], batch_of(CONFIGS[name])
    whole = step(config, batch)
    fly = step(
        replace(config, reference="on_the_fly"),
        batch._replace(ref_logprobs=np.zeros_like(batch.ref_logprobs)),
    )
    assert_close((fly.metrics, fly.gradient), (whole.metrics, whole.gradient))


LOSS_AT_REFERENCE = {  # where all log-ratios are 0
    DPOConfig(): math.log(2),
    DPOConfig(loss="hinge"): 1,
    DPOConfig(loss="exponential"): 1,
    DPOConfig(loss="discopop"): (math.log(2) + 1) / 2,
    DPOConfig(0.1, 0.2, loss="robust"): math.log(2),
    DPOConfig(0.1, loss="ipo"): 25,
    DPOConfig(0.1, loss="sppo_hard"): 50,
    DPOConfig(loss="nca_pair"): 2 * math.log(2),
    DPOConfig(loss="apo_zero"): 1,
    DPOConfig(loss="apo_down"): 1,
    DPOConfig(loss="aot"): math.log(2),
    DPOConfig(loss="aot_unpaired"): math.log(2),
}


@pytest.mark.parametrize("config", LOSS_AT_REFERENCE, ids=lambda c: c.loss)
def test_the_loss_where_the_policy_is_the_reference(config):
    params = bigrams(1)
    state = algorithm(config, BIGRAMS).init(params, params, KEY)
    _, metrics = jax.jit(algorithm(config, BIGRAMS).train_step)(state, make_batch())
    assert metrics["pref/loss"] == pytest.approx(LOSS_AT_REFERENCE[config], rel=1e-5)
    assert metrics["pref/margin"] == pytest.approx(0, abs=1e-6)


def test_a_refreshed_reference_follows_the_policy():
    """Gorbatovski et al. 2024: after every second update it is replaced, so that the loss is ln 2 again."""
    config = DPOConfig(0.3, reference="on_the_fly", ref_update_every=2)
    made = algorithm(config, BIGRAMS)
    state = made.init(bigrams(1), bigrams(1), KEY)
    assert state.ref_params is None  # what changes is saved with the state, not kept beside it
    update, batch, losses, policies = jax.jit(made.train_step), make_batch(), [], []
    for _ in range(5):
        policies.append(state.params["policy"])
        state, metrics = update(state, batch)
        losses.append(float(metrics["pref/loss"]))
    at_reference = [abs(loss - math.log(2)) < 1e-5 for loss in losses]
    assert at_reference == [True, False, True, False, True]
    assert_close(state.extra["reference"], policies[4])


def test_a_soft_refresh_mixes_and_keeps_the_references_type():
    ref, policy = {"a": jnp.array([0.0, 4.0], jnp.bfloat16)}, {"a": jnp.array([1.0, 8.0])}
    for step_, expected in ((0, [0, 4]), (1, [0, 4]), (3, [0.25, 5]), (4, [0, 4])):
        new = refreshed_reference(ref, policy, jnp.int32(step_), every=3, mixup=0.25)
        assert new["a"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(new["a"].astype(jnp.float32), expected)


def test_an_adapters_reference_is_its_base_and_is_not_refreshed():
    adapted = Model(replace(MODEL.config, lora=LoRAConfig(rank=2)))
    with pytest.raises(UserError, match="ref_update_every is not possible with adapters"):
        FROM_PAIRS[DPOConfig](DPOConfig(reference="on_the_fly", ref_update_every=1), adapted, DESCENT)


# --- rankings -----------------------------------------------------------------------------------------------------


def test_a_ranking_of_two_is_dpo():
    """Plackett-Luce and Bradley-Terry agree on pairs; where nothing ties, so does Rao-Kupper as ties become rare."""
    pairs = make_batch()
    dpo = step(CONFIGS["sigmoid"], pairs)
    ranked = RankedBatch(*pairs[:4], np.tile(np.array([1, 2], np.int32), (ROWS, 1)))
    turned = jax.tree.map(lambda x: x[:, ::-1].copy(), ranked)
    for likelihood in ("plackett_luce", "bradley_terry"):
        for batch in (ranked, turned):
            found = step(RankedDPOConfig(0.3, likelihood), batch)
            assert_close((found.metrics, found.gradient), (dpo.metrics, dpo.gradient))
    rare = step(RankedDPOConfig(0.3, "rao_kupper", tie_rate=1e-4), ranked)
    assert rare.metrics["pref/loss"] == pytest.approx(dpo.metrics["pref/loss"], abs=1e-3)


@pytest.mark.parametrize("likelihood", ["rao_kupper", "davidson"])
def test_equal_answers_tie_as_often_as_the_config_says(likelihood):
    """Chen et al. 2024 choose nu = 3 and nu = 1, at which half of the comparisons of equal answers are ties."""
    params = bigrams(1)
    batch = make_batch(4)
    for rate in (0.5, 0.2):
        made = algorithm(RankedDPOConfig(0.3, likelihood, rate), BIGRAMS)
        state = made.init(params, params, KEY)
        tied = batch._replace(ranks=np.ones_like(batch.ranks) * (batch.mask.any(axis=2)))
        _, metrics = jax.jit(made.train_step)(state, tied)
        assert metrics["pref/loss"] == pytest.approx(-math.log(rate), rel=1e-5)
        assert metrics["pref/acc"] == 0  # no ordered pair


def test_metrics_of_rankings_are_over_their_ordered_pairs():
    batch, config = make_batch(4), CONFIGS["plackett-luce"]
    logps = np.asarray(jax.jit(lambda b: pair_logprobs(BIGRAMS, START[BIGRAMS][0], b))(batch), np.float64)
    rewards = config.beta * (logps - batch.ref_logprobs)
    right, gaps, chosen = [], [], []
    for row, ranks in enumerate(batch.ranks):
        pairs = [(i, j) for i in range(4) for j in range(4) if 0 < ranks[i] < ranks[j]]
        if pairs:
            right.append(np.mean([rewards[row, i] > rewards[row, j] for i, j in pairs]))
            gaps.append(np.mean([rewards[row, i] - rewards[row, j] for i, j in pairs]))
            chosen.append(np.mean([logps[row, i] for i, _ in pairs]))
    assert 0 < len(right) < ROWS
    metrics = step(config, batch).metrics
    assert metrics["pref/acc"] == pytest.approx(np.mean(right), abs=1e-6)
    assert metrics["pref/margin"] == pytest.approx(np.mean(gaps), rel=1e-4)
    assert metrics["pref/logp_chosen"] == pytest.approx(np.mean(chosen), rel=1e-5)


# --- implicit rewards and mistakes ----------------------------------------------------------------------------------


def test_implicit_rewards_say_which_answer_they_prefer():
    """A long answer of likely tokens: SimPO and ORPO prefer it for its tokens, CPO the short one for its sum."""
    batch = make_batch()
    params = START[BIGRAMS][0]
    logps = np.asarray(jax.jit(lambda b: pair_logprobs(BIGRAMS, params, b))(batch), np.float64)
    mean = logps / batch.response_mask.sum(axis=2)
    p = np.exp(mean)
    expected = {"simpo": 2.0 * mean, "orpo": np.log(p / (1 - p)), "cpo": 0.1 * logps}
    for name, rewards in expected.items():
        metrics = step(CONFIGS[name], batch).metrics
        assert metrics["pref/margin"] == pytest.approx(np.mean(rewards[:, 0] - rewards[:, 1]), rel=1e-4), name
        assert metrics["pref/acc"] == np.mean(rewards[:, 0] > rewards[:, 1])


MISTAKES = {
    "an unknown loss": (
        lambda: DPOConfig(loss="sigmod"),
        "loss 'sigmod' is unknown. Did you mean 'sigmoid'?",
    ),
    "smoothing that is not read": (
        lambda: DPOConfig(0.1, 0.1, loss="ipo"),
        "loss 'ipo' reads no label_smoothing",
    ),
    "no flips": (lambda: DPOConfig(loss="robust"), "loss 'robust' asks how often labels are flipped"),
    "no flips for EXO": (lambda: DPOConfig(loss="exo_pair"), "loss 'exo_pair' asks how often"),
    "a divergence of whole rewards": (
        lambda: DPOConfig(loss="nca_pair", divergence="forward_kl"),
        "needs a loss of",
    ),
    "ld and lengths": (
        lambda: DPOConfig(ld_alpha=0.5, length_normalized=True),
        "ld_alpha leaves no plain sum",
    ),
    "wpo and sorting": (lambda: DPOConfig(loss="aot", wpo=True), "wpo weighs pairs"),
    "a reference that is not there": (
        lambda: DPOConfig(reference_free=True, reference="on_the_fly"),
        "no reference",
    ),
    "a refresh of what is precomputed": (
        lambda: DPOConfig(ref_update_every=2),
        "set reference to 'on_the_fly'",
    ),
    "a mixture without a refresh": (lambda: DPOConfig(ref_mixup=0.5), "ref_mixup is read where"),
    "no mixture": (lambda: DPOConfig(ref_mixup=0.0), r"ref_mixup must be in \(0, 1\]"),
    "a negative RPO": (lambda: DPOConfig(rpo_alpha=-1.0), "rpo_alpha must be zero or more"),
    "an unknown likelihood": (lambda: RankedDPOConfig(likelihood="davidsen"), "Did you mean 'davidson'?"),
    "always ties": (lambda: RankedDPOConfig(tie_rate=1.0), "tie_rate must be between 0 and 1"),
    "no odds": (lambda: ORPOConfig(0.0), "odds_coef must be positive"),
    "a negative margin": (lambda: SimPOConfig(gamma=-1.0), "gamma must be zero or more"),
    "half of the labels": (lambda: CPOConfig(label_smoothing=0.5), r"label_smoothing must be in \[0, 0.5\)"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name):
    make, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        make()
