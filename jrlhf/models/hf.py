"""Hugging Face checkpoints: a folder of `config.json` and safetensors, read into our tree and written back.

A family of models is one `Family` table. Loading, checking and saving all walk the same rows, so a row that
is right one way is right the other way too. Nothing is guessed: an unknown, missing, doubled or wrongly shaped
tensor, or a config value that our decoder does not compute, is a UserError that names it.
"""

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jrlhf.config import UserError, did_you_mean, read_json
from jrlhf.models.config import ModelConfig
from jrlhf.models.transformer import Model
from jrlhf.sharding import path_names
from jrlhf.types import Params

Head = Literal["lm", "scalar"]
Shape = tuple[int, ...]

CONFIG, GENERATION = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_MODELS = ("tokenizer.json", "tokenizer.model")
TOKENIZER_FILES = (
    *TOKENIZER_MODELS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt",
)  # fmt: skip
FILE_DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


# --- the tables: a family is added here ---------------------------------------------------------------------


class Layout(NamedTuple):
    """How one tensor lies in a file and in our tree. `shape` is ours, without the layers axis."""

    hf_shape: Callable[[Shape], Shape]
    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    to_hf: Callable[[np.ndarray], np.ndarray]


def linear(n_in: int) -> Layout:
    """torch keeps a linear map as [out, in]; ours has its `n_in` input axes first, then its output axes."""

    def hf_shape(shape: Shape) -> Shape:
        return math.prod(shape[n_in:]), math.prod(shape[:n_in])

    return Layout(
        hf_shape,
        lambda x, shape: x.T.reshape(shape),
        lambda x: x.reshape(hf_shape(x.shape)[::-1]).T,
    )


SAME = Layout(lambda shape: shape, lambda x, shape: x.reshape(shape), lambda x: x)


class Weight(NamedTuple):
    """One row: the name in the file (`{}` is the layer), the path in our tree, and how the two differ."""

    hf: str
    path: str
    layout: Layout
    optional: bool = False  # zeros where the file has none, and left out of the file where it is zero


class Field(NamedTuple):
    """A config.json field that is a ModelConfig field."""

    hf: str
    ours: str
    default: Any = None  # transformers' default where the field is absent; None: it must be there


@dataclass(frozen=True)
class Family:
    """All that tells one family of checkpoints from another."""

    model_type: str
    architectures: Mapping[Head, str]
    fields: tuple[Field, ...]
    fixed: Mapping[str, tuple[Any, ...]]  # field -> values that our decoder computes; the first is written
    weights: tuple[Weight, ...]
    ignored: str  # regular expression of buffers that can be recomputed

    def name_of(self, path: str) -> str:
        return next(w.hf for w in self.weights if w.path == path)


LLAMA = Family(
    model_type="llama",
    architectures={"lm": "LlamaForCausalLM", "scalar": "LlamaForSequenceClassification"},
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("hidden_size", "d_model"),
        Field("intermediate_size", "d_ff"),
        Field("num_hidden_layers", "n_layers"),
        Field("num_attention_heads", "n_heads"),
        Field("num_key_value_heads", "n_kv_heads"),  # absent: num_attention_heads
        Field("head_dim", "head_dim"),  # absent: hidden_size / num_attention_heads
        Field("max_position_embeddings", "context", 2048),
        Field("rms_norm_eps", "norm_eps", 1e-6),
        Field("rope_theta", "rope_theta", 10_000.0),  # or inside rope_parameters
        Field("tie_word_embeddings", "tie_embeddings", False),
    ),
    fixed={
        "hidden_act": ("silu", "swish"),
        "rope_scaling": (None,),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "attention_dropout": (0.0, None),
        "quantization_config": (None,),
    },
    weights=(
        Weight("model.embed_tokens.weight", "embed/embedding", SAME),
        Weight("model.layers.{}.input_layernorm.weight", "layers/attn_norm/scale", SAME),
        Weight("model.layers.{}.self_attn.q_proj.weight", "layers/attn/q", linear(1)),
        Weight("model.layers.{}.self_attn.k_proj.weight", "layers/attn/k", linear(1)),
        Weight("model.layers.{}.self_attn.v_proj.weight", "layers/attn/v", linear(1)),
        Weight("model.layers.{}.self_attn.o_proj.weight", "layers/attn/o", linear(2)),
        Weight("model.layers.{}.post_attention_layernorm.weight", "layers/mlp_norm/scale", SAME),
        Weight("model.layers.{}.mlp.gate_proj.weight", "layers/mlp/gate", linear(1)),
        Weight("model.layers.{}.mlp.up_proj.weight", "layers/mlp/up", linear(1)),
        Weight("model.layers.{}.mlp.down_proj.weight", "layers/mlp/down", linear(1)),
        Weight("model.norm.weight", "final_norm/scale", SAME),
        Weight("lm_head.weight", "lm_head/kernel", linear(1)),
        Weight("score.weight", "score/kernel", linear(1)),
        # transformers has no such tensor and ignores it: its scores then lack a constant, which no comparison
        # of two answers sees.
        Weight("score.bias", "score/bias", SAME, optional=True),
    ),
    ignored=r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
)

