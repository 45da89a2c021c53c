"""Shared frozen dataclasses, the user-facing error, and how configs become JSON and come back.

A config is a tree of frozen dataclasses, tuples, dicts with string keys and plain values. It is written as
JSON (`to_dict`), read back with strict types (`from_dict`) and changed from the command line
(`apply_overrides`). A class is named in JSON by its bare name, and is looked up only among the classes that
its field allows: reading a config never imports or runs anything.
"""

import contextlib
import dataclasses
import difflib
import io
import json
import math
import operator
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

if TYPE_CHECKING:
    from rich.console import Console

    from jrlhf.types import Plan, PreferenceRow

T = TypeVar("T")


class UserError(Exception):
    """A mistake that the user can mend.

    The message names the file, line or field and says what to do. The command line prints it without a
    traceback (`--debug` shows one) and exits with code 2.
    """


class Preempted(Exception):
    """Raised by a stage that was asked to stop and has saved its state.

    The command line exits with code 75 (`EX_TEMPFAIL`): the same command goes on from what was saved.
    """


class StopRequest:
    """Set by the command line on SIGTERM. Training drivers look at `requested` after every step; when it is
    true they save and raise `Preempted`."""

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        self.requested = True

    def clear(self) -> None:
        self.requested = False


STOP = StopRequest()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"`, or `" Known: a, b."` when nothing is close."""
    known = sorted(str(k) for k in known)
    close = difflib.get_close_matches(str(name), known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known) or '(none)'}."


def bytes_text(n: float) -> str:
    """1300000 -> 1.2 MiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}" if unit == "GiB" else f"{n / scale:.1f} {unit}"
    return f"{n:.0f} B"


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh. -1 takes the devices that the other axes leave (only for one axis)."""

    data: int = -1  # rows
    fsdp: int = 1  # rows; parameters, gradients and optimiser state are split
    expert: int = dataclasses.field(default=1, kw_only=True)  # rows; the experts of a mixture are split
    sequence: int = dataclasses.field(default=1, kw_only=True)  # lengths
    tensor: int = 1  # heads, feed-forward, vocabulary
    # Parts of the devices between which the network is slow; only `data` (`fsdp` where data is 1) goes from one to
    # another. 0: as the devices say.
    slices: int = dataclasses.field(default=0, kw_only=True)


# What a stage leaves in its folder (`Stage.artifact`), for a field that names a stage to say which it needs.
LANGUAGE_MODEL = "a language model"
REWARD_MODEL = "a reward model"
PREFERENCES = "preferences"
STEPS = "labelled steps"
PROMPTS = "prompts"
DEMONSTRATIONS = "demonstrations"
BEST_OF_N = "a best-of-n table"
EVALUATION = "an evaluation"

# What is left as rows, and in which file of the stage's folder.
ROWS = {
    PROMPTS: "prompts.jsonl",
    DEMONSTRATIONS: "demonstrations.jsonl",
    PREFERENCES: "preferences.jsonl",
    STEPS: "steps.jsonl",
}


@dataclass(frozen=True)
class Source:
    """Where rows come from. To add one: a frozen dataclass with the one method `rows`.

    `rows()` yields dicts of one schema of `jrlhf.types` and must yield the same rows in the same order on
    every call (a source that draws has its own `seed` field).
    """

    abstract: ClassVar[bool] = True  # of this class alone: not to be offered where a Source is wanted

    def rows(self) -> Iterator[dict]:
        raise TypeError(f"{type(self).__name__} does not define rows()")

    def files(self) -> tuple[str, ...]:
        """Local files whose content is part of a stage's fingerprint."""
        return ()


@dataclass(frozen=True)
class Labeler:
    """Who compares answers. To add one: a frozen dataclass with the one method `label`."""

    abstract: ClassVar[bool] = True

    def label(self, rows: list[dict], responses: list[list[str]], seed: int) -> "list[PreferenceRow]":
        """One PreferenceRow per prompt row: ranks (1 is best, equal is a tie) and, where known, `scores`,
        `criteria`, `labeler`. The draws depend on `seed` alone."""
        raise TypeError(f"{type(self).__name__} does not define label()")


