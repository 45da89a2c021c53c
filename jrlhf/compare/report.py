"""The comparison report: a table for the terminal, one self-contained page, and every number in files."""

import csv
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from jrlhf import __version__
from jrlhf.compare import plots
from jrlhf.compare.runs import Evaluation, Run
from jrlhf.compare.statistics import RESAMPLES, Interval
from jrlhf.compare.summary import (
    ENOUGH_SEEDS,
    MINUS,
    Row,
    Summary,
    headline,
    limits,
    number,
    seed_note,
    signed,
    summarize,
)

DASH, TIMES = "\u2013", "\u00d7"
SAMPLES = 12  # prompts shown
PACKAGES = ("jrlhf", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")
GLYPHS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}
SWAP = {
    plots.PAPER: "var(--paper)",
    plots.INK: "var(--ink)",
    plots.MUTED: "var(--muted)",
    plots.RULE: "var(--rule)",
    plots.BASELINE: "var(--c0)",
} | {color: f"var(--c{i})" for i, color in enumerate(plots.SERIES, 1)}


def write_report(runs: list[Path], out: Path, console: Console) -> Path:
    """Read finished run folders, print their table, and write the report into the folder `out`.

    Returns `out/report.html`, which needs no other file. Beside it: `summary.json` and `summary.csv` with
    every number, and `figures/` with each figure as SVG and PNG. Raises UserError when a run has no finished
    evaluate stage, a file is broken, or the runs do not share a gold reward.
    """
    summary = summarize(runs)
    print_table(console, summary)
    out = Path(out)
    figures = plots.all_figures(summary)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for panel in (panel for figure in figures for panel in figure.panels):
        (out / "figures" / f"{panel.slug}.svg").write_text(panel.svg)
        (out / "figures" / f"{panel.slug}.png").write_bytes(panel.png)
    _write_json(out / "summary.json", summary)
    _write_csv(out / "summary.csv", summary)
    page = out / "report.html"
    page.write_text(_html(summary, figures))
    return page


def print_table(console: Console, summary: Summary) -> None:
    """The main split's table, the headline and what the intervals cover."""
    columns = _columns(summary.main)
    table = _table(summary, columns)
    if Measurement.get(console, console.options.update(width=1000), table).maximum > console.width:
        # A narrow terminal: limits where a decision hangs on them, the rest is in the files.
        columns = [(words, cell if words in ("gold", "gain") else _value(cell)) for words, cell in columns]
        table = _table(
            summary,
            [column for column in columns if column[0] not in ("of maximum", "ended", "IQM of seeds")],
        )
    console.print(table)
    console.print(Text(headline(summary)))
    console.print(Text(seed_note(summary), style="yellow" if summary.seeds < ENOUGH_SEEDS else "dim"))


