"""Conversations: rendered as transformers renders them, and learned where the assistant speaks.

In the expected texts ⟦ and ⟧ enclose what is to be learned.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from chat_formats import CALLS, CHATML, FORMATS, MISTRAL, TURNS, make_tokenizer, write_tokenizer

from jrlhf.config import UserError, from_dict, to_dict
from jrlhf.data.batching import (
    encode_conversation,
    encode_demonstration,
    encode_preference,
    encode_prompt,
    encode_rows,
    encode_turns,
)
from jrlhf.data.chat import ChatConfig, ChatTemplate, prompt_text
from jrlhf.data.report import Report
from jrlhf.data.tokenizer import load_tokenizer, train_sentencepiece

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "chat.json").read_text(encoding="utf-8"))
SYSTEM = {"role": "system", "content": "Be kind."}

MARKED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello there.<|im_end|>\n"
        "<|im_start|>assistant\n⟦I am fine, thanks.<|im_end|>⟧\n"
        "<|im_start|>user\nWhat is 2 + 2? <b>naïve</b> 日本<|im_end|>\n"
        "<|im_start|>assistant\n⟦It is 4.\n\n1. café<|im_end|>⟧"
    ),
    "chatml_marked": (
        "<|im_start|>user\nHello there.<|im_end|>\n<|im_start|>assistant\n⟦I am fine, thanks.<|im_end|>⟧\n"
        "<|im_start|>user\nWhat is 2 + 2? <b>naïve</b> 日本<|im_end|>\n"
        "<|im_start|>assistant\n⟦It is 4.\n\n1. café<|im_end|>⟧"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello there.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦I am fine, thanks.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2? <b>naïve</b> 日本<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is 4.\n\n1. café<|eot_id|>⟧"
    ),
    "gemma": (
        "<bos><start_of_turn>user\nHello there.<end_of_turn>\n"
        "<start_of_turn>model\n⟦I am fine, thanks.<end_of_turn>⟧\n"
        "<start_of_turn>user\nWhat is 2 + 2? <b>naïve</b> 日本<end_of_turn>\n"
        "<start_of_turn>model\n⟦It is 4.\n\n1. café<end_of_turn>⟧"
    ),
    "mistral": (
        "<s>[INST] Hello there. [/INST]⟦ I am fine, thanks.</s>⟧"
        "[INST] What is 2 + 2? <b>naïve</b> 日本 [/INST]⟦ It is 4.\n\n1. café</s>⟧"
    ),
    "zephyr": (
        "<|user|>\nHello there.</s>\n<|assistant|>\n⟦I am fine, thanks.</s>⟧\n"
        "<|user|>\nWhat is 2 + 2? <b>naïve</b> 日本</s>\n<|assistant|>\n⟦It is 4.\n\n1. café</s>⟧"
    ),
}
END = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>"}


@pytest.fixture(params=sorted(MARKED))
def name(request):
    return request.param


@pytest.fixture
def make(tmp_path):
    return lambda name: make_tokenizer(tmp_path / name, name)


def spell(tokenizer, ids):
    """The text of ids, special tokens written out."""
    return tokenizer._model.decode(list(ids), skip_special_tokens=False)


def show(tokenizer, example):
    """An example's text with its targets between ⟦ and ⟧."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], example.loss_mask, [False]])))
    parts = np.split(example.ids, edges)
    marks = ["⟦", "⟧"] * len(edges)
    return "".join(
        spell(tokenizer, part) + mark for part, mark in zip(parts, [*marks[: len(edges)], ""], strict=True)
    )


