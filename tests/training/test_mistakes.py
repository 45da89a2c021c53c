"""Mistakes in an experiment or its data: one message that names the field, file or line."""

import errno
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from tiny_runs import QUIET, folders, one_device, only, use_mesh

from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.algorithms.sft import SFTConfig
from jrlhf.cli import EXIT_USER_ERROR, main
from jrlhf.config import Labeler, MeshConfig, UserError
from jrlhf.data.sources import FileSource
from jrlhf.data.stories import StoryEndings
from jrlhf.experiment import dry_run, run
from jrlhf.lab import LarderDemonstrations, LarderPrompts, LarderText
from jrlhf.metrics import MetricLogger
from jrlhf.optim import OptimConfig
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training import rewards
from jrlhf.training.loop import LoopConfig
from jrlhf.training.stages import SFT, Checkpoint, DirectAlignment, RewardModel, TokenizerConfig

STAGES = tiny.experiment.stages
BEFORE = ("pretrain", "sft", "preferences", "reward_model")


def message(error: pytest.ExceptionInfo) -> str:
    return " ".join(str(error.value).split())


# --- before anything runs -----------------------------------------------------------------------------------


def changed(name: str, **fields):
    """The tiny experiment with fields of one stage changed; a function, because some configs refuse at once."""
    return lambda: replace(
        tiny.experiment, stages=STAGES | {name: replace(STAGES[name], **{k: v() for k, v in fields.items()})}
    )


def ppo_config(**fields):
    return lambda: replace(STAGES["ppo"].algorithm, **fields)


def sampling(**fields):
    return lambda: SamplingConfig(**{"max_new_tokens": 8} | fields)


def loop(**fields):
    return lambda: LoopConfig(**fields)


def just(value):
    return lambda: value


