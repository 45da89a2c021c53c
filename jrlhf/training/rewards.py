"""A reward by name: a program, or what a finished stage left (a reward model, an ensemble, a judge, a mix), behind one
interface."""

import asyncio
import inspect
import io
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from jrlhf.algorithms.reward_model import sequence_head_scores, sequence_scores
from jrlhf.config import UserError, did_you_mean, read_json
from jrlhf.data.chat import prompt_text
from jrlhf.data.tokenizer import Tokenizer
from jrlhf.hosts import own_share, told_by_all
from jrlhf.lab import REWARDS as LAB_REWARDS
from jrlhf.models.transformer import Model
from jrlhf.ops.mixing import mix_scores
from jrlhf.ops.reward_losses import Combine, combine_scores
from jrlhf.rewards import REWARDS as PROGRAM_REWARDS
from jrlhf.rewards.pool import verifier_of
from jrlhf.rollout.rollout import response_ids
from jrlhf.sharding import fetch
from jrlhf.training.artifacts import Loaded, has_model, load_adapter, load_model, model_meta
from jrlhf.training.data import chunk_rows, in_chunks
from jrlhf.training.judging import ProcessReward, judge_of
from jrlhf.training.rubrics import rubric_scorer
from jrlhf.types import Array, Params, RewardFn, Rollout, Scores

# What stages leave that have no model of their own; they name the folders beside their own whose models they use.
ENSEMBLE, JUDGE, MIX, VERIFIER = "ensemble.json", "judge.json", "mix.json", "verifier.json"
STEP_REWARD, RUBRIC, LENGTH = "step_reward.json", "rubric.json", "length.json"
SHAPED = "shaped.json"

Shape = Literal["sigmoid", "log_sigmoid"]

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


def any_row(rows: Sequence[dict]) -> None:
    """The check of a reward that needs nothing of a prompt's row."""


class Reward(NamedTuple):
    name: str
    needs_text: bool
    score: Callable[[Rollout, Texts | None], Scores]
    on_host: bool = False  # it touches no device: several of these may be asked at once, in threads
    # Between these a learned reward scored 98% of the answers that it was trained on.
    trained_on: tuple[float, float] | None = None
    # UserError for prompts' rows that lack what the reward reads, before anything is compiled for them.
    check: Callable[[Sequence[dict]], None] = any_row


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
    return program(name, program_reward(name))


def program(name: str, function: RewardFn) -> Reward:
    """A reward that runs on the host. Of several processes each asks it about answers of its own."""
    return text_reward(name, function, on_host=one_process(), divided=not one_process())


def text_reward(name: str, function: RewardFn, on_host: bool = False, divided: bool = False) -> Reward:
    """divided: over the processes, of which each must then be asked at the same time (so that it is not `on_host`)."""

    def ask(texts: Texts) -> Scores:
        try:
            said = function(texts.prompts, texts.completions, texts.rows)
            if inspect.isawaitable(said):
                # In a thread of its own, for a notebook has a running event loop already.
                with ThreadPoolExecutor(1) as pool:
                    said = pool.submit(asyncio.run, _result(said)).result()
        except Exception as error:
            error.add_note(f"It was raised by the reward {name!r}.")
            raise
        return checked(name, said if isinstance(said, Scores) else Scores(said), len(texts.prompts))

    def score(rollout: Rollout, texts: Texts | None) -> Scores:
        if texts is None:
            raise ValueError(f"reward {name!r} reads text (`needs_text`), and was given none")
        return asked_on_all(name, ask, texts) if divided else ask(texts)

    return Reward(name, True, score, on_host, check=getattr(function, "check_rows", any_row))


def asked_on_all(name: str, ask: Callable[[Texts], Scores], texts: Texts) -> Scores:
    """`ask(texts)`, each process about its own share of the answers. A trouble of one is an error on all."""
    first, last = own_rows(texts.prompts, jax.process_count(), jax.process_index())

    def say() -> bytes:
        some = Texts._make(column[first:last] for column in texts)
        return packed_scores(ask(some)) if first < last else b""

    return joined_scores([said for said in told_by_all(f"reward {name!r}", say) if said])


def own_rows(prompts: Sequence[str], processes: int, process: int) -> tuple[int, int]:
    """The rows [first, last) that a process scores: about as many on each, and never a part of a prompt's answers,
    which lie next to each other: a function may compare them."""
    starts = [i for i, prompt in enumerate(prompts) if i == 0 or prompt != prompts[i - 1]]
    ends = [*starts, len(prompts)]
    first, last = own_share(len(starts), processes, process)
    return ends[first], ends[last]


