import threading
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise

import numpy as np
import pytest

from jrlhf.config import Source, UserError
from jrlhf.data.batching import (
    Batches,
    Example,
    StreamBatches,
    encode_demonstration,
    encode_preference,
    encode_prompt,
    encode_rows,
    pack,
    pack_texts,
    pad_batch,
    preference_batch,
    prefetch,
    stack_preferences,
)
from jrlhf.data.report import Report
from jrlhf.data.sources import HHSource, TextFileSource, load
from jrlhf.data.tokenizer import load_tokenizer

ROW = {"prompt": "apple is bread", "completion": "thanks ."}  # 1 BOS + 3 + 2 + 1 EOS = 7 tokens
PAIR = {"prompt": "apple is", "responses": ["bread .", "sorry apple bread ."], "ranks": [2, 1]}


def random_examples(count, longest, seed=0):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, longest + 1, count)
    return [Example(draw.integers(4, 40, n).astype(np.int32), draw.random(n) < 0.5) for n in lengths]


# --- demonstrations and prompts -------------------------------------------------------------------------


def test_demonstration_is_what_generation_sees_then_completion_and_eos(tokenizer):
    example = encode_demonstration(ROW, tokenizer, max_len=7)
    prompt = encode_prompt(ROW, tokenizer, max_prompt_len=4)
    np.testing.assert_array_equal(example.ids[:4], prompt)
    assert prompt[0] == tokenizer.bos_id
    assert example.ids[-1] == tokenizer.eos_ids[0]
    assert list(example.ids[4:-1]) == tokenizer.encode(ROW["completion"])
    assert example.loss_mask.tolist() == [False] * 4 + [True] * 3
    assert (example.ids.dtype, example.loss_mask.dtype) == (np.int32, bool)


def test_first_token_is_no_target_without_bos_and_prompt(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "add_bos", False)
    example = encode_demonstration({"prompt": "", "completion": "apple is"}, tokenizer, max_len=8)
    assert list(example.ids) == [*tokenizer.encode("apple is"), tokenizer.eos_ids[0]]
    assert example.loss_mask.tolist() == [False, True, True]


def test_truncation_never_loses_eos_uncounted(tokenizer):
    report = Report()
    whole = encode_demonstration(ROW, tokenizer, 7, "truncate", report)
    assert whole.ids[-1] == tokenizer.eos_ids[0]
    assert not report.changed
    cut = encode_demonstration(ROW, tokenizer, 5, "truncate", report)
    np.testing.assert_array_equal(cut.ids, whole.ids[:5])
    np.testing.assert_array_equal(cut.loss_mask, whole.loss_mask[:5])
    assert report.changed == {"completion lost its end and EOS": 1}
    assert encode_demonstration(ROW, tokenizer, 4, "truncate", report) is None  # nothing left to learn
    assert encode_demonstration(ROW, tokenizer, 6, "drop", report) is None
    assert report.dropped == {"prompt fills 4 tokens": 1, "longer than 6 tokens": 1}
    assert (report.kept, report.read) == (2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda t: encode_demonstration(ROW, t, 6),
            "7 tokens do not fit in 6 .'apple is bread'.*'drop' or 'truncate'",
        ),
        (
            lambda t: encode_demonstration(ROW, t, 6, "trunc"),
            "unknown policy 'trunc'. Did you mean 'truncate'",
        ),
        (lambda t: encode_prompt(ROW, t, 3), "4 tokens do not fit in 3 .*'truncate_left'"),
        (lambda t: encode_prompt(ROW, t, 3, "truncate"), "Did you mean 'truncate_left'"),
        (lambda t: encode_preference(PAIR, t, 7), "8 tokens do not fit in 7"),
        (lambda t: preference_batch([PAIR], t, 8, 1), "2 responses, max_responses is 1"),
        (
            lambda t: encode_rows([ROW, ROW], partial(encode_prompt, tokenizer=t, max_prompt_len=3), "sft"),
            "sft row 1: 4",
        ),
        (
            lambda t: encode_rows(
                [ROW], partial(encode_prompt, tokenizer=t, max_prompt_len=3, too_long="drop"), "sft"
            ),
            "No row is left. sft: 0 of 1 rows kept; dropped 1: longer than 3",
        ),
        (lambda t: pad_batch(random_examples(3, 9), 1), "does not fit in rows of 1"),
        (lambda t: pad_batch([], 4, "centre"), "neither 'left' nor 'right'"),
        (lambda t: pack(random_examples(3, 9), 1), "does not fit in rows of 1"),
        (lambda t: pack_texts([], t, 8), "no texts"),
        (lambda t: pack_texts(["apple"], t, 1), "needs at least 2 tokens"),
        (lambda t: Batches(3, 4, 0), "3 rows do not fill one batch of 4"),
        (lambda t: Batches(9, 4, 0, host_count=3), "batch_size 4 must be a positive multiple of the 3 hosts"),
        (lambda t: StreamBatches(Rows(9), 4, 0, buffer=0), "buffer is 0"),
        (lambda t: next(StreamBatches(Rows(3), 4, 0)), "Rows: fewer rows than one batch of 4"),
        (lambda t: prefetch([], id, depth=0), "depth is 0"),
    ],
)
def test_mistakes(tokenizer, call, message):
    with pytest.raises(UserError, match=message):
        call(tokenizer)


