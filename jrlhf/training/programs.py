"""The programs that the stages of an experiment compile, from shapes alone: no data is read, no parameter made, and the
devices of the mesh need not be there. What is lowered here are the drivers' own functions."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrlhf.algorithms import FROM_LABELS, FROM_PAIRS
from jrlhf.algorithms.reward_model import make_reward_model
from jrlhf.algorithms.sft import make_sft
from jrlhf.config import REWARD_MODEL, Stage, UserError
from jrlhf.models.config import LoRAConfig
from jrlhf.models.flops import Passed, backward_flops, forward_flops
from jrlhf.models.packed import as_packed
from jrlhf.models.transformer import Model, with_scalar_head
from jrlhf.optim import build_optimizer
from jrlhf.rollout.rollout import loop_trips, rollout
from jrlhf.rollout.sampling import make_sampling
from jrlhf.sharding import HOST, batch_sharding, check_batch, replicated, sampling_ways, state_shardings
from jrlhf.training.artifacts import shapes_and_axes
from jrlhf.training.data import Packing, chunk_rows
from jrlhf.training.evaluation import draw_sizes
from jrlhf.training.loop import guarded, sharded_state
from jrlhf.training.online import online_programs
from jrlhf.training.rewards import jitted_scores
from jrlhf.training.stages.common import ModelStage, model_stage
from jrlhf.training.stages.direct_alignment import DirectAlignment, jitted_pair_logprobs
from jrlhf.training.stages.language_model import SFT, Pretrain
from jrlhf.training.stages.on_policy import PPO, OnPolicy, RolloutStage
from jrlhf.training.stages.reward_model import RewardModel
from jrlhf.training.stages.unpaired import UnpairedAlignment
from jrlhf.types import (
    AnswerBatch,
    PairBatch,
    PreferenceBatch,
    Prompts,
    RankedBatch,
    Rollout,
    SequenceBatch,
    UnpairedBatch,
)


@dataclass(frozen=True)
class Lengths:
    """Tokens to plan for. 0: the longest that the config allows, of which preferences are half prompt, half answer."""

    prompt: int = 0
    answer: int = 0
    answers: int = 2  # to each prompt of preferences


class Program(NamedTuple):
    """One function that a stage compiles."""

    stage: str
    name: str
    lower: Callable[[], Any]  # -> Lowered; under `jax.set_mesh`
    often: float  # runs in each training step; 0: once, before training
    useful: float  # FLOPs that the algorithm asks for, of all devices: not what is computed again
    given: Any  # its arguments that are not `Held`, as shapes
    loops: tuple[float, ...] = ()  # trips of the loops that end when their data say so


class Held(NamedTuple):
    """Something that stays on the devices while a stage trains."""

    name: str
    tree: Any  # of ShapeDtypeStructs with shardings


class StagePrograms(NamedTuple):
    programs: list[Program]
    held: list[Held]


class Texts(NamedTuple):
    """Texts that pass through a model whole, each a prompt and an answer; as many as `shared` have the same prompt,
    which passes once for all of them."""

    rows: int
    prompt: int
    answer: int
    shared: int = 1

    def passed(self, model: Model) -> Passed:
        p, a, prompts = self.prompt, self.answer, self.rows / self.shared
        keys = prompts * p * p / 2 + self.rows * a * (p + a / 2)
        return Passed(prompts * p + self.rows * a, keys, self.rows * (a if model.head == "lm" else 1))

    def forward(self, model: Model) -> float:
        return forward_flops(model.config, self.passed(model), None if model.head == "lm" else model.heads)

    def train(self, model: Model) -> float:
        backward = backward_flops(
            model.config, self.passed(model), None if model.head == "lm" else model.heads
        )
        return self.forward(model) + backward


def programs_of(name: str, stages: Mapping[str, Stage], mesh: Mesh, lengths: Lengths) -> StagePrograms | None:
    """Of a stage; None where it compiles nothing that is planned for. UserError where the mesh does not suit it."""
    stage = stages[name]
    for kind, make in MAKERS.items():
        if isinstance(stage, kind):
            return make(name, stage, stages, mesh, lengths)
    return None


# --- shapes -------------------------------------------------------------------------------------------------


def struct(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> Any:
    """Of rows: split over the batch."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))


