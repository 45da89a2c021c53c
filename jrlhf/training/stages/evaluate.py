"""Every policy on the same prompts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import numpy as np
from rich.console import Console

from jrlhf import hosts
from jrlhf.config import (
    BEST_OF_N,
    EVALUATION,
    LANGUAGE_MODEL,
    ORDERED,
    REWARD_MODEL,
    Source,
    StageContext,
    UserError,
    stage_ref,
    stage_ref_or_name,
)
from jrlhf.data.chat import prompt_text
from jrlhf.lab import CRITERIA, MAXIMA
from jrlhf.metrics import progress
from jrlhf.ops.best_of_n import best_of_n_kl
from jrlhf.ops.pass_at_k import verdict_summary
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import Loaded, load_model, model_meta
from jrlhf.training.evaluation import Sampler, Scorer, prompt_slots, score
from jrlhf.training.loop import stage_key
from jrlhf.training.rewards import (
    Reward,
    Texts,
    check_all,
    fault_rates,
    make_reward,
    on_host_scores,
    read_texts,
    whole_parts,
)
from jrlhf.training.stages.best_of_n import best_of_n_table
from jrlhf.training.stages.common import (
    MeshStage,
    TooLongPrompt,
    check_answers,
    check_reward,
    start_config,
    usable_prompts,
    write_text,
)
from jrlhf.training.stages.sizes import Count, sampling_plan, usable
from jrlhf.types import Array


@dataclass(frozen=True)
class Evaluate(MeshStage):
    """Every policy on the same prompts: gold, proxy, KL to the first policy, length. Leaves `evaluation.json`."""

    artifact: ClassVar[str] = EVALUATION

    policies: tuple[str, ...] = stage_ref(artifact=LANGUAGE_MODEL)
    gold: str = stage_ref_or_name(artifact=REWARD_MODEL)  # the reward that is reported
    prompts: dict[str, Source] = field(kw_only=True, metadata=ORDERED)  # by split; the first is the main one
    proxy: str = stage_ref_or_name("", REWARD_MODEL)  # the learned reward, for comparison
    best_of_n: str = stage_ref("", BEST_OF_N)
    # gold rewards of groups of people, beside `gold`: each is shown, and the worst
    groups: tuple[str, ...] = stage_ref_or_name((), REWARD_MODEL)
    samples: int = 4  # per prompt
    sampling: SamplingConfig = SamplingConfig()
    show: int = 12  # prompts whose answers are kept as text
    max_prompt: int = 0
    too_long: TooLongPrompt = "error"

    def validate(self, stages):
        check_reward(self.gold, stages, "gold")
        if self.proxy:
            check_reward(self.proxy, stages, "proxy")
        for name in self.groups:
            check_reward(name, stages, "groups")
        if len(self.groups) == 1 or len({*self.groups}) != len(self.groups):
            raise UserError(f"groups must be two or more rewards that differ, got {', '.join(self.groups)}")
        if not self.policies or not self.prompts:
            raise UserError("policies and prompts must not be empty")
        if self.sampling.filtered:
            raise UserError(
                "sampling: the KL to the first policy is measured on unfiltered samples; use temperature"
            )
        if self.samples < 1:
            raise UserError(f"samples must be positive, got {self.samples}")
        for name in self.policies:
            check_answers(name, stages, self.sampling, self.max_prompt)

    def plan(self, ctx):
        splits = [usable(source, self.too_long) for source in self.prompts.values()]
        rows = Count(sum(split.n for split in splits), all(split.exact for split in splits))
        answers = rows.times(self.samples * len(self.policies))
        config = start_config(ctx.stages, self.policies[0])
        return sampling_plan(config, rows, answers, self.sampling.max_new_tokens, 3)

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        # Mistakes first: the policies are sampled one after the other, which takes long.
        table = best_of_n_table(ctx.parents[self.best_of_n]) if self.best_of_n else None
        tokenizers = {name: model_meta(ctx.parents[name])["tokenizer"] for name in self.policies}
        for name in self.policies:
            if tokenizers[name] != tokenizers[self.policies[0]]:
                raise UserError(f"policies: {name} and {self.policies[0]} have different tokenizers")
        with jax.set_mesh(mesh):
            base = load_model(ctx.parents[self.policies[0]], mesh)
            limit = self.max_prompt or base.model.config.context - self.sampling.max_new_tokens
            splits = {
                name: usable_prompts(
                    base, source, limit, self.sampling, self.too_long, ctx, f"prompts.{name}"
                )
                for name, source in self.prompts.items()
            }
            slots = prompt_slots(*(ids for _, ids in splits.values()))
            gold = make_reward(self.gold, dict(ctx.parents), mesh, base.tokenizer)
            proxy = make_reward(self.proxy, dict(ctx.parents), mesh, base.tokenizer) if self.proxy else None
            groups = {
                name: make_reward(name, dict(ctx.parents), mesh, base.tokenizer) for name in self.groups
            }
            for rows, _ in splits.values():
                check_all([gold, *groups.values(), *([proxy] if proxy else [])])(rows)
            measured: dict[str, dict] = {}
            criteria: dict[str, dict] = {}
            kept = {}
            total = len(self.policies) * sum(len(ids) for _, ids in splits.values()) * self.samples
            done = 0
            with progress(ctx.console, total, f"{ctx.name}: sampling") as bar:
                for name in self.policies:
                    hosts.heed_stop(f"{done} of {total} answers are drawn")
                    policy = load_model(ctx.parents[name], mesh)
                    sampler = Sampler(policy.model, policy.tokenizer, mesh, self.sampling, slots)
                    measured[name], criteria[name] = {"splits": {}}, {}
                    for i, (split, (rows, ids)) in enumerate(splits.items()):
                        # Every policy uses the same keys: common random numbers make differences less noisy.
                        result, texts, parts = self._measure(
                            policy,
                            base,
                            sampler,
                            rows,
                            ids,
                            gold,
                            proxy,
                            groups,
                            jax.random.fold_in(stage_key(ctx), i),
                            ctx.console,
                        )
                        measured[name]["splits"][split] = result
                        if self.gold in CRITERIA:
                            parts = CRITERIA[self.gold](texts.prompts, texts.completions, texts.rows)
                        if parts:
                            criteria[name][split] = {k: self._by_prompt(v) for k, v in parts.items()}
                        if i == 0:
                            kept[name] = (texts, result)
                        done += len(texts.completions)
                        bar.update(done)
        main = next(iter(splits))
        shown = {name: [prompt_text(row["prompt"]) for row in rows] for name, (rows, _) in splits.items()}
        prompts = shown[main]
        evaluation = {
            "reward_name": self.gold,
            "prompts": shown,
            "gold_max": float(np.mean(MAXIMA[self.gold](prompts))) if self.gold in MAXIMA else None,
            "policies": measured,
            "criteria": criteria,
            "samples": self._samples(kept, prompts),
            "best_of_n": None,
        }
        if table is not None:
            self._add_best_of_n(evaluation, table, main, prompts)
        write_text(ctx.folder / "evaluation.json", json.dumps(evaluation, allow_nan=False))
        return {
            name: {
                split: {k: float(np.mean(v)) for k, v in values.items() if v is not None and k != "groups"}
                | verdict_summary(values["gold"], values["length"])
                | of_groups(values["groups"])
                for split, values in measured[name]["splits"].items()
            }
            for name in measured
        }

    def _by_prompt(self, values) -> list[list[float]]:
        return np.round(np.asarray(values, np.float64), 6).reshape(-1, self.samples).tolist()

    def _measure(
        self,
        policy: Loaded,
        base: Loaded,
        sampler: Sampler,
        rows,
        ids,
        gold: Reward,
        proxy: Reward | None,
        groups: dict[str, Reward],
        key,
        console: Console,
    ) -> tuple[dict, Texts, Mapping[str, Array]]:
        n = self.samples
        samples = sampler.sample(policy.params, ids, key, group=n)
        texts = read_texts(samples, [row for row in rows for _ in range(n)], policy.tokenizer)
        base_logprobs = Scorer(base.model, sampler.mesh, self.sampling.temperature).logprobs(
            base.params, samples
        )
        said = on_host_scores(gold, samples, texts, sampler.mesh)
        return (
            fault_rates(gold.name, said, console)
            | {
                "gold": self._by_prompt(said.total),
                "proxy": self._by_prompt(score(proxy, samples, texts, sampler.mesh)) if proxy else None,
                "groups": {
                    name: self._by_prompt(score(reward, samples, texts, sampler.mesh))
                    for name, reward in groups.items()
                },
                "kl": self._by_prompt(np.sum(samples.logprobs, axis=1) - base_logprobs),
                "length": self._by_prompt(np.sum(samples.response_mask, axis=1)),
                "ended": self._by_prompt(samples.ended),
            },
            texts,
            whole_parts(said),
        )

    def _samples(self, kept: dict, prompts: list[str]) -> list[dict]:
        out = []
        for i in range(min(self.show, len(prompts))):
            answers = {}
            for name, (texts, result) in kept.items():
                answers[name] = {"text": texts.completions[i * self.samples], "gold": result["gold"][i][0]}
                if result["proxy"] is not None:
                    answers[name]["proxy"] = result["proxy"][i][0]
            out.append({"prompt": prompts[i], "answers": answers})
        return out

    def _add_best_of_n(self, evaluation: dict, table: dict, main: str, prompts: list[str]) -> None:
        curves = table["per_prompt"]
        mean = lambda name: [float(np.mean(curves[name][str(n)])) for n in table["n"]]  # noqa: E731
        error = [
            1.96 * float(np.std(curves["gold"][str(n)]) / len(table["prompts"]) ** 0.5) for n in table["n"]
        ]
        evaluation["best_of_n"] = {
            "n": table["n"],
            "gold": mean("gold"),
            "proxy": mean("proxy"),
            "kl": table["kl"],
            "gold_low": [g - e for g, e in zip(mean("gold"), error, strict=True)],
            "gold_high": [g + e for g, e in zip(mean("gold"), error, strict=True)],
        }
        if table["prompts"] == prompts:  # the same prompts: a row of the table, comparable prompt by prompt
            n = 16 if 16 in table["n"] else table["n"][-1]
            column = lambda name: [[v] for v in curves[name][str(n)]]  # noqa: E731
            split: dict = {k: column(k) for k in ("gold", "proxy", "length", "ended")}
            split |= {"kl": None, "groups": {}}
            evaluation["policies"][f"best_of_{n}"] = {"splits": {main: split}, "kl_exact": best_of_n_kl(n)}


def of_groups(values: dict[str, list[list[float]]]) -> dict:
    """The mean of each group's gold reward, and the smallest of them; nothing where there are no groups."""
    means = {name: float(np.mean(column)) for name, column in values.items()}
    return {"groups": means, "worst_group": min(means.values())} if means else {}
