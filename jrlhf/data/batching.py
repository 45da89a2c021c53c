"""Rows to ids to fixed-shape numpy arrays, and which rows go into which step.

A text prompt and its answer are encoded apart and their ids joined, because generation sees exactly the
prompt's ids and then produces the answer's: encoding the joined text could merge across the boundary. A
conversation is rendered by the chat template and encoded whole, as inference engines do, but what precedes an
assistant turn is always what an engine would be given there (`_encode_in_turns`).
`loss_mask[t]` means that token t is a target, predicted from the tokens before it; a first token has nothing
before it and is never one.
"""

import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from jrlhf.config import Source, UserError, did_you_mean
from jrlhf.data.chat import ChatTemplate, Message, Rewritten, answer_messages, prompt_text
from jrlhf.data.report import Report
from jrlhf.data.sources import read
from jrlhf.data.tokenizer import CHOOSE_TEMPLATE, Tokenizer
from jrlhf.types import PackedAnswers, PreferenceBatch, StepBatch


class Example(NamedTuple):
    """One text as ids. T tokens, no padding."""

    ids: np.ndarray  # [T] int32
    loss_mask: np.ndarray  # [T] bool, this token is a target


class PreferenceExample(NamedTuple):
    """K answers to one prompt."""

    answers: tuple[Example, ...]  # prompt + answer + EOS; loss_mask marks the answer and EOS
    ranks: np.ndarray  # [K] int32
    margins: np.ndarray  # [K] float32
    criteria: dict[str, list[float]]  # K numbers by name
    weight: float = 1.0  # how much the row counts
    certainty: float = 1.0  # that the better of two is the better, 1/2 or more


class StepExample(NamedTuple):
    """A prompt and the steps of an answer to it. T tokens, no padding."""

    ids: np.ndarray  # [T] int32
    ends: np.ndarray  # [T] bool, the last token of a step
    labels: np.ndarray  # [T] float32, -1 where there is none


# --- rows to ids ------------------------------------------------------------------------------------------


def _example(context: Sequence[int], targets: Sequence[int]) -> Example:
    loss_mask = np.arange(len(context) + len(targets)) >= max(len(context), 1)
    return Example(np.asarray([*context, *targets], np.int32), loss_mask)


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []


def _too_long(policy: str, cut: str, tokens: int, limit: int, text: str, report: Report) -> bool:
    """Whether to cut a text of `tokens` tokens or to drop it; UserError when neither was chosen."""
    if policy not in ("error", "drop", cut):
        raise UserError(f"too_long: unknown policy {policy!r}.{did_you_mean(policy, ('error', 'drop', cut))}")
    if policy == "error":
        raise UserError(
            f"{tokens} tokens do not fit in {limit} ({text[:40]!r}...). Raise the limit, or set too_long to "
            f"'drop' or {cut!r}."
        )
    if policy == "drop":
        report.dropped[f"longer than {limit} tokens"] += 1
    return policy == cut


def _template(tokenizer: Tokenizer) -> ChatTemplate:
    if tokenizer.chat_template is None:
        raise UserError(f"the row holds messages, but the tokenizer has no chat template. {CHOOSE_TEMPLATE}")
    return tokenizer.chat_template


def _context_messages(row: dict, tokenizer: Tokenizer) -> list[Message] | None:
    """The row's prompt as messages, or None where it is a text that is used as it stands."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if tokenizer.wrap_strings else None
    return prompt


def _prompt(row: dict, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(BOS or nothing, the other ids) of a row's prompt."""
    if (messages := _context_messages(row, tokenizer)) is None:
        return _bos(tokenizer), tokenizer.encode(row["prompt"])
    text = _template(tokenizer).render(messages, tools=row.get("tools"), add_generation_prompt=True)
    ids = tokenizer.encode_rendered(text).ids
    bos = int(ids[:1] == [tokenizer.bos_id])
    return ids[:bos], ids[bos:]


def _answered(row: dict, answer: str | list[Message], tokenizer: Tokenizer) -> tuple[Example, int]:
    """A row's prompt with an answer to it, and how many tokens are the prompt's."""
    if (messages := _context_messages(row, tokenizer)) is not None:
        answers = answer_messages(answer)
        return encode_conversation([*messages, *answers], tokenizer, len(messages), row.get("tools"))
    if not isinstance(answer, str):
        raise UserError(
            "the prompt is text but the answer is messages; give both as messages, or both as text"
        )
    context = [*_bos(tokenizer), *tokenizer.encode(row["prompt"])]
    return _example(context, [*tokenizer.encode(answer), tokenizer.eos_ids[0]]), len(context)


