"""What must show on Larder (claims B1, B3 to B7, B9 and B10), from finished runs to numbers and pictures.

    python benchmarks/larder.py collect B3 runs/larder-best-of-n-...    reads the run, writes benchmarks/larder/B3.json
    python benchmarks/larder.py table                                   prints the table of docs/lab.md
    python benchmarks/larder.py plot                                    draws every JSON there is, into docs/images

Each JSON has the command, the versions, every seed's own numbers, and for each part of the claim its mean over seeds, a
95% interval (Student's t over seeds), the bound, and whether the mean meets it. Nothing is left out that fails.
"""

import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy import stats

from jrlhf.config import UserError
from jrlhf.experiment import stage_folders
from jrlhf.metrics import read_metrics
from jrlhf.training.monitors import Alarms, Monitor

HERE = Path(__file__).parent / "larder"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
FORMS: dict[str, Callable] = {"d(a - b d)": lambda d: d, "d(a - b log d)": np.log}  # best-of-n's, and RL's


def fit(d: np.ndarray, gain: np.ndarray) -> dict[str, dict[str, float]]:
    """R(d) = d (a - b f(d)) by least squares (Gao et al. 2022, eq. 1), for both forms: a, b and R² of the gain."""
    keep = d > 0
    d, gain = d[keep], gain[keep]
    found = {}
    for form, f in FORMS.items():
        columns = np.stack([d, -d * f(d)], axis=1)
        (a, b), *_ = np.linalg.lstsq(columns, gain, rcond=None)
        residual = gain - columns @ np.array([a, b])
        found[form] = {"a": a, "b": b, "r2": 1 - np.sum(residual**2) / np.sum((gain - gain.mean()) ** 2)}
    return found


def smoothed(x: np.ndarray, width: int = 5) -> np.ndarray:
    """Centred means over `width` steps; fewer at the ends."""
    half = width // 2
    return np.array([x[max(0, i - half) : i + half + 1].mean() for i in range(len(x))])


