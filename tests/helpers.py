"""A tiny model that divides over every mesh, batches for it, and the way to take a train step on a mesh."""

import contextlib
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jrlhf.config import MeshConfig
from jrlhf.models.config import ModelConfig
from jrlhf.models.transformer import Model
from jrlhf.optim import Optimizer
from jrlhf.sharding import make_mesh, put_batch, state_shardings

TINY = ModelConfig(vocab_size=32, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24, context=64)
MODEL = Model(TINY)
SCALAR = Model(TINY, "scalar")
AXES = SCALAR.logical_axes() | MODEL.logical_axes()
MESHES = {
    "data": MeshConfig(8, 1, 1),
    "all": MeshConfig(2, 2, 2),
    "long": MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
}

# Plain descent at rate 1: the parameters before a step less those after it are its gradient.
DESCENT = Optimizer(optax.sgd(1.0), lambda updates: jnp.float32(1.0), None)


@functools.cache
def fake_params(model: Model, seed: int = 0) -> Any:
    """Random parameters by NumPy: compiling the real initialiser takes longer than most tests. They are larger
    than fresh ones, which predict all tokens alike and would hide mistakes."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        spread = {"scale": 0.2, "bias": 0.2, "embedding": 0.4}.get(name, model.config.d_model**-0.5)
        offset = 1.0 if name == "scale" else 0.0
        return jnp.asarray(offset + spread * rng.standard_normal(shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


def lm_params(seed: int = 0) -> Any:
    return fake_params(MODEL, seed)


def scalar_params(seed: int = 1) -> Any:
    return fake_params(SCALAR, seed)


def assert_close(a: Any, b: Any, atol: float = 1e-5, rtol: float = 1e-5) -> None:
    """Two trees are equal within a tolerance, and none of it is NaN."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=atol, rtol=rtol, err_msg=where)
        assert np.all(np.isfinite(np.asarray(x, np.float32))), where


def largest_difference(a: Any, b: Any) -> float:
    gaps = jax.tree.map(lambda x, y: float(np.max(np.abs(np.asarray(x) - np.asarray(y)))), a, b)
    return max(jax.tree.leaves(gaps))


class Step(NamedTuple):
    """What one train step did."""

    state: Any  # on its devices
    params: Any  # on the host
    gradient: Any  # parameters before less those after: the gradient, under DESCENT
    metrics: dict  # on the host
    hlo: str  # the compiled program's text


_compiled: dict = {}  # programs by what they were compiled of: tests share them


def one_step(algorithm, init_args: tuple, batch: Any, mesh: str | None = None) -> Step:
    """A compiled train step on one device, or with state and batch split over one of MESHES.

    Pass the same algorithm again (not another one made alike), and it is not compiled again.
    """
    state = algorithm.init(*init_args)
    before = jax.device_get(state.params)
    if mesh is None:
        context = contextlib.nullcontext()
    else:
        devices = make_mesh(MESHES[mesh])
        state = jax.device_put(state, state_shardings(devices, state, AXES))
        batch = put_batch(devices, jax.device_get(batch))
        context = jax.set_mesh(devices)
    shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves((state, batch)))
    key = (algorithm.train_step, mesh, jax.tree.structure((state, batch)), shapes)
    with context:
        if key not in _compiled:
            _compiled[key] = jax.jit(algorithm.train_step).lower(state, batch).compile()
        state, metrics = _compiled[key](state, batch)
    params, metrics = jax.device_get((state.params, metrics))
    gradient = jax.tree.map(lambda a, b: a - b, before, params)
    return Step(state, params, gradient, metrics, _compiled[key].as_text())


def two_processes(script: str, *arguments: str, **environment: str) -> list[str]:
    """Runs `script` as processes 0 and 1, with its number, a free port and `arguments`: what each of them printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(n), port, *arguments],
            cwd=Path(__file__).resolve().parent.parent,
            env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs
