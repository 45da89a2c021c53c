"""`config.json` and `ModelConfig`, both ways, by the tables of `families.py`.

Nothing is guessed: an unknown family, a missing field, or a value that our decoder does not compute is a UserError that
names file, field and value. A config is written only if reading it again gives the same decoder.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from jrlhf.config import UserError, did_you_mean, read_json
from jrlhf.models.config import ModelConfig, RopeScaling
from jrlhf.models.families import FAMILIES, Family, Field, Head

CONFIG = "config.json"
WINDOWED, FULL = "sliding_attention", "full_attention"
# rotary scaling: the file's field and ours
ROPE_FIELDS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_context",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}
ROPE_USES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate"
    ),
}  # fmt: skip


# --- reading ------------------------------------------------------------------------------------------------


def read_object(path: Path) -> dict:
    card = read_json(path)
    if not isinstance(card, dict):
        raise UserError(f"{path}: expected a JSON object")
    return card


def read_card(folder: Path) -> tuple[Path, dict, Family]:
    """config.json's path, contents and family."""
    path = folder / CONFIG
    card = read_object(path)
    kind, names = card.get("model_type"), card.get("architectures") or []
    if kind not in FAMILIES:
        raise UserError(
            f"{path}: model_type {kind!r} is not supported. Known: {', '.join(sorted(FAMILIES))}."
        )
    known = FAMILIES[kind].architectures.values()
    if [a for a in names if a not in known] or len(names) > 1:
        raise UserError(f"{path}: architectures {names} is not supported. Known: one of {', '.join(known)}.")
    return path, card, FAMILIES[kind]