def stage_ref(default: Any = dataclasses.MISSING, artifact: str | tuple[str, ...] = "") -> Any:
    """A stage's field that names another stage (a str or a tuple of str); the graph is read from these.

    An empty string names none. `artifact` is what that stage must leave (LANGUAGE_MODEL, ..., or one of several; "":
    anything).
    """
    return dataclasses.field(default=default, metadata={"stage_ref": True, "artifact": artifact})


def stage_ref_or_name(default: Any = dataclasses.MISSING, artifact: str = "") -> Any:
    """Like `stage_ref`, but a value that is no stage's name means something else (a program reward)."""
    return dataclasses.field(default=default, metadata={"stage_ref": "maybe", "artifact": artifact})


class Reference(NamedTuple):
    """A field that names a stage."""

    field: str  # its path inside the stage
    name: str
    optional: bool  # a name that is no stage's means something else
    artifact: str | tuple[str, ...]  # what the named stage must leave, or one of these; "": anything

    def fits(self, stage: "Stage") -> bool:
        wanted = (self.artifact,) if isinstance(self.artifact, str) else self.artifact
        return not any(wanted) or stage.artifact in wanted


def no_fingerprint(default: Any = dataclasses.MISSING) -> Any:
    """A field that cannot change a stage's results (logging, saving): left out of the fingerprint."""
    return dataclasses.field(default=default, metadata={"fingerprint": False})


# Metadata of a field that is a dict whose order can change results: the order is part of the fingerprint.
ORDERED = {"ordered": True}


@dataclass(frozen=True)
class Stage:
    """One step of an experiment. To add one: a frozen dataclass with the method `run`.

    Fields made by `stage_ref` say which stages it starts from. `run` must depend on nothing but the fields,
    the seed and the parents' folders, because a finished stage is reused wherever an equal one is asked for.
    """

    abstract: ClassVar[bool] = True
    artifact: ClassVar[str] = ""  # what it leaves for others to start from: LANGUAGE_MODEL, ...; "": nothing
    # Its run only notes its fields. It is run again where it is reused, so that what is noted of fields that are in no
    # fingerprint is what this experiment says.
    only_notes: ClassVar[bool] = False

    def references(self) -> tuple[Reference, ...]:
        """Every `stage_ref` field that names something, in field order."""
        return tuple(_references(self))

    def parents(self, known: Iterable[str]) -> tuple[str, ...]:
        """Names of the stages that this one starts from, in field order, each once.

        `known` are the experiment's stage names; a `stage_ref_or_name` value counts only if it is one.
        """
        known = set(known)
        names = (r.name for r in self.references() if r.name in known or not r.optional)
        return tuple(dict.fromkeys(names))

    def validate(self, stages: "Mapping[str, Stage]") -> None:
        """Raise UserError if the fields do not fit together, or to the experiment's other `stages` (by name).

        That these exist and leave what the fields need (`stage_ref`) was checked before.
        """

    def check_mesh(self, mesh: MeshConfig) -> None:
        """Raise UserError if the stage cannot run on the devices that there are. Called before any stage runs."""

    def check_model(self, mesh: MeshConfig, stages: "Mapping[str, Stage]") -> None:
        """Raise UserError if the model that the stage will leave does not divide over the devices. Called then, too."""

    def files(self) -> tuple[str, ...]:
        """Local files (or folders) whose content is part of the fingerprint: those of nested Sources."""
        found = (f for _, part in _nested(self) if isinstance(part, Source) for f in part.files())
        return tuple(dict.fromkeys(found))

    def plan(self, ctx: "StageContext") -> "Plan":
        """What the stage will do, from configs only (parents may not exist yet). For `--dry-run`."""
        from jrlhf.types import Plan  # imports jax: not needed to write or check a config

        return Plan()

    def run(self, ctx: "StageContext") -> dict[str, Any]:
        """Do the work in `ctx.folder`, resuming from what an interrupted run left there.

        Returns JSON-able results. Raises UserError for the user's mistakes and `Preempted` after saving
        because `STOP.requested`.
        """
        raise TypeError(f"{type(self).__name__} does not define run()")


