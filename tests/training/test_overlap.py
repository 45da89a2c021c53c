"""Sampling the next answers while the last ones are learned from: what it computes, what it waits for, and that a run
that is stopped goes on as if it had not been; on one mesh, and with devices that only sample."""

import gc
import threading
import tracemalloc
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from helpers import AXES, MODEL, SCALAR, assert_close, lm_params, scalar_params
from jax._src.array import ArrayImpl
from tiny_runs import QUIET, folders, lasting, only, trained

from jrlhf.algorithms.grpo import GRPOConfig, make_grpo
from jrlhf.algorithms.online_dpo import OnlineDPOConfig
from jrlhf.algorithms.ppo import PPOConfig, actor_critic, make_ppo
from jrlhf.algorithms.raft import RAFTConfig
from jrlhf.algorithms.remax import ReMaxConfig, make_remax
from jrlhf.algorithms.rloo import RLOOConfig, make_rloo
from jrlhf.algorithms.sft import SFTConfig, make_sft
from jrlhf.config import STOP, MeshConfig, Preempted, StageContext, UserError
from jrlhf.data.curation import Curriculum
from jrlhf.experiment import keep_compiled, run
from jrlhf.metrics import MetricLogger
from jrlhf.models.config import LoRAConfig
from jrlhf.models.transformer import Model
from jrlhf.ops.on_policy import OnPolicyConfig
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import batch_sharding, make_mesh, reshaped, state_shardings
from jrlhf.training import online
from jrlhf.training.evaluation import Sampler
from jrlhf.training.loop import COMPILATIONS, LoopConfig, performance
from jrlhf.training.monitors import Alarms, Monitor
from jrlhf.training.offline import train_offline
from jrlhf.training.online import train_online
from jrlhf.training.rewards import Reward, checked, jitted_scores
from jrlhf.training.stages import OnPolicy
from jrlhf.types import Scores, SequenceBatch

ADAM = OptimConfig(lr=1e-2)
RLOO = RLOOConfig(group_size=2, importance_cap=2.0)


class Letters:
    """As much of a tokenizer as sampling needs: id 1 ends, id 0 pads."""

    eos_ids, pad_id = (1,), 0

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


ROWS = [{"prompt": f"p{i}", "difficulty": float(i)} for i in range(12)]
IDS = [[2 + i, 3 + i, 5][: 2 + i % 2] for i in range(12)]


def of_text(prompts, completions, rows):
    """Depends on the prompt too: an answer that is scored beside another prompt gets another score."""
    assert [row["prompt"] for row in rows] == prompts
    return np.asarray(
        [len(set(c)) / 4 + c.count("e") - int(p[1:]) / 9 for p, c in zip(prompts, completions, strict=True)],
        np.float32,
    )


def text_reward(function=of_text) -> Reward:
    def score(rollout, texts):
        assert texts is not None
        return checked(
            "text", Scores(function(texts.prompts, texts.completions, texts.rows)), len(texts.prompts)
        )

    return Reward("text", True, score, on_host=True)


def device_reward(mesh) -> Reward:
    params = placed(mesh, scalar_params())
    return Reward(
        "model",
        False,
        lambda rollout, texts: Scores(jitted_scores(SCALAR, params, rollout.tokens, rollout.mask)),
        trained_on=(-1.0, 1.0),
    )


def placed(mesh, params):
    return jax.device_put(params, state_shardings(mesh, params, AXES))


