"""Where a model comes from: a checkpoint with its adapter, a larger vocabulary, a classifier as the reward, and a
pretrained mixture of experts."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from tiny_runs import QUIET, evaluated, folders, one_device, trained
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.algorithms.reward_model import sequence_scores
from jrlhf.algorithms.sft import SFTConfig
from jrlhf.checkpoint import load_meta, load_params
from jrlhf.config import MeshConfig, UserError
from jrlhf.data.sources import FileSource
from jrlhf.experiment import Experiment, dry_run, run
from jrlhf.models.config import LoRAConfig, MoEConfig
from jrlhf.models.lora import leaves
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import load_model
from jrlhf.training.stages import PPO, SFT, BestOfN, Checkpoint, RewardCheckpoint, RewardModel

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "hf"
CUBE = MeshConfig(data=2, fsdp=2, tensor=2)
LORA = LoRAConfig(rank=2)


def write_tokenizer(folder: Path, ids: int) -> str:
    """A tokenizer of words w4, w5, ... and four special tokens, as large as asked."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = [*special, *(f"w{n}" for n in range(len(special), ids))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special[:3]])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    card = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(card))
    return str(folder)


@pytest.fixture
def tokenizer(tmp_path) -> str:
    return write_tokenizer(tmp_path / "tokenizer", 96)


def checkpoint(name: str, tokenizer: str, **fields) -> Checkpoint:
    return Checkpoint(str(GOLDEN / name), tokenizer, **fields)


def ran(tmp_path: Path, mesh: MeshConfig | None = None, **stages) -> dict[str, Path]:
    """The folders of these stages, run on one device, or on a mesh."""
    experiment = Experiment("from-checkpoints", stages, mesh=mesh or MeshConfig())
    if mesh is not None:
        return folders(run(experiment, tmp_path / "runs", console=QUIET))
    with one_device():
        return folders(run(experiment, tmp_path / "runs", console=QUIET))


def loaded(folder: Path, head="lm"):
    return load_model(folder, make_mesh(MeshConfig(data=1), jax.devices()[:1]), head)


def outputs(folder: Path, golden, head="lm") -> np.ndarray:
    """Logits at the real golden tokens, or the scores at each row's last one, of a stage's model."""
    found = loaded(folder, head)
    tokens = jnp.asarray(golden["tokens"])
    mask = np.arange(tokens.shape[1])[None] < golden["lengths"][:, None]
    if head == "scalar":
        return np.asarray(sequence_scores(found.model, found.params, tokens, jnp.asarray(mask)))
    hidden = found.model.hidden(found.params, tokens, jnp.asarray(mask))
    return np.asarray(found.model.logits(found.params, hidden))[mask]


# --- checkpoints --------------------------------------------------------------------------------------------


def test_a_peft_adapter_is_merged_as_peft_merges_it(tokenizer, tmp_path):
    base = checkpoint("llama", tokenizer, adapter=str(GOLDEN / "lora_r4"))
    golden = np.load(GOLDEN / "lora_r4" / "golden.npz")
    found = outputs(ran(tmp_path, base=base)["base"], golden)
    np.testing.assert_allclose(found, golden["merged_logits"], rtol=0, atol=2e-4)


def test_a_larger_tokenizer_makes_new_rows_on_a_mesh(tmp_path):
    """A new token's logit is the mean of the old ones', and the rows that only pad are no tokens."""
    base = checkpoint("llama", write_tokenizer(tmp_path / "t", 98), grow_vocabulary=True, vocab_multiple=4)
    golden = np.load(GOLDEN / "llama" / "golden.npz")
    folder = ran(tmp_path, CUBE, base=base)["base"]
    logits = outputs(folder, golden)
    config = loaded(folder).model.config
    assert (config.vocab_size, config.padded_vocab, logits.shape[1]) == (98, 100, 100)
    np.testing.assert_allclose(logits[:, :96], golden["logits"], rtol=0, atol=2e-4)
    mean = golden["logits"].mean(axis=1, keepdims=True)
    np.testing.assert_allclose(logits[:, 96:98], np.broadcast_to(mean, (len(mean), 2)), rtol=0, atol=2e-4)
    assert np.all(logits[:, 98:] == -np.inf)


