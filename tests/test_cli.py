"""The command line: what it does, what it says to a mistake, and its exit codes."""

import json
import os
import shutil
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import pytest

from jrlhf.cli import main
from jrlhf.config import STOP, UserError
from jrlhf.training import profiling

REPOSITORY = Path(__file__).parent.parent

FILE = """
import os, signal, sys
from dataclasses import dataclass

from jrlhf.config import STOP, Preempted, Source, Stage, UserError, stage_ref
from jrlhf.experiment import Experiment


@dataclass(frozen=True)
class CliLines(Source):
    path: str
    def files(self):
        return (self.path,) if self.path else ()


@dataclass(frozen=True)
class CliLimits:
    least: float = 0.0
    most: float = 1.0

    def __post_init__(self):
        if self.least > self.most:
            raise UserError("least must not exceed most")


@dataclass(frozen=True)
class CliTrain(Stage):
    '''Adds numbers.'''

    start: str = stage_ref("")
    lr: float = 0.1  # Step size.
    steps: int = 3
    data: Source = CliLines("")
    act: str = ""

    def run(self, ctx):
        if self.act == "sigterm" and not (ctx.folder / "saved").exists():
            os.kill(os.getpid(), signal.SIGTERM)
            assert STOP.requested
            (ctx.folder / "saved").touch()
            raise Preempted("at step 1")
        if self.act == "ctrl-c":
            raise KeyboardInterrupt
        if self.act == "mistake":
            raise UserError("data.txt:3: no field 'prompt'")
        if self.act == "late":
            (ctx.folder / "metrics.jsonl").touch()
            raise UserError("step 3: the loss is nan")
        if self.act == "devices":
            import jax
            told = {"devices": jax.device_count(), "cache": jax.config.jax_compilation_cache_dir}
            return told | {"threads": int(os.environ["PJRT_NPROC"])}
        return {"lr": self.lr, "curve": list(range(20)), "nested": {"steps": self.steps}}


experiment = Experiment(
    "toy", {"base": CliTrain(), "sft": CliTrain("base", lr=0.2), "ppo": CliTrain("sft", lr=0.3)}, seeds=(0, 1)
)
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """An experiment file in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JRLHF_RUNS", raising=False)
    Path("toy.py").write_text(FILE)
    Path("data.txt").write_text("x\n")
    return "toy.py"


@pytest.fixture
def call(capsys):
    """call("run toy.py") -> (exit code, stdout, stderr)"""

    def call(command: str):
        code = main(command.split())
        out, err = capsys.readouterr()
        return code, out, err

    return call


def results(name: str) -> dict:
    (folder,) = Path("runs").glob(f"{name}-*")
    return json.loads((folder / "results.json").read_text())


def test_run_then_run_again(file, call):
    code, out, err = call("run toy.py")
    assert (code, err) == (0, "")
    assert out.count(": running in runs/stages/cli-train-") == 6
    code, out, _ = call("run toy.py")
    assert code == 0
    assert out.count(": reused runs/stages/cli-train-") == 6
    assert set(results("toy")) == {"base", "sft", "ppo"}


def test_overrides(file, call):
    code, _, err = call("run toy.py --stages.ppo.lr 0.5 --seeds 7 --name other --mesh.data 2 --runs-dir runs")
    assert (code, err) == (0, "")
    assert {n: s["7"]["lr"] for n, s in results("other").items()} == {"base": 0.1, "sft": 0.2, "ppo": 0.5}


def test_run_again_from_the_run_folder(file, call):
    call("run toy.py --name first --stages.sft.steps 5")
    (folder,) = Path("runs").glob("first-*")
    code, out, err = call(f"run {folder}/config.json")
    assert (code, err) == (0, "")
    assert out.count("reused") == 6
    assert len(list(Path("runs").glob("first-*"))) == 1
    assert call(f"run {folder} --stages.ppo.steps 6")[1].count("reused") == 4