FAMILIES: dict[str, Family] = {f.model_type: f for f in (LLAMA,)}


# --- config.json --------------------------------------------------------------------------------------------


def config_from_hf(
    folder: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    remat: Literal["none", "full", "dots"] = "none",
    attention: Literal["auto", "xla", "cudnn"] = "auto",
    logits_chunk: int = 0,
) -> ModelConfig:
    """The shape of a checkpoint, from its config.json. The keyword arguments are the caller's own choice.

    Raises UserError naming file, field and value for an unknown family, a missing field, or anything that our
    decoder does not compute (another activation, scaled rotary frequencies, biases, quantised weights).
    """
    path, card, family = _read_card(Path(folder))
    return _model_config(path, card, family, dtype, remat, attention, logits_chunk)


def _read_object(path: Path) -> dict:
    card = read_json(path)
    if not isinstance(card, dict):
        raise UserError(f"{path}: expected a JSON object")
    return card


def _read_card(folder: Path) -> tuple[Path, dict, Family]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder.{_near(folder)}")
    path = folder / CONFIG
    card = _read_object(path)
    kind, names = card.get("model_type"), card.get("architectures") or []
    known = sorted(a for f in FAMILIES.values() for a in f.architectures.values())
    if kind not in FAMILIES:
        raise UserError(f"{path}: model_type {kind!r} is not supported.{did_you_mean(str(kind), FAMILIES)}")
    unknown = [a for a in names if a not in FAMILIES[kind].architectures.values()]
    if unknown or len(names) > 1:
        raise UserError(f"{path}: architectures {names} is not supported. Known: one of {', '.join(known)}.")
    return path, card, FAMILIES[kind]


