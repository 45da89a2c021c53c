"""How near a GPU or TPU comes to its limits: training against its matrix products, decoding against its memory.

The limits are measured first, in the same process: the rate of a large product in bfloat16, and of copying. Then, for
models of Qwen2.5's shapes from random weights, in bfloat16 with float32 parameters:

- `train`: tokens per second of an SFT step and its share of the product rate (6 FLOPs for each token and parameter of a
  product, and causal attention's; what is computed again does not count: MFU, Chowdhery et al. 2022, appendix B).
- `decode`: tokens per second of `rollout`, and its share of what the memory allows: every step reads all weights and
  the keys and values so far.
- `grpo`, `ppo`: an iteration, and how much of it is sampling, scoring and the update.

    python benchmarks/accelerator.py                             all of it; writes benchmarks/accelerator.json
    python benchmarks/accelerator.py --only train --shapes 1.5b --length 4096 --rows 4 8 --remat attention_mlp full
    JAX_PLATFORMS=cpu python benchmarks/accelerator.py --shapes tiny --out /dev/null       that it runs

Peers on the same device: `benchmarks/peers.py run` with these shapes by its flags.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf import __version__
from jrlhf.algorithms.grpo import GRPOConfig, make_grpo
from jrlhf.algorithms.ppo import PPOConfig, actor_critic, make_ppo
from jrlhf.algorithms.sft import SFTConfig, make_sft
from jrlhf.config import MeshConfig
from jrlhf.models.config import ModelConfig
from jrlhf.models.transformer import Model
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.rollout.rollout import rollout
from jrlhf.rollout.sampling import SamplingConfig, make_sampling
from jrlhf.sharding import make_mesh, put_batch
from jrlhf.training.loop import LoopConfig, guarded, sharded_state
from jrlhf.types import Algorithm, Prompts, SequenceBatch

RESULTS = Path(__file__).parent / "accelerator.json"
_QWEN = ModelConfig(
    vocab_size=151_936, n_kv_heads=2, qkv_bias=True, rope_theta=1e6, dtype="bfloat16", context=32_768,
)  # fmt: skip
SHAPES = {
    "0.5b": replace(_QWEN, d_model=896, n_layers=24, n_heads=14, d_ff=4864),
    "1.5b": replace(_QWEN, d_model=1536, n_layers=28, n_heads=12, d_ff=8960),
    "tiny": replace(_QWEN, vocab_size=512, d_model=64, n_layers=2, n_heads=4, d_ff=128, context=512),
}


def median_seconds(call: Callable[[], Any], least: int = 5) -> float:
    """Of a call, after two that do not count."""
    taken = []
    for n in range(least + 2):
        began = time.perf_counter()
        jax.block_until_ready(call())
        if n > 1:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def limits(small: bool) -> dict[str, float]:
    """FLOP/s of a bfloat16 product and bytes/s of a copy (read and written), of one device."""
    n = 512 if small else 8192
    square = jnp.ones((n, n), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    long = jnp.ones(2**20 if small else 2**30, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return {
        "flops": 2 * n**3 / median_seconds(lambda: product(square), 20),
        "bytes": 2 * long.nbytes / median_seconds(lambda: copy(long), 20),
    }


def product_params(config: ModelConfig) -> int:
    """Parameters that every token is multiplied by: the head's, and not the embedding's rows."""
    layers = config.n_params - config.padded_vocab * config.d_model * (1 if config.tie_embeddings else 2)
    return layers + config.padded_vocab * config.d_model


def train(config: ModelConfig, mesh: Any, rows: int, length: int, limit: dict) -> dict:
    model = Model(config)
    algorithm = make_sft(SFTConfig(), model, build_optimizer(OptimConfig(lr=1e-5), 1000))
    params = jax.jit(model.init)(jax.random.key(0))
    _, make, _ = sharded_state(mesh, model.logical_axes(), algorithm.init, params, jax.random.key(1))
    del params
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    batch = put_batch(mesh, SequenceBatch(tokens, np.ones_like(tokens), positions, positions > 0))
    state = make()
    compiled = jax.jit(algorithm.train_step, donate_argnums=0).lower(state, batch).compile()

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    seconds = median_seconds(step)
    # Scores and their use, forward and backward, of the half that is not masked.
    attention = 6 * config.n_layers * config.n_heads * config.head_size * length
    flops = (6 * product_params(config) + attention) * tokens.size
    return {
        "rows": rows, "length": length, "remat": config.remat, "seconds": seconds,
        "tokens_per_s": tokens.size / seconds,
        "mfu": flops / seconds / limit["flops"] / mesh.size,
        "temporaries_gb": compiled.memory_analysis().temp_size_in_bytes / 1e9,
    }  # fmt: skip


def decode(config: ModelConfig, mesh: Any, rows: int, prompt: int, new: int, limit: dict) -> dict:
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    sampling = make_sampling(SamplingConfig(max_new_tokens=new), (), 0)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (rows, prompt), np.int32)
    prompts = put_batch(mesh, Prompts(ids, np.ones_like(ids, bool)))
    whole = median_seconds(lambda: rollout(model, params, prompts, jax.random.key(1), sampling), 3)
    # The prefill, and what is done once for all tokens, by a rollout of one token.
    short = make_sampling(SamplingConfig(max_new_tokens=1), (), 0)
    first = median_seconds(lambda: rollout(model, params, prompts, jax.random.key(1), short), 3)
    seconds = max(whole - first, 1e-9) / max(new - 1, 1)
    size = jnp.dtype(config.dtype).itemsize
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_size * jnp.dtype(config.kept_dtype).itemsize
    read = product_params(config) * size + rows / mesh.size * (prompt + new / 2) * cache
    return {
        "rows": rows, "prompt": prompt, "new": new, "seconds": whole, "prefill_seconds": first,
        "tokens_per_s": rows / seconds, "share_of_bandwidth": read / limit["bytes"] / seconds,
    }  # fmt: skip


def iteration(
    config: ModelConfig, mesh: Any, kind: str, rows: int, group: int, prompt: int, new: int
) -> dict:
    """One iteration's parts: sampling, old and reference log-probabilities with advantages, the update."""
    model, scalar = Model(config), Model(config, "scalar")
    optimizer = build_optimizer(OptimConfig(lr=1e-6), 1000)
    params = jax.jit(model.init)(jax.random.key(0))
    axes = model.logical_axes() | scalar.logical_axes()
    algorithm: Algorithm
    if kind == "grpo":
        algorithm = make_grpo(
            GRPOConfig(group_size=group, share_prompts=True, microbatches=2), model, optimizer
        )
        start = (params, params, jax.random.key(2))
    else:
        group = 1
        algorithm = make_ppo(
            PPOConfig(epochs=2, minibatches=2), actor_critic(model, scalar), optimizer, optimizer
        )
        start = (params, jax.jit(scalar.init)(jax.random.key(1)), params, jax.random.key(2))
    _, make, frozen = sharded_state(mesh, axes, algorithm.init, *start)
    state = make()
    sampling = make_sampling(SamplingConfig(max_new_tokens=new), (), 0)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (rows // group, prompt), np.int32)
    prompts = put_batch(mesh, Prompts(ids, np.ones_like(ids, bool)))
    draw = lambda: rollout(model, state.params["policy"], prompts, jax.random.key(3), sampling, group=group)  # noqa: E731
    sampled = median_seconds(draw, 3)
    samples = draw()
    rewards = put_batch(mesh, np.random.default_rng(1).standard_normal(rows).astype(np.float32))
    make_batch = jax.jit(algorithm.make_batch)  # type: ignore[arg-type]
    score = lambda: make_batch(state._replace(ref_params=frozen), samples, rewards)  # noqa: E731
    scored = median_seconds(score, 3)
    batch = score()

    update = jax.jit(guarded(algorithm.train_step, LoopConfig(steps=1)), donate_argnums=0)

    def step() -> Any:
        nonlocal state
        state, metrics = update(state, frozen, batch)
        return metrics

    updated = median_seconds(step, 3)
    whole = sampled + scored + updated
    return {
        "rows": rows, "group": group, "prompt": prompt, "new": new, "seconds": whole,
        "tokens_per_s": rows * (prompt + new) / whole,
        "share": {"sampling": sampled / whole, "scoring": scored / whole, "update": updated / whole},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=("train", "decode", "grpo", "ppo"))
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["0.5b", "1.5b"])
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row to train on")
    parser.add_argument("--rows", nargs="+", type=int, default=[4], help="to train on, on each device")
    parser.add_argument("--remat", nargs="+", default=["attention_mlp", "full"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 64, 256], help="rows that are decoded")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    small = asked.shapes == ["tiny"]
    if small:
        asked.length, asked.prompt, asked.new, asked.batch = 128, 16, 16, [8]
    mesh = make_mesh(MeshConfig())
    device = jax.devices()[0]
    limit = limits(small)
    found: dict[str, Any] = {
        "device": device.device_kind, "devices": mesh.size, "limits": limit,
        "versions": {"jrlhf": __version__, "jax": jax.__version__},
    }  # fmt: skip
    print(
        f"{device.device_kind}: {limit['flops'] / 1e12:.0f} TFLOP/s, {limit['bytes'] / 1e12:.2f} TB/s",
        flush=True,
    )

    def note(name: str, call: Callable[[], dict]) -> None:
        """A measurement that does not fit is a result, too."""
        if asked.only and name.split()[0] not in asked.only:
            return
        try:
            found[name] = call()
        except jax.errors.JaxRuntimeError as error:
            found[name] = {"error": str(error).splitlines()[0]}
        print(name, {k: v for k, v in found[name].items() if k not in ("prompt", "new")}, flush=True)
        if asked.out != Path("/dev/null"):
            asked.out.write_text(json.dumps(found, indent=1) + "\n")

    for shape in asked.shapes:
        config = replace(SHAPES[shape])
        with jax.set_mesh(mesh):
            for rows in asked.rows:
                for remat in asked.remat:
                    kept = replace(config, remat=remat)
                    name = f"train {shape} rows {rows} remat {remat}"
                    note(
                        name,
                        lambda kept=kept, rows=rows: train(kept, mesh, rows * mesh.size, asked.length, limit),
                    )
            for batch in asked.batch:
                rows = -(-batch // mesh.size) * mesh.size
                name = f"decode {shape} batch {rows}"
                note(name, lambda rows=rows, c=config: decode(c, mesh, rows, asked.prompt, asked.new, limit))
            for kind in ("grpo", "ppo"):
                rows = (16 if small else 64) * mesh.size
                note(
                    f"{kind} {shape}",
                    lambda kind=kind, rows=rows, c=config: iteration(
                        replace(c, remat="full"), mesh, kind, rows, 8, asked.prompt, asked.new
                    ),
                )


if __name__ == "__main__":
    main()
