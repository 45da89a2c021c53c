"""Tunix (Flax NNX) at one workload, in its own trainers; `python benchmarks/peers.py` starts it in its environment."""

from typing import Any

import worker


def run(spec: dict, gate_of: Any) -> None:
    WORKLOADS[spec["kind"]](spec, gate_of)


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("google-tunix", "jax", "flax")}


class Words:
    """The tokenizer of words; no token ends an answer."""

    def __init__(self, vocab: int):
        self.vocab = vocab

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: Any, **_: Any) -> str:
        return worker.words(map(int, ids))

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return self.vocab

    def pad_id(self) -> int:
        return 0


def language_model(spec: dict, seed: int = 0, scalar: bool = False) -> Any:
    from flax import nnx
    from tunix.models.llama3.model import Llama3, ModelConfig, RematConfig

    m = spec["model"]
    config = ModelConfig(
        num_layers=m["layers"],
        vocab_size=m["vocab"],
        embed_dim=m["d"],
        hidden_dim=m["ff"],
        num_heads=m["heads"],
        head_dim=m["d"] // m["heads"],
        num_kv_heads=m["kv_heads"],
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=False,
        remat_config=RematConfig.NONE if spec["remat"] == "none" else RematConfig.DECODER,
    )

    class Unpacked(Llama3):
        """Its PPO hands segment ids to critics and reward models, which its Llama does not take; nothing is packed."""

        def __call__(self, *args, segment_ids=None, **kwargs):
            return super().__call__(*args, **kwargs)

    model = (Unpacked if scalar else Llama3)(config, rngs=nnx.Rngs(seed))
    if scalar:
        model.lm_head = nnx.Linear(m["d"], 1, use_bias=False, rngs=nnx.Rngs(seed))
    return model


def optimizer() -> Any:
    import optax

    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, weight_decay=0.0))


def wait_for(model: Any) -> None:
    import jax
    from flax import nnx

    jax.block_until_ready(nnx.state(model, nnx.Param))


def batches(spec: dict, gate: worker.Gate, model: Any, rows: list, collate: Any) -> Any:
    """Without end, at the gate after every so many. collate(rows) -> (batch, real tokens)."""
    import numpy as np

    order, tokens, given = np.random.default_rng(0), 0, 0
    while True:
        shuffled = order.permutation(len(rows))
        for start in range(0, len(rows) - spec["batch"] + 1, spec["batch"]):
            batch, real = collate([rows[i] for i in shuffled[start : start + spec["batch"]]])
            yield batch
            tokens, given = tokens + real, given + 1
            if given % spec["steps"] == 0:
                wait_for(model)
                gate.passed(tokens)
                tokens = 0


def padded(rows: list, length: int, left: bool = False) -> Any:
    """(ids, mask) [B, length] of lists of ids."""
    import numpy as np

    ids, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = row, True
    return ids, mask


def sft(spec: dict, gate_of: Any) -> None:
    import numpy as np
    from tunix.rl import common
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

    model = language_model(spec)
    trainer = PeftTrainer(model, optimizer(), TrainingConfig(eval_every_n_steps=10**9))

    def model_input(x: TrainingInput) -> dict:
        # A batch's mask marks targets; what is padding, the tokens say.
        real = x.input_tokens != 0
        return {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": common.build_positions_from_mask(real),
            "attention_mask": common.make_causal_attn_mask(real),
        }

    def collate(rows: list) -> tuple[TrainingInput, int]:
        ids, real = padded([e["prompt"] + e["answer"] for e in rows], spec["length"])
        begin = np.asarray([len(e["prompt"]) for e in rows])[:, None]
        return TrainingInput(ids, real & (np.arange(spec["length"])[None] >= begin)), int(real.sum())

    trainer.with_gen_model_input_fn(model_input)
    gate = gate_of(versions(), "padded to the longest: its SFT does not pack")
    trainer.train(batches(spec, gate, model, worker.data_of(spec)["examples"], collate))


def dpo(spec: dict, gate_of: Any) -> None:
    from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput

    pairs = worker.data_of(spec)["pairs"]
    prompt = max(len(p["prompt"]) for p in pairs)
    answer = max(len(p[which]) for p in pairs for which in ("chosen", "rejected"))
    model = language_model(spec)
    trainer = DPOTrainer(
        model, language_model(spec, 1), optimizer(), DPOTrainingConfig(eval_every_n_steps=10**9, beta=0.1)
    )

    def collate(rows: list) -> tuple[TrainingInput, int]:
        ids, real = padded([p["prompt"] for p in rows], prompt, left=True)
        chosen, of_chosen = padded([p["chosen"] for p in rows], answer)
        rejected, of_rejected = padded([p["rejected"] for p in rows], answer)
        tokens = int(2 * real.sum() + of_chosen.sum() + of_rejected.sum())
        return TrainingInput(ids, real, chosen, of_chosen, rejected, of_rejected), tokens

    gate = gate_of(versions(), "prompts and answers padded to the longest; reference scored in every step")
    trainer.train(batches(spec, gate, model, pairs, collate))


