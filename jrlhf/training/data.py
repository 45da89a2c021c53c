"""From sources to arrays of fixed shape in memory, and batches of them on the mesh."""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from jrlhf.config import Source, UserError, did_you_mean
from jrlhf.data.batching import (
    Batches,
    Example,
    StreamBatches,
    document_ids,
    encode_demonstration,
    encode_preference,
    encode_prompt,
    encode_rows,
    encode_steps,
    encode_turns,
    first_fit,
    pack,
    pack_answers,
    pack_texts,
    pad_batch,
    prefetch,
    shared_tokens,
    stack_preferences,
    stack_steps,
)
from jrlhf.data.chat import prompt_text
from jrlhf.data.labelers import rater_of
from jrlhf.data.report import Report
from jrlhf.data.sources import DataSource, check_row, load, read
from jrlhf.data.tokenizer import Tokenizer
from jrlhf.sharding import batch_sharding, batch_ways, fetch, put_batch, take_batch
from jrlhf.types import AnswerBatch, PairBatch, PreferenceBatch, SequenceBatch, StepBatch, UnpairedBatch


def load_rows(source: Source, kind: str, console: Console) -> list[dict]:
    """All rows of a source, each checked against the schema; says how many were read and dropped."""
    rows, report = load(source)
    where = type(source).__name__
    rows = [check_row(row, kind, f"{where} row {n}") for n, row in enumerate(rows, 1)]
    console.print(f"  {report}", highlight=False)
    return rows


def text_batch(source: Source, tokenizer: Tokenizer, length: int, console: Console) -> SequenceBatch:
    """Every document of a source, packed into rows of `length` tokens; all tokens but the first are targets."""
    return packed_texts(load_rows(source, "text", console), tokenizer, length)


def packed_texts(rows: Iterable[dict], tokenizer: Tokenizer, length: int) -> SequenceBatch:
    return SequenceBatch(**pack_texts((row["text"] for row in rows), tokenizer, length))


def demonstration_batch(
    source: Source, tokenizer: Tokenizer, length: int, too_long: str, console: Console
) -> SequenceBatch:
    """Demonstrations packed into rows of `length`; completions (or all assistant turns) and EOS are targets."""
    rows = load_rows(source, "demonstration", console)
    encode = partial(encode_turns, tokenizer=tokenizer, max_len=length, too_long=too_long)
    groups, report = encode_rows(rows, encode, type(source).__name__)
    if report.dropped or report.changed:
        console.print(f"  {report}", highlight=False)
    examples = [example for group in groups for example in group]
    return SequenceBatch(**pack(examples, length, tokenizer.pad_id))