# --- rendering ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_name", sorted(FORMATS))
def test_text_ids_and_mask_are_those_of_transformers(make, format_name):
    tokenizer = make(format_name)
    for kind, golden in GOLDEN[format_name].items():
        messages = {"turns": TURNS, "calls": CALLS}[kind]
        template = tokenizer.chat_template
        assert template.render(messages) == golden["text"]
        assert template.render(messages[:-1], add_generation_prompt=True) == golden["prompt"]
        assert tokenizer.encode_rendered(golden["text"]).ids == golden["ids"]
        if golden["mask"] is not None:
            example, _ = encode_conversation(messages, tokenizer)
            length = len(example.ids)
            assert example.ids.tolist() == golden["ids"][:length]
            assert example.loss_mask.astype(int).tolist() == golden["mask"][:length]
            assert not any(golden["mask"][length:])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({'role': 'user'}) }}",
        "{{ cycler.__init__.__globals__.os.popen('echo run').read() }}",
        "{{ raise_exception.__globals__['jinja2'].sys }}",
        "{{ strftime_now.__globals__.json }}",
        "{% set messages[0].content = 'x' %}",
        "{% include '/etc/passwd' %}",
        "{{ range(10 ** 9) | list }}",
        "{{ messages[0].content.format.__self__.__class__('{0.__class__}').format(1).upper.__func__ }}",
    ],
)
def test_a_malicious_template_raises(source):
    with pytest.raises(UserError, match="chat template"):
        ChatTemplate(source).render(TURNS)


def test_what_a_template_may_use():
    source = (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}"
        "{% if loop.index0 == 3 %}{% break %}{% endif %}{{ m.content[:5] }}|{% endfor %}"
        "{{ tools[0] | tojson }}{{ {'é<': 1} | tojson(indent=1) }}{{ strftime_now('%Y') | length }}{{ nothing }}"
    )
    text = ChatTemplate(source).render(TURNS, tools=[{"b": "<>&'"}])
    assert text == 'Hello|What |{"b": "<>&\'"}{\n "é<": 1\n}4'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% if %}", "line 1 of the chat template"),
        ("a\n{% for m in messages %}", "line 2 of the chat template"),
        ("{{ raise_exception('no system role') }}", "the chat template failed: no system role"),
        ("{{ messages[0].content + none }}", "the chat template failed"),
        ("{{ messages[9].content.x }}", "the chat template failed"),
        ("{% generation %}", "Unexpected end of template"),
    ],
)
def test_a_template_that_fails_says_why(source, message):
    with pytest.raises(UserError, match=message) as raised:
        ChatTemplate(source, where="tokenizer_config.json").render(TURNS)
    assert str(raised.value).startswith("tokenizer_config.json: ")


# --- where the files are --------------------------------------------------------------------------------


def test_named_templates_and_the_jinja_file(tmp_path):
    _, specials, names = FORMATS["chatml"]
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    folder = write_tokenizer(tmp_path, named, specials, names)
    assert load_tokenizer(folder).chat_template.source == CHATML
    write_tokenizer(tmp_path, named[:1], specials, names)
    with pytest.raises(UserError, match=r"no chat_template is named 'default', only 'tool_use'"):
        load_tokenizer(folder)
    (tmp_path / "chat_template.jinja").write_text(MISTRAL)  # outranks the field
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template.source == MISTRAL
    assert tokenizer.chat_template.where.endswith("chat_template.jinja")


@pytest.mark.parametrize("jinja_file", [False, True])
def test_the_format_survives_saving(tmp_path, jinja_file):
    template, specials, names = FORMATS["llama3"]
    folder = write_tokenizer(tmp_path / "a", None if jinja_file else template, specials, names)
    if jinja_file:
        (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "b")
    again = load_tokenizer(tmp_path / "b")
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.chat_template.render(TURNS) == tokenizer.chat_template.render(TURNS)
    assert again.eos_ids == tokenizer.eos_ids
    assert tokenizer.with_chat(ChatConfig(wrap_strings=True)).fingerprint() != tokenizer.fingerprint()
    changed = tokenizer.with_chat(ChatConfig("plain", wrap_strings=True))
    assert changed.fingerprint() != tokenizer.fingerprint()
    changed.save(tmp_path / "b")
    again = load_tokenizer(tmp_path / "b")
    assert again.fingerprint() == changed.fingerprint()
    assert again.wrap_strings
    assert (
        again.chat_template.render(TURNS)
        == changed.chat_template.render(TURNS)
        != GOLDEN["llama3"]["turns"]["text"]
    )


@pytest.mark.parametrize("format_name", sorted(END))
def test_the_end_of_turn_is_an_end(make, format_name):
    tokenizer = make(format_name)
    ends = [spell(tokenizer, [i]) for i in tokenizer.eos_ids]
    first = {"chatml": "<|endoftext|>", "llama3": "<|end_of_text|>", "gemma": "<eos>", "mistral": "</s>"}
    assert ends == list(dict.fromkeys([first[format_name], END[format_name]]))
    example, _ = encode_conversation(TURNS, tokenizer)
    assert spell(tokenizer, example.ids[-1:]) == END[format_name]


def test_ends_are_all_that_any_file_names(tmp_path):
    folder = write_tokenizer(tmp_path, *FORMATS["llama3"])
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    assert load_tokenizer(folder).eos_ids == (1, 3, 4)  # <|end_of_text|>, another, <|eot_id|>


def test_a_rendered_texts_tokens_begin_where_they_are_written(make, tmp_path):
    text = "<s>Hello there. <b>naïve</b> é</s>日本 2 + 2?"
    texts = [text.replace("<s>", " ").replace("</s>", " ")] * 9
    for tokenizer in (make("mistral"), train_sentencepiece(texts, 70, tmp_path / "sp", "bpe")):
        ids, starts = tokenizer.encode_rendered(text)
        assert [i for i in ids if tokenizer._is_special(i)] == [tokenizer.bos_id, tokenizer.eos_ids[0]]
        assert len(ids) == len(starts)
        assert starts == sorted(starts)
        for i, start in zip(ids, starts, strict=True):
            said = tokenizer._token(i) if tokenizer._is_special(i) else tokenizer.decode([i]).strip()
            if "\ufffd" not in said:  # else a part of a character
                assert text[start:].lstrip().startswith(said)


# --- what is learned ------------------------------------------------------------------------------------


def test_every_assistant_turn_of_a_demonstration_is_learned(make, name):
    tokenizer = make(name)
    example = encode_demonstration({"messages": TURNS}, tokenizer, 500)
    assert show(tokenizer, example) == MARKED[name]


def test_of_a_prompt_and_completion_only_the_completion_is_learned(make, name):
    tokenizer = make(name)
    expected = MARKED[name].replace("⟦", "", 1).replace("⟧", "", 1)
    for completion in (TURNS[-1:], TURNS[-1]["content"]):
        row = {"prompt": TURNS[:-1], "completion": completion}
        example = encode_demonstration(row, tokenizer, 500)
        assert show(tokenizer, example) == expected
        prompt = encode_prompt(row, tokenizer, 500)
        start = int(np.flatnonzero(example.loss_mask)[0])
        np.testing.assert_array_equal(example.ids[:start], prompt)


def test_prompt_and_completion_ids_are_the_conversations(make, name):
    tokenizer = make(name)
    whole = encode_demonstration({"messages": TURNS}, tokenizer, 500)
    ids = tokenizer.encode_rendered(tokenizer.chat_template.render(TURNS)).ids
    assert whole.ids.tolist() == ids[: len(whole.ids)]
    for turn in (1, 3):
        prompt = encode_prompt({"prompt": TURNS[:turn]}, tokenizer, 500)
        np.testing.assert_array_equal(whole.ids[: len(prompt)], prompt)
        assert whole.loss_mask[len(prompt)]
        assert not whole.loss_mask[len(prompt) - 1]


def test_bos_is_there_once(make):
    for name in ("llama3", "gemma", "mistral"):
        tokenizer = make(name)
        for ids in (
            encode_prompt({"prompt": TURNS[:1]}, tokenizer, 99),
            encode_conversation(TURNS, tokenizer)[0].ids,
        ):
            assert np.flatnonzero(ids == tokenizer.bos_id).tolist() == [0]
    tokenizer = make("zephyr")  # its template writes none, so engines give none
    assert tokenizer.add_bos
    assert tokenizer.bos_id not in encode_prompt({"prompt": TURNS[:1]}, tokenizer, 99)