def encode_conversation(
    messages: Sequence[Message], tokenizer: Tokenizer, context: int = 0, tools: Sequence[dict] | None = None
) -> tuple[Example, int]:
    """A conversation through the chat template, and how many tokens its first `context` messages take.

    Targets are the assistant turns after the context, each up to and with the token that ends it. What the
    template writes after the last of them is left out, because a sampler stops there. The context's ids are
    those of `encode_prompt`. UserError when there is no template, when the turns cannot be told apart
    (`ChatTemplate.lay_out`), or when no end-of-text token ends a turn.
    """
    template = _template(tokenizer)
    layout = template.lay_out(messages, context=context, tools=tools)
    cuts = sorted({layout.context_end, *(span.start for span in layout.answers)})
    ids, starts, place = _encode_in_turns(layout.text, cuts, tokenizer)
    ends = np.isin(ids, tokenizer.eos_ids)
    targets = np.zeros(len(ids), bool)
    for n, (begin, end) in enumerate(layout.answers, 1):
        # A token that begins inside an answer belongs to it, also if its text reaches beyond.
        first, stop = place[begin], int(np.searchsorted(starts, end))
        stop += int(stop < len(ids) and bool(ends[stop]) and not ends[first:stop].any())
        if ends[first:stop].any():
            stop = first + int(np.flatnonzero(ends[first:stop])[-1]) + 1
        elif n == len(layout.answers) or not template.marks_answers:
            raise UserError(
                f"{template.where}: the template ends the assistant's turn ({layout.text[begin:end][-40:]!r}) with "
                f"none of the tokenizer's end tokens (ids {list(tokenizer.eos_ids)}), so the model would not learn "
                f"to stop. {CHOOSE_TEMPLATE}"
            )
        targets[first:stop] = True
    length = int(np.flatnonzero(targets)[-1]) + 1
    targets[0] = False
    return Example(ids[:length], targets[:length]), place[layout.context_end]


def _encode_in_turns(
    text: str, cuts: Sequence[int], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, dict[int, int]]:
    """Ids [T] int32 of a text, where each token begins [T] (characters), and the token at which each cut is.

    The text is encoded whole. But the ids before a cut must be those of the text before it, which a sampler
    would have been given; where they are not (the answer begins with a line break that merges with the
    prompt's), what follows the cut is encoded apart.
    """
    begin = 0  # what is settled: the text before it
    ids: list[int] = []
    starts: list[int] = []
    rest, place = tokenizer.encode_rendered(text), {}
    whole = rest.ids
    for cut in cuts:
        head = tokenizer.encode_rendered(text[begin:cut])
        if rest.ids[: len(head.ids)] != head.ids:
            ids, starts = ids + head.ids, starts + [begin + start for start in head.starts]
            begin, rest = cut, tokenizer.encode_rendered(text[cut:])
            place[cut] = len(ids)
        else:
            place[cut] = len(ids) + len(head.ids)
    if begin and tokenizer.decode([*ids, *rest.ids]) != tokenizer.decode(whole):
        raise UserError(
            f"the tokenizer cannot begin an answer after {text[max(0, begin - 20) : begin]!r}, where the chat "
            "template's generation prompt ends. End it before the white space."
        )
    starts += [begin + start for start in rest.starts]
    return np.asarray([*ids, *rest.ids], np.int32), np.asarray(starts), place


def encode_prompt(
    row: dict | str,
    tokenizer: Tokenizer,
    max_prompt_len: int,
    too_long: str = "error",
    report: Report | None = None,
) -> np.ndarray | None:
    """BOS (if the tokenizer adds it) and the prompt, or messages and the generation prompt: [T] int32.

    A bare text is encoded as it is, `wrap_strings` or not. A prompt longer than `max_prompt_len` is a
    UserError, or None with `too_long="drop"`, or loses its beginning (not BOS) with "truncate_left".
    """
    report = Report() if report is None else report
    bos, ids = (_bos(tokenizer), tokenizer.encode(row)) if isinstance(row, str) else _prompt(row, tokenizer)
    if (excess := len(bos) + len(ids) - max_prompt_len) > 0:
        text = row if isinstance(row, str) else prompt_text(row["prompt"])
        if not _too_long(too_long, "truncate_left", len(bos) + len(ids), max_prompt_len, text, report):
            return None
        report.changed["prompt lost its beginning"] += 1
        ids = ids[excess:]
    report.kept += 1
    return np.asarray(bos + ids, np.int32)


