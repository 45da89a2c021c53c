"""The command line: `jrlhf run | mesh | list | show | compare | generate | chat | export`.

Exit codes: 0 done; 1 a bug (with a traceback); 2 a mistake of the user's, in one message; 75 asked to stop
(SIGTERM), saved, the same command goes on; 130 interrupted by Ctrl-C.
"""

import argparse
import contextlib
import importlib
import os
import pkgutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from jrlhf import remote
from jrlhf.config import (
    STOP,
    Preempted,
    UserError,
    apply_overrides,
    did_you_mean,
    group_options,
    print_options,
    read_json,
)

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = os.EX_TEMPFAIL  # 75
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        options = _parse([a for a in argv if a != "--debug"])
        if options.command is _mesh or getattr(options, "help", None):  # they look at no runs
            return options.command(options)
        writes = options.command is _run and not options.dry_run
        with remote.working_folder(options.runs_dir, writes) as options.runs_dir:
            return options.command(options)
    except UserError as e:
        if debug:
            raise
        print(_told(e), file=sys.stderr)
        return EXIT_USER_ERROR
    except Preempted as e:
        print(f"stopped ({e}); saved. Run the same command to go on.", file=sys.stderr)
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        print("interrupted; run the same command to go on from the last save", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as e:  # argparse has printed help
        return int(e.code or 0)
    except BrokenPipeError:  # `jrlhf list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _told(e: UserError) -> str:
    return " ".join([f"error: {e}", *(f"({note})" for note in getattr(e, "__notes__", ()))])


# --- arguments ----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors, and whose options are not abbreviated."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser, and each command's own."""
    from jrlhf import __version__

    parser = _Parser(prog="jrlhf", description="Reinforcement learning from human feedback in JAX.")
    parser.add_argument("--version", action="version", version=f"jrlhf {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    made: dict[str, _Parser] = {}

    def command(name: str, function: Any, text: str) -> _Parser:
        p = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        p.set_defaults(command=function)
        p.add_argument(
            "--runs-dir", type=remote.runs_dir,
            help="folder of runs, or gs://BUCKET/FOLDER (default: $JRLHF_RUNS, or runs)",
        )  # fmt: skip
        p.add_argument("--debug", action="store_true", help="show the traceback of an error")
        made[name] = p
        return p

    p = command("run", _run, "run an experiment, reusing the stages that are finished")
    p.usage = "jrlhf run FILE [options] [--FIELD VALUE ...]"
    p.epilog = "`jrlhf run FILE --help` lists the fields of the experiment."
    p.add_argument("file", metavar="FILE", help="experiment file (.py), run folder or its config.json")
    p.add_argument(
        "--force",
        nargs="*",
        metavar="STAGE",
        help="run these stages (no name: all) and their dependants again",
    )
    p.add_argument("--dry-run", action="store_true", help="show what would be done, and do nothing")
    p.add_argument("--devices", type=int, metavar="N", help="virtual CPU devices (default: at most 2)")
    p.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, whom the cluster tells of each other",
    )
    p.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where there is no such cluster: process 0's address"
    )
    p.add_argument(
        "--processes", type=int, metavar="N", help="with --coordinator: how many processes there are"
    )
    p.add_argument("--process", type=int, metavar="I", help="with --coordinator: which one this is, from 0")
    p.add_argument(
        "--stall-timeout", type=float, metavar="SECONDS", default=1800.0,
        help="of several processes: end them when nothing has moved for so long (default: 1800; 0: wait for ever)",
    )  # fmt: skip
    p.add_argument(
        "--profile", metavar="[steps=]FIRST:LAST",
        help="trace these steps of every training loop into its folder profile/; SIGUSR1 traces the next five",
    )  # fmt: skip
    p.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="FILE.py",
        help="first execute a file that defines classes named in a config.json",
    )  # fmt: skip

    p = command("mesh", _mesh, "show where the parameters of an experiment's models would lie")
    p.usage = "jrlhf mesh FILE [--chips N] [--FIELD VALUE ...]"
    p.epilog = "For example: jrlhf mesh FILE --chips 64 --mesh.data 4 --mesh.fsdp 16"
    p.add_argument("file", metavar="FILE", help="experiment file (.py), run folder or its config.json")
    p.add_argument(
        "--chips", type=int, metavar="N", help="devices of a mesh with an axis of -1 (default: those here)"
    )
    p.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="FILE.py", help="as of `run`"
    )

    p = command("plan", _plan, "compile an experiment for TPUs that are not here: what fits, and how fast")
    p.usage = "jrlhf plan FILE [STAGE[:PROGRAM] ...] --topology v5p:4x4x4 [options] [--FIELD VALUE ...]"
    p.epilog = (
        "Needs the TPU compiler (pip install 'jrlhf[plan]') and no TPU. For example: "
        "jrlhf plan FILE --topology v5e:4x4 --mesh.fsdp 16 --mesh.data 1 --search 8"
    )
    p.add_argument("file", metavar="FILE", help="experiment file (.py), run folder or its config.json")
    p.add_argument(
        "stages", nargs="*", metavar="STAGE[:PROGRAM]", help="what to plan for (default: all that trains)"
    )
    p.add_argument("--topology", required=True, metavar="CHIP:AxBxC", help="v5e:4x4, v5p:4x4x8, v6e:8x8, ...")
    p.add_argument(
        "--card", action="append", default=[], metavar="NAME=FOLDER",
        help="a folder with the config.json of a checkpoint of the hub, which is then not asked for",
    )  # fmt: skip
    p.add_argument(
        "--prompt", type=int, default=0, metavar="N", help="tokens of a prompt (default: the longest)"
    )
    p.add_argument(
        "--answer", type=int, default=0, metavar="N", help="tokens of an answer (default: the longest)"
    )
    p.add_argument(
        "--answers", type=int, default=2, metavar="K", help="ranked answers to a prompt (default: 2)"
    )
    p.add_argument(
        "--search", type=int, default=0, metavar="N",
        help="try up to N variants of each stage's update (mesh, remat, microbatches, offload) and name the best",
    )  # fmt: skip
    p.add_argument("--out", type=Path, metavar="FOLDER", help="write plan.json and memory.png there")
    p.add_argument(
        "--quick", action="store_true",
        help="stop the compiler before it makes machine code: a third of the time, and kernels are not tried",
    )  # fmt: skip
    p.add_argument("--jobs", type=int, default=0, metavar="N", help="compilations at a time (default: cores)")
    p.add_argument("--compile", nargs=2, metavar=("STAGE", "PROGRAM"), help=argparse.SUPPRESS)  # by itself
    p.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="FILE.py", help="as of `run`"
    )

    command("list", _list, "list the runs")

    p = command("show", _show, "show a run's stages and results")
    p.add_argument("run", help=f"{_RUN}")
    p.add_argument("--config", action="store_true", help="the resolved config as well")

    p = command("compare", _compare, "write a report that compares runs")
    p.add_argument("runs", nargs="+", metavar="RUN", help=f"each {_RUN}")
    p.add_argument("--out", type=Path, default=Path("report"), help="folder of the report (default: report)")

    p = command("generate", _generate, "print a model's answers to prompts")
    _add_model(p)
    p.add_argument("--prompt", action="append", required=True, help="may be given several times")
    p.add_argument("--n", type=int, default=1, help="answers to each prompt")
    p.add_argument("--stream", action="store_true", help="print an answer while it is written")

    p = command("chat", _chat, "talk with a model")
    _add_model(p)
    p.add_argument("--system", default="", metavar="TEXT", help="message that begins the conversation")

    p = command("export", _export, "save a model as a Hugging Face checkpoint")
    p.add_argument("model", metavar="MODEL", help="RUN:STAGE[:SEED] or a stage folder")
    p.add_argument("folder", type=Path, help="folder to write")
    p.add_argument(
        "--adapter", action="store_true", help="only the adapter of a stage with `lora`, as PEFT files"
    )
    p.add_argument(
        "--base",
        metavar="NAME",
        help="with --adapter: folder or hub name of its base (default: the checkpoint that the stage began with)",
    )
    p.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier export left in the folder"
    )
    return parser, made


