"""A reward by name: a program, or the reward model of a finished stage, behind one interface."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jrlhf.algorithms.reward_model import sequence_scores
from jrlhf.config import UserError, did_you_mean
from jrlhf.data.chat import prompt_text
from jrlhf.data.tokenizer import Tokenizer
from jrlhf.lab import REWARDS as LAB_REWARDS
from jrlhf.rewards import REWARDS as PROGRAM_REWARDS
from jrlhf.rollout.rollout import response_ids
from jrlhf.sharding import fetch
from jrlhf.training.artifacts import Loaded, load_adapter, load_model, model_meta
from jrlhf.types import RewardFn, Rollout

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


def program_reward(name: str) -> RewardFn:
    if name not in REWARDS:
        raise UserError(
            f"reward {name!r} is neither a stage nor a known reward.{did_you_mean(name, REWARDS)}"
        )
    return REWARDS[name]


def make_reward(
    name: str,
    parents: dict[str, Path],
    mesh: Mesh,
    tokenizer: Tokenizer,
    base: tuple[Path, Loaded] | None = None,
) -> Reward:
    """`name` is one of `parents` (a reward-model stage) or one of `REWARDS`.

    base: a stage's folder and model; a reward model that is an adapter beside it uses its arrays, instead of its own.

    Program rewards must return one finite number per response: anything else is an error, never a zero.
    """
    if name in parents:
        if model_meta(parents[name], "scalar")["tokenizer"] != tokenizer.fingerprint():
            raise UserError(f"reward {name!r} was trained with another tokenizer than the policy")
        adapted = load_adapter(parents[name], base[0], base[1].model.config, mesh) if base else None
        if base and adapted:
            model, params = adapted[0], adapted[0].whole(adapted[1], base[1].params)
        else:
            loaded = load_model(parents[name], mesh, "scalar")
            model, params = loaded.model, loaded.params
        scores = lambda rollout, texts: jitted_scores(model, params, rollout.tokens, rollout.mask)  # noqa: E731
        return Reward(name, False, scores)

    function = program_reward(name)

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


jitted_scores = jax.jit(sequence_scores, static_argnums=0)


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
