"""Ends a rank that no longer gets anywhere, after it has said where it is stuck.

A hang raises nothing: a collective whose partner is gone or in another collective, a disk, a driver. What
counts as one depends on the run, so the limit is a multiple of its own median step; loading, compilation,
saving and drawing have a limit of their own. The rank that notices tells the others through the process
group's store, so that all leave their stacks, the one that everybody waits for among them.

Every thread here may find that what hangs is its own file or socket. So reports are written by threads
that are waited for only for a while, and the process ends all the same. What holds Python's lock while it
hangs is not noticed; NCCL's own watchdog ends that one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from dsr_scale.config.recovery import RecoveryConfig
from dsr_scale.job.failures import HUNG_STATUS, Failure
from dsr_scale.train import failing, hang_report

if TYPE_CHECKING:
    import torch.distributed as dist

SLOW_PHASES = frozenset({"start", "checkpoint", "grid", "evaluation"})
"""No parts of an ordinary step."""
WAITING_PHASES = frozenset({"data", "agree"})
"""Where a rank waits for encoders, or for one that does."""

FIRST_STEPS = 3
"""Of this process: they compile and set up communicators."""
MEDIAN_STEPS = 50

NOTICE = "dsr_scale/hang"
"""Key in the store: what the first rank that noticed has to say."""


@dataclass(frozen=True)
class Timing:
    """How quickly the watch itself does things; in seconds."""

    look_s: float = 1.0
    """Between two looks at the clock."""
    ask_s: float = 2.0
    """Between two questions to the store."""
    report_s: float = 30.0
    """A report that takes longer is left unfinished."""
    grace_s: float = 5.0
    """Between the report and the end: a launcher ends the other ranks with the first that goes."""


@dataclass(frozen=True)
class _Wait:
    """What is watched."""

    phase: str
    finished_steps: int | None
    since_s: float
    limit_s: float


class StepTimes:
    """Durations of the last ordinary steps, without what was no part of them."""

    def __init__(self) -> None:
        self.finished = 0
        """Steps of this process."""
        self.median_s: float | None = None
        self._times_s: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self._step_s = 0.0

    def spend(self, phase: str, seconds: float) -> None:
        """Adds a stretch of the step that goes on."""
        if phase not in SLOW_PHASES:
            self._step_s += seconds

    def finish(self) -> None:
        """Ends the step; the median is of those from the last of the first ones on."""
        self.finished += 1
        if self.finished >= FIRST_STEPS:
            self._times_s.append(self._step_s)
            self.median_s = statistics.median(self._times_s)
        self._step_s = 0.0

    def limit_s(self, phase: str, recovery: RecoveryConfig, outage_s: float) -> float:
        """How long `phase` may take."""
        limit_s = recovery.start_timeout_s
        if self.median_s is not None and phase not in SLOW_PHASES:
            limit_s = max(recovery.hang_least_s, recovery.hang_multiple * self.median_s)
        return limit_s + outage_s if phase in WAITING_PHASES else limit_s


class HangWatch:
    """While entered, every phase of this rank has a limit, from `start` on."""

    def __init__(
        self,
        account: failing.Account,
        recovery: RecoveryConfig,
        *,
        outage_s: float = 0.0,
        attempt: Path | None = None,
        timing: Timing | None = None,
    ) -> None:
        """`outage_s` is what waiting for data may take beyond the limit, `attempt` the directory for
        stacks; without one they go to stderr. `account` is kept up to date."""
        self._account = account
        self._recovery = recovery
        self._outage_s = outage_s
        self._timing = timing or Timing()
        self._times = StepTimes()
        self._store: dist.Store | None = None
        self._rank = failing.own_rank()
        self._path = None if attempt is None else attempt / f"rank_{self._rank:05d}.stacks"
        self._closed = threading.Event()
        self._ending = threading.Lock()
        self._wait = self._begin(account.phase)

    def __enter__(self) -> HangWatch:
        self._wait = self._begin(self._account.phase)
        threading.Thread(target=self._watch, name="hang watch", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closed.set()

    def listen(self, store: dist.Store | None) -> None:
        """From now on ranks tell each other of a hang through `store`; None for a single process."""
        if store is None:
            return
        # A connection of its own: the main thread may be waiting in the other one.
        self._store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        threading.Thread(target=self._listen, name="hang listener", daemon=True).start()

    def touch(self, phase: str) -> None:
        """Work on `phase` begins; the one before is over."""
        self._account.phase = phase
        self._replace(phase)

    def begin_steps(self, finished_steps: int) -> None:
        """The first step of this process comes next, after so many of the run."""
        self._account.finished_steps = finished_steps
        self._replace(self._account.phase)

    def finish_step(self, finished_steps: int) -> None:
        """So many optimizer steps of the run are done; the phase goes on with its time anew."""
        self._account.finished_steps = finished_steps
        self._replace(self._account.phase, finish=True)

    @property
    def median_step_s(self) -> float | None:
        """Of the last steps, in seconds; None before there are any but the first."""
        return self._times.median_s

    def _replace(self, phase: str, *, finish: bool = False) -> None:
        before = self._wait
        self._times.spend(before.phase, time.monotonic() - before.since_s)
        if finish:
            self._times.finish()
        self._wait = self._begin(phase)

    def _begin(self, phase: str) -> _Wait:
        limit_s = self._times.limit_s(phase, self._recovery, self._outage_s)
        return _Wait(phase, self._account.finished_steps, time.monotonic(), limit_s)

    def _watch(self) -> None:
        watched, waited_s, looked_s = self._wait, 0.0, time.monotonic()
        while not self._closed.wait(self._timing.look_s):
            now_s = time.monotonic()
            # Time in which this thread did not run either, say of a suspended job, does not count.
            waited_s += min(now_s - looked_s, 2 * self._timing.look_s)
            looked_s = now_s
            if self._wait is not watched:
                watched, waited_s = self._wait, 0.0
            elif waited_s > watched.limit_s:
                self._end(watched, None)

    def _listen(self) -> None:
        assert self._store is not None
        while not self._closed.wait(self._timing.ask_s):
            try:
                if not self._store.check([NOTICE]):
                    continue
                notice = self._store.get(NOTICE).decode()
            except RuntimeError:
                # The first rank, which keeps the store, is gone: its launcher ends this one.
                return
            self._end(self._wait, notice)

    def _tell(self, notice: str) -> None:
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._store.set(NOTICE, notice)

    def _end(self, wait: _Wait, told: str | None) -> None:
        """Leaves all that is known and ends the process; the first caller does."""
        if not self._ending.acquire(blocking=False):
            return
        timing = self._timing
        # If writing takes Python's lock with it, this needs none; its status is 1.
        faulthandler.dump_traceback_later(2 * (timing.report_s + timing.grace_s), exit=True)
        header = self._header(wait)
        if told is None:
            summary = header
            threading.Thread(target=self._tell, args=(header,), daemon=True).start()
        else:
            summary = f"ended with another rank: {told}; here: {header}"
        report = threading.Thread(target=self._report, args=(wait, summary), daemon=True)
        report.start()
        report.join(timing.report_s)
        time.sleep(timing.grace_s)
        os._exit(HUNG_STATUS)

    def _header(self, wait: _Wait) -> str:
        median_s = self._times.median_s
        steps = (
            "before the first step"
            if wait.finished_steps is None
            else (f"after {wait.finished_steps} steps")
        )
        return (
            f"rank {self._rank} on {failing.own_node()}: {time.monotonic() - wait.since_s:.1f} s in "
            f"{wait.phase} {steps}, limit {wait.limit_s:.1f} s, "
            + ("no median yet" if median_s is None else f"median step {median_s:.2f} s")
        )

    def _report(self, wait: _Wait, summary: str) -> None:
        """First to the node's own disk, then to the shared one."""
        stack = "".join(traceback.format_stack(hang_report.main_frame()))
        failing.leave(
            Failure(
                rank=self._rank,
                node=failing.own_node(),
                kind="hang",
                error=hang_report.waited_for(),
                message=summary,
                step=wait.finished_steps,
                phase=wait.phase,
                time_s=time.time(),
                traceback=stack,
            )
        )
        where = "" if self._path is None else f"; stacks in {self._path}"
        print(f"hang: {summary}{where}", file=sys.stderr, flush=True)
        hang_report.write_report(self._path, summary)
