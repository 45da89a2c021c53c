"""The reward model: the SFT model with a scalar head, trained on preferences."""

import math
import zlib
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrlhf.algorithms.reward_model import (
    OVERALL,
    RewardModelConfig,
    evidence_of,
    head_labels,
    log_tie_parameter,
    make_reward_model,
    preference_scores,
    prompt_losses,
    usable_prompts,
)
from jrlhf.config import (
    PREFERENCES,
    REWARD_MODEL,
    Source,
    StageContext,
    UserError,
    did_you_mean,
    no_fingerprint,
    stage_ref,
)
from jrlhf.data.labelers import of_labelers, raters_of
from jrlhf.models.transformer import Model
from jrlhf.ops.calibration import expected_calibration_error
from jrlhf.ops.intervals import wilson_interval
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import Loaded, begin, load_model, save_trained
from jrlhf.training.data import (
    PackedFeed,
    bootstrap_weights,
    check_plain,
    group_weights,
    in_chunks,
    load_rows,
    preference_arrays,
    rows_of,
    split_by_prompt,
)
from jrlhf.training.evaluation import (
    chunk_rows,
    criteria_accuracy,
)
from jrlhf.training.loop import stage_key
from jrlhf.training.offline import train_offline
from jrlhf.training.stages.common import (
    FineTuningStage,
    TooLongPrompt,
    check_length,
    check_microbatches,
    check_packing,
    labelled,
    start_config,
)
from jrlhf.training.stages.preferences import check_one_of, preference_plan, preference_rows
from jrlhf.training.utilisation import Pass, flops_of_passes, peak_flops
from jrlhf.types import Array, PreferenceBatch


