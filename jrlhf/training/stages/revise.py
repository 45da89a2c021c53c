"""Constitutional AI: answers revised by principles, and labels by principles (Bai et al. 2022)."""

import json
import zlib
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import numpy as np

from jrlhf import hosts
from jrlhf.config import (
    DEMONSTRATIONS,
    LANGUAGE_MODEL,
    PREFERENCES,
    MeshConfig,
    Source,
    StageContext,
    UserError,
    stage_ref,
)
from jrlhf.data.chat import prompt_text
from jrlhf.metrics import progress
from jrlhf.rewards.constitution import COMPARISON, CRITIQUE, REVISION, Principle, load_principles
from jrlhf.rewards.endpoint import Endpoint, EndpointJudge
from jrlhf.rewards.judges import Comparison, Writer, compare_pairs, fill
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import Loaded, load_model
from jrlhf.training.evaluation import Sampler, prompt_slots
from jrlhf.training.judging import ANSWERS, LocalJudge, judge_costs
from jrlhf.training.loop import stage_key
from jrlhf.training.rewards import read_texts
from jrlhf.training.stages.ai_labels import (
    AT_ONCE,
    Pairs,
    every_pair,
    judge_report,
    labelled_rows,
)
from jrlhf.training.stages.common import (
    TooLongPrompt,
    check_answers,
    start_config,
    usable_prompts,
    write_text,
)
from jrlhf.training.stages.preferences import check_one_of, preference_rows
from jrlhf.training.stages.rubric import AskingStage
from jrlhf.training.stages.sizes import sampling_plan, usable
from jrlhf.types import Plan


def drawn(count: int, principles: int, what: str) -> np.ndarray:
    """[count] numbers of principles, each as likely; `what` seeds the draw."""
    return np.random.default_rng(zlib.crc32(what.encode())).integers(principles, size=count)