def one_device():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def learn(
    folder,
    config: OnPolicyConfig = RLOO,
    steps: int = 4,
    mesh=None,
    make=make_rloo,
    reward=None,
    lora: bool = False,
    lr: float = 1e-2,
    alarms: Alarms | None = None,
    loop: LoopConfig | None = None,
    **more: Any,
):
    """`train_online` with a model of two layers -> (the state it ends with, its lines of metrics)."""
    mesh = mesh or one_device()
    model = Model(replace(MODEL.config, lora=LoRAConfig(rank=2))) if lora else MODEL
    optimizer = build_optimizer(replace(ADAM, lr=lr), steps)
    with jax.set_mesh(mesh):
        base = placed(mesh, lm_params())
        axes, trained_params = AXES | model.logical_axes(), base
        if lora:
            trained_params = model.fresh_adapter(jax.random.key(3))
        start: tuple = (trained_params, base, jax.random.key(1))
        if isinstance(config, PPOConfig):
            start = (base, placed(mesh, scalar_params(2)), base, jax.random.key(1))
            algorithm = make_ppo(config, actor_critic(MODEL, SCALAR), optimizer, build_optimizer(ADAM, steps))
        else:
            algorithm = make(config, model, optimizer, 1.0)
        sampler = Sampler(model, Letters(), mesh, SamplingConfig(max_new_tokens=6), 4)  # type: ignore[arg-type]
        ctx = StageContext(
            "rl", tiny.experiment.stages["sft"], folder, {}, {}, 0, MeshConfig(), QUIET, folder
        )
        monitor = Monitor(alarms, "", QUIET) if alarms else None
        state = train_online(
            ctx, mesh, loop or LoopConfig(steps=steps, batch_size=8, checkpoint_every=2), config, algorithm, start,
            axes, sampler, ROWS, IDS, reward or text_reward(), [], jax.random.key(2), monitor=monitor, **more,
        )  # fmt: skip
    return state, trained(folder)


def column(rows: list[dict], name: str) -> list[float]:
    return [row[name] for row in rows]


# --- what it computes ---------------------------------------------------------------------------------------


def test_answers_are_those_of_the_policy_before_the_last_update(tmp_path, optimised):
    """The second batch is drawn by the untrained policy, as in a run that does not learn; the third is not. The weights
    make the update one of the policy that is trained: they are 1 until it has moved."""
    still = learn(tmp_path / "still", lr=0.0)[1]
    moving = learn(tmp_path / "moving", lr=0.1)[1]
    ahead = learn(tmp_path / "ahead", lr=0.1, overlap="one_step")[1]
    drawn = [
        [(m["reward/score/mean"], m["rollout/len_mean"], m["perf/pad_frac"]) for m in rows]
        for rows in (still, moving, ahead)
    ]
    assert drawn[2][:2] == drawn[0][:2]  # the same prompts, draws and scores
    assert drawn[1][1] != drawn[0][1]  # what the first update changes is to be seen
    assert drawn[2][2] != drawn[0][2]
    assert column(ahead, "rollout/staleness") == [0.0, 1.0, 1.0, 1.0]
    assert column(ahead, "mismatch/logp_diff_max")[0] < 1e-5
    assert min(column(ahead, "mismatch/logp_diff_max")[1:]) > 0.05
    assert max(column(moving, "mismatch/logp_diff_max")) < 1e-5
    assert lasting(ahead[0]) == lasting(moving[0]) | {"rollout/staleness": 0.0}


def test_without_an_update_nothing_is_out_of_date(tmp_path):
    """Every prompt, draw, score, greedy baseline and share of a curriculum meets its own round's."""
    options: dict[str, Any] = {
        "config": ReMaxConfig(importance_cap=2.0),
        "make": make_remax,
        "curriculum": Curriculum("difficulty", steps=4),
        "lr": 0.0,
    }
    plain = learn(tmp_path / "plain", **options)[1]
    ahead = learn(tmp_path / "ahead", overlap="one_step", **options)[1]
    assert [lasting(m) for m in ahead] == [
        lasting(m) | {"rollout/staleness": float(m["step"] > 1)} for m in plain
    ]
    assert len(set(column(plain, "reward/greedy/mean"))) > 1


def test_an_alarm_ends_training_with_what_was_drawn_for_the_next_step_left_out(tmp_path):
    alarms = Alarms(on_alarm="stop", kl=1e-6, window=1, patience=1)
    state, rows = learn(tmp_path, steps=6, alarms=alarms, overlap="one_step")
    assert len(rows) < 6
    assert set(state.extra) == {"kl_coef"}


# --- a run that is stopped ----------------------------------------------------------------------------------


def eight():
    return make_mesh(MeshConfig(data=4, fsdp=2))


def halves():
    """(four devices that train, the other four)"""
    return make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4]), make_mesh(
        MeshConfig(data=4), jax.devices()[4:]
    )


