"""The driver for algorithms that learn from a dataset: pretraining, SFT, reward models, DPO."""

import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jrlhf.config import StageContext
from jrlhf.sharding import check_batch
from jrlhf.training.data import BatchFeed, SizedFeed, StreamFeed
from jrlhf.training.loop import LoopConfig, Phases, guarded, sharded_state, train
from jrlhf.training.utilisation import StepFlops, counted
from jrlhf.types import Algorithm, TrainState


def train_offline(
    ctx: StageContext,
    mesh: Mesh,
    loop: LoopConfig,
    steps: int,
    algorithm: Algorithm,
    start: tuple,
    axes: dict,
    arrays: Any,  # or a feed of batches
    evaluate: Callable[[TrainState, int], dict] | None = None,
    show: tuple[str, ...] = ("train/loss",),
    flops: Callable[[Any], StepFlops] | None = None,
    peak: float = 0.0,
) -> TrainState:
    """Train on `arrays` (leading axis rows, in memory), packed or not, or on a stream, for `steps` batches.

    start: arguments of `algorithm.init`. axes: the model's logical axes. Batches of arrays, and so the position in
    the data, are a pure function of (seed, step); a stream's position is saved with each checkpoint. Where batches have
    several shapes, the step is compiled for all of them first, so that no late one is slow or does not fit. flops: what
    a batch needs; peak: FLOP/s of the devices.
    """
    check_batch(mesh, loop.batch_size, "loop.batch_size")
    template, make_state, frozen = sharded_state(
        mesh, axes, algorithm.init, *start,
        offload_optimizer=loop.offload_optimizer, offload_reference=loop.offload_reference,
    )  # fmt: skip
    step = jax.jit(guarded(counted(algorithm.train_step, flops), loop), donate_argnums=0)
    feed: BatchFeed | StreamFeed
    where: dict[str, Any] = {}
    if isinstance(arrays, StreamFeed):
        feed = arrays
        where = {"position": lambda n: arrays.position, "resume_position": arrays.restore}
    elif isinstance(arrays, BatchFeed):
        feed = arrays
    else:
        feed = BatchFeed(arrays, loop.batch_size, ctx.seed, mesh)

    if isinstance(feed, SizedFeed):
        for shapes in feed.shapes():
            step.lower(template, frozen, shapes).compile()

    def do_step(state: TrainState, n: int, finish: Callable[[], None]):
        phases = Phases(loop, n, state, finish)
        began = time.perf_counter()
        batch = feed(n)
        waited = {"time/data": time.perf_counter() - began}
        phases.end("data", batch)
        state, metrics = step(state, frozen, batch)
        phases.end("update", (state, metrics))
        return state, metrics | waited | phases.metrics, batch

    try:
        return train(ctx, loop, steps, template, make_state, do_step, evaluate, show, peak=peak, **where)
    finally:
        feed.close()
