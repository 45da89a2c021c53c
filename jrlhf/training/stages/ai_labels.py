"""AI feedback: a judge labels preferences, and where people have, how far it agrees with them."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np

from jrlhf import hosts
from jrlhf.config import (
    PREFERENCES,
    REWARD_MODEL,
    Source,
    StageContext,
    UserError,
    read_json,
    stage_ref,
)
from jrlhf.data.chat import prompt_text
from jrlhf.data.schema import rounded_ranks
from jrlhf.metrics import progress
from jrlhf.ops.agreement import cohen_kappa, in_both_orders
from jrlhf.ops.intervals import bootstrap_interval, wilson_interval
from jrlhf.rewards.judges import Comparison, check_template, decide, position_bias
from jrlhf.sharding import make_mesh
from jrlhf.training.judging import ANSWERS, JudgeReward, judge_costs, judge_of
from jrlhf.training.rewards import JUDGE
from jrlhf.training.stages.common import MeshStage, write_text
from jrlhf.training.stages.judge import Judge
from jrlhf.training.stages.preferences import check_one_of, preference_rows, ranks_of

AT_ONCE = 512  # pairs between two looks at the clock and at whether to stop


class Pairs(NamedTuple):
    """Every two answers to each prompt, [N] each."""

    row: np.ndarray
    first: np.ndarray  # which answer of the row
    second: np.ndarray


@dataclass(frozen=True)
class AILabels(MeshStage):
    """A judge of two answers labels every pair of answers to each prompt (RLAIF: Bai et al. 2022, Lee et al. 2023).
    Leaves `preferences.jsonl`, from which reward models and direct alignment learn; a row that the judge has no
    verdict on is left out.

    The rows' own ranks are what their labeller said; the results tell how far the judge agrees with them.
    """

    artifact: ClassVar[str] = PREFERENCES

    judge: str = stage_ref(artifact=REWARD_MODEL)
    preferences: str = stage_ref("", PREFERENCES)
    data: Source | None = None
    # More than two answers are ranked by wins less losses, or by the mean probability to win (the order of
    # Bradley-Terry strengths, for each meets each); "pairs" leaves a row for each two of them.
    rank_by: Literal["copeland", "borda", "pairs"] = "copeland"
    soft: bool = True  # rows of two answers keep the judge's `probability` that the first is better
    margin: float = 0.0  # with soft=False, answers whose probabilities differ by no more are tied

    def validate(self, stages):
        check_one_of(self)
        judge = stages[self.judge]
        if not isinstance(judge, Judge):
            raise UserError(f"judge {self.judge!r} is {type(judge).__name__}; it must be a Judge")
        if not check_template(judge.template):
            raise UserError(
                f"judge {self.judge!r} is asked about one answer; labels need a template with {{answer_a}} and "
                "{answer_b}"
            )
        if self.rank_by not in ("copeland", "borda", "pairs"):
            raise UserError(f"rank_by is {self.rank_by!r}; it is 'copeland', 'borda' or 'pairs'")
        if not 0 <= self.margin < 1 or (self.margin and self.soft):
            raise UserError(
                f"margin is {self.margin}: with soft=False it is at least 0 and less than 1; soft labels need none"
            )

    def run(self, ctx: StageContext) -> dict:
        rows = preference_rows(self, ctx)
        noted = read_json(ctx.parents[self.judge] / JUDGE)
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            judge = judge_of(self.judge, noted, ctx.parents[self.judge], mesh, ctx.folder / ANSWERS)
            pairs = every_pair(rows)
            said = self._ask(judge, rows, pairs, ctx)
        labels = labelled_rows(
            rows, pairs, said.probabilities, noted["labeler"], self.rank_by, self.soft, self.margin
        )
        if not labels:
            raise UserError(f"judge {self.judge!r} has no verdict on any of the {len(rows)} rows")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in labels)
        write_text(ctx.folder / "preferences.jsonl", "".join(lines))
        results = {"rows": len(labels), "of_rows": len(rows)}
        results |= judge_report(rows, pairs, said, self.margin) | {"costs": judge_costs(judge.judge)}
        _print(ctx.console, results)
        return results

    def _ask(self, judge: JudgeReward, rows: list[dict], pairs: Pairs, ctx: StageContext) -> Comparison:
        text = lambda n, k: prompt_text(rows[n]["responses"][k])  # noqa: E731
        parts, total = [], len(pairs.row)
        with progress(ctx.console, total, f"{ctx.name}: judging") as bar:
            for start in range(0, total, AT_ONCE):
                hosts.heed_stop(f"{start} of {total} pairs are judged")
                some = [p[start : start + AT_ONCE].tolist() for p in pairs]
                asked = [prompt_text(rows[n]["prompt"]) for n in some[0]]
                first, second = ([text(n, k) for n, k in zip(some[0], ks, strict=True)] for ks in some[1:])
                parts.append(judge.comparison(asked, first, second))
                bar.update(min(start + AT_ONCE, total))
        return Comparison(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def every_pair(rows: Sequence[dict]) -> Pairs:
    found = [
        (n, i, j) for n, row in enumerate(rows) for i, j in combinations(range(len(row["responses"])), 2)
    ]
    return Pairs(*np.asarray(found).T)


def labelled_rows(
    rows: Sequence[dict],
    pairs: Pairs,
    probabilities: np.ndarray,
    labeler: str,
    rank_by: str,
    soft: bool,
    margin: float,
) -> list[dict]:
    """Preference rows by the judge's word: probabilities [N, 3] of every pair (first, second, tie), NaN without one."""
    out = []
    starts = np.searchsorted(pairs.row, np.arange(len(rows) + 1))
    choices = decide(probabilities, margin)
    wins = np.round(probabilities[:, 0] + 0.5 * probabilities[:, 2], 6)
    for row, begin, end in zip(rows, starts[:-1], starts[1:], strict=True):
        k, mine = len(row["responses"]), range(begin, end)
        if k == 2 or rank_by == "pairs":
            for n in mine:
                if not np.isnan(wins[n]):
                    of = _part(row, [pairs.first[n], pairs.second[n]], labeler)
                    if soft:
                        of |= {"ranks": rounded_ranks(wins[n]), "probability": float(wins[n])}
                    else:
                        of["ranks"] = ranks_of(np.asarray([choices[n], -choices[n]]))
                    out.append(of)
            continue
        if np.isnan(wins[begin:end]).any():
            continue  # the answers that lack a verdict would be ranked by the others alone
        score = np.zeros(k)
        for n in mine:
            gain = choices[n] if rank_by == "copeland" else 2 * wins[n] - 1
            score[pairs.first[n]] += gain
            score[pairs.second[n]] -= gain
        score = np.round(score, 6)
        of = _part(row, range(k), labeler) | {"ranks": ranks_of(score)}
        if rank_by == "borda":
            of["scores"] = (0.5 + 0.5 * score / (k - 1)).tolist()
        out.append(of)
    return out


def _part(row: dict, answers: Sequence[int], labeler: str) -> dict:
    of = {"prompt": row["prompt"], "responses": [row["responses"][k] for k in answers], "labeler": labeler}
    if "ended" in row:
        of["ended"] = [row["ended"][k] for k in answers]
    return of | ({"tools": row["tools"]} if "tools" in row else {})


def judge_report(rows: Sequence[dict], pairs: Pairs, said: Comparison, margin: float) -> dict[str, Any]:
    """How the judge went about it, and how far it agrees with the ranks of the rows. [low, high] are 95% intervals:
    Wilson's of single shares, and by resampling prompts where pairs of one prompt may hang together.

    agreement: the share of equal choices where neither is tied; agreement_with_ties: of all pairs with a verdict
    (the two setups of Zheng et al. 2023, table 5); kappa: Cohen's, over first, tie, second, of every pair in both
    orders.
    """
    ranks = lambda which: np.asarray([rows[n]["ranks"][k] for n, k in zip(pairs.row, which, strict=True)])  # noqa: E731
    human = np.sign(ranks(pairs.second) - ranks(pairs.first)).astype(np.float64)
    judge = decide(said.probabilities, margin)
    known = ~np.isnan(judge)
    prompts = np.unique([prompt_text(row["prompt"]) for row in rows], return_inverse=True)[1][pairs.row]
    same = judge == human
    share = lambda of: _estimate(lambda i: float(np.mean(same[i])), np.flatnonzero(of), prompts)  # noqa: E731
    kappa = lambda i: cohen_kappa(in_both_orders(human[i]), in_both_orders(judge[i]))  # noqa: E731
    report: dict[str, Any] = {
        "pairs": len(judge),
        "abstained": _share(int(np.sum(~known)), len(judge)),
        "tied": _share(int(np.sum(judge == 0)), int(known.sum())),
        "agreement": share(known & (judge != 0) & (human != 0)),
        "agreement_with_ties": share(known),
        "kappa": _estimate(kappa, np.flatnonzero(known), prompts),
    }
    bias = position_bias(said, margin)
    if bias.pairs:
        report["flipped"] = _share(bias.flipped, bias.pairs)
        report["first_place"] = _share(bias.first_place, bias.verdicts)
    return report


def _share(count: int, of: int) -> dict[str, float | None]:
    if not of:
        return {"mean": None, "low": None, "high": None}
    low, high = wilson_interval(count, of)
    return {"mean": count / of, "low": low, "high": high}


def _estimate(statistic: Callable, pairs: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """`statistic` of some pairs; None where there is nothing to say."""
    known = {"mean": statistic(pairs)} if pairs.size else {}
    known |= dict(
        zip(("low", "high"), bootstrap_interval(lambda i: statistic(pairs[i]), prompts[pairs]), strict=True)
    )
    told = {name: known.get(name, math.nan) for name in ("mean", "low", "high")}
    return {name: None if math.isnan(x) else x for name, x in told.items()} | {"pairs": len(pairs)}


def _print(console, results: dict[str, Any]) -> None:
    told = lambda x: "unknown" if x["mean"] is None else f"{x['mean']:.3f} [{x['low']:.3f}, {x['high']:.3f}]"  # noqa: E731
    names = [
        n
        for n in ("agreement", "agreement_with_ties", "kappa", "flipped", "first_place", "abstained")
        if n in results
    ]
    console.print("  " + "; ".join(f"{n} {told(results[n])}" for n in names), highlight=False)
