"""What share of its devices' FLOP/s a train step uses: `perf/mfu`, `perf/hfu` and what they are made of.

A step's model FLOPs are those that its models need for the tokens that there are: of prompts and answers alike, whether
they carry loss or not, but not of padding. Its hardware FLOPs are those that its passes do: padding and what the
backward pass computes again are in them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrlhf.hardware import hardware_of
from jrlhf.models.attention import attention_implementation
from jrlhf.models.config import ModelConfig
from jrlhf.models.flops import Passed, backward_flops, forward_flops, recomputed_flops
from jrlhf.models.transformer import Model
from jrlhf.ops.masking import positions_from_mask
from jrlhf.ops.on_policy import OnPolicyConfig
from jrlhf.types import Array, PackedAnswers, Rollout, SequenceBatch


class Pass(NamedTuple):
    """That a batch goes through a model: forward, or forward and backward."""

    model: Model
    trained: bool = True
    times: float = 1.0


class StepFlops(NamedTuple):
    """Of all devices together, [] float32 each."""

    needed: Array  # by the models
    done: Array  # by the devices

    def plus(self, other: "StepFlops") -> "StepFlops":
        return StepFlops(self.needed + other.needed, self.done + other.done)

    def times(self, factor: Any) -> "StepFlops":
        return StepFlops(self.needed * factor, self.done * factor)

    def metrics(self) -> dict[str, Array]:
        return {"perf/model_flops": self.needed, "perf/hardware_flops": self.done}


def counted(train_step: Callable, flops: Callable[[Any], StepFlops] | None) -> Callable:
    """`(state, batch) -> (state, metrics)` with `flops(batch)` among the metrics, where they are to be counted."""
    if flops is None:
        return train_step

    def step(state: Any, batch: Any) -> tuple[Any, dict]:
        state, metrics = train_step(state, batch)
        return state, {**metrics, **flops(batch).metrics()}

    return step


def flops_of_passes(passes: Sequence[Pass], batch: Any, group: int = 1) -> StepFlops:
    """Of a batch that goes through these models. group: rows next to each other whose prompt goes through once."""
    needed, done = jnp.float32(0.0), jnp.float32(0.0)
    for model, trained, times in passes:
        config, outputs = model.config, model.heads if model.head == "scalar" else None
        real, padded = passed(config, batch, group)
        model_flops, hardware_flops = (forward_flops(config, x, outputs) for x in (real, padded))
        if trained:
            model_flops += backward_flops(config, real, outputs)
            hardware_flops += backward_flops(config, padded, outputs) + recomputed_flops(config, padded)
        needed, done = needed + times * model_flops, done + times * hardware_flops
    return StepFlops(needed, done)


def sampled_flops(model: Model, samples: Rollout, group: int = 1) -> StepFlops:
    """Of drawing `group` answers to each prompt. A cache keeps what was computed, so that the devices do no more than
    is needed: each prompt once, and the tokens that are drawn."""
    flops = forward_flops(model.config, passed(model.config, samples, group)[0])
    return StepFlops(flops, flops)


class OnlineFlops:
    """Of an iteration of an on-policy algorithm: answers are drawn, scored by policy, critic and reference, and learned
    from in epochs. A reward model's own passes are not counted."""

    def __init__(self, model: Model, critic: Model | None, config: OnPolicyConfig) -> None:
        self._config = config
        learners = (model,) if critic is None else (model, critic)
        self._trained = tuple(Pass(m, times=config.epochs) for m in learners)
        if config.kl == "full" and config.beta:
            self._trained += (Pass(model.base, False, config.epochs),)
        self._scored: tuple[Pass, ...] = (Pass(model.base, False),)
        if not config.scored_in_update:
            self._scored += tuple(Pass(m, False) for m in learners)
        self._drawn = jax.jit(self._of_samples)

    def of_update(self, batch: Any) -> StepFlops:
        """Of a batch's update, as a part of it."""
        found = flops_of_passes(self._trained, batch, self._config.shared_group)
        text = getattr(batch.extra, "ptx", None)
        return found if text is None else found.plus(flops_of_passes(self._trained[:1], text))

    def metrics(self, of_update: dict, samples: Rollout, rounds: int) -> dict[str, Array]:
        """Of a whole iteration, whose update's metrics tell its own; `rounds` of answers like these were drawn."""
        done = of_update["perf/model_flops"], of_update["perf/hardware_flops"]
        updates = of_update["policy/updates"] if self._config.stop_kl else None
        found = self._drawn(StepFlops(*done), updates, samples, rounds).metrics()
        if self._config.length_buckets > 1:  # which of its lengths a microbatch took is not known
            of_update.pop("perf/hardware_flops")
            found.pop("perf/hardware_flops")
        return found

    def _of_samples(
        self, update: StepFlops, updates: Array | None, samples: Rollout, rounds: int
    ) -> StepFlops:
        config, model = self._config, self._trained[0].model
        if updates is not None:  # an early stop leaves some out
            update = update.times(updates / (config.epochs * config.minibatches))
        drawn = sampled_flops(model, samples, config.group_size).times(rounds)
        return update.plus(flops_of_passes(self._scored, samples, config.shared_group)).plus(drawn)


def passed(config: ModelConfig, batch: Any, group: int = 1) -> tuple[Passed, Passed]:
    """(the real tokens, all positions) of a batch of any kind: of sequences, packed or not, or of answers."""
    if isinstance(batch.tokens, PackedAnswers):
        packed = batch.tokens
        mask, seen, slots = packed.segment_ids != 0, packed.positions + 1, packed.owners
        predicted = slots >= 0
    elif isinstance(batch, SequenceBatch):
        mask, seen, predicted = batch.segment_ids != 0, batch.positions + 1, batch.loss_mask
        slots = mask if isinstance(batch.targets, tuple) else batch.targets
    else:
        mask = batch.mask.reshape(-1, batch.mask.shape[-1])
        seen = positions_from_mask(mask) + 1
        predicted = slots = getattr(batch, "response_mask", mask)
    rows, length = mask.shape
    # Answers have slots of their own, behind those of the prompt.
    prompt = np.arange(length) < length - predicted.shape[-1]
    share = np.where(prompt, 1 / group, 1.0).astype(np.float32)
    weight = mask.astype(jnp.float32) * share[None]
    keys = jnp.sum(weight * _keys(config, seen.astype(jnp.float32)))
    real = Passed(jnp.sum(weight), keys, jnp.sum(predicted, dtype=jnp.float32))
    each: Any = np.arange(1, length + 1, dtype=np.float32)
    if attention_implementation(config, length, length) == "xla":
        each[:] = length  # what is masked is computed all the same
    else:
        each = _keys(config, each, np)
    return real, Passed(rows * share.sum(), rows * (share * each).sum(), slots.size)


def _keys(config: ModelConfig, seen: Array, np: Any = jnp) -> Array:
    """What a token that sees so many keys attends to, a mean over layers."""
    windowed = sum(config.layers_windowed) / config.n_layers
    if not windowed:
        return seen
    return (1.0 - windowed) * seen + windowed * np.minimum(seen, float(config.window))


def peak_flops(mesh: Mesh, *models: Model) -> float:
    """FLOP/s of all devices of a mesh in the models' dtype; 0 where one's kind is not known, or the dtypes differ."""
    dtypes = {model.config.dtype for model in models}
    kinds = [hardware_of(device.device_kind) for device in mesh.devices.flat]
    if len(dtypes) != 1 or None in kinds:
        return 0.0
    return sum(hardware.peak(*dtypes) for hardware in kinds if hardware is not None)