@dataclass(frozen=True)
class RewardModel(FineTuningStage):
    """The SFT model with a scalar head, trained on preferences and normalised to mean 0, std 1.

    With several heads (`algorithm.heads`, `criteria`, `groups`, `mixture`) the reward is their weighted sum,
    normalised.
    """

    artifact: ClassVar[str] = REWARD_MODEL

    preferences: str = stage_ref("", PREFERENCES)
    data: Source | None = None
    eval_data: Source | None = None  # held-out preferences; None: a share of the prompts
    optim: OptimConfig = OptimConfig(lr=3e-4, schedule="cosine", warmup_steps=50)
    algorithm: RewardModelConfig = RewardModelConfig()
    # of the heads in the reward, before it is normalised: "overall" and the criteria by name ({}: the overall head
    # alone), the groups by their pattern, a mixture's as "type_0", ... ({}: equal)
    weights: dict[str, float] = field(default_factory=dict)
    labelers: tuple[
        str, ...
    ] = ()  # learn from these alone: patterns of the rows' `labeler`, such as "A*"; (): all
    member: int = 0  # of a RewardEnsemble: another initial head, another order of the data
    eval_fraction: float = 0.1  # of the prompts (all their rows) are kept for evaluation
    max_length: int = 0  # tokens of prompt and answer; 0: the model's context
    too_long: TooLongPrompt = "error"
    # a prompt goes through the model once for all its answers, and several share a row of tokens
    packing: bool = no_fingerprint(True)

    def validate(self, stages):
        check_one_of(self)
        check_microbatches(self)
        self.check_adapters(stages)
        if not self.needs_download(stages):
            check_packing(self.packing, start_config(stages, self.start), self.max_length)
        if not 0 < self.eval_fraction < 1:
            raise UserError(f"eval_fraction must be between 0 and 1, got {self.eval_fraction}")
        if self.member < 0:
            raise UserError(f"member must not be negative, got {self.member}")
        self._check_weights()

    def _check_weights(self) -> None:
        names, criteria = self.algorithm.head_names, self.algorithm.criteria
        if self.weights and not (criteria or self.algorithm.groups or self.algorithm.mixture):
            raise UserError(
                "weights are of heads for criteria, groups or a mixture: algorithm has none of these"
            )
        for name, weight in self.weights.items():
            if name not in names:
                raise UserError(f"weights: {name!r} is no head.{did_you_mean(name, names)}")
            if not math.isfinite(weight):
                raise UserError(f"weights.{name} is {weight}; it must be a finite number")
        needed = bool(self.weights) or (bool(criteria) and not self.algorithm.overall)
        if needed and not any(self.weights.values()):
            raise UserError(f"weights: give one that is not 0, of the heads {', '.join(names)}")

    def head_weights(self) -> list[float]:
        """Of each head in the reward."""
        names = self.algorithm.head_names
        if not self.algorithm.criteria and not self.weights:
            return [1 / len(names)] * len(names)
        weights = self.weights or {OVERALL: 1.0}
        return [weights.get(name, 0.0) for name in names]

    def plan(self, ctx):
        plan = preference_plan(self, ctx)
        return replace(plan, at_most=("rows", "steps", "tokens")) if self.labelers else plan

    def run(self, ctx: StageContext) -> dict:
        ctx = as_member(ctx, self.member)
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            key = stage_key(ctx)
            loaded = load_model(ctx.parents[self.start], mesh)
            arrays, held, held_rows, people = self._preferences(loaded, ctx)
            config, names, weights = self.algorithm, self.algorithm.head_names, self.head_weights()
            if config.heads > 1:
                draws = bootstrap_weights(arrays, config.heads, jax.random.fold_in(key, 2))
                arrays = arrays._replace(weights=draws)

            beginning = begin(loaded, "scalar", self.lora, jax.random.fold_in(key, 1), len(names))
            model, start, frozen = beginning
            check_packing(self.packing, model.config, self.max_length)
            whole = lambda state: model.whole(state.params["policy"], frozen)  # noqa: E731
            steps = self.loop.total_steps(rows_of(arrays))
            optimizer = build_optimizer(self.optim, steps)
            raters, rows_each = len(people), rows_of(arrays) / max(len(people), 1)
            algorithm = make_reward_model(config, model, optimizer, tie_share(arrays), raters, rows_each)

            def evaluate(state, step):
                scores = all_scores(model, whole(state), held, mesh, self.packing)
                return reward_accuracy(scores @ weights, held.ranks, held.certainty)

            batches: Any = arrays
            if self.packing:
                batches = PackedFeed(arrays, self.loop.batch_size, ctx.seed, mesh, steps, config.microbatches)
            state = train_offline(
                ctx, mesh, self.loop, steps, algorithm, (start, key, frozen), model.logical_axes(), batches,
                evaluate,
                ("rm/loss", "rm/acc"),
                flops=partial(flops_of_passes, (Pass(model),)), peak=peak_flops(mesh, model),
            )  # fmt: skip
            params = whole(state)
            scores = all_scores(model, params, held, mesh, self.packing)
            scores_of_training = all_scores(model, params, arrays, mesh, self.packing)
            of_training = scores_of_training[arrays.ranks > 0]
            mean, std = moments(of_training @ weights)
            moments_of_each = [moments(of_training[:, h]) for h in range(len(names))]
            accuracy = reward_accuracy(scores @ weights, held.ranks, held.certainty)
            by_criterion, by_labeler = {}, {}
            if rows_of(held) == len(held_rows):  # none was dropped for its length
                by_criterion = criteria_accuracy(scores @ weights, held_rows)
                by_labeler = labelers_accuracy(scores @ weights, held_rows)
            heads = {
                "names": list(names),
                "ensemble": config.ensemble,  # or criteria
                "weights": weights,
                "mean": [m for m, _ in moments_of_each],
                "std": [s for _, s in moments_of_each],
            }
            save_trained(
                ctx.folder, beginning, state.params["policy"], loaded.tokenizer, ctx.parents[self.start],
                normalization={"mean": mean, "std": std, "range": score_range(of_training @ weights)},
                **({"heads": heads} if len(names) > 1 else {}),
            )  # fmt: skip
        results = {
            "held_out_accuracy": accuracy["eval/rm_acc/mean"],
            "held_out_accuracy_low": accuracy["eval/rm_acc/ci_low"],
            "held_out_accuracy_high": accuracy["eval/rm_acc/ci_high"],
            "held_out_ece": accuracy["rm/ece"],
            "held_out_pairs": accuracy["eval/rm_pairs"],
            "held_out_accuracy_against": by_criterion,
            "held_out_accuracy_of_labelers": by_labeler,
            "normalization": {"mean": mean, "std": std},
        }
        if config.mixture:
            log_tie = log_tie_parameter(config, state.params)
            types = types_of(config, scores_of_training, arrays, len(people), float(log_tie))
            results["types"] = told_types(types, people, np.unique(arrays.raters))
            rows = 1.0 if isinstance(held.weights, tuple) else held.weights
            held = held._replace(weights=rows * types[held.raters])
        if len(names) > 1:
            results["held_out_accuracy_of_heads"] = heads_accuracy(config, scores, held)
        if config.ensemble:
            results["held_out_disagreement"] = disagreement(scores / heads["std"], held.ranks)
        if config.objective == "regression" and config.overall:
            error = scores[..., 0] - held.margins
            results["held_out_squared_error"] = float(np.mean(error[held.ranks > 0] ** 2))
        if config.models_ties:
            results["tie_parameter"] = math.exp(float(log_tie_parameter(config, state.params)))
        return results

    def _preferences(
        self, loaded: Loaded, ctx: StageContext
    ) -> tuple[PreferenceBatch, PreferenceBatch, list[dict], list[str]]:
        """Preferences to train on, those held out, the latter's rows, and of a mixture who ranked them."""
        rows = self._usable(preference_rows(self, ctx), "preferences")
        if self.eval_data is not None:
            held_rows = load_rows(self.eval_data, "preference", labelled(ctx.console, "eval_data"))
            held_rows = self._usable(held_rows, "eval_data")
        else:
            rows, held_rows = split_by_prompt(rows, self.eval_fraction)
        check_length(self.max_length, loaded.model, "max_length")
        limit = self.max_length or loaded.model.config.context
        config = self.algorithm
        people = [*dict.fromkeys(raters_of(rows + held_rows))] if config.mixture else []
        number = {name: n for n, name in enumerate(people)}

        def told(label: str, kept: list[dict]) -> dict[str, np.ndarray]:
            if config.groups:
                return {"weights": group_weights(kept, config.groups, label)}
            if config.mixture:
                return {"raters": np.asarray([number[name] for name in raters_of(kept)], np.int32)}
            return {}

        arrays, held = (
            preference_arrays(
                r,
                loaded.tokenizer,
                limit,
                self.too_long,
                ctx.console,
                label,
                config.criteria,
                partial(told, label),
            )
            for r, label in zip((rows, held_rows), ("preferences", "held-out preferences"), strict=True)
        )
        check_ordered(held)
        return arrays, held, held_rows, people

    def _usable(self, rows: list[dict], where: str) -> list[dict]:
        """The rows to learn from (or to test on), which say what the algorithm asks and no more than it can use."""
        rows = of_labelers(rows, self.labelers, where) if self.labelers else rows
        self._check_scores(rows, where)
        if not self.algorithm.reads_certainty:
            check_plain(rows, ("probability",), "algorithm as it is set")
        return rows

    def _check_scores(self, rows: list[dict], where: str) -> None:
        config = self.algorithm
        if not config.overall or not (config.margins or config.objective == "regression"):
            return
        why = "algorithm.margins" if config.margins else "algorithm.objective 'regression'"
        for n, row in enumerate(rows, 1):
            if "scores" not in row:
                raise UserError(f"{where} row {n}: no field 'scores', which {why} needs")


