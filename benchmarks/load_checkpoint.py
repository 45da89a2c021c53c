"""Peak host memory of reading a checkpoint onto eight devices, and of writing it back.

A Llama of 1.04 billion parameters (bfloat16, four files, 1.9 GiB) is generated, read onto a 4 x 2 mesh (fsdp x tensor)
of eight CPU devices of this one process, and written back. The devices' memory is the host's, so that the process must
hold the whole model in the end; what counts is the peak beyond that, against the largest parameter (all layers of one
kind of matrix, which is placed as one array).

    python benchmarks/load_checkpoint.py [--folder SCRATCH]        about 2 minutes, 4 GiB of disk
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LIMIT = 1.3  # times the largest parameter


def generate(folder: Path) -> None:
    import ml_dtypes
    import numpy as np
    import safetensors.numpy

    d, f, layers, heads, kv_heads, h, vocab = 2048, 8192, 16, 32, 8, 64, 32000
    folder.mkdir(parents=True)
    card = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": d,
        "intermediate_size": f, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": h, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": True, "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(card))
    noise = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32) * 0.02

    def weight(*shape: int):
        return np.resize(noise, shape).astype(ml_dtypes.bfloat16)

    where = {}
    for part in range(4):
        tensors = {}
        for layer in range(part * layers // 4, (part + 1) * layers // 4):
            name = f"model.layers.{layer}."
            for which, shape in (
                ("input_layernorm", (d,)), ("post_attention_layernorm", (d,)), ("self_attn.q_proj", (heads * h, d)),
                ("self_attn.k_proj", (kv_heads * h, d)), ("self_attn.v_proj", (kv_heads * h, d)),
                ("self_attn.o_proj", (d, heads * h)), ("mlp.gate_proj", (f, d)), ("mlp.up_proj", (f, d)),
                ("mlp.down_proj", (d, f)),
            ):  # fmt: skip
                tensors[f"{name}{which}.weight"] = weight(*shape)
        if part == 0:
            tensors["model.embed_tokens.weight"] = weight(vocab, d)
        if part == 3:
            tensors["model.norm.weight"] = weight(d)
        file = f"model-{part + 1:05d}-of-00004.safetensors"
        safetensors.numpy.save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def resident() -> float:
    """GiB of this process, mapped files included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 2**20


class Peak:
    """The most that was resident inside the block, GiB."""

    def __enter__(self):
        self.start = self.most = resident()
        self.seconds, self._done, self._began = 0.0, threading.Event(), time.perf_counter()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.wait(0.005):
            self.most = max(self.most, resident())

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self._began


def measure(folder: Path, param_dtype: str) -> dict:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    import numpy as np

    from jrlhf.config import MeshConfig
    from jrlhf.models.hf import load_hf, save_hf
    from jrlhf.sharding import make_mesh, state_shardings

    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    jax.device_put(np.zeros(8)).block_until_ready()  # the runtime itself is not to be counted
    with jax.set_mesh(mesh):
        placed = lambda m: state_shardings(  # noqa: E731
            mesh, jax.eval_shape(m.init, jax.random.key(0)), m.logical_axes()
        )
        with Peak() as read:
            model, params = load_hf(folder, shardings=placed, param_dtype=param_dtype)
            jax.block_until_ready(params)
    leaves = jax.tree.leaves(params)
    owned = sum(s.data.nbytes for x in leaves for s in x.addressable_shards) / 2**30
    largest = max(x.nbytes for x in leaves) / 2**30
    excess = read.most - read.start - owned
    with Peak() as written:
        save_hf(folder.parent / "saved", model, params, max_shard_bytes=600_000_000, overwrite=True)
    return {
        "param_dtype": param_dtype,
        "parameters": sum(x.size for x in leaves),
        "owned_gib": round(owned, 2),
        "largest_parameter_gib": round(largest, 2),
        "read_peak_beyond_owned_gib": round(excess, 2),
        "read_peak_over_largest": round(excess / largest, 2),
        "limit": LIMIT,
        "read_seconds": round(read.seconds, 1),
        "write_peak_gib": round(written.most - written.start, 2),
        "write_seconds": round(written.seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="scratch space; the checkpoint there is used again")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help=argparse.SUPPRESS)  # one measurement
    args = parser.parse_args()
    if args.dtype:
        print(json.dumps(measure(args.folder, args.dtype)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.folder or Path(scratch)) / "llama"
        if not folder.exists():
            generate(folder)
        results = []
        for dtype in ("bfloat16", "float32"):  # each in a process of its own: peaks do not mix
            command = [sys.executable, __file__, "--folder", str(folder), "--dtype", dtype]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results.append(json.loads(out.splitlines()[-1]))
    import jax

    report = {"machine": f"{platform.machine()}, CPU", "jax": jax.__version__, "results": results}
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    if any(r["read_peak_over_largest"] > LIMIT for r in results):
        sys.exit(f"over the limit of {LIMIT}")


if __name__ == "__main__":
    main()
