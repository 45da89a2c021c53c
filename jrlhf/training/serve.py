"""Using a trained model: generate, chat, export."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

from jrlhf.checkpoint import load_meta
from jrlhf.config import MeshConfig, UserError, from_dict, read_json
from jrlhf.data.batching import encode_prompt
from jrlhf.data.chat import Message
from jrlhf.data.tokenizer import Tokenizer, load_tokenizer
from jrlhf.models.config import ModelConfig
from jrlhf.models.hf import load_hf, resolve_checkpoint, save_hf
from jrlhf.models.hf_config import read_object
from jrlhf.models.peft import PEFT_CONFIG, save_peft
from jrlhf.rollout.rollout import response_ids
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.rollout.stops import cut_at_stop
from jrlhf.sharding import fetch, make_mesh
from jrlhf.training.artifacts import Loaded, has_model, load_adapter, load_model
from jrlhf.training.evaluation import Sampler, prompt_slots

ONE_DEVICE = MeshConfig(data=1)


def generate(
    path: Path,
    prompts: Sequence[str],
    *,
    n: int,
    console: Console,
    seed: int,
    raw: bool = False,
    stream: bool = False,
    **sampling: Any,
) -> dict[str, list[list[str]]]:
    """Print and return `n` answers to each prompt: of one model, or of every policy of a run folder.

    What is printed says which policy, prompt and answer it is, where there are several. Where a model's tokenizer has
    a chat template a prompt is a user's message, unless it is `raw`. Words that a tokenizer does not know are named
    on stderr. With `stream` an answer is printed as it is written; there is one to each prompt then (UserError).
    """
    if stream and n > 1:
        raise UserError(f"stream: shows one answer to a prompt as it is written, and n is {n}")
    models = policies(path)
    typist = Typist(console) if stream else None
    answers: dict[str, list[list[str]]] = {}
    warned: set[str] = set()
    for name, folder in models.items():
        loaded = load_any(folder)
        if len(models) > 1:
            console.print(Text(name, style="bold"), soft_wrap=True)
        for prompt in prompts:
            if warning := about_unknown_words(loaded.tokenizer, prompt, warned):
                print(warning, file=sys.stderr)
            turn = [{"role": "user", "content": prompt}] if chats(loaded) and not raw else prompt
            if len(prompts) > 1:
                console.print(Text(f"> {prompt}", style="dim"), soft_wrap=True)
            given = respond(loaded, turn, n, seed, typist=typist, **sampling)
            answers.setdefault(name, []).append(given)
            if typist is not None:
                typist.finish(given[0])
                continue
            for number, answer in enumerate(given, 1):
                console.print(Text(f"{number}: {answer}" if n > 1 else answer), soft_wrap=True)
    return answers


def chats(loaded: Loaded) -> bool:
    return loaded.tokenizer.chat_template is not None


def chat(
    path: Path, *, console: Console, seed: int, raw: bool = False, system: str = "", **sampling: Any
) -> None:
    """Read lines from the terminal and answer each; a run folder answers with its last policy.

    Where the model's tokenizer has a chat template, lines are a user's messages of one conversation, which
    begins with the `system` message if there is one. Without a template, or `raw`, a line is a prompt by
    itself, and `/dialogue` keeps the conversation in the form of the HH data
    (`\\n\\nHuman: ... \\n\\nAssistant:`). `/new` forgets it, `/quit` or end of file leaves.
    Answers are printed as they are written.
    """
    name, folder = list(policies(path).items())[-1]
    loaded = load_any(folder)
    converse: Conversation | Lines
    if chats(loaded) and not raw:
        converse = Conversation([{"role": "system", "content": system}] if system else [])
        hello = "type a message; /new begins another conversation, /quit leaves"
    elif system:
        raise UserError("--system: without a chat template there is no system message")
    else:
        converse = Lines()
        hello = "type a prompt; /dialogue keeps the conversation, /new forgets it, /quit leaves"
    console.print(Text(f"{name}: {hello}"), soft_wrap=True)
    warned: set[str] = set()
    typist = Typist(console)
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        if (said := converse.command(line)) is not None:
            console.print(said)
            continue
        if not line:
            continue
        if warning := about_unknown_words(loaded.tokenizer, line, warned):
            console.print(Text(warning, style="yellow"), soft_wrap=True)
        seed += 1
        try:
            answer = respond(loaded, converse.prompt(line), 1, seed, typist=typist, **sampling)[0]
        except UserError as error:  # too long for the context: say so and go on
            forget = ". /new forgets what was said before" if converse.remembers else ""
            console.print(Text(f"{error}{forget}", style="red"), soft_wrap=True)
            continue
        typist.finish(answer)
        converse.keep(line, answer)


class Typist:
    """Prints one answer after another, each as it is written: the `stream` of a `rollout` of one row."""

    def __init__(self, console: Console):
        self._console = console
        self._text: Callable[[list[int]], str] = lambda ids: ""
        self._stop: Sequence[str] = ()
        self._ids: list[int] = []
        self._printed = ""

    def begin(self, text: Callable[[list[int]], str], stop: Sequence[str]) -> None:
        """An answer begins, whose tokens' text, cut at a stop string, is `text(ids)`."""
        self._text, self._stop, self._ids, self._printed = text, stop, [], ""

    def __call__(self, rows: np.ndarray, tokens: np.ndarray, real: np.ndarray) -> None:
        self._ids += np.asarray(tokens)[np.asarray(real)].tolist()
        self._print(settled(self._text(self._ids), self._stop))

    def finish(self, answer: str) -> None:
        """Print what is left of the answer, and end its line."""
        self._print(answer)
        self._console.out()
        self._printed = ""

    def _print(self, text: str) -> None:
        # Some tokenizers take a character back where a wrong byte follows it: what is printed stays.
        if new := text[len(self._printed) :]:
            self._console.out(new, end="", highlight=False)
            self._printed = text