def model_config(path: Path, card: dict, family: Family, **ours: Any) -> ModelConfig:
    """The decoder that `card` describes; `ours` are the fields that no checkpoint says (dtype, remat, ...)."""
    for name, allowed in family.fixed.items():
        require(path, name, card.get(name, allowed[0]), allowed)
    values: dict[str, Any] = {}
    for field in family.fields:
        value = _value(path, card, field)
        if value is None and field.ours == "n_kv_heads":
            value = values["n_heads"]
        if value is None and field.ours == "d_ff" and family.model_type == "gpt2":
            value = 4 * values["d_model"]
        if value is None and field.ours == "head_dim":
            continue  # d_model / n_heads
        if value is None:
            raise UserError(f"{path}: no field {field.hf!r}.{similar(field.hf, card)}")
        values[field.ours] = value
    if "n_kv_heads" not in values:
        values["n_kv_heads"] = values["n_heads"]
    values |= family.ours
    if values.get("positions") != "learned":
        values |= _read_rope(path, card, family, values)
    values |= _read_windows(path, card, family, values["n_layers"])
    # One way to say the same: 0 where the default is meant.
    if values.get("head_dim") and values["head_dim"] * values["n_heads"] == values["d_model"]:
        values["head_dim"] = 0
    if values.get("query_scalar") == (values.get("head_dim") or values["d_model"] / values["n_heads"]):
        values["query_scalar"] = 0.0
    try:
        return _with(ModelConfig(hf_family=family.model_type, **ours), values)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def require(path: Path, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{path}: {name} {value!r} is not supported; only {json.dumps(allowed[0])} is")


def similar(name: str, names: Mapping[str, Any]) -> str:
    hint = did_you_mean(name, names)
    return hint if hint.startswith(" Did") else ""  # a config has too many fields to list them


def _with(config: ModelConfig, values: Mapping[str, Any]) -> ModelConfig:
    """The config with some fields changed; "moe.experts" is a field of the record `moe`."""
    plain = {k: v for k, v in values.items() if "." not in k}
    for name in {k.split(".")[0] for k in values if "." in k}:
        inner = {k.split(".")[1]: v for k, v in values.items() if k.startswith(f"{name}.")}
        plain[name] = replace(getattr(config, name), **inner)
    return replace(config, **plain)


def _get(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _value(path: Path, card: dict, field: Field) -> Any:
    """A field in our terms; None where it is absent and has no default."""
    name = field.also if field.also in card and field.hf not in card else field.hf
    value = card.get(name, field.default)
    if value is None:
        value = field.default if field.null is None else field.null
    if value is None:
        return None
    if field.names is not None:
        if value not in field.names:
            raise UserError(
                f"{path}: {name} {value!r} is not supported.{did_you_mean(str(value), field.names)}"
            )
        return field.names[value]
    return _typed(path, name, field.ours, value)


def _typed(path: Path, name: str, ours: str, value: Any) -> Any:
    """`value` as the type of the ModelConfig field."""
    record: Any = ModelConfig
    for part in ours.split("."):
        want = get_type_hints(record)[part]
        record = want
    if want is float and type(value) in (int, float) and value >= 0:
        return float(value)
    if (want is int and type(value) is int and value > 0) or (want is bool and type(value) is bool):
        return value
    what = "true or false" if want is bool else f"a positive {want.__name__}"
    raise UserError(f"{path}: {name} must be {what}, got {value!r}")


def _read_rope(path: Path, card: dict, family: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters (transformers 5, by kind of layer where there are two) or rope_theta and rope_scaling."""
    rope = card.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters must be an object, got {rope!r}")
    where, local = "rope_parameters", {}
    if FULL in rope or WINDOWED in rope:
        rope, local, where = rope.get(FULL, {}), rope.get(WINDOWED, {}), f"rope_parameters.{FULL}"
    if "rope_theta" in rope and card.get("rope_theta", rope["rope_theta"]) != rope["rope_theta"]:
        raise UserError(
            f"{path}: rope_theta {card['rope_theta']} differs "
            f"from rope_parameters.rope_theta {rope['rope_theta']}"
        )
    scaling = rope
    if rope.get("rope_type", "default") == "default" and card.get("rope_scaling"):
        scaling, where = card["rope_scaling"], "rope_scaling"
    out: dict[str, Any] = {
        "rope_theta": _positive(
            path,
            "rope_theta",
            rope.get("rope_theta", card.get(family.theta_field, card.get("rope_theta", family.rope_theta))),
        ),
        "rope_scaling": _read_scaling(path, where, scaling, card),
    }

    field, default = family.rotary
    share = rope.get("partial_rotary_factor", card.get(field, default) if field else 1.0)
    if not field:
        require(path, "rope_parameters.partial_rotary_factor", share, (1.0,))
    head = values.get("head_dim") or values["d_model"] // values["n_heads"]
    out["rotary_dim"] = 0 if share == 1 else int(head * share)

    field, default = family.local_theta
    if field:
        require(
            path, f"rope_parameters.{WINDOWED}.rope_type", local.get("rope_type", "default"), ("default",)
        )
        theta = local.get("rope_theta", card.get(field, default))
        out["window_rope_theta"] = _positive(path, field, theta)
    return out


def _positive(path: Path, name: str, value: Any) -> float:
    if type(value) not in (int, float) or value <= 0:
        raise UserError(f"{path}: {name} must be a positive float, got {value!r}")
    return float(value)


def _read_scaling(path: Path, where: str, scaling: Any, card: dict) -> RopeScaling:
    if not isinstance(scaling, dict):
        raise UserError(f"{path}: {where} must be an object, got {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_USES:
        raise UserError(
            f"{path}: {where}.rope_type {kind!r} is not supported.{did_you_mean(str(kind), ROPE_USES)}"
        )
    known = {
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
        "mscale",
        "mscale_all_dim",
        *ROPE_FIELDS,
    }
    if strange := sorted(set(scaling) - known):
        raise UserError(
            f"{path}: {where}.{strange[0]} is not supported.{similar(strange[0], dict.fromkeys(known))}"
        )
    if kind == "default":
        require(path, f"{where}.factor", scaling.get("factor", 1.0), (1.0,))
        return RopeScaling()
    given = {ours: scaling[hf] for hf, ours in ROPE_FIELDS.items() if scaling.get(hf) is not None}
    if "factor" not in given:
        raise UserError(f"{path}: no field {where}.factor")
    if kind in ("llama3", "yarn"):
        given.setdefault("original_context", card.get("max_position_embeddings", 0))
    m, m_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if kind == "yarn" and m and m_all and "attention_factor" not in given:
        grown = lambda m: 0.1 * m * math.log(given["factor"]) + 1.0 if given["factor"] > 1 else 1.0  # noqa: E731
        given["attention_factor"] = grown(m) / grown(m_all)
    hints = get_type_hints(RopeScaling)
    for name, value in given.items():
        if type(value) not in ((int, float) if hints[name] is float else (hints[name],)):
            raise UserError(f"{path}: {where}: {name} must be a {hints[name].__name__}, got {value!r}")
    return RopeScaling(kind, **{n: hints[n](v) for n, v in given.items()})


def _read_windows(path: Path, card: dict, family: Family, n_layers: int) -> dict[str, Any]:
    rule = family.windows
    if rule.kind == "none":
        return {}
    size = card.get("sliding_window", rule.default)
    types = card.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or set(types) - {WINDOWED, FULL} or len(types) != n_layers:
            raise UserError(
                f"{path}: layer_types must name {n_layers} layers, each {WINDOWED} or {FULL}; got {types!r}"
            )
        windowed = tuple(t == WINDOWED for t in types)
    elif rule.kind == "all":
        windowed = (size is not None,) * n_layers
    elif rule.kind == "late":
        first = card.get("max_window_layers", 28) if card.get("use_sliding_window") else n_layers
        windowed = tuple(i >= first for i in range(n_layers))
    else:
        every = card.get("sliding_window_pattern", card.get("_sliding_window_pattern", rule.every))
        windowed = tuple((i + 1) % every != 0 for i in range(n_layers))
    if not any(windowed):
        return {"window": 0, "windowed": ()}
    if type(size) is not int or size < 1:
        raise UserError(f"{path}: sliding_window must be a positive int, got {size!r}")
    return {"window": size, "windowed": () if all(windowed) else windowed}


# --- writing ------------------------------------------------------------------------------------------------


def write_card(config: ModelConfig, head: Head, dtype: str) -> dict[str, Any]:
    """config.json's fields, without the special ids. rope_theta is at the top, where every transformers looks."""
    if config.hf_family not in FAMILIES:
        raise UserError(
            f"model.hf_family {config.hf_family!r} is unknown.{did_you_mean(config.hf_family, FAMILIES)}"
        )
    family = FAMILIES[config.hf_family]
    card: dict[str, Any] = {
        "architectures": [family.architectures[head]],
        "model_type": family.model_type,
        "torch_dtype": dtype,
    }
    for field in family.fields:
        value = config.head_size if field.ours == "head_dim" else _get(config, field.ours)
        if field.names is not None:
            value = next((hf for hf, ours in field.names.items() if ours == value), value)
        if field.ours == "query_scalar":
            value = value or config.head_size
            value = int(value) if value == int(value) else value  # transformers wants a whole number
        card[field.hf] = None if field.null is not None and value == field.null else value
    card |= {name: allowed[0] for name, allowed in family.fixed.items() if name != "quantization_config"}
    if config.positions == "rope":
        card |= _write_rope(config, family)
    card |= _write_windows(config, family)
    if head == "scalar":
        card |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    _check_same(config, card, family)
    return card


def _write_rope(config: ModelConfig, family: Family) -> dict[str, Any]:
    s = config.rope_scaling
    scaling: dict[str, Any] | None = None
    if s.kind != "none":
        scaling = {"rope_type": s.kind}
        scaling |= {hf: getattr(s, ROPE_FIELDS[hf]) for hf in ROPE_USES[s.kind]}
        if not s.original_context and s.kind != "linear":
            scaling["original_max_position_embeddings"] = config.context
        if s.kind == "yarn" and not s.attention_factor:
            del scaling["attention_factor"]
    card: dict[str, Any] = {family.theta_field: config.rope_theta, "rope_scaling": scaling}
    if family.rotary[0]:
        card[family.rotary[0]] = config.rotary_size / config.head_size
    if family.local_theta[0]:
        card[family.local_theta[0]] = config.window_rope_theta or config.rope_theta
    return card


def _write_windows(config: ModelConfig, family: Family) -> dict[str, Any]:
    rule, windowed = family.windows, config.layers_windowed
    if rule.kind == "none":
        return {}
    types = {"layer_types": [WINDOWED if w else FULL for w in windowed]}
    if rule.kind == "all":
        return {"sliding_window": config.window if any(windowed) else None}
    if rule.kind == "late":
        first = windowed.index(True) if any(windowed) else config.n_layers
        size = config.window if any(windowed) else None
        return {
            "use_sliding_window": any(windowed), "sliding_window": size, "max_window_layers": first
        } | types  # fmt: skip
    return {"sliding_window": config.window or rule.default} | types


def _check_same(config: ModelConfig, card: dict, family: Family) -> None:
    """What is written must be the model that was trained."""
    ours = {n: getattr(config, n) for n in OURS}
    again = model_config(Path(CONFIG), card, family, **ours)
    a, b = _explicit(config), _explicit(again)
    if different := _differences(a, b):
        name, mine, theirs = different[0]
        raise UserError(
            f"model.{name} is {mine!r}, but a {family.model_type} checkpoint can only say {theirs!r}: choose another "
            f"model.hf_family ({', '.join(FAMILIES)}), or another model"
        )


# what no checkpoint says
OURS = ("dtype", "param_dtype", "remat", "attention", "cache_dtype", "logits_chunk", "vocab_multiple", "lora")


def _explicit(config: ModelConfig) -> ModelConfig:
    """With what 0 and () stand for."""
    windowed = config.layers_windowed
    scaling = config.rope_scaling
    if scaling.kind in ("llama3", "yarn"):
        scaling = replace(scaling, original_context=scaling.original_context or config.context)
    return replace(
        config,
        head_dim=config.head_size,
        rotary_dim=config.rotary_size if config.positions == "rope" else 0,
        rope_theta=config.rope_theta if config.positions == "rope" else 0.0,
        rope_scaling=scaling,
        window=config.window if any(windowed) else 0,
        windowed=windowed,
        window_rope_theta=(config.window_rope_theta or config.rope_theta) if any(windowed) else 0.0,
        query_scalar=config.query_scalar or float(config.head_size),
    )


def _differences(a: Any, b: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    out = []
    for f in dataclass_fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if is_dataclass(x):
            out += _differences(x, y, f"{prefix}{f.name}.")
        elif x != y:
            out.append((prefix + f.name, x, y))
    return out
