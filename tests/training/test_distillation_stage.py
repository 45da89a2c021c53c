"""Distillation as a stage: a small student, a larger teacher, demonstrations and the student's own samples."""

import json
from dataclasses import replace

import pytest
import tiny
from tiny_runs import QUIET, evaluated, folders, one_device, only, trained

from jrlhf.algorithms.distillation import DistillationConfig
from jrlhf.checkpoint import load_meta
from jrlhf.config import UserError
from jrlhf.data.tokenizer import load_tokenizer, train_sentencepiece
from jrlhf.experiment import run
from jrlhf.lab import LarderDemonstrations, LarderPrompts
from jrlhf.models.config import LoRAConfig
from jrlhf.training.stages import Distill, TokenizerConfig
from jrlhf.training.stages.distillation import same_vocabulary

pretrain = tiny.experiment.stages["pretrain"]
small = replace(pretrain, model=replace(pretrain.model, d_model=8), loop=tiny.loop(2), eval_rows=8)
distill = Distill(
    start="small",
    teacher="sft",
    data=LarderDemonstrations(size=96),
    prompts=LarderPrompts(size=32),
    algorithm=DistillationConfig("jsd", on_policy=0.5),
    sampling=tiny.answers,
    optim=tiny.adam,
    loop=tiny.loop(6, eval_every=3),
    eval_rows=8,
    eval_prompts=tiny.prompts,
)
adapted = replace(
    distill, start="pretrain", prompts=None, eval_prompts=None, algorithm=DistillationConfig(),
    lora=LoRAConfig(rank=2), loop=tiny.loop(4),
)  # fmt: skip
stages = tiny.experiment.stages | {"small": small, "distill": distill}


@pytest.fixture(scope="module")
def left(one_device_runs):
    kept = only("pretrain", "sft", small=small, distill=distill, adapted=adapted)
    with one_device():
        return folders(run(kept, one_device_runs, console=QUIET))


def test_steps_are_of_demonstrations_and_of_own_samples(left):
    rows = trained(left["distill"])
    own = [row["distill/on_policy"] for row in rows]
    assert len(rows) == 6
    assert set(own) == {0.0, 1.0}
    assert all(("rollout/len_mean" in row) == bool(o) for row, o in zip(rows, own, strict=True))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_the_student_comes_nearer_to_the_teacher_and_keeps_its_size(left):
    first, last = evaluated(left["distill"])
    for name in ("eval/forward_kl", "eval/reverse_kl"):
        assert 0 < last[name] < first[name], name
    assert last["eval/teacher_kl/mean"] > 0
    assert load_meta(left["distill"] / "model")["model"]["d_model"] == 8
    results = json.loads((left["distill"] / "done.json").read_text())["results"]
    assert results["forward_kl"] == pytest.approx(last["eval/forward_kl"])


def test_an_adapter_learns_the_teacher_of_its_own_base(left):
    losses = [row["train/loss"] for row in trained(left["adapted"])]
    assert losses[-1] < losses[0]
    assert (left["adapted"] / "adapter").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "small"}, "the student's own start"),
        ({"data": None}, "data: demonstrations are learned from"),
        ({"prompts": None}, "prompts: the student answers them"),
        ({"algorithm": DistillationConfig()}, "give prompts then, and only then"),
        ({"algorithm": DistillationConfig(on_policy=1.0)}, "give data then, and only then"),
        ({"loop": replace(tiny.loop(1), steps=0, epochs=1.0)}, "loop.epochs"),
        ({"algorithm": DistillationConfig(on_policy=0.5, microbatches=3)}, "algorithm.microbatches 3"),
    ],
)
def test_mistakes_are_found_before_anything_runs(changes, message):
    with pytest.raises(UserError, match=message):
        replace(distill, **changes).validate(stages)


def test_a_teacher_of_another_vocabulary_is_refused_before_anything_runs(tmp_path):
    distill.validate(stages)
    other = replace(pretrain, tokenizer=TokenizerConfig(model_type="word", vocab_size=64))
    message = "'sft' has another vocabulary than the student 'other'"
    with pytest.raises(UserError, match=message):
        replace(distill, start="other").validate(stages | {"other": other})
    for n in (0, 1):
        texts = [f"{'ab'[n]}{i} {'ab'[n]}{i + 1}" for i in range(30)]
        train_sentencepiece(texts, 40, tmp_path / str(n), "word")
    given = [replace(pretrain, tokenizer=TokenizerConfig(path=str(tmp_path / str(n)))) for n in (0, 1)]
    with pytest.raises(UserError, match="another vocabulary"):
        Distill(start="a", teacher="b", data=LarderDemonstrations(size=96), loop=tiny.loop(1)).validate(
            {"a": given[0], "b": given[1]}
        )


def test_vocabularies_are_compared_by_what_their_ids_say(tmp_path):
    texts = [f"a b c {w}" for w in "defgh"] * 4
    first = train_sentencepiece(texts, 32, tmp_path / "first", "word")
    card = tmp_path / "first" / "generation_config.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"eos_token_id": [5]}))
    other_end = load_tokenizer(tmp_path / "first")
    other = train_sentencepiece([t.replace("a", "z") for t in texts], 32, tmp_path / "other", "word")
    assert first.fingerprint() != other_end.fingerprint()
    assert same_vocabulary(first, other_end)
    assert first.vocab_size == other.vocab_size
    assert not same_vocabulary(first, other)
