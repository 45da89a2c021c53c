"""Best-of-n: rerank samples by the reward."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np

from jrlhf.config import (
    BEST_OF_N,
    LANGUAGE_MODEL,
    REWARD_MODEL,
    Source,
    StageContext,
    UserError,
    stage_ref,
    stage_ref_or_name,
)
from jrlhf.data.chat import prompt_text
from jrlhf.ops.best_of_n import best_of_n, best_of_n_kl
from jrlhf.rollout.sampling import SamplingConfig
from jrlhf.sharding import make_mesh
from jrlhf.training.artifacts import load_model
from jrlhf.training.evaluation import score
from jrlhf.training.rewards import fault_rates, make_reward, on_host_scores, whole_parts
from jrlhf.training.stages.common import (
    MeshStage,
    TooLongPrompt,
    check_answers,
    check_reward,
    sample_answers,
    start_config,
    write_text,
)
from jrlhf.training.stages.sizes import sampling_plan, usable


@dataclass(frozen=True)
class BestOfN(MeshStage):
    """Rerank samples of a policy by the reward: the strongest simple baseline. Leaves `best_of_n.json`.

    Where the reward has parts (a process reward's aggregates of an answer's steps, the parts of a mix), the results
    also tell the gold of the best by each part alone, from the same samples (`gold_by`).
    """

    artifact: ClassVar[str] = BEST_OF_N

    start: str = stage_ref(artifact=LANGUAGE_MODEL)
    reward: str = stage_ref_or_name(artifact=REWARD_MODEL)
    prompts: Source = field(kw_only=True)
    gold: str = stage_ref_or_name("", REWARD_MODEL)
    samples: int = 64  # per prompt; every n up to it is estimated without bias from the same samples
    sampling: SamplingConfig = SamplingConfig()
    max_prompt: int = 0
    too_long: TooLongPrompt = "error"

    def validate(self, stages):
        check_reward(self.reward, stages)
        if self.gold:
            check_reward(self.gold, stages, "gold")
        if self.samples < 2:
            raise UserError(f"samples is {self.samples}; best-of-n needs at least 2")
        check_answers(self.start, stages, self.sampling, self.max_prompt)

    def plan(self, ctx):
        rows, config = usable(self.prompts, self.too_long), start_config(ctx.stages, self.start)
        return sampling_plan(config, rows, rows.times(self.samples), self.sampling.max_new_tokens, 2)

    def run(self, ctx: StageContext) -> dict:
        mesh = make_mesh(ctx.mesh)
        with jax.set_mesh(mesh):
            policy = load_model(ctx.parents[self.start], mesh)
            n = self.samples
            reward = make_reward(self.reward, dict(ctx.parents), mesh, policy.tokenizer)
            gold = make_reward(self.gold, dict(ctx.parents), mesh, policy.tokenizer) if self.gold else reward
            rows, _, samples, texts = sample_answers(self, policy, ctx, n, (reward, gold))
            by_prompt = lambda x: np.asarray(x, np.float64).reshape(len(rows), n)  # noqa: E731
            scores = on_host_scores(reward, samples, texts, mesh)
            values = {
                "proxy": by_prompt(scores.total),
                "gold": by_prompt(score(gold, samples, texts, mesh)),
                "length": by_prompt(np.sum(samples.response_mask, axis=1)),
                "ended": by_prompt(samples.ended),
            }
        ns = [2**i for i in range(n.bit_length()) if 2**i <= n]
        proxy = values["proxy"]
        curves = {name: {str(m): best_of_n(proxy, v, m).tolist() for m in ns} for name, v in values.items()}
        by_part = {
            part: {str(m): best_of_n(by_prompt(said), values["gold"], m).tolist() for m in ns}
            for part, said in (whole_parts(scores) if self.gold else {}).items()
        }
        table = {
            "prompts": [prompt_text(row["prompt"]) for row in rows],
            "n": ns,
            "kl": [best_of_n_kl(m) for m in ns],
            "per_prompt": curves,
            "gold_by": by_part,
            "best_text": [texts.completions[i * n + int(np.argmax(proxy[i]))] for i in range(len(rows))],
        }
        write_text(ctx.folder / "best_of_n.json", json.dumps(table))
        means = lambda by_n: {m: float(np.mean(v)) for m, v in by_n.items()}  # noqa: E731
        results: dict = {name: means(by_n) for name, by_n in curves.items()}
        if rates := fault_rates(reward.name, scores, ctx.console):
            results["unscored"] = rates
        if by_part:
            results["gold_by"] = {part: means(by_n) for part, by_n in by_part.items()}
        return results


def best_of_n_table(folder: Path) -> dict:
    path = folder / "best_of_n.json"
    if not path.exists():
        raise UserError(f"{path} is missing; run its stage again with --force")
    return json.loads(path.read_text(encoding="utf-8"))
