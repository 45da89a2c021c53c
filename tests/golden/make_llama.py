"""Makes the Llama checkpoints and reference arrays that `tests/models/test_hf.py` reads.

    python tests/golden/make_llama.py [FOLDER]

Needs torch and transformers, which the tests do not. Writes, beside this file unless FOLDER is named,

    llama_untied/  grouped keys and values, head_dim other than d/heads, own rope_theta and eps; one file
    llama_tied/    tied embeddings, as many key-value heads as heads; shards and an index
    llama_scalar/  a sequence classifier of one label, bfloat16
    llama.npz      per checkpoint: tokens, mask (right-padded; *_left: left-padded), logits or scores, and the
                   greedy continuation of the left-padded rows; `versions` of what made them

Every parameter is random, norms included, and large enough for the logits to depend on all of it.
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

LENGTHS = (9, 5, 1)  # of the batch's rows
NEW_TOKENS = 12
SIZES = {
    "untied": dict(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, rope_theta=50_000.0, rms_norm_eps=1e-3, tie_word_embeddings=False,
        max_position_embeddings=64,
    ),
    "tied": dict(
        vocab_size=48, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=3, rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=64,
    ),
    "scalar": dict(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, tie_word_embeddings=False, max_position_embeddings=64, num_labels=1,
    ),
}  # fmt: skip


def make_model(kind: str, seed: int):
    config = LlamaConfig(**SIZES[kind], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    if "rope_theta" in SIZES[kind]:
        stored = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
        assert stored["rope_theta"] == SIZES[kind]["rope_theta"], stored
    torch.manual_seed(seed)
    model = (LlamaForSequenceClassification if kind == "scalar" else LlamaForCausalLM)(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            p.copy_(1 + 0.3 * noise if p.ndim == 1 else noise * (1.5 / p.shape[1] ** 0.5))
            if "embed_tokens" in name:
                p.copy_(0.5 * noise)
    return model.eval()


def batch(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded rows of unequal length; padding is filled with random ids, which nothing may see."""
    tokens = rng.integers(3, SIZES[kind]["vocab_size"], (len(LENGTHS), max(LENGTHS)))
    mask = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
    return tokens.astype(np.int32), mask


def left_padded(rows: np.ndarray) -> np.ndarray:
    return np.stack([np.roll(row, max(LENGTHS) - n) for row, n in zip(rows, LENGTHS, strict=True)])


@torch.no_grad()
def causal_lm_arrays(model, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    def logits(tokens, mask):
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        kw = {"attention_mask": torch.tensor(mask.astype(np.int64)), "position_ids": torch.tensor(positions)}
        return model(torch.tensor(tokens.astype(np.int64)), **kw).logits.float().numpy()

    out = {"tokens": tokens, "mask": mask, "logits": logits(tokens, mask)}
    tokens, mask = left_padded(tokens), left_padded(mask)
    out |= {"tokens_left": tokens, "mask_left": mask, "logits_left": logits(tokens, mask)}
    model.generation_config.eos_token_id = None  # the test compares a fixed number of tokens
    generated = model.generate(
        torch.tensor(tokens.astype(np.int64)),
        attention_mask=torch.tensor(mask.astype(np.int64)),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    top = torch.stack(generated.logits).topk(2, dim=-1).values
    margin = float((top[..., 0] - top[..., 1]).min())
    assert margin > 0.01, f"greedy margin {margin}: try another seed"  # identity must not hang on rounding
    out["greedy"] = generated.sequences[:, tokens.shape[1] :].numpy().astype(np.int32)
    return out


@torch.no_grad()
def scalar_arrays(model, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of each row's last real token, as the classifier itself picks it."""
    scores = []
    for row, n in zip(tokens, LENGTHS, strict=True):
        scores.append(model(torch.tensor(row[None, :n].astype(np.int64))).logits[0, 0].item())
    return {"tokens": tokens, "mask": mask, "scores": np.array(scores, np.float32)}


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for seed, kind in enumerate(SIZES):
        model = make_model(kind, seed)
        target = folder / f"llama_{kind}"
        if kind == "scalar":
            # What is compared is float32 arithmetic on the rounded weights. Casting the model that is run would
            # round its rotary frequencies too.
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(target)
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(p.to(torch.bfloat16).float())
        else:
            model.save_pretrained(target, max_shard_size="20KB" if kind == "tied" else "1GB")
        make = scalar_arrays if kind == "scalar" else causal_lm_arrays
        made = make(model, *batch(kind, rng))
        arrays |= {f"{kind}/{name}": array for name, array in made.items()}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__}"
    np.savez_compressed(folder / "llama.npz", versions=np.array(versions), **arrays)
    print(versions)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
