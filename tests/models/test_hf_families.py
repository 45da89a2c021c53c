"""Families of checkpoints: what transformers computes with each, and what it writes.

The cases lie in tests/golden/hf (`make_hf_families.py` tells what is in them); a folder of further ones, made by the
same script, is named by $JRLHF_HF_CASES. With $JRLHF_HF_SAVED set, the checkpoints that are saved here are left in
that folder, for the script's `--verify`.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jrlhf.config import UserError
from jrlhf.models.config import ModelConfig
from jrlhf.models.hf import config_from_hf, load_hf, save_hf
from jrlhf.models.transformer import Model
from jrlhf.rollout.rollout import response_ids, rollout
from jrlhf.rollout.sampling import SamplingConfig, make_sampling
from jrlhf.types import Params, Prompts

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "hf"
PLACES = [GOLDEN, *([Path(os.environ["JRLHF_HF_CASES"])] if os.environ.get("JRLHF_HF_CASES") else [])]
FOLDERS = sorted(p.parent for place in PLACES for p in place.glob("*/config.json"))
HELD = {f: set(np.load(f / "golden.npz")) for f in FOLDERS}
LANGUAGE_MODELS = [f for f in FOLDERS if "logits" in HELD[f]]
CLASSIFIERS = [f for f in FOLDERS if "scores" in HELD[f]]
DEFAULTS = json.loads((GOLDEN / "defaults.json").read_text())
MIXTURES = [f for f in FOLDERS if "aux_loss" in HELD[f]]

PROMPT, NEW = 24, 12  # slots of every case's prompts and continuations
TOLERANCE = 2e-4


def of(folders: list[Path]):
    """Parametrises by case; all tests of one case share what is compiled for it."""
    return pytest.mark.parametrize("case", folders, indirect=True, ids=lambda f: f.name)


@dataclass(frozen=True)
class Case:
    """A checkpoint, what transformers says of it, and the one forward pass that is compiled for it."""

    folder: Path
    golden: dict[str, np.ndarray]
    model: Model
    params: Params
    forward: (
        Callable  # (params, tokens, mask), 2 B rows -> (logits [2 B, T, V] or scores [2 B, T], balance loss)
    )

    @property
    def prompts(self) -> Prompts:
        """[B, PROMPT], left-padded."""
        lengths = self.golden["lengths"]
        shifted = [np.roll(row, PROMPT - n) for row, n in zip(self.golden["tokens"], lengths, strict=True)]
        return Prompts(np.stack(shifted), np.arange(PROMPT)[None] >= PROMPT - lengths[:, None])

    def on_both_sides(self) -> tuple[np.ndarray, np.ndarray]:
        """The forward pass at the real tokens, [2, sum(lengths), ...] for right and left padding; the balance."""
        right_mask = np.arange(PROMPT + NEW)[None] < self.golden["lengths"][:, None]
        right = np.pad(self.golden["tokens"], ((0, 0), (0, NEW)))
        left, left_mask = (np.pad(x, ((0, 0), (NEW, 0))) for x in self.prompts)
        mask = np.concatenate([right_mask, left_mask])
        out, balance = self.forward(self.params, np.concatenate([right, left]), mask)
        real = np.asarray(out)[mask]
        return real.reshape(2, -1, *real.shape[1:]), np.asarray(balance)


@pytest.fixture(scope="module")
def case(request) -> Case:
    folder = request.param
    with np.load(folder / "golden.npz") as arrays:
        golden = dict(arrays)
    assert golden["tokens"].shape[1] == PROMPT
    if folder in CLASSIFIERS:
        model, params = load_hf(folder, head="scalar")
        return Case(folder, golden, model, params, jax.jit(lambda *a: (model.scores(*a), 0.0)))
    model, params = load_hf(folder)

    def forward(params, tokens, mask):
        hidden, balance = model.hidden_and_balance(params, tokens, mask)
        return model.logits(params, hidden), balance

    return Case(folder, golden, model, params, jax.jit(forward))


def sample(case: Case, temperature: float):
    """A rollout from the prompts. The temperature is traced, so one compilation serves all but 0."""
    rule = make_sampling(SamplingConfig(max_new_tokens=NEW, temperature=temperature), (), 0)
    return jax.device_get(rollout(case.model, case.params, case.prompts, jax.random.key(3), rule))


# --- parity with transformers -------------------------------------------------------------------------------


@of(LANGUAGE_MODELS)
def test_logits_equal_transformers(case):
    for logits in case.on_both_sides()[0]:
        np.testing.assert_allclose(logits, case.golden["logits"], rtol=0, atol=TOLERANCE)


@of(MIXTURES)
def test_balance_loss_equals_transformers(case):
    """Padding has no part in it. Right- and left-padded rows together have the mean of either."""
    np.testing.assert_allclose(case.on_both_sides()[1], case.golden["aux_loss"], rtol=1e-5, atol=0)


@of(CLASSIFIERS)
def test_scores_equal_transformers(case):
    """At every token; what its classifier returns is the score of each row's last token."""
    for scores in case.on_both_sides()[0]:
        np.testing.assert_allclose(scores, case.golden["token_scores"], rtol=0, atol=TOLERANCE)
        last = scores[np.cumsum(case.golden["lengths"]) - 1]
        np.testing.assert_allclose(last, case.golden["scores"], rtol=0, atol=TOLERANCE)


