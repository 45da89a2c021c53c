"""Who may import whom. The rules are read from every file's syntax tree, imports inside functions included."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "jrlhf"

# A room may import its own tier and those before it. SIDE rooms are apart.
TIERS = (
    ("types",),
    ("config", "sharding", "hosts", "hardware", "hlo", "remote"),
    ("ops",),
    ("models",),
    ("rollout", "optim", "checkpoint", "metrics"),
    ("algorithms",),
    ("training",),
    ("experiment", "compare"),
    ("cli",),
)
RANK = {room: rank for rank, tier in enumerate(TIERS) for room in tier}
SIDE = ("data", "rewards", "lab")
SIDE_MAY_IMPORT = {"types", "config", "ops", "models", "rollout"}


def imported(source: str, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in `source`, absolute; `from a import b` gives a.b."""
    package = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{prefix}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            by_name = ast.unparse(node.func) in ("importlib.import_module", "__import__")
            if by_name and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def violations(source: str, module: str) -> list[str]:
    """What `module` (dotted, without jrlhf.) may not import, as messages."""
    room, inside = module.split(".")[0], module.split(".")[1:]
    found = []
    for line, name in imported(source, f"jrlhf.{module}"):
        if name.startswith("flax.linen") and room != "models":
            found.append(f"{line}: only models/ imports flax.linen")
        if not name.startswith("jrlhf."):
            continue
        parts = name.split(".")[1:]
        other = parts[0]
        if other in (room, "__version__"):
            same_file = inside and len(parts) > 1 and parts[1] == inside[0]
            if room == "algorithms" and inside and inside != ["__init__"] and not same_file:
                found.append(
                    f"{line}: algorithms do not import one another ({name}); what two share goes to ops"
                )
        elif room in SIDE:
            if other not in SIDE_MAY_IMPORT:
                found.append(f"{line}: {room} may import only {sorted(SIDE_MAY_IMPORT)}, not {other}")
        elif other in SIDE:
            if RANK[room] < RANK["training"]:
                found.append(f"{line}: only training and above import {other}")
        elif other not in RANK:
            found.append(f"{line}: {other} is not one of the rooms")
        elif RANK[other] > RANK[room]:
            found.append(f"{line}: {room} may not import {other}, which is above it")
    return found


def modules() -> dict[str, Path]:
    """{dotted name without jrlhf.: file}"""
    return {
        ".".join(p.relative_to(PACKAGE).with_suffix("").parts): p
        for p in sorted(PACKAGE.rglob("*.py"))
        if p != PACKAGE / "__init__.py"
    }


@pytest.mark.parametrize("module", modules())
def test_imports(module):
    room = module.split(".")[0]
    assert room in RANK or room in SIDE, f"jrlhf/{room} has no place in the import rules"
    path = modules()[module]
    assert not [f"{path.relative_to(PACKAGE.parent)}:{v}" for v in violations(path.read_text(), module)]


def test_the_package_itself_imports_nothing_of_its_own():
    """Otherwise `import jrlhf.config` would import everything."""
    names = [name for _, name in imported((PACKAGE / "__init__.py").read_text(), "jrlhf.__init__")]
    assert not [n for n in names if n.startswith("jrlhf")]


def test_no_import_cycles_between_files():
    known = modules()
    graph = {}
    for module, path in known.items():
        tree = ast.parse(path.read_text())
        top = ast.unparse(
            ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
        )
        names = {name.removeprefix("jrlhf.") for _, name in imported(top, f"jrlhf.{module}")}
        files = {n if n in known else n.rpartition(".")[0] for n in names}
        graph[module] = {f for f in files if f in known}
    while free := [m for m, needs in graph.items() if not needs]:
        for m in free:
            del graph[m]
        graph = {m: needs - set(free) for m, needs in graph.items()}
    assert not graph, f"these import one another: {sorted(graph)}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("config", "from jrlhf.models.config import ModelConfig"),
        ("config", "def f():\n    from jrlhf.training import loop"),
        ("ops.kl", "from jrlhf import optim"),
        ("ops.kl", "from ..rollout import sampling"),
        ("ops.kl", "import jrlhf.models.layers as layers"),
        ("models.hf", "from jrlhf.checkpoint import save"),
        ("algorithms.ppo", "from jrlhf.algorithms.dpo import loss"),
        ("algorithms.ppo", "from .dpo import loss"),
        ("algorithms.ppo", "from jrlhf.algorithms import dpo"),
        ("algorithms.ppo", "from jrlhf.rewards import length"),
        ("algorithms.ppo", "from jrlhf.training.loop import fit"),
        ("rollout.sampling", "from jrlhf.data import tokenizer"),
        ("data.sources", "from jrlhf.sharding import make_mesh"),
        ("data.sources", "from jrlhf.lab.larder import world"),
        ("lab.larder", "if True:\n    import jrlhf.training.loop"),
        ("training.loop", "from jrlhf.experiment import run"),
        ("training.loop", "import importlib\nimportlib.import_module('jrlhf.cli')"),
        ("experiment", "import jrlhf.cli"),
        ("training.loop", "import flax.linen as nn"),
        ("training.loop", "from flax import linen"),
        ("training.loop", "from flax.linen import Dense"),
        ("training.loop", "from jrlhf.utils import f"),
    ],
)  # fmt: skip
def test_a_breach_is_found(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models.layers", "from flax import linen as nn"),
        ("ops.kl", "from jrlhf.types import Params"),
        ("ops.kl", "from .masking import masked_mean"),
        ("config", "from jrlhf.types import Plan"),
        ("algorithms.ppo", "from jrlhf.ops.losses import ppo_policy_loss"),
        ("algorithms.__init__", "from jrlhf.algorithms.ppo import PPO"),
        ("lab.larder", "from jrlhf.models.config import ModelConfig\nfrom jrlhf.lab.exact import f"),
        ("training.loop", "from jrlhf.data.sources import FileSource"),
        ("cli", "from jrlhf import __version__, experiment"),
    ],
)  # fmt: skip
def test_what_is_allowed_is_not_reported(module, source):
    assert violations(source, module) == []
