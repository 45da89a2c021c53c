"""Direct alignment: DPO and its relatives on preferences, without a reward model or rollouts."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jrlhf.algorithms import FROM_PAIRS
from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.config import StageContext, UserError, no_fingerprint
from jrlhf.models.packed import as_packed
from jrlhf.models.transformer import Model
from jrlhf.ops.intervals import wilson_interval
from jrlhf.ops.pairs import PairConfig, answers_of, pair_logprobs
from jrlhf.optim import build_optimizer
from jrlhf.sharding import DEVICE, make_mesh, placed
from jrlhf.training.artifacts import begin, save_trained
from jrlhf.training.data import (
    PackedFeed,
    check_plain,
    in_chunks,
    pair_arrays,
    preference_arrays,
    rows_of,
    split_by_prompt,
)
from jrlhf.training.evaluation import chunk_rows, criteria_accuracy
from jrlhf.training.loop import stage_key
from jrlhf.training.offline import train_offline
from jrlhf.training.stages.alignment import AlignmentStage
from jrlhf.training.stages.common import check_length, check_packing, start_config
from jrlhf.training.stages.preferences import preference_plan, preference_rows, with_references
from jrlhf.training.utilisation import Pass, flops_of_passes, peak_flops
from jrlhf.types import PairBatch, PreferenceBatch, RankedBatch


@dataclass(frozen=True)
class DirectAlignment(AlignmentStage):
    """A policy trained on ranked answers, against its own start as the reference (where `algorithm` has one).

    `algorithm` is the config of any of `jrlhf.algorithms.FROM_PAIRS`; another one makes another method.
    """

    pairs: Literal["all", "best_worst"] = "all"  # of each prompt's ranked answers, for algorithms on pairs
    algorithm: PairConfig = DPOConfig()
    # a prompt goes through the model once for all its answers, and several share a row of tokens
    packing: bool = no_fingerprint(True)

    def validate(self, stages):
        self.check_algorithm(FROM_PAIRS, "pairs of answers")
        super().validate(stages)
        if not self.needs_download(stages):
            check_packing(self.packing, start_config(stages, self.start), self.max_length)
        if self.of_rankings and self.pairs != "all":
            raise UserError(
                f"pairs: {type(self.algorithm).__name__} learns from whole rankings, not from {self.pairs!r} pairs"
            )
        if self.lora.rank and getattr(self.algorithm, "ref_update_every", 0):
            raise UserError(
                "algorithm.ref_update_every: with adapters (lora) the reference is the base, and stays"
            )

    @property
    def of_rankings(self) -> bool:
        return self.algorithm.learns_from == "rankings"

    @property
    def unread(self) -> tuple[str, ...]:
        """Fields of preference rows that the algorithm cannot use."""
        reads = {"weight": self.algorithm.reads_weights, "probability": self.algorithm.reads_certainty}
        return tuple(name for name, is_read in reads.items() if not is_read)

    def no_reference(self) -> str:
        if self.algorithm.reference_scored == "never":
            return f"{type(self.algorithm).__name__} has no reference"
        return super().no_reference()

    def plan(self, ctx):
        plan = preference_plan(self, ctx, "" if self.of_rankings else self.pairs)
        return with_references(plan, self, start_config(ctx.stages, self.start))

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            key = stage_key(ctx)
            policy = self.load_start(ctx, mesh)
            model, tokenizer = policy.model, policy.tokenizer
            beginning = begin(policy, "lm", self.lora, jax.random.fold_in(key, 1))
            trained = beginning.model
            check_packing(self.packing, model.config, self.max_length)
            if self.packing:
                model, trained = as_packed(model), as_packed(trained)
            whole = lambda state: trained.whole(state.params["policy"], beginning.frozen)  # noqa: E731
            rows = preference_rows(self, ctx)
            check_plain(rows, self.unread, f"{type(self.algorithm).__name__} as it is set")
            train_rows, held_rows = split_by_prompt(rows, self.eval_fraction)
            check_length(self.max_length, model, "max_length")
            limit = self.max_length or model.config.context
            ranked, answers = (
                preference_arrays(r, tokenizer, limit, self.too_long, ctx.console, label)
                for r, label in zip(
                    (train_rows, held_rows), ("preferences", "held-out preferences"), strict=True
                )
            )
            score = partial(scored, self.algorithm, model, policy.params, mesh=mesh, packing=self.packing)
            # Held-out accuracy is that of ordered pairs, whatever is learned from, and against the start.
            held = score(pair_arrays(answers, self.pairs))
            batch: PairBatch | RankedBatch = (
                rankings(ranked)
                if self.of_rankings
                else pair_arrays(ranked, self.pairs, even=self.algorithm.reads_certainty)
            )
            if self.algorithm.reference_scored == "precomputed":
                batch = score(batch)

            probe = self.probe(ctx, mesh, policy, beginning.model, jax.random.fold_in(key, 2))

            def evaluate(state, step):
                params = whole(state)
                metrics = implicit_accuracy(self.algorithm, trained, params, held, mesh, self.packing)
                return metrics | probe(params, step)

            steps = self.loop.total_steps(rows_of(batch))
            make = FROM_PAIRS[type(self.algorithm)]
            algorithm = make(self.algorithm, trained, build_optimizer(self.optim, steps))
            batches: Any = batch
            if self.packing:
                parts = self.algorithm.microbatches
                batches = PackedFeed(batch, self.loop.batch_size, ctx.seed, mesh, steps, parts)
            passes = [Pass(trained)]
            if self.algorithm.reference_scored == "on_the_fly":
                passes.append(Pass(trained.base, trained=False))
            state = train_offline(
                ctx, mesh, self.loop, steps, algorithm, (beginning.trained, policy.params, key),
                trained.logical_axes(), batches, evaluate, ("pref/loss", "pref/acc"),
                flops=partial(flops_of_passes, passes), peak=peak_flops(mesh, trained),
            )  # fmt: skip
            params = save_trained(
                ctx.folder, beginning, state.params["policy"], tokenizer, ctx.parents[self.start]
            )
            accuracy = implicit_accuracy(self.algorithm, model, params, held, mesh, self.packing)
            by_criterion = {}
            if rows_of(answers) == len(held_rows):
                every = score(rankings(answers))
                implied = implicit_rewards(self.algorithm, model, params, every, mesh, self.packing)
                by_criterion = criteria_accuracy(implied, held_rows)
        return {
            "implicit_accuracy": accuracy["eval/pref_acc/mean"],
            "implicit_accuracy_low": accuracy["eval/pref_acc/ci_low"],
            "implicit_accuracy_high": accuracy["eval/pref_acc/ci_high"],
            "implicit_accuracy_against": by_criterion,
        }


def rankings(answers: PreferenceBatch) -> RankedBatch:
    """All of a prompt's answers in one row; the reference is yet to be scored."""
    nothing = np.zeros(answers.ranks.shape, np.float32)
    return RankedBatch(answers.tokens, answers.mask, answers.response_mask, nothing, answers.ranks)


