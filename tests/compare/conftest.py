"""Synthetic finished runs, in the layout that `jrlhf run` leaves behind."""

import json
from pathlib import Path

import numpy as np
import pytest

ITEMS = ("lamp oil", "rye flour", "bleach", "plum jam", "barley", "lye", "honey", "green tea")
# name: gold on prompts like those of training, loss on held-out ones, proxy, KL, length, share that end
POLICIES = {
    "sft": (0.62, 0.10, 0.1, 0.0, 9.5, 0.93),
    "ppo": (1.23, 0.16, 1.9, 1.8, 12.5, 0.99),
    "grpo": (1.05, 0.31, 2.1, 5.2, 16.0, 0.97),
    "dpo": (0.95, 0.22, 1.2, 2.6, 11.5, 0.95),
    "kto": (0.63, 0.11, 0.3, 0.4, 9.8, 0.94),
    "best_of_16": (1.10, 0.12, 1.7, 1.84, 10.5, 0.98),
}


def _traits(policy: str) -> tuple[float, ...]:
    """`ppo-strong` behaves as `ppo`."""
    return POLICIES[policy.partition("-")[0]]


SPLITS = {"eval": 0.0, "held_out_four": 1.0, "held_out_pairs": 0.4}


def make_run(
    runs: Path,
    *,
    name: str = "ppo_vs_dpo",
    code: str = "1a2b3c4d",
    policies: tuple[str, ...] = tuple(POLICIES),
    seeds: tuple[int, ...] = (0,),
    prompts: int = 96,
    answers: int = 2,
    updates: int = 120,
    proxy: bool = True,
    best_of_n: bool = True,
    curves: bool = True,
    reward_name: str = "larder_gold",
    trained_on: str = "reward_model",
    once: tuple[str, ...] = (),
    codes: dict[str, str] | None = None,
    asked: int | None = None,
    drawn: bool = True,
) -> Path:
    """Write a finished run of `policies` (the first is the baseline) and return its folder.

    `once` names policies that do not depend on the seed, `codes` the code of stages that differ from `code`:
    a stage of the same code is the same in two runs. `asked` is how many prompts are distinct, `drawn` whether
    the evaluation recorded them.
    """
    folder = runs / f"{name}-{code}"
    trained = [p for p in policies if not p.startswith("best_of")]
    stages = {"reward_model": _stage("RewardModel", learning_rate=3e-4, pairs=16000)}
    stages |= {p: _stage(p.upper(), learning_rate=1e-4, beta=0.05 if p == "ppo" else 0.1) for p in trained}
    for policy in trained:
        if policy.startswith(("ppo", "grpo")):
            stages[policy]["reward"] = trained_on
    if "best_of_16" in policies:
        stages["best_of_n"] = _stage("BestOfN")
    stages["evaluate"] = {"type": "Evaluate", "policies": list(policies), "reward": reward_name}
    stages["evaluate"] |= {"proxy": "reward_model", "best_of_n": "best_of_n" * ("best_of_16" in policies)}
    stages["evaluate"] |= {"prompts": {split: {"size": prompts} for split in SPLITS}, "sampling": {}}
    codes = codes or {}
    index: dict[str, dict[str, str]] = {}
    for stage, config in stages.items():
        shared = stage in ("sft", "reward_model", "best_of_n", *once)
        for seed in seeds[:1] if shared else seeds:
            made = codes.get(stage, code)
            rng = np.random.default_rng([seed, *stage.encode(), *made.encode()])
            where = runs / "stages" / f"{stage}-{made}{seed:04d}"
            index.setdefault(stage, {})[str(seed)] = f"stages/{where.name}"
            parents = {}
            if stage == "evaluate":
                parents = {
                    n: {"folder": Path(w.get(str(seed), w[str(seeds[0])])).name} for n, w in index.items()
                }
            record = {"stage": config, "seed": seed, "fingerprint": made, "parents": parents}
            _write(where / "config.json", record)
            _write(where / "environment.json", _environment())
            _write(where / "done.json", {"results": {}, "seconds": round(20 + 60 * rng.random(), 3)})
            if stage == "evaluate":
                shifts = {}
                for policy in policies:  # the randomness of training: the same in each look at a training run
                    which = parents.get(policy, parents.get("best_of_n"))["folder"]
                    shift = np.random.default_rng([*which.encode()]).normal(0, 0.05)
                    shifts[policy] = 0.0 if policy == "sft" else shift
                evaluation = _evaluation(rng, shifts, prompts, answers, proxy, best_of_n, reward_name)
                if drawn:
                    names = [f"prompt {i % (asked or prompts)}" for i in range(prompts)]
                    evaluation["prompts"] = {split: names for split in SPLITS}
                _write(where / "evaluation.json", evaluation)
            elif curves and stage != "best_of_n":
                lines = _curves(rng, stage, updates, reward_name, trained_on)
                (where / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _write(
        folder / "config.json",
        {"name": name, "stages": stages, "seeds": list(seeds), "seed_from": "ppo", "mesh": {"data": -1}},
    )
    _write(folder / "stages.json", index)
    return folder


def _stage(kind: str, **fields) -> dict:
    return {"type": kind, "policy": "sft", "batch_size": 64, "optimizer": {"name": "adam"} | fields}


def _environment() -> dict:
    return {
        "date": "2025-01-02T03:04:05+00:00",
        "command": ["jrlhf", "run", "experiments/ppo_vs_dpo.py"],
        "python": "3.11.9",
        "platform": "Linux-6.1-x86_64",
        "devices": {"kind": "cpu", "platform": "cpu", "count": 1},
        "processes": 1,
        "git": {
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "dirty": True,
            "untracked": [],
            "diff": "x",
        },
        "packages": {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.0", "numpy": "2.2.0", "pip": "25.0"},
    }


def _evaluation(rng, policies, prompts, answers, proxy, best_of_n, reward_name) -> dict:
    """`policies`: name -> how much more gold its training gave it than expected."""
    difficulty = np.random.default_rng(7).normal(0, 0.35, prompts)
    out: dict = {"reward_name": reward_name, "gold_max": 1.9, "policies": {}, "criteria": {}}
    for policy in policies:
        gold, drop, reward, kl, length, ended = _traits(policy)
        shift = policies[policy]
        splits = {}
        for split, far in SPLITS.items():
            shape = (prompts, answers)
            noise = rng.normal(0, 0.4, shape)
            scores = np.clip(gold + shift - far * drop + difficulty[:, None] + noise, -1, 1.9).round(1)
            splits[split] = {
                "gold": scores.tolist(),
                "proxy": (reward + 0.8 * noise + rng.normal(0, 0.4, shape)).round(3).tolist()
                if proxy
                else None,
                "kl": rng.normal(kl, 0.3 + kl**0.5, shape).round(3).tolist(),
                "length": np.clip(rng.poisson(length, shape), 1, 28).tolist(),
                "ended": (rng.random(shape) < ended).astype(float).tolist(),
            }
            if policy == "best_of_16":
                splits[split]["kl"] = None
            if policy == "best_of_16":  # chosen from another policy's answers: only scores are kept
                continue
            out["criteria"].setdefault(policy, {})[split] = {
                "helpful": (0.6 * scores).round(3).tolist(),
                "harmless": (0.4 * scores).round(3).tolist(),
            }
        out["policies"][policy] = {"splits": splits}
        if policy == "best_of_16":
            out["policies"][policy]["kl_exact"] = float(np.log(16) - 15 / 16)
    out["samples"] = [_sample(rng, number, policies, proxy) for number in range(16)]
    out["best_of_n"] = _best_of_n(rng, proxy) if best_of_n else None
    return out


def _sample(rng, number: int, policies, proxy: bool) -> dict:
    items = [ITEMS[i] for i in rng.choice(len(ITEMS), 1 + number % 3, replace=False)]
    answers = {}
    for policy in (p for p in policies if p != "best_of_16"):
        text = (
            " ".join(f"{item} is {rng.choice(['sweet', 'dry', 'golden', 'sharp'])} ." for item in items)
            + " thanks"
        )
        answers[policy] = {
            "text": text + (" <b>great</b>" if rng.random() < 0.3 else ""),
            "gold": round(float(rng.normal(_traits(policy)[0], 0.4)), 2),
            "proxy": round(float(rng.normal(_traits(policy)[2], 0.4)), 2) if proxy else None,
        }
    return {"prompt": f"describe {' , '.join(items)}", "answers": answers}


def _best_of_n(rng, proxy: bool) -> dict:
    n = 2 ** np.arange(0, 9)
    kl = np.log(n) - (n - 1) / n
    d = np.sqrt(kl)
    gold = 0.62 + d * (0.62 - 0.26 * d) + rng.normal(0, 0.01, len(n))
    return {
        "n": n.tolist(),
        "gold": gold.tolist(),
        "proxy": (0.1 + 1.2 * d).tolist() if proxy else None,
        "kl": kl.tolist(),
        "gold_low": (gold - 0.07).tolist(),
        "gold_high": (gold + 0.07).tolist(),
    }


def _curves(rng, stage: str, updates: int, gold: str, trained_on: str) -> list[dict]:
    u = np.linspace(0, 1, updates)
    noise = lambda scale: rng.normal(0, scale, updates)  # noqa: E731
    if stage == "reward_model":
        columns = {
            "rm/loss": 0.7 - 0.25 * u + noise(0.02),
            "rm/acc": 0.5 + 0.3 * (1 - np.exp(-4 * u)) + noise(0.02),
        }
    elif stage == "sft":
        columns = {
            "train/loss": 1.8 - 0.6 * (1 - np.exp(-5 * u)) + noise(0.02),
            "policy/entropy": 1.1 + noise(0.01),
        }
    elif stage.startswith(("dpo", "kto")):
        rise = 1 - np.exp(-3 * u)
        columns = {
            "pref/acc": 0.5 + 0.35 * rise + noise(0.03),
            "pref/margin": 1.5 * rise + noise(0.05),
            f"eval/{gold}/mean": 0.62 + (_traits(stage)[0] - 0.62) * rise + noise(0.02),
            "eval/kl/mean": _traits(stage)[3] * u,
        }
    else:
        top, kl, hump = _traits(stage)[0], _traits(stage)[3], 0.35 if stage == "grpo" else 0.0
        rise = 1 - np.exp(-4 * u)
        columns = {
            f"reward/{gold}/mean": 0.62 + (top + hump - 0.62) * rise - hump * u**2 + noise(0.05),
            "reward/score/mean": 0.1 + 1.8 * rise + noise(0.06),
            "reward/total/mean": 0.1 + 1.6 * rise + noise(0.06),
            "kl/ref_k1": kl * (0.7 * u + 0.3 * u**2) + noise(0.05),
            "policy/entropy": 1.1 - 0.5 * u + noise(0.02),
            "rollout/len_mean": 9.5 + (_traits(stage)[4] - 9.5) * u + noise(0.3),
            "rollout/eos_rate": 0.93 + 0.05 * u + noise(0.01),
        }
        if trained_on == gold:
            columns["reward/score/mean"] = columns.pop(f"reward/{gold}/mean")
    kept = lambda name, i: not name.startswith("eval/") or i % 20 == 0  # noqa: E731
    return [
        {"step": i + 1} | {k: float(v[i]) for k, v in columns.items() if kept(k, i)} for i in range(updates)
    ]


def _write(file: Path, value) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


@pytest.fixture(scope="session")
def finished_run():
    """`make_run`, for tests that want runs of their own."""
    return make_run