_RUN = "a run folder, or a run's name or the beginning of it (of several runs the newest finished one)"
_MODEL = "RUN[:STAGE[:SEED]], a stage folder, or a Hugging Face checkpoint (folder or hub name)"


def _add_model(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=_MODEL)
    p.add_argument(
        "--max-new-tokens", type=int, help="longest answer (default: what fits the context, at most 256)"
    )
    p.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--top-k", type=int, default=0, help="0: all tokens")
    p.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="end an answer before this text; may be given several times",
    )  # fmt: skip
    p.add_argument(
        "--raw", action="store_true", help="prompts as they stand, also where the model has a chat template"
    )
    p.add_argument("--seed", type=int, default=0)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser, commands = _parser()
    name = next((a for a in argv if not a.startswith("-")), None)
    if not argv:
        parser.print_help()
        raise SystemExit(EXIT_USER_ERROR)
    if name is not None and name not in commands:
        raise UserError(f"{name}: no such command.{did_you_mean(name, commands)}")
    if name in ("run", "mesh", "plan"):  # they take the experiment's fields, too
        return _parse_run(commands[name], argv[argv.index(name) + 1 :])
    options = parser.parse_args(argv)
    options.runs_dir = options.runs_dir or _default_runs_dir()
    return options


def _parse_run(parser: _Parser, argv: list[str]) -> argparse.Namespace:
    """`run`'s own options, and apart from them the experiment's (`overrides`)."""
    own = set(parser._option_string_actions)
    mine: list[str] = []
    overrides: list[str] = []
    groups = group_options(argv)
    if not any(option == "" for option, _ in groups):
        groups = _file_first(groups)
    for option, values in groups:
        if option in ("", *own):
            mine += [option, *values] if option else values
        else:
            overrides += [option, *values]
    wants_help = [a for a in mine if a in ("-h", "--help")]
    if wants_help and not (len(mine) > len(wants_help) and not mine[0].startswith("-")):
        parser.parse_args(["--help"])
    options = parser.parse_args([a for a in mine if a not in wants_help])
    options.overrides, options.own, options.help = overrides, own, parser if wants_help else None
    options.argv = [parser.prog.split()[-1], *argv]
    options.runs_dir = options.runs_dir or _default_runs_dir()
    return options