def encode_demonstration(
    row: dict, tokenizer: Tokenizer, max_len: int, too_long: str = "error", report: Report | None = None
) -> Example | None:
    """BOS + prompt + completion + EOS, at most `max_len` tokens; completion and EOS are targets.

    Messages are rendered by the chat template; of a row with `messages` every assistant turn is a target. A
    longer row is a UserError, or None with `too_long="drop"`. With "truncate" the completion loses its end
    and the row its EOS, so that it does not teach stopping in the middle; the report counts these. A row
    whose prompt alone fills `max_len` is dropped.
    """
    report = Report() if report is None else report
    if "messages" in row:
        example, _ = encode_conversation(row["messages"], tokenizer, tools=row.get("tools"))
        text, lost = prompt_text(row["messages"]), "conversation lost its end"
    else:
        example, _ = _answered(row, row["completion"], tokenizer)
        text, lost = prompt_text(row["prompt"]), "completion lost its end and EOS"
    if (tokens := len(example.ids)) > max_len:
        if not _too_long(too_long, "truncate", tokens, max_len, text, report):
            return None
        targets = np.flatnonzero(example.loss_mask[:max_len])
        if not len(targets):
            report.dropped[f"prompt fills {max_len} tokens"] += 1
            return None
        report.changed[lost] += 1
        example = Example(*(x[: targets[-1] + 1] for x in example))
    report.kept += 1
    return example


def encode_turns(
    row: dict, tokenizer: Tokenizer, max_len: int, too_long: str = "error", report: Report | None = None
) -> list[Example] | None:
    """`encode_demonstration` as a list of one, or an example for each assistant turn of `messages`.

    The latter where the template writes earlier turns differently once more follows (it drops their reasoning):
    each turn is then learned after what a sampler would have been given. The report counts these rows.
    """
    report = Report() if report is None else report
    try:
        example = encode_demonstration(row, tokenizer, max_len, too_long, report)
        return [example] if example is not None else None
    except Rewritten:
        if "messages" not in row:
            raise
    messages, tools = row["messages"], row.get("tools")
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    rows = [{"prompt": messages[:n], "completion": messages[n : n + 1], "tools": tools} for n in turns]
    parts = Report()
    examples = [encode_demonstration(part, tokenizer, max_len, too_long, parts) for part in rows]
    report.changed["its turns became examples of their own: the template rewrites earlier turns"] += 1
    report.changed.update(parts.changed)
    if not parts.kept:
        report.dropped.update(dict.fromkeys(list(parts.dropped)[:1], 1))
        return None
    report.kept += 1
    if lost := parts.dropped.total():
        report.changed["it lost turns that do not fit"] += lost
    return [example for example in examples if example is not None]


def encode_preference(
    row: dict, tokenizer: Tokenizer, max_len: int, too_long: str = "error", report: Report | None = None
) -> PreferenceExample | None:
    """Every answer as BOS + prompt + answer + EOS, at most `max_len` tokens; answer and EOS are marked.

    An answer that was cut off by its length (the row's `ended` says so) has no EOS: a reward model must be able to
    tell, and DPO must not learn to stop there.

    Messages are rendered by the chat template; all answers follow the same ids of the prompt. A longer row is
    a UserError, or None with `too_long="drop"`. With "truncate_left" the prompt loses its beginning until the
    longest answer fits, the same for all answers, which keep their EOS; a row with an answer that cannot fit
    is dropped.
    """
    report = Report() if report is None else report
    ended = row.get("ended", [True] * len(row["responses"]))
    encoded = [_answered(row, answer, tokenizer) for answer in row["responses"]]
    encoded = [
        (example, start) if end else (Example(example.ids[:-1], example.loss_mask[:-1]), start)
        for (example, start), end in zip(encoded, ended, strict=True)
    ]
    bos, prompt = _prompt(row, tokenizer)
    longest = max(len(example.ids) for example, _ in encoded)
    excess = max(longest - max_len, 0)
    if excess:
        if not _too_long(too_long, "truncate_left", longest, max_len, prompt_text(row["prompt"]), report):
            return None
        if excess > len(prompt):
            report.dropped[f"an answer fills {max_len} tokens"] += 1
            return None
        report.changed["prompt lost its beginning"] += 1
    report.kept += 1
    answers = []
    for example, start in encoded:
        context = bos + prompt[excess:]
        ids = np.concatenate([np.asarray(context, np.int32), example.ids[start:]])
        loss_mask = np.concatenate([np.zeros(len(context), bool), example.loss_mask[start:]])
        loss_mask[0] = False
        answers.append(Example(ids, loss_mask))
    return PreferenceExample(
        tuple(answers),
        np.asarray(row["ranks"], np.int32),
        np.asarray(row.get("scores", [0.0] * len(answers)), np.float32),
        row.get("criteria", {}),
        float(row.get("weight", 1.0)),
        certainty_of(row),
    )


