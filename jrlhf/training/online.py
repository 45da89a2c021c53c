"""The driver for algorithms that learn from their own samples: prompts -> rollout -> reward -> update."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrlhf.config import StageContext
from jrlhf.data.batching import Batches, EasyFirst
from jrlhf.data.curation import Curriculum
from jrlhf.ops.on_policy import OnPolicyConfig, reference_params, shaped_scores
from jrlhf.sharding import check_batch, fetch, put_batch
from jrlhf.training.data import BatchFeed
from jrlhf.training.evaluation import Sampler
from jrlhf.training.loop import LoopConfig, guarded, sharded_state, train
from jrlhf.training.monitors import Monitor
from jrlhf.training.rewards import Reward, Texts, read_texts, repeat_rate, score_metrics
from jrlhf.types import Algorithm, Array, Rollout, Scores, TrainState


class Scored(NamedTuple):
    """Answers and their rewards; texts only where a program reads them."""

    samples: Rollout
    scores: Scores  # of B answers
    texts: Texts | None


def train_online(
    ctx: StageContext,
    mesh: Mesh,
    loop: LoopConfig,
    config: OnPolicyConfig,
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
    monitor: Monitor | None = None,
    curriculum: Curriculum | None = None,
) -> TrainState:
    """One iteration: `batch_size` responses (`group_size` to each prompt), their rewards, and the algorithm's update.

    watch: rewards that are only logged (a held-out reward model, the gold reward of a laboratory). ptx: arrays of
    pretraining text, of which each iteration takes one row per response. monitor: may end training early.
    curriculum: which prompts come when.

    Everything drawn depends on (key, number of the round) alone; without resampling an iteration is one round. With
    it, the number of rounds so far is saved with each checkpoint.
    """
    check_batch(mesh, loop.batch_size, "loop.batch_size")
    template, make_state, frozen = sharded_state(mesh, axes, algorithm.init, *start)
    if algorithm.make_batch is None:
        raise ValueError("this algorithm learns from a dataset: it has no make_batch")
    make_batch = jax.jit(algorithm.make_batch)
    step = jax.jit(guarded(algorithm.train_step, loop), donate_argnums=0)
    asked = loop.batch_size // config.group_size  # prompts of a round
    batches: Batches | EasyFirst = Batches(len(ids), asked, ctx.seed)
    if curriculum is not None:
        batches = EasyFirst(curriculum.difficulty(rows), asked, ctx.seed, curriculum.share)
    text_feed = BatchFeed(ptx, loop.batch_size, ctx.seed, mesh) if ptx is not None else None
    need_text = reward.needs_text or any(w.needs_text for w in watch)
    greedy = (
        replace(sampler, config=replace(sampler.config, temperature=0.0)) if config.greedy_baseline else None
    )
    shaped = jax.jit(partial(shaped_totals, config))
    rounds = 0  # of sampling so far

    def answers(state: TrainState, number: int, sampler: Sampler, dispatched: Callable[[], None]) -> Scored:
        """Of one round: a batch of prompts, their answers by the current policy, and the rewards."""
        of_round = batches.indices(number)
        index = [i for i in of_round for _ in range(config.group_size)]
        if config.sample_from == "reference":
            model, params = sampler.model.base, reference_params(state._replace(ref_params=frozen))
        else:
            model, params = sampler.model, sampler.model.whole(state.params["policy"], frozen)
        sampler = replace(sampler, model=model)
        draw = jax.random.fold_in(key, number)
        samples = sampler.draw(params, [ids[i] for i in of_round], draw, config.group_size)
        dispatched()
        # A program reads the text on the host, a reward model stays on the devices.
        texts = read_texts(samples, [rows[i] for i in index], sampler.tokenizer) if need_text else None
        return Scored(samples, reward.score(samples, texts), texts)

    def do_step(state: TrainState, n: int, finish: Callable[[], None]):
        nonlocal rounds
        began = 0.0

        def dispatched() -> None:
            # The rollout follows the update of the step before; from here on the time is its own.
            nonlocal began
            finish()
            began = began or time.perf_counter()

        # 1. Prompts, responses to each by the current policy, and their rewards.
        if config.resample_rounds:
            draw = lambda number: answers(state, number, sampler, dispatched)  # noqa: E731
            scored, used, extra = resampled(draw, rounds, config, loop.batch_size, mesh)
        else:
            scored, used, extra = answers(state, rounds, sampler, dispatched), 1, {}
        samples, scores, texts = scored
        rolled = time.perf_counter()
        extra |= score_metrics(reward.name, scores) | watched(samples, texts, scores.total, watch)
        if curriculum is not None:
            extra["rollout/competence"] = curriculum.share(rounds)
        if reward.trained_on is not None:
            extra["reward/out_of_range"] = share_outside(scores.total, reward.trained_on)
        # 2. What else the algorithm wants.
        more = (text_feed(n),) if text_feed is not None else ()
        if greedy is not None:
            baseline = answers(state, rounds, greedy, dispatched)
            extra["reward/greedy/mean"] = jnp.mean(baseline.scores.total)
            more = (shaped(baseline.samples, baseline.scores),)
        rounds += used
        # 3. Advantages, then all epochs and minibatches of the update in one compiled call.
        earned = {} if scores.tokens is None else {"token_rewards": scores.tokens}
        batch = make_batch(state._replace(ref_params=frozen), samples, scores.values, *more, **earned)
        state, metrics = step(state, frozen, batch)
        if texts is not None:  # the host has waited for the rollout, so that its time is known
            extra["time/rollout"] = rolled - began
            sampled = sum(map(len, texts.ids)) * used  # about: the rounds' answers are alike in length
            extra["perf/tokens_per_s_rollout"] = sampled / (rolled - began)
        return state, metrics | extra, batch

    def resume(position: dict) -> None:
        nonlocal rounds
        rounds = position.get("rounds", position["step"])  # without resampling a step is a round

    try:
        return train(
            ctx, loop, loop.steps, template, make_state, do_step, evaluate, show,
            lambda n: {"step": n, "rounds": rounds}, resume, monitor,
        )  # fmt: skip
    finally:
        if text_feed is not None:
            text_feed.close()


def resampled(
    draw: Callable[[int], Scored], first: int, config: OnPolicyConfig, size: int, mesh: Mesh
) -> tuple[Scored, int, dict]:
    """Dynamic sampling (DAPO, Yu et al. 2025, section 3.2): rounds of fresh prompts until `size` answers are in
    groups whose scores differ, at most `resample_rounds` of them. (the batch, rounds used, metrics)

    Where even that is too little, groups of equal scores fill the batch; `reward/frac_zero_std_groups` tells.
    """
    useful: list[Scored] = []
    useless: list[Scored] = []
    seen, means = 0, []
    for used in range(1, config.resample_rounds + 1):
        samples, scores, texts = draw(first + used - 1)
        samples, scores = fetch((samples, scores))
        groups = scores.total.reshape(-1, config.group_size)
        differ = np.repeat(groups.max(axis=1) > groups.min(axis=1), config.group_size)
        means.append(float(np.mean(scores.total)))
        for kept, into in ((differ, useful), (~differ, useless)):
            into.append(take_scored(Scored(samples, scores, texts), np.flatnonzero(kept)))
        seen += int(differ.sum())
        if seen >= size:
            break
    samples, scores, texts = take_scored(joined([*useful, *useless]), np.arange(size))
    metrics = {
        "rollout/rounds": used,
        "rollout/informative": seen / (used * size),
        "reward/sampled/mean": float(np.mean(means)),
    }
    return Scored(put_batch(mesh, samples), put_batch(mesh, scores), texts), used, metrics


def take_scored(scored: Scored, index: np.ndarray) -> Scored:
    """The numbered answers, on the host."""
    texts = None
    if scored.texts is not None:
        texts = Texts._make([part[i] for i in index] for part in scored.texts)
    take = lambda x: x[index]  # noqa: E731
    return Scored(jax.tree.map(take, scored.samples), jax.tree.map(take, scored.scores), texts)


def joined(parts: list[Scored]) -> Scored:
    together = lambda *x: jax.tree.map(lambda *leaves: np.concatenate(leaves), *x)  # noqa: E731
    texts = [p.texts for p in parts if p.texts is not None]
    whole = lambda column: [x for part in texts for x in getattr(part, column)]  # noqa: E731
    merged = Texts._make(map(whole, Texts._fields)) if texts else None
    return Scored(together(*[p.samples for p in parts]), together(*[p.scores for p in parts]), merged)


def shaped_totals(config: OnPolicyConfig, samples: Rollout, scores: Scores) -> jax.Array:
    """[B]: what answers earn in all, as `score_rollout` pays it: clip and penalties are of the values alone."""
    values = jnp.asarray(scores.values)
    return shaped_scores(config, samples, values) + (scores.total - values)


def watched(samples, texts: Texts | None, scores, watch: list[Reward]) -> dict:
    """Rewards that are logged and not learned from, and what only text can tell. Scores on the devices stay there."""
    metrics: dict[str, Any] = {}
    for n, reward in enumerate(watch):
        said = reward.score(samples, texts)
        beside = compared(scores, said.total)
        metrics |= score_metrics(reward.name, said, f"{reward.name}.")
        metrics |= {f"reward/{reward.name}/{what}": beside[what] for what in ("mean", "std", "corr")}
        if n == 0:
            metrics["reward/gold_proxy_gap"] = beside["gap"]
    if texts is not None:
        metrics["rollout/repeat_rate"] = repeat_rate(texts.ids)
    return metrics


@jax.jit
def compared(scores: Array, others: Array) -> dict[str, jax.Array]:
    """Of another reward of the same answers, [B] each: its mean and std, its correlation with the scores, and how much
    higher these are."""
    scores, others = jnp.asarray(scores, jnp.float32), jnp.asarray(others, jnp.float32)
    mean, std = jnp.mean(others), jnp.std(others)
    covariance = jnp.mean((scores - jnp.mean(scores)) * (others - mean))
    return {
        "mean": mean,
        "std": std,
        "corr": covariance / jnp.maximum(jnp.std(scores) * std, 1e-8),
        "gap": jnp.mean(scores) - mean,
    }


@jax.jit
def share_outside(scores: Array, bounds: tuple[float, float]) -> jax.Array:
    """Share of scores [B] below the first bound or above the second."""
    low, high = bounds
    return jnp.mean((scores < low) | (scores > high), dtype=jnp.float32)
