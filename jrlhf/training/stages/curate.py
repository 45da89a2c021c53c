"""Rows that are kept: without duplicates, without what evaluations ask, and the best by a reward."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from jrlhf.config import (
    DEMONSTRATIONS,
    LANGUAGE_MODEL,
    PREFERENCES,
    PROMPTS,
    REWARD_MODEL,
    ROWS,
    Source,
    Stage,
    StageContext,
    UserError,
    stage_ref,
    stage_ref_or_name,
)
from jrlhf.data.batching import encode_preference, encode_rows
from jrlhf.data.chat import prompt_text
from jrlhf.data.curation import contaminated, exact_duplicates, near_duplicates, row_texts, spoken
from jrlhf.data.tokenizer import Tokenizer
from jrlhf.rollout.rollout import pad_prompts
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import load_model
from jrlhf.training.data import load_rows
from jrlhf.training.evaluation import prompt_slots, score
from jrlhf.training.rewards import Texts, make_reward
from jrlhf.training.stages.common import MeshStage, check_reward, labelled
from jrlhf.training.stages.sizes import check_kind, count_rows
from jrlhf.training.stages.solve_rate import write_rows
from jrlhf.types import Plan, Rollout


@dataclass(frozen=True)
class Curated(Stage):
    """Rows without duplicates and without what the evaluation's prompts ask. What was dropped, why and for what, is
    in `dropped.jsonl`."""

    abstract: ClassVar[bool] = True
    kind: ClassVar[str]

    data: Source
    compare: Literal["prompt", "row"] = "row"  # what makes rows alike: their prompts, or all that they say
    exact: bool = True  # drop what an earlier row said, but for case and space
    near: float = 0.0  # drop what has this Jaccard similarity with an earlier row, 0 < near <= 1; 0: keep it
    ngram: int = 5  # words and symbols, of which `near` compares sets
    against: dict[str, Source] = field(default_factory=dict)  # the evaluation's prompts, by split
    overlap: int = 13  # words that a row may not share with one of them (GPT-3)
    contained: int = (
        8  # words of a shorter evaluation prompt that a row may not hold; still shorter ones must be equal
    )

    def validate(self, stages):
        if not 0 <= self.near <= 1:
            raise UserError(f"near is {self.near}; it is a similarity up to 1, or 0 to keep near duplicates")
        if self.ngram < 1 or not 1 <= self.contained <= self.overlap:
            raise UserError(
                f"ngram {self.ngram} must be positive, and contained {self.contained} from 1 to overlap {self.overlap}"
            )
        if not (self.exact or self.near or self.against):
            raise UserError("give one of exact, near and against: nothing would be dropped")

    def plan(self, ctx):
        check_kind(self.data, self.kind, "data")
        return _read(self.data)

    def run(self, ctx: StageContext) -> dict:
        rows = load_rows(self.data, self.kind, labelled(ctx.console, "data"))
        asked = {
            split: [
                spoken(row["prompt"])
                for row in load_rows(source, "prompt", labelled(ctx.console, f"against.{split}"))
            ]
            for split, source in self.against.items()
        }
        kept, dropped = self.curated(rows, asked)
        if not kept:
            raise UserError(f"all {len(rows)} rows were dropped: {dict(Counter(d['why'] for d in dropped))}")
        write_rows(ctx.folder / ROWS[self.artifact], kept)
        write_rows(ctx.folder / "dropped.jsonl", dropped)
        why = Counter(d["why"] for d in dropped)
        splits = Counter(d["split"] for d in dropped if d["why"] == "contaminated")
        return {
            "rows": len(rows),
            "kept": len(kept),
            "exact_duplicates": why["exact duplicate"],
            "near_duplicates": why["near duplicate"],
            "contaminated": why["contaminated"],
            "by_split": {split: splits[split] for split in asked},
        }

    def curated(self, rows: Sequence[dict], asked: dict[str, list[str]]) -> tuple[list[dict], list[dict]]:
        """(rows that are kept, what was dropped). Duplicates are looked for among what is not contaminated."""
        texts = [row_texts(row) for row in rows]
        left = list(range(len(rows)))
        dropped: list[dict] = []

        def drop(found: Iterable[Any], why: str, noted: Any) -> None:
            nonlocal left
            gone = {}
            for item in found:
                gone[left[item.row]] = {"row": left[item.row] + 1, "why": why} | noted(item)
            dropped.extend(told | {"text": "\n".join(texts[n])} for n, told in gone.items())
            left = [n for n in left if n not in gone]

        if asked:
            prompts, answers = (
                ["\n".join(texts[n][:1]) for n in left],
                ["\n".join(texts[n][1:]) for n in left],
            )
            drop(
                contaminated(prompts, answers, asked, self.overlap, self.contained),
                "contaminated",
                lambda c: {
                    "split": c.split, "prompt": asked[c.split][c.prompt], "shared": c.shared, "how": c.how
                },
            )  # fmt: skip
        said = lambda: ["\n".join(texts[n][:1] if self.compare == "prompt" else texts[n]) for n in left]  # noqa: E731
        of = lambda d: {"of": left[d.of] + 1, "similarity": round(d.similarity, 4)}  # noqa: E731
        if self.exact:
            drop(exact_duplicates(said()), "exact duplicate", of)
        if self.near:
            drop(near_duplicates(said(), self.near, self.ngram), "near duplicate", of)
        return [rows[n] for n in left], sorted(dropped, key=lambda told: told["row"])


@dataclass(frozen=True)
class CuratePrompts(Curated):
    """Prompts without duplicates and without those of evaluations. Leaves `prompts.jsonl`."""

    artifact: ClassVar[str] = PROMPTS
    kind: ClassVar[str] = "prompt"


@dataclass(frozen=True)
class CurateDemonstrations(Curated):
    """Demonstrations without duplicates and without prompts of evaluations. Leaves `demonstrations.jsonl`."""

    artifact: ClassVar[str] = DEMONSTRATIONS
    kind: ClassVar[str] = "demonstration"


@dataclass(frozen=True)
class CuratePreferences(Curated):
    """Preferences without duplicates and without prompts of evaluations. Leaves `preferences.jsonl`."""

    artifact: ClassVar[str] = PREFERENCES
    kind: ClassVar[str] = "preference"


# --- the best by a reward -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Selected(MeshStage):
    """The rows that a reward finds good: a share of them, or those of at least some value.

    A reward model reads the tokens of `start`, the language model that it was trained from; a program reads text.
    """

    abstract: ClassVar[bool] = True
    kind: ClassVar[str]

    data: Source
    reward: str = stage_ref_or_name(artifact=REWARD_MODEL)
    start: str = stage_ref("", LANGUAGE_MODEL)
    keep: float = 1.0  # the share of rows with the largest values
    least: float | None = None  # the value that a row must have at least

    def validate(self, stages):
        check_reward(self.reward, stages)
        if self.reward in stages and not self.start:
            raise UserError(f"start: name the language model whose tokens the reward {self.reward!r} reads")
        if not 0 < self.keep <= 1:
            raise UserError(f"keep is {self.keep}, a share of the rows above 0 and at most 1")
        if self.keep == 1 and self.least is None:
            raise UserError("give keep or least: all rows would be kept")

    def plan(self, ctx):
        check_kind(self.data, self.kind, "data")
        return _read(self.data)

    def values(self, row: dict, rewards: np.ndarray) -> float:
        """What a row is worth, by the rewards of its answers [K]."""
        raise TypeError(f"{type(self).__name__} does not define values()")

    def run(self, ctx: StageContext) -> dict:
        rows = load_rows(self.data, self.kind, labelled(ctx.console, "data"))
        where = type(self.data).__name__
        answers = [answers_of(row, f"{where} row {n}") for n, row in enumerate(rows, 1)]
        rewards = self._rewards(ctx, answers)
        sizes = np.cumsum([len(row["responses"]) for row in answers])[:-1]
        pairs = zip(answers, np.split(rewards, sizes), strict=True)
        values = np.asarray([self.values(row, mine) for row, mine in pairs])
        kept = best_share(values, self.keep, self.least)
        if not len(kept):
            raise UserError(
                f"least {self.least} keeps none of {len(rows)} rows: their values go from {values.min():.3g} to "
                f"{values.max():.3g}"
            )
        write_rows(ctx.folder / ROWS[self.artifact], (rows[i] for i in kept))
        return {
            "rows": len(rows),
            "kept": len(kept),
            "value": float(values.mean()),
            "value_kept": float(values[kept].mean()),
            "least_kept": float(values[kept].min()),
        }

    def _rewards(self, ctx: StageContext, answers: Sequence[dict]) -> np.ndarray:
        """[N] float64 of all answers, row by row."""
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            if not self.start:
                reward = make_reward(self.reward, {}, mesh, None)  # type: ignore[arg-type]  # a program reads text
                return np.asarray(score(reward, None, written(answers), mesh), np.float64)  # type: ignore[arg-type]
            policy = load_model(ctx.parents[self.start], mesh)
            reward = make_reward(self.reward, dict(ctx.parents), mesh, policy.tokenizer)
            samples, texts = as_sampled(answers, policy.tokenizer, policy.model.config.context)
            return np.asarray(score(reward, samples, texts, mesh), np.float64)


@dataclass(frozen=True)
class SelectDemonstrations(Selected):
    """The demonstrations whose completions have the largest reward. Leaves `demonstrations.jsonl`."""

    artifact: ClassVar[str] = DEMONSTRATIONS
    kind: ClassVar[str] = "demonstration"

    def values(self, row, rewards):
        return float(rewards[0])


@dataclass(frozen=True)
class SelectPreferences(Selected):
    """The preference rows that a reward finds good. Leaves `preferences.jsonl`.

    by: "margin" is how much better the reward finds what is ranked first than what is ranked last, so that labels with
    which it disagrees go first; "best" the reward of what is ranked first.
    """

    artifact: ClassVar[str] = PREFERENCES
    kind: ClassVar[str] = "preference"

    by: Literal["margin", "best"] = "margin"

    def values(self, row, rewards):
        ranks = np.asarray(row["ranks"])
        best = float(rewards[ranks == 1].mean())
        return best if self.by == "best" else best - float(rewards[ranks == ranks.max()].mean())


def best_share(values: np.ndarray, keep: float, least: float | None) -> np.ndarray:
    """Indices, in order, of the share `keep` of values [N] that are largest, at least one; of these, those of at least
    `least`. Equal values: the earlier."""
    best = np.argsort(-values, kind="stable")[: max(1, round(keep * len(values)))]
    return np.sort(best if least is None else best[values[best] >= least])


def answers_of(row: dict, place: str) -> dict:
    """A demonstration or preference row as one with `responses` and `ranks`."""
    if "messages" in row:
        raise UserError(
            f"{place}: a reward is of one answer to a prompt; give prompt and completion, not messages"
        )
    return row if "responses" in row else row | {"responses": [row["completion"]], "ranks": [1]}


def written(rows: Sequence[dict]) -> Texts:
    """All answers of rows, as a program reads them."""
    prompts, completions, of_rows = [], [], []
    for row in rows:
        for answer, ended in zip(
            row["responses"], row.get("ended", [True] * len(row["responses"])), strict=True
        ):
            prompts.append(prompt_text(row["prompt"]))
            completions.append(spoken(answer))
            of_rows.append(row | {"ended": ended})
    return Texts(prompts, completions, of_rows, [[] for _ in prompts])


def as_sampled(rows: Sequence[dict], tokenizer: Tokenizer, context: int) -> tuple[Rollout, Texts]:
    """All answers of rows as if they had been sampled, on the host. UserError for one that does not fit the context."""
    encoded, _ = encode_rows(
        rows, lambda row, report: encode_preference(row, tokenizer, context, "error", report)
    )
    examples = [answer for example in encoded for answer in example.answers]
    begin = [int(np.argmax(example.loss_mask)) for example in examples]
    prompts = [example.ids[:b].tolist() for example, b in zip(examples, begin, strict=True)]
    answers = [example.ids[b:].tolist() for example, b in zip(examples, begin, strict=True)]
    asked = pad_prompts(prompts, prompt_slots(prompts), tokenizer.pad_id)
    slots = max(map(len, answers))
    tokens = np.full((len(answers), slots), tokenizer.pad_id, np.int32)
    mask = np.zeros((len(answers), slots), bool)
    for i, ids in enumerate(answers):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    texts = written(rows)
    samples = Rollout(
        np.concatenate([asked.tokens, tokens], axis=1),
        np.concatenate([asked.mask, mask], axis=1),
        mask,
        np.zeros(mask.shape, np.float32),
        np.asarray([row["ended"] for row in texts.rows]),
    )
    return samples, texts._replace(ids=answers)


def _read(source: Source) -> Plan:
    rows = count_rows(source)
    return Plan(rows=rows.n, at_most=() if rows.exact or not rows.n else ("rows",))
