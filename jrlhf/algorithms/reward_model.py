"""The reward model: the SFT model, LM head off, a linear scalar head on, scored at the last response token.

Bradley-Terry on every pair of a prompt's K ranked answers, all in one batch element, divided by the number of pairs
(InstructGPT, Ouyang et al. 2022, equation 1; Stiennon et al. 2020). K = 2 is the ordinary pair. Beside it the
likelihood of the whole ranking, and regression on ratings.

Several heads on one trunk are an ensemble, each on its own bootstrap resample of the prompts; or one for the overall
preference and one for each criterion of a rubric; or one for each group of people, who need not want the same. Where
nobody says who belongs together, a mixture finds out: expectation-maximisation over K heads, in which a labeller is of
one unknown type (Chakraborty et al. 2024, MaxMin-RLHF, algorithm 2, there with hard assignments; Chen et al. 2024, PAL,
learn a point between the prototypes instead). Each head has its own loss; theirs is the mean.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.config import UserError, did_you_mean
from jrlhf.models.packed import packed_scores
from jrlhf.models.transformer import Model
from jrlhf.ops.masking import last_token_index, masked_mean, masked_var
from jrlhf.ops.microbatch import value_and_grad_rows
from jrlhf.ops.reward_losses import (
    Ties,
    centering_loss,
    kwise_bradley_terry_loss,
    ordered_pairs,
    plackett_luce_loss,
    rating_loss,
)
from jrlhf.optim import Optimizer
from jrlhf.types import Algorithm, Array, PackedAnswers, Params, PreferenceBatch, TrainState

Objective = Literal["bradley_terry", "plackett_luce", "regression"]
OVERALL = "overall"  # the head of the rows' ranks


@dataclass(frozen=True)
class RewardModelConfig:
    objective: Objective = (
        "bradley_terry"  # plackett_luce: the whole ranking; regression: on the rows' `scores`
    )
    label_smoothing: float = 0.0  # probability that a label is assumed flipped
    margins: bool = False  # subtract the rows' score differences inside the sigmoid (Llama 2)
    # equal ranks: learn them with target 1/2, leave their pairs out, or give them a probability of their own
    # (Rao & Kupper 1967; Davidson 1970). plackett_luce draws each of the tied against all of them (Breslow).
    ties: Ties = "half"
    tie_parameter: float = 0.0  # rao_kupper: the threshold > 1; davidson: its factor > 0; 0 learns it
    centering: float = 0.0  # weight of (r_i + r_j)^2, which keeps scores near zero (Eisenstein et al. 2023)
    heads: int = 1  # of an ensemble on one trunk, each trained on its own bootstrap resample of the prompts
    criteria: tuple[
        str, ...
    ] = ()  # of the rows; each gets a head that learns its scores by the same objective
    overall: bool = True  # beside criteria, also a head for the ranks (regression: the `scores`)
    groups: tuple[
        str, ...
    ] = ()  # patterns of labeller ids, such as ("A*", "B*"); each gets a head for its own rows
    mixture: int = 0  # heads for as many unknown types of labellers (of prompts, where rows name no labeller)
    microbatches: int = 1

    def __post_init__(self):
        for name, known in (("objective", get_args(Objective)), ("ties", get_args(Ties))):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{name} is {value!r}.{did_you_mean(str(value), known)}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.centering < 0:
            raise UserError(f"centering must not be negative, got {self.centering}")
        if self.objective != "bradley_terry":
            for name, default in (("ties", "half"), ("margins", False), ("label_smoothing", 0.0)):
                if getattr(self, name) != default:
                    raise UserError(
                        f"{name} {getattr(self, name)!r} is for pairs: with objective {self.objective!r} leave it "
                        f"{default!r}, or set objective to 'bradley_terry'"
                    )
        if self.objective == "regression" and self.centering:
            raise UserError("centering: regression on ratings fixes the scores' offset by itself; leave it 0")
        self._check_ties()
        self._check_heads()

    def _check_ties(self) -> None:
        if not self.models_ties:
            if self.tie_parameter:
                raise UserError(
                    f"tie_parameter belongs to ties 'rao_kupper' or 'davidson', not {self.ties!r}"
                )
            return
        if self.margins:
            raise UserError(f"margins: ties {self.ties!r} explains them by itself; leave margins out")
        least = 1.0 if self.ties == "rao_kupper" else 0.0
        if self.tie_parameter and not least < self.tie_parameter < math.inf:
            raise UserError(
                f"tie_parameter is {self.tie_parameter}: of {self.ties!r} it is above {least:g}, or 0 to learn it"
            )

    def _check_heads(self) -> None:
        if self.heads < 1:
            raise UserError(f"heads must be positive, got {self.heads}")
        if self.mixture and self.mixture < 2:
            raise UserError(f"mixture is {self.mixture}: at least 2 heads, or 0 for none")
        if len(self.groups) == 1 or len({*self.groups}) != len(self.groups):
            raise UserError(
                f"groups must be two or more patterns that differ, got {', '.join(map(repr, self.groups))}; for one "
                "group alone give the stage `labelers`"
            )
        kinds = {"heads": self.heads > 1, "criteria": bool(self.criteria)}
        kinds |= {"groups": bool(self.groups), "mixture": bool(self.mixture)}
        if len(several := [name for name, given in kinds.items() if given]) > 1:
            raise UserError(
                f"{' and '.join(several)}: what the heads are for must be one of them; for more, name several reward "
                "models in a RewardEnsemble"
            )
        if self.mixture and self.objective == "regression":
            raise UserError("mixture: types of labellers are told apart by their preferences, not by ratings")
        if not self.overall and not self.criteria:
            raise UserError("overall: without it there must be criteria to learn")
        if len({*self.criteria}) != len(self.criteria) or OVERALL in self.criteria:
            raise UserError(
                f"criteria must differ, and none be called {OVERALL!r}: {', '.join(self.criteria)}"
            )

    @property
    def models_ties(self) -> bool:
        """Whether a tie has a probability of its own."""
        return self.ties in ("rao_kupper", "davidson")

    @property
    def reads_certainty(self) -> bool:
        """Whether rows may say how surely the better answer is the better: soft labels, shares of votes."""
        return self.objective == "bradley_terry" and not self.models_ties and not self.margins

    @property
    def ensemble(self) -> bool:
        """Whether the heads are several opinions of one thing, the overall preference."""
        return self.heads > 1 or bool(self.groups) or self.mixture > 1

    @property
    def head_names(self) -> tuple[str, ...]:
        if self.heads > 1:
            return tuple(f"head_{n}" for n in range(self.heads))
        if self.groups:
            return self.groups
        if self.mixture:
            return tuple(f"type_{n}" for n in range(self.mixture))
        return ((OVERALL,) if self.overall else ()) + self.criteria


class HeadLabels(NamedTuple):
    """What each of n heads learns."""

    ranks: Array  # [B, K, n] int32, 0 where there is nothing to learn
    ratings: Array  # [B, K, n] float32, the numbers behind the ranks
    weights: Array  # [B, n] float32, how much the prompt counts for the head
    certainty: Array | None = None  # [B, n] float32, as in PreferenceBatch; None where all are 1


def sequence_scores(model: Model, params, tokens_BT, mask_BT) -> jax.Array:
    """The scalar head at each sequence's last real token, [B] float32."""
    return model.scores(params, tokens_BT, mask_BT, at=last_token_index(mask_BT)[:, None])[:, 0]


