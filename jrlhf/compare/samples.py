"""A few prompts with every policy's answer, for reading in the terminal."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jrlhf.compare.summary import listed, signed
from jrlhf.config import read_json


def print_samples(console: Console, evaluation: Path, count: int = 4) -> None:
    """The first `count` sampled prompts of an `evaluation.json`: each policy's answer and its gold reward."""
    content = read_json(evaluation)
    samples = content["samples"][:count]
    for sample in samples:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("  policy")
        table.add_column("gold", justify="right")
        table.add_column("answer")
        for policy, answer in sample["answers"].items():
            table.add_row(
                f"  {policy}", f"[bold]{signed(answer['gold'])}[/]", Text(" ".join(answer["text"].split()))
            )
        console.print()
        console.print(Text(" ".join(sample["prompt"].split()), style="italic"))
        console.print(table)
    silent = [name for name in content["policies"] if samples and name not in samples[0]["answers"]]
    if silent:
        console.print(Text(f"(of {listed(silent)} the evaluation keeps scores and no texts)", style="dim"))
    console.print()
