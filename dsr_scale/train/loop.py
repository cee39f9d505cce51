"""The training loop: batches in, steps, and at intervals metrics, grids and checkpoints.

It holds no arithmetic of its own: the objective makes the loss, the engine makes the step, the report
makes the metrics, and everything that depends on the step number is a pure function of it, so a
resumed run repeats the uninterrupted one. The sections of the clock are the phases of a step.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint.saver import CheckpointWriter
from dsr_scale.config.decoder import DecoderRun
from dsr_scale.config.load import dump_run
from dsr_scale.config.run import AnyRun, RunConfig
from dsr_scale.data.corruption import CorruptImage, check_rate
from dsr_scale.data.loader import Batch
from dsr_scale.job.attempt import current_attempt
from dsr_scale.job.run_lock import held
from dsr_scale.parallel import groups
from dsr_scale.telemetry.metrics import MetricsLog
from dsr_scale.train import resume
from dsr_scale.train.arrival import Arrivals, shared_failure
from dsr_scale.train.build import Training, build_training, check_before_start
from dsr_scale.train.clock import StepClock
from dsr_scale.train.decoder_build import DecoderTraining, build_decoder
from dsr_scale.train.decoder_evaluation import Reconstructions
from dsr_scale.train.evaluation import TrainingEvaluation
from dsr_scale.train.failing import Account, end_now
from dsr_scale.train.feed import StepData
from dsr_scale.train.grids import TrainingGrids
from dsr_scale.train.outcomes import Outcome, Outcomes
from dsr_scale.train.report import Report, open_log
from dsr_scale.train.schedule import learning_rate
from dsr_scale.train.signals import StopRequest, grace_warning
from dsr_scale.train.started import Started
from dsr_scale.train.state import RunState
from dsr_scale.train.watch import HangWatch

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


def train(
    run: RunConfig | DecoderRun, *, on_step: OnStep | None = None, account: Account | None = None
) -> Finished:
    """Trains to the last step, from the newest checkpoint if there is one.

    One process, torchrun and srun call this alike. `account` follows where the run is. Raises
    InputError for anything a person can put right; a hang ends the process (`train.watch`).
    """
    place = groups.place_from_environment(os.environ)
    check_before_start(run, processes=place.world_size)
    account = account or Account()
    attempt = current_attempt()
    with ExitStack() as until_the_end:
        watch = until_the_end.enter_context(
            HangWatch(
                account,
                run.recovery,
                outage_s=_longest_outage_s(run),
                attempt=None if attempt is None else attempt[0],
            )
        )
        ranks = groups.start(run.training.device, tp=run.parallel.tp, pp=run.parallel.pp)
        watch.listen(ranks.store)
        lock = held(
            Path(run.directory),
            on_lost=lambda error: end_now(error, account),
            tell=partial(print, file=sys.stderr),
        )
        ranks.on_first(lambda: until_the_end.enter_context(lock))
        finished = _Loop(_started(run, ranks), on_step, watch).run()
    # After a signal ranks end with its status, for which srun ends who is left: the first goes last.
    ranks.on_first(lambda: None)
    groups.stop()
    return finished


def _started(run: RunConfig | DecoderRun, ranks: groups.Ranks) -> Training | DecoderTraining:
    return build_decoder(run, ranks) if isinstance(run, DecoderRun) else build_training(run, ranks)


def _longest_outage_s(run: AnyRun) -> float:
    """How long a rank may wait for encoders: a request may stall before and after the waiting."""
    access = run.encoder
    if access.mode != "service":
        return 0.0
    return access.give_up_after_s + 2 * access.request_timeout_s


class _Loop:
    """One run in this process."""

    def __init__(
        self, training: Training | DecoderTraining, on_step: OnStep | None, watch: HangWatch
    ) -> None:
        self.training: Started = training
        self.watch = watch
        self.grace_compared = False
        self.on_step = on_step
        self.console = Console(stderr=True, quiet=not training.ranks.is_first)
        self.directory = Path(training.run.directory)
        self.corrupt_keys: list[str] = []
        self.outcomes = Outcomes()
        self.state = resume.restore(training, self.console)
        self.writer = CheckpointWriter(training.ranks.saving_group)
        attempt = current_attempt()
        self.attempt = None if attempt is None else attempt[1]
        self.log = self._open_log()
        self.grids: TrainingGrids | Reconstructions | None
        self.evaluation: TrainingEvaluation | None = None
        if isinstance(training, Training):
            self.grids = TrainingGrids.for_run(training)
            self.evaluation = TrainingEvaluation.for_run(training, self._warn)
        else:
            self.grids = Reconstructions.for_run(training, self._warn)
        self.arrivals = Arrivals(
            partial(training.feed.steps, self.state.step),
            may_wait_long=training.run.encoder.mode == "service",
        )
        self.data_failed = False
        self.clock = StepClock(training.ranks.device, on_section=watch.touch)
        self.report = Report(training, self.clock, self.console, self.log, self.state, self.attempt)

    def _open_log(self) -> MetricsLog | None:
        """The first rank's log; its failure, say wandb without a key, is everyone's."""
        run, log = self.training.run, None

        def open_on_first() -> str | None:
            nonlocal log
            atomic_files.write_bytes(self.directory / CONFIG_FILE, dump_run(run).encode())
            log = open_log(run, self.state.tracker_run_id, self.attempt)
            return log.run_id

        run_id = self.training.ranks.on_first(open_on_first)
        self.state = replace(self.state, tracker_run_id=run_id)
        return log

    def run(self) -> Finished:
        """Steps until the end or a signal; the last state is always saved."""
        steps = self.training.run.training.steps
        stopped_by: str | None = None
        try:
            with StopRequest() as request, self.report.bar:
                self.watch.begin_steps(self.state.step)
                upcoming = None
                if self.state.step < steps:
                    upcoming = self._next_data(request)
                    asked, _ = self._agree(request)
                    if self.data_failed:
                        raise shared_failure(self.arrivals.failure, self.training.ranks)
                    if asked:
                        stopped_by = request.signal_name or OTHER_RANK
                if stopped_by is None and self._owes_evaluation() and self._evaluate(request):
                    stopped_by = request.signal_name or OTHER_RANK
                while self.state.step < steps and stopped_by is None:
                    assert upcoming is not None
                    asked, upcoming = self._step(upcoming, request)
                    last = self.state.step == steps
                    if asked or last or self._due(self.training.run.tracking.log_every_steps):
                        self._settle(self.outcomes.flush())
                        self.report.write(self.state, self.corrupt_keys)
                        self._compare_grace()
                    self.report.advance(self.state.step)
                    # A grace period is for the save: it comes before the grid, which a stop skips.
                    saves = asked or last or self._due(self.training.run.checkpoint.every_steps)
                    if saves:
                        self._save()
                    if self.data_failed:
                        self.writer.wait()
                        raise shared_failure(self.arrivals.failure, self.training.ranks)
                    if asked and not last:
                        stopped_by = request.signal_name or OTHER_RANK
                    elif self.grids is not None and self._due(self.grids.every_steps):
                        with self.clock.section("grid"):
                            self.grids.draw(self.state.step, self.log)
                    if stopped_by is None and self._evaluation_is_due() and self._evaluate(request):
                        if not saves:
                            self._save()
                        stopped_by = request.signal_name or OTHER_RANK
                with self.clock.section("checkpoint"):
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
        loss = training.forward_backward(
            training.measures.watched(data.examples),
            step=step,
            section=self.clock.section,
            probes=training.measures.probes(step + 1),
        )
        rate = learning_rate(training.run.training, step)
        with self.clock.section("optimizer"):
            values = training.engine.step(loss, step=step, learning_rate=rate)
        self.report.end_step(skipped=values[2])
        samples = [
            f"{sample_id} ({key})"
            for batch in data.batches
            for sample_id, key in zip(batch.sample_ids.tolist(), batch.keys, strict=True)
        ]
        self._settle(self.outcomes.push(step + 1, values, samples))
        corrupt = [record for batch in data.batches for record in batch.corrupt]
        last = step + 1 == training.run.training.steps
        upcoming = None if last else self._next_data(request)
        asked, corrupt_sum = self._agree(request, len(corrupt))
        if corrupt_sum:
            self._name_corrupt(corrupt)
        self.state = replace(
            self.state,
            step=step + 1,
            samples_seen=(step + 1) * training.batches.global_images,
            corrupt_seen=self.state.corrupt_seen + corrupt_sum,
        )
        check_rate(
            self.state.corrupt_seen,
            self.state.samples_seen,
            training.run.data.max_corrupt_rate,
            self.corrupt_keys,
        )
        self.watch.finish_step(self.state.step)
        if self.on_step is not None:
            self.on_step(self.state.step, data.batches)
        return asked, upcoming

    def _next_data(self, request: StopRequest) -> StepData | None:
        with self.clock.section("data"):
            return self.arrivals.next(request)

    def _agree(self, request: StopRequest, corrupt: int = 0) -> tuple[bool, int]:
        """What any rank knows, all know: whether to stop, and how many images were unusable."""
        with self.clock.section("agree"):
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
            self.report.take_in(outcome)
            if not outcome.skipped:
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
        with self.clock.section("checkpoint"):
            self._settle(self.outcomes.flush())
            statistics = self.training.engine.guard.statistics.tolist()
            self.state = replace(self.state, guard=tuple(statistics))
            self.report.checkpoint_blocked(
                resume.start_save(self.training, self.state, self.writer)
            )

    def _evaluation_is_due(self) -> bool:
        return self.evaluation is not None and self.evaluation.is_due(self.state.step)

    def _owes_evaluation(self) -> bool:
        """Whether the run had ended between the step that it goes on from and its evaluation."""
        return self.evaluation is not None and self.evaluation.is_owed(self.state.step)

    def _evaluate(self, request: StopRequest) -> bool:
        """Evaluates the run as it is; whether that was cut short by a signal."""
        assert self.evaluation is not None
        with self.clock.section("evaluation"):
            return not self.evaluation.evaluate(
                self.state.step,
                self.log,
                asked=lambda: request.signal_name is not None,
                touch=partial(self.watch.touch, "evaluation"),
            )

    def _warn(self, message: str) -> None:
        self.console.print(message, style="yellow", markup=False, soft_wrap=True)

    def _compare_grace(self) -> None:
        """Says once, after the first save, that the time after a signal is too short."""
        save_s, step_s = self.writer.last_write_s, self.watch.median_step_s
        if self.attempt is None or self.grace_compared or save_s is None or step_s is None:
            return
        self.grace_compared = True
        warning = grace_warning(self.attempt.grace_s, save_s, step_s)
        if warning is not None:
            self.console.print(warning, style="yellow", markup=False, soft_wrap=True)

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

    def _due(self, every_steps: int) -> bool:
        return self.state.step % every_steps == 0