CASES = {
    "greedy": {
        "config": ReMaxConfig(importance_cap=2.0),
        "make": make_remax,
        "curriculum": Curriculum("difficulty", steps=4),
    },
    "critic": {"config": PPOConfig(epochs=1, minibatches=2, importance_cap=2.0), "reward": "model"},
    "adapter": {"lora": True},
    "eight devices": {"mesh": eight},
    "two meshes": {"mesh": lambda: halves()[0], "sampling_mesh": lambda: halves()[1]},
}


def options_of(name: str) -> dict[str, Any]:
    options = {k: v() if k in ("mesh", "sampling_mesh") else v for k, v in CASES[name].items()}
    if options.get("reward") == "model":
        options["reward"] = device_reward(options.get("mesh") or one_device())
    return options


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_goes_on_with_the_answers_that_were_drawn(name, tmp_path, monkeypatch):
    """Stopped after steps 1 and 2: what step 2 learns from was drawn by the policy before step 1, which is gone."""
    options = options_of(name) | {"overlap": "one_step"}
    whole, rows = learn(tmp_path / "whole", **options)
    start = MetricLogger.__init__

    def start_and_ask_to_stop(*args, **kwargs):
        start(*args, **kwargs)
        STOP.request()

    monkeypatch.setattr(MetricLogger, "__init__", start_and_ask_to_stop)
    try:
        for done in (1, 2):
            with pytest.raises(Preempted, match=f"saved at step {done} of 4"):
                learn(tmp_path / "stopped", **options)
            STOP.clear()
    finally:
        STOP.clear()
    monkeypatch.setattr(MetricLogger, "__init__", start)
    resumed, again = learn(tmp_path / "stopped", **options)
    assert [lasting(m) for m in again] == [lasting(m) for m in rows]
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)


# --- what waits for what ------------------------------------------------------------------------------------


class Gate:
    """Holds a device back until it is opened: whoever waits for anything that comes after it waits forever."""

    def __init__(self) -> None:
        self._open, self.timed_out = threading.Event(), False
        self._held = jax.jit(self._hold)
        # A program with little to do would run at once, in the thread that asks for it: this one is none of those.
        self._slow = jax.jit(lambda x: jax.lax.fori_loop(0, 400, lambda i, c: jnp.tanh(c @ c), x))
        self._input = jnp.ones((600, 600))

    def _wait(self, _):
        self.timed_out |= not self._open.wait(120)
        return np.float32(0)

    def _hold(self, tree, after):
        zero = jax.pure_callback(self._wait, jax.ShapeDtypeStruct((), jnp.float32), after[0, 0])
        return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)

    def close(self, tree: Any) -> Any:
        self._held.lower(tree, self._input).compile()
        self._slow(self._input).block_until_ready()
        return self._held(tree, self._slow(self._input))

    def open(self) -> None:
        self._open.set()


def steps_behind_a_gate(monkeypatch, before: int, behind: int):
    """`train` takes `before` steps, closes a gate before the policy's parameters, and dispatches `behind` more."""
    seen: dict[str, Any] = {}

    def train(ctx, loop, steps, template, make_state, do_step, *rest):
        state = make_state()
        for n in range(before):
            state, metrics, _ = do_step(state, n, lambda: None)
        jax.block_until_ready((state, metrics))
        gate = Gate()
        held = gate.close(state.params["policy"])
        state = state._replace(params=state.params | {"policy": held})
        compiled = COMPILATIONS.count
        try:
            for n in range(before, before + behind):
                state, metrics, _ = do_step(state, n, lambda: None)
            seen["waiting"] = not jax.tree.leaves(state.params)[0].is_ready() and not gate.timed_out
            seen["compiled"] = COMPILATIONS.count - compiled
        finally:
            gate.open()
        jax.block_until_ready(state)
        seen["metrics"] = jax.device_get(metrics)
        return state

    monkeypatch.setattr(online, "train", train)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {"config": GRPOConfig(group_size=2), "make": make_grpo},
        {"config": PPOConfig(epochs=2, minibatches=2)},
        {"config": PPOConfig(epochs=1, minibatches=2, importance_cap=2.0), "overlap": "one_step"},
    ],
    ids=["grpo", "ppo", "overlap"],
)
def test_with_a_reward_on_the_devices_the_host_waits_for_nothing(options, tmp_path, monkeypatch):
    """Two whole iterations are dispatched while the parameters that they start from are still being made."""
    seen = steps_behind_a_gate(monkeypatch, 2, 2)
    learn_quietly(tmp_path, steps=6, reward=device_reward(one_device()), **options)
    assert seen["waiting"]
    assert seen["compiled"] == 0
    assert np.isfinite(seen["metrics"]["policy/loss"])


