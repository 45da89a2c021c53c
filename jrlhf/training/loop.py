"""The loop under both drivers: resume, run steps, log, evaluate, save, stop. All side effects of training are here.

Order within step n: its metrics are written, then its evaluation, then its checkpoint. A run killed anywhere goes on
from the last checkpoint; what was logged after it is removed and written again, with the same values.
"""

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrlhf import hosts, remote
from jrlhf.checkpoint import Checkpointer
from jrlhf.config import Preempted, StageContext, UserError, did_you_mean, no_fingerprint
from jrlhf.metrics import MetricLogger, progress
from jrlhf.sharding import HOST, fetch, leads, moved, on_host, path_names, placed, state_shardings
from jrlhf.training.monitors import Monitor, Snapshots
from jrlhf.training.profiling import PROFILING
from jrlhf.types import TrainState


@dataclass(frozen=True)
class LoopConfig:
    """How long to train and what to keep. Give `steps` or `epochs`, not both."""

    steps: int = 0  # train steps
    epochs: float = 0.0  # passes over the data
    batch_size: int = 128  # rows of a step, over all devices and hosts
    eval_every: int = 0  # steps between evaluations; 0: only after the last
    on_nonfinite: Literal["stop", "skip"] = "stop"  # a NaN or infinite loss: stop, or leave out that update
    # The optimiser's state lies in the host's memory between steps; each moves it whole, there and back
    offload_optimizer: bool = no_fingerprint(False)
    # The frozen reference lies in the host's memory, and is moved whole to where it is read
    offload_reference: bool = no_fingerprint(False)
    checkpoint_every: int = no_fingerprint(100)  # steps between checkpoints; 0: only when asked to stop
    keep_last: int = no_fingerprint(2)
    keep_best: str = no_fingerprint("")  # a metric: the checkpoint at which it was best is kept as well
    best_mode: Literal["max", "min"] = no_fingerprint("max")
    # Every so many steps one whose phases are timed apart: the host waits for the devices after each, so that this
    # step is slower than others. 0: none
    breakdown_every: int = no_fingerprint(0)

    def __post_init__(self):
        if (self.steps > 0) == (self.epochs > 0) or self.steps < 0 or self.epochs < 0:
            raise UserError(
                f"loop: give steps or epochs, one of them positive (steps {self.steps}, epochs {self.epochs})"
            )
        if self.batch_size <= 0:
            raise UserError(f"loop.batch_size must be positive, got {self.batch_size}")
        for name in ("eval_every", "checkpoint_every", "breakdown_every"):
            if getattr(self, name) < 0:
                raise UserError(f"loop.{name} must be zero or more, got {getattr(self, name)}")
        if self.keep_best.startswith("eval/") and not self.eval_every:
            raise UserError(
                f"loop.keep_best {self.keep_best!r} is only measured where loop.eval_every is set"
            )
        if self.keep_last < 1:
            raise UserError(f"loop.keep_last must be at least 1, got {self.keep_last}")

    def total_steps(self, rows: int) -> int:
        if self.steps:
            return self.steps
        return max(1, int(self.epochs * rows) // self.batch_size)


def stage_key(ctx: StageContext) -> jax.Array:
    """The stage's base key: a function of its seed and kind (not of its name: equal stages are shared)."""
    return jax.random.fold_in(jax.random.key(ctx.seed), zlib.crc32(type(ctx.stage).__name__.encode()))


def sharded_state(
    mesh: Mesh,
    axes: dict,
    init: Callable[..., TrainState],
    *args: Any,
    offload_optimizer: bool = False,
    offload_reference: bool = False,
) -> tuple[Any, Callable, Any]:
    """(template, make, frozen): the state's shapes with shardings, a function that computes it in place, and the
    parameters that are never trained (`ref_params`), which the loop keeps beside the state.

    `args` (parameters to start from, keys) are passed to the jitted `init`. The state's arrays are copies: a train step
    donates its state, and the parameters it started from may be in use as the reference. The frozen ones are `args`'
    own arrays: not copied, not donated, not saved with each checkpoint.

    offload_optimizer: `opt_state` is kept in the host's memory; offload_reference: the frozen parameters are (UserError
    where the devices reach none). The latter leaves the devices only if `args` are there already: who holds these while
    they train holds what lies on the devices, too.
    """
    frozen = _given(lambda *args: init(*args).ref_params, *args)
    here: Callable[[Any], Any] = lambda args: args  # noqa: E731
    if offload_reference:
        on_host(mesh, None, "loop.offload_reference")
        frozen, here = placed(frozen, HOST), partial(moved, space=jax.memory.Space.Device)
    trained = lambda *args: init(*here(args))._replace(ref_params=None)  # noqa: E731
    abstract = jax.eval_shape(trained, *args)
    shardings = state_shardings(mesh, abstract, axes)
    if offload_optimizer:
        kept = on_host(mesh, shardings.opt_state, "loop.offload_optimizer")
        shardings = shardings._replace(opt_state=kept)
    template = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), abstract, shardings
    )
    copied = lambda *args: jax.tree.map(_copy, trained(*args))  # noqa: E731
    return template, lambda: jax.jit(copied, out_shardings=shardings)(*args), frozen


