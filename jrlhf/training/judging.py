"""Rewards that read text and ask a model: a judge's verdict, and the steps of an answer.

Both encode the text anew, with their own tokenizer, so that the policy may have another.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrlhf.config import UserError, did_you_mean
from jrlhf.data.batching import encode_prompt, encode_steps, pad_batch, stack_steps
from jrlhf.data.tokenizer import Tokenizer
from jrlhf.models.transformer import Model
from jrlhf.ops.masking import last_token_index
from jrlhf.ops.reward_losses import Aggregate, aggregate_steps
from jrlhf.training.artifacts import Loaded
from jrlhf.training.data import chunk_rows, in_chunks
from jrlhf.types import Params, StepBatch

ONE_ANSWER, TWO_ANSWERS = ("question", "answer"), ("question", "answer_a", "answer_b")
LENGTHS = 64  # sequences are padded to multiples of this, so that few shapes are compiled

Value = Literal["log_odds", "probability"]


# --- a judge's verdict --------------------------------------------------------------------------------------


def check_template(template: str) -> bool:
    """Whether it compares two answers; UserError unless it has the places of one answer, or of two, and no others."""
    found = set(re.findall(r"\{(\w+)\}", template))
    known = {*ONE_ANSWER, *TWO_ANSWERS}
    if unknown := sorted(found - known):
        raise UserError(f"template: unknown placeholder {{{unknown[0]}}}.{did_you_mean(unknown[0], known)}")
    if found not in ({*ONE_ANSWER}, {*TWO_ANSWERS}):
        raise UserError(
            "template must have {question} and {answer}, or {question}, {answer_a} and {answer_b}; it has "
            + (", ".join(f"{{{name}}}" for name in sorted(found)) or "none of them")
        )
    return found == {*TWO_ANSWERS}


def fill(template: str, **parts: str) -> str:
    """The template with its places filled; braces inside the parts stay what they are."""
    return re.sub(r"\{(\w+)\}", lambda place: parts[place[1]], template)


def verdict_ids(tokenizer: Tokenizer, verdicts: tuple[str, str]) -> tuple[int, int]:
    """The first token of each verdict, by which they must differ."""
    ids = [tokenizer.encode(verdict) for verdict in verdicts]
    for verdict, tokens in zip(verdicts, ids, strict=True):
        if not tokens:
            raise UserError(f"verdicts: {verdict!r} has no token")
    if ids[0][0] == ids[1][0]:
        raise UserError(
            f"verdicts: {verdicts[0]!r} and {verdicts[1]!r} begin with the same token (id {ids[0][0]}), so that one "
            "token cannot tell them apart; choose others"
        )
    return ids[0][0], ids[1][0]


@partial(jax.jit, static_argnums=(0, 1))
def verdict_log_odds(model: Model, verdicts: tuple[int, int], params: Params, tokens, mask) -> jax.Array:
    """log p(first) - log p(second) of the token that follows each sequence, tokens and mask [B, T] -> [B] float32."""
    hidden = model.hidden(params, tokens, mask)
    last = jnp.take_along_axis(hidden, last_token_index(mask)[:, None, None], axis=1)
    logits = model.logits(params, last)[:, 0]
    return logits[:, verdicts[0]] - logits[:, verdicts[1]]


@dataclass(frozen=True)
class JudgeReward:
    """A language model that is asked about answers, and answers by the odds of one token (Zheng et al. 2023).

    A template of two answers compares an answer with the prompt's reference, the row's `answer`, in both orders, and
    averages, so that a liking for the first place cancels.
    """

    name: str
    loaded: Loaded
    template: str
    verdicts: tuple[str, str]
    value: Value
    mesh: Mesh

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict]
    ) -> np.ndarray:
        """[N] float32: the log-odds of the first verdict, or its probability among the two."""
        if not check_template(self.template):
            odds = self.log_odds(
                [fill(self.template, question=q, answer=a) for q, a in zip(prompts, completions, strict=True)]
            )
        else:
            references = []
            for n, row in enumerate(rows, 1):
                if "answer" not in row:
                    raise UserError(
                        f"reward {self.name!r}: prompt {n} has no field 'answer', the reference with which a template "
                        "of two answers compares"
                    )
                references.append(row["answer"])
            odds = self.compare(prompts, completions, references)
        return odds if self.value == "log_odds" else 1 / (1 + np.exp(-odds))

    def compare(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        """[N] float32: log-odds that answer a is better than b, the mean of both orders."""
        pairs = list(zip(prompts, a, b, strict=True))
        first = self.log_odds([fill(self.template, question=q, answer_a=x, answer_b=y) for q, x, y in pairs])
        second = self.log_odds([fill(self.template, question=q, answer_a=y, answer_b=x) for q, x, y in pairs])
        return 0.5 * (first - second)

    def log_odds(self, texts: Sequence[str]) -> np.ndarray:
        """[N] float32, of each filled template. A tokenizer that wraps strings makes it a user's turn."""
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        verdicts = verdict_ids(tokenizer, self.verdicts)
        try:
            ids = [_ids(encode_prompt({"prompt": text}, tokenizer, model.config.context)) for text in texts]
        except UserError as error:
            raise UserError(f"reward {self.name!r}: the judge's context: {error}") from error
        longest = max(len(row) for row in ids)
        batch = pad_batch(ids, _padded(longest, model), "right", tokenizer.pad_id)
        f = lambda rows: verdict_log_odds(model, verdicts, self.loaded.params, rows["tokens"], rows["mask"])  # noqa: E731
        return in_chunks(f, batch, chunk_rows(len(texts), self.mesh), self.mesh)


