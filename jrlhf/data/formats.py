"""Public dataset formats onto the rows of `schema.py`. `FORMATS` is the table; each line of it is one format.

A format says which fields it expects and how a record with these becomes rows. A record without them is of
another format: an error that suggests which. A record that has them but cannot be used (an empty answer, a
number where text should be, equal answers) is dropped, and the report counts it by its reason.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

from jrlhf.config import UserError, did_you_mean
from jrlhf.data.report import Report
from jrlhf.data.schema import OPTIONAL, SCHEMAS, check_message, check_row, order_fault, require

Records = Iterator[tuple[str, Any]]  # (where it stands, the record)

_SPEAKER = {"system": "System", "user": "Human", "assistant": "Assistant"}  # of the HH dialogues
_ROLE = {  # whatever a file calls a speaker -> our role
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_MARK = "\n\nAssistant:"


class Unfit(Exception):
    """A record that has the fields of its format but cannot be used; the message is the reason."""


# --- messages ---------------------------------------------------------------------------------------------


def to_messages(value: Any, place: str) -> list[dict]:
    """Messages in anybody's spelling (`role`/`content` or `from`/`value`) in ours; one alone becomes a list.

    ShareGPT's `function_call` becomes `tool_calls` (the form that chat templates read) and `observation` the
    role tool. Keys that are null (columns of a table that this message does not use) are left out.
    """
    value = _parsed(value)
    if not isinstance(value, list | dict):
        raise Unfit(f"messages are {type(value).__name__}, not a list")
    if not value:
        raise Unfit("there are no messages")
    return [_to_message(m, place) for m in ([value] if isinstance(value, dict) else value)]


def _to_message(message: Any, place: str) -> dict:
    if not isinstance(message, dict):
        raise UserError(f"{place}: a message is {type(message).__name__}, expected an object.")
    role_key, text_key = ("from", "value") if "from" in message else ("role", "content")
    if role_key not in message or (text_key not in message and not message.get("tool_calls")):
        raise UserError(
            f"{place}: a message needs 'role' and 'content' (or 'from' and 'value'), got {', '.join(message)}."
        )
    role, text = message[role_key], message.get(text_key)
    if role not in _ROLE:
        raise UserError(f"{place}: unknown role {role!r}.{did_you_mean(str(role), _ROLE)}")
    more = {k: v for k, v in message.items() if v is not None and k not in (role_key, text_key)}
    if role == "function_call":
        more["tool_calls"], text = _tool_calls(text), ""
    if text is None and more.get("tool_calls"):
        text = ""
    ours = {"role": _ROLE[role], "content": _text(text, "content"), **more}
    check_message(ours, text_key, place)
    return ours


def _tool_calls(text: Any) -> list[dict]:
    """`{"name": ..., "arguments": {...}}`, or a list of them, in the form of an assistant's tool calls."""
    calls = _parsed(text)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call and "arguments" in call for call in calls):
        raise Unfit("a function call is not JSON with 'name' and 'arguments'")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": _parsed(call["arguments"])}}
        for call in calls
    ]


