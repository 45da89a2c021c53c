"""What the stages of algorithms on pairs of answers share: everything but the algorithm (DPO and its relatives)."""

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jrlhf.config import PREFERENCES, Source, StageContext, UserError, stage_ref
from jrlhf.models.transformer import Model
from jrlhf.ops.intervals import wilson_interval
from jrlhf.ops.pairs import PairConfig, pair_logprobs
from jrlhf.optim import OptimConfig, Optimizer, build_optimizer
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import begin, load_model, save_trained
from jrlhf.training.data import in_chunks, pair_arrays, preference_arrays, rows_of, split_by_prompt
from jrlhf.training.evaluation import Probe, Sampler, chunk_rows, criteria_accuracy, prompt_slots
from jrlhf.training.loop import stage_key
from jrlhf.training.offline import train_offline
from jrlhf.training.rewards import make_reward, program_reward
from jrlhf.training.stages.common import (
    FineTuningStage,
    TooLongPrompt,
    check_answers,
    check_length,
    check_microbatches,
    usable_prompts,
)
from jrlhf.training.stages.preferences import check_one_of, preference_plan, preference_rows
from jrlhf.types import Algorithm, PairBatch, PreferenceBatch


@dataclass(frozen=True)
class PairStage(FineTuningStage):
    """A policy trained on pairs of ranked answers, against its own start as the reference.

    To add one: a frozen dataclass with `algorithm` (a PairConfig with a default) and `make_algorithm`.
    """

    abstract: ClassVar[bool] = True

    preferences: str = stage_ref("", PREFERENCES)
    data: Source | None = None
    pairs: Literal["all", "best_worst"] = "all"  # of each prompt's ranked answers
    optim: OptimConfig = OptimConfig(lr=1e-4, schedule="cosine", warmup_steps=20)
    algorithm: PairConfig = field(default_factory=PairConfig)
    eval_fraction: float = 0.1  # of the prompts, for held-out implicit accuracy
    eval_prompts: Source | None = None  # sampled from during training: an offline method drifts too
    sampling: SamplingConfig = SamplingConfig()  # for eval_prompts
    gold: str = ""  # a program reward, logged on eval_prompts
    max_length: int = 0
    too_long: TooLongPrompt = "error"

    def make_algorithm(self, model: Model, optimizer: Optimizer) -> Algorithm:
        """Of PairBatches; its `init` takes (params, ref_params, key)."""
        raise TypeError(f"{type(self).__name__} does not define make_algorithm()")

    def validate(self, stages):
        check_one_of(self)
        check_microbatches(self)
        self.check_adapters(stages)
        if self.gold:
            program_reward(self.gold)
            if self.eval_prompts is None:
                raise UserError("gold is measured on samples: give eval_prompts")
        if self.eval_prompts is not None and self.sampling.filtered:
            raise UserError(
                "sampling: the KL to the start policy is measured on unfiltered samples; use temperature"
            )
        if not 0 < self.eval_fraction < 1:
            raise UserError(f"eval_fraction must be between 0 and 1, got {self.eval_fraction}")
        if self.eval_prompts is not None:
            check_answers(self.start, stages, self.sampling, 0)

    def plan(self, ctx):
        return preference_plan(self, ctx, self.pairs)

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            key = stage_key(ctx)
            policy = load_model(ctx.parents[self.start], mesh)
            model, tokenizer = policy.model, policy.tokenizer
            beginning = begin(policy, "lm", self.lora, jax.random.fold_in(key, 1))
            trained = beginning.model
            whole = lambda state: trained.whole(state.params["policy"], beginning.frozen)  # noqa: E731
            train_rows, held_rows = split_by_prompt(preference_rows(self, ctx), self.eval_fraction)
            check_length(self.max_length, model, "max_length")
            limit = self.max_length or model.config.context
            ranked, answers = (
                preference_arrays(r, tokenizer, limit, self.too_long, ctx.console, label)
                for r, label in zip(
                    (train_rows, held_rows), ("preferences", "held-out preferences"), strict=True
                )
            )
            pairs, held = pair_arrays(ranked, self.pairs), pair_arrays(answers, self.pairs)
            held = with_reference(model, policy.params, held, mesh)
            if self.algorithm.reference == "precomputed":
                pairs = with_reference(model, policy.params, pairs, mesh)

            probe = None
            if self.eval_prompts:
                room = model.config.context - self.sampling.max_new_tokens
                rows, ids = usable_prompts(
                    policy, self.eval_prompts, room, self.sampling, self.too_long, ctx, "eval_prompts"
                )
                sampler = Sampler(trained, tokenizer, mesh, self.sampling, prompt_slots(ids))
                rewards = [make_reward(self.gold, {}, mesh, tokenizer)] if self.gold else []
                probe = Probe(
                    ctx.folder, sampler, rows, ids, policy.params, rewards, jax.random.fold_in(key, 2)
                )

            def evaluate(state, step):
                params = whole(state)
                metrics = implicit_accuracy(trained, params, held, mesh)
                return metrics | (probe(params, step) if probe else {})

            steps = self.loop.total_steps(rows_of(pairs))
            algorithm = self.make_algorithm(trained, build_optimizer(self.optim, steps))
            state = train_offline(
                ctx, mesh, self.loop, steps, algorithm, (beginning.trained, policy.params, key),
                trained.logical_axes(), pairs, evaluate, ("pref/loss", "pref/acc"),
            )  # fmt: skip
            params = save_trained(
                ctx.folder, beginning, state.params["policy"], tokenizer, ctx.parents[self.start]
            )
            accuracy = implicit_accuracy(model, params, held, mesh)
            by_criterion = {}
            if rows_of(answers) == len(held_rows):
                gain = answer_logprobs(model, params, answers, mesh) - answer_logprobs(
                    model, policy.params, answers, mesh
                )
                by_criterion = criteria_accuracy(gain, held_rows)
        return {
            "implicit_accuracy": accuracy["eval/pref_acc/mean"],
            "implicit_accuracy_low": accuracy["eval/pref_acc/ci_low"],
            "implicit_accuracy_high": accuracy["eval/pref_acc/ci_high"],
            "implicit_accuracy_against": by_criterion,
        }


