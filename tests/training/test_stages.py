"""What the stages promise beyond running: normalised rewards, variants of PPO and DPO, seeds, pairs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny_runs import QUIET, assert_close_metrics, folders, jsonl, one_device, only, trained

from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.ppo import PPOConfig
from jrlhf.checkpoint import load_params
from jrlhf.config import MeshConfig, StageContext, UserError
from jrlhf.data.batching import preference_batch
from jrlhf.experiment import run, stage_folders
from jrlhf.lab import LarderText
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import load_model
from jrlhf.training.data import in_eval_share, pair_arrays, split_by_prompt
from jrlhf.training.evaluation import Sampler, score
from jrlhf.training.labelers import RewardLabeler
from jrlhf.training.loop import stage_key
from jrlhf.training.rewards import REWARDS, make_reward, read_texts, repeat_rate
from jrlhf.training.stages.reward_model import ordered_pairs
from jrlhf.types import PreferenceBatch, Rollout

PPO = tiny.experiment.stages["ppo"]
DPO = tiny.experiment.stages["dpo"]


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


# --- the reward model ---------------------------------------------------------------------------------------


def test_a_loaded_reward_model_scores_the_training_answers_with_mean_0_and_std_1(one_device_run, mesh):
    left = folders(one_device_run)
    loaded = load_model(left["reward_model"], mesh, "scalar")
    rows, _ = split_by_prompt(jsonl(left["preferences"] / "preferences.jsonl"), 0.25)
    batch = preference_batch(rows, loaded.tokenizer, 40, 3)
    tokens, mask = (jnp.asarray(x.reshape(-1, 40)) for x in (batch.tokens, batch.mask))
    by_token = np.asarray(loaded.model.scores(loaded.params, tokens, mask))
    scores = by_token[np.arange(len(by_token)), batch.mask.sum(axis=-1).reshape(-1) - 1]
    assert len(scores) == 3 * len(rows)
    assert scores.mean() == pytest.approx(0, abs=1e-4)
    assert scores.std() == pytest.approx(1, abs=1e-4)
    assert loaded.meta["normalization"]["std"] != pytest.approx(1, abs=0.01)  # there was something to do


def test_a_learned_reward_scores_left_padded_rollouts_as_right_padded_preferences(one_device_run, mesh):
    left = folders(one_device_run)
    policy = load_model(left["sft"], mesh)
    reward = make_reward("reward_model", {"reward_model": left["reward_model"]}, mesh, policy.tokenizer)
    prompts = list(tiny.prompts.rows())
    ids = [[1, *policy.tokenizer.encode(row["prompt"])] for row in prompts]
    samples = Sampler(policy.model, policy.tokenizer, mesh, tiny.answers, 20).sample(
        policy.params, ids, jax.random.key(5)
    )
    texts = read_texts(samples, prompts, policy.tokenizer)
    ended = [i for i, row in enumerate(texts.rows) if row["ended"]]
    assert ended
    rows = [
        {"prompt": texts.prompts[i], "responses": [texts.completions[i]] * 2, "ranks": [1, 1]} for i in ended
    ]
    loaded = load_model(left["reward_model"], mesh, "scalar")
    batch = preference_batch(rows, policy.tokenizer, 40, 2)
    by_token = loaded.model.scores(
        loaded.params, jnp.asarray(batch.tokens[:, 0]), jnp.asarray(batch.mask[:, 0])
    )
    last = batch.mask[:, 0].sum(axis=1) - 1
    np.testing.assert_allclose(
        score(reward, samples, texts, mesh)[ended],
        np.asarray(by_token)[np.arange(len(ended)), last],
        atol=1e-4,
    )


# --- PPO ----------------------------------------------------------------------------------------------------


def test_ppo_on_a_program_reward(train, one_device_run):
    """Step 1 samples what PPO on the reward model samples, which logs the same program as its gold reward."""
    ppo = replace(
        PPO,
        reward="larder_gold",
        gold="",
        critic="policy",
        eval_prompts=None,
        loop=tiny.loop(2),
        algorithm=PPOConfig(
            epochs=1, minibatches=2, microbatches=2, score_clip=0.5, whiten_rewards=True, stop_kl=10.0
        ),
    )
    rows = trained(train(program=ppo)["program"])
    other = trained(folders(one_device_run)["ppo"])
    assert rows[0]["reward/score/mean"] == pytest.approx(other[0]["reward/larder_gold/mean"], abs=1e-6)
    assert [row["policy/updates"] for row in rows] == [2, 2]
    assert all(row["mismatch/logp_diff_max"] < 1e-4 for row in rows)


def test_ppo_with_a_shared_trunk_pretraining_text_and_a_temperature(train, one_device_run):
    ppo = replace(
        PPO,
        critic="shared",
        ptx=LarderText(documents=64, seed=3),
        eval_prompts=None,
        loop=tiny.loop(2),
        sampling=SamplingConfig(max_new_tokens=8, temperature=0.7),
        algorithm=PPOConfig(epochs=1, minibatches=2, ptx_coef=0.5),
    )
    folder = train(shared=ppo)["shared"]
    rows = trained(folder)
    assert rows[0]["kl/ref_k1"] == 0
    assert all(row["mismatch/logp_diff_max"] < 1e-4 for row in rows)  # sampler and trainer are at 0.7
    base = trained(folders(one_device_run)["pretrain"])[-1]["train/loss"]
    assert rows[0]["policy/ptx_loss"] == pytest.approx(base, abs=0.7)
    params, meta = load_params(folder / "model")
    assert meta["head"] == "lm"
    assert "score" not in params
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


# --- DPO ----------------------------------------------------------------------------------------------------


def test_a_reference_scored_on_the_fly_gives_the_precomputed_metrics(train, one_device_run):
    dpo = replace(DPO, algorithm=replace(DPO.algorithm, reference="on_the_fly"))
    rows = trained(train(fly=dpo)["fly"])
    assert_close_metrics(rows, trained(folders(one_device_run)["dpo"]), rtol=1e-4, atol=1e-5)


def test_accumulated_gradients_give_the_same_metrics(train, one_device_run):
    dpo = replace(DPO, algorithm=DPOConfig(beta=0.1, microbatches=4))
    rows = trained(train(parts=dpo)["parts"])
    assert_close_metrics(rows, trained(folders(one_device_run)["dpo"]), rtol=1e-4, atol=1e-5)


def ranked(*ranks: tuple[int, ...]) -> PreferenceBatch:
    """Rows of three answers; answer k of row n is the single token 10 n + k. Rank 0 is no answer."""
    n = len(ranks)
    tokens = 10 * np.arange(n)[:, None, None] + np.arange(3)[None, :, None]
    real = np.asarray(ranks)[..., None] > 0
    return PreferenceBatch(tokens, real, real, np.asarray(ranks), np.zeros((n, 3), np.float32))


RANKED = ranked((2, 1, 3), (1, 1, 2), (1, 2, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("which", "pairs"),
    [
        ("all", {(0, 2), (1, 0), (1, 2), (10, 12), (11, 12), (20, 21)}),
        ("best_worst", {(1, 2), (10, 12), (20, 21)}),
    ],
)
def test_pairs_of_k_wise_preferences(which, pairs):
    batch = pair_arrays(RANKED, which)
    found = {tuple(int(t) for t in row[:, 0]) for row in batch.tokens}
    assert found == pairs
    assert len(batch.tokens) == len(pairs)
    assert batch.mask.all()


def test_ordered_pairs_leave_out_ties_and_missing_answers():
    found = {(int(n), int(i), int(j)) for n, i, j in zip(*ordered_pairs(RANKED.ranks), strict=True)}
    assert found == {(0, 0, 2), (0, 1, 0), (0, 1, 2), (1, 0, 2), (1, 1, 2), (2, 0, 1)}


@pytest.mark.parametrize("which", ["all", "best_worst"])
def test_preferences_that_are_all_ties_make_no_pairs(which):
    with pytest.raises(UserError, match="no ordered pair"):
        pair_arrays(ranked((1, 1, 1), (1, 1, 0)), which)


# --- seeds --------------------------------------------------------------------------------------------------


def test_seeds_vary_from_the_stage_that_is_named(one_device_run, one_device_runs):
    experiment = replace(only("pretrain", "sft"), seeds=(0, 1), seed_from="sft")
    with one_device():
        out = stage_folders(run(experiment, one_device_runs, console=QUIET))
    assert {name: list(seeds) for name, seeds in out.items()} == {"pretrain": ["0"], "sft": ["0", "1"]}
    assert out["sft"]["0"] == folders(one_device_run)["sft"]  # seed 0 was there already
    first, second = (trained(folder)[0] for folder in out["sft"].values())
    assert first["train/loss"] != second["train/loss"]  # other batches


def test_a_stage_key_depends_on_seed_and_kind_and_not_on_the_name(tmp_path):
    def key(name, stage, seed):
        ctx = StageContext(name, stage, tmp_path, {}, {}, seed, MeshConfig(), QUIET, tmp_path)
        return jax.random.key_data(stage_key(ctx)).tolist()

    assert key("a", PPO, 0) == key("b", PPO, 0)
    assert key("a", PPO, 0) != key("a", PPO, 1)
    assert key("a", PPO, 0) != key("a", DPO, 0)


# --- small things -------------------------------------------------------------------------------------------


def test_the_held_out_share_goes_by_prompts():
    rows = [{"prompt": f"prompt {n % 500}", "n": n} for n in range(1000)]
    kept, held = split_by_prompt(rows, 0.1)
    assert len(kept) + len(held) == 1000
    assert not {row["prompt"] for row in kept} & {row["prompt"] for row in held}
    assert 0.06 < len(held) / 1000 < 0.14
    assert all(in_eval_share(row["prompt"], 0.5) for row in held)  # a larger share holds the smaller one


def test_repeat_rate_by_hand():
    assert repeat_rate([[1, 2, 3, 4]]) == 0
    assert repeat_rate([[7] * 8]) == pytest.approx(4 / 5)  # five windows, one of them new
    assert repeat_rate([[1, 2], []]) == 0  # no window at all
    assert repeat_rate([[7] * 5, [1, 2, 3, 4, 5]]) == pytest.approx(1 / 4)


def test_texts_hold_what_was_sampled_and_whether_it_ended(one_device_run, mesh):
    tokenizer = load_model(folders(one_device_run)["sft"], mesh).tokenizer
    words = tokenizer.encode("tea is bitter .")
    end = tokenizer.eos_ids[0]
    pad = tokenizer.pad_id
    prompt = [1, *tokenizer.encode("describe tea :")]
    tokens = np.asarray([[*prompt, *words, end, pad], [*prompt, *words, *words[:2]]])
    response = np.asarray([[True] * 5 + [False], [True] * 6])
    rollout = Rollout(tokens, tokens != pad, response, np.zeros_like(response, np.float32), ~response[:, -1])
    rows = [{"prompt": "describe tea :", "answer": "x"}] * 2
    texts = read_texts(rollout, rows, tokenizer)
    assert texts.completions == ["tea is bitter .", "tea is bitter . tea is"]
    assert texts.ids == [[*words, end], [*words, *words[:2]]]
    assert [row["ended"] for row in texts.rows] == [True, False]
    assert texts.rows[0]["answer"] == "x"


# --- a labeller of any program reward -----------------------------------------------------------------------


def test_a_reward_labeller_prefers_by_the_law_of_bradley_and_terry(monkeypatch):
    monkeypatch.setitem(REWARDS, "length", lambda prompts, texts, rows: np.asarray([len(t) for t in texts]))
    rows = [{"prompt": "p"}] * 4000
    labels = RewardLabeler("length", temperature=2.0).label(rows, [["aa", "aaaa"]] * 4000, 0)
    longer = np.mean([row["ranks"] == [2, 1] for row in labels])
    assert longer == pytest.approx(1 / (1 + np.exp(-2 / 2.0)), abs=0.025)
    assert labels[0]["scores"] == [2.0, 4.0]
    flipped = RewardLabeler("length", temperature=0.01, flip=0.25).label(rows, [["aa", "aaaa"]] * 4000, 0)
    assert np.mean([row["ranks"] == [1, 2] for row in flipped]) == pytest.approx(0.25, abs=0.025)


def test_a_reward_labeller_is_told_which_answers_ended():
    rows = [{"prompt": "describe tea :", "ended": [True, False]}]
    labels = RewardLabeler("larder_gold", temperature=1e-3).label(rows, [["tea is bitter ."] * 2], 0)
    assert labels[0]["ranks"] == [1, 2]
    gold = REWARDS["larder_gold"](["describe tea :"] * 2, ["tea is bitter ."] * 2, [{}, {"ended": False}])
    np.testing.assert_allclose(labels[0]["scores"], gold, atol=1e-6)
