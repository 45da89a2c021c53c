"""Talking with a model whose tokenizer has a chat template, and one whose tokenizer has none; exporting models."""

import io
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from chat_formats import make_tokenizer
from rich.console import Console

from jrlhf import cli
from jrlhf.config import UserError
from jrlhf.data.chat import ChatConfig
from jrlhf.data.tokenizer import load_tokenizer, train_sentencepiece
from jrlhf.experiment import fingerprint
from jrlhf.lab.larder import HAZARDS, INSTRUCTIONS, ITEMS, parse_prompt
from jrlhf.models.config import LoRAConfig, ModelConfig
from jrlhf.models.hf import load_hf
from jrlhf.models.lora import join, merged
from jrlhf.models.peft import PEFT_CONFIG, load_peft
from jrlhf.models.transformer import Model
from jrlhf.rollout.stops import cut_at_stop
from jrlhf.training import serve
from jrlhf.training.artifacts import Beginning, begin, save_model, save_trained
from jrlhf.training.loop import COMPILATIONS

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

    def respond(loaded, prompt, n, seed, **options):
        if "too long" in str(prompt):
            raise UserError(f"{prompt}: does not fit")
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
    serve.generate(chatml, ["Hello"], n=1, console=QUIET, seed=0)
    serve.generate(chatml, ["Hello"], n=1, console=QUIET, seed=0, raw=True)
    serve.generate(bare, ["Hello"], n=1, console=QUIET, seed=0)
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
    for answer, beside in ((None, ""), (8, " beside an answer of 8")):
        with pytest.raises(UserError) as error:
            serve.respond(loaded, "Hello there. " * 90, 1, 0, answer)
        tokens = len(loaded.tokenizer.encode("Hello there. " * 90))
        said = f"the prompt is too long: its {tokens} tokens do not fit the model's context of 96{beside}"
        assert str(error.value) == said


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


def test_the_example_of_the_guide_is_an_experiment():
    guide = (Path(__file__).parents[2] / "docs" / "chat.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", guide, re.M | re.S)
    exec(block, names := {})
    assert names["stages"]["sft"].chat == ChatConfig("plain")
    with pytest.raises(UserError, match=r"'chatlm' is neither a built-in template .* Did you mean 'chatml'"):
        fingerprint(replace(names["stages"]["sft"], chat=ChatConfig("chatlm")), 0, {"base": "0"})


# --- what is printed ----------------------------------------------------------------------------------------


@pytest.fixture
def words(tmp_path_factory):
    """A model whose tokenizer has one piece per word."""
    folder = tmp_path_factory.mktemp("words")
    texts = ["describe tea and bleach :", "tea is warm ."] * 9
    return write_model(folder / "model", train_sentencepiece(texts, 40, folder / "t", "word"))


def screen():
    return Console(file=io.StringIO(), width=40)


def test_answers_say_what_they_answer(bare, asked, tmp_path):
    def printed(path, prompts, n):
        console = screen()
        answers = serve.generate(path, prompts, n=n, console=console, seed=0)
        assert all(of_model == [["Fine."] * n] * len(prompts) for of_model in answers.values())
        return console.file.getvalue()

    assert printed(bare, ["Hello"], 1) == "Fine.\n"
    assert printed(bare, ["Hello"], 2) == "1: Fine.\n2: Fine.\n"
    assert printed(bare, ["Hello", "[/b]"], 1) == "> Hello\nFine.\n> [/b]\nFine.\n"
    (tmp_path / "stages" / "run").mkdir(parents=True)
    index = {name: {"0": str(bare)} for name in ("sft", "ppo[/b]")}
    (tmp_path / "stages" / "run" / "stages.json").write_text(json.dumps(index))
    of_each = "> a\n1: Fine.\n2: Fine.\n> b\n1: Fine.\n2: Fine.\n"
    assert printed(tmp_path / "stages" / "run", ["a", "b"], 2) == f"sft\n{of_each}ppo[/b]\n{of_each}"


def chatted(monkeypatch, folder, *lines):
    """The last line on the screen."""
    console = screen()
    say(monkeypatch, *lines)
    serve.chat(folder, console=console, seed=0, max_new_tokens=2)
    return console.file.getvalue().splitlines()[-1]


