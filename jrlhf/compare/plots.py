"""The report's figures. Each is a function of the summary that returns panels and a computed caption.

Colours are Okabe and Ito's, safe for colour-blind readers, and shape or position says the same again. Text
and lines use a few fixed hex colours, so that the page can swap them for its light and dark variables.
A figure without data has no panels: its `missing` says in plain words what was not recorded.
"""

import io
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from scipy.optimize import isotonic_regression

from jrlhf.compare.evaluations import Policy
from jrlhf.compare.runs import Stage
from jrlhf.compare.statistics import Interval, not_dominated
from jrlhf.compare.summary import Row, Summary, limits, listed, number, signed
from jrlhf.metrics import DRIVER_REWARDS

PAPER, INK, MUTED, RULE = "#ffffff", "#1b1f24", "#5f6670", "#d8dce1"
BASELINE = "#747b85"
# Okabe & Ito (2008): blue, vermillion, bluish green, reddish purple, orange, sky blue.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 4.8  # inches; a phone shows it at about four fifths, so 9.5 pt text stays readable
DASHES = (0, (4, 2))
LINES = ("-", DASHES, (0, (1, 1.4)), (0, (6, 1.5, 1, 1.5)))  # where colours run out
BINS = 150  # points of a training curve after binning
LONG, MANY = 16, 7  # characters of a name, and names: from here they stand below the axes, not in them

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Panel:
    """One drawing, as SVG text and as PNG bytes. `alt` describes it to those who cannot see it."""

    slug: str
    svg: str
    png: bytes
    alt: str


@dataclass(frozen=True)
class Figure:
    """`finding` is what the figure shows, computed; `guide` is what to look at. Without panels `missing` says
    what was not recorded."""

    slug: str
    title: str
    finding: str = ""
    guide: str = ""
    panels: tuple[Panel, ...] = ()
    missing: str = ""


@dataclass(frozen=True)
class Look:
    color: str
    marker: str
    line: Any = "-"


def all_figures(summary: Summary) -> list[Figure]:
    """Every figure of the report, in reading order."""
    looks = policy_looks(summary)
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        return [
            frontier(summary, looks),
            win_rates(summary, looks),
            pareto(summary, looks),
            reward_and_kl(summary, looks),
            reward_parts(summary, looks),
            learning_curves(summary, looks),
            best_of_n(summary),
            gold_by_split(summary, looks),
            length_distribution(summary, looks),
        ]


