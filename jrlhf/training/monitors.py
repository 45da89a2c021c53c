"""Signs of reward hacking while a policy trains: thresholds on smoothed metrics, and what to do when one is passed.

A policy that is optimised against a proxy finds what the proxy overrates (Gao et al. 2022; Pan et al. 2022). The rules
read what a step logs anyway, on the host; docs/reward-hacking.md says what each can and cannot see.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.text import Text

from jrlhf.checkpoint import Checkpointer
from jrlhf.config import UserError
from jrlhf.hosts import agreed
from jrlhf.types import Metrics, Params

KL, LENGTH, PROXY = "kl/ref_k1", "rollout/len_mean", "reward/score/mean"
ENTROPY, ENDED, REPEATS = "policy/entropy", "rollout/eos_rate", "rollout/repeat_rate"
OUT_OF_RANGE, DISAGREEMENT = "reward/out_of_range", "reward/disagreement/mean"
HELD_OUT, HELD_OUT_STD = "held-out mean", "held-out std"  # stand for the metrics of the held-out reward


@dataclass(frozen=True)
class Alarms:
    """Thresholds of the rules, on means over `window` steps; "the start" is the mean over the first `window`. 0: off.

    A rule's alarm is raised when its threshold is passed in `patience` steps running, and ends when it is not passed in
    as many.
    """

    # "log": say so and go on. "stop": end training after the next step. "rollback": the same, and the stage leaves the
    # policy whose held-out reward (mean over the `window` training batches up to it) was the best.
    on_alarm: Literal["log", "stop", "rollback"] = "log"
    # Fall of the held-out reward from its peak while the reward itself has not fallen: a share of its rise since the
    # start, or of half its standard deviation over the start's answers, whichever is more.
    held_out: float = 0.3
    kl: float = 0.0  # to the reference, nats per answer
    kl_per_token: float = 0.25  # to the reference, nats per token
    length: float = 1.35  # mean length, times that of the first batch: it may grow from the first update on
    repeats: float = 0.1  # repeat rate, more than the start's
    endless: float = 0.1  # share of answers that do not end, more than the start's
    entropy: float = 0.03  # raised below this share of the start's
    out_of_range: float = 0.3  # share of answers scored beyond 98% of the reward model's training answers
    disagreement: float = 2.0  # std over an ensemble's members, times the start's
    window: int = 5
    patience: int = 2
    snapshot_every: int = 10  # steps: how often "rollback" may keep the policy

    def __post_init__(self):
        for name in ("window", "patience", "snapshot_every"):
            if getattr(self, name) < 1:
                raise UserError(f"alarms.{name} must be at least 1, got {getattr(self, name)}")
        for name in RULES:
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"alarms.{name} must be positive, or 0 for off, got {getattr(self, name)}")
        for name in ("length", "disagreement"):
            if 0 < getattr(self, name) <= 1:
                raise UserError(
                    f"alarms.{name} is a factor of growth, above 1 (0 is off), got {getattr(self, name)}"
                )
        if self.entropy >= 1:
            raise UserError(f"alarms.entropy is a share of the start's, below 1, got {self.entropy}")

    @property
    def ends(self) -> bool:
        return self.on_alarm != "log"


class Alarm(NamedTuple):
    step: int  # whose metrics raised it
    rule: str
    value: float
    threshold: float


class Rule(NamedTuple):
    reads: tuple[str, ...]  # metrics
    value: Callable[["Seen"], float]
    advice: str
    below: bool = False  # raised below its threshold


RULES: dict[str, Rule] = {
    "held_out": Rule(
        (HELD_OUT, HELD_OUT_STD, PROXY),
        lambda seen: seen.fall(),
        "take an earlier policy, raise beta, or use a reward that is harder to fool (RewardEnsemble)",
    ),
    "kl": Rule((KL,), lambda seen: seen.now[KL], "raise beta, set target_kl, or stop here"),
    "kl_per_token": Rule(
        (KL, LENGTH),
        lambda seen: seen.now[KL] / seen.now[LENGTH],
        "raise beta, set target_kl, or stop earlier",
    ),
    "length": Rule(
        (LENGTH,),
        lambda seen: seen.now[LENGTH] / seen.first[LENGTH],
        "read samples: if length itself is paid for, LengthCorrected or overlong_buffer take it out",
    ),
    "repeats": Rule(
        (REPEATS,),
        lambda seen: seen.gain(REPEATS),
        "read samples; raise beta, or add a reward that punishes repetition",
    ),
    "endless": Rule(
        (ENDED,), lambda seen: -seen.gain(ENDED), "set missing_eos_penalty, or more sampling.max_new_tokens"
    ),
    "entropy": Rule(
        (ENTROPY,),
        lambda seen: seen.growth(ENTROPY),
        "hardly anything is explored any more: set entropy_coef, raise beta, or stop here",
        below=True,
    ),
    "out_of_range": Rule(
        (OUT_OF_RANGE,),
        lambda seen: seen.now[OUT_OF_RANGE],
        "the reward model was trained on no such answers: have some compared and train it again, or set score_clip",
    ),
    "disagreement": Rule(
        (DISAGREEMENT,),
        lambda seen: seen.growth(DISAGREEMENT),
        "the members guess: combine 'min' or 'mean_minus_variance', or have such answers compared",
    ),
}


@dataclass
class Seen:
    """What is remembered of the metrics: plain values, so that it can be saved and read back."""

    recent: dict[str, list[float]] = field(default_factory=dict)  # the last `window` values of each
    start: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)  # of the first batch, which the start policy wrote
    now: dict[str, float] = field(default_factory=dict)
    peak: tuple[float, float] | None = None  # the held-out reward at its best, and the reward itself there

    def add(self, metrics: Metrics, window: int) -> None:
        for name, value in metrics.items():
            self.first.setdefault(name, float(value))
            recent = self.recent[name] = [*self.recent.get(name, []), float(value)][-window:]
            if len(recent) == window:
                self.now[name] = sum(recent) / window
                self.start.setdefault(name, self.now[name])
        both = HELD_OUT in self.now and PROXY in self.now
        if both and (self.peak is None or self.now[HELD_OUT] > self.peak[0]):
            self.peak = (self.now[HELD_OUT], self.now[PROXY])

    def gain(self, name: str) -> float:
        return self.now[name] - self.start[name]

    def growth(self, name: str) -> float:
        return self.now[name] / self.start[name] if self.start[name] else 1.0

    def fall(self) -> float:
        """Of the held-out reward since its peak, as a share of its rise; 0 where the reward itself fell as well."""
        assert self.peak is not None
        best, proxy = self.peak
        if self.now[PROXY] < proxy:
            return 0.0
        rise = max(best - self.start[HELD_OUT], self.start[HELD_OUT_STD] / 2)
        return (best - self.now[HELD_OUT]) / rise if rise else 0.0


class Monitor:
    """The rules over one stage's training. It is a function of the metrics alone; `state` is saved with checkpoints, so
    that a resumed run raises what an uninterrupted one would have raised.

    held_out: name of the held-out reward, or "".
    """

    def __init__(self, alarms: Alarms, held_out: str = "", console: Console | None = None):
        self.alarms, self.raised = alarms, list[Alarm]()
        self._console, self._seen = console, Seen()
        self._of = {f"reward/{held_out}/mean": HELD_OUT, f"reward/{held_out}/std": HELD_OUT_STD}
        self._on: set[str] = set()
        self._against: dict[str, int] = {}  # steps running in which a rule said other than its alarm
        self.ended_at: int | None = None  # steps, where an alarm ended training
        self._best: tuple[int, float] | None = None  # step and held-out reward of the policy that was kept

    def observe(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Takes in one step's metrics; returns `alarm/<rule>` (1: raised) of the rules whose metrics there are."""
        metrics = {self._of.get(name, name): value for name, value in metrics.items()}
        rules = {
            name: rule
            for name, rule in RULES.items()
            if getattr(self.alarms, name) and all(read in metrics for read in rule.reads)
        }
        # The held-out reward decides what a rollback goes back to, also where its own rule is off.
        read = {name for rule in rules.values() for name in rule.reads} | {HELD_OUT} & metrics.keys()
        # What is not finite says nothing: neither for an alarm nor against it.
        finite = {name: float(metrics[name]) for name in sorted(read) if math.isfinite(metrics[name])}
        self._seen.add(finite, self.alarms.window)
        for name, rule in rules.items():
            if all(read in finite and read in self._seen.now for read in rule.reads):
                self._judge(step, name, rule)
        return {f"alarm/{name}": float(name in self._on) for name in rules}

    def _judge(self, step: int, name: str, rule: Rule) -> None:
        value, threshold = rule.value(self._seen), getattr(self.alarms, name)
        passed = value < threshold if rule.below else value > threshold
        if passed == (name in self._on):
            self._against[name] = 0
            return
        self._against[name] = self._against.get(name, 0) + 1
        if self._against[name] < self.alarms.patience:
            return
        self._against[name] = 0
        self._on ^= {name}
        if passed and name not in {alarm.rule for alarm in self.raised}:
            self.raised.append(Alarm(step, name, value, threshold))
            self._say(self.raised[-1], rule)

    def _say(self, alarm: Alarm, rule: Rule) -> None:
        if self._console is not None:
            sign = "below" if rule.below else "above"
            line = (
                f"  alarm at step {alarm.step}: {alarm.rule} is {alarm.value:.3g}, {sign} {alarm.threshold:g}"
            )
            self._console.print(Text(f"{line}; {rule.advice}", style="yellow"))

    def ended(self, step: int) -> bool:
        """Whether training ends with `step` steps done: an alarm was raised by the metrics of a step before the last.

        Metrics come to the host one step late, so that this is known in every run at the same step.
        """
        if not self.alarms.ends or not agreed(any(alarm.step < step for alarm in self.raised)):
            return False
        self.ended_at = step
        return True

    def is_best(self, step: int) -> bool:
        """Whether the policy after `step` steps is the best so far, by the held-out reward of the batches up to it.

        The first policy counts, with the mean over the first `window` batches.
        """
        value = self._seen.now.get(HELD_OUT)
        before = self._best[1] if self._best else self._seen.start.get(HELD_OUT)
        if not agreed(value is not None and before is not None and value > before):
            return False
        assert value is not None
        self._best = (step, value)
        return True

    @property
    def best_step(self) -> int:
        """Of the policy that a rollback restores; 0 is the start."""
        return self._best[0] if self._best else 0

    def results(self) -> dict[str, Any]:
        """For the stage's results: the alarms, and whether one ended training, with whose policy."""
        found: dict[str, Any] = {"alarms": [alarm._asdict() for alarm in self.raised]}
        if self.ended_at is not None:
            rolled_back = self.alarms.on_alarm == "rollback"
            found["ended_at"] = self.ended_at
            found["policy_of_step"] = self.best_step if rolled_back else self.ended_at
        return found

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "seen": asdict(self._seen),
            "on": sorted(self._on),
            "against": self._against,
            "raised": self.raised,
            "best": self._best,
        }

    def restore(self, state: dict[str, Any]) -> None:
        seen = state["seen"]
        self._seen = Seen(**seen | {"peak": tuple(seen["peak"]) if seen["peak"] else None})
        self._on, self._against = set(state["on"]), dict(state["against"])
        self.raised = [Alarm(*alarm) for alarm in state["raised"]]
        self._best = tuple(state["best"]) if state["best"] else None


