"""Rows of messages on their way through the stages' own functions: arrays, splits, texts for rewards."""

from dataclasses import dataclass

import numpy as np
import pytest
from chat_formats import TURNS, make_tokenizer
from rich.console import Console

from jrlhf.config import Source, UserError
from jrlhf.data.chat import ChatConfig
from jrlhf.rollout.rollout import pad_prompts
from jrlhf.training.data import (
    demonstration_batch,
    encode_cut_demonstration,
    preference_arrays,
    prompt_ids,
    split_by_prompt,
)
from jrlhf.training.rewards import read_texts
from jrlhf.types import Rollout

QUIET = Console(quiet=True)


@dataclass(frozen=True)
class ChatRows(Source):
    """The rows that it was given."""

    given: tuple

    def rows(self):
        yield from self.given


@pytest.fixture
def tokenizer(tmp_path):
    return make_tokenizer(tmp_path, "chatml_marked")


def test_demonstrations_of_messages_are_packed_with_their_targets(tokenizer):
    rows = (
        {"messages": TURNS},
        {"prompt": TURNS[:3], "completion": TURNS[3:]},
        {"prompt": "a", "completion": "b"},
    )
    batch = demonstration_batch(ChatRows(rows), tokenizer, 256, "error", QUIET)
    end = tokenizer.eos_ids[0]
    assert int(np.sum(batch.loss_mask & (batch.tokens == end))) == 2 + 1 + 1
    assert not np.any(batch.loss_mask & (batch.segment_ids == 0))
    cut = encode_cut_demonstration({"messages": TURNS}, tokenizer, 40)
    assert len(cut.ids) <= 40
    assert cut.loss_mask[-1]


def test_turns_that_the_template_rewrites_become_examples(tmp_path):
    tokenizer = make_tokenizer(tmp_path, "thinking")
    thoughts = [
        dict(m, content=f"<think>hm</think>{m['content']}") if n % 2 else m for n, m in enumerate(TURNS)
    ]
    batch = demonstration_batch(ChatRows(({"messages": thoughts},)), tokenizer, 128, "error", QUIET)
    assert batch.segment_ids.max() == 2
    assert int(np.sum(batch.loss_mask & (batch.tokens == tokenizer.eos_ids[0]))) == 2
    with pytest.raises(UserError, match="differently once more follows"):
        encode_cut_demonstration({"messages": thoughts}, tokenizer, 128)


def test_preferences_of_messages_share_the_prompt(tokenizer):
    rows = [{"prompt": TURNS[:3], "responses": ["It is 4.", "No."], "ranks": [1, 2]}]
    batch = preference_arrays(rows, tokenizer, 256, "error", QUIET)
    _, (prompt,) = prompt_ids(ChatRows(({"prompt": TURNS[:3]},)), tokenizer, 256, "error", QUIET)
    for k in range(2):
        assert batch.tokens[0, k, : len(prompt)].tolist() == prompt
        assert np.flatnonzero(batch.response_mask[0, k])[0] == len(prompt)
        assert batch.tokens[0, k][batch.mask[0, k]][-1] == tokenizer.eos_ids[0]


def test_messages_are_split_by_what_they_say():
    rows = [{"prompt": [{"role": "user", "content": f"question {n}"}]} for n in range(200)]
    kept, held = split_by_prompt(rows, 0.25)
    assert len(kept) + len(held) == 200
    assert 20 < len(held) < 80
    again, _ = split_by_prompt(rows[::-1], 0.25)
    assert again == kept[::-1]


def test_rewards_read_a_dialogue_and_find_the_messages_in_the_row(tokenizer):
    tokenizer = tokenizer.with_chat(ChatConfig(wrap_strings=True))
    rows, ids = prompt_ids(ChatRows(({"prompt": TURNS[:1]}, {"prompt": "Hi"})), tokenizer, 99, "error", QUIET)
    prompts = pad_prompts(ids, 40, tokenizer.pad_id)
    answer = tokenizer.encode_rendered("Hello there.<|im_end|>").ids
    tokens = np.concatenate([prompts.tokens, np.asarray([answer] * 2, np.int32)], axis=1)
    said = np.ones((2, len(answer)), bool)
    mask = np.concatenate([prompts.mask, said], axis=1)
    rollout = Rollout(tokens, mask, said, np.zeros(said.shape, np.float32), np.ones(2, bool))
    texts = read_texts(rollout, rows, tokenizer)
    assert texts.prompts == ["\n\nHuman: Hello there.\n\nAssistant:", "Hi"]
    assert texts.completions == ["Hello there."] * 2
    assert texts.rows[0]["prompt"] == TURNS[:1]


def test_preferences_longer_than_the_context_are_dropped_if_asked(tokenizer):
    rows = [
        {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2]},
        {"prompt": "a", "responses": ["b " * 50, "c"], "ranks": [1, 2]},
    ]
    assert preference_arrays(rows, tokenizer, 20, "drop", QUIET).tokens.shape[0] == 1
    with pytest.raises(UserError, match=r"held-out preferences row 2: "):
        preference_arrays(rows, tokenizer, 20, "error", QUIET, "held-out preferences")
    wide = preference_arrays(rows[:1], tokenizer, 5, "error", QUIET)
    assert wide.tokens.shape[2] <= 5  # rounding up does not pass the limit