def with_targets(batch: SequenceBatch) -> SequenceBatch:
    """The batch with the slots of what is to be predicted, where that is less than all: prompts need no logits."""
    mask = batch.loss_mask[:, 1:]
    most = -(-int(mask.sum(axis=1).max()) // 8) * 8
    if most >= mask.shape[1]:
        return batch
    # slots with a target, in their order, then others
    first = np.argsort(~mask, axis=1, kind="stable")[:, :most]
    found = np.take_along_axis(mask, first, axis=1)
    return batch._replace(targets=np.where(found, first + 1, -1).astype(np.int32))


def prompt_ids(
    source: Source, tokenizer: Tokenizer, max_len: int, too_long: str, console: Console
) -> tuple[list[dict], list[list[int]]]:
    """Prompt rows and their ids; a prompt longer than `max_len` is handled as `too_long` says."""
    rows = load_rows(source, "prompt", console)
    encode = partial(encode_prompt, tokenizer=tokenizer, max_prompt_len=max_len, too_long=too_long)
    kept, ids = [], []
    encoded, report = encode_rows(
        rows, lambda row, report: _with_row(row, encode(row, report=report)), type(source).__name__
    )
    if report.dropped or report.changed:
        console.print(f"  {report}", highlight=False)
    for row, tokens in encoded:
        kept.append(row)
        ids.append(tokens.tolist())
    return kept, ids


def _with_row(row: dict, encoded: Any):
    return None if encoded is None else (row, encoded)


def in_eval_share(prompt: str, fraction: float) -> bool:
    """Whether a prompt belongs to the held-out share: a function of its text, so that no prompt is in both."""
    return zlib.crc32(prompt.encode()) / 2**32 < fraction


def split_by_prompt(rows: list[dict], fraction: float) -> tuple[list[dict], list[dict]]:
    chosen = [in_eval_share(prompt_text(row["prompt"]), fraction) for row in rows]
    held = [row for row, is_held in zip(rows, chosen, strict=True) if is_held]
    kept = [row for row, is_held in zip(rows, chosen, strict=True) if not is_held]
    if not kept or (fraction and not held):
        raise UserError(
            f"eval_fraction {fraction} leaves {len(kept)} rows to train on and {len(held)} to evaluate"
        )
    return kept, held


def preference_arrays(
    rows: list[dict],
    tokenizer: Tokenizer,
    limit: int,
    too_long: str,
    console: Console,
    label: str = "preferences",
    criteria: tuple[str, ...] = (),
    told: Callable[[list[dict]], dict[str, np.ndarray]] | None = None,
) -> PreferenceBatch:
    """All preference rows of at most `limit` tokens as one [N, K, T] batch, T being the longest of them.

    criteria: those whose scores are wanted; UserError where no row has one. told: what further fields of the batch the
    rows that fit have (`group_weights`, ...).
    """
    known = {name for row in rows for name in row.get("criteria", {})}
    for name in criteria:
        if name not in known:
            raise UserError(f"{label}: no row has the criterion {name!r}.{did_you_mean(name, known)}")
    encode = partial(encode_preference, tokenizer=tokenizer, max_len=limit, too_long=too_long)
    encoded, report = encode_rows(rows, lambda row, report: _with_row(row, encode(row, report=report)), label)
    if report.dropped or report.changed:
        console.print(f"  {report}", highlight=False)
    examples = [example for _, example in encoded]
    longest = max(len(a.ids) for e in examples for a in e.answers)
    widest = max(len(e.answers) for e in examples)
    length = min(-(-longest // 8) * 8, limit)
    batch = stack_preferences(examples, length, widest, tokenizer.pad_id, criteria)
    return batch._replace(**told([row for row, _ in encoded])) if told else batch


def step_arrays(
    rows: list[dict],
    tokenizer: Tokenizer,
    limit: int,
    separator: str,
    too_long: str,
    console: Console,
    label: str = "steps",
) -> StepBatch:
    """All answers in steps of at most `limit` tokens as one [N, T] batch, T being the longest of them."""
    encode = partial(encode_steps, tokenizer=tokenizer, max_len=limit, separator=separator, too_long=too_long)
    examples, report = encode_rows(rows, encode, label)
    if report.dropped or report.changed:
        console.print(f"  {report}", highlight=False)
    longest = max(len(e.ids) for e in examples)
    return stack_steps(examples, min(-(-longest // 8) * 8, limit), tokenizer.pad_id)


def bootstrap_weights(batch: PreferenceBatch, heads: int, key: jax.Array) -> np.ndarray:
    """[N, heads] float32: how often each head's resample of the prompts, drawn with replacement, holds a row's prompt.

    Head h draws by `fold_in(key, h)`. Rows of one prompt are drawn together, for their answers are alike (Efron 1979;
    for reward ensembles Christiano et al. 2017, §2.2.3).
    """
    first, prompt = batch.tokens[:, 0], batch.mask[:, 0] & ~batch.response_mask[:, 0]
    texts = [row[real].tobytes() for row, real in zip(first, prompt, strict=True)]
    number = {text: n for n, text in enumerate(dict.fromkeys(texts))}
    draw = lambda h: jax.random.randint(jax.random.fold_in(key, h), (len(number),), 0, len(number))  # noqa: E731
    counts = [np.bincount(np.asarray(draw(h)), minlength=len(number)) for h in range(heads)]
    drawn = np.stack(counts, axis=1)[[number[text] for text in texts]].astype(np.float32)
    return drawn if isinstance(batch.weights, tuple) else drawn * batch.weights


def group_weights(rows: list[dict], groups: tuple[str, ...], where: str) -> np.ndarray:
    """[N, n] float32: the row's `weight` (or 1) in the column of its labeller's group, 0 in the others.

    UserError for a row whose labeller belongs to no group or to several.
    """
    weights = np.zeros((len(rows), len(groups)), np.float32)
    for n, row in enumerate(rows):
        name = rater_of(row, f"{where} row {n + 1}", "algorithm.groups")
        fits = [g for g, pattern in enumerate(groups) if fnmatchcase(name, pattern)]
        if len(fits) != 1:
            found = " and ".join(repr(groups[g]) for g in fits) or "none"
            raise UserError(
                f"{where} row {n + 1}: the labeller {name!r} must match one of algorithm.groups "
                f"({', '.join(map(repr, groups))}), and matches {found}."
            )
        weights[n, fits[0]] = row.get("weight", 1.0)
    return weights


def pair_arrays(batch: PreferenceBatch, which: str, even: bool = False) -> PairBatch:
    """Ordered pairs of a preference batch: "all" of them, or the "best_worst" of each prompt. Ties make none.

    even: a pair of certainty 1/2, on which the labels are evenly divided, is one all the same.
    """
    ranks = np.asarray(batch.ranks)
    before = (ranks[:, :, None] < ranks[:, None, :]) & (ranks[:, :, None] > 0)
    n, chosen, rejected = np.nonzero(before)
    if which == "best_worst":
        best = np.argmin(np.where(ranks > 0, ranks, np.iinfo(np.int32).max), axis=1)
        worst = np.argmax(ranks, axis=1)
        n = np.flatnonzero(ranks[np.arange(len(ranks)), best] < ranks[np.arange(len(ranks)), worst])
        chosen, rejected = best[n], worst[n]
    if even and not isinstance(batch.certainty, tuple):
        # Both, for a probability just off 1/2 rounds to it in float32.
        divided = np.flatnonzero((np.asarray(batch.certainty) == 0.5) & (ranks[:, 0] == ranks[:, 1]))
        n = np.concatenate([n, divided])
        order = np.argsort(n, kind="stable")
        chosen = np.concatenate([chosen, np.zeros_like(divided)])[order]
        n, rejected = n[order], np.concatenate([rejected, np.ones_like(divided)])[order]
    if not len(n):
        raise UserError("the preferences hold no ordered pair: every answer is tied")
    pick = lambda x: np.stack([x[n, chosen], x[n, rejected]], axis=1)  # noqa: E731
    return PairBatch(
        pick(batch.tokens),
        pick(batch.mask),
        pick(batch.response_mask),
        np.zeros((len(n), 2), np.float32),
        batch.weights if isinstance(batch.weights, tuple) else np.asarray(batch.weights)[n, 0],
        batch.certainty if isinstance(batch.certainty, tuple) else np.asarray(batch.certainty)[n],
    )


def check_plain(rows: list[dict], fields: tuple[str, ...], who: str) -> None:
    """UserError for a row that says, in one of `fields` ("weight", "probability"), what `who` would not hear."""
    plain = {"weight": (1,), "probability": (0, 1)}
    for n, row in enumerate(rows, 1):
        for name in fields:
            if name in row and row[name] not in plain[name]:
                raise UserError(
                    f"preferences row {n} has {name!r} {row[name]:g}, which {who} cannot use. Aggregate the votes with "
                    "method 'majority' (and weight 'one'), or choose an algorithm that reads it (docs/people.md)."
                )


def take(arrays: Any, index: np.ndarray) -> Any:
    return jax.tree.map(lambda x: x[index], arrays)


def rows_of(arrays: Any) -> int:
    return len(jax.tree.leaves(arrays)[0])


class Packing:
    """How answers in memory are packed (`PackedAnswers`): rows of one length, in which as many prompts are as fit.

    arrays: a PreferenceBatch, PairBatch or RankedBatch of numpy arrays, padded on the right. parts: the microbatches of
    a batch, each of which has rows of its own. `length` is that of the longest prompt with all its answers. `targets`
    is a quarter more than the answers' tokens that a row has on average, and `answers` as much more than its answers.
    """

    def __init__(self, arrays: Any, mesh: Mesh, parts: int = 1):
        self._arrays, self._parts, self._ways = arrays, parts, batch_ways(mesh)
        self._padded = arrays.tokens, arrays.mask, arrays.response_mask
        shared, lengths = shared_tokens(*self._padded), arrays.mask.sum(axis=2)
        tokens = shared + np.maximum(lengths - shared[:, None], 0).sum(axis=1)
        targets = arrays.response_mask[:, :, 1:].sum(axis=(1, 2))
        answers = (lengths > 0).sum(axis=1)
        self._sizes = np.stack([tokens, targets, answers], axis=1)
        self.length = -(-int(tokens.max()) // 8) * 8
        usual = 1.25 * self.length / tokens.sum()  # times what all have: what a row has room for
        self.targets = min(-(-int(max(targets.max(), usual * targets.sum(), 1)) // 8) * 8, self.length)
        self.answers = math.ceil(max(answers.max(), usual * answers.sum()))

    def unit(self, size: int) -> int:
        """Rows come in multiples of this, in batches of `size` prompts."""
        both = self._ways * self._parts
        return both if size % both == 0 else math.lcm(self._ways, self._parts)

    def rows(self, index: np.ndarray) -> int:
        """Rows that a batch of the numbered prompts needs."""
        most = max(int(self._bins(index[i :: self._parts]).max()) + 1 for i in range(self._parts))
        unit = self.unit(len(index))
        return -(-most * self._parts // unit) * unit

    def batch(self, index: np.ndarray, rows: int) -> Any:
        """The numbered prompts as a batch of numpy arrays, packed into so many rows; those that are left are empty."""
        shape = rows // self._parts, self.length, self.targets, self.answers
        packed = []
        for i in range(self._parts):
            own = index[i :: self._parts]
            tokens, mask, response_mask = (x[own] for x in self._padded)
            packed.append(pack_answers(tokens, mask, response_mask, self._bins(own), shape))
        # Part i of `split_rows` is rows i, i + parts, ...
        merged = jax.tree.map(lambda *x: np.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *packed)
        others = self._arrays._replace(tokens=(), mask=(), response_mask=())
        return take(others, index)._replace(tokens=merged)

    def _bins(self, index: np.ndarray) -> np.ndarray:
        return first_fit(self._sizes[index], (self.length, self.targets, self.answers))


class BatchFeed:
    """Batches of in-memory arrays for `train`, prepared ahead in a background thread; any step can be the first."""

    def __init__(self, arrays: Any, batch_size: int, seed: int, mesh: Mesh):
        self._arrays, self._mesh = arrays, mesh
        self._batches = Batches(rows_of(arrays), batch_size, seed)
        self._feed: Iterator | None = None
        self._next = -1

    def __call__(self, step: int) -> Any:
        if self._feed is None or step != self._next:
            self.close()
            self._feed = prefetch(self._from(step), self._put)
        self._next = step + 1
        return next(self._feed)

    def _put(self, index: np.ndarray) -> Any:
        return take_batch(self._mesh, self._arrays, index)

    def _from(self, step: int) -> Iterator[np.ndarray]:
        while True:
            yield self._batches.indices(step)
            step += 1

    def close(self) -> None:
        if isinstance(self._feed, prefetch):
            self._feed.close()


SHAPES = 4  # sizes that batches may have: each is a program of its own


class SizedFeed(BatchFeed):
    """Batches of which each is as large as its rows need: of one of at most `shapes` sizes (one, in short runs).

    The sizes are evenly spaced and were chosen by what the steps of the run need: all of them, or a sample where they
    are many. A step that needs more than any of these has the next larger one.

    needs: rows by number -> the size that they need. cut: (rows by number, size) -> a batch of numpy arrays. Sizes are
    multiples of `unit`.
    """

    def __init__(
        self,
        arrays: Any,
        batch_size: int,
        seed: int,
        mesh: Mesh,
        steps: int,
        needs: Callable[[np.ndarray], int],
        cut: Callable[[np.ndarray, int], Any],
        unit: int,
        shapes: int = SHAPES,
    ):
        super().__init__(arrays, batch_size, seed, mesh)
        self._needs, self._cut = needs, cut
        sample = np.unique(np.linspace(0, steps - 1, min(steps, 256)).astype(int))
        needed = {int(step): needs(self._batches.indices(int(step))) for step in sample}
        self._least, self._unit = 0, unit
        if steps < 50 * shapes:
            self._least = max(self._size(n) for n in needed.values())
        while len({self._size(n) for n in needed.values()}) > shapes:
            self._unit += unit
        self._least = min(self._size(n) for n in needed.values())
        self._examples = {self._size(n): step for step, n in needed.items()}  # a step of each

    def _size(self, needed: int) -> int:
        return max(-(-needed // self._unit) * self._unit, self._least)

    def _batch(self, index: np.ndarray) -> Any:
        return self._cut(index, self._size(self._needs(index)))

    def _put(self, index: np.ndarray) -> Any:
        return put_batch(self._mesh, self._batch(index))

    def shapes(self) -> list[Any]:
        """A batch of each size as shapes on the mesh, the largest first."""
        sharding = batch_sharding(self._mesh)
        struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        steps = [step for _, step in sorted(self._examples.items(), reverse=True)]
        return [jax.tree.map(struct, self._batch(self._batches.indices(step))) for step in steps]


class PackedFeed(SizedFeed):
    """The same prompts in the same steps, packed (`Packing`) into as many rows as they need."""

    def __init__(self, arrays: Any, batch_size: int, seed: int, mesh: Mesh, steps: int, parts: int = 1):
        packing = Packing(arrays, mesh, parts)
        unit = packing.unit(batch_size)
        super().__init__(arrays, batch_size, seed, mesh, steps, packing.rows, packing.batch, unit)


class TargetFeed(SizedFeed):
    """Sequences `with_targets`, with room for as many as the row of a batch with the most of them has.

    Two sizes: what is beyond a batch's targets costs the last layer and the head alone, less than a program more.
    """

    def __init__(self, arrays: SequenceBatch, batch_size: int, seed: int, mesh: Mesh, steps: int):
        counts = np.sum(arrays.targets >= 0, axis=1)

        def cut(index: np.ndarray, size: int) -> SequenceBatch:
            batch = take(arrays, index)
            return batch._replace(targets=batch.targets[:, :size])

        needs = lambda index: int(counts[index].max())  # noqa: E731
        super().__init__(arrays, batch_size, seed, mesh, steps, needs, cut, unit=8, shapes=2)


def feed_of(arrays: SequenceBatch, batch_size: int, seed: int, mesh: Mesh, steps: int) -> BatchFeed:
    """Batches of sequences for `steps` steps."""
    if isinstance(arrays.targets, tuple):
        return BatchFeed(arrays, batch_size, seed, mesh)
    return TargetFeed(arrays, batch_size, seed, mesh, steps)


@dataclass(frozen=True)
class Later(DataSource):
    """A source without its first rows (which something else uses)."""

    abstract: ClassVar[bool] = True

    source: Source
    skip: int

    def read(self, report: Report, start: int = 0) -> Iterator[dict]:
        return read(self.source, report, self.skip + start)


class StreamFeed:
    """Batches of rows from a source that is read as it goes. `position` is where the last batch given ended."""

    def __init__(
        self,
        source: Source,
        encode: Callable,
        batch_size: int,
        length: int,
        seed: int,
        mesh: Mesh,
        pad_id: int,
    ):
        self._stream = StreamBatches(source, batch_size, seed)
        self._encode, self._length, self._mesh, self._pad_id = encode, length, mesh, pad_id
        self.position = self._stream.state()
        self._feed: prefetch | None = None

    def restore(self, position: dict) -> None:
        self.position = position
        self._stream.restore(position)

    def __call__(self, step: int) -> SequenceBatch:
        if self._feed is None:
            self._feed = prefetch(self._encoded(), lambda item: (put_batch(self._mesh, item[0]), item[1]))
        batch, self.position = next(self._feed)
        return batch

    def _encoded(self) -> Iterator[tuple[SequenceBatch, dict]]:
        for rows in self._stream:
            examples = [self._encode(row) for row in rows]
            yield one_per_row(examples, self._length, self._pad_id), self._stream.state()

    def close(self) -> None:
        if self._feed is not None:
            self._feed.close()


def one_per_row(examples: list[Example], length: int, pad_id: int) -> SequenceBatch:
    """Examples padded on the right, one in each row (a stream is not packed: batches keep their number of rows)."""
    padded = pad_batch(examples, length, "right", pad_id)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), padded["tokens"].shape)
    return SequenceBatch(padded["tokens"], padded["mask"].astype(np.int32), positions, padded["loss_mask"])


def encode_text(row: dict, tokenizer: Tokenizer, length: int) -> Example:
    """A document of a stream: BOS + text + EOS, cut at `length`; every token but the first is a target."""
    row = check_row(row, "text", "stream")
    ids = np.asarray(document_ids(row["text"], tokenizer)[:length], np.int32)
    return Example(ids, np.arange(len(ids)) > 0)


def encode_cut_demonstration(row: dict, tokenizer: Tokenizer, length: int) -> Example:
    """A demonstration of a stream, cut at `length`; a prompt that fills it leaves a row without targets."""
    row = check_row(row, "demonstration", "stream")
    example = encode_demonstration(row, tokenizer, length, "truncate")
    return example if example is not None else Example(np.zeros(1, np.int32), np.zeros(1, bool))


SAMPLE_ROWS = 256  # rows that are sampled or scored together where there are many


def chunk_rows(rows: int, mesh: Mesh) -> int:
    """Rows that go through a model together: at most SAMPLE_ROWS, up to a multiple of the mesh's batch shards."""
    ways = batch_ways(mesh)
    return -(-min(rows, SAMPLE_ROWS) // ways) * ways


def in_chunks(f: Callable, arrays: Any, size: int, mesh: Mesh, packing: bool = False) -> Any:
    """`f(batch)` over all rows, `size` at a time (the last padded with copies of one), results on the host.

    packing: the rows are answers to prompts, and batches of them are packed (`Packing`).
    """
    n = rows_of(arrays)
    # Those that are packed are mixed, so that chunks are about as large.
    order = Batches(n, n, 0).indices(0) if packing else np.arange(n)
    chunks = [order[np.arange(start, start + size) % n] for start in range(0, n, size)]
    if packing:
        packed = Packing(arrays, mesh)
        rows = max(packed.rows(index) for index in chunks)
        batches = (put_batch(mesh, packed.batch(index, rows)) for index in chunks)
    else:
        batches = (take_batch(mesh, arrays, index) for index in chunks)
    out = [fetch(f(batch)) for batch in batches]
    return take(jax.tree.map(lambda *x: np.concatenate(x)[:n], *out), np.argsort(order))


# --- single labelled answers --------------------------------------------------------------------------------


def best_and_worst(rows: list[dict]) -> list[dict]:
    """Binary rows of preference rows: the best answers to each prompt are desirable, the worst undesirable.

    Answers between them, and rows whose answers are all tied, are left out. UserError for rows with a weight or a soft
    label, which a single labelled answer cannot carry.
    """
    check_plain(rows, ("weight", "probability"), "an algorithm on single labelled answers")
    found = []
    for row in rows:
        best, worst = min(row["ranks"]), max(row["ranks"])
        shared = {"prompt": row["prompt"]} | ({"tools": row["tools"]} if "tools" in row else {})
        ended = row.get("ended", [True] * len(row["ranks"]))
        for answer, rank, end in zip(row["responses"], row["ranks"], ended, strict=True):
            if best < worst and rank in (best, worst):
                found.append(shared | {"completion": answer, "label": rank == best, "ended": end})
    return found


def encode_labelled(
    row: dict, tokenizer: Tokenizer, max_len: int, too_long: str, report: Report | None = None
) -> tuple[dict, Example] | None:
    """A binary row with its answer's ids, as `encode_preference` makes them of one answer."""
    alone = row | {"responses": [row["completion"]], "ranks": [1], "ended": [row.get("ended", True)]}
    example = encode_preference(alone, tokenizer, max_len, too_long, report)
    return None if example is None else (row, example.answers[0])


def unpaired_arrays(
    rows: list[dict],
    tokenizer: Tokenizer,
    limit: int,
    too_long: str,
    console: Console,
    seed: int | None = None,
    label: str = "labelled answers",
) -> tuple[UnpairedBatch, list[str]]:
    """All binary rows of at most `limit` tokens, and each one's prompt as text.

    With a `seed` each prompt also gets an answer to another one (`other_answers`), cut where it does not fit `limit`.
    """
    encode = partial(encode_labelled, tokenizer=tokenizer, max_len=limit, too_long=too_long)
    encoded, report = encode_rows(rows, encode, label)
    if report.dropped or report.changed:
        console.print(f"  {report}", highlight=False)
    prompts = [prompt_text(row["prompt"]) for row, _ in encoded]
    examples = [example for _, example in encoded]
    mismatched = None
    if seed is not None:
        pairs = zip(examples, (examples[i] for i in other_answers(prompts, seed)), strict=True)
        mismatched = _answer_batch(
            [_with_answer(own, other, limit) for own, other in pairs], limit, tokenizer.pad_id
        )
    labels = np.asarray([row["label"] for row, _ in encoded], bool)
    return UnpairedBatch(_answer_batch(examples, limit, tokenizer.pad_id), labels, mismatched), prompts


def _answer_batch(examples: list[Example], limit: int, pad_id: int) -> AnswerBatch:
    longest = max(len(e.ids) for e in examples)
    padded = pad_batch(examples, min(-(-longest // 8) * 8, limit), "right", pad_id)
    nothing = np.zeros(len(examples), np.float32)
    return AnswerBatch(padded["tokens"], padded["mask"], padded["loss_mask"], nothing)


def _with_answer(example: Example, other: Example, limit: int) -> Example:
    """The prompt of one with the answer of another."""
    begin, answer = (int(np.argmax(e.loss_mask)) for e in (example, other))
    ids = np.concatenate([example.ids[:begin], other.ids[answer:]])
    loss_mask = np.concatenate([example.loss_mask[:begin], other.loss_mask[answer:]])
    return Example(ids[:limit], loss_mask[:limit])


def other_answers(prompts: list[str], seed: int) -> np.ndarray:
    """For each row another row of a different prompt, [N]; every row is given once. A function of the seed.

    Prompts are put in a random order, the rows of one next to each other, and the rows rotated by the most rows that
    a prompt has. UserError where one prompt has more than half of them.
    """
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    group = np.asarray([number[prompt] for prompt in prompts])
    most = int(np.max(np.bincount(group)))
    if 2 * most > len(prompts):
        raise UserError(
            f"one prompt has {most} of the {len(prompts)} answers: KTO's reference point needs an answer to another "
            "prompt for each. Give more prompts, or set algorithm.reference_point to 'zero'."
        )
    place = np.argsort(Batches(len(number), len(number), seed).indices(0))
    order = np.argsort(place[group], kind="stable")
    others = np.empty_like(order)
    others[order] = np.roll(order, -most)
    return others
