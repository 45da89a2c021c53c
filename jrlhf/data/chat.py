"""Chat templates: from messages to the one text that a model reads, and where in it the assistant speaks.

A template is a Jinja program that came with a checkpoint, so it is untrusted: it runs in Jinja's immutable
sandbox, with what `transformers` (apply_chat_template) gives it and nothing more, and renders the same text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from jrlhf.config import UserError, did_you_mean

Message = dict[
    str, Any
]  # {"role": ..., "content": ...}, and what else a template reads (tool_calls, name, ...)

BUILT_IN = {path.stem: path for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))}

# Noncharacters of Unicode: no text may hold them, so they can mark the places of {% generation %} blocks.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


@dataclass(frozen=True)
class ChatConfig:
    """Changes to a tokenizer's chat format. They are saved with the tokenizer, for every later stage."""

    template: str = ""  # a built-in ("chatml", "plain") or a .jinja file; "": the tokenizer's own
    wrap_strings: bool = False  # a row's text prompt is a user turn, its text answers are assistant turns

    def files(self) -> tuple[str, ...]:
        """Local files whose content decides what is trained. UserError as of `text`."""
        return (str(self._path()),) if self.template and self.template not in BUILT_IN else ()

    def text(self) -> str:
        """The template's source. UserError when there is none of that name."""
        return self._path().read_text(encoding="utf-8")

    def _path(self) -> Path:
        path = BUILT_IN.get(self.template, Path(self.template))
        if not path.is_file():
            raise UserError(
                f"chat.template: {self.template!r} is neither a built-in template nor a file."
                f"{did_you_mean(self.template, BUILT_IN)}"
            )
        return path


class Rewritten(UserError):
    """The template writes the beginning of a conversation differently once more follows."""


class Span(NamedTuple):
    """Characters [start, end) of a rendered conversation."""

    start: int
    end: int


class Layout(NamedTuple):
    """A rendered conversation and who wrote what."""

    text: str
    context_end: int  # characters that the context takes, generation prompt included; 0: no context
    answers: list[Span]  # what the assistant says after the context


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it may name (`bos_token`, `eos_token`, ...).

    `where` is the file that it came from, for messages.
    """

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict, hash=False)
    where: str = "chat template"

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[dict] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text; with `add_generation_prompt` up to where the assistant begins to speak.

        UserError when the template refuses the messages or tries what the sandbox forbids.
        """
        return self._render(messages, tools, add_generation_prompt, marking=False)

    def lay_out(
        self, messages: Sequence[Message], *, context: int = 0, tools: Sequence[dict] | None = None
    ) -> Layout:
        """Render a conversation and find its assistant turns after the first `context` messages.

        They are what the template marks by `{% generation %}`. Where it marks nothing, turn i is what
        `messages[:i + 1]` adds to `messages[:i]` with the generation prompt; both must be prefixes of the
        whole text. `Rewritten` (a UserError) when they are not: the turn is not to be found then, and what a sampler is
        shown is not what would be trained.
        """
        text = self.render(messages, tools=tools)

        def prefix(count: int, prompt: bool) -> int:
            part = self.render(messages[:count], tools=tools, add_generation_prompt=prompt)
            if not text.startswith(part):
                raise Rewritten(_INCONSISTENT.format(where=self.where, i=count if prompt else count - 1))
            return len(part)

        context_end = prefix(context, True) if context else 0
        if self.marks_answers:
            marked = self._marked(text, messages, tools)
            answers = [Span(max(s.start, context_end), s.end) for s in marked if s.end > context_end]
        else:
            turns = [i for i in range(context, len(messages)) if messages[i].get("role") == "assistant"]
            answers = [Span(prefix(i, True), prefix(i + 1, False)) for i in turns]
        if not any(span.end > span.start for span in answers):
            raise UserError("the conversation has no assistant turn to learn from")
        return Layout(text, context_end, answers)

    @property
    def marks_answers(self) -> bool:
        """Whether the template has `{% generation %}` blocks."""
        return _compiled(self.source, self.where, False)[1]

    def _marked(self, text: str, messages: Sequence[Message], tools: Sequence[dict] | None) -> list[Span]:
        marked = self._render(messages, tools, False, marking=True)
        parts = re.split(f"([{_OPEN}{_CLOSE}])", marked)
        # Marks must come in pairs and leave the text as it is: a template may trim or copy what holds them.
        if "".join(parts[::2]) != text or parts[1::2] != [_OPEN, _CLOSE] * (len(parts) // 4):
            raise UserError(f"{self.where}: the places of the {{% generation %}} blocks cannot be told.")
        edges, spans = [0], []
        for part in parts[::2]:
            edges.append(edges[-1] + len(part))
        for n in range(1, len(parts) // 2 + 1, 2):
            spans.append(Span(edges[n], edges[n + 1]))
        return spans

    def _render(
        self, messages: Sequence[Message], tools: Sequence[dict] | None, prompt: bool, marking: bool
    ) -> str:
        template, _ = _compiled(self.source, self.where, marking)
        # Tables that hold several rows' messages fill absent fields with null.
        chat = [{k: v for k, v in m.items() if v is not None or k == "content"} for m in messages]
        try:
            text = template.render(
                messages=chat,
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=prompt,
                **self.tokens,
            )
        except Exception as error:  # a template is a foreign program, which fails in any way it likes
            raise UserError(f"{self.where}: the chat template failed: {error}") from error
        if not marking and (_OPEN in text or _CLOSE in text):
            raise UserError(f"a message holds U+{ord(_OPEN):X} or U+{ord(_CLOSE):X}, which are no characters")
        return text


_INCONSISTENT = (
    "{where}: this chat template writes the conversation before message {i} (counted from 0) differently once "
    "more follows; some drop earlier reasoning, some open the answer's reasoning only for a sampler. So the "
    "assistant's tokens cannot be told from the others. Choose another template in `chat.template`."
)


@lru_cache(maxsize=16)
def _compiled(source: str, where: str, marking: bool) -> tuple[Any, bool]:
    """The template, and whether it has `{% generation %}` blocks; `marking` puts marks around them."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    found: list[int] = []

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012  (Jinja's own interface)

        def parse(self, parser: Any) -> Any:
            found.append(line := next(parser.stream).lineno)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}" if marking else caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes HTML.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source), bool(found)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{where}: line {error.lineno} of the chat template: {error.message}") from error


def pick_template(value: Any, where: str) -> str | None:
    """The source in a `chat_template` field: a text, or a list of named ones, of which "default" is taken."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(v, dict) and "name" in v for v in value):
        raise UserError(
            f"{where}: chat_template is {type(value).__name__}, expected text or named templates."
        )
    named = {v["name"]: v.get("template") for v in value}
    if not isinstance(named.get("default"), str):
        raise UserError(
            f"{where}: no chat_template is named 'default', only {', '.join(map(repr, named)) or 'none'}. "
            "Name a built-in template or a .jinja file in `chat.template`."
        )
    return named["default"]


def answer_messages(answer: str | list[Message]) -> list[Message]:
    """A completion as messages: a text is one assistant turn."""
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def prompt_text(prompt: str | list[Message]) -> str:
    """A prompt for people and reward functions: a text as it is, messages as a dialogue of the form
    `\\n\\nHuman: ... \\n\\nAssistant:`, whatever template the model reads them through."""
    return prompt if isinstance(prompt, str) else _PLAIN.render(prompt, add_generation_prompt=True)


_PLAIN = ChatTemplate(BUILT_IN["plain"].read_text(encoding="utf-8"), {"eos_token": ""}, "plain.jinja")
