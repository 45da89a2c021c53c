"""What single tokens write, of tokenizers of every kind: put together, it is the text that they decode."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from jrlhf.config import UserError
from jrlhf.data.tokenizer import load_tokenizer, train_sentencepiece
from jrlhf.rollout.stops import ACCEPTED, stop_table

TEXTS = ["one two\nthree four, é ü 日本 \n\nHuman: tea\n\nAssistant: ok"] * 9
STOPS = ("\n\nHuman:", " t", "é", "ee", "\nAs")
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def byte_level():
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<end>", "<|x|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.add_tokens([" added é"])
    return made


def pieces(vocab, decoder):
    model = models.WordLevel({piece: i for i, piece in enumerate(["<end>", *vocab])}, unk_token="<end>")
    made = tokenizers.Tokenizer(model)
    if decoder is not None:
        made.decoder = decoder
    return made


LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
WORDS = ["▁", "▁t", "ee", "▁▁", "Human", ":", "é", "\n"]
MADE = {
    "byte_level": byte_level,
    "llama": lambda: pieces([*WORDS, *BYTES[:128]], decoders.Sequence(LLAMA)),
    "metaspace": lambda: pieces(WORDS, decoders.Metaspace()),
    "word_piece": lambda: pieces(["t", "##ee", "é", ".", "don", "'t"], decoders.WordPiece()),
    "no_decoder": lambda: pieces(["t", "ee", "é", "Human:"], None),
    # Two pads in a row are one, and words are merged.
    "ctc": lambda: pieces(["t", "ee", "é"], decoders.CTC(pad_token="t", word_delimiter_token="é")),
}


def make(name, folder):
    if name in ("word", "unigram", "bpe"):
        return train_sentencepiece(TEXTS, 400, folder, name, byte_fallback=name == "bpe")
    (folder / "tokenizer.json").write_text(MADE[name]().to_str())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    return load_tokenizer(folder)


KINDS = ["word", "unigram", "bpe", *(name for name in MADE if name != "ctc")]


@pytest.mark.parametrize("name", KINDS)
def test_stop_strings_are_found_where_the_decoded_text_has_them(name, tmp_path):
    tokenizer = make(name, tmp_path)
    table = stop_table(STOPS, tokenizer.token_bytes(), tokenizer.vocab_size + 2)
    rng, found = np.random.default_rng(0), 0
    rows = [rng.integers(0, tokenizer.vocab_size + 2, 8).tolist() for _ in range(300)]
    if name in ("word", "unigram", "bpe", "byte_level"):
        spoken = tokenizer.encode(TEXTS[0])
        rows += [spoken[n:] for n in range(len(spoken))]
    for row in rows:
        state = 0
        for n, i in enumerate(row):
            state = table[state, i]
            assert (state == ACCEPTED) == any(stop in tokenizer.decode(row[: n + 1]) for stop in STOPS)
            if state == ACCEPTED:
                found += 1
                break
    assert found > 10


@pytest.mark.parametrize("name", KINDS)
def test_special_tokens_write_nothing(name, tmp_path):
    tokenizer = make(name, tmp_path)
    tokens = tokenizer.token_bytes()
    assert len(tokens.later) == len(tokens.first) == len(tokens.begins) == tokenizer.vocab_size
    for i in {tokenizer.eos_ids[0], tokenizer.pad_id}:
        assert (tokens.later[i], tokens.first[i], tokens.begins[i]) == (b"", b"", True)


def test_parts_of_a_character_are_bytes(tmp_path):
    for name in ("byte_level", "bpe"):
        (tmp_path / name).mkdir()
        tokenizer = make(name, tmp_path / name)
        ids = tokenizer.encode("a☃")
        tokens = tokenizer.token_bytes()
        assert b"".join(tokens.later[i] for i in ids).endswith("☃".encode())
        assert sum(len(tokens.later[i]) == 1 for i in ids) >= 3


def test_a_tokenizer_whose_tokens_merge_says_so(tmp_path):
    with pytest.raises(UserError, match="what a token writes depends on its neighbours"):
        make("ctc", tmp_path).token_bytes()