def settled(text: str, stop: Sequence[str]) -> str:
    """The beginning of a text that more tokens will not change: whole characters, and nothing that may yet become a
    stop string."""
    text = text.rstrip("\ufffd")  # bytes of a character that is not complete
    begun = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    return text[: len(text) - max(begun, default=0)]


class Conversation:
    """What was said so far, as messages."""

    def __init__(self, beginning: list[Message]):
        self._beginning, self._messages = beginning, beginning

    @property
    def remembers(self) -> bool:
        return len(self._messages) > len(self._beginning)

    def command(self, line: str) -> str | None:
        """What to tell the user where the line is a command, which is then done."""
        if line != "/new":
            return None
        self._messages = self._beginning
        return "nothing is remembered"

    def prompt(self, line: str) -> list[Message]:
        return [*self._messages, {"role": "user", "content": line}]

    def keep(self, line: str, answer: str) -> None:
        self._messages = [*self.prompt(line), {"role": "assistant", "content": answer}]


class Lines:
    """Prompts of one line each, or a dialogue in plain text."""

    def __init__(self) -> None:
        self._dialogue, self._history = False, ""

    @property
    def remembers(self) -> bool:
        return bool(self._history)

    def command(self, line: str) -> str | None:
        if line not in ("/dialogue", "/new"):
            return None
        self._dialogue, self._history = (not self._dialogue if line == "/dialogue" else self._dialogue), ""
        return f"conversation {'on' if self._dialogue else 'off'}, nothing is remembered"

    def prompt(self, line: str) -> str:
        return f"{self._history}\n\nHuman: {line}\n\nAssistant:" if self._dialogue else line

    def keep(self, line: str, answer: str) -> None:
        if self._dialogue:
            self._history = f"{self.prompt(line)} {answer.strip()}"


def about_unknown_words(tokenizer: Tokenizer, text: str, warned: set[str]) -> str:
    """A warning that names the words of `text` that `tokenizer` does not know, "" where there is none.

    Words that were `warned` of before are left out, and these are added to them.
    """
    stranger = "\ue000"  # of Unicode's private use: no text has it
    unknown = tokenizer.encode(stranger)
    if tokenizer.decode(unknown).strip() == stranger:
        return ""  # it writes everything, by bytes
    words = [
        word
        for word in dict.fromkeys(text.split())
        if word not in warned and (ids := tokenizer.encode(word)) and {*ids} <= {*unknown}
    ]
    warned.update(words)
    if not words:
        return ""
    verb = "is no word" if len(words) == 1 else "are no words"
    return f"{', '.join(words)}: {verb} of this model's tokenizer, and will be read as unknown"


def export(path: Path, out: Path, overwrite: bool = False) -> None:
    """Write a stage's model as a Hugging Face checkpoint; of a stage with adapters, the merged one.

    With `overwrite` it replaces a checkpoint in `out`; a folder that holds anything else is a UserError.
    """
    folder = only_model(path)
    head = load_meta(folder / "model")["head"]
    mesh = make_mesh(ONE_DEVICE, jax.devices()[:1])
    loaded = load_model(folder, mesh, head)
    t = loaded.tokenizer
    save_hf(
        out,
        loaded.model,
        loaded.params,
        folder / "tokenizer",
        eos_ids=t.eos_ids,
        pad_id=t.pad_id,
        bos_id=t.bos_id,
        overwrite=overwrite,
    )


def export_adapter(path: Path, out: Path, base: str = "", overwrite: bool = False) -> str:
    """Write the adapter of a stage that was trained with `lora` in PEFT's format; returns the name of its base.

    base: the folder or hub name of the base as a Hugging Face checkpoint. "" is the checkpoint that the stage began
    with. Where it began with another stage, or a changed checkpoint, that has to be exported and its folder named:
    UserError otherwise. With `overwrite` an adapter in `out` is replaced.
    """
    if not overwrite and out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: exists and is not empty; name a new folder, or ask to overwrite it")
    if base and has_model(Path(base)):
        raise UserError(f"--base: {_TO_EXPORT.format(stage=base)}")
    folder = only_model(path)
    if not (folder / "adapter" / "model.json").is_file():
        raise UserError(
            f"{path}: has no adapter, because it was not trained with `lora`. Without --adapter its model is exported"
        )
    beside = Path(load_meta(folder / "adapter")["base"])
    name = base or base_checkpoint(folder.parent / beside)
    if not name:
        told = _TO_EXPORT.format(stage=folder.parent / beside)
        raise UserError(f"{path}: its adapter lies beside another stage. {told}")
    config = from_dict(ModelConfig, load_meta(folder / "model")["model"], f"{folder}/model")
    found = load_adapter(folder, beside, config, make_mesh(ONE_DEVICE, jax.devices()[:1]))
    assert found is not None  # there is one, and the base is its own
    save_peft(out, *found, name)
    return name