@dataclass(frozen=True)
class Revise(AskingStage):
    """Answers of `start` are criticised and rewritten, `rounds` times, each time by a principle that is drawn for the
    prompt (Bai et al. 2022, section 3.1). Leaves `demonstrations.jsonl`, each prompt with the last revision, for SFT to
    learn from, and `trace.jsonl` with every answer, critique and principle.

    Who writes critiques and revisions: `start` itself, the language model `judge`, or `by`. A prompt without a reply is
    left out.
    """

    artifact: ClassVar[str] = DEMONSTRATIONS

    start: str = stage_ref(artifact=LANGUAGE_MODEL)
    prompts: Source = field(kw_only=True)
    principles: str = field(kw_only=True)  # a text file (docs/constitution.md)
    rounds: int = 1
    sampling: SamplingConfig = SamplingConfig()  # of the first answers
    writing: SamplingConfig | None = None  # of a model's critiques and revisions; None: as the answers
    max_prompt: int = 0
    too_long: TooLongPrompt = "error"

    def validate(self, stages):
        if self.judge and self.by is not None:
            raise UserError(
                "give judge (a language model's stage) or by, or neither: `start` itself then writes"
            )
        if self.by is not None and not isinstance(self.by, Endpoint) and not hasattr(self.by, "write"):
            raise UserError(f"by: {type(self.by).__name__} gives verdicts, but it does not write")
        if self.by is not None and self.writing is not None:
            raise UserError(
                "writing is how a model of the experiment is sampled; `by` goes about it in its own way"
            )
        if self.rounds < 1:
            raise UserError(f"rounds must be at least 1, got {self.rounds}")
        _revising(self.principles)
        check_answers(self.start, stages, self.sampling, self.max_prompt)

    def check_mesh(self, mesh: MeshConfig) -> None:
        super().check_mesh(mesh)
        if isinstance(self.by, Endpoint) and jax.process_count() > 1:
            raise UserError("by: an Endpoint writes for one process only; run this stage on one host")

    def files(self) -> tuple[str, ...]:
        return (*super().files(), self.principles)

    def plan(self, ctx) -> Plan:
        rows, config = usable(self.prompts, self.too_long), start_config(ctx.stages, self.start)
        return sampling_plan(config, rows, rows, self.sampling.max_new_tokens, 1)

    def run(self, ctx: StageContext) -> dict:
        mesh, principles = make_mesh(ctx.mesh), _revising(self.principles)
        with jax.set_mesh(mesh):
            policy = load_model(ctx.parents[self.start], mesh)
            rows, answers = self._answers(policy, ctx, mesh)
            writer = self._writer(policy, ctx, mesh)
            asked = [prompt_text(row["prompt"]) for row in rows]
            traces = [{"prompt": row["prompt"], "answers": [a], "critiques": [], "principles": []}
                      for row, a in zip(rows, answers, strict=True)]  # fmt: skip
            for r in range(self.rounds):
                hosts.heed_stop(f"{r} of {self.rounds} rounds are done")
                self._revise(writer, asked, traces, principles, r, ctx)
        whole = [t for t in traces if t["answers"][-1] is not None]
        if not whole:
            raise UserError(f"there is no revision of any of the {len(traces)} answers: nobody replied")
        jsonl = lambda lines: "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines)  # noqa: E731
        tools = {id(t): row["tools"] for t, row in zip(traces, rows, strict=True) if "tools" in row}
        write_text(ctx.folder / "trace.jsonl", jsonl(traces))
        write_text(
            ctx.folder / "demonstrations.jsonl",
            jsonl(
                {"prompt": t["prompt"], "completion": t["answers"][-1]}
                | ({"tools": tools[id(t)]} if id(t) in tools else {})
                for t in whole
            ),
        )
        return {
            "rows": len(whole),
            "of_prompts": len(traces),
            "revised": float(np.mean([t["answers"][0] != t["answers"][-1] for t in whole])),
            "costs": writer.counts() if isinstance(writer, EndpointJudge) else {},
        }

    def _answers(self, policy: Loaded, ctx: StageContext, mesh) -> tuple[list[dict], list[str]]:
        limit = self.max_prompt or policy.model.config.context - self.sampling.max_new_tokens
        rows, ids = usable_prompts(policy, self.prompts, limit, self.sampling, self.too_long, ctx, "prompts")
        sampler = Sampler(policy.model, policy.tokenizer, mesh, self.sampling, prompt_slots(ids))
        with progress(ctx.console, len(ids), f"{ctx.name}: sampling") as bar:
            samples = sampler.sample(policy.params, ids, stage_key(ctx), bar.update)
        return rows, read_texts(samples, rows, policy.tokenizer).completions

    def _writer(self, policy: Loaded, ctx: StageContext, mesh) -> Writer:
        if isinstance(self.by, Endpoint):
            return EndpointJudge(self.by, ctx.folder / ANSWERS)
        if self.by is not None:
            return self.by  # type: ignore[return-value]  # validate: it writes
        loaded = load_model(ctx.parents[self.judge], mesh) if self.judge else policy
        return LocalJudge(self.judge or self.start, loaded, mesh, self.writing or self.sampling)

    def _revise(self, writer: Writer, asked, traces, principles, r: int, ctx: StageContext) -> None:
        """One round, of the answers that are still there."""
        which = drawn(len(traces), len(principles), f"{ctx.seed} principles {r}")
        shown = lambda n: {"question": asked[n], "answer": traces[n]["answers"][-1]}  # noqa: E731

        def write(what: str, questions: dict[int, str]) -> dict[int, str | None]:
            seed = zlib.crc32(f"{ctx.seed} {what} {r}".encode())
            with progress(ctx.console, len(questions), f"{ctx.name}: {what} {r + 1}") as bar:
                said = writer.write(list(questions.values()), seed) if questions else []
                bar.update(len(questions))
            return dict(zip(questions, said, strict=True))

        critiques = write(
            "critique",
            {
                n: fill(CRITIQUE, **shown(n), request=principles[which[n]].critique)
                for n, trace in enumerate(traces)
                if trace["answers"][-1] is not None
            },
        )
        revisions = write(
            "revision",
            {
                n: fill(REVISION, **shown(n), critique=critique, request=principles[which[n]].revise)
                for n, critique in critiques.items()
                if critique is not None
            },
        )
        for n, critique in critiques.items():
            traces[n]["critiques"].append(critique)
            traces[n]["principles"].append(int(which[n]))
            traces[n]["answers"].append((revisions.get(n) or "").strip() or None)