def packed_scores(scores: Scores) -> bytes:
    """Its arrays by their names, as .npz."""
    given: dict[str, Any] = {"values": scores.values, "failed": scores.failed, "timed_out": scores.timed_out}
    given |= {"tokens": scores.tokens} | {f"part {name}": part for name, part in scores.parts.items()}
    for name, flags in scores.unscored.items():
        given |= {f"failed {name}": flags[0], f"timed_out {name}": flags[1]}
    file = io.BytesIO()
    np.savez(file, **{name: np.asarray(x) for name, x in given.items() if x is not None})  # type: ignore[arg-type]
    return file.getvalue()


def joined_scores(packed: Sequence[bytes]) -> Scores:
    """The scores of all answers, from what `packed_scores` made of consecutive ones."""
    files = [np.load(io.BytesIO(said), allow_pickle=False) for said in packed]
    names = set(files[0].files)
    if any(set(file.files) != names for file in files):
        raise UserError(
            "a reward said other things of some answers than of others: name the same parts for all"
        )
    whole = {name: np.concatenate([file[name] for file in files]) for name in files[0].files}
    of = lambda kind: {n.removeprefix(kind): x for n, x in whole.items() if n.startswith(kind)}  # noqa: E731
    failed, timed_out = of("failed "), of("timed_out ")
    unscored = {name: (failed.get(name), timed_out.get(name)) for name in {**failed, **timed_out}}
    flags = (whole.get("failed"), whole.get("timed_out"))
    return Scores(whole["values"], of("part "), *flags, unscored, whole.get("tokens"))


def steps_reward(name: str, process: ProcessReward, tokenizer: Tokenizer) -> Reward:
    """A process reward, of the tokens that end steps where it is one of steps. tokenizer: that of the policy."""

    def score(rollout: Rollout, texts: Texts | None) -> Scores:
        if texts is None:
            raise ValueError(f"reward {name!r} reads text (`needs_text`), and was given none")
        slots = rollout.response_mask.shape[1]
        said = process.scores(texts.ids, texts.completions, texts.rows, tokenizer, slots)
        return checked(name, said, len(texts.prompts))

    return Reward(name, True, score)


async def _result(awaitable: Any) -> Any:
    return await awaitable


def checked(name: str, scores: Scores, n: int) -> Scores:
    """`scores` of `n` answers as arrays; UserError unless there is one finite number for each."""
    values = _numbers(f"reward {name!r}", scores.values, n)
    parts = {p: _numbers(f"part {p!r} of reward {name!r}", v, n) for p, v in scores.parts.items()}
    flags = {"failed": scores.failed, "timed_out": scores.timed_out}
    said: dict[str, Any] = {what: np.asarray(flag, bool) for what, flag in flags.items() if flag is not None}
    for what, flag in said.items():
        if flag.shape != (n,):
            raise UserError(f"reward {name!r}: {what!r} has shape {flag.shape}; expected {n} bools")
    if scores.tokens is not None:
        tokens = _array(f"`tokens` of reward {name!r}", scores.tokens)
        if tokens.ndim != 2 or len(tokens) != n or np.isinf(tokens).any():
            raise UserError(
                f"reward {name!r}: `tokens` must be [{n}, R], finite or NaN where nothing is said of a token; got "
                f"{tokens.shape}"
            )
    return scores._replace(values=values, parts=parts, **said)


def _array(what: str, given: Any) -> np.ndarray:
    try:
        return np.asarray(given, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} returned something else than numbers: {error}") from None


def _numbers(what: str, given: Any, n: int) -> np.ndarray:
    values = _array(what, given)
    if values.shape != (n,):
        raise UserError(f"{what} returned shape {values.shape}; expected {n} numbers, one for each answer")
    if not np.isfinite(values).all():
        first = int(np.argmin(np.isfinite(values)))
        raise UserError(
            f"{what} returned {np.sum(~np.isfinite(values))} of {n} values that are not finite, the first "
            f"({values[first]}) for answer {first + 1}"
        )
    return values


def score_metrics(name: str, scores: Scores, before: str = "") -> dict[str, Any]:
    """What is logged of a reward: its parts, and how often it had nothing to say. `before` the parts' names: that of a
    reward that is only watched, whose parts may be called as those of the one that is learned from."""
    metrics: dict[str, Any] = {}
    for part, values in scores.parts.items():
        # NaN: it was not asked about this answer.
        metrics[f"reward/{before}{part}/mean"] = jnp.nanmean(values)
        metrics[f"reward/{before}{part}/std"] = jnp.nanstd(values)
    for part, (failed, timed_out) in unscored(name, scores).items():
        part = part if part == name else before + part
        if failed is not None:
            metrics[f"reward/{part}/fail_rate"] = jnp.mean(failed, dtype=jnp.float32)
        if timed_out is not None:
            metrics[f"reward/{part}/timeout_rate"] = jnp.mean(timed_out, dtype=jnp.float32)
    return metrics


def unscored(name: str, scores: Scores) -> dict[str, tuple]:
    """(failed, timed_out) of a reward and of its parts, of those that can fail."""
    own = (scores.failed, scores.timed_out)
    fails = any(flag is not None for flag in own)
    return ({name: own} if fails else {}) | dict(scores.unscored)


def fault_rates(name: str, scores: Scores, console: Console) -> dict[str, float]:
    """Shares of answers that a reward, and each of its parts, could not score; told where there are any."""
    rates = {}
    for part, flags in unscored(name, scores).items():
        for what, flag in zip(("fail_rate", "timeout_rate"), flags, strict=True):
            if flag is not None:
                rates[f"{part}/{what}"] = float(np.mean(flag))
    for rate, share in rates.items():
        if share:
            console.print(
                f"  {rate}: {share:.1%} of {len(scores.values)} answers have no score of their own",
                style="yellow",
            )
    return rates


def either(flags: list[Any]) -> np.ndarray | None:
    """[B] of several [B] bool: where any is set. Some may be None, all of them make None."""
    known = [flag for flag in flags if flag is not None]
    return np.any(known, axis=0) if known else None


def stage_reward(
    name: str, folder: Path, mesh: Mesh, tokenizer: Tokenizer, base: tuple[Path, Loaded] | None = None
) -> Reward:
    """The reward of a finished stage, by what it left: a note of `NOTED`, or a reward model."""
    for note, make in NOTED.items():
        if (folder / note).is_file():
            return make(name, folder, mesh, tokenizer, base)
    if "process" in model_meta(folder, "scalar"):
        return steps_reward(name, process_reward(name, folder, mesh), tokenizer)
    model, params = _learned(name, folder, mesh, tokenizer, base)
    scores = lambda rollout, texts: Scores(jitted_scores(model, params, rollout.tokens, rollout.mask))  # noqa: E731
    return Reward(name, False, scores, trained_on=trained_range(model_meta(folder, "scalar")))


def noted_reward(
    name: str, said: dict[str, Any], folder: Path, mesh: Mesh, tokenizer: Tokenizer, base
) -> Reward:
    """Of what a note in `folder` names: a stage, by the folder that it left beside this one, or a program."""
    if "stage" in said:
        return stage_reward(name, folder.parent / said["stage"], mesh, tokenizer, base)
    return program(name, program_reward(said["program"]))


def judged_reward(name: str, folder: Path, mesh: Mesh, *_: Any) -> Reward:
    noted = read_json(folder / JUDGE)
    return text_reward(name, judge_of(name, noted, folder, mesh), "asked" in noted and one_process())


def rubric_reward(name: str, folder: Path, mesh: Mesh, *_: Any) -> Reward:
    noted = read_json(folder / RUBRIC)
    return text_reward(name, rubric_scorer(name, noted, folder, mesh), "asked" in noted and one_process())


def verified_reward(name: str, folder: Path, *_: Any) -> Reward:
    return program(name, verifier_of(read_json(folder / VERIFIER)))


def one_process() -> bool:
    """Several processes tell each other what a program or a server said, in one order: not in threads."""
    return jax.process_count() == 1


def paid_steps_reward(name: str, folder: Path, mesh: Mesh, tokenizer: Tokenizer, *_: Any) -> Reward:
    noted = read_json(folder / STEP_REWARD)
    process = process_reward(name, folder.parent / noted["model"], mesh)
    paid = replace(process, as_reward=noted["as_reward"], aggregate=noted["aggregate"])
    return steps_reward(name, paid, tokenizer)


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
    how, lam, weights = noted["combine"], noted["lam"], tuple(noted["weights"])
    members = [_member(name, folder.parent / m, mesh, tokenizer, base) for m in noted["members"]]

    def score(rollout: Rollout, texts: Texts | None) -> Scores:
        said = scores_of(members, rollout, texts, mesh)
        # Rows of an array of several heads come first everywhere else, so that they are last here.
        every = tuple(s.total[None] if s.values.ndim == 1 else s.values.T for s in said)
        return Scores(
            combined(how, lam, weights, every),
            parts={"disagreement": disagreement(every)},
            failed=either([s.failed for s in said]),
            timed_out=either([s.timed_out for s in said]),
        )

    return Reward(name, any(m.needs_text for m in members), score, check=check_all(members))


def check_all(rewards: Sequence[Reward]) -> Callable[[Sequence[dict]], None]:
    def check(rows: Sequence[dict]) -> None:
        for reward in rewards:
            reward.check(rows)

    return check


def check_groups(name: str, parts: Mapping[str, Reward]) -> Callable[[Sequence[dict]], None]:
    """Of a mix by group, each part of which reads the rows of its own group."""

    def check(rows: Sequence[dict]) -> None:
        chosen = group_numbers(name, [*parts], rows)
        for i, reward in enumerate(parts.values()):
            reward.check([row for row, part in zip(rows, chosen, strict=True) if part == i])

    return check


def trained_range(meta: dict[str, Any]) -> tuple[float, float] | None:
    """What a reward model's note says of its `range`, normalised as its scores are."""
    norm = meta.get("normalization", {})
    if "range" not in norm:  # one that other code trained
        return None
    low, high = ((bound - norm["mean"]) / norm["std"] for bound in norm["range"])
    return low, high


def length_corrected_reward(
    name: str, folder: Path, mesh: Mesh, tokenizer: Tokenizer, base: tuple[Path, Loaded] | None = None
) -> Reward:
    """A reward less what length explains of it, by the note of a LengthCorrected stage; the reward is logged too."""
    noted = read_json(folder / LENGTH)
    reward = stage_reward(noted["reward"], folder.parent / noted["reward"], mesh, tokenizer, base)
    how = noted["slope"], noted["length"], noted["mean"], noted["std"]

    def score(rollout: Rollout, texts: Texts | None) -> Scores:
        said = reward.score(rollout, texts)
        values = without_length(said.total, rollout.response_mask, *how)
        return said._replace(values=values, tokens=None, parts={**said.parts, "uncorrected": said.total})

    return Reward(name, reward.needs_text, score, check=reward.check)


@jax.jit
def without_length(scores: Array, response_mask: Array, slope, length, mean, std) -> jax.Array:
    """[B] of scores [B] of the answers in response_mask [B, R]: (score - slope · (tokens - length) - mean) / std."""
    tokens = jnp.sum(response_mask, axis=1, dtype=jnp.float32)
    return (jnp.asarray(scores, jnp.float32) - slope * (tokens - length) - mean) / std


def shaped_reward(
    name: str, folder: Path, mesh: Mesh, tokenizer: Tokenizer, base: tuple[Path, Loaded] | None = None
) -> Reward:
    """A reward seen from the references of each prompt, by the note of a Shaped stage; the reward is logged too."""
    noted = read_json(folder / SHAPED)
    reward = noted_reward(name, noted, folder, mesh, tokenizer, base)
    known = {key: np.asarray(scores, np.float64) for key, scores in noted["references"].items()}

    def references(row: dict) -> np.ndarray:
        if (key := reference_key(row)) not in known:
            raise UserError(
                f"reward {name!r} has no references for the prompt {_beginning(row)}. Its stage's `prompts` must have "
                "every row that is scored, with the same `answer`, `group` and `tools`: add those of evaluations by "
                "a Mixture"
            )
        return known[key]

    def score(rollout: Rollout, texts: Texts | None) -> Scores:
        if texts is None:
            raise ValueError(f"reward {name!r} reads prompts (`needs_text`), and was given none")
        of_prompts = [references(row) for row in texts.rows]
        said = scores_of([reward], rollout, texts, mesh)[0]
        values = shape_scores(fetch(said.total), of_prompts, noted["shape"])
        return said._replace(values=values, tokens=None, parts={**said.parts, "unshaped": said.total})

    def check(rows: Sequence[dict]) -> None:
        reward.check(rows)
        for row in rows:
            references(row)

    return Reward(name, True, score, check=check)


def reference_key(row: dict) -> str:
    """The prompt of a row, with what else of it tools and rewards commonly read. Fields that other stages add (a solve
    rate) make no other prompt of it."""
    read = ("prompt", "tools", "answer", "group")
    return json.dumps({name: row[name] for name in read if row.get(name) is not None}, sort_keys=True)


def _beginning(row: dict) -> str:
    text = prompt_text(row["prompt"])
    return repr(text if len(text) <= 80 else text[:77] + "...")


def shape_scores(scores: Array, references: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
    """[B] float32 of scores [B] and the references' scores [M_i] of each: the mean over these of
    sigmoid(score - reference), in (0, 1), or of its logarithm."""
    scores = np.asarray(scores, np.float64)
    of_each = [-np.logaddexp(0.0, some - score) for score, some in zip(scores, references, strict=True)]
    if shape == "sigmoid":
        of_each = [np.exp(log) for log in of_each]
    return np.asarray([np.mean(x) for x in of_each], np.float32)


def _member(name: str, folder: Path, mesh: Mesh, tokenizer: Tokenizer, base) -> Reward:
    """A model of several heads gives `values` of [B, n]."""
    if has_model(folder) and is_head_ensemble(model_meta(folder, "scalar")):
        model, params = _learned(name, folder, mesh, tokenizer, base, every_head=True)
        heads = lambda rollout, texts: Scores(  # noqa: E731
            jitted_head_scores(model, params, rollout.tokens, rollout.mask)
        )
        return Reward(name, False, heads)
    return stage_reward(name, folder, mesh, tokenizer, base)


def scores_of(rewards: Sequence[Reward], rollout: Rollout, texts: Texts | None, mesh: Mesh) -> list[Scores]:
    """What each reward says; those that touch no device are asked at the same time.

    Without a reader of text everything stays on the devices. Otherwise the host waits anyhow, and rewards that read
    tokens take some rows at a time.
    """
    on_devices = isinstance(rollout.tokens, jax.Array)
    if on_devices and not any(r.needs_text for r in rewards):
        return [r.score(rollout, texts) for r in rewards]
    if on_devices:
        rollout = fetch(rollout)
    with ThreadPoolExecutor(len(rewards)) as pool:
        asked = [pool.submit(r.score, rollout, texts) if r.on_host else None for r in rewards]
        return [
            future.result() if future else on_host_scores(r, rollout, texts, mesh)
            for r, future in zip(rewards, asked, strict=True)
        ]


def scores_of_rows(reward: Reward, samples: Rollout, texts: Texts, index: np.ndarray, mesh: Mesh) -> Scores:
    """Of some rows [n] of a rollout on the host, results on the host. A reader of text is asked about these alone: the
    others may lack what it reads."""
    if not len(index):
        return Scores(np.zeros(0, np.float32))
    take = lambda tree: jax.tree.map(lambda x: x[index], tree)  # noqa: E731
    if not reward.needs_text:  # of all rows, so that nothing recompiles
        return take(on_host_scores(reward, samples, texts, mesh))
    of = lambda column: [column[i] for i in index]  # noqa: E731
    some = Texts(of(texts.prompts), of(texts.completions), of(texts.rows), of(texts.ids))
    return on_host_scores(reward, take(samples), some, mesh)


def whole_parts(scores: Scores) -> dict[str, Array]:
    """The parts that say something of every answer (those of a mix by group do not)."""
    return {name: part for name, part in scores.parts.items() if not np.isnan(fetch(part)).any()}


def on_host_scores(reward: Reward, samples: Rollout, texts: Texts | None, mesh: Mesh) -> Scores:
    """Of a rollout on the host, results on the host."""
    if reward.needs_text:
        return fetch(reward.score(samples, texts))
    return in_chunks(
        lambda rows: reward.score(rows, None), samples, chunk_rows(len(samples.tokens), mesh), mesh
    )


def mixed_reward(
    name: str, folder: Path, mesh: Mesh, tokenizer: Tokenizer, base: tuple[Path, Loaded] | None = None
) -> Reward:
    """Several rewards as one, by the note of a RewardMix; each is logged as a part. It is one of whole answers: what
    tokens earn is added up."""
    noted = read_json(folder / MIX)
    rewards = [
        noted_reward(part, said, folder, mesh, tokenizer, base) for part, said in noted["parts"].items()
    ]
    how, rules = noted["how"], list(noted["parts"].values())
    names = [r.name for r in rewards]
    column = lambda key, none=0.0: np.asarray(  # noqa: E731
        [none if rule[key] is None else rule[key] for rule in rules], np.float32
    )
    weights, gates, mean, std = column("weight"), column("gate", -np.inf), column("mean"), column("std")
    reads_text = how in ("by_group", "product") or any(r.needs_text for r in rewards)

    def score(rollout: Rollout, texts: Texts | None) -> Scores:
        if how == "by_group":
            assert texts is not None
            return score_by_group(fetch(rollout), texts)
        said = scores_of(rewards, rollout, texts, mesh)
        values = [s.total for s in said]
        if how == "product":
            for reward, some in zip(rewards, values, strict=True):
                if np.min(fetch(some)) < 0:
                    raise UserError(
                        f"reward {name!r} is a product, but its part {reward.name!r} gave {np.min(fetch(some)):g}: "
                        "only rewards that are never negative can be multiplied"
                    )
        total = jitted_mix(jnp.stack(values), how, weights, mean, std, gates)
        return Scores(
            total,
            parts={r.name: v for r, v in zip(rewards, values, strict=True)}
            | {f"{r.name}.{k}": v for r, s in zip(rewards, said, strict=True) for k, v in s.parts.items()},
            failed=either([s.failed for s in said]),
            timed_out=either([s.timed_out for s in said]),
            unscored={
                k: v for r, s in zip(rewards, said, strict=True) for k, v in unscored(r.name, s).items()
            },
        )

    def score_by_group(samples: Rollout, texts: Texts) -> Scores:
        """Each part of its own rows. It is NaN of the others, and not there where it has none."""
        chosen, n = group_numbers(name, names, texts.rows), len(texts.rows)
        values = np.zeros((len(rewards), n), np.float32)
        parts: dict[str, np.ndarray] = {}
        faults: dict[str, tuple] = {}
        told: dict[str, np.ndarray] = {}
        for i, reward in enumerate(rewards):
            mine = np.flatnonzero(chosen == i)
            said = scores_of_rows(reward, samples, texts, mine, mesh)
            values[i, mine] = said.total
            faults |= unscored(reward.name, said)
            for what in ("failed", "timed_out"):
                if (flag := getattr(said, what)) is not None:
                    told.setdefault(what, np.zeros(n, bool))[mine] = flag
            of_part = {reward.name: said.total} | {f"{reward.name}.{k}": v for k, v in said.parts.items()}
            for k, v in of_part.items() if len(mine) else ():
                parts[k] = np.full(n, np.nan, np.float32)
                parts[k][mine] = v
        total = jitted_mix(values, how, weights, mean, std, gates, chosen)
        return Scores(total, parts=parts, unscored=faults, **told)

    by_name = dict(zip(names, rewards, strict=True))
    check = check_groups(name, by_name) if how == "by_group" else check_all(rewards)
    return Reward(name, reads_text, score, check=check)


def group_numbers(name: str, parts: Sequence[str], rows: Sequence[dict]) -> np.ndarray:
    """Which of `parts` each row's field `group` names, [B] int32."""
    for n, row in enumerate(rows, 1):
        if row.get("group") not in parts:
            raise UserError(
                f"reward {name!r} goes by group: prompt {n} has the group {row.get('group')!r}."
                f"{did_you_mean(str(row.get('group')), parts)}"
            )
    return np.asarray([parts.index(row["group"]) for row in rows], np.int32)


jitted_mix = jax.jit(mix_scores, static_argnums=1)


# The reward that each of these files notes. To add one: a stage that writes such a file, and a line.
NOTED: dict[str, Callable[..., Reward]] = {
    ENSEMBLE: ensemble_reward,
    MIX: mixed_reward,
    LENGTH: length_corrected_reward,
    SHAPED: shaped_reward,
    JUDGE: judged_reward,
    RUBRIC: rubric_reward,
    VERIFIER: verified_reward,
    STEP_REWARD: paid_steps_reward,
}


def is_head_ensemble(meta: dict[str, Any]) -> bool:
    """Whether a model's heads are members of an ensemble, rather than criteria."""
    return "heads" in meta and meta["heads"]["ensemble"]


@partial(jax.jit, static_argnums=(0, 1, 2))
def combined(how: Combine, lam: float, weights: tuple[float, ...], scores: tuple) -> jax.Array:
    """[B] of members' [n, B]."""
    return combine_scores(jnp.concatenate(scores), how, lam, weights)


@jax.jit
def disagreement(scores: tuple) -> jax.Array:
    """[B]: the std over members' [n, B]."""
    return jnp.std(jnp.concatenate(scores).astype(jnp.float32), axis=0)


jitted_scores = jax.jit(sequence_scores, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def jitted_head_scores(model: Model, params: Params, tokens, mask) -> jax.Array:
    """[B, n]"""
    return sequence_head_scores(model, params, tokens, mask)


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
