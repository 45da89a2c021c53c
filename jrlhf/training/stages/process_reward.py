"""The process reward model: the SFT model with a scalar head, trained on the labels of an answer's steps."""

import json
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from jrlhf.algorithms.process_reward import ProcessRewardConfig, make_process_reward
from jrlhf.config import REWARD_MODEL, STEPS, Source, Stage, StageContext, UserError, stage_ref
from jrlhf.models.transformer import Model
from jrlhf.ops.intervals import wilson_interval
from jrlhf.ops.reward_losses import Aggregate
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import begin, load_model, save_trained
from jrlhf.training.data import chunk_rows, in_chunks, load_rows, rows_of, split_by_prompt, step_arrays
from jrlhf.training.judging import AsReward, scalar_scores
from jrlhf.training.loop import stage_key
from jrlhf.training.offline import train_offline
from jrlhf.training.rewards import STEP_REWARD
from jrlhf.training.stages.common import (
    FineTuningStage,
    TooLongPrompt,
    check_length,
    check_microbatches,
    labelled,
    start_config,
    write_text,
)
from jrlhf.training.stages.sizes import (
    UNKNOWN,
    Count,
    at_most,
    check_kind,
    count_rows,
    finished,
    training_plan,
)
from jrlhf.training.stages.step_labels import stored_steps
from jrlhf.training.utilisation import Pass, flops_of_passes, peak_flops
from jrlhf.types import StepBatch


@dataclass(frozen=True)
class ProcessRewardModel(FineTuningStage):
    """The SFT model with a scalar head that says of every step how likely it is right, from labels of steps (Uesato et
    al. 2022; Lightman et al. 2023): rows of data, or what a stage `StepLabels` found (Wang et al. 2024).

    As a reward it splits an answer at the separator and puts the steps' probabilities together, at the end of the
    answer; `StepReward` pays for steps where they end.
    """

    artifact: ClassVar[str] = REWARD_MODEL

    data: Source | None = None  # rows of the kind "steps"
    steps: str = stage_ref("", STEPS)  # instead of data: a stage that labels steps
    eval_data: Source | None = None  # held-out rows; None: a share of the prompts
    optim: OptimConfig = OptimConfig(lr=3e-4, schedule="cosine", warmup_steps=50)
    algorithm: ProcessRewardConfig = ProcessRewardConfig()
    separator: str = "\n"  # follows every step
    aggregate: Aggregate = "min"  # of an answer's steps, as a reward: product, last and mean as well
    eval_fraction: float = 0.1  # of the prompts (all their rows) are kept for evaluation
    max_length: int = 0  # tokens of prompt and steps; 0: the model's context
    too_long: TooLongPrompt = "error"

    def validate(self, stages):
        if bool(self.steps) == (self.data is not None):
            raise UserError(
                "give either steps (a stage that labels them) or data (a source of labelled rows)"
            )
        if self.steps and getattr(stages[self.steps], "separator", self.separator) != self.separator:
            raise UserError(
                f"separator {self.separator!r} is not that of {self.steps!r}, {stages[self.steps].separator!r}"
            )
        check_microbatches(self)
        self.check_adapters(stages)
        if not self.separator:
            raise UserError("separator must not be empty: it ends every step")
        if not 0 < self.eval_fraction < 1:
            raise UserError(f"eval_fraction must be between 0 and 1, got {self.eval_fraction}")

    def plan(self, ctx):
        config = start_config(ctx.stages, self.start)
        if self.steps:
            parent = ctx.parents.get(self.steps)
            rows = Count(len(stored_steps(parent))) if parent and finished(parent) else UNKNOWN
        else:
            rows = count_rows(self.data)
            check_kind(self.data, "steps", "data")
        if self.eval_data is None or self.too_long == "drop":
            rows = at_most(rows.n)
        length = at_most(min(self.max_length or config.context, config.context))
        return training_plan(config, self.loop, rows, length, lora=self.lora)

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            key = stage_key(ctx)
            loaded = load_model(ctx.parents[self.start], mesh)
            if self.data is None:
                rows = stored_steps(ctx.parents[self.steps])
            else:
                rows = load_rows(self.data, "steps", labelled(ctx.console, "data"))
            if self.eval_data is not None:
                held_rows = load_rows(self.eval_data, "steps", labelled(ctx.console, "eval_data"))
            else:
                rows, held_rows = split_by_prompt(rows, self.eval_fraction)
            check_length(self.max_length, loaded.model, "max_length")
            limit = self.max_length or loaded.model.config.context
            arrays, held = (
                step_arrays(r, loaded.tokenizer, limit, self.separator, self.too_long, ctx.console, label)
                for r, label in zip((rows, held_rows), ("data", "held-out data"), strict=True)
            )
            for part, label in ((arrays, "data"), (held, "the held-out data")):
                if not np.any(part.labels >= 0):
                    raise UserError(f"{label}: no step has a label")

            beginning = begin(loaded, "scalar", self.lora, jax.random.fold_in(key, 1))
            model, start, frozen = beginning
            whole = lambda state: model.whole(state.params["policy"], frozen)  # noqa: E731
            steps = self.loop.total_steps(rows_of(arrays))
            algorithm = make_process_reward(self.algorithm, model, build_optimizer(self.optim, steps))

            def evaluate(state, step):
                found = step_accuracy(all_logits(model, whole(state), held, mesh), held)
                return {f"eval/{name}": value for name, value in found.items()}

            state = train_offline(
                ctx, mesh, self.loop, steps, algorithm, (start, key, frozen), model.logical_axes(), arrays,
                evaluate,
                ("rm/loss", "rm/step_acc"),
                flops=partial(flops_of_passes, (Pass(model),)), peak=peak_flops(mesh, model),
            )  # fmt: skip
            found = step_accuracy(all_logits(model, whole(state), held, mesh), held)
            save_trained(
                ctx.folder, beginning, state.params["policy"], loaded.tokenizer, ctx.parents[self.start],
                process={"separator": self.separator, "aggregate": self.aggregate},
            )  # fmt: skip
        return {f"held_out_{name}": value for name, value in found.items()}