def scored(config: PairConfig, model: Model, ref_params, batch: Any, mesh: Mesh, packing: bool) -> Any:
    """The batch (pairs or rankings) with the reference's log-probabilities, computed once; as it is without one."""
    if config.reference_scored == "never":
        return batch
    f = partial(jitted_pair_logprobs, model, config.tail_weight, placed(ref_params, DEVICE))
    logprobs = in_chunks(f, batch, chunk_rows(rows_of(batch), mesh), mesh, packing)
    return batch._replace(ref_logprobs=logprobs)


def implicit_rewards(
    config: PairConfig, model: Model, params, batch: PairBatch | RankedBatch, mesh: Mesh, packing: bool
) -> np.ndarray:
    """What the policy implies for every answer, [N, K]: of DPO beta log(pi/ref), of others what they say."""
    f = partial(jitted_rewards, config, model, params)
    return in_chunks(f, batch, chunk_rows(rows_of(batch), mesh), mesh, packing)


@partial(jax.jit, static_argnums=(0, 1))
def jitted_pair_logprobs(model: Model, tail_weight: float, params, batch):
    return pair_logprobs(model, params, batch, tail_weight)


@partial(jax.jit, static_argnums=(0, 1))
def jitted_rewards(config: PairConfig, model: Model, params, batch):
    return config.implicit_reward(answers_of(model, params, batch, config.tail_weight))


def implicit_accuracy(
    config: PairConfig, model: Model, params, held: PairBatch, mesh: Mesh, packing: bool
) -> dict[str, float]:
    """Share of held-out pairs whose chosen answer has the larger implicit reward."""
    rewards = implicit_rewards(config, model, params, held, mesh, packing)
    right = float(np.sum(rewards[:, 0] > rewards[:, 1]))
    low, high = wilson_interval(right, len(rewards))
    return {
        "eval/pref_acc/mean": right / len(rewards),
        "eval/pref_acc/ci_low": low,
        "eval/pref_acc/ci_high": high,
    }