def test_long_prompts_can_lose_their_beginning_or_be_dropped(tokenizer):
    report = Report()
    cut = encode_prompt("apple is bread", tokenizer, 3, "truncate_left", report)
    assert cut.tolist() == [tokenizer.bos_id, *tokenizer.encode("is bread")]
    assert encode_prompt("apple is bread", tokenizer, 3, "drop", report) is None
    assert report.changed == {"prompt lost its beginning": 1}
    assert report.dropped == {"longer than 3 tokens": 1}


def test_encode_rows_drops_and_counts(tokenizer):
    rows = [ROW, {"prompt": "apple", "completion": "is"}, ROW]
    encode = partial(encode_demonstration, tokenizer=tokenizer, max_len=6, too_long="drop")
    examples, report = encode_rows(rows, encode, "sft")
    assert [len(e.ids) for e in examples] == [4]
    assert str(report) == "sft: 1 of 3 rows kept; dropped 2: longer than 6 tokens"


# --- padding and packing --------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_id", [0, 7])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_keeps_ids_and_masks_come_from_lengths(side, pad_id):
    examples = random_examples(20, 12)
    batch = pad_batch(examples, 12, side, pad_id)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "tokens": ((20, 12), "int32"),
        "mask": ((20, 12), "bool"),
        "loss_mask": ((20, 12), "bool"),
    }
    for b, example in enumerate(examples):
        mask = batch["mask"][b]
        n = len(example.ids)
        assert mask.tolist() == ([True] * n + [False] * (12 - n))[:: 1 if side == "right" else -1]
        np.testing.assert_array_equal(batch["tokens"][b, mask], example.ids)
        np.testing.assert_array_equal(batch["loss_mask"][b, mask], example.loss_mask)
        assert (batch["tokens"][b, ~mask] == pad_id).all()
        assert not batch["loss_mask"][b, ~mask].any()


def test_bare_ids_have_no_targets():
    batch = pad_batch([np.array([5, 6], np.int32)], 3, "left")
    assert batch["tokens"].tolist() == [[0, 5, 6]]
    assert batch["mask"].tolist() == [[False, True, True]]
    assert not batch["loss_mask"].any()


def unpack(packed):
    """Every segment's (ids, loss mask), in row order; checks the layout on the way."""
    for tokens, segments, positions, loss_mask in zip(
        *(packed[k] for k in ("tokens", "segment_ids", "positions", "loss_mask")), strict=True
    ):
        used = int((segments > 0).sum())
        assert (segments[:used] > 0).all()  # padding only at the end
        assert not loss_mask[used:].any()
        for segment in range(1, segments.max() + 1):
            (slots,) = np.nonzero(segments == segment)
            assert (np.diff(slots) == 1).all()
            np.testing.assert_array_equal(positions[slots], np.arange(len(slots)))
            assert not loss_mask[slots[0]]  # a first token is predicted from another segment
            yield tokens[slots], loss_mask[slots]


