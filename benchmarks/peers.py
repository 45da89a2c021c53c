"""Speed and memory beside TRL (PyTorch) and Tunix (JAX), on the same model, data, type and cores.

Each library runs in its own loop, in a process of its own and, but for jrlhf, in an environment of its own, which this
script makes under build/peers. Of each workload the libraries take turns, a segment of so many steps each, round after
round. Warm-up (compilation) does not count; how long it took is kept beside. docs/performance.md says what is measured.

    python benchmarks/peers.py run                         everything, into benchmarks/peers.json and the guide's table
    python benchmarks/peers.py run --only sft dpo --libraries jrlhf trl --rounds 3
    python benchmarks/peers.py run --only sft --batch 16 --length 512 --layers 8 --d 512 --out wider.json
    python benchmarks/peers.py table                       the guide's table again, from the JSON

`--env trl=PYTHON` takes an environment that exists. An hour on two cores, and some GB for the environments.
"""

import argparse
import itertools
import json
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS, GUIDE = HERE / "peers.json", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- begin: python benchmarks/peers.py table -->", "<!-- end -->"

# A pin names one build everywhere; where the index at hand also has a CPU build of it, pip may be pointed there.
HUGGING_FACE = ["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0"]
ENVIRONMENTS = {
    "trl": [*HUGGING_FACE, "trl==1.16.0"],
    "trl-ppo": [*HUGGING_FACE, "trl==1.12.0"],  # the last release that has PPO
    "tunix": ["google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8"],
}
LIBRARIES = {"jrlhf": "jrlhf", "trl": "TRL", "tunix": "Tunix"}
VOCABULARY = 4096
REAL_LENGTH = 512


@dataclass(frozen=True)
class Workload:
    """What is measured. `batch`: rows, pairs or prompts of a step; generation: rows that a peer draws at a time."""

    name: str
    title: str
    kind: str  # a key of WORKLOADS in the libraries' scripts
    batch: int
    steps: int  # of a segment
    length: int = 0  # tokens of a sequence
    prompt: int = 64
    new: int = 0  # tokens of an answer
    group: int = 1  # answers to each prompt
    epochs: int = 1
    rows: int = 0  # prompts of a generation
    skewed: bool = False  # answers end: mean a quarter of `new`
    real: bool = False  # dialogues, of their own lengths
    variants: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of a library: each is measured


