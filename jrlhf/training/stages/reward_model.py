"""The reward model: the SFT model with a scalar head, trained on preferences."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from jrlhf.algorithms.reward_model import (
    RewardModelConfig,
    make_reward_model,
    preference_scores,
)
from jrlhf.config import (
    PREFERENCES,
    REWARD_MODEL,
    Source,
    StageContext,
    UserError,
    stage_ref,
)
from jrlhf.models.transformer import Model
from jrlhf.ops.calibration import expected_calibration_error
from jrlhf.ops.intervals import wilson_interval
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import begin, load_model, save_trained
from jrlhf.training.data import (
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
    labelled,
)
from jrlhf.training.stages.preferences import check_one_of, preference_plan, preference_rows
from jrlhf.types import PreferenceBatch


@dataclass(frozen=True)
class RewardModel(FineTuningStage):
    """The SFT model with a scalar head, trained on preferences and normalised to mean 0, std 1."""

    artifact: ClassVar[str] = REWARD_MODEL

    preferences: str = stage_ref("", PREFERENCES)
    data: Source | None = None
    eval_data: Source | None = None  # held-out preferences; None: a share of the prompts
    optim: OptimConfig = OptimConfig(lr=3e-4, schedule="cosine", warmup_steps=50)
    algorithm: RewardModelConfig = RewardModelConfig()
    eval_fraction: float = 0.1  # of the prompts (all their rows) are kept for evaluation
    max_length: int = 0  # tokens of prompt and answer; 0: the model's context
    too_long: TooLongPrompt = "error"

    def validate(self, stages):
        check_one_of(self)
        check_microbatches(self)
        self.check_adapters(stages)
        if not 0 < self.eval_fraction < 1:
            raise UserError(f"eval_fraction must be between 0 and 1, got {self.eval_fraction}")

    def plan(self, ctx):
        return preference_plan(self, ctx)

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            key = stage_key(ctx)
            loaded = load_model(ctx.parents[self.start], mesh)
            rows = preference_rows(self, ctx)
            if self.eval_data is not None:
                held_rows = load_rows(self.eval_data, "preference", labelled(ctx.console, "eval_data"))
            else:
                rows, held_rows = split_by_prompt(rows, self.eval_fraction)
            check_length(self.max_length, loaded.model, "max_length")
            limit = self.max_length or loaded.model.config.context
            arrays, held = (
                preference_arrays(r, loaded.tokenizer, limit, self.too_long, ctx.console, label)
                for r, label in zip((rows, held_rows), ("preferences", "held-out preferences"), strict=True)
            )
            check_ordered(held)

            beginning = begin(loaded, "scalar", self.lora, jax.random.fold_in(key, 1))
            model, start, frozen = beginning
            whole = lambda state: model.whole(state.params["policy"], frozen)  # noqa: E731
            steps = self.loop.total_steps(rows_of(arrays))
            algorithm = make_reward_model(self.algorithm, model, build_optimizer(self.optim, steps))
            evaluate = lambda state, step: reward_accuracy(model, whole(state), held, mesh)  # noqa: E731
            state = train_offline(
                ctx, mesh, self.loop, steps, algorithm, (start, key, frozen), model.logical_axes(), arrays,
                evaluate,
                ("rm/loss", "rm/acc"),
            )  # fmt: skip
            params = whole(state)
            mean, std = reference_moments(model, params, arrays, mesh)
            accuracy = reward_accuracy(model, params, held, mesh)
            by_criterion = {}
            if rows_of(held) == len(held_rows):  # none was dropped for its length
                by_criterion = criteria_accuracy(all_scores(model, params, held, mesh), held_rows)
            save_trained(
                ctx.folder, beginning, state.params["policy"], loaded.tokenizer, ctx.parents[self.start],
                normalization={"mean": mean, "std": std},
            )  # fmt: skip
        return {
            "held_out_accuracy": accuracy["eval/rm_acc/mean"],
            "held_out_accuracy_low": accuracy["eval/rm_acc/ci_low"],
            "held_out_accuracy_high": accuracy["eval/rm_acc/ci_high"],
            "held_out_ece": accuracy["rm/ece"],
            "held_out_pairs": accuracy["eval/rm_pairs"],
            "held_out_accuracy_against": by_criterion,
            "normalization": {"mean": mean, "std": std},
        }


def reference_moments(model: Model, params, arrays: PreferenceBatch, mesh: Mesh) -> tuple[float, float]:
    """Mean and std of the raw scores of the training answers, which the start policy (or people) wrote."""
    scores = all_scores(model, params, arrays, mesh)[arrays.ranks > 0]
    return float(scores.mean()), float(max(scores.std(), 1e-6))


def all_scores(model: Model, params, arrays: PreferenceBatch, mesh: Mesh) -> np.ndarray:
    f = partial(jitted_scores, model, params)
    return in_chunks(f, arrays, chunk_rows(rows_of(arrays), mesh), mesh)


jitted_scores = jax.jit(preference_scores, static_argnums=0)


def ordered_pairs(arrays: PreferenceBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, better answer, worse answer) of every pair that is no tie."""
    ranks = arrays.ranks
    row, better, worse = np.nonzero((ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] > 0))
    return row, better, worse


def check_ordered(held: PreferenceBatch) -> None:
    if not len(ordered_pairs(held)[0]):
        raise UserError("the held-out preferences hold no ordered pair: every answer is tied")


def reward_accuracy(model: Model, params, held: PreferenceBatch, mesh: Mesh) -> dict[str, float]:
    """Accuracy (ties left out, with a Wilson interval), margin and calibration on held-out pairs."""
    scores = all_scores(model, params, held, mesh)
    n, i, j = ordered_pairs(held)
    gap = (scores[n, i] - scores[n, j]).astype(np.float64)
    right = (gap > 0) + 0.5 * (gap == 0)
    low, high = wilson_interval(right.sum(), len(right))
    # Half of the pairs are turned round, so that the labels are not all ones.
    turned = np.arange(len(gap)) % 2 == 1
    probability = 1 / (1 + np.exp(-np.where(turned, -gap, gap)))
    return {
        "rm/ece": expected_calibration_error(probability, (~turned).astype(np.float64)),
        "eval/rm_acc/mean": float(right.mean()),
        "eval/rm_acc/ci_low": low,
        "eval/rm_acc/ci_high": high,
        "eval/rm_margin/mean": float(gap.mean()),
        "eval/rm_pairs": len(gap),
    }
