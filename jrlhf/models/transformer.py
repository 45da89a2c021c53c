"""One decoder for policy, reference, critic and reward model; sampling and training call the same layers.

Parameters are a plain dict:

    embed/embedding [V, D]          layers/{attn_norm, attn/{q,k,v,o}, mlp_norm, mlp/{gate,up,down}} [L, ...]
    final_norm/scale [D]            lm_head/kernel [D, V] (untied language model)
    score/{kernel [D, 1], bias [1]} (scalar head: reward model, critic)
"""

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from jrlhf.models.config import ModelConfig
from jrlhf.models.layers import Block, LayerCache, RMSNorm, fan_in, gathered, logical
from jrlhf.ops.logprobs import chunked_logprobs_and_entropy, logprobs_and_entropy
from jrlhf.ops.masking import positions_from_mask
from jrlhf.sharding import constrain, path_names
from jrlhf.types import Params

Cache = list[LayerCache]

REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Decoder(nn.Module):
    """Embedding, scanned layers, final norm and the head's parameters. Returns hidden states [B, T, D]."""

    config: ModelConfig
    head: str

    @nn.compact
    def __call__(self, tokens_BT, positions_BT, mask_BTT):
        c = self.config
        x_BTD = Embed(c, name="embed")(tokens_BT)
        block = Block
        if c.remat != "none":
            # prevent_cse is only needed outside a scan
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.n_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BTD, _ = layers(c, name="layers")(x_BTD, positions_BT, mask_BTT)
        x_BTD = RMSNorm(c.norm_eps, name="final_norm")(x_BTD)
        if self.head == "scalar":
            ScalarHead(name="score")(x_BTD)
        elif not c.tie_embeddings:
            UntiedHead(c, name="lm_head")(x_BTD[:, :1])
        return x_BTD


class Embed(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT):
        c = self.config
        init = logical(nn.initializers.normal(0.02), "vocab", "embed")
        table_VD = self.param("embedding", init, (c.vocab_size, c.d_model), jnp.float32)
        # Without the constraint the gather's result loses its split over the batch.
        table_VD = gathered(table_VD, c.dtype, "vocab", "embed")
        return constrain(table_VD[tokens_BT], "batch", "length", "act_embed")