def test_what_a_user_types_is_no_markup(bare, asked, monkeypatch):
    assert chatted(monkeypatch, bare, "[/x] too long") == "[/x] too long: does not fit"


def test_a_line_that_is_too_long_says_what_can_be_done(bare, chatml, monkeypatch):
    line, forget = "Hello there. " * 90, "/new forgets what was said before"
    for folder, lines, remembers in (
        (bare, [line], False),
        (bare, ["/dialogue", "Hello", line], True),
        (chatml, ["Hello", line], True),
        (chatml, ["Hello", "/new", line], False),
    ):
        last = chatted(monkeypatch, folder, *lines)
        assert last.startswith("the prompt is too long: its ")
        assert last.endswith(forget) is remembers


class Shown(io.StringIO):
    """A screen that keeps what was on it after each piece was written."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def flush(self):
        self.seen.append(self.getvalue())


ROMAN = "one\ntwo é ü 日本"


@pytest.fixture(scope="module")
def spelled(tmp_path_factory):
    """Its words are few, and it writes characters in several bytes."""
    folder = tmp_path_factory.mktemp("spelled")
    tokenizer = train_sentencepiece([ROMAN] * 9, 300, folder / "t", "bpe", byte_fallback=True)
    return serve.load_any(write_model(folder / "model", tokenizer))


def typed(tokenizer, ids, stop=(), chunk=3):
    """What a Typist shows of an answer in chunks of tokens, piece by piece, and the answer."""
    screen = Shown()
    typist = serve.Typist(Console(file=screen))
    text = lambda ids: cut_at_stop(tokenizer.decode(ids), stop)  # noqa: E731
    typist.begin(text, stop)
    for start in range(0, len(ids), chunk):
        part = np.asarray([[*ids[start : start + chunk], *ids[:1] * chunk][:chunk]])
        typist(np.zeros(1), part, np.arange(chunk)[None] < len(ids) - start)
    typist.finish(text(ids))
    return screen.seen, text(ids)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("stop", [(), ("two",), ("日x", "wo é ", "\n\n"), ("本",)], ids=str)
@pytest.mark.parametrize("said", [ROMAN, "☃ été [/b] " + ROMAN, "a" * 100 + " bcd"])
def test_a_typist_shows_what_will_stay(spelled, stop, chunk, said):
    seen, answer = typed(spelled.tokenizer, spelled.tokenizer.encode(said), stop, chunk)
    assert seen[-1] == answer + "\n"
    assert answer == said[: min(said.find(s) % 1000 for s in (*stop, "\ue000"))]
    assert all(answer.startswith(text) for text in seen[:-1])
    assert "\ufffd" not in "".join(seen)
    assert stop or len({*seen}) >= 3


def test_a_typist_shows_an_answer_as_far_as_it_may(spelled):
    seen, _ = typed(spelled.tokenizer, spelled.tokenizer.encode("one two"), ("two three", "e t"), chunk=1)
    assert seen[-1] == "on\n"
    seen, answer = typed(spelled.tokenizer, spelled.tokenizer.encode("one two"), ("two three",), chunk=100)
    assert (answer, seen[0], seen[-1]) == ("one two", "one ", "one two\n")
    assert serve.settled("xaba", ("abac", "ab")) == "x"  # the longest beginning of a stop string
    half = spelled.tokenizer.encode("one ☃")[:-1]
    assert typed(spelled.tokenizer, half, chunk=1)[0][-1].startswith("one \ufffd")  # it stays half


def test_an_answer_is_the_same_while_it_is_written(spelled):
    prompt, screen = "one", Shown()
    plain = serve.respond(spelled, prompt, 1, 3, max_new_tokens=40)
    typist = serve.Typist(Console(file=screen))
    assert serve.respond(spelled, prompt, 1, 3, 40, typist) == plain
    typist.finish(plain[0])
    assert screen.getvalue() == plain[0] + "\n"
    assert len({*screen.seen}) > 3  # piece by piece
    stop = plain[0][5:8]
    (cut,) = serve.respond(spelled, prompt, 1, 3, max_new_tokens=40, stop=(stop, "never"))
    assert plain[0].startswith(cut + stop)
    programs = COMPILATIONS.count
    # Neither another prompt, nor another answer of the same typist, is compiled.
    for more in ("two", "one two é ü 日本", "é"):
        serve.respond(spelled, more, 1, 4, 40, typist)
    assert COMPILATIONS.count == programs


def test_generate_streams_one_answer_to_each_prompt(spelled, monkeypatch):
    monkeypatch.setattr(serve, "policies", lambda path: {"model": path})
    monkeypatch.setattr(serve, "load_any", lambda folder: spelled)
    shown = []
    for stream in (False, True):
        console = Console(file=Shown(), width=10_000)
        serve.generate(
            Path(),
            ["one", "two"],
            n=1,
            console=console,
            seed=0,
            stream=stream,
            max_new_tokens=20,
            stop=("zz",),
        )
        shown.append(console.file)
    assert shown[0].getvalue() == shown[1].getvalue()
    assert len({*shown[1].seen}) > len({*shown[0].seen}) + 3
    with pytest.raises(UserError, match="stream: shows one answer"):
        serve.generate(Path(), ["one"], n=2, console=QUIET, seed=0, stream=True)


def test_words_that_are_not_known_are_named_once(words, bare, chatml, asked, monkeypatch, capsys):
    prompts = ["describe cats and tea:", "describe dogs and cats :", "describe tea :"]
    serve.generate(words, prompts, n=1, console=QUIET, seed=0)
    rest = "of this model's tokenizer, and will be read as unknown"
    assert capsys.readouterr().err == f"cats, tea:: are no words {rest}\ndogs: is no word {rest}\n"
    console = screen()
    say(monkeypatch, "tea", "cats [/x]", "cats")
    serve.chat(words, console=console, seed=0)
    warning = f"cats, [/x]: are no words {rest}"
    assert console.file.getvalue().splitlines()[1:] == ["Fine.", warning, "Fine.", "Fine."]
    serve.generate(chatml, ["cats \ue000"], n=1, console=QUIET, seed=0)  # its tokenizer writes bytes
    serve.generate(bare, ["cats"], n=1, console=QUIET, seed=0)  # pieces of words
    assert capsys.readouterr().err == ""


def test_what_the_readme_says_may_be_typed():
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split())
    text = readme[readme.index("The Larder model knows") : readme.index("Any other word is named")]
    for prompt in re.findall(r"`([^`]* :)`", text):
        parse_prompt(prompt)
    assert all(f"`{instruction}`" in text for instruction in INSTRUCTIONS)
    safe, hazards = text.split("The items are ")[1].split(", and, not to be described, ")
    assert (set(safe.split()), set(hazards.rstrip(". ").split())) == ({*ITEMS} - HAZARDS, HAZARDS)


# --- adapters -----------------------------------------------------------------------------------------------


def adapted_stage(
    folder: Path, head: str, base: Path, meta: dict | None = None, **config
) -> tuple[Beginning, dict]:
    """A stage folder as a stage with `lora` leaves it, and the adapter, which changes something."""
    loaded = serve.load_any(base)
    tokenizer = loaded.tokenizer
    loaded = replace(loaded, model=Model(replace(loaded.model.config, **config)))
    beginning = begin(loaded, head, LoRAConfig(rank=2, targets=("attn/q", "mlp/down")), jax.random.key(1))
    keys = iter(jax.random.split(jax.random.key(2), 99))
    adapter = jax.tree.map(lambda x: x + jax.random.normal(next(keys), x.shape), beginning.trained)
    save_trained(folder, beginning, adapter, tokenizer, base, **(meta or {}))
    return beginning, adapter


@pytest.fixture
def stages(bare, tmp_path):
    """A folder of stages with a base in it."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "base-1").symlink_to(bare)
    return tmp_path / "stages"


