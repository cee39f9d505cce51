"""What a run tells of itself: measured between log lines, written at them.

What is particular to the network in training (`Started.measures`) is summed on the device and read at
a log line alone, where the ranks put together what each of them knows: two messages between hosts.
docs/metrics.md says what every number means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from dsr_scale.config import costs
from dsr_scale.config.run import AnyRun
from dsr_scale.job.attempt import Attempt
from dsr_scale.parallel.groups import Ranks
from dsr_scale.telemetry.metrics import MetricsLog
from dsr_scale.telemetry.progress import training_bar
from dsr_scale.train.clock import OTHER, StepClock
from dsr_scale.train.outcomes import Outcome
from dsr_scale.train.schedule import learning_rate
from dsr_scale.train.started import Started
from dsr_scale.train.state import RunState
from dsr_scale.train.stragglers import Stragglers

WORTH_SAYING = 0.1
"""Share of a step's time that waits for data, above which a plain line says so."""

_ALWAYS_TIMED = ("data", "encode", "optimizer", "agree", "checkpoint", "grid", OTHER)


def open_log(run: AnyRun, run_id: str | None, attempt: Attempt | None) -> MetricsLog:
    """The log of the first rank; `run_id` is the tracker's, of a run that goes on."""
    return MetricsLog(
        Path(run.directory),
        wandb_mode=run.tracking.wandb,
        project=run.tracking.project,
        name=run.name,
        config=tracker_config(run, attempt),
        run_id=run_id,
    )


def tracker_config(run: AnyRun, attempt: Attempt | None) -> dict[str, Any]:
    """What the tracker shows beside the curves: the run file, and the job where there is one."""
    config = run.model_dump(mode="json")
    if attempt is not None:
        config["job"] = {
            "id": attempt.job_id,
            "restarts": attempt.number,
            "reason": attempt.reason,
        }
    return config


@dataclass
class _Interval:
    """What the host counts between two log lines."""

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    """Of the steps that were taken."""
    gradient_norm: float = float("nan")
    """Of the last step."""
    checkpoint_blocked_s: float = 0.0


