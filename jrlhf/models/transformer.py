"""One decoder for policy, reference, critic and reward model; sampling and training call the same layers.

Parameters are a plain dict:

    embed/embedding [V, D]          layers/{attn_norm, attn/{q,k,v,o}, mlp_norm, mlp/{gate,up,down}} [L, ...]
    final_norm/scale [D]            lm_head/kernel [D, V] (untied language model)
    score/{kernel [D, 1], bias [1]} (scalar head: reward model, critic; n heads: [D, n] and [n])
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jrlhf.models.attention import LayerCache, Segments, attention_implementation, empty_cache, platform
from jrlhf.models.config import LoRAConfig, ModelConfig, Remat
from jrlhf.models.layers import Block, View, Views, fan_in, gathered, logical, norm, product
from jrlhf.models.lora import join, split
from jrlhf.models.rope import rotation
from jrlhf.ops.distillation import chunked_divergence
from jrlhf.ops.kl import full_kl
from jrlhf.ops.logprobs import chunked_logprobs_and_entropy, logprobs_and_entropy, weighted_logprobs
from jrlhf.ops.masking import Places, at_places, lengthened, positions_from_mask
from jrlhf.sharding import (
    batch_ways,
    constrain,
    even_lengths,
    in_stretches,
    on_own_rows,
    out_of_stretches,
    path_names,
    sequence_ways,
    whole_lengths,
)
from jrlhf.types import Params

Cache = list[LayerCache]

# How many logits a device holds at a time where nobody says `logits_chunk`: on a CPU what stays in its caches (4 MiB),
# elsewhere 256 MiB.
LOGITS_AT_A_TIME = {"cpu": 2**20, "gpu": 2**26, "tpu": 2**26}
Normal = float | Sequence[float]  # of all scalar heads, or of each


def _offload(*names: str):
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=list(names),
        offload_src="device", offload_dst="pinned_host",
    )  # fmt: skip


_keep = jax.checkpoint_policies.save_only_these_names
ATTENTION, MLP = ("query", "key", "value", "attention"), ("gate", "up")  # as `layers` names them

# What the backward pass of a layer finds, beside its input; it computes the rest again.
REMAT = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": _keep(*ATTENTION),
    "mlp": _keep(*MLP),
    "attention_mlp": _keep(*ATTENTION, *MLP),
    "offload_attention": _offload(*ATTENTION),  # kept in the host's memory
    "offload_attention_mlp": _offload(*ATTENTION, *MLP),
}


def kept_of_layers(config: ModelConfig) -> Remat:
    """What `remat` is where it is left to the device. On a CPU writing everything down takes longer than computing the
    cheap part of it again; elsewhere speed comes first, and memory is what the user asks for."""
    if config.remat != "auto":
        return config.remat
    if platform() != "cpu":
        return "none"
    return "attention" if config.moe.experts else "attention_mlp"


class Decoder(nn.Module):
    """Embedding, scanned layers, final norm and the head's parameters.

    Returns hidden states [B, T, D], and of a mixture of experts [2, E]: each expert's share and mean probability.
    """

    config: ModelConfig
    head: str
    heads: int = 1

    @nn.compact
    def __call__(self, tokens_BT, positions_BT, mask_BTT, segments: Segments | None = None):
        """`segments`, where there are any, say what the mask says."""
        c = self.config
        x_BTD = Embed(c, name="embed")(tokens_BT, positions_BT)
        block = Block
        if (kept := kept_of_layers(c)) != "none":
            # prevent_cse is only needed outside a scan
            block = nn.remat(Block, policy=REMAT[kept], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.n_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        t = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        views = layer_views(c, positions_BT, mask_BTT, t, t, segments)
        windowed_L = jnp.asarray(c.layers_windowed)
        # The keys are nobody's; unused, they are not kept.
        x_BTD, (_, balance_L2E) = layers(c, name="layers")(x_BTD, windowed_L, views)
        x_BTD = norm(c, "final_norm")(x_BTD)
        if self.head == "scalar":
            ScalarHead(self.heads, name="score")(x_BTD)
        elif not c.tie_embeddings:
            UntiedHead(c, name="lm_head")(x_BTD[:, :1])
        return x_BTD, None if balance_L2E is None else jnp.mean(balance_L2E, axis=0)


def layer_views(
    config: ModelConfig, positions_BT, mask_BTS, query_slot_T, key_slot_S, segments: Segments | None = None
) -> Views:
    """What full and windowed layers see. Slots count a row's tokens, padding included, as distances go."""
    turn = config.positions == "rope"
    full = View(mask_BTS, rotation(config, positions_BT, False) if turn else None)
    if not any(config.layers_windowed):
        return Views(full, None, segments)
    near_TS = query_slot_T[:, None] - key_slot_S[None] < config.window
    windowed = View(mask_BTS & near_TS[None], rotation(config, positions_BT, True) if turn else None)
    only = all(config.layers_windowed)
    return Views(windowed, None, segments) if only else Views(full, windowed, segments)


