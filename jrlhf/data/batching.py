"""Rows to ids to fixed-shape numpy arrays, and which rows go into which step.

A prompt and its answer are encoded apart and their ids joined, because generation sees exactly the prompt's
ids and then produces the answer's: encoding the joined text could merge across the boundary.
`loss_mask[t]` means that token t is a target, predicted from the tokens before it; a first token has nothing
before it and is never one.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from jrlhf.config import Source, UserError, did_you_mean
from jrlhf.data.report import Report
from jrlhf.data.sources import read
from jrlhf.data.tokenizer import Tokenizer
from jrlhf.types import PreferenceBatch


class Example(NamedTuple):
    """One text as ids. T tokens, no padding."""

    ids: np.ndarray  # [T] int32
    loss_mask: np.ndarray  # [T] bool, this token is a target


class PreferenceExample(NamedTuple):
    """K answers to one prompt."""

    answers: tuple[Example, ...]  # prompt + answer + EOS; loss_mask marks the answer and EOS
    ranks: np.ndarray  # [K] int32
    margins: np.ndarray  # [K] float32


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


def encode_prompt(
    row: dict | str,
    tokenizer: Tokenizer,
    max_prompt_len: int,
    too_long: str = "error",
    report: Report | None = None,
) -> np.ndarray | None:
    """BOS (if the tokenizer adds it) and the prompt: [T] int32, T <= max_prompt_len.

    A longer prompt is a UserError, or None with `too_long="drop"`, or loses its beginning (not BOS) with
    "truncate_left".
    """
    report = Report() if report is None else report
    text = row if isinstance(row, str) else row["prompt"]
    bos, ids = _bos(tokenizer), tokenizer.encode(text)
    if (excess := len(bos) + len(ids) - max_prompt_len) > 0:
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

    A longer row is a UserError, or None with `too_long="drop"`. With "truncate" the completion loses its end
    and the row its EOS, so that it does not teach stopping in the middle; the report counts these. A row
    whose prompt alone fills `max_len` is dropped.
    """
    report = Report() if report is None else report
    context = _bos(tokenizer) + tokenizer.encode(row["prompt"])
    targets = [*tokenizer.encode(row["completion"]), tokenizer.eos_ids[0]]
    if (tokens := len(context) + len(targets)) > max_len:
        if not _too_long(too_long, "truncate", tokens, max_len, row["prompt"], report):
            return None
        if len(context) >= max_len:
            report.dropped[f"prompt fills {max_len} tokens"] += 1
            return None
        report.changed["completion lost its end and EOS"] += 1
        targets = targets[: max_len - len(context)]
    report.kept += 1
    return _example(context, targets)


def encode_preference(
    row: dict, tokenizer: Tokenizer, max_len: int, too_long: str = "error", report: Report | None = None
) -> PreferenceExample | None:
    """Every answer as BOS + prompt + answer + EOS, at most `max_len` tokens.

    A longer row is a UserError, or None with `too_long="drop"`. With "truncate_left" the prompt loses its
    beginning until the longest answer fits, the same for all answers, which keep their EOS; a row with an
    answer that cannot fit is dropped.
    """
    report = Report() if report is None else report
    bos, prompt = _bos(tokenizer), tokenizer.encode(row["prompt"])
    answers = [[*tokenizer.encode(r), tokenizer.eos_ids[0]] for r in row["responses"]]
    longest = len(bos) + max(map(len, answers))
    if (excess := longest + len(prompt) - max_len) > 0:
        if not _too_long(too_long, "truncate_left", longest + len(prompt), max_len, row["prompt"], report):
            return None
        if excess > len(prompt):
            report.dropped[f"an answer fills {max_len} tokens"] += 1
            return None
        report.changed["prompt lost its beginning"] += 1
        prompt = prompt[excess:]
    report.kept += 1
    return PreferenceExample(
        tuple(_example(bos + prompt, answer) for answer in answers),
        np.asarray(row["ranks"], np.int32),
        np.asarray(row.get("scores", [0.0] * len(answers)), np.float32),
    )


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
    decreasing (Johnson 1973) within windows of `window` examples, so that neighbours in the data stay near.
    """
    examples = list(examples)
    bins: list[list[Example]] = []
    for start in range(0, len(examples), window):
        group = sorted(examples[start : start + window], key=lambda e: -len(e.ids))  # stable: repeatable
        room = np.full(len(group), length)
        rows: list[list[Example]] = [[] for _ in group]
        for example in group:
            _check_fits(len(example.ids), length)
            first = int(np.argmax(room >= len(example.ids)))
            rows[first].append(example)
            room[first] -= len(example.ids)
        bins += [row for row in rows if row]
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
    examples: Sequence[PreferenceExample], max_len: int, max_responses: int, pad_id: int = 0
) -> PreferenceBatch:
    """Encoded preferences as numpy arrays [B, max_responses, max_len]; a missing answer is masked, rank 0."""
    B, K, T = len(examples), max_responses, max_len
    tokens = np.full((B, K, T), pad_id, np.int32)
    mask, response_mask = np.zeros((B, K, T), bool), np.zeros((B, K, T), bool)
    ranks, margins = np.zeros((B, K), np.int32), np.zeros((B, K), np.float32)
    for b, example in enumerate(examples):
        k = len(example.answers)
        if k > K:
            raise UserError(f"A row has {k} responses, max_responses is {K}.")
        padded = pad_batch(example.answers, T, "right", pad_id)
        tokens[b, :k], mask[b, :k] = padded["tokens"], padded["mask"]
        response_mask[b, :k] = padded["loss_mask"]
        ranks[b, :k], margins[b, :k] = example.ranks, example.margins
    return PreferenceBatch(tokens, mask, response_mask, ranks, margins)


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
