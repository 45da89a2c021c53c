"""Sampling rules on logits. B rows, V vocabulary; everything float32."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.config import UserError, no_fingerprint
from jrlhf.models.attention import platform
from jrlhf.sharding import RULES, constrain

NEG = -1e30  # a logit that is never sampled; finite, so that no NaN can come of it
CANDIDATES = 256  # of each row's largest logits, which mostly decide top-k and top-p


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn. Filters apply in this order: temperature, top-k, top-p, min-p."""

    max_new_tokens: int = 64
    temperature: float = 1.0  # divides logits; 0 is greedy
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the smallest set with at least this probability; 1: all
    min_p: float = 0.0  # keep tokens with at least this share of the most likely one's probability
    # Texts that end an answer once its tokens have written one of them. The tokens are kept, as a stop token is.
    stop: tuple[str, ...] = ()
    # Rows that are sampled at a time: each that ends leaves its slot to the next. 0: 16 a device on a CPU, else 256.
    slots: int = no_fingerprint(0)

    def __post_init__(self):
        checks = {
            "max_new_tokens": (self.max_new_tokens > 0, "positive"),
            "temperature": (self.temperature >= 0, "zero or more"),
            "top_k": (self.top_k >= 0, "zero or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1)"),
            "slots": (self.slots >= 0, "zero or more"),
        }
        for name, (ok, rule) in checks.items():
            if not ok:
                raise UserError(f"sampling.{name} must be {rule}, got {getattr(self, name)}")
        if isinstance(self.stop, str):
            raise UserError(f"sampling.stop must be a tuple of strings; write ({self.stop!r},)")
        if any(not text or "\ufffd" in text for text in self.stop):
            raise UserError(
                "sampling.stop: a stop string must not be empty, nor have U+FFFD, which stands for what is no text"
            )

    @property
    def filtered(self) -> bool:
        """Whether tokens are drawn from something else than the policy at its temperature."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0 or self.temperature == 0


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p", "min_p", "next_state"],
    meta_fields=["max_new_tokens", "stop_ids", "pad_id", "greedy", "use_top_k", "use_top_p", "use_min_p"],
)
@dataclass(frozen=True)
class Sampling:
    """A SamplingConfig as a jitted function takes it: values are traced, so that changing one recompiles
    nothing; only the maximum length, the stop ids, which filters exist and the shape of `next_state` are static."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    next_state: jax.Array | None  # [S, V] of the stop strings (`stop_table`); None without any
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    greedy: bool
    use_top_k: bool
    use_top_p: bool
    use_min_p: bool


def make_sampling(
    config: SamplingConfig, stop_ids: tuple[int, ...], pad_id: int, next_state: np.ndarray | None = None
) -> Sampling:
    """`stop_ids` end a response (EOS and any other); the stop token itself is kept and trained on.

    next_state: `stop_table` of `config.stop`, which must be given where there are stop strings.
    """
    if (next_state is None) != (not config.stop):
        raise ValueError("stop strings need their table, and without them there is none")
    return Sampling(
        temperature=jnp.asarray(config.temperature or 1.0, jnp.float32),
        top_k=jnp.asarray(config.top_k, jnp.int32),
        top_p=jnp.asarray(config.top_p, jnp.float32),
        min_p=jnp.asarray(config.min_p, jnp.float32),
        next_state=None if next_state is None else jnp.asarray(next_state),
        max_new_tokens=config.max_new_tokens,
        stop_ids=tuple(int(i) for i in stop_ids),
        pad_id=int(pad_id),
        greedy=config.temperature == 0,
        use_top_k=config.top_k > 0,
        use_top_p=config.top_p < 1,
        use_min_p=config.min_p > 0,
    )


