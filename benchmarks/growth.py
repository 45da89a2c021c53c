"""How cost grows: time and memory of a step against each size by itself, and a run of many steps against its start.

Each size of a train step, an update and sampling is doubled several times while the others stay. The exponent is the
slope of the last doubling in logarithms: 1 is proportional, 2 quadratic. Only attention may be more than proportional
to anything, and it only to length. Memory is what the compiler says a program needs for temporaries, time a median.
`steps` runs ten thousand steps of a driver, and looks at the process's memory and at the steps' time on the way.

    python benchmarks/growth.py run       writes benchmarks/growth.json and docs/images/growth_*.png
    python benchmarks/growth.py run --only sft.length steps
    python benchmarks/growth.py table     as markdown
"""

import argparse
import json
import math
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console

from jrlhf import __version__
from jrlhf.algorithms.grpo import GRPOConfig, make_grpo
from jrlhf.algorithms.sft import SFTConfig, make_sft
from jrlhf.config import MeshConfig, StageContext
from jrlhf.experiment import keep_memory
from jrlhf.models.config import ModelConfig
from jrlhf.models.transformer import Model
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.rollout.rollout import rollout
from jrlhf.rollout.sampling import SamplingConfig, make_sampling
from jrlhf.sharding import make_mesh
from jrlhf.training.data import one_per_row
from jrlhf.training.loop import LoopConfig, guarded
from jrlhf.training.offline import train_offline
from jrlhf.types import Prompts, Rollout, SequenceBatch

HERE = Path(__file__).parent
RESULTS = HERE / "growth.json"
IMAGES = HERE.parent / "docs" / "images"

BASE = ModelConfig(
    vocab_size=2048, d_model=128, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=384, context=4096, tie_embeddings=False
)  # fmt: skip
# workload -> size -> values; where a size is not varied it has its first value here.
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "sft": {
        "batch": (4, 8, 16, 32, 64),
        "length": (128, 256, 512, 1024, 2048),
        "vocabulary": (2048, 4096, 8192, 16384, 32768),
        "layers": (2, 4, 8, 16),
    },
    "generate": {
        "prompts": (16, 32, 64, 128, 256),
        "group": (1, 2, 4, 8, 16),
        "new tokens": (64, 128, 256, 512, 1024),
        "vocabulary": (2048, 4096, 8192, 16384, 32768),
    },
    "grpo": {"group": (2, 4, 8, 16, 32), "prompts": (4, 8, 16, 32)},
}
STEPS = 10_000
WINDOW = 100  # steps between two looks at the process
Timed = tuple[Callable[[], Any], Any]  # a call that is to be timed, and its compiled program


def params_of(config: ModelConfig) -> tuple[Model, Any]:
    model = Model(config)
    return model, jax.jit(model.init)(jax.random.key(0))


def sft(sizes: dict[str, int]) -> Timed:
    model, params = params_of(replace(BASE, vocab_size=sizes["vocabulary"], n_layers=sizes["layers"]))
    algorithm = make_sft(SFTConfig(), model, build_optimizer(OptimConfig(), STEPS))
    b, t = sizes["batch"], sizes["length"]
    rng = np.random.default_rng(0)
    batch = SequenceBatch(
        rng.integers(0, sizes["vocabulary"], (b, t), np.int32),
        np.ones((b, t), np.int32),
        np.broadcast_to(np.arange(t, dtype=np.int32), (b, t)),
        np.broadcast_to(np.arange(t) > 0, (b, t)),
    )
    return step_of(algorithm.train_step, algorithm.init(params, jax.random.key(1)), batch)


def step_of(train_step: Callable, state: Any, batch: Any) -> Timed:
    batch = jax.tree.map(jax.numpy.asarray, batch)
    compiled = jax.jit(train_step, donate_argnums=0).lower(state, batch).compile()

    def call() -> None:
        nonlocal state
        state, _ = compiled(state, batch)
        jax.block_until_ready(state)

    return call, compiled


