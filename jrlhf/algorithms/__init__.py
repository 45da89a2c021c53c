"""Every algorithm by its config. To add one: a file with a config and a `make_...`, and a line here."""

from collections.abc import Callable
from typing import Any

from jrlhf.algorithms.bco import BCOConfig, make_bco
from jrlhf.algorithms.cispo import CISPOConfig, make_cispo
from jrlhf.algorithms.cpo import CPOConfig, make_cpo
from jrlhf.algorithms.dapo import DAPOConfig, make_dapo
from jrlhf.algorithms.dpo import DPOConfig, make_dpo
from jrlhf.algorithms.dr_grpo import DrGRPOConfig, make_dr_grpo
from jrlhf.algorithms.grpo import GRPOConfig, make_grpo
from jrlhf.algorithms.gspo import GSPOConfig, make_gspo
from jrlhf.algorithms.kto import KTOConfig, make_kto
from jrlhf.algorithms.online_dpo import OnlineDPOConfig, make_online_dpo
from jrlhf.algorithms.orpo import ORPOConfig, make_orpo
from jrlhf.algorithms.raft import RAFTConfig, make_raft
from jrlhf.algorithms.ranked_dpo import RankedDPOConfig, make_ranked_dpo
from jrlhf.algorithms.reinforce import REINFORCEConfig, make_reinforce
from jrlhf.algorithms.reinforce_plus_plus import REINFORCEPlusPlusConfig, make_reinforce_plus_plus
from jrlhf.algorithms.remax import ReMaxConfig, make_remax
from jrlhf.algorithms.rloo import RLOOConfig, make_rloo
from jrlhf.algorithms.simpo import SimPOConfig, make_simpo

# Each learns from pairs of ranked answers, or from whole rankings: make(config, model, optimizer) -> Algorithm of
# PairBatches (of RankedBatches).
FROM_PAIRS: dict[type, Callable[..., Any]] = {
    DPOConfig: make_dpo,
    SimPOConfig: make_simpo,
    ORPOConfig: make_orpo,
    CPOConfig: make_cpo,
    RankedDPOConfig: make_ranked_dpo,
}

# Each learns from its own samples, without a critic (PPO has one, and a stage of its own):
# make(config, model, optimizer, temperature) -> Algorithm of Rollouts and their scores.
FROM_ROLLOUTS: dict[type, Callable[..., Any]] = {
    GRPOConfig: make_grpo,
    DrGRPOConfig: make_dr_grpo,
    DAPOConfig: make_dapo,
    GSPOConfig: make_gspo,
    CISPOConfig: make_cispo,
    RLOOConfig: make_rloo,
    REINFORCEConfig: make_reinforce,
    REINFORCEPlusPlusConfig: make_reinforce_plus_plus,
    ReMaxConfig: make_remax,
    RAFTConfig: make_raft,
    OnlineDPOConfig: make_online_dpo,
}

# Each learns from single labelled answers: make(config, model, optimizer) -> Algorithm of UnpairedBatches.
FROM_LABELS: dict[type, Callable[..., Any]] = {
    KTOConfig: make_kto,
    BCOConfig: make_bco,
}