def test_text_is_read_and_scored_while_the_update_before_runs(tmp_path, monkeypatch):
    """The next answers and the update are dispatched too; the answers that are read were there before."""
    seen = steps_behind_a_gate(monkeypatch, 2, 1)
    scored: list[bool] = []

    def reward(*texts):
        scored.append("metrics" in seen or "waiting" in seen)
        return of_text(*texts)

    learn_quietly(tmp_path, steps=6, reward=text_reward(reward), overlap="one_step")
    assert seen["waiting"]
    assert seen["compiled"] == 0
    assert scored == [False] * 3  # of three steps, each before the gate was opened


def learn_quietly(folder, **options):
    """`learn` where `train` has been replaced: nothing is logged."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").touch()
    return learn(folder, **options)


# --- devices that only sample -------------------------------------------------------------------------------


def test_on_devices_of_their_own_the_answers_are_the_same(tmp_path):
    """Of four devices that train and another four that sample, and of four that take turns."""
    train, sample = halves()
    turns = learn(tmp_path / "turns", mesh=train)[1]
    assert [lasting(m) for m in learn(tmp_path / "apart", mesh=train, sampling_mesh=sample)[1]] == [
        lasting(m) for m in turns
    ]
    ahead = learn(tmp_path / "ahead", mesh=train, overlap="one_step")[1]
    both = learn(tmp_path / "both", mesh=train, sampling_mesh=sample, overlap="one_step")[1]
    assert [lasting(m) for m in both] == [lasting(m) for m in ahead]
    assert [lasting(m) for m in ahead] != [lasting(m) for m in turns]


def test_on_another_mesh_of_the_same_devices_the_answers_are_the_same(tmp_path):
    """What goes there (an adapter, beside a base that is sent once) has that mesh's split, and answers come back with
    the trainer's."""
    train = make_mesh(MeshConfig(1, 4, 2))
    sample = reshaped(train, MeshConfig(4, 1, 2))
    here = learn(tmp_path / "here", mesh=train, lora=True, steps=2)[1]
    there = learn(tmp_path / "there", mesh=train, sampling_mesh=sample, lora=True, steps=2)[1]
    for a, b in zip(there, here, strict=True):
        np.testing.assert_allclose(list(lasting(a).values()), list(lasting(b).values()), rtol=1e-4, atol=1e-5)
    with jax.set_mesh(train):
        sampler = Sampler(MODEL, Letters(), train, SamplingConfig(max_new_tokens=6), 4)  # type: ignore[arg-type]
        drawing = online.Drawing(sampler, train, sample, AXES)
        params = placed(train, lm_params())
        sent = drawing.whole(params, None)
        drawn = drawing.back(drawing(sent, IDS[:8], jax.random.key(0), 1))
        assert_close(sent, params)
    assert sent["layers"]["mlp"]["gate"].sharding.shard_shape((2, 16, 24)) == (2, 16, 12)
    assert params["layers"]["mlp"]["gate"].sharding.shard_shape((2, 16, 24)) == (2, 4, 12)
    assert drawn.tokens.sharding.is_equivalent_to(batch_sharding(train), 2)


def test_an_adapter_is_sent_without_its_base(tmp_path, monkeypatch):
    """Once the base, then what is trained; two devices that sample have other parts of a batch than four that train."""
    sent = []
    put = jax.device_put

    def count(x, *rest):
        if isinstance(x, dict):
            sent.append(sum(leaf.size for leaf in jax.tree.leaves(x)))
        return put(x, *rest)

    train, _ = halves()
    sample = make_mesh(MeshConfig(data=2), jax.devices()[6:])
    turns = learn(tmp_path / "turns", mesh=train, lora=True)[1]
    monkeypatch.setattr(online.jax, "device_put", count)
    apart = learn(tmp_path / "apart", mesh=train, sampling_mesh=sample, lora=True)[1]
    base, *adapters = sent[-5:]
    assert base == sum(x.size for x in jax.tree.leaves(lm_params()))
    assert len(set(adapters)) == 1
    assert adapters[0] < base / 4
    for a, b in zip(apart, turns, strict=True):
        np.testing.assert_allclose(list(lasting(a).values()), list(lasting(b).values()), rtol=1e-4, atol=1e-5)


