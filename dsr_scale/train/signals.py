"""Ctrl-C and SIGTERM become a request to save and stop after the current step.

A second Ctrl-C interrupts at once. Ranks may see the signal in different steps, so the loop asks
for the sum of all ranks' requests and every rank stops after the same step.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType


class Interrupted(BaseException):
    """A stop was asked for in the middle of waiting; not an error, so `except Exception` lets it pass."""


class StopRequest:
    """While entered, remembers which signal asked for a stop."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._waiting = False
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.getsignal(number)  # type: ignore[assignment]
            signal.signal(number, self._remember)
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
