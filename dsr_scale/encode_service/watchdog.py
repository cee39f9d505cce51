"""Notices work that never ends: a device that hangs raises nothing, so somebody else has to look.

A thread looks at a clock that work winds up when it begins. It cannot end the work, a call inside a driver
cannot be ended; it tells, and the process has to go.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

_LOOKS = 10
"""In a limit: work is noticed a tenth of the limit late at most."""


class Watchdog:
    """Watches one piece of work at a time."""

    def __init__(self, limit_s: float, hung: Callable[[Exception], None]) -> None:
        """`hung` is called once, in the watchdog's thread, when a piece takes longer than `limit_s`."""
        self._limit_s = limit_s
        self._hung = hung
        self._began_s: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.barked = False
        """`hung` was called."""

    def start(self) -> None:
        """Work before this is not watched."""
        self._thread.start()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While entered, the clock runs."""
        self._began_s = time.monotonic()
        try:
            yield
        finally:
            self._began_s = None

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._limit_s / _LOOKS):
            began_s = self._began_s
            if began_s is not None and time.monotonic() - began_s > self._limit_s:
                self.barked = True
                self._hung(TimeoutError(f"a batch is not encoded after {self._limit_s:g} s"))
                return