def sequence_head_scores(model: Model, params, tokens_BT, mask_BT) -> jax.Array:
    """Every scalar head at each sequence's last real token, [B, n] float32."""
    return model.head_scores(params, tokens_BT, mask_BT, at=last_token_index(mask_BT)[:, None])[:, 0]


def preference_scores(model: Model, params, batch: PreferenceBatch) -> jax.Array:
    """[B, K, n] scores of the answers by every head; those of padding answers mean nothing."""
    if isinstance(batch.tokens, PackedAnswers):
        return packed_scores(model, params, batch.tokens)
    b, k, t = batch.tokens.shape
    flat = sequence_head_scores(model, params, batch.tokens.reshape(b * k, t), batch.mask.reshape(b * k, t))
    return flat.reshape(b, k, -1)


def head_labels(config: RewardModelConfig, batch: PreferenceBatch) -> HeadLabels:
    """The overall ranks for the overall head or for every head of an ensemble; for a criterion's head, the ranks by
    that criterion's scores, of the answers that have one."""
    ranks, ratings = batch.ranks[..., None], batch.margins[..., None]
    heads = len(config.head_names)
    if config.ensemble:
        ranks, ratings = (jnp.repeat(x, heads, axis=-1) for x in (ranks, ratings))
    elif config.criteria:
        known = (batch.ranks > 0)[..., None] & ~jnp.isnan(batch.criteria)
        values = jnp.where(known, batch.criteria, 0.0)
        better = (values[:, None] > values[:, :, None]) & known[:, None]
        by_value = jnp.where(known, 1 + jnp.sum(better, axis=2, dtype=jnp.int32), 0)
        own = (ranks, ratings) if config.overall else (ranks[..., :0], ratings[..., :0])
        ranks, ratings = (jnp.concatenate(x, axis=-1) for x in zip(own, (by_value, values), strict=True))
    weights = jnp.ones((1, 1), jnp.float32) if isinstance(batch.weights, tuple) else batch.weights
    certainty = None
    if not isinstance(batch.certainty, tuple):
        of_ranks = np.asarray([name not in config.criteria for name in config.head_names])
        certainty = jnp.where(of_ranks, jnp.asarray(batch.certainty)[:, None], 1.0)
    return HeadLabels(ranks, ratings, jnp.broadcast_to(weights, (len(ranks), heads)), certainty)