def answer_logprobs(model: Model, params, answers: PreferenceBatch, mesh: Mesh) -> np.ndarray:
    """Summed log-probability of every answer, [N, K]."""
    f = jax.jit(lambda params, batch: pair_logprobs(model, params, batch))
    return in_chunks(partial(f, params), answers, chunk_rows(rows_of(answers), mesh), mesh)


def with_reference(model: Model, ref_params, pairs: PairBatch, mesh: Mesh) -> PairBatch:
    """The pairs with the reference's log-probabilities, computed once."""
    return pairs._replace(ref_logprobs=all_pair_logprobs(model, ref_params, pairs, mesh))


def all_pair_logprobs(model: Model, params, pairs: PairBatch, mesh: Mesh) -> np.ndarray:
    """Summed log-probabilities of both answers of all pairs, [N, 2]."""
    f = partial(jitted_pair_logprobs, model, params)
    return in_chunks(f, pairs, chunk_rows(rows_of(pairs), mesh), mesh)


jitted_pair_logprobs = jax.jit(pair_logprobs, static_argnums=0)


def implicit_accuracy(model: Model, params, held: PairBatch, mesh: Mesh) -> dict[str, float]:
    """Share of held-out pairs whose chosen answer has the larger log(pi / ref)."""
    gain = all_pair_logprobs(model, params, held, mesh) - held.ref_logprobs
    right = float(np.sum(gain[:, 0] > gain[:, 1]))
    low, high = wilson_interval(right, len(gain))
    return {
        "eval/pref_acc/mean": right / len(gain),
        "eval/pref_acc/ci_low": low,
        "eval/pref_acc/ci_high": high,
    }