_TO_EXPORT = (
    "{stage} is a stage's folder, which peft cannot read: first `jrlhf export {stage} FOLDER`, then give "
    "`--base FOLDER`"
)


def base_checkpoint(folder: Path) -> str:
    """The checkpoint (path or hub name) that a `Checkpoint` stage took over with its weights unchanged, else ""."""
    stage = read_json(folder / "config.json")["stage"]
    changed = stage.get("adapter") or stage.get("grow_vocabulary")
    return stage["path"] if stage["type"] == "Checkpoint" and not changed else ""


def policies(path: Path) -> dict[str, Path]:
    """name -> folder of the language models at `path`: a stage folder, a run folder, a checkpoint or hub name."""
    if has_model(path):
        return {path.name: path}
    if (path / "stages.json").is_file():
        stages = json.loads((path / "stages.json").read_text(encoding="utf-8"))
        folders = {name: path.parent / next(iter(seeds.values())) for name, seeds in stages.items()}
        found = {
            name: folder
            for name, folder in folders.items()
            if has_model(folder) and load_meta(folder / "model")["head"] == "lm"
        }
        if not found:
            raise UserError(f"{path}: no stage of this run has a finished language model")
        return found
    folder = resolve_checkpoint(path)
    if (folder / PEFT_CONFIG).is_file() and not (folder / "config.json").is_file():
        base = read_object(folder / PEFT_CONFIG).get("base_model_name_or_path") or "path/to/base"
        raise UserError(
            f"{path}: is an adapter, which answers only beside its base. Make a stage of both in an experiment, "
            f"Checkpoint({str(base)!r}, adapter={str(path)!r}), run it and name RUN:STAGE"
        )
    return {str(path): folder}


def only_model(path: Path) -> Path:
    if not has_model(path):
        hint = " Name one of its stages: RUN:STAGE." if (path / "stages.json").is_file() else ""
        raise UserError(f"{path}: not a stage folder with a finished model.{hint}")
    return path


def load_any(folder: Path) -> Loaded:
    """A finished stage, or a Hugging Face checkpoint, on one device."""
    mesh = make_mesh(ONE_DEVICE, jax.devices()[:1])
    if has_model(folder):
        return load_model(folder, mesh)
    model, params = load_hf(folder)
    return Loaded(model, params, load_tokenizer(folder), {})


def respond(
    loaded: Loaded,
    prompt: str | list[Message],
    n: int,
    seed: int,
    max_new_tokens: int | None = None,
    typist: Typist | None = None,
    **sampling: Any,
) -> list[str]:
    """`n` answers to one prompt, each as long as fits (at most 256 tokens) unless a length is given.

    A text is taken as it stands; messages go through the chat template. An answer ends before a stop string. A `typist`
    prints the only answer while it is written, for which it is told `finish` afterwards.

    Raises UserError when prompt and answer do not fit the context.
    """
    context = loaded.model.config.context
    if (max_new_tokens or 1) >= context:
        raise UserError(f"max_new_tokens {max_new_tokens} leaves no room in the context of {context}")
    row = prompt if isinstance(prompt, str) else {"prompt": prompt}
    encoded = encode_prompt(row, loaded.tokenizer, sys.maxsize)
    if encoded is None or not len(encoded):
        raise UserError("the prompt is empty, and this tokenizer begins texts with nothing")
    if len(encoded) + (max_new_tokens or 1) > context:
        beside = f" beside an answer of {max_new_tokens}" if max_new_tokens else ""
        raise UserError(
            f"the prompt is too long: its {len(encoded)} tokens do not fit the model's context of {context}{beside}"
        )
    ids = [encoded.tolist()]
    config = SamplingConfig(max_new_tokens or min(256, context - len(encoded)), **sampling)
    mesh = make_mesh(ONE_DEVICE, jax.devices()[:1])
    # In coarse steps, so that the next turn of a conversation mostly finds its program compiled.
    slots = -(-prompt_slots(ids) // 64) * 64
    sampler = Sampler(loaded.model, loaded.tokenizer, mesh, config, slots)

    def text(ids: list[int]) -> str:
        return cut_at_stop(loaded.tokenizer.decode(ids), config.stop)

    key = jax.random.key(seed)
    if typist is None:
        samples = sampler.sample(loaded.params, ids, key, group=n)
    else:
        typist.begin(text, config.stop)
        samples = fetch(sampler.draw(loaded.params, ids, key, stream=typist))
        jax.effects_barrier()
    return [text(row) for row in response_ids(samples)]