class UntiedHead(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        kernel = self.param(
            "kernel", logical(fan_in((0,)), "embed", "vocab"), (c.d_model, c.vocab_size), jnp.float32
        )
        return x_BTD @ kernel.astype(x_BTD.dtype)


class ScalarHead(nn.Module):
    """A linear scalar head, kernel ~ N(0, 1 / (d + 1)) (Stiennon et al. 2020), in float32."""

    @nn.compact
    def __call__(self, x_BTD):
        d = x_BTD.shape[-1]
        init = nn.initializers.normal((d + 1) ** -0.5)
        kernel = self.param("kernel", logical(init, "embed", "scalar"), (d, 1), jnp.float32)
        bias = self.param("bias", logical(nn.initializers.zeros, "scalar"), (1,), jnp.float32)
        return scalar_head({"kernel": kernel, "bias": bias}, x_BTD)


def scalar_head(head: Params, x_BTD: jax.Array) -> jax.Array:
    """[B, T] float32 scores."""
    return jnp.einsum("BTD,D->BT", x_BTD.astype(jnp.float32), head["kernel"][:, 0]) + head["bias"][0]


def causal_mask(segment_ids_BT: jax.Array) -> jax.Array:
    """[B, T, T]: a token sees itself and earlier tokens of its own segment; segment 0 is padding."""
    t = segment_ids_BT.shape[1]
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return same & (segment_ids_BT != 0)[:, None, :] & jnp.tril(jnp.ones((t, t), bool))[None]


@dataclass(frozen=True)
class Model:
    """A decoder and its head as pure functions of `params`. Hashable, so it may be closed over or static."""

    config: ModelConfig
    head: Literal["lm", "scalar"] = "lm"

    def _decoder(self) -> Decoder:
        return Decoder(self.config, self.head)

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters."""
        ids = jnp.ones((1, 2), jnp.int32)
        return meta.unbox(self._decoder().init(key, ids, ids, causal_mask(ids))["params"])

    def logical_axes(self) -> dict[tuple[str, ...], tuple[str | None, ...]]:
        """Parameter path -> logical axis names, for `sharding.state_shardings`."""
        ids = jnp.ones((1, 2), jnp.int32)
        boxed = jax.eval_shape(
            lambda k: self._decoder().init(k, ids, ids, causal_mask(ids)), jax.random.key(0)
        )
        is_box = lambda x: isinstance(x, meta.AxisMetadata)  # noqa: E731
        leaves, _ = jax.tree_util.tree_flatten_with_path(boxed["params"], is_leaf=is_box)
        return {path_names(path): box.names for path, box in leaves}

    def hidden(self, params: Params, tokens_BT, segment_ids_BT, positions_BT=None) -> jax.Array:
        """Hidden states [B, T, D] after the final norm.

        `segment_ids` (0 = padding, any side) may be a bool mask; without `positions` they count real tokens
        of a row, so packed rows must pass them.
        """
        segment_ids_BT = segment_ids_BT.astype(jnp.int32)
        if positions_BT is None:
            positions_BT = positions_from_mask(segment_ids_BT != 0)
        return _apply(self._decoder(), params, tokens_BT, positions_BT, causal_mask(segment_ids_BT))

    def lm_kernel(self, params: Params) -> jax.Array:
        """[D, V] float32: the head that makes logits of hidden states."""
        if self.config.tie_embeddings:
            return gathered(params["embed"]["embedding"], jnp.float32, "vocab", "embed").T
        return gathered(params["lm_head"]["kernel"], jnp.float32, "embed", "vocab")

    def logits(self, params: Params, hidden_BTD: jax.Array) -> jax.Array:
        """[B, T, V] float32. For a few positions (a decode step, a test): training uses `logprobs`."""
        kernel = self.lm_kernel(params).astype(hidden_BTD.dtype)
        return constrain(
            jnp.einsum("BTD,DV->BTV", hidden_BTD, kernel, preferred_element_type=jnp.float32),
            "batch",
            "length",
            "vocab",
        )

    def logprobs_of_hidden(self, params, hidden_BTD, targets_BT, temperature) -> tuple[jax.Array, jax.Array]:
        """Log-probability of each target and the entropy there, [B, T] float32, at a temperature."""
        chunk = self.config.logits_chunk
        if chunk and chunk < targets_BT.shape[1]:
            # The kernel goes in as it is (float32), so that its gradient is summed over chunks in float32.
            kernel = self.lm_kernel(params)
            return chunked_logprobs_and_entropy(hidden_BTD, kernel, targets_BT, temperature, chunk=chunk)
        return logprobs_and_entropy(self.logits(params, hidden_BTD), targets_BT, temperature)

    def logprobs(
        self, params, tokens_BT, segment_ids_BT, start: int = 1, temperature=1.0, positions_BT=None
    ) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities and entropies of tokens [start, T) given what precedes them, each [B, T - start].

        Only the positions that predict them reach the head. Padding and segment starts hold numbers without
        meaning: mask them.
        """
        hidden = self.hidden(params, tokens_BT, segment_ids_BT, positions_BT)
        return self.logprobs_of_hidden(params, hidden[:, start - 1 : -1], tokens_BT[:, start:], temperature)

    def scores(self, params: Params, tokens_BT, segment_ids_BT, positions_BT=None) -> jax.Array:
        """Scalar head at every token, [B, T] float32."""
        return scalar_head(params["score"], self.hidden(params, tokens_BT, segment_ids_BT, positions_BT))

    # --- decoding: the same blocks, unrolled, with an explicit cache -------------------------------------------

    def decode_params(self, params: Params) -> Params:
        """Parameters as decoding wants them: layers as a list, in the compute dtype. Once per rollout."""
        # Norm scales ([L, D]) stay float32 as in training: rounding them would make the sampler another policy.
        cast = jax.tree.map(lambda x: x.astype(self.config.dtype) if x.ndim > 2 else x, params["layers"])
        layers = [jax.tree.map(lambda x, i=i: x[i], cast) for i in range(self.config.n_layers)]
        return params | {"layers": layers}

    def init_cache(self, rows: int, slots: int) -> Cache:
        shape = (rows, self.config.n_kv_heads, slots, self.config.head_dim)
        empty = lambda: constrain(jnp.zeros(shape, self.config.dtype), "batch", "kv_heads", None, None)  # noqa: E731
        return [LayerCache(empty(), empty()) for _ in range(self.config.n_layers)]

    def decode(
        self, decode_params: Params, tokens_BT, positions_BT, mask_BTS, cache: Cache, slot
    ) -> tuple[jax.Array, Cache]:
        """T new tokens written at cache slots [slot, slot + T): hidden states [B, T, D] and the new cache.

        `mask_BTS` says which slots each new token sees. Prefill is the call with T = prompt length.
        """
        c = self.config
        x_BTD = _apply(Embed(c), decode_params["embed"], tokens_BT)
        new_cache = []
        for layer, layer_cache in zip(decode_params["layers"], cache, strict=True):
            x_BTD, layer_cache = _apply(Block(c), layer, x_BTD, positions_BT, mask_BTS, layer_cache, slot)
            new_cache.append(layer_cache)
        return _apply(RMSNorm(c.norm_eps), decode_params["final_norm"], x_BTD), new_cache


def _apply(module: nn.Module, params: Params, *args) -> Any:
    """The module's result. Flax's `apply` is typed as if it might return updated variables beside it."""
    return module.apply({"params": params}, *args)


def with_scalar_head(params: Params, key: jax.Array) -> Params:
    """A language model's parameters with the LM head off and a fresh linear scalar head on."""
    d = params["final_norm"]["scale"].shape[0]
    head = {
        "kernel": jax.random.normal(key, (d, 1), jnp.float32) * (d + 1) ** -0.5,
        "bias": jnp.zeros((1,), jnp.float32),
    }
    return {k: v for k, v in params.items() if k != "lm_head"} | {"score": head}


def fold_normalization(params: Params, mean: float, std: float) -> Params:
    """A reward model whose scores are (score - mean) / std."""
    score = params["score"]
    return params | {"score": {"kernel": score["kernel"] / std, "bias": (score["bias"] - mean) / std}}