def _given(f: Callable[..., Any], *args: Any) -> Any:
    """`f(*args)` where it only hands on what it is given: the arguments' own arrays. A jitted function's results
    would be copies."""
    # Of the arguments' shapes alone: where they lie in the host's memory, nothing could be computed with them.
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    traced, shapes = jax.make_jaxpr(f, return_shape=True)(*like)
    own = dict(zip(traced.jaxpr.invars, jax.tree.leaves(args), strict=True))
    if any(x not in own for x in traced.jaxpr.outvars):
        raise ValueError("an algorithm's init computes its ref_params; they must be among its arguments")
    return jax.tree.unflatten(jax.tree.structure(shapes), [own[x] for x in traced.jaxpr.outvars])


def _copy(x: jax.Array) -> jax.Array:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.copy(jax.random.key_data(x)))
    return jnp.copy(x)


def is_finite(metrics: dict) -> jax.Array:
    return jnp.all(
        jnp.stack([jnp.isfinite(v).all() for k, v in sorted(metrics.items()) if "loss" in k or "norm" in k])
    )


def fetched(frozen: Any, config: LoopConfig) -> Any:
    """The frozen parameters within a jitted function that reads them. (What it does not read is never moved.)"""
    return moved(frozen, jax.memory.Space.Device) if config.offload_reference else frozen


def guarded(train_step: Callable, config: LoopConfig) -> Callable:
    """(state, frozen, batch) -> (state, metrics): the step with the frozen parameters beside the state; with
    `on_nonfinite="skip"` the old parameters are kept when its loss is not finite."""

    def plain(state: TrainState, frozen: Any, batch):
        new, metrics = train_step(state._replace(ref_params=fetched(frozen, config)), batch)
        return new._replace(ref_params=None), metrics

    def skipping(state: TrainState, frozen: Any, batch):
        new, metrics = plain(state, frozen, batch)
        ok = is_finite(metrics)
        keep = lambda a, b: jax.tree.map(lambda x, y: jnp.where(ok, x, y), a, b)  # noqa: E731
        kept = new._replace(
            params=keep(new.params, state.params),
            opt_state=keep(new.opt_state, state.opt_state),
            extra=keep(new.extra, state.extra),  # a reference that follows the policy, a running mean
        )
        return kept, metrics | {"train/skipped": 1.0 - ok.astype(jnp.float32)}

    step = plain if config.on_nonfinite == "stop" else skipping
    if not config.offload_optimizer:
        return step

    def fetching(state: TrainState, frozen: Any, batch):
        state = state._replace(opt_state=moved(state.opt_state, jax.memory.Space.Device))
        new, metrics = step(state, frozen, batch)
        return new._replace(opt_state=moved(new.opt_state, jax.memory.Space.Host)), metrics

    return fetching