class Embed(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BT, positions_BT):
        c = self.config
        init = logical(nn.initializers.normal(0.02), "vocab", "embed")
        dtype = jnp.dtype(c.param_dtype)
        table_VD = self.param("embedding", init, (c.padded_vocab, c.d_model), dtype)
        # Without the constraint the gather's result loses its split over the batch.
        table_VD = gathered(table_VD, c.dtype, "vocab", "embed")
        x_BTD = table_VD[tokens_BT]
        if c.scale_embedding:
            x_BTD = x_BTD * jnp.asarray(c.d_model**0.5, x_BTD.dtype)
        if c.positions == "learned":
            init = logical(nn.initializers.normal(0.02), "context", "embed")
            table_SD = self.param("positions", init, (c.context, c.d_model), dtype)
            x_BTD = x_BTD + gathered(table_SD, c.dtype, "context", "embed")[positions_BT]
        return constrain(x_BTD, "batch", "length", "act_embed")


class UntiedHead(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        kernel = self.param(
            "kernel",
            logical(fan_in((0,)), "embed", "vocab"),
            (c.d_model, c.padded_vocab),
            jnp.dtype(c.param_dtype),
        )
        return x_BTD @ kernel.astype(x_BTD.dtype)


class ScalarHead(nn.Module):
    """Linear scalar heads, kernel ~ N(0, 1 / (d + 1)) (Stiennon et al. 2020), in float32."""

    heads: int = 1

    @nn.compact
    def __call__(self, x_BTD):
        d = x_BTD.shape[-1]
        init = nn.initializers.normal((d + 1) ** -0.5)
        kernel = self.param("kernel", logical(init, "embed", "scalar"), (d, self.heads), jnp.float32)
        bias = self.param("bias", logical(nn.initializers.zeros, "scalar"), (self.heads,), jnp.float32)
        return scalar_heads({"kernel": kernel, "bias": bias}, x_BTD)


def scalar_heads(head: Params, x_BTD: jax.Array) -> jax.Array:
    """[B, T, n] float32 scores of every head."""
    scores_BTN = jnp.einsum("BTD,DN->BTN", x_BTD.astype(jnp.float32), head["kernel"])
    return whole_lengths(scores_BTN + head["bias"][None, None])


def scalar_head(head: Params, x_BTD: jax.Array) -> jax.Array:
    """[B, T] float32 scores of the only head."""
    if (n := head["kernel"].shape[1]) != 1:
        raise ValueError(f"there are {n} scalar heads where one is wanted: combine them (combine_heads)")
    scores_BT = jnp.einsum("BTD,D->BT", x_BTD.astype(jnp.float32), head["kernel"][:, 0]) + head["bias"][0]
    return whole_lengths(scores_BT)


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
    heads: int = 1  # scalar heads: members of an ensemble, or criteria

    @property
    def n_params(self) -> int:
        return sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(self.init, jax.random.key(0))))

    @property
    def base(self) -> "Model":
        """The same model without adapters."""
        return replace(self, config=replace(self.config, lora=LoRAConfig()))

    def whole(self, trained: Params, frozen: Params | None) -> Params:
        """All parameters: `trained` is all of them, or with adapters what is trained beside a frozen base."""
        if not self.config.lora.rank:
            return trained
        if frozen is None:
            raise ValueError("adapters need a frozen base beside them")
        return join(frozen, trained)

    def fresh_adapter(self, key: jax.Array) -> Params:
        """An adapter that changes nothing yet: A is random, B zero; a new scalar head where the model has one."""
        return jax.jit(lambda key: split(self.init(key))[1])(key)  # the compiler leaves out what is not kept

    def _decoder(self) -> Decoder:
        return Decoder(self.config, self.head, self.heads)

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters."""
        ids = jnp.ones((1, 2), jnp.int32)
        return meta.unbox(self._decoder().init(key, ids, ids, causal_mask(ids))["params"])

    def logical_axes(self) -> dict[tuple[str, ...], tuple[str | None, ...]]:
        """Parameter path -> logical axis names, for `sharding.state_shardings`."""

        def boxed_init():
            ids = jnp.ones((1, 2), jnp.int32)
            return self._decoder().init(jax.random.key(0), ids, ids, causal_mask(ids))

        # Nothing is computed: the mesh may be one that is only compiled for.
        boxed = jax.eval_shape(boxed_init)
        is_box = lambda x: isinstance(x, meta.AxisMetadata)  # noqa: E731
        leaves, _ = jax.tree_util.tree_flatten_with_path(boxed["params"], is_leaf=is_box)
        return {path_names(path): box.names for path, box in leaves}

    def hidden(
        self, params: Params, tokens_BT, segment_ids_BT, positions_BT=None, at: Places = None
    ) -> jax.Array:
        """Hidden states [B, T, D] after the final norm, or [B, A, D] `at` some places of each row.

        `segment_ids` (0 = padding, any side) may be a bool mask; without `positions` they count real tokens
        of a row, so packed rows must pass them.
        """
        return self.hidden_and_balance(params, tokens_BT, segment_ids_BT, positions_BT, at)[0]

    def hidden_and_balance(
        self, params: Params, tokens_BT, segment_ids_BT, positions_BT=None, at: Places = None
    ) -> tuple[jax.Array, jax.Array]:
        """`hidden`, and the load-balancing loss of a mixture of experts (0 for a dense model).

        E Σ_e share_e · probability_e over all layers and real tokens (Fedus et al. 2021, eq. 4): per_token at best.
        """
        segment_ids_BT = segment_ids_BT.astype(jnp.int32)
        if positions_BT is None:
            positions_BT = positions_from_mask(segment_ids_BT != 0)
        mask_BTT, segments = causal_mask(segment_ids_BT), Segments(segment_ids_BT, segment_ids_BT)
        hidden, balance = self.states(params, tokens_BT, positions_BT, mask_BTT, segments, at)
        if balance is None:
            return hidden, jnp.float32(0.0)
        return hidden, self.config.moe.experts * jnp.sum(balance[0] * balance[1])

    def states(
        self,
        params: Params,
        tokens_BT,
        positions_BT,
        mask_BTT,
        segments: Segments | None = None,
        at: Places = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Hidden states [B, T, D] or [B, A, D] of tokens that see what a mask says, and a `Decoder`'s balance.

        Nothing reads the last layer but `at` these places: its queries and its feed-forward block are computed there
        alone, where that saves enough (`_ends_early`).
        """
        c, length = self.config, tokens_BT.shape[1]
        if not self._ends_early(length, at):
            more = -length % sequence_ways()  # what no real token sees
            rows = whole_lengths((tokens_BT, positions_BT, mask_BTT, segments))
            rows = jax.tree.map(lambda x: lengthened(x, 1, more), rows)
            tokens_BT, positions_BT, mask_BTT, segments = rows
            mask_BTT = whole_lengths(lengthened(mask_BTT, 2, more))
            hidden_BTD, balance = _apply(self._decoder(), params, tokens_BT, positions_BT, mask_BTT, segments)
            return at_places(hidden_BTD[:, :length], at), balance
        slots = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        views = layer_views(c, positions_BT, mask_BTT, slots, slots, segments)

        def layer(x_BTD, of_layer):
            weights, windowed = of_layer
            return _apply(Block(c), weights, x_BTD, windowed, views)[0], None

        def last_layer(x_BTD, weights):
            return _apply(Block(c), weights, x_BTD, c.layers_windowed[-1], views, None, None, None, at)[0]

        if (kept := kept_of_layers(c)) != "none":
            layer = jax.checkpoint(layer, policy=REMAT[kept], prevent_cse=False)
            last_layer = jax.checkpoint(last_layer, policy=REMAT[kept])
        x_BTD = _apply(Embed(c), params["embed"], tokens_BT, positions_BT)
        before, last = (jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in (slice(-1), -1))
        x_BTD, _ = jax.lax.scan(layer, x_BTD, (before, jnp.asarray(c.layers_windowed[:-1])))
        return _apply(norm(c, "final_norm"), params["final_norm"], last_layer(x_BTD, last)), None

    def _ends_early(self, length: int, at: Places) -> bool:
        """Whether the last layer is computed at some places alone. For deep models it is not worth a second program of
        a layer; experts are balanced over all tokens; a kernel of all queries beats XLA's attention of many; and where
        the mesh splits lengths, some places are mostly those of some devices."""
        c = self.config
        if at is None or c.moe.experts or sequence_ways() > 1:
            return False
        share = (len(range(*at.indices(length))) if isinstance(at, slice) else at.shape[1]) / length
        few = attention_implementation(c, length, length) == "xla" or share <= 1 / 8
        return few and (1 - share) / c.n_layers >= 0.05

    def lm_kernel(self, params: Params) -> jax.Array:
        """[D, V] float32: the head that makes logits of hidden states."""
        if self.config.tie_embeddings:
            return gathered(params["embed"]["embedding"], jnp.float32, "vocab", "embed").T
        return gathered(params["lm_head"]["kernel"], jnp.float32, "embed", "vocab")

    def logits(self, params: Params, hidden_BTD: jax.Array) -> jax.Array:
        """[B, T, V] float32. For a few positions (a decode step, a test): training uses `logprobs`."""
        kernel = self.lm_kernel(params).astype(hidden_BTD.dtype)
        logits = product(hidden_BTD, kernel, 1, jnp.float32)
        return constrain(self.cap_logits(logits), "batch", "length", "vocab")

    def cap_logits(self, logits: jax.Array) -> jax.Array:
        """Soft-capped; the rows that pad the embedding are no tokens."""
        c = self.config
        if c.logits_softcap:
            logits = jnp.tanh(logits / c.logits_softcap) * c.logits_softcap
        if c.padded_vocab > c.vocab_size:
            is_token_V = jnp.arange(c.padded_vocab) < c.vocab_size
            logits = jnp.where(jnp.broadcast_to(is_token_V, logits.shape), logits, -jnp.inf)
        return logits

    def logprobs_of_hidden(
        self, params, hidden_BTD, targets_BT, temperature, needed_BT=None
    ) -> tuple[jax.Array, jax.Array]:
        """Log-probability of each target and the entropy there, [B, T] float32, at a temperature.

        Where `needed` is False there may be anything finite: stretches of which nothing is needed are left out.
        """
        chunk, length = self.logits_chunk(*targets_BT.shape), targets_BT.shape[1]
        if chunk * sequence_ways() < length:
            if needed_BT is None:
                needed_BT = jnp.ones(targets_BT.shape, bool)

            def chunked(shared, hidden, targets, needed):
                return chunked_logprobs_and_entropy(
                    hidden,
                    shared[0],
                    targets,
                    shared[1],
                    chunk=chunk,
                    of_logits=self.cap_logits,
                    needed=needed,
                )

            # The kernel goes in as it is (float32), so that its gradient is summed over chunks in float32.
            shared = self.lm_kernel(params), jnp.asarray(temperature, jnp.float32)
            rows = in_stretches((hidden_BTD, targets_BT, needed_BT))
            return out_of_stretches(on_own_rows(chunked, shared, *rows), length)
        hidden_BTD, targets_BT = even_lengths((hidden_BTD, targets_BT))
        told = whole_lengths(logprobs_and_entropy(self.logits(params, hidden_BTD), targets_BT, temperature))
        return jax.tree.map(lambda x: x[:, :length], told)

    def weighted_logprobs_of_hidden(
        self, params, hidden_BTD, targets_BT, weights_BT
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Σ weights · log-probability, [], with its gradient; the log-probabilities and entropies, [B, T] float32,
        without. For weights that are known beforehand: the logits are computed once (`ops.logprobs`)."""
        chunk, length = self.logits_chunk(*targets_BT.shape), targets_BT.shape[1]

        def weighted(kernel, hidden, targets, weights):
            total, *told = weighted_logprobs(
                hidden, kernel, targets, weights, chunk=chunk, of_logits=self.cap_logits
            )
            return total[None], *told

        rows = in_stretches((hidden_BTD, targets_BT, weights_BT))
        totals, *told = on_own_rows(weighted, self.lm_kernel(params), *rows)
        return jnp.sum(totals), *out_of_stretches(told, length)

    def logits_chunk(self, rows: int, positions: int) -> int:
        """Positions of each row whose logits are alive at a time, at least 1 and at most all (of those that a device
        has, where the mesh splits lengths)."""
        positions = -(-positions // sequence_ways())
        if self.config.logits_chunk:
            return min(self.config.logits_chunk, positions)
        mesh = jax.sharding.get_abstract_mesh()
        here = rows if mesh.empty else max(rows // batch_ways(mesh), 1)
        most = LOGITS_AT_A_TIME[platform()]
        return min(max(most // (here * self.config.padded_vocab), 1), positions)

    def logprobs(
        self,
        params,
        tokens_BT,
        segment_ids_BT,
        start: int = 1,
        temperature=1.0,
        positions_BT=None,
        group: int = 1,
    ) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities and entropies of tokens [start, T) given what precedes them, each [B, T - start].

        Only the positions that predict them reach the head. Padding and segment starts hold numbers without
        meaning: mask them.

        group > 1: rows next to each other have the same first `start` tokens, left-padded, which then go through the
        model once for all of them (`hidden_of_groups`).
        """
        hidden = self.predicting(params, tokens_BT, segment_ids_BT, start, positions_BT, group)
        needed_BT = jnp.asarray(segment_ids_BT)[:, start:].astype(bool)
        return self.logprobs_of_hidden(params, hidden, tokens_BT[:, start:], temperature, needed_BT)

    def predicting(
        self, params, tokens_BT, segment_ids_BT, start, positions_BT=None, group: int = 1
    ) -> jax.Array:
        """Hidden states that predict tokens [start, T): [B, T - start, D]."""
        if group > 1:
            if positions_BT is not None or len(tokens_BT) % group:
                raise ValueError(
                    f"{len(tokens_BT)} rows in groups of {group}: they must divide, and their positions are counted"
                )
            return self.hidden_of_groups(params, tokens_BT, segment_ids_BT, start, group)
        return self.hidden(params, tokens_BT, segment_ids_BT, positions_BT, at=slice(start - 1, -1))

    def hidden_of_groups(self, params: Params, tokens_BT, mask_BT, start: int, group: int) -> jax.Array:
        """Hidden states that predict tokens [start, T): [B, T - start, D].

        `group` rows next to each other share their prompt, the first `start` tokens (left-padded). It goes through the
        model once, and the group's answers attend to its keys and values and to their own: the forward and backward
        pass of Q * (P + G * R) tokens in place of Q * G * (P + R).
        """
        c, ways, answers = self.config, sequence_ways(), tokens_BT.shape[1] - start
        if ways > 1:  # both lengths divide
            more = ((0, 0), (-start % ways, -answers % ways))
            tokens_BT, mask_BT, start = (
                jnp.pad(tokens_BT, more),
                jnp.pad(mask_BT, more),
                start + -start % ways,
            )
        prompt_QP, answer_BR = tokens_BT[::group, :start], tokens_BT[:, start:]
        seen_BT = jnp.asarray(mask_BT).astype(jnp.int32) != 0
        positions_BT = positions_from_mask(seen_BT)
        text_BT = seen_BT.astype(jnp.int32)
        prompt_mask, own = causal_mask(text_BT[::group, :start]), causal_mask(text_BT[:, start:])
        before = jnp.broadcast_to(seen_BT[:, None, :start], (*own.shape[:2], start))
        answer_mask = jnp.concatenate([before, own], axis=2) & seen_BT[:, start:, None]
        slots = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        of_prompts = Segments(text_BT[::group, :start], text_BT[::group, :start])
        of_answers = Segments(text_BT[:, start:], text_BT)
        prompt_views = layer_views(
            c, positions_BT[::group, :start], prompt_mask, slots[:start], slots[:start], of_prompts
        )
        answer_views = layer_views(c, positions_BT[:, start:], answer_mask, slots[start:], slots, of_answers)

        def layer(carry, of_layer):
            x_QPD, x_BRD = carry
            weights, windowed = of_layer
            x_QPD, (keys, _) = _apply(Block(c), weights, x_QPD, windowed, prompt_views)
            x_BRD, _ = _apply(Block(c), weights, x_BRD, windowed, answer_views, None, None, keys)
            return (x_QPD, x_BRD), None

        if (kept := kept_of_layers(c)) != "none":
            layer = jax.checkpoint(layer, policy=REMAT[kept], prevent_cse=False)
        embedded = (
            _apply(Embed(c), params["embed"], prompt_QP, positions_BT[::group, :start]),
            _apply(Embed(c), params["embed"], answer_BR, positions_BT[:, start:]),
        )
        windowed_L = jnp.asarray(c.layers_windowed)
        (x_QPD, x_BRD), _ = jax.lax.scan(layer, embedded, (params["layers"], windowed_L))
        predicting = jnp.concatenate([jnp.repeat(x_QPD[:, -1:], group, axis=0), x_BRD[:, :-1]], axis=1)
        return _apply(norm(c, "final_norm"), params["final_norm"], predicting[:, :answers])

    def divergence(
        self,
        params: Params,
        other_params: Params,
        tokens_BT,
        segment_ids_BT,
        start: int = 1,
        temperature: jax.Array | float = 1.0,
        of: Callable[[jax.Array, jax.Array], jax.Array] = full_kl,
        other: "Model | None" = None,
        positions_BT=None,
        group: int = 1,
    ) -> jax.Array:
        """A divergence between this model's and another's next-token distributions, at the positions that predict
        tokens [start, T): [B, T - start] float32, over the whole vocabulary.

        `of(logits, other's logits)` is KL(this‖other) by default, exact at each state, without sampling noise; those
        of `ops.distillation` fit as well. `other` is the model of `other_params` (None: this one without adapters).
        The temperature divides the logits of both. Ids that only the larger vocabulary has are left out.

        Gradient: that of `of` at each state with respect to `params`; the other model is a constant. The tokens are
        constants too, so that on samples of this model it leaves out that the model chooses which states it reaches.
        Padding and segment starts hold numbers without meaning: mask them. `group` is that of `logprobs`.
        """
        other = self.base if other is None else other
        other_params = jax.lax.stop_gradient(other_params)
        rows = (tokens_BT, segment_ids_BT, start, positions_BT, group)
        hidden_BTD, other_BTD = self.predicting(params, *rows), other.predicting(other_params, *rows)
        sizes = {(c.vocab_size, c.padded_vocab) for c in (self.config, other.config)}
        shared = min(sizes)[0] if len(sizes) > 1 else self.config.padded_vocab

        def compare(logits, other_logits):
            return of(logits[..., :shared] / temperature, other_logits[..., :shared] / temperature)

        chunk, length = self.logits_chunk(*hidden_BTD.shape[:2]), hidden_BTD.shape[1]
        if chunk * sequence_ways() < length:
            kernels = (self.lm_kernel(params), other.lm_kernel(other_params))
            capped = lambda logits, others: compare(self.cap_logits(logits), other.cap_logits(others))  # noqa: E731
            chunked = lambda kernels, *states: chunked_divergence(capped, states, kernels, chunk=chunk)  # noqa: E731
            apart = on_own_rows(chunked, kernels, *in_stretches((hidden_BTD, other_BTD)))
            return out_of_stretches(apart, length)
        hidden_BTD, other_BTD = even_lengths((hidden_BTD, other_BTD))
        apart = compare(self.logits(params, hidden_BTD), other.logits(other_params, other_BTD))
        return whole_lengths(apart)[:, :length]

    def scores(
        self, params: Params, tokens_BT, segment_ids_BT, positions_BT=None, at: Places = None
    ) -> jax.Array:
        """Scalar head at every token, [B, T] float32, or `at` some, [B, A]."""
        return scalar_head(params["score"], self.hidden(params, tokens_BT, segment_ids_BT, positions_BT, at))

    def head_scores(
        self, params: Params, tokens_BT, segment_ids_BT, positions_BT=None, at: Places = None
    ) -> jax.Array:
        """Every scalar head at every token, [B, T, n] float32, or `at` some, [B, A, n]."""
        return scalar_heads(params["score"], self.hidden(params, tokens_BT, segment_ids_BT, positions_BT, at))

    # --- decoding: the same blocks, unrolled, with an explicit cache -------------------------------------------

    def decode_params(self, params: Params) -> Params:
        """Parameters as decoding wants them: layers as a list, in the compute dtype. Once per rollout."""

        # Norms stay as they are, as in training: rounding them would make the sampler another policy.
        def cast(path, x):
            return x if path_names(path)[-1] in ("scale", "bias") else x.astype(self.config.dtype)

        stacked = jax.tree_util.tree_map_with_path(cast, params["layers"])
        layers = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(self.config.n_layers)]
        return params | {"layers": layers}

    def init_cache(self, rows: int, slots: int) -> Cache:
        return [empty_cache(self.config, rows, slots) for _ in range(self.config.n_layers)]

    def decode(
        self,
        decode_params: Params,
        tokens_BT,
        positions_BT,
        mask_BTS,
        cache: Cache,
        slot,
        query_slots=None,
        key_slots=None,
        prefix: Cache | None = None,
    ) -> tuple[jax.Array, Cache]:
        """T new tokens written at cache slots [slot, slot + T): hidden states [B, T, D] and the new cache.

        `mask_BTS` says which slots each new token sees. Prefill is the call with T = prompt length. In a ring the slots
        are not in the order of the tokens: `query_slots` [T] and `key_slots` [S] then number them for windows.
        `prefix` is a cache of B / A rows, the slots before those of `cache`: A rows each attend to the same one.
        """  # fmt: skip
        c = self.config
        x_BTD = _apply(Embed(c), decode_params["embed"], tokens_BT, positions_BT)
        if query_slots is None:
            query_slots = slot + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
            key_slots = jnp.arange(mask_BTS.shape[2], dtype=jnp.int32)
        views = layer_views(c, positions_BT, mask_BTS, query_slots, key_slots)
        new_cache = []
        before: Sequence[LayerCache | None] = prefix or [None] * c.n_layers
        for layer, windowed, layer_cache, shared in zip(
            decode_params["layers"], c.layers_windowed, cache, before, strict=True
        ):
            x_BTD, (layer_cache, _) = _apply(
                Block(c), layer, x_BTD, windowed, views, layer_cache, slot, shared
            )
            new_cache.append(layer_cache)
        return _apply(norm(c, "final_norm"), decode_params["final_norm"], x_BTD), new_cache