def test_tool_calls_are_learned_and_their_results_are_not(make):
    tokenizer = make("chatml_marked")
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2, "note": "<é>"}}\n</tool_call>'
    expected = (
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
        f"<|im_start|>assistant\n⟦{call}<|im_end|>⟧\n"
        "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧"
    )
    assert show(tokenizer, encode_demonstration({"messages": CALLS}, tokenizer, 500)) == expected
    nulls = [{**m, "tool_calls": m.get("tool_calls"), "name": None} for m in CALLS]  # as tables hold them
    row = {"prompt": nulls[:1], "completion": nulls[1:]}
    assert show(tokenizer, encode_demonstration(row, tokenizer, 500)) == expected


def with_template(tmp_path, source):
    _, specials, names = FORMATS["chatml"]
    return load_tokenizer(write_tokenizer(tmp_path, source, specials, names))


def test_marks_that_leave_the_end_out_are_completed_and_what_follows_it_is_not_learned(tmp_path):
    start = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% generation %}{{ m.content }}"
    before = start + "{% endgeneration %}{{ '<|im_end|>\\n' }}{% endfor %}"
    inside = start + "{{ '<|im_end|>\\n' }}{% endgeneration %}{% endfor %}"
    prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    for n, source in enumerate((before, inside)):
        tokenizer = with_template(tmp_path / str(n), source + prompt)
        example, _ = encode_conversation(TURNS[:2], tokenizer, context=1)
        # The context's own mark is no answer; the answer ends with its end, and the line break is not learned.
        assert show(tokenizer, example).endswith("assistant\n⟦I am fine, thanks.<|im_end|>⟧")
        assert example.loss_mask.sum() == len(tokenizer.encode("I am fine, thanks.")) + 1


def test_marks_whose_places_are_lost_are_an_error(tmp_path):
    source = (
        "{% set all %}{% for m in messages %}{% generation %} {{ m.content }} {% endgeneration %}{% endfor %}"
        "{% endset %}{{ all | replace(' ', '') }}<|im_end|>"
    )
    twice = "{% set a %}{% generation %}{{ messages[1].content }}{% endgeneration %}{% endset %}{{ a | upper | list }}"
    assert ChatTemplate(source).marks_answers  # these survive a replacement of spaces
    with pytest.raises(UserError, match="generation %} blocks cannot be told"):
        ChatTemplate(twice).lay_out(TURNS[:2])


def test_a_template_that_rewrites_earlier_turns_is_an_error(make):
    tokenizer = make("thinking")
    thoughts = [
        {**m, "content": f"<think>hm</think>{m['content']}"} if m["role"] == "assistant" else m for m in TURNS
    ]
    with pytest.raises(UserError, match=r"before message 1 .counted from 0. differently once more follows"):
        encode_demonstration({"messages": thoughts}, tokenizer, 500)
    # Turn by turn, each with the context that a sampler would be given, it can be learned.
    report = Report()
    first, second = encode_turns({"messages": thoughts}, tokenizer, 500, report=report)
    assert show(tokenizer, first) == (
        "<|im_start|>user\nHello there.<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>hm</think>I am fine, thanks.<|im_end|>⟧"
    )
    assert show(tokenizer, second) == (
        "<|im_start|>user\nHello there.<|im_end|>\n<|im_start|>assistant\nI am fine, thanks.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 2? <b>naïve</b> 日本<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>hm</think>It is 4.\n\n1. café<|im_end|>⟧"
    )
    assert str(report).startswith("1 of 1 rows kept; changed 1: its turns became examples of their own")
    (only,) = encode_turns({"messages": thoughts}, tokenizer, len(first.ids), "drop", report)
    np.testing.assert_array_equal(only.ids, first.ids)
    assert encode_turns({"messages": thoughts}, tokenizer, 9, "drop", report) is None
    assert (report.kept, report.read) == (2, 3)
    (whole,) = encode_turns({"messages": TURNS}, tokenizer, 500)  # no reasoning to drop
    assert show(tokenizer, whole).count("⟦") == 2


