"""The driver for algorithms that learn from their own samples: prompts -> rollout -> reward -> update."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jrlhf.config import StageContext
from jrlhf.data.batching import Batches
from jrlhf.rollout.rollout import rollout
from jrlhf.sharding import check_batch, fetch
from jrlhf.training.data import BatchFeed
from jrlhf.training.evaluation import Sampler
from jrlhf.training.loop import LoopConfig, guarded, sharded_state, train
from jrlhf.training.rewards import Reward, Texts, read_texts, repeat_rate
from jrlhf.types import Algorithm, TrainState


def train_online(
    ctx: StageContext,
    mesh: Mesh,
    loop: LoopConfig,
    algorithm: Algorithm,
    start: tuple,
    axes: dict,
    sampler: Sampler,
    rows: list[dict],
    ids: list[list[int]],
    reward: Reward,
    watch: list[Reward],
    key: jax.Array,
    ptx: Any = None,
    evaluate: Callable[[TrainState, int], dict] | None = None,
    show: tuple[str, ...] = ("reward/score/mean", "kl/ref_k1"),
) -> TrainState:
    """One iteration: `batch_size` prompts, a response each, their rewards, and the algorithm's update.

    watch: rewards that are only logged (the gold reward of a laboratory). ptx: arrays of pretraining text, of which
    each iteration takes one row per prompt. Everything drawn depends on (key, step) alone.
    """
    check_batch(mesh, loop.batch_size, "loop.batch_size")
    template, make_state, frozen = sharded_state(mesh, axes, algorithm.init, *start)
    if algorithm.make_batch is None:
        raise ValueError("this algorithm learns from a dataset: it has no make_batch")
    make_batch = jax.jit(algorithm.make_batch)
    step = jax.jit(guarded(algorithm.train_step, loop), donate_argnums=0)
    batches = Batches(len(ids), loop.batch_size, ctx.seed)
    text_feed = BatchFeed(ptx, loop.batch_size, ctx.seed, mesh) if ptx is not None else None
    need_text = reward.needs_text or any(w.needs_text for w in watch)

    def do_step(state: TrainState, n: int, finish: Callable[[], None]):
        index = batches.indices(n)
        # 1. Prompts and one response to each, by the current policy.
        prompts = sampler.put_prompts([ids[i] for i in index])
        policy = sampler.model.whole(state.params["policy"], frozen)
        samples = rollout(sampler.model, policy, prompts, jax.random.fold_in(key, n), sampler.sampling)
        finish()  # dispatched, the rollout follows the update of the step before; from here on the time is its own
        began = time.perf_counter()
        # 2. Rewards: a program reads the text on the host, a reward model stays on the devices.
        texts = read_texts(samples, [rows[i] for i in index], sampler.tokenizer) if need_text else None
        rolled = time.perf_counter()
        scores = reward.score(samples, texts)
        extra = watched(samples, texts, scores, watch)
        # 3. Advantages, then all epochs and minibatches of the update in one compiled call.
        text = (text_feed(n),) if text_feed is not None else ()
        batch = make_batch(state._replace(ref_params=frozen), samples, scores, *text)
        state, metrics = step(state, frozen, batch)
        if texts is not None:  # the host has waited for the rollout, so that its time is known
            extra["time/rollout"] = rolled - began
            extra["perf/tokens_per_s_rollout"] = sum(map(len, texts.ids)) / (rolled - began)
        return state, metrics | extra, batch

    try:
        return train(ctx, loop, loop.steps, template, make_state, do_step, evaluate, show)
    finally:
        if text_feed is not None:
            text_feed.close()


def watched(samples, texts: Texts | None, scores, watch: list[Reward]) -> dict:
    """Rewards that are logged and not learned from, and what only text can tell."""
    metrics = {}
    for reward in watch:
        values = np.asarray(fetch(reward.score(samples, texts)))
        metrics[f"reward/{reward.name}/mean"] = float(np.mean(values))
        metrics[f"reward/{reward.name}/std"] = float(np.std(values))
    if watch:
        metrics["reward/gold_proxy_gap"] = (
            float(np.mean(fetch(scores))) - metrics[f"reward/{watch[0].name}/mean"]
        )
    if texts is not None:
        metrics["rollout/repeat_rate"] = repeat_rate(texts.ids)
    return metrics
