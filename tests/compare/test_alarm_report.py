"""Alarms of reward hacking in the report: in the terminal, on the page and in the files."""

import json
from pathlib import Path

from rich.console import Console

from jrlhf.compare.report import write_report

ALARMS = [
    {"step": 34, "rule": "held_out", "value": 0.57123, "threshold": 0.3},
    {"step": 28, "rule": "kl_per_token", "value": 0.33, "threshold": 0.25},
]


def raise_alarms(run: Path, stage: str, seed: str, **results) -> Path:
    folder = run.parent / json.loads((run / "stages.json").read_text())[stage][seed]
    done = json.loads((folder / "done.json").read_text())
    (folder / "done.json").write_text(json.dumps(done | {"results": results}))
    return folder


def test_alarms_are_told_in_order_of_time(finished_run, tmp_path):
    run = finished_run(tmp_path / "runs", policies=("sft", "ppo", "grpo"), seeds=(0, 1))
    raise_alarms(run, "ppo", "1", alarms=ALARMS)
    raise_alarms(run, "grpo", "0", alarms=ALARMS[:1], ended_at=35, policy_of_step=20)
    raise_alarms(run, "grpo", "1", alarms=[])  # quiet
    console = Console(width=300, record=True, file=open(tmp_path / "printed", "w"))  # noqa: SIM115
    page = write_report([run], tmp_path / "report", console)
    lines = [
        "Alarms of ppo (seed 1): kl_per_token 0.33 (threshold 0.25) at step 28, "
        "held_out 0.571 (threshold 0.3) at step 34",
        "Alarms of grpo (seed 0): held_out 0.571 (threshold 0.3) at step 34; "
        "ended at step 35 with the policy of step 20",
    ]
    console.file.close()
    printed = (tmp_path / "printed").read_text()
    for line in lines:
        assert line in printed
        assert line in page.read_text()
    assert printed.count("Alarms of") == page.read_text().count("Alarms of") == 2
    written = json.loads((tmp_path / "report" / "summary.json").read_text())["alarms"]
    assert [(a["stage"], a["seed"], a["ended_at"]) for a in written] == [
        ("ppo", "1", None),
        ("grpo", "0", 35),
    ]


def test_without_alarms_nothing_is_said(finished_run, tmp_path):
    run = finished_run(tmp_path / "runs", policies=("sft", "ppo"))
    page = write_report([run], tmp_path / "report", Console(quiet=True))
    assert "Alarms" not in page.read_text()