@pytest.mark.parametrize("window", [1, 7, 1024])
def test_packed_segments_are_the_examples(window):
    examples = random_examples(300, 16)
    packed = pack(examples, 16, pad_id=7, window=window)
    found = sorted((ids.tolist(), mask.tolist()) for ids, mask in unpack(packed))
    expected = sorted((e.ids.tolist(), [False, *e.loss_mask[1:].tolist()]) for e in examples)
    assert found == expected
    again = pack(examples, 16, pad_id=7, window=window)
    assert all((packed[k] == again[k]).all() for k in packed)


def test_packing_is_dense_and_keeps_windows_in_order():
    examples = random_examples(600, 16)
    packed = pack(examples, 32, window=200)
    assert (packed["segment_ids"] > 0).mean() > 0.95
    first_window = sum(len(e.ids) for e in examples[:200])
    rows = pack(examples[:200], 32)["tokens"]
    np.testing.assert_array_equal(packed["tokens"][: len(rows)], rows)
    assert (pack(examples[:200], 32)["segment_ids"] > 0).sum() == first_window
    # First-fit decreasing by hand: 5 and 2 share a row, 4 and 3 the next.
    sized = [Example(np.full(n, n, np.int32), np.ones(n, bool)) for n in (2, 5, 3, 4)]
    assert pack(sized, 7)["tokens"].tolist() == [[5] * 5 + [2] * 2, [4] * 4 + [3] * 3]