def usable_prompts(config: RewardModelConfig, labels: HeadLabels) -> jax.Array:
    """[B, n] float32: the weight of each prompt that has something to learn for a head, 0 of the others."""
    answers = jnp.sum(labels.ranks > 0, axis=1)
    if config.objective == "regression":
        usable = answers > 0
    elif config.ties == "drop":
        usable = jnp.any(_over_heads(lambda ranks: ordered_pairs(ranks)[0], labels.ranks), axis=(1, 2))
    else:
        usable = answers > 1
    return jnp.where(usable, labels.weights, 0.0)


def _over_heads(f, *arrays):
    """`f` of each head's own slice of the last axis, the results along a last axis."""
    return jax.vmap(f, in_axes=-1, out_axes=-1)(*arrays)


def log_tie_parameter(config: RewardModelConfig, params: Params) -> jax.Array | float:
    """log θ of Rao-Kupper or log nu of Davidson: as the config says, or as learned."""
    if not config.models_ties:
        return 0.0
    if config.tie_parameter:
        return math.log(config.tie_parameter)
    learned = params["tie"]["bias"]
    return jax.nn.softplus(learned) if config.ties == "rao_kupper" else learned


def initial_tie_parameter(config: RewardModelConfig, tie_share: float) -> float:
    """The value of params["tie"]["bias"] that is most likely while all scores are equal and this share is tied."""
    share = min(max(tie_share, 1e-3), 1.0 - 1e-3)
    if config.ties == "davidson":
        return math.log(2.0 * share / (1.0 - share))  # P(tie) = nu / (2 + nu)
    return math.log(math.expm1(math.log((1.0 + share) / (1.0 - share))))  # P(tie) = (θ - 1) / (θ + 1)


def reward_model_loss(
    config: RewardModelConfig,
    model: Model,
    params,
    batch: PreferenceBatch,
    prompts,
    log_tie=0.0,
    raters: int = 0,
):
    """Mean over heads of the weighted mean over prompts of each prompt's loss.

    prompts [n]: each head's weight of the usable prompts of the global batch (`total_weight`).
    """
    scores, labels = preference_scores(model, params, batch), head_labels(config, batch)
    weights = usable_prompts(config, labels)
    loss, pairs, correct = prompt_losses(config, scores, labels, log_tie)
    centering = _over_heads(centering_loss, scores, labels.ranks)
    ordered = _over_heads(lambda ranks: ordered_pairs(ranks)[0], labels.ranks)  # [B, K, K, n]
    gap = scores[:, :, None] - scores[:, None, :]

    def mean(x):  # [B, n]: over prompts, then over heads
        return jnp.mean(jnp.sum(jnp.where(weights > 0, x * weights, 0.0), axis=0) / prompts)

    sums = {
        "rm/loss": mean(loss),
        "rm/acc": mean(correct / jnp.maximum(pairs, 1.0)),
        "rm/margin": mean(masked_mean(gap, ordered, axis=(1, 2))),
    }
    if config.ensemble:
        spread = jnp.sqrt(masked_var(gap, jnp.ones_like(gap, bool), axis=-1))
        of_prompt = masked_mean(spread, ordered[..., 0], axis=(1, 2))
        sums["rm/disagreement"] = mean(jnp.repeat(of_prompt[:, None], len(config.head_names), axis=1))
    if config.mixture:
        sums["evidence"] = jax.lax.stop_gradient(evidence_of(loss, weights, batch.raters, raters))
    return mean(loss) + config.centering * mean(centering), (sums, {})


def total_weight(config: RewardModelConfig, labels: HeadLabels) -> jax.Array:
    """[n]: each head's weight of all usable prompts; 1 where there is none, for it divides."""
    total = jnp.sum(usable_prompts(config, labels), axis=0)
    return jnp.where(total > 0, total, 1.0)


