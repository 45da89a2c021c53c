"""PPO against a reward model or a program."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jrlhf.algorithms.ppo import PPOConfig, actor_critic, make_ppo
from jrlhf.algorithms.sft import sft_loss
from jrlhf.config import (
    REWARD_MODEL,
    Source,
    StageContext,
    UserError,
    stage_ref_or_name,
)
from jrlhf.models.transformer import Model, with_scalar_head
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import Loaded, begin, load_adapter, load_model, save_trained
from jrlhf.training.data import (
    text_batch,
)
from jrlhf.training.evaluation import Probe, Sampler, prompt_slots
from jrlhf.training.loop import stage_key
from jrlhf.training.online import train_online
from jrlhf.training.rewards import make_reward, program_reward
from jrlhf.training.stages.common import (
    FineTuningStage,
    TooLongPrompt,
    check_answers,
    check_reward,
    labelled,
    start_config,
    usable_prompts,
)
from jrlhf.training.stages.sizes import at_most, trained_bytes, training_plan, usable


@dataclass(frozen=True)
class PPO(FineTuningStage):
    """Reinforcement learning from the reward model (or a program), with a KL penalty to the start policy."""

    reward: str = stage_ref_or_name(artifact=REWARD_MODEL)
    prompts: Source = field(kw_only=True)
    algorithm: PPOConfig = PPOConfig()
    sampling: SamplingConfig = SamplingConfig()
    critic: Literal["reward", "policy", "shared"] = "reward"  # start the critic from the reward model, from
    # the start policy, or share the policy's trunk
    optim: OptimConfig = OptimConfig(lr=1e-4, eps=1e-5)
    critic_optim: OptimConfig = OptimConfig(lr=3e-4, eps=1e-5)
    gold: str = ""  # a program reward that is only logged
    eval_prompts: Source | None = None
    ptx: Source | None = None  # pretraining text for algorithm.ptx_coef
    max_prompt: int = 0
    too_long: TooLongPrompt = "error"

    def validate(self, stages):
        check_reward(self.reward, stages)
        if self.gold:
            program_reward(self.gold)
        if self.sampling.filtered:
            raise UserError(
                "sampling: PPO trains the distribution that is sampled, so top_k, top_p, min_p and temperature 0 are "
                "not possible here; use temperature"
            )
        self.check_adapters(stages)
        if self.lora.rank and self.ptx:
            raise UserError("ptx: the pretraining mix is not possible with adapters (lora)")
        if self.critic == "reward" and self.reward not in stages:
            raise UserError(
                f"critic 'reward' needs a reward-model stage; {self.reward!r} is a program: use 'policy'"
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
        if self.loop.epochs:
            raise UserError("loop.epochs: PPO counts steps; set loop.steps")
        minibatch = self.algorithm.minibatches * self.algorithm.microbatches
        if self.loop.batch_size % minibatch:
            raise UserError(
                f"loop.batch_size {self.loop.batch_size} is not divisible by minibatches x microbatches = {minibatch}"
            )
        check_answers(self.start, stages, self.sampling, self.max_prompt)

    def plan(self, ctx):
        config = start_config(ctx.stages, self.start)
        prompt = self.max_prompt or config.context - self.sampling.max_new_tokens
        length = at_most(prompt + self.sampling.max_new_tokens)
        prompts = usable(self.prompts, self.too_long)
        plan = training_plan(config, self.loop, prompts, length, lora=self.lora)
        critic = 0 if self.critic == "shared" else 1
        # The reference is the adapters' base, or a model of its own. The critic is trained like the policy.
        reference = 0 if self.lora.rank else jnp.dtype(config.param_dtype).itemsize * config.n_params
        state = reference + critic * trained_bytes(config, self.lora)
        return replace(plan, memory_bytes=plan.memory_bytes + state)

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            key = stage_key(ctx)
            policy = load_model(ctx.parents[self.start], mesh)
            beginning = begin(policy, "lm", self.lora, jax.random.fold_in(key, 4))
            model, tokenizer = beginning.model, policy.tokenizer
            limit = self.max_prompt or model.config.context - self.sampling.max_new_tokens
            rows, ids = usable_prompts(
                policy, self.prompts, limit, self.sampling, self.too_long, ctx, "prompts"
            )
            # With adapters, a reward model that was trained as one beside the same base shares that base.
            shared = (ctx.parents[self.start], policy) if self.lora.rank else None
            reward = make_reward(self.reward, dict(ctx.parents), mesh, tokenizer, shared)
            watch = (
                [make_reward(self.gold, {}, mesh, tokenizer)]
                if self.gold and self.gold != self.reward
                else []
            )

            # Models: the policy, its frozen start, and a critic.
            critic_model, critic_params = self._critic(ctx, mesh, policy, jax.random.fold_in(key, 1))
            language_loss = (lambda p, b, n: sft_loss(model, p, b, n)[0]) if self.ptx else None
            updates = self.loop.steps * self.algorithm.epochs * self.algorithm.minibatches
            algorithm = make_ppo(
                self.algorithm,
                actor_critic(model, critic_model, language_loss),
                build_optimizer(self.optim, updates),
                build_optimizer(self.critic_optim, updates),
                self.sampling.temperature,
            )
            eval_rows, eval_ids = (
                usable_prompts(
                    policy, self.eval_prompts, limit, self.sampling, self.too_long, ctx, "eval_prompts"
                )
                if self.eval_prompts
                else ([], [])
            )
            slots = prompt_slots(ids, eval_ids)
            sampler = Sampler(model, tokenizer, mesh, self.sampling, slots)
            evaluate = None
            if eval_ids:
                probe = Probe(
                    ctx.folder,
                    sampler,
                    eval_rows,
                    eval_ids,
                    policy.params,
                    [reward, *watch],
                    jax.random.fold_in(key, 2),
                )
                whole = lambda state: model.whole(state.params["policy"], beginning.frozen)  # noqa: E731
                evaluate = lambda state, step: probe(whole(state), step)  # noqa: E731
            text = None
            if self.ptx:
                length = slots + self.sampling.max_new_tokens
                text = text_batch(self.ptx, tokenizer, length, labelled(ctx.console, "ptx"))
            axes = model.logical_axes() | Model(model.config, "scalar").logical_axes()
            state = train_online(
                ctx, mesh, self.loop, algorithm, (beginning.trained, critic_params, policy.params, key), axes, sampler,
                rows, ids, reward, watch, jax.random.fold_in(key, 3), text, evaluate,
                ("reward/score/mean", *(f"reward/{w.name}/mean" for w in watch), "kl/ref_k1"),
            )  # fmt: skip
            save_trained(ctx.folder, beginning, state.params["policy"], tokenizer, ctx.parents[self.start])
        return {"kl_coef": float(state.extra["kl_coef"])}

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
