"""A reward by name: a program, or what a finished stage left (a reward model, an ensemble, a judge), behind one
interface."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jrlhf.algorithms.reward_model import sequence_head_scores, sequence_scores
from jrlhf.config import UserError, did_you_mean, read_json
from jrlhf.data.chat import prompt_text
from jrlhf.data.tokenizer import Tokenizer
from jrlhf.lab import REWARDS as LAB_REWARDS
from jrlhf.models.transformer import Model
from jrlhf.ops.reward_losses import Combine, combine_scores
from jrlhf.rewards import REWARDS as PROGRAM_REWARDS
from jrlhf.rollout.rollout import response_ids
from jrlhf.sharding import fetch
from jrlhf.training.artifacts import Loaded, has_model, load_adapter, load_model, model_meta
from jrlhf.training.data import chunk_rows, in_chunks
from jrlhf.training.judging import ProcessReward, judge_of
from jrlhf.types import Params, RewardFn, Rollout

# What stages leave that have no model of their own; they name the folders beside their own whose models they use.
ENSEMBLE, JUDGE = "ensemble.json", "judge.json"

# Every reward that a config may name. To add one: a function (prompts, completions, rows) -> [N], and a line
# in `jrlhf/rewards/__init__.py`.
REWARDS: dict[str, RewardFn] = {**PROGRAM_REWARDS, **LAB_REWARDS}


class Texts(NamedTuple):
    """Responses on the host, as program rewards read them. `rows[i]["ended"]` says whether a stop token came.

    A prompt of messages is given as a dialogue in plain text (`prompt_text`); `rows[i]["prompt"]` has them.
    """

    prompts: list[str]
    completions: list[str]
    rows: list[dict]
    ids: list[list[int]]


class Reward(NamedTuple):
    name: str
    needs_text: bool
    score: Callable[[Rollout, Texts | None], Any]  # -> [B] float32


def program_reward(name: str, field: str = "reward") -> RewardFn:
    if name not in REWARDS:
        raise UserError(
            f"{field} {name!r} is {'no' if field == 'gold' else 'neither a stage nor a'} known reward."
            f"{did_you_mean(name, REWARDS)}"
        )
    return REWARDS[name]


def make_reward(
    name: str,
    parents: dict[str, Path],
    mesh: Mesh,
    tokenizer: Tokenizer,
    base: tuple[Path, Loaded] | None = None,
) -> Reward:
    """`name` is one of `parents` (a stage that leaves a reward model) or one of `REWARDS`.

    base: a stage's folder and model; a reward model that is an adapter beside it uses its arrays, instead of its own.

    Rewards that read text must return one finite number per response: anything else is an error, never a zero.
    """
    if name in parents:
        return stage_reward(name, parents[name], mesh, tokenizer, base)
    return text_reward(name, program_reward(name))


def text_reward(name: str, function: RewardFn) -> Reward:
    def score(rollout: Rollout, texts: Texts | None) -> np.ndarray:
        if texts is None:
            raise ValueError(f"reward {name!r} reads text (`needs_text`), and was given none")
        values = np.asarray(function(texts.prompts, texts.completions, texts.rows), np.float32)
        if values.shape != (len(texts.prompts),) or not np.isfinite(values).all():
            raise UserError(
                f"reward {name!r} returned shape {values.shape} with {np.sum(~np.isfinite(values))} values that are "
                f"not finite; expected {len(texts.prompts)} finite numbers"
            )
        return values

    return Reward(name, True, score)


def stage_reward(
    name: str, folder: Path, mesh: Mesh, tokenizer: Tokenizer, base: tuple[Path, Loaded] | None = None
) -> Reward:
    """The reward of a finished stage, by what it left: an ensemble's or judge's note, or a reward model."""
    if (folder / ENSEMBLE).is_file():
        return ensemble_reward(name, folder, mesh, tokenizer, base)
    if (folder / JUDGE).is_file():
        noted = read_json(folder / JUDGE)
        return text_reward(
            name, judge_of(name, noted, load_model(folder.parent / noted["model"], mesh), mesh)
        )
    if "process" in model_meta(folder, "scalar"):
        return text_reward(name, process_reward(name, folder, mesh))
    model, params = _learned(name, folder, mesh, tokenizer, base)
    scores = lambda rollout, texts: jitted_scores(model, params, rollout.tokens, rollout.mask)  # noqa: E731
    return Reward(name, False, scores)


def process_reward(name: str, folder: Path, mesh: Mesh) -> ProcessReward:
    """That of a finished process-reward-model stage; it also tells the score of every step."""
    loaded = load_model(folder, mesh, "scalar")
    process = loaded.meta["process"]
    return ProcessReward(name, loaded, process["separator"], process["aggregate"], mesh)


def _learned(
    name: str, folder: Path, mesh: Mesh, tokenizer: Tokenizer, base, every_head: bool = False
) -> tuple[Model, Params]:
    """A reward model that reads the policy's own tokens."""
    if model_meta(folder, "scalar")["tokenizer"] != tokenizer.fingerprint():
        raise UserError(f"reward {name!r} was trained with another tokenizer than the policy")
    adapted = None
    if base:
        adapted = load_adapter(folder, base[0], base[1].model.config, mesh, every_head=every_head)
    if base and adapted:
        return adapted[0], adapted[0].whole(adapted[1], base[1].params)
    loaded = load_model(folder, mesh, "scalar", every_head=every_head)
    return loaded.model, loaded.params


def ensemble_reward(
    name: str, folder: Path, mesh: Mesh, tokenizer: Tokenizer, base: tuple[Path, Loaded] | None = None
) -> Reward:
    """Members' rewards combined. A member that is itself an ensemble of heads gives each of them."""
    noted = read_json(folder / ENSEMBLE)
    how, lam = noted["combine"], noted["lam"]
    members = [_member(name, folder.parent / m, mesh, tokenizer, base) for m in noted["members"]]
    needs_text = any(m.needs_text for m in members)

    def score(rollout: Rollout, texts: Texts | None) -> Any:
        if needs_text and isinstance(rollout.tokens, jax.Array):  # the host waits anyhow
            rollout = fetch(rollout)
        return combined(how, lam, tuple(_of_member(m, rollout, texts, needs_text, mesh) for m in members))

    return Reward(name, needs_text, score)


def _member(name: str, folder: Path, mesh: Mesh, tokenizer: Tokenizer, base) -> Reward:
    """As a reward of [n, B], n the number of its heads."""
    if has_model(folder) and is_head_ensemble(model_meta(folder, "scalar")):
        model, params = _learned(name, folder, mesh, tokenizer, base, every_head=True)
        heads = lambda rollout, texts: jitted_head_scores(model, params, rollout.tokens, rollout.mask)  # noqa: E731
        return Reward(name, False, heads)
    one = stage_reward(name, folder, mesh, tokenizer, base)
    return one._replace(score=lambda rollout, texts: one.score(rollout, texts)[None])


def _of_member(member: Reward, rollout: Rollout, texts: Texts | None, on_host: bool, mesh: Mesh) -> Any:
    """[n, B]. Beside members that read text, those that read tokens take some rows at a time."""
    if not on_host or member.needs_text:
        return member.score(rollout, texts)
    rows = chunk_rows(len(rollout.tokens), mesh)
    return in_chunks(lambda some: member.score(some, None).T, rollout, rows, mesh).T


def is_head_ensemble(meta: dict[str, Any]) -> bool:
    """Whether a model's heads are members of an ensemble, rather than criteria."""
    return "heads" in meta and meta["heads"]["ensemble"]


@partial(jax.jit, static_argnums=(0, 1))
def combined(how: Combine, lam: float, scores: tuple) -> jax.Array:
    """[B] of members' [n, B]."""
    return combine_scores(jnp.concatenate(scores), how, lam)


jitted_scores = jax.jit(sequence_scores, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def jitted_head_scores(model: Model, params: Params, tokens, mask) -> jax.Array:
    """[n, B]"""
    return sequence_head_scores(model, params, tokens, mask).T


def read_texts(rollout: Rollout, rows: list[dict], tokenizer: Tokenizer) -> Texts:
    """Decode a rollout, whole on every host."""
    ids, ended = response_ids(rollout), fetch(rollout.ended)
    return Texts(
        prompts=[prompt_text(row["prompt"]) for row in rows],
        completions=[tokenizer.decode(i) for i in ids],
        rows=[{**row, "ended": bool(e)} for row, e in zip(rows, ended, strict=True)],
        ids=ids,
    )


def repeat_rate(ids: list[list[int]], n: int = 4) -> float:
    """Share of n-token windows that occurred before in the same response."""
    windows = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in ids]
    total = sum(map(len, windows))
    return sum(len(w) - len(set(w)) for w in windows) / total if total else 0.0