@dataclass(frozen=True)
class StageRows(Source):
    """The rows that another stage of the experiment leaves (`ROWS`), wherever a Source is asked for.

    Rows of preferences or demonstrations are prompts too. Which file that is, is known once the stage runs
    (`with_stage_rows`); the fingerprint holds that of the stage.
    """

    stage: str = stage_ref(artifact=tuple(ROWS))

    def __post_init__(self) -> None:
        if not self.stage:
            raise UserError("StageRows.stage: name the stage whose rows are meant")

    def rows(self) -> Iterator[dict]:
        raise TypeError(f"the rows of the stage {self.stage!r} are known when the stage that reads them runs")


@dataclass(frozen=True)
class LeftRows(Source):
    """The rows in the file that a finished stage left."""

    abstract: ClassVar[bool] = True

    path: str

    def rows(self) -> Iterator[dict]:
        if not Path(self.path).is_file():
            raise UserError(f"{self.path} is missing; run its stage again with --force")
        with open(self.path, encoding="utf-8") as lines:
            yield from map(json.loads, lines)

    def files(self) -> tuple[str, ...]:
        return (self.path,) if Path(self.path).is_file() else ()  # a dry run comes before the stage


def with_stage_rows(value: T, parents: Mapping[str, Path], stages: "Mapping[str, Stage]") -> T:
    """`value` (a stage) with every `StageRows` in it replaced by the file in the folder of the stage that it names."""

    def resolved(part: Any) -> Any:
        if isinstance(part, StageRows):
            return LeftRows(str(parents[part.stage] / ROWS[stages[part.stage].artifact]))
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            old = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init}
            changed = {name: new for name, item in old.items() if (new := resolved(item)) is not item}
            return dataclasses.replace(part, **changed) if changed else part
        if isinstance(part, (tuple, list)):
            items = [resolved(item) for item in part]
            return part if all(map(operator.is_, items, part)) else type(part)(items)
        if isinstance(part, dict):
            found = {key: resolved(item) for key, item in part.items()}
            return part if all(found[key] is item for key, item in part.items()) else found
        return part

    return resolved(value)


@dataclass(frozen=True)
class StageContext:
    """What a stage is given to run."""

    name: str  # the stage's name in this experiment; an equal stage elsewhere may have another
    stage: Stage
    folder: Path  # belongs to this stage and seed alone
    parents: Mapping[str, Path]  # referenced stage's name -> its finished folder
    stages: Mapping[str, Stage]  # every stage of the experiment, for `plan`
    seed: int
    mesh: MeshConfig
    console: "Console"
    runs_dir: Path


