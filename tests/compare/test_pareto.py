"""Policies by the gold rewards of several groups: dominance, and the report's picture and table of it."""

import csv
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text
from rich.console import Console

from jrlhf.compare import plots
from jrlhf.compare.report import write_report
from jrlhf.compare.statistics import mean_interval, not_dominated
from jrlhf.compare.summary import summarize

GROUPS = ("gold_A", "gold_B", "gold_C")
LEVELS = {  # by policy, the means of up to three groups
    "sft": (0.6, 0.6, 0.6),
    "ppo": (1.2, 1.0, 0.7),
    "grpo": (0.9, 1.2, 0.8),
    "dpo": (0.8, 0.9, 1.5),
    "kto": (0.8, 0.9, 0.7),
}


def with_groups(run: Path, levels: dict[str, tuple[float, ...]]) -> Path:
    """Have the policies of `levels` scored by the gold rewards of as many groups as each has levels."""
    for seed, where in json.loads((run / "stages.json").read_text())["evaluate"].items():
        file = run.parent / where / "evaluation.json"
        content, rng = json.loads(file.read_text()), np.random.default_rng(int(seed))
        for name, means in levels.items():
            for split in content["policies"][name]["splits"].values():
                shape = np.shape(split["gold"])
                split["groups"] = {
                    group: rng.normal(mean, 0.01, shape).tolist()
                    for group, mean in zip(GROUPS, means, strict=False)
                }
        file.write_text(json.dumps(content))
    return run


@pytest.fixture(scope="module")
def run_of(finished_run, tmp_path_factory):
    """`run_of(groups, **levels)`: a finished run of five policies and best-of-n, small, under `groups` groups."""

    def make(groups: int, levels=LEVELS, seeds=(0,)) -> Path:
        policies = (*levels, "best_of_16")
        small = {"policies": policies, "seeds": seeds, "prompts": 6, "curves": False}
        run = finished_run(tmp_path_factory.mktemp("pareto"), **small)
        return with_groups(run, {name: means[:groups] for name, means in levels.items()} if groups else {})

    return make


@pytest.fixture(scope="module")
def two(run_of):
    return summarize([run_of(2)])


@pytest.fixture(scope="module")
def three(run_of):
    return summarize([run_of(3)])


def drawn(summary) -> plots.Figure:
    with matplotlib.rc_context(plots.STYLE):
        return plots.pareto(summary, plots.policy_looks(summary))


# --- dominance ------------------------------------------------------------------------------------------


def by_definition(points) -> list[bool]:
    def dominates(a, b) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and any(
            x > y for x, y in zip(a, b, strict=True)
        )

    return [not any(dominates(other, point) for other in points) for point in points]


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_dominance_is_that_of_the_definition(groups):
    rng, seen = np.random.default_rng(groups), set()
    for policies in (1, 2, 3, 8, 30):
        for _ in range(20):
            points = rng.integers(0, 5, (policies, groups)).astype(
                float
            )  # few values: ties in one and in all
            kept = not_dominated(points)
            assert kept.dtype == bool
            assert kept.tolist() == by_definition(points.tolist())
            seen |= {*kept.tolist()}
    assert seen == {True, False}


def test_equal_points_both_stay_and_an_equal_part_does_not_save():
    assert not_dominated([[1, 1], [1, 1], [1, 0], [0, 1]]).tolist() == [True, True, False, False]
    assert not_dominated([[1, -np.inf], [0, 3], [0, np.inf]]).tolist() == [True, False, True]


def test_a_point_that_was_not_measured_in_full_is_not_compared():
    """Not on the front, and nothing falls to it, though it has more where it was measured."""
    values = [[1.0, 1.0], [9.0, np.nan], [0.0, 2.0], [0.0, 1.0]]
    assert not_dominated(values).tolist() == [True, False, True, False]
    assert not_dominated([[np.nan, np.nan]]).tolist() == [False]


def test_dominance_needs_rows_and_columns():
    assert not_dominated(np.zeros((0, 2))).shape == (0,)
    for wrong in ([1.0, 2.0], np.zeros((3, 0)), np.zeros((1, 2, 3))):
        with pytest.raises(ValueError, match=r"\[P, G\]"):
            not_dominated(wrong)


# --- the picture ----------------------------------------------------------------------------------------


def test_the_front_of_a_known_comparison(two):
    """kto has what dpo has, or nearly: ppo dominates both by two groups. Best-of-n was scored by no group."""
    (front,) = plots.fronts(two)
    assert front.groups == GROUPS[:2]
    assert front.by_label == {"sft": False, "ppo": True, "grpo": True, "dpo": False, "kto": False}
    figure = drawn(two)
    assert [panel.slug for panel in figure.panels] == ["pareto"]
    assert figure.finding == "2 of 5 are not dominated: ppo and grpo."
    assert all(name in figure.panels[0].alt for name in GROUPS[:2])
    assert all(f">{name}<" in figure.panels[0].svg for name in LEVELS)
    assert "best_of_16" not in figure.panels[0].svg


