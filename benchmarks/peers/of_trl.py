"""TRL (PyTorch) at one workload, in its own trainers; `python benchmarks/peers.py` starts it in its own environment."""

from pathlib import Path
from typing import Any

import worker


def run(spec: dict, gate_of: Any) -> None:
    import torch

    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    WORKLOADS[spec["kind"]](spec, gate_of)


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("trl", "torch", "transformers", "accelerate")}


def language_model(spec: dict, cls: str = "LlamaForCausalLM", **more: Any) -> Any:
    import transformers

    m = spec["model"]
    config = transformers.LlamaConfig(
        vocab_size=m["vocab"],
        hidden_size=m["d"],
        intermediate_size=m["ff"],
        num_hidden_layers=m["layers"],
        num_attention_heads=m["heads"],
        num_key_value_heads=m["kv_heads"],
        max_position_embeddings=m["context"],
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
        **more,
    )
    return getattr(transformers, cls)(config).float()


def kept(model: Any, spec: dict) -> Any:
    """The model, also in a folder: its trainer reads a reference from there."""
    folder = str(Path(spec["scratch"]) / "model")
    model.save_pretrained(folder)
    model.config._name_or_path = folder
    return model


def tokenizer(spec: dict) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(spec["tokenizer"], padding_side="left")


def common(spec: dict, batch: int) -> dict[str, Any]:
    """Options of every trainer: float32, nothing saved or reported, no activation checkpointing (which saves memory
    for time, and is on by default)."""
    return {
        "output_dir": str(Path(spec["scratch"]) / "trl"),
        "per_device_train_batch_size": batch,
        "max_steps": 1_000_000,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "gradient_checkpointing": spec["remat"] != "none",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def at_gate(gate: worker.Gate, steps: int, tokens: Any) -> Any:
    """A callback that comes to the gate after every so many steps. tokens(): of them."""
    from transformers import TrainerCallback

    class AtGate(TrainerCallback):
        done = 0

        def on_step_end(self, args, state, control, **_):
            self.done += 1
            if self.done % steps == 0:
                gate.passed(tokens())

    return AtGate()


def counted(trainer: type) -> type:
    """The trainer, counting real tokens in the batches of its steps."""

    class Counted(trainer):
        seen = 0

        def training_step(self, model, inputs, *args, **kwargs):
            mask = inputs.get("attention_mask")
            self.seen += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, *args, **kwargs)

        def taken(self) -> int:
            seen, self.seen = self.seen, 0
            return seen

    return Counted


def train_offline(spec: dict, gate: worker.Gate, trainer: type, **arguments: Any) -> None:
    trainer = counted(trainer)(**arguments)
    trainer.add_callback(at_gate(gate, spec["steps"], trainer.taken))
    trainer.train()


def sft(spec: dict, gate_of: Any) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    examples, variant = worker.data_of(spec)["examples"], spec["variant"]
    rows = Dataset.from_list(
        [
            {
                "input_ids": e["prompt"] + e["answer"],
                "completion_mask": [0] * len(e["prompt"]) + [1] * len(e["answer"]),
            }
            for e in examples
        ]
    )
    options = common(spec, spec["batch"]) | {"max_length": spec["length"], "completion_only_loss": True}
    said = "padded"
    if variant == "packing":
        options |= {"packing": True}
        said = "packing=True (rows of a batch joined into one)"
    elif variant == "grouped":
        options |= {"train_sampling_strategy": "group_by_length"}
        said = "padded to the longest of a batch, train_sampling_strategy='group_by_length'"
    gate = gate_of(versions(), said)
    train_offline(
        spec,
        gate,
        SFTTrainer,
        model=language_model(spec),
        args=SFTConfig(**options),
        train_dataset=rows,
        processing_class=tokenizer(spec),
    )


def reward_model(spec: dict, gate_of: Any) -> None:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = Dataset.from_list(
        [
            {"chosen_ids": p["prompt"] + p["chosen"], "rejected_ids": p["prompt"] + p["rejected"]}
            for p in worker.data_of(spec)["pairs"]
        ]
    )
    gate = gate_of(versions(), "padded to the longest of a batch")
    train_offline(
        spec,
        gate,
        RewardTrainer,
        model=language_model(spec, "LlamaForSequenceClassification", num_labels=1),
        args=RewardConfig(**common(spec, spec["batch"]), max_length=spec["length"]),
        train_dataset=rows,
        processing_class=tokenizer(spec),
    )