EARLY = {
    "unknown reward": (
        changed("ppo", reward=just("larder_glod"), critic=just("policy")),
        "stages.ppo: reward 'larder_glod' is neither a stage nor a known reward. Did you mean 'larder_gold'?",
    ),
    "unknown gold": (changed("ppo", gold=just("larder_god")), "Did you mean 'larder_gold'?"),
    "unknown gold of an evaluation": (
        changed("evaluate", gold=just("reward_modle")),
        "Did you mean 'reward_model'?",
    ),
    "unknown start": (
        changed("dpo", start=just("sfft")),
        "stages.dpo.start: 'sfft' is not a stage. Did you mean 'sft'?",
    ),
    "a critic from a program": (
        changed("ppo", reward=just("larder_gold")),
        "critic 'reward' needs a reward-model stage",
    ),
    "ptx without a weight": (changed("ppo", ptx=just(LarderText(8))), "ptx (text) and algorithm.ptx_coef"),
    "a weight without ptx": (
        changed("ppo", algorithm=ppo_config(ptx_coef=0.1)),
        "ptx (text) and algorithm.ptx_coef",
    ),
    "PPO with top-k": (
        changed("ppo", sampling=sampling(top_k=5)),
        "stages.ppo: sampling: PPO trains the distribution",
    ),
    "PPO with top-p": (
        changed("ppo", sampling=sampling(top_p=0.9)),
        "stages.ppo: sampling: PPO trains the distribution",
    ),
    "greedy PPO": (changed("ppo", sampling=sampling(temperature=0.0)), "stages.ppo: sampling: PPO trains"),
    "PPO by epochs": (
        changed("ppo", loop=loop(epochs=1.0, batch_size=8)),
        "PPO counts steps; set loop.steps",
    ),
    "minibatches that do not divide": (
        changed("ppo", algorithm=ppo_config(minibatches=3)),
        "loop.batch_size 8 is not divisible by minibatches x microbatches = 3",
    ),
    "microbatches that do not divide": (
        changed("sft", algorithm=just(SFTConfig(microbatches=3))),
        "stages.sft: loop.batch_size 8 is not divisible by algorithm.microbatches 3",
    ),
    "no microbatches": (
        changed("sft", algorithm=just(SFTConfig(microbatches=0))),
        "algorithm.microbatches 0",
    ),
    "negative steps": (
        changed("sft", loop=loop(steps=-1)),
        "loop: give steps or epochs, one of them positive (steps -1",
    ),
    "steps and epochs": (changed("sft", loop=loop(steps=1, epochs=1.0)), "loop: give steps or epochs"),
    "neither steps nor epochs": (changed("sft", loop=loop()), "loop: give steps or epochs"),
    "a batch of nothing": (
        changed("sft", loop=loop(steps=1, batch_size=0)),
        "loop.batch_size must be positive, got 0",
    ),
    "no checkpoint to keep": (
        changed("sft", loop=loop(steps=1, keep_last=0)),
        "loop.keep_last must be at least 1",
    ),
    "no new tokens": (
        changed("ppo", sampling=sampling(max_new_tokens=0)),
        "sampling.max_new_tokens must be positive",
    ),
    "a preference of one": (
        changed("preferences", responses=just(1)),
        "responses is 1; a preference needs at least 2",
    ),
    "best of one": (changed("best_of_n", samples=just(1)), "samples is 1; best-of-n needs at least 2"),
    "nothing to evaluate": (changed("evaluate", policies=just(())), "policies and prompts must not be empty"),
    "a filtered evaluation": (changed("evaluate", sampling=sampling(top_k=3)), "unfiltered samples"),
    "no samples": (changed("evaluate", samples=just(0)), "samples must be positive, got 0"),
    "everything held out": (
        changed("reward_model", eval_fraction=just(1.0)),
        "eval_fraction must be between 0 and 1",
    ),
    "no preferences": (changed("dpo", preferences=just("")), "give either preferences (a stage) or data"),
    "two sources of preferences": (
        changed("dpo", data=just(FileSource("data.jsonl", "preference"))),
        "stages.dpo: give either preferences (a stage) or data",
    ),
    "gold without prompts": (
        changed("dpo", eval_prompts=just(None)),
        "gold is measured on samples: give eval_prompts",
    ),
    "a filtered probe": (changed("dpo", sampling=sampling(temperature=0.0)), "stages.dpo: sampling: the KL"),
    "rows longer than the context": (
        changed("pretrain", length=just(41)),
        "length 41 is longer than model.context 40",
    ),
    "heads that do not divide": (
        changed("pretrain", model=lambda: replace(STAGES["pretrain"].model, head_dim=0, n_heads=3)),
        "model.d_model 16 is not divisible by model.n_heads 3",
    ),
    "a tokenizer that is not there": (
        changed("pretrain", tokenizer=just(TokenizerConfig(path="nowhere/tokenizer.model"))),
        "stages.pretrain: nowhere/tokenizer.model: no such file",
    ),
    "data that are not there": (
        changed("sft", data=just(FileSource("nowhere/data.jsonl", "demonstration"))),
        "stages.sft: nowhere/data.jsonl: no such file",
    ),
    "a negative learning rate": (
        changed("sft", optim=lambda: OptimConfig(lr=-1.0)),
        "OptimConfig.lr is -1.0",
    ),
    "a start that is no model": (
        changed("ppo", start=just("preferences")),
        "stages.ppo.start: needs a language model, but 'preferences' (Preferences) leaves preferences. "
        "Stages that fit: pretrain, sft, dpo.",
    ),
    "a start that is a reward model": (
        changed("ppo", start=just("reward_model")),
        "stages.ppo.start: needs a language model, but 'reward_model' (RewardModel) leaves a reward model. "
        "Stages that fit: pretrain, sft, dpo.",
    ),
    "a policy as reward": (
        changed("ppo", reward=just("sft")),
        "stages.ppo.reward: needs a reward model, but 'sft' (SFT) leaves a language model. "
        "Stages that fit: reward_model.",
    ),
    "a policy as reward of best-of-n": (
        changed("best_of_n", reward=just("sft")),
        "stages.best_of_n.reward: needs",
    ),
    "a policy as proxy": (
        changed("evaluate", proxy=just("sft")),
        "stages.evaluate.proxy: needs a reward model",
    ),
    "a policy that is no model": (
        changed("evaluate", policies=just(("sft", "preferences"))),
        "stages.evaluate.policies: needs a language model, but 'preferences' (Preferences) leaves preferences.",
    ),
    "preferences of another kind of stage": (
        changed("dpo", preferences=just("best_of_n")),
        "stages.dpo.preferences: needs preferences, but 'best_of_n' (BestOfN) leaves a best-of-n table. "
        "Stages that fit: preferences.",
    ),
    "best-of-n of another kind of stage": (
        changed("evaluate", best_of_n=just("preferences")),
        "stages.evaluate.best_of_n: needs a best-of-n table, but 'preferences' (Preferences) leaves preferences.",
    ),
    "answers that leave no room": (
        changed("preferences", sampling=sampling(max_new_tokens=39)),
        "stages.preferences: sampling.max_new_tokens 39 leaves no room for a prompt in the context of 40 tokens",
    ),
    "answers as long as the context": (
        changed("evaluate", sampling=sampling(max_new_tokens=41)),
        "stages.evaluate: sampling.max_new_tokens 41 do not fit the context of 40 tokens of 'sft'",
    ),
    "prompts and answers longer than the context": (
        changed("ppo", max_prompt=just(33)),
        "stages.ppo: max_prompt 33 and sampling.max_new_tokens 8 do not fit the context of 40 tokens of 'sft'",
    ),
    "best-of-n longer than the context": (
        changed("best_of_n", max_prompt=just(33)),
        "stages.best_of_n: max_prompt 33 and",
    ),
    "samples of DPO longer than the context": (
        changed("dpo", sampling=sampling(max_new_tokens=39)),
        "stages.dpo: sampling.max_new_tokens 39 leaves no room",
    ),
    "a negative prompt": (changed("ppo", max_prompt=just(-1)), "max_prompt must not be negative, got -1"),
    "a folder without a checkpoint": (
        lambda: replace(tiny.experiment, stages={"base": Checkpoint("no/such/model")}),
        "stages.base: no/such/model: no such checkpoint folder",
    ),
    "an unknown split": (
        changed("ppo", prompts=lambda: LarderPrompts(8, split="test")),
        "LarderPrompts.split: no split",
    ),
}


