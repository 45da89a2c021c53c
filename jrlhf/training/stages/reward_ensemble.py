"""Several reward models as one reward that distrusts what they disagree about."""

import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

from jrlhf.config import REWARD_MODEL, Stage, StageContext, UserError, stage_ref
from jrlhf.ops.reward_losses import Combine
from jrlhf.training.artifacts import has_model, model_meta
from jrlhf.training.rewards import ENSEMBLE, is_head_ensemble
from jrlhf.training.stages.common import write_text
from jrlhf.training.stages.reward_model import RewardModel


@dataclass(frozen=True)
class RewardEnsemble(Stage):
    """The reward of several: their mean, the worst of them, or the mean less lam times their variance (Coste et al.
    2023; Eisenstein et al. 2023). Members are reward models that differ in `member`, or one with several `heads`.

    Where members speak for groups of people (`RewardModel.labelers`, or heads by `groups` or a `mixture`), "min" is the
    reward of the group that is worst off (Chakraborty et al. 2024), and with "vote" each says how much of the training
    answers it puts below this one, so that none outvotes the others by the scale of its scores (`combine_scores`).

    Leaves `ensemble.json`, which names the members; no parameter is copied.
    """

    artifact: ClassVar[str] = REWARD_MODEL

    members: tuple[str, ...] = stage_ref(artifact=REWARD_MODEL)
    combine: Combine = "mean"
    lam: float = (
        0.0  # of mean_minus_variance; the scores of RewardModels have std 1 over the training answers
    )
    # of every member in "mean" and "vote", of a model with several heads one for each head; (): equal
    weights: tuple[float, ...] = ()

    def validate(self, stages):
        if not self.members:
            raise UserError("members must not be empty")
        weighs = self.combine == "mean_minus_variance"
        if weighs != (self.lam > 0) or not math.isfinite(self.lam):
            raise UserError(
                f"lam is {self.lam}: it weighs the variance with combine 'mean_minus_variance', where it must be "
                "positive, and is 0 otherwise"
            )
        self._check_weights()
        if self.combine == "vote":
            for name in self.members:
                if not isinstance(stages[name], RewardModel):
                    raise UserError(
                        f"members: {name!r} is a {type(stages[name]).__name__}; combine 'vote' reads scores that are "
                        "normalised over reference answers, as those of a RewardModel are"
                    )
        if self.weights and all(isinstance(stages[name], RewardModel) for name in self.members):
            self._check_count(sum(_scores(stages[name]) for name in self.members))
        for n, name in enumerate(self.members):
            for other in self.members[:n]:
                if stages[other] == stages[name]:
                    raise UserError(
                        f"members: {other!r} and {name!r} are the same model; give each another `member` (0, 1, ...)"
                    )
        only = stages[self.members[0]]
        if len(self.members) == 1 and isinstance(only, RewardModel) and not only.algorithm.ensemble:
            raise UserError(
                f"members: {self.members[0]!r} alone is no ensemble; add members, or give it algorithm.heads "
                "(or groups, or mixture)"
            )

    def _check_weights(self) -> None:
        if not self.weights:
            return
        if self.combine not in ("mean", "vote"):
            raise UserError(f"weights are of the members in a 'mean' or a 'vote', not in {self.combine!r}")
        if not all(math.isfinite(w) and w >= 0 for w in self.weights) or not any(self.weights):
            raise UserError(f"weights must not be negative, nor all 0: {self.weights}")

    def _check_count(self, scores: int) -> None:
        if self.weights and len(self.weights) != scores:
            raise UserError(f"weights: {len(self.weights)} are given for {scores} scores (a head is one)")

    def run(self, ctx: StageContext) -> dict:
        folders = [ctx.parents[name] for name in self.members]
        heads = sum(
            len(meta["heads"]["names"]) if (meta := _meta(f)) and is_head_ensemble(meta) else 1
            for f in folders
        )
        self._check_count(heads)
        note = {
            "members": [f.name for f in folders],
            "combine": self.combine,
            "lam": self.lam,
            "weights": list(self.weights),
        }
        write_text(ctx.folder / ENSEMBLE, json.dumps(note))
        return {"members": heads}


def _scores(model: Stage) -> int:
    """How many scores a reward model gives each answer."""
    assert isinstance(model, RewardModel)
    return len(model.algorithm.head_names) if model.algorithm.ensemble else 1


def _meta(folder) -> dict:
    return model_meta(folder, "scalar") if has_model(folder) else {}


def reward_members(model: RewardModel, count: int) -> list[RewardModel]:
    """`count` reward models that differ in their first head and the order of their data, for an ensemble."""
    return [replace(model, member=n) for n in range(count)]