def _file_first(groups: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """FILE found behind `--force STAGE ...`, where it can be told from a stage's name."""
    for option, values in groups:
        if values and option not in ("--runs-dir", "--import", "--devices"):
            is_file = "/" in values[-1] or values[-1].endswith((".py", ".json"))
            if option == "--force" and is_file:
                return [("", [values.pop()]), *groups]
            if is_file:
                raise UserError(
                    f"{option}: the experiment file comes before the options: jrlhf run {values[-1]} ..."
                )
    return groups


def _default_runs_dir() -> Path | str:
    from jrlhf.experiment import default_runs_dir

    return default_runs_dir()


def _wide_console() -> Any:
    """As wide as the terminal; wide enough for tables where there is none."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


# --- commands -----------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    from jrlhf import experiment as ex

    if not options.help:
        cache = None if options.dry_run else options.runs_dir  # a dry run creates nothing
        _set_up_jax(options.devices, cache)
        together = _join_others(options)
        _check_devices(options.devices)
        _plan_profile(options.profile)
    experiment = _loaded(options)
    if options.help:
        options.help.print_help()
        print()
        print_options(experiment, f"jrlhf run {options.file}")
        return 0
    experiment = apply_overrides(experiment, options.overrides, options.own)
    force = () if options.force is None else tuple(options.force) or ex.ALL
    if options.dry_run:
        _wide_console().print(ex.dry_run(experiment, options.runs_dir, force=force, whole_mesh=not together))
        if together:
            print("the other hosts were not asked: whether the mesh suits all their devices is not checked")
        return 0
    with _stop_on_sigterm(), _trace_on_sigusr1(), _together():
        folder = ex.run(experiment, options.runs_dir, force=force)
    _report(folder)
    return 0


def _loaded(options: argparse.Namespace) -> Any:
    """The experiment of FILE, as it stands there."""
    from jrlhf import experiment as ex

    for file in options.imports:
        ex.load_python(Path(file))
    if not options.file.endswith(".py"):
        _import_rooms()
    return ex.load_experiment(options.file)


def _mesh(options: argparse.Namespace) -> int:
    if options.help:
        options.help.print_help()
        return 0
    if options.chips is not None and options.chips < 1:
        raise UserError(f"--chips: expected at least 1, got {options.chips}")
    import jax

    if options.chips:  # nothing runs: the devices that are here, if any, are left to others
        jax.config.update("jax_platforms", "cpu")
    _set_up_jax(None, None)
    experiment = apply_overrides(_loaded(options), options.overrides, options.own)
    from jrlhf.training.placement import abstract_mesh, placement_tables

    mesh = abstract_mesh(experiment.mesh, options.chips)
    console = _wide_console()
    for heading, table in placement_tables(experiment.stages, mesh):
        console.print(heading, soft_wrap=True, highlight=False)
        console.print(table)
    return 0


def _plan(options: argparse.Namespace) -> int:
    if options.help:
        options.help.print_help()
        return 0
    from jrlhf.compare import plans as shown
    from jrlhf.sharding import make_mesh
    from jrlhf.training.planning import Compiler, compile_here, plan_experiment, topology_devices, with_cards
    from jrlhf.training.programs import Lengths, programs_of

    _set_up_jax(None, None)
    experiment = apply_overrides(_loaded(options), options.overrides, options.own)
    stages = with_cards(experiment.stages, dict(_pair("--card", card) for card in options.card))
    devices = topology_devices(options.topology, max(experiment.mesh.slices, 1))
    lengths = Lengths(options.prompt, options.answer, options.answers)
    if options.compile:
        stage, program = options.compile
        mesh = make_mesh(experiment.mesh, devices)
        found = programs_of(stage, stages, mesh, lengths)
        assert found is not None  # whoever gives these options has looked
        compile_here(next(p for p in found.programs if p.name == program), mesh, options.out)
        return 0

    def command(stage: str, program: str, more: Sequence[str], folder: Path) -> list[str]:
        this = [sys.executable, "-m", "jrlhf.cli", *options.argv, *more]
        return [*this, "--compile", stage, program, "--out", str(folder)]

    console = _wide_console()
    told = lambda what: console.print(f"  {what}", highlight=False)  # noqa: E731
    compiler = Compiler(command, options.quick, options.jobs or os.cpu_count() or 1)
    planned = plan_experiment(
        stages, experiment.mesh, options.stages, devices, lengths, compiler, options.search, told
    )
    where = f"{options.topology}, {planned.sizes}"
    console.print(f"{experiment.name} on {where}", highlight=False)
    console.print(shown.plan_table(planned.programs))
    for program in planned.programs:
        if program.program == "update" and program.compiles:
            console.print(f"{program.stage}: what the update sends", highlight=False)
            console.print(shown.collectives_table(program))
    console.print(shown.steps_table(planned.programs))
    for stage, tried in planned.searches.items():
        console.print(f"{stage}: variants of its update, the best first", highlight=False)
        console.print(shown.search_table(tried))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        about = {"experiment": experiment.name, "topology": options.topology, "mesh": planned.sizes}
        (options.out / "plan.json").write_text(shown.plan_json(planned, **about), encoding="utf-8")
        shown.memory_picture(planned.programs, options.out / "memory.png", f"{experiment.name} on {where}")
        console.print(f"{options.out}/plan.json and memory.png", highlight=False)
    return 0 if all(program.fits for program in planned.programs) else 1


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UserError(f"{option} {text}: expected NAME=FOLDER")
    return name, value


def _report(run: Path) -> None:
    """What a run with an evaluation ends with: answers to read, the table, and the page with the plots."""
    import jax

    from jrlhf.experiment import stage_folders

    if jax.process_index() != 0:
        return
    folders = [f for seeds in stage_folders(run).values() for f in seeds.values()]
    evaluated = [f for f in folders if (f / "evaluation.json").is_file()]
    if not evaluated:
        return
    from jrlhf.compare.report import write_report
    from jrlhf.compare.samples import print_samples

    console = _wide_console()
    print_samples(console, evaluated[0] / "evaluation.json")
    page = write_report([run], run / "report", console)
    remote.push(run)
    console.print(f"report: {remote.shown(page)}", highlight=False, soft_wrap=True)


def _import_rooms() -> None:
    """Make every config class of the package known, so that a config.json can name it."""
    for room in ("data", "rewards", "lab", "training"):
        package = importlib.import_module(f"jrlhf.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def _join_others(options: argparse.Namespace) -> bool:
    """Of several processes that run the same command: joins the others, before jax looks at its devices. In a dry run
    nobody is waited for. Whether there are others."""
    from jrlhf import hosts

    cluster = (options.coordinator, options.processes, options.process)
    if options.stall_timeout < 0:
        raise UserError(f"--stall-timeout: expected seconds, or 0 for none, got {options.stall_timeout:g}")
    if not options.distributed and all(x is None for x in cluster):
        return False
    hosts.check_cluster(*cluster)
    if not options.dry_run:
        import jax

        hosts.join(*cluster)
        if jax.process_count() > 1 and options.stall_timeout:
            hosts.WATCH.start(options.stall_timeout)
    return True


def _plan_profile(steps: str | None) -> None:
    from jrlhf.training.profiling import PROFILING

    if steps is not None:
        PROFILING.plan(steps)


def _set_up_jax(devices: int | None, runs_dir: Path | None) -> None:
    """What has to be set before jax looks at its devices.

    On a machine without accelerators jax makes `devices` virtual CPU devices, so that a sharded experiment
    runs anywhere. Compiled programs are kept in `<runs_dir>/.jax_cache` (None: nowhere).
    """
    import jax

    from jrlhf.experiment import keep_compiled, keep_memory

    if devices is not None and devices < 1:
        raise UserError(f"--devices: expected at least 1, got {devices}")
    keep_memory()
    forced = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if devices is not None and forced:
        raise UserError("--devices: XLA_FLAGS already sets --xla_force_host_platform_device_count; unset it")
    if devices is not None or not (forced or jax.config.jax_num_cpu_devices > 0):  # type: ignore[attr-defined]
        count = devices or min(2, os.cpu_count() or 1)
        if count > 2:
            # XLA's threads wait inside collectives. Its default on a small machine, one for each device, is too few
            # where collectives over several axes of the mesh are under way at once: all threads wait, nothing moves
            # any more, and XLA aborts. Two devices have one axis, and more threads than cores only cost time.
            os.environ.setdefault("PJRT_NPROC", str(max(4 * count, os.cpu_count() or 1)))
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:  # jax has started: within a program that calls `main`
            if devices is not None and jax.device_count("cpu") != devices:
                raise UserError(
                    f"--devices {devices}: jax has started with {jax.device_count('cpu')}"
                ) from None
    if runs_dir is not None:
        keep_compiled(runs_dir)


def _check_devices(devices: int | None) -> None:
    import jax

    if devices is not None and jax.default_backend() != "cpu":
        raise UserError(f"--devices sets virtual CPU devices, but jax runs on {jax.default_backend()} here")


def _set_up_serving(runs_dir: Path) -> None:
    """Of a command that reads a model and leaves no folder of runs where there was none."""
    _set_up_jax(None, runs_dir if runs_dir.is_dir() else None)


@contextlib.contextmanager
def _trace_on_sigusr1() -> Iterator[None]:
    from jrlhf.training.profiling import PROFILING

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGUSR1, lambda *_: PROFILING.ask())
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Of several processes: one that fails ends at once, without the good-bye for which jax would wait for the others,
    so that they notice and say so."""
    import jax

    from jrlhf import hosts

    try:
        yield
    except Preempted:  # they all stop
        raise
    except Exception as e:
        if jax.process_count() == 1:
            raise
        if isinstance(e, UserError):
            hosts.leave(_told(e), EXIT_USER_ERROR)
        traceback.print_exc()
        if hosts.is_loss(e):
            hosts.leave(f"an exchange with the other hosts failed: one of them may be gone. {hosts.AGAIN}")
        hosts.leave("an error; its traceback is above", 1)


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """Within it, a first SIGTERM asks the running stage to save and stop; a second one kills.

    Of several processes jax hears the signal, and tells all of them (`hosts.stop_requested`)."""
    import jax

    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield  # signals belong to the main thread
        return

    def ask(number: int, frame: FrameType | None) -> None:
        STOP.request()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.write(2, b"SIGTERM: will save and stop; a second SIGTERM kills\n")

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        STOP.clear()


def _list(options: argparse.Namespace) -> int:
    from datetime import datetime

    from rich.markup import escape
    from rich.table import Table

    from jrlhf import experiment as ex

    runs = ex.run_folders(options.runs_dir)
    if not runs:
        print(f"no runs in {remote.shown(options.runs_dir)}")
        return 0
    table = Table("run", "finished", "last started", "seeds", "stages", "differs from the first so named in")
    for column in table.columns[:3]:
        column.no_wrap = True
    first: dict[str, Any] = {}  # experiment's name -> config of its oldest run
    for run in runs:
        stages, config = ex.stage_folders(run), read_json(run / "config.json")
        folders = [f for seeds in stages.values() for f in seeds.values()]
        finished = sum((f / "done.json").exists() for f in folders)
        seeds = sorted({int(s) for of_stage in stages.values() for s in of_stage})
        started = datetime.fromtimestamp((run / "stages.json").stat().st_mtime)
        changes = ex.differences(first.setdefault(ex.experiment_name(run), config), config)
        table.add_row(
            run.name, f"{finished}/{len(folders)}", f"{started:%Y-%m-%d %H:%M}", " ".join(map(str, seeds)),
            ", ".join(stages), escape(_few(changes)),
        )  # fmt: skip
    _wide_console().print(table)
    return 0


def _few(words: list[str], most: int = 4) -> str:
    rest = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + rest


def _show(options: argparse.Namespace) -> int:
    from rich.markup import escape
    from rich.table import Table
    from rich.tree import Tree

    from jrlhf import experiment as ex

    run = ex.find_run(options.run, options.runs_dir, _notice)
    console = _wide_console()
    table = Table(
        "stage", "seed", "status", "time", "folder", "results", title=remote.shown(run), title_justify="left"
    )
    for name, seeds in ex.stage_folders(run).items():
        for seed, folder in seeds.items():
            done = read_json(folder / "done.json") if (folder / "done.json").exists() else None
            status = "finished" if done else "partial" if folder.exists() else "to do"
            table.add_row(
                name, seed, status, f"{done['seconds']:.1f} s" if done else "-", folder.name,
                escape("\n".join(_flat(done["results"]))) if done else "",
            )  # fmt: skip
    console.print(table)
    if not options.config:
        console.print(f"its config: jrlhf show {run.name} --config", highlight=False)
        return 0
    tree = Tree("[bold]config[/]", highlight=False)
    _grow(tree, read_json(run / "config.json"))
    console.print(tree)
    return 0


def _notice(line: str) -> None:
    print(line, file=sys.stderr)


def _grow(tree: Any, data: Any) -> None:
    """Add a config's fields to a rich tree."""
    from rich.markup import escape

    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        nested = isinstance(value, dict) or (
            isinstance(value, list) and any(isinstance(v, dict) for v in value)
        )
        if nested and value:
            kind = f" [dim]{value['type']}[/]" if isinstance(value, dict) and "type" in value else ""
            _grow(tree.add(f"[bold]{escape(str(key))}[/]{kind}"), value)
        elif key != "type":
            tree.add(escape(f"{key}: {value}"))


def _flat(results: Any, name: str = "") -> Iterator[str]:
    """Results as lines, the numbers of one group in one; long lists are left to the file."""
    if not isinstance(results, dict):
        yield f"{name}: {_short(results)}"
        return
    numbers = {k: v for k, v in results.items() if not isinstance(v, dict)}
    if name and len(numbers) > 1:
        yield f"{name}: " + "  ".join(f"{k} {_short(v)}" for k, v in numbers.items())
    else:
        yield from (f"{name}.{k}: {_short(v)}" if name else f"{k}: {_short(v)}" for k, v in numbers.items())
    for key, value in results.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.{key}" if name else key)


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} values"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _compare(options: argparse.Namespace) -> int:
    from jrlhf.experiment import find_run

    runs = [find_run(r, options.runs_dir, _notice) for r in options.runs]

    from jrlhf.compare.report import write_report

    print(write_report(runs, options.out, _wide_console()))
    return 0


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    for name, ok, what in (
        ("max_new_tokens", options.max_new_tokens is None or options.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 <= options.temperature < float("inf"), "at least 0"),
        ("top_p", 0 < options.top_p <= 1, "in (0, 1]"),
        ("top_k", options.top_k >= 0, "at least 0"),
        ("stop", all(options.stop), "a text"),
    ):
        if not ok:
            raise UserError(f"--{name.replace('_', '-')}: must be {what}, got {getattr(options, name)}")
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
    return {"stop": tuple(options.stop)} | {n: getattr(options, n) for n in names}