@pytest.mark.parametrize("name", EARLY)
def test_refused_before_anything_runs(name, tmp_path):
    make, expected = EARLY[name]
    for refuse in (partial(run, console=QUIET), dry_run):
        with pytest.raises(UserError) as error:
            refuse(make(), tmp_path / "runs")
        assert expected in message(error)
    assert not (tmp_path / "runs").exists()


def test_the_command_line_says_it_in_one_line_and_exits_with_2(tmp_path, capsys):
    command = ["run", str(Path(tiny.__file__)), "--runs-dir", str(tmp_path / "runs")]
    assert main([*command, "--stages.ppo.sampling.top_k", "3"]) == EXIT_USER_ERROR
    assert main([*command, "--stages.ppo.lopp.steps", "3"]) == EXIT_USER_ERROR
    assert main([*command, "--stages.sft.too_long", "dorp"]) == EXIT_USER_ERROR
    out, err = capsys.readouterr()
    first, second, third = err.splitlines()
    assert first.startswith("error: stages.ppo: sampling: PPO trains the distribution that is sampled")
    assert second.startswith("error: --stages.ppo.lopp.steps: no such")
    assert "'error', 'drop', 'truncate'" in third
    assert out == ""
    assert not (tmp_path / "runs").exists()


# --- while a stage reads its data and parents ---------------------------------------------------------------