def train(
    ctx: StageContext,
    config: LoopConfig,
    steps: int,
    template: TrainState,
    make_state: Callable[[], TrainState],
    do_step: Callable[..., tuple[TrainState, dict, Any]],
    evaluate: Callable[[TrainState, int], dict] | None = None,
    show: tuple[str, ...] = ("train/loss",),
    position: Callable[[int], dict] = lambda step: {"step": step},
    resume_position: Callable[[dict], None] | None = None,
    monitor: Monitor | None = None,
    peak: float = 0.0,
) -> TrainState:
    """Run `do_step(state, step, finish) -> (state, metrics, batch)` from the last checkpoint to `steps`.

    Metrics of step n are fetched after step n + 1 has been dispatched, so the devices never wait for the host; the
    moment at which they come is step n's end. A `do_step` that itself waits for the devices calls `finish()` (which
    fetches and logs the step before) when its first work is dispatched and before it waits: what it measures from
    there on is time of its own step.
    A `monitor` that says so ends training early; what is returned, and evaluated last, may then be an earlier policy.
    peak: FLOP/s of all devices, of which `perf/mfu` is a share; 0: not known.
    Raises UserError on a loss that is not finite (after saving the batch), Preempted after a requested stop.
    """
    clock = Clock()
    checkpointer = Checkpointer(
        ctx.folder / "checkpoints", config.keep_last, config.keep_best, config.best_mode, ctx.console.print
    )
    restored = checkpointer.restore(template)
    if restored is not None:
        start, state, where = restored
        ctx.console.print(f"  resuming at step {start} of {steps}")
        if resume_position is not None:
            resume_position(where)
        if monitor is not None:
            monitor.restore(where["alarms"])
    else:
        start, state = 0, make_state()
    snapshots = None
    if monitor is not None and monitor.alarms.on_alarm == "rollback":
        snapshots = Snapshots(ctx.folder, monitor, ctx.console.print)
        if start == 0:
            snapshots.keep(0, state.params["policy"])
    done, ending = start, False
    logger = MetricLogger(ctx.folder, resume_step=start if restored is not None else None)
    pending: tuple | None = None
    last: dict = {}
    times = HostReport(ctx.console) if jax.process_count() > 1 else None
    clock.restart()

    def flush() -> None:
        nonlocal pending, last
        if pending is None:
            return
        step, metrics, batch = pending
        pending = None
        with hosts.WAITS:
            values = jax.device_get(metrics)
        last = {k: float(v) for k, v in values.items()}
        if monitor is not None:
            last |= monitor.observe(step, last)
        bad = [k for k, v in last.items() if ("loss" in k or "norm" in k) and not np.isfinite(v)]
        measured = performance(last, *clock.lap(), peak)
        if times is not None:
            measured |= times.step(last | measured, clock.own)
        logger.log(step, last | measured)
        if bad and config.on_nonfinite == "stop":
            path = remote.shown(save_batch(ctx.folder / f"nonfinite_step_{step}.npz", batch))
            raise UserError(
                f"step {step}: {bad[0]} is {last[bad[0]]}. Its batch is in {path}; the last checkpoint is of step "
                f"{max(checkpointer.steps(), default=0)}. Lower the learning rate, or set loop.on_nonfinite to 'skip'."
            )

    try:
        with progress(ctx.console, steps, ctx.name, start) as bar:
            for step in range(start, steps):
                if told := PROFILING.before(step, ctx.folder / "profile", state):
                    ctx.console.print(f"  {told}")
                state, metrics, batch = do_step(state, step, flush)
                flush()
                pending = (step + 1, metrics, batch)
                bar.update(step, {k: last[k] for k in show if k in last})
                done = step + 1
                hosts.WATCH.moved(f"step {done} of {ctx.name}")
                ending = monitor is not None and monitor.ended(done)
                if snapshots is not None and (ending or snapshots.due(done)):
                    flush()
                    snapshots.consider(done, state.params["policy"])
                    clock.restart()
                if snapshots is not None and ending:
                    policy = snapshots.best(state.params["policy"])
                    state = state._replace(params={**state.params, "policy": policy})
                due = ending or done == steps or (config.eval_every > 0 and done % config.eval_every == 0)
                if evaluate is not None and due:
                    flush()
                    evaluated = {k: float(v) for k, v in evaluate(state, done).items()}
                    logger.log(done, evaluated)
                    last |= evaluated
                    clock.restart()  # no part of the next step
                if ending:
                    break  # like the last step it leaves no checkpoint: a run killed after it comes to it again
                stopping = hosts.stop_requested() and done < steps
                if stopping or (
                    config.checkpoint_every and done % config.checkpoint_every == 0 and done < steps
                ):
                    flush()
                    if config.keep_best and config.keep_best not in last and "eval/" not in config.keep_best:
                        raise UserError(
                            f"loop.keep_best: no such metric.{did_you_mean(config.keep_best, last)}"
                        )
                    where = position(done) | ({"alarms": monitor.state()} if monitor is not None else {})
                    if snapshots is not None:
                        snapshots.wait()  # the checkpoint names the best step, whose policy must be there
                    checkpointer.save(done, state, where, last)
                    clock.restart()
                if stopping:
                    raise Preempted(f"{ctx.name}: saved at step {done} of {steps}")
            flush()
            bar.update(done if ending else steps, {k: last[k] for k in show if k in last})
    finally:
        if told := PROFILING.end():
            ctx.console.print(f"  {told}")
        checkpointer.close()
        if snapshots is not None:
            snapshots.close()
        logger.close()
    return state


class Clock:
    """Times steps, and tells what share of the time since it began they are, compiling left out."""

    def __init__(self) -> None:
        self._began, self._useful = time.perf_counter(), 0.0
        self.own = 0.0  # of the last step: what was neither compiling nor waiting for devices and other hosts
        self.restart()

    def restart(self) -> None:
        """What went before is no part of the next step."""
        self._at, self._compiled = time.perf_counter(), COMPILATIONS.seconds
        self._waits = hosts.WAITS.seconds

    def lap(self) -> tuple[float, float]:
        """(seconds of the step that ends here, share of all time so far)"""
        now = time.perf_counter()
        seconds = now - self._at
        useful = max(seconds - (COMPILATIONS.seconds - self._compiled), 0.0)
        self._useful += useful
        self.own = max(useful - (hosts.WAITS.seconds - self._waits), 0.0)
        self.restart()
        return seconds, self._useful / (now - self._began)


