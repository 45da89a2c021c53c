"""The parts of a reward in the report: their curves while training."""

import json
from pathlib import Path

from rich.console import Console

from jrlhf.compare import plots
from jrlhf.compare.report import write_report
from jrlhf.compare.summary import summarize


def log_parts(run: Path, stage: str, **parts: tuple[float, float]) -> None:
    """Beside what the stage logged, criteria that go from one value to another, and a reward that is watched."""
    folder = run.parent / json.loads((run / "stages.json").read_text())[stage]["0"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for n, line in enumerate(lines):
        share = n / (len(lines) - 1)
        line |= {f"reward/{name}/mean": a + (b - a) * share for name, (a, b) in parts.items()}
        line["reward/watched/mean"] = 1.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = json.loads((folder / "config.json").read_text())
    config["stage"]["watch"] = ["watched"]
    (folder / "config.json").write_text(json.dumps(config))


def test_criteria_have_curves(finished_run, tmp_path):
    run = finished_run(tmp_path / "runs", policies=("sft", "ppo", "grpo"), seeds=(0,), updates=21)
    log_parts(run, "ppo", helpful=(0.2, 0.8), hazard=(0.5, 0.5))
    (figure,) = (f for f in plots.all_figures(summarize([run])) if f.slug == "parts")
    assert [panel.slug for panel in figure.panels] == ["parts_ppo"]
    assert figure.finding == "ppo: helpful from 0.20 to 0.80, hazard from 0.50 to 0.50."
    page = write_report([run], tmp_path / "report", Console(quiet=True))
    assert (page.parent / "figures" / "parts_ppo.svg").is_file()


def test_rewards_themselves_are_no_parts(finished_run, tmp_path):
    run = finished_run(tmp_path / "runs", policies=("sft", "ppo"), seeds=(0,), updates=5)
    (figure,) = (f for f in plots.all_figures(summarize([run])) if f.slug == "parts")
    assert not figure.panels
    assert "no policy" in figure.missing.lower()
