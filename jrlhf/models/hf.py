"""Hugging Face checkpoints: a folder of `config.json` and safetensors, read into our tree and written back.

What differs between families of models is in the tables of `families.py`. Nothing is guessed: an unknown, missing,
doubled or wrongly shaped tensor is a UserError that names it.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jrlhf.config import UserError, did_you_mean
from jrlhf.models.config import LoRAConfig, ModelConfig
from jrlhf.models.families import FAMILIES, Family, Head, Shape, Weight
from jrlhf.models.hf_config import CONFIG, model_config, read_card, read_object, similar, write_card
from jrlhf.models.transformer import Model
from jrlhf.sharding import leads, path_names
from jrlhf.types import Params

GENERATION = "generation_config.json"
COPIED_ROWS = 64  # at a time, of a transposed array
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_MODELS = ("tokenizer.json", "tokenizer.model")
TOKENIZER_FILES = (
    *TOKENIZER_MODELS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt",
)  # fmt: skip
FILE_DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}


# --- config.json --------------------------------------------------------------------------------------------


def config_from_hf(folder: str | Path, *, head: Head | None = None, **ours: Any) -> ModelConfig:
    """The shape of a checkpoint, from its config.json. `ours` are the caller's own choices: dtype, remat, ...

    head: what the checkpoint must hold, a language model or a scalar head (a reward model); None: either.

    Raises UserError naming file, field and value for an unknown family, a missing field, or anything that our
    decoder does not compute (another activation, unknown rotary scaling, quantised weights).
    """
    path, card, family = _card(Path(folder))
    if head is not None:
        _check_head(path, card, family, head)
    return model_config(path, card, family, **ours)


def _card(folder: Path) -> tuple[Path, dict, Family]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder.{_near(folder)}")
    return read_card(folder)


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
    param_dtype: Literal["float32", "bfloat16"] | None = None,
    shardings: Any = None,
    **ours: Any,
) -> tuple[Model, Params]:
    """A checkpoint as (model, parameters).

    folder: config.json with model.safetensors, or with model.safetensors.index.json and its shards; float32,
    bfloat16 or float16. head: "scalar" loads a sequence classifier of one label (a reward model). param_dtype: None
    keeps bfloat16 where all of the file is bfloat16, and makes float32 of anything else; a scalar head is float32.
    shardings: a tree of shardings like the parameters (`sharding.state_shardings` of
    `jax.eval_shape(model.init, key)`), or a function from the model to it; every device is then given only its own
    part. Without it the arrays are on the default device. ours: further fields of ModelConfig (dtype, remat, ...).

    All names and shapes are checked before a tensor is read. Then one parameter at a time is read, each tensor of the
    file once: the host holds its own devices' parts of that parameter and one tensor. Raises UserError naming the
    file and the tensor.
    """
    folder = Path(folder)
    path, card, family = _card(folder)
    _check_head(path, card, family, head)
    files = _Files(folder, family)
    param_dtype = param_dtype or files.dtype()
    config = model_config(path, card, family, param_dtype=param_dtype, **ours)
    model = Model(replace(config, lora=LoRAConfig()), head)
    abstract = _abstract(model)
    rows = _rows(family, abstract)
    _check_tensors(files, family, rows, model.config)
    _check_tied(files, family, model)

    def load(tree_path, leaf, sharding):
        weight = rows["/".join(path_names(tree_path))][0]
        return _load_one(files, weight, leaf, sharding, model.config)

    if callable(shardings):
        shardings = shardings(model)
    if shardings is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), abstract)
    return model, jax.tree_util.tree_map_with_path(load, abstract, shardings)


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


def _own_shape(weight: Weight, shape: Shape, config: ModelConfig) -> Shape:
    """Of one tensor: without the stacked axes, and without the rows that pad the vocabulary."""
    cut = {"embed/embedding": (config.vocab_size, shape[-1]), "lm_head/kernel": (shape[0], config.vocab_size)}
    return cut.get(weight.path, shape[weight.stacked :])


def _tensors(
    rows: Mapping[str, tuple[Weight, Shape]], config: ModelConfig
) -> Iterator[tuple[str, Weight, tuple[int, ...], Shape]]:
    """(name, row, index on the stacked axes, shape in the file) of every tensor that a checkpoint should hold, by
    layer; where parameters share a tensor, once for each."""
    per_layer = [w for w, _ in rows.values() if w.stacked]
    shapes = {w.path: shape for w, shape in rows.values()}

    def one(weight: Weight, index: tuple[int, ...]):
        hf_shape = weight.layout.hf_shape(_own_shape(weight, shapes[weight.path], config), config)
        return weight.name(index), weight, index, hf_shape

    layers_done = False
    for weight, _ in rows.values():
        if not weight.stacked:
            yield one(weight, ())
        elif not layers_done:
            layers_done = True
            for layer in range(config.n_layers):
                for w in per_layer:
                    for rest in np.ndindex(*shapes[w.path][1 : w.stacked]):
                        yield one(w, (layer, *rest))


class _Files:
    """The safetensors files of a folder: which tensor is in which, and the tensors one by one.

    Tensors are known by the names of the family's table; a checkpoint of the bare decoder lacks their prefix.
    """

    def __init__(self, folder: Path, family: Family):
        self.folder = folder
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, Shape] = {}
        self._kinds: dict[str, str] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        listed, index = self._listing()
        for path in listed:
            try:
                opened = safetensors.safe_open(path, framework="np")
            except (safetensors.SafetensorError, OSError) as e:
                raise UserError(
                    f"{path}: not a whole safetensors file ({e}). Download or copy it again."
                ) from e
            self._spans |= _spans(path)
            with opened as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if name in self._where:
                        raise UserError(f"tensor {name} is in two files: {self._where[name]} and {path}")
                    tensor = file.get_slice(name)
                    self._where[name], self._shapes[name] = path, tuple(tensor.get_shape())
                    self._kinds[name] = tensor.get_dtype()
        for name, path in index.items():
            if self._where.get(name) != path:
                found = f"it is in {self._where[name].name}" if name in self._where else "it is in no file"
                raise UserError(f"{folder / INDEX}: tensor {name} should be in {path.name}, but {found}")
        heads = ("lm_head.", "embed_out.", "score.")
        bare = not any(n.startswith(family.prefix) for n in self._where)
        self._stored = {family.prefix + n if bare and not n.startswith(heads) else n: n for n in self._where}

    def check_kinds(self, names: Iterable[str]) -> None:
        for name in names:
            if (kind := self._kinds[self._stored[name]]) not in FILE_DTYPES:
                known = ", ".join(FILE_DTYPES)
                raise UserError(
                    f"{self.file(name)}: tensor {name} has dtype {kind}, which is not one of {known}"
                )

    def dtype(self) -> Literal["float32", "bfloat16"]:
        return "bfloat16" if set(self._kinds.values()) == {"BF16"} else "float32"

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
        where = read_object(index).get("weight_map")
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
        return set(self._stored)

    def file(self, name: str) -> Path:
        return self._where[self._stored[name]]

    def shape(self, name: str) -> Shape:
        return self._shapes[self._stored[name]]

    def tensor(self, name: str) -> np.ndarray:
        """The tensor as it lies in the file: its pages are read where it is looked at, and let go with it."""
        stored = self._stored[name]
        dtype, (start, stop), path = (
            FILE_DTYPES[self._kinds[stored]],
            self._spans[stored],
            self._where[stored],
        )
        flat = (
            np.memmap(path, np.uint8, "r", start, (stop - start,)) if stop > start else np.empty(0, np.uint8)
        )
        return flat.view(dtype).reshape(self._shapes[stored])


def _spans(path: Path) -> dict[str, tuple[int, int]]:
    """Name -> first and last byte of each tensor. The format: a length, a JSON header of that length, the bytes."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: (8 + size + i["data_offsets"][0], 8 + size + i["data_offsets"][1]) for name, i in header.items()
    }