def begins_with(folder: Path, stage: dict) -> None:
    (folder / "config.json").write_text(json.dumps({"stage": stage, "seed": 0}))


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_an_adapter_is_exported_as_it_is(head, stages, tmp_path):
    base = stages / "base-1"
    begins_with(base, {"type": "Pretrain"})
    norm = {"normalization": {"mean": 0.5, "std": 2.0}} if head == "scalar" else {}
    beginning, adapter = adapted_stage(stages / "tuned-1", head, base, norm)
    if head == "scalar":  # as scores are given: normalised; PEFT has no place for the bias
        adapter["score"] = {"kernel": adapter["score"]["kernel"] / 2.0, "bias": np.zeros(1, np.float32)}
    serve.export(base, tmp_path / "base")
    exported = str(tmp_path / "base")
    assert serve.export_adapter(stages / "tuned-1", tmp_path / "adapter", base=exported) == exported
    card = json.loads((tmp_path / "adapter" / PEFT_CONFIG).read_text())
    assert card["base_model_name_or_path"] == exported
    model, params = load_hf(tmp_path / "base")
    found, loaded = load_peft(tmp_path / "adapter", Model(model.config, head))
    assert found.config.lora == beginning.model.config.lora
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter)
    if head == "lm":  # and the base with it is what is exported without it
        serve.export(stages / "tuned-1", tmp_path / "merged")
        expected = load_hf(tmp_path / "merged")[1]
        fold = jax.jit(partial(merged, found.config))
        jax.tree.map(np.testing.assert_array_equal, fold(join(params, loaded)), expected)


