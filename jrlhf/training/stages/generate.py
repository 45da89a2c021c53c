"""Rows that a model makes: demonstrations that are the best of its answers, and prompts like those that there are."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import numpy as np

from jrlhf import hosts
from jrlhf.config import DEMONSTRATIONS, LANGUAGE_MODEL, PROMPTS, Source, StageContext, UserError, stage_ref
from jrlhf.data.chat import prompt_text
from jrlhf.data.curation import BEYOND_TEXT, few_shot, is_unfinished, parse_tasks, rouge_l, task_fault, words
from jrlhf.metrics import progress
from jrlhf.rewards.endpoint import Endpoint, EndpointJudge
from jrlhf.rewards.judges import Writer
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import load_model
from jrlhf.training.data import load_rows
from jrlhf.training.judging import ANSWERS, LocalJudge
from jrlhf.training.stages.common import MeshStage, check_answers, labelled, start_config
from jrlhf.training.stages.sizes import at_most, check_kind, sampling_plan
from jrlhf.training.stages.solve_rate import ScoredAnswers, write_rows
from jrlhf.types import Plan


@dataclass(frozen=True)
class BestAnswers(ScoredAnswers):
    """Of a policy's answers to each prompt the best by a reward, as demonstrations for SFT: best-of-n distillation
    from a data set (rejection sampling: Touvron et al. 2023, section 3.2.3). Leaves `demonstrations.jsonl`.

    The on-policy form, with fresh answers in every step, is `OnPolicy(algorithm=RAFTConfig())`. An answer that was cut
    off by its length is none to learn from, and a prompt without another is left out.
    """

    artifact: ClassVar[str] = DEMONSTRATIONS

    keep: int = 1  # answers to a prompt, the best first; equal texts count once
    least: float | None = None  # the reward that an answer must have at least

    def validate(self, stages):
        super().validate(stages)
        if not 1 <= self.keep <= self.samples:
            raise UserError(f"keep is {self.keep}; it must be from 1 to samples, {self.samples}")

    def run(self, ctx: StageContext) -> dict:
        done = self.answered(ctx)
        kept: list[dict] = []
        without = 0
        for p, row in enumerate(done.rows):
            answers = done.texts.completions[p * self.samples : (p + 1) * self.samples]
            chosen: dict[str, float] = {}
            for i in np.argsort(-done.rewards[p], kind="stable"):
                good = self.least is None or done.rewards[p, i] >= self.least
                if done.ended[p, i] and good and answers[i].strip() and len(chosen) < self.keep:
                    chosen.setdefault(answers[i], float(done.rewards[p, i]))
            without += not chosen
            shared = {"prompt": row["prompt"]} | ({"tools": row["tools"]} if "tools" in row else {})
            kept += [shared | {"completion": text, "reward": value} for text, value in chosen.items()]
        if not kept:
            raise UserError(
                f"no answer ended by itself with a reward of at least {self.least} (the best has "
                f"{done.rewards.max():.3g}, {done.ended.mean():.0%} ended): lower least or raise max_new_tokens"
            )
        write_rows(ctx.folder / "demonstrations.jsonl", kept)
        return {
            "prompts": len(done.rows),
            "demonstrations": len(kept),
            "without_answer": without,
            "reward_sampled": float(done.rewards.mean()),
            "reward_kept": float(np.mean([row["reward"] for row in kept])),
            "ended": float(done.ended.mean()),
        }


FAULTS = ("unfinished", "too short", "too long", "keyword", "punctuation first", "too similar")


@dataclass(frozen=True)
class SelfInstruct(MeshStage):
    """New prompts like those that there are (Self-Instruct: Wang et al. 2023, section 2.2). Leaves `prompts.jsonl`.

    A model goes on with a list of tasks, most of them from `seeds` and some of its own. Of what it writes is kept what
    is whole, neither too short nor too long, speaks of text alone, and whose ROUGE-L with every prompt so far is below
    `similarity`. The results tell how much each filter takes. Without `with_seeds` the seeds themselves are left out.
    """

    artifact: ClassVar[str] = PROMPTS

    start: str = stage_ref("", LANGUAGE_MODEL)
    by: Endpoint | None = None  # instead of start
    seeds: Source = field(kw_only=True)  # prompts
    requests: int = 64  # lists that are asked for in each round
    rounds: int = 4  # later ones are shown what earlier ones made
    examples: int = 8  # tasks in a list that are given
    own: int = 2  # of these, tasks that were made before, where there are
    similarity: float = 0.7
    least_words: int = 4
    most_words: int = 150
    excluded: tuple[str, ...] = BEYOND_TEXT  # words of tasks that are not for a language model
    with_seeds: bool = False
    sampling: SamplingConfig = SamplingConfig(max_new_tokens=256)  # of `start`

    def validate(self, stages):
        if bool(self.start) == (self.by is not None):
            raise UserError("give either start (a language model's stage) or by (an endpoint)")
        if self.start:
            check_answers(self.start, stages, self.sampling, 0)
        if self.requests < 1 or self.rounds < 1:
            raise UserError(f"requests {self.requests} and rounds {self.rounds} must be positive")
        if not 0 <= self.own < self.examples:
            raise UserError(f"own is {self.own}; it must be from 0 to below examples, {self.examples}")
        if not 0 < self.similarity <= 1:
            raise UserError(f"similarity is {self.similarity}; it must be above 0 and at most 1")
        if not 1 <= self.least_words <= self.most_words:
            raise UserError(f"least_words {self.least_words} must be from 1 to most_words {self.most_words}")

    def plan(self, ctx):
        check_kind(self.seeds, "prompt", "seeds")
        asked = at_most(self.requests * self.rounds)
        if not self.start:
            return Plan(rows=asked.n, note="asks an endpoint")
        return sampling_plan(
            start_config(ctx.stages, self.start), asked, asked, self.sampling.max_new_tokens, 1
        )

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        rows = load_rows(self.seeds, "prompt", labelled(ctx.console, "seeds"))
        seeds = list(dict.fromkeys(prompt_text(row["prompt"]) for row in rows))
        if self.by is not None and jax.process_count() > 1:
            raise UserError("by: an endpoint is asked by one process; run this stage on one host")
        if len(seeds) < self.examples:
            raise UserError(f"examples is {self.examples}, but there are only {len(seeds)} different seeds")
        with jax.set_mesh(mesh):
            writer: Writer
            if self.by is not None:
                writer = EndpointJudge(self.by, ctx.folder / ANSWERS)
            else:
                writer = LocalJudge(ctx.name, load_model(ctx.parents[self.start], mesh), mesh, self.sampling)
            with progress(ctx.console, self.rounds, f"{ctx.name}: rounds") as bar:
                made, counts = self.generated(writer, seeds, ctx.seed, bar.update)
        if not made:
            raise UserError(
                f"no task survived the filters ({counts}): is the model able to go on with a list?"
            )
        kept = [*({"prompt": s} for s in seeds), *made] if self.with_seeds else made
        write_rows(ctx.folder / "prompts.jsonl", kept)
        return {"seeds": len(seeds), "requests": self.requests * self.rounds, **counts, "kept": len(made)}

    def generated(
        self, writer: Writer, seeds: Sequence[str], seed: int, update: Any = lambda n: None
    ) -> tuple[list[dict], dict[str, int]]:
        """(rows `{"prompt", "similarity"}`, tasks that were parsed and how many each filter took). Draws by `seed`."""
        known = [words(text) for text in seeds]
        made: list[dict] = []
        counts = dict.fromkeys(("replies", "tasks", *FAULTS), 0)
        for number in range(self.rounds):
            hosts.heed_stop(f"{number} of {self.rounds} rounds are done")
            rng = np.random.default_rng([seed, number])
            asked = [few_shot(self._shown(seeds, made, rng)) for _ in range(self.requests)]
            replies = writer.write(asked, int(rng.integers(2**31)))
            for reply in replies:
                counts["replies"] += reply is not None
                tasks = parse_tasks(reply or "", self.examples + 1)
                counts["tasks"] += len(tasks)
                for n, task in enumerate(tasks, 1):
                    said = words(task)
                    fault = "unfinished" if n == len(tasks) and is_unfinished(task) else ""
                    fault = fault or task_fault(task, self.least_words, self.most_words, self.excluded)
                    nearest = 0.0 if fault else max(rouge_l(said, other) for other in known)
                    fault = fault or ("too similar" if nearest >= self.similarity else "")
                    if fault:
                        counts[fault] += 1
                    else:
                        known.append(said)
                        made.append({"prompt": task, "similarity": round(nearest, 4)})
            update(number + 1)
        return made, counts

    def _shown(self, seeds: Sequence[str], made: Sequence[dict], rng: np.random.Generator) -> list[str]:
        """The tasks of one list, in random order."""
        own = min(self.own, len(made))
        some = [seeds[i] for i in rng.choice(len(seeds), self.examples - own, replace=False)]
        some += [made[i]["prompt"] for i in rng.choice(len(made), own, replace=False)] if own else []
        return [some[i] for i in rng.permutation(len(some))]
