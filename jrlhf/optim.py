"""The optimiser: AdamW with a clipped gradient and a learning rate that warms up and decays."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from jrlhf.config import UserError, did_you_mean
from jrlhf.types import Params

Schedule = Literal["constant", "cosine", "linear"]
StateDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019). Steps are optimiser updates: PPO makes several in a train step.

    Weight decay leaves alone the parameters whose own name is `scale` or `bias` (norms and biases).
    """

    lr: float = 3e-4  # the peak
    schedule: Schedule = "constant"  # what follows the warm-up, until the last step
    warmup_steps: int = 0  # update n (from 0) of the warm-up uses lr * (n + 1) / warmup_steps
    final_lr: float = 0.0  # cosine and linear: fraction of lr left at the end
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # largest global norm of the gradient; 0 does not clip
    # Type of Adam's first moment, for memory's sake. The second is always float32: at b2 = 0.999 it changes
    # by less than bfloat16 can tell apart, and would stand still.
    state_dtype: StateDtype = "float32"

    def __post_init__(self):
        for field, known in (("schedule", get_args(Schedule)), ("state_dtype", get_args(StateDtype))):
            value = getattr(self, field)
            if value not in known:
                raise UserError(f"OptimConfig.{field} is {value!r}.{did_you_mean(value, known)}")
        for field in ("lr", "warmup_steps", "weight_decay", "grad_clip"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"OptimConfig.{field} is {value}: it must be 0 or more")
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"OptimConfig.{field} is {getattr(self, field)}: it must be in [0, 1)")
        if not 0 <= self.final_lr <= 1:
            raise UserError(
                f"OptimConfig.final_lr is {self.final_lr}: it is a fraction of lr, between 0 and 1"
            )
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise UserError(f"OptimConfig.eps is {self.eps}: it must be above 0")


class Optimizer(NamedTuple):
    """An optimiser as the algorithms use it: pure functions, to be called inside a train step."""

    transform: optax.GradientTransformation
    learning_rate: Callable[[Any], jax.Array]  # number of updates done -> [] float32, of the next update
    trainable_mask: Any  # pytree of bool like the parameters, or None: all of them

    def init(self, params: Params) -> Any:
        return self.transform.init(params)

    def apply(self, grads: Params, opt_state: Any, params: Params) -> tuple[Params, Any, jax.Array]:
        """(new params, new opt_state, global norm of the trainable gradients before clipping, [] float32)."""
        if self.trainable_mask is None:
            trained = grads
        else:
            trained = jax.tree.map(lambda on, g: g if on else None, self.trainable_mask, grads)
        grad_norm = optax.tree.norm(_cast(trained, jnp.float32))
        updates, opt_state = self.transform.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, grad_norm


def build_optimizer(config: OptimConfig, total_steps: int, trainable_mask: Any = None) -> Optimizer:
    """`make_optimizer` and `learning_rate` as one record. Same arguments and errors as `make_optimizer`."""
    transform = make_optimizer(config, total_steps, trainable_mask)
    return Optimizer(transform, learning_rate(config, total_steps), trainable_mask)


def make_optimizer(
    config: OptimConfig, total_steps: int, trainable_mask: Any = None
) -> optax.GradientTransformation:
    """Clip -> Adam -> decoupled weight decay -> learning rate; the arithmetic is in float32.

    Args:
      total_steps: how many updates there will be; the schedule ends there.
      trainable_mask: pytree of bool like the parameters. Where False, the parameter stays as it is, has no
        moments, and its gradient does not count in the norm that is clipped. None trains everything.

    Raises:
      UserError: `total_steps` is below 1.
    """
    schedule = learning_rate(config, total_steps)
    chain = optax.chain(
        optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity(),
        _scale_by_adam(config.b1, config.b2, config.eps, jnp.dtype(config.state_dtype)),
        optax.add_decayed_weights(config.weight_decay, decayed) if config.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )
    chain = _in_float32(chain)
    if trainable_mask is None:
        return chain
    frozen = jax.tree.map(lambda on: not on, trainable_mask)
    return optax.chain(optax.masked(chain, trainable_mask), optax.masked(optax.set_to_zero(), frozen))


def learning_rate(config: OptimConfig, total_steps: int) -> Callable[[Any], jax.Array]:
    """The schedule: number of updates done (int or [] int32) -> learning rate of the next one, [] float32.

    It rises linearly to `lr` over `warmup_steps` updates (the first is not wasted on a rate of 0), then falls
    to `final_lr * lr` at `total_steps` and stays there. A run shorter than its warm-up never reaches `lr`.

    Raises:
      UserError: `total_steps` is below 1.
    """
    if total_steps < 1:
        raise UserError(f"an optimiser needs at least 1 step, and total_steps is {total_steps}")
    warmup = config.warmup_steps
    decay_steps = max(total_steps - warmup, 1)

    def rate(step) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup) / decay_steps, 0.0, 1.0)
        if config.schedule == "constant":
            left = jnp.ones_like(done)
        elif config.schedule == "linear":
            left = config.final_lr + (1.0 - config.final_lr) * (1.0 - done)
        else:
            left = config.final_lr + (1.0 - config.final_lr) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        risen = jnp.minimum((step + 1.0) / warmup, 1.0) if warmup else 1.0
        return config.lr * risen * left

    return rate


def decayed(params: Params) -> Any:
    """Pytree of bool: which parameters weight decay shrinks (not those named `scale` or `bias`)."""

    def decays(path, _) -> bool:
        return jax.tree_util.keystr(path[-1:], simple=True) not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(decays, params)


def _scale_by_adam(b1: float, b2: float, eps: float, mu_dtype: Any) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015, algorithm 1) on float32 updates; its first moment is stored in `mu_dtype`.

    optax's own refuses to mix a bfloat16 moment with a float32 gradient under strict promotion.
    """

    def init(params) -> optax.ScaleByAdamState:
        zeros = lambda dtype: jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params)  # noqa: E731
        return optax.ScaleByAdamState(jnp.int32(0), mu=zeros(mu_dtype), nu=zeros(jnp.float32))

    def update(grads, state: optax.ScaleByAdamState, params=None):
        del params
        count = optax.safe_increment(state.count)
        t = count.astype(jnp.float32)
        mu = jax.tree.map(lambda g, m: b1 * m.astype(jnp.float32) + (1 - b1) * g, grads, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g * g, grads, state.nu)
        # 1 - b**t, without the cancellation that costs float32 four digits at b2 = 0.999.
        bias = lambda b: -jnp.expm1(t * math.log(b)) if b else 1.0  # noqa: E731
        bias_mu, bias_nu = bias(b1), bias(b2)
        updates = jax.tree.map(lambda m, v: m / bias_mu / (jnp.sqrt(v / bias_nu) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, _cast(mu, mu_dtype), nu)

    return optax.GradientTransformation(init, update)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on float32 copies; the updates come out in the parameters' types."""

    def init(params):
        return inner.init(_cast(params, jnp.float32))

    def update(grads, state, params):
        updates, state = inner.update(_cast(grads, jnp.float32), state, _cast(params, jnp.float32))
        return jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params), state

    return optax.GradientTransformation(init, update)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)