@dataclass(frozen=True)
class StepReward(Stage):
    """The reward of a `ProcessRewardModel`, paid in another way. Leaves `step_reward.json`; no parameter is copied.

    * "outcome": the aggregate of the steps' probabilities, at the end of the answer. It is what every algorithm then
      optimises, and what best-of-n chooses by.
    * "steps": each step's probability where the step ends (process supervision, Shao et al. 2024, section 4.1.3). What
      is optimised is their *sum*, which grows with the number of steps: an answer that repeats a sure step is paid for
      each (Cheng et al. 2025, "Stop summation", and Gao et al. 2024, whose policies came to repeat steps). For answers
      whose number of steps is given.
    * "differences": what a step adds to the probability of the one before it (of none: 0), as potential-based shaping
      has it (Ng et al. 1999). They sum to the last step's probability, so the optimum is that of "outcome" with the
      aggregate "last": a further step earns only what it adds, and credit comes where the probability moves.

    The last two reward single tokens: PPO, and algorithms with an advantage for each token (`token_rewards` of their
    configs), can use them. Evaluation and best-of-n take the sum, and so does a mix.
    """

    artifact: ClassVar[str] = REWARD_MODEL

    model: str = stage_ref(artifact=REWARD_MODEL)
    as_reward: AsReward = "differences"
    aggregate: Aggregate = "min"  # of as_reward "outcome"

    @property
    def token_rewards(self) -> bool:
        """Whether single tokens are rewarded."""
        return self.as_reward != "outcome"

    def validate(self, stages):
        if not isinstance(stages[self.model], ProcessRewardModel):
            raise UserError(f"model {self.model!r} is no ProcessRewardModel: it does not score steps")
        if self.token_rewards and self.aggregate != type(self).aggregate:
            raise UserError(
                f"aggregate {self.aggregate!r} is only read with as_reward 'outcome', not {self.as_reward!r}"
            )

    def run(self, ctx: StageContext) -> dict:
        note = {
            "model": ctx.parents[self.model].name,
            "as_reward": self.as_reward,
            "aggregate": self.aggregate,
        }
        write_text(ctx.folder / STEP_REWARD, json.dumps(note))
        return {}


def all_logits(model: Model, params, arrays: StepBatch, mesh: Mesh) -> np.ndarray:
    f = partial(scalar_scores, model, params)
    return in_chunks(f, arrays, chunk_rows(rows_of(arrays), mesh), mesh)


def step_accuracy(logits: np.ndarray, held: StepBatch) -> dict[str, float]:
    """How well steps are told right from wrong, by logits [N, T] and a threshold of one half.

    Over labelled steps the accuracy with a Wilson interval. Over answers with a wrong step, how often the first step
    that is called wrong is the first that is (`first_error`); over answers without, how often none is called wrong
    (`all_right`), as in ProcessBench (Zheng et al. 2024). Of the two, those for which there are answers.
    """
    labelled = held.ends & (held.labels >= 0)
    called_right, is_right = logits > 0, held.labels > 0.5
    correct = (called_right == is_right)[labelled]
    low, high = wilson_interval(correct.sum(), len(correct))
    first_wrong = lambda wrong: np.where(wrong.any(axis=1), wrong.argmax(axis=1), -1)  # noqa: E731
    hit = first_wrong(labelled & ~called_right) == first_wrong(labelled & ~is_right)
    has_error = (labelled & ~is_right).any(axis=1)
    found = {
        "step_acc": float(correct.mean()),
        "step_acc_low": low,
        "step_acc_high": high,
        "steps": len(correct),
    }
    for name, answers in (("first_error", has_error), ("all_right", ~has_error & labelled.any(axis=1))):
        if answers.any():
            found[name] = float(hit[answers].mean())
    return found