def _apply(module: nn.Module, params: Params, *args) -> Any:
    """The module's result. Flax's `apply` is typed as if it might return updated variables beside it."""
    return module.apply({"params": params}, *args)


def with_scalar_head(params: Params, key: jax.Array, heads: int = 1) -> Params:
    """A language model's parameters with the LM head off and fresh linear scalar heads on."""
    d = params["final_norm"]["scale"].shape[0]
    head = {
        "kernel": jax.random.normal(key, (d, heads), jnp.float32) * (d + 1) ** -0.5,
        "bias": jnp.zeros((heads,), jnp.float32),
    }
    return {k: v for k, v in params.items() if k != "lm_head"} | {"score": head}


def fold_normalization(params: Params, mean: Normal, std: Normal) -> Params:
    """A reward model whose scores are (score - mean) / std; one mean and std for all heads, or one for each."""
    score = params["score"]
    mean_N, std_N = (np.atleast_1d(np.asarray(x, np.float32)) for x in (mean, std))
    return params | {
        "score": {"kernel": score["kernel"] / std_N[None], "bias": (score["bias"] - mean_N) / std_N}
    }


def combine_heads(params: Params, weights: Sequence[float]) -> Params:
    """A reward model of one head, whose score is the weighted sum of those that there are."""
    score, weights_N = params["score"], np.asarray(weights, np.float32)
    return params | {
        "score": {"kernel": score["kernel"] @ weights_N[:, None], "bias": (score["bias"] @ weights_N)[None]}
    }
