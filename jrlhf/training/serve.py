"""Using a trained model: generate, chat, export."""

import json
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.text import Text

from jrlhf.checkpoint import load_meta
from jrlhf.config import MeshConfig, UserError
from jrlhf.data.batching import encode_prompt
from jrlhf.data.chat import Message
from jrlhf.data.tokenizer import load_tokenizer
from jrlhf.models.hf import load_hf, resolve_checkpoint, save_hf
from jrlhf.rollout.rollout import response_ids
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import Loaded, has_model, load_model
from jrlhf.training.evaluation import Sampler, prompt_slots

ONE_DEVICE = MeshConfig(data=1)


def generate(
    path: Path, prompt: str, *, n: int, console: Console, seed: int, raw: bool = False, **sampling: Any
) -> dict[str, list[str]]:
    """Print and return `n` answers to a prompt: of one model, or of every policy of a run folder.

    Where a model's tokenizer has a chat template the prompt is a user's message, unless it is `raw`.
    """
    models = policies(path)
    answers = {}
    for name, folder in models.items():
        loaded = load_any(folder)
        turn = [{"role": "user", "content": prompt}] if chats(loaded) and not raw else prompt
        answers[name] = respond(loaded, turn, n, seed, **sampling)
        if len(models) > 1:
            console.print(f"[bold]{name}[/]")
        for answer in answers[name]:
            console.print(Text(answer), soft_wrap=True)
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
    """
    name, folder = list(policies(path).items())[-1]
    loaded = load_any(folder)
    converse: Conversation | Lines
    if chats(loaded) and not raw:
        converse = Conversation([{"role": "system", "content": system}] if system else [])
        console.print(f"{name}: type a message; /new begins another conversation, /quit leaves")
    elif system:
        raise UserError("--system: without a chat template there is no system message")
    else:
        converse = Lines()
        console.print(
            f"{name}: type a prompt; /dialogue keeps the conversation, /new forgets it, /quit leaves"
        )
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
        seed += 1
        try:
            answer = respond(loaded, converse.prompt(line), 1, seed, **sampling)[0]
        except UserError as error:  # too long for the context: say so and go on
            console.print(f"[red]{error}[/]")
            continue
        console.print(Text(answer))
        converse.keep(line, answer)


class Conversation:
    """What was said so far, as messages."""

    def __init__(self, beginning: list[Message]):
        self._beginning, self._messages = beginning, beginning

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


def export(path: Path, out: Path) -> None:
    """Write a stage's model as a Hugging Face checkpoint."""
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
    )


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
    return {str(path): resolve_checkpoint(path)}


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
    **sampling: Any,
) -> list[str]:
    """`n` answers to one prompt, each as long as fits (at most 256 tokens) unless a length is given.

    A text is taken as it stands; messages go through the chat template.

    Raises UserError when prompt and answer do not fit the context.
    """
    context = loaded.model.config.context
    if (max_new_tokens or 1) >= context:
        raise UserError(f"max_new_tokens {max_new_tokens} leaves no room in the context of {context}")
    row = prompt if isinstance(prompt, str) else {"prompt": prompt}
    encoded = encode_prompt(row, loaded.tokenizer, context - (max_new_tokens or 1))
    if encoded is None or not len(encoded):
        raise UserError("the prompt is empty, and this tokenizer begins texts with nothing")
    ids = [encoded.tolist()] * n
    config = SamplingConfig(max_new_tokens or min(256, context - len(encoded)), **sampling)
    mesh = make_mesh(ONE_DEVICE, jax.devices()[:1])
    sampler = Sampler(loaded.model, loaded.tokenizer, mesh, config, prompt_slots(ids))
    samples = sampler.sample(loaded.params, ids, jax.random.key(seed))
    return [loaded.tokenizer.decode(row) for row in response_ids(samples)]
