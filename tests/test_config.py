"""Configs become JSON and come back exactly; wrong values are named by field; overrides are typed."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest

from jrlhf.config import (
    LANGUAGE_MODEL,
    Labeler,
    MeshConfig,
    Reference,
    Source,
    Stage,
    UserError,
    apply_overrides,
    from_dict,
    group_options,
    load_stage,
    no_fingerprint,
    print_options,
    stage_ref,
    stage_ref_or_name,
    to_dict,
)


@dataclass(frozen=True)
class ConfigLines(Source):
    """Lines of a file."""

    path: str
    limit: int | None = None

    def files(self):
        return (self.path,)


@dataclass(frozen=True)
class ConfigMixed(Source):
    parts: tuple[Source, ...]
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class ConfigCoin(Labeler):
    bias: float = 0.5


@dataclass(frozen=True)
class ConfigLora:
    rank: int = 8


@dataclass(frozen=True)
class ConfigTerm:
    name: str = stage_ref_or_name("length")
    weight: float = 1.0


@dataclass(frozen=True)
class ConfigTrain(Stage):
    """Trains something."""

    data: Source
    start: str = stage_ref("")
    beta: float = 0.1  # KL weight
    steps: int = 10
    lr_end: float = 0.0
    shuffle: bool = True
    loss: Literal["sigmoid", "hinge", 1] = "sigmoid"
    lora: ConfigLora | None = None
    judge: ConfigCoin | ConfigLora = ConfigCoin()
    labeler: Labeler = ConfigCoin(0.25)
    pair: tuple[int, str] = (1, "a")
    grid: tuple[tuple[float, ...], ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    terms: tuple[ConfigTerm, ...] = ()
    mixed: str | tuple[int, ...] | None = None
    note: str = no_fingerprint("")


@dataclass(frozen=True)
class ConfigEnsemble(Stage):
    members: tuple[str, ...] = stage_ref((), LANGUAGE_MODEL)
    best: str = stage_ref_or_name("")


@dataclass(frozen=True)
class Graph:
    stages: dict[str, Stage]
    seeds: tuple[int, ...] = (0,)
    mesh: MeshConfig = field(default_factory=MeshConfig)


FULL = ConfigTrain(
    data=ConfigMixed((ConfigLines("a.txt"), ConfigMixed((ConfigLines("b.txt", 3),))), (0.5, 1e-300)),
    start="base",
    beta=0.1 + 0.2,
    steps=2**60,
    shuffle=False,
    loss=1,
    lora=ConfigLora(4),
    judge=ConfigLora(2),
    labeler=ConfigCoin(0.125),
    pair=(-3, "ü\n"),
    grid=((1.0,), (), (math.inf, -math.inf)),
    weights={"a b": 1.0, "c.d": -0.0},
    terms=(ConfigTerm(), ConfigTerm("rm", 0.5)),
    mixed=(1, 2),
)
GRAPH = Graph(
    {"base": ConfigTrain(ConfigLines("a.txt")), "the-rm": FULL, "all": ConfigEnsemble(("base",))}, (1, 2)
)


@pytest.mark.parametrize("value", [GRAPH, FULL, replace(FULL, mixed="x", lora=None), Graph({})])
def test_json_round_trip_is_exact(value):
    text = json.dumps(to_dict(value), allow_nan=False)
    back = from_dict(type(value), json.loads(text))
    assert back == value
    assert repr(back) == repr(value)  # also the types: 1.0 is not 1, -0.0 is not 0.0


def test_nan_survives():
    back = from_dict(ConfigTrain, json.loads(json.dumps(to_dict(replace(FULL, beta=math.nan)))))
    assert math.isnan(back.beta)


def test_lists_and_ints_become_what_the_annotation_says():
    loose = replace(FULL, pair=[1, "a"], beta=1, terms=[ConfigTerm()])
    strict = from_dict(ConfigTrain, to_dict(loose))
    assert strict.pair == (1, "a")
    assert isinstance(strict.pair, tuple)
    assert isinstance(strict.beta, float)
    assert isinstance(strict.terms, tuple)


def test_a_class_is_named_only_where_the_annotation_allows_several():
    data = to_dict(GRAPH)
    assert "type" not in data
    assert "type" not in data["mesh"]
    assert data["stages"]["base"]["type"] == "ConfigTrain"
    assert data["stages"]["the-rm"]["judge"]["type"] == "ConfigLora"  # a union
    assert "type" not in data["stages"]["the-rm"]["lora"]  # an optional
    assert data["stages"]["the-rm"]["data"]["parts"][1]["type"] == "ConfigMixed"


def changed(**fields: Any) -> dict:
    return to_dict(FULL, Stage) | fields


BAD_DATA = [
    (changed(beta="abc"), "ppo.beta: expected a float, got the string 'abc'"),
    (changed(beta=True), "ppo.beta: expected a float, got True"),
    (changed(beta=None), "ppo.beta: expected a float, got None"),
    (changed(steps=1.0), "ppo.steps: expected an int, got 1.0"),
    (changed(steps=True), "ppo.steps: expected an int, got True"),
    (changed(steps="inf"), "ppo.steps: expected an int, got the string 'inf'"),
    (changed(shuffle=0), "ppo.shuffle: expected true or false, got 0"),
    (changed(loss="hing"), "ppo.loss: expected one of 'sigmoid', 'hinge', 1, got 'hing'"),
    (changed(loss=True), "ppo.loss: expected one of"),
    (changed(pair=[1]), "ppo.pair: expected a list of 2, got [1]"),
    (changed(pair=[1, 2]), "ppo.pair.1: expected a string, got 2"),
    (changed(grid=[[1], ["x"]]), "ppo.grid.1.0: expected a float, got the string 'x'"),
    (changed(grid=3), "ppo.grid: expected a list (each a list (each a float)), got 3"),
    (changed(weights={"a": "x"}), "ppo.weights.a: expected a float, got the string 'x'"),
    (changed(weights=[1.0]), "ppo.weights: expected a dict, got [1.0]"),
    (changed(betta=1.0), "ppo.betta: ConfigTrain has no such field. Did you mean 'beta'?"),
    (changed(lora={"rnk": 1}), "ppo.lora.rnk: ConfigLora has no such field. Did you mean 'rank'?"),
    (changed(lora=3), "ppo.lora: expected a ConfigLora or null (None), got 3"),
    (changed(data={"type": "ConfigLines"}), "ppo.data.path: ConfigLines needs this field"),
    (changed(data={"path": "a"}), "ppo.data: the field 'type' is missing. Known: "),
    (changed(data={"type": "ConfigLine", "path": "a"}), "Did you mean 'ConfigLines'?"),
    (changed(data={"type": "ConfigCoin"}), "ppo.data.type: 'ConfigCoin' is not a Source."),
    (changed(data={"type": "os.system", "path": "a"}), "ppo.data.type: 'os.system' is not a Source."),
    (changed(data=None), "ppo.data: expected a Source, got None"),
    (changed(judge={"rank": 2}), "ppo.judge: the field 'type' is missing"),
    (changed(terms=[{"weight": "x"}]), "ppo.terms.0.weight: expected a float, got the string 'x'"),
]


@pytest.mark.parametrize(("data", "message"), BAD_DATA, ids=[m for _, m in BAD_DATA])
def test_bad_data_names_the_field(data, message):
    with pytest.raises(UserError) as error:
        from_dict(Stage, data, "ppo")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("base", [Source, Stage, Labeler])
def test_a_base_class_is_not_suggested(base):
    @dataclass(frozen=True)
    class ConfigBetween(base):
        abstract = True

    @dataclass(frozen=True)
    class ConfigOffered(ConfigBetween):
        pass

    for data in ({}, {"type": "zzz"}):
        with pytest.raises(UserError) as error:
            from_dict(base, data, "here")
        _, _, known = str(error.value).partition("Known: ")
        known = known.split(".")[0].split(", ")
        assert "ConfigOffered" in known
        assert not {base.__name__, "ConfigBetween", "TrainingStage"} & set(known)


def test_a_wrong_value_in_python_is_found_when_written():
    with pytest.raises(UserError, match=r"^s\.beta: expected a float, got the string 'abc'$"):
        to_dict(replace(FULL, beta="abc"), where="s")
    with pytest.raises(UserError, match=r"^s\.data: expected a Source, got a ConfigCoin"):
        to_dict(replace(FULL, data=ConfigCoin()), where="s")


def test_a_forgotten_decorator_is_an_error():
    class ConfigForgot(Source):
        path: str = "x"

    with pytest.raises(UserError, match=r"ConfigForgot.*@dataclass"):
        to_dict(replace(FULL, data=ConfigForgot()))


def test_an_unsupported_annotation_is_a_type_error():
    @dataclass(frozen=True)
    class Odd:
        function: Callable | None = None

    with pytest.raises(TypeError, match="annotation"):
        from_dict(Odd, {"function": "x"})


def test_a_class_check_is_reported_with_its_field():
    @dataclass(frozen=True)
    class Even:
        n: int

        def __post_init__(self):
            if self.n % 2:
                raise ValueError(f"n must be even, got {self.n}")

    with pytest.raises(UserError, match=r"^here: n must be even, got 3$"):
        from_dict(Even, {"n": 3}, "here")


# --- stages -------------------------------------------------------------------------------------------------


def test_parents_come_from_marked_fields_each_once():
    names = ("base", "rm", "all")
    assert ConfigTrain(ConfigLines("a")).parents(names) == ()  # "" names none
    assert FULL.parents(names) == ("base", "rm")  # "length" is no stage, so it is a program
    assert FULL.parents((*names, "length")) == ("base", "length", "rm")
    assert ConfigEnsemble(("a", "b", "a"), "b").parents(()) == ("a", "b")  # unknown: the graph will complain


def test_references_say_where_they_stand_and_what_they_need():
    needs = replace(ConfigEnsemble(("a", "b"), "c"))
    assert needs.references() == (
        Reference("members", "a", False, "a language model"),
        Reference("members", "b", False, "a language model"),
        Reference("best", "c", True, ""),
    )
    assert [r.field for r in FULL.references()] == ["start", "terms.0.name", "terms.1.name"]


def test_files_are_those_of_nested_sources():
    assert FULL.files() == ("a.txt", "b.txt")


def test_load_stage(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"stage": to_dict(FULL, Stage), "seed": 3}))
    assert load_stage(tmp_path) == (FULL, 3)
    (tmp_path / "config.json").write_text('{"stage": 1,\n "seed": }')
    with pytest.raises(UserError, match=r"config.json:2: not valid JSON"):
        load_stage(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        load_stage(tmp_path / "none")


# --- overrides ----------------------------------------------------------------------------------------------


def nested_lines(graph: Graph) -> ConfigLines:
    return graph.stages["the-rm"].data.parts[1].parts[0]


OVERRIDES = [
    ("--stages.the-rm.beta 1e-4", lambda g: g.stages["the-rm"].beta, 1e-4),
    ("--stages.the_rm.beta=-2", lambda g: g.stages["the-rm"].beta, -2.0),
    ("--stages.base.lr-end 2", lambda g: g.stages["base"].lr_end, 2.0),
    ("--stages.base.beta inf", lambda g: g.stages["base"].beta, math.inf),
    ("--stages.base.steps -1", lambda g: g.stages["base"].steps, -1),
    ("--stages.base.shuffle false", lambda g: g.stages["base"].shuffle, False),
    ("--stages.base.loss hinge", lambda g: g.stages["base"].loss, "hinge"),
    ("--stages.base.loss 1", lambda g: g.stages["base"].loss, 1),
    ("--stages.base.start -x", lambda g: g.stages["base"].start, "-x"),
    ("--stages.the-rm.start=", lambda g: g.stages["the-rm"].start, ""),
    ("--stages.base.pair 3 z", lambda g: g.stages["base"].pair, (3, "z")),
    ("--stages.base.data.limit 5", lambda g: g.stages["base"].data.limit, 5),
    ("--stages.the-rm.data.parts.1.parts.0.limit None", lambda g: nested_lines(g).limit, None),
    ("--stages.the-rm.terms.1.weight 3", lambda g: g.stages["the-rm"].terms[1].weight, 3.0),
    ("--stages.the-rm.weights.c.d 3", lambda g: g.stages["the-rm"].weights["c.d"], 3.0),
    ("--stages.the-rm.lora.rank 3", lambda g: g.stages["the-rm"].lora.rank, 3),
    ("--stages.all.members base the-rm", lambda g: g.stages["all"].members, ("base", "the-rm")),
    ("--seeds 4 5 6", lambda g: g.seeds, (4, 5, 6)),
    ("--seeds", lambda g: g.seeds, ()),
    ("--mesh.data 2", lambda g: g.mesh.data, 2),
]  # fmt: skip


@pytest.mark.parametrize(("args", "get", "expected"), OVERRIDES, ids=[o[0] for o in OVERRIDES])
def test_override_sets_one_typed_field(args, get, expected):
    after = apply_overrides(GRAPH, args.split())
    assert get(after) == expected
    assert type(get(after)) is type(expected)
    old, new = dict(values(to_dict(GRAPH))), dict(values(to_dict(after)))
    assert sum(old.get(k) != new.get(k) for k in old | new) == 1


def values(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, JSON) of every field."""
    if isinstance(data, list) and any(isinstance(v, dict) for v in data):
        data = dict(enumerate(data))
    if isinstance(data, dict):
        for key, value in data.items():
            yield from values(value, f"{path}/{key}")
    else:
        yield path, json.dumps(data)