@of(LANGUAGE_MODELS)
def test_greedy_continuations_equal_transformers(case):
    """Prompts of unequal length in one batch; transformers continued each alone. The best token leads by 0.005,
    which at this temperature is certainty, and shares its compilation with the next test's."""
    assert response_ids(sample(case, 1e-6)) == case.golden["greedy"].tolist()


@of(LANGUAGE_MODELS)
def test_prefill_and_decode_equal_one_forward_pass(case):
    """Log-probabilities of sampled tokens, from the cache and from the whole sequence at once."""
    out = sample(case, 1.0)
    logits, _ = case.forward(case.params, np.tile(out.tokens, (2, 1)), np.tile(out.mask, (2, 1)))
    logprobs = np.asarray(jax.nn.log_softmax(logits[: len(out.tokens), PROMPT - 1 : -1]))
    chosen = np.take_along_axis(logprobs, out.tokens[:, PROMPT:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.logprobs, chosen, rtol=0, atol=5e-5)
    assert out.response_mask.all()
    assert response_ids(out) != case.golden["greedy"].tolist()  # other tokens than the test above has seen


# --- files --------------------------------------------------------------------------------------------------


def card_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def explicit(config: ModelConfig) -> ModelConfig:
    """Families without the field are saved with the size that it stands for."""
    return replace(config, head_dim=config.head_size)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@of(FOLDERS)
def test_a_saved_checkpoint_is_what_transformers_wrote(case, tmp_path):
    """The same tensors, bit for bit; and its config.json describes the same model."""
    place = Path(os.environ.get("JRLHF_HF_SAVED") or tmp_path)
    folder = place / case.folder.name
    save_hf(folder, case.model, case.params, dtype="bfloat16", overwrite=True)
    assert explicit(config_from_hf(folder)) == explicit(config_from_hf(case.folder))
    ours, theirs = load_file(folder / "model.safetensors"), load_file(case.folder / "model.safetensors")
    assert sorted(ours) == sorted(theirs)
    assert [name for name, tensor in theirs.items() if not same_bits(ours[name], tensor)] == []
    assert {tensor.dtype.name for tensor in ours.values()} == {"bfloat16"}

    old, new = card_of(case.folder), card_of(folder)
    assert (new["model_type"], new["architectures"]) == (old["model_type"], old["architectures"])
    # A field under the same name says the same, in the same JSON. Where transformers wrote null, its config class
    # fills in what it stands for; ids that save_hf was not given are null.
    told = {k for k in {*old} & {*new} if old[k] is not None and not k.endswith("_token_id")}
    if not old.get("use_sliding_window"):
        told -= {"max_window_layers"}
    told -= {"transformers_version"}
    assert {k: new[k] for k in told if json.dumps(new[k]) != json.dumps(old[k])} == {}


@pytest.mark.parametrize(
    "folder", [f for f in FOLDERS if (f / "older_config.json").exists()], ids=lambda f: f.name
)
def test_older_files_describe_the_same_model(folder, tmp_path):
    """As transformers 4 wrote them, and most published checkpoints are."""
    shutil.copy(folder / "older_config.json", tmp_path / "config.json")
    assert explicit(config_from_hf(tmp_path)) == explicit(config_from_hf(folder))


@pytest.mark.parametrize("kind", DEFAULTS)
def test_absent_fields_mean_what_transformers_takes(kind, tmp_path):
    """Each field of a family's default config.json left out in turn: the same model, or an error that names it."""

    def read(card):
        (tmp_path / "config.json").write_text(json.dumps(card))
        return explicit(config_from_hf(tmp_path))

    card, wrong = DEFAULTS[kind], {}
    whole = read(card)
    for field in set(card) - {"model_type"}:
        try:
            found = vars(read({k: v for k, v in card.items() if k != field}))
        except UserError as e:
            different = None if f"no field {field!r}" in str(e) else str(e)
        else:
            different = {k: v for k, v in found.items() if v != getattr(whole, k)}
        if different:
            wrong[field] = different
    assert wrong == {}