def test_a_token_across_the_start_of_an_answer_is_split_as_a_sampler_would(make):
    chatml = make("chatml")
    # The header ends with a line break too, and the first two are one token.
    turns = [TURNS[0], {"role": "assistant", "content": "\n\nHello"}]
    whole = chatml.encode_rendered(chatml.chat_template.render(turns)).ids
    prompt = encode_prompt({"prompt": turns[:1]}, chatml, 99).tolist()
    assert whole[: len(prompt)] != prompt
    example = encode_demonstration({"messages": turns}, chatml, 99)
    assert example.ids[: len(prompt)].tolist() == prompt
    assert show(chatml, example).endswith("<|im_start|>assistant\n⟦\n\nHello<|im_end|>⟧")
    assert spell(chatml, example.ids) == spell(chatml, whole[:-1])
    # A second such turn: its context is what was settled, its answer is split again.
    more = encode_demonstration({"messages": [*turns, TURNS[2], turns[1]]}, chatml, 200)
    assert show(chatml, more).count("assistant\n⟦\n\nHello<|im_end|>⟧") == 2
    assert more.ids[: len(example.ids)].tolist() == example.ids.tolist()
    mixed = encode_demonstration({"messages": [*turns, *TURNS]}, chatml, 300)
    assert show(chatml, mixed).count("⟦") == 3
    assert show(chatml, mixed).count("assistant\n⟦I am fine, thanks.<|im_end|>⟧\n") == 1


def test_an_end_inside_an_answer_does_not_end_its_targets(make):
    tokenizer = make("chatml")
    turns = [TURNS[0], {"role": "assistant", "content": "Hello<|im_end|> there."}]
    example = encode_demonstration({"messages": turns}, tokenizer, 99)
    assert show(tokenizer, example).endswith("assistant\n⟦Hello<|im_end|> there.<|im_end|>⟧")


def test_truncation_keeps_the_mask_aligned(make, name):
    tokenizer = make(name)
    report = Report()
    whole = encode_demonstration({"messages": TURNS}, tokenizer, 500)
    first_end = int(np.flatnonzero(np.isin(whole.ids, tokenizer.eos_ids) & whole.loss_mask)[0])
    for length in range(len(whole.ids) - 1, 0, -7):
        cut = encode_demonstration({"messages": TURNS}, tokenizer, length, "truncate", report)
        if not whole.loss_mask[:length].any():
            assert cut is None
            continue
        np.testing.assert_array_equal(cut.ids, whole.ids[: len(cut.ids)])
        np.testing.assert_array_equal(cut.loss_mask, whole.loss_mask[: len(cut.ids)])
        assert cut.loss_mask[-1]
        assert not whole.loss_mask[len(cut.ids) : length].any()  # nothing to learn was lost before the limit
    between = encode_demonstration({"messages": TURNS}, tokenizer, first_end + 4, "truncate")
    assert len(between.ids) == first_end + 1  # cut in the next question: ends with the first answer
    assert report.changed.keys() == {"conversation lost its end"}
    with pytest.raises(UserError, match=r"tokens do not fit in 20 \('\\n\\nHuman: Hello there"):
        encode_demonstration({"messages": TURNS}, tokenizer, 20)
    assert encode_demonstration({"messages": TURNS}, tokenizer, 20, "drop", report) is None


def test_long_prompts_of_messages_lose_their_beginning_but_not_bos(make):
    for name in ("llama3", "chatml"):
        tokenizer = make(name)
        whole = encode_prompt({"prompt": TURNS[:3]}, tokenizer, 500).tolist()
        cut = encode_prompt({"prompt": TURNS[:3]}, tokenizer, 20, "truncate_left").tolist()
        assert cut == (whole[:1] + whole[-19:] if name == "llama3" else whole[-20:])


# --- preferences ----------------------------------------------------------------------------------------


