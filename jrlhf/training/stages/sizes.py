"""How much a stage will do, for the dry run: counted where the data and the tokenizer are at hand, else bounded."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from rich.console import Console

from jrlhf.config import Source, StageContext, UserError, to_dict
from jrlhf.data.schema import check_row
from jrlhf.data.tokenizer import Tokenizer, load_tokenizer
from jrlhf.models.config import LoRAConfig, ModelConfig
from jrlhf.models.transformer import Model, kept_of_layers
from jrlhf.training.data import rows_of
from jrlhf.training.loop import LoopConfig
from jrlhf.types import Plan

QUIET: Any = Console(quiet=True)
READABLE = 64 * 2**20  # bytes of files that a dry run reads to count their rows

NO_ADAPTERS = LoRAConfig()


class Count(NamedTuple):
    n: int = 0  # 0: nothing tells
    exact: bool = True

    def times(self, factor: int) -> "Count":
        return Count(self.n * factor, self.exact)


UNKNOWN = Count(0, False)


def at_most(n: int) -> Count:
    return Count(n, False)


def check_kind(source: Source | None, kind: str, field: str) -> None:
    """At config time, that a source at hand gives rows of this kind."""
    rows = local_rows(source) if source is not None else None
    if not rows:
        return
    try:
        check_row(rows[0], kind, f"{field}: {type(source).__name__} row 1")
    except UserError as e:
        asked = f" Its rows must be of the kind {kind!r}"
        asked += f": kind={kind!r} makes them of many formats." if hasattr(source, "kind") else "."
        raise UserError(f"{e}{asked}") from None


def count_rows(source: Source | None) -> Count:
    """Rows of a source: what its config says (`size`, `documents`), or what is in its local files."""
    if source is None:
        return Count()
    for name in ("size", "documents"):
        if n := getattr(source, name, None):
            return Count(n)
    if (rows := local_rows(source)) is not None:
        return Count(len(rows))
    return at_most(getattr(source, "max_rows", None) or 0)


def local_rows(source: Source) -> list[dict] | None:
    """All rows of a source that is at hand and quick to read; None of any other.

    At hand are local files and what makes its rows itself (it has a `size`).
    """
    files = [Path(f) for f in source.files()]
    if sum(f.stat().st_size for f in files) > READABLE or getattr(source, "streaming", False):
        return None
    if not files and not getattr(source, "size", None):
        return None
    return _read(_Key(source), tuple((str(f), f.stat().st_mtime_ns) for f in files))


class _Key:
    """A source as a cache's key: configs with dicts in them have no hash."""

    def __init__(self, source: Source) -> None:
        self.source, self.text = source, json.dumps(to_dict(source, Source), sort_keys=True)

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text


@lru_cache(maxsize=8)
def _read(key: _Key, files: tuple) -> list[dict]:
    return list(key.source.rows())


def finished(folder: Path | None) -> bool:
    return folder is not None and (folder / "done.json").is_file()


def tokenizer_of(ctx: StageContext, parent: str) -> Tokenizer | None:
    """The tokenizer of a parent that is finished."""
    folder = ctx.parents.get(parent)
    return load_tokenizer(folder / "tokenizer") if folder and finished(folder) else None


def packed_rows(held_out: int, pack: Callable[[], Any]) -> Count:
    """Rows to train on after packing, `pack() -> arrays`."""
    return Count(max(rows_of(pack()) - held_out, 0))


def kept_per_token(config: ModelConfig) -> int:
    """Numbers that a forward pass leaves on the device for the backward pass, about."""
    remat = kept_of_layers(config)
    if remat == "none":
        return 16 * config.d_model * config.n_layers
    heads = 2 * (config.n_heads + config.n_kv_heads) * config.head_size
    of_layer = 2 * config.d_model
    if remat in ("dots", "attention", "attention_mlp"):
        of_layer += heads
    if remat in ("dots", "mlp", "attention_mlp"):
        of_layer += 3 * config.d_ff
    return of_layer * config.n_layers


def training_plan(
    config: ModelConfig,
    loop: LoopConfig,
    rows: Count,
    length: Count,
    per_row: int = 1,
    read: Count | None = None,
    lora: LoRAConfig = NO_ADAPTERS,
) -> Plan:
    """Sizes of a training stage on batches of `rows`, each `per_row` sequences of `length` tokens.

    `read` is shown instead of `rows` where the two differ (documents are packed into rows). Memory: parameters (with
    adapters: those frozen, and the adapter's), gradient and two float32 moments of what is trained, and activations.
    """
    shown = rows if read is None else read
    steps = Count(loop.steps) if loop.steps else Count(loop.total_steps(rows.n) if rows.n else 0, rows.exact)
    tokens_step = loop.batch_size * per_row * length.n
    sequences = loop.batch_size * per_row
    logits = 3 * config.vocab_size * sequences * Model(config).logits_chunk(sequences, length.n)
    activations = 4 * (tokens_step * kept_per_token(config) + logits)
    plan = Plan(
        config.n_params,
        memory_bytes=frozen_bytes(config, lora) + trained_bytes(config, lora) + activations,
        note="" if steps.n else "steps depend on the data",
    )
    return counted(plan, shown, steps, Count(steps.n * tokens_step, steps.exact and length.exact))


def frozen_bytes(config: ModelConfig, lora: LoRAConfig) -> int:
    """The base beside an adapter; 0 without adapters."""
    return jnp.dtype(config.param_dtype).itemsize * config.n_params if lora.rank else 0


def trained_bytes(config: ModelConfig, lora: LoRAConfig) -> int:
    """What is trained, its gradient and two float32 moments."""
    if lora.rank:
        return 16 * (replace(config, lora=lora).n_params - config.n_params)
    return (2 * jnp.dtype(config.param_dtype).itemsize + 8) * config.n_params


def sampling_plan(
    config: ModelConfig, prompts: Count, answers: Count, max_new_tokens: int, models: int
) -> Plan:
    """Sizes of a stage that samples `answers` with `models` float32 models in memory; an answer may end early."""
    plan = Plan(config.n_params, memory_bytes=4 * models * config.n_params)
    return counted(plan, prompts, Count(), at_most(answers.n * max_new_tokens))


def counted(plan: Plan, rows: Count, steps: Count, tokens: Count) -> Plan:
    counts = {"rows": rows, "steps": steps, "tokens": tokens}
    bounds = tuple(name for name, count in counts.items() if count.n and not count.exact)
    return replace(plan, rows=rows.n, steps=steps.n, tokens=tokens.n, at_most=bounds)


def usable(source: Source, too_long: str) -> Count:
    """Prompts of a source that are used: those that are too long may be dropped."""
    rows = count_rows(source)
    return rows if too_long != "drop" else at_most(rows.n)
