"""Ctrl-C, SIGTERM and SIGUSR1 become a request to save and stop after the current step.

SIGUSR1 is what Slurm sends before the time limit. A second Ctrl-C interrupts at once. Ranks may see
the signal in different steps, so the loop asks for the sum of all ranks' requests and every rank stops
after the same step.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType

_early: str | None = None
"""A signal that came before anybody asked."""


class Interrupted(BaseException):
    """A stop was asked for in the middle of waiting; not an error, so `except Exception` lets it pass."""


@contextlib.contextmanager
def remembered_early() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 are kept for the next `StopRequest` instead of ending the process.

    For the time in which torch is imported and ranks meet: there, one rank that is ended by its signal
    would leave the others waiting.
    """
    previous = {n: signal.signal(n, _remember_early) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _remember_early(number: int, frame: FrameType | None) -> None:
    global _early
    _early = signal.Signals(number).name


class StopRequest:
    """While entered, remembers which signal asked for a stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._waiting = False
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.getsignal(number)  # type: ignore[assignment]
            signal.signal(number, self._remember)
        global _early
        self.signal_name, _early = self.signal_name or _early, None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, a signal raises Interrupted at once: for waits that may be as long as an outage."""
        try:
            self._waiting = True
            if self.signal_name is not None:
                raise Interrupted
            yield
        finally:
            self._waiting = False

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        if self._waiting:
            self._waiting = False
            raise Interrupted


def grace_warning(grace_s: float | None, save_s: float, step_s: float) -> str | None:
    """What to say when the time between signal and kill is too short for the step that runs and a save.

    All in seconds; `grace_s` is None or 0 where nobody said how long it is.
    """
    if not grace_s or save_s + step_s <= grace_s:
        return None
    return (
        f"a save takes {save_s:.3g} s and a step {step_s:.3g} s, but the job is killed {grace_s:.3g} s "
        "after its signal: raise the seconds of --signal in the launcher"
    )
