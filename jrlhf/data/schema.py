"""What a row must look like: one schema per kind, in text or in chat messages.

Wherever a row holds text that was spoken (`prompt`, `completion`, each of `responses`) it may hold a list of
messages instead: `{"role": "system" | "user" | "assistant" | "tool", "content": str}`, further keys
(`tool_calls`, `name`, ...) as the tokenizer's chat template wants them. A prompt ends before the assistant
speaks, an answer begins with the assistant. A demonstration may be one list, `messages`. The functions that
the assistant may call are `tools`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jrlhf.config import UserError, did_you_mean

# kind -> the fields that a row must have (jrlhf.types holds the same as TypedDicts)
SCHEMAS: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "demonstration": ("prompt", "completion"),  # or `messages` alone
    "preference": ("prompt", "responses", "ranks"),
    "binary": ("prompt", "completion", "label"),
    "steps": ("prompt", "steps", "labels"),
    "prompt": ("prompt",),
}
OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "demonstration": ("messages", "tools"),
    "preference": ("scores", "criteria", "labeler", "ended", "tools", "weight", "probability"),
    "binary": ("tools",),
    "steps": ("tools",),
    "prompt": ("answer", "tools"),
}
ROLES = ("system", "user", "assistant", "tool")
_TEXT = ("text", "answer", "labeler")
_SPOKEN = {"prompt": "prompt", "completion": "answer", "messages": "conversation"}  # field -> part


def check_row(row: Any, kind: str, place: str) -> dict:
    """Return `row` if it is a row of `kind`, else raise a UserError that starts with `place`."""
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object with fields, got {type(row).__name__}.")
    fields = (*SCHEMAS[kind], *OPTIONAL.get(kind, ()))
    if kind == "demonstration" and "messages" in row:
        if "completion" in row:
            raise UserError(
                f"{place}: the row has 'messages' and 'completion'; a demonstration is one of them."
            )
        fields = ("messages", "tools")
    else:
        for name in SCHEMAS[kind]:
            require(row, name, place)
    for name in fields:
        if name in row and name in _TEXT:
            check_text(row[name], name, place)
        elif name in row and name in _SPOKEN:
            _check_spoken(row[name], name, place, _SPOKEN[name])
    tools = row.get("tools", []) if "tools" in fields else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{place}: field 'tools' must be a list of objects, one for each function.")
    if kind == "preference":
        _check_preference(row, place)
    if kind == "binary" and not isinstance(row["label"], bool):
        raise UserError(f"{place}: field 'label' is {row['label']!r}, expected true or false.")
    if kind == "steps":
        _check_steps(row, place)
    return row


def validate(rows: Iterable[dict], kind: str, where: str) -> Iterator[dict]:
    """Pass `rows` on, each checked; UserError on the first bad one, or when there is none at all."""
    n = 0
    for n, row in enumerate(rows, 1):
        yield check_row(row, kind, f"{where} row {n}")
    if n == 0:
        raise UserError(f"{where}: no rows.")


def require(row: dict, name: str, place: str) -> Any:
    """`row[name]`, or a UserError with the field that was perhaps meant."""
    if name not in row:
        raise UserError(f"{place}: no field {name!r}.{did_you_mean(name, row)} `columns` maps fields.")
    return row[name]


def check_text(value: Any, name: str, place: str) -> None:
    """UserError unless `value` is text that can be encoded."""
    if not isinstance(value, str):
        raise UserError(f"{place}: field {name!r} is {type(value).__name__}, expected text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: field {name!r} holds half of a character ({error.reason}).") from error


def check_message(message: Any, name: str, place: str) -> None:
    """UserError unless `message` has a known role and text (which a message with tool calls may lack)."""
    if not isinstance(message, dict) or "role" not in message:
        raise UserError(f"{place}: field {name!r}: a message needs 'role' and 'content'.")
    if message["role"] not in ROLES:
        raise UserError(
            f"{place}: field {name!r}: unknown role {message['role']!r}.{did_you_mean(message['role'], ROLES)}"
        )
    if message.get("content") is None and message.get("tool_calls"):
        return
    if "content" not in message:
        raise UserError(f"{place}: field {name!r}: a message needs 'role' and 'content'.")
    check_text(message["content"], f"{name}.content", place)


def order_fault(messages: list[dict], part: str) -> str:
    """Why these messages cannot be a "prompt", an "answer" or a "conversation"; "" when they can."""
    roles = [message["role"] for message in messages]
    if not roles:
        return "there are no messages"
    if part == "answer":
        if roles[0] != "assistant":
            return f"an answer begins with the {roles[0]}"
        if other := {*roles} & {"user", "system"}:
            return f"an answer holds a message of the {min(other)}"
        return "" if roles[-1] == "assistant" else f"an answer ends with the {roles[-1]}"
    first = next((role for role in roles if role != "system"), "system")
    if first in ("assistant", "tool"):
        return f"the dialogue begins with the {first}"
    if part == "prompt":
        return "a prompt ends with the assistant" if roles[-1] == "assistant" else ""
    return "" if "assistant" in roles else "the assistant says nothing"


def _check_spoken(value: Any, name: str, place: str, part: str) -> None:
    if isinstance(value, str) and part != "conversation":
        return check_text(value, name, place)
    if not isinstance(value, list):
        raise UserError(f"{place}: field {name!r} is {type(value).__name__}, expected text or messages.")
    for i, message in enumerate(value):
        check_message(message, f"{name}[{i}]", place)
    if fault := order_fault(value, part):
        raise UserError(f"{place}: field {name!r}: {fault}.")
    return None


def _check_preference(row: dict, place: str) -> None:
    responses, ranks = row["responses"], row["ranks"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise UserError(f"{place}: field 'responses' must be a list of at least 2 answers.")
    for i, response in enumerate(responses):
        _check_spoken(response, f"responses[{i}]", place, "answer")
    _check_numbers(ranks, "ranks", len(responses), place, (int,))
    if min(ranks) != 1:
        raise UserError(f"{place}: field 'ranks' is {ranks}; 1 is the best rank and someone must have it.")
    ended = row.get("ended", [True] * len(responses))
    if not isinstance(ended, list) or [type(e) for e in ended] != [bool] * len(responses):
        raise UserError(
            f"{place}: field 'ended' must be a list of {len(responses)} booleans, one per response."
        )
    _check_weight(row, place)
    criteria = row.get("criteria", {})
    if not isinstance(criteria, dict):
        raise UserError(f"{place}: field 'criteria' must map a name to one number per response.")
    scores = {"scores": row["scores"]} if "scores" in row else {}
    for name, values in {**scores, **{f"criteria.{k}": v for k, v in criteria.items()}}.items():
        _check_numbers(values, name, len(responses), place, (int, float))


def rounded_ranks(probability: float) -> list[int]:
    """The ranks of two answers of which the first is preferred with this probability; one half is a tie."""
    return [1 + int(probability < 0.5), 1 + int(probability > 0.5)]


def _check_weight(row: dict, place: str) -> None:
    """`weight`, how much the row counts, and `probability`, that the first of two answers is preferred."""
    for name, most in (("weight", math.inf), ("probability", 1.0)):
        if name not in row:
            continue
        value = row[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not 0 <= value <= most:
            wanted = "from 0 to 1" if name == "probability" else "of at least 0"
            raise UserError(f"{place}: field {name!r} is {value!r}, expected a number {wanted}.")
    if "probability" not in row:
        return
    if (answers := len(row["responses"])) != 2:
        raise UserError(
            f"{place}: field 'probability' says how surely the first of two answers is preferred; the row has "
            f"{answers}."
        )
    if row["ranks"] != (ranks := rounded_ranks(row["probability"])):
        raise UserError(
            f"{place}: field 'probability' is {row['probability']}, which contradicts 'ranks' {row['ranks']}: they "
            f"must be its rounding, {ranks} (one half is a tie)."
        )


def _check_steps(row: dict, place: str) -> None:
    steps, labels = row["steps"], row["labels"]
    if not isinstance(steps, list) or not steps:
        raise UserError(f"{place}: field 'steps' must be a list of at least 1 text.")
    for i, step in enumerate(steps):
        check_text(step, f"steps[{i}]", place)
        if not step.strip():
            raise UserError(f"{place}: field 'steps[{i}]' is empty.")
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise UserError(f"{place}: field 'labels' must be a list of {len(steps)} labels, one per step.")
    for label in labels:
        number = isinstance(label, (int, float)) and (0 <= label <= 1 or label == -1)
        if label is not None and not number:
            raise UserError(
                f"{place}: field 'labels' holds {label!r}, expected 0 (wrong) to 1 (right), or null or -1 for no label."
            )


def _check_numbers(values: Any, name: str, count: int, place: str, types: tuple[Any, ...]) -> None:
    if not isinstance(values, list):
        raise UserError(f"{place}: field {name!r} must be a list, got {type(values).__name__}.")
    if len(values) != count:
        raise UserError(f"{place}: field {name!r} has {len(values)} entries for {count} responses.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, types) or not math.isfinite(value):
            raise UserError(f"{place}: field {name!r} holds {value!r}, expected {types[-1].__name__}s.")
