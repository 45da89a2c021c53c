"""Sampling from policies and measuring what they write."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrlhf.data.tokenizer import Tokenizer
from jrlhf.models.attention import platform
from jrlhf.models.transformer import Model
from jrlhf.rollout.rollout import Stream, pad_prompts, rollout
from jrlhf.rollout.sampling import Sampling, SamplingConfig, make_sampling
from jrlhf.rollout.stops import stop_table
from jrlhf.sharding import DEVICE, batch_ways, check_batch, fetch, leads, placed, put_batch, sampling_ways
from jrlhf.training.data import chunk_rows, in_chunks
from jrlhf.training.rewards import Reward, Texts, on_host_scores, read_texts
from jrlhf.types import Params, Prompts, Rollout

BLOCK = 1024  # rows that one call draws, where there are many
SLOTS = {"cpu": 16}  # rows sampled at a time on each device, by platform


@dataclass(frozen=True)
class Sampler:
    """Draws responses to many prompts, a fixed number of rows at a time, so that nothing recompiles."""

    model: Model
    tokenizer: Tokenizer
    mesh: Mesh
    config: SamplingConfig
    prompt_length: int  # slots for the prompt; every prompt must fit

    def __post_init__(self):
        if self.config.stop:
            _ = self.sampling  # a tokenizer that knows no stop strings says so before anything is computed

    @cached_property
    def sampling(self) -> Sampling:
        stop, vocab_size = self.config.stop, self.model.config.vocab_size
        next_state = token_states(stop, self.tokenizer, vocab_size) if stop else None
        return make_sampling(self.config, self.tokenizer.eos_ids, self.tokenizer.pad_id, next_state)

    def put_prompts(self, ids: list[list[int]]) -> Prompts:
        return put_batch(self.mesh, pad_prompts(ids, self.prompt_length, self.tokenizer.pad_id))

    def draw(
        self,
        params: Params,
        ids: list[list[int]],
        key: jax.Array,
        group: int = 1,
        first_row: int = 0,
        stream: Stream | None = None,
    ) -> Rollout:
        """`group` responses to each prompt, next to each other, on the devices: one call of `rollout`.

        `first_row` numbers the first of them, for its draws. UserError where the rows do not divide over the mesh:
        `sample` fills them up, this does not.
        """
        check_batch(self.mesh, len(ids) * group, f"answers to draw ({len(ids)} prompts x {group})")
        copies, slots = draw_sizes(self.mesh, self.config, len(ids), group)
        prompts = self.put_prompts([row for row in ids for _ in range(copies)])
        return rollout(
            self.model, params, prompts, key, self.sampling, group // copies, slots, first_row, stream=stream,
        )  # fmt: skip

    def sample(
        self,
        params: Params,
        ids: list[list[int]],
        key: jax.Array,
        progress: Callable | None = None,
        group: int = 1,
    ) -> Rollout:
        """`group` responses to each prompt, next to each other, as numpy arrays of len(ids) * group rows."""
        ways, out = batch_ways(self.mesh) * self.mesh.shape["sequence"], []
        # A fixed number of prompts at a time: more need another program, or more memory for what is drawn.
        size = -(-min(len(ids), max(BLOCK // group, 1)) // ways) * ways
        for start in range(0, len(ids), size):
            some = ids[start : start + size]
            some = some + [ids[0]] * (size - len(some))
            out.append(fetch(self.draw(params, some, key, group, start * group)))
            if progress is not None:
                progress(min(start + size, len(ids)) * group)
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(ids) * group], *out)


def draw_sizes(mesh: Mesh, config: SamplingConfig, prompts: int, group: int) -> tuple[int, int]:
    """(how often each prompt is given, rows that are sampled at a time or 0 for all) of a call of `rollout`.

    Prompts are split over the mesh: where there are too few for that, some are given several times."""
    rows = prompts * group
    apart = sampling_ways(mesh, rows)
    ways = math.lcm(batch_ways(mesh), apart)
    copies = next(n for n in range(1, group + 1) if group % n == 0 and prompts * n % ways == 0)
    slots = (config.slots or SLOTS.get(platform(), 256) * apart) // apart * apart or apart
    return copies, slots if slots < rows else 0


@lru_cache(maxsize=8)
def token_states(stop: tuple[str, ...], tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """`stop_table` of a tokenizer's tokens; the same one for the same tokenizer, of which a stage makes samplers."""
    return stop_table(stop, tokenizer.token_bytes(), vocab_size)