BAD_OVERRIDES = [
    ("--stages.base.bta 3", "--stages.base.bta: no such field. Did you mean 'beta'?"),
    ("--stages.bse.beta 3", "Did you mean '--stages.base.beta'?"),
    ("--dry-rn", "--dry-rn: no such option or field. Did you mean '--dry-run'?"),
    ("--stages.base.beta abc", "--stages.base.beta: expected a float, got 'abc'"),
    ("--stages.base.beta 1 2", "--stages.base.beta: expected a float, got '1 2'"),
    ("--stages.base.beta", "--stages.base.beta: expected a float after it"),
    ("--stages.base.steps 1.5", "--stages.base.steps: expected an int, got '1.5'"),
    ("--stages.base.shuffle maybe", "--stages.base.shuffle: expected true or false, got 'maybe'"),
    ("--stages.base.loss c", "--stages.base.loss: expected one of 'sigmoid', 'hinge', 1, got 'c'"),
    ("--stages.base.start a b", "--stages.base.start: expected one string, got 'a b' (quote it)"),
    ("--stages.base.lora.rank 3", "stages.base.lora is None here; set it in the experiment file"),
    ("--stages.base 3", "--stages.base is not one value; set one of its fields"),
    ("--stages.the-rm.rank 3", "no such field. Did you mean --stages.the-rm.lora.rank or --stages.the-rm.judge.rank?"),
    ("--seeds 0,1,2", "got '0,1,2'. Separate by spaces: --seeds 0 1 2"),
    ("--seeds [0, 1]", "Separate by spaces: --seeds 0 1"),
    ("--seeds a", "--seeds: expected a list (each an int), got 'a'"),
    ("--zzz 1", "--zzz: no such option or field. `jrlhf run FILE --help` lists the fields."),
    ("stray --seeds 1", "expected --FIELD VALUE"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message"), BAD_OVERRIDES, ids=[a for a, _ in BAD_OVERRIDES])
def test_bad_override(args, message, capsys):
    with pytest.raises(UserError) as error:
        apply_overrides(GRAPH, args.split(), others=("--dry-run", "--force"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")  # the message is the only one


def test_group_options():
    assert group_options(["f", "--a", "1", "-2", "--b=3=4", "--c"]) == [
        ("", ["f"]), ("--a", ["1", "-2"]), ("--b", ["3=4"]), ("--c", []),
    ]  # fmt: skip


def test_help_lists_fields_with_defaults_and_docs_by_stage(capsys):
    print_options(GRAPH, "jrlhf run x.py")
    out = " ".join(capsys.readouterr().out.split())
    assert "stages.base options" in out
    assert "Trains something." in out
    assert "--stages.base.beta FLOAT KL weight (default: 0.1)" in out
    assert "--stages.base.data.limit {None}|INT" in out