def _revising(path: str) -> list[Principle]:
    found = [p for p in load_principles(path) if p.critique]
    if not found:
        raise UserError(f"{path}: no principle has 'critique' and 'revise'")
    return found


@dataclass(frozen=True)
class PrincipleLabels(AskingStage):
    """A judge says of every two answers to a prompt which follows a principle better, one that is drawn for the row
    (Bai et al. 2022, section 4.1). Leaves `preferences.jsonl`, as AILabels does, and tells the same of the judge."""

    artifact: ClassVar[str] = PREFERENCES

    preferences: str = stage_ref("", PREFERENCES)
    data: Source | None = None
    principles: str = field(kw_only=True)  # a text file (docs/constitution.md)
    both_orders: bool = True
    soft: bool = True  # rows of two answers keep the judge's `probability` that the first is better

    def validate(self, stages):
        self.check_judge()
        check_one_of(self)
        _choosing(self.principles)

    def files(self) -> tuple[str, ...]:
        return (*super().files(), self.principles)

    def run(self, ctx: StageContext) -> dict:
        rows, principles = preference_rows(self, ctx), _choosing(self.principles)
        mesh, pairs = make_mesh(ctx.mesh), every_pair(rows)
        which = drawn(len(rows), len(principles), f"{ctx.seed} principles")[pairs.row]
        said = Comparison(*(np.full((len(pairs.row), 3), np.nan) for _ in Comparison._fields))
        with jax.set_mesh(mesh), progress(ctx.console, len(which), f"{ctx.name}: judging") as bar:
            judge, done = self.asked(ctx, mesh), 0
            for p, principle in enumerate(principles):
                mine = np.flatnonzero(which == p)
                for some in np.split(mine, range(AT_ONCE, len(mine), AT_ONCE)):
                    hosts.heed_stop(f"{done} of {len(which)} pairs are judged")
                    if len(some):
                        self._compare(judge, principle, rows, pairs, some, said)
                    done += len(some)
                    bar.update(done)
        labels = labelled_rows(
            rows, pairs, said.probabilities, self.labeler(ctx), "copeland", self.soft, margin=0.0
        )
        if not labels:
            raise UserError(f"the judge has no verdict on any of the {len(rows)} rows")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in labels)
        write_text(ctx.folder / "preferences.jsonl", "".join(lines))
        report = judge_report(rows, pairs, said, 0.0)
        return {"rows": len(labels), "of_rows": len(rows)} | report | {"costs": judge_costs(judge)}

    def _compare(self, judge, principle: Principle, rows, pairs: Pairs, some, said: Comparison) -> None:
        """Fill in `some` of the pairs."""
        answer = lambda n, k: prompt_text(rows[n]["responses"][k])  # noqa: E731
        found = compare_pairs(
            judge,
            COMPARISON.replace("{principle}", principle.choose),
            ("A", "B"),
            [prompt_text(rows[n]["prompt"]) for n in pairs.row[some]],
            [answer(n, k) for n, k in zip(pairs.row[some], pairs.first[some], strict=True)],
            [answer(n, k) for n, k in zip(pairs.row[some], pairs.second[some], strict=True)],
            self.both_orders,
        )
        for whole, part in zip(said, found, strict=True):
            whole[some] = part


def _choosing(path: str) -> list[Principle]:
    found = [p for p in load_principles(path) if p.choose]
    if not found:
        raise UserError(f"{path}: no principle has 'choose'")
    return found
