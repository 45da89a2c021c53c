"""Every experiment file: it loads, its config survives JSON, the dry run works, and it runs once at tiny size."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import fake_params
from rich.console import Console

from jrlhf.config import MeshConfig, from_dict, to_dict
from jrlhf.data.curation import Between
from jrlhf.data.tokenizer import load_tokenizer
from jrlhf.experiment import Experiment, dry_run, load_experiment, run, stage_folders
from jrlhf.metrics import check_name, read_metrics
from jrlhf.models.config import ModelConfig
from jrlhf.models.hf import save_hf
from jrlhf.models.transformer import Model
from jrlhf.ops.on_policy import OnPolicyConfig
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training import stages
from jrlhf.training.loop import LoopConfig

FOLDER = Path(__file__).parent.parent / "experiments"
FILES = {str(path.relative_to(FOLDER)): path for path in sorted(FOLDER.rglob("*.py"))}
QUIET = Console(quiet=True)

every_file = pytest.mark.parametrize("name", FILES)


@pytest.fixture
def load(monkeypatch):
    """load(name): the experiment of a file. Those that read real data are skipped where there is none."""

    def load(name: str) -> Experiment:
        if "JRLHF_DATA" in FILES[name].read_text(encoding="utf-8"):
            data = os.environ.get("JRLHF_SHARED_DATA") or FOLDER.parent.parent / "shared" / "data"
            if not Path(data).is_dir():
                pytest.skip(f"{name} reads public sample data, and there is none at {data}")
            monkeypatch.setenv("JRLHF_DATA", str(data))
        return load_experiment(FILES[name])

    return load


def test_there_are_experiments():
    assert {"larder", "stories", "hh"} <= {Path(name).parts[0] for name in FILES}


@every_file
def test_its_docstring_says_how_to_run_it_and_on_what(name):
    text = FILES[name].read_text(encoding="utf-8")
    docstring = text.split('"""')[1]
    assert text.startswith('"""')
    assert "Hardware" in docstring
    assert "Command" in docstring
    assert f"jrlhf run experiments/{name}" in docstring


@every_file
def test_its_config_survives_json(name, load):
    experiment = load(name)
    written = json.loads(json.dumps(to_dict(experiment), allow_nan=False))
    assert from_dict(Experiment, written) == experiment


@every_file
def test_its_dry_run(name, load, tmp_path):
    experiment = load(name)
    table = dry_run(experiment, tmp_path / "runs")
    assert table.row_count == len(experiment.stages) * len(experiment.seeds)
    assert not (tmp_path / "runs").exists()


# --- once at tiny size --------------------------------------------------------------------------------------


def shrink(value, checkpoint: Path):
    """The same experiment, stage by stage, with everything that costs time made small."""
    if isinstance(value, LoopConfig):
        return LoopConfig(steps=1, batch_size=4)
    if isinstance(value, SamplingConfig):
        return dataclasses.replace(value, max_new_tokens=min(8, value.max_new_tokens))
    if isinstance(value, ModelConfig):
        return dataclasses.replace(
            value, d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=0, d_ff=32, remat="none"
        )
    if isinstance(value, OnPolicyConfig):
        return dataclasses.replace(
            value,
            epochs=1,
            minibatches=min(value.minibatches, 2),
            microbatches=1,
            group_size=min(value.group_size, 2),
            resample_rounds=min(value.resample_rounds, 2),
        )
    if isinstance(value, stages.Checkpoint):
        return dataclasses.replace(value, path=str(checkpoint), remat="none")
    if isinstance(value, Between):  # a model that learned nothing solves nothing
        return shrink(value.source, checkpoint)
    if isinstance(value, (tuple, list)):
        return type(value)(shrink(item, checkpoint) for item in value)
    if isinstance(value, dict):
        return {key: shrink(item, checkpoint) for key, item in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    changed = {
        f.name: shrink(getattr(value, f.name), checkpoint) for f in dataclasses.fields(value) if f.init
    }
    for size, small in SIZES.items():
        if size in changed:
            changed[size] = small
    if isinstance(value, stages.BestAnswers):  # few answers end: SFT on the best needs some that do
        changed |= {"samples": 16, "keep": 16}
    return type(value)(**changed)


SIZES = {
    "documents": 64,
    "size": 32,
    "max_rows": 32,
    "samples": 2,
    "responses": 2,
    "show": 2,
    "eval_rows": 1,
    "eval_fraction": 0.3,
}


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory) -> Path:
    """One for all files, so that what they share is computed once."""
    return tmp_path_factory.mktemp("experiments") / "runs"


@pytest.fixture
def checkpoint(load, tmp_path_factory) -> Path:
    """A language model of one layer with the real story tokenizer, as a Hugging Face checkpoint."""
    load("stories/happy_endings.py")  # or skips
    real = Path(os.environ["JRLHF_DATA"]) / "stories260K"
    tokenizer = load_tokenizer(real)
    config = ModelConfig(tokenizer.vocab_size, 16, 1, 2, 2, d_ff=32, context=512)
    out = tmp_path_factory.getbasetemp() / "tiny_stories"
    if not out.exists():
        save_hf(
            out,
            Model(config),
            fake_params(Model(config)),
            real,
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
            bos_id=tokenizer.bos_id,
        )
    return out


@pytest.fixture
def one_device(monkeypatch):
    """Quick to compile: a mesh of one device."""
    for module in vars(stages).values():
        if hasattr(module, "make_mesh"):
            make = lambda config: make_mesh(MeshConfig(data=1), jax.devices()[:1])  # noqa: E731
            monkeypatch.setattr(module, "make_mesh", make)


@every_file
def test_it_runs_once_at_tiny_size(name, load, request, runs_dir, one_device):
    experiment = load(name)
    needs_checkpoint = any(isinstance(stage, stages.Checkpoint) for stage in experiment.stages.values())
    path = request.getfixturevalue("checkpoint") if needs_checkpoint else Path()
    small = dataclasses.replace(shrink(experiment, path), seeds=experiment.seeds[:1])
    folder = run(small, runs_dir, console=QUIET)
    for stage, seeds in stage_folders(folder).items():
        (left,) = seeds.values()
        assert (left / "done.json").is_file(), stage
        if (left / "metrics.jsonl").is_file():
            rows = read_metrics(left)
            assert rows[0]["step"] == 1
            for metric, number in rows[0].items():
                assert metric == "step" or check_name(metric) is None
                assert np.isfinite(number), (stage, metric)
