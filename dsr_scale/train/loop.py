"""The training loop: batches in, steps, and at intervals metrics, grids and checkpoints.

It holds no arithmetic of its own: the objective makes the loss, the engine makes the step, and
everything that depends on the step number is a pure function of it, so a resumed run repeats the
uninterrupted one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint.saver import CheckpointWriter
from dsr_scale.config.load import dump_run
from dsr_scale.config.run import RunConfig
from dsr_scale.data.corruption import CorruptImage, check_rate
from dsr_scale.data.loader import Batch
from dsr_scale.parallel import groups
from dsr_scale.telemetry.metrics import MetricsLog
from dsr_scale.telemetry.progress import training_bar
from dsr_scale.train import resume
from dsr_scale.train.arrival import Arrivals, shared_failure
from dsr_scale.train.build import Training, build_training, check_before_start
from dsr_scale.train.feed import StepData
from dsr_scale.train.grids import TrainingGrids
from dsr_scale.train.outcomes import Outcome, Outcomes
from dsr_scale.train.schedule import learning_rate
from dsr_scale.train.signals import StopRequest
from dsr_scale.train.state import RunState

CONFIG_FILE = "config.yaml"

NAMED_SAMPLES = 32

OTHER_RANK = "a signal on another rank"

OnStep = Callable[[int, list[Batch]], None]
"""Called after each optimizer step with its number (from 1) and the micro-batches this rank read."""


@dataclass(frozen=True)
class Finished:
    """How a run ended."""

    state: RunState
    stopped_by: str | None
    """Name of the signal that asked for the stop, or None when all steps are done."""


def train(run: RunConfig, *, on_step: OnStep | None = None) -> Finished:
    """Trains to the last step, from the newest checkpoint if there is one.

    One process, torchrun and srun call this alike. Raises InputError for anything a person can
    put right.
    """
    place = groups.place_from_environment(os.environ)
    check_before_start(run, processes=place.world_size)
    ranks = groups.start(run.training.device, tp=run.parallel.tp, pp=run.parallel.pp)
    finished = _Loop(build_training(run, ranks), on_step).run()
    groups.stop()
    return finished


class _Interval:
    """Sums between two log lines."""

    def __init__(self) -> None:
        self.started_s = time.perf_counter()
        self.steps = 0
        self.losses: list[float] = []
        """Of the steps that were taken."""
        self.checkpoint_blocked_s = 0.0


class _Loop:
    """One run in this process."""

    def __init__(self, training: Training, on_step: OnStep | None) -> None:
        self.training = training
        self.on_step = on_step
        self.console = Console(stderr=True, quiet=not training.ranks.is_first)
        self.directory = Path(training.run.directory)
        self.corrupt_keys: list[str] = []
        self.gradient_norm = float("nan")
        self.outcomes = Outcomes()
        self.interval = _Interval()
        self.state = resume.restore(training, self.console)
        self.writer = CheckpointWriter(training.ranks.saving_group)
        self.log = self._open_log()
        self.grids = TrainingGrids.for_run(training)
        self.arrivals = Arrivals(
            training.feed.steps(self.state.step),
            may_wait_long=training.run.encoder.mode == "service",
        )
        self.data_failed = False

    def _open_log(self) -> MetricsLog | None:
        """The first rank's log; its failure, say wandb without a key, is everyone's."""
        run, log = self.training.run, None

        def open_on_first() -> str | None:
            nonlocal log
            atomic_files.write_bytes(self.directory / CONFIG_FILE, dump_run(run).encode())
            log = MetricsLog(
                self.directory,
                wandb_mode=run.tracking.wandb,
                project=run.tracking.project,
                name=run.name,
                config=run.model_dump(mode="json"),
                run_id=self.state.tracker_run_id,
            )
            return log.run_id

        run_id = self.training.ranks.on_first(open_on_first)
        self.state = replace(self.state, tracker_run_id=run_id)
        return log

    def run(self) -> Finished:
        """Steps until the end or a signal; the last state is always saved."""
        steps = self.training.run.training.steps
        stopped_by: str | None = None
        bar = training_bar(
            self.console, visible=self.training.ranks.is_first and self.console.is_terminal
        )
        task = bar.add_task(
            "training", total=steps, completed=self.state.step, loss="–", images_per_s="–"
        )
        try:
            with StopRequest() as request, bar:
                upcoming = None
                if self.state.step < steps:
                    upcoming = self.arrivals.next(request)
                    asked, _ = self._agree(request)
                    if self.data_failed:
                        raise shared_failure(self.arrivals.failure, self.training.ranks)
                    if asked:
                        stopped_by = request.signal_name or OTHER_RANK
                while self.state.step < steps and stopped_by is None:
                    assert upcoming is not None
                    asked, upcoming = self._step(upcoming, request)
                    last = self.state.step == steps
                    if asked or last or self._due(self.training.run.tracking.log_every_steps):
                        self._settle(self.outcomes.flush())
                        self._write_metrics(bar, task)
                    bar.update(task, completed=self.state.step)
                    # A grace period is for the save: it comes before the grid, which a stop skips.
                    if asked or last or self._due(self.training.run.checkpoint.every_steps):
                        self._save()
                    if self.data_failed:
                        self.writer.wait()
                        raise shared_failure(self.arrivals.failure, self.training.ranks)
                    if asked and not last:
                        stopped_by = request.signal_name or OTHER_RANK
                    elif self.grids is not None and self._due(self.grids.every_steps):
                        self.grids.draw(self.state.step, self.log)
                self.writer.wait()
        finally:
            self.training.feed.close()
            if self.log is not None:
                self.log.close()
        saved = f"saved in {self.directory}" if self.state.step else "and nothing to save"
        done = f"step {self.state.step} of {steps} {saved}"
        if stopped_by is not None:
            done = f"stopped by {stopped_by}: {done}; the same command goes on from there"
        self.console.print(done, highlight=False, markup=False, soft_wrap=True)
        return Finished(self.state, stopped_by)

    def _step(self, data: StepData, request: StopRequest) -> tuple[bool, StepData | None]:
        """One optimizer step: whether to save and stop after it, and the data of the next."""
        training, step = self.training, self.state.step
        loss = training.engine.forward_backward(data.examples)
        rate = learning_rate(training.run.training, step)
        values = training.engine.step(loss, step=step, learning_rate=rate)
        samples = [
            f"{sample_id} ({key})"
            for batch in data.batches
            for sample_id, key in zip(batch.sample_ids.tolist(), batch.keys, strict=True)
        ]
        self._settle(self.outcomes.push(step + 1, values, samples))
        corrupt = [record for batch in data.batches for record in batch.corrupt]
        last = step + 1 == training.run.training.steps
        upcoming = None if last else self.arrivals.next(request)
        asked, corrupt_sum = self._agree(request, len(corrupt))
        if corrupt_sum:
            self._name_corrupt(corrupt)
        self.state = replace(
            self.state,
            step=step + 1,
            samples_seen=(step + 1) * training.batches.global_images,
            corrupt_seen=self.state.corrupt_seen + corrupt_sum,
        )
        self.interval.steps += 1
        check_rate(
            self.state.corrupt_seen,
            self.state.samples_seen,
            training.run.data.max_corrupt_rate,
            self.corrupt_keys,
        )
        if self.on_step is not None:
            self.on_step(self.state.step, data.batches)
        return asked, upcoming

    def _agree(self, request: StopRequest, corrupt: int = 0) -> tuple[bool, int]:
        """What any rank knows, all know: whether to stop, and how many images were unusable."""
        corrupt_sum, stops, failed_saves, failures = self.training.ranks.sum_on_host(
            [
                float(corrupt),
                float(request.signal_name is not None),
                float(self.writer.poll()),
                float(self.arrivals.failure is not None),
            ]
        )
        if failed_saves:
            self.writer.wait()
        self.data_failed = failures > 0
        return stops + failures > 0, int(corrupt_sum)

    def _settle(self, outcomes: list[Outcome]) -> None:
        """Takes in what became of steps; names the samples of a skipped one, stops after too many."""
        for outcome in outcomes:
            self.gradient_norm = outcome.gradient_norm
            if not outcome.skipped:
                self.interval.losses.append(outcome.loss)
                self.state = replace(self.state, skipped_in_a_row=0)
                continue
            self.state = replace(
                self.state,
                skipped_steps=self.state.skipped_steps + 1,
                skipped_in_a_row=self.state.skipped_in_a_row + 1,
            )
            samples = self.training.ranks.gather_on_host(outcome.samples)
            if self.log is not None:
                skipped = {"loss": outcome.loss, "skipped": True, "skipped_samples": samples}
                self.log.log(outcome.step, skipped)
            more = len(samples) - NAMED_SAMPLES
            self.console.print(
                f"step {outcome.step} skipped: loss {outcome.loss:.4g}, gradient norm "
                f"{outcome.gradient_norm:.4g}; samples {', '.join(samples[:NAMED_SAMPLES])}"
                + (f" and {more} more, all in metrics.jsonl" if more > 0 else ""),
                style="yellow",
                markup=False,
                soft_wrap=True,
            )
            self._refuse_too_many(outcome)

    def _refuse_too_many(self, outcome: Outcome) -> None:
        settings = self.training.run.training.skip
        if self.state.skipped_in_a_row < settings.most_in_a_row:
            return
        raise InputError(
            found=f"{self.state.skipped_in_a_row} steps in a row skipped, the last step "
            f"{outcome.step} with loss {outcome.loss:.4g} and gradient norm "
            f"{outcome.gradient_norm:.4g}",
            required="a loss and a gradient that are finite"
            + (
                ""
                if settings.spike_deviations is None
                else f" and within {settings.spike_deviations:g} deviations of their running mean"
            ),
            remedy="lower training.optimizer.learning_rate, add warm-up, set gradient_clip, raise "
            "training.skip.spike_deviations, or look at the samples named above; the last "
            "checkpoint is from before",
        )

    def _save(self) -> None:
        """Begins a checkpoint of this moment; the loop goes on when the state is copied."""
        self._settle(self.outcomes.flush())
        statistics = self.training.engine.guard.statistics.tolist()
        self.state = replace(self.state, guard=tuple(statistics))
        self.interval.checkpoint_blocked_s += resume.start_save(
            self.training, self.state, self.writer
        )

    def _name_corrupt(self, corrupt: list[CorruptImage]) -> None:
        """Prints what any rank could not use; all ranks call this when one of them has some."""
        for record in self.training.ranks.gather_on_host(corrupt):
            self.corrupt_keys.append(record.key)
            self.console.print(
                f"unusable image {record.key}: {record.error}; sample {record.replacement_id} "
                f"takes the place of {record.sample_id}",
                style="yellow",
                markup=False,
            )

    def _write_metrics(self, bar: Progress, task: TaskID) -> None:
        """Logs the interval's means, shows them, and begins the next interval."""
        interval, self.interval = self.interval, _Interval()
        elapsed_s = time.perf_counter() - interval.started_s
        images_per_s = interval.steps * self.training.batches.global_images / elapsed_s
        loss = sum(interval.losses) / len(interval.losses) if interval.losses else float("nan")
        if self.log is not None:
            self.log.log(
                self.state.step,
                {
                    "loss": loss,
                    "gradient_norm": self.gradient_norm,
                    "learning_rate": learning_rate(self.training.run.training, self.state.step - 1),
                    "images_per_s": images_per_s,
                    "samples_seen": self.state.samples_seen,
                    "epoch": self.state.samples_seen / len(self.training.samples),
                    "skipped_steps": self.state.skipped_steps,
                    "checkpoint_blocked_s": interval.checkpoint_blocked_s,
                    "corrupt_seen": self.state.corrupt_seen,
                    "corrupt_keys": self.corrupt_keys[-20:],
                },
            )
        if not self.console.is_terminal:
            self.console.print(
                f"step {self.state.step}/{self.training.run.training.steps}  loss {loss:.4f}  "
                f"{images_per_s:.1f} images/s"
            )
        bar.update(task, loss=f"{loss:.4f}", images_per_s=f"{images_per_s:.1f}")

    def _due(self, every_steps: int) -> bool:
        return self.state.step % every_steps == 0