def prompt_losses(
    config: RewardModelConfig, scores: Array, labels: HeadLabels, log_tie: Array | float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each prompt's loss for each head, its pairs and how many of them are ordered right, from scores [B, K, n]: three
    [B, n] float32."""

    def pair_loss(scores, ranks, ratings, *certainty):
        margins = ratings if config.margins else None
        return kwise_bradley_terry_loss(
            scores, ranks, margins, config.label_smoothing, config.ties, log_tie, *certainty
        )

    sure = () if labels.certainty is None else (labels.certainty,)
    loss, pairs, correct = _over_heads(pair_loss, scores, labels.ranks, labels.ratings, *sure)
    if config.objective == "plackett_luce":
        loss = _over_heads(plackett_luce_loss, scores, labels.ranks)
    elif config.objective == "regression":
        loss = _over_heads(rating_loss, scores, labels.ratings, labels.ranks)
    return loss, pairs, correct


def evidence_of(losses: Array, weights: Array, raters: Array, count: int) -> tuple[jax.Array, jax.Array]:
    """What rows say of the type of who ranked them: the log-likelihood under each head, summed over the rater's rows
    [U, n], and the number of these rows [U]. losses and weights [B, n], raters [B] below `count` U.

    A row's log-likelihood is minus its loss, a mean over its pairs: a ranking counts as one comparison.
    """
    row = jnp.sum(weights, axis=1, keepdims=True)  # a row's responsibilities sum to 1
    logp = jnp.where(row > 0, -losses * row, 0.0)
    add = lambda x: jax.ops.segment_sum(x, raters, count)  # noqa: E731
    return add(logp), add((row[:, 0] > 0).astype(jnp.float32))


def make_reward_model(
    config: RewardModelConfig,
    model: Model,
    optimizer: Optimizer,
    tie_share: float = 1 / 3,
    raters: int = 0,
    rows_each: float = 1.0,
) -> Algorithm:
    """tie_share: of the pairs, from which a learned tie parameter starts.

    raters, rows_each: of a mixture, how many people (or prompts) there are, and on average rows of each. Each step's
    expectation is over what the rater said in about the last epoch: the log-likelihoods of earlier rows fade by
    1 - 1 / rows_each with each new one (incremental EM, Neal & Hinton 1998). All types are equally likely beforehand.
    """
    if bool(config.mixture) != (raters > 0):
        raise ValueError(f"a mixture of {config.mixture} types was given {raters} raters")
    if model.heads != len(config.head_names):
        raise ValueError(f"the model has {model.heads} heads for {', '.join(config.head_names)}")

    def init(params, key, frozen=None) -> TrainState:
        """frozen: the base that adapters `params` are trained beside."""
        params = {"policy": params}
        if config.models_ties and not config.tie_parameter:
            # Named a bias, because weight decay must leave it alone.
            params["tie"] = {"bias": jnp.float32(initial_tie_parameter(config, tie_share))}
        extra: dict | tuple = ()
        if config.mixture:  # a first guess, without which all heads would learn the same
            guess = jax.random.normal(jax.random.fold_in(key, 3), (raters, config.mixture), jnp.float32)
            extra = {"evidence": tuple(2.0 * guess.T)}  # of each type [U]: vectors need no sharding rule
        return TrainState(jnp.int32(0), params, optimizer.init(params), frozen, key, extra)

    def train_step(state: TrainState, batch: PreferenceBatch):
        if config.mixture:
            types = jax.nn.softmax(jnp.stack(state.extra["evidence"], axis=1), axis=1)[batch.raters]
            rows = 1.0 if isinstance(batch.weights, tuple) else jnp.asarray(batch.weights)
            batch = batch._replace(weights=rows * types)
        prompts = total_weight(config, head_labels(config, batch))

        def loss(params, rows: PreferenceBatch):
            whole = model.whole(params["policy"], state.ref_params)
            log_tie = log_tie_parameter(config, params)
            return reward_model_loss(config, model, whole, rows, prompts, log_tie, raters)

        metrics, _, grads = value_and_grad_rows(loss, state.params, batch, config.microbatches)
        extra = state.extra
        if config.mixture:
            evidence, rows = metrics.pop("evidence")
            fading = (1.0 - 1.0 / max(rows_each, 1.0)) ** rows
            now = fading[:, None] * jnp.stack(extra["evidence"], axis=1) + evidence
            extra = {"evidence": tuple(now.T)}
            metrics["rm/type_certainty"] = jnp.mean(jnp.max(jax.nn.softmax(now, axis=1), axis=1))
        params, opt_state, grad_norm = optimizer.apply(grads, state.opt_state, state.params)
        metrics |= {"train/grad_norm": grad_norm, "train/lr": optimizer.learning_rate(state.step)}
        if config.models_ties:
            metrics["rm/tie_parameter"] = jnp.exp(jnp.float32(log_tie_parameter(config, state.params)))
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state, extra=extra), metrics

    return Algorithm(init, None, train_step)