PAIRS = {"jrlhf": ("", "packed")}
WORKLOADS = [
    Workload("generate_8", "generate: 8 rows, 128 tokens each", "generate", 8, 2, new=128, rows=8),
    Workload("generate_32", "generate: 32 rows, 128 tokens each", "generate", 32, 1, new=128, rows=32),
    Workload(
        "generate_skewed", "generate: 128 rows that end, 31 tokens on average", "generate", 32, 1, new=128,
        rows=128, skewed=True,
    ),
    Workload("sft", "SFT: 8 x 256", "sft", 8, 5, length=256),
    Workload("reward_model", "reward model: 8 pairs x 256", "reward_model", 8, 3, length=256, variants=PAIRS),
    Workload("dpo", "DPO: 8 pairs x 256", "dpo", 8, 2, length=256, variants=PAIRS),
    Workload(
        "sft_real", "SFT: 8 rows, dialogues", "sft", 8, 5, length=REAL_LENGTH, real=True,
        variants={"jrlhf": ("packed",), "trl": ("grouped", "packing")},
    ),
    Workload(
        "reward_model_real", "reward model: 8 pairs, dialogues", "reward_model", 8, 3, length=REAL_LENGTH, real=True,
        variants=PAIRS,
    ),
    Workload("dpo_real", "DPO: 8 pairs, dialogues", "dpo", 8, 2, length=REAL_LENGTH, real=True, variants=PAIRS),
    Workload("grpo", "GRPO: 8 prompts x 8 answers, 64 + 64", "grpo", 8, 1, new=64, group=8),
    Workload("ppo", "PPO: 32 x (64 + 64), 4 epochs", "ppo", 32, 1, new=64, epochs=4),
]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Of the model: Llama, untied, float32."""

    layers: int = 4
    d: int = 256
    heads: int = 4
    kv_heads: int = 2
    ff: int = 1024
    vocab: int = VOCABULARY
    context: int = 1024


# --- data ---------------------------------------------------------------------------------------------------------


def random_data(w: Workload, vocab: int) -> dict[str, list]:
    rng = np.random.default_rng(0)
    draw = lambda n, length: rng.integers(4, vocab, (n, length)).tolist()  # noqa: E731
    if w.kind == "sft":
        both = zip(draw(256, w.prompt), draw(256, w.length - w.prompt), strict=True)
        return {"examples": [{"prompt": p, "answer": a} for p, a in both]}
    if w.kind in ("reward_model", "dpo"):
        parts = draw(256, w.prompt), draw(256, w.length - w.prompt), draw(256, w.length - w.prompt)
        return {"pairs": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(*parts, strict=True)]}
    return {"prompts": draw(w.rows or 256, w.prompt)}


def real_data(w: Workload, vocab: int, folder: Path, build: Path) -> dict[str, list]:
    """Dialogues of hh-harmless-base as ids of one tokenizer: what precedes the last answer, and the answers."""
    from jrlhf.data.tokenizer import load_tokenizer, train_sentencepiece

    file = folder / "hh-harmless-base" / "pairs.jsonl"
    if not file.exists():
        raise FileNotFoundError(f"no dialogues at {file}: give --data the folder of the public sample data")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    home = build / f"tokenizer-{vocab}"
    if (home / "tokenizer.model").exists():
        tokenizer = load_tokenizer(home)
    else:
        tokenizer = train_sentencepiece((row["chosen"] for row in rows), vocab, home)
    pairs = []
    for row in rows:
        (head, sep, chosen), (other, _, rejected) = (
            row[w].rpartition("\n\nAssistant:") for w in ("chosen", "rejected")
        )
        if head != other:
            continue
        prompt, end = tokenizer.encode(head + sep), [tokenizer.eos_ids[0]]
        ids = {
            name: tokenizer.encode(text) + end for name, text in (("chosen", chosen), ("rejected", rejected))
        }
        if len(prompt) + max(map(len, ids.values())) <= w.length:
            pairs.append({"prompt": prompt, **ids})
    if w.kind == "sft":
        return {"examples": [{"prompt": p["prompt"], "answer": p["chosen"]} for p in pairs]}
    return {"pairs": pairs}


def write_tokenizer(folder: Path, vocab: int) -> Path:
    """A tokenizer whose text is `w17 w4 ...`, in the files that every library reads. Ids 0 to 3 are special."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    ids = {token: i for i, token in enumerate([*special, *(f"w{i}" for i in range(4, vocab))])}
    flags = {
        "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True,
    }  # fmt: skip
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": "<unk>"},
    }
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    card = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(card))
    return folder