def generate(sizes: dict[str, int]) -> Timed:
    model, params = params_of(replace(BASE, vocab_size=sizes["vocabulary"]))
    sampling = make_sampling(SamplingConfig(max_new_tokens=sizes["new tokens"]), (), 0)
    q, p = sizes["prompts"], 64
    prompts = Prompts(np.ones((q, p), np.int32), np.ones((q, p), bool))
    draw = partial(rollout, model, group=sizes["group"], slots=16)
    arguments = (params, prompts, jax.random.key(1), sampling)
    compiled = draw.func.lower(model, *arguments, group=sizes["group"], slots=16).compile()
    return lambda: jax.block_until_ready(draw(*arguments)), compiled


def grpo(sizes: dict[str, int]) -> Timed:
    """One update, with the prompts shared by their groups."""
    model, params = params_of(BASE)
    group, p, r = sizes["group"], 64, 64
    config = GRPOConfig(group_size=group, share_prompts=True)
    algorithm = make_grpo(config, model, build_optimizer(OptimConfig(), STEPS))
    n = sizes["prompts"] * group
    rng = np.random.default_rng(0)
    prompts = np.repeat(rng.integers(0, 2048, (sizes["prompts"], p), np.int32), group, axis=0)
    tokens = np.concatenate([prompts, rng.integers(0, 2048, (n, r), np.int32)], axis=1)
    full, zeros = np.ones((n, p + r), bool), np.zeros((n, r), np.float32)
    samples = Rollout(tokens, full, full[:, p:], zeros, np.ones(n, bool))
    state = algorithm.init(params, params, jax.random.key(1))
    batch = jax.jit(algorithm.make_batch)(state, samples, rng.standard_normal(n).astype(np.float32))
    reference = state.ref_params

    step = guarded(algorithm.train_step, LoopConfig(steps=STEPS))
    train_step = lambda state, batch: step(state, reference, batch)  # noqa: E731
    copied = jax.tree.map(jax.numpy.copy, state._replace(ref_params=None, key=None))
    return step_of(train_step, copied._replace(key=state.key), batch)


WORKLOADS = {"sft": sft, "generate": generate, "grpo": grpo}


def along(workload: str, size: str) -> dict:
    """Cost at each value of one size."""
    first = {name: values[0] for name, values in SIZES[workload].items()}
    points = []
    for value in SIZES[workload][size]:
        call, compiled = WORKLOADS[workload](first | {size: value})
        call()
        seconds = []
        while len(seconds) < 5 or (sum(seconds) < 2 and len(seconds) < 50):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
        memory = compiled.memory_analysis().temp_size_in_bytes
        points.append({"value": value, "seconds": float(np.median(seconds)), "temporaries": int(memory)})
        print(f"{workload}.{size} {value}: {points[-1]['seconds']:.4f} s, {memory / 1e6:.1f} MB", flush=True)
    slope = lambda what: math.log2(points[-1][what] / points[-2][what])  # noqa: E731
    return {"others": first, "points": points} | {
        what: round(slope(what) / math.log2(points[-1]["value"] / points[-2]["value"]), 2)
        for what in ("seconds", "temporaries")
    }


