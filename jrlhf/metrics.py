"""Metrics: their names, one JSON line a step, TensorBoard files, and a progress bar.

`metrics.jsonl` is the record: floats are written so that they read back bit for bit, and a resumed run cuts
off the lines after its checkpoint, so that the file is the one that an uninterrupted run would have written.
"""

import functools
import json
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np

from jrlhf.config import UserError, did_you_mean
from jrlhf.types import Metrics


class Name(NamedTuple):
    unit: str  # "" where it has none
    meaning: str


# reward/<name>/mean that the driver logs of every reward: no part of a reward can be called so.
DRIVER_REWARDS = ("total", "score", "sampled", "greedy", "tokens")

# Every metric there is, one name for one thing. `<…>` stands for one word, `*` for anything.
NAMES: dict[str, Name] = {
    "train/loss": Name("", "the loss that is differentiated, mean over the global batch"),
    "train/balance_loss": Name(
        "", "load-balancing loss of a mixture of experts: experts per token at best, their number at worst"
    ),
    "train/grad_norm": Name("", "global norm of the gradient before clipping"),
    "train/lr": Name("", "learning rate of this step"),
    "train/tokens": Name("tokens", "tokens of this step that carry loss"),
    "train/skipped": Name("", "1 where this step's update was left out: its loss was not finite"),
    "reward/total/mean": Name(
        "reward", "per response what the algorithm maximises, its penalties included: mean"
    ),
    "reward/total/std": Name("reward", "standard deviation of the same over the batch"),
    "reward/<name>/mean": Name("reward", "one reward by itself (score: all combined, no KL penalty): mean"),
    "reward/<name>/std": Name("reward", "standard deviation of the same over the batch"),
    "reward/<name>/fail_rate": Name("fraction", "answers that the reward could not score"),
    "reward/<name>/timeout_rate": Name("fraction", "answers that the reward had no time to score"),
    "reward/length_corr": Name("", "correlation of the score with the response's length"),
    "reward/gold_proxy_gap": Name(
        "reward", "score minus gold reward (without one, the first that is watched), mean over the batch"
    ),
    "reward/<name>/corr": Name("", "correlation of a reward that is only watched with the score"),
    "reward/disagreement/mean": Name("reward", "std of an answer's score over an ensemble's members: mean"),
    "reward/out_of_range": Name(
        "fraction", "answers scored beyond 98% of those that the reward model was trained on (2% at first)"
    ),
    "alarm/<rule>": Name("", "1 while this alarm is raised, else 0 (docs/reward-hacking.md)"),
    "reward/frac_zero_std_groups": Name("fraction", "prompts whose answers all have the same score"),
    "reward/sampled/mean": Name(
        "reward", "score of all sampled answers, where dynamic sampling keeps some: mean"
    ),
    "reward/tokens/mean": Name(
        "reward", "what the tokens of an answer earn beside its value (its steps), summed: mean"
    ),
    "reward/tokens/count": Name("tokens", "tokens of an answer that earn something by themselves: mean"),
    "reward/greedy/mean": Name("reward", "score of the greedy answers that are the baseline (ReMax): mean"),
    "kl/ref_k1": Name("nats", "KL(policy || reference) per response, estimator k1 = -log r, summed"),
    "kl/ref_k3": Name("nats", "the same by k3 = r - 1 - log r: never negative, less noise"),
    "kl/coef": Name("", "coefficient of the KL penalty"),
    "kl/loss": Name("nats", "KL estimate in the loss, before its coefficient"),
    "policy/loss": Name("", "policy loss"),
    "policy/entropy": Name("nats", "entropy of the policy's next-token distribution, mean over tokens"),
    "policy/approx_kl": Name("nats", "KL(old policy || policy) per token, estimator k3"),
    "policy/ratio_max": Name("", "largest probability ratio of a token to the old policy"),
    "policy/clip_frac": Name("fraction", "tokens whose ratio is clipped"),
    "policy/grad_norm": Name("", "global norm of the policy's gradient before clipping"),
    "policy/lr": Name("", "learning rate of the policy"),
    "policy/updates": Name("updates", "optimiser updates made in this step (early stop lowers it)"),
    "policy/ptx_loss": Name("nats", "loss per token on pretraining text mixed into PPO"),
    "value/loss": Name("", "loss of the critic"),
    "value/clip_frac": Name("fraction", "values clipped to their old neighbourhood"),
    "value/explained_var": Name("", "1 - Var(return - value) / Var(return)"),
    "value/grad_norm": Name("", "global norm of the critic's gradient before clipping"),
    "value/lr": Name("", "learning rate of the critic"),
    "adv/mean": Name("reward", "advantage before whitening, mean over tokens"),
    "adv/std": Name("reward", "standard deviation of the same"),
    "rollout/len_mean": Name("tokens", "length of the responses, end of sequence included: mean"),
    "rollout/len_max": Name("tokens", "longest response"),
    "rollout/eos_rate": Name("fraction", "responses that ended by a stop token"),
    "rollout/trunc_rate": Name("fraction", "responses cut off at the length limit"),
    "rollout/repeat_rate": Name("fraction", "four-token windows seen before in the same response"),
    "rollout/rounds": Name("rounds", "of sampling that filled this batch (dynamic sampling)"),
    "rollout/informative": Name(
        "fraction", "sampled answers in groups whose scores differ (dynamic sampling)"
    ),
    "rollout/competence": Name(
        "fraction", "prompts, the easiest first, that may be asked by now (curriculum)"
    ),
    "rollout/staleness": Name(
        "iterations", "updates of the policy since it drew this batch (overlap): 0 or 1"
    ),
    "rollout/accepted": Name("fraction", "answers that are learned from (expert iteration)"),
    "mismatch/kl": Name("nats", "KL(sampler || trainer) per token, on the sampled tokens"),
    "mismatch/logp_diff_max": Name("nats", "largest |sampler - trainer| log-probability of a token"),
    "mismatch/ess": Name("fraction", "effective sample size of the responses' trainer / sampler weights"),
    "pref/loss": Name("", "preference loss (DPO, IPO, KTO, …)"),
    "pref/acc": Name("fraction", "pairs whose better answer has the higher implicit reward"),
    "pref/margin": Name("reward", "implicit reward of chosen minus rejected, mean"),
    "pref/ordered": Name("fraction", "prompts whose best and worst answer score differently (online DPO)"),
    "pref/logp_chosen": Name("nats", "log-probability of the chosen answer, summed over its tokens"),
    "pref/logp_rejected": Name("nats", "log-probability of the rejected answer, summed over its tokens"),
    "pref/label_acc": Name(
        "fraction", "labelled answers whose implicit reward is on their label's side of pref/shift"
    ),
    "pref/shift": Name(
        "reward", "implicit reward that labelled answers are compared with (KTO: β·z0, BCO: δ)"
    ),
    "pref/reward_desirable": Name("reward", "implicit reward of desirable answers, mean; 0 without any"),
    "pref/reward_undesirable": Name("reward", "the same of undesirable answers"),
    "pref/desirable_frac": Name("fraction", "answers of the batch that are labelled desirable"),
    "distill/on_policy": Name("", "1 where the step learned from the student's own samples"),
    "rm/loss": Name(
        "nats", "reward model's loss per prompt (of a process reward model: per step), mean over heads"
    ),
    "rm/acc": Name(
        "fraction", "pairs that the reward model orders as labelled; ties that are learned count half"
    ),
    "rm/margin": Name("reward", "score of the better answer minus the worse, mean over pairs"),
    "rm/disagreement": Name(
        "reward", "std over an ensemble's heads of a pair's score difference, mean over pairs"
    ),
    "rm/type_certainty": Name(
        "fraction", "of a mixture: probability of each labeller's most probable type, mean over labellers"
    ),
    "rm/tie_parameter": Name(
        "", "of Rao-Kupper (threshold, above 1) or Davidson (factor) in the likelihood of ties"
    ),
    "rm/step_acc": Name(
        "fraction", "labelled steps that a process reward model calls right or wrong as labelled"
    ),
    "rm/ece": Name("fraction", "expected calibration error of the predicted preference"),
    "eval/<name>/mean": Name("", "an evaluated quantity (gold, win_rate, length, …): mean over prompts"),
    "eval/<name>/ci_low": Name("", "lower end of its 95% confidence interval"),
    "eval/<name>/ci_high": Name("", "upper end of its 95% confidence interval"),
    "eval/*": Name("", "any other figure of an evaluation, named by the evaluation"),
    "perf/tokens_per_s_rollout": Name("tokens/s", "response tokens sampled per second, all devices"),
    "perf/tokens_per_s_train": Name("tokens/s", "tokens trained on per second, all devices"),
    "perf/model_flops": Name(
        "FLOP",
        "what the models need for this step's real tokens, prompts too: 6 N a token learned from, 2 N one scored",
    ),
    "perf/hardware_flops": Name("FLOP", "what its passes do: padding, and what remat computes again, too"),
    "perf/mfu": Name(
        "fraction", "model FLOPs a second of the whole step, of what the devices can do at most"
    ),
    "perf/hfu": Name("fraction", "the same of hardware FLOPs"),
    "perf/slowest_host": Name("", "of several hosts: the process that a step takes longest by itself"),
    "perf/hbm_peak": Name(
        "bytes", "most device memory in use so far, of the fullest device (of other hosts as last told)"
    ),
    "perf/compile_count": Name("", "compilations since the run began; constant after warm-up"),
    "perf/compile_s": Name("s", "spent compiling, or reading what was compiled before, since the run began"),
    "perf/goodput": Name(
        "fraction",
        "of the time since the stage began (or went on) that steps took: not compiling, restoring, saving, evaluating",
    ),
    "perf/pad_frac": Name("fraction", "positions of the batch that are padding"),
    "time/step_max_host": Name(
        "s",
        "of several hosts: a step without the waiting for devices and others, of the slowest, mean of 20 steps",
    ),
    "time/skew": Name("s", "the same, less the median of the others"),
    "time/data_max_host": Name("s", "waiting for a batch, of the host that waits longest, mean of 20 steps"),
    "time/<phase>": Name(
        "s",
        "wall-clock seconds of a step, or of a phase: rollout, reward, make_batch, update; data: waiting for a batch",
    ),
}


