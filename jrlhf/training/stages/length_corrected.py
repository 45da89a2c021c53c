"""A reward less the part of it that the length of an answer explains."""

import json
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import numpy as np

from jrlhf.config import LANGUAGE_MODEL, PREFERENCES, REWARD_MODEL, Source, StageContext, UserError, stage_ref
from jrlhf.rollout.rollout import pad_prompts
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import load_model
from jrlhf.training.data import preference_arrays
from jrlhf.training.evaluation import prompt_slots
from jrlhf.training.rewards import LENGTH, make_reward, on_host_scores, read_texts
from jrlhf.training.stages.common import MeshStage, TooLongPrompt, check_length, write_text
from jrlhf.training.stages.preferences import check_one_of, preference_rows
from jrlhf.types import PreferenceBatch, Rollout


@dataclass(frozen=True)
class LengthCorrected(MeshStage):
    """The reward `reward` less slope · (tokens - mean length), at mean 0 and std 1 over the answers it was fitted on.

    The slope is that of the reward on length among answers to the same prompt (Singhal et al. 2023 and Chen et al. 2024
    show how much of a learned reward it can be), by least squares over the answers of `preferences` or `data`: those
    that the reward model was trained on. It takes out what longer answers earn by being better, too: measure that.

    Leaves `length.json`; no parameter is copied, and a learned reward still stays on the devices.
    """

    artifact: ClassVar[str] = REWARD_MODEL

    reward: str = stage_ref(artifact=REWARD_MODEL)
    start: str = stage_ref(
        artifact=LANGUAGE_MODEL
    )  # whose tokens are counted: the policy that will be trained
    preferences: str = stage_ref("", PREFERENCES)
    data: Source | None = None
    max_length: int = 0  # tokens of prompt and answer; 0: the model's context
    too_long: TooLongPrompt = "error"

    def validate(self, stages):
        check_one_of(self)

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            policy = load_model(ctx.parents[self.start], mesh)
            check_length(self.max_length, policy.model, "max_length")
            rows = preference_rows(self, ctx)
            limit = self.max_length or policy.model.config.context
            kept: list[dict] = []  # rows that are not too long

            def told(those: list[dict]) -> dict:
                kept.extend(those)
                return {}

            arrays = preference_arrays(rows, policy.tokenizer, limit, self.too_long, ctx.console, told=told)
            samples, row_of = as_samples(arrays, policy.tokenizer.pad_id, policy.tokenizer.eos_ids)
            texts = read_texts(samples, [kept[i] for i in row_of], policy.tokenizer)
            reward = make_reward(self.reward, dict(ctx.parents), mesh, policy.tokenizer)
            scores = np.asarray(on_host_scores(reward, samples, texts, mesh).total, np.float64)
        fit = fit_length(scores, np.sum(samples.response_mask, axis=1), row_of)
        note = fit._asdict()
        share = note.pop("explained")
        write_text(ctx.folder / LENGTH, json.dumps({"reward": ctx.parents[self.reward].name, **note}))
        return {**note, "explained": share}


class LengthFit(NamedTuple):
    slope: float  # reward per token
    length: float  # mean, tokens
    mean: float  # of the corrected reward, before it is normalised
    std: float
    explained: float  # share of the reward's variance within prompts that length explains


def fit_length(scores: np.ndarray, lengths: np.ndarray, prompt: np.ndarray) -> LengthFit:
    """Of scores, lengths (tokens) and the number of the prompt of each answer, [N] each.

    slope = Σ (l - l̄_p)(r - r̄_p) / Σ (l - l̄_p)², with means l̄_p and r̄_p over the answers to a prompt: a harder prompt
    may well ask for a longer answer. UserError where no prompt has answers of different lengths.
    """
    lengths = np.asarray(lengths, np.float64)
    count = np.bincount(prompt)
    within = lambda x: x - (np.bincount(prompt, x) / np.maximum(count, 1))[prompt]  # noqa: E731
    length, score = within(lengths), within(np.asarray(scores, np.float64))
    spread = np.sum(length**2)
    if spread < 1e-9:
        raise UserError(
            "preferences: no prompt has answers of different lengths, so what length earns cannot be told"
        )
    slope = np.sum(length * score) / spread
    corrected = scores - slope * (lengths - lengths.mean())
    explained = slope**2 * spread / max(float(np.sum(score**2)), 1e-12)
    std = max(float(corrected.std()), 1e-6)
    return LengthFit(float(slope), float(lengths.mean()), float(corrected.mean()), std, float(explained))


def as_samples(arrays: PreferenceBatch, pad_id: int, eos_ids: tuple[int, ...]) -> tuple[Rollout, np.ndarray]:
    """All answers of preferences [N, K, T] as if a policy had sampled them, and the row [0, N) of each."""
    row_of, answer = np.nonzero(arrays.ranks > 0)
    tokens, mask, response = (x[row_of, answer] for x in (arrays.tokens, arrays.mask, arrays.response_mask))
    prompts = [t[m & ~r].tolist() for t, m, r in zip(tokens, mask, response, strict=True)]
    answers = [t[r].tolist() for t, r in zip(tokens, response, strict=True)]
    put = pad_prompts(prompts, prompt_slots(prompts), pad_id)
    slots = max(map(len, answers))
    written = np.full((len(answers), slots), pad_id, np.int32)
    is_written = np.zeros((len(answers), slots), bool)
    for i, ids in enumerate(answers):
        written[i, : len(ids)], is_written[i, : len(ids)] = ids, True
    samples = Rollout(
        tokens=np.concatenate([put.tokens, written], axis=1),
        mask=np.concatenate([put.mask, is_written], axis=1),
        response_mask=is_written,
        logprobs=np.zeros(written.shape, np.float32),
        ended=np.asarray([bool(ids) and ids[-1] in eos_ids for ids in answers]),
    )
    return samples, row_of