def _check_tensors(files: _Files, family: Family, rows: Mapping, config: ModelConfig) -> None:
    expected = {name: (w, shape) for name, w, _, shape in _tensors(rows, config)}
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
            f"{where}: unknown tensors: {_some(unknown)}.{similar(unknown[0], expected)} "
            f"(config.json says {config.n_layers} layers, tied embeddings {config.tie_embeddings}.)"
        )
    for name, (_, shape) in expected.items():
        if name in found and files.shape(name) != shape:
            raise UserError(
                f"{files.file(name)}: tensor {name} has shape {list(files.shape(name))}, "
                f"but config.json asks for {list(shape)}"
            )
    files.check_kinds(n for n in expected if n in found)


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _check_tied(files: _Files, family: Family, model: Model) -> None:
    """Some tied checkpoints carry the embedding a second time, as the head; the two must be equal."""
    names = family.name_of("lm_head/kernel"), family.name_of("embed/embedding")
    if model.config.tie_embeddings and names[0] in files.names():
        head, embed = (files.tensor(n) for n in names)
        same = head.shape == embed.shape and np.array_equal(head, embed)
        if not same:
            raise UserError(
                f"{files.file(names[0])}: {names[0]} differs from {names[1]}, but config.json says "
                "tie_word_embeddings true. Set it to false if the head is the right one."
            )


