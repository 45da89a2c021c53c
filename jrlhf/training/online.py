"""The driver for algorithms that learn from their own samples: prompts -> rollout -> reward -> update."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jrlhf.config import StageContext
from jrlhf.data.batching import Batches, EasyFirst
from jrlhf.data.curation import Curriculum
from jrlhf.hosts import WAITS
from jrlhf.models.transformer import Model
from jrlhf.ops.on_policy import OnPolicyConfig, reference_params, shaped_scores
from jrlhf.sharding import (
    DEVICE,
    batch_sharding,
    check_batch,
    fetch,
    placed,
    put_batch,
    replicated,
    state_shardings,
)
from jrlhf.training.data import BatchFeed
from jrlhf.training.evaluation import Sampler
from jrlhf.training.loop import LoopConfig, Phases, fetched, guarded, sharded_state, train
from jrlhf.training.monitors import Monitor
from jrlhf.training.rewards import Reward, Texts, read_texts, repeat_rate, score_metrics
from jrlhf.training.utilisation import OnlineFlops, counted, peak_flops
from jrlhf.types import Algorithm, Array, Params, Rollout, Scores, TrainState

# "one_step": the answers of an iteration are drawn by the policy before the update of the iteration before.
Overlap = Literal["none", "one_step"]
AHEAD = "ahead"  # in `TrainState.extra` between two iterations: answers drawn for the next one


class Drawn(NamedTuple):
    """Answers on the devices that sampled them, not yet scored."""

    samples: Rollout
    greedy: Rollout | None  # greedy answers to the same prompts, where these are the baseline


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
    overlap: Overlap = "none",
    sampling_mesh: Mesh | None = None,
    critic: Model | None = None,
) -> TrainState:
    """One iteration: `batch_size` responses (`group_size` to each prompt), their rewards, and the algorithm's update.

    watch: rewards that are only logged (a held-out reward model, the gold reward of a laboratory). ptx: arrays of
    pretraining text, of which each iteration takes one row per response. monitor: may end training early.
    curriculum: which prompts come when. sampling_mesh: of devices that only sample, none of which is in `mesh`, or
    another mesh of the same devices (`sharding.reshaped`). critic: the algorithm's, where it is a model of its own.

    Everything drawn depends on (key, number of the round) alone; without resampling an iteration is one round. With
    it, the number of rounds so far is saved with each checkpoint.

    Nothing here waits for the devices but a program that reads text. With `overlap` it reads the answers of iteration
    n while the devices run the update before and draw the answers of n + 1, by the policy that n has not updated yet.
    Those are a part of the state between iterations, so that checkpoints hold them.
    """
    check_batch(mesh, loop.batch_size, "loop.batch_size")
    template, make_state, frozen = sharded_state(
        mesh, axes, algorithm.init, *start,
        offload_optimizer=loop.offload_optimizer, offload_reference=loop.offload_reference,
    )  # fmt: skip
    flops = OnlineFlops(sampler.model, critic, config)
    algorithm = algorithm._replace(train_step=counted(algorithm.train_step, flops.of_update))
    make_batch, step = online_programs(algorithm, loop)
    asked = loop.batch_size // config.group_size  # prompts of a round
    batches: Batches | EasyFirst = Batches(len(ids), asked, ctx.seed)
    if curriculum is not None:
        batches = EasyFirst(curriculum.difficulty(rows), asked, ctx.seed, curriculum.share)
    text_feed = BatchFeed(ptx, loop.batch_size, ctx.seed, mesh) if ptx is not None else None
    need_text = reward.needs_text or any(w.needs_text for w in watch)
    from_policy = config.sample_from == "policy"
    sampler = sampler if from_policy else replace(sampler, model=sampler.model.base)
    draw_on = Drawing(sampler, mesh, sampling_mesh, axes)
    shaped = jax.jit(partial(shaped_totals, config))
    rounds = 0  # of sampling so far
    if overlap == "one_step":
        shapes = shapes_ahead(loop, config, sampler, draw_on.sharding)
        template = template._replace(extra=template.extra | {AHEAD: shapes})

    def draw(state: TrainState, number: int) -> Drawn:
        """Of one round: answers to a batch of prompts by the policy as it is in `state`."""
        if from_policy:
            params = draw_on.whole(state.params["policy"], frozen)
        else:
            params = draw_on.sent(placed(reference_params(state._replace(ref_params=frozen)), DEVICE))
        prompts = [ids[i] for i in batches.indices(number)]
        drawn = partial(draw_on, params, prompts, jax.random.fold_in(key, number), config.group_size)
        return Drawn(drawn(), drawn(greedy=True) if config.greedy_baseline else None)

    def scored(drawn: Rollout, number: int, phases: Phases) -> Scored:
        index = [i for i in batches.indices(number) for _ in range(config.group_size)]
        samples = draw_on.back(drawn)
        # A program reads the text on the host, a reward model stays on the devices. (Text is read where it was drawn:
        # what comes back does so after the update that is under way.)
        if need_text:
            with WAITS:
                jax.block_until_ready(drawn)
        texts = read_texts(drawn, [rows[i] for i in index], sampler.tokenizer) if need_text else None
        phases.end("rollout", samples, need_text and overlap == "none")
        said = reward.score(samples, texts)
        phases.end("reward", said, reward.needs_text and overlap == "none")
        return Scored(samples, said, texts)

    def do_step(state: TrainState, n: int, finish: Callable[[], None]):
        nonlocal rounds
        extra: dict[str, Any] = {}
        phases = Phases(loop, n, state, finish)

        def dispatched() -> None:
            # The rollout follows the update of the step before; where the host waits for it, from here on the time is
            # this step's own. (With overlap it waits for what was drawn before that update.)
            if need_text and overlap == "none":
                finish()
            phases.begin()

        # 1. Prompts, responses to each by the current policy (or, with overlap, the one before), and their rewards.
        state, ahead = without_ahead(state)
        used, greedy = 1, None
        if config.resample_rounds:

            def of_round(number: int) -> Scored:
                drawn = draw(state, number)
                dispatched()
                return scored(drawn.samples, number, phases)

            (samples, scores, texts), used, extra = resampled(of_round, rounds, config, loop.batch_size, mesh)
        else:
            drawn = ahead or draw(state, rounds)
            if overlap == "one_step":
                extra["rollout/staleness"] = float(ahead is not None and from_policy)
                ahead = draw(state, rounds + 1) if n + 1 < loop.steps else None
            dispatched()
            phases.end("rollout", (drawn, ahead))
            samples, scores, texts = scored(drawn.samples, rounds, phases)
            greedy = drawn.greedy
        extra |= score_metrics(reward.name, scores) | watched(samples, texts, scores.total, watch)
        if curriculum is not None:
            extra["rollout/competence"] = curriculum.share(rounds)
        if reward.trained_on is not None:
            extra["reward/out_of_range"] = share_outside(scores.total, reward.trained_on)
        # 2. What else the algorithm wants.
        more = (text_feed(n),) if text_feed is not None else ()
        if greedy is not None:
            baseline = scored(greedy, rounds, phases)
            extra["reward/greedy/mean"] = jnp.mean(baseline.scores.total)
            more = (shaped(baseline.samples, baseline.scores),)
        rounds += used
        # 3. Advantages, then all epochs and minibatches of the update in one compiled call.
        earned = {} if scores.tokens is None else {"token_rewards": scores.tokens}
        batch = make_batch(state, frozen, samples, scores.values, *more, **earned)
        phases.end("make_batch", batch)
        state, metrics = step(state, frozen, batch)
        phases.end("update", (state, metrics))
        extra |= phases.metrics | flops.metrics(metrics, samples, used + (greedy is not None))
        if texts is not None and "time/rollout" in phases.metrics:
            sampled = sum(map(len, texts.ids)) * used  # about: the rounds' answers are alike in length
            extra["perf/tokens_per_s_rollout"] = sampled / phases.metrics["time/rollout"]
        if ahead is not None:
            state = state._replace(extra=state.extra | {AHEAD: ahead})
        return state, metrics | extra, batch

    meshes = [mesh] if sampling_mesh is None or not draw_on.away else [mesh, sampling_mesh]
    peaks = [peak_flops(m, sampler.model, *([critic] if critic else [])) for m in meshes]
    peak = sum(peaks) if all(peaks) else 0.0

    def resume(position: dict) -> None:
        nonlocal rounds
        rounds = position.get("rounds", position["step"])  # without resampling a step is a round

    try:
        state = train(
            ctx, loop, loop.steps, template, make_state, do_step, evaluate, show,
            lambda n: {"step": n, "rounds": rounds}, resume, monitor, peak,
        )  # fmt: skip
    finally:
        if text_feed is not None:
            text_feed.close()
    return without_ahead(state)[0]


def online_programs(algorithm: Algorithm, loop: LoopConfig) -> tuple[Any, Any]:
    """(make_batch, train_step) of an on-policy algorithm, compiled when called:
    `(state, frozen, rollout, scores, ...) -> batch` and `(state, frozen, batch) -> (state, metrics)`."""
    batch_of = algorithm.make_batch
    if batch_of is None:
        raise ValueError("this algorithm learns from a dataset: it has no make_batch")

    @jax.jit
    def make_batch(state: TrainState, frozen: Any, *rollout: Any, **earned: Any) -> Any:
        return batch_of(state._replace(ref_params=fetched(frozen, loop)), *rollout, **earned)

    return make_batch, jax.jit(guarded(algorithm.train_step, loop), donate_argnums=0)


def without_ahead(state: TrainState) -> tuple[TrainState, Drawn | None]:
    """The algorithm's own state, and what was drawn for the next iteration."""
    extra = dict(state.extra)
    ahead = extra.pop(AHEAD, None)
    return state._replace(extra=extra), ahead