def endurance() -> dict:
    """SFT of a tiny model through the driver, with its logs; the process's memory and the steps' time on the way."""
    config = replace(BASE, vocab_size=64, d_model=16, n_heads=2, n_kv_heads=2, d_ff=32, context=32)
    model = Model(config)
    looks: list[dict] = []

    def look(state: Any, done: int) -> dict:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        looks.append(
            {"step": done, "time": time.perf_counter(), "rss_mb": pages * resource.getpagesize() / 1e6}
        )
        return {}

    rng = np.random.default_rng(0)
    rows = one_per_row([list(map(int, rng.integers(1, 64, 16))) for _ in range(256)], 16, 0)
    with tempfile.TemporaryDirectory() as folder:
        quiet = Console(quiet=True)
        ctx = StageContext("", None, Path(folder), {}, {}, 0, MeshConfig(), quiet, Path(folder))  # type: ignore
        mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
        loop = LoopConfig(steps=STEPS, batch_size=8, eval_every=WINDOW, checkpoint_every=1000)
        algorithm = make_sft(SFTConfig(), model, build_optimizer(OptimConfig(), STEPS))
        start = (model.init(jax.random.key(0)), jax.random.key(1))
        with jax.set_mesh(mesh):
            train_offline(ctx, mesh, loop, STEPS, algorithm, start, model.logical_axes(), rows, look)
    taken = [(b["time"] - a["time"]) / WINDOW for a, b in pairwise(looks)]
    tenth = max(len(taken) // 10, 1)
    return {
        "steps": STEPS,
        "seconds_a_step_first_tenth": float(np.median(taken[:tenth])),
        "seconds_a_step_last_tenth": float(np.median(taken[-tenth:])),
        "rss_mb": {str(x["step"]): round(x["rss_mb"], 1) for x in looks[:: max(len(looks) // 10, 1)]},
        "rss_growth_mb": round(looks[-1]["rss_mb"] - looks[len(looks) // 10]["rss_mb"], 1),
    }


def plot(results: dict) -> None:
    for workload, sizes in SIZES.items():
        found = {size: results.get(f"{workload}.{size}") for size in sizes}
        if not all(found.values()):
            continue
        figure, axes = plt.subplots(2, len(sizes), figsize=(2.6 * len(sizes), 4.6), constrained_layout=True)
        for column, (size, data) in zip(axes.T, found.items(), strict=True):
            values = [p["value"] for p in data["points"]]
            for ax, what, scale, label in zip(
                column, ("seconds", "temporaries"), (1e3, 1e-6), ("ms", "MB of temporaries"), strict=True
            ):
                costs = [p[what] * scale for p in data["points"]]
                ax.loglog(values, costs, "o-", color="#0072b2", base=2)
                straight = [costs[-1] * v / values[-1] for v in values]
                ax.loglog(values, straight, ":", color="#747b85", base=2)
                ax.set_xlabel(size)
                ax.set_ylabel(label)
                ax.set_title(f"exponent {data[what]}", fontsize=9)
                ax.set_xticks(values, [str(v) for v in values], fontsize=7)
                ax.minorticks_off()
        figure.suptitle(f"{workload}: cost against each size; dotted: proportional", fontsize=10)
        figure.savefig(IMAGES / f"growth_{workload}.png", dpi=130)
        plt.close(figure)


def table(results: dict) -> str:
    lines = ["| | from | to | time grows as | temporaries grow as |", "|---|---:|---:|---:|---:|"]
    for workload, sizes in SIZES.items():
        for size in sizes:
            if data := results.get(f"{workload}.{size}"):
                ends = data["points"][-2]["value"], data["points"][-1]["value"]
                lines.append(
                    f"| {workload}: {size} | {ends[0]:,} | {ends[1]:,} | {size}^{data['seconds']:.2f} | "
                    f"{size}^{data['temporaries']:.2f} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("do", choices=("run", "table"))
    names = [f"{w}.{s}" for w, sizes in SIZES.items() for s in sizes] + ["steps"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="WORKLOAD.SIZE")
    asked = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if asked.do == "table":
        print(table(results))
        return
    keep_memory()
    for name in asked.only:
        found = endurance() if name == "steps" else along(*name.split(".", 1))
        versions = {"jrlhf": __version__, "jax": jax.__version__, "python": platform.python_version()}
        results[name] = found | {"versions": versions}
        RESULTS.write_text(json.dumps({n: results[n] for n in names if n in results}, indent=1) + "\n")
    plot(results)


if __name__ == "__main__":
    main()