def _table(summary: Summary, columns: Sequence[tuple[str, Any]]) -> Table:
    table = Table(
        title=_about(summary),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("policy", no_wrap=True)
    for words, _ in columns:
        table.add_column(words.replace(" (", "\n("), justify="right", no_wrap=True)
    for row in summary.main:
        cells = (Text("\n".join(part for part in cell(row) if part)) for _, cell in columns)
        table.add_row(Text(row.label, style="dim" if row.is_baseline else ""), *cells)
    return table


def _value(cell: Any) -> Any:
    """The same cell without its limits."""
    return lambda row: (cell(row)[0], "")


# --- tables ---------------------------------------------------------------------------------------------


def _columns(rows: Sequence[Row]) -> list[tuple[str, Any]]:
    """(heading, row -> (value, limits)) of the columns that at least one row can fill."""
    columns = [
        ("gold", True, lambda r: _cell(r.gold)),
        ("of maximum", any(r.share for r in rows), lambda r: _cell(r.share, percent=True)),
        ("gain", any(r.gain for r in rows), lambda r: _cell(r.gain, plus=True)),
        ("win rate", any(r.win for r in rows), lambda r: _cell(r.win, percent=True)),
        ("KL (nats)", any(r.kl for r in rows), lambda r: ("0", "") if r.is_baseline else _cell(r.kl)),
        ("proxy", any(r.proxy for r in rows), lambda r: _cell(r.proxy)),
        ("length (tokens)", True, lambda r: _cell(r.length, digits=1)),
        ("ended", True, lambda r: _cell(r.ended, percent=True)),
        ("IQM of seeds", any(r.middle is not None for r in rows), lambda r: (_maybe(r.middle), "")),
    ]
    return [(words, cell) for words, filled, cell in columns if filled]


def _cell(
    interval: Interval | None, digits: int = 2, percent: bool = False, plus: bool = False
) -> tuple[str, str]:
    if interval is None:
        return DASH, ""
    if percent:
        value = f"{interval.value:.0%}".replace("-", MINUS)
    else:
        value = signed(interval.value, digits) if plus else number(interval.value, digits)
    return value, limits(interval, digits, percent)


def _maybe(value: float | None) -> str:
    return DASH if value is None else number(value)


def _about(summary: Summary) -> str:
    """What was measured on what: `gold: larder_gold · eval · 96 prompts, 2 answers each · 3 seeds`."""
    rows = summary.main
    answers = sorted({row.answers for row in rows})
    spread = str(answers[0]) if len(answers) == 1 else f"{answers[0]} to {answers[-1]}"
    splits = ", ".join(dict.fromkeys(row.split for row in rows))
    seeds = sorted({row.seeds for row in rows})
    many = " to ".join(map(str, seeds if len(seeds) < 2 else (seeds[0], seeds[-1])))
    return (
        f"gold: {summary.reward_name} · split: {splits} · {_count(rows[0].prompts, 'prompt')}, "
        f"{spread} answer{'s' * (spread != '1')} each · {many} seed{'s' * (many != '1')}"
    )


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


# --- files ----------------------------------------------------------------------------------------------


def _flat(row: Row) -> dict[str, Any]:
    """A row as plain columns; `x`, `x_low` and `x_high` for each interval, None where there is none."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if field.name == "criteria":
            for name, interval in value.items():
                out |= _limits_of(f"criterion_{name}", interval)
        elif isinstance(value, Interval) or field.name in ("share", "gain", "win", "proxy", "kl"):
            out |= _limits_of(field.name, value)
        else:
            out[field.name] = value
    return out


def _limits_of(name: str, interval: Interval | None) -> dict[str, float | None]:
    values = interval or (None, None, None)
    plain = [None if v is None or math.isnan(v) else float(v) for v in values]
    return dict(zip((name, f"{name}_low", f"{name}_high"), plain, strict=True))


def _write_csv(file: Path, summary: Summary) -> None:
    rows = [_flat(row) for row in summary.rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def _write_json(file: Path, summary: Summary) -> None:
    content = {
        "headline": headline(summary),
        "reward_name": summary.reward_name,
        "confidence": 0.95,
        "runs": [run.name for run in summary.runs],
        "rows": [_flat(row) for row in summary.rows],
        "best_of_n": {
            evaluation.label: {
                name: None if value is None else value.tolist()
                for name, value in vars(evaluation.best_of_n).items()
            }
            for evaluation in summary.evaluations
            if evaluation.best_of_n is not None
        },
        "seconds": _cost(summary),
    }
    file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


# --- the page -------------------------------------------------------------------------------------------


def _html(summary: Summary, figures: list[plots.Figure]) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    looks = {
        label: {"color": SWAP[look.color], "glyph": GLYPHS[look.marker]}
        for label, look in plots.policy_looks(summary).items()
    }
    names = list(dict.fromkeys(run.name.rpartition("-")[0] or run.name for run in summary.runs))
    return templates.get_template("report.html").render(
        title=" and ".join(names),
        headline=headline(summary),
        about=_about(summary),
        seed_note=seed_note(summary),
        few_seeds=summary.seeds < ENOUGH_SEEDS,
        shared=_shared_stages(summary),
        unfinished=[(run.name, *entry) for run in summary.runs for entry in run.unfinished],
        method=_method(summary),
        looks=looks,
        baseline=summary.evaluations[0].baseline.name,
        columns=_columns(summary.main),
        rows=summary.main,
        splits=[
            (split, rows, _columns(rows))
            for split in summary.splits
            if (rows := [row for row in summary.rows if row.split == split and row not in summary.main])
        ],
        criteria=_criteria(summary.main),
        figures=[
            (
                figure,
                [plots.inline_svg(panel, lambda color: SWAP.get(color, color)) for panel in figure.panels],
            )
            for figure in figures
        ],
        samples=[_samples(evaluation) for evaluation in summary.evaluations],
        cost=_cost(summary),
        duration=_duration,
        differences=_differences(summary),
        configs=_configs(summary),
        commands=_commands(summary.runs),
        environment=_environment(summary),
        version=__version__,
    )


def _method(summary: Summary) -> str:
    text = "Brackets are 95% intervals for the mean over prompts; answers to one prompt count as one draw. "
    if summary.seeds == 1:
        text += f"They come from a BCa bootstrap over prompts with {RESAMPLES:,} resamples. "
    else:
        text += "Seeds and prompts are crossed random effects; limits use Student's t (Satterthwaite). "
    return text + (
        "Gains are paired by prompt. A win rate compares each answer's gold with each baseline answer to the "
        "same prompt, ties half. Intervals are not adjusted for the number of policies compared."
    )


def _shared_stages(summary: Summary) -> list[str]:
    """Stages with fewer seeds than the evaluation: their randomness is in no interval."""
    shared = []
    for evaluation in summary.evaluations:
        for name in dict.fromkeys(stage.name for stage in evaluation.run.stages):
            seeds = [stage for stage in evaluation.run.stages if stage.name == name]
            if len(seeds) < len(evaluation.seeds):
                shared.append(name)
    return list(dict.fromkeys(shared))


def _criteria(rows: Sequence[Row]) -> dict[str, Any] | None:
    names = list(dict.fromkeys(name for row in rows for name in row.criteria))
    if not names:
        return None
    body = [(row.label, [_cell(row.criteria.get(name)) for name in names]) for row in rows if row.criteria]
    return {"names": names, "rows": body}


def _samples(evaluation: Evaluation) -> dict[str, Any]:
    order = [policy.name for policy in evaluation.policies]
    shown = []
    for sample in evaluation.samples[:SAMPLES]:
        answers = sample["answers"]
        shown.append(
            {
                "prompt": sample["prompt"],
                "answers": [
                    {
                        "label": f"{name} ({evaluation.label})" if evaluation.label else name,
                        "name": name,
                        "text": answers[name]["text"],
                        "scores": [
                            (score, number(answers[name][score]))
                            for score in ("gold", "proxy")
                            if answers[name].get(score) is not None
                        ],
                    }
                    for name in order
                    if name in answers
                ],
            }
        )
    return {"label": evaluation.label, "total": len(evaluation.samples), "shown": shown}


def _cost(summary: Summary) -> list[dict[str, Any]]:
    """Seconds of each stage: the mean of its seeds, and their sum."""
    out = []
    for run in summary.runs:
        for name in dict.fromkeys(stage.name for stage in run.stages):
            stages = [stage for stage in run.stages if stage.name == name]
            seconds = [stage.seconds for stage in stages if stage.seconds is not None]
            out.append(
                {
                    "run": run.name,
                    "stage": name,
                    "kind": stages[0].config.get("type", ""),
                    "seeds": len(stages),
                    "mean": sum(seconds) / len(seconds) if seconds else None,
                    "total": sum(seconds) if seconds else None,
                }
            )
    return out


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _arms(summary: Summary) -> dict[str, Mapping[str, Any]]:
    """Label -> config of each evaluated policy that a stage of that name made, the baselines apart."""
    arms = {}
    for evaluation in summary.evaluations:
        for policy in evaluation.policies[1:]:
            for stage in evaluation.run.stages:
                if stage.name == policy.name:
                    arms[f"{policy.name} ({evaluation.label})" if evaluation.label else policy.name] = (
                        stage.config
                    )
    return arms


def _differences(summary: Summary) -> dict[str, Any]:
    """The settings that are not the same in every arm. A setting that an arm does not have is a dash."""
    arms = {label: dict(_leaves(config)) for label, config in _arms(summary).items()}
    keys = list(dict.fromkeys(key for settings in arms.values() for key in settings))
    table = [(key, [settings.get(key, DASH) for settings in arms.values()]) for key in keys]
    return {"arms": list(arms), "rows": [(key, values) for key, values in table if len(set(values)) > 1]}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)


def _configs(summary: Summary) -> list[tuple[str, str]]:
    return [(run.name, json.dumps(run.config, indent=2, ensure_ascii=False)) for run in summary.runs]


def _commands(runs: Sequence[Run]) -> list[str]:
    """Run again from the resolved config; finished stages are found and reused."""
    folders = [f"{run.folder.resolve().parent.name}/{run.name}" for run in runs]
    return [f"jrlhf run {folder}/config.json" for folder in folders] + [f"jrlhf compare {' '.join(folders)}"]


def _environment(summary: Summary) -> list[tuple[str, list[str]]]:
    """What the stages recorded, each distinct value once: stages may be reused from another machine."""
    found: dict[str, dict[str, None]] = {}

    def note(key: str, value: Any) -> None:
        if value not in (None, ""):
            found.setdefault(key, {})[str(value)] = None

    for stage in (stage for run in summary.runs for stage in run.stages):
        seen = stage.environment
        devices, git, packages = (seen.get(key) or {} for key in ("devices", "git", "packages"))
        note("date", (seen.get("date") or "")[:10])
        if devices:
            note("devices", f"{devices['count']} {TIMES} {devices['kind']}")
        note("processes", seen.get("processes"))
        note("platform", seen.get("platform"))
        note("Python", seen.get("python"))
        note("packages", ", ".join(f"{name} {packages[name]}" for name in PACKAGES if name in packages))
        if git.get("commit"):
            note("code", git["commit"][:12] + (" with uncommitted changes" if git.get("dirty") else ""))
    return [(key, list(values)) for key, values in found.items()]