def generate(spec: dict, gate_of: Any) -> None:
    import jax.numpy as jnp
    from tunix.generate.sampler import CacheConfig, Sampler

    m, stops = spec["model"], spec["stops"] or [spec["model"]["vocab"]]
    model = language_model(spec)
    if spec["stops"]:
        model.lm_head.w.value = jnp.zeros_like(model.lm_head.w.value)
    cache = CacheConfig(spec["prompt"] + spec["new"], m["layers"], m["kv_heads"], m["d"] // m["heads"])
    sampler = Sampler(model, Words(m["vocab"]), cache)
    prompts = [worker.words(ids) for ids in worker.data_of(spec)["prompts"]]
    gate, ends, calls = gate_of(versions(), f"its Sampler, {spec['batch']} rows at a time"), {*stops}, 0
    while True:
        tokens = 0
        for _ in range(spec["steps"]):
            for start in range(0, len(prompts), spec["batch"]):
                out = sampler(
                    prompts[start : start + spec["batch"]],
                    spec["new"],
                    spec["prompt"],
                    eos_tokens=stops,
                    temperature=1.0,
                    top_p=1.0,
                    seed=calls,
                )
                calls += 1
                # The stop token itself is left out of what it returns.
                tokens += sum(min(worker.useful(row.tolist(), ends) + 1, spec["new"]) for row in out.tokens)
        gate.passed(tokens)


def cluster(spec: dict, rows: int, **models: Any) -> Any:
    """Actor, reference and what else there is, on one device."""
    import jax
    from jax.sharding import AxisType
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
    from tunix.rl.rollout.base_rollout import RolloutConfig

    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    config = ClusterConfig(
        role_to_mesh=dict.fromkeys(Role, mesh),
        training_config=RLTrainingConfig(
            eval_every_n_steps=10**9,
            max_steps=10**9,
            actor_optimizer=optimizer(),
            critic_optimizer=optimizer(),
            mini_batch_size=rows,
            train_micro_batch_size=rows,
        ),
        rollout_config=RolloutConfig(
            max_tokens_to_generate=spec["new"],
            max_prompt_length=spec["prompt"],
            kv_cache_size=spec["prompt"] + spec["new"],
            temperature=1.0,
            top_p=1.0,
        ),
    )
    return RLCluster(
        actor=language_model(spec),
        reference=language_model(spec, 1),
        tokenizer=Words(spec["model"]["vocab"]),
        cluster_config=config,
        **models,
    )


def at_gate(learner: type, spec: dict, gate: worker.Gate, tokens: int) -> type:
    """The learner, at the gate after every so many iterations."""

    class AtGate(learner):
        done = 0

        def _run_global_step(self, *args: Any, **kwargs: Any) -> None:
            super()._run_global_step(*args, **kwargs)
            self.done += 1
            if self.done % spec["steps"] == 0:
                wait_for(self.rl_cluster.actor_trainer.model)
                gate.passed(tokens * spec["steps"])

    return AtGate


def prompts_of(spec: dict) -> Any:
    import numpy as np

    prompts = np.asarray([worker.words(ids) for ids in worker.data_of(spec)["prompts"]])
    while True:
        for start in range(0, len(prompts) - spec["batch"] + 1, spec["batch"]):
            yield {"prompts": prompts[start : start + spec["batch"]]}


def grpo(spec: dict, gate_of: Any) -> None:
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner

    answers = spec["batch"] * spec["group"]
    gate = gate_of(versions(), "defaults")
    learner = at_gate(GRPOLearner, spec, gate, answers * (spec["prompt"] + spec["new"]))
    reward = lambda prompts, completions, **_: worker.variety(completions)  # noqa: E731
    config = GRPOConfig(num_generations=spec["group"], beta=0.04)
    learner(cluster(spec, spec["batch"]), config, reward).train(prompts_of(spec))


def ppo(spec: dict, gate_of: Any) -> None:
    from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner

    gate = gate_of(versions(), "separate critic and reward model; one minibatch")
    learner = at_gate(PPOLearner, spec, gate, spec["batch"] * (spec["prompt"] + spec["new"]))
    scalar = lambda seed: language_model(spec, seed, scalar=True)  # noqa: E731
    models = cluster(spec, spec["batch"], critic=scalar(2), reward=scalar(3))
    learner(models, PPOConfig(num_iterations=spec["epochs"], beta=0.05)).train(prompts_of(spec))


def reward_model(spec: dict, gate_of: Any) -> None:
    raise worker.NotOffered("Tunix has no trainer of reward models")


WORKLOADS = {
    "generate": generate,
    "sft": sft,
    "reward_model": reward_model,
    "dpo": dpo,
    "grpo": grpo,
    "ppo": ppo,
}

if __name__ == "__main__":
    worker.main(run)
