"""What docs/models.md shows: every snippet and command is executed, and its tables are what the code says."""

import inspect
import json
import math
import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny_runs import QUIET, one_device

from jrlhf.cli import main
from jrlhf.config import Stage, UserError
from jrlhf.data.tokenizer import train_sentencepiece
from jrlhf.experiment import Experiment, run
from jrlhf.models import families
from jrlhf.models.config import LoRAConfig, ModelConfig
from jrlhf.models.families import FAMILIES
from jrlhf.models.hf import config_from_hf, load_hf, save_hf
from jrlhf.models.lora import split
from jrlhf.models.transformer import Model, with_scalar_head

GUIDE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```", GUIDE, re.M | re.S)
TINY = ModelConfig(d_model=8, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=16, context=64, tie_embeddings=False)
# What makes an experiment of the guide tiny.
SMALLER = {
    "adapters.py": (
        "--stages.sft.eval_rows 1 --stages.rm.eval_fraction 0.5 --stages.ppo.sampling.max_new_tokens 4 "
        "--stages.ppo.loop.steps 1 --stages.ppo.loop.batch_size 4 --stages.sft.loop.batch_size 2 "
        "--stages.rm.loop.batch_size 2 --stages.ppo.too_long drop --stages.ppo.max_prompt 16"
    ),
    "experts.py": (
        "--stages.base.model.d_model 8 --stages.base.model.d_ff 8 --stages.base.model.n_layers 1 "
        "--stages.base.model.context 16 --stages.base.loop.batch_size 4 --stages.base.eval_rows 2 "
        "--stages.base.tokenizer.vocab_size 60"
    ),
}


def rows(path: str, *given: dict) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in given))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the checkpoints and the data that the guide names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JRLHF_RUNS", raising=False)
    text = "Once upon a time there was a tea pot . "
    tokenizer = train_sentencepiece([text] * 9, 60, "t")
    config = replace(TINY, vocab_size=tokenizer.vocab_size)
    params = Model(config).init(jax.random.key(0))
    specials = {"eos_ids": tokenizer.eos_ids, "pad_id": tokenizer.pad_id, "bos_id": tokenizer.bos_id}
    save_hf("path/to/llama", Model(config), params, "t", **specials)
    scored = with_scalar_head(params, jax.random.key(1))
    save_hf("path/to/reward-model", Model(config, "scalar"), scored, "t", **specials)
    train_sentencepiece([text] * 9, 64, "path/to/tokenizer", symbols=("<one>", "<two>"))
    rows("demonstrations.jsonl", *[{"prompt": f"a time {i}", "completion": "a tea pot"} for i in range(24)])
    pair = {"chosen": "a tea pot", "rejected": "a time"}
    rows("pairs.jsonl", *[{"prompt": f"Once {i}", **pair} for i in range(12)])
    rows("prompts.jsonl", *[{"prompt": f"a time {i}"} for i in range(4)])
    rows("texts.jsonl", *[{"text": text * 4} for _ in range(9)])
    before = jax.config.jax_compilation_cache_dir
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def statements(block: str) -> list[str]:
    """Those of a block, each with its lines."""
    return [m.group().strip() for m in re.finditer(r"^\S.*(?:\n(?:[ )\]}]).*)*", block, re.M)]


def test_every_snippet_and_command_does_what_it_shows(place, monkeypatch, capsys):
    monkeypatch.setattr(Console, "input", lambda *args, **kwargs: "/quit")
    names: dict = {}
    stages: dict[str, Stage] = {}
    for language, block in BLOCKS:
        if language == "bash":
            for command in block.splitlines():
                program, *words = shlex.split(command)
                more = SMALLER[words[1]].split() if words[0] == "run" else []
                with one_device():
                    code = main([*words, *more])
                printed = capsys.readouterr()
                assert (program, code, printed.err) == ("jrlhf", 0, ""), (command, printed.err)
        elif block.startswith("# "):
            Path(block.splitlines()[0].removeprefix("# ")).write_text(block)
        elif not block.startswith("OLMO2"):
            for statement in statements(block):
                if not re.match(r"\w*Checkpoint\(", statement):
                    exec(statement, names)
                    continue
                stages = {"it": eval(statement, names)}
                with one_device():
                    run(Experiment(f"one-{len(statement)}", stages), Path("runs"), console=QUIET)
    one_step_of_sft(names)
    assert load_hf("out/experts")[0].config.moe.experts == 8
    config = load_hf("out/merged")[0].config
    assert (config.hf_family, config.param_dtype) == ("llama", "bfloat16")
    card = json.loads(Path("out/adapter/adapter_config.json").read_text())
    assert (card["base_model_name_or_path"], card["r"]) == ("path/to/llama", 8)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert Path("out/copy", file).read_bytes() == Path("out/adapter", file).read_bytes()
    # What is merged is what was exported merged, which the base's bfloat16 rounds.
    loose = partial(np.testing.assert_allclose, rtol=0.02, atol=1e-3)
    jax.tree.map(
        loose, names["plain"], jax.tree.map(lambda x: x.astype(np.float32), load_hf("out/merged")[1])
    )
    assert names["model"].config.padded_vocab == 128


def one_step_of_sft(names: dict) -> None:
    """The loss is that of the logits shown, over the completion and its end token, and the step lowers it."""
    model = load_hf("path/to/llama")[0]
    batch, tokenizer = names["batch"], names["tokenizer"]
    learned = [int(t) for t in batch.tokens[0][batch.loss_mask[0]]]
    assert learned == [*tokenizer.encode(names["row"]["completion"]), tokenizer.eos_ids[0]]

    def loss(logits) -> float:
        logits = np.asarray(logits[0], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -np.mean([logprobs[t - 1, batch.tokens[0, t]] for t in np.flatnonzero(batch.loss_mask[0])])

    before = loss(names["logits"])
    np.testing.assert_allclose(before, names["metrics"]["train/loss"], rtol=1e-5)
    hidden = model.hidden(names["tuned"], names["ids"], names["mask"])
    assert loss(model.logits(names["tuned"], hidden)) < before


def test_the_table_of_families():
    table = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(\w+)` \|", GUIDE, re.M)
    assert {row[0]: row[1:] for row in table} == {
        name: (family.architectures["lm"], family.architectures["scalar"])
        for name, family in FAMILIES.items()
    }