class Snapshots:
    """For a rollback: the best policy so far, in the folder `best` of a stage.

    A resumed run passes again the steps whose snapshots were written after its checkpoint. These are the ones that it
    would write, and are left as they are.
    """

    def __init__(self, folder: Path, monitor: Monitor, report: Callable[[str], None]):
        self._monitor = monitor
        self._checkpoints = Checkpointer(folder / "best", keep_last=1, report=report)
        self._written = max(self._checkpoints.steps(), default=-1)

    def due(self, step: int) -> bool:
        return step % self._monitor.alarms.snapshot_every == 0

    def consider(self, step: int, policy: Params) -> None:
        """Keep the policy after `step` steps if it is the best so far; the metrics up to there have been observed."""
        if self.due(step) and self._monitor.is_best(step):
            self.keep(step, policy)

    def keep(self, step: int, policy: Params) -> None:
        if step > self._written:
            self._checkpoints.save(step, policy, {}, {})

    def best(self, policy: Params) -> Params:
        """The one that was kept, placed like `policy`."""
        found = self._checkpoints.restore(policy, self._monitor.best_step)
        assert found is not None
        return found[1]

    def wait(self) -> None:
        """Until what was kept is on disk."""
        self._checkpoints.wait()

    def close(self) -> None:
        self._checkpoints.close()