def structs(mesh: Mesh, tree: Any) -> Any:
    return jax.tree.map(lambda x: struct(mesh, x.shape, x.dtype), tree)


def with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def parameters(model: Model, mesh: Mesh) -> Any:
    shapes, axes = shapes_and_axes(model)
    return with_shardings(shapes, state_shardings(mesh, shapes, axes))


def once(mesh: Mesh, x: Any) -> Any:
    """Whole on every device."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))


def key_of(mesh: Mesh) -> Any:
    return once(mesh, jax.eval_shape(jax.random.key, 0))


class Begun(NamedTuple):
    """A `Beginning` of shapes."""

    model: Model
    trained: Any
    frozen: Any


def begun(base: Model, params: Any, head: str, lora: LoRAConfig, mesh: Mesh, heads: int = 1) -> Begun:
    model = Model(replace(base.config, lora=lora) if lora.rank else base.config, head, heads)  # type: ignore[arg-type]
    _, axes = shapes_and_axes(model)
    if lora.rank:
        trained = jax.eval_shape(model.fresh_adapter, jax.random.key(0))
        frozen = {k: v for k, v in params.items() if head == "lm" or k != "lm_head"}
    else:
        trained, frozen = params, None
        if head == "scalar":
            trained = jax.eval_shape(lambda p, k: with_scalar_head(p, k, heads), params, jax.random.key(0))
    return Begun(model, with_shardings(trained, state_shardings(mesh, trained, axes)), frozen)


def state_of(mesh: Mesh, loop: Any, axes: dict, init: Callable, *start: Any) -> tuple[Any, Any]:
    """(train state, frozen parameters), as `sharded_state` places them."""
    template, _, frozen = sharded_state(mesh, axes, init, *start, offload_optimizer=loop.offload_optimizer)
    if loop.offload_reference:
        kept = jax.tree.map(lambda x: x.sharding.with_memory_kind(HOST), frozen)
        frozen = with_shardings(frozen, kept)
    return template, frozen


def base_of(stage: Any, stages: Mapping[str, Stage], mesh: Mesh) -> tuple[Model, Any]:
    model = Model(stage.model_config(stages))
    return model, parameters(model, mesh)


# --- stages that learn from a dataset -----------------------------------------------------------------------


def offline(
    name: str, stage: Any, mesh: Mesh, algorithm: Any, start: tuple, model: Model, batch: Any, useful: float,
    held: list[Held],
) -> StagePrograms:  # fmt: skip
    check_batch(mesh, stage.loop.batch_size, f"{name}.loop.batch_size")
    state, frozen = state_of(mesh, stage.loop, shapes_and_axes(model)[1], algorithm.init, *start)
    step = jax.jit(guarded(algorithm.train_step, stage.loop), donate_argnums=0)
    update = Program(name, "update", partial(step.lower, state, frozen, batch), 1, useful, batch)
    return StagePrograms([update], [Held("train state", state), Held("frozen", frozen), *held])


def of_language_model(name: str, stage: Any, stages, mesh: Mesh, lengths: Lengths) -> StagePrograms:
    base, params = base_of(stage, stages, mesh)
    lora = stage.lora if isinstance(stage, SFT) else LoRAConfig()
    model, trained, frozen = begun(base, params, "lm", lora, mesh)
    rows, length = stage.loop.batch_size, stage.length or base.config.context
    algorithm = make_sft(stage.algorithm, model, build_optimizer(stage.optim, 100))
    ints, bools = struct(mesh, (rows, length), jnp.int32), struct(mesh, (rows, length), jnp.bool_)
    batch = SequenceBatch(ints, ints, ints, bools)
    start = (trained, key_of(mesh), frozen)
    useful = Texts(rows, 1, length - 1).train(model)
    return offline(name, stage, mesh, algorithm, start, model, batch, useful, _started(trained, frozen))


def _started(trained: Any, frozen: Any) -> list[Held]:
    """What was loaded to start from lies beside the state that was copied from it."""
    return [Held("start", trained)] if frozen is None else []


def answer_lengths(stage: Any, model: Model, lengths: Lengths) -> tuple[int, int]:
    """(prompt, answer) in tokens."""
    limit = stage.max_length or model.config.context
    prompt = lengths.prompt or limit // 2
    answer = lengths.answer or limit - prompt
    if prompt < 1 or answer < 1 or prompt + answer > limit:
        raise UserError(
            f"a prompt of {prompt} and an answer of {answer} tokens do not fit the {limit} of {type(stage).__name__}"
        )
    return prompt, answer


def answer_arrays(
    rows: int, answers: int, prompt: int, answer: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, mask and response mask [rows, answers, T] of texts that are as long as they may be. Answers differ."""
    shape = rows, answers, prompt + answer
    tokens = np.ones(shape, np.int32)
    tokens[:, :, prompt:] += np.arange(1, answers + 1, dtype=np.int32)[None, :, None]
    response = np.zeros(shape, bool)
    response[:, :, prompt:] = True
    return tokens, np.ones(shape, bool), response


def batch_of_answers(stage: Any, mesh: Mesh, arrays: Any, packing: bool) -> Any:
    """Shapes of a batch, packed as the stage packs it."""
    if not packing:
        return structs(mesh, arrays)
    packed = Packing(arrays, mesh, stage.algorithm.microbatches)
    index = np.arange(stage.loop.batch_size)
    return structs(mesh, packed.batch(index, packed.rows(index)))


def of_reward_model(name: str, stage: RewardModel, stages, mesh: Mesh, lengths: Lengths) -> StagePrograms:
    base, params = base_of(stage, stages, mesh)
    config, rows, answers = stage.algorithm, stage.loop.batch_size, lengths.answers
    if config.mixture:
        raise UserError(
            f"{name}: a mixture of labellers' types depends on who they are; it cannot be planned"
        )
    heads = len(config.head_names)
    model, trained, frozen = begun(base, params, "scalar", stage.lora, mesh, heads)
    prompt, answer = answer_lengths(stage, base, lengths)
    arrays = PreferenceBatch(
        *answer_arrays(rows, answers, prompt, answer),
        np.tile(np.arange(1, answers + 1, dtype=np.int32), (rows, 1)),
        np.zeros((rows, answers), np.float32),
    )
    if config.criteria:
        arrays = arrays._replace(criteria=np.zeros((rows, answers, len(config.criteria)), np.float32))
    if config.heads > 1 or config.groups:
        arrays = arrays._replace(weights=np.ones((rows, heads), np.float32))
    batch = batch_of_answers(stage, mesh, arrays, stage.packing)
    algorithm = make_reward_model(config, model, build_optimizer(stage.optim, 100), 0.0, 0, float(rows))
    start = (trained, key_of(mesh), frozen)
    texts = Texts(rows * answers, prompt, answer, answers if stage.packing else 1)
    held = _started(trained, frozen)
    return offline(name, stage, mesh, algorithm, start, model, batch, texts.train(model), held)


def of_pairs(name: str, stage: DirectAlignment, stages, mesh: Mesh, lengths: Lengths) -> StagePrograms:
    base, params = base_of(stage, stages, mesh)
    model, trained, _ = begun(base, params, "lm", stage.lora, mesh)
    rows = stage.loop.batch_size
    answers = lengths.answers if stage.of_rankings else 2
    prompt, answer = answer_lengths(stage, base, lengths)
    padded, nothing = answer_arrays(rows, answers, prompt, answer), np.zeros((rows, answers), np.float32)
    ranks = np.tile(np.arange(1, answers + 1, dtype=np.int32), (rows, 1))
    arrays = RankedBatch(*padded, nothing, ranks) if stage.of_rankings else PairBatch(*padded, nothing)
    batch = batch_of_answers(stage, mesh, arrays, stage.packing)
    if stage.packing:
        base, model = as_packed(base), as_packed(model)
    make = FROM_PAIRS[type(stage.algorithm)]
    algorithm = make(stage.algorithm, model, build_optimizer(stage.optim, 100))
    start = (trained, params, key_of(mesh))
    texts = Texts(rows * answers, prompt, answer, answers if stage.packing else 1)
    held = [] if stage.lora.rank else [Held("reference", params)]
    planned = offline(name, stage, mesh, algorithm, start, model, batch, texts.train(model), held)
    if stage.algorithm.reference_scored != "precomputed":
        return planned
    size = chunk_rows(rows, mesh)
    few = jax.tree.map(lambda x: x[np.arange(size) % rows], arrays)
    some = batch_of_answers(
        replace(stage, loop=replace(stage.loop, batch_size=size)), mesh, few, stage.packing
    )

    lower = partial(jitted_pair_logprobs.lower, base, stage.algorithm.tail_weight, params, some)
    useful = texts._replace(rows=size * answers).forward(base)
    reference = Program(name, "reference", lower, 0, useful, some)
    return planned._replace(programs=[reference, *planned.programs])


def of_labels(name: str, stage: UnpairedAlignment, stages, mesh: Mesh, lengths: Lengths) -> StagePrograms:
    base, params = base_of(stage, stages, mesh)
    model, trained, _ = begun(base, params, "lm", stage.lora, mesh)
    rows = stage.loop.batch_size
    prompt, answer = answer_lengths(stage, base, lengths)
    tokens, mask, response = (x[:, 0] for x in answer_arrays(rows, 1, prompt, answer))
    answers = AnswerBatch(tokens, mask, response, np.zeros(rows, np.float32))
    mismatched = answers if stage.algorithm.mismatched else None
    batch = structs(mesh, UnpairedBatch(answers, np.ones(rows, bool), mismatched))
    make = FROM_LABELS[type(stage.algorithm)]
    algorithm = make(stage.algorithm, model, build_optimizer(stage.optim, 100))
    start = (trained, params, key_of(mesh))
    held = [] if stage.lora.rank else [Held("reference", params)]
    texts = Texts(rows * (2 if stage.algorithm.mismatched else 1), prompt, answer)
    return offline(name, stage, mesh, algorithm, start, model, batch, texts.train(model), held)


# --- stages that learn from their own answers ---------------------------------------------------------------


def of_rollouts(name: str, stage: RolloutStage, stages, mesh: Mesh, lengths: Lengths) -> StagePrograms:
    loop, config, sampling = stage.loop, stage.algorithm, stage.sampling
    check_batch(mesh, loop.batch_size, f"{name}.loop.batch_size")
    stage._check_microbatches(mesh)
    base, params = base_of(stage, stages, mesh)
    model, trained, _ = begun(base, params, "lm", stage.lora, mesh)
    slots = lengths.answer or sampling.max_new_tokens
    sampling = replace(sampling, max_new_tokens=slots)
    prompt = lengths.prompt or stage.max_prompt or base.config.context - slots
    if prompt < 1 or prompt + slots > base.config.context:
        raise UserError(
            f"{name}: prompts of {prompt} tokens and answers of {slots} do not fit the context of {base.config.context}"
        )
    rows, length = loop.batch_size, prompt + slots
    held = []
    if isinstance(stage, PPO):
        critic, critic_params = critic_of(stage, base, params, mesh)
        algorithm = stage.build(model, critic)
        start: tuple = (trained, critic_params, params, key_of(mesh))
        held.append(Held("critic's start", critic_params))
        axes = shapes_and_axes(model)[1] | shapes_and_axes(Model(model.config, "scalar"))[1]
    else:
        assert isinstance(stage, OnPolicy)
        critic = None
        algorithm = stage.build(model)
        start, axes = (trained, params, key_of(mesh)), shapes_and_axes(model)[1]
    state, frozen = state_of(mesh, loop, axes, algorithm.init, *start)
    held = [Held("train state", state), Held("reference", frozen), *held]
    make_batch, step = online_programs(algorithm, loop)

    group = config.group_size
    prompts, row = rows // group, lambda dtype, *size: struct(mesh, (rows, *size), dtype)
    samples = Rollout(
        row(jnp.int32, length),
        row(jnp.bool_, length),
        row(jnp.bool_, slots),
        row(jnp.float32, slots),
        row(jnp.bool_),
    )
    programs = []

    with jax.set_mesh(mesh):  # its devices say how many rows are sampled at a time
        copies, at_a_time = draw_sizes(mesh, sampling, prompts, group)
    ways = sampling_ways(mesh, prompts * copies)
    rules = jax.eval_shape(lambda: make_sampling(replace(sampling, stop=()), (2,), 0))
    trips = loop_trips(rows // ways, at_a_time // ways, slots)

    asked = Prompts(
        struct(mesh, (prompts * copies, prompt), jnp.int32),
        struct(mesh, (prompts * copies, prompt), jnp.bool_),
    )

    def lower_rollout() -> Any:
        by_policy = config.sample_from == "policy"
        weights = model.whole(state.params["policy"], frozen) if by_policy else params
        drawn_by = model if by_policy else base
        return rollout.lower(drawn_by, weights, asked, key_of(mesh), rules, group // copies, at_a_time)

    often = max(config.resample_rounds, 1) * (2 if config.greedy_baseline else 1)
    texts = Texts(rows, prompt, slots, shared=group)
    programs = [Program(name, "rollout", lower_rollout, often, texts.forward(base), asked, trips)]
    texts = texts._replace(shared=1)
    for reward in dict.fromkeys(learned_rewards((stage.reward, *stage.watched), stages)):
        scored = Model(model_stage(stages, reward).model_config(stages), "scalar")
        own = parameters(scored, mesh)
        held.append(Held(f"reward model {reward}", own))
        lower = partial(jitted_scores.lower, scored, own, samples.tokens, samples.mask)
        title = f"score by {reward}"
        programs.append(Program(name, title, lower, often, texts.forward(scored), samples))

    more: tuple = ()
    if isinstance(stage, PPO) and stage.ptx:
        ints = row(jnp.int32, length)
        more = (SequenceBatch(ints, ints, ints, row(jnp.bool_, length)),)
    if config.greedy_baseline:
        more = (row(jnp.float32),)
    given = (samples, row(jnp.float32), *more)
    scoring = 0.0 if config.scored_in_update else texts.forward(model)
    scoring += texts.forward(base)  # of the reference
    scoring += texts.forward(critic) if critic is not None else 0.0
    lower = partial(make_batch.lower, state, frozen, *given)
    programs.append(Program(name, "batch", lower, 1, scoring, given))

    with jax.set_mesh(mesh):
        made = jax.eval_shape(make_batch, state, frozen, *given)
    batch = jax.tree.map(lambda x: struct(mesh, x.shape, x.dtype) if x.ndim else once(mesh, x), made)
    learned = texts._replace(
        rows=rows // group * config.learned_per_group * config.epochs, shared=config.shared_group
    )
    update = learned.train(model) + (learned.train(critic) if critic is not None else 0.0)
    lower = partial(step.lower, state, frozen, batch)
    programs.append(Program(name, "update", lower, 1, update, batch))
    return StagePrograms(programs, held)


def critic_of(stage: PPO, base: Model, params: Any, mesh: Mesh) -> tuple[Model | None, Any]:
    """PPO's critic: of the reward model's shape, of the policy's, or only a head on its trunk."""
    begun_critic = begun(base, params, "scalar", stage.lora, mesh)
    if stage.critic == "shared":
        return None, {"score": begun_critic.trained["score"]}
    return begun_critic.model, begun_critic.trained


def learned_rewards(names: tuple[str, ...], stages: Mapping[str, Stage]) -> Iterator[str]:
    """The stages whose models score answers for these rewards: themselves, or those that they are made of."""
    for name in names:
        if (stage := stages.get(name)) is None:
            continue  # a program
        if isinstance(stage, ModelStage):
            yield name
        else:
            parents = [p for p in stage.parents(stages) if stages[p].artifact == REWARD_MODEL]
            yield from learned_rewards(tuple(parents), stages)


MAKERS: dict[type, Callable[..., StagePrograms]] = {
    Pretrain: of_language_model,
    SFT: of_language_model,
    RewardModel: of_reward_model,
    DirectAlignment: of_pairs,
    UnpairedAlignment: of_labels,
    RolloutStage: of_rollouts,
}