def filter_logits(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits at the temperature with filtered tokens at NEG: their softmax is what is sampled."""
    x = logits_BV.astype(jnp.float32) / sampling.temperature
    if sampling.greedy:
        best = jnp.argmax(x, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(x.shape[-1])[None] == best, x, NEG)
    if sampling.use_top_k or sampling.use_top_p:
        filters = _filter_by_bits if _sorting_is_dear() else _filter_by_candidates
        x = filters(x, sampling)
    if sampling.use_min_p:
        x = jnp.where(x >= jnp.max(x, -1, keepdims=True) + jnp.log(sampling.min_p), x, NEG)
    return x


def _sorting_is_dear() -> bool:
    """Whether top-k of a row costs more than a few dozen passes over it: on a TPU, or where the mesh splits it."""
    return _vocab_ways() > 1 or platform() == "tpu"


def _vocab_ways() -> int:
    """Over how many devices the vocabulary is split here."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["vocab"])


def _filter_by_bits(x_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Top-k and top-p by passes over the whole vocabulary, one for each bit of a threshold."""
    if sampling.use_top_k:
        x_BV = jnp.where(x_BV >= _top_k_by_bits(x_BV, sampling.top_k), x_BV, NEG)
    if sampling.use_top_p:
        x_BV = jnp.where(x_BV >= _top_p_by_bits(x_BV, sampling.top_p), x_BV, NEG)
    return x_BV


def _filter_by_candidates(x_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """The same through each row's largest numbers, where these are enough to tell; else bit by bit.

    A row's threshold is found the same way whatever the other rows are.
    """
    size = min(CANDIDATES, x_BV.shape[-1])
    top_BC = jax.lax.top_k(x_BV, size)[0]
    all_are_candidates = size == x_BV.shape[-1]
    if sampling.use_top_k:
        kth_B1 = jax.lax.dynamic_slice_in_dim(top_BC, jnp.minimum(sampling.top_k, size) - 1, 1, axis=1)
        if not all_are_candidates:
            kth_B1 = jax.lax.cond(
                sampling.top_k <= size, lambda: kth_B1, lambda: _top_k_by_bits(x_BV, sampling.top_k)
            )
        x_BV = jnp.where(x_BV >= kth_B1, x_BV, NEG)
    if sampling.use_top_p:
        # Shares of the mass of all that is left, which may be more than the candidates. (What top-k has removed comes
        # last among these: top_p is reached before.)
        mass_BC = jnp.exp(top_BC - jax.nn.logsumexp(x_BV, axis=-1, keepdims=True))
        enough_BC = jnp.cumsum(mass_BC, axis=-1) >= sampling.top_p
        found_B1 = jnp.any(enough_BC, axis=-1, keepdims=True)
        last_B1 = jnp.take_along_axis(top_BC, jnp.argmax(enough_BC, axis=-1)[:, None], axis=1)
        if all_are_candidates:  # then only rounding can leave the mass below top_p: everything is kept
            last_B1 = jnp.where(found_B1, last_B1, -jnp.inf)
        else:
            last_B1 = jax.lax.cond(
                jnp.all(found_B1),
                lambda: last_B1,
                lambda: jnp.where(found_B1, last_B1, _top_p_by_bits(x_BV, sampling.top_p)),
            )
        x_BV = jnp.where(x_BV >= last_B1, x_BV, NEG)
    return x_BV


def _top_k_by_bits(x_BV: jax.Array, top_k: jax.Array) -> jax.Array:
    return _largest_threshold(x_BV, lambda kept: jnp.sum(kept, -1, keepdims=True) >= top_k)


def _top_p_by_bits(x_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    p_BV = jax.nn.softmax(x_BV, axis=-1)
    return _largest_threshold(
        x_BV, lambda kept: jnp.sum(jnp.where(kept, p_BV, 0.0), -1, keepdims=True) >= top_p
    )


def _largest_threshold(x_BV: jax.Array, enough) -> jax.Array:
    """The largest t, [B, 1], of each row's float32 numbers for which `enough(x >= t)` holds; -inf where none does.

    Floats are mapped to unsigned integers of the same order and t is found bit by bit: 32 passes, exact, and no
    sort. (There -0 is less than 0, which no mask x >= t can tell.)
    """
    bits = jax.lax.bitcast_convert_type(x_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order_BV = jnp.where(bits >= sign, ~bits, bits | sign)

    def set_bit(i, t_B1):
        candidate = t_B1 | (sign >> i.astype(jnp.uint32))
        return jnp.where(enough(order_BV >= candidate), candidate, t_B1)

    t_B1 = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros((x_BV.shape[0], 1), jnp.uint32))
    back_B1 = jax.lax.bitcast_convert_type(jnp.where(t_B1 >= sign, t_B1 ^ sign, ~t_B1), jnp.float32)
    return jnp.where(t_B1 == 0, -jnp.inf, back_B1)


def inverse_cdf(logits_BV: jax.Array, uniform_B: jax.Array, block: int = 256) -> jax.Array:
    """One exact draw per row from softmax(logits) with one uniform number per row, [B] int32.

    Two-level sum: pick the block of the vocabulary where the cumulative probability crosses, then the token in it.
    A twentieth of the cost of Gumbel noise for every token of a large vocabulary on a CPU. Devices that split the
    vocabulary have whole blocks each: they tell one another sums, and one block.
    """
    b, v = logits_BV.shape
    parts = _vocab_ways()
    each = v // parts
    width = min(block, each)
    x = logits_BV.reshape(b, parts, each)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -each % width)), constant_values=NEG)
    p = jnp.exp(x - jnp.max(x, axis=(1, 2), keepdims=True)).reshape(b, -1, width)
    # Whole on each device: a running sum over what is split goes from neighbour to neighbour, for which XLA has all
    # devices of a CPU wait for one another, also those whose rows have ended.
    block_sum_BN = constrain(jnp.sum(p, axis=-1), "batch", None)
    cum_BN = jnp.cumsum(block_sum_BN, axis=-1)
    target_B = uniform_B * cum_BN[:, -1]
    n_B = _first_above(cum_BN, block_sum_BN, target_B)
    before_B = jnp.take_along_axis(cum_BN - block_sum_BN, n_B[:, None], 1)[:, 0]
    p_BW = constrain(jnp.take_along_axis(p, n_B[:, None, None], axis=1)[:, 0], "batch", None)
    w_B = _first_above(jnp.cumsum(p_BW, axis=-1), p_BW, target_B - before_B)
    blocks = p.shape[1] // parts
    return (n_B // blocks * each + n_B % blocks * width + w_B).astype(jnp.int32)


def _first_above(cum, mass, target) -> jax.Array:
    """First index whose cumulative sum exceeds the target and that has mass; the heaviest if rounding leaves none."""
    above = (cum > target[:, None]) & (mass > 0)
    return jnp.where(jnp.any(above, -1), jnp.argmax(above, -1), jnp.argmax(mass, -1))


def row_keys(key: jax.Array, rows: int, first: jax.Array | int = 0) -> jax.Array:
    """One key per row, a function of the row's number alone: draws do not depend on how rows are batched."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(rows, dtype=jnp.int32))


def draw(logits_BV: jax.Array, keys_B: jax.Array, steps_B: jax.Array) -> jax.Array:
    """A token per row, each at a step of its own. Inverse CDF, except on a TPU, where Gumbel noise is cheaper than the
    gathers."""
    keys_B = jax.vmap(jax.random.fold_in)(keys_B, steps_B)
    if platform() == "tpu":
        return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
    return inverse_cdf(logits_BV, jax.vmap(lambda k: jax.random.uniform(k, dtype=jnp.float32))(keys_B))
