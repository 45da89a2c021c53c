"""Rewards that read text and ask a model: a judge's verdict, and the steps of an answer.

Both encode the text anew, with their own tokenizer, so that the policy may have another.
"""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import Mesh

from jrlhf import hosts
from jrlhf.config import UserError, from_dict
from jrlhf.data.batching import encode_prompt, encode_steps, pad_batch, stack_steps
from jrlhf.data.tokenizer import Tokenizer
from jrlhf.models.transformer import Model
from jrlhf.ops.masking import last_token_index
from jrlhf.ops.reward_losses import Aggregate, aggregate_steps
from jrlhf.rewards.endpoint import Endpoint, EndpointJudge
from jrlhf.rewards.judges import (
    Comparison,
    Judge,
    Program,
    check_template,
    checked,
    compare_pairs,
    expected_score,
    fill,
    filled,
)
from jrlhf.rollout.rollout import response_ids
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import leads
from jrlhf.training.artifacts import Loaded, load_model
from jrlhf.training.data import chunk_rows, in_chunks
from jrlhf.types import Params, Scores, StepBatch

ANSWERS = "answers.sqlite"  # an endpoint's replies, in the folder of whoever asked
LENGTHS = 64  # sequences are padded to multiples of this, so that few shapes are compiled

# Of the first verdict against the second; of the first; or the mean of numeric verdicts, from -1 to 1.
Value = Literal["log_odds", "probability", "expected"]
AsReward = Literal["outcome", "steps", "differences"]


# --- a judge's verdict --------------------------------------------------------------------------------------


Respondent = Endpoint | Program  # who is asked, when it is no local model


@dataclass(frozen=True)
class Asked:
    """How a respondent is noted as JSON."""

    by: Respondent


def verdict_ids(tokenizer: Tokenizer, verdicts: Sequence[str]) -> tuple[int, ...]:
    """The first token of each verdict, by which they must differ."""
    first: dict[int, str] = {}
    for verdict in verdicts:
        ids = tokenizer.encode(verdict)
        if not ids:
            raise UserError(f"verdicts: {verdict!r} has no token")
        if ids[0] in first:
            raise UserError(
                f"verdicts: {first[ids[0]]!r} and {verdict!r} begin with the same token (id {ids[0]}), so that one "
                "token cannot tell them apart; choose others"
            )
        first[ids[0]] = verdict
    return tuple(first)


@partial(jax.jit, static_argnums=(0, 1))
def verdict_logits(model: Model, verdicts: tuple[int, ...], params: Params, tokens, mask) -> jax.Array:
    """Logits of the verdicts' tokens after each sequence, tokens and mask [B, T] -> [B, K] float32."""
    last = model.hidden(params, tokens, mask, at=last_token_index(mask)[:, None])
    return model.logits(params, last)[:, 0][:, np.asarray(verdicts)]


@dataclass(frozen=True)
class LocalJudge:
    """A language model on the mesh as a `Judge` and a `Writer` (`jrlhf.rewards.judges`).

    It answers by the odds of one token (Zheng et al. 2023; Lee et al. 2023), without sampling. A tokenizer that wraps
    strings makes a question a user's turn.
    """

    name: str
    loaded: Loaded
    mesh: Mesh
    sampling: SamplingConfig = SamplingConfig()  # of `write`

    def verdicts(self, questions: Sequence[str], options: Sequence[str]) -> np.ndarray:
        """[N, K] float64: the softmax over the logits of the options' first tokens."""
        from scipy.special import softmax  # slow to import

        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        verdicts = verdict_ids(tokenizer, options)
        if not questions:
            return np.zeros((0, len(options)))
        ids = self._encoded(questions, model.config.context)
        batch = pad_batch(ids, _padded(max(map(len, ids)), model), "right", tokenizer.pad_id)
        f = lambda rows: verdict_logits(model, verdicts, self.loaded.params, rows["tokens"], rows["mask"])  # noqa: E731
        logits = in_chunks(f, batch, chunk_rows(len(questions), self.mesh), self.mesh)
        return softmax(logits.astype(np.float64), axis=1)

    def write(self, questions: Sequence[str], seed: int) -> list[str | None]:
        """A sampled reply to each."""
        from jrlhf.training.evaluation import Sampler, prompt_slots  # which reads rewards, and so this module

        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        encoded = self._encoded(questions, model.config.context - self.sampling.max_new_tokens)
        ids = [row.tolist() for row in encoded]
        sampler = Sampler(model, tokenizer, self.mesh, self.sampling, prompt_slots(ids))
        samples = sampler.sample(self.loaded.params, ids, jax.random.key(seed))
        return [tokenizer.decode(row) for row in response_ids(samples)]

    def _encoded(self, questions: Sequence[str], limit: int) -> list[np.ndarray]:
        try:
            return [_ids(encode_prompt({"prompt": q}, self.loaded.tokenizer, limit)) for q in questions]
        except UserError as error:
            raise UserError(f"judge {self.name!r}: the judge's context: {error}") from error