def shapes_ahead(
    loop: LoopConfig, config: OnPolicyConfig, sampler: Sampler, sharding: NamedSharding
) -> Drawn:
    """Of what a checkpoint holds of the next iteration: shapes with shardings."""
    rows, slots, of_prompt = loop.batch_size, sampler.config.max_new_tokens, sampler.prompt_length

    def shape(dtype: Any, *size: int) -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    answers = Rollout(
        tokens=shape(jnp.int32, rows, of_prompt + slots),
        mask=shape(jnp.bool_, rows, of_prompt + slots),
        response_mask=shape(jnp.bool_, rows, slots),
        logprobs=shape(jnp.float32, rows, slots),
        ended=shape(jnp.bool_, rows),
    )
    return Drawn(answers, answers if config.greedy_baseline else None)


class Drawing:
    """Draws answers where they are to be drawn: on the trainer's own mesh, on another mesh of the same devices, or on
    other devices of the same process, to which parameters are sent and from which answers come back.

    On the same devices parameters are split anew by one program, and answers are left split as the trainer has them.

    Nothing waits. Between different devices arrays are copied from device to device, for which each device must hold
    the part that another one wants: parameters are gathered first (but for `tensor`, as the sampler wants them anyhow).
    Answers stay where they were drawn until they are asked back: the trainer's programs run in the order in which they
    were dispatched, so that an update behind their return would wait for them.
    """

    def __init__(self, sampler: Sampler, mesh: Mesh, sampling_mesh: Mesh | None, axes: dict):
        self._mesh, self._to, self._axes = mesh, sampling_mesh, axes
        self.away = sampling_mesh is not None and sampling_mesh.devices.flat[0] not in mesh.devices
        self._model, self._sampler = sampler.model, replace(sampler, mesh=sampling_mesh or mesh)
        self._greedy = replace(self._sampler, config=replace(sampler.config, temperature=0.0))
        self._send: Callable[[Params], Params] | None = None
        self._base: Params | None = None  # beside adapters: it never changes, and is sent once
        # Of answers, as they are drawn and as a checkpoint restores them: a resumed run then does the same sums.
        self.sharding = replicated(sampling_mesh) if sampling_mesh and self.away else batch_sharding(mesh)
        self._place = jax.jit(lambda x: x, out_shardings=self.sharding)
        self._split = jax.jit(lambda x: x, out_shardings=batch_sharding(mesh))
        self._key = jax.jit(lambda x: x, out_shardings=replicated(sampling_mesh or mesh))

    def whole(self, trained: Params, frozen: Params | None) -> Params:
        """Parameters of the policy, where it samples."""
        if self._to is not None and self._model.config.lora.rank:
            self._base = self._base or self._sender(self._to, frozen)(frozen)
            frozen = self._base
        return self._model.whole(self.sent(trained), frozen)

    def sent(self, params: Params) -> Params:
        if self._to is None:
            return params
        self._send = self._send or self._sender(self._to, params)
        return self._send(params)

    def _sender(self, to: Mesh, like: Params) -> Callable[[Params], Params]:
        there = state_shardings(to, like, self._axes)
        if not self.away:
            return jax.jit(partial(in_decode_dtype, self._model), out_shardings=there)
        whole = lambda s: NamedSharding(self._mesh, P(*[a if a == "tensor" else None for a in s.spec]))  # noqa: E731
        gather = jax.jit(partial(in_decode_dtype, self._model), out_shardings=jax.tree.map(whole, there))
        return lambda params: jax.device_put(gather(params), there)

    def __call__(
        self, params: Params, prompts: list[list[int]], key: jax.Array, group: int, greedy: bool = False
    ) -> Rollout:
        sampler = self._greedy if greedy else self._sampler
        if self._to is None:
            return self._place(sampler.draw(params, prompts, key, group))
        key = jax.device_put(key, replicated(self._to)) if self.away else self._key(key)
        with jax.set_mesh(self._to):
            return self._place(sampler.draw(params, prompts, key, group))

    def back(self, drawn: Rollout) -> Rollout:
        """On the trainer's mesh, split over the batch."""
        if not self.away:
            return drawn
        return self._split(jax.device_put(drawn, replicated(self._mesh)))


def in_decode_dtype(model: Model, params: Params) -> Params:
    """With layers in the dtype that decoding rounds them to: there is less to send."""
    like = jax.eval_shape(model.decode_params, params)["layers"][0]
    layers = jax.tree.map(lambda x, y: x.astype(y.dtype), params["layers"], like)
    return params | {"layers": layers}


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
