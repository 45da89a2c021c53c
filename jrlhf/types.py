"""The records that travel between rooms. Shapes: B rows, T tokens, P prompt tokens, R response tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray  # batches hold numpy arrays while on the host, jax arrays on the devices
Params = Any  # a pytree of arrays
Metrics = Mapping[str, Any]  # metric name (docs/metrics.md) -> scalar


class TrainState(NamedTuple):
    """Everything a train step reads and writes; a checkpoint is this plus the data position.

    `key` is the stage's base key and never changes: step n uses `fold_in(key, n)`, so a resumed run
    draws what an uninterrupted one would have drawn. `extra` holds an algorithm's own small state
    (PPO's adaptive KL coefficient).
    """

    step: jax.Array  # [] int32
    params: Params  # {"policy": ..., "critic": ...}
    opt_state: Any
    ref_params: Params  # frozen reference policy, or None
    key: jax.Array
    extra: Any = ()


class Prompts(NamedTuple):
    """Left-padded prompts, ready to be continued; every row has at least one real token."""

    tokens: Array  # [B, P] int32
    mask: Array  # [B, P] bool


class SequenceBatch(NamedTuple):
    """Token sequences to learn from, packed or padded on either side."""

    tokens: Array  # [B, T] int32
    segment_ids: Array  # [B, T] int32: 1, 2, ... per row, 0 is padding
    positions: Array  # [B, T] int32, restarting in each segment
    loss_mask: Array  # [B, T] bool: tokens to be predicted (never the first of a segment)
    # [B, A] int32: the slots of the tokens to be predicted, -1 is none: the head is given no others. () where
    # that would leave nothing out, and in streams
    targets: Any = ()


class Rollout(NamedTuple):
    """What `rollout` returns. The prompt fills slots [0, P) left-padded, the response slots [P, P+R)."""

    tokens: Array  # [B, P+R] int32
    mask: Array  # [B, P+R] bool: a real token (prompt or response, EOS included)
    response_mask: Array  # [B, R] bool: sampled tokens, EOS included
    logprobs: Array  # [B, R] float32 under the distribution that was sampled; 0 where masked
    ended: Array  # [B] bool: the response ended by a stop token (not by length)


class Algorithm(NamedTuple):
    """An algorithm is a record of pure functions; the driver alone jits, shards, saves and logs."""

    init: Callable[..., TrainState]
    make_batch: Callable[..., Any] | None  # (TrainState, Rollout, rewards) -> Batch; None when offline
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]]


class PackedAnswers(NamedTuple):
    """K answers to each of B prompts, every prompt once, in N rows of T tokens: prompt, its answers, prompt, ...

    A token sees what is before it in its row and segment, and of that the prompt and its own answer alone.
    """

    tokens: Array  # [N, T] int32
    segment_ids: Array  # [N, T] int32: prompts by number, 1, 2, ... per row; 0 is padding
    branches: Array  # [N, T] int32: 0 is a prompt's token, 1 to K of that answer
    positions: Array  # [N, T] int32; every answer continues where its prompt ends
    # The answers' tokens that are to be predicted, of which a row has room for A
    before: Array  # [N, A] int32: the slot of the token before it, for an answer's first the prompt's last
    targets: Array  # [N, A] int32: the token
    places: Array  # [N, A] int32: 1, 2, ... within its answer
    owners: Array  # [N, A] int32: its answer, K * prompt + answer, prompts as numbered in a microbatch; -1 is none
    ends: Array  # [N, E] int32: the slots of the last tokens of a row's answers, of which there are at most E
    answers: Array  # [B, K] int32: which of these is an answer's, E * row + number in a microbatch; 0 of a missing one
    lengths: Array  # [B, K] int32: tokens of each answer that are to be predicted


class PreferenceBatch(NamedTuple):
    """K answers to each prompt, all of a prompt in one batch element. Padding answers have rank 0.

    Of this and the other batches of answers: where they are packed, `tokens` is PackedAnswers and the masks are ().
    """

    tokens: Any  # [B, K, T] int32, prompt then answer, right-padded
    mask: Array  # [B, K, T] bool, a real token
    response_mask: Array  # [B, K, T] bool, a token of the answer (EOS included)
    ranks: Array  # [B, K] int32; 1 is best, equal ranks are ties, 0 is no answer
    margins: Array  # [B, K] float32 scores whose differences are margins; zeros when there are none
    criteria: Any = ()  # [B, K, C] float32 scores by criterion, NaN where a row has none; () where not asked for
    # [B, n] float32: how much the prompt counts for each of n heads, or with n = 1 for all of them; () is once
    weights: Any = ()
    # [B] float32: of two answers, how surely the better is the better, from 1/2 (a tie) to 1; () is 1
    certainty: Any = ()
    raters: Any = ()  # [B] int32: who ranked them, as a number; () where not asked for


class PairBatch(NamedTuple):
    """Chosen (index 0) and rejected (index 1) answers to each prompt."""

    tokens: Any  # [B, 2, T] int32, prompt then answer
    mask: Array  # [B, 2, T] bool, a real token
    response_mask: Array  # [B, 2, T] bool, a token of the answer
    ref_logprobs: Array  # [B, 2] summed reference log-probabilities; ignored when computed on the fly
    weights: Any = ()  # [B] float32: how much each pair counts; () is once
    certainty: Any = ()  # [B] float32: that the chosen answer is the better, from 1/2 (a tie) to 1; () is 1


class AnswerBatch(NamedTuple):
    """One answer to each prompt."""

    tokens: Array  # [B, T] int32, prompt then answer
    mask: Array  # [B, T] bool, a real token
    response_mask: Array  # [B, T] bool, a token of the answer
    ref_logprobs: Array  # [B] summed reference log-probabilities; ignored when computed on the fly


class UnpairedBatch(NamedTuple):
    """Answers that are each labelled desirable or not."""

    answers: AnswerBatch
    labels: Array  # [B] bool, desirable
    mismatched: AnswerBatch | None  # to each prompt an answer to another one (KTO's reference point)


class RankedBatch(NamedTuple):
    """K answers to each prompt for algorithms on whole rankings. Padding answers have rank 0."""

    tokens: Any  # [B, K, T] int32, prompt then answer
    mask: Array  # [B, K, T] bool, a real token
    response_mask: Array  # [B, K, T] bool, a token of the answer
    ref_logprobs: Array  # [B, K] summed reference log-probabilities; ignored when computed on the fly
    ranks: Array  # [B, K] int32; 1 is best, equal ranks are ties, 0 is no answer


class StepBatch(NamedTuple):
    """Answers in steps; every step ends with a token at which it is judged."""

    tokens: Array  # [B, T] int32, prompt then steps, right-padded
    mask: Array  # [B, T] bool, a real token
    ends: Array  # [B, T] bool, the last token of a step
    labels: Array  # [B, T] float32: at a step's end the probability that it is right, -1 where nobody said


class TextRow(TypedDict):
    text: str


Message = dict[str, Any]  # role, content, and what else a chat template reads
Spoken = str | list[Message]  # plain text, or turns of a conversation


class DemonstrationRow(TypedDict, total=False):
    """`prompt` and `completion`, or `messages` of which every assistant turn is learned."""

    prompt: Spoken
    completion: Spoken
    messages: list[Message]
    tools: list[dict]


class BinaryRow(TypedDict):
    """One answer and whether it is wanted (Ethayarajh et al. 2024)."""

    prompt: Spoken
    completion: Spoken
    label: bool


class StepRow(TypedDict):
    """An answer in steps, each right (1), wrong (0), something between, or without a label (None, -1)."""

    prompt: Spoken
    steps: list[str]
    labels: list[float | None]


class _PreferenceRequired(TypedDict):
    prompt: Spoken
    responses: Sequence[Spoken]
    ranks: list[int]  # 1 is best, equal ranks are ties


class PreferenceRow(_PreferenceRequired, total=False):
    scores: list[float]
    criteria: dict[str, list[float]]
    labeler: str
    tools: list[dict]
    ended: list[bool]  # whether each answer ended by itself, rather than by its length
    weight: float  # how much the row counts, 1 if it does not say
    # of two answers: that the first is preferred. `ranks` are its rounding: [1, 2], [2, 1], or at one half a tie
    probability: float


class PromptRow(TypedDict, total=False):
    prompt: Spoken
    tools: list[dict]
    answer: str


class Scores(NamedTuple):
    """What a reward says of N answers. A function may return plain numbers instead, which are `values`."""

    values: Array  # [N] float32
    parts: Mapping[str, Array] = {}
    failed: Array | None = None  # [N] bool: could not be scored; the value is what the config says
    timed_out: Array | None = None  # [N] bool: the same, for want of time (not counted in `failed`)
    unscored: Mapping[str, tuple] = {}  # of parts: their own (failed, timed_out)
    # [N, R] float32: what single tokens earn beside the values (rewards of steps), NaN where nothing is said of one
    tokens: Array | None = None

    @property
    def total(self) -> Array:
        """[N]: what each answer earns in all, by its value and by its tokens."""
        return self.values if self.tokens is None else self.values + jnp.nansum(self.tokens, axis=1)


# A reward is one function, which may be `async`. `rows` are the prompts' full rows (an answer to verify, a gold
# fact, ...), with `ended`: whether the completion ended by a stop token.
RewardFn = Callable[
    [list[str], list[str], list[dict]], Any
]  # -> [N] float32, or Scores, or an awaitable of them


@dataclass(frozen=True)
class Plan:
    """What a stage will do, for the dry run: 0 where nothing tells. Memory is arithmetic (bytes).

    Counts are exact, but for those that `at_most` names: what is dropped, packed or ended early lowers them.
    """

    model_params: int = 0
    rows: int = 0  # that it reads: documents, demonstrations, prompts, rankings or pairs to learn from
    steps: int = 0
    tokens: int = 0  # that pass through the model: padding in training, prompts not in sampling
    memory_bytes: int = 0
    note: str = ""
    at_most: tuple[str, ...] = ()  # which of "rows", "steps", "tokens" are upper bounds