def test_answers_to_messages_share_the_prompts_ids(make, name):
    tokenizer = make(name)
    row = {
        "prompt": TURNS[:3],
        "responses": ["It is 4.", [{"role": "assistant", "content": "\nIs it?"}]],
        "ranks": [1, 2],
    }
    prompt = encode_prompt(row, tokenizer, 500)
    preference = encode_preference(row, tokenizer, 500)
    for example, text in zip(preference.answers, ("It is 4.", "Is it?"), strict=True):
        np.testing.assert_array_equal(example.ids[: len(prompt)], prompt)
        assert not example.loss_mask[: len(prompt)].any()
        assert example.loss_mask[len(prompt) :].all()
        assert example.ids[-1] in tokenizer.eos_ids
        assert spell(tokenizer, example.ids[len(prompt) : -1]).strip() == text
    longest = max(len(e.ids) for e in preference.answers)
    short = encode_preference(row, tokenizer, longest - 3, "truncate_left")
    bos = int(prompt[0] == tokenizer.bos_id)
    for example, cut in zip(preference.answers, short.answers, strict=True):
        kept = np.r_[0:bos, bos + 3 : len(example.ids)]
        np.testing.assert_array_equal(cut.ids, example.ids[kept])
        np.testing.assert_array_equal(cut.loss_mask, example.loss_mask[kept])


# --- texts and templates --------------------------------------------------------------------------------

TEXT_ROW = {"prompt": "What is 2 + 2?", "completion": "It is 4."}
TURN_ROW = {"prompt": [{"role": "user", "content": "What is 2 + 2?"}], "completion": "It is 4."}


def test_texts_are_wrapped_only_when_asked(make):
    tokenizer = make("chatml")
    plain = encode_demonstration(TEXT_ROW, tokenizer, 99)
    assert show(tokenizer, plain) == "What is 2 + 2?⟦It is 4.<|endoftext|>⟧"
    wrapping = tokenizer.with_chat(ChatConfig(wrap_strings=True))
    wrapped, turns = (encode_demonstration(row, wrapping, 99) for row in (TEXT_ROW, TURN_ROW))
    np.testing.assert_array_equal(wrapped.ids, turns.ids)
    np.testing.assert_array_equal(wrapped.loss_mask, turns.loss_mask)
    for row in (TEXT_ROW, TURN_ROW):
        assert spell(wrapping, encode_prompt(row, wrapping, 99)).endswith(
            "2 + 2?<|im_end|>\n<|im_start|>assistant\n"
        )
    assert (
        spell(wrapping, encode_prompt(TEXT_ROW["prompt"], wrapping, 99)) == TEXT_ROW["prompt"]
    )  # a bare text
    again = wrapping.with_chat(ChatConfig())
    np.testing.assert_array_equal(encode_demonstration(TEXT_ROW, again, 99).ids, plain.ids)


def test_messages_without_a_template_name_the_built_in_ones(tmp_path, tokenizer):
    for call in (
        lambda: encode_prompt(TURN_ROW, tokenizer, 99),
        lambda: encode_demonstration({"messages": TURNS}, tokenizer, 99),
        lambda: encode_preference({**TURN_ROW, "responses": ["a", "b"], "ranks": [1, 2]}, tokenizer, 99),
    ):
        with pytest.raises(
            UserError, match=r"no chat template. Name .* `chat.template`: 'chatml' or 'plain', or a"
        ):
            call()
    with pytest.raises(UserError, match=r"chat.wrap_strings: .* no chat template"):
        tokenizer.with_chat(ChatConfig(wrap_strings=True))
    with pytest.raises(UserError, match=r"neither a built-in template nor a file. Did you mean 'chatml'"):
        tokenizer.with_chat(ChatConfig("chatlm"))
    chatml = tokenizer.with_chat(ChatConfig("chatml"))  # a tokenizer without its tokens
    with pytest.raises(
        UserError, match=r"ends the assistant's turn .* with none of the tokenizer's end tokens"
    ):
        encode_demonstration({"messages": TURNS}, chatml, 999)
    encode = partial(encode_demonstration, tokenizer=tokenizer, max_len=99)
    with pytest.raises(UserError, match="file row 1: the prompt is text but the answer is messages"):
        encode_rows([{"prompt": "a", "completion": TURNS[1:2]}], encode, "file")


