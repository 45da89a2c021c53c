"""The comparison report: a table for the terminal, one self-contained page, and every number in files."""

import csv
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from jrlhf import __version__
from jrlhf.compare import plots
from jrlhf.compare.evaluations import Evaluation
from jrlhf.compare.pairs import LIMIT, Pair
from jrlhf.compare.runs import Run
from jrlhf.compare.statistics import RESAMPLES, Interval, Scores
from jrlhf.compare.summary import (
    DAGGER,
    ENOUGH_SEEDS,
    MINUS,
    Row,
    Summary,
    headline,
    limits,
    listed,
    number,
    seed_note,
    shown_pairs,
    signed,
    summarize,
)
from jrlhf.config import UserError, read_json

PASS = "pass@k: one of k answers is right · all alike: prompts whose answers are all right or all wrong"
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
    every number, and `figures/` with each figure as SVG and PNG. A report that is already in `out` is replaced,
    and what only it had drawn is removed; nothing else in `out` is touched. Raises UserError when a run has no
    finished evaluate stage, a file is broken, the runs do not share a gold reward, or `out` holds files by these
    names that are no report's.
    """
    out = Path(out)
    before = _report_in(out)
    summary = summarize(runs)
    print_table(console, summary)
    figures = plots.all_figures(summary)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    drawn = []
    for panel in (panel for figure in figures for panel in figure.panels):
        drawn += [f"figures/{panel.slug}.svg", f"figures/{panel.slug}.png"]
        (out / drawn[-2]).write_text(panel.svg)
        (out / drawn[-1]).write_bytes(panel.png)
    for name in set(before.get("figures", [])) - set(drawn):
        (out / "figures" / Path(name).name).unlink(missing_ok=True)
    _write_json(out / "summary.json", summary, drawn)
    _write_csv(out / "summary.csv", summary)
    page = out / "report.html"
    page.write_text(_html(summary, figures))
    replaced = set(before.get("runs", [])) - {run.name for run in summary.runs}
    if replaced:
        console.print(
            Text(f"{out}: replaced the report of {listed(before['runs'])}; another folder (--out) keeps both")
        )
    return page


def _report_in(out: Path) -> Mapping[str, Any]:
    """The `summary.json` of the report in `out`; empty where there is none. UserError for files of others."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, and the report needs a folder")
    ours = {"runs", "rows", "reward_name"}
    if (out / "summary.json").is_file():
        found = read_json(out / "summary.json")
        if isinstance(found, Mapping) and ours <= found.keys():
            return found
    taken = [name for name in ("summary.json", "summary.csv", "report.html") if (out / name).exists()]
    if taken:
        raise UserError(
            f"{out} holds {listed(taken)}, which no comparison wrote; choose another folder for the report"
        )
    return {}


def print_table(console: Console, summary: Summary) -> None:
    """The main split's table, policies against each other, the headline, and what the intervals cover."""
    columns = _columns(summary)
    table = _table(summary.main, columns, _about(summary))
    if _too_wide(table, console):
        # A narrow terminal: limits where a decision hangs on them, the rest is in the files.
        gain = f"gain (over {summary.baseline})"
        columns = [(words, cell if words in ("gold", gain) else _value(cell)) for words, cell in columns]
        columns = [column for column in columns if column[0] not in ("of maximum", "ended", "IQM of seeds")]
        table = _table(summary.main, columns, _about(summary))
    console.print(table)
    if pairs := shown_pairs(summary):
        console.print(Text("Policies against each other, the one with more gold first", style="bold"))
        console.print(_pairs_table(summary, pairs))
    if columns := _pass_columns(summary.main):
        table = _table(summary.main, columns, PASS)
        if _too_wide(table, console):
            table = _table(summary.main, [(words, _value(cell)) for words, cell in columns], PASS)
        console.print(table)
    console.print(Text(headline(summary)))
    console.print(Text(seed_note(summary), style="yellow" if summary.seeds < ENOUGH_SEEDS else "dim"))
    for notice in _notes(summary):
        console.print(Text(notice, style="dim"))
    for found in _alarms(summary):
        console.print(Text(_alarm_line(found), style="yellow"))