@dataclass(frozen=True)
class DividedJudge:
    """A judge of whom each of several processes asks its share of the questions; they tell one another. A question is
    asked once, however often it comes."""

    judge: Judge

    def verdicts(self, questions: Sequence[str], options: Sequence[str]) -> np.ndarray:
        if jax.process_count() == 1:
            return self.judge.verdicts(questions, options)
        different = list(dict.fromkeys(questions))
        first, last = hosts.own_share(len(different), jax.process_count(), jax.process_index())

        def say() -> bytes:
            some = different[first:last]
            said = checked(self.judge.verdicts(some, options), len(some), options, "judge") if some else ()
            return np.asarray(said, np.float64).tobytes()

        told = np.frombuffer(b"".join(hosts.told_by_all("the judge", say))).reshape(-1, len(options))
        of = {question: n for n, question in enumerate(different)}
        return told[[of[question] for question in questions]]


def make_judge(by: Respondent, answers: Path) -> DividedJudge:
    """Whoever is asked. answers: the file where an endpoint's replies and costs are kept; of several processes each
    has one of its own beside it."""
    if not isinstance(by, Endpoint):
        return DividedJudge(by)
    if not leads():
        answers = answers.with_name(f"{answers.stem}-{jax.process_index()}{answers.suffix}")
    return DividedJudge(EndpointJudge(by, answers))


def judge_costs(judge: Judge) -> dict[str, float]:
    """What asking took (`EndpointJudge.counts`), all processes together, which must all call it; nothing for a judge
    that asks no server."""
    if isinstance(judge, DividedJudge):
        judge = judge.judge
    if not isinstance(judge, EndpointJudge):
        return {}
    if jax.process_count() == 1:
        return judge.counts()
    counts = [json.loads(said) for said in hosts.exchanged(json.dumps(judge.counts()).encode())]
    return {name: sum(of[name] for of in counts) for name in counts[0]}


