"""Floating-point operations of a decoder, by arithmetic.

Counted are the matrix products, an addition and a multiplication as two: of a token with every weight that it meets
(2 N forward, 4 N backward, Kaplan et al. 2020), and of attention. N has the head's V x D, but not the embedding, which
is looked up; of a mixture of experts a token meets its own and the router. Norms, softmax and the optimiser are left
out.

In attention a token meets the keys that it sees, itself and those before it in its own text: half a row on average,
where PaLM's formula (Chowdhery et al. 2022, appendix B) has the whole row.
"""

from typing import Any, NamedTuple

from jrlhf.models.config import ModelConfig


class Passed(NamedTuple):
    """What goes through a model: numbers, or arrays [] float32."""

    tokens: Any  # through the layers
    keys: Any  # that these attend to, added up over the tokens (of layers that differ the mean)
    predicted: Any  # tokens whose successor, or score, the head computes


class Flops(NamedTuple):
    """Of one token in all layers, forward."""

    weights: float  # products with weights that are trained where all parameters are
    adapters: float  # with those of LoRA
    attention: float  # for each key that it attends to
    head: float  # for each token that is predicted
    again: float  # of `weights`, what the backward pass computes again (`ModelConfig.remat`)
    attention_again: float  # of `attention`
    adapters_again: float


def rows_passed(config: ModelConfig, tokens: float, length: int) -> Passed:
    """So many tokens in texts of `length` tokens, each of which predicts its successor."""
    seen = [min(length, config.window) if windowed else length for windowed in config.layers_windowed]
    # The first w - 1 tokens of a text see fewer than w.
    keys = sum(w - w * (w - 1) / (2 * length) for w in seen)
    return Passed(tokens, tokens * keys / config.n_layers, tokens)


def train_flops(config: ModelConfig, tokens: float, length: int) -> float:
    """FLOPs that a language model needs to learn from so many tokens in texts of `length` tokens: a forward and a
    backward pass. With adapters (`config.lora`) the frozen weights have no gradient of their own: 4 N instead of 6 N,
    and 6 for each parameter of the adapters."""
    passed = rows_passed(config, tokens, length)
    return forward_flops(config, passed) + backward_flops(config, passed)


def forward_flops(config: ModelConfig, passed: Passed, outputs: int | None = None) -> Any:
    """FLOPs of a forward pass. outputs: of the head (None: the vocabulary; of a scalar head their number)."""
    of = flops_of(config, outputs)
    return (
        passed.tokens * (of.weights + of.adapters) + passed.keys * of.attention + passed.predicted * of.head
    )


def backward_flops(config: ModelConfig, passed: Passed, outputs: int | None = None) -> Any:
    """FLOPs of a backward pass: the gradients of activations and of what is trained."""
    of = flops_of(config, outputs)
    of_weights = 1 if config.lora.rank else 2
    # A scalar head is trained beside adapters too; a language model's is the base's.
    of_head = 1 if config.lora.rank and outputs is None else 2
    by_token = of_weights * of.weights + 2 * of.adapters
    return passed.tokens * by_token + 2 * passed.keys * of.attention + of_head * passed.predicted * of.head


def recomputed_flops(config: ModelConfig, passed: Passed) -> Any:
    """FLOPs that the backward pass does once more, of layers whose products are not kept. What a kernel of attention
    computes again for itself is not among them."""
    of = flops_of(config)
    return passed.tokens * (of.again + of.adapters_again) + passed.keys * of.attention_again


def flops_of(config: ModelConfig, outputs: int | None = None) -> Flops:
    c = config
    d, n, k, h, f = c.d_model, c.n_heads, c.n_kv_heads, c.head_size, c.d_ff
    sizes = {"attn/q": (d, n * h), "attn/k": (d, k * h), "attn/v": (d, k * h), "attn/o": (n * h, d)}
    into = ("mlp/gate", "mlp/up") if c.gated_mlp else ("mlp/up",)
    times = c.moe.per_token if c.moe.experts else 1
    sizes |= dict.fromkeys(into, (d, times * f)) | {"mlp/down": (times * f, d)}
    if c.moe.experts:
        sizes["router"] = (d, c.moe.experts)
    product = {name: 2 * a * b for name, (a, b) in sizes.items()}
    adapter = {name: 2 * c.lora.rank * sum(sizes[name]) for name in c.adapted_layers}
    again = recomputed_products(c)
    total = lambda of, names: float(c.n_layers * sum(of[name] for name in names if name in of))  # noqa: E731
    attention = 4.0 * c.n_layers * n * h
    return Flops(
        weights=total(product, sizes),
        adapters=total(adapter, sizes),
        attention=attention,
        head=2.0 * d * (c.vocab_size if outputs is None else outputs),
        again=total(product, again),
        attention_again=attention if "attention" in again else 0.0,
        adapters_again=total(adapter, again),
    )


def recomputed_products(config: ModelConfig) -> tuple[str, ...]:
    """Of a layer: those whose results the backward pass needs and does not find. The last product's nobody needs, but
    that of experts, which are weighted by the router."""
    from jrlhf.models.transformer import kept_of_layers

    kept = kept_of_layers(config).removeprefix("offload_")
    if kept == "none":
        return ()
    experts = ("mlp/gate", "mlp/up", "mlp/down")
    if kept == "dots":  # a product of some rows with each expert's weights is not what its policy calls one
        return ("attention", *(experts if config.moe.experts else ()))
    mlp = ("router", *experts) if config.moe.experts else ("mlp/gate", "mlp/up")
    only_added = config.parallel_residual and config.norm_placement == "pre"  # nobody reads it but a sum
    return (
        *(() if "attention" in kept else ("attn/q", "attn/k", "attn/v", "attention")),
        *(() if only_added else ("attn/o",)),
        *(() if "mlp" in kept else mlp),
    )