def test_packed_rows_have_about_as_many_targets():
    """All rows of a batch have room for as many as one of them has."""
    rng = np.random.default_rng(4)
    lengths = rng.integers(4, 30, 400)
    learned = np.maximum(np.where(rng.random(400) < 0.2, lengths - 2, lengths // 8), 1)
    examples = [
        Example(np.ones(n, np.int32), np.arange(n) >= n - m) for n, m in zip(lengths, learned, strict=True)
    ]
    packed = pack(examples, 64)
    targets, segments = packed["loss_mask"].sum(axis=1), packed["segment_ids"].max(axis=1)
    assert targets.sum() == learned.sum()
    usual = 64 * learned.sum() / lengths.sum()
    assert np.all((targets <= 1.5 * usual + 1) | (segments == 1))
    assert (packed["segment_ids"] > 0).mean() > 0.9


def test_pack_texts_predicts_every_token_once(texts, tokenizer):
    documents = texts[:50]
    whole = [[tokenizer.bos_id, *tokenizer.encode(t), tokenizer.eos_ids[0]] for t in documents]
    packed = pack_texts(documents, tokenizer, length=8)  # shorter than many documents
    assert max(map(len, whole)) > 8
    targets = packed["tokens"][packed["loss_mask"]]
    assert sorted(targets.tolist()) == sorted(token for ids in whole for token in ids[1:])
    contexts = {tuple(ids[max(0, i - 1) : i + 1]) for ids in whole for i in range(1, len(ids))}
    for ids, mask in unpack(packed):
        assert mask[1:].all()
        assert {tuple(pair) for pair in pairwise(ids)} <= contexts
    roomy = pack_texts(documents, tokenizer, length=64)
    assert sorted(ids.tolist() for ids, _ in unpack(roomy)) == sorted(whole)


# --- preferences ----------------------------------------------------------------------------------------


def test_criteria_are_kept_by_name_and_missing_ones_are_nan(tokenizer):
    rated = {**PAIR, "criteria": {"brief": [1, 0.5], "true": [0, 2]}}
    examples = [encode_preference(row, tokenizer, 9) for row in (PAIR, rated)]
    criteria = stack_preferences(examples, 9, 3, criteria=("true", "brief")).criteria
    nan = [np.nan, np.nan]
    np.testing.assert_array_equal(criteria, [[nan, nan, nan], [[0, 1], [2, 0.5], nan]])


def test_preference_batch_layout(tokenizer):
    three = {**PAIR, "responses": ["is", "bread .", "thanks"], "ranks": [1, 1, 3], "scores": [0.5, 0.5, -1]}
    batch = preference_batch([PAIR, three], tokenizer, max_len=9, max_responses=4)
    assert (batch.criteria, batch.weights) == ((), ())
    assert [(x.shape, x.dtype.name) for x in batch[:5]] == [
        ((2, 4, 9), "int32"),
        ((2, 4, 9), "bool"),
        ((2, 4, 9), "bool"),
        ((2, 4), "int32"),
        ((2, 4), "float32"),
    ]
    assert batch.ranks.tolist() == [[2, 1, 0, 0], [1, 1, 3, 0]]
    assert batch.margins.tolist() == [[0, 0, 0, 0], [0.5, 0.5, -1, 0]]
    prompt = encode_prompt(PAIR, tokenizer, 9)
    for b, row in enumerate([PAIR, three]):
        for k, response in enumerate(row["responses"]):
            answer = [*tokenizer.encode(response), tokenizer.eos_ids[0]]
            used = len(prompt) + len(answer)
            assert batch.tokens[b, k, :used].tolist() == [*prompt, *answer]
            assert batch.mask[b, k].tolist() == [True] * used + [False] * (9 - used)
            assert batch.tokens[b, k][batch.response_mask[b, k]].tolist() == answer
        assert not batch.mask[b, len(row["responses"]) :].any()
        assert not batch.response_mask[b, len(row["responses"]) :].any()


def test_an_answer_that_was_cut_off_has_no_end(tokenizer):
    """A reward model must see the difference, and DPO must not learn to stop where the length ran out."""
    whole, cut = (
        encode_preference({**PAIR, "ended": ended}, tokenizer, 20) for ended in ([True, True], [False, True])
    )
    assert whole.answers[0].ids[-1] == whole.answers[1].ids[-1] == tokenizer.eos_ids[0]
    np.testing.assert_array_equal(cut.answers[0].ids, whole.answers[0].ids[:-1])
    np.testing.assert_array_equal(cut.answers[0].loss_mask, whole.answers[0].loss_mask[:-1])
    np.testing.assert_array_equal(cut.answers[1].ids, whole.answers[1].ids)


def test_long_preferences_lose_the_same_prompt_beginning(tokenizer):
    report = Report()
    encode = partial(encode_preference, tokenizer=tokenizer, too_long="truncate_left", report=report)
    cut = encode(PAIR, max_len=7)
    assert [answer.ids.tolist()[:2] for answer in cut.answers] == [[1, *tokenizer.encode("is")]] * 2
    assert all(answer.ids[-1] == tokenizer.eos_ids[0] for answer in cut.answers)
    assert encode(PAIR, max_len=5) is None
    assert encode_preference(PAIR, tokenizer, 7, "drop", report) is None
    assert report.changed == {"prompt lost its beginning": 1}
    assert report.dropped == {"an answer fills 5 tokens": 1, "longer than 7 tokens": 1}


# --- which rows when ------------------------------------------------------------------------------------


def test_an_epoch_covers_every_row_once_and_epochs_differ():
    batches = Batches(n_rows=24, batch_size=6, seed=3)
    epochs = [np.concatenate([batches.indices(4 * e + i) for i in range(4)]) for e in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(24))
        assert list(order) != list(range(24))
    assert list(epochs[0]) != list(epochs[1])
    assert list(Batches(24, 6, seed=4).indices(0)) != list(batches.indices(0))


def test_indices_are_a_pure_function_of_the_step():
    steps = [7, 0, 3, 100, 0, 12]
    visited = Batches(50, 8, seed=1)
    for step in steps:
        np.testing.assert_array_equal(visited.indices(step), Batches(50, 8, seed=1).indices(step))


def test_the_shuffle_does_not_change_between_versions():
    """A resumed run depends on this order; it may change only with a note in the change log."""
    # Philox4x64 seeded with SeedSequence([0, 0]), its first ten words ranked.
    assert Batches(10, 10, seed=0).indices(0).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]


@pytest.mark.parametrize("host_count", [1, 2, 4])
def test_hosts_share_every_batch(host_count):
    whole = Batches(30, 8, seed=5)
    hosts = [Batches(30, 8, seed=5, host_index=h, host_count=host_count) for h in range(host_count)]
    for step in range(10):
        shares = [host.indices(step) for host in hosts]
        assert {len(share) for share in shares} == {8 // host_count}
        np.testing.assert_array_equal(np.concatenate(shares), whole.indices(step))


def test_last_batch_and_given_order():
    assert Batches(10, 4, 0).steps_per_epoch == 2
    kept = Batches(10, 4, 0, drop_last=False, shuffle=False)
    assert [kept.indices(step).tolist() for step in range(4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
        [0, 1, 2, 3],
    ]
    shuffled = Batches(10, 4, 0, drop_last=False)
    assert sorted(np.concatenate([shuffled.indices(step) for step in range(3)])) == list(range(10))


@dataclass(frozen=True)
class Rows(Source):
    n: int

    def rows(self):
        yield from ({"text": str(i)} for i in range(self.n))


def numbers(batch):
    return [int(row["text"]) for row in batch]


@pytest.mark.parametrize("buffer", [1, 5, 8, 100])
def test_stream_covers_an_epoch_and_resumes_anywhere(buffer):
    stream = StreamBatches(Rows(30), batch_size=4, seed=2, buffer=buffer)
    batches, states = [], [stream.state()]
    for batch in islice(stream, 20):  # 7 batches per epoch, 2 rows left over
        batches.append(numbers(batch))
        states.append(stream.state())
    epoch = [n for batch in batches[:7] for n in batch]
    assert len(set(epoch)) == 28
    assert (epoch == list(range(28))) == (buffer == 1)
    assert (batches[7:14] == batches[:7]) == (buffer == 1)
    assert states[7] == {"epoch": 0, "row": 28}
    assert states[8] == {"epoch": 1, "row": 4}
    for position in range(20):
        resumed = StreamBatches(Rows(30), batch_size=4, seed=2, buffer=buffer)
        resumed.restore(states[position])
        assert [numbers(batch) for batch in islice(resumed, 20 - position)] == batches[position:]
    assert stream.report.where == "Rows"
    assert stream.report.kept >= 80


def test_stream_blocks_are_shuffled_differently():
    rows = [n for batch in islice(StreamBatches(Rows(32), 8, seed=2, buffer=8), 4) for n in numbers(batch)]
    blocks = [[n - start for n in rows[start : start + 8]] for start in range(0, 32, 8)]
    assert [sorted(block) for block in blocks] == [list(range(8))] * 4
    assert len({tuple(block) for block in blocks}) == 4


def test_stream_hosts_share_every_batch():
    hosts = [StreamBatches(Rows(30), 4, 2, 8, host, 2) for host in range(2)]
    whole = StreamBatches(Rows(30), 4, 2, 8)
    for _ in range(12):
        assert [n for host in hosts for n in numbers(next(host))] == numbers(next(whole))
        assert [host.state() for host in hosts] == [whole.state()] * 2


def test_stream_of_hh_resumes(shared_data):
    source = HHSource(str(shared_data / "hh-harmless-base" / "pairs.jsonl"), max_rows=100)
    stream = StreamBatches(source, 8, seed=0, buffer=32)
    first = [next(stream) for _ in range(5)]
    state = stream.state()
    rest = [next(stream) for _ in range(10)]
    resumed = StreamBatches(source, 8, seed=0, buffer=32)
    resumed.restore(state)
    assert [next(resumed) for _ in range(10)] == rest
    assert len({row["prompt"] for batch in first for row in batch}) > 30


# --- prefetch -------------------------------------------------------------------------------------------


def worker_threads():
    return [thread for thread in threading.enumerate() if "_work" in thread.name]


def test_prefetch_gives_the_same_in_order_and_runs_ahead():
    calls = []
    ahead = prefetch(range(10), lambda x: calls.append(x) or x * x, depth=3)
    deadline = time.monotonic() + 10
    while len(calls) < 4 and time.monotonic() < deadline:  # three wait in the queue, one in the hand
        time.sleep(0.01)
    time.sleep(0.05)
    assert calls == [0, 1, 2, 3]
    assert list(ahead) == [x * x for x in range(10)]
    assert list(ahead) == []
    assert not worker_threads()


@pytest.mark.parametrize("where", ["iterator", "put"])
@pytest.mark.parametrize("error", [ValueError("broken"), StopIteration()])
def test_prefetch_raises_what_failed_after_the_good_items(where, error):
    def items():
        yield from (1, 2)
        if where == "iterator":
            raise error
        yield 3

    def put(item):
        if item == 3:
            raise error
        return item

    ahead = prefetch(items(), put)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises((ValueError, RuntimeError, StopIteration)) as caught:
        next(ahead)
    if isinstance(error, ValueError):
        assert caught.value is error
    else:
        assert isinstance(caught.value, RuntimeError)  # it must not look like the end
    assert not worker_threads()


def test_prefetch_closes_early_with_an_endless_iterator():
    def endless():
        while True:
            yield 0

    with prefetch(endless(), lambda x: x) as ahead:
        assert next(ahead) == 0
        assert worker_threads()
    assert not worker_threads()
    assert list(ahead) == []


def test_prefetch_to_devices():
    import jax

    batches = [{"tokens": np.full((2, 3), i, np.int32)} for i in range(3)]
    for i, batch in enumerate(prefetch(batches, jax.device_put)):
        assert isinstance(batch["tokens"], jax.Array)
        np.testing.assert_array_equal(batch["tokens"], batches[i]["tokens"])


# --- real data ------------------------------------------------------------------------------------------


def test_stories_pack_with_the_real_tokenizer(shared_data):
    tokenizer = load_tokenizer(shared_data / "stories260K")
    rows, _ = load(TextFileSource(str(shared_data / "tinystories" / "tinystories_sample.txt"), max_rows=60))
    packed = pack_texts([row["text"] for row in rows], tokenizer, 512)
    whole = [[1, *tokenizer.encode(row["text"]), 1] for row in rows]
    assert packed["loss_mask"].sum() == sum(len(ids) - 1 for ids in whole)
    short = sorted(ids for ids in whole if len(ids) <= 512)
    found = [ids.tolist() for ids, _ in unpack(packed)]
    assert all(ids in found for ids in short)


def test_hh_pairs_fit_or_are_counted(shared_data):
    tokenizer = load_tokenizer(shared_data / "stories260K")
    rows, _ = load(HHSource(str(shared_data / "hh-harmless-base" / "pairs.jsonl"), max_rows=100))
    cut, report = encode_rows(
        rows, partial(encode_preference, tokenizer=tokenizer, max_len=256, too_long="truncate_left")
    )
    assert report.read == 100
    assert report.kept == len(cut)
    assert report.changed.total() > 0
    batch = stack_preferences(cut, 256, 2, tokenizer.pad_id)
    lengths = batch.mask.sum(-1)
    assert lengths.max() == 256
    last = np.take_along_axis(batch.tokens, lengths[..., None] - 1, -1)
    assert (last == tokenizer.eos_ids[0]).all()
    assert (batch.ranks == [1, 2]).all()
    shared = ~batch.response_mask & batch.mask
    for b in range(len(cut)):  # both answers follow the same prompt
        first, second = (batch.tokens[b, k][shared[b, k]] for k in range(2))
        np.testing.assert_array_equal(first, second)