def test_three_groups_have_a_panel_a_pair_and_dominance_by_all(three):
    figure = drawn(three)
    assert [panel.slug for panel in figure.panels] == ["pareto", "pareto_2", "pareto_3"]
    for panel, pair in zip(figure.panels, itertools.combinations(GROUPS, 2), strict=True):
        assert {name for name in GROUPS if name in panel.svg} == {*pair}
    assert "dpo" in figure.finding  # by the third group, though in the first panel it lies below the line
    assert plots.fronts(three)[0].by_label["dpo"]


def test_without_two_groups_there_is_no_picture(run_of):
    for groups in (0, 1):
        summary = summarize([run_of(groups)])
        assert plots.fronts(summary) == []
        figure = drawn(summary)
        assert not figure.panels
        assert "two or more groups" in figure.missing


@pytest.mark.parametrize("last", [(2.0, 2.0), None])
def test_one_policy_above_all_and_all_level_are_said_so(run_of, last):
    levels = {"sft": (0.5, 0.5), "ppo": last or (0.4, 0.8), "dpo": (1.0, 0.3)}
    finding = drawn(summarize([run_of(2, levels)])).finding
    assert finding == (
        "ppo dominates every other policy." if last else "None of the 3 policies dominates another."
    )


def test_a_dominated_policy_is_hollow_and_bars_are_the_intervals(two, monkeypatch):
    ax = canvases(two, monkeypatch)[0].axes[0]
    rows = {(row.groups["gold_A"].value, row.groups["gold_B"].value): row for row in two.main if row.groups}
    front, seen = plots.fronts(two)[0].by_label, 0
    lines = [(line.get_xydata(), line) for line in ax.lines]
    for data, line in lines:
        if len(data) == 1:
            row = rows[tuple(data[0])]
            seen += 1
            assert (line.get_markerfacecolor() == line.get_color()) == front[row.label]
            for axis, group in enumerate(("gold_A", "gold_B")):
                ends = [xy[:, axis] for xy, _ in lines if len(xy) == 2 and np.ptp(xy[:, 1 - axis]) == 0]
                assert any(np.array_equal(end, row.groups[group][1:]) for end in ends)
    assert seen == len(rows) == 5


def test_what_lies_below_the_line_is_dominated(two, monkeypatch):
    """The line passes the points of the front, goes only right and down, and has the others below it."""
    ax = canvases(two, monkeypatch)[0].axes[0]
    (stairs,) = (line.get_xydata() for line in ax.lines if len(line.get_xydata()) > 2)
    steps = np.diff(stairs, axis=0)
    assert np.all(steps[:, 0] >= 0)
    assert np.all(steps[:, 1] <= 0)
    assert np.all((steps == 0).any(axis=1))
    assert stairs[0, 0] == pytest.approx(ax.get_xlim()[0])
    assert stairs[-1, 1] == pytest.approx(ax.get_ylim()[0])
    for row, kept in zip(plots.fronts(two)[0].rows, plots.fronts(two)[0].kept, strict=True):
        x, y = (row.groups[name].value for name in GROUPS[:2])
        height = stairs[stairs[:, 0] >= x][:, 1].max()  # of the edge at x: the highest corner from there on
        assert y == pytest.approx(height) if kept else y < height


def test_policies_that_answered_other_prompts_are_not_held_against_each_other(finished_run, tmp_path):
    """Each evaluation has a front and a panel of its own, though by its numbers one would fall to the other."""
    small = {"policies": ("sft", "ppo"), "prompts": 4, "curves": False}
    a = finished_run(tmp_path, name="low", code="aaaaaaaa", **small)
    b = finished_run(tmp_path, name="high", code="bbbbbbbb", **small)
    with_groups(a, {"sft": (0.0, 0.0), "ppo": (1.0, 1.0)})
    with_groups(b, {"sft": (5.0, 6.0), "ppo": (6.0, 5.0)})
    summary = summarize([a, b])
    figure = drawn(summary)
    assert [front.kept for front in plots.fronts(summary)] == [(False, True), (True, True)]
    assert figure.finding == (
        "low: ppo (low) dominates every other policy. high: None of the 2 policies dominates another."
    )
    assert [panel.slug for panel in figure.panels] == ["pareto", "pareto_2"]


def test_a_policy_that_one_group_did_not_judge_is_left_out(run_of):
    run = with_groups(run_of(3), {"ppo": (9.0, 9.0)})
    (front,) = plots.fronts(summarize([run]))
    assert front.by_label == {"sft": False, "grpo": True, "dpo": True, "kto": False}


