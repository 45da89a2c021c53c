"""Talking with a model whose tokenizer has a chat template, and one whose tokenizer has none."""

import jax
import numpy as np
import pytest
from chat_formats import make_tokenizer
from rich.console import Console

from jrlhf.config import UserError
from jrlhf.data.chat import ChatConfig
from jrlhf.data.tokenizer import load_tokenizer, train_sentencepiece
from jrlhf.models.config import ModelConfig
from jrlhf.models.transformer import Model
from jrlhf.training import serve
from jrlhf.training.artifacts import save_model

QUIET = Console(quiet=True)


def write_model(folder, tokenizer):
    model = Model(
        ModelConfig(tokenizer.vocab_size, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=8, context=96)
    )
    save_model(folder, model, model.init(jax.random.key(0)), tokenizer)
    return folder


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatml")
    return write_model(folder / "model", make_tokenizer(folder / "tokenizer", "chatml_marked"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare")
    return write_model(
        folder / "model", train_sentencepiece(["Hello there. Human: Assistant:"] * 9, 60, folder / "t")
    )


@pytest.fixture
def asked(monkeypatch):
    """The prompts that were asked; every answer is "Fine." """
    prompts = []

    def respond(loaded, prompt, n, seed, **sampling):
        if "too long" in str(prompt):
            raise UserError("does not fit")
        prompts.append(prompt)
        return ["Fine."] * n

    monkeypatch.setattr(serve, "respond", respond)
    return prompts


def say(monkeypatch, *lines):
    told = iter(lines)
    monkeypatch.setattr(Console, "input", lambda *args, **kwargs: next(told, "/quit"))


def user(text):
    return {"role": "user", "content": text}


FINE = {"role": "assistant", "content": "Fine."}


def test_a_prompt_is_a_users_message_where_there_is_a_template(chatml, bare, asked):
    serve.generate(chatml, "Hello", n=1, console=QUIET, seed=0)
    serve.generate(chatml, "Hello", n=1, console=QUIET, seed=0, raw=True)
    serve.generate(bare, "Hello", n=1, console=QUIET, seed=0)
    assert asked == [[user("Hello")], "Hello", "Hello"]


def test_chat_keeps_the_conversation(chatml, asked, monkeypatch):
    say(monkeypatch, "one", "", "too long", "two", "/new", "three")
    serve.chat(chatml, console=QUIET, seed=0, system="Be kind.")
    kind = {"role": "system", "content": "Be kind."}
    assert asked == [[kind, user("one")], [kind, user("one"), FINE, user("two")], [kind, user("three")]]


def test_chat_without_a_template_takes_lines(bare, chatml, asked, monkeypatch):
    lines = ("one", "two", "/dialogue", "three", "four", "/new", "five")
    said = "\n\nHuman: three\n\nAssistant:"
    expected = [
        "one",
        "two",
        said,
        f"{said} Fine.\n\nHuman: four\n\nAssistant:",
        "\n\nHuman: five\n\nAssistant:",
    ]
    for folder, raw in ((bare, False), (chatml, True)):
        asked.clear()
        say(monkeypatch, *lines)
        serve.chat(folder, console=QUIET, seed=0, raw=raw)
        assert asked == expected
    with pytest.raises(UserError, match="--system: without a chat template"):
        serve.chat(bare, console=QUIET, seed=0, system="Be kind.")


def test_messages_are_answered_as_far_as_they_fit(chatml):
    loaded = serve.load_any(chatml)
    answers = serve.respond(loaded, [user("Hello there.")], 3, 0, 8)
    assert len(answers) == 3
    assert "<|im_end|>" not in "".join(answers)
    with pytest.raises(UserError, match="do not fit"):
        serve.respond(loaded, [user("Hello there. " * 90)], 1, 0, 8)


def test_the_format_survives_saving_and_export(chatml, tmp_path):
    tokenizer = serve.load_any(chatml).tokenizer
    assert tokenizer.chat_template is not None
    changed = write_model(tmp_path / "plain", tokenizer.with_chat(ChatConfig("plain", wrap_strings=True)))
    for name, folder in (("chatml", chatml), ("plain", changed)):
        saved = load_tokenizer(folder / "tokenizer")
        serve.export(folder, tmp_path / "hf" / name)
        exported = load_tokenizer(tmp_path / "hf" / name)
        assert exported.fingerprint() == saved.fingerprint()
        assert exported.chat_template.source == saved.chat_template.source
        assert exported.wrap_strings == (name == "plain")
    np.testing.assert_array_equal(exported.eos_ids, saved.eos_ids)
