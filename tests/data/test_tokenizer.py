import json

import pytest
import sentencepiece
import tokenizers

from jrlhf.config import UserError
from jrlhf.data.chat import ChatConfig
from jrlhf.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, load_tokenizer, train_sentencepiece


def stories(shared_data, count):
    return (shared_data / "tinystories" / "tinystories_sample.txt").read_text().split("<|endoftext|>")[:count]


def write_json_tokenizer(folder, added=(), **cards):
    """A four-word tokenizer.json with <s> and </s>, and the sidecar files given as keywords."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "c": 5, "<end>": 9}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["<s>", "</s>", "<end>", *added])
    model.save(str(folder / "tokenizer.json"))
    for name, card in cards.items():
        (folder / f"{name}.json").write_text(json.dumps(card))
    return model


# --- training -------------------------------------------------------------------------------------------


def test_word_model_has_one_piece_per_word(texts, tokenizer):
    words = sorted({word for text in texts for word in text.split()})
    pieces = [tokenizer.encode(word) for word in words]
    assert all(len(piece) == 1 for piece in pieces)
    assert len({piece[0] for piece in pieces}) == len(words)
    assert min(pieces)[0] >= 4
    assert tokenizer.vocab_size == 4 + len(words)
    for text in texts:
        assert len(tokenizer.encode(text)) == len(text.split())
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("model_type", ["word", "unigram", "bpe"])
def test_training_is_repeatable_quiet_and_round_trips(texts, tmp_path, capfd, model_type):
    first, second = (train_sentencepiece(iter(texts), 90, tmp_path / name, model_type) for name in "ab")
    assert first.fingerprint() == second.fingerprint()
    assert capfd.readouterr() == ("", "")
    assert (first.pad_id, first.bos_id, first.eos_ids, first.add_bos) == (0, 1, (2,), True)
    assert load_tokenizer(tmp_path / "a").fingerprint() == first.fingerprint()
    other = train_sentencepiece([*texts[::2], "new words"], 90, tmp_path / "c", model_type)
    assert other.fingerprint() != first.fingerprint()
    for text in texts:
        assert first.decode([1, *first.encode(text), 2, 0, 0]) == text


def test_long_texts_are_not_left_out_of_training(tmp_path):
    long = "common " * 2000 + "rare"  # longer than SentencePiece's own limit of 4,192 bytes
    tokenizer = train_sentencepiece(["common common"] * 5 + [long], 50, tmp_path, "word")
    assert tokenizer.decode(tokenizer.encode("rare")) == "rare"


def test_symbols_are_one_piece_and_bytes_spell_the_unseen(tmp_path):
    tokenizer = train_sentencepiece(
        ["one two\nthree"] * 9, 300, tmp_path, "bpe", ["<call>"], byte_fallback=True
    )
    ids = tokenizer.encode("two\none<call>two é")
    assert tokenizer.decode(ids) == "two\none<call>two é"
    assert [tokenizer.decode([i]) for i in ids].count("<call>") == 1


def test_text_is_not_normalised(tmp_path):
    text = "\ufb01ne \uff21 \u2460 cafe\u0301"  # a ligature, a full-width A, a circled 1, a combining accent
    tokenizer = train_sentencepiece([text] * 9, 50, tmp_path, "word")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("texts", "vocab_size", "model_type", "message"),
    [
        ([], 50, "word", "no text to train on"),
        (["abcdef ghij"], 6, "bpe", "Vocabulary size is smaller"),
        (["abc"], 50, "unigrm", "Did you mean 'unigram'?"),
    ],
)
def test_training_mistakes(tmp_path, texts, vocab_size, model_type, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        train_sentencepiece(texts, vocab_size, tmp_path, model_type)


# --- a real checkpoint ----------------------------------------------------------------------------------


def test_stories260k_ids_equal_sentencepiece(shared_data):
    folder = shared_data / "stories260K"
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    json_tokenizer, model_tokenizer = (load_tokenizer(folder / f"tokenizer.{s}") for s in ("json", "model"))
    assert isinstance(load_tokenizer(folder), JsonTokenizer)
    for story in stories(shared_data, 200):
        ids = reference.encode(story)
        assert json_tokenizer.encode(story) == ids
        assert model_tokenizer.encode(story) == ids
        assert json_tokenizer.decode(ids) == model_tokenizer.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_stories260k_ends_where_generation_config_says(shared_data, tmp_path, name):
    tokenizer = load_tokenizer(shared_data / "stories260K" / name)
    assert tokenizer.eos_ids == (1,)  # config.json and tokenizer_config.json both say 2
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.vocab_size) == (1, True, 512)
    assert tokenizer.pad_id == 1  # none is named, so the first EOS
    ids = tokenizer.encode("Once upon a time")
    assert 1 not in ids
    assert tokenizer.decode([1, *ids, 1, 1]) == "Once upon a time"
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.encode("Once upon") == tokenizer.encode("Once upon")


# --- which files name the special tokens ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("cards", "expected"),  # expected: bos_id, add_bos, eos_ids, pad_id
    [
        ({"config": {"eos_token_id": 2}}, (None, False, (2,), 2)),
        ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": 1}}, (None, False, (1,), 1)),
        ({"generation_config": {"eos_token_id": [2, 9]}}, (None, False, (2, 9), 2)),
        # the tokenizer's own EOS ends training texts, so it comes first
        (
            {"generation_config": {"eos_token_id": [2, 9]}, "tokenizer_config": {"eos_token": "<end>"}},
            (None, False, (9, 2), 9),
        ),
        (
            {
                "tokenizer_config": {
                    "bos_token": {"content": "<s>"},
                    "eos_token": "</s>",
                    "add_bos_token": True,
                }
            },
            (1, True, (2,), 2),
        ),
        # an explicit null says that there is no BOS, whatever generation_config says
        (
            {
                "tokenizer_config": {"bos_token": None, "eos_token": "</s>"},
                "generation_config": {"bos_token_id": 1},
            },
            (None, False, (2,), 2),
        ),
        (
            {
                "special_tokens_map": {"eos_token": "</s>", "pad_token": "<unk>"},
                "config": {"bos_token_id": 1},
            },
            (1, False, (2,), 0),
        ),
        ({"generation_config": {"eos_token_id": 2, "pad_token_id": 9}}, (None, False, (2,), 9)),
    ],
)
def test_special_tokens_come_from_the_right_file(tmp_path, cards, expected):
    write_json_tokenizer(tmp_path, **cards)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.eos_ids, tokenizer.pad_id) == expected
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").fingerprint() == tokenizer.fingerprint()


def test_an_end_that_is_an_ordinary_token_is_not_decoded(tmp_path):
    write_json_tokenizer(tmp_path, generation_config={"eos_token_id": 5})
    assert load_tokenizer(tmp_path).decode([3, 4, 5]) == "a b"


def test_bos_follows_the_post_processor_where_no_file_says(tmp_path):
    model = write_json_tokenizer(tmp_path, generation_config={"eos_token_id": 2, "bos_token_id": 1})
    model.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.add_bos
    assert tokenizer.encode("a b") == [3, 4]


def test_saved_truncation_and_padding_are_not_applied(tmp_path):
    model = write_json_tokenizer(tmp_path, config={"eos_token_id": 2})
    model.enable_truncation(2)
    model.enable_padding(length=8)
    model.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a b c") == [3, 4, 5]


def test_vocab_size_bounds_ids_with_gaps(tmp_path):
    write_json_tokenizer(tmp_path, config={"eos_token_id": 9})
    assert load_tokenizer(tmp_path).vocab_size == 10  # seven tokens, the largest id is 9


@pytest.mark.parametrize(
    ("cards", "message"),
    [
        ({}, "no end-of-text token"),
        ({"generation_config": {"eos_token_id": 77}}, "id 77 is outside"),
        ({"tokenizer_config": {"eos_token": "<stop>"}}, "names eos_token '<stop>', which is not a token"),
        ({"tokenizer_config": {"eos_token": "</s>", "add_bos_token": True}}, "there is no BOS token"),
        ({"generation_config": [2]}, "generation_config.json: expected a JSON object"),
    ],
)
def test_special_token_mistakes(tmp_path, cards, message):
    write_json_tokenizer(tmp_path, **cards)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "not a tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "not a tokenizer.json"),
        ("tokenizer.model", b"nonsense", "not a SentencePiece model"),
        ("tokenizer.txt", b"", "not '.txt'"),
        ("notes.md", b"", "it holds notes.md"),
    ],
)
def test_file_mistakes(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path if name == "notes.md" else tmp_path / name)


def test_missing_tokenizer_is_named_with_a_suggestion(tmp_path):
    write_json_tokenizer(tmp_path)
    with pytest.raises(UserError, match=r"tokeniser.json: no such tokenizer. Did you mean 'tokenizer.json'"):
        load_tokenizer(tmp_path / "tokeniser.json")


def test_sentencepiece_without_sidecars_uses_the_model_ids(tmp_path, tokenizer):
    tokenizer.save(tmp_path / "full")
    (tmp_path / "bare.model").write_bytes((tmp_path / "full" / "tokenizer.model").read_bytes())
    bare = load_tokenizer(tmp_path / "bare.model")
    assert isinstance(bare, SentencePieceTokenizer)
    assert (bare.pad_id, bare.bos_id, bare.eos_ids, bare.add_bos) == (0, 1, (2,), True)
    assert bare.decode([]) == ""


def test_a_chat_format_survives_saving_where_generation_ends_otherwise(shared_data, tmp_path):
    """stories260K: generation ends with <s>, the tokenizer's own EOS is </s>, with which the template ends a turn."""
    plain = load_tokenizer(shared_data / "stories260K")
    assert plain.eos_ids == (1,)
    chat = plain.with_chat(ChatConfig("plain"))
    assert chat.eos_ids == (2, 1)
    chat.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.eos_ids, again.fingerprint()) == (chat.eos_ids, chat.fingerprint())