def dpo(spec: dict, gate_of: Any) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = Dataset.from_list(
        [
            {"prompt_ids": p["prompt"], "chosen_ids": p["chosen"], "rejected_ids": p["rejected"]}
            for p in worker.data_of(spec)["pairs"]
        ]
    )

    class Tokenised(DPOTrainer):
        """Of rows that are ids already."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

    gate = gate_of(
        versions(), "padded to the longest of a batch; reference scored in every step (the default)"
    )
    train_offline(
        spec,
        gate,
        Tokenised,
        model=language_model(spec),
        ref_model=language_model(spec),
        args=DPOConfig(**common(spec, spec["batch"]), max_length=spec["length"], beta=0.1),
        train_dataset=rows,
        processing_class=tokenizer(spec),
        data_collator=DataCollatorForPreference(pad_token_id=0, max_length=spec["length"]),
    )


def generate(spec: dict, gate_of: Any) -> None:
    """As GRPOTrainer generates: `generate` with its generation config, a batch at a time."""
    import torch
    from transformers import GenerationConfig

    prompts, stops = worker.data_of(spec)["prompts"], spec["stops"]
    model = language_model(spec).eval()
    if stops:
        model.lm_head.weight.data.zero_()
    config = GenerationConfig(
        max_new_tokens=spec["new"],
        do_sample=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=stops or None,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        disable_compile=True,
    )
    if not stops:
        model.generation_config.eos_token_id = None  # what a config leaves out comes from here
    gate, ends = gate_of(versions(), f"transformers generate, {spec['batch']} rows at a time"), {*stops}
    while True:
        tokens = 0
        for _ in range(spec["steps"]):
            for start in range(0, len(prompts), spec["batch"]):
                ids = torch.tensor(prompts[start : start + spec["batch"]])
                with torch.no_grad():
                    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
                tokens += sum(worker.useful(row, ends) for row in out[:, ids.shape[1] :].tolist())
        gate.passed(tokens)


def grpo(spec: dict, gate_of: Any) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    prompts, group = worker.data_of(spec)["prompts"], spec["group"]
    answers = spec["batch"] * group
    options = common(spec, answers) | {
        "num_generations": group,
        "max_completion_length": spec["new"],
        "beta": 0.04,
        "temperature": 1.0,
    }
    gate = gate_of(versions(), "defaults")
    trainer = GRPOTrainer(
        model=kept(language_model(spec), spec),
        args=GRPOConfig(**options),
        train_dataset=Dataset.from_list([{"prompt": worker.words(ids)} for ids in prompts]),
        reward_funcs=lambda completions, **_: worker.variety(completions),
        processing_class=tokenizer(spec),
    )
    tokens = answers * (spec["prompt"] + spec["new"]) * spec["steps"]
    trainer.add_callback(at_gate(gate, spec["steps"], lambda: tokens))
    trainer.train()


def ppo(spec: dict, gate_of: Any) -> None:
    """In an environment of its own: later releases have no PPO."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    rows = Dataset.from_list([{"input_ids": ids} for ids in worker.data_of(spec)["prompts"]])
    options = common(spec, spec["batch"]) | {
        "total_episodes": 10_000_000,
        "max_steps": -1,
        "num_ppo_epochs": spec["epochs"],
        "num_mini_batches": 1,
        "response_length": spec["new"],
        "local_rollout_forward_batch_size": spec["batch"],
        "num_sample_generations": 0,
        "temperature": 1.0,
        "kl_coef": 0.05,
    }
    tokens = spec["batch"] * (spec["prompt"] + spec["new"]) * spec["steps"]
    gate = gate_of(versions(), "separate value and reward models; one minibatch")
    classifier = lambda: language_model(spec, "LlamaForSequenceClassification", num_labels=1)  # noqa: E731
    PPOTrainer(
        args=PPOConfig(**options),
        processing_class=tokenizer(spec),
        model=language_model(spec),
        ref_model=language_model(spec),
        reward_model=classifier(),
        value_model=classifier(),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[at_gate(gate, spec["steps"], lambda: tokens)],
    ).train()


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