def as_member(ctx: StageContext, member: int) -> StageContext:
    """The context of a member of an ensemble: its own draws, of heads and of the data's order."""
    return replace(ctx, seed=zlib.crc32(f"{ctx.seed} member {member}".encode())) if member else ctx


def moments(scores: np.ndarray) -> tuple[float, float]:
    """Mean and std of the raw scores of the training answers, which the start policy (or people) wrote."""
    return float(scores.mean()), float(max(scores.std(), 1e-6))


def score_range(scores: np.ndarray) -> list[float]:
    """The raw scores between which 98% of the training answers are: outside, a policy is where nothing was learned."""
    return np.quantile(scores, (0.01, 0.99)).tolist()


def all_scores(model: Model, params, arrays: PreferenceBatch, mesh: Mesh, packing: bool) -> np.ndarray:
    """[N, K, n] float64 of every head."""
    f = partial(jitted_scores, model, params)
    return in_chunks(f, arrays, chunk_rows(rows_of(arrays), mesh), mesh, packing).astype(np.float64)


jitted_scores = jax.jit(preference_scores, static_argnums=0)


def tie_share(arrays: PreferenceBatch) -> float:
    """The share of tied pairs among all."""
    ordered, answers = len(ordered_pairs(arrays.ranks)[0]), np.sum(arrays.ranks > 0, axis=1)
    pairs = max(int(np.sum(answers * (answers - 1) // 2)), 1)
    return 1.0 - ordered / pairs


def ordered_pairs(ranks: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, better answer, worse answer) of every pair that is no tie."""
    row, better, worse = np.nonzero((ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] > 0))
    return row, better, worse


def heads_accuracy(config: RewardModelConfig, scores: np.ndarray, held: PreferenceBatch) -> dict[str, float]:
    """Of each head (scores [N, K, n]) the accuracy on what it learned, by the weights of the rows for it; a head
    without an ordered pair is left out."""
    labels = head_labels(config, held)
    ranks, weights = np.asarray(labels.ranks), np.asarray(labels.weights, np.float64)
    found = {}
    for h, name in enumerate(config.head_names):
        n, i, j = ordered_pairs(ranks[..., h])
        right = 0.5 + 0.5 * np.sign(scores[n, i, h] - scores[n, j, h])
        if total := np.sum(weights[n, h]):
            found[name] = float(np.sum(right * weights[n, h]) / total)
    return found


def labelers_accuracy(scores: np.ndarray, rows: list[dict]) -> dict[str, dict[str, float]]:
    """The accuracy of scores [N, K] on the ordered pairs of each labeller, and how many these are, by name; empty where
    rows name nobody."""
    found: dict[str, list[float]] = {}
    for own, row in zip(scores, rows, strict=True):
        _, i, j = ordered_pairs(np.asarray(row["ranks"])[None])
        if "labeler" in row:
            found.setdefault(row["labeler"], []).extend(0.5 + 0.5 * np.sign(own[i] - own[j]))
    return {
        name: {"accuracy": float(np.mean(right)), "pairs": len(right)}
        for name, right in sorted(found.items())
        if right
    }


def types_of(
    config: RewardModelConfig, scores: np.ndarray, arrays: PreferenceBatch, people: int, log_tie: float
) -> np.ndarray:
    """The probability of each type of a mixture for each rater [U, n], given all that he said, from all scores
    [N, K, n] of the finished heads. Equal for a rater without a row."""
    labels = head_labels(config, arrays)
    losses, *_ = prompt_losses(config, jnp.asarray(scores, jnp.float32), labels, log_tie)
    usable = usable_prompts(config, labels) / len(
        config.head_names
    )  # of a row, 1 over all heads, or its weight
    evidence, _ = evidence_of(losses, usable, jnp.asarray(arrays.raters), people)
    return np.asarray(jax.nn.softmax(evidence, axis=1))


def told_types(types: np.ndarray, people: list[str], seen: np.ndarray) -> dict:
    """A mixture's types: their shares among the raters who were learned from, how sure each one's is, and of up to 1000
    raters each one's probabilities."""
    of_each = {people[n]: types[n].tolist() for n in seen}
    told = {"share": types[seen].mean(axis=0).tolist(), "certainty": float(types[seen].max(axis=1).mean())}
    return told | ({"of_raters": of_each} if len(of_each) <= 1000 else {})


def disagreement(scores: np.ndarray, ranks: Array) -> float:
    """How far an ensemble's heads differ on a pair: the std over heads of the score difference, mean over ordered
    pairs. scores [N, K, n]."""
    n, i, j = ordered_pairs(ranks)
    return float(np.mean(np.std(scores[n, i] - scores[n, j], axis=-1)))


def check_ordered(held: PreferenceBatch) -> None:
    if not len(ordered_pairs(held.ranks)[0]):
        raise UserError("the held-out preferences hold no ordered pair: every answer is tied")


def reward_accuracy(scores: np.ndarray, ranks: Array, certainty: Any = ()) -> dict[str, float]:
    """Accuracy (ties left out, with a Wilson interval), margin and calibration of scores [N, K] on ranked answers.

    certainty [N]: of soft labels, which the predicted probabilities are held against; () is 1.
    """
    n, i, j = ordered_pairs(ranks)
    gap = np.asarray(scores[n, i] - scores[n, j], np.float64)
    right = (gap > 0) + 0.5 * (gap == 0)
    low, high = wilson_interval(right.sum(), len(right))
    # Half of the pairs are turned round, so that the labels are not all ones.
    turned = np.arange(len(gap)) % 2 == 1
    probability = 1 / (1 + np.exp(-np.where(turned, -gap, gap)))
    sure = np.ones(len(gap)) if isinstance(certainty, tuple) else np.asarray(certainty, np.float64)[n]
    return {
        "rm/ece": expected_calibration_error(probability, np.where(turned, 1.0 - sure, sure)),
        "eval/rm_acc/mean": float(right.mean()),
        "eval/rm_acc/ci_low": low,
        "eval/rm_acc/ci_high": high,
        "eval/rm_margin/mean": float(gap.mean()),
        "eval/rm_pairs": len(gap),
    }