def _generate(options: argparse.Namespace) -> int:
    from rich.console import Console

    if options.n < 1:
        raise UserError(f"--n: must be at least 1, got {options.n}")
    if options.stream and options.n > 1:
        raise UserError(f"--stream: shows one answer to a prompt as it is written, and --n is {options.n}")
    sampling = _sampling(options)
    path = _model_folder(options.model, options.runs_dir)
    _set_up_serving(options.runs_dir)
    from jrlhf.training import serve

    asked = {"n": options.n, "raw": options.raw, "stream": options.stream}
    serve.generate(path, options.prompt, console=Console(), **asked, **sampling)
    return 0


def _chat(options: argparse.Namespace) -> int:
    from rich.console import Console

    sampling = _sampling(options)
    path = _model_folder(options.model, options.runs_dir)
    _set_up_serving(options.runs_dir)
    from jrlhf.training import serve

    serve.chat(path, console=Console(), raw=options.raw, system=options.system, **sampling)
    return 0


def _export(options: argparse.Namespace) -> int:
    path = _model_folder(options.model, options.runs_dir)
    if options.base is not None and not (options.adapter and options.base):
        raise UserError("--base: names the base of an adapter; give it with --adapter, and not empty")
    if options.folder.exists() and not options.folder.is_dir():
        raise UserError(f"{options.folder}: is a file; name a folder")
    if options.folder.exists() and any(options.folder.iterdir()) and not options.overwrite:
        raise UserError(
            f"{options.folder}: exists and is not empty; name a new folder, or --overwrite an earlier export"
        )
    _set_up_serving(options.runs_dir)
    from jrlhf.training import serve

    asked = {name: value for name in ("base", "overwrite") if (value := getattr(options, name))}
    if not options.adapter:
        serve.export(path, options.folder, **asked)
        return 0
    base = serve.export_adapter(path, options.folder, **asked)
    print(f"{options.folder}: an adapter beside {base}")
    return 0