def stop_ids(w: Workload, vocab: int) -> list[int]:
    """With all tokens equally likely, one of these comes every new / 4 tokens."""
    return list(range(vocab - 4 * vocab // w.new, vocab)) if w.skewed else []


def spec_of(
    w: Workload, shape: Shape, variant: str, threads: int, remat: str, build: Path, data: Path
) -> dict[str, Any]:
    """What a worker is told: the workload, and where its data is."""
    tokenizer = write_tokenizer(build / f"words-{shape.vocab}", shape.vocab)
    file = build / "data" / f"{w.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    found = real_data(w, shape.vocab, data, build) if w.real else random_data(w, shape.vocab)
    file.write_text(json.dumps(found))
    fields = {k: v for k, v in asdict(w).items() if k not in ("title", "variants")}
    return fields | {
        "model": asdict(shape), "variant": variant, "threads": threads, "remat": remat, "data": str(file),
        "tokenizer": str(tokenizer), "stops": stop_ids(w, shape.vocab),
        "scratch": str(build / "scratch" / w.name),
    }  # fmt: skip


# --- environments and workers ---------------------------------------------------------------------------------------


def python_of(library: str, w: Workload, given: dict[str, str], build: Path) -> str:
    """The interpreter of a library's environment, which is made where it is not there yet."""
    if library == "jrlhf":
        return sys.executable
    name = "trl-ppo" if (library, w.kind) == ("trl", "ppo") else library
    if name in given:
        return given[name]
    home, pins = build / name, "\n".join(ENVIRONMENTS[name])
    python, stamp = home / "bin" / "python", home / "installed.txt"
    if not (stamp.exists() and stamp.read_text() == pins):
        print(f"making the environment {home.name}: {', '.join(ENVIRONMENTS[name])}")
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        install = [python, "-m", "pip", "install", "-q", *ENVIRONMENTS[name]]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "ERROR" in line] or [done.stderr[-300:]]
            raise RuntimeError(f"pip install {' '.join(ENVIRONMENTS[name])}: {said[-1]}")
        stamp.write_text(pins)
    return str(python)


class Failed(Exception):
    """A worker said that, or ended before it said anything."""


class Worker:
    """A library's process at one workload."""

    def __init__(self, library: str, python: str, spec: dict, build: Path, patience: float):
        name = "-".join(filter(None, [spec["name"], library, spec["variant"]]))
        self._patience, self.log = patience, build / "logs" / f"{name}.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        file = build / "data" / f"{name}.spec.json"
        file.write_text(json.dumps(spec))
        shutil.rmtree(Path(spec["scratch"]), ignore_errors=True)
        script = HERE / "peers" / f"of_{library}.py"
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                [python, script, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=environment(), cwd=ROOT,
            )  # fmt: skip
        self._lines: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.about = self._next()["ready"]

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._lines.put(line)
        self._lines.put("")

    def _next(self) -> dict:
        try:
            line = self._lines.get(timeout=self._patience)
        except queue.Empty:
            self.end()
            raise Failed(f"nothing came for {self._patience:g} s") from None
        if not line:
            code, said = self._process.wait(), self.log.read_text().strip().splitlines()
            raise Failed(f"the process ended with code {code}: {said[-1] if said else 'it said nothing'}")
        said = json.loads(line)
        if "error" in said:
            raise Failed(said["error"])
        return said

    def _tell(self, word: str) -> None:
        if self._process.stdin is not None:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()

    def segment(self) -> dict:
        """Of one: its seconds, useful tokens, and the process's peak memory so far."""
        self._tell("go")
        return self._next()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def environment() -> dict[str, str]:
    """Of workers: on the CPU alone, nothing fetched, nothing compiled before."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "PYTHONPATH"))}
    return mine | {
        "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(
    w: Workload, shape: Shape, libraries: list[str], asked: argparse.Namespace, given: dict[str, str]
) -> dict:
    """One workload by every library and variant, round after round in turn."""
    entries: dict[str, dict] = {}
    workers: dict[str, Worker] = {}
    try:
        for library in libraries:
            for variant in w.variants.get(library, ("",)):
                name = "/".join(filter(None, [library, variant]))
                entries[name] = {"library": library, "variant": variant}
                try:
                    spec = spec_of(
                        w, shape, variant, asked.threads, asked.remat[library], asked.build, asked.data
                    )
                    python = python_of(library, w, given, asked.build)
                    print(f"{w.name}: {name} warms up", flush=True)
                    workers[name] = Worker(library, python, spec, asked.build, asked.patience)
                    entries[name] |= workers[name].about | {"rounds": []}
                except (Failed, FileNotFoundError, RuntimeError, subprocess.SubprocessError) as error:
                    entries[name]["error"] = str(error)
                    print(f"{w.name}: {name} failed: {error}")
        for n in range(asked.rounds):
            order = list(workers)
            for name in order[n % max(len(order), 1) :] + order[: n % max(len(order), 1)]:
                try:
                    entries[name]["rounds"].append(workers[name].segment())
                except Failed as error:
                    entries[name]["error"] = str(error)
                    workers.pop(name).end()
    finally:
        for running in workers.values():
            running.end()
    for entry in entries.values():
        if "error" not in entry:
            entry |= summary(entry["warm_up_s"], entry["rounds"])
    shown = {k: v for k, v in asdict(w).items() if k not in ("name", "title", "variants")}
    return {"title": w.title, "shape": shown, "model": asdict(shape), "entries": entries} | compared(entries)


def summary(warm_up_s: list[float], rounds: list[dict]) -> dict[str, float]:
    """Medians over rounds; `compile_s` is what the first segment took beyond an ordinary one."""
    return {
        "tokens_per_s": round(median(r["tokens"] / r["seconds"] for r in rounds), 1),
        "compile_s": round(max(warm_up_s[0] - median(r["seconds"] for r in rounds), 0.0), 1),
        "peak_rss_mb": round(max(r["peak_rss_mb"] for r in rounds)),
    }


def fastest(entries: dict[str, dict], library: str) -> str | None:
    """The name of a library's fastest entry; None where it has none that ran."""
    ran = [n for n, e in entries.items() if e["library"] == library and "error" not in e]
    return max(ran, key=lambda n: entries[n]["tokens_per_s"], default=None)


def compared(entries: dict[str, dict]) -> dict[str, Any]:
    """`ratio`: of jrlhf to the faster peer, the median over rounds of what the two did in the same round."""
    ours = fastest(entries, "jrlhf")
    peers = [name for library in LIBRARIES if library != "jrlhf" and (name := fastest(entries, library))]
    if ours is None or not peers:
        return {}
    peer = max(peers, key=lambda n: entries[n]["tokens_per_s"])
    speed = lambda r: r["tokens"] / r["seconds"]  # noqa: E731
    pairs = zip(entries[ours]["rounds"], entries[peer]["rounds"], strict=True)
    return {"ratio": round(median(speed(a) / speed(b) for a, b in pairs), 3), "against": peer}


def machine(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else []
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "cores_used": threads,
        "system": f"{platform.system()} {platform.machine()}",
    }


# --- the table -----------------------------------------------------------------------------------------------------


def table(results: dict) -> list[str]:
    """Lines of Markdown: speed and ratio of every workload, and memory and compile time."""
    found = results.get("workloads", {})
    if not found:
        return ["*Not measured yet: `make bench`.*"]
    said, names = results["machine"], list(LIBRARIES.values())
    lines = [
        f"{said['cpu']}, {said['cores_used']} of {said['cores']} cores. {versions_line(found)}",
        "",
        f"| tokens/s | {' | '.join(names)} | jrlhf / faster peer |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for w in found.values():
        cells = [speed_cell(w["entries"], library) for library in LIBRARIES]
        ratio = f"**{w['ratio']:.2f}**" if "ratio" in w else "-"
        lines.append(f"| {w['title']} | {' | '.join(cells)} | {ratio} |")
    lines += [
        "",
        f"| peak memory of the process, MB; (compilation, s) | {' | '.join(names)} |",
        "|---|" + "---:|" * len(names),
    ]
    for w in found.values():
        cells = [memory_cell(w["entries"], library) for library in LIBRARIES]
        lines.append(f"| {w['title']} | {' | '.join(cells)} |")
    errors = {
        f"- {w['title']}, {name}: {e['error']}"
        for w in found.values()
        for name, e in w["entries"].items()
        if "error" in e
    }
    return lines + (["", "What did not run:", "", *sorted(errors)] if errors else [])


def speed_cell(entries: dict[str, dict], library: str) -> str:
    name = fastest(entries, library)
    if name is None:
        return "failed" if any(e["library"] == library for e in entries.values()) else "-"
    entry = entries[name]
    return f"{entry['tokens_per_s']:,.0f}" + (f" ({entry['variant']})" if entry["variant"] else "")


def memory_cell(entries: dict[str, dict], library: str) -> str:
    name = fastest(entries, library)
    if name is None:
        return "-"
    return f"{entries[name]['peak_rss_mb']:,} ({entries[name]['compile_s']:.0f})"


def versions_line(found: dict) -> str:
    every: dict[str, set[str]] = {}
    for entry in itertools.chain.from_iterable(w["entries"].values() for w in found.values()):
        if "versions" in entry:
            told = " ".join(f"{k} {v}" for k, v in entry["versions"].items() if k != "python")
            every.setdefault(entry["library"], set()).add(told)
    lines = [f"{LIBRARIES[x]}: {' or '.join(sorted(every[x]))}" for x in LIBRARIES if x in every]
    return "; ".join(lines) + "."


def write_guide(results: dict, guide: Path = GUIDE) -> None:
    before, _, rest = guide.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    guide.write_text("\n".join([before + BEGIN, *table(results), END + after]), encoding="utf-8")


# --- the command line ------------------------------------------------------------------------------------------------


def arguments(line: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("table", help="write the guide's table again")
    run = commands.add_parser("run", help="measure")
    names = [w.name for w in WORKLOADS]
    run.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="WORKLOAD", help=", ".join(names)
    )
    run.add_argument("--libraries", nargs="+", choices=[*LIBRARIES], default=[*LIBRARIES])
    run.add_argument("--rounds", type=int, default=5)
    run.add_argument("--threads", type=int, default=2, help="cores that every library may use")
    run.add_argument("--out", type=Path, default=RESULTS)
    run.add_argument("--build", type=Path, default=ROOT / "build" / "peers")
    run.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="public sample data")
    run.add_argument(
        "--env", nargs="+", default=[], metavar="NAME=PYTHON", help=f"of {', '.join(ENVIRONMENTS)}"
    )
    run.add_argument("--patience", type=float, default=1800.0, help="seconds that a worker may say nothing")
    run.add_argument("--remat", nargs="+", default=[], metavar="LIBRARY=full", help="recompute activations")
    for what in ("batch", "steps", "length", "prompt", "new", "group", "epochs", "rows"):
        run.add_argument(f"--{what}", type=int, help="of the workloads, instead of their own")
    for what in ("layers", "d", "heads", "kv_heads", "ff", "vocab", "context"):
        run.add_argument(f"--{what}", type=int, help="of the model")
    asked = parser.parse_args(line)
    if asked.command == "run":
        if asked.rounds < 1:
            parser.error("--rounds must be positive")
        chosen = (
            dict.fromkeys(LIBRARIES, "none")
            | {"jrlhf": "auto"}
            | dict(pair.split("=", 1) for pair in asked.remat)
        )
        if {*chosen} != {*LIBRARIES}:
            parser.error(f"--remat: libraries are {', '.join(LIBRARIES)}")
        asked.remat = chosen
        asked.build = asked.build.absolute()
        other = [what for what in (*asdict(WORKLOADS[0]), *asdict(Shape())) if getattr(asked, what, None)]
        if other and asked.out == RESULTS:
            parser.error(
                f"--{other[0]} makes other workloads than the guide's: give --out a file of their own"
            )
    return asked


def changed(thing: Any, asked: argparse.Namespace) -> Any:
    """A workload or a shape with what the command line says instead, of what it has."""
    fields = {k: v for k, v in asdict(thing).items() if getattr(asked, k, None)}
    return replace(thing, **{k: getattr(asked, k) for k, v in fields.items() if v})


def main(line: list[str] | None = None) -> None:
    asked = arguments(line)
    if asked.command == "table":
        write_guide(json.loads(RESULTS.read_text()) if RESULTS.exists() else {})
        return
    given = dict(pair.split("=", 1) for pair in asked.env)
    results = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    here = machine(asked.threads)
    if results and results["machine"] != here:
        sys.exit(f"{asked.out} holds results of {results['machine']}; move it away, or give another --out")
    results = {"machine": here, "workloads": results.get("workloads", {})}
    shape, began = changed(Shape(), asked), time.time()
    for w in WORKLOADS:
        if w.name not in asked.only:
            continue
        found = measure(changed(w, asked), shape, asked.libraries, asked, given)
        results["workloads"][w.name] = found | {"remat": asked.remat, "date": time.strftime("%Y-%m-%d")}
        order = [x.name for x in WORKLOADS if x.name in results["workloads"]]
        results["workloads"] = {name: results["workloads"][name] for name in order}
        asked.out.write_text(json.dumps(results, indent=1) + "\n")
        cells = [f"{LIBRARIES[x]} {speed_cell(found['entries'], x)}" for x in asked.libraries]
        print(f"{w.name}: {', '.join(cells)}; ratio {found.get('ratio', '-')}", flush=True)
    if asked.out == RESULTS:
        write_guide(results)
    print(f"{asked.out}, {(time.time() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