def test_a_vocabulary_is_padded_to_divide(tokenizer, tmp_path):
    base = checkpoint("llama", tokenizer, vocab_multiple=64)
    golden = np.load(GOLDEN / "llama" / "golden.npz")
    logits = outputs(ran(tmp_path, base=base)["base"], golden)
    assert logits.shape[1] == 128
    np.testing.assert_allclose(logits[:, :96], golden["logits"], rtol=0, atol=2e-4)
    assert np.all(logits[:, 96:] == -np.inf)


def test_a_classifier_is_a_reward(tokenizer, tmp_path):
    words = [{"prompt": f"w{n} w{n + 1} w{n + 2}"} for n in range(10, 18)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    left = ran(
        tmp_path,
        base=checkpoint("llama", tokenizer),
        judge=RewardCheckpoint(str(GOLDEN / "llama_scalar"), tokenizer),
        best=BestOfN(
            "base",
            "judge",
            prompts=FileSource(str(tmp_path / "prompts.jsonl"), "prompt"),
            samples=4,
            sampling=SamplingConfig(max_new_tokens=6),
        ),
    )
    golden = np.load(GOLDEN / "llama_scalar" / "golden.npz")
    assert load_meta(left["judge"] / "model")["head"] == "scalar"
    assert "normalization" not in load_meta(left["judge"] / "model")  # as they are
    scores = outputs(left["judge"], golden, "scalar")
    np.testing.assert_allclose(scores, golden["scores"], rtol=0, atol=2e-4)
    table = json.loads((left["best"] / "best_of_n.json").read_text())
    proxy = np.asarray([table["per_prompt"]["proxy"][str(n)] for n in (1, 2, 4)])
    assert np.all(np.diff(proxy, axis=0) > 0)  # the best of more is better, for each prompt


PREFERENCES = [
    {"prompt": f"w{n} w{n + 1}", "responses": [f"w{n + 2}", f"w{n + 3} w5"], "ranks": [1, 2]}
    for n in range(8, 24)
]


def test_adapters_beside_a_bfloat16_base_with_a_head_of_its_own(tokenizer, tmp_path):
    """The base keeps its type and bits through reward model and PPO; adapters and scores are float32. The reward
    model has no use for the base's head."""
    data = tmp_path / "preferences.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PREFERENCES))
    only_q = replace(LORA, targets=("q",))
    answers = SamplingConfig(max_new_tokens=4)
    left = ran(
        tmp_path,
        base=checkpoint("llama", tokenizer, param_dtype="bfloat16"),
        rm=RewardModel(
            "base", data=FileSource(str(data), "preference"), eval_fraction=0.25, lora=only_q, loop=tiny.loop(1)
        ),
        ppo=PPO(
            "base",
            "rm",
            prompts=FileSource(str(data), "prompt"),
            eval_prompts=FileSource(str(data), "prompt"),
            algorithm=PPOConfig(epochs=1, minibatches=1),
            sampling=answers,
            optim=tiny.adam,
            lora=only_q,
            loop=tiny.loop(2),
        ),
    )  # fmt: skip
    params = {name: dict(leaves(load_params(left[name] / "model")[0])) for name in left}
    assert ("lm_head", "kernel") in params["base"]
    assert set(params["ppo"]) == set(params["base"])
    assert set(params["rm"]) == set(params["base"]) - {("lm_head", "kernel")} | {
        ("score", "kernel"), ("score", "bias"),
    }  # fmt: skip
    for name in ("rm", "ppo"):
        assert loaded(left[name], "scalar" if name == "rm" else "lm").model.config.param_dtype == "bfloat16"
        adapter, _ = load_params(left[name] / "adapter")
        assert {x.dtype for _, x in leaves(adapter)} == {np.dtype(np.float32)}
        for path, x in params[name].items():
            if path[0] == "score":
                assert x.dtype == np.float32
                continue
            before = params["base"][path]
            assert x.dtype == before.dtype == ml_dtypes.bfloat16
            assert np.array_equal(x, before) == (path[-1] != "q"), path
    rows = trained(left["ppo"])
    assert [row["policy/ratio_max"] for row in rows] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert rows[0]["kl/ref_k1"] == pytest.approx(0, abs=1e-5)
    assert all(np.isfinite(list(row.values())).all() for row in rows + evaluated(left["ppo"]))


def test_mistakes_in_a_checkpoint_are_told_before_anything_runs(tokenizer, tmp_path):
    large = write_tokenizer(tmp_path / "large", 97)
    base = checkpoint("llama", tokenizer)
    judge = RewardCheckpoint(str(GOLDEN / "llama_scalar"), tokenizer)
    data = tiny.experiment.stages["sft"].data
    ppo = PPO(
        "base",
        "judge",
        prompts=tiny.prompts,
        lora=LORA,
        sampling=SamplingConfig(max_new_tokens=4),
        loop=tiny.loop(1),
    )
    balanced = SFT("base", data=data, algorithm=SFTConfig(balance_coef=0.1), loop=tiny.loop(1))

    def refused(**stages) -> str:
        with pytest.raises(UserError) as error:
            dry_run(Experiment("mistaken", stages), tmp_path / "runs")
        return " ".join(str(error.value).split())

    found = refused(base=checkpoint("llama", large))
    assert found.startswith("stages.base: tokenizer: ")
    assert "has 97 ids, but the model has only 96 tokens. Set grow_vocabulary" in found
    assert "no tokenizer.json or tokenizer.model there" in refused(base=Checkpoint(str(GOLDEN / "llama")))
    assert "critic 'reward' with adapters needs" in refused(base=base, judge=judge, ppo=ppo)
    assert "balance_coef is for a mixture of experts" in refused(base=base, sft=balanced)
    adapted = lambda folder: replace(base, adapter=str(GOLDEN / folder))  # noqa: E731
    assert "use_dora True is not supported" in refused(base=adapted("lora_dora"))
    assert "no such checkpoint folder" in refused(base=adapted("lora_r5"))
    assert "is a LlamaForCausalLM, not a LlamaForSequenceClassification" in refused(
        judge=RewardCheckpoint(str(GOLDEN / "llama"), tokenizer)
    )
    assert "is a LlamaForSequenceClassification" in refused(base=checkpoint("llama_scalar", tokenizer))
    dry_run(
        Experiment("right", {"base": checkpoint("mixtral", tokenizer), "sft": balanced}), tmp_path / "runs"
    )


# --- a mixture of experts -----------------------------------------------------------------------------------


def test_a_mixture_of_experts_is_pretrained_and_tuned_on_a_mesh(tmp_path):
    model = replace(tiny.experiment.stages["pretrain"].model, vocab_multiple=2, moe=MoEConfig(experts=4))
    balanced = SFTConfig(balance_coef=0.05)
    left = ran(
        tmp_path,
        CUBE,
        pretrain=replace(
            tiny.experiment.stages["pretrain"], model=model, algorithm=balanced, loop=tiny.loop(4)
        ),
        sft=replace(tiny.experiment.stages["sft"], start="pretrain", lora=LORA, loop=tiny.loop(2)),
    )
    rows = trained(left["pretrain"])
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]
    assert all(2 <= row["train/balance_loss"] < 4 for row in rows)  # per_token and experts
    assert not any("train/balance_loss" in row for row in trained(left["sft"]))
    base, tuned = (dict(leaves(load_params(left[name] / "model")[0])) for name in ("pretrain", "sft"))
    changed = {path[-1] for path, x in tuned.items() if not np.array_equal(x, base[path])}
    assert changed == {"q", "k", "v", "o"}
