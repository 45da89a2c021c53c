"""A plan (`jrlhf.training.planning`) as a table, a picture of the memory, and JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from jrlhf.training.planning import ExperimentPlan, Moved, Planned, Tried

GIB = 2**30


def plan_table(plans: Sequence[Planned]) -> Table:
    """One row for each program. Of one device, but for MFU."""
    table = Table(caption="of one device; time is predicted, memory is the compiler's")
    for column in ("stage", "program"):
        table.add_column(column)
    for column in ("HBM GiB", "of", "fits", "TFLOP", "HBM GB moved", "sent GB", "time", "MFU", "compiled in"):
        table.add_column(column, justify="right")
    for plan in plans:
        sent = sum(moved.bytes * moved.times for moved in plan.collectives)
        refused = "" if plan.compiles else "[red]refused[/red]"
        told = [
            f"{plan.flops / 1e12:.3g}", f"{plan.hbm_traffic / 1e9:.3g}", f"{sent / 1e9:.3g}",
            duration(plan.seconds), f"{plan.mfu:.1%}",
        ]  # fmt: skip
        table.add_row(
            plan.stage, plan.program, f"{plan.needed / GIB:.1f}", f"{plan.capacity / GIB:.0f}",
            "yes" if plan.fits else "[red]no[/red]", *(told if plan.compiles else [refused, "", "", "", ""]),
            f"{plan.compile_seconds:.0f} s",
        )  # fmt: skip
    return table


def duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def steps_table(plans: Sequence[Planned]) -> Table:
    """What a training step of each stage takes."""
    table = Table()
    table.add_column("stage")
    for column in ("step", "of which"):
        table.add_column(column)
    for stage in dict.fromkeys(plan.stage for plan in plans):
        own = [p for p in plans if p.stage == stage and p.often and p.compiles]
        total = sum(p.seconds * p.often for p in own)
        shares = ", ".join(f"{p.program} {p.seconds * p.often / total:.0%}" for p in own) if total else ""
        table.add_row(stage, duration(total), shares)
    return table


def collectives_table(plan: Planned) -> Table:
    """By kind and by how many devices take part."""
    table = Table()
    for column in ("collective", "devices", "times", "each, largest", "together", "beside computing"):
        table.add_column(column, justify="left" if column == "collective" else "right")
    groups: dict[tuple[str, int, bool], list[Moved]] = {}
    for moved in plan.collectives:
        groups.setdefault((moved.kind, moved.devices, moved.overlapped), []).append(moved)
    for (kind, devices, overlapped), all_of in groups.items():
        count, total = sum(m.times for m in all_of), sum(m.times * m.bytes for m in all_of)
        table.add_row(
            kind, str(devices), f"{count:.0f}", f"{max(m.bytes for m in all_of) / 1e6:.3g} MB",
            f"{total / 1e9:.3g} GB", "yes" if overlapped else "no",
        )  # fmt: skip
    return table


def search_table(tried: Sequence[Tried]) -> Table:
    table = Table()
    table.add_column("change")
    for column in ("HBM GiB", "fits", "update", "MFU"):
        table.add_column(column, justify="right")
    for one in tried:
        options = " ".join(one.change.options) or "(as it is)"
        if one.refused:
            table.add_row(f"{options}\n  {one.refused}", "", "[red]no[/red]", "", "")
            continue
        update = one.plans[-1]
        table.add_row(
            options, f"{one.needed / GIB:.1f}", "yes" if one.fits else "[red]no[/red]",
            duration(update.seconds) if update.compiles else "", f"{update.mfu:.1%}" if update.compiles else "",
        )  # fmt: skip
    return table


def plan_json(plan: ExperimentPlan, **about: Any) -> str:
    """`about` (topology, mesh, ...), the programs, and of searches what was tried."""

    def told(planned: Planned) -> dict[str, Any]:
        collectives = [moved._asdict() for moved in planned.collectives]
        return {
            **asdict(planned),
            "collectives": collectives,
            "needed": planned.needed,
            "fits": planned.fits,
        }

    searches = {
        stage: [
            {
                "options": one.change.options,
                "refused": one.refused,
                "fits": one.fits,
                "programs": list(map(told, one.plans)),
            }
            for one in tried
        ]
        for stage, tried in plan.searches.items()
    }
    made = {**about, "programs": list(map(told, plan.programs)), "searches": searches}
    return json.dumps(made, indent=1) + "\n"


def memory_picture(plans: Sequence[Planned], path: Path, title: str) -> None:
    """A bar for each program, of what lies in a device's memory while it runs, beside what there is."""
    names = list(dict.fromkeys(part for plan in plans for part, size in plan.parts.items() if size))
    figure = Figure(figsize=(8.5, 1.6 + 0.42 * len(plans)), layout="constrained")
    axes = figure.subplots()
    colors = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    labels = [f"{plan.stage}: {plan.program}" for plan in plans]
    left = [0.0] * len(plans)
    for number, name in enumerate(names):
        widths = [plan.parts.get(name, 0) / GIB for plan in plans]
        axes.barh(labels, widths, left=left, label=name, color=colors[number % len(colors)], height=0.62)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    refused = [
        max(plan.needed / GIB - at, 0) if not plan.compiles else 0
        for plan, at in zip(plans, left, strict=True)
    ]
    if any(refused):
        axes.barh(
            labels,
            refused,
            left=left,
            label="refused",
            color="none",
            edgecolor="tab:red",
            hatch="//",
            height=0.62,
        )
    capacity = plans[0].capacity / GIB
    axes.axvline(capacity, color="black", linestyle="--", linewidth=1)
    across = axes.get_xaxis_transform()
    axes.text(capacity, 0.99, f"{capacity:.0f} GiB ", transform=across, va="top", ha="right", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(capacity, *(plan.needed / GIB for plan in plans)) * 1.12)
    axes.set_xlabel("GiB of a device's memory")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=130)