def canvases(summary, monkeypatch) -> list:
    """The drawings before they become text."""
    found, render = [], plots._render
    with monkeypatch.context() as patch:
        patch.setattr(
            plots, "_render", lambda slug, canvas, alt: (found.append(canvas), render(slug, canvas, alt))[1]
        )
        drawn(summary)
    return found


NINE = {
    "sft": (0.6, 0.6),
    "ppo-pooled": (1.2, 1.22),
    "ppo-A": (1.5, 0.8),
    "ppo-B": (0.75, 1.5),
    "ppo-mean": (1.21, 1.23),
    "ppo-vote": (1.19, 1.25),
    "ppo-worst": (1.22, 1.2),
    "ppo-worst_of_heads": (1.18, 1.21),
    "ppo-worst_of_mixture": (1.2, 1.2),
    "dpo": (1.0, 1.18),
}


def test_names_stand_beside_points_and_cover_nothing(run_of, monkeypatch):
    (canvas,) = canvases(summarize([run_of(2, NINE, seeds=(0, 1))]), monkeypatch)
    ax = canvas.axes[0]
    assert not canvas.legends
    canvas.draw_without_rendering()
    texts = {
        note.get_text(): Text.get_window_extent(note) for note in ax.texts
    }  # without the line to the point
    assert {*texts} == {*NINE}
    for a, b in itertools.combinations(texts.values(), 2):
        assert not a.overlaps(b)
    frame = ax.get_window_extent()
    for box in texts.values():
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
        for line in ax.lines:
            if len(line.get_xydata()) == 1:
                assert not box.contains(*ax.transData.transform(line.get_xydata()[0]))


def test_names_that_find_no_place_stand_below(two, monkeypatch):
    long = {row.label: f"{row.label} {'of a run with a long name ' * 6}{i}" for i, row in enumerate(two.main)}
    rows = tuple(replace(row, label=long[row.label]) for row in two.rows)
    (canvas,) = canvases(replace(two, rows=rows), monkeypatch)
    assert not canvas.axes[0].texts
    (legend,) = canvas.legends
    assert len(legend.get_texts()) == len(LEVELS)


# --- the page and the files -----------------------------------------------------------------------------


def test_the_table_and_the_files_say_what_the_function_says(run_of, tmp_path):
    run = run_of(3)
    page = write_report([run], tmp_path / "report", Console(quiet=True))
    summary = summarize([run])
    (evaluation,) = summary.evaluations
    scored = [p for p in evaluation.policies if p.splits["eval"].groups]
    means = [[mean_interval(p.splits["eval"].groups[g]).value for g in GROUPS] for p in scored]
    expected = dict(zip((p.label for p in scored), not_dominated(means).tolist(), strict=True))
    assert {*expected.values()} == {True, False}
    table = re.search(r"<h3>Groups</h3>.*?</table>", page.read_text(), flags=re.DOTALL)[0]
    heads = re.findall(r'<th scope="col">(.*?)</th>', table)
    assert heads == ["policy", *GROUPS, "not dominated", "worst group"]
    told = {}
    for label, cells in re.findall(r'<tr><th scope="row">(?:<i.*?</i>)?(.*?)</th>(.*?)</tr>', table):
        told[label] = re.findall(r"<td>(.*?)</td>", cells)[heads.index("not dominated") - 1]
    assert told == {k: "yes" if v else "no" for k, v in expected.items()} | {"best_of_16": "\u2013"}
    rows = json.loads((page.parent / "summary.json").read_text())["rows"]
    assert {r["policy"]: r["not_dominated"] for r in rows if r["split"] == "eval"} == {
        **expected,
        "best_of_16": None,
    }
    assert {r["not_dominated"] for r in rows if r["split"] != "eval"} == {None}
    with (page.parent / "summary.csv").open() as stream:
        assert [r["not_dominated"] for r in csv.DictReader(stream)] == [
            "" if r["not_dominated"] is None else str(r["not_dominated"]) for r in rows
        ]
    for name in ("pareto", "pareto_2", "pareto_3"):
        assert f'id="{name}-figure_1"' in page.read_text()
        assert (page.parent / "figures" / f"{name}.png").is_file()
    drawings = re.findall(
        r'<svg[^>]*aria-label="Gold reward of one group.*?</svg>', page.read_text(), flags=re.DOTALL
    )
    assert len(drawings) == 3
    assert not re.findall(r"#[0-9a-f]{6}\b", "".join(drawings))  # the page's colours, light and dark


def test_a_page_without_groups_has_neither(run_of, tmp_path):
    page = write_report([run_of(0)], tmp_path / "report", Console(quiet=True))
    assert "not dominated" not in page.read_text()
    assert not (page.parent / "figures" / "pareto.png").exists()
    assert "not_dominated" not in (page.parent / "summary.csv").read_text()