def test_an_adapter_names_the_checkpoint_that_it_lies_beside(stages, tmp_path):
    base = stages / "base-1"
    adapted_stage(stages / "tuned-1", "lm", base)
    checkpoint = {"type": "Checkpoint", "path": "org/name", "adapter": "", "grow_vocabulary": False}
    tuned, out = stages / "tuned-1", tmp_path / "adapter"
    first = re.escape(f"first `jrlhf export {base} FOLDER`, then give `--base FOLDER`")
    for stage, named in (
        (checkpoint | {"adapter": "there"}, ""),
        (checkpoint | {"grow_vocabulary": True}, ""),
        ({"type": "Pretrain"}, ""),
        (checkpoint, "org/name"),
    ):
        begins_with(base, stage)
        if named:
            assert serve.export_adapter(tuned, out) == named
        else:
            with pytest.raises(UserError, match=first):
                serve.export_adapter(tuned, out)
            assert not out.exists()
    with pytest.raises(UserError, match=f"--base: .*{first}"):
        serve.export_adapter(tuned, out, base=str(base), overwrite=True)
    with pytest.raises(UserError, match="not empty; name a new folder, or ask to overwrite"):
        serve.export_adapter(tuned, out, base="org/other")
    assert serve.export_adapter(tuned, out, base="org/other", overwrite=True) == "org/other"
    assert json.loads((out / PEFT_CONFIG).read_text())["base_model_name_or_path"] == "org/other"
    used = re.escape(f"Checkpoint('org/other', adapter='{out}')")
    with pytest.raises(UserError, match=f"is an adapter, .*{used}"):
        serve.generate(out, ["Hello"], n=1, console=QUIET, seed=0)


def test_export_overwrites_only_what_export_wrote(bare, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["export", str(bare), str(out)]) == 0
    (out / "config.json").write_text("{}")
    assert cli.main(["export", str(bare), str(out)]) == 2
    assert (out / "config.json").read_text() == "{}"
    assert cli.main(["export", str(bare), str(out), "--overwrite"]) == 0
    load_hf(out)
    (out / "thesis.txt").write_text("mine")
    assert cli.main(["export", str(bare), str(out), "--overwrite"]) == 2
    assert (out / "thesis.txt").read_text() == "mine"
    assert cli.main(["export", str(bare), str(tmp_path / "new"), "--base", "org/name"]) == 2
    assert not (tmp_path / "new").exists()


def test_a_stage_without_an_adapter_says_so(stages, tmp_path):
    with pytest.raises(UserError, match="base-1: has no adapter, because it was not trained with `lora`"):
        serve.export_adapter(stages / "base-1", tmp_path / "adapter")
    with pytest.raises(UserError, match="not a stage folder with a finished model"):
        serve.export_adapter(stages, tmp_path / "adapter")
    adapted_stage(stages / "tuned-1", "lm", stages / "base-1", hf_family="phi3")
    with pytest.raises(UserError, match="'q' shares a tensor with others in phi3 checkpoints"):
        serve.export_adapter(stages / "tuned-1", tmp_path / "adapter", base="org/name")
    assert not (tmp_path / "adapter").exists()