def _model_config(
    path: Path, card: dict, family: Family, dtype, remat, attention, logits_chunk
) -> ModelConfig:
    rope = card.get("rope_parameters") or {}  # where transformers 5 keeps rope_theta
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters must be an object, got {rope!r}")
    if "rope_theta" in rope and card.get("rope_theta", rope["rope_theta"]) != rope["rope_theta"]:
        raise UserError(
            f"{path}: rope_theta {card['rope_theta']} differs "
            f"from rope_parameters.rope_theta {rope['rope_theta']}"
        )
    _require(path, "rope_parameters.rope_type", rope.get("rope_type", "default"), ("default",))
    for name in ("factor", "partial_rotary_factor"):
        _require(path, f"rope_parameters.{name}", rope.get(name, 1.0), (1.0,))
    for name, allowed in family.fixed.items():
        value = card.get(name, allowed[0])
        if name == "rope_scaling" and value in ({"rope_type": "default"}, {"type": "default"}):
            value = None  # another way to say so
        _require(path, name, value, allowed)

    card = {"rope_theta": rope["rope_theta"]} | card if "rope_theta" in rope else card
    values: dict[str, Any] = {}
    for field in family.fields:
        value = card.get(field.hf, field.default)
        if value is None and field.ours == "head_dim":
            continue  # ModelConfig divides
        if value is None and field.ours == "n_kv_heads":
            value = values["n_heads"]
        if value is None:
            raise UserError(f"{path}: no field {field.hf!r}.{_similar(field.hf, card)}")
        values[field.ours] = _typed(path, field, value)
    try:
        return ModelConfig(**values, dtype=dtype, remat=remat, attention=attention, logits_chunk=logits_chunk)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def _require(path: Path, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{path}: {name} {value!r} is not supported; only {json.dumps(allowed[0])} is")


def _similar(name: str, names: Mapping[str, Any]) -> str:
    hint = did_you_mean(name, names)
    return hint if hint.startswith(" Did") else ""  # a config has too many fields to list them


def _typed(path: Path, field: Field, value: Any) -> Any:
    """`value` as the type of the ModelConfig field."""
    want = type(getattr(ModelConfig, field.ours))
    if want is float and type(value) in (int, float) and value > 0:
        return float(value)
    if (want is int and type(value) is int and value > 0) or (want is bool and type(value) is bool):
        return value
    what = "true or false" if want is bool else f"a positive {want.__name__}"
    raise UserError(f"{path}: {field.hf} must be {what}, got {value!r}")


def _num_labels(card: dict) -> int:
    """As transformers counts them: `num_labels`, else the named labels, else 2."""
    return card.get("num_labels") or len(card.get("id2label") or (0, 1))


def _check_head(path: Path, card: dict, family: Family, head: Head) -> None:
    if head not in family.architectures:
        raise UserError(f"head: {head!r} is unknown.{did_you_mean(head, family.architectures)}")
    held = {name: kind for kind, name in family.architectures.items()}
    for name in card.get("architectures") or []:
        if held[name] != head:
            hint = (
                "load it with head='lm' and put a fresh scalar head on it (transformer.with_scalar_head)"
                if head == "scalar"
                else "load it with head='scalar'"
            )
            raise UserError(f"{path}: the checkpoint is a {name}, not a {family.architectures[head]}; {hint}")
    if head == "scalar" and _num_labels(card) != 1:
        raise UserError(f"{path}: num_labels is {_num_labels(card)}; a scalar head has 1")


# --- loading ------------------------------------------------------------------------------------------------


def load_hf(
    folder: str | Path,
    *,
    head: Head = "lm",
    dtype: Literal["float32", "bfloat16"] = "float32",
    remat: Literal["none", "full", "dots"] = "none",
    attention: Literal["auto", "xla", "cudnn"] = "auto",
    logits_chunk: int = 0,
    shardings: Any = None,
) -> tuple[Model, Params]:
    """A checkpoint as (model, float32 parameters).

    folder: config.json with model.safetensors, or with model.safetensors.index.json and its shards; float32,
    bfloat16 or float16. head: "scalar" loads a sequence classifier of one label (a reward model).
    shardings: a tree of shardings like the parameters (`sharding.state_shardings` of
    `jax.eval_shape(model.init, key)`); every device is then given only its own part, one parameter at a time,
    and the host holds one part and one tensor. Without it the arrays are on the default device.

    All names and shapes are checked before a tensor is read. Raises UserError naming the file and the tensor.
    """
    folder = Path(folder)
    path, card, family = _read_card(folder)
    _check_head(path, card, family, head)
    model = Model(_model_config(path, card, family, dtype, remat, attention, logits_chunk), head)
    abstract = _abstract(model)

    with contextlib.ExitStack() as stack:
        files = _Files(folder, stack)
        rows = _rows(family, abstract)
        _check_tensors(files, family, rows, model.config)
        _check_tied(files, family, model)

        def load(tree_path, leaf, sharding):
            weight = rows["/".join(path_names(tree_path))][0]
            if sharding is None:
                return jnp.asarray(_read(files, weight, leaf.shape, (slice(None),) * len(leaf.shape)))
            part = lambda index: _read(files, weight, leaf.shape, index)  # noqa: E731
            return jax.make_array_from_callback(leaf.shape, sharding, part)

        if shardings is None:
            shardings = jax.tree.map(lambda _: None, abstract)
        params = jax.tree_util.tree_map_with_path(load, abstract, shardings)
    return model, params


def _abstract(model: Model) -> Params:
    return jax.eval_shape(model.init, jax.random.key(0))


def _rows(family: Family, tree: Params) -> dict[str, tuple[Weight, Shape]]:
    """Path -> (its row, its shape) for every parameter of `tree`, in the table's order."""
    shapes = {
        "/".join(path_names(p)): tuple(leaf.shape)
        for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    table = {w.path: w for w in family.weights}
    if without := sorted(set(shapes) - set(table)):
        raise ValueError(f"the table of family {family.model_type!r} has no row for parameter {without[0]}")
    return {path: (weight, shapes[path]) for path, weight in table.items() if path in shapes}


def _is_layered(weight: Weight) -> bool:
    return "{}" in weight.hf


def _tensors(rows: Mapping[str, tuple[Weight, Shape]]) -> Iterator[tuple[str, Weight, int, Shape]]:
    """(name, row, layer, shape in the file) of every tensor that a checkpoint should hold."""
    for weight, shape in rows.values():
        own = shape[1:] if _is_layered(weight) else shape
        for layer in range(shape[0] if _is_layered(weight) else 1):
            yield weight.hf.format(layer), weight, layer, weight.layout.hf_shape(own)


class _Files:
    """The safetensors files of a folder: which tensor is in which, and the tensors one by one."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack):
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        listed, where = self._listing()
        for path in listed:
            try:
                file = stack.enter_context(safetensors.safe_open(path, framework="np"))
            except (safetensors.SafetensorError, OSError) as e:
                raise UserError(
                    f"{path}: not a whole safetensors file ({e}). Download or copy it again."
                ) from e
            self._open[path] = file
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name in self._file_of:
                    raise UserError(f"tensor {name} is in two files: {self._file_of[name]} and {path}")
                self._file_of[name] = path
                if (kind := file.get_slice(name).get_dtype()) not in FILE_DTYPES:
                    known = ", ".join(FILE_DTYPES)
                    raise UserError(f"{path}: tensor {name} has dtype {kind}, which is not one of {known}")
        for name, path in where.items():
            if self._file_of.get(name) != path:
                found = (
                    f"it is in {self._file_of[name].name}" if name in self._file_of else "it is in no file"
                )
                raise UserError(f"{folder / INDEX}: tensor {name} should be in {path.name}, but {found}")

    def _listing(self) -> tuple[list[Path], dict[str, Path]]:
        """The files, and what the index (if there is one) says is where."""
        single, index = self.folder / SINGLE, self.folder / INDEX
        if single.exists() and index.exists():
            raise UserError(f"{self.folder}: both {SINGLE} and {INDEX}; remove the one that is stale")
        if single.exists():
            return [single], {}
        if not index.exists():
            there = ", ".join(sorted(p.name for p in self.folder.iterdir())) or "nothing"
            raise UserError(f"{self.folder}: no {SINGLE} and no {INDEX}; it holds {there}")
        where = _read_object(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
            raise UserError(f"{index}: expected an object 'weight_map' of tensor name to file name")
        for file in where.values():
            if Path(file).name != file:
                raise UserError(f"{index}: {file!r} is not the name of a file in the same folder")
            if not (self.folder / file).exists():
                raise UserError(f"{self.folder / file}: no such file, but {INDEX} lists it")
        files = sorted({self.folder / file for file in where.values()})
        return files, {name: self.folder / file for name, file in where.items()}

    def names(self) -> set[str]:
        return set(self._file_of)

    def file(self, name: str) -> Path:
        return self._file_of[name]

    def shape(self, name: str) -> Shape:
        return tuple(self._open[self._file_of[name]].get_slice(name).get_shape())

    def tensor(self, name: str) -> np.ndarray:
        return self._open[self._file_of[name]].get_tensor(name)


def _check_tensors(files: _Files, family: Family, rows: Mapping, config: ModelConfig) -> None:
    expected = {name: (w, shape) for name, w, _, shape in _tensors(rows)}
    found = files.names()
    missing = [n for n, (w, _) in expected.items() if n not in found and not w.optional]
    ignored = {family.name_of("lm_head/kernel")} if config.tie_embeddings else set()  # see _check_tied
    ignored |= {n for n in found if re.fullmatch(family.ignored, n)}
    unknown = sorted(found - set(expected) - ignored)
    if missing:
        hint = f" Unknown instead: {_some(unknown)}." if unknown else ""
        raise UserError(f"{files.folder}: missing tensors: {_some(missing)}.{hint}")
    if unknown:
        where = files.file(unknown[0])
        raise UserError(
            f"{where}: unknown tensors: {_some(unknown)}.{_similar(unknown[0], expected)} "
            f"(config.json says {config.n_layers} layers, tied embeddings {config.tie_embeddings}.)"
        )
    for name, (_, shape) in expected.items():
        if name in found and files.shape(name) != shape:
            raise UserError(
                f"{files.file(name)}: tensor {name} has shape {list(files.shape(name))}, "
                f"but config.json asks for {list(shape)}"
            )


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_tied(files: _Files, family: Family, model: Model) -> None:
    """Some tied checkpoints carry the embedding a second time, as the head; the two must be equal."""
    names = family.name_of("lm_head/kernel"), family.name_of("embed/embedding")
    if model.config.tie_embeddings and names[0] in files.names():
        head, embed = (files.tensor(n) for n in names)
        if head.shape != embed.shape or not np.array_equal(head, embed):
            raise UserError(
                f"{files.file(names[0])}: {names[0]} differs from {names[1]}, but config.json says "
                "tie_word_embeddings true. Set it to false if the head is the right one."
            )


def _read(files: _Files, weight: Weight, shape: Shape, index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of our float32 array of `shape`."""
    part = tuple(len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True))
    if weight.optional and weight.hf not in files.names():
        return np.zeros(part, np.float32)
    if not _is_layered(weight):
        return weight.layout.to_ours(files.tensor(weight.hf), shape)[index].astype(np.float32)
    out = np.empty(part, np.float32)
    for i, layer in enumerate(range(*index[0].indices(shape[0]))):
        tensor = files.tensor(weight.hf.format(layer))
        out[i] = weight.layout.to_ours(tensor, shape[1:])[index[1:]]
    return out


# --- saving -------------------------------------------------------------------------------------------------


def save_hf(
    folder: str | Path,
    model: Model,
    params: Params,
    tokenizer_folder: str | Path | None = None,
    *,
    max_shard_bytes: int = 5_000_000_000,
    dtype: Literal["float32", "bfloat16"] = "float32",
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
    bos_id: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint that `load_hf` and transformers load; float32 round trips are bit-exact.

    tokenizer_folder: its tokenizer files are copied. Special ids given here go into config.json and
    generation_config.json; those not given are taken from the tokenizer folder's own two files, if they are
    there. A tensor larger than `max_shard_bytes` gets a shard to itself. A scalar head is written as a
    sequence classifier of one label; its bias, for which transformers has no place, as `score.bias` where it
    is not zero.

    The folder appears whole, by one rename. With `overwrite` it replaces an earlier checkpoint. Raises
    UserError when the folder holds anything else, and ValueError when `params` is not the model's tree.
    """
    folder = Path(folder)
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype: {dtype!r} is unknown.{did_you_mean(dtype, ('float32', 'bfloat16'))}")
    if max_shard_bytes <= 0:
        raise UserError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    _check_target(folder, overwrite)
    tokenizer = Path(tokenizer_folder) if tokenizer_folder is not None else None
    if tokenizer is not None and not any((tokenizer / n).is_file() for n in TOKENIZER_MODELS):
        raise UserError(f"{tokenizer}: no {' or '.join(TOKENIZER_MODELS)} to copy")
    family = LLAMA  # what ModelConfig describes
    rows = _rows(family, _abstract(model))
    leaves = _checked_leaves(params, rows)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".saving-{folder.name}-") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        asked = {"bos_token_id": bos_id, "eos_token_id": list(eos_ids), "pad_token_id": pad_id}
        _write_cards(new, tokenizer, _card(family, model, dtype), asked)
        _write_weights(new, leaves, rows, np.dtype(dtype), max_shard_bytes)
        if folder.exists():
            os.rename(folder, Path(temporary) / "old")
        os.rename(new, folder)


def _check_target(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    there = sorted(p.name for p in folder.iterdir())
    ours = {CONFIG, GENERATION, INDEX, *TOKENIZER_FILES}
    strange = [n for n in there if n not in ours and not re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", n)]
    if strange:
        raise UserError(
            f"{folder}: holds {_some(strange)}, which is no part of a checkpoint; name another folder"
        )
    if there and not overwrite:
        raise UserError(f"{folder}: there is a checkpoint already; remove it, or ask to overwrite it")


def _checked_leaves(params: Params, rows: Mapping[str, tuple[Weight, Shape]]) -> dict[str, Any]:
    leaves = {"/".join(path_names(p)): x for p, x in jax.tree_util.tree_flatten_with_path(params)[0]}
    if wrong := sorted(set(leaves) ^ set(rows)):
        what = "is no parameter of the model" if wrong[0] in leaves else "is missing"
        raise ValueError(f"params: {wrong[0]} {what}")
    for path, (_, shape) in rows.items():
        if tuple(leaves[path].shape) != shape:
            raise ValueError(f"params: {path} has shape {tuple(leaves[path].shape)}, the model's is {shape}")
        if not getattr(leaves[path], "is_fully_addressable", True):
            raise ValueError(f"params: {path} is spread over several processes; save from one")
    return leaves


def _card(family: Family, model: Model, dtype: str) -> dict[str, Any]:
    """config.json without the special ids. rope_theta is at the top, where every transformers looks."""
    card: dict[str, Any] = {
        "architectures": [family.architectures[model.head]],
        "model_type": family.model_type,
        "torch_dtype": dtype,
    }
    card |= {f.hf: getattr(model.config, f.ours) for f in family.fields}
    card |= {name: allowed[0] for name, allowed in family.fixed.items() if name != "quantization_config"}
    if model.head == "scalar":
        card |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return card


def _write_cards(new: Path, tokenizer: Path | None, card: dict[str, Any], asked: dict[str, Any]) -> None:
    """config.json, generation_config.json and the tokenizer's files.

    What is asked for outranks generation_config.json, which outranks config.json: the order in which the
    two are believed when a tokenizer is loaded. Where nothing is known config.json says null, because
    transformers takes its own family's ids for an absent field.
    """
    generation, old = {}, {}
    if tokenizer is not None:
        generation = _read_object(tokenizer / GENERATION) if (tokenizer / GENERATION).exists() else {}
        old = _read_object(tokenizer / CONFIG) if (tokenizer / CONFIG).exists() else {}
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, new / name)
    if asked["eos_token_id"]:
        ids = [int(i) for i in asked["eos_token_id"]]
        generation["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    for name in ("bos_token_id", "pad_token_id"):
        if asked[name] is not None:
            generation[name] = int(asked[name])
    for name in asked:
        known = [c[name] for c in (generation, old) if c.get(name) is not None]
        card[name] = known[0] if known else None
    _write_json(new / CONFIG, card)
    if generation:  # transformers derives it from config.json where it is absent
        _write_json(new / GENERATION, generation)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_weights(new: Path, leaves, rows, dtype: np.dtype, max_shard_bytes: int) -> None:
    """model.safetensors, or shards and their index; the host holds one shard at a time."""
    shards: list[list[tuple[str, Weight, int]]] = [[]]
    size = total = 0
    for name, weight, layer, shape in _tensors(rows):
        if weight.optional and not np.any(np.asarray(leaves[weight.path])):
            continue
        n_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + n_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, weight, layer))
        size += n_bytes
        total += n_bytes

    def tensor(weight: Weight, layer: int) -> np.ndarray:
        leaf = leaves[weight.path]
        x = np.asarray(leaf[layer] if _is_layered(weight) else leaf)
        # safetensors writes the buffer as it lies: a transposed view would come out scrambled.
        return np.ascontiguousarray(weight.layout.to_hf(x).astype(dtype))

    where: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: tensor(weight, layer) for name, weight, layer in shard}
        # transformers refuses a file that does not say which framework's layout it has
        safetensors.numpy.save_file(tensors, new / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        _write_json(new / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


# --- a folder, or a name on the hub -------------------------------------------------------------------------


def resolve_checkpoint(path_or_hub_name: str | Path) -> Path:
    """The folder of a checkpoint: a local one if it exists, else the snapshot of "org/name" from the hub.

    The hub's own cache is used, also without a network. Raises UserError when there is neither folder nor
    such a repository, or no way to reach it.
    """
    name = str(path_or_hub_name)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: a checkpoint is a folder; this is a file. Name its folder {path.parent}.")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(f"{path}: no such checkpoint folder.{_near(path)}")
    import huggingface_hub
    from huggingface_hub import errors

    neither = f"{name}: no such folder.{_near(path)} The hub"
    wanted = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except errors.GatedRepoError as e:
        raise UserError(f"{neither} wants you to accept its terms and log in (`hf auth login`).") from e
    except errors.RepositoryNotFoundError as e:
        raise UserError(f"{neither} has no such public repository.") from e
    except errors.LocalEntryNotFoundError as e:
        raise UserError(
            f"{neither} cannot be reached (there is no network, or it is switched off) and its cache has no copy. "
            "Download the checkpoint elsewhere and name its folder."
        ) from e
    except Exception as e:  # which network library raises depends on the version of huggingface_hub
        raise UserError(f"{neither} could not give it: {type(e).__name__}: {e}") from e


def _near(path: Path) -> str:
    """A suggestion among the folders that lie beside `path`."""
    parent = path.parent
    if not parent.is_dir():
        return f" There is no folder {parent} either."
    folders = [p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith(".")]
    hint = did_you_mean(path.name, folders)
    return hint if hint.startswith(" Did") or len(folders) <= 8 else f" {parent} holds {len(folders)} others."