def certainty_of(row: dict) -> float:
    """How surely the better of a preference row's two answers is the better: from 1/2 (a tie) to 1, as of all rows that
    do not say."""
    probability = float(row.get("probability", 1.0))
    return max(probability, 1.0 - probability)


def encode_steps(
    row: dict,
    tokenizer: Tokenizer,
    max_len: int,
    separator: str,
    too_long: str = "error",
    report: Report | None = None,
) -> StepExample | None:
    """BOS + prompt + steps, each followed by `separator` and encoded by itself, at most `max_len` tokens.

    A step ends with the last token of its separator; no special token is needed. A longer row is a UserError, or None
    with `too_long="drop"`; with "truncate_left" the prompt loses its beginning.
    """
    report = Report() if report is None else report
    bos, prompt = _prompt(row, tokenizer)
    steps = [tokenizer.encode(step + separator) for step in row["steps"]]
    tokens = len(bos) + len(prompt) + sum(map(len, steps))
    if (excess := max(tokens - max_len, 0)) > 0:
        if not _too_long(too_long, "truncate_left", tokens, max_len, prompt_text(row["prompt"]), report):
            return None
        if excess > len(prompt):
            report.dropped[f"its steps fill {max_len} tokens"] += 1
            return None
        report.changed["prompt lost its beginning"] += 1
    report.kept += 1
    ids = [*bos, *prompt[excess:]]
    places, values = [], []
    for step, label in zip(steps, row["labels"], strict=True):
        ids += step
        places.append(len(ids) - 1)
        values.append(-1.0 if label is None else float(label))
    ends, labels = np.zeros(len(ids), bool), np.full(len(ids), -1.0, np.float32)
    ends[places], labels[places] = True, values
    return StepExample(np.asarray(ids, np.int32), ends, labels)


def encode_rows(rows: Iterable[dict], encode: Callable[..., Any], where: str = "") -> tuple[list, Report]:
    """`encode(row, report=...)` over rows without those it drops; e.g. `partial(encode_prompt, ...)`."""
    report, encoded = Report(where), []
    for n, row in enumerate(rows, 1):
        try:
            example = encode(row, report=report)
        except UserError as error:
            raise UserError(f"{where} row {n}: {error}".lstrip()) from error
        if example is not None:
            encoded.append(example)
    if not encoded:
        raise UserError(f"No row is left. {report}.")
    return encoded, report


# --- ids to arrays ----------------------------------------------------------------------------------------


def pad_batch(
    examples: Sequence[Example | np.ndarray], length: int, side: str = "right", pad_id: int = 0
) -> dict[str, np.ndarray]:
    """`tokens` [B, length] int32, `mask` and `loss_mask` [B, length] bool, padded on `side`.

    Bare id arrays (prompts) have no targets. Masks come from lengths, so `pad_id` may be a real token.
    """
    if side not in ("left", "right"):
        raise UserError(f"side: {side!r} is neither 'left' nor 'right'.")
    tokens = np.full((len(examples), length), pad_id, np.int32)
    mask, loss_mask = np.zeros_like(tokens, bool), np.zeros_like(tokens, bool)
    for b, example in enumerate(examples):
        ids = example.ids if isinstance(example, Example) else example
        _check_fits(len(ids), length)
        slots = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        tokens[b, slots], mask[b, slots] = ids, True
        if isinstance(example, Example):
            loss_mask[b, slots] = example.loss_mask
    return {"tokens": tokens, "mask": mask, "loss_mask": loss_mask}


def _check_fits(tokens: int, length: int) -> None:
    if tokens > length:
        raise UserError(f"An example of {tokens} tokens does not fit in rows of {length}.")