def _pairs_table(summary: Summary, pairs: Sequence[Pair]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("policy")
    table.add_column("against")
    table.add_column("gold", justify="right", no_wrap=True)
    table.add_column("win rate", justify="right", no_wrap=True)
    table.add_column("")
    for p in pairs:
        mark = DAGGER if summary.marked(*p.runs) else ""
        table.add_row(
            Text(p.a),
            Text(p.b),
            Text(" ".join(_cell(p.difference, plus=True)) + mark),
            Text(" ".join(_cell(p.win, percent=True))),
            Text(_verdict(p), style="" if p.difference.excludes(0) else "yellow"),
        )
    return table


def _verdict(p: Pair) -> str:
    if not p.difference.excludes(0):
        return "cannot be told apart"
    return "more" if p.difference.value > 0 else "less"


def _table(rows: Sequence[Row], columns: Sequence[tuple[str, Any]], title: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("policy", no_wrap=True)
    for words, _ in columns:
        table.add_column(words.replace(" (", "\n("), justify="right", no_wrap=True)
    for row in rows:
        cells = (Text("\n".join(part for part in cell(row) if part)) for _, cell in columns)
        table.add_row(Text(row.label, style="dim" if row.is_baseline else ""), *cells)
    return table


def _too_wide(table: Table, console: Console) -> bool:
    return Measurement.get(console, console.options.update(width=1000), table).maximum > console.width


def _value(cell: Any) -> Any:
    """The same cell without its limits."""
    return lambda row: (cell(row)[0], "")


# --- tables ---------------------------------------------------------------------------------------------


def _columns(summary: Summary, rows: Sequence[Row] | None = None) -> list[tuple[str, Any]]:
    """(heading, row -> (value, limits)) of the columns that at least one row can fill."""
    rows = summary.main if rows is None else rows
    over = f"(over {summary.baseline})"
    several = len({row.seeds for row in rows}) > 1
    columns = [
        ("gold", True, lambda r: _cell(r.gold)),
        ("of maximum", any(r.share for r in rows), lambda r: _cell(r.share, percent=True)),
        (f"gain {over}", any(r.gain for r in rows), lambda r: _cell(r.gain, plus=True)),
        ("gap (from the main split)", any(r.gap for r in rows), lambda r: _cell(r.gap, plus=True)),
        (f"win rate {over}", any(r.win for r in rows), lambda r: _cell(r.win, percent=True)),
        ("KL (nats)", any(r.kl for r in rows), lambda r: ("0", "") if r.is_baseline else _cell(r.kl)),
        ("proxy", any(r.proxy for r in rows), lambda r: _cell(r.proxy)),
        ("length (tokens)", True, lambda r: _cell(r.length, digits=1)),
        ("ended", True, lambda r: _cell(r.ended, percent=True)),
        ("IQM of seeds", any(r.middle is not None for r in rows), lambda r: (_maybe(r.middle), "")),
        ("seeds", several, lambda r: (f"{r.seeds}{DAGGER if summary.marked(r.seeds) else ''}", "")),
    ]
    return [(words, cell) for words, filled, cell in columns if filled]


def _pass_columns(rows: Sequence[Row]) -> list[tuple[str, Any]]:
    """The columns of the table of right and wrong answers; none where no gold reward says right or wrong."""
    ks = sorted({k for row in rows for k in row.pass_at})
    if not ks:
        return []
    tokens = lambda value: (_maybe(value, 1), "")  # noqa: E731
    return [
        *((f"pass@{k}", lambda r, k=k: _cell(r.pass_at.get(k), percent=True)) for k in ks),
        ("all alike", lambda r: _cell(r.zero_variance, percent=True)),
        ("length right", lambda r: tokens(r.length_right)),
        ("length wrong", lambda r: tokens(r.length_wrong)),
    ]


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


def _maybe(value: float | None, digits: int = 2) -> str:
    return DASH if value is None else number(value, digits)


def _about(summary: Summary) -> str:
    """What was measured on what: `gold: larder_gold · split: eval · 96 prompts (81 distinct), 2 answers each`."""
    rows = summary.main
    answers = sorted({row.answers for row in rows})
    spread = str(answers[0]) if len(answers) == 1 else f"{answers[0]} to {answers[-1]}"
    splits = ", ".join(dict.fromkeys(row.split for row in rows))
    seeds = sorted({row.seeds for row in summary.compared})
    many = " to ".join(map(str, seeds if len(seeds) < 2 else (seeds[0], seeds[-1])))
    prompts = _count(rows[0].prompts, "prompt")
    if rows[0].distinct not in (None, rows[0].prompts):
        prompts += f" ({rows[0].distinct:,} distinct)"
    return (
        f"gold: {summary.reward_name} · split: {splits} · {prompts}, "
        f"{spread} answer{'s' * (spread != '1')} each · {many} seed{'s' * (many != '1')}"
    )


def _notes(summary: Summary) -> list[str]:
    """What has to be known to read the table: how runs were put together, and why a cell is empty."""
    notes = list(summary.notices)
    chosen = [row.label for row in summary.main if _is_best_of_n(summary, row)]
    if chosen:
        notes.append(
            f"{listed(chosen)}: chosen by the proxy from samples of another policy. Only the scores of the chosen "
            f"answers are kept, so texts and criteria are a dash ({DASH}), and the KL is the exact bound."
        )
    return notes


def _alarms(summary: Summary) -> list[dict[str, Any]]:
    """The stages that raised alarms of reward hacking as they trained, each once, with these in order of time."""
    out, counted = [], set()
    for run in summary.runs:
        for stage in run.stages:
            results = read_json(stage.folder / "done.json").get("results") or {}
            if not results.get("alarms") or stage.folder.resolve() in counted:
                continue
            counted.add(stage.folder.resolve())
            ended = {key: results.get(key) for key in ("ended_at", "policy_of_step")}
            about = {"run": run.name, "stage": stage.name, "seed": stage.seed}
            out.append(about | ended | {"alarms": sorted(results["alarms"], key=lambda alarm: alarm["step"])})
    return out


def _alarm_line(found: Mapping[str, Any]) -> str:
    told = ", ".join(
        f"{a['rule']} {a['value']:.3g} (threshold {a['threshold']:g}) at step {a['step']}"
        for a in found["alarms"]
    )
    end = ""
    if found["ended_at"] is not None:
        end = f"; ended at step {found['ended_at']} with the policy of step {found['policy_of_step']}"
    return f"Alarms of {found['stage']} (seed {found['seed']}): {told}{end}"


def _is_best_of_n(summary: Summary, row: Row) -> bool:
    """Its answers were chosen, not sampled from a model of its own: the KL is known and nothing was recorded."""
    return any(
        policy.label == row.label and policy.kl_exact is not None
        for evaluation in summary.evaluations
        for policy in evaluation.policies
    )


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


# --- files ----------------------------------------------------------------------------------------------


def _flat(row: Row) -> dict[str, Any]:
    """A row as plain columns; `x`, `x_low` and `x_high` for each interval, None where there is none."""
    out: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if field.name in ("criteria", "groups", "pass_at"):
            prefix = {"criteria": "criterion_", "groups": "group_", "pass_at": "pass_at_"}[field.name]
            for name, interval in value.items():
                out |= _limits_of(f"{prefix}{name}", interval)
        elif isinstance(value, Interval) or field.name in (
            "share", "gain", "gap", "win", "proxy", "kl", "zero_variance",
        ):  # fmt: skip
            out |= _limits_of(field.name, value)
        else:
            out[field.name] = value
    return out


def _flat_rows(summary: Summary) -> list[dict[str, Any]]:
    """Every row as plain columns, and on the main split whether no other policy dominates it by the groups' means."""
    kept, main = _not_dominated(summary), summary.main
    return [
        _flat(row) | ({"not_dominated": kept.get(row.label) if row in main else None} if kept else {})
        for row in summary.rows
    ]


def _limits_of(name: str, interval: Interval | None) -> dict[str, float | None]:
    values = interval or (None, None, None)
    plain = [None if v is None or math.isnan(v) else float(v) for v in values]
    return dict(zip((name, f"{name}_low", f"{name}_high"), plain, strict=True))


def _write_csv(file: Path, summary: Summary) -> None:
    rows = _flat_rows(summary)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def _pair_flat(p: Pair) -> dict[str, Any]:
    return {
        "a": p.a,
        "b": p.b,
        "seeds_a": p.runs[0],
        "seeds_b": p.runs[1],
        "paired_by": "prompt and seed" if p.paired_runs else "prompt",
        **_limits_of("difference", p.difference),
        **_limits_of("win", p.win),
    }


def _write_json(file: Path, summary: Summary, figures: Sequence[str]) -> None:
    content = {
        "headline": headline(summary),
        "reward_name": summary.reward_name,
        "confidence": 0.95,
        "runs": [run.name for run in summary.runs],
        "rows": _flat_rows(summary),
        "pairs": [_pair_flat(p) for p in summary.pairs],
        "best_of_n": {
            f"{evaluation.label} {curve.label}".strip(): {
                name: None if value is None else value.tolist()
                for name, value in vars(curve).items()
                if name != "label"
            }
            for evaluation in summary.evaluations
            for curve in evaluation.best_of_n
        },
        "seconds": _cost(summary),
        "alarms": _alarms(summary),
        "figures": list(figures),
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
        unfinished=[(run.name, *entry) for run in summary.runs for entry in run.unfinished],
        notes=_notes(summary),
        method=_method(summary),
        pairs=_matrix(summary),
        pairs_limit=LIMIT,
        looks=looks,
        columns=_columns(summary),
        rows=summary.main,
        pass_columns=_pass_columns(summary.main),
        splits=[
            (split, rows, _columns(summary, rows), _pass_columns(rows))
            for split in summary.splits
            if (rows := [row for row in summary.rows if row.split == split and row not in summary.main])
        ],
        criteria=_criteria(summary),
        groups=_groups(summary),
        alarms=[_alarm_line(found) for found in _alarms(summary)],
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
    rows = summary.main
    if any(row.distinct not in (None, row.prompts) for row in rows):
        text += (
            "A prompt that was drawn more than once counts each time, as it should where prompts are drawn at random; "
            "copies in a file of prompts would make the intervals too narrow. "
        )
    if any(row.seeds == 1 for row in rows):
        text += f"With one training run they come from a BCa bootstrap over prompts with {RESAMPLES:,} resamples. "
    if any(row.seeds > 1 for row in rows):
        text += "Several training runs and prompts are crossed random effects; limits use Student's t (Satterthwaite). "
    return text + (
        "Gains are paired by prompt, and by seed where both policies have the same ones. A win rate compares each "
        "answer's gold with each baseline answer to the same prompt, ties half. Intervals are not adjusted for the "
        "number of policies compared."
    )


def _matrix(summary: Summary) -> dict[str, Any] | None:
    """Every policy (row) against every other (column), best first: `(difference, limits, win rate, told apart)`."""
    found = {(p.a, p.b): p for pair in summary.pairs for p in (pair, pair.reversed)}
    names = list(dict.fromkeys(name for p in summary.pairs for name in (p.a, p.b)))
    if len(names) < 2:
        return None

    def cell(a: str, b: str) -> Any:
        if a == b:
            return None
        if (a, b) not in found:
            return {"value": DASH, "limits": "", "win": "", "told": True}
        p = found[a, b]
        value, bounds = _cell(p.difference, plus=True)
        mark = DAGGER if summary.marked(*p.runs) else ""
        win = f"wins {_cell(p.win, percent=True)[0]}"
        return {"value": value + mark, "limits": bounds, "win": win, "told": p.difference.excludes(0)}

    gold = {row.label: row.gold.value for row in summary.main}
    names.sort(key=lambda name: -gold[name])
    level = [f"{p.a} and {p.b}" for p in summary.pairs if not p.difference.excludes(0)]
    dash = any((a, b) not in found for a in names for b in names if a != b)
    return {
        "names": names,
        "rows": [(a, [cell(a, b) for b in names]) for a in names],
        "level": level,
        "unshared": dash,
        "left_out": len(gold) - len(names),
    }


def _criteria(summary: Summary) -> dict[str, Any] | None:
    """The criteria's means, with the range of single answers for a scale. A policy without them has dashes."""
    names = list(dict.fromkeys(name for row in summary.main for name in row.criteria))
    if not names:
        return None
    splits = [
        policy.splits[evaluation.main_split]
        for evaluation in summary.evaluations
        for policy in evaluation.policies
        if evaluation.main_split in policy.splits
    ]
    scored = [split for split in splits if split.criteria]
    ranges = []
    for name in names:
        answers = [_flat_scores(split.criteria[name]) for split in scored if name in split.criteria]
        low, high = min(a.min() for a in answers), max(a.max() for a in answers)
        ranges.append(f"{number(low, 1)} to {number(high, 1)}")
    total = all(
        split.criteria.keys() == set(names)
        and np.allclose(
            sum(_flat_scores(split.criteria[name]) for name in names), _flat_scores(split.gold), atol=1e-4
        )
        for split in scored
    )
    body = [(row.label, [_cell(row.criteria.get(name)) for name in names]) for row in summary.main]
    return {"names": list(zip(names, ranges, strict=True)), "rows": body, "adds_up": total}


def _groups(summary: Summary) -> dict[str, Any] | None:
    """Each group's own gold reward, whether another policy dominates this one (where two or more can be held against
    each other), and the group which is worst off. A policy without them has dashes."""
    names = list(dict.fromkeys(name for row in summary.main for name in row.groups))
    if not names:
        return None
    kept, body = _not_dominated(summary), []
    for row in summary.main:
        worst = min(row.groups, key=lambda name: row.groups[name].value, default="")
        value, bounds = _cell(row.groups.get(worst))
        last = (f"{value} ({worst})", bounds) if worst else (value, bounds)
        front = [({True: "yes", False: "no", None: DASH}[kept.get(row.label)], "")] if kept else []
        body.append((row.label, [*(_cell(row.groups.get(name)) for name in names), *front, last]))
    return {"names": [*names, *["not dominated"] * bool(kept)], "rows": body}


def _not_dominated(summary: Summary) -> dict[str, bool]:
    """By label, of the policies in the Pareto figure."""
    return {label: kept for front in plots.fronts(summary) for label, kept in front.by_label.items()}


def _flat_scores(scores: Scores) -> np.ndarray:
    return np.array([value for run in scores for answers in run for value in answers], float)


def _samples(evaluation: Evaluation) -> dict[str, Any]:
    shown = []
    for sample in evaluation.samples[:SAMPLES]:
        answers = sample["answers"]
        shown.append(
            {
                "prompt": sample["prompt"],
                "answers": [
                    {
                        "label": policy.label,
                        "text": answers[policy.label]["text"],
                        "scores": [
                            (score, number(answers[policy.label][score]))
                            for score in ("gold", "proxy")
                            if answers[policy.label].get(score) is not None
                        ],
                    }
                    for policy in evaluation.policies
                    if policy.label in answers
                ],
            }
        )
    told = {label for sample in evaluation.samples for label in sample["answers"]}
    without = [policy.label for policy in evaluation.policies if policy.label not in told]
    return {
        "label": evaluation.label,
        "total": len(evaluation.samples),
        "shown": shown,
        "without": listed(without) if without and shown else "",
    }


def _cost(summary: Summary) -> list[dict[str, Any]]:
    """Seconds of each stage: the mean of its seeds, and their sum. A stage that runs share counts once."""
    out, counted = [], set()
    for run in summary.runs:
        for name in dict.fromkeys(stage.name for stage in run.stages):
            stages = [s for s in run.stages if s.name == name and s.folder.resolve() not in counted]
            counted |= {stage.folder.resolve() for stage in stages}
            if not stages:
                continue
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
    """Label -> config of the stage that made each evaluated policy, the baselines apart."""
    return {
        policy.label: policy.stages[0].config
        for evaluation in summary.evaluations
        for policy in evaluation.policies[1:]
        if policy.stages and policy.name == policy.stages[0].name
    }


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