def write(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def file(kind: str, *rows):
    return lambda folder: FileSource(write(folder / "data.jsonl", rows), kind)


def demonstrations(**fields):
    return just(LarderDemonstrations(**{"size": 32} | fields))


def sft(data=None, **fields):
    def make(folder: Path) -> SFT:
        source = data(folder) if data else LarderDemonstrations(size=64)
        return replace(STAGES["sft"], **{"data": source, "loop": tiny.loop(1)} | fields)

    return make


def stage(name: str, **fields):
    return lambda folder: replace(STAGES[name], **fields)


PAIR = {"prompt": "describe tea :", "responses": ["thanks", "great"], "ranks": [1, 2]}
TIE = PAIR | {"ranks": [1, 1]}
TIES = [TIE | {"prompt": f"describe tea {'thanks ' * n}:"} for n in range(20)]

LATE = {
    "a line that is not JSON": (
        sft(file("demonstration", {"prompt": "a", "completion": "b"}, '{"prompt": "a", "comp')),
        "data.jsonl line 2: not JSON",
    ),
    "a field that is missing": (
        sft(file("demonstration", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completions": "b"})),
        "data.jsonl line 2: no field 'completion'. Did you mean 'completions'?",
    ),
    "an empty file": (sft(file("demonstration")), "data.jsonl: no rows"),
    "an empty source": (sft(lambda folder: LarderDemonstrations(size=0)), "LarderDemonstrations: no rows"),
    "a row that does not fit": (sft(length=8), "LarderDemonstrations row 1: "),
    "rows longer than the context": (sft(length=41), "length: sequences of 41 tokens do not fit the model"),
    "too many held-out rows": (sft(eval_rows=1000), "eval_rows is 1000, but the data fills"),
    "no held-out rows": (sft(eval_rows=0), "eval_rows is 0, but the data fills"),
    "a batch larger than the data": (
        sft(loop=tiny.loop(1, 512)),
        "rows do not fill one batch of 512. Lower batch_size.",
    ),
    "a vocabulary that is too small": (
        stage("pretrain", model=replace(STAGES["pretrain"].model, vocab_size=10)),
        "model.vocab_size is 10, but the tokenizer has",
    ),
    "prompts longer than allowed": (stage("ppo", max_prompt=4), "LarderPrompts row 1: "),
    "fewer prompts than a batch": (
        stage("ppo", prompts=LarderPrompts(size=4)),
        "4 rows do not fill one batch of 8",
    ),
    "less pretraining text than a batch": (
        stage("ppo", ptx=LarderText(documents=2), algorithm=PPOConfig(epochs=1, minibatches=1, ptx_coef=1.0)),
        "rows do not fill one batch of 8",
    ),
    "only ties for the reward model": (
        lambda folder: RewardModel(
            "sft", loop=tiny.loop(1), data=file("preference", *TIES)(folder), eval_fraction=0.5
        ),
        "the held-out preferences hold no ordered pair",
    ),
    "only ties for DPO": (
        lambda folder: DirectAlignment(
            "sft", loop=tiny.loop(1), data=file("preference", *TIES)(folder), eval_fraction=0.5
        ),
        "the preferences hold no ordered pair",
    ),
    "one prompt, so nothing to hold out": (
        lambda folder: DirectAlignment("sft", loop=tiny.loop(1), data=file("preference", PAIR)(folder)),
        "eval_fraction 0.1 leaves",
    ),
    "ranks that fit no answers": (
        lambda folder: DirectAlignment(
            "sft", loop=tiny.loop(1), data=file("preference", PAIR, PAIR | {"ranks": [1]})(folder)
        ),
        "data.jsonl line 2: field 'ranks' has 1 entries for 2 responses",
    ),
    "answers longer than the limit": (stage("dpo", max_length=10), "preferences row 1: "),
    "stories without an ending": (
        lambda folder: sft(lambda f: StoryEndings(write(f / "stories.txt", ["A story that never ends"])))(
            folder
        ),
        "stories.txt: no story has an ending",
    ),
    "gold of other prompts": (
        stage(
            "ppo",
            reward="larder_gold",
            gold="",
            critic="policy",
            eval_prompts=None,
            prompts=FileSource("", "prompt"),
        ),
        "not a Larder prompt: 'hello'",
    ),
}


@pytest.mark.parametrize("name", LATE)
def test_refused_by_the_stage(name, one_device_run, one_device_runs, tmp_path):
    make, expected = LATE[name]
    bad = make(tmp_path)
    if name == "gold of other prompts":
        bad = replace(bad, prompts=file("prompt", *[{"prompt": "hello"}] * 8)(tmp_path))
    with pytest.raises(UserError) as error, one_device():
        run(only(*BEFORE, bad=bad), one_device_runs, console=QUIET)
    assert expected in message(error)
    assert "in stage 'bad' (seed 0)" in error.value.__notes__[-1]  # a reward may have said its name first


# --- the mesh -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "devices", "name", "expected"),
    [
        (MeshConfig(), 8, "sft", "loop.batch_size: 12 rows do not divide over the mesh's 8 batch shards"),
        (
            MeshConfig(data=2, fsdp=4),
            8,
            "ppo",
            "loop.batch_size: 12 rows do not divide over the mesh's 8 batch shards",
        ),
        (
            MeshConfig(data=1, tensor=3),
            3,
            "sft",
            "embed/embedding: axis 'vocab' of size 52 is not divisible by 3 (mesh axes tensor)",
        ),
        (
            MeshConfig(data=1, tensor=4),
            4,
            "sft",
            "layers/attn/k: axis 'kv_heads' of size 2 is not divisible by 4 (mesh axes tensor)",
        ),
        (
            MeshConfig(data=1, fsdp=3),
            3,
            "sft",
            "axis 'embed' of size 16 is not divisible by 3 (mesh axes fsdp)",
        ),
        (
            MeshConfig(data=3),
            8,
            "sft",
            "mesh: data 3 x fsdp 1 x tensor 1 needs 3 devices, but there are 8. Change the mesh, or try it on virtual "
            "CPU devices: --devices 3",
        ),
        (MeshConfig(fsdp=3), 8, "sft", "mesh: data -1 x fsdp 3 x tensor 1 needs a multiple of 3 devices"),
        (MeshConfig(data=-1, fsdp=-1), 8, "sft", "at most one may be -1"),
    ],
)
def test_a_mesh_that_does_not_fit(
    mesh, devices, name, expected, one_device_run, one_device_runs, monkeypatch
):
    use_mesh(monkeypatch, lambda config: make_mesh(config, jax.devices()[:devices]))
    bad = replace(STAGES[name], loop=tiny.loop(1, 12), **({"eval_prompts": None} if name == "ppo" else {}))
    with pytest.raises(UserError) as error:
        run(replace(only(*BEFORE, bad=bad), mesh=mesh), one_device_runs, console=QUIET)
    assert expected in message(error)


@pytest.mark.parametrize("refuse", [partial(run, console=QUIET), dry_run], ids=["run", "dry run"])
@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=4, tensor=4), MeshConfig(data=2)])
def test_a_mesh_of_other_devices_is_refused_before_anything_runs(mesh, refuse, tmp_path):
    with pytest.raises(UserError) as error:
        refuse(replace(tiny.experiment, mesh=mesh), tmp_path / "runs")
    assert f"stages.pretrain: mesh: data {mesh.data} x fsdp {mesh.fsdp} x tensor" in message(error)
    assert "MeshConfig" not in message(error)
    assert not (tmp_path / "runs").exists()