def pack(
    examples: Iterable[Example], length: int, pad_id: int = 0, window: int = 1024
) -> dict[str, np.ndarray]:
    """Several examples per row: `tokens`, `segment_ids`, `positions` [N, length] int32, `loss_mask` bool.

    Segments are numbered from 1 in each row and 0 is padding; positions restart at 0 in each. First-fit
    decreasing (Johnson 1973) within windows of `window` examples, so that neighbours in the data stay near. A row takes
    no more examples where it would have more than one and a half times the targets that are usual: all rows of a batch
    have room for as many as one of them has.
    """
    examples = list(examples)
    for example in examples:
        _check_fits(len(example.ids), length)
    sizes = np.asarray([(len(e.ids), np.sum(e.loss_mask[1:])) for e in examples]).reshape(-1, 2)
    tokens_in_all, targets_in_all = sizes.sum(axis=0)
    room = length, math.ceil(1.5 * length * targets_in_all / max(tokens_in_all, 1))
    sizes = np.minimum(sizes, room)  # an example that has more by itself fills its row
    bins: list[list[Example]] = []
    for start in range(0, len(examples), window):
        own = sizes[start : start + window]
        row_of = first_fit(own, room)
        rows: list[list[Example]] = [[] for _ in range(int(row_of.max()) + 1)]
        for i in np.argsort(-own[:, 0], kind="stable"):
            rows[row_of[i]].append(examples[start + i])
        bins += rows
    tokens = np.full((len(bins), length), pad_id, np.int32)
    segment_ids, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    loss_mask = np.zeros_like(tokens, bool)
    for n, row in enumerate(bins):
        end = 0
        for segment, example in enumerate(row, 1):
            slots = slice(end, end := end + len(example.ids))
            tokens[n, slots], segment_ids[n, slots] = example.ids, segment
            positions[n, slots] = np.arange(len(example.ids))
            loss_mask[n, slots] = example.loss_mask & (positions[n, slots] > 0)
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions, "loss_mask": loss_mask}


def document_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """BOS + text + EOS."""
    return [*_bos(tokenizer), *tokenizer.encode(text), tokenizer.eos_ids[0]]


def pack_texts(texts: Iterable[str], tokenizer: Tokenizer, length: int) -> dict[str, np.ndarray]:
    """Documents for pretraining, BOS + text + EOS, as `pack` does; every token but the first is a target.

    A document longer than `length` is cut into segments of which each begins with the last token of the one
    before, as context only: every token is a target exactly once.
    """
    if length < 2:
        raise UserError(f"length is {length}; a row needs at least 2 tokens to have a target.")
    pieces = []
    for text in texts:
        ids = document_ids(text, tokenizer)
        starts = range(0, max(len(ids) - 1, 1), length - 1)
        pieces += [_example([], ids[start : start + length]) for start in starts]
    if not pieces:
        raise UserError("pack_texts: no texts.")
    return pack(pieces, length, tokenizer.pad_id)


def stack_preferences(
    examples: Sequence[PreferenceExample],
    max_len: int,
    max_responses: int,
    pad_id: int = 0,
    criteria: Sequence[str] = (),
) -> PreferenceBatch:
    """Encoded preferences as numpy arrays [B, max_responses, max_len]; a missing answer is masked, rank 0.

    criteria: those whose scores are wanted, NaN where a row has none. Weights and certainties are () where all are 1.
    """
    B, K, T = len(examples), max_responses, max_len
    tokens = np.full((B, K, T), pad_id, np.int32)
    mask, response_mask = np.zeros((B, K, T), bool), np.zeros((B, K, T), bool)
    ranks, margins = np.zeros((B, K), np.int32), np.zeros((B, K), np.float32)
    values = np.full((B, K, len(criteria)), np.nan, np.float32)
    for b, example in enumerate(examples):
        k = len(example.answers)
        if k > K:
            raise UserError(f"A row has {k} responses, max_responses is {K}.")
        padded = pad_batch(example.answers, T, "right", pad_id)
        tokens[b, :k], mask[b, :k] = padded["tokens"], padded["mask"]
        response_mask[b, :k] = padded["loss_mask"]
        ranks[b, :k], margins[b, :k] = example.ranks, example.margins
        for c, name in enumerate(criteria):
            if name in example.criteria:
                values[b, :k, c] = example.criteria[name]
    certainty = np.asarray([e.certainty for e in examples], np.float32)
    weights = np.asarray([[e.weight] for e in examples], np.float32)
    return PreferenceBatch(
        tokens,
        mask,
        response_mask,
        ranks,
        margins,
        values if criteria else (),
        weights if np.any(weights != 1.0) else (),
        certainty if np.any(certainty != 1.0) else (),
    )