def test_force(file, call):
    call("run toy.py --seeds 0")
    code, out, _ = call("run toy.py --seeds 0 --force sft --stages.ppo.lr 0.3")
    assert code == 0
    assert (out.count("reused"), out.count("running in"), out.count("is kept as")) == (1, 2, 2)
    assert call("run toy.py --force --seeds 0")[1].count("running in") == 3
    code, out, _ = call("run --seeds 0 --force sft ppo toy.py")  # a stage's name has no dot
    assert (code, out.count("reused"), out.count("running in")) == (0, 1, 2)


def test_dry_run(file, call):
    call("run toy.py --seeds 0 --stages.ppo.lr 0.9")
    before = sorted(Path("runs").rglob("*"))
    code, out, err = call("run toy.py --seeds 0 --dry-run")
    assert (code, err) == (0, "")
    lines = {line.split()[1]: line for line in out.splitlines() if "cli-train" in line}
    assert "finished" in lines["base"]
    assert "to do" in lines["ppo"]
    assert sorted(Path("runs").rglob("*")) == before


def test_a_dry_run_of_real_stages_creates_nothing(tmp_path):
    """Not even the cache of compiled programs."""
    file = REPOSITORY / "experiments" / "larder" / "ppo_vs_dpo.py"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PJRT_"))}
    env |= {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jrlhf.cli", "run", str(file), "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "stages to run: 8, to reuse: 0" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_dry_run_waits_for_no_other_host(file, call):
    """Nobody is at that address. Whether the mesh suits the devices of all hosts, one alone cannot tell."""
    cluster = "--coordinator localhost:9 --processes 2 --process"
    code, out, err = call(f"run toy.py --seeds 0 --dry-run --mesh.fsdp 16 {cluster} 1")
    assert (code, err) == (0, "")
    assert "to do" in out
    assert "whether the mesh suits all their devices is not checked" in out
    code, _, err = call(f"run toy.py --seeds 0 --dry-run {cluster} 2")
    assert code == 2
    assert "--process: 2 is none of the 2" in err


def test_a_dry_run_checks_what_is_to_be_traced(file, call, monkeypatch):
    monkeypatch.setattr(profiling, "PROFILING", profiling.Profiling())
    assert call("run toy.py --seeds 0 --dry-run --profile steps=10:15")[0] == 0
    code, _, err = call("run toy.py --seeds 0 --dry-run --profile 10-15")
    assert code == 2
    assert "--profile: expected FIRST:LAST" in err
    assert call("run toy.py --seeds 0 --dry-run --profile=")[0] == 2


def test_runs_dir_from_the_environment(file, call, monkeypatch):
    monkeypatch.setenv("JRLHF_RUNS", "elsewhere")
    assert call("run toy.py --seeds 0")[0] == 0
    assert len(list(Path("elsewhere").glob("toy-*"))) == 1
    assert not Path("runs").exists()


def test_help(file, call):
    code, out, _ = call("--help")
    assert code == 0
    assert all(
        f"\n    {name} " in out for name in ("run", "list", "show", "compare", "generate", "chat", "export")
    )
    assert "--dry-run" in call("run --help")[1]
    code, out, err = call("run toy.py --help")
    assert (code, err) == (0, "")
    out = " ".join(out.split())
    assert "--dry-run" in out
    assert "stages.ppo options" in out
    assert "--stages.ppo.lr FLOAT Step size. (default: 0.3)" in out
    assert "Adds numbers." in out
    assert not Path("runs").exists()
    assert call("--version")[1].startswith("jrlhf ")


def test_help_does_not_import_jax():
    code = "import sys, jrlhf.cli as c; c.main(['--help']); assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, capture_output=True)


# --- mistakes -----------------------------------------------------------------------------------------------

# (command, edit of the experiment file, what stderr says)
MISTAKES = [
    ("", None, None),
    ("rnu toy.py", None, "rnu: no such command. Did you mean 'run'?"),
    ("run", None, "the following arguments are required: FILE"),
    ("run tyo.py", None, "tyo.py: no such file. Did you mean 'toy.py'?"),
    ("run none/toy.py", None, "none/toy.py: no such file. There is no folder none."),
    ("run toy.yaml", None, "toy.yaml: no such file."),
    ("run data.txt", None, "data.txt: an experiment is a .py file or a config.json"),
    ("run toy.py --stages.ppo.lrr 1", None, "--stages.ppo.lrr: no such field. Did you mean 'lr'?"),
    ("run toy.py --stages.pp.lr 1", None, "Did you mean '--stages.ppo.lr'?"),
    ("run toy.py --stages.ppo.lr abc", None, "--stages.ppo.lr: expected a float, got 'abc'"),
    ("run toy.py --stages.ppo.steps 1.5", None, "--stages.ppo.steps: expected an int, got '1.5'"),
    ("run toy.py --seeds x", None, "--seeds: expected a list (each an int), got 'x'"),
    ("run toy.py --seeds 0,1,2", None, "got '0,1,2'. Separate by spaces: --seeds 0 1 2"),
    ("run --stages.ppo.lr 1 toy.py", None, "comes before the options: jrlhf run toy.py ..."),
    ("run toy.py --seeds -1", None, "seeds: must be in [0, 2^31), got (-1,)"),
    ("run toy.py --dry-rnu", None, "--dry-rnu: no such option or field. Did you mean '--dry-run'?"),
    ("run toy.py extra", None, "unrecognized arguments: extra"),
    ("run toy.py --force pppo", None, "--force pppo: not a stage. Did you mean 'ppo'?"),
    ("run toy.py --devices 0", None, "--devices: expected at least 1, got 0"),
    ("run toy.py --devices x", None, "argument --devices: invalid int value: 'x'"),
    ("run toy.py --devices 3", None, "--devices 3: jax has started with 8"),
    ("run toy.py --import mine.py", None, "mine.py: no such file."),
    ("run toy.py --stages.ppo.start stf", None, "stages.ppo.start: 'stf' is not a stage. Did you mean 'sft'?"),
    ("run toy.py --stages.base.start ppo", None, "stages: a cycle: base -> ppo -> sft -> base"),
    ("run toy.py --stages.ppo.data.path dta.txt", None, "stages.ppo: dta.txt: no such file. Did you mean"),
    ("run toy.py --stages.ppo.act mistake", None, "data.txt:3: no field 'prompt'"),
    ("run toy.py --name a/b", None, "name: 'a/b' cannot be a name"),
    ("run toy.py", ("experiment = Exp", "experimnt = Exp"), "toy.py: defines no `experiment = Exp"),
    ("run toy.py", ("lr=0.3)", "lr=0.3"), "error: toy.py:57: SyntaxError: "),
    ("run toy.py", ("lr=0.3", "lrr=0.3"), "error: toy.py:57: CliTrain has no field 'lrr'. Did you mean 'lr'?"),
    ("run toy.py", ("lr=0.3", "lr='x'"), "toy.py.stages.ppo.lr: expected a float, got the string 'x'"),
    ("run toy.py", ("experiment = Experiment(", "experiment = dict("), "error: toy.py:56: TypeError: "),
    (
        "run toy.py",
        ('act: str = ""', 'act: str = ""; limits: CliLimits = CliLimits(most="2")'),
        "error: toy.py:34: CliLimits.most: expected a float, got the string '2'",
    ),
    ("run toy.py", ("import os", "import oss"), "toy.py:2: ModuleNotFoundError: No module named 'oss'"),
    ("run toy.py", ("import os", "import sys; sys.exit(3); import os"), "toy.py:2: SystemExit: 3"),
    ("run empty/config.json", None, "empty/config.json: no such file"),
    ("run broken.json", None, "broken.json:2: not valid JSON"),
    ("run other.json", None, "other.json: not an experiment's config"),
    ("run alien.json", None, "alien.json.stages.a.type: 'CliTrian' is not a Stage. Did you mean 'CliTrain'?"),
    ("show", None, "the following arguments are required: run"),
    ("show nothing", None, "nothing: no such run in runs. Known: (none)."),
    ("compare nothing", None, "nothing: no such run in runs."),
    ("generate path/to/nothing --prompt x", None, "neither a folder, nor a run in runs. Known: (none)."),
    ("generate nothing --prompt x", None, "nothing: no such run in runs."),
    ("generate toy.py", None, "the following arguments are required: --prompt"),
    ("generate toy.py --prompt x --temperature -1", None, "--temperature: must be at least 0, got -1.0"),
    ("generate toy.py --prompt x --top-p 0", None, "--top-p: must be in (0, 1], got 0.0"),
    ("generate toy.py --prompt x --n 0", None, "--n: must be at least 1, got 0"),
    ("generate toy.py --prompt x --n 2 --stream", None, "--stream: shows one answer to a prompt as it is written"),
    ("chat toy.py --stop", None, "argument --stop: expected one argument"),
    ("chat toy.py --max-new-tokens 0", None, "--max-new-tokens: must be at least 1, got 0"),
    ("export toy.py .", None, ".: exists and is not empty; name a new folder"),
    ("list --runsdir x", None, "unrecognized arguments: --runsdir x"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "edit", "message"), MISTAKES, ids=[f"{c}|{e[1] if e else ''}" for c, e, _ in MISTAKES]
)
def test_a_mistake_is_one_message_and_exit_code_2(command, edit, message, file, call):
    Path("broken.json").write_text('{"name": "x",\n "stages": ]}')
    Path("other.json").write_text("[]")
    Path("alien.json").write_text('{"name": "x", "stages": {"a": {"type": "CliTrian"}}}')
    if "--devices" in command:
        import jax

        jax.devices()  # jax has started
    if edit:
        assert FILE.count(edit[0]) == 1
        Path("toy.py").write_text(FILE.replace(*edit))
    elif "alien" in command:
        call("run toy.py --help")  # makes the class known
    code, out, err = call(command)
    assert code == 2
    if message is None:
        assert "usage: jrlhf" in out
        return
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_debug_shows_where_an_error_comes_from(file):
    with pytest.raises(UserError, match="no such file"):
        main(["run", "none.py", "--debug"])


def test_a_bug_is_not_hidden(file):
    Path("toy.py").write_text(FILE.replace("raise KeyboardInterrupt", "1 / 0"))
    with pytest.raises(ZeroDivisionError):
        main(["run", "toy.py", "--stages.base.act", "ctrl-c"])


def test_ctrl_c(file, call):
    code, _, err = call("run toy.py --stages.base.act ctrl-c")
    assert code == 130
    assert "run the same command to go on" in err


def test_sigterm_saves_and_the_same_command_goes_on(file, call):
    code, out, err = call("run toy.py --stages.sft.act sigterm --seeds 0")
    assert code == 75
    assert "sft (seed 0): finished" not in out
    assert "stopped (at step 1); saved. Run the same command to go on." in err
    assert not STOP.requested
    code, out, _ = call("run toy.py --stages.sft.act sigterm --seeds 0")
    assert code == 0
    assert "base (seed 0): reused" in out
    assert "sft (seed 0): resuming" in out
    assert "ppo (seed 0): running" in out


# --- other commands -----------------------------------------------------------------------------------------


def test_list_and_show(file, call):
    assert call("list")[1] == "no runs in runs\n"
    call("run toy.py --seeds 0 1")
    call("run toy.py --seeds 0 --name half --stages.ppo.act late")
    code, out, err = call("list")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert any("toy-" in line and "6/6" in line for line in lines)
    assert any("half-" in line and "2/3" in line for line in lines)
    code, out, err = call("show toy")
    assert (code, err) == (0, "")
    assert "lr: 0.3" in out
    assert "nested.steps: 3" in out
    assert "curve: 20 values" in out
    assert "CliTrain" not in out
    (run,) = Path("runs").glob("toy-*")
    assert call(f"show {run}/config.json")[1] == out
    out = call("show toy --config")[1]
    assert out.index("nested.steps: 3") < out.index("CliTrain")
    assert "partial" in call("show half")[1]
    assert "hlaf: no such run in runs. Did you mean 'half'?" in call("show hlaf")[2]


def test_results_of_one_group_are_one_line(file, call):
    Path("toy.py").write_text(FILE.replace('{"steps": self.steps}', '{"a": {"kl": 0.25, "n": 3}, "b": {}}'))
    call("run toy.py --seeds 0")
    assert "nested.a: kl 0.25  n 3" in call("show toy")[1]


def test_of_several_runs_of_a_name_the_newest_finished_one_is_taken(file, call):
    """And the list says how each differs from the first."""
    call("run toy.py --seeds 0")
    call("run toy.py --seeds 0 --stages.ppo.lr 0.5 --stages.sft.steps 7")
    call("run toy.py --seeds 0 --stages.ppo.act late")
    call("run toy.py --seeds 0 --name toy-two")
    old, new, failed = (p.name for p in sorted(Path("runs").glob("toy-????????"), key=started))
    code, out, err = call("show toy")
    assert code == 0
    assert err == f"toy: {new}, the newest finished of 3 runs (`jrlhf list` tells how they differ)\n"
    assert f"runs/{new}" in out
    for exact in (old, failed, f"runs/{old}"):
        code, out, err = call(f"show {exact}")
        assert (code, err) == (0, "")
        assert exact in out
    assert "runs of several experiments have names that begin so: toy, toy-two" in call("show to")[2]
    lines = {name: next(x for x in call("list")[1].splitlines() if name in x) for name in (old, new, failed)}
    assert "sft.steps=7, ppo.lr=0.5" in lines[new]
    assert "ppo.act=late" in lines[failed]
    assert "=" not in lines[old]


def started(run: Path) -> int:
    return (run / "stages.json").stat().st_mtime_ns


def test_a_run_that_fails_before_a_stage_has_done_something_leaves_nothing(file, call):
    assert call("run toy.py --seeds 0 --stages.base.act mistake")[0] == 2
    assert call("list")[1] == "no runs in runs\n"
    assert not [p for p in Path("runs/stages").iterdir() if p.is_dir()]
    call("run toy.py --seeds 0")
    call("run toy.py --seeds 0 --stages.ppo.act mistake")  # everything before is reused
    assert len(list(Path("runs").glob("toy-*"))) == 1
    call("run toy.py --seeds 0 --stages.sft.steps 7 --stages.ppo.act mistake")  # sft is run
    assert len(list(Path("runs").glob("toy-*"))) == 2
    assert "to do" in call(f"show {max(Path('runs').glob('toy-*'), key=started).name}")[1]


def test_a_run_says_how_much_there_is_to_do(file, call):
    assert "toy: stages to run: 3, to reuse: 0" in call("run toy.py --seeds 0")[1]
    assert "toy: stages to run: 3, to reuse: 3" in call("run toy.py --seeds 0 1")[1]
    assert "stages to run: 1, to reuse: 2" in call("run toy.py --seeds 0 --stages.ppo.lr 2 --dry-run")[1]


@pytest.fixture
def serve(monkeypatch):
    """Records the calls that the commands make."""
    calls = []
    module = types.ModuleType("jrlhf.training.serve")

    def record(*args, _name, **kwargs):
        calls.append((_name, args, kwargs))
        return "org/base"

    for name in ("generate", "chat", "export", "export_adapter"):
        setattr(module, name, partial(record, _name=name))
    import jrlhf.training

    monkeypatch.setitem(sys.modules, "jrlhf.training.serve", module)
    monkeypatch.setattr(jrlhf.training, "serve", module, raising=False)
    return calls


def test_generate_chat_export_find_the_model(file, call, serve):
    call("run toy.py")
    (run,) = Path("runs").glob("toy-*")
    for folder in Path("runs/stages").glob("cli-train-*"):
        (folder / "model").mkdir()
        (folder / "model/model.json").touch()
    index = json.loads((run / "stages.json").read_text())
    assert call("generate toy:sft:1 --prompt a --prompt b --n 2 --top-k 5 --temperature 0")[0] == 0
    assert call("chat toy:ppo --seed 3 --stop Human: --stop x")[0] == 0
    assert call("chat toy")[0] == 0
    assert call("export data.txt out")[0] == 0
    told = "out: an adapter beside org/base\n"
    assert call("export toy:ppo out --adapter")[:2] == (0, told)
    assert call("chat org/model")[0] == 0
    (_, (path, asked), sampling), (_, (chatted,), options), (_, (whole,), _), exported, adapter, hub = serve
    assert path == Path("runs") / index["sft"]["1"]
    assert path.is_dir()
    assert asked == ["a", "b"]
    assert {k: sampling[k] for k in ("n", "top_k", "temperature", "top_p", "max_new_tokens", "seed")} == {
        "n": 2, "top_k": 5, "temperature": 0.0, "top_p": 1.0, "max_new_tokens": None, "seed": 0,
    }  # fmt: skip
    assert chatted == Path("runs") / index["ppo"]["0"]
    assert (options["seed"], options["stop"]) == (3, ("Human:", "x"))
    assert (sampling["stop"], sampling["stream"]) == ((), False)
    assert whole == run
    assert exported == ("export", (Path("data.txt"), Path("out")), {})
    assert adapter == ("export_adapter", (chatted, Path("out")), {})
    assert hub[1] == (Path("org/model"),)
    for seed in ("0", "1"):
        (Path("runs") / index["base"][seed] / "model/model.json").unlink()
    told = "this stage (CliTrain) leaves no model."
    assert f"toy:base: {told} Stages with a model: sft, ppo." in call("generate toy:base --prompt a")[2]
    assert told in call(f"export runs/{index['base']['0']} out")[2]
    assert "has no stage 'sfft'. Did you mean 'sft'?" in call("generate toy:sfft --prompt a")[2]
    assert "has no seed '9'. Known: 0, 1." in call("generate toy:sft:9 --prompt a")[2]


def test_serving_a_checkpoint_leaves_nothing_behind(tmp_path):
    """No folder of runs where there was none, and where there is one its cache of compiled programs is used."""
    import jax

    from jrlhf.data.tokenizer import train_sentencepiece
    from jrlhf.models.config import ModelConfig
    from jrlhf.models.hf import save_hf
    from jrlhf.models.transformer import Model

    tokenizer = train_sentencepiece(["Once upon a time"] * 9, 30, tmp_path / "t")
    shape = {"d_model": 8, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "d_ff": 8, "context": 16}
    model = Model(ModelConfig(tokenizer.vocab_size, **shape))
    save_hf(tmp_path / "hf", model, model.init(jax.random.key(0)), tmp_path / "t", eos_ids=tokenizer.eos_ids)
    shutil.rmtree(tmp_path / "t")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "JRLHF_"))}
    env |= {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def generate():
        words = [sys.executable, "-m", "jrlhf.cli", "generate", "hf", "--prompt", "Once"]
        return subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    done = generate()
    assert (done.returncode, done.stderr) == (0, "")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    (tmp_path / "runs").mkdir()
    assert generate().stdout == done.stdout
    assert any((tmp_path / "runs" / ".jax_cache").iterdir())


def test_compare_passes_the_runs(file, call, monkeypatch):
    calls = []
    module = types.ModuleType("jrlhf.compare.report")
    module.write_report = lambda runs, out, console: calls.append((runs, out)) or "report/index.html"
    monkeypatch.setitem(sys.modules, "jrlhf.compare.report", module)
    call("run toy.py --seeds 0")
    call("run toy.py --seeds 1 --name other")
    code, out, _ = call("compare toy other --out there")
    assert (code, out) == (0, "report/index.html\n")
    (first,), (second,) = Path("runs").glob("toy-*"), Path("runs").glob("other-*")
    assert calls == [([first, second], Path("there"))]


def test_a_fresh_process(file):
    """Devices and the compilation cache are set before jax starts; --import makes own classes known."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PJRT_"))}
    env |= {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}

    def jrlhf(command: str):
        words = [sys.executable, "-m", "jrlhf.cli", *command.split()]
        return subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)

    done = jrlhf("run toy.py --seeds 0 --stages.ppo.act devices --devices 3")
    assert (done.returncode, done.stderr) == (0, "")
    told = results("toy")["ppo"]["0"]
    # Devices may wait in collectives over several axes at once.
    assert told.pop("threads") == max(12, os.cpu_count())
    assert told == {"devices": 3, "cache": str(Path("runs/.jax_cache").absolute())}
    (folder,) = Path("runs").glob("toy-*")
    unknown = jrlhf(f"run {folder}")
    assert unknown.returncode == 2
    assert "'CliTrain' is not a Stage." in unknown.stderr
    assert "--import FILE.py" in unknown.stderr
    assert jrlhf(f"run {folder} --import toy.py").stdout.count("reused") == 3
