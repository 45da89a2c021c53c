"""Alignment from single labelled answers: KTO and BCO, without pairs, a reward model or rollouts."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jrlhf.algorithms import FROM_LABELS
from jrlhf.algorithms.kto import KTOConfig
from jrlhf.config import StageContext, UserError
from jrlhf.data.sources import check_row, load
from jrlhf.models.transformer import Model
from jrlhf.ops.intervals import auc_interval
from jrlhf.ops.unpaired import UnpairedConfig, answer_logprobs
from jrlhf.optim import build_optimizer
from jrlhf.sharding import DEVICE, make_mesh, placed
from jrlhf.training.artifacts import begin, save_trained
from jrlhf.training.data import best_and_worst, in_chunks, rows_of, split_by_prompt, unpaired_arrays
from jrlhf.training.evaluation import chunk_rows
from jrlhf.training.loop import stage_key
from jrlhf.training.offline import train_offline
from jrlhf.training.stages.alignment import AlignmentStage
from jrlhf.training.stages.common import check_length, labelled, start_config
from jrlhf.training.stages.preferences import Preferences, stored_preferences, with_references
from jrlhf.training.stages.sizes import (
    Count,
    at_most,
    check_kind,
    count_rows,
    finished,
    local_rows,
    training_plan,
)
from jrlhf.training.utilisation import Pass, StepFlops, flops_of_passes, peak_flops
from jrlhf.types import AnswerBatch, UnpairedBatch


@dataclass(frozen=True)
class UnpairedAlignment(AlignmentStage):
    """A policy trained on single answers that are labelled desirable or not, against its own start as the reference.

    `algorithm` is the config of any of `jrlhf.algorithms.FROM_LABELS`. The answers are those of a preference stage or
    of `data`, a source of binary or of preference rows. Of ranked answers the best to each prompt are desirable and
    the worst undesirable; those between, and prompts whose answers are all tied, are left out.
    """

    algorithm: UnpairedConfig = field(default_factory=KTOConfig)

    def validate(self, stages):
        self.check_algorithm(FROM_LABELS, "single labelled answers")
        super().validate(stages)

    def plan(self, ctx):
        config = start_config(ctx.stages, self.start)
        rows = self._planned(ctx)
        if self.too_long == "drop":
            rows = at_most(rows.n)
        length = at_most(min(self.max_length or config.context, config.context))
        sequences = 2 if self.algorithm.mismatched else 1
        plan = training_plan(config, self.loop, rows, length, sequences, lora=self.lora)
        return with_references(plan, self, config)

    def _planned(self, ctx: StageContext) -> Count:
        """Labelled answers to train on, as well as can be told before the parent ran."""
        if self.preferences and not finished(ctx.parents.get(self.preferences)):
            parent = ctx.stages[self.preferences]
            if not isinstance(parent, Preferences):
                return Count(0, False)
            return at_most(count_rows(parent.prompts).n * parent.responses)
        if self.data is not None:
            rows = local_rows(self.data)
            if rows is None:
                return at_most(count_rows(self.data).n)
            check_kind(self.data, row_kind(rows), "data")
        else:
            rows = stored_preferences(ctx.parents[self.preferences])
        return Count(len(split_by_prompt(as_labelled(rows), self.eval_fraction)[0]))

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            key = stage_key(ctx)
            policy = self.load_start(ctx, mesh)
            model, tokenizer = policy.model, policy.tokenizer
            beginning = begin(policy, "lm", self.lora, jax.random.fold_in(key, 1))
            trained = beginning.model
            whole = lambda state: trained.whole(state.params["policy"], beginning.frozen)  # noqa: E731
            check_length(self.max_length, model, "max_length")
            limit = self.max_length or model.config.context
            train_rows, held_rows = split_by_prompt(self._rows(ctx), self.eval_fraction)
            arrays = partial(
                unpaired_arrays,
                tokenizer=tokenizer,
                limit=limit,
                too_long=self.too_long,
                console=ctx.console,
            )
            answers, _ = arrays(train_rows, seed=ctx.seed if self.algorithm.mismatched else None)
            held, prompts = arrays(held_rows, label="held-out labelled answers")
            report_labels(np.asarray(answers.labels), np.asarray(held.labels), self.algorithm, ctx.console)
            held = with_reference(model, policy.params, held, mesh)
            if self.algorithm.reference == "precomputed":
                answers = with_reference(model, policy.params, answers, mesh)

            probe = self.probe(ctx, mesh, policy, trained, jax.random.fold_in(key, 2))

            def evaluate(state, step):
                params = whole(state)
                metrics = implicit_auc(trained, params, held, prompts, mesh)
                return metrics | probe(params, step)

            steps = self.loop.total_steps(rows_of(answers))
            reference = (
                (Pass(trained.base, trained=False),) if self.algorithm.reference == "on_the_fly" else ()
            )

            def flops(batch: UnpairedBatch) -> StepFlops:
                learned = flops_of_passes((Pass(trained), *reference), batch.answers)
                # The shift is measured before the update, on the mismatched answers where the algorithm has them.
                before = (Pass(trained, trained=False),)
                if batch.mismatched is None:
                    return learned.plus(flops_of_passes(before, batch.answers))
                return learned.plus(flops_of_passes((*before, *reference), batch.mismatched))

            optimizer = build_optimizer(self.optim, steps)
            algorithm = FROM_LABELS[type(self.algorithm)](self.algorithm, trained, optimizer)
            state = train_offline(
                ctx, mesh, self.loop, steps, algorithm, (beginning.trained, policy.params, key),
                trained.logical_axes(), answers, evaluate, ("pref/loss", "pref/label_acc"),
                flops=flops, peak=peak_flops(mesh, trained),
            )  # fmt: skip
            params = save_trained(
                ctx.folder, beginning, state.params["policy"], tokenizer, ctx.parents[self.start]
            )
            auc = implicit_auc(model, params, held, prompts, mesh)
        return {
            "implicit_auc": auc["eval/label_auc/mean"],
            "implicit_auc_low": auc["eval/label_auc/ci_low"],
            "implicit_auc_high": auc["eval/label_auc/ci_high"],
            "desirable": int(np.sum(answers.labels)),
            "undesirable": int(np.sum(~answers.labels)),
        }

    def _rows(self, ctx: StageContext) -> list[dict]:
        """Binary rows."""
        if self.preferences:
            return as_labelled(stored_preferences(ctx.parents[self.preferences]))
        assert self.data is not None
        rows, report = load(self.data)
        labelled(ctx.console, "data").print(f"{report}", highlight=False)
        kind, where = row_kind(rows), type(self.data).__name__
        return as_labelled([check_row(row, kind, f"{where} row {n}") for n, row in enumerate(rows, 1)])


def row_kind(rows: list[dict]) -> str:
    return "preference" if rows and "responses" in rows[0] else "binary"


def as_labelled(rows: list[dict]) -> list[dict]:
    """Binary rows as they are, or those of preference rows."""
    if row_kind(rows) == "binary":
        return rows
    found = best_and_worst(rows)
    if not found:
        raise UserError("the preferences tell no answer from another: every prompt's answers are tied")
    return found


def report_labels(labels: np.ndarray, held: np.ndarray, algorithm: UnpairedConfig, console: Any) -> None:
    """Says how many answers have each label, and what the weights make of it; UserError when one is missing."""
    for name, found in (("training", labels), ("held-out", held)):
        if np.all(found) or not np.any(found):
            which = "desirable" if np.all(found) else "undesirable"
            raise UserError(f"all {len(found)} {name} answers are labelled {which}: both labels are needed")
    desirable = int(np.sum(labels))
    undesirable = len(labels) - desirable
    console.print(f"  labels: {desirable} desirable, {undesirable} undesirable", highlight=False)
    if isinstance(algorithm, KTOConfig):
        wanted = algorithm.desirable_weight * desirable
        ratio = wanted / (algorithm.undesirable_weight * undesirable)
        if not 1 <= ratio <= 4 / 3:
            console.print(
                f"  KTO's authors keep desirable_weight x desirable answers at 1 to 4/3 times undesirable_weight x "
                f"undesirable ones; here it is {ratio:.3g} times. undesirable_weight {wanted / undesirable:.3g} would "
                "balance them.",
                highlight=False,
            )


jitted_answer_logprobs = jax.jit(answer_logprobs, static_argnums=0)


def all_answer_logprobs(model: Model, params, answers: AnswerBatch, mesh: Mesh) -> np.ndarray:
    """Summed log-probabilities of all answers, [N]."""
    f = partial(jitted_answer_logprobs, model, params)
    return in_chunks(f, answers, chunk_rows(rows_of(answers), mesh), mesh)


def with_reference(model: Model, ref_params, batch: UnpairedBatch, mesh: Mesh) -> UnpairedBatch:
    """The answers with the reference's log-probabilities, computed once."""
    ref_params = placed(ref_params, DEVICE)
    score = lambda answers: answers._replace(  # noqa: E731
        ref_logprobs=all_answer_logprobs(model, ref_params, answers, mesh)
    )
    mismatched = None if batch.mismatched is None else score(batch.mismatched)
    return batch._replace(answers=score(batch.answers), mismatched=mismatched)


def implicit_auc(
    model: Model, params, held: UnpairedBatch, prompts: list[str], mesh: Mesh
) -> dict[str, float]:
    """How often a held-out desirable answer has a larger log(pi / ref) than an undesirable one."""
    gain = all_answer_logprobs(model, params, held.answers, mesh) - held.answers.ref_logprobs
    auc, low, high = auc_interval(gain, np.asarray(held.labels), np.asarray(prompts))
    return {"eval/label_auc/mean": auc, "eval/label_auc/ci_low": low, "eval/label_auc/ci_high": high}
