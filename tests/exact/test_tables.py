"""The pages that quote measured distances quote what was measured."""

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
ROWS = json.loads((ROOT / "benchmarks" / "exact_space.json").read_text(encoding="utf-8"))


def shown(distance: float) -> str:
    digits = next(n for n, least in ((2, 0.1), (3, 0.002), (4, 0.0001), (5, 0.0)) if distance >= least)
    return f"{distance:.{digits}f}"


def test_the_table_of_algorithms_quotes_the_benchmark():
    """Of a table's line the distance is that of its first cell; elsewhere of the name in brackets after it."""
    quoted = {}
    for line in TEXT.split("\n"):
        if found := re.match(r"\| `([\w+-]+)` \|", line):
            numbers = re.findall(r"\| (\d\.\d+)(?: from π\*| after 1,500)? \|", line)
            if numbers:
                quoted[found[1]] = numbers[-1]
    text = TEXT.replace("\n", " ")
    quoted |= {name: number for number, name in re.findall(r"(\d\.\d+)(?: from π\*)? \(`([\w+-]+)`\)", text)}
    wrong = {n: q for n, q in quoted.items() if n not in ROWS or q != shown(max(ROWS[n]["distances"]))}
    assert not wrong
    # Every row that has been measured is quoted, but for one that has neither bounds nor a closed form.
    assert set(ROWS) - set(quoted) <= {"transformer-kto"}


def test_every_row_with_bounds_is_right():
    assert [name for name, row in ROWS.items() if row["right"] is False] == []
    assert sum(row["right"] is True for row in ROWS.values()) >= 40


def test_the_page_of_the_laboratory_has_the_measured_table():
    spec = importlib.util.spec_from_file_location("larder_benchmark", ROOT / "benchmarks" / "larder.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "\n".join(module.table()) in (ROOT / "docs" / "lab.md").read_text(encoding="utf-8")