def test_a_stage_that_only_samples_needs_its_devices_too():
    with pytest.raises(UserError, match=r"needs 3 devices, but there are 8.* --devices 3"):
        STAGES["preferences"].check_mesh(MeshConfig(data=3))


@pytest.mark.parametrize("devices", [3, 6])
def test_sampling_on_a_number_of_devices_that_does_not_divide_256(devices, monkeypatch, one_device_run):
    from jrlhf.training.evaluation import chunk_rows

    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    for rows in (1, 10, 255, 256, 10_000):
        assert chunk_rows(rows, mesh) % devices == 0
        assert min(rows, 256) <= chunk_rows(rows, mesh) < 256 + devices


# --- rewards and labellers that are wrong -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (
            lambda p, c, rows: np.full(len(p), np.nan),
            "reward 'odd' returned 8 of 8 values that are not finite",
        ),
        (lambda p, c, rows: np.zeros((len(p), 2)), "reward 'odd' returned shape (8, 2)"),
        (
            lambda p, c, rows: np.zeros(3),
            "reward 'odd' returned shape (3,); expected 8 numbers",
        ),
    ],
)
def test_a_reward_that_returns_something_else(reward, expected, one_device_run, one_device_runs, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "odd", reward)
    bad = replace(STAGES["ppo"], reward="odd", critic="policy", gold="", eval_prompts=None)
    with pytest.raises(UserError) as error, one_device():
        run(only(*BEFORE, bad=bad), one_device_runs, console=QUIET)
    assert expected in message(error)


