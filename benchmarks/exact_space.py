"""Every algorithm on the exact space: how far from its known optimum it ends, and that controls end elsewhere.

A row runs the package's own algorithm for ten seeds on a table (1,500 updates), or for three on a two-layer transformer
over a smaller space (500 updates), and measures the total variation from what it should reach. A row is
right when every seed's distance is within its bounds; a control's lower bound says how far off it must be. Rows without
bounds only say what was found. An algorithm of the visible dicts without a row here gets one by its defaults.

    python benchmarks/exact_space.py                    all rows that benchmarks/exact_space.json does not hold yet
    python benchmarks/exact_space.py --only rloo        this row (and those of other names that begin so), again
    python benchmarks/exact_space.py --list

A minute a row, at most, on two cores; each is written when it is done.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf import __version__
from jrlhf.algorithms import FROM_LABELS, FROM_PAIRS, FROM_ROLLOUTS
from jrlhf.algorithms.bco import BCOConfig
from jrlhf.algorithms.cispo import CISPOConfig
from jrlhf.algorithms.dapo import DAPOConfig
from jrlhf.algorithms.dpo import DPOConfig
from jrlhf.algorithms.dr_grpo import DrGRPOConfig
from jrlhf.algorithms.grpo import GRPOConfig
from jrlhf.algorithms.gspo import GSPOConfig
from jrlhf.algorithms.kto import KTOConfig
from jrlhf.algorithms.ppo import PPOConfig, actor_critic, make_ppo
from jrlhf.algorithms.raft import RAFTConfig
from jrlhf.algorithms.ranked_dpo import RankedDPOConfig
from jrlhf.algorithms.reinforce import REINFORCEConfig
from jrlhf.algorithms.reinforce_plus_plus import REINFORCEPlusPlusConfig
from jrlhf.algorithms.remax import ReMaxConfig
from jrlhf.algorithms.rloo import RLOOConfig
from jrlhf.lab import exact
from jrlhf.optim import OptimConfig, build_optimizer
from jrlhf.training.exact import (
    Learner,
    TableModel,
    measure,
    run_from_labels,
    run_from_pairs,
    run_from_rankings,
    run_from_rollouts,
    tabular,
    transformer,
)

RESULTS = Path(__file__).with_suffix(".json")
SEED, BETA = 11, 0.5
UPDATES = {"table": 1500, "transformer": 500}
SEEDS = {"table": 10, "transformer": 3}


class MeanTable(TableModel):
    """A mistake: log-probabilities of answers are means over tokens."""

    def logprobs(self, params, tokens, mask, start=1, temperature=1.0):
        logprobs, entropy = super().logprobs(params, tokens, mask, start, temperature)
        return logprobs / jnp.sum(mask[:, 1:], axis=1, keepdims=True, dtype=jnp.float32), entropy


def less_at_full_length(world: exact.World) -> exact.World:
    """Answers of all tokens cost 1: the length penalty at its end."""
    _, mask = world.space.all_sequences()
    return replace(world, reward=world.reward - jnp.float32(mask.all(axis=1)))


class Target:
    """Where a row should end: a closed form, by name."""

    OPTIMUM = ("ref exp(r / beta)", exact.optimum)
    FORWARD_KL = ("beta ref / (c - r)", exact.forward_kl_optimum)
    TOKEN_KL = ("of states: ref exp(Q / beta)", lambda w: exact.token_level_optimum(w, in_loss=w.beta))
    TOKEN_FORWARD_KL = ("of states: beta ref / (c - Q)", exact.token_level_forward_kl_optimum)
    ENTROPY = (
        "of states: entropy 0.2 in the loss",
        lambda w: exact.token_level_optimum(w, in_reward=w.beta, entropy=0.2),
    )
    OVERLONG = ("ref exp((r - 1 at full length) / beta)", lambda w: exact.optimum(less_at_full_length(w)))
    FLIPPED = (
        "ref exp(s / beta), s fitted to labels flipped at 0.2",
        lambda w: exact.dpo_optimum(w, exact.preferences(w, flips=0.2)),
    )
    IPO = ("ref exp(P / beta)", lambda w: exact.ipo_optimum(w, exact.preferences(w), w.beta))
    SQUARE = ("ref exp(2 P / beta)", lambda w: exact.ipo_optimum(w, exact.preferences(w), w.beta / 2))
    EXPONENTIAL = ("ref exp(r / (2 beta))", exact.exponential_optimum)
    NCA = ("2 P ref", lambda w: exact.nca_optimum(w, exact.preferences(w)))
    SPPO = ("exact.sppo_optimum", lambda w: exact.sppo_optimum(w, exact.preferences(w), w.beta))
    BEST_OF_4 = ("law of the best of 4 of ref", lambda w: exact.best_of_n_optimum(w, 4))
    KTO = ("exact.kto_optimum", lambda w: exact.kto_optimum(w, jax.nn.sigmoid(w.reward)))


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    config: Any  # of the algorithm; its make function is looked up in the visible dicts
    target: tuple[str, Callable[[exact.World], Any]] = Target.OPTIMUM
    below: float | None = None  # bounds of every seed's distance from the target
    above: float | None = None
    on: str = "table"  # or "transformer"
    lr: float = 0.02
    beta: float = BETA  # the world's
    flips: float = 0.0  # of the labels of pairs
    mean_logprobs: bool = False

    def right(self, distances: list[float]) -> bool | None:
        if self.below is None and self.above is None:
            return None
        return max(distances) <= (self.below or 1.0) and min(distances) >= (self.above or 0.0)


GROUPS = {"beta": BETA, "group_size": 16, "kl": "reward"}
PLAIN_PPO = {"epochs": 1, "minibatches": 1, "missing_eos_penalty": 0.0, "whiten_advantages": False}


def in_the_loss(kl: str, level: str = "token", **more) -> REINFORCEConfig:
    """Its baseline leaves an answer's own reward out. GRPO's does not: rewards count (G - 1)/G there, and a penalty in
    the loss 1."""
    return REINFORCEConfig(beta=BETA, kl=kl, kl_level=level, **more)


ROWS = [
    # With -beta k1 in the reward all of these have one optimum.
    Row("ppo", PPOConfig(beta=BETA, **PLAIN_PPO), below=0.01),
    Row("ppo-defaults", PPOConfig(beta=BETA), below=0.01, lr=0.005),
    Row("ppo-without-kl", PPOConfig(beta=0.0, **PLAIN_PPO), above=0.5),
    Row("ppo-entropy", PPOConfig(beta=BETA, entropy_coef=0.2, **PLAIN_PPO), Target.ENTROPY, below=0.02),
    Row("rloo", RLOOConfig(**GROUPS), below=0.01),
    Row("rloo-without-kl", RLOOConfig(beta=0.0, group_size=16), above=0.5),
    Row("reinforce", REINFORCEConfig(beta=BETA), below=0.01),
    Row("reinforce++", REINFORCEPlusPlusConfig(beta=BETA), below=0.01),
    Row("reinforce++-baseline", REINFORCEPlusPlusConfig(group_baseline=True, **GROUPS), below=0.01),
    # A baseline that is the same in every state leaves noise at the optimum, where the others have none.
    Row("remax", ReMaxConfig(beta=BETA), below=0.03),
    Row("grpo-kl-in-reward", GRPOConfig(scale="none", normalise="sum", **GROUPS), below=0.01),
    Row("dr-grpo", DrGRPOConfig(**GROUPS), below=0.01),
    Row("dapo", DAPOConfig(overlong_buffer=0.0, **GROUPS), below=0.01),
    Row("dapo-overlong", DAPOConfig(**GROUPS), Target.OVERLONG, below=0.01),
    Row("gspo", GSPOConfig(**GROUPS), below=0.01),
    Row("cispo", CISPOConfig(**GROUPS), below=0.01),
    # An estimator in the loss optimises what its gradient says.
    Row("grpo-as-published", GRPOConfig(beta=BETA, group_size=16), below=0.24, above=0.13),
    Row("loss-k1", in_the_loss("k1"), above=0.7),
    Row("loss-k2", in_the_loss("k2"), Target.TOKEN_KL, below=0.02),
    Row("loss-full", in_the_loss("full"), Target.TOKEN_KL, below=0.02),
    Row("loss-k3", in_the_loss("k3"), Target.TOKEN_FORWARD_KL, below=0.02),
    Row("loss-k2-sequence", in_the_loss("k2", "sequence"), below=0.01),
    Row("loss-k3-sequence", in_the_loss("k3", "sequence"), Target.FORWARD_KL, below=0.02),
    Row("loss-k3-sequence-ratio", in_the_loss("k3", "sequence", kl_ratio=True), below=0.02),
    # Imitation of the best.
    Row("raft", RAFTConfig(group_size=16), above=0.5),
    Row("raft-penalised", RAFTConfig(group_size=16, beta=BETA), below=0.01),
    Row("best-of-4-distilled", RAFTConfig(group_size=4, samples="reference"), Target.BEST_OF_4, below=0.02),
    # Pairs of the reference's answers.
    Row("dpo", DPOConfig(BETA), below=0.05, lr=0.05),
    Row("dpo-mean-logprobs", DPOConfig(BETA, reference="on_the_fly"), above=0.4, lr=0.05, mean_logprobs=True),
    Row("dpo-flipped", DPOConfig(BETA), Target.FLIPPED, below=0.05, lr=0.05, flips=0.2),
    Row("dpo-conservative", DPOConfig(BETA, 0.2), Target.FLIPPED, below=0.05, lr=0.05),
    Row("dpo-robust-flipped", DPOConfig(BETA, 0.2, loss="robust"), below=0.05, lr=0.05, flips=0.2),
    # The target is stationary (tests/exact/test_fixed_points.py), but far: it takes 10,000 steps, without noise.
    Row("dpo-forward-kl", DPOConfig(BETA, divergence="forward_kl"), Target.FORWARD_KL, lr=0.05),
    Row("ipo", DPOConfig(BETA, loss="ipo"), Target.IPO, below=0.05, lr=0.05),
    Row("ipo-is-not-dpo", DPOConfig(BETA, loss="ipo"), above=0.1, lr=0.05),
    Row("dpo-square", DPOConfig(BETA, loss="square"), Target.SQUARE, below=0.05, lr=0.05),
    Row("dpo-exponential", DPOConfig(BETA, loss="exponential"), Target.EXPONENTIAL, below=0.05, lr=0.05),
    Row("dpo-hinge", DPOConfig(BETA, loss="hinge"), lr=0.05),
    Row("dpo-exo", DPOConfig(BETA, 0.01, loss="exo_pair"), lr=0.05),
    Row("nca", DPOConfig(1.0, loss="nca_pair"), Target.NCA, below=0.05, lr=0.05, beta=1.0),
    Row("sppo", DPOConfig(BETA, loss="sppo_hard"), Target.SPPO, below=0.05, lr=0.05),
    Row("ranked-dpo", RankedDPOConfig(BETA), below=0.05, lr=0.05),
    # Single labelled answers of the reference.
    Row("kto", KTOConfig(BETA, reference_point="zero"), Target.KTO, below=0.05, lr=0.05),
    Row("bco", BCOConfig(BETA), lr=0.05),
    # A two-layer transformer.
    Row("transformer-ppo", PPOConfig(beta=BETA, **PLAIN_PPO), below=0.03, on="transformer", lr=0.005),
    Row("transformer-rloo", RLOOConfig(**GROUPS), below=0.03, on="transformer", lr=0.005),
    Row("transformer-without-kl", RLOOConfig(beta=0.0, group_size=16), above=0.3, on="transformer", lr=0.005),
    Row("transformer-dpo", DPOConfig(BETA), below=0.03, on="transformer", lr=0.005),
    Row("transformer-ipo", DPOConfig(BETA, loss="ipo"), Target.IPO, below=0.03, on="transformer", lr=0.005),
    Row("transformer-kto", KTOConfig(BETA, reference_point="zero"), Target.KTO, on="transformer", lr=0.005),
]  # fmt: skip
COVERED = {type(row.config) for row in ROWS}


def by_default(kind: type) -> Row:
    beta = {"beta": BETA} if "beta" in [field.name for field in fields(kind)] else {}
    return Row(kind.__name__.removesuffix("Config").lower(), kind(**beta), lr=0.05)


ROWS += [by_default(kind) for kind in [*FROM_ROLLOUTS, *FROM_PAIRS, *FROM_LABELS] if kind not in COVERED]


@cache
def learner_of(on: str, beta: float) -> Learner:
    if on == "transformer":
        return transformer(SEED, beta, exact.Space(2, 4), d_model=16)
    return tabular(exact.make_world(SEED, beta))


def run(row: Row) -> dict:
    learner = learner_of(row.on, row.beta)
    # The mistake is the algorithm's alone: what is measured is the policy itself.
    model = MeanTable(learner.world.space) if row.mean_logprobs else learner.model
    world, updates, seeds, kind = learner.world, UPDATES[row.on], SEEDS[row.on], type(row.config)
    per_step = getattr(row.config, "epochs", 1) * getattr(row.config, "minibatches", 1)
    optimizer = build_optimizer(OptimConfig(lr=row.lr, schedule="cosine", grad_clip=0.0), updates * per_step)
    start: tuple = (learner.params, learner.params)
    how: dict[str, Any] = {"updates": updates}
    few = row.on == "transformer"  # samples a step
    if kind is PPOConfig:
        algorithm = make_ppo(row.config, actor_critic(model, learner.critic), optimizer, optimizer)
        start = (learner.params, learner.critic_params, learner.params)
        run_from, how = run_from_rollouts, how | ({"answers": 128} if few else {})
    elif kind in FROM_ROLLOUTS:
        algorithm = FROM_ROLLOUTS[kind](row.config, model, optimizer)
        how |= {"sample_from": row.config.sample_from, "greedy_baseline": row.config.greedy_baseline}
        run_from, how = run_from_rollouts, how | ({"answers": 128} if few else {})
    elif kind in FROM_LABELS:
        algorithm = FROM_LABELS[kind](row.config, model, optimizer)
        run_from, how = run_from_labels, how | ({"answers": 128} if few else {})
    elif row.config.learns_from == "rankings":
        algorithm, run_from = FROM_PAIRS[kind](row.config, model, optimizer), run_from_rankings
    else:
        algorithm = FROM_PAIRS[kind](row.config, model, optimizer)
        how |= {"preference": exact.preferences(world, flips=row.flips)} | ({"pairs": 256} if few else {})
        run_from = run_from_pairs

    began = time.perf_counter()
    every = jax.jit(jax.vmap(lambda key: run_from(algorithm, start, learner, key, **how)))
    reached = every(jax.random.split(jax.random.key(0), seeds))
    name, target = row.target
    found = measure(world, reached, target(world))
    distances = [round(float(d), 5) for d in found.distance]
    return {
        "algorithm": kind.__name__,
        "config": asdict(row.config),
        "on": row.on,
        "world": {"seed": SEED, "beta": row.beta, **asdict(world.space), "flips": row.flips},
        "target": name,
        "below": row.below,
        "above": row.above,
        "right": row.right(distances),
        "distances": distances,
        "from_optimum": round(float(jnp.mean(measure(world, reached, exact.optimum(world)).distance)), 5),
        "reward": round(float(np.mean(found.reward)), 4),
        "kl": round(float(np.mean(found.kl)), 4),
        "updates": updates,
        "learning_rate": row.lr,
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {"jrlhf": __version__, "jax": jax.__version__, "python": platform.python_version()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", default="", help="rows whose names begin so, also if they are there already"
    )
    parser.add_argument("--list", action="store_true", help="names and bounds of all rows")
    asked = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if asked.only and not any(row.name.startswith(asked.only) for row in ROWS):
        parser.error(f"no row begins with {asked.only!r}; there are {', '.join(row.name for row in ROWS)}")
    for row in ROWS:
        if asked.list:
            print(f"{row.name:24} {row.target[0]:50} below {row.below} above {row.above}")
            continue
        if not row.name.startswith(asked.only) or (row.name in results and not asked.only):
            continue
        results[row.name] = run(row)
        order = [r.name for r in ROWS if r.name in results]
        RESULTS.write_text(json.dumps({name: results[name] for name in order}, indent=1) + "\n")
        line = results[row.name]
        print(
            f"{row.name:24} {min(line['distances']):.4f} to {max(line['distances']):.4f} from {line['target']}"
            f" ({line['from_optimum']:.4f} from the optimum), right: {line['right']}, {line['seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
