"""Answers packed behind their prompts: what every token is, sees and predicts, read back from the arrays."""

import numpy as np
import pytest

from jrlhf.data.batching import first_fit, pack_answers, shared_tokens

B, K, T = 20, 3, 14


def answers():
    """Prompts of 1 to 6 tokens, answers of 1 to 8 of which some tokens are not learned; some answers are missing."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((B, K, T), np.int32)
    mask, response = np.zeros((B, K, T), bool), np.zeros((B, K, T), bool)
    for b in range(B):
        prompt = rng.integers(1, 50, rng.integers(1, 7))
        for k in range(K):
            if (b + k) % 4:
                text = np.concatenate([prompt, rng.integers(1, 50, rng.integers(1, 9))])
                tokens[b, k, : len(text)], mask[b, k, : len(text)] = text, True
                response[b, k, len(prompt) : len(text)] = rng.random(len(text) - len(prompt)) < 0.8
                response[b, k, len(prompt)] = True
    return tokens, mask, response


def test_every_answer_can_be_read_back_from_its_row():
    tokens, mask, response = answers()
    shared = shared_tokens(tokens, mask, response)
    own = np.maximum(mask.sum(2) - shared[:, None], 0)
    sizes = np.stack([shared + own.sum(1), response.sum((1, 2)), mask.any(2).sum(1)], axis=1)
    length, most, answers_most = 40, 26, 7
    rows = first_fit(sizes, (length, most, answers_most))
    packed = pack_answers(tokens, mask, response, rows, (12, length, most, answers_most))
    assert np.sum(packed.segment_ids > 0) == sizes[:, 0].sum()  # every prompt once, every answer once
    assert np.sum(packed.owners >= 0) == response.sum()
    flat = {
        name: getattr(packed, name).reshape(-1) for name in ("tokens", "positions", "branches", "segment_ids")
    }
    for b in range(B):
        for k in np.flatnonzero(mask[b].any(1)):
            row, number = divmod(packed.answers[b, k], answers_most)
            assert row == rows[b]
            end = row * length + packed.ends[row, number]
            # What the last token sees: its own segment's prompt and answer.
            seen = np.arange(row * length, end + 1)
            seen = seen[flat["segment_ids"][seen] == flat["segment_ids"][end]]
            seen = seen[np.isin(flat["branches"][seen], (0, k + 1))]
            np.testing.assert_array_equal(flat["tokens"][seen], tokens[b, k][mask[b, k]])
            np.testing.assert_array_equal(flat["positions"][seen], np.arange(mask[b, k].sum()))
            mine = np.flatnonzero(packed.owners[row] == b * K + k)
            assert len(mine) == packed.lengths[b, k] == response[b, k].sum()
            np.testing.assert_array_equal(packed.targets[row, mine], tokens[b, k][response[b, k]])
            np.testing.assert_array_equal(packed.places[row, mine], 1 + np.arange(len(mine)))
            before = seen[np.flatnonzero(response[b, k]) - 1] - row * length
            np.testing.assert_array_equal(packed.before[row, mine], before)
        for k in np.flatnonzero(~mask[b].any(1)):
            assert packed.lengths[b, k] == packed.answers[b, k] == 0


def test_what_answers_share_ends_before_the_first_that_is_learned():
    """Answers may begin alike: that is learned twice, and so is not shared. Nor is it where one is left out."""
    tokens = np.array(
        [[[1, 2, 3, 4], [1, 2, 3, 5]], [[1, 2, 3, 4], [0, 0, 0, 0]], [[6, 0, 0, 0], [6, 7, 0, 0]]]
    )
    mask = tokens > 0
    response = mask & (np.arange(4) >= 2)
    response[2] = mask[2] & (np.arange(4) >= 1)
    np.testing.assert_array_equal(shared_tokens(tokens, mask, response), [2, 2, 1])
    with pytest.raises(ValueError, match="padded on the right"):
        shared_tokens(tokens, mask[:, :, ::-1], response)


def test_bins_have_room_for_all_kinds_and_hold_much():
    rng = np.random.default_rng(1)
    sizes = np.stack([rng.integers(1, 40, 300), rng.integers(1, 16, 300)], axis=1)
    bins = first_fit(sizes, (64, 40))
    filled = np.stack([np.bincount(bins, sizes[:, n]) for n in range(2)], axis=1)
    assert np.all(filled <= (64, 40))
    assert np.all(filled > 0)
    assert filled[:, 0].mean() > 0.9 * 64