def test_sampling_elsewhere_waits_for_no_update(tmp_path, monkeypatch):
    """The host reads answers where they were drawn, and nothing of the devices that train: neither the update before
    these answers, nor their own, nor the next answers are waited for."""
    train, sample = halves()
    read: list[set] = []
    value = ArrayImpl._value
    drawn, draw = [], Sampler.draw

    def watching(self):
        read.append(self.sharding.device_set)
        return value.fget(self)

    def drawing(self, *args):
        drawn.append(len(read))
        return draw(self, *args)

    def run_steps(ctx, loop, steps, template, make_state, do_step, *rest):
        state, _, _ = do_step(make_state(), 0, lambda: None)
        monkeypatch.setattr(ArrayImpl, "_value", property(watching))
        monkeypatch.setattr(Sampler, "draw", drawing)
        for n in (1, 2):
            state, _, _ = do_step(state, n, lambda: None)
        monkeypatch.undo()
        assert state.extra[online.AHEAD].samples.tokens.sharding.device_set == set(sample.devices.flat)
        return state

    monkeypatch.setattr(online, "train", run_steps)
    learn_quietly(tmp_path, steps=6, mesh=train, sampling_mesh=sample, overlap="one_step")
    assert len(read) >= 4
    assert set.union(*read) == set(sample.devices.flat)
    assert drawn == [0, len(read) // 2]  # the next answers are under way before the last ones are read


# --- long runs ----------------------------------------------------------------------------------------------


class Growth:
    """An evaluation that notes what the process holds."""

    def __init__(self) -> None:
        self.arrays: list[int] = []
        self.compiled: list[int] = []
        self.bytes: list[int] = []

    def __call__(self, state, step) -> dict:
        if not self.arrays:
            tracemalloc.start()  # not before: what is compiled until now would take three times as long
        gc.collect()
        self.arrays.append(len(jax.live_arrays()))
        self.compiled.append(COMPILATIONS.count)
        self.bytes.append(tracemalloc.get_traced_memory()[0])
        return {}


def assert_constant(growth: Growth) -> None:
    """After the first of a few looks, which is after warm-up. (With the last step nothing is drawn ahead.)"""
    assert len(growth.arrays) == 5
    assert len(set(growth.arrays[1:-1])) == 1, growth.arrays
    assert growth.arrays[-1] <= growth.arrays[1]
    assert len(set(growth.compiled[1:])) == 1, growth.compiled
    # Of the last two looks, as one may come while a checkpoint is still being written: what leaks is there at both.
    assert min(growth.bytes[-2:]) - growth.bytes[1] < 100_000, growth.bytes


def long(steps: int) -> LoopConfig:
    return LoopConfig(steps=steps, batch_size=8, checkpoint_every=steps // 5, eval_every=steps // 5)


@pytest.fixture
def growth():
    yield Growth()
    tracemalloc.stop()


@pytest.mark.parametrize("overlap", ["none", "one_step"])
def test_a_long_online_run_grows_neither_in_memory_nor_in_programs(overlap, tmp_path, growth):
    learn(tmp_path, steps=100, loop=long(100), evaluate=growth, overlap=overlap)
    assert_constant(growth)


def test_a_long_offline_run_grows_neither_in_memory_nor_in_programs(tmp_path, growth):
    mesh = one_device()
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 32, (40, 8)).astype(np.int32)
    ones = np.ones_like(tokens)
    arrays = SequenceBatch(tokens, ones, np.broadcast_to(np.arange(8, dtype=np.int32), ones.shape), ones > 0)
    ctx = StageContext("x", tiny.experiment.stages["sft"], tmp_path, {}, {}, 0, MeshConfig(), QUIET, tmp_path)
    with jax.set_mesh(mesh):
        start = (placed(mesh, lm_params()), jax.random.key(1))
        algorithm = make_sft(SFTConfig(), MODEL, build_optimizer(ADAM, 200))
        train_offline(ctx, mesh, long(200), 200, algorithm, start, AXES, arrays, growth)
    assert_constant(growth)


# --- compiling ----------------------------------------------------------------------------------------------


def test_seconds_of_compiling_are_counted_where_something_is_compiled():
    twice = jax.jit(lambda x: 2 * x + 0.125)
    before = COMPILATIONS.count, COMPILATIONS.seconds
    twice(jnp.ones(3))
    after = COMPILATIONS.count, COMPILATIONS.seconds
    assert after[0] > before[0]
    assert after[1] > before[1]
    twice(jnp.ones(3))
    assert (COMPILATIONS.count, COMPILATIONS.seconds) == after
    told = performance({}, 1.0, 0.5)
    assert (told["perf/compile_count"], told["perf/compile_s"]) == after


def test_whoever_runs_an_experiment_keeps_its_programs(tmp_path, monkeypatch):
    """Small ones too; what jax has been told already stands."""
    config = jax.config
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(config, name) for name in names]
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    found = []
    try:
        for told in ((None, 1.0), ("elsewhere", 1.0)):
            for name, value in zip(names, told, strict=True):
                config.update(name, value)
            keep_compiled(tmp_path / "runs")
            found.append([getattr(config, name) for name in names])
    finally:
        for name, value in zip(names, before, strict=True):
            config.update(name, value)
    assert found == [[str(tmp_path / "runs" / ".jax_cache"), 0.0], ["elsewhere", 1.0]]


