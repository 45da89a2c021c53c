"""jrlhf at one workload: the product's own drivers, samplers and algorithms; `python benchmarks/peers.py` starts it."""

import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import worker
from rich.console import Console

from jrlhf.algorithms.dpo import DPOConfig, make_dpo
from jrlhf.algorithms.grpo import GRPOConfig, make_grpo
from jrlhf.algorithms.ppo import PPOConfig, actor_critic, make_ppo
from jrlhf.algorithms.reward_model import RewardModelConfig, make_reward_model
from jrlhf.algorithms.sft import SFTConfig, make_sft
from jrlhf.config import MeshConfig, StageContext
from jrlhf.data.batching import Batches, Example, PreferenceExample, pack, stack_preferences
from jrlhf.data.tokenizer import Tokenizer, load_tokenizer
from jrlhf.experiment import keep_memory
from jrlhf.models.config import ModelConfig
from jrlhf.models.packed import as_packed
from jrlhf.models.transformer import Model
from jrlhf.ops.on_policy import OnPolicyConfig
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh, state_shardings
from jrlhf.training.data import PackedFeed, feed_of, one_per_row, pair_arrays, rows_of, with_targets
from jrlhf.training.evaluation import Sampler
from jrlhf.training.loop import LoopConfig
from jrlhf.training.offline import train_offline
from jrlhf.training.online import train_online
from jrlhf.training.rewards import Reward, jitted_scores, text_reward
from jrlhf.types import Algorithm, Params, PreferenceBatch, Scores, SequenceBatch

PAD = 0
STEPS = 1_000_000  # a worker is told when to stop


class Side(NamedTuple):
    """What every workload needs."""

    spec: dict
    gate: worker.Gate
    mesh: jax.sharding.Mesh
    ctx: StageContext
    config: ModelConfig
    optimizer: Any

    def params(self, model: Model, seed: int) -> Params:
        key = jax.random.key(seed)
        shardings = state_shardings(self.mesh, jax.eval_shape(model.init, key), model.logical_axes())
        return jax.jit(model.init, out_shardings=shardings)(key)

    def loop(self, batch: int) -> LoopConfig:
        return LoopConfig(steps=STEPS, batch_size=batch, eval_every=self.spec["steps"], checkpoint_every=0)

    def at_gate(self, tokens: Callable[[int], int]) -> Callable[[Any, int], dict]:
        """What a driver takes for an evaluation, which it begins when nothing is under way. tokens: of a step."""

        def evaluate(state: Any, done: int) -> dict:
            self.gate.passed(sum(map(tokens, range(done - self.spec["steps"], done))))
            return {}

        return evaluate


def start(spec: dict, gate_of: Any) -> None:
    jax.config.update("jax_num_cpu_devices", min(2, spec["threads"]))  # as `jrlhf run` does, and this:
    keep_memory()
    run(spec, gate_of)


def run(spec: dict, gate_of: Any) -> None:
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        prepare, settings = WORKLOADS[spec["kind"]]
        settings = settings.get(spec["variant"], "") if isinstance(settings, dict) else settings
        settings = "; ".join(filter(None, [settings, f"{mesh.size} CPU devices", f"remat {spec['remat']}"]))
        m = spec["model"]
        config = ModelConfig(
            vocab_size=m["vocab"], d_model=m["d"], n_layers=m["layers"], n_heads=m["heads"], n_kv_heads=m["kv_heads"],
            d_ff=m["ff"], context=m["context"], tie_embeddings=False, remat=spec["remat"],
        )  # fmt: skip
        folder = Path(spec["scratch"]) / "jrlhf"
        folder.mkdir(parents=True, exist_ok=True)
        ctx = StageContext("", None, folder, {}, {}, 0, MeshConfig(), Console(quiet=True), folder)  # type: ignore
        optimizer = build_optimizer(OptimConfig(lr=1e-5), STEPS)
        prepare(Side(spec, gate_of(versions(), settings), mesh, ctx, config, optimizer))


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("jrlhf", "jax", "flax")}


# --- learning from data -----------------------------------------------------------------------------------------


def train(
    side: Side, algorithm: Algorithm, model: Model, start: tuple, arrays: Any, real: np.ndarray
) -> None:
    """real: tokens of each row of the arrays that are no padding."""
    batch = side.spec["batch"]
    batches = Batches(rows_of(arrays), batch, side.ctx.seed)  # those of the driver
    evaluate = side.at_gate(lambda step: int(real[batches.indices(step)].sum()))
    if isinstance(arrays, SequenceBatch):  # packed already, where it is
        arrays = feed_of(arrays, batch, side.ctx.seed, side.mesh, STEPS)
    elif side.spec["variant"] == "packed":
        arrays = PackedFeed(arrays, batch, side.ctx.seed, side.mesh, STEPS)
    train_offline(
        side.ctx, side.mesh, side.loop(batch), STEPS, algorithm, start, model.logical_axes(), arrays, evaluate
    )


def example(prompt: list[int], answer: list[int]) -> Example:
    ids = np.asarray([*prompt, *answer], np.int32)
    return Example(ids, np.arange(len(ids)) >= max(len(prompt), 1))