class Report:
    """The measures of a run in this process. All ranks call every method together."""

    def __init__(
        self,
        training: Started,
        clock: StepClock,
        console: Console,
        log: MetricsLog | None,
        state: RunState,
        attempt: Attempt | None,
    ) -> None:
        """`log` on the first rank only; times are counted from here on."""
        self._training = training
        self._clock = clock
        self._console = console
        self._log = log
        self._attempt = attempt
        self._interval = _Interval()
        self._measures = training.measures
        self._ceilings_tflops = _ceilings_tflops(training)
        ranks = training.ranks
        self._stragglers = Stragglers(ranks.store, rank=ranks.rank, world_size=ranks.world_size)
        self.bar = training_bar(console, visible=training.ranks.is_first and console.is_terminal)
        self._task = self.bar.add_task(
            "training",
            total=training.run.training.steps,
            completed=state.step,
            loss="–",
            images_per_s="–",
            per_device="–",
        )
        if attempt is not None and attempt.number > 0:
            console.print(
                f"attempt {attempt.number} of job {attempt.job_id}, after: {attempt.reason}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        clock.take()

    def end_step(self, skipped: Tensor) -> None:
        """Counts a step; `skipped`, on the device, is not 0 for one that changed nothing."""
        self._measures.end_step(skipped)
        self._interval.steps += 1

    def take_in(self, outcome: Outcome) -> None:
        """Counts what became of a step, once the host knows."""
        self._interval.gradient_norm = outcome.gradient_norm
        if not outcome.skipped:
            self._interval.losses.append(outcome.loss)

    def checkpoint_blocked(self, seconds: float) -> None:
        """Counts what a save held the loop up."""
        self._interval.checkpoint_blocked_s += seconds

    def advance(self, step: int) -> None:
        """Shows that `step` steps are done."""
        self.bar.update(self._task, completed=step)

    def write(self, state: RunState, corrupt_keys: Sequence[str]) -> None:
        """Logs and shows the interval, and begins the next. The outcomes of its steps are in."""
        training = self._training
        interval, self._interval = self._interval, _Interval()
        times_s = self._clock.take()
        step_s = sum(times_s.values()) / interval.steps
        images_per_s = training.batches.global_images / step_s
        loss = sum(interval.losses) / len(interval.losses) if interval.losses else float("nan")
        metrics = {
            "loss": loss,
            "gradient_norm": interval.gradient_norm,
            "learning_rate": learning_rate(training.run.training, state.step - 1),
            **self._throughput(images_per_s),
            "step_s": step_s,
            **_time_metrics(times_s, interval.steps),
            "memory_gib": _largest_memory_gib(training.ranks),
            "samples_seen": state.samples_seen,
            "epoch": state.samples_seen / len(training.samples),
            "skipped_steps": state.skipped_steps,
            "restarts": 0 if self._attempt is None else self._attempt.number,
            "checkpoint_blocked_s": interval.checkpoint_blocked_s,
            "corrupt_seen": state.corrupt_seen,
            "corrupt_keys": list(corrupt_keys[-20:]),
            **self._measures.take(),
            **self._compare_ranks(state.step, times_s, interval.steps),
        }
        if self._log is not None:
            self._log.log(state.step, metrics)
        self._show(state.step, metrics)

    def _compare_ranks(
        self, step: int, times_s: dict[str, float], steps: int
    ) -> dict[str, int | float | str]:
        """Who was slowest at the line before; names nodes that stay slow."""
        work_s = sum(times_s.get(name, 0.0) for name in ("forward_backward", "forward", "backward"))
        self._stragglers.put(
            step, forward_backward_s=work_s / steps, data_wait_s=times_s.get("data", 0.0) / steps
        )
        metrics, sentences = self._stragglers.take()
        for sentence in sentences:
            self._console.print(sentence, style="yellow", markup=False, soft_wrap=True)
        return metrics

    def _throughput(self, images_per_s: float) -> dict[str, float]:
        per_device = images_per_s / self._training.ranks.world_size
        tflops = self._training.training_flops * per_device / 1e12
        return {
            "images_per_s": images_per_s,
            "images_per_s_per_device": per_device,
            "tflops_per_device": tflops,
            **{name: tflops / ceiling for name, ceiling in self._ceilings_tflops.items()},
        }

    def _show(self, step: int, metrics: dict[str, Any]) -> None:
        if not self._console.is_terminal:
            self._console.print(plain_line(step, self._training.run.training.steps, metrics))
        self.bar.update(
            self._task,
            loss=f"{metrics['loss']:.4f}",
            images_per_s=f"{metrics['images_per_s']:.1f}",
            per_device=f"{metrics['images_per_s_per_device']:.1f}",
        )


def plain_line(step: int, steps: int, metrics: dict[str, Any]) -> str:
    """An interval in a log file; waiting for data is named where it is worth saying."""
    line = (
        f"step {step}/{steps}  loss {metrics['loss']:.4f}  {metrics['images_per_s']:.1f} images/s"
    )
    waiting = metrics["time/data_wait_s"] / metrics["step_s"]
    return line + (f"  data wait {100 * waiting:.0f} %" if waiting > WORTH_SAYING else "")


def _time_metrics(times_s: dict[str, float], steps: int) -> dict[str, float]:
    """Seconds per step of every section."""
    seconds = dict.fromkeys(_ALWAYS_TIMED, 0.0) | times_s
    seconds["data_wait"] = seconds.pop("data")
    return {f"time/{name}_s": value / steps for name, value in seconds.items()}


def _largest_memory_gib(ranks: Ranks) -> float:
    """Most memory of any rank: allocated on the GPU since the last call, or resident now."""
    if ranks.device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(ranks.device)
        torch.cuda.reset_peak_memory_stats(ranks.device)
    else:
        allocated = psutil.Process().memory_info().rss
    largest = torch.tensor(allocated, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ranks.host_group)
    return float(largest) / 2**30


def _ceilings_tflops(training: Started) -> dict[str, float]:
    """What the arithmetic of this run may reach at most, by the metric that compares with it."""
    device = training.ranks.device
    if device.type != "cuda" or training.run.training.precision != "bf16":
        return {}
    kind = costs.gpu_kind(torch.cuda.get_device_name(device))
    ceilings = {
        "mfu_measured": costs.MEASURED_CEILING_TFLOPS,
        "mfu_datasheet": costs.DATASHEET_CEILING_TFLOPS,
    }
    return {name: table[kind] for name, table in ceilings.items() if kind in table}