def _tools(record: dict) -> dict:
    """The tools on offer, as chat templates read them: `{"tools": [{"type": "function", ...}]}` or nothing."""
    tools = _parsed(record.get("tools") or [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unfit("'tools' is not a list of functions")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return {"tools": tools} if tools else {}


def _said(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def _answer(text: str) -> list[dict]:
    if not text.strip():
        raise Unfit("an answer is empty")
    return _said("assistant", text)


def _spoken(value: Any, place: str) -> str | list[dict]:
    """Text as it is, anything else as messages; an empty answer among them makes the record unfit."""
    if isinstance(value, str):
        table = _parsed(value)  # a text that is JSON stays one, unless it is plainly a list of messages
        like = isinstance(table, list) and [
            isinstance(m, dict) and bool({"role", "from"} & {*m}) for m in table
        ]
        if not like or not all(like):
            return value
        value = table
    if not isinstance(value, list | dict):
        raise Unfit(f"{type(value).__name__} where text or messages belong")
    messages = to_messages(value, place)
    if any(m["role"] == "assistant" and not (m["content"].strip() or m.get("tool_calls")) for m in messages):
        raise Unfit("an answer is empty")
    return messages


def _dialogue(value: Any, place: str, part: str) -> list[dict]:
    messages = _spoken(value, place)
    if isinstance(messages, str):
        raise Unfit("messages are str, not a list")
    if fault := order_fault(messages, part):
        raise Unfit(fault)
    return messages


def _parsed(value: Any) -> Any:
    """A list or object that a text column (CSV, ShareGPT's tools) holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value  # a text that only looks like it
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unfit(f"{name!r} is {'null' if value is None else type(value).__name__}, not text")
    return value


# --- messages or text -------------------------------------------------------------------------------------

CHATS = ("messages", "dialogue", "bare")


def dialogue_text(messages: list[dict], place: str = "messages") -> str:
    """Chat messages in the plain form of Anthropic's HH data: `\\n\\nHuman: ...\\n\\nAssistant: ...`."""
    parts = []
    for message in messages:
        if message["role"] not in _SPEAKER or message.get("tool_calls"):
            raise UserError(f"{place}: tools have no place in a plain dialogue. Use chat='messages'.")
        parts.append(f"\n\n{_SPEAKER[message['role']]}: {message['content']}")
    return "".join(parts)


def dialogue_messages(text: str, place: str = "dialogue") -> list[dict]:
    """The messages of a HH dialogue. A last `\\n\\nAssistant:` with nothing after it only asks for an answer."""
    start, *turns = re.split(r"\n\n(Human|Assistant|System):", text.removesuffix(_MARK))
    if start or not turns:
        raise UserError(f"{place}: {text[:30]!r} does not begin with a speaker, such as '\\n\\nHuman:'.")
    role = {speaker: role for role, speaker in _SPEAKER.items()}
    return [
        {"role": role[speaker], "content": said.removeprefix(" ")}
        for speaker, said in zip(turns[::2], turns[1::2], strict=True)
    ]


def _as_text(row: dict, chat: str, place: str) -> dict:
    """A row without messages: as a HH "dialogue", or "bare", one question and its answer with nothing added."""
    if row.get("tools"):
        raise UserError(f"{place}: tools have no place in text. Use chat='messages'.")
    if "messages" in row:
        prompt, completion = _last_turn(row.pop("messages"))
        row |= {"prompt": prompt, "completion": completion}

    def prompt_text(messages: list[dict]) -> str:
        if chat == "dialogue":
            return dialogue_text(messages, place) + _MARK
        if [m["role"] for m in messages if m["role"] != "system"] != ["user"]:
            raise UserError(
                f"{place}: a dialogue of several turns is not bare text. Use chat='messages' or 'dialogue'."
            )
        return "\n\n".join(m["content"] for m in messages)

    def answer_text(messages: list[dict]) -> str:
        if chat == "dialogue":
            return dialogue_text(messages, place).removeprefix(_MARK)
        if len(messages) > 1 or messages[0].get("tool_calls"):
            raise UserError(f"{place}: an answer of several messages is not bare text. Use chat='messages'.")
        return messages[0]["content"]

    if isinstance(row.get("text"), list):
        row["text"] = dialogue_text(row["text"], place)
    if isinstance(row.get("prompt"), list):
        row["prompt"] = prompt_text(row["prompt"])
    if isinstance(row.get("completion"), list):
        row["completion"] = answer_text(row["completion"])
    if "responses" in row:
        row["responses"] = [answer_text(r) if isinstance(r, list) else r for r in row["responses"]]
    return row


def _last_turn(messages: list[dict]) -> tuple[list[dict], list[dict]]:
    """A conversation as what came before the assistant's last message, and that message."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last], [messages[last]]


# --- one function per format: (record, place, report) -> rows ---------------------------------------------


def _plain(record: dict, place: str, report: Report) -> Iterator[dict]:
    yield {"text": _text(record["text"], "text")}


def _prompt(record: dict, place: str, report: Report) -> Iterator[dict]:
    row = {"prompt": _spoken(record["prompt"], place)}
    if (answer := record.get("answer")) is not None:
        number = isinstance(answer, int | float) and not isinstance(answer, bool)
        row["answer"] = _text(str(answer) if number else answer, "answer")
    yield _usable({**row, **_tools(record)})


def _prompt_completion(record: dict, place: str, report: Report) -> Iterator[dict]:
    row = {"prompt": _spoken(record["prompt"], place), "completion": _spoken(record["completion"], place)}
    yield _usable({**row, **_tools(record)})


def _alike(row: dict) -> dict:
    """Prompt and answers all as text or all as messages: who speaks one that is text is plain. In place."""
    answers = row.get("responses", [row["completion"]] if "completion" in row else [])
    if any(isinstance(x, list) for x in (row["prompt"], *answers)):
        if isinstance(row["prompt"], str):
            row["prompt"] = _said("user", row["prompt"])
        answers = [_said("assistant", a) if isinstance(a, str) else a for a in answers]
        row.update(
            {"responses": answers} if "responses" in row else {"completion": answers[0]} if answers else {}
        )
    return row


def _usable(row: dict) -> dict:
    """The row, its prompt and answers alike, or Unfit when one is empty or spoken by the wrong role."""
    answers = row.get("responses", [row["completion"]] if "completion" in row else [])
    if any(isinstance(a, str) and not a.strip() for a in answers):
        raise Unfit("an answer is empty")
    for value, part in [(row["prompt"], "prompt"), *((a, "answer") for a in answers)]:
        if isinstance(value, list) and (fault := order_fault(value, part)):
            raise Unfit(fault)
    return _alike(row)


def _conversation(field: str) -> Callable:
    def convert(record: dict, place: str, report: Report) -> Iterator[dict]:
        messages = _spoken(record[field], place)
        if isinstance(messages, str):
            raise Unfit("messages are str, not a list")
        messages = _system(record) + messages
        if fault := order_fault(messages, "conversation"):
            raise Unfit(fault)
        yield {"messages": messages, **_tools(record)}

    return convert


def _system(record: dict) -> list[dict]:
    return _said("system", _text(record["system"], "system")) if record.get("system") else []


def _asked(record: dict) -> list[dict]:
    """Alpaca's instruction, with its input on the next line."""
    instruction, extra = (
        _text(record["instruction"], "instruction"),
        _text(record.get("input") or "", "input"),
    )
    return _said("user", f"{instruction}\n{extra}" if extra else instruction)


def _alpaca(record: dict, place: str, report: Report) -> Iterator[dict]:
    earlier = _parsed(record.get("history") or [])
    if not isinstance(earlier, list) or not all(isinstance(t, list) and len(t) == 2 for t in earlier):
        raise Unfit("'history' is not a list of [question, answer]")
    turns = [_said("user", _text(q, "history")) + _answer(_text(a, "history")) for q, a in earlier]
    prompt = _system(record) + list(chain.from_iterable(turns)) + _asked(record)
    yield {"prompt": prompt, "completion": _answer(_text(record["output"], "output"))}


def _self_instruct(record: dict, place: str, report: Report) -> Iterator[dict]:
    instances = _parsed(record["instances"])
    if not isinstance(instances, list) or not instances:
        raise Unfit("there are no instances")
    if not all(isinstance(i, dict) and "output" in i for i in instances):
        raise Unfit("'instances' is not a list of objects with 'input' and 'output'")
    for instance in instances:
        yield from _alpaca({"instruction": record["instruction"], **instance}, place, report)


def _gsm8k(record: dict, place: str, report: Report) -> Iterator[dict]:
    worked = _text(record["answer"], "answer")
    _, mark, answer = worked.rpartition("####")
    if not mark or not answer.strip():
        raise Unfit("the answer has no '#### N'")
    yield {
        "prompt": _said("user", _text(record["question"], "question")),
        "completion": _answer(worked),
        "answer": answer.strip().replace(",", ""),
    }


def _preference(record: dict, place: str, report: Report) -> Iterator[dict]:
    chosen, rejected = _spoken(record["chosen"], place), _spoken(record["rejected"], place)
    prompt = _spoken(record["prompt"], place) if record.get("prompt") is not None else None
    if chosen == rejected:
        raise Unfit("the answers are equal")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise Unfit("one answer is text and the other messages")
    if isinstance(chosen, str) and chosen.startswith("\n\nHuman:") and prompt is None:
        raise UserError(f"{place}: these are HH dialogues: format='hh' knows where their answers begin.")
    if prompt is None or (isinstance(chosen, list) and chosen[0]["role"] != "assistant"):
        prompt, chosen, rejected = _shared(chosen, rejected, prompt)
    row = _usable({"prompt": prompt, "responses": [chosen, rejected], "ranks": [1, 2], **_tools(record)})
    if record.get("score_chosen") is not None and record.get("score_rejected") is not None:
        row["scores"] = [_number(record[f"score_{which}"]) for which in ("chosen", "rejected")]
    yield row


def _shared(chosen: Any, rejected: Any, prompt: Any) -> tuple[Any, Any, Any]:
    """Prompt and answers of two texts, or two conversations, that begin alike.

    Texts are cut between words, so that answers which begin with the same letters keep them.
    """
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    same = min(len(chosen), len(rejected)) if same is None else same
    if isinstance(chosen, str):
        ends = all(answer[same : same + 1].isspace() for answer in (chosen, rejected))
        while same and not ends and not chosen[same - 1].isspace():
            same -= 1
        while same and chosen[same - 1].isspace():
            same -= 1
    else:
        while same and (chosen[same - 1]["role"] == "assistant" or same in (len(chosen), len(rejected))):
            same -= 1
    if not same:
        raise Unfit("the answers share no beginning that could be the prompt")
    shared = chosen[:same]
    if isinstance(prompt, str) and not any(m["content"] == prompt for m in shared):
        raise Unfit("the prompt is not what the conversations share")
    if isinstance(prompt, list) and shared[: len(prompt)] != prompt:
        raise Unfit("the prompt is not what the conversations share")
    return shared, chosen[same:], rejected[same:]


def _sharegpt_preference(record: dict, place: str, report: Report) -> Iterator[dict]:
    prompt = _system(record) + _dialogue(record["conversations"], place, "prompt")
    pair = {name: _dialogue(record[name], place, "answer") for name in ("chosen", "rejected")}
    yield from _preference({"prompt": prompt, **pair, "tools": record.get("tools")}, place, report)


def _hh(record: dict, place: str, report: Report) -> Iterator[dict]:
    row, why = split_dialogues(record["chosen"], record["rejected"])
    if row is None:
        raise Unfit(why)
    yield hh_messages(row, place)


def hh_messages(row: dict, place: str) -> dict:
    """A row of HH text in messages."""
    row = {**row, "prompt": dialogue_messages(row["prompt"], place)}
    if "completion" in row:
        row["completion"] = dialogue_messages(_MARK + row["completion"], place)
    if "responses" in row:
        row["responses"] = [dialogue_messages(_MARK + answer, place) for answer in row["responses"]]
    return row


def split_dialogues(chosen: Any, rejected: Any) -> tuple[dict | None, str]:
    """A preference row from two dialogues that differ in their last answer, or None and the reason."""
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return None, "not text"
    if any(not text.startswith("\n\nHuman:") or _MARK not in text for text in (chosen, rejected)):
        return None, "not a dialogue"
    (prompt, _, good), (other, _, bad) = chosen.rpartition(_MARK), rejected.rpartition(_MARK)
    if prompt != other:
        return None, "the dialogues differ before the last answer"
    if not good.strip() or not bad.strip():
        return None, "an answer is empty"
    if "\n\nHuman:" in good + bad:
        return None, "a dialogue ends with the human"
    if good == bad:
        return None, "the answers are equal"
    return {"prompt": prompt + _MARK, "responses": [good, bad], "ranks": [1, 2]}, ""


def _label(value: Any) -> bool:
    known = {"true": True, "false": False, "1": True, "0": False}
    if str(value).lower() not in known:
        raise Unfit(f"'label' is {value!r}, not true or false")
    return known[str(value).lower()]


def _binary(record: dict, place: str, report: Report) -> Iterator[dict]:
    for row in _prompt_completion(record, place, report):
        yield {**row, "label": _label(record["label"])}


def _messages_binary(record: dict, place: str, report: Report) -> Iterator[dict]:
    messages = _system(record) + _dialogue(record["messages"], place, "conversation")
    if messages[-1]["role"] != "assistant":
        raise Unfit(f"the dialogue ends with the {messages[-1]['role']}")
    prompt, completion = _last_turn(messages)
    yield {"prompt": prompt, "completion": completion, "label": _label(record["label"]), **_tools(record)}


def _stepwise(record: dict, place: str, report: Report) -> Iterator[dict]:
    """Every step is an answer to the prompt and the steps before it, on lines of their own."""
    steps, labels = _parsed(record["completions"]), _parsed(record["labels"])
    prompt = _text(record["prompt"], "prompt")
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels):
        raise Unfit("'completions' and 'labels' are not lists of one length")
    for step, label in zip(steps, labels, strict=True):
        yield {"prompt": prompt, "completion": _text(step, "completions"), "label": _label(label)}
        prompt += step + "\n"


def _steps(record: dict, place: str, report: Report) -> Iterator[dict]:
    steps, labels = _parsed(record["steps"]), _parsed(record["labels"])
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels):
        raise Unfit("'steps' and 'labels' are not lists of one length")
    if not steps or any(not _text(step, "steps").strip() for step in steps):
        raise Unfit("a step is empty")
    labels = [label if label is None else _number(label) for label in labels]
    if wrong := [label for label in labels if label is not None and not (0 <= label <= 1 or label == -1)]:
        raise Unfit(f"a label is {wrong[0]}, not 0 to 1")
    prompt = _spoken(record["prompt"], place)
    if isinstance(prompt, list) and (fault := order_fault(prompt, "prompt")):
        raise Unfit(fault)
    yield {"prompt": prompt, "steps": steps, "labels": labels, **_tools(record)}


def _ranking(record: dict, place: str, report: Report) -> Iterator[dict]:
    answers = _parsed(record["responses"])
    if not isinstance(answers, list) or len(answers) < 2:
        raise Unfit("'responses' are not at least two")
    ranks = _parsed(record["ranks"])
    row = {"prompt": _spoken(record["prompt"], place), "responses": [_spoken(a, place) for a in answers]}
    told = ("scores", "criteria", "labeler", "weight", "probability")
    more = {k: _parsed(record[k]) for k in told if record.get(k) is not None}
    yield _usable({**row, "ranks": ranks, **more, **_tools(record)})


def _qa(record: dict) -> tuple[list[dict], list[list[dict]], list[tuple[tuple[int, int], int]]]:
    """Question with its passages as the authors of Fine-Grained RLHF write them, answers, choices of pairs."""
    passages = _parsed(record["passages"])
    if not isinstance(passages, list) or not all(isinstance(p, list) and p for p in passages):
        raise Unfit("'passages' is not a list of [title, sentence, ...]")
    context = " ".join(
        f"wikipage: {title} text: {' '.join(_text(t, 'passages') for t in text)}" for title, *text in passages
    )
    prompt = _said("user", f"question: {_text(record['question'], 'question')} context: {context}")
    answers = [_answer(_text(record[f"prediction {k}"], f"prediction {k}")) for k in (1, 2, 3, 4)]
    choices = _parsed(record["preference"])
    if not isinstance(choices, list) or len(choices) != 6 or any(c not in (0, 1, 2) for c in choices):
        raise Unfit("'preference' is not six times 0, 1 or 2")
    return prompt, answers, list(zip(combinations(range(4), 2), choices, strict=True))


def _qa_feedback(record: dict, place: str, report: Report) -> Iterator[dict]:
    prompt, answers, choices = _qa(record)
    ranks = copeland_ranks(len(answers), choices)
    if any(_choice(ranks[i], ranks[j]) != choice for (i, j), choice in choices):
        report.change("the six choices fit no ranking: ranked by wins less losses", place)
    yield {"prompt": prompt, "responses": answers, "ranks": ranks}


def _qa_feedback_pairs(record: dict, place: str, report: Report) -> Iterator[dict]:
    prompt, answers, choices = _qa(record)
    for (i, j), choice in choices:
        yield {"prompt": prompt, "responses": [answers[i], answers[j]], "ranks": _PAIR_RANKS[choice]}


_PAIR_RANKS = {0: [1, 1], 1: [1, 2], 2: [2, 1]}  # a choice between two answers: 0 is neither


def _choice(first: int, second: int) -> int:
    return 0 if first == second else 1 if first < second else 2


def copeland_ranks(count: int, choices: Iterable[tuple[tuple[int, int], int]]) -> list[int]:
    """Ranks (1 is best) of `count` answers by wins less losses (Copeland 1951) of ((i, j), 0 | 1 | 2).

    Choices that fit a ranking with ties give back that ranking. Cycles make ties of those in them.
    """
    net = [0] * count
    for (i, j), choice in choices:
        sign = {0: 0, 1: 1, 2: -1}[choice]
        net[i] += sign
        net[j] -= sign
    return ranks_of(net)


def ranks_of(scores: list) -> list[int]:
    """Ranks without gaps: 1 for the highest score, equal scores share one."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) + 1 for score in scores]


_ANNOTATORS = ("annotator1", "annotator2", "annotator3")


def _vote(value: Any, name: str) -> int:
    if str(value) not in ("0", "1", "2"):
        raise Unfit(f"{name!r} is {value!r}, not 0, 1 or 2")
    return int(value)


def _pandalm_annotators(record: dict, place: str, report: Report) -> Iterator[dict]:
    answers = [_answer(_text(record[name], name)) for name in ("response1", "response2")]
    for name in _ANNOTATORS:
        ranks = _PAIR_RANKS[_vote(record[name], name)]
        yield {"prompt": _asked(record), "responses": answers, "ranks": ranks, "labeler": name}


def _pandalm(record: dict, place: str, report: Report) -> Iterator[dict]:
    first = next(_pandalm_annotators(record, place, report))
    ((choice, votes),) = Counter(_vote(record[name], name) for name in _ANNOTATORS).most_common(1)
    if votes == 1:
        choice = 0
        report.change("three annotators, three opinions: a tie", place)
    yield {"prompt": first["prompt"], "responses": first["responses"], "ranks": _PAIR_RANKS[choice]}


_PROMETHEUS = re.compile(
    r"###The instruction to evaluate:\n(?P<dialogue>.*?)\n+"
    r"###Response to evaluate:\n(?P<response>.*?)\n+"
    r"###Reference Answer \(Score 5\):\n(?P<reference>.*?)\n+"
    r"###Score Rubrics:\n(?P<rubric>\[(?P<criterion>.*?)\]\n.*?)\n+###Feedback:",
    re.DOTALL,
)


def _prometheus(record: dict, place: str, report: Report) -> Iterator[dict]:
    """The judged answer beside the reference answer, which by definition of the rubric has score 5."""
    parts = _PROMETHEUS.search(_text(record["instruction"], "instruction"))
    scores = _parsed(record["gpt4_score"])
    if not parts:
        raise Unfit("the instruction does not have Prometheus' sections")
    if not isinstance(scores, list) or not scores or not all(1 <= _number(s) <= 5 for s in scores):
        raise Unfit("'gpt4_score' is not a list of 1 to 5")
    values = [sum(map(_number, scores)) / len(scores), 5.0]
    yield {
        "prompt": _prometheus_prompt(parts["dialogue"]),
        "responses": [_answer(parts["response"]), _answer(parts["reference"])],
        "ranks": ranks_of(values),
        "scores": values,
        "criteria": {parts["criterion"]: values},
        "labeler": "gpt-4",
        "answer": parts["reference"],
        "rubric": parts["rubric"],
    }


def _prometheus_prompt(dialogue: str) -> list[dict]:
    """`User: ... Assistant: ... User: ... Assistant:` after an introduction, or one instruction alone."""
    introduction, mark, _ = dialogue.partition("User: ")
    if not mark or not introduction.startswith("Here is a previous dialogue"):
        return _said("user", dialogue)
    turns = re.split(r"(?:^|\n\n)(User|Assistant):", dialogue[len(introduction) :])[1:]
    spoken = [(who.lower(), text.strip()) for who, text in zip(turns[::2], turns[1::2], strict=True)]
    messages = [{"role": who, "content": text} for who, text in spoken if text]
    if fault := order_fault(messages, "prompt"):
        raise Unfit(fault)
    return messages


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise Unfit(f"{value!r} is not a number") from error


# --- the table --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """`fields` a record must have, the `kind` of rows that it gives, and how."""

    fields: tuple[str, ...]
    kind: str
    convert: Callable[[dict, str, Report], Iterator[dict]]
    optional: tuple[str, ...] = ()
    default: str = ""  # the kind when none is asked for, if it is not `kind`
    looks: Callable[[dict], bool] = lambda record: True  # tells formats with the same fields apart
    guess: bool = True  # format="auto" may choose it


def _is_hh(record: dict) -> bool:
    return isinstance(record["chosen"], str) and record["chosen"].startswith("\n\nHuman:")


_PAIRS = (
    "question",
    "passages",
    "prediction 1",
    "prediction 2",
    "prediction 3",
    "prediction 4",
    "preference",
)
_VOTES = ("instruction", "response1", "response2", *_ANNOTATORS)

FORMATS: Mapping[str, Format] = {
    "text": Format(("text",), "text", _plain),
    "prompt": Format(("prompt",), "prompt", _prompt, ("answer", "tools")),
    "prompt_completion": Format(("prompt", "completion"), "demonstration", _prompt_completion, ("tools",)),
    "messages": Format(("messages",), "demonstration", _conversation("messages"), ("tools", "system")),
    "sharegpt": Format(
        ("conversations",), "demonstration", _conversation("conversations"), ("tools", "system")
    ),
    "alpaca": Format(("instruction", "output"), "demonstration", _alpaca, ("input", "system", "history")),
    "self_instruct": Format(("instruction", "instances"), "demonstration", _self_instruct),
    "gsm8k": Format(
        ("question", "answer"), "demonstration", _gsm8k, (), "prompt", lambda r: "####" in str(r["answer"])
    ),
    "preference": Format(
        ("chosen", "rejected"),
        "preference",
        _preference,
        ("prompt", "score_chosen", "score_rejected", "tools"),
        looks=lambda r: "prompt" in r or not _is_hh(r),
    ),
    "hh": Format(("chosen", "rejected"), "preference", _hh, looks=_is_hh),
    "sharegpt_preference": Format(
        ("conversations", "chosen", "rejected"), "preference", _sharegpt_preference, ("tools", "system")
    ),
    "ranking": Format(("prompt", "responses", "ranks"), "preference", _ranking, OPTIONAL["preference"]),
    "binary": Format(("prompt", "completion", "label"), "binary", _binary, ("tools",)),
    "messages_binary": Format(("messages", "label"), "binary", _messages_binary, ("tools", "system")),
    "stepwise": Format(("prompt", "completions", "labels"), "binary", _stepwise),
    "steps": Format(("prompt", "steps", "labels"), "steps", _steps, ("tools",)),
    "qa_feedback": Format(_PAIRS, "preference", _qa_feedback),
    "qa_feedback_pairs": Format(_PAIRS, "preference", _qa_feedback_pairs, guess=False),
    "pandalm": Format(_VOTES, "preference", _pandalm, ("input",)),
    "pandalm_annotators": Format(_VOTES, "preference", _pandalm_annotators, ("input",), guess=False),
    "prometheus": Format(("instruction", "gpt4_score"), "preference", _prometheus),
}

# What rows of a kind can be read as: preferences teach by their best answer, and all but texts have prompts.
KINDS_FROM: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "prompt": ("prompt",),
    "demonstration": ("demonstration", "prompt"),
    "preference": ("preference", "demonstration", "prompt"),
    "binary": ("binary", "demonstration", "prompt", "steps"),  # an outcome is the label of an only step
    "steps": ("steps", "prompt"),
}
_ONLY_PREFERENCE = ("responses", "ranks", "scores", "criteria", "labeler", "weight", "probability")


def _as_kind(row: dict, kind: str, wanted: str) -> dict:
    if kind == wanted:
        return row
    if "messages" in row:  # a conversation, of which the prompt is all before the last answer
        return {"prompt": _last_turn(row["messages"])[0], **{k: v for k, v in row.items() if k == "tools"}}
    if wanted == "prompt":
        answers = (*_ONLY_PREFERENCE, "completion", "label", "steps", "labels")
        return {k: v for k, v in row.items() if k not in answers}
    if wanted == "steps":
        answer = row["completion"]
        if isinstance(answer, list):
            if len(answer) > 1 or answer[0].get("tool_calls"):
                raise Unfit("an answer of several messages is no step")
            answer = answer[0]["content"]
        rest = {k: v for k, v in row.items() if k not in ("completion", "label")}
        return {**rest, "steps": [answer], "labels": [float(row["label"])]}
    if kind == "binary":
        if not row["label"]:
            raise Unfit("an undesirable answer is no demonstration")
        return {k: v for k, v in row.items() if k != "label"}
    if row["ranks"].count(1) > 1:
        raise Unfit("no single best answer to demonstrate")
    best = row["responses"][row["ranks"].index(1)]
    return {**{k: v for k, v in row.items() if k not in _ONLY_PREFERENCE}, "completion": best}


def formats_that_fit(record: Any, kind: str = "") -> list[str]:
    """The formats whose fields `record` has (and that give `kind`), those that use most of its fields."""
    if not isinstance(record, dict):
        return []
    fit = [
        name
        for name, form in FORMATS.items()
        if form.guess
        and all(record.get(f) is not None for f in form.fields)
        and form.looks(record)
        and kind in ("", *KINDS_FROM[form.kind])
    ]
    most = max((len(FORMATS[name].fields) for name in fit), default=0)
    return [name for name in fit if len(FORMATS[name].fields) == most]


def suggestion(record: Any, kind: str = "") -> str:
    """` format='...' would fit.`, or nothing."""
    fit = formats_that_fit(record, kind) or formats_that_fit(record)
    return f" format={fit[0]!r} would fit." if fit else ""


def _uses_more(record: Any, format: str) -> str:
    """A format that fits a record of `format` and uses more of its fields: perhaps what was meant; or ""."""
    used = {*FORMATS[format].fields}
    fit = [name for name in formats_that_fit(record) if used < {*FORMATS[name].fields}]
    return fit[0] if fit and used <= {*record} else ""


def guess_format(record: Any, kind: str, place: str) -> str:
    """What `format="auto"` chooses, by the fields of the first record; UserError unless exactly one fits."""
    fit = formats_that_fit(record, kind)
    if len(fit) == 1:
        return fit[0]
    found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
    if fit:
        raise UserError(f"{place}: format='auto': {' and '.join(fit)} fit the fields {found}. Name the one.")
    raise UserError(
        f"{place}: format='auto': no format fits the fields {found}{f' for kind {kind!r}' if kind else ''}. "
        f"Map them by `columns`. Known formats: {', '.join(FORMATS)}."
    )


def check_format(format: str, kind: str, chat: str, columns: Mapping[str, str], where: str) -> None:
    """UserError for names that do not exist or do not go together; reads nothing."""
    known = ("rows", "auto", *FORMATS)
    if format not in known:
        raise UserError(f"{where}: unknown format {format!r}.{did_you_mean(format, known)}")
    if chat not in CHATS:
        raise UserError(f"{where}: unknown chat {chat!r}.{did_you_mean(chat, CHATS)}")
    if kind and kind not in SCHEMAS:
        raise UserError(f"{where}: unknown kind {kind!r}.{did_you_mean(kind, SCHEMAS)}")
    if format == "rows" and not kind:
        raise UserError(
            f"{where}: name the kind of rows ({', '.join(SCHEMAS)}), or a format ({', '.join(known[1:])})."
        )
    if format in FORMATS and kind and kind not in KINDS_FROM[FORMATS[format].kind]:
        kinds = ", ".join(KINDS_FROM[FORMATS[format].kind])
        raise UserError(f"{where}: format {format!r} has no {kind!r} rows. It has: {kinds}.")
    if format == "rows":
        names = (*SCHEMAS[kind], *OPTIONAL.get(kind, ()))
        names += ("chosen", "rejected") if kind == "preference" else ()
        of = f"a {kind}"
    elif format in FORMATS:
        kind = kind or FORMATS[format].default or FORMATS[format].kind
        names = (*FORMATS[format].fields, *FORMATS[format].optional)
        of = f"format {format!r}"
    else:  # auto: columns are renamed first, to whatever format they then fit
        return
    for name in columns:
        if name not in names and kind != "prompt":  # a reward may want any further field of a prompt row
            raise UserError(f"{where}: columns: {name!r} is no field of {of}.{did_you_mean(name, names)}")


# --- records to rows --------------------------------------------------------------------------------------


def read_records(
    records: Records, format: str, kind: str, chat: str, columns: Mapping[str, str], report: Report
) -> Iterator[dict]:
    """Rows of `kind` ("": what the format gives) from the records of a file or hub dataset."""
    if format != "rows":
        first = next(records, None)
        if first is None:
            return
        place, record = first
        renamed = {**record, **_picked(record, columns, place)} if isinstance(record, dict) else record
        if format == "auto":
            format = guess_format(renamed, kind, place)
            report.notes.append(f"format {format!r} by the fields {', '.join(FORMATS[format].fields)}")
        elif better := _uses_more(renamed, format):
            report.notes.append(f"format {better!r} would also use {', '.join(FORMATS[better].fields)}")
        records = chain([first], records)
    for place, record in records:
        if format == "rows":
            yield to_row(record, kind, columns, place, chat)
            continue
        try:
            yield from _converted(record, format, kind, chat, columns, place, report)
        except Unfit as unfit:
            report.drop(str(unfit), place)


def _converted(
    record: Any, format: str, kind: str, chat: str, columns: Mapping[str, str], place: str, report: Report
) -> Iterator[dict]:
    """The rows of one record; Unfit when it cannot be used."""
    form = FORMATS[format]
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected an object with fields, got {type(record).__name__}.")
    wanted = kind or form.default or form.kind
    picked = _picked(record, columns, place)
    full = {**record, **picked}
    if missing := [name for name in form.fields if name not in full]:
        optional = f" (and may have {', '.join(form.optional)})" if form.optional else ""
        raise UserError(
            f"{place}: no field {missing[0]!r}. format={format!r} expects {', '.join(form.fields)}{optional}; "
            f"found {', '.join(record)}.{suggestion(full, kind) or did_you_mean(missing[0], record)}"
        )
    if null := [name for name in form.fields if full[name] is None]:
        raise Unfit(f"{null[0]!r} is null")
    extra = {k: v for k, v in picked.items() if k not in (*form.fields, *form.optional)}
    for row in list(form.convert(full, place, report)):  # unfit as a whole, or not at all
        try:
            row = {**_as_kind(row, form.kind, wanted), **extra}
        except Unfit as unfit:
            report.drop(str(unfit), place)
            continue
        yield check_row(row if chat == "messages" else _as_text(row, chat, place), wanted, place)


def to_row(record: Any, kind: str, columns: Mapping[str, str], place: str, chat: str = "messages") -> dict:
    """Turn a record that has our fields, once `columns` has mapped them, into a row of `kind`; others stay.

    `a.b.0` reaches into objects and lists. `chosen` and `rejected` become `responses` and `ranks`.
    """
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected an object with fields, got {type(record).__name__}.")
    row = {**record, **_picked(record, columns, place)}
    try:
        _spell_alike(row, kind, place)
    except Unfit as unfit:
        raise UserError(f"{place}: {unfit}.") from unfit
    if chat != "messages":
        row = _as_text(row, chat, place)
    conversation = kind == "demonstration" and "messages" in row
    for name in () if conversation else SCHEMAS[kind]:
        if name not in row:
            hint = suggestion(record, kind)
            raise UserError(
                f"{place}: no field {name!r}.{did_you_mean(name, row)} `columns` maps fields.{hint}"
            )
    try:
        return check_row(row, kind, place)
    except UserError as error:
        if "chosen" in record:  # whole conversations, or HH dialogues, where the answers alone were expected
            raise UserError(f"{error}{suggestion(record, kind)}") from error
        raise


def _spell_alike(row: dict, kind: str, place: str) -> None:
    """Messages in our spelling, a pair as a ranking; in place."""
    if kind == "preference" and "responses" not in row and ("chosen" in row or "rejected" in row):
        row["responses"] = [require(row, "chosen", place), require(row, "rejected", place)]
        row["ranks"] = [1, 2]
        del row["chosen"], row["rejected"]
    fields = (*SCHEMAS[kind], *OPTIONAL.get(kind, ()))
    for name in ("text", "prompt", "completion", "messages"):
        if name in fields and isinstance(row.get(name), list | dict):
            row[name] = to_messages(row[name], place)
    if "responses" in fields and isinstance(row.get("responses"), list):
        row["responses"] = [
            to_messages(r, place) if isinstance(r, list | dict) else r for r in row["responses"]
        ]
    if "tools" in fields and "tools" in row:
        tools = _tools(row)
        del row["tools"]
        row |= tools
    if kind in ("demonstration", "preference", "binary") and "prompt" in row:
        answers = {"preference": "responses"}.get(kind, "completion")
        if isinstance(row.get(answers), str | list):
            row |= _alike({"prompt": row["prompt"], answers: row[answers]})


def _picked(record: dict, columns: Mapping[str, str], place: str) -> dict:
    return {ours: pick(record, theirs, place) for ours, theirs in columns.items()}


def pick(record: dict, path: str, place: str) -> Any:
    """The value at `a.b.0` in a record; UserError with the nearest name when there is none."""
    if path in record:  # a field whose own name holds a dot
        return record[path]
    value: Any = record
    for key in path.split("."):
        if isinstance(value, list) and key.lstrip("-").isdigit():
            if not -len(value) <= int(key) < len(value):
                raise UserError(f"{place}: column {path!r}: a list of {len(value)} has no entry {key}.")
            value = value[int(key)]
        elif isinstance(value, dict) and key in value:
            value = value[key]
        else:
            known = value if isinstance(value, dict) else ()
            raise UserError(f"{place}: no column {path!r}.{did_you_mean(key, known)}")
    return value
