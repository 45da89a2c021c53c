"""The code of docs/add-an-algorithm.md is run: algorithms are added as it says, and its experiments stepped once."""

import gc
import re
import shutil
import sys
import textwrap
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from test_experiments import one_device, shrink  # noqa: F401 - a fixture

from jrlhf import algorithms
from jrlhf.experiment import load_experiment, run, stage_folders
from jrlhf.metrics import read_metrics

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "add-an-algorithm.md").read_text(encoding="utf-8")
# [(file that the text names last before it, code)]
BLOCKS = [
    (
        re.findall(r"`((?:jrlhf|experiments)/[\w/]+\.py)`", TEXT[: found.start()])[-1],
        textwrap.dedent(found[1]),
    )
    for found in re.finditer(r"```python\n(.*?)```", TEXT, re.DOTALL)
]


def line_of(name: str) -> tuple[str, str, str]:
    """(dict, config, make function) of the line that the text has for an algorithm's file."""
    after = TEXT[TEXT.index(f"`jrlhf/algorithms/{name}.py`") :]
    return re.search(r"`(FROM_\w+)`.*?`(\w+Config): (make_\w+)`", after, re.DOTALL).groups()


def test_the_text_has_two_algorithms():
    assert [file for file, _ in BLOCKS] == [
        "jrlhf/algorithms/dpop.py",
        "experiments/larder/dpop.py",
        "jrlhf/algorithms/sapo.py",
        "experiments/larder/sapo.py",
    ]


@pytest.mark.parametrize("name", ["dpop", "sapo"])
def test_an_algorithm_is_one_file_and_one_line(name, tmp_path, monkeypatch, one_device):  # noqa: F811
    code = dict(BLOCKS)
    assert not hasattr(algorithms, name), "the example is in the package by now: choose another"
    module = types.ModuleType(f"jrlhf.algorithms.{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code[f"jrlhf/algorithms/{name}.py"], f"{name}.py", "exec"), module.__dict__)
    registry, config, make = line_of(name)
    monkeypatch.setitem(getattr(algorithms, registry), getattr(module, config), getattr(module, make))

    for file in (ROOT / "experiments" / "larder").glob("*.py"):
        shutil.copy(file, tmp_path)
    (tmp_path / f"{name}.py").write_text(code[f"experiments/larder/{name}.py"], encoding="utf-8")
    experiment = shrink(load_experiment(tmp_path / f"{name}.py"), Path())
    folder = run(experiment, tmp_path / "runs", console=Console(quiet=True))
    (left,) = stage_folders(folder)[name].values()
    first = read_metrics(left)[0]
    assert first["policy/grad_norm"] > 0
    assert all(np.isfinite(value) for value in first.values())
    # The class must not outlive the test: configs find classes by their names.
    del experiment, module
    jax.clear_caches()
    gc.collect()