def _pattern(name: str) -> re.Pattern:
    escaped = re.escape(name).replace(r"\*", ".+")
    return re.compile(re.sub(r"<\w+>", "[^/]+", escaped))


@functools.cache
def check_name(name: str) -> None:
    """Raises ValueError, with a suggestion, for a name that `NAMES` does not list."""
    if not any(_pattern(known).fullmatch(name) for known in NAMES):
        raise ValueError(f"{name!r} is not a metric: list it in NAMES.{did_you_mean(name, NAMES)}")


class MetricLogger:
    """Writes `metrics.jsonl` and TensorBoard files (`tb/`) into `folder`; process 0 alone writes.

    Args:
      console: a `rich.console.Console` that gets a line for each line written; None prints nothing.
      every: `log` leaves out steps that are not multiples of this, unless told `always`.
      resume_step: the step of the checkpoint that this run continues; what was logged after it is dropped,
        here and in TensorBoard. None begins afresh and drops everything.

    Log the metrics of a step before its checkpoint is saved: then no kill can lose a line.
    """

    def __init__(
        self, folder: str | Path, console: Any = None, every: int = 1, resume_step: int | None = None
    ):
        if every < 1:
            raise UserError(f"metrics are logged every {every} steps: it must be 1 or more")
        self.console = console
        self.every = every
        self._file: TextIO | None = None
        self._board: Any = None
        if jax.process_index() != 0:
            return
        from tensorboardX import SummaryWriter  # not needed by those who only read metrics

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        last = -1 if resume_step is None else resume_step
        _keep_until(path, last)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tb"), flush_secs=10, purge_step=last + 1)

    def log(self, step: int, metrics: Metrics, always: bool = False) -> None:
        """Writes one line: {"step": step, name: value, …}.

        Args:
          metrics: scalars, on a device or not; they are fetched together.
          always: write it although `step` is no multiple of `every` (an evaluation).

        Raises:
          ValueError: a name that is not in `NAMES`, or a value that is not a scalar.
        """
        for name in metrics:
            check_name(name)
        if step % self.every and not always:
            return
        values = {name: _number(name, v) for name, v in jax.device_get(dict(metrics)).items()}
        if self._file is None:
            return
        row = {name: v if math.isfinite(v) else str(v) for name, v in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self.console is not None:
            self.console.print(f"step {step}  {_text(values)}", highlight=False)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


def read_metrics(folder: str | Path) -> list[dict]:
    """The lines of `folder/metrics.jsonl`, values as they were logged ("nan" and "inf" are floats again).

    A last line that a killed process left half-written is passed over.

    Raises:
      UserError: there is no such file, or a line before the last is not JSON.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"there are no metrics in {folder}: {path} is missing")
    return [
        {name: float(v) if isinstance(v, str) else v for name, v in row.items()} for _, row in _lines(path)
    ]


class Progress:
    """A bar with the time left and a few current metrics; a line now and then where there is no terminal.

    with progress(console, total=100, description="ppo", start=20) as bar:
        bar.update(21, {"reward": 0.5})
    """

    def __init__(self, console: Any, total: int, description: str, start: int = 0, interval: float = 30.0):
        from rich.console import Console

        self.console = console or Console()
        self.total, self.description, self.start, self.interval = total, description, start, interval
        self._bar: Any = None  # where there is a terminal
        self._task: Any = None
        self._began = self._shown = time.monotonic()

    def __enter__(self) -> "Progress":
        self._began = self._shown = time.monotonic()
        if self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=self.console,
                refresh_per_second=2,  # the trainer may have two cores only
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.description, total=self.total, completed=self.start, metrics=""
            )
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """`step` steps are done. Values still on the device are fetched only when they are shown."""
        now = time.monotonic()
        due = now - self._shown >= (0.5 if self._bar is not None else self.interval) or step >= self.total
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if not due:
            return
        self._shown = now
        text = _text({name: float(v) for name, v in jax.device_get(dict(metrics or {})).items()})
        if self._bar is not None:
            self._bar.update(self._task, metrics=text)
            return
        done = step - self.start
        left = (now - self._began) / done * (self.total - step) if done else math.nan
        clock = f"{_duration(left)} left" if math.isfinite(left) else ""
        self.console.print(
            f"{self.description} {step}/{self.total} {clock}  {text}".rstrip(), highlight=False, markup=False
        )


def progress(console: Any, total: int, description: str, start: int = 0, interval: float = 30.0) -> Progress:
    """A `Progress` of `total` steps of which `start` are done; `interval` seconds between lines."""
    return Progress(console, total, description, start, interval)


def _lines(path: Path) -> list[tuple[str, dict]]:
    """(text, object) of each line; a last one that is not JSON was cut off by a kill and is left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "step" not in row:
                raise ValueError("not an object with a step")
        except ValueError as e:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number} is not a line of metrics: {e}") from e
        rows.append((line, row))
    return rows


def _keep_until(path: Path, last: int) -> None:
    """Rewrites the file without the lines of steps after `last`, by one rename."""
    if not path.exists():
        return
    kept = [line for line, row in _lines(path) if row["step"] <= last]
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _number(name: str, value: Any) -> int | float:
    array = np.asarray(value)
    if array.shape:
        raise ValueError(f"metric {name} has shape {array.shape}: it must be a scalar")
    return int(array) if array.dtype.kind in "biu" else float(array)


def _text(values: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