def _ids(encoded: np.ndarray | None) -> np.ndarray:
    assert encoded is not None  # nothing is dropped: what is too long is an error
    return encoded


def _padded(length: int, model: Model) -> int:
    return min(-(-length // LENGTHS) * LENGTHS, model.config.context)


# --- the steps of an answer ---------------------------------------------------------------------------------


def split_steps(text: str, separator: str) -> list[str]:
    """The steps of an answer: what lies between separators and is not blank."""
    return [step for step in text.split(separator) if step.strip()]


@partial(jax.jit, static_argnums=0)
def scalar_scores(model: Model, params: Params, batch: StepBatch) -> jax.Array:
    """The scalar head at every token, [B, T] float32."""
    return model.scores(params, batch.tokens, batch.mask)


@dataclass(frozen=True)
class ProcessReward:
    """Scores an answer by its steps. The answer is split as text, and its steps are encoded one by one as in training:
    a tokenizer may merge a separator with its neighbours, so that the policy's tokens need not show where steps end.
    """

    name: str
    loaded: Loaded
    separator: str
    aggregate: Aggregate
    mesh: Mesh

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict]
    ) -> np.ndarray:
        """[N] float32 in [0, 1]; 0 for an answer without a step."""
        batch, logits = self._logits(completions, rows)
        return np.asarray(aggregate_steps(logits, batch.ends, self.aggregate))

    def step_scores(self, completions: Sequence[str], rows: Sequence[dict]) -> list[np.ndarray]:
        """The probability that each step is right, of each answer."""
        batch, logits = self._logits(completions, rows)
        return [1 / (1 + np.exp(-row[ends])) for row, ends in zip(logits, batch.ends, strict=True)]

    def token_scores(
        self, ids: Sequence[Sequence[int]], rows: Sequence[dict], tokenizer: Tokenizer, length: int
    ) -> np.ndarray:
        """[B, length] float32: each step's score at the token of the response that ends it, 0 elsewhere.

        ids: the sampled tokens of each response; tokenizer: that of the policy.
        """
        out = np.zeros((len(ids), length), np.float32)
        texts = [tokenizer.decode(row) for row in ids]
        for n, scores in enumerate(self.step_scores(texts, rows)):
            places = step_ends(ids[n], self.separator, tokenizer)
            np.add.at(out[n], places, scores)  # two short steps may end in one token
        return out

    def _logits(self, completions: Sequence[str], rows: Sequence[dict]) -> tuple[StepBatch, np.ndarray]:
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        context, encoded = model.config.context, []
        for row, text in zip(rows, completions, strict=True):
            steps = split_steps(text, self.separator)
            asked = {**row, "steps": steps, "labels": [None] * len(steps)}
            try:
                example = encode_steps(asked, tokenizer, context, self.separator)
            except UserError as error:
                raise UserError(f"reward {self.name!r}: {error}") from error
            assert example is not None  # nothing is dropped: what is too long is an error
            encoded.append(example)
        longest = max(len(example.ids) for example in encoded)
        batch = stack_steps(encoded, _padded(longest, model), tokenizer.pad_id)
        f = partial(scalar_scores, model, self.loaded.params)
        return batch, in_chunks(f, batch, chunk_rows(len(encoded), self.mesh), self.mesh)


def step_ends(ids: Sequence[int], separator: str, tokenizer: Tokenizer) -> list[int]:
    """Which token ends each step of a response: the first after which the text holds the step and its separator."""
    text, ends, begin = tokenizer.decode(ids), [], 0
    for piece in text.split(separator):
        stop = min(begin + len(piece) + len(separator), len(text))
        if piece.strip():
            ends.append(stop)
        begin = stop
    lengths = [len(tokenizer.decode(ids[: t + 1])) for t in range(len(ids))]
    reached = [next(t for t, n in enumerate(lengths) if n >= end) for end in ends]
    if reached and ends[-1] == len(text):  # the end of the answer, whatever ended it
        reached[-1] = len(ids) - 1
    return reached


def judge_of(name: str, noted: dict[str, Any], loaded: Loaded, mesh: Mesh) -> JudgeReward:
    """The judge that its stage noted."""
    return JudgeReward(name, loaded, noted["template"], tuple(noted["verdicts"]), noted["value"], mesh)