def _nested(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """(path, dataclass): `value` and every dataclass inside it, outermost first."""
    if dataclasses.is_dataclass(value):
        yield where, value
        for f in dataclasses.fields(value):
            yield from _nested(getattr(value, f.name), _join(where, f.name))
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _nested(item, _join(where, str(i)))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _nested(item, _join(where, str(key)))


def _references(value: Any) -> Iterator[Reference]:
    """Every stage that a `stage_ref` field in `value` names."""
    for where, part in _nested(value):
        for f in dataclasses.fields(part):
            if kind := f.metadata.get("stage_ref"):
                refs = getattr(part, f.name)
                for name in (refs,) if isinstance(refs, str) else refs or ():
                    if name:
                        yield Reference(_join(where, f.name), name, kind == "maybe", f.metadata["artifact"])


# --- dataclass <-> JSON -------------------------------------------------------------------------------------


def to_dict(obj: Any, declared: Any = None, where: str = "") -> Any:
    """`obj` as JSON-able values; `from_dict(declared, to_dict(obj, declared))` gives `obj` back exactly.

    `declared` is the annotation of the place that holds it (by default its own class). A dataclass held
    under a base class or a union carries `"type": "<its class name>"`. Infinite and NaN floats become the
    strings "inf", "-inf", "nan". Values are checked against the annotations: UserError names the field.
    """
    return _encode(type(obj) if declared is None else declared, obj, where)


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """The `cls` (or, by "type", subclass of it) that `to_dict` wrote. `where` is the path used in errors.

    Raises UserError for an unknown or missing field, an unknown type, or a value of the wrong type. An int is
    taken for a float; a bool is not taken for a number.
    """
    return _decode(cls, data, where)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _wrong(where: str, tp: Any, value: Any) -> UserError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    if isinstance(value, type):
        shown = f"the class itself; write {value.__name__}(...)"
    elif dataclasses.is_dataclass(value):
        shown = _a(type(value).__name__)
    texts = (a for m in _members(tp) if get_origin(m) is Literal for a in get_args(m) if isinstance(a, str))
    if isinstance(value, str) and not any(texts):
        shown = f"the string {shown}"
    return UserError(f"{where or 'value'}: expected {_describe(tp)}, got {shown}")


def _a(name: str) -> str:
    return f"an {name}" if name[:1] in "AEIOUaeiou" else f"a {name}"


def _members(tp: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation: a union's members, else the annotation itself."""
    origin = get_origin(tp)
    if origin is Annotated:
        return _members(get_args(tp)[0])
    if origin in (Union, types.UnionType):
        return tuple(m for arg in get_args(tp) for m in _members(arg))
    return (tp,)


def _is_class(tp: Any) -> bool:
    return isinstance(tp, type) and dataclasses.is_dataclass(tp)


def _is_mapping(tp: Any) -> bool:
    return get_origin(tp) in (dict, Mapping)


def _is_sequence(tp: Any) -> bool:
    return get_origin(tp) in (tuple, list)


def _describe(tp: Any) -> str:
    plain = {
        bool: "true or false", int: "an int", float: "a float", str: "a string", type(None): "null (None)",
    }  # fmt: skip
    parts = []
    for m in _members(tp):
        if m in plain:
            parts.append(plain[m])
        elif get_origin(m) is Literal:
            parts.append("one of " + ", ".join(repr(a) for a in get_args(m)))
        elif _is_class(m):
            parts.append(_a(m.__name__))
        elif _is_mapping(m):
            parts.append("a dict")
        elif _is_sequence(m):
            args = get_args(m)
            many = get_origin(m) is list or args[-1] is Ellipsis
            parts.append(f"a list (each {_describe(args[0])})" if many else f"a list of {len(args)}")
        else:
            raise TypeError(f"configs do not support the annotation {m!r}")
    return " or ".join(parts)


def _hints(cls: type) -> dict[str, Any]:
    """Field name -> annotation, for the fields that `__init__` takes."""
    if "__dataclass_fields__" not in cls.__dict__:
        raise UserError(f"{cls.__name__} ({cls.__module__}): decorate the class with @dataclass(frozen=True)")
    hints = get_type_hints(cls)
    if "type" in hints:
        raise UserError(
            f"{cls.__name__}: a field cannot be called 'type'; configs write the class name there"
        )
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _subclasses(cls: type) -> list[type]:
    """`cls` and all that derive from it, in the order of definition."""
    children: list[type] = cls.__subclasses__()
    return list(dict.fromkeys([cls, *(s for child in children for s in _subclasses(child))]))


FILE_MODULE = "experiment_file_"  # how the module of an executed experiment file is named


def _known_classes(bases: Iterable[type], where: str) -> dict[str, type]:
    """Class name -> class. A class that is defined again, in the same module or in a later experiment file,
    replaces the first; any other twin is an error, for its name in JSON would not say which is meant."""
    known: dict[str, type] = {}
    for cls in (sub for base in bases for sub in _subclasses(base)):
        other = known.get(cls.__name__)
        from_files = other is not None and all(c.__module__.startswith(FILE_MODULE) for c in (other, cls))
        if other is not None and not from_files and not _same_definition(other, cls):
            raise _twins(where, other, cls)
        known[cls.__name__] = cls
    return known


def _offered(classes: Mapping[str, type]) -> list[str]:
    """The names of those that are no mere base for others."""
    return [name for name, cls in classes.items() if not cls.__dict__.get("abstract", False)]


def _same_definition(a: type, b: type) -> bool:
    return (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)


def _twins(where: str, a: type, b: type) -> UserError:
    return UserError(
        f"{where or 'config'}: two classes are called {a.__name__!r} ({a.__module__} and {b.__module__}); "
        "rename one"
    )


def _carries_type(tp: Any, cls: type) -> bool:
    """Whether a `cls` under the annotation `tp` needs its name written: the annotation allows several."""
    bases = [m for m in _members(tp) if _is_class(m)]
    return len(bases) > 1 or bases[0] is not cls or not dataclasses.fields(cls)


def _encode(tp: Any, value: Any, where: str) -> Any:
    members = _members(tp)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        bases = [m for m in members if _is_class(m)]
        if not any(issubclass(cls, b) for b in bases):
            raise _wrong(where, tp, value)
        out: dict[str, Any] = {}
        if _carries_type(tp, cls):
            found = _known_classes(bases, where)[cls.__name__]
            if not _same_definition(found, cls):
                raise _twins(where, found, cls)
            out["type"] = cls.__name__
        return out | {n: _encode(h, getattr(value, n), _join(where, n)) for n, h in _hints(cls).items()}
    if isinstance(value, Mapping):
        for m in members:
            if _is_mapping(m):
                if bad := [k for k in value if not isinstance(k, str)]:
                    raise UserError(f"{where}: keys must be strings, got {bad[0]!r}")
                return {k: _encode(get_args(m)[1], v, _join(where, k)) for k, v in value.items()}
        raise _wrong(where, tp, value)
    if isinstance(value, (tuple, list)):
        return [_encode(t, v, _join(where, str(i))) for i, (t, v) in enumerate(_items(tp, value, where))]
    plain = _scalar(tp, value, where)
    if isinstance(plain, float) and not math.isfinite(plain):
        if str in members:
            raise UserError(f"{where}: {plain} cannot be told from a string here; use a finite number")
        return str(plain)
    return plain


def _decode(tp: Any, data: Any, where: str) -> Any:
    members = _members(tp)
    if isinstance(data, Mapping):
        if bases := [m for m in members if _is_class(m)]:
            return _build(_pick(tp, bases, data, where), data, where)
        for m in members:
            if _is_mapping(m):
                return {k: _decode(get_args(m)[1], v, _join(where, k)) for k, v in data.items()}
        raise _wrong(where, tp, dict(data))
    if isinstance(data, (list, tuple)):
        items = [_decode(t, v, _join(where, str(i))) for i, (t, v) in enumerate(_items(tp, data, where))]
        return items if any(get_origin(m) is list for m in members) else tuple(items)
    if float in members and str not in members and data in ("inf", "-inf", "nan"):
        return float(data)
    return _scalar(tp, data, where)


def _scalar(tp: Any, value: Any, where: str) -> Any:
    """`value` if the annotation allows it; an int becomes a float where only a float is allowed."""
    members = _members(tp)
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        if type(value) in members:
            return value
        if type(value) is int and float in members:
            return float(value)
    elif isinstance(value, float) and float in members:
        return float(value)  # a numpy float becomes a plain one
    for m in members:
        if get_origin(m) is Literal and any(a == value and type(a) is type(value) for a in get_args(m)):
            return value
    raise _wrong(where, tp, value)


def _items(tp: Any, values: Any, where: str) -> list[tuple[Any, Any]]:
    """(annotation, value) of each item of a sequence."""
    for m in _members(tp):
        if _is_sequence(m):
            args = get_args(m)
            if get_origin(m) is list or args[-1] is Ellipsis:
                return [(args[0], v) for v in values]
            if len(args) == len(values):
                return list(zip(args, values, strict=True))
    raise _wrong(where, tp, values)


def _pick(tp: Any, bases: list[type], data: Mapping, where: str) -> type:
    """The class that `data` was written from."""
    name = data.get("type")
    if name is None:
        if _carries_type(tp, bases[0]):
            known = _offered(_known_classes(bases, where))
            raise UserError(f"{where or 'config'}: the field 'type' is missing.{did_you_mean('', known)}")
        return bases[0]
    known_classes = _known_classes(bases, where)
    if name not in known_classes:
        known_as = " or ".join(_a(b.__name__) for b in bases)
        raise UserError(
            f"{_join(where, 'type')}: {name!r} is not {known_as}."
            f"{did_you_mean(name, _offered(known_classes))} (For a class of your own, pass the file that defines it: "
            "--import FILE.py)"
        )
    return known_classes[name]


def _build(cls: type, data: Mapping, where: str) -> Any:
    hints = _hints(cls)
    for name in data:
        if name != "type" and name not in hints:
            raise UserError(
                f"{_join(where, name)}: {cls.__name__} has no such field.{did_you_mean(name, hints)}"
            )
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if f.init and required and f.name not in data:
            raise UserError(f"{_join(where, f.name)}: {cls.__name__} needs this field")
    values = {n: _decode(h, data[n], _join(where, n)) for n, h in hints.items() if n in data}
    try:
        return cls(**values)
    except (UserError, ValueError) as e:  # a class's own __post_init__ check
        raise UserError(f"{where}: {e}" if where else str(e)) from e


def read_json(path: Path | str) -> Any:
    """A JSON file's content; UserError (with the line) if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        line = f":{e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line}: not valid JSON ({e})") from None


def load_stage(folder: Path | str) -> tuple[Stage, int]:
    """The (stage, seed) that a stage folder was made from."""
    path = Path(folder) / "config.json"
    data = read_json(path)
    if not isinstance(data, dict) or "stage" not in data or "seed" not in data:
        raise UserError(f"{path}: not a stage's config (it has no 'stage' and 'seed')")
    return from_dict(Stage, data["stage"], f"{path}: stage"), data["seed"]


# --- overrides from the command line ------------------------------------------------------------------------


def leaves(
    obj: Any, declared: Any = None, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, annotation) of every field that the command line can set."""
    if dataclasses.is_dataclass(obj):
        for name, hint in _hints(type(obj)).items():
            yield from leaves(getattr(obj, name), hint, (*path, name))
    elif isinstance(obj, Mapping) and obj:
        value_type = next(get_args(m)[1] for m in _members(declared) if _is_mapping(m))
        for key, item in obj.items():
            yield from leaves(item, value_type, (*path, key))
    elif isinstance(obj, (tuple, list)) and any(dataclasses.is_dataclass(v) for v in obj):
        for i, (hint, item) in enumerate(_items(declared, obj, ".".join(path))):
            yield from leaves(item, hint, (*path, str(i)))
    else:
        yield path, declared


def apply_overrides(obj: T, args: Iterable[str], others: Iterable[str] = ()) -> T:
    """`obj` with fields set by `--dotted.path value ...` (or `--dotted.path=value`).

    Hyphens and underscores are the same. `others` are option names that belong to the command itself, for
    suggestions. Raises UserError for an unknown field or a value of the wrong type.
    """
    data = to_dict(obj)  # first, because it checks what the caller built
    known = {".".join(path): (path, tp) for path, tp in leaves(obj)}
    spelling = {name.replace("-", "_"): name for name in known}
    for option, values in group_options(args):
        name = option.removeprefix("--")
        found = name if name in known else spelling.get(name.replace("-", "_"), "")
        if not found:
            raise _no_such_option(name, {n: tp for n, (_, tp) in known.items()}, others)
        path, tp = known[found]
        _set(data, path, _parse(tp, values, found))
    return from_dict(type(obj), data)


def group_options(args: Iterable[str]) -> list[tuple[str, list[str]]]:
    """`--a 1 2 --b=3` as [("--a", ["1", "2"]), ("--b", ["3"])]; earlier words are under ""."""
    groups: list[tuple[str, list[str]]] = []
    for arg in args:
        if arg.startswith("--"):
            option, equals, value = arg.partition("=")
            groups.append((option, [value] if equals else []))
        elif groups:
            groups[-1][1].append(arg)
        else:
            groups.append(("", [arg]))
    return groups


def _no_such_option(name: str, known: Mapping[str, Any], others: Iterable[str]) -> UserError:
    if not name:
        return UserError("expected --FIELD VALUE after the experiment file")
    for path, tp in known.items():
        if name.startswith(path + ".") and any(_is_class(m) for m in _members(tp)):
            return UserError(f"--{name}: {path} is None here; set it in the experiment file")
    inside = [path for path in known if path.startswith(name + ".")]
    if inside:
        return UserError(f"--{name} is not one value; set one of its fields: --{', --'.join(inside)}")
    # Where the beginning of the path is right, only its last part can be the mistake.
    folder, _, last = name.rpartition(".")
    siblings = {p.rpartition(".")[2]: p for p in known if p.rpartition(".")[0] == folder}
    if folder and siblings:
        deeper = [p for p in known if p.startswith(folder + ".") and p.rpartition(".")[2] == last]
        if deeper:
            return UserError(
                f"--{name}: no such field. Did you mean {' or '.join(f'--{p}' for p in deeper)}?"
            )
        return UserError(f"--{name}: no such field.{did_you_mean(last, siblings)}")
    near = difflib.get_close_matches(name, [*known, *(o.removeprefix("--") for o in others)], n=1)
    hint = f"Did you mean '--{near[0]}'?" if near else "`jrlhf run FILE --help` lists the fields."
    return UserError(f"--{name}: no such option or field. {hint}")


def _parse(tp: Any, values: list[str], path: str) -> Any:
    """Command-line words -> JSON-able value of the annotation `tp`."""
    members = _members(tp)
    if not values and not any(_is_sequence(m) for m in members):
        raise UserError(f"--{path}: expected {_describe(tp)} after it")
    if any(_is_class(m) for m in members) and values != ["None"]:
        raise UserError(f"--{path}: expected {_describe(tp)}; set it in the experiment file")
    if members == (str,):
        if len(values) > 1:
            raise UserError(f"--{path}: expected one string, got {' '.join(values)!r} (quote it)")
        return values[0]
    if bool in members:
        values = [v.title() if v.lower() in ("true", "false") else v for v in values]
    if values == ["None"] and type(None) in members:
        return None
    import tyro

    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            parsed = tyro.cli(tp, args=values)
    except SystemExit:
        hint = ""
        if any(_is_sequence(m) for m in members) and any("," in v for v in values):
            apart = " ".join(v.strip("[]() ") for word in values for v in word.split(",")).split()
            hint = f". Separate by spaces: --{path} {' '.join(apart)}"
        raise UserError(f"--{path}: expected {_describe(tp)}, got {' '.join(values)!r}{hint}") from None
    return _encode(tp, parsed, path)


def _set(data: Any, path: tuple[str, ...], value: Any) -> None:
    """data[path[0]][path[1]]... = value, in nested dicts and lists."""
    for part in path[:-1]:
        data = data[int(part)] if isinstance(data, list) else data[part]
    data[path[-1]] = value


def print_options(obj: Any, command: str) -> None:
    """Print every field that can be set, with type, default and docstring, grouped by where it is."""
    import tyro

    with contextlib.suppress(SystemExit):
        tyro.cli(
            type(obj),
            default=obj,
            args=["--help"],
            prog=command,
            description="Fields of the experiment (--FIELD VALUE ...):",
            use_underscores=True,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )
