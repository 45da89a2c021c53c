"""Distillation: a student learns a teacher's next-token distributions, on demonstrations or on its own samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrlhf.algorithms.distillation import DistillationConfig, make_distillation
from jrlhf.config import LANGUAGE_MODEL, Source, Stage, StageContext, UserError, stage_ref
from jrlhf.data.batching import Batches
from jrlhf.data.tokenizer import Tokenizer, load_tokenizer
from jrlhf.models.hf import resolve_checkpoint
from jrlhf.models.transformer import Model
from jrlhf.ops.distillation import forward_kl, reverse_kl
from jrlhf.ops.masking import positions_from_mask
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import begin, load_model, save_trained
from jrlhf.training.data import BatchFeed, demonstration_batch, in_chunks, prompt_ids, rows_of
from jrlhf.training.evaluation import Sampler, chunk_rows, in_rows, prompt_slots
from jrlhf.training.loop import Phases, guarded, sharded_state, stage_key, train
from jrlhf.training.stages.common import (
    FineTuningStage,
    TooLong,
    check_answers,
    check_length,
    check_microbatches,
    labelled,
    start_config,
)
from jrlhf.training.stages.language_model import Checkpoint, Pretrain, hold_out
from jrlhf.training.stages.sizes import at_most, check_kind, count_rows, training_plan
from jrlhf.training.utilisation import Pass, StepFlops, counted, flops_of_passes, peak_flops, sampled_flops
from jrlhf.types import Rollout, SequenceBatch, TrainState


@dataclass(frozen=True)
class Distill(FineTuningStage):
    """The student `start` learns from the stage `teacher`, another model (of any size) with the same vocabulary.

    `algorithm.on_policy` says how often it learns on its own samples: below 1 it needs `data`, above 0 `prompts`.
    """

    teacher: str = stage_ref(artifact=LANGUAGE_MODEL)
    data: Source | None = None  # demonstrations
    prompts: Source | None = None  # that the student answers
    algorithm: DistillationConfig = field(default_factory=DistillationConfig)
    sampling: SamplingConfig = SamplingConfig()  # of the student's answers; no gradient goes through it
    optim: OptimConfig = OptimConfig(lr=3e-4, schedule="cosine")
    length: int = 0  # tokens of a packed row of data; 0: the student's context
    max_prompt: int = 0  # longest of prompts in tokens; 0: whatever fits the context
    too_long: TooLong = "error"  # of data; prompts that are too long are dropped unless this is "error"
    eval_rows: int = 32  # packed rows of data kept for the held-out divergences
    eval_prompts: Source | None = None  # answered by the student, to measure its KL to the teacher there

    def validate(self, stages):
        if self.teacher == self.start:
            raise UserError(f"teacher: {self.teacher!r} is the student's own start: it has nothing to teach")
        share = self.algorithm.on_policy
        if (share < 1) != (self.data is not None):
            raise UserError(
                f"data: demonstrations are learned from where algorithm.on_policy is below 1 (it is {share}): give "
                "data then, and only then"
            )
        if (share > 0) != (self.prompts is not None):
            raise UserError(
                f"prompts: the student answers them where algorithm.on_policy is above 0 (it is {share}): give "
                "prompts then, and only then"
            )
        if self.prompts is not None and not self.loop.steps:
            raise UserError("loop.epochs: with the student's own samples steps are counted; set loop.steps")
        if self.prompts is not None or self.eval_prompts is not None:
            for name in (self.start, self.teacher):
                check_answers(name, stages, self.sampling, self.max_prompt)
        temperatures = self.sampling.temperature, self.algorithm.temperature
        if self.eval_prompts is not None and (self.sampling.filtered or len({*temperatures}) > 1):
            raise UserError(
                "eval_prompts: the KL to the teacher is that of unfiltered samples at one temperature; sampling has "
                f"{temperatures[0]}, algorithm {temperatures[1]}"
            )
        check_microbatches(self)
        self.check_adapters(stages)
        check_teacher(stages, self.start, self.teacher)

    def plan(self, ctx):
        config, teacher = (start_config(ctx.stages, name) for name in (self.start, self.teacher))
        rows = at_most(max(count_rows(self.data).n - self.eval_rows, 0))
        if self.data is not None:
            check_kind(self.data, "demonstration", "data")
        plan = training_plan(
            config, self.loop, rows, at_most(self.length or config.context),
            read=count_rows(self.data or self.prompts), lora=self.lora,
        )  # fmt: skip
        frozen = jnp.dtype(teacher.param_dtype).itemsize * teacher.n_params
        return replace(plan, memory_bytes=plan.memory_bytes + frozen)

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            key = stage_key(ctx)
            student, teacher = (load_model(ctx.parents[name], mesh) for name in (self.start, self.teacher))
            if not same_vocabulary(student.tokenizer, teacher.tokenizer):
                raise UserError(other_vocabulary(self.start, self.teacher))
            beginning = begin(student, "lm", self.lora, jax.random.fold_in(key, 1))
            model, tokenizer = beginning.model, student.tokenizer
            length = self.length or model.config.context
            for each in (model, teacher.model):
                check_length(length if self.data is not None else 0, each, "length")

            held: SequenceBatch | None = None
            feed: BatchFeed | None = None
            steps = self.loop.steps
            if self.data is not None:
                arrays = demonstration_batch(
                    self.data, tokenizer, length, self.too_long, labelled(ctx.console, "data")
                )
                kept, held = hold_out(arrays, self.eval_rows)
                feed = BatchFeed(kept, self.loop.batch_size, ctx.seed, mesh)
                steps = self.loop.total_steps(rows_of(kept))
            samplers = {
                name: self._sampler(source, model, tokenizer, mesh, ctx, name)
                for name, source in (("prompts", self.prompts), ("eval_prompts", self.eval_prompts))
                if source is not None
            }
            algorithm = make_distillation(
                self.algorithm, model, teacher.model, build_optimizer(self.optim, steps)
            )
            template, make_state, fixed = sharded_state(
                mesh, model.logical_axes(), algorithm.init, beginning.trained, teacher.params, key, beginning.frozen,
                offload_optimizer=self.loop.offload_optimizer,
            )  # fmt: skip

            def evaluate(state: TrainState, step: int) -> dict:
                whole = model.whole(state.params["policy"], beginning.frozen)
                compared = (model, teacher.model, self.algorithm.temperature, whole, teacher.params)
                metrics = {} if held is None else held_out_divergences(*compared, held, mesh)
                if "eval_prompts" in samplers:
                    sampler, ids = samplers["eval_prompts"]
                    samples = sampler.sample(whole, ids, jax.random.fold_in(jax.random.fold_in(key, 2), step))
                    metrics |= on_policy_kl(*compared, samples, mesh)
                return metrics

            passes = (Pass(model), Pass(teacher.model, trained=False))
            counting = counted(algorithm.train_step, partial(flops_of_passes, passes))
            step = jax.jit(guarded(counting, self.loop), donate_argnums=0)
            do_step = self._step(
                ctx.seed, steps, algorithm, step, fixed, feed, samplers.get("prompts"), key, beginning
            )
            measured = held is not None or bool(self.eval_prompts)
            try:
                state = train(
                    ctx, self.loop, steps, template, make_state, do_step, evaluate if measured else None,
                    peak=peak_flops(mesh, model, teacher.model),
                )  # fmt: skip
            finally:
                if feed is not None:
                    feed.close()
            result = evaluate(state, steps)
            save_trained(ctx.folder, beginning, state.params["policy"], tokenizer, ctx.parents[self.start])
        return {name.removeprefix("eval/").removesuffix("/mean"): value for name, value in result.items()}

    def _sampler(self, source: Source, model: Model, tokenizer: Tokenizer, mesh: Mesh, ctx, name: str):
        """(sampler, ids of the prompts)."""
        limit = self.max_prompt or model.config.context - self.sampling.max_new_tokens
        too_long = "error" if self.too_long == "error" else "drop"
        _, ids = prompt_ids(source, tokenizer, limit, too_long, labelled(ctx.console, name))
        return Sampler(model, tokenizer, mesh, self.sampling, prompt_slots(ids)), ids

    def _step(self, seed, steps, algorithm, step, fixed, feed, asked, key, beginning) -> Callable:
        """`do_step` of the loop: a batch of demonstrations, or of the student's own answers.

        Which of them a step takes is a function of the seed; the batches of either are gone through in order.
        """
        own = np.random.default_rng(seed).random(steps) < self.algorithm.on_policy
        before = np.cumsum(own) - own  # steps of its own before each
        make_batch = jax.jit(algorithm.make_batch)
        if asked is not None:
            sampler, ids = asked
            batches = Batches(len(ids), self.loop.batch_size, seed)
            drawn = jax.jit(
                lambda samples, flops: sampled_flops(sampler.model, samples).plus(flops).metrics()
            )

        def do_step(state: TrainState, n: int, finish: Callable[[], None]):
            extra: dict[str, Any] = {"distill/on_policy": float(own[n])}
            phases = Phases(self.loop, n, state, finish)
            if own[n]:
                prompts = [ids[i] for i in batches.indices(int(before[n]))]
                policy = sampler.model.whole(state.params["policy"], beginning.frozen)
                draw = jax.random.fold_in(jax.random.fold_in(key, 3), n)
                samples = sampler.draw(policy, prompts, draw)
                batch = make_batch(state, samples)
                lengths = jnp.sum(samples.response_mask, axis=1, dtype=jnp.float32)
                extra["rollout/len_mean"] = jnp.mean(lengths)
                extra["rollout/eos_rate"] = jnp.mean(samples.ended, dtype=jnp.float32)
                phases.end("rollout", batch)
            else:
                batch = feed(n - int(before[n]))
                phases.end("data", batch)
            state, metrics = step(state, fixed, batch)
            phases.end("update", (state, metrics))
            if own[n]:
                metrics |= drawn(
                    samples, StepFlops(metrics["perf/model_flops"], metrics["perf/hardware_flops"])
                )
            return state, metrics | extra | phases.metrics, batch

        return do_step


def held_out_divergences(
    model: Model, teacher: Model, temperature: float, params, teacher_params, held: SequenceBatch, mesh: Mesh
) -> dict[str, float]:
    """Both KLs per target token on held-out demonstrations."""
    sums = in_chunks(
        partial(row_divergences, model, teacher, temperature, params, teacher_params),
        held, chunk_rows(rows_of(held), mesh), mesh,
    )  # fmt: skip
    forward, reverse = np.sum(sums, axis=0) / np.sum(held.loss_mask[:, 1:])
    return {"eval/forward_kl": float(forward), "eval/reverse_kl": float(reverse)}


def on_policy_kl(
    model: Model, teacher: Model, temperature: float, params, teacher_params, samples: Rollout, mesh: Mesh
) -> dict[str, float]:
    """KL(student ‖ teacher) of whole answers: at each state of the student's answers exact, summed over an answer."""

    def sums(rows: Rollout):
        prompt = rows.tokens.shape[1] - rows.response_mask.shape[1]
        targets = jnp.pad(rows.response_mask, ((0, 0), (prompt, 0)))
        batch = SequenceBatch(rows.tokens, rows.mask, positions_from_mask(rows.mask), targets)
        return row_divergences(model, teacher, temperature, params, teacher_params, batch)

    kl = in_rows(sums, samples, mesh)[:, 1]
    return {
        "eval/teacher_kl/mean": float(np.mean(kl)),
        "eval/length/mean": float(np.mean(np.sum(samples.response_mask, axis=1))),
    }


@partial(jax.jit, static_argnums=(0, 1, 2))
def row_divergences(
    model: Model, teacher: Model, temperature: float, params, teacher_params, batch: SequenceBatch
) -> jax.Array:
    """Forward and reverse KL summed over each row's targets, [B, 2]."""
    both = lambda s, t: jnp.stack([forward_kl(s, t), reverse_kl(s, t)], axis=-1)  # noqa: E731
    found = model.divergence(
        params, teacher_params, batch.tokens, batch.segment_ids, 1, temperature, both, teacher, batch.positions
    )  # fmt: skip
    return jnp.sum(jnp.where(batch.loss_mask[:, 1:, None], found, 0.0), axis=1)


# --- one vocabulary -----------------------------------------------------------------------------------------


def same_vocabulary(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether every id stands for the same text. How texts are cut, chat templates, and which ids end a text, begin
    or pad it (no text stands for those) may differ."""
    if a.fingerprint() == b.fingerprint():
        return True
    special = {*a.eos_ids, *b.eos_ids, a.pad_id, b.pad_id, a.bos_id, b.bos_id}
    ids = (i for i in range(a.vocab_size) if i not in special)
    return a.vocab_size == b.vocab_size and all(a.decode([i]) == b.decode([i]) for i in ids)


def other_vocabulary(start: str, teacher: str) -> str:
    return (
        f"teacher: {teacher!r} has another vocabulary than the student {start!r}, so that their distributions cannot "
        "be compared. Start both from models with one tokenizer."
    )


def check_teacher(stages: Mapping[str, Stage], start: str, teacher: str) -> None:
    """At config time, as well as can be told, that both have one vocabulary."""
    a, b = (first_stage(stages, name) for name in (start, teacher))
    if a is b:
        return
    trained = [stage for stage in (a, b) if isinstance(stage, Pretrain) and not stage.tokenizer.path]
    if len(trained) == 2 and (trained[0].tokenizer, trained[0].data) != (
        trained[1].tokenizer,
        trained[1].data,
    ):
        raise UserError(other_vocabulary(start, teacher))
    ours, theirs = (known_tokenizer(stage, stages) for stage in (a, b))
    if ours is not None and theirs is not None and not same_vocabulary(ours, theirs):
        raise UserError(other_vocabulary(start, teacher))


def first_stage(stages: Mapping[str, Stage], name: str) -> Stage:
    """The stage at the beginning of a model's chain of stages, whose tokenizer the others keep."""
    stage = stages[name]
    return first_stage(stages, stage.start) if isinstance(stage, FineTuningStage) else stage


def known_tokenizer(stage: Stage, stages: Mapping[str, Stage]) -> Tokenizer | None:
    """That of a first stage that takes an existing one from this machine."""
    if isinstance(stage, Pretrain) and stage.tokenizer.path:
        return load_tokenizer(stage.tokenizer.path)
    if isinstance(stage, Checkpoint) and not stage.needs_download(stages):
        return load_tokenizer(stage.tokenizer or resolve_checkpoint(stage.path))
    return None