def odd_labeler(*rows: dict) -> Labeler:
    labeler = Labeler()
    object.__setattr__(labeler, "label", lambda asked, responses, seed: list(rows))
    return labeler


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "responses": ["a", "b"]}, "labeler: no field 'ranks'"),
        (PAIR | {"ranks": [2, 3]}, "labeler: field 'ranks' is [2, 3]; 1 is the best rank"),
        (PAIR | {"scores": [0.0, float("nan")]}, "labeler: field 'scores' holds nan"),
    ],
)
def test_a_labeller_that_returns_something_else(row, expected, one_device_run, tmp_path, monkeypatch):
    from tiny_runs import folders

    from jrlhf.config import StageContext

    bad = replace(STAGES["preferences"], labeler=odd_labeler(row), responses=2)
    parents = {"sft": folders(one_device_run)["sft"]}
    ctx = StageContext("bad", bad, tmp_path, parents, {}, 0, MeshConfig(), QUIET, tmp_path)
    with pytest.raises(UserError) as error, one_device():
        bad.run(ctx)
    assert expected in message(error)
    assert not (tmp_path / "preferences.jsonl").exists()


# --- damage to what earlier stages left ---------------------------------------------------------------------


@pytest.fixture
def broken(one_device_run, tmp_path):
    """broken(path inside the SFT stage's folder, new content or None to remove) -> message of what DPO says."""
    runs = shutil.copytree(one_device_run.parent, tmp_path / "runs")
    target = runs / "stages" / folders(one_device_run)["sft"].name

    def broken(path: str, content: bytes | None) -> str:
        if content is None:
            (shutil.rmtree if (target / path).is_dir() else Path.unlink)(target / path)
        else:
            (target / path).write_bytes(content)
        bad = replace(STAGES["dpo"], loop=tiny.loop(1))
        with pytest.raises(UserError) as error, one_device():
            run(only("pretrain", "sft", "preferences", bad=bad), runs, console=QUIET)
        return message(error)

    return broken


def test_a_damaged_parent(broken):
    assert "model.json is not readable JSON" in broken("model/model.json", b"{")


def test_a_parent_whose_model_was_deleted(broken):
    assert "this stage has no model" in broken("model", None)


def test_a_parent_whose_tokenizer_was_deleted(broken):
    assert "tokenizer: no such tokenizer" in broken("tokenizer", None)


def test_a_parent_whose_parameters_are_damaged(broken, one_device_run):
    folder = folders(one_device_run)["sft"] / "model"
    data = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    name = f"model/{data.relative_to(folder)}"
    told = broken(name, data.read_bytes()[:-1] + b"?")
    assert f"the checksum of {data.relative_to(folder)} does not match" in told


def test_a_parent_with_another_tokenizer(broken, one_device_run):
    path = folders(one_device_run)["sft"] / "tokenizer" / "generation_config.json"
    other = json.loads(path.read_text()) | {"eos_token_id": [2, 5]}
    assert "is not the tokenizer that the model" in broken(
        "tokenizer/generation_config.json", json.dumps(other).encode()
    )


def test_a_full_disk(one_device_run, one_device_runs, monkeypatch):
    def full(self, step, values, always=False):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(MetricLogger, "log", full)
    with (
        pytest.raises(UserError, match=r"disk full while writing to metrics\.jsonl; free some space"),
        one_device(),
    ):
        run(
            only(*BEFORE, bad=replace(STAGES["dpo"], eval_prompts=None, gold="")),
            one_device_runs,
            console=QUIET,
        )