def _model_folder(text: str, runs_dir: Path) -> Path:
    """A path, or a hub name, as it is; RUN as its run folder; RUN:STAGE[:SEED] as that stage's folder.

    UserError for a stage that holds no model.
    """
    if Path(text).exists():
        _check_holds_model(text, Path(text), runs_dir)
        return Path(text)
    if text.count("/") == 1 and ":" not in text and not Path(text).parent.is_dir():
        return Path(text)  # a name of the hub's
    from jrlhf.experiment import find_run, stage_folders

    run_name, *rest = text.split(":")
    run = find_run(run_name, runs_dir, _notice)
    if not rest:
        return run
    if len(rest) > 2:
        raise UserError(f"{text}: expected {_MODEL}")
    stages = stage_folders(run)
    if rest[0] not in stages:
        raise UserError(f"{text}: {run.name} has no stage {rest[0]!r}.{did_you_mean(rest[0], stages)}")
    seeds = stages[rest[0]]
    seed = rest[1] if len(rest) == 2 else next(iter(seeds))
    if seed not in seeds:
        raise UserError(f"{text}: stage {rest[0]!r} has no seed {seed!r}.{did_you_mean(seed, seeds)}")
    held = [name for name, of_seed in stages.items() if any(map(_holds_model, of_seed.values()))]
    _check_holds_model(text, seeds[seed], runs_dir, f" Stages with a model: {', '.join(held) or '(none)'}.")
    return seeds[seed]


def _holds_model(folder: Path) -> bool:
    return (folder / "model" / "model.json").is_file()


def _check_holds_model(text: str, folder: Path, runs_dir: Path, others: str = "") -> None:
    """UserError for a stage folder without a model; run folders and checkpoints pass."""
    is_stage = folder.resolve().parent == (runs_dir / "stages").resolve()
    if is_stage and not _holds_model(folder):
        config = folder / "config.json"
        kind = read_json(config)["stage"]["type"] if config.is_file() else ""
        done = (folder / "done.json").is_file()
        why = f"this stage ({kind}) leaves no model." if done else "this stage has not finished."
        raise UserError(f"{text}: {why}{others}")


if __name__ == "__main__":
    sys.exit(main())