def prompt_slots(*ids: list[list[int]]) -> int:
    """A prompt length that all fit in, rounded up to a multiple of 4."""
    longest = max(len(row) for rows in ids for row in rows)
    return -(-longest // 4) * 4


@dataclass(frozen=True)
class Scorer:
    """Sequence log-probabilities of responses under a model, some rows at a time."""

    model: Model
    mesh: Mesh
    temperature: float

    def logprobs(self, params: Params, samples: Rollout) -> np.ndarray:
        """Summed over each response, [N] float32."""
        f = partial(response_logprobs, self.model, self.temperature, params)
        return in_rows(lambda r: f(r.tokens, r.mask, r.response_mask), samples, self.mesh)


@partial(jax.jit, static_argnums=(0, 1))
def response_logprobs(model: Model, temperature: float, params, tokens, mask, response_mask) -> jax.Array:
    """[B] float32. tokens, mask [B, P + R]; response_mask [B, R]."""
    start = tokens.shape[1] - response_mask.shape[1]
    logprobs, _ = model.logprobs(params, tokens, mask, start, temperature)
    return jnp.sum(jnp.where(response_mask, logprobs, 0.0), axis=1)


def in_rows(f: Callable[[Rollout], Any], samples: Rollout, mesh: Mesh) -> np.ndarray:
    """`f` over a host rollout, SAMPLE_ROWS rows at a time, results on the host."""
    return in_chunks(f, samples, chunk_rows(len(samples.tokens), mesh), mesh)


def score(reward: Reward, samples: Rollout, texts: Texts, mesh: Mesh) -> np.ndarray:
    """One reward of every sampled response, [N]."""
    return np.asarray(on_host_scores(reward, samples, texts, mesh).total)


class Probe:
    """A quick look at a policy during training: the same prompts every time, a few samples kept as text."""

    def __init__(
        self,
        folder: Path,
        sampler: Sampler,
        rows: list[dict],
        ids: list[list[int]],
        ref_params: Params,
        rewards: list[Reward],
        key: jax.Array,
    ):
        self._folder, self._sampler, self._rows, self._ids = folder, sampler, rows, ids
        self._ref_params, self._rewards, self._key = ref_params, rewards, key
        # The reference has no adapters.
        self._scorer = Scorer(sampler.model.base, sampler.mesh, sampler.config.temperature)

    def __call__(self, params: Params, step: int) -> dict[str, float]:
        """eval/<reward>/mean, eval/kl/mean (k1 to the reference), eval/length/mean, eval/ended/mean."""
        samples = self._sampler.sample(params, self._ids, jax.random.fold_in(self._key, step))
        texts = read_texts(samples, self._rows, self._sampler.tokenizer)
        of_reference = self._scorer.logprobs(placed(self._ref_params, DEVICE), samples)
        kl = np.sum(samples.logprobs, axis=1) - of_reference
        values = {r.name: score(r, samples, texts, self._sampler.mesh) for r in self._rewards}
        if leads():
            self._write(step, texts, values)
        metrics = {f"eval/{name}/mean": float(np.mean(v)) for name, v in values.items()}
        return metrics | {
            "eval/kl/mean": float(np.mean(kl)),
            "eval/length/mean": float(np.mean(np.sum(samples.response_mask, axis=1))),
            "eval/ended/mean": float(np.mean(samples.ended)),
        }

    def _write(self, step: int, texts: Texts, values: dict[str, np.ndarray], count: int = 8) -> None:
        path = self._folder / "samples.jsonl"
        unfinished = path.with_name(path.name + ".partial")
        with open(unfinished, "w", encoding="utf-8") as f:
            if path.exists():
                # Without this step, which a stopped run may have written after its last checkpoint.
                with open(path, encoding="utf-8") as before:
                    f.writelines(line for line in before if json.loads(line)["step"] < step)
            for i in range(min(count, len(texts.prompts))):
                scores = {name: round(float(v[i]), 4) for name, v in values.items()}
                line = {
                    "step": step,
                    "prompt": texts.prompts[i],
                    "completion": texts.completions[i],
                    **scores,
                }
                f.write(json.dumps(line, ensure_ascii=False) + "\n")
        unfinished.rename(path)


def criteria_accuracy(scores: np.ndarray, rows: list[dict]) -> dict[str, float]:
    """How often scores order two answers of a prompt as each criterion that the rows carry does.

    scores: [N, K] in the order of `rows` (at most their answers). Pairs that a criterion ties are left out.
    """
    right: dict[str, list[float]] = {}
    for row, values in zip(rows, scores, strict=True):
        for name, criterion in row.get("criteria", {}).items():
            c = np.asarray(criterion, np.float64)
            i, j = np.triu_indices(len(c), 1)
            gap, wanted = values[i] - values[j], np.sign(c[i] - c[j])
            right.setdefault(name, []).extend((0.5 + 0.5 * np.sign(gap) * wanted)[wanted != 0].tolist())
    return {name: float(np.mean(v)) for name, v in right.items() if v}