def first_fit(sizes: np.ndarray, room: Sequence[int]) -> np.ndarray:
    """The bin of each item, [B]: the largest first, into the first bin that still has room (Johnson 1973).

    sizes: [B, n], of n kinds, of each of which a bin holds `room` [n]. Largest is by the first kind. Every item fits
    into an empty bin.
    """
    free, bins = np.tile(np.asarray(room), (len(sizes), 1)), np.zeros(len(sizes), np.int64)
    opened = 1
    for i in np.argsort(-sizes[:, 0], kind="stable"):
        fits = np.all(free[: opened + 1] >= sizes[i], axis=1)
        n = int(np.argmax(fits))
        bins[i], free[n] = n, free[n] - sizes[i]
        opened = max(opened, n + 1)
    return bins


def shared_tokens(tokens: np.ndarray, mask: np.ndarray, response_mask: np.ndarray) -> np.ndarray:
    """How many tokens all answers to a prompt begin with, before the first that any of them learns: [B].

    Arrays [B, K, T] of right-padded answers; missing ones are masked. ValueError where they are padded on the left.
    """
    lengths, slots = mask.sum(axis=2), np.arange(mask.shape[2])
    if not np.array_equal(mask, slots < lengths[..., None]):
        raise ValueError("answers that are packed must be padded on the right")
    first = np.argmax(lengths > 0, axis=1)  # of the answers that are there
    leader = np.take_along_axis(tokens, first[:, None, None], axis=1)
    alike = (tokens == leader) & mask & ~response_mask | (lengths == 0)[..., None]
    alike = np.all(alike, axis=1) & (slots < lengths.max(axis=1)[:, None])
    return np.where(np.all(alike, axis=1), alike.shape[1], np.argmin(alike, axis=1))


def pack_answers(
    tokens: np.ndarray,
    mask: np.ndarray,
    response_mask: np.ndarray,
    row_of: np.ndarray,
    shape: tuple[int, int, int, int],
) -> PackedAnswers:
    """Right-padded answers [B, K, T] with every prompt once, many in a row; answers that are missing are masked.

    row_of: [B], the row of each prompt. shape: how many rows there are, their tokens, and the answers' tokens and the
    answers for which one has room. What the answers share is their prompt, as far as it is not learned
    (`shared_tokens`).
    """
    B, K, _ = tokens.shape
    N, T, A, E = shape
    shared, lengths = shared_tokens(tokens, mask, response_mask), mask.sum(axis=2)
    own = np.maximum(lengths - shared[:, None], 0)
    size = shared + own.sum(axis=1)
    order = np.argsort(row_of, kind="stable")  # the prompts of a row follow one another
    before = np.cumsum(size[order]) - size[order]
    first = np.searchsorted(row_of[order], row_of[order])
    begin, segment = np.empty(B, np.int64), np.empty(B, np.int64)
    begin[order], segment[order] = before - before[first], np.arange(B) - first + 1
    begin_own = begin[:, None] + shared[:, None] + np.cumsum(own, axis=1) - own

    def slot(b, k, t):
        """Of token t of an answer to prompt b."""
        return np.where(t < shared[b], begin[b] + t, begin_own[b, k] + t - shared[b])

    leads = np.arange(K) == np.argmax(lengths > 0, axis=1)[:, None]
    t = np.arange(tokens.shape[2])
    b, k, t = np.nonzero(mask & (leads[..., None] | (t >= shared[:, None, None])))
    at = row_of[b], slot(b, k, t)
    packed = {name: np.zeros((N, T), np.int32) for name in ("tokens", "segment_ids", "branches", "positions")}
    packed["tokens"][at], packed["positions"][at] = tokens[b, k, t], t
    packed["segment_ids"][at], packed["branches"][at] = segment[b], np.where(t < shared[b], 0, k + 1)

    def by_row(b, *others):
        """Things of prompts b, and what else is said of them, in the order of their rows; and their places there."""
        order = np.argsort(row_of[b], kind="stable")
        rows = row_of[b[order]]
        return *(x[order] for x in (b, *others)), (rows, np.arange(len(b)) - np.searchsorted(rows, rows))

    b, k, t, at = by_row(*np.nonzero(response_mask[:, :, 1:]))
    t = t + 1  # a first token is never predicted
    packed |= {name: np.zeros((N, A), np.int32) for name in ("before", "targets", "places")}
    packed["owners"] = np.full((N, A), -1, np.int32)
    packed["before"][at], packed["targets"][at] = slot(b, k, t - 1), tokens[b, k, t]
    packed["places"][at], packed["owners"][at] = (
        np.cumsum(response_mask[:, :, 1:], axis=2)[b, k, t - 1],
        b * K + k,
    )

    b, k, at = by_row(*np.nonzero(lengths))
    packed["ends"], packed["answers"] = np.zeros((N, E), np.int32), np.zeros((B, K), np.int32)
    packed["ends"][at] = slot(b, k, lengths[b, k] - 1)
    packed["answers"][b, k] = at[0] * E + at[1]
    return PackedAnswers(**packed, lengths=response_mask[:, :, 1:].sum(axis=2, dtype=np.int32))


