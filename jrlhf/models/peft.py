"""Adapters in PEFT's file format: what peft writes is loaded, and what is written peft loads."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jrlhf.config import UserError, did_you_mean
from jrlhf.models.config import LoRAConfig, ModelConfig
from jrlhf.models.families import FAMILIES, Weight
from jrlhf.models.hf_config import read_object
from jrlhf.models.lora import leaves, put, split
from jrlhf.models.transformer import Model
from jrlhf.types import Params

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_peft(folder: str | Path, model: Model, adapter: Params, base: str) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, as peft writes and loads them.

    base: the folder or hub name of the base checkpoint, for those who load the adapter. Raises UserError where a
    family keeps several of our layers in one tensor (Phi-3, GPT-2, GPT-NeoX): PEFT's adapter would be of that tensor.
    """
    folder, lora = Path(folder), model.config.lora
    tensors = {}
    modules = []
    for name, weight, leaf in _peft_pairs(model, adapter):
        for layer in range(leaf[0].shape[0]):
            a, b = np.asarray(leaf[0][layer], np.float32), np.asarray(leaf[1][layer], np.float32)
            module = weight.name((layer,)).removesuffix(".weight")
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, lora.rank).T)
            tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(b.reshape(lora.rank, -1).T)
        modules.append(name)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.head == "lm" else "SEQ_CLS",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": lora.rank_stabilized,
        "target_modules": modules,
        "modules_to_save": ["score"] if model.head == "scalar" else None,
        "inference_mode": True,
    }
    if model.head == "scalar":
        tensors["base_model.model.score.weight"] = np.asarray(adapter["score"]["kernel"], np.float32).T.copy()
    if folder.exists() and (strange := {p.name for p in folder.iterdir()} - {PEFT_CONFIG, PEFT_WEIGHTS}):
        raise UserError(
            f"{folder}: holds {sorted(strange)[0]}, which is no part of an adapter; name another folder"
        )
    new = folder.with_name(f".saving-{folder.name}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    safetensors.numpy.save_file(tensors, new / PEFT_WEIGHTS, metadata={"format": "pt"})
    (new / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def peft_config(folder: str | Path, config: ModelConfig) -> LoRAConfig:
    """What adapter_config.json describes, for a base of `config`.

    Raises UserError for what our adapters are not: DoRA, biases, other ranks per layer, layers that the base does not
    have.
    """
    folder = Path(folder)
    path = folder / PEFT_CONFIG
    card = read_object(path)
    for name, allowed in (
        ("peft_type", ("LORA",)), ("bias", ("none", None)), ("use_dora", (False, None)),
        ("rank_pattern", ({}, None)), ("alpha_pattern", ({}, None)), ("fan_in_fan_out", (False, None)),
        ("layers_to_transform", (None,)),
    ):  # fmt: skip
        if (value := card.get(name, allowed[0])) not in allowed:
            raise UserError(f"{path}: {name} {value!r} is not supported; only {json.dumps(allowed[0])} is")
    if missing := [name for name in ("r", "lora_alpha", "target_modules") if not card.get(name)]:
        raise UserError(f"{path}: no field {missing[0]!r}")
    asked = card["target_modules"]
    named = {module: ours for ours, module in _modules(config)}
    if asked == "all-linear":
        asked = list(named)
    if isinstance(asked, str):
        asked = [m for m in named if re.search(rf"(^|\.)({asked})$", m)] or [asked]
    if unknown := [m for m in asked if m.split(".")[-1] not in named]:
        raise UserError(
            f"{path}: target_modules: {unknown[0]!r} is unknown.{did_you_mean(unknown[0], named)}"
        )
    wanted = {named[m.split(".")[-1]] for m in asked}
    targets = tuple(t for t in config.linear_layers if t.split("/")[1] in wanted)
    return LoRAConfig(
        rank=card["r"],
        alpha=float(card["lora_alpha"]),
        targets=targets,
        rank_stabilized=bool(card.get("use_rslora")),
    )


def load_peft(folder: str | Path, model: Model) -> tuple[Model, Params]:
    """(the model with adapters, the adapter) of a PEFT folder, for a base that is loaded already.

    Raises UserError for what `peft_config` refuses, and for a missing or unknown tensor or one of another shape.
    """
    folder = Path(folder)
    lora = peft_config(folder, model.config)
    model = Model(replace(model.config, lora=lora), model.head)
    adapter = jax.eval_shape(lambda: split(model.init(jax.random.key(0)))[1])
    out: dict = {}
    with safetensors.safe_open(folder / PEFT_WEIGHTS, framework="np") as file:
        left = set(file.keys())

        def take(name: str) -> np.ndarray:
            if name not in left:
                raise UserError(f"{folder / PEFT_WEIGHTS}: missing tensor {name}")
            left.discard(name)
            return file.get_tensor(name).astype(np.float32)

        for _, weight, (a, b) in _peft_pairs(model, adapter):
            parts: tuple[list, list] = ([], [])
            for layer in range(a.shape[0]):
                key = "base_model.model." + weight.name((layer,)).removesuffix(".weight")
                for part, name, shape in zip(parts, ("lora_A", "lora_B"), (a.shape, b.shape), strict=True):
                    x = take(f"{key}.{name}.weight")
                    if x.size != np.prod(shape[1:]) or lora.rank not in x.shape:
                        raise UserError(
                            f"{folder / PEFT_WEIGHTS}: tensor {key}.{name}.weight has shape {list(x.shape)}, which "
                            f"does not fit the model"
                        )
                    part.append(x.T.reshape(shape[1:]))
            path_ = tuple(weight.path.split("/"))
            for suffix, part in zip(("_lora_a", "_lora_b"), parts, strict=True):
                put(out, (*path_[:-1], path_[-1] + suffix), jnp.asarray(np.stack(part)))
        if model.head == "scalar":
            score = take("base_model.model.score.weight").T
            out["score"] = {"kernel": jnp.asarray(score), "bias": jnp.zeros((1,), jnp.float32)}
        if left:
            raise UserError(f"{folder / PEFT_WEIGHTS}: unknown tensor {sorted(left)[0]}")
    return model, out


def _modules(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(our layer's name, the last part of its module's name in the family) of every linear layer of its own tensor."""
    weights = [
        w
        for w in FAMILIES[config.hf_family].weights
        if w.path.removeprefix("layers/") in config.linear_layers
    ]
    for w in weights:
        if sum(other.hf == w.hf for other in weights) == 1 and w.stacked == 1:
            yield w.path.split("/")[-1], w.hf.removesuffix(".weight").split(".")[-1]


def _peft_pairs(model: Model, adapter: Params) -> Iterator[tuple[str, Weight, tuple[Any, Any]]]:
    """(module's last name, row of the family's table, (A, B)) of every adapted layer."""
    modules = dict(_modules(model.config))
    by_path = dict(leaves(adapter))
    for path, a in by_path.items():
        if path[-1].endswith("_lora_a"):
            name = path[-1].removesuffix("_lora_a")
            if name not in modules:
                raise UserError(
                    f"lora.targets: {name!r} shares a tensor with others in {model.config.hf_family} checkpoints, so "
                    f"that PEFT has no adapter of it alone; merge the adapter instead"
                )
            weight = next(
                w for w in FAMILIES[model.config.hf_family].weights if w.path == "/".join((*path[:-1], name))
            )
            yield modules[name], weight, (a, by_path[(*path[:-1], f"{name}_lora_b")])