class Phases:
    """Times the phases of every so many steps (`LoopConfig.breakdown_every`), in which the host waits for the devices
    after each phase. In other steps nothing waits, and only what the host has waited for anyhow is timed.

    metrics: `time/<phase>`, each time that there was one added up.
    """

    def __init__(self, config: LoopConfig, step: int, state: TrainState, finish: Callable[[], None]):
        self.metrics: dict[str, float] = {}
        self._on = config.breakdown_every > 0 and (step + 1) % config.breakdown_every == 0
        self._at = 0.0
        if self._on:
            finish()
            jax.block_until_ready(state)
            self.begin()

    def begin(self) -> None:
        """What went before is no part of the first phase; later calls change nothing."""
        self._at = self._at or time.perf_counter()

    def end(self, phase: str, made: Any, known: bool = False) -> None:
        """The phase that ends when what it `made` is there, which is `known` where the host has it already."""
        if self._on:
            jax.block_until_ready(made)
        if self._on or known:
            now = time.perf_counter()
            self.metrics[f"time/{phase}"] = self.metrics.get(f"time/{phase}", 0.0) + now - self._at
            self._at = now


class HostReport:
    """What is logged of several hosts' own times, and told where one of them holds up the others."""

    def __init__(self, console: Any) -> None:
        self._console, self._times = console, hosts.HostTimes()
        self._peak = 0.0  # of all hosts, as far as they have told
        self._told: int | None = None

    def step(self, metrics: dict, own: float) -> dict[str, float]:
        """metrics: of this process's step, of which so long was its own work."""
        rows = self._times.step(own, metrics.get("time/data", 0.0), metrics.get("perf/hbm_peak", 0.0))
        found: dict[str, float] = {}
        if rows is not None:
            found = slowest(rows)
            self._peak = max(self._peak, float(rows[:, 2].max()))
            host = int(found["perf/slowest_host"])
            if found["time/skew"] > 0.2 * metrics["time/step"] and host != self._told:
                self._console.print(
                    f"  process {host} of {len(rows)} takes {found['time/skew']:.2f} s of each step longer than the "
                    f"others do by themselves: they wait for it"
                )
                self._told = host
        if self._peak:
            found["perf/hbm_peak"] = max(self._peak, metrics.get("perf/hbm_peak", 0.0))
        return found


def slowest(rows: np.ndarray) -> dict[str, float]:
    """Of `HostTimes` rows [hosts, 3]: what the slowest host takes, and how much longer than the others' median."""
    own, data = rows[:, 0], rows[:, 1]
    others = np.delete(own, own.argmax())
    return {
        "time/step_max_host": float(own.max()),
        "time/skew": float(own.max() - np.median(others)),
        "time/data_max_host": float(data.max()),
        "perf/slowest_host": float(own.argmax()),
    }


def performance(metrics: dict, seconds: float, goodput: float, peak: float = 0.0) -> dict:
    """Of one step: its time, tokens per second, compilations so far, device memory where the backend tells, and what
    share of the devices' `peak` FLOP/s it used where that is known."""
    found = {
        "time/step": seconds,
        "perf/goodput": goodput,
        "perf/compile_count": COMPILATIONS.count,
        "perf/compile_s": COMPILATIONS.seconds,
    }
    if "train/tokens" in metrics:
        found["perf/tokens_per_s_train"] = metrics["train/tokens"] / seconds
    for name, of in (("perf/mfu", "perf/model_flops"), ("perf/hfu", "perf/hardware_flops")):
        if peak and of in metrics:
            found[name] = metrics[of] / seconds / peak
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.local_devices()]
    if max(peaks):
        found["perf/hbm_peak"] = max(peaks)
    return found


class _Compilations:
    """How often this process has compiled something, and for how long; both must stand still after warm-up.

    A program that is found in the cache on disk counts too, with the time that it takes to read it.
    """

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.count += 1
            self.seconds += duration_secs


COMPILATIONS = _Compilations()


def save_batch(path: Path, batch: Any) -> Path:
    """Every array of a batch by its path, as .npz."""
    leaves = jax.tree_util.tree_flatten_with_path(fetch(batch))[0]
    if leads():
        arrays = {"/".join(path_names(p)): np.asarray(x) for p, x in leaves}
        np.savez(path, **arrays)  # type: ignore[arg-type]  # the stub takes them for `allow_pickle`
    return path