def _load_one(files: _Files, weight: Weight, leaf, sharding, config: ModelConfig) -> jax.Array:
    """One parameter on its devices. Each tensor is read once; every part of it goes into its device's buffer."""
    shape, dtype = leaf.shape, np.dtype(leaf.dtype)
    devices = sharding.addressable_devices_indices_map(shape)
    spans = lambda index: tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))  # noqa: E731
    where = {device: spans(index) for device, index in devices.items()}
    # Zeros are what an optional tensor that is not there holds, and the rows that pad the vocabulary.
    parts = {s: np.zeros([stop - start for start, stop in s], dtype) for s in set(where.values())}
    own = _own_shape(weight, shape, config)
    for index in np.ndindex(*shape[: weight.stacked]):
        inside = lambda s, index=index: tuple(i - s[j][0] for j, i in enumerate(index))  # noqa: E731
        wanted = [s for s in parts if all(a <= i < b for i, (a, b) in zip(index, s, strict=False))]
        if not wanted or (weight.optional and weight.name(index) not in files.names()):
            continue
        view = weight.layout.view(files.tensor(weight.name(index)), own, config)
        for s in wanted:
            new = view[tuple(slice(start, stop) for start, stop in s[weight.stacked :])]
            _copy(new, parts[s][(*inside(s), *(slice(0, n) for n in new.shape))])
    arrays = {}
    for span in list(parts):
        part = parts.pop(span)  # let go as soon as it is on its devices
        for device in [d for d, s in where.items() if s == span]:
            arrays[device] = jax.block_until_ready(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(shape, sharding, [arrays[d] for d in devices])


def _copy(new: np.ndarray, out: np.ndarray) -> None:
    """`out[...] = new` for an array that lies transposed: by blocks, which the processor's cache holds."""
    for start in range(0, len(new), COPIED_ROWS):
        out[start : start + COPIED_ROWS] = new[start : start + COPIED_ROWS]


# --- saving -------------------------------------------------------------------------------------------------


def save_hf(
    folder: str | Path,
    model: Model,
    params: Params,
    tokenizer_folder: str | Path | None = None,
    *,
    max_shard_bytes: int = 5_000_000_000,
    dtype: Literal["float32", "bfloat16"] | None = None,
    eos_ids: Sequence[int] = (),
    pad_id: int | None = None,
    bos_id: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint that `load_hf` and transformers load; round trips are bit-exact.

    dtype: None is the model's param_dtype. Every process must call this, with a folder that all of them see: each
    writes its share of the shards.

    tokenizer_folder: its tokenizer files are copied. Special ids given here go into config.json and
    generation_config.json; those not given are taken from the tokenizer folder's own two files, if they are
    there. A tensor larger than `max_shard_bytes` gets a shard to itself. A scalar head is written as a
    sequence classifier of one label; its bias, for which transformers has no place, as `score.bias` where it
    is not zero.

    The folder appears whole, by one rename. With `overwrite` it replaces an earlier checkpoint. Raises
    UserError when the folder holds anything else, and ValueError when `params` is not the model's tree.
    """
    folder = Path(folder)
    if dtype not in ("float32", "bfloat16", None):
        raise UserError(f"dtype: {dtype!r} is unknown.{did_you_mean(dtype, ('float32', 'bfloat16'))}")
    if max_shard_bytes <= 0:
        raise UserError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    if model.heads != 1:
        raise UserError(
            f"a reward model of {model.heads} heads cannot be written: combine them into one first "
            "(transformer.combine_heads)"
        )
    _check_target(folder, overwrite)
    tokenizer = Path(tokenizer_folder) if tokenizer_folder is not None else None
    if tokenizer is not None and not any((tokenizer / n).is_file() for n in TOKENIZER_MODELS):
        raise UserError(f"{tokenizer}: no {' or '.join(TOKENIZER_MODELS)} to copy")
    if dtype is None:
        dtype = model.config.param_dtype
    card = write_card(model.config, model.head, dtype)
    rows = _rows(FAMILIES[model.config.hf_family], _abstract(model))
    leaves = _checked_leaves(params, rows)
    asked = {"bos_token_id": bos_id, "eos_token_id": list(eos_ids), "pad_token_id": pad_id}

    # Every process writes its share of the files into one hidden folder beside; the first makes it and renames it.
    temporary = folder.parent / f".saving-{folder.name}"
    new = temporary / "new"
    if leads():
        shutil.rmtree(temporary, ignore_errors=True)
        new.mkdir(parents=True)
    _all_arrived("folder made")
    try:
        if leads():
            _write_cards(new, tokenizer, card, asked)
        _write_weights(new, leaves, rows, model.config, np.dtype(dtype), max_shard_bytes)
        _all_arrived("files written")
        if leads():
            if folder.exists():
                os.rename(folder, temporary / "old")
            os.rename(new, folder)
        _all_arrived("folder in place")
    finally:
        if leads():
            shutil.rmtree(temporary, ignore_errors=True)


def _all_arrived(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"save_hf: {what}")


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
    return leaves


def _write_cards(new: Path, tokenizer: Path | None, card: dict[str, Any], asked: dict[str, Any]) -> None:
    """config.json, generation_config.json and the tokenizer's files.

    What is asked for outranks generation_config.json, which outranks config.json: the order in which the
    two are believed when a tokenizer is loaded. Where nothing is known config.json says null, because
    transformers takes its own family's ids for an absent field.
    """
    generation, old = {}, {}
    if tokenizer is not None:
        generation = read_object(tokenizer / GENERATION) if (tokenizer / GENERATION).exists() else {}
        old = read_object(tokenizer / CONFIG) if (tokenizer / CONFIG).exists() else {}
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


def _write_weights(
    new: Path, leaves, rows, config: ModelConfig, dtype: np.dtype, max_shard_bytes: int
) -> None:
    """model.safetensors, or shards and their index. The processes take turns with the shards; a host holds one shard
    and one tensor at a time, never the model."""
    tensors: dict[str, tuple[Shape, list[tuple[Weight, tuple[int, ...]]]]] = {}
    for name, weight, index, shape in _tensors(rows, config):
        if weight.optional and not np.any(_part(leaves[weight.path], ())):
            continue
        tensors.setdefault(name, (shape, []))[1].append((weight, index))

    shards: list[list[str]] = [[]]
    size = total = 0
    for name, (shape, _) in tensors.items():
        n_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + n_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n_bytes
        total += n_bytes

    def tensor(name: str) -> np.ndarray:
        shape, parts = tensors[name]
        out = np.empty(shape, dtype)
        for weight, index in parts:
            own = _own_shape(weight, rows[weight.path][1], config)
            x = _part(leaves[weight.path], index)[tuple(slice(0, n) for n in own)]
            _copy(x.astype(dtype), weight.layout.view(out, own, config))
        return out

    where: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        held = {}
        for name in shard:  # all processes: fetching is a collective
            x = tensor(name)
            if i % jax.process_count() == jax.process_index():
                held[name] = x
        if held:
            # transformers refuses a file that does not say which framework's layout it has
            safetensors.numpy.save_file(held, new / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    if len(shards) > 1 and leads():
        _write_json(new / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _part(leaf: Any, index: tuple[int, ...]) -> np.ndarray:
    """One tensor of a parameter that may be spread over devices and hosts."""
    if getattr(leaf, "is_fully_addressable", True):
        return np.asarray(leaf[index] if index else leaf)
    part = _replicated_part(leaf, tuple(jnp.int32(i) for i in index), NamedSharding(leaf.sharding.mesh, P()))
    return np.asarray(part.addressable_data(0))


@partial(jax.jit, static_argnums=2)
def _replicated_part(leaf: jax.Array, index: tuple[jax.Array, ...], sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf[index] if index else leaf, sharding)


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
