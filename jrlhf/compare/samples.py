"""A few prompts with every policy's answer, for reading in the terminal."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jrlhf.config import read_json


def print_samples(console: Console, evaluation: Path, count: int = 4) -> None:
    """The first `count` sampled prompts of an `evaluation.json`: each policy's answer and its gold reward."""
    for sample in read_json(evaluation)["samples"][:count]:
        table = Table(show_header=False, box=None, pad_edge=False)
        for policy, answer in sample["answers"].items():
            table.add_row(
                f"  {policy}", f"[bold]{answer['gold']:+.2f}[/]", Text(" ".join(answer["text"].split()))
            )
        console.print()
        console.print(Text(" ".join(sample["prompt"].split()), style="italic"))
        console.print(table)
    console.print()