def test_rotary_scaling_that_is_not_there_is_refused(tmp_path):
    scaling = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    card = {
        "model_type": "phi3",
        "vocab_size": 9,
        "hidden_size": 8,
        "intermediate_size": 8,
        "rope_scaling": scaling,
    }
    card |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"rope_scaling\.rope_type 'longrope' is not supported"):
        config_from_hf(tmp_path)


def test_the_family_that_is_shown_is_the_one_that_is_used():
    (shown,) = (block for _, block in BLOCKS if block.startswith("OLMO2"))
    assert shown in inspect.getsource(families)


def test_memory_of_ppo():
    """Counted in parameters: float32 ones with two moments where they are trained, beside the base in bfloat16."""
    config = ModelConfig(
        vocab_size=128_256, d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8, d_ff=8192, context=131_072
    )
    n = Model(config).n_params

    def adapter(head: str) -> int:
        model = Model(replace(config, lora=LoRAConfig(rank=8)), head)
        tree = split(jax.eval_shape(model.init, jax.random.key(0)))[1]
        return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))

    full = [12 * n, 12 * n, 4 * n, 4 * n]
    low = [12 * adapter("lm"), 12 * adapter("scalar"), 2 * n, 4 * adapter("scalar")]
    table = re.findall(r"^\| [\w ]+ \| (\d+\.\d+) \| (\d+\.\d+)", GUIDE, re.M)
    expected = [*zip(full, low, strict=True), (sum(full), sum(low))]
    assert table == [(f"{a / 1e9:.2f}", f"{b / 1e9:.2f}") for a, b in expected]
    assert f"({n / 1e9:.2f} billion parameters" in GUIDE
    assert f"linear layer has {adapter('lm') / 1e6:.1f} million" in " ".join(GUIDE.split())
