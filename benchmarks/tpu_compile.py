"""A train step and a decode step, compiled by the real TPU compiler without a TPU: memory, kernels and collectives.

What fits, and whether attention is the kernel that was meant, can be read before a pod is asked for. Nothing is run, so
that nothing is said about time. Needs `pip install libtpu` (an environment of its own is best) and no device.

    JAX_PLATFORMS=cpu python benchmarks/tpu_compile.py --topology v5e:4x4 --mesh.data 4 --mesh.fsdp 4
    JAX_PLATFORMS=cpu python benchmarks/tpu_compile.py --model.remat attention --model.cache-dtype int8

About two minutes for a Llama of 1.2 billion parameters on two cores, of which one is busy.
"""

import importlib.util
import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import NamedSharding

from jrlhf.algorithms.sft import SFTConfig, make_sft
from jrlhf.config import MeshConfig, UserError
from jrlhf.models.config import ModelConfig
from jrlhf.models.transformer import Model
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.sharding import batch_sharding, logical_spec, make_mesh, state_shardings
from jrlhf.types import SequenceBatch

# The shape of Llama 3.2 1B.
LLAMA = ModelConfig(
    vocab_size=128_256, d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8, d_ff=8192, context=4096,
    rope_theta=500_000.0, dtype="bfloat16", remat="full", logits_chunk=256,
)  # fmt: skip


@dataclass(frozen=True)
class Args:
    topology: str = "v5e:4x4"
    mesh: MeshConfig = MeshConfig(data=4, fsdp=4)
    model: ModelConfig = LLAMA
    rows: int = 16  # of a train step
    length: int = 4096
    decode_rows: int = 256
    decode_slots: int = 2048


def topology(name: str) -> list[jax.Device]:
    """Devices to compile for."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is missing: pip install libtpu")
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def shapes(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def train_step(model: Model, mesh: jax.sharding.Mesh, rows: int, length: int) -> Any:
    """SFT with Adam on whole rows."""
    sft = make_sft(SFTConfig(), model, build_optimizer(OptimConfig(), total_steps=100))
    abstract = jax.eval_shape(lambda: sft.init(model.init(jax.random.key(0)), jax.random.key(0)))
    state = shapes(abstract, state_shardings(mesh, abstract, model.logical_axes()))
    of = lambda dtype: jax.ShapeDtypeStruct((rows, length), dtype, sharding=batch_sharding(mesh))  # noqa: E731
    batch = SequenceBatch(of(jnp.int32), of(jnp.int32), of(jnp.int32), of(jnp.bool_))
    return jax.jit(sft.train_step, donate_argnums=0).lower(state, batch).compile()


def decode_step(model: Model, mesh: jax.sharding.Mesh, rows: int, slots: int) -> Any:
    """One token of every row, with whole weights on each device (but for `tensor`), as `rollout` has them."""

    axes = model.logical_axes()
    lists = jax.eval_shape(lambda: model.decode_params(model.init(jax.random.key(0))))
    cache = jax.eval_shape(lambda: model.init_cache(rows, slots))
    split = lambda *axes: NamedSharding(mesh, logical_spec(axes))  # noqa: E731
    cache = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split("batch", "kv_heads", None, None)),
        cache,
    )

    def whole(path: tuple, x: Any) -> Any:
        names = tuple(k.key for k in path if hasattr(k, "key"))
        own = axes[names][1:] if names[0] == "layers" else axes[names]
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=split(*(None if a == "embed" else a for a in own))
        )

    params = jax.tree_util.tree_map_with_path(whole, lists)
    row = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))  # noqa: E731

    def step(params, token, position, seen, cache, slot):
        hidden, cache = model.decode(params, token, position, seen, cache, slot)
        return jnp.argmax(model.logits(params, hidden)[:, 0], axis=-1), cache

    return (
        jax.jit(step, donate_argnums=4)
        .lower(
            params,
            row((rows, 1), jnp.int32),
            row((rows, 1), jnp.int32),
            row((rows, 1, slots), jnp.bool_),
            cache,
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        .compile()
    )


def report(compiled: Any) -> dict[str, Any]:
    """Of one device: gibibytes, and how often the text has each Mosaic kernel and each kind of collective."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    gib = lambda n: round(n / 2**30, 2)  # noqa: E731
    kernels = re.findall(r'%([a-z_]+)[.\d]* = [^\n]*custom_call_target="tpu_custom_call"', text)
    collectives = re.findall(
        r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text
    )
    return {
        "arguments": gib(memory.argument_size_in_bytes),
        "temporary": gib(memory.temp_size_in_bytes),
        "host": gib(memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes),
        "kernels": dict(sorted(Counter(kernels).items())),
        "collectives": dict(sorted(Counter(collectives).items())),
    }


def main() -> None:
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    args = tyro.cli(Args)
    try:
        mesh, model = make_mesh(args.mesh, topology(args.topology)), Model(args.model)
        with jax.set_mesh(mesh):
            print(json.dumps({"train": report(train_step(model, mesh, args.rows, args.length))}), flush=True)
            print(
                json.dumps({"decode": report(decode_step(model, mesh, args.decode_rows, args.decode_slots))})
            )
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
