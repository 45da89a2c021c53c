"""Labels of steps without people: a step is as good as the answers that go on from it (Wang et al. 2024)."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jrlhf.config import (
    LANGUAGE_MODEL,
    REWARD_MODEL,
    STEPS,
    Source,
    StageContext,
    UserError,
    stage_ref,
    stage_ref_or_name,
)
from jrlhf.data.schema import check_row
from jrlhf.data.tokenizer import Tokenizer
from jrlhf.metrics import progress
from jrlhf.models.transformer import Model
from jrlhf.ops.intervals import auc_interval, wilson_interval
from jrlhf.rollout.rollout import response_ids
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import load_model
from jrlhf.training.evaluation import Sampler, prompt_slots, score
from jrlhf.training.judging import split_steps, step_ends
from jrlhf.training.loop import stage_key
from jrlhf.training.rewards import make_reward, read_texts
from jrlhf.training.stages.common import (
    MeshStage,
    TooLongPrompt,
    check_answers,
    check_reward,
    sample_answers,
    start_config,
    write_text,
)
from jrlhf.training.stages.sizes import at_most, counted, sampling_plan, usable
from jrlhf.types import Params, Rollout

BUCKETS = 4  # groups of prefixes by length, each compiled once


@dataclass(frozen=True)
class StepLabels(MeshStage):
    """Labels of the steps of a policy's answers by Monte Carlo (Math-Shepherd, Wang et al. 2024, section 3.3): after
    each step the policy goes on `continuations` times, and the label tells how many of these come out right.

    "soft" is their share (eq. 4), an unbiased estimate of the policy's probability to be right from there; "hard" is 1
    if any is right (eq. 3). An answer's last step is labelled by its own outcome. Whether a step *is* right is another
    question: a policy may recover from a wrong step, guess, or fail after a right one; `truth` measures that.
    Leaves `steps.jsonl`, from which `ProcessRewardModel(steps=...)` learns.
    """

    artifact: ClassVar[str] = STEPS

    start: str = stage_ref(artifact=LANGUAGE_MODEL)
    reward: str = stage_ref_or_name(artifact=REWARD_MODEL)  # of a whole answer: its outcome
    prompts: Source = field(kw_only=True)
    separator: str = "\n"  # between steps
    responses: int = 1  # answers to each prompt
    continuations: int = 8  # of each step but the last
    label: Literal["soft", "hard"] = "soft"
    threshold: float = 0.5  # an outcome of at least this is right
    truth: str = stage_ref_or_name("", REWARD_MODEL)  # of an answer up to a step: 1 or 0
    sampling: SamplingConfig = SamplingConfig()
    max_prompt: int = 0
    too_long: TooLongPrompt = "error"

    def validate(self, stages):
        check_reward(self.reward, stages)
        if self.truth:
            check_reward(self.truth, stages, "truth")
        if not self.separator:
            raise UserError("separator must not be empty: it ends every step")
        for name in ("responses", "continuations"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        if self.sampling.temperature == 0 and self.continuations > 1:
            raise UserError(
                "sampling.temperature is 0: all continuations of a step would be the same; give continuations 1"
            )
        check_answers(self.start, stages, self.sampling, self.max_prompt)

    def plan(self, ctx):
        rows, config = usable(self.prompts, self.too_long), start_config(ctx.stages, self.start)
        answers = rows.times(self.responses)
        plan = sampling_plan(config, rows, answers, self.sampling.max_new_tokens, 1)
        # At most, as if each token ended a step: on average half an answer is still to come.
        every = self.sampling.max_new_tokens * (1 + self.continuations * self.sampling.max_new_tokens // 2)
        return counted(plan, rows, at_most(0), at_most(answers.n * every))

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            policy = load_model(ctx.parents[self.start], mesh)
            tokenizer = policy.tokenizer
            asked_of = [name for name in (self.reward, self.truth) if name]
            rewards = [make_reward(name, dict(ctx.parents), mesh, tokenizer) for name in asked_of]
            outcome, truth = rewards[0], rewards[-1]

            # 1. Answers, their outcomes, and where their steps end.
            asked, prompt_ids, answers, texts = sample_answers(self, policy, ctx, self.responses, rewards)
            rows = [row for row in asked for _ in range(self.responses)]
            ids = [row for row in prompt_ids for _ in range(self.responses)]
            is_right = score(outcome, answers, texts, mesh) >= self.threshold
            ends = [step_ends(row, self.separator, tokenizer) for row in texts.ids]
            steps = [Prefix(n, end + 1) for n, places in enumerate(ends) for end in places]
            if not steps:
                raise UserError(f"no answer of {self.start!r} has a step")
            # 2. An answer's last step is labelled by its own outcome, every other by what its continuations come to.
            is_last = np.asarray([end == places[-1] for places in ends for end in places])
            labels = is_right[[step.answer for step in steps]].astype(np.float64)
            inner = [step for step, last in zip(steps, is_last, strict=True) if not last]
            if inner:
                repeated = [step for step in inner for _ in range(self.continuations)]
                with progress(ctx.console, len(repeated), f"{ctx.name}: continuations") as bar:
                    more = continued(
                        policy.model, policy.params, tokenizer, mesh, self.sampling, ids, answers, repeated,
                        jax.random.fold_in(stage_key(ctx), 1), bar.update,
                    )  # fmt: skip
                read = read_texts(more, [rows[step.answer] for step in repeated], tokenizer)
                came_right = score(outcome, more, read, mesh).reshape(len(inner), -1) >= self.threshold
                labels[~is_last] = label_of(came_right, self.label)
            results = {
                "answers": len(rows),
                "right": float(np.mean(is_right)),
                "without_steps": sum(not places for places in ends),
                "steps": len(steps),
                "continuations": len(inner) * self.continuations,
                "label_mean": float(np.mean(labels)),
            }
            # 3. Against the truth, where it is known.
            if self.truth:
                so_far = cut(answers, steps)
                read = read_texts(so_far, [rows[step.answer] for step in steps], tokenizer)
                prompts = np.asarray([step.answer // self.responses for step in steps])
                results |= against_truth(labels, score(truth, so_far, read, mesh) >= 0.5, prompts)
        of_answer = np.split(labels, np.cumsum([len(places) for places in ends])[:-1])
        lines = []
        for row, text, values in zip(rows, texts.completions, of_answer, strict=True):
            if len(values):
                kept = {"prompt": row["prompt"], "steps": split_steps(text, self.separator)}
                kept |= {"labels": values.tolist()} | ({"tools": row["tools"]} if "tools" in row else {})
                lines.append(json.dumps(check_row(kept, "steps", "an answer"), ensure_ascii=False) + "\n")
        write_text(ctx.folder / "steps.jsonl", "".join(lines))
        return results


def stored_steps(folder: Path) -> list[dict]:
    """What `StepLabels` left, rows of the kind "steps"."""
    path = folder / "steps.jsonl"
    if not path.exists():
        raise UserError(f"{path} is missing; run its stage again with --force")
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


class Prefix(NamedTuple):
    """The beginning of an answer."""

    answer: int  # its row
    length: int  # in tokens


def cut(answers: Rollout, prefixes: Sequence[Prefix]) -> Rollout:
    """The beginnings of answers as answers of their own, on the host; what is whole ended as the answer did."""
    rows, length = np.asarray(prefixes).T
    response = answers.response_mask[rows]
    kept = response & (np.arange(response.shape[1]) < length[:, None])
    start = answers.tokens.shape[1] - response.shape[1]
    return Rollout(
        answers.tokens[rows],
        np.concatenate([answers.mask[rows, :start], kept], axis=1),
        kept,
        np.where(kept, answers.logprobs[rows], np.float32(0.0)),
        answers.ended[rows] & (length == response.sum(axis=1)),
    )


def continued(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    mesh: Mesh,
    sampling: SamplingConfig,
    prompts: Sequence[list[int]],
    answers: Rollout,
    prefixes: Sequence[Prefix],
    key: jax.Array,
    update: Callable | None = None,
) -> Rollout:
    """Whole answers that begin with each prefix and go on as the policy does, one to each, on the host.

    prompts: of each answer; answers: [N, P + R] on the host. A continuation has the tokens that its prefix leaves of R,
    so that it is distributed as the answers are, given the prefix. Prefixes of similar length go on together, each a
    prompt to the one `rollout`; a shorter one may run past its budget there, and is cut.
    """
    slots, first = sampling.max_new_tokens, answers.tokens.shape[1] - sampling.max_new_tokens
    begun, written = cut(answers, prefixes), response_ids(answers)
    tokens, mask = begun.tokens[:, first:].copy(), begun.response_mask.copy()
    logprobs, ended = begun.logprobs.copy(), begun.ended.copy()
    rows, lengths = np.asarray(prefixes).T
    width, done = -(-slots // BUCKETS), 0
    for shortest in range(1, slots, width):
        some = np.flatnonzero((lengths >= shortest) & (lengths < min(shortest + width, slots)))
        if not some.size:
            continue
        ids = [[*prompts[rows[i]], *written[rows[i]][: lengths[i]]] for i in some]
        budget = replace(sampling, max_new_tokens=slots - shortest)
        sampler = Sampler(model, tokenizer, mesh, budget, prompt_slots(ids))
        tell = None if update is None else lambda n, done=done: update(done + n)
        more = sampler.sample(params, ids, jax.random.fold_in(key, shortest), tell)
        done += len(some)
        # The n-th token that was sampled belongs after the prefix.
        place = np.arange(slots) - lengths[some, None]
        n = np.clip(place, 0, slots - shortest - 1)
        new = (place >= 0) & np.take_along_axis(more.response_mask, n, axis=1)
        sampled = np.take_along_axis(more.tokens[:, sampler.prompt_length :], n, axis=1)
        tokens[some] = np.where(new, sampled, tokens[some])
        logprobs[some] = np.where(new, np.take_along_axis(more.logprobs, n, axis=1), logprobs[some])
        mask[some] |= new
        ended[some] = more.ended & (lengths[some] + more.response_mask.sum(axis=1) <= slots)
    return Rollout(
        np.concatenate([begun.tokens[:, :first], np.where(mask, tokens, tokenizer.pad_id)], axis=1),
        np.concatenate([begun.mask[:, :first], mask], axis=1),
        mask,
        logprobs,
        ended,
    )


def label_of(came_right: np.ndarray, label: Literal["soft", "hard"]) -> np.ndarray:
    """Labels [S] of steps by their continuations [S, C] bool: the share that came right, or 1 if any did."""
    right = came_right.sum(axis=1)
    return np.asarray(right / came_right.shape[1] if label == "soft" else right > 0, np.float64)


def against_truth(labels: np.ndarray, is_right: np.ndarray, prompts: np.ndarray) -> dict[str, float]:
    """How well labels [S] of steps, at one half, say which are right [S], and where both kinds occur how often a right
    step has the higher label (AUC; steps of one prompt may depend on one another)."""
    agree = (labels > 0.5) == is_right
    low, high = wilson_interval(agree.sum(), len(agree))
    found = {
        "truth_mean": float(np.mean(is_right)),
        "truth_agreement": float(np.mean(agree)),
        "truth_agreement_low": low,
        "truth_agreement_high": high,
    }
    if len(np.unique(is_right)) == 2 and len(np.unique(prompts)) > 1:
        auc, low, high = auc_interval(labels, is_right, prompts)
        found |= {"truth_auc": auc, "truth_auc_low": low, "truth_auc_high": high}
    return found