def sft(side: Side) -> None:
    examples = [example(e["prompt"], e["answer"]) for e in worker.data_of(side.spec)["examples"]]
    length = side.spec["length"]
    if side.spec["variant"] == "packed":
        arrays = SequenceBatch(**pack(examples, length, PAD))
    else:
        arrays = one_per_row(examples, length, PAD)
    model = Model(side.config)
    algorithm = make_sft(SFTConfig(), model, side.optimizer)
    real = (arrays.segment_ids != 0).sum(axis=1)
    train(side, algorithm, model, (side.params(model, 0), jax.random.key(1)), with_targets(arrays), real)


def preferences(side: Side) -> PreferenceBatch:
    ranks, margins = np.asarray([1, 2], np.int32), np.zeros(2, np.float32)
    examples = [
        PreferenceExample(
            tuple(example(p["prompt"], p[which]) for which in ("chosen", "rejected")), ranks, margins, {}
        )
        for p in worker.data_of(side.spec)["pairs"]
    ]
    return stack_preferences(examples, side.spec["length"], 2, PAD)


def reward_model(side: Side) -> None:
    model, arrays = Model(side.config, "scalar"), preferences(side)
    algorithm = make_reward_model(RewardModelConfig(), model, side.optimizer)
    real = arrays.mask.sum(axis=(1, 2))
    train(side, algorithm, model, (side.params(model, 0), jax.random.key(1)), arrays, real)


def dpo(side: Side) -> None:
    model, arrays = Model(side.config), pair_arrays(preferences(side), "all")
    if side.spec["variant"] == "packed":
        model = as_packed(model)
    algorithm = make_dpo(DPOConfig(beta=0.1, reference="on_the_fly"), model, side.optimizer)
    start = (side.params(model, 0), side.params(model, 1), jax.random.key(1))
    train(side, algorithm, model, start, arrays, arrays.mask.sum(axis=(1, 2)))


# --- generation and learning from it ----------------------------------------------------------------------------


def tokenizer(side: Side, stops: Sequence[int] = ()) -> Tokenizer:
    """That of words, where only `stops` end an answer."""
    loaded = load_tokenizer(side.spec["tokenizer"])
    loaded.eos_ids = tuple(stops)
    return loaded


def sampler(side: Side, model: Model, stops: Sequence[int] = ()) -> Sampler:
    config = SamplingConfig(max_new_tokens=side.spec["new"])
    return Sampler(model, tokenizer(side, stops), side.mesh, config, side.spec["prompt"])


def generate(side: Side) -> None:
    spec, model = side.spec, Model(side.config)
    prompts, draw = worker.data_of(spec)["prompts"], sampler(side, model, spec["stops"])
    params = side.params(model, 0)
    if spec["stops"]:
        kernel = params["lm_head"]["kernel"]
        params = params | {"lm_head": {"kernel": jax.numpy.zeros_like(kernel)}}
    calls = 0
    while True:
        tokens = 0
        for _ in range(spec["steps"]):
            samples = draw.sample(params, prompts, jax.random.key(calls))
            tokens, calls = tokens + int(samples.response_mask.sum()), calls + 1
        side.gate.passed(tokens)


def online(
    side: Side, config: OnPolicyConfig, algorithm: Algorithm, start: tuple, model: Model, reward: Reward
) -> None:
    spec, prompts = side.spec, worker.data_of(side.spec)["prompts"]
    answers = spec["batch"] * config.group_size
    axes = model.logical_axes() | Model(side.config, "scalar").logical_axes()
    train_online(
        side.ctx, side.mesh, side.loop(answers), config, algorithm, start, axes, sampler(side, model),
        [{"prompt": worker.words(ids)} for ids in prompts], prompts, reward, [], jax.random.key(2),
        evaluate=side.at_gate(lambda step: answers * (spec["prompt"] + spec["new"])),
    )  # fmt: skip


def grpo(side: Side) -> None:
    model = Model(side.config)
    config = GRPOConfig(group_size=side.spec["group"], beta=0.04, share_prompts=True, microbatches=4)
    algorithm = make_grpo(config, model, side.optimizer)
    start = (side.params(model, 0), side.params(model, 1), jax.random.key(1))
    reward = text_reward("variety", lambda prompts, completions, rows: worker.variety(completions), True)
    online(side, config, algorithm, start, model, reward)


def ppo(side: Side) -> None:
    model, scalar = Model(side.config), Model(side.config, "scalar")
    config = PPOConfig(epochs=side.spec["epochs"], minibatches=1, microbatches=4)
    algorithm = make_ppo(config, actor_critic(model, scalar), side.optimizer, side.optimizer)
    judge = side.params(scalar, 3)
    score = partial(jitted_scores, scalar, judge)
    reward = Reward("score", False, lambda samples, texts: Scores(score(samples.tokens, samples.mask)))
    start = (side.params(model, 0), side.params(scalar, 2), side.params(model, 1), jax.random.key(1))
    online(side, config, algorithm, start, model, reward)


PACKED = "packed rows, a prompt once for both answers"
ON_THE_FLY = "reference scored in every step"
WORKLOADS: dict[str, tuple[Callable[[Side], None], Any]] = {
    "generate": (generate, "Sampler, with its default slots"),
    "sft": (sft, {"": "padded", "packed": "packed rows"}),
    "reward_model": (reward_model, {"": "padded to the longest", "packed": PACKED}),
    "dpo": (
        dpo,
        {"": f"padded to the longest; {ON_THE_FLY}", "packed": f"{PACKED}; {ON_THE_FLY}"},
    ),
    "grpo": (grpo, "share_prompts"),
    "ppo": (ppo, "separate critic and reward model; one minibatch"),
}

if __name__ == "__main__":
    worker.main(start)