def test_built_in_chatml_is_the_familiar_one(make):
    tokenizer = make("chatml_marked").with_chat(ChatConfig("chatml"))
    assert (
        show(tokenizer, encode_demonstration({"messages": TURNS}, tokenizer, 500)) == MARKED["chatml_marked"]
    )
    assert tokenizer.chat_template.where.endswith("tokenizer_config.json")
    with pytest.raises(UserError, match="template chatml shows no tools"):
        encode_prompt({**TURN_ROW, "tools": [{"name": "add"}]}, tokenizer, 99)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_plain_dialogues_with_a_sentencepiece_tokenizer(tmp_path, model_type):
    texts = ["\n\nHuman: Hello there. é 日本\n\nAssistant: I am fine, thanks.", "It is 4. What is 2 + 2?"]
    tokenizer = train_sentencepiece(texts * 9, 90, tmp_path / "sp", model_type)
    tokenizer = tokenizer.with_chat(ChatConfig("plain"))
    turns = [
        {"role": m["role"], "content": c}
        for m, c in zip(TURNS, ("é 日本", "It is", "Hello", "4."), strict=True)
    ]
    example = encode_demonstration({"messages": turns}, tokenizer, 99)
    assert example.ids[0] == tokenizer.bos_id
    edges = np.flatnonzero(np.diff(example.loss_mask.astype(int), prepend=0, append=0))
    parts = [example.ids[a:b].tolist() for a, b in zip([0, *edges], [*edges, len(example.ids)], strict=True)]
    assert [part.count(tokenizer.eos_ids[0]) for part in parts] == [0, 1, 0, 1, 0]
    assert [parts[n][-1] for n in (1, 3)] == [tokenizer.eos_ids[0]] * 2
    said = [" ".join(tokenizer.decode(part).split()) for part in parts]
    assert said == ["Human: é 日本 Assistant:", "It is", "Human: Hello Assistant:", "4.", ""]
    prompt = encode_prompt({"prompt": turns[:3]}, tokenizer, 99).tolist()
    assert example.ids[: len(prompt)].tolist() == prompt
    assert len(prompt) == sum(map(len, parts[:3]))
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint() == tokenizer.fingerprint()


def test_a_generation_prompt_that_the_tokenizer_cannot_end_is_an_error(tmp_path):
    path = tmp_path / "space.jinja"
    path.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
                    "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    _, specials, names = FORMATS["zephyr"]
    write_tokenizer(tmp_path, None, specials, names)
    model = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")  # as Llama 2
    model.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=list(specials), show_progress=False)
    model.train_from_iterator(["user: Hello there. assistant: I am fine, thanks."], trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path).with_chat(ChatConfig(str(path)))
    with pytest.raises(
        UserError, match=r"cannot begin an answer after .*assistant: '.* before the white space"
    ):
        encode_demonstration({"messages": TURNS[:2]}, tokenizer, 99)


def test_prompts_are_shown_as_dialogues():
    assert prompt_text("as it is") == "as it is"
    assert prompt_text([SYSTEM, *TURNS[:1]]) == "\n\nSystem: Be kind.\n\nHuman: Hello there.\n\nAssistant:"
    assert prompt_text(CALLS[:3]).endswith('"<é>"}}\n\nTool: 4\n\nAssistant:')


def test_the_config_is_written_and_its_file_is_known(tmp_path):
    path = str(tmp_path / "mine.jinja")
    Path(path).write_text("{{ messages }}")
    for config, files in ((ChatConfig("plain", True), ()), (ChatConfig(path), (path,)), (ChatConfig(), ())):
        assert from_dict(ChatConfig, to_dict(config)) == config
        assert config.files() == files
    with pytest.raises(UserError, match=r"neither a built-in template nor a file. Did you mean 'chatml'"):
        ChatConfig("chatlm").files()