def stack_steps(examples: Sequence[StepExample], max_len: int, pad_id: int = 0) -> StepBatch:
    """Encoded answers in steps as numpy arrays [B, max_len], padded on the right."""
    padded = pad_batch([e.ids for e in examples], max_len, "right", pad_id)
    ends, labels = np.zeros_like(padded["mask"]), np.full(padded["mask"].shape, -1.0, np.float32)
    for b, example in enumerate(examples):
        ends[b, : len(example.ids)], labels[b, : len(example.ids)] = example.ends, example.labels
    return StepBatch(padded["tokens"], padded["mask"], ends, labels)


def preference_batch(
    rows: Sequence[dict], tokenizer: Tokenizer, max_len: int, max_responses: int
) -> PreferenceBatch:
    """Preference rows as one batch of numpy arrays; a row that does not fit is a UserError."""
    examples = [encode_preference(row, tokenizer, max_len) for row in rows]
    return stack_preferences([e for e in examples if e], max_len, max_responses, tokenizer.pad_id)


# --- which rows in which step -----------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, part: tuple[int, ...]) -> np.ndarray:
    # Sorting raw Philox words, because numpy keeps those the same across versions and `permutation` not.
    words = np.random.Philox(np.random.SeedSequence([seed, *part])).random_raw(n)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False  # it is shared by all who ask again
    return order


def _host_share(batch_size: int, host_index: int, host_count: int) -> slice:
    if batch_size < 1 or batch_size % host_count:
        raise UserError(f"batch_size {batch_size} must be a positive multiple of the {host_count} hosts.")
    share = batch_size // host_count
    return slice(host_index * share, (host_index + 1) * share)