def policy_looks(summary: Summary) -> dict[str, Look]:
    """Policy label -> its colour and marker, the same in every figure. Baselines are grey circles."""
    looks, used = {}, 0
    for row in summary.rows:
        if row.label in looks:
            continue
        if row.is_baseline:
            looks[row.label] = Look(BASELINE, "o")
        else:
            line = LINES[used // len(SERIES) % len(LINES)]
            looks[row.label] = Look(SERIES[used % len(SERIES)], MARKERS[(used + 1) % len(MARKERS)], line)
            used += 1
    return looks


# --- 1. the frontier ------------------------------------------------------------------------------------


def frontier(summary: Summary, looks: dict[str, Look]) -> Figure:
    """Gold against KL from the baseline, on a square-root scale (Gao et al. 2023 plot against √KL)."""
    title = "Gold reward against distance from the baseline"
    rows = [(row, row.kl) for row in summary.main if row.kl]
    if all(row.is_baseline for row, _ in rows):
        return Figure(
            "frontier", title, missing="The evaluation recorded no KL, so there is no frontier to draw."
        )
    below = _crowded([row.label for row, _ in rows])
    canvas, ax = _canvas(3.7)
    _square_root_axis(ax)
    key: list[tuple[str, Line2D]] = []
    boxes: list[tuple[float, float]] = []
    labels: list[tuple[float, float, str, str]] = []
    for evaluation in summary.evaluations:
        for curve in evaluation.best_of_n:
            if curve.kl is not None:
                x, y = curve.kl.mean(axis=0), curve.gold.mean(axis=0)
                ax.plot(x, y, color=MUTED, lw=1.2, ls=DASHES, zorder=2)
                ax.plot(x, y, ".", color=MUTED, ms=4, zorder=2)
                boxes += _along(x, y)
                of = curve.label or evaluation.label
                labels.append((x[-1], y[-1], f"best of n, to {curve.n[-1]} {of}".strip(), MUTED))
                key.append((labels[-1][2], Line2D([], [], color=MUTED, lw=1.2, ls=DASHES, marker=".", ms=4)))
    paths = 0
    for _, look, seeds in _trained(summary, looks):
        pair = _path_metrics(summary.reward_name, seeds)
        if pair:
            (_, y), (_, x) = (_mean_curve(seeds, name, bins=12) for name in pair)
            ax.plot(x, y, color=look.color, lw=1.1, ls=look.line, alpha=0.55, zorder=2)
            boxes += _along(x, y)
            paths += 1
    for row, kl in rows:
        _cross(ax, kl, row.gold, looks[row.label])
        look = looks[row.label]
        labels.append((kl.value, row.gold.value, row.label, look.color))
        key.append((row.label, Line2D([], [], color=look.color, marker=look.marker, ms=6, ls="")))
        boxes += _along(np.array(kl[1:]), np.full(2, row.gold.value)) if np.isfinite(kl.low) else []
        boxes += _along(np.full(2, kl.value), np.array(row.gold[1:])) if np.isfinite(row.gold.low) else []
        boxes.append((kl.value, row.gold.value))
    start = next(row for row, _ in rows if row.is_baseline)
    ax.axhline(start.gold.value, color=BASELINE, lw=0.9, ls=(0, (1, 2)), zorder=1)
    known = [e.gold_max for e in summary.evaluations if e.gold_max]
    if known:
        ax.axhline(known[0], color=MUTED, lw=0.9, zorder=1)
        ax.annotate(
            f"maximum {number(known[0])}", (1, known[0]), xycoords=("axes fraction", "data"),
            xytext=(0, -3), textcoords="offset points", ha="right", va="top", color=MUTED, fontsize=8.5,
        )  # fmt: skip
    right = max(x for x, _ in boxes)
    ax.set_xlim(-0.004 * right, right * 1.12)
    _kl_ticks(ax, right * 1.12)
    _y_title(ax, f"gold reward ({summary.reward_name})")
    ax.set_xlabel("KL from the baseline (nats per answer, square-root scale)")
    if below:
        _key(canvas, key)
    else:
        _place(ax, labels, boxes)
    others = [(row, kl) for row, kl in rows if not row.is_baseline]
    best, best_kl = max(others, key=lambda entry: entry[0].gold.value)
    top = max((row for row, _ in rows if row.is_baseline), key=lambda row: row.gold.value)
    found = f"{number(best.gold.value)} {limits(best.gold)} at {number(best_kl.value)} nats"
    if best.gold.value > top.gold.value:
        finding = f"{best.label} is highest: {found}."
    else:
        finding = (
            f"None is above {top.label}, the baseline ({number(top.gold.value)}); "
            f"the next is {best.label}: {found}."
        )
    finding += _against_best_of_n(summary, rows)
    guide = "Up is better, left is closer to the baseline. Bars are 95% intervals, dots the baseline's gold"
    guide += ", faint lines the way there while training, on the prompts used then." if paths else "."
    return _figure("frontier", title, finding, guide, [("frontier", canvas, title)])


def _path_metrics(reward_name: str, seeds: list[Stage]) -> tuple[str, str] | None:
    """The logged (gold, KL) of a policy on its way: of its rollouts, else of its evaluations while training."""
    pairs = ((_gold_metric(reward_name, seeds), "kl/ref_k1"), (f"eval/{reward_name}/mean", "eval/kl/mean"))
    for pair in pairs:
        if all(name in stage.curves and len(stage.curves[name][0]) > 2 for name in pair for stage in seeds):
            return pair
    return None


def _gold_metric(reward_name: str, seeds: list[Stage]) -> str:
    """The name under which rollouts logged the gold reward; it is the score where gold itself was trained on."""
    return TRAINED if seeds[0].config.get("reward") == reward_name else f"reward/{reward_name}/mean"


def _against_best_of_n(summary: Summary, rows: list[tuple[Row, Interval]]) -> str:
    """Whether each policy lies above best-of-n at its own KL: the comparison at an equal budget of KL."""
    above, below = [], []
    for evaluation in summary.evaluations:
        # With several curves there is no one height to be above or below.
        if len(evaluation.best_of_n) != 1 or evaluation.best_of_n[0].kl is None:
            continue
        curve = evaluation.best_of_n[0]
        x, y = evaluation.best_of_n[0].kl.mean(axis=0), curve.gold.mean(axis=0)
        for row, kl in rows:
            inside = row.evaluation == evaluation.label and x[0] < kl.value <= x[-1]
            if inside and not row.is_baseline and not np.isnan(kl.low):
                height = np.interp(np.sqrt(kl.value), np.sqrt(x), y)
                if row.gold.low > height:
                    above.append(row.label)
                elif row.gold.high < height:
                    below.append(row.label)
    found = [f"{listed(names)} {words}" for names, words in ((above, "above"), (below, "below")) if names]
    return f" Against best-of-n at equal KL: {'; '.join(found)}." if found else ""


# --- 2. the reward and the KL while training ------------------------------------------------------------


def reward_and_kl(summary: Summary, looks: dict[str, Look]) -> Figure:
    """For each policy trained on its own samples: gold and proxy against the update, KL below them."""
    title = "Reward and KL while training"
    panels, findings = [], []
    for label, look, seeds in _trained(summary, looks):
        logged = _names(seeds)
        gold = _gold_metric(summary.reward_name, seeds)
        proxies = [TRAINED] if TRAINED in logged and gold != TRAINED else []
        if gold not in logged and not proxies:
            continue
        rewards = _on_axes(seeds, [gold] if gold in logged else [], proxies)
        kl = ["kl/ref_k1"] if "kl/ref_k1" in logged else []
        heights = [1.45] * len(rewards) + [1.0] * len(kl)
        canvas = Canvas(figsize=(4.6, 1.1 * sum(heights) + 0.4), layout="constrained")
        axes = canvas.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        for ax, names in zip(axes, [*rewards, *([kl] if kl else [])], strict=True):
            ends = []
            for name in names:
                x, y = _draw_curves(
                    ax, seeds, name, MUTED if name in kl else look.color, DASHES if name in proxies else "-"
                )
                ends.append(
                    (x[-1], y[-1], "" if name in kl else _reward_label(name, gold, seeds), look.color)
                )
            _y_title(
                ax,
                "KL from the reference (nats per answer)"
                if names == kl
                else f"{_wrapped(label, 40)}: reward, batch mean",
            )
            _label_ends(ax, ends)
        axes[-1].set_xlabel("update")
        axes[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panels.append((f"training_{_slug(label)}", canvas, f"{title} {label}"))
        findings.append(f"{label}: {_course(seeds, gold, proxies)}")
    if not panels:
        missing = "No evaluated policy logged rewards while training, so there are no reward curves."
        return Figure("training", title, missing=missing)
    guide = (
        "Solid is the gold reward, dashed the reward that was trained on where the two differ. Gold that "
        "turns down while the dashed line rises is over-optimisation."
    )
    return _figure("training", title, " ".join(findings), guide, panels)


def _course(seeds: list[Stage], gold: str, proxies: list[str]) -> str:
    """Where the gold reward went, and where the trained one did."""
    parts = []
    if gold in _names(seeds):
        x, y = _mean_curve(seeds, gold)
        peak, noise = int(np.argmax(y)), np.std(np.diff(y)) if len(y) > 2 else 0.0
        if y[peak] - y[-1] > 3 * noise and peak < 0.8 * len(y):
            parts.append(
                f"gold peaks at {number(y[peak])} near update {x[peak]:.0f} and ends at {number(y[-1])}"
            )
        else:
            parts.append(f"gold goes from {number(y[0])} to {number(y[-1])} without a clear fall")
    else:
        parts.append("the gold reward was not logged")
    for name in proxies:
        _, y = _mean_curve(seeds, name)
        parts.append(
            f"the reward {_reward_label(name, gold, seeds)} goes from {number(y[0])} to {number(y[-1])}"
        )
    return "; ".join(parts) + "."


def _reward_label(name: str, gold: str, seeds: list[Stage]) -> str:
    return "gold" if name == gold else f"trained on {seeds[0].config.get('reward', 'score')}"


def _on_axes(seeds: list[Stage], gold: list[str], proxies: list[str]) -> list[list[str]]:
    """One axis when the two have comparable units, otherwise one each: never two scales on one axis."""
    if not gold or not proxies:
        return [gold + proxies]
    spans = [_span(_mean_curve(seeds, name)[1]) for name in gold + proxies]
    return [gold + proxies] if _comparable(spans) else [gold, proxies]


def _span(values: np.ndarray) -> tuple[float, float]:
    return float(np.min(values)), float(np.max(values))


def _comparable(spans: Sequence[tuple[float, float]]) -> bool:
    """Whether the smallest span still fills a quarter of an axis that holds them all."""
    whole = max(high for _, high in spans) - min(low for low, _ in spans)
    return whole == 0 or min(high - low for low, high in spans) / whole > 0.25


def reward_parts(summary: Summary, looks: dict[str, Look]) -> Figure:
    """For each policy trained on its own samples: the criteria or other parts of its rewards, against the update."""
    title = "Parts of the reward while training"
    panels, findings = [], []
    for label, _, seeds in _trained(summary, looks):
        config = seeds[0].config
        whole = {
            *DRIVER_REWARDS,
            summary.reward_name,
            config.get("reward"),
            config.get("gold"),
            *config.get("watch", ()),
        }
        found = [re.fullmatch(r"reward/([^/]+)/mean", name) for name in _names(seeds)]
        # Parts of watched rewards (`<name>.<part>`) are not what this one is made of.
        watched = tuple(f"{name}." for name in (config.get("gold"), *config.get("watch", ())) if name)
        parts = [m[0] for m in found if m and m[1] not in whole and not m[1].startswith(watched)]
        if not parts:
            continue
        canvas, ax = _canvas(2.6, width=4.6)
        lines, moves = [], []
        for i, name in enumerate(parts):
            color, line = SERIES[i % len(SERIES)], LINES[i // len(SERIES) % len(LINES)]
            part = name.split("/")[1]
            _, y = _draw_curves(ax, seeds, name, color, line)
            lines.append((part, Line2D([], [], color=color, ls=line)))
            moves.append(f"{part} from {number(y[0])} to {number(y[-1])}")
        ax.set_xlabel("update")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _y_title(ax, f"{_wrapped(label, 40)}: parts, batch mean")
        _key(canvas, lines)
        panels.append((f"parts_{_slug(label)}", canvas, f"{title} {label}"))
        findings.append(f"{label}: {', '.join(moves)}.")
    if not panels:
        return Figure("parts", title, missing="No policy was trained on a reward that has parts.")
    guide = "Each part in its own units: what a rising reward is made of, and which criterion pays for it."
    return _figure("parts", title, " ".join(findings), guide, panels)


# --- 3. learning curves ---------------------------------------------------------------------------------

TRAINED = "reward/score/mean"  # the reward that is learned from, without the KL penalty
CURVES = (
    ("kl/ref_k1", "KL from the reference (nats per answer)"),
    ("policy/entropy", "entropy (nats per token)"),
    ("rollout/len_mean", "answer length (tokens)"),
    ("rollout/eos_rate", "answers that end (share)"),
    ("pref/acc", "implicit reward accuracy"),
    ("pref/margin", "implicit reward margin"),
    ("rm/acc", "reward model accuracy"),
    ("train/loss", "training loss (nats per token)"),
)


def learning_curves(summary: Summary, looks: dict[str, Look]) -> Figure:
    """Small multiples, one metric each, of every stage that logged it."""
    title = "Learning curves"
    stages = [(label, look, seeds) for label, look, seeds in _trained(summary, looks)]
    stages += _untested(summary)
    wanted = (
        ("gold", f"gold reward ({summary.reward_name})"),
        (f"eval/{summary.reward_name}/mean", "gold reward on evaluation prompts"),
        *CURVES,
    )
    panels = []
    for name, words in wanted:
        metrics = [
            _gold_metric(summary.reward_name, seeds) if name == "gold" else name for *_, seeds in stages
        ]
        logged = [(*entry, m) for entry, m in zip(stages, metrics, strict=True) if m in _names(entry[2])]
        if not logged:
            continue
        canvas, ax = _canvas(2.2, width=3.5)
        below = _crowded([label for label, *_ in logged])
        ends = []
        for label, look, seeds, metric in logged:
            x, y = _draw_curves(ax, seeds, metric, look.color, look.line if below else "-")
            ends.append((x[-1], y[-1], label, look.color))
        ax.set_xlabel("update")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        _y_title(ax, words)
        if below:
            order = np.argsort([-end[1] for end in ends])  # as the lines end, from the top
            lines = [(label, Line2D([], [], color=look.color, ls=look.line)) for label, look, *_ in logged]
            _key(canvas, [lines[i] for i in order])
        else:
            _label_ends(ax, ends)
        panels.append((f"curve_{_slug(name)}", canvas, f"{words} against update"))
    if not panels:
        return Figure("learning_curves", title, missing="No stage logged a metric that this report draws.")
    entropy = [
        (label, _mean_curve(seeds, name)[1])
        for label, _, seeds in stages
        if (name := "policy/entropy") in _names(seeds)
    ]
    finding = "; ".join(f"{label} from {number(y[0])} to {number(y[-1])}" for label, y in entropy)
    guide = (
        "Thick lines are means over seeds and over bins of updates, faint lines are single seeds. Look for "
        "entropy or the share of answers that end falling towards zero, and for length or KL that keeps"
        " growing."
    )
    return _figure("learning_curves", title, f"Entropy: {finding}." if finding else "", guide, panels)


# --- 4. best of n ---------------------------------------------------------------------------------------


def best_of_n(summary: Summary) -> Figure:
    """Gold and proxy of the answer that the proxy ranks first among n."""
    title = "Best-of-n"
    found = [(curve.label or e.label, curve) for e in summary.evaluations for curve in e.best_of_n]
    if not found:
        return Figure("best_of_n", title, missing="The evaluation did not sample best-of-n.")
    panels, captions = [], []
    for label, curve in found:
        gold, proxy = curve.gold.mean(axis=0), None if curve.proxy is None else curve.proxy.mean(axis=0)
        together = proxy is None or _comparable([_span(gold), _span(proxy)])
        rows = 1 if together else 2
        canvas = Canvas(figsize=(WIDTH, 2.9 if together else 3.9), layout="constrained")
        axes = list(canvas.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
        gold_ax, proxy_ax = axes[0], axes[-1]
        for ax in axes:
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_locator(FixedLocator(list(curve.n)))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:.0f}"))
        if curve.low is not None and curve.high is not None:
            gold_ax.fill_between(
                curve.n, curve.low.mean(axis=0), curve.high.mean(axis=0), color=SERIES[0], alpha=0.16, lw=0
            )
        gold_ax.plot(curve.n, gold, color=SERIES[0], marker="o", ms=4)
        peak = int(np.argmax(gold))
        ends = [(curve.n[-1], gold[-1], "gold", SERIES[0])]
        if proxy is not None:
            proxy_ax.plot(curve.n, proxy, color=SERIES[1], marker="s", ms=3.5, ls=DASHES)
            ends.append((curve.n[-1], proxy[-1], "proxy", SERIES[1]))
        for ax in axes:
            _y_title(ax, "reward" if together else "gold reward" if ax is gold_ax else "proxy reward")
        if together:
            _label_ends(gold_ax, ends)
        axes[-1].set_xlabel("n, answers sampled per prompt (log scale)")
        panels.append((f"best_of_n{'_' + _slug(label) if label else ''}", canvas, f"{title} {label}".strip()))
        where = f"{label}: " if label else ""
        top = f"{number(gold[peak])} at n = {curve.n[peak]}"
        if 0 < peak < len(gold) - 1:
            captions.append(f"{where}gold peaks at {top} and is {number(gold[-1])} at n = {curve.n[-1]}")
        elif peak == 0:
            captions.append(f"{where}gold is highest without selection ({top})")
        else:
            captions.append(f"{where}gold is still highest at the largest n ({top})")
    finding = "; ".join(captions)
    guide = (
        "Of n answers the one that the proxy ranks first is kept; the band is a 95% interval of its gold. "
        "Where gold falls while the proxy rises, the proxy is being exploited."
    )
    return _figure("best_of_n", title, f"{finding[:1].upper()}{finding[1:]}.", guide, panels)


# --- 5 to 7. policies side by side ----------------------------------------------------------------------


def gold_by_split(summary: Summary, looks: dict[str, Look]) -> Figure:
    """A dot and interval for each policy on each split: what carries over to prompts held out of training."""
    title = "Gold reward by split"
    if len(summary.splits) < 2:
        return Figure(
            "gold_by_split",
            title,
            missing=f"Only one split ({summary.splits[0]}) was evaluated: nothing to compare.",
        )
    groups = {label: [row for row in summary.rows if row.label == label] for label in looks}
    lines: list[str | Row] = []
    for label, rows in groups.items():
        lines += [*_wrapped(label, 44).splitlines(), *rows]
    canvas, ax = _canvas(0.2 * len(lines) + 0.75)
    for y, line in enumerate(lines):
        if isinstance(line, Row):
            _bar(ax, line.gold, y, looks[line.label])
    _rows_axis(
        ax,
        range(len(lines)),
        [line.split if isinstance(line, Row) else "" for line in lines],
        len(lines) - 0.4,
    )
    ax.tick_params(axis="y", labelsize=8.5)
    for y, line in enumerate(lines):
        if not isinstance(line, Row):
            ax.annotate(
                line, (0, y), xycoords=("axes fraction", "data"), xytext=(2, 0), textcoords="offset points",
                va="center", fontsize=9.5, color=INK,
            )  # fmt: skip
    ax.set_xlabel(f"gold reward ({summary.reward_name}), mean and 95% interval", loc="right")
    drops = []
    for label, (first, *rest) in groups.items():
        if rest:
            worst = min(rest, key=lambda row: row.gold.value)
            drops.append((worst.gold.value - first.gold.value, f"{label} on {worst.split}"))
    drops.sort()
    most, least = drops[0], drops[-1]
    finding = (
        f"From the first split to its worst other split, gold changes most for {most[1]} ({signed(most[0])})"
    )
    finding += f" and least for {least[1]} ({signed(least[0])})." if len(drops) > 1 else "."
    guide = (
        "The first split resembles the training prompts, the others are held out. A policy that only learnt "
        "its training prompts drops to the left on them."
    )
    return _figure("gold_by_split", title, finding, guide, [("gold_by_split", canvas, title)])


def win_rates(summary: Summary, looks: dict[str, Look]) -> Figure:
    """Share of answers whose gold is above the baseline's on the same prompt."""
    rows = [(row, row.win) for row in summary.main if row.win]
    title = f"Win rate against {'the ' * (summary.baseline == 'baseline')}{summary.baseline}"
    if not rows:
        return Figure(
            "win_rates", title, missing="Only the baseline was evaluated, so there is nothing to win."
        )
    canvas, ax = _canvas(_row_height([row.label for row, _ in rows], 0.27) * len(rows) + 0.8)
    ax.axvline(50, color=MUTED, lw=0.9, zorder=1)
    for y, (row, win) in enumerate(rows):
        _bar(ax, win.scaled(100), y, looks[row.label])
        ax.annotate(
            f"{win.value:.0%}", (1, y), xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", va="center", fontsize=9, color=INK,
        )  # fmt: skip
    _rows_axis(ax, range(len(rows)), [row.label for row, _ in rows], len(rows) - 0.4, color=INK)
    ax.set_xlim(0, 100)
    ax.set_xlabel("answers with more gold than the baseline's (%), ties half", loc="right")
    clear = [row.label for row, win in rows if win.low > 0.5]
    worse = [row.label for row, win in rows if win.high < 0.5]
    level = [row.label for row, win in rows if not win.excludes(0.5)]
    found = [f"more than half are won by {listed(clear)}"] if clear else []
    found += [f"fewer than half by {listed(worse)}"] if worse else []
    found += [f"the interval includes 50% for {listed(level)}"] if level else []
    finding = "; ".join(found)
    guide = (
        "Each answer meets each of the baseline's answers to the same prompt. An interval that crosses 50% "
        "shows no difference."
    )
    return _figure(
        "win_rates", title, f"{finding[:1].upper()}{finding[1:]}.", guide, [("win_rates", canvas, title)]
    )


@dataclass(frozen=True)
class Front:
    """The policies of one evaluation that every one of its groups' gold rewards judged, on the main split."""

    evaluation: str
    groups: tuple[str, ...]  # two or more
    rows: tuple[Row, ...]  # two or more
    kept: tuple[bool, ...]  # by row: no other policy dominates it, by the means of all groups

    @property
    def by_label(self) -> dict[str, bool]:
        return {row.label: kept for row, kept in zip(self.rows, self.kept, strict=True)}


def fronts(summary: Summary) -> list[Front]:
    """The Pareto front of each evaluation with groups. Policies of two evaluations answered different prompts or
    have different baselines, and are not held against each other."""
    found = []
    for evaluation in summary.evaluations:
        rows = [row for row in summary.main if row.evaluation == evaluation.label]
        groups = tuple(dict.fromkeys(name for row in rows for name in row.groups))
        judged = tuple(row for row in rows if row.groups.keys() == {*groups})
        if len(groups) > 1 and len(judged) > 1:
            kept = not_dominated([[row.groups[name].value for name in groups] for row in judged])
            found.append(Front(evaluation.label, groups, judged, tuple(kept.tolist())))
    return found


def pareto(summary: Summary, looks: dict[str, Look]) -> Figure:
    """The policies by the gold rewards of two groups, with the front of those that no other dominates.

    A panel for each pair of the first three groups; dominance is by all groups.
    """
    title = "Gold reward of one group against another"
    found = fronts(summary)
    if not found:
        missing = "No two policies were judged by the gold rewards of two or more groups."
        return Figure("pareto", title, missing=missing)
    panels: list[tuple[str, Canvas, str]] = []
    findings = []
    for front in found:
        where = f"{front.evaluation}: " if front.evaluation else ""
        for x, y in combinations(front.groups[:3], 2):
            canvas = _pareto_panel(front, x, y, looks)
            slug = "pareto" if not panels else f"pareto_{len(panels) + 1}"
            panels.append((slug, canvas, f"{title}: {where}{y} against {x}"))
        names = [label for label, kept in front.by_label.items() if kept]
        if len(names) == 1:
            findings.append(f"{where}{names[0]} dominates every other policy.")
        elif len(names) == len(front.rows):
            findings.append(f"{where}None of the {len(names)} policies dominates another.")
        else:
            findings.append(f"{where}{len(names)} of {len(front.rows)} are not dominated: {listed(names)}.")
    guide = (
        "Up and to the right is better. Pale and hollow are dominated: another policy has at least as much gold of "
        "every group and more of one. This is by the means alone; bars are 95% intervals, and where they overlap "
        "another run may say otherwise. "
    )
    if any(len(front.groups) > 2 for front in found):
        guide += "The line is the front of a panel's two groups; a filled policy below it is kept by another group."
    else:
        guide += "What lies below the line is dominated."
    return _figure("pareto", title, " ".join(findings), guide, panels)


def _pareto_panel(front: Front, x: str, y: str, looks: dict[str, Look]) -> Canvas:
    canvas, ax = _canvas(4.2)
    boxes: list[tuple[float, float]] = []
    labels: list[tuple[float, float, str, str]] = []
    key: list[tuple[str, Line2D]] = []
    for row, kept in sorted(zip(front.rows, front.kept, strict=True), key=lambda entry: entry[1]):
        across, up, look = row.groups[x], row.groups[y], looks[row.label]
        _cross(ax, across, up, look, pale=not kept)
        boxes += _along(np.array(across[1:]), np.full(2, up.value)) if np.isfinite(across.low) else []
        boxes += _along(np.full(2, across.value), np.array(up[1:])) if np.isfinite(up.low) else []
        labels.append((across.value, up.value, _wrapped(row.label), look.color))
        fill = look.color if kept else PAPER
        key.append((row.label, Line2D([], [], color=look.color, mfc=fill, marker=look.marker, ms=6, ls="")))
    ax.margins(x=0.2, y=0.12)  # room for names
    ax.autoscale_view()
    points = np.array([label[:2] for label in labels])
    corners = _stairs(points[not_dominated(points)], ax.get_xlim()[0], ax.get_ylim()[0])
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())  # as they are: the line goes to the edges and not beyond
    ax.plot(*corners.T, color=MUTED, lw=1.1, zorder=2)
    for segment in pairwise(corners):
        boxes += _along(*np.array(segment).T)
    _y_title(ax, f"{_wrapped(y, 40)}, mean gold reward")
    ax.set_xlabel(f"{_wrapped(x, 40)}, mean gold reward")
    if not _place(ax, labels, boxes, only_clear=True):
        _key(canvas, key)
    return canvas


def _stairs(front: np.ndarray, left: float, bottom: float) -> np.ndarray:
    """Corners [C, 2] of the edge of what the points `front` [P, 2], none dominated, dominate: from the left edge
    along the highest, down to the next, and at last to the bottom edge."""
    front = np.unique(front, axis=0)  # by x, so that y falls
    x, y = np.repeat(front[:, 0], 2), np.repeat(front[:, 1], 2)
    return np.stack([np.concatenate([[left], x]), np.concatenate([y, [bottom]])], axis=1)


def length_distribution(summary: Summary, looks: dict[str, Look]) -> Figure:
    """How long the answers are: a histogram per policy on a shared axis, with the median marked."""
    title = "Length of answers"
    lengths: list[tuple[str, np.ndarray, float]] = []
    for evaluation in summary.evaluations:
        for policy in evaluation.policies:
            split = policy.splits.get(evaluation.main_split)
            if split is not None:
                values = np.concatenate([np.asarray(a, float) for run in split.length for a in run])
                ended = np.concatenate([np.asarray(a, float) for run in split.ended for a in run]).mean()
                lengths.append((policy.label, values, float(ended)))
    longest = max(values.max() for _, values, _ in lengths)
    bins = np.arange(-0.5, longest + 1.5) if longest < 64 else np.linspace(0, longest, 49)
    canvas, ax = _canvas(_row_height([label for label, *_ in lengths], 0.42) * len(lengths) + 0.75)
    for row, (label, values, ended) in enumerate(lengths):
        counts, _ = np.histogram(values, bins)
        height = 0.82 * counts / counts.max()
        color = looks[label].color
        ax.stairs(row - height, bins, baseline=row, fill=True, color=color, alpha=0.3, lw=0)
        ax.stairs(row - height, bins, baseline=row, color=color, lw=1.0)
        ax.plot([np.median(values)] * 2, [row, row - 0.9], color=INK, lw=1.4)
        ax.annotate(
            f"median {np.median(values):.0f}\n{ended:.0%} end", (1, row - 0.4),
            xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", va="center", fontsize=8, color=MUTED,
        )  # fmt: skip
    _rows_axis(
        ax, np.arange(len(lengths)) - 0.4, [label for label, _, _ in lengths], len(lengths) - 0.95, color=INK
    )
    ax.set_ylim(len(lengths) - 0.95, -1.05)
    ax.set_xlabel("response tokens; each row is scaled to its own mode", loc="right")
    first = np.median(lengths[0][1])
    longer = max(lengths, key=lambda entry: np.median(entry[1]))
    finding = f"The baseline's median is {first:.0f} tokens"
    finding += (
        f"; the longest is {longer[0]} with {np.median(longer[1]):.0f}."
        if np.median(longer[1]) > first
        else "; no policy's is longer."
    )
    guide = "Length can stand in for quality: check it before believing a gain. The bar marks the median."
    return _figure("length", title, finding, guide, [("length", canvas, title)])


# --- curves ---------------------------------------------------------------------------------------------


def _policies(summary: Summary) -> list[Policy]:
    return [policy for evaluation in summary.evaluations for policy in evaluation.policies]


def _trained(summary: Summary, looks: dict[str, Look]) -> list[tuple[str, Look, list[Stage]]]:
    """Evaluated policies whose training left curves, with the stage of each training run."""
    found = []
    for policy in _policies(summary):
        stages = [stage for stage in policy.stages if stage.curves]
        if stages and policy.kl_exact is None:
            found.append((policy.label, looks[policy.label], stages))
    return found


def _untested(summary: Summary) -> list[tuple[str, Look, list[Stage]]]:
    """Stages that trained something which was not itself evaluated, each once: a reward model."""
    seen = {stage.folder.name for policy in _policies(summary) for stage in policy.stages}
    found: dict[tuple[str, str], list[Stage]] = {}
    for run in summary.runs:
        for stage in run.stages:
            if stage.folder.name not in seen and stage.curves:
                seen.add(stage.folder.name)
                found.setdefault((stage.name, run.name), []).append(stage)
    names = [name for name, _ in found]
    return [
        (
            name if names.count(name) == 1 else f"{name} ({run.rpartition('-')[2]})",
            Look(MUTED, "o", LINES[(i + 1) % len(LINES)]),
            stages,
        )
        for i, ((name, run), stages) in enumerate(found.items())
    ]


def _names(seeds: Iterable[Stage]) -> list[str]:
    return list(dict.fromkeys(name for stage in seeds for name in stage.curves))


def _binned(x: np.ndarray, y: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of at most `bins` runs of neighbouring points, as long as each other: an uneven split would
    smooth one part of a curve and leave the rest rough."""
    width = -(-len(x) // bins)
    parts = np.array_split(np.arange(len(x)), len(x) // width)
    return np.array([x[part].mean() for part in parts]), np.array([y[part].mean() for part in parts])


def _mean_curve(seeds: list[Stage], name: str, bins: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """The mean over seeds, then over bins of steps."""
    curves = [stage.curves[name] for stage in seeds if name in stage.curves]
    steps, where = np.unique(np.concatenate([x for x, _ in curves]), return_inverse=True)
    values = np.concatenate([y for _, y in curves])
    return _binned(steps, np.bincount(where, values) / np.bincount(where), bins)


def _draw_curves(
    ax: Axes, seeds: list[Stage], name: str, color: str, line: Any = "-"
) -> tuple[np.ndarray, np.ndarray]:
    """Faint lines of the seeds and a thick one of their mean, which is returned."""
    for stage in seeds:
        if name in stage.curves:
            ax.plot(*_binned(*stage.curves[name], BINS), color=color, lw=0.7, alpha=0.35)
    x, y = _mean_curve(seeds, name)
    ax.plot(x, y, color=color, ls=line)
    return x, y


# --- drawing --------------------------------------------------------------------------------------------


def _canvas(height: float, width: float = WIDTH) -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=(width, height), layout="constrained")
    return canvas, canvas.add_subplot()


def _y_title(ax: Axes, words: str) -> None:
    """The vertical axis is named above it, upright, where it can be read."""
    ax.set_title(words, color=MUTED, fontsize=9)


def _cross(ax: Axes, x: Interval, y: Interval, look: Look, pale: bool = False) -> None:
    """A marker with its intervals as bars. `pale`: faint bars and a hollow marker, for what steps back."""
    alpha = 0.4 if pale else 1.0
    if np.isfinite(x.low):
        ax.plot([x.low, x.high], [y.value] * 2, color=look.color, lw=1.5, alpha=alpha, zorder=3)
    if np.isfinite(y.low):
        ax.plot([x.value] * 2, [y.low, y.high], color=look.color, lw=1.5, alpha=alpha, zorder=3)
    fill = PAPER if pale else look.color
    ax.plot(x.value, y.value, look.marker, color=look.color, mfc=fill, ms=7, zorder=4)


def _bar(ax: Axes, interval: Interval, y: float, look: Look) -> None:
    if np.isfinite(interval.low):
        ax.plot([interval.low, interval.high], [y, y], color=look.color, lw=2.2, zorder=2)
    ax.plot(interval.value, y, look.marker, color=look.color, ms=6.5, zorder=3)


def _crowded(names: Sequence[str]) -> bool:
    """Whether names are too long or too many to stand beside what they name."""
    return max(map(len, names)) > LONG or len(names) > MANY


def _row_height(names: Sequence[str], least: float) -> float:
    """Inches that a row needs to hold its name."""
    return max(least, 0.1 + 0.14 * max(_wrapped(name).count("\n") + 1 for name in names))


def _wrapped(name: str, width: int = 28) -> str:
    """A long name in several lines, broken before its parenthesis where it has one."""
    parts = name.replace(" (", "\n(").splitlines() if len(name) > width else [name]
    return "\n".join(line for part in parts for line in textwrap.wrap(part, width))


def _key(canvas: Canvas, entries: Sequence[tuple[str, Line2D]]) -> None:
    """Names below the axes, in as many columns as fit; the figure grows by their height."""
    names = [_wrapped(name, 44) for name, _ in entries]
    width, height = canvas.get_size_inches()
    across = max(len(line) for name in names for line in name.splitlines()) * 0.075 + 0.45  # inches at 8 pt
    columns = max(1, min(len(names), int(width / across)))
    rows = -(-len(names) // columns)
    lines = max(sum(n.count("\n") + 1 for n in names[i : i + rows]) for i in range(0, len(names), rows))
    canvas.set_size_inches(width, height + 0.15 * lines + 0.15)
    canvas.legend(
        [handle for _, handle in entries], names, loc="outside lower left", ncols=columns, frameon=False,
        fontsize=8, labelcolor=INK, handlelength=1.8, columnspacing=1.2, labelspacing=0.3, borderpad=0.2,
    )  # fmt: skip


def _rows_axis(
    ax: Axes, ticks: Iterable[float], names: Sequence[str], bottom: float, color: str = MUTED
) -> None:
    size = 9 if max(map(len, names)) <= LONG else 8
    ax.set_yticks(list(ticks), [_wrapped(name) for name in names], color=color, fontsize=size)
    ax.set_ylim(bottom, -0.6)
    ax.grid(False, axis="y")
    ax.spines["left"].set_visible(False)


def _square_root_axis(ax: Axes) -> None:
    ax.set_xscale(
        "function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2)
    )


def _kl_ticks(ax: Axes, right: float) -> None:
    decade = np.floor(np.log10(right))
    steps = [step * 10**power for power in (decade, decade - 1, decade - 2) for step in (8, 6, 5, 4, 3, 2, 1)]
    kept = [0.0]
    for step in steps:  # downwards, so that the far end is named
        if step <= right and min(abs(np.sqrt(step) - np.sqrt(other)) for other in kept) > 0.1 * np.sqrt(
            right
        ):
            kept.append(step)
    ax.xaxis.set_major_locator(FixedLocator(kept))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _label_ends(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names beside the ends of lines, pushed apart as little as possible (isotonic regression)."""
    ends = sorted((end for end in ends if end[2]), key=lambda end: end[1])
    if not ends:
        return
    ax.margins(y=0.08)
    low, high = ax.get_ylim()
    share = ax.get_subplotspec().get_position(ax.figure).height  # type: ignore[union-attr, arg-type]
    gap = 11.5 / (ax.figure.get_figheight() * 72 * share) * (high - low)  # type: ignore[union-attr]
    offsets = gap * np.arange(len(ends))
    places = isotonic_regression(np.array([end[1] for end in ends]) - offsets).x + offsets
    for (_, _, text, color), place in zip(ends, places, strict=True):
        ax.annotate(
            text, (1, place), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8.5, color=color, annotation_clip=False,
        )  # fmt: skip
    ax.set_ylim(low, high)


def _along(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    """Points along a polyline, for labels to keep clear of."""
    at = np.linspace(0, len(x) - 1, 8 * len(x))
    return list(zip(np.interp(at, np.arange(len(x)), x), np.interp(at, np.arange(len(x)), y), strict=True))


def _place(
    ax: Axes,
    labels: list[tuple[float, float, str, str]],
    lines: list[tuple[float, float]],
    only_clear: bool = False,
) -> bool:
    """Put each name near its point, on the side where it covers the least of markers, lines and names.

    A name that had to go further away, or that stands about as near to another point, is tied to its own by a thin line
    in the point's colour. Returns whether no name covers another, a marker or the frame; with `only_clear` nothing is
    drawn where one would.
    """
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]  # no sub-figures here
    scale = 72 / ax.figure.dpi  # pixels to points
    frame = np.asarray(ax.get_window_extent().extents) * scale
    thin = _squares(ax.transData.transform(lines) * scale, 1.5)
    spots = ax.transData.transform([label[:2] for label in labels]) * scale
    marks = _squares(spots, 4)
    every = [_candidates(spots, i, text) for i, (_, _, text, _) in enumerate(labels)]
    costs = [
        each.cost
        + _overlap(each.boxes, thin)
        + 40 * _overlap(each.boxes, marks)
        + 40_000 * _beyond(each.boxes[:, 0], frame)
        for each in every
    ]
    chosen: dict[int, int] = {}
    for i in [*range(len(labels))] * 4:  # the first places were taken before the last names were there
        others = np.concatenate([marks[:0], *(every[j].boxes[c] for j, c in chosen.items() if j != i)])
        chosen[i] = int(np.argmin(costs[i] + 40 * _overlap(every[i].boxes, others)))
    names = np.array([every[i].boxes[chosen[i], 0] for i in range(len(labels))])
    clear = not _beyond(names, frame).any() and all(
        _overlap(names[i : i + 1], np.concatenate([marks, np.delete(names, i, axis=0)])) == 0
        for i in range(len(names))
    )
    for i, (px, py, text, color) in enumerate(labels if clear or not only_clear else []):
        dx, dy, reach = every[i].steps[chosen[i]]
        tied = color != MUTED and (reach > 13 or every[i].doubtful[chosen[i]])
        tie = {"arrowstyle": "-", "color": color, "lw": 0.8, "shrinkA": 0, "shrinkB": 4}
        note = ax.annotate(
            text, (px, py), xytext=(dx * reach, dy * reach), textcoords="offset points", zorder=5, fontsize=9,
            color=MUTED if color == MUTED else INK, ha={1: "left", 0: "center", -1: "right"}[dx], va="center",
            arrowprops=tie | {"relpos": (0.5 - dx / 2, 0.5 - dy / 2 * (dx == 0))} if tied else None,
        )  # fmt: skip
        note.set_in_layout(False)  # a name must not squeeze the axes, however it lies
    return clear


@dataclass(frozen=True)
class _Candidates:
    """Where a name may stand, C places. `boxes` [C, 1 + K, 4] (left, bottom, right, top, in points) are it and dots of
    the line that may tie it; `doubtful` [C] are those where another point is about as near."""

    steps: list[tuple[int, float, int]]  # dx, dy and reach: the name is anchored at reach * (dx, dy)
    boxes: np.ndarray
    doubtful: np.ndarray
    cost: np.ndarray  # [C]


def _candidates(spots: np.ndarray, own: int, text: str) -> _Candidates:
    """Of the name `text` of the point `spots[own]`, all [N, 2] in points."""
    (x, y), width = spots[own], 5.6 * max(map(len, text.splitlines()))
    height = 12.0 * (text.count("\n") + 1) - 3
    sides = [(dx, dy) for dx in (1, -1) for dy in (0, 1, -1, 0.5, -0.5)] + [(0, 1), (0, -1)]
    steps = [(dx, dy, reach) for reach in (9, 13, 18, 26, 36, 48, 62, 78) for dx, dy in sides]
    boxes = []
    for dx, dy, reach in steps:
        left = x + dx * reach - (width if dx < 0 else width / 2 if dx == 0 else 0)
        base = y + dy * reach - height / 2
        tie = np.linspace(6 / reach, 1, 12)[:, None] * [dx * reach, dy * reach] + [x, y]
        boxes.append(np.concatenate([[[left, base, left + width, base + height]], _squares(tie, 1)]))
    names = np.array(boxes)[:, None, 0]
    away = np.maximum(np.maximum(names[..., :2] - spots, spots - names[..., 2:]), 0)  # [C, N, 2]
    away = np.hypot(away[..., 0], away[..., 1])
    doubtful = np.any(np.delete(away, own, axis=1) < away[:, own, None] + 5, axis=1)
    cost = np.array([2.0 * reach + 4 * (dx == 0) for dx, _, reach in steps]) + 20 * doubtful
    return _Candidates(steps, np.array(boxes), doubtful, cost)


def _squares(centres: np.ndarray, half: float) -> np.ndarray:
    """[N, 2] -> [N, 4]"""
    return np.concatenate([centres - half, centres + half], axis=1)


def _beyond(boxes: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Whether boxes [N, 4] reach out of the frame [4]."""
    return np.any(boxes[:, :2] < frame[:2], axis=1) | np.any(boxes[:, 2:] > frame[2:], axis=1)


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The area that boxes [..., K, 4] share with others [M, 4], summed over both: [...]."""
    sides = np.minimum(boxes[..., None, 2:], others[:, 2:]) - np.maximum(boxes[..., None, :2], others[:, :2])
    return np.prod(np.maximum(sides, 0), axis=-1).sum(axis=(-1, -2))


def _figure(
    slug: str, title: str, finding: str, guide: str, canvases: list[tuple[str, Canvas, str]]
) -> Figure:
    return Figure(slug, title, finding, guide, tuple(_render(*canvas) for canvas in canvases))


def _render(slug: str, canvas: Canvas, alt: str) -> Panel:
    svg, png = io.StringIO(), io.BytesIO()
    canvas.draw_without_rendering()
    canvas.set_layout_engine("none")  # laid out once; each format would otherwise do it again
    nameless = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": slug}):  # the same data give the same file
        canvas.savefig(svg, format="svg", facecolor="none", metadata=nameless)
        canvas.savefig(png, format="png", facecolor=PAPER, dpi=150, metadata={"Software": None})
    return Panel(slug, svg.getvalue(), png.getvalue(), alt)


def inline_svg(panel: Panel, swap: Callable[[str], str]) -> str:
    """The panel's `<svg>` element for an HTML page: unique ids, colours through `swap`, the page's fonts.

    `swap` maps a hex colour such as `#1b1f24` to a CSS colour.
    """
    text = panel.svg[panel.svg.index("<svg") :]
    text = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", text)
    text = re.sub(
        r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{panel.alt}"', text, count=1
    )
    text = re.sub(r'\bid="([^"]+)"', rf'id="{panel.slug}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{panel.slug}-", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    return re.sub(r"#[0-9a-f]{6}\b", lambda match: swap(match.group()), text)


def _slug(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_").lower()
