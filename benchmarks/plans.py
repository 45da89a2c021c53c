"""The plans of docs/plans.md: Llama 3 and Mixtral on TPU slices, each compiled ahead of time (`jrlhf plan`).

    pip install 'jrlhf[plan]'
    python benchmarks/plans.py run [NAME ...]    # all, or those whose name begins so; writes docs/plans/NAME.json
    python benchmarks/plans.py table             # the table of docs/plans.md, from what is there

About a minute for each on two cores: the compiler is stopped before it makes machine code.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PLANS = ROOT / "docs" / "plans"
EXPERIMENT = ROOT / "experiments" / "large" / "llama3.py"
NAMES = {
    "llama3_8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3_70b": "meta-llama/Meta-Llama-3-70B-Instruct",
    "mixtral_8x7b": "mistralai/Mixtral-8x7B-Instruct-v0.1",
}


class Case(NamedTuple):
    model: str
    program: str  # stage:program, or a stage
    topology: str
    chips: int
    mesh: str  # "data=4 fsdp=16"
    rows: int = 4  # prompts' answers on each chip
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        slices = "2x_" if "slices=2" in self.mesh else ""
        return f"{self.model}_{self.program.replace(':', '_')}_{slices}{self.topology.replace(':', '_')}"


def microbatches(stage: str, parts: int) -> tuple[str, ...]:
    return (f"--stages.{stage}.algorithm.microbatches", str(parts))


KEPT = ("--stages.base.remat", "attention_mlp")
SLICES = {  # topology -> (chips, mesh, rows on each chip, microbatches, further options)
    "v5e:4x4": (16, "data=1 fsdp=16", 4, 4, ()),
    "v5e:8x8": (64, "data=1 fsdp=64", 4, 4, ()),
    "v5e:16x16": (256, "data=16 fsdp=16", 4, 4, ()),
    "v5p:2x2x2": (8, "data=1 fsdp=8", 4, 1, KEPT),
    "v5p:4x4x4": (64, "data=4 fsdp=16", 4, 1, KEPT),
    "v5p:4x4x8": (128, "data=8 fsdp=16", 4, 1, KEPT),
    "v6e:8x8": (64, "data=8 fsdp=8", 4, 4, ()),
}
CASES = [
    Case("llama3_8b", f"{stage}:update", topology, chips, mesh, rows, (*microbatches(stage, parts), *options))
    for topology, (chips, mesh, rows, parts, options) in SLICES.items()
    for stage in ("grpo", "ppo", "dpo")
]
CASES += [
    Case("llama3_8b", "ppo", "v5p:4x4x4", 64, "data=4 fsdp=16", 4, KEPT),
    Case("llama3_8b", "grpo:update", "v5p:4x4x4", 128, "data=8 fsdp=16 slices=2", 4, KEPT),
    Case("llama3_70b", "grpo:update", "v5p:4x4x8", 128, "data=4 fsdp=32", 2, microbatches("grpo", 2)),
    Case("llama3_70b", "dpo:update", "v5p:4x4x8", 128, "data=4 fsdp=32", 2, microbatches("dpo", 2)),
    Case("llama3_70b", "grpo:update", "v5p:4x8x8", 256, "data=4 fsdp=64", 2, microbatches("grpo", 2)),
    Case("llama3_70b", "dpo:update", "v5p:4x8x8", 256, "data=4 fsdp=64", 2, microbatches("dpo", 2)),
    Case("mixtral_8x7b", "grpo:update", "v5p:4x4x4", 64, "data=1 fsdp=16 expert=4", 4, ()),
]


def run(case: Case) -> None:
    stage = case.program.split(":")[0]
    rows = case.rows * case.chips // (2 if stage == "dpo" else 1)  # a pair is two
    command = [
        sys.executable, "-m", "jrlhf.cli", "plan", str(EXPERIMENT), case.program, "--topology", case.topology,
        "--quick", "--card", f"{NAMES[case.model]}={PLANS / 'cards' / case.model}",
        *(x for axis in case.mesh.split() for x in (f"--mesh.{axis.split('=')[0]}", axis.split("=")[1])),
        f"--stages.{stage}.loop.batch_size", str(rows), *case.options,
    ]  # fmt: skip
    environment = os.environ | {"LLAMA": NAMES[case.model], "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, "--out", folder], env=environment, capture_output=True, text=True)
        if done.returncode > 1:  # 1: it does not fit
            print(f"{case.name}: {done.stderr.strip().splitlines()[-1]}", flush=True)
            return
        made = json.loads((Path(folder) / "plan.json").read_text())
        made["options"] = command[command.index("--quick") + 3 :]  # beside the model's card
        (PLANS / f"{case.name}.json").write_text(json.dumps(made, indent=1) + "\n")
        if ":" not in case.program:
            (PLANS / f"{case.name}.png").write_bytes((Path(folder) / "memory.png").read_bytes())
    told = [f"{p['program']} {p['needed'] / 2**30:.1f} GiB, {p['mfu']:.1%}" for p in made["programs"]]
    print(f"{case.name}: {'; '.join(told)}", flush=True)


def table() -> str:
    lines = [
        "| model | program | chips | mesh | rows a chip | GiB of | fits | time | MFU | sent |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        path = PLANS / f"{case.name}.json"
        if not path.is_file():
            continue
        made = json.loads(path.read_text())
        for p in made["programs"]:
            sent = sum(c["bytes"] * c["times"] for c in p["collectives"]) / 1e9
            lines.append(
                f"| {case.model} | {p['stage']} {p['program']} | {case.chips} {case.topology} | {made['mesh']} | "
                f"{case.rows} | {p['needed'] / 2**30:.1f} of {p['capacity'] / 2**30:.0f} | "
                f"{'yes' if p['fits'] else '**no**'} | {p['seconds']:.2f} s | {p['mfu']:.1%} | {sent:.0f} GB |"
            )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["table"]:
        print(table())
    elif sys.argv[1:2] == ["run"]:
        for case in CASES:
            if not sys.argv[2:] or any(case.name.startswith(name) for name in sys.argv[2:]):
                run(case)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