# --- mistakes -----------------------------------------------------------------------------------------------

STAGE = OnPolicy(
    start="sft",
    reward="larder_gold",
    prompts=tiny.prompts,
    algorithm=RLOOConfig(group_size=4, importance_cap=2.0),
    sampling=tiny.answers,
    optim=tiny.adam,
    loop=tiny.loop(2),
    overlap="one_step",
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": RLOOConfig(group_size=4)}, "overlap 'one_step' .* set algorithm.importance_cap"),
        (
            {"algorithm": RLOOConfig(group_size=4, importance_cap=2.0, resample_rounds=2)},
            "overlap 'one_step' .* algorithm.resample_rounds",
        ),
        ({"rollout_devices": -1}, "rollout_devices must be zero or more"),
        ({"rollout_devices": 8}, "rollout_devices 8 leaves none of the 8 devices"),
        ({"rollout_devices": 3}, "rollout_devices 3 leaves 5 devices to train on: mesh: .* fsdp 2"),
        ({"rollout_devices": 2}, "rollout_devices 2 leaves 6 devices to train on: loop.batch_size: 8 rows"),
        (
            {"rollout_devices": 4, "loop": tiny.loop(2, 10), "algorithm": RLOOConfig(group_size=2, importance_cap=2.0)},
            "rollout_devices 4 leaves 4 devices to train on: loop.batch_size: 10 rows",
        ),
        ({"rollout_devices": 6}, "rollout_devices 6: loop.batch_size: 8 rows"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_runs(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(only("pretrain", "sft", rl=replace(STAGE, **change)), tmp_path, console=QUIET)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_several_processes_share_their_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="rollout_devices is only possible with one process"):
        replace(STAGE, rollout_devices=4).check_mesh(MeshConfig())


def test_what_needs_no_correction_may_overlap_without():
    stages = tiny.experiment.stages
    for algorithm in (OnlineDPOConfig(group_size=4), RAFTConfig(group_size=4, samples="reference")):
        replace(STAGE, algorithm=algorithm).validate(stages)


def test_a_stage_samples_on_devices_of_its_own(one_device_run, one_device_runs):
    """Of eight devices six train, in batches of twelve."""
    algorithm = RLOOConfig(group_size=2, importance_cap=2.0)
    stages = {"rl": replace(STAGE, rollout_devices=2, algorithm=algorithm, loop=tiny.loop(3, 12))}
    rows = trained(folders(run(only("pretrain", "sft", **stages), one_device_runs, console=QUIET))["rl"])
    assert column(rows, "rollout/staleness") == [0.0, 1.0, 1.0]
    assert max(column(rows[:1], "mismatch/logp_diff_max")) < 1e-4
