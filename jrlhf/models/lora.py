"""Low-rank adapters as trees of parameters: beside a frozen base, and merged into it.

An adapter is a tree of its own: the `<layer>_lora_a` and `<layer>_lora_b` leaves, and the scalar head where there is
one, which is trained whole. The base is kept once; policy, critic and reward model are adapters beside it, and the
reference is the base alone.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jrlhf.models.config import ModelConfig
from jrlhf.sharding import path_names
from jrlhf.types import Params


def is_adapter(path: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to the adapter rather than to the base."""
    return path[-1].endswith(("_lora_a", "_lora_b")) or path[0] == "score"


def split(params: Params) -> tuple[Params, Params]:
    """(base, adapter) of a whole tree."""
    base: dict = {}
    adapter: dict = {}
    for path, leaf in leaves(params):
        put(adapter if is_adapter(path) else base, path, leaf)
    return base, adapter


def join(base: Params, adapter: Params) -> Params:
    """The whole tree: the base with the adapter's leaves beside its own."""
    whole: dict = {}
    for tree in (base, adapter):
        for path, leaf in leaves(tree):
            put(whole, path, leaf)
    return whole


def merged(config: ModelConfig, params: Params) -> Params:
    """The whole tree folded into plain weights: W + (alpha / rank) A B, computed in float32."""
    base, adapter = split(params)
    whole = dict(leaves(base))
    pairs = dict(leaves(adapter))
    for path, a in pairs.items():
        if path[-1].endswith("_lora_a"):
            w_path = (*path[:-1], path[-1].removesuffix("_lora_a"))
            b = pairs[(*path[:-1], w_path[-1] + "_lora_b")]
            w = whole[w_path]
            ab = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(a, b)  # the first axis is the layers
            whole[w_path] = (w.astype(jnp.float32) + config.lora.scale * ab).astype(w.dtype)
        elif path[0] == "score":
            whole[path] = a
    out: dict = {}
    for path, leaf in whole.items():
        put(out, path, leaf)
    return out


def leaves(tree: Params) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, leaf) of every leaf."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield path_names(path), leaf


def put(tree: dict, path: tuple[str, ...], leaf: Any) -> None:
    """A leaf at its path, with the dicts above it."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf
