"""Reinforcement learning from a reward model or a program: GRPO, RLOO, DAPO, ... without a critic, and PPO with one."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from jrlhf.algorithms import FROM_ROLLOUTS
from jrlhf.algorithms.online_dpo import OnlineDPOConfig
from jrlhf.algorithms.ppo import PPOConfig, actor_critic, make_ppo
from jrlhf.algorithms.sft import sft_loss
from jrlhf.config import (
    REWARD_MODEL,
    MeshConfig,
    Source,
    StageContext,
    UserError,
    did_you_mean,
    no_fingerprint,
    stage_ref_or_name,
)
from jrlhf.data.curation import Curriculum
from jrlhf.metrics import DRIVER_REWARDS
from jrlhf.models.transformer import Model, with_scalar_head
from jrlhf.ops.on_policy import OnPolicyConfig
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import batch_shards, batch_ways, check_batch, make_mesh, reshaped
from jrlhf.training.artifacts import Beginning, Loaded, begin, load_adapter, load_model, save_trained
from jrlhf.training.data import text_batch
from jrlhf.training.evaluation import Probe, Sampler, prompt_slots
from jrlhf.training.loop import stage_key
from jrlhf.training.monitors import Alarms, Monitor
from jrlhf.training.online import Overlap, train_online
from jrlhf.training.rewards import check_all, make_reward
from jrlhf.training.stages.common import (
    FineTuningStage,
    ModelStage,
    TooLongPrompt,
    check_answers,
    check_axes,
    check_reward,
    fixed_reference,
    labelled,
    start_config,
    usable_prompts,
)
from jrlhf.training.stages.preferences import with_references
from jrlhf.training.stages.sizes import at_most, local_rows, trained_bytes, training_plan, usable
from jrlhf.types import Algorithm


class Learner(NamedTuple):
    """What a stage gives the driver."""

    algorithm: Algorithm
    start: tuple  # arguments of its init
    axes: dict  # logical axes of the models in its state
    text: Any = None  # arrays of pretraining text
    critic: Model | None = None  # where it is a model of its own


@dataclass(frozen=True)
class RolloutStage(FineTuningStage):
    """A policy that learns from its own answers, with a KL penalty to the start policy."""

    abstract: ClassVar[bool] = True

    reward: str = stage_ref_or_name(artifact=REWARD_MODEL)
    prompts: Source = field(kw_only=True)
    algorithm: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    sampling: SamplingConfig = SamplingConfig()
    optim: OptimConfig = OptimConfig(lr=1e-4, eps=1e-5)
    gold: str = stage_ref_or_name("", REWARD_MODEL)  # a reward that is only logged
    # More that are only logged. The first of these (without any, `gold`) is the held-out reward of `alarms`.
    watch: tuple[str, ...] = stage_ref_or_name((), REWARD_MODEL)
    alarms: Alarms = field(default=Alarms())
    curriculum: Curriculum | None = None  # prompts from easy to hard, instead of a new order in every epoch
    eval_prompts: Source | None = None
    max_prompt: int = 0
    too_long: TooLongPrompt = "error"
    # "one_step": the answers of each iteration are drawn while the one before is scored and learned from, by the policy
    # before that update (docs/algorithms.md).
    overlap: Overlap = "none"
    # So many of the devices, the last ones, only sample; the mesh is one of the others. 0: all take turns.
    rollout_devices: int = no_fingerprint(0)
    # The mesh of all devices while they sample, where it is to be another one: weights are split anew each time.
    rollout_mesh: MeshConfig | None = no_fingerprint(None)

    def learner(
        self, ctx: StageContext, mesh: Mesh, policy: Loaded, beginning: Beginning, key: jax.Array, slots: int
    ) -> Learner:
        """`slots`: of a prompt."""
        raise TypeError(f"{type(self).__name__} does not define learner()")

    def validate(self, stages):
        check_reward(self.reward, stages)
        if self.gold:
            check_reward(self.gold, stages, "gold")
        for name in self.watch:
            check_reward(name, stages, "watch")
        if {self.reward, self.gold} & {*self.watch} or len({*self.watch}) < len(self.watch):
            raise UserError(f"watch {self.watch}: name rewards other than reward and gold, each once")
        for name in self.watched:
            if name in DRIVER_REWARDS:
                raise UserError(
                    f"{name!r} cannot be watched by this name, for reward/{name}/mean is something else; give its "
                    "stage another"
                )
        parts = getattr(stages.get(self.reward), "parts", {})
        if taken := {*parts} & {*self.watched}:
            raise UserError(
                f"reward {self.reward!r} has a part called {min(taken)!r}, as is a reward that is watched: both would "
                f"be logged as reward/{min(taken)}/mean; give the part another name"
            )
        if self.alarms.on_alarm == "rollback" and not self.held_out:
            raise UserError(
                "alarms.on_alarm 'rollback' goes back to the policy with the best held-out reward: name one in watch"
            )
        if getattr(stages.get(self.reward), "token_rewards", False) and not self.algorithm.token_rewards:
            able = sorted(c.__name__ for c in (PPOConfig, *FROM_ROLLOUTS) if c.token_rewards)
            raise UserError(
                f"reward {self.reward!r} rewards single steps, and {type(self.algorithm).__name__} has one advantage "
                f"for a whole answer; use {', '.join(able)}, or as_reward 'outcome' in {self.reward!r}"
            )
        if self.sampling.filtered:
            raise UserError(
                f"sampling: {type(self).__name__} trains the distribution that is sampled, so top_k, top_p, min_p and "
                "temperature 0 are not possible here; use temperature"
            )
        self.check_adapters(stages)
        self._check_overlap()
        if self.loop.epochs:
            raise UserError(f"loop.epochs: {type(self).__name__} counts steps; set loop.steps")
        algorithm, size = self.algorithm, self.loop.batch_size
        if size % algorithm.group_size:
            raise UserError(
                f"loop.batch_size {size} (answers) is not divisible by algorithm.group_size {algorithm.group_size}"
            )
        learned = self._learned
        if learned % (algorithm.parts * algorithm.shared_group):
            what = "" if learned == size else f", of which {learned} rows are learned from,"
            if algorithm.share_prompts:
                what = f" in {size // algorithm.group_size} groups that share a prompt"
            raise UserError(
                f"loop.batch_size {size}{what} is not divisible by minibatches x microbatches = {algorithm.parts}"
            )
        if self.lora.rank and algorithm.ref_update_every:
            raise UserError("algorithm.ref_update_every: with adapters (lora) the reference is their base")
        check_answers(self.start, stages, self.sampling, self.max_prompt)

    def _check_overlap(self) -> None:
        algorithm = self.algorithm
        if self.rollout_devices < 0:
            raise UserError(f"rollout_devices must be zero or more, got {self.rollout_devices}")
        if self.rollout_devices and self.rollout_mesh:
            raise UserError(
                "rollout_devices sample on a mesh of their own, and rollout_mesh is of all devices: use one of them"
            )
        if self.overlap == "none":
            return
        if algorithm.resample_rounds:
            raise UserError(
                "overlap 'one_step' draws answers before the last ones are scored, and algorithm.resample_rounds waits "
                "for scores to draw more: use one of them"
            )
        # Pairs may come from any policy (online DPO), and the reference's answers are never out of date.
        corrected = algorithm.importance_cap or isinstance(algorithm, OnlineDPOConfig)
        if algorithm.sample_from == "policy" and not corrected:
            raise UserError(
                "overlap 'one_step' learns from answers of the policy before the last update, which truncated "
                "importance sampling corrects: set algorithm.importance_cap (2 is usual)"
            )

    def no_reference(self) -> str:
        return fixed_reference(self)

    def check_mesh(self, mesh: MeshConfig) -> None:
        devices = self.device_mesh(mesh)
        self.check_offload(devices)
        self._check_microbatches(devices)

    def _check_microbatches(self, mesh: Mesh) -> None:
        """That each device has rows of its own in every microbatch: else rows move from one to another all the time,
        and no memory is saved."""
        algorithm, ways = self.algorithm, batch_ways(mesh)
        of_minibatch = self._learned // (algorithm.minibatches * algorithm.shared_group)
        rows = of_minibatch // algorithm.microbatches
        if algorithm.microbatches == 1 or rows % ways == 0:
            return
        what = "rows" if algorithm.shared_group == 1 else "groups that share a prompt"
        fitting = f"a divisor of {of_minibatch // ways}" if of_minibatch % ways == 0 else "1"
        raise UserError(
            f"algorithm.microbatches {algorithm.microbatches}: {rows} {what} of each (loop.batch_size "
            f"{self.loop.batch_size}, algorithm.minibatches {algorithm.minibatches}) do not divide over the mesh's "
            f"{ways} batch shards ({batch_shards(mesh)}). Use {fitting}, or another loop.batch_size."
        )

    def device_mesh(self, config: MeshConfig) -> Mesh:
        return self._meshes(config)[0]

    def check_model(self, mesh: MeshConfig, stages) -> None:
        super().check_model(mesh, stages)
        if self.rollout_mesh is not None and not self.needs_download(stages):
            sampling = self._meshes(mesh)[1]
            assert sampling is not None
            try:
                check_axes(sampling, self.model_config(stages))
            except UserError as e:
                raise UserError(f"rollout_mesh: {e}") from e

    def _meshes(self, config: MeshConfig) -> tuple[Mesh, Mesh | None]:
        """(the mesh that trains, the one that samples or None where it is the same)"""
        n, devices = self.rollout_devices, jax.devices()
        if not n:
            mesh = make_mesh(config)
            check_batch(mesh, self.loop.batch_size, "loop.batch_size")
            if self.rollout_mesh is None:
                return mesh, None
            try:
                sampling = reshaped(mesh, self.rollout_mesh)
                check_batch(sampling, self.loop.batch_size, "loop.batch_size")
            except UserError as e:
                raise UserError(f"rollout_mesh: {e}") from e
            return mesh, sampling
        if jax.process_count() > 1:
            raise UserError("rollout_devices is only possible with one process; leave it 0")
        if n >= len(devices):
            raise UserError(f"rollout_devices {n} leaves none of the {len(devices)} devices to train on")
        try:
            mesh = make_mesh(config, devices[:-n])
            check_batch(mesh, self.loop.batch_size, "loop.batch_size")
        except UserError as e:
            raise UserError(f"rollout_devices {n} leaves {len(devices) - n} devices to train on: {e}") from e
        try:
            # Weights are whole while sampling, but for `tensor`.
            sampling = make_mesh(MeshConfig(tensor=mesh.shape["tensor"]), devices[-n:])
            check_batch(sampling, self.loop.batch_size, "loop.batch_size")
        except UserError as e:
            raise UserError(f"rollout_devices {n}: {e}") from e
        return mesh, sampling

    def plan(self, ctx):
        config = start_config(ctx.stages, self.start)
        prompt = self.max_prompt or config.context - self.sampling.max_new_tokens
        length = at_most(prompt + self.sampling.max_new_tokens)
        prompts = usable(self.prompts, self.too_long)
        if self.curriculum and (rows := local_rows(self.prompts)):
            self.curriculum.difficulty(rows)  # or says which row has none
        plan = training_plan(config, self.loop, prompts, length, lora=self.lora)
        return with_references(plan, self, config)

    def run(self, ctx: StageContext) -> dict:
        mesh, sampling_mesh = self._meshes(ctx.mesh)
        with jax.set_mesh(mesh):
            key = stage_key(ctx)
            policy = self.load_start(ctx, mesh)
            beginning = begin(policy, "lm", self.lora, jax.random.fold_in(key, 4))
            model, tokenizer = beginning.model, policy.tokenizer
            limit = self.max_prompt or model.config.context - self.sampling.max_new_tokens
            read = lambda source, label: usable_prompts(  # noqa: E731
                policy, source, limit, self.sampling, self.too_long, ctx, label
            )
            rows, ids = read(self.prompts, "prompts")
            eval_rows, eval_ids = read(self.eval_prompts, "eval_prompts") if self.eval_prompts else ([], [])
            # With adapters, a reward model that was trained as one beside the same base shares that base.
            shared = (ctx.parents[self.start], policy) if self.lora.rank else None
            reward = make_reward(self.reward, dict(ctx.parents), mesh, tokenizer, shared)
            watch = [make_reward(name, dict(ctx.parents), mesh, tokenizer) for name in self.watched]

            for some in (rows, eval_rows):
                check_all([reward, *watch])(some)

            slots = prompt_slots(ids, eval_ids)
            sampler = Sampler(model, tokenizer, mesh, self.sampling, slots)
            evaluate = None
            if eval_ids:
                probe = Probe(
                    ctx.folder, sampler, eval_rows, eval_ids, policy.params, [reward, *watch],
                    jax.random.fold_in(key, 2),
                )  # fmt: skip
                whole = lambda state: model.whole(state.params["policy"], beginning.frozen)  # noqa: E731
                evaluate = lambda state, step: probe(whole(state), step)  # noqa: E731
            learner = self.learner(ctx, mesh, policy, beginning, jax.random.fold_in(key, 5), slots)
            monitor = Monitor(self.alarms, self.held_out, ctx.console)
            shown = "reward/sampled/mean" if self.algorithm.resample_rounds else "reward/score/mean"
            state = train_online(
                ctx, mesh, self.loop, self.algorithm, learner.algorithm, learner.start, learner.axes, sampler,
                rows, ids, reward, watch, jax.random.fold_in(key, 3), learner.text, evaluate,
                (shown, *(f"reward/{w.name}/mean" for w in watch), "kl/ref_k1"),
                monitor, self.curriculum, self.overlap, sampling_mesh, learner.critic,
            )  # fmt: skip
            save_trained(ctx.folder, beginning, state.params["policy"], tokenizer, ctx.parents[self.start])
        return {"kl_coef": float(state.extra["kl_coef"])} | monitor.results()

    @property
    def _learned(self) -> int:
        """Rows that an iteration's update learns from."""
        return self.loop.batch_size // self.algorithm.group_size * self.algorithm.learned_per_group

    @property
    def watched(self) -> tuple[str, ...]:
        """Rewards that are logged and not learned from."""
        return ((self.gold,) if self.gold and self.gold != self.reward else ()) + self.watch

    @property
    def held_out(self) -> str:
        """The reward that shows whether `reward` is still to be believed; "" without one."""
        return next(iter(self.watch + self.watched), "")

    @property
    def updates(self) -> int:
        """Of the policy, in all."""
        return self.loop.steps * self.algorithm.epochs * self.algorithm.minibatches


@dataclass(frozen=True)
class OnPolicy(RolloutStage):
    """Reinforcement learning without a critic; `algorithm` says which (GRPOConfig, RLOOConfig, DAPOConfig, ...)."""

    algorithm: OnPolicyConfig = field(kw_only=True)

    def validate(self, stages):
        if type(self.algorithm) not in FROM_ROLLOUTS:
            name = type(self.algorithm).__name__
            hint = (
                " PPO has a critic: use the stage PPO."
                if isinstance(self.algorithm, PPOConfig)
                else did_you_mean(name, [c.__name__ for c in FROM_ROLLOUTS])
            )
            raise UserError(
                f"algorithm: {name} is not in jrlhf.algorithms.FROM_ROLLOUTS; add its line there.{hint}"
            )
        super().validate(stages)

    def build(self, model: Model) -> Algorithm:
        make = FROM_ROLLOUTS[type(self.algorithm)]
        optimizer = build_optimizer(self.optim, self.updates)
        return make(self.algorithm, model, optimizer, self.sampling.temperature)

    def learner(self, ctx, mesh, policy, beginning, key, slots) -> Learner:
        start = (beginning.trained, policy.params, key)
        return Learner(self.build(beginning.model), start, beginning.model.logical_axes())


@dataclass(frozen=True)
class PPO(RolloutStage):
    """Reinforcement learning with a critic, as InstructGPT has it."""

    algorithm: PPOConfig = PPOConfig()
    critic: Literal["reward", "policy", "shared"] = "reward"  # start the critic from the reward model, from
    # the start policy, or share the policy's trunk
    critic_optim: OptimConfig = OptimConfig(lr=3e-4, eps=1e-5)
    ptx: Source | None = None  # pretraining text for algorithm.ptx_coef

    def validate(self, stages):
        super().validate(stages)
        if self.lora.rank and self.ptx:
            raise UserError("ptx: the pretraining mix is not possible with adapters (lora)")
        if self.critic == "reward" and self.reward not in stages:
            raise UserError(
                f"critic 'reward' needs a reward-model stage; {self.reward!r} is a program: use 'policy'"
            )
        if self.critic == "reward" and not isinstance(stages[self.reward], ModelStage):
            raise UserError(
                f"critic 'reward' needs a reward model to start from; {self.reward!r} has no parameters of its own: "
                "use 'policy'"
            )
        if self.critic == "reward" and self.lora.rank:
            reward = stages[self.reward]
            beside = isinstance(reward, FineTuningStage) and reward.lora.rank and reward.start == self.start
            if not beside:
                raise UserError(
                    f"critic 'reward' with adapters needs a reward model that is an adapter beside the same base: "
                    f"give {self.reward!r} `lora` and start {self.start!r}, or set critic to 'policy'"
                )
        if bool(self.ptx) != bool(self.algorithm.ptx_coef):
            raise UserError(
                "ptx (text) and algorithm.ptx_coef (its weight) go together: give both or neither"
            )

    def plan(self, ctx):
        plan, config = super().plan(ctx), start_config(ctx.stages, self.start)
        critic = 0 if self.critic == "shared" else trained_bytes(config, self.lora)  # trained like the policy
        return replace(plan, memory_bytes=plan.memory_bytes + critic)

    def build(self, model: Model, critic: Model | None) -> Algorithm:
        """critic None: a head on the policy's trunk."""
        language_loss: Callable | None = (lambda p, b, n: sft_loss(model, p, b, n)[0]) if self.ptx else None
        return make_ppo(
            self.algorithm,
            actor_critic(model, critic, language_loss),
            build_optimizer(self.optim, self.updates),
            build_optimizer(self.critic_optim, self.updates),
            self.sampling.temperature,
        )

    def learner(self, ctx, mesh, policy, beginning, key, slots) -> Learner:
        model = beginning.model
        critic_model, critic_params = self._critic(ctx, mesh, policy, jax.random.fold_in(key, 1))
        algorithm = self.build(model, critic_model)
        text = None
        if self.ptx:
            length = slots + self.sampling.max_new_tokens
            text = text_batch(self.ptx, policy.tokenizer, length, labelled(ctx.console, "ptx"))
        axes = model.logical_axes() | Model(model.config, "scalar").logical_axes()
        return Learner(
            algorithm, (beginning.trained, critic_params, policy.params, key), axes, text, critic_model
        )

    def _critic(self, ctx: StageContext, mesh: Mesh, policy: Loaded, key) -> tuple[Model | None, Any]:
        if self.critic == "shared":
            return None, {"score": with_scalar_head(policy.params, key)["score"]}
        if self.critic == "policy":
            beginning = begin(policy, "scalar", self.lora, key)
            return beginning.model, beginning.trained
        folder = ctx.parents[self.reward]
        if not self.lora.rank:
            loaded = load_model(folder, mesh, "scalar")
            return loaded.model, loaded.params
        adapted = load_adapter(folder, ctx.parents[self.start], policy.model.config, mesh)
        if adapted is None:
            raise UserError(
                f"critic 'reward' with adapters needs a reward model that is an adapter beside the same base: train "
                f"{self.reward!r} with `lora` from {self.start!r}, or set critic to 'policy'"
            )
        return adapted