@dataclass(frozen=True)
class JudgeReward:
    """What a judge says of answers, as a reward (direct RLAIF: Lee et al. 2023, section 2.3.2).

    A template of two answers compares an answer with the prompt's reference, the row's `answer`, in both orders, and
    averages, so that a liking for the first place cancels.
    """

    name: str
    judge: Judge
    template: str
    verdicts: tuple[str, ...]
    value: Value
    fallback: float | None = None  # where the judge has no verdict; None: that is an error
    both_orders: bool = True

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], rows: Sequence[dict]) -> Scores:
        """[N] values; `failed` where there is no verdict."""
        if not check_template(self.template):
            texts = [
                fill(self.template, question=q, answer=a) for q, a in zip(prompts, completions, strict=True)
            ]
            said = checked(self.judge.verdicts(texts, self.verdicts), len(texts), self.verdicts, self.name)
            values = self.values(said)
        else:
            self.check_rows(rows)
            values = self.compare(prompts, completions, [row["answer"] for row in rows])
        advice = "give the judge a `fallback`, the reward of such an answer"
        values, failed = filled(values, self.fallback, self.name, "answers", advice)
        return Scores(values.astype(np.float32), failed=failed)

    def check_rows(self, rows: Sequence[dict]) -> None:
        """UserError for a row without the reference with which a template of two answers compares."""
        if not check_template(self.template):
            return
        for n, row in enumerate(rows, 1):
            reference = row.get("answer")
            if not isinstance(reference, str):
                found = (
                    "has no field 'answer'"
                    if "answer" not in row
                    else f"has {reference!r:.40} as its 'answer'"
                )
                raise UserError(
                    f"reward {self.name!r}: prompt {n} {found}; a template of two answers compares with that text"
                )

    def compare(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        """[N] float64: how much better answer a is than b, the mean of both orders."""
        said = self.comparison(prompts, a, b)
        if not self.both_orders:
            return self.values(said.shown)
        return 0.5 * (self.values(said.shown) + self.values(said.turned))

    def comparison(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Comparison:
        return compare_pairs(self.judge, self.template, self.verdicts, prompts, a, b, self.both_orders)

    def values(self, said: np.ndarray) -> np.ndarray:
        """[N] float64 of [N, K] probabilities; of pairs [N, 3] (first, second, tie), a tie counting half."""
        if self.value == "expected":
            return expected_score(said, self.verdicts)
        if self.value == "probability":
            return said[:, 0] + (0.5 * said[:, 2] if check_template(self.template) else 0.0)
        if (said[:, :2] == 0).any():
            raise UserError(
                f"reward {self.name!r}: the judge is certain (a probability of 0), which has no finite log-odds; use "
                "value 'probability'"
            )
        return np.log(said[:, 0]) - np.log(said[:, 1])


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

    as_reward: what is paid, and when (the stage `StepReward` says what each optimises). "outcome": the aggregate, at
    the end; "steps": each step's score where it ends; "differences": what each step adds to the one before.
    """

    name: str
    loaded: Loaded
    separator: str
    aggregate: Aggregate
    mesh: Mesh
    as_reward: AsReward = "outcome"

    def scores(
        self,
        ids: Sequence[Sequence[int]],
        completions: Sequence[str],
        rows: Sequence[dict],
        tokenizer: Tokenizer,
        slots: int,
    ) -> Scores:
        """Of N answers; `parts` has every aggregate as `step_<aggregate>`, in [0, 1], 0 for an answer without a step.

        ids: the sampled tokens of each response, of which `completions` are the text; tokenizer: that of the policy;
        slots: R, tokens for a response. Rewards of steps are `tokens`, [N, slots], beside values of 0.
        """
        batch, logits = self._logits(completions, rows)
        parts = {
            f"step_{how}": np.asarray(aggregate_steps(logits, batch.ends, how)) for how in get_args(Aggregate)
        }
        if self.as_reward == "outcome":
            return Scores(parts[f"step_{self.aggregate}"], parts)
        tokens = np.full((len(ids), slots), np.nan, np.float32)
        for n, row in enumerate(ids):
            earned = _probabilities(logits[n, batch.ends[n]])
            if self.as_reward == "differences":
                earned = np.diff(earned, prepend=np.float32(0.0))
            places = step_ends(row, self.separator, tokenizer)
            tokens[n, places] = 0.0
            np.add.at(tokens[n], places, earned)  # two short steps may end in one token
        return Scores(np.zeros(len(ids), np.float32), parts, tokens=tokens)

    def step_scores(self, completions: Sequence[str], rows: Sequence[dict]) -> list[np.ndarray]:
        """The probability that each step is right, of each answer."""
        batch, logits = self._logits(completions, rows)
        return [_probabilities(row[ends]) for row, ends in zip(logits, batch.ends, strict=True)]

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


def _probabilities(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def step_ends(ids: Sequence[int], separator: str, tokenizer: Tokenizer) -> list[int]:
    """Which token ends each step of a response: the first after which the text holds the step and its separator."""
    text, ends, begin = tokenizer.decode(ids), [], 0
    for piece in text.split(separator):
        stop = min(begin + len(piece) + len(separator), len(text))
        if piece.strip():
            ends.append(stop)
        begin = stop
    length = lambda t: len(tokenizer.decode(ids[: t + 1]))  # noqa: E731
    reached = [bisect_left(range(len(ids)), end, key=length) for end in ends]
    if reached and ends[-1] == len(text):  # the end of the answer, whatever ended it
        reached[-1] = len(ids) - 1
    return reached


def judge_of(
    name: str, noted: dict[str, Any], folder: Path, mesh: Mesh, answers: Path | None = None
) -> JudgeReward:
    """The judge that the stage of `folder` noted. Its models' folders lie beside; an endpoint's replies are kept in
    `answers`, by default in its own folder."""
    judge: Judge
    if "model" in noted:
        judge = LocalJudge(name, load_model(folder.parent / noted["model"], mesh), mesh)
    else:
        judge = make_judge(from_dict(Asked, noted["asked"]).by, answers or folder / ANSWERS)
    return JudgeReward(
        name,
        judge,
        noted["template"],
        tuple(noted["verdicts"]),
        noted["value"],
        noted["fallback"],
        noted["both_orders"],
    )
