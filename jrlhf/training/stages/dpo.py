"""DPO on the same preferences."""

from dataclasses import dataclass

from jrlhf.algorithms.dpo import DPOConfig, make_dpo
from jrlhf.models.transformer import Model
from jrlhf.optim import Optimizer
from jrlhf.training.stages.pairs import PairStage
from jrlhf.types import Algorithm


@dataclass(frozen=True)
class DPO(PairStage):
    """Direct preference optimisation on the same preferences, without a reward model or rollouts."""

    algorithm: DPOConfig = DPOConfig()

    def make_algorithm(self, model: Model, optimizer: Optimizer) -> Algorithm:
        return make_dpo(self.algorithm, model, optimizer)