def part(values: list[float], at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """One part of a claim, over seeds."""
    x = np.asarray(values, np.float64)
    spread = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else float("nan")
    met = (at_least is None or x.mean() >= at_least) and (at_most is None or x.mean() <= at_most)
    out = {"seeds": x.tolist(), "mean": x.mean(), "low": x.mean() - spread, "high": x.mean() + spread}
    return out | {"at_least": at_least, "at_most": at_most, "met": bool(met)}


# --- one function a claim: {seed: {stage: folder}} -> {"curves": by seed, "parts": by name} ---------------------


def b1(seeds: dict) -> dict:
    """PPO on gold: at least 88% of the maximum at KL <= 2.5 within 100 updates of 128."""
    rows = {seed: evaluated(left["evaluate"]) for seed, left in seeds.items()}
    return {
        "curves": {seed: training(left["ppo"]) for seed, left in seeds.items()},
        "parts": {
            "share of the maximum": part(
                [r["ppo"]["gold"] / r["ppo"]["maximum"] for r in rows.values()], at_least=0.88
            ),
            "KL": part([r["ppo"]["kl"] for r in rows.values()], at_most=2.5),
            "SFT's share": part([r["sft"]["gold"] / r["sft"]["maximum"] for r in rows.values()]),
            "alarms raised": part([len(result(left["ppo"], "alarms")) for left in seeds.values()], at_most=0),
        },
    }


def b3(seeds: dict) -> dict:
    """Best-of-n: peak at n in 4..32, gold at 256 <= 0.8 peak, proxy monotone, R(d) fits; no fall by gold itself."""
    curves: dict = {}
    for seed, left in seeds.items():
        table = json.loads((left["by_reward_model"] / "best_of_n.json").read_text())
        by_gold = json.loads((left["by_gold"] / "best_of_n.json").read_text())
        mean = lambda t, name: [float(np.mean(t["per_prompt"][name][str(n)])) for n in t["n"]]  # noqa: E731
        curves[seed] = {
            "n": table["n"], "kl": table["kl"], "gold": mean(table, "gold"), "proxy": mean(table, "proxy"),
            "by_gold": mean(by_gold, "gold"),
            "accuracy": result(left["reward_model"], "held_out_accuracy_against")["gold"],
        }  # fmt: skip
        gold = np.array(curves[seed]["gold"])
        curves[seed]["fit"] = fit(np.sqrt(table["kl"]), gold - gold[0])
    each = list(curves.values())
    gold, proxy, by_gold = (np.array([c[k] for c in each]) for k in ("gold", "proxy", "by_gold"))
    peak = gold.argmax(axis=1)
    r2 = lambda form: [c["fit"][form]["r2"] for c in each]  # noqa: E731
    mean_fit = fit(np.sqrt(each[0]["kl"]), gold.mean(axis=0) - gold[:, 0].mean())
    return {
        "curves": curves,
        "fit of the mean over seeds": mean_fit,
        "parts": {
            "n of the peak": part([each[0]["n"][i] for i in peak], 4, 32),
            "gold at 256 over the peak": part(gold[:, -1] / gold.max(axis=1), at_most=0.8),
            "least step of the proxy": part(np.diff(proxy, axis=1).min(axis=1), at_least=0.0),
            "R² of d(a - b d), each seed": part(r2("d(a - b d)"), at_least=0.97),
            "R² of d(a - b d), mean over seeds": part([mean_fit["d(a - b d)"]["r2"]], at_least=0.97),
            "R² of it less that of d(a - b log d)": part(
                [a - b for a, b in zip(r2("d(a - b d)"), r2("d(a - b log d)"), strict=True)], at_least=0.0
            ),
            "least step when gold itself chooses": part(np.diff(by_gold, axis=1).min(axis=1), at_least=0.0),
        },
    }


def b4(seeds: dict) -> dict:
    """PPO, beta 0: gold >= 1.8 SFT before KL 3, <= 0.5 peak by KL 12, proxy does not fall; R(d) of the RL form."""
    curves, fits = {}, []
    parts: dict[str, list] = {"rise": [], "fall": [], "proxy": [], "kl": []}
    course = {seed: training(left["ppo"]) for seed, left in seeds.items()}
    start = float(np.mean([c["gold"][0] for c in course.values()]))  # every first batch is SFT's
    for seed, c in course.items():
        kl, gold, proxy = (smoothed(np.array(c[k])) for k in ("kl", "gold", "proxy"))
        late = int(np.argmax(kl >= 12)) if (kl >= 12).any() else len(kl) - 1
        parts["rise"].append(gold[kl <= 3].max() / start)
        parts["fall"].append(gold[late] / gold[: late + 1].max())
        parts["proxy"].append(proxy[late] - proxy[: late + 1][gold[: late + 1].argmax()])
        parts["kl"].append(kl.max())
        found = fit(np.sqrt(np.maximum(kl[: late + 1], 0)), gold[: late + 1] - start)
        curves[seed] = c | {"fit": found}
        fits.append(found)
    r2 = lambda form: [f[form]["r2"] for f in fits]  # noqa: E731
    # The mean over seeds up to KL 12, at equal steps of √KL.
    grid = np.linspace(0.1, np.sqrt(12.0), 60)
    mean_fit = fit(grid, on_grid(list(curves.values()), "gold", grid).mean(axis=0) - start)
    return {
        "curves": curves,
        "fit of the mean over seeds": mean_fit,
        "parts": {
            "gold before KL 3 over SFT's": part(parts["rise"], at_least=1.8),
            "gold at KL 12 over the peak": part(parts["fall"], at_most=0.5),
            "proxy at KL 12 less at gold's peak": part(parts["proxy"], at_least=0.0),
            "largest KL": part(parts["kl"], at_least=12.0),
            "R² of d(a - b log d), each seed": part(r2("d(a - b log d)"), at_least=0.95),
            "R² of d(a - b log d), mean over seeds": part([mean_fit["d(a - b log d)"]["r2"]], at_least=0.95),
            "R² of it less that of d(a - b d)": part(
                [a - b for a, b in zip(r2("d(a - b log d)"), r2("d(a - b d)"), strict=True)], at_least=0.0
            ),
            "steps from the first alarm to gold's fall": part(
                early := [warning(left["ppo"], "held_out") for left in seeds.values()]
            ),
            "seeds with an alarm before gold's fall": part([np.mean(np.array(early) > 0)], at_least=1.0),
        },
    }


def b5(seeds: dict) -> dict:
    """RLOO and PPO at equal beta: KL within 15%, gold within 0.15, >= 90% of their peak; GRPO drifts >= 1.5 times."""
    arms = [name for name in next(iter(seeds.values())) if name in ("ppo", "rloo", "dr_grpo", "grpo")]
    curves = {seed: {arm: training(left[arm]) for arm in arms} for seed, left in seeds.items()}
    final = {seed: evaluated(left["evaluate"]) for seed, left in seeds.items()}
    of = lambda arm, what: np.array([final[seed][arm][what] for seed in seeds])  # noqa: E731
    kept = {}
    for arm in arms:
        gold = [smoothed(np.array(curves[seed][arm]["gold"]), 9) for seed in seeds]
        kept[f"{arm}: gold at the end over its peak"] = part(
            [g[-1] / g.max() for g in gold], at_least=0.9 if arm in ("ppo", "rloo") else None
        )
    return {
        "curves": curves,
        "final": {arm: {k: part(of(arm, k)) for k in ("gold", "kl", "length")} for arm in ("sft", *arms)},
        "parts": {
            "RLOO's KL over PPO's": part(of("rloo", "kl") / of("ppo", "kl"), 0.85, 1.15),
            "RLOO's gold less PPO's": part(of("rloo", "gold") - of("ppo", "gold"), -0.15, 0.15),
            "GRPO's KL over the mean of theirs": part(
                2 * of("grpo", "kl") / (of("rloo", "kl") + of("ppo", "kl")), at_least=1.5
            ),
            **kept,
        },
    }


def b6(seeds: dict) -> dict:
    """Length-biased labels: length >= 2x, gold below SFT; with length regressed out >= 70% of the clean arm's peak."""
    arms = ("clean", "biased", "restored")
    curves = {seed: {arm: training(left[arm]) for arm in arms} for seed, left in seeds.items()}
    final = {seed: evaluated(left["evaluate"]) for seed, left in seeds.items()}
    of = lambda arm, what: np.array([final[seed][arm][what] for seed in seeds])  # noqa: E731
    peak = lambda arm: np.array([smoothed(np.array(c[arm]["gold"])).max() for c in curves.values()])  # noqa: E731
    return {
        "curves": curves,
        "final": {arm: {k: part(of(arm, k)) for k in ("gold", "kl", "length")} for arm in ("sft", *arms)},
        "parts": {
            "biased: length over SFT's": part(of("biased", "length") / of("sft", "length"), at_least=2.0),
            "biased: gold less SFT's": part(of("biased", "gold") - of("sft", "gold"), at_most=0.0),
            "corrected: gold over the clean arm's peak": part(
                of("restored", "gold") / peak("clean"), at_least=0.7
            ),
            "corrected: peak over the clean arm's": part(peak("restored") / peak("clean")),
            "corrected: length over SFT's": part(of("restored", "length") / of("sft", "length")),
            "biased: steps from the first alarm to gold's fall": part(
                early := [warning(left["biased"], "larder_gold") for left in seeds.values()]
            ),
            "biased: seeds with an alarm before gold's fall": part(
                [np.mean(np.array(early) > 0)], at_least=1.0
            ),
        },
    }


def b7(seeds: dict) -> dict:
    """DPO: implicit accuracy >= 0.83; the beta sweep with its KL; some beta within 0.1 of RLOO's (here PPO's) gold."""
    arms = [name for name in next(iter(seeds.values())) if name.startswith("dpo_")]
    final = {seed: evaluated(left["evaluate"]) for seed, left in seeds.items()}
    of = lambda arm, what: np.array([final[seed][arm][what] for seed in seeds])  # noqa: E731
    accuracy = {
        arm: [result(left[arm], "implicit_accuracy_against")["gold"] for left in seeds.values()]
        for arm in arms
    }
    best = max(arms, key=lambda arm: np.mean(of(arm, "gold")))
    return {
        "curves": {},
        "final": {
            arm: {k: part(of(arm, k)) for k in ("gold", "kl")}
            | ({"accuracy": part(accuracy[arm])} if arm in arms else {})
            for arm in ("sft", "ppo", *arms)
        },
        "parts": {
            f"implicit accuracy of {best}": part(accuracy[best], at_least=0.83),
            f"gold of {best} less PPO's": part(of(best, "gold") - of("ppo", "gold"), at_least=-0.1),
        },
    }


def b9(seeds: dict) -> dict:
    """Ensembles of 5 at 25% flips: best-of-n's fall from its peak to n = 256 halved by one of the two careful ones."""
    arms = ("one", "mean", "worst", "careful", "worst_of_own", "careful_own")
    curves: dict = {}
    for seed, left in seeds.items():
        tables = {arm: json.loads((left[f"by_{arm}"] / "best_of_n.json").read_text()) for arm in arms}
        gold = {
            arm: [float(np.mean(t["per_prompt"]["gold"][str(n)])) for n in t["n"]]
            for arm, t in tables.items()
        }
        curves[seed] = {"n": tables["one"]["n"], "kl": tables["one"]["kl"], **gold}
    fall = {arm: np.array([max(c[arm]) - c[arm][-1] for c in curves.values()]) for arm in arms}
    share = lambda arm, **bound: part([fall[arm].mean() / fall["one"].mean()], **bound)  # noqa: E731
    careful = min(("worst", "careful"), key=lambda arm: fall[arm].mean())
    own = min(("worst_of_own", "careful_own"), key=lambda arm: fall[arm].mean())
    return {
        "curves": curves,
        "parts": {
            **{f"{arm}: gold's fall by n = 256": part(fall[arm]) for arm in arms},
            **{f"{arm}: peak of gold": part([max(c[arm]) for c in curves.values()]) for arm in arms},
            **{f"{arm}: fall over that of one model": share(arm) for arm in arms[1:]},
            "the better careful one: fall over that of one model": share(careful, at_most=0.5),
            "the better one with labels of their own: fall over that of one model": share(own, at_most=0.5),
        },
    }


def b10(seeds: dict) -> dict:
    """Labellers of two groups: pooled, each loses some of its own gold; who learns of the groups recovers it."""
    final = {seed: evaluated(left["evaluate"]) for seed, left in seeds.items()}
    arms = [name for name in next(iter(final.values())) if name.startswith("ppo_")]
    of = lambda arm, group: np.array(  # noqa: E731
        [final[seed][arm]["groups"][f"larder_gold_{group}"] for seed in seeds]
    )
    gain = lambda arm, group: of(arm, group) - of("sft", group)  # noqa: E731
    told = lambda model, group: np.array(  # noqa: E731
        [group_accuracy(left[model], group) for left in seeds.values()]
    )
    worse = {arm: np.minimum(gain(arm, "B"), gain(arm, "C")) for arm in arms}
    parts = {}
    for group in "BC":
        better = told(f"rm_{group}", group) - told("reward_model", group)
        parts[f"{group}: held-out accuracy of its own model less the pooled one's"] = part(
            better, at_least=0.0
        )
    for group in "BC":
        for own in (f"ppo_{group}", f"ppo_head_{group}"):
            lost = of(own, group) - of("ppo_pooled", group)
            parts[f"{group}: gold of {own} less the pooled one's"] = part(lost, at_least=0.0)
    apart = [told_apart(left["rm_mixture"]) for left in seeds.values()]
    parts["labellers that the mixture puts with their group"] = part(apart, at_least=0.9)
    for arm in ("ppo_mean", "ppo_vote", "ppo_worst", "ppo_worst_of_mixture"):
        parts[f"group that gains less over SFT: {arm} less the pooled one"] = part(
            worse[arm] - worse["ppo_pooled"]
        )
    return {
        "curves": {},
        "final": {
            arm: {group: part(of(arm, group)) for group in "BC"}
            | {"kl": part([final[seed][arm]["kl"] for seed in seeds])}
            for arm in ("sft", *arms)
        },
        "parts": parts,
    }


CLAIMS = {"B1": b1, "B3": b3, "B4": b4, "B5": b5, "B6": b6, "B7": b7, "B9": b9, "B10": b10}


# --- reading runs -----------------------------------------------------------------------------------------------


def training(folder: Path) -> dict[str, list[float]]:
    rows = [row for row in read_metrics(folder) if "kl/ref_k1" in row]
    names = {
        "kl": "kl/ref_k1",
        "gold": "reward/larder_gold/mean",
        "proxy": "reward/score/mean",
        "length": "rollout/len_mean",
    }
    gold_is_the_reward = names["gold"] not in rows[0]
    if gold_is_the_reward:
        names["gold"] = names["proxy"]
    return {name: [round(row[metric], 5) for row in rows] for name, metric in names.items()}


def warning(folder: Path, held_out: str) -> int:
    """Steps from the first alarm until gold (smoothed) is a fifth below its peak, or training ends. Without an alarm
    they are negative: the steps that came after gold's fall."""
    rows = [row for row in read_metrics(folder) if "kl/ref_k1" in row]
    gold = smoothed(np.array([row["reward/larder_gold/mean"] for row in rows]))
    fallen = gold < 0.8 * np.maximum.accumulate(gold)
    end = int(np.argmax(fallen)) if fallen.any() else len(rows)
    monitor = Monitor(Alarms(), held_out)  # as the rules are now: they read metrics alone
    for row in rows:
        monitor.observe(row["step"], row)
    raised = [alarm.step for alarm in monitor.raised]
    return end + 1 - min(raised, default=len(rows) + 1)


def result(folder: Path, name: str) -> Any:
    return json.loads((folder / "done.json").read_text())["results"].get(name)


def group_accuracy(folder: Path, group: str) -> float:
    """Of a reward model on the held-out pairs of a group's labellers."""
    told = [
        of for who, of in result(folder, "held_out_accuracy_of_labelers").items() if who.startswith(group)
    ]
    return float(np.average([of["accuracy"] for of in told], weights=[of["pairs"] for of in told]))


def told_apart(folder: Path) -> float:
    """The share of labellers whom a mixture of two puts with their group, whichever type is called the first."""
    is_first = [
        (who[0] == "B", types[0] > 0.5) for who, types in result(folder, "types")["of_raters"].items()
    ]
    right = float(np.mean([is_b == first for is_b, first in is_first]))
    return max(right, 1.0 - right)


def evaluated(folder: Path) -> dict[str, dict[str, float]]:
    """{policy: its means on prompts like those of training, and the best mean that there is}"""
    maximum = json.loads((folder / "evaluation.json").read_text())["gold_max"]
    found = json.loads((folder / "done.json").read_text())["results"]
    return {policy: splits["eval"] | {"maximum": maximum} for policy, splits in found.items()}


def collect(claim: str, run: Path) -> Path:
    left: dict[str, dict[str, Path]] = {}
    for stage, by_seed in stage_folders(run).items():
        for seed, folder in by_seed.items():
            left.setdefault(seed, {})[stage] = folder
    # With --seed_from, what all seeds start from stands under the first.
    shared = left[min(left, key=int)]
    found = CLAIMS[claim]({seed: shared | left[seed] for seed in sorted(left, key=int)})
    about = {
        "claim": CLAIMS[claim].__doc__,
        "run": run.name,
        "jax": jax.__version__,
        "machine": platform.machine(),
    }
    out = HERE / f"{claim}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(about | found, indent=1, default=float) + "\n")
    for name, p in found["parts"].items():
        bounds = [
            f"{sign} {p[key]}" for key, sign in (("at_least", ">="), ("at_most", "<=")) if p[key] is not None
        ]
        verdict = ["met" if p["met"] else "NOT MET"] if bounds else []
        print(
            claim,
            f"{name:42} {p['mean']:8.3f} [{p['low']:.3f}, {p['high']:.3f}]",
            *bounds,
            *verdict,
            sep="  ",
        )
    return out


def table() -> list[str]:
    """Lines of a Markdown table: every part of every claim that has a bound."""
    lines = ["| claim | part | mean over seeds, 95% interval | bound | |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        file = HERE / f"{claim}.json"
        for name, p in json.loads(file.read_text())["parts"].items() if file.exists() else ():
            bounds = [
                f"{sign} {p[key]:g}"
                for key, sign in (("at_least", "≥"), ("at_most", "≤"))
                if p[key] is not None
            ]
            if not bounds:
                continue
            interval = f" [{p['low']:.2f}, {p['high']:.2f}]" if len(p["seeds"]) > 1 else ""
            verdict = "" if p["met"] else "**not met**"
            lines.append(
                f"| {claim} | {name} | {p['mean']:.2f}{interval} | {', '.join(bounds)} | {verdict} |"
            )
    return lines


# --- pictures ---------------------------------------------------------------------------------------------------


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for claim, draw in {
        "B3": plot_b3,
        "B4": plot_b4,
        "B5": plot_b5,
        "B6": plot_b6,
        "B9": plot_b9,
        "B10": plot_b10,
    }.items():
        file = HERE / f"{claim}.json"
        if not file.exists():
            print(f"{file.name} is not there yet")
            continue
        figure, ax = plt.subplots(figsize=(6.4, 4.0), constrained_layout=True)
        draw(ax, json.loads(file.read_text()))
        ax.spines[["top", "right"]].set_visible(False)
        figure.savefig(IMAGES / f"larder_{claim.lower()}.png", dpi=150)
        plt.close(figure)
        print(IMAGES / f"larder_{claim.lower()}.png")


def band(ax, x: np.ndarray, ys: np.ndarray, label: str, color: str) -> None:
    """The mean over seeds with its 95% band, each seed a thin line."""
    for y in ys:
        ax.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
    mean = ys.mean(axis=0)
    if len(ys) > 1:
        spread = stats.t.ppf(0.975, len(ys) - 1) * ys.std(axis=0, ddof=1) / np.sqrt(len(ys))
        ax.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)
    ax.plot(x, mean, color=color, label=label, linewidth=2)


def plot_b3(ax, data: dict) -> None:
    each = list(data["curves"].values())
    d = np.sqrt(each[0]["kl"])
    of = lambda name: np.array([c[name] for c in each])  # noqa: E731
    band(ax, d, of("by_gold"), "gold, chosen by gold", "tab:green")
    band(ax, d, of("gold"), "gold, chosen by the reward model", "tab:blue")
    proxy = of("proxy")
    scaled = (proxy - proxy[:, :1]) / (proxy[:, -1:] - proxy[:, :1])
    gold0, top = of("gold")[:, 0].mean(), of("by_gold")[:, -1].mean()
    band(ax, d, gold0 + scaled * (top - gold0), "the reward model's own score (scaled)", "tab:gray")
    ax.set(
        xlabel="√KL to SFT, of best-of-n (nats)",
        ylabel="gold reward",
        title="Best-of-n on Larder: choosing harder by a proxy",
    )
    ax.legend(frameon=False)


def on_grid(curves: list[dict], name: str, grid: np.ndarray) -> np.ndarray:
    """[seeds, grid] a metric against √KL, interpolated between steps smoothed over 5."""
    rows = []
    for c in curves:
        d = np.sqrt(np.maximum(smoothed(np.array(c["kl"])), 0))
        order = np.argsort(d)
        rows.append(np.interp(grid, d[order], smoothed(np.array(c[name]))[order]))
    return np.array(rows)


def plot_b4(ax, data: dict) -> None:
    each = list(data["curves"].values())
    grid = np.linspace(0.1, min(np.sqrt(max(c["kl"])) for c in each), 60)
    gold, proxy = on_grid(each, "gold", grid), on_grid(each, "proxy", grid)
    band(ax, grid, gold, "gold", "tab:blue")
    band(ax, grid, proxy, "reward model", "tab:gray")
    a, b = (np.mean([c["fit"]["d(a - b log d)"][k] for c in each]) for k in "ab")
    start = np.mean([c["gold"][0] for c in each])
    ax.plot(
        grid, start + grid * (a - b * np.log(grid)), "k--", linewidth=1, label=f"d({a:.2f} - {b:.2f} log d)"
    )
    ax.set(
        xlabel="√KL to SFT (nats)", ylabel="reward", title="PPO without a KL penalty, against a reward model"
    )
    ax.legend(frameon=False)


def plot_b5(ax, data: dict) -> None:
    names = {
        "ppo": "PPO",
        "rloo": "RLOO",
        "dr_grpo": "Dr. GRPO, KL in the reward",
        "grpo": "GRPO as published",
    }
    for color, (arm, label) in zip(
        ("tab:orange", "tab:blue", "tab:green", "tab:red"), names.items(), strict=True
    ):
        each = [by_arm[arm] for by_arm in data["curves"].values()]
        grid = np.linspace(0.1, min(np.sqrt(max(c["kl"])) for c in each), 60)
        band(ax, grid, on_grid(each, "gold", grid), label, color)
    ax.set(
        xlabel="√KL to SFT (nats)",
        ylabel="gold reward",
        title="One beta: gold along training",
    )
    ax.legend(frameon=False)


def plot_b6(ax, data: dict) -> None:
    names = {
        "clean": ("clean labels", "tab:blue"),
        "biased": ("labels that pay for length", "tab:red"),
        "restored": ("the same, length regressed out", "tab:green"),
    }
    for arm, (label, color) in names.items():
        gold = np.array([smoothed(np.array(by_arm[arm]["gold"])) for by_arm in data["curves"].values()])
        band(ax, np.arange(1, gold.shape[1] + 1), gold, label, color)
    ax.set(xlabel="step", ylabel="gold reward", title="PPO on Larder where labellers like length")
    ax.legend(frameon=False)


def plot_b9(ax, data: dict) -> None:
    names = {
        "one": ("one reward model", "tab:gray"),
        "mean": ("mean of five", "tab:blue"),
        "worst": ("worst of five", "tab:green"),
        "careful": ("mean less variance", "tab:orange"),
    }
    each = list(data["curves"].values())
    for arm, (label, color) in names.items():
        band(ax, np.sqrt(each[0]["kl"]), np.array([c[arm] for c in each]), label, color)
    ax.set(
        xlabel="√KL to SFT, of best-of-n (nats)",
        ylabel="gold reward",
        title="Best-of-n by an ensemble, a quarter of the labels turned round",
    )
    ax.legend(frameon=False)


def plot_b10(ax, data: dict) -> None:
    kinds = {
        "sft": "tab:gray",
        "ppo_pooled": "black",
        "ppo_B": "tab:blue",
        "ppo_head_B": "tab:blue",
        "ppo_C": "tab:orange",
        "ppo_head_C": "tab:orange",
    }
    below, left = {"ppo_B", "ppo_C", "ppo_worst", "ppo_mean"}, {"ppo_worst_of_mixture", "ppo_C"}
    for arm, of in data["final"].items():
        x, y = (np.asarray(of[group]["seeds"]) for group in "BC")
        color = kinds.get(arm, "tab:green")
        ax.plot(x, y, ".", color=color, alpha=0.3)
        ax.plot(x.mean(), y.mean(), "o", color=color)
        ax.annotate(
            arm.removeprefix("ppo_").replace("_", " "),
            (x.mean(), y.mean()),
            textcoords="offset points",
            xytext=(-5 if arm in left else 5, -11 if arm in below else 5),
            ha="right" if arm in left else "left",
            fontsize=8,
            color=color,
        )
    ax.set(
        xlabel="gold of group B, which wants hazards refused",
        ylabel="gold of group C, which wants to hear of them",
        title="Policies for opposed groups (large: mean over seeds)",
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["collect", claim, run] if claim in CLAIMS:
            print(collect(claim, Path(run)))
        case ["table"]:
            print("\n".join(table()))
        case ["plot"]:
            plot()
        case _:
            raise UserError(__doc__ or "")
