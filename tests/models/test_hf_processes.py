"""A checkpoint written and read by two processes, each with half of the devices, is that of one process."""

from pathlib import Path

import jax
import numpy as np
from helpers import two_processes
from safetensors.numpy import load_file

from jrlhf.models.hf import load_hf, save_hf

REPOSITORY = Path(__file__).resolve().parent.parent.parent
GOLDEN = REPOSITORY / "tests" / "golden" / "hf"
SHARD = 4000  # bytes, so that there are many shards of several tensors

# Reads a checkpoint of a mixture of experts over a mesh of both processes and writes it again; what each process
# reads back, it compares with its parts of what was read first. Process 0, which puts the folder in its place, is slow.
_ONE_OF_TWO = """
import sys, time
from pathlib import Path
import jax
import numpy as np
from jrlhf.config import MeshConfig
from jrlhf.models import hf
process, port, source, target = int(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4])
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("localhost:" + port, 2, process)
from jrlhf.sharding import make_mesh, state_shardings
mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
placed = lambda m: state_shardings(mesh, jax.eval_shape(m.init, jax.random.key(0)), m.logical_axes())
if process == 0:
    rename = hf.os.rename
    hf.os.rename = lambda a, b: (time.sleep(0.5), rename(a, b))
written = []
write = hf.safetensors.numpy.save_file
def note(tensors, path, metadata):
    written.append(Path(path).name)
    write(tensors, path, metadata)
hf.safetensors.numpy.save_file = note
model, params = hf.load_hf(source, shardings=placed)
assert not params["embed"]["embedding"].is_fully_addressable
hf.save_hf(target, model, params, max_shard_bytes=int(sys.argv[5]))
print("wrote", *written)
again, read = hf.load_hf(target, shardings=placed)
assert again == model
for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(read), strict=True):
    for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True):
        np.testing.assert_array_equal(a.data, b.data)
"""


def test_two_processes_write_the_bytes_of_one(tmp_path):
    source = GOLDEN / "mixtral"
    one, two = tmp_path / "one", tmp_path / "two"
    model, params = load_hf(source)
    save_hf(one, model, params, max_shard_bytes=SHARD)

    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    outputs = two_processes(_ONE_OF_TWO, str(source), str(two), str(SHARD), **cache)

    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    names = sorted(p.name for p in one.iterdir())
    assert sorted(p.name for p in two.iterdir()) == names
    for name in names:
        assert (two / name).read_bytes() == (one / name).read_bytes(), name

    shards = [name for name in names if name.endswith(".safetensors")]
    wrote = [next(line for line in o.splitlines() if line.startswith("wrote")).split()[1:] for o in outputs]
    assert sorted(wrote[0] + wrote[1]) == shards  # each file once
    assert min(map(len, wrote)) >= len(shards) // 2 > 1
    assert max(len(load_file(one / name)) for name in shards) > 1
    for name, x in load_file(source / "model.safetensors").items():
        file = next(s for s in shards if name in load_file(two / s))
        np.testing.assert_array_equal(load_file(two / file)[name], x)
