"""A finished stage's model on disk: parameters, how to read them, and the tokenizer."""

from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from jrlhf.checkpoint import load_meta, load_params, save_params
from jrlhf.config import UserError, from_dict, to_dict
from jrlhf.data.tokenizer import Tokenizer, load_tokenizer
from jrlhf.models.config import LoRAConfig, ModelConfig
from jrlhf.models.lora import merged, split
from jrlhf.models.transformer import Model, combine_heads, fold_normalization, with_scalar_head
from jrlhf.sharding import state_shardings
from jrlhf.types import Params


@dataclass(frozen=True)
class Loaded:
    """A model of a finished stage, on the mesh."""

    model: Model
    params: Params
    tokenizer: Tokenizer
    meta: dict[str, Any]


def save_model(folder: Path, model: Model, params: Params, tokenizer: Tokenizer, **meta: Any) -> None:
    """`<folder>/model` and `<folder>/tokenizer`."""
    tokenizer.save(folder / "tokenizer")
    meta = {"model": to_dict(model.config), "head": model.head, "tokenizer": tokenizer.fingerprint()} | meta
    if model.heads != len(meta.get("heads", {"names": [model.head]})["names"]):
        raise ValueError(f"the model has {model.heads} scalar heads: `heads` must say what they are")
    save_params(folder / "model", params, meta)


def has_model(folder: Path) -> bool:
    return (folder / "model" / "model.json").is_file()


def model_meta(folder: Path, head: str = "lm") -> dict[str, Any]:
    """What `save_model` noted about a stage's model; UserError when there is none, or one of the other kind."""
    if not has_model(folder):
        raise UserError(f"{folder}: this stage has no model (it may not be finished)")
    meta = load_meta(folder / "model")
    if meta["head"] != head:
        kinds = {"lm": "a language model", "scalar": "a reward model"}
        raise UserError(f"{folder}: expected {kinds[head]}, but the stage holds {kinds[meta['head']]}")
    return meta


def load_model(
    folder: Path,
    mesh: Mesh,
    head: Literal["lm", "scalar"] = "lm",
    *,
    every_head: bool = False,
    **changes: Any,
) -> Loaded:
    """The model of a stage folder. A reward model's normalisation is folded into its head.

    A reward model's several heads are combined into one as its stage said, or with `every_head` kept apart, each
    normalised by itself.

    `changes` replace numerics of the saved config that do not touch parameters (remat, attention, dtype).
    """
    meta = model_meta(folder, head)
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.fingerprint() != meta["tokenizer"]:
        raise UserError(
            f"{folder / 'tokenizer'} is not the tokenizer that the model in {folder} was trained with"
        )
    config = replace(from_dict(ModelConfig, meta["model"], f"{folder}/model"), **changes)
    model = Model(config, head, _n_heads(meta))
    abstract, axes = shapes_and_axes(model)
    shardings = state_shardings(mesh, abstract, axes)
    template = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )
    params, _ = load_params(folder / "model", template)
    model, params = _with_final_heads(model, params, meta, every_head)
    return Loaded(model, params, tokenizer, meta)


def _n_heads(meta: dict[str, Any]) -> int:
    return len(meta["heads"]["names"]) if "heads" in meta else 1


def _with_final_heads(
    model: Model, params: Params, meta: dict[str, Any], every_head: bool
) -> tuple[Model, Params]:
    """The model with its scalar heads normalised, and combined into one unless each is wanted."""
    heads = meta.get("heads")
    if heads and every_head:
        return model, fold_normalization(params, heads["mean"], heads["std"])
    if heads:
        model, params = replace(model, heads=1), combine_heads(params, heads["weights"])
    if norm := meta.get("normalization"):
        params = fold_normalization(params, norm["mean"], norm["std"])
    return model, params


class Beginning(NamedTuple):
    """What a fine-tuning stage starts from."""

    model: Model
    trained: Params  # all parameters, or an adapter
    frozen: Params | None  # the base beside an adapter: the loaded arrays themselves


def begin(
    loaded: Loaded, head: Literal["lm", "scalar"], lora: LoRAConfig, key: jax.Array, heads: int = 1
) -> Beginning:
    """The model to train: the loaded one, with fresh scalar heads if asked, or a fresh adapter beside it."""
    config = loaded.model.config
    if lora.rank:
        model = Model(replace(config, lora=lora), head, heads)
        return Beginning(model, model.fresh_adapter(key), _without_lm_head(loaded.params, head))
    params = loaded.params if head == "lm" else with_scalar_head(loaded.params, key, heads)
    return Beginning(Model(config, head, heads), params, None)


def save_trained(
    folder: Path, beginning: Beginning, trained: Params, tokenizer: Tokenizer, base: Path, **meta: Any
) -> Params:
    """`save_model` of what was trained from `beginning`, merged where it is an adapter, which is then kept beside it
    in `<folder>/adapter`. base: the folder of the stage that was started from. Returns the whole parameters."""
    model = beginning.model
    if model.config.lora.rank:
        noted = {"lora": to_dict(model.config.lora), "base": base.name, "head": model.head}
        save_params(folder / "adapter", trained, noted)
        whole = model.whole(trained, beginning.frozen)
        trained = jax.jit(partial(merged, model.config))(whole)
    save_model(folder, model.base, trained, tokenizer, **meta)
    return trained


def load_adapter(
    folder: Path, base: Path, config: ModelConfig, mesh: Mesh, *, every_head: bool = False
) -> tuple[Model, Params] | None:
    """(model with adapters, adapter) of a stage that trained one beside the model of the stage `base`; None of any
    other. A reward model's heads are normalised and combined as by `load_model`."""
    if not (folder / "adapter" / "model.json").is_file():
        return None
    noted = load_meta(folder / "adapter")
    if noted["base"] != base.name:
        return None
    lora = from_dict(LoRAConfig, noted["lora"], f"{folder}/adapter")
    meta = load_meta(folder / "model")
    model = Model(replace(config, lora=lora), noted["head"], _n_heads(meta))
    abstract, axes = shapes_and_axes(model)
    _, adapter = split(abstract)
    shardings = state_shardings(mesh, adapter, axes)
    template = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), adapter, shardings
    )
    adapter, _ = load_params(folder / "adapter", template)
    return _with_final_heads(model, adapter, meta, every_head)


def _without_lm_head(params: Params, head: str) -> Params:
    return params if head == "lm" else {k: v for k, v in params.items() if k != "lm_head"}


@cache
def shapes_and_axes(model: Model) -> tuple[Params, dict]:
    """Abstract parameters and their logical axes; kept, because each takes a trace of the model."""
    return jax.eval_shape(model.init, jax.random.key(0)), model.logical_axes()


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer, where: str) -> ModelConfig:
    """The config with the tokenizer's vocabulary size filled in; UserError when they disagree."""
    if config.vocab_size == 0:
        return replace(config, vocab_size=tokenizer.vocab_size)
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"{where}.vocab_size is {config.vocab_size}, but the tokenizer has {tokenizer.vocab_size} ids. "
            f"Set it to 0 to take the tokenizer's."
        )
    return config