class Batches:
    """Which rows of an in-memory dataset belong to which step: a pure function of (seed, step).

    Every epoch is a new permutation (or the given order, `shuffle=False`). `batch_size` is global; each host
    gets its own slice of every batch, so that the batches are the same for any number of hosts. With
    `drop_last=False` an epoch's last batch holds the rows that remain, and a host's share may be empty.
    """

    def __init__(
        self,
        n_rows: int,
        batch_size: int,
        seed: int,
        drop_last: bool = True,
        host_index: int = 0,
        host_count: int = 1,
        shuffle: bool = True,
    ):
        self.n_rows, self.batch_size, self.seed, self.shuffle = n_rows, batch_size, seed, shuffle
        self._share = _host_share(batch_size, host_index, host_count)
        self.steps_per_epoch = n_rows // batch_size if drop_last else -(-n_rows // batch_size)
        if self.steps_per_epoch < 1:
            raise UserError(f"{n_rows} rows do not fill one batch of {batch_size}. Lower batch_size.")

    def indices(self, step: int) -> np.ndarray:
        """This host's row numbers at `step` (from 0, without end): [batch_size / host_count] int64."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = _permutation(self.n_rows, self.seed, (epoch,)) if self.shuffle else np.arange(self.n_rows)
        return order[batch * self.batch_size : (batch + 1) * self.batch_size][self._share]


class EasyFirst:
    """Which prompts belong to which step when the easiest come first: a pure function of (seed, step).

    difficulty: [N], larger is harder; equals are in random order. share: of the prompts, those that may be asked at a
    step; a batch is drawn from them uniformly, each at most once (Platanios et al. 2019, algorithm 1). There are always
    enough to fill a batch.
    """

    def __init__(self, difficulty: np.ndarray, batch_size: int, seed: int, share: Callable[[int], float]):
        if len(difficulty) < batch_size:
            raise UserError(
                f"{len(difficulty)} rows do not fill one batch of {batch_size}. Lower batch_size."
            )
        self._order = np.lexsort((_permutation(len(difficulty), seed, (0, 2)), difficulty))
        self.batch_size, self.seed, self._share = batch_size, seed, share

    def indices(self, step: int) -> np.ndarray:
        """Row numbers at `step` (from 0, without end): [batch_size] int64."""
        eligible = max(self.batch_size, math.ceil(self._share(step) * len(self._order)))
        return self._order[_permutation(eligible, self.seed, (step, 1))[: self.batch_size]]


class StreamBatches:
    """Batches of rows from a source too large for memory, without end; an incomplete last batch is skipped.

    Rows are shuffled within consecutive blocks of `buffer` rows, each by (seed, epoch, block), so the
    position is two numbers and resuming reads no row from before the current block. The position must
    travel with its batch when something prefetches: `((rows, stream.state()) for rows in stream)`.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        buffer: int = 1024,
        host_index: int = 0,
        host_count: int = 1,
    ):
        if buffer < 1:
            raise UserError(f"buffer is {buffer}; it must be at least 1 (no shuffling).")
        self._source, self._batch_size, self._seed, self._buffer = source, batch_size, seed, buffer
        self._share = _host_share(batch_size, host_index, host_count)
        self.report = Report()  # of what was read so far, blocks read ahead and read again included
        self.restore({"epoch": 0, "row": 0})

    def state(self) -> dict[str, int]:
        """The position after the last batch: epoch, and rows of it consumed by all hosts together."""
        return {"epoch": self._epoch, "row": self._row}

    def restore(self, state: dict[str, int]) -> None:
        """Continue after the batch at which `state()` was taken."""
        self._epoch, self._row = int(state["epoch"]), int(state["row"])
        self._rows = self._shuffled()

    def __iter__(self) -> Iterator[list[dict]]:
        return self

    def __next__(self) -> list[dict]:
        """This host's rows of the next global batch."""
        batch = self._take()
        if len(batch) < self._batch_size:  # the epoch's end
            if self._row == 0:
                raise UserError(f"{self.report.where}: fewer rows than one batch of {self._batch_size}.")
            self.restore({"epoch": self._epoch + 1, "row": 0})
            batch = self._take()
        self._row += len(batch)
        return batch[self._share]

    def _take(self) -> list[dict]:
        return [row for _, row in zip(range(self._batch_size), self._rows, strict=False)]

    def _shuffled(self) -> Iterator[dict]:
        block, offset = divmod(self._row, self._buffer)
        rows = read(self._source, self.report, block * self._buffer)
        while waiting := [row for _, row in zip(range(self._buffer), rows, strict=False)]:
            for i in _permutation(len(waiting), self._seed, (self._epoch, block))[offset:]:
                yield waiting[i]
            block, offset = block + 1, 0


# --- host to device ---------------------------------------------------------------------------------------


class prefetch:
    """Iterate `put(item)` over an iterator, prepared up to `depth` ahead in a background thread.

    `put` moves a host batch to the devices; it runs in that thread, where a mesh set by `jax.set_mesh` is not
    in force, so pass shardings explicitly. What fails there is raised at the `next` that would have given the
    item. Close it (or use `with`) when leaving before the end.
    """

    def __init__(self, iterator: Iterable[Any], put: Callable[[Any], Any], depth: int = 2):
        if depth < 1:
            raise UserError(f"prefetch depth is {depth}; it must be at least 1.")
        self._queue: queue.Queue = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(iterator, put), daemon=True)
        self._thread.start()

    def _work(self, iterator: Iterable[Any], put: Callable[[Any], Any]) -> None:
        # Entries are (a list of one result, no error), (None, error) or, at the end, (None, None).
        try:
            for item in iterator:
                if not self._offer(([put(item)], None)):
                    return
            self._offer((None, None))  # the end
        except BaseException as error:  # handed to the consumer, whatever it is
            self._offer((None, error))

    def _offer(self, entry: tuple[list | None, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._closed.is_set():
            raise StopIteration
        result, error = self._queue.get()
        if result is not None:
            return result[0]
        self.close()
        if isinstance(error, StopIteration):  # from `put`; passed on as it is, it would look like the end
            raise RuntimeError("put raised StopIteration") from error
        raise StopIteration if error is None else error

    def close(self) -> None:
        """Stop the thread and wait for it. Items prepared ahead are discarded."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> "prefetch":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
