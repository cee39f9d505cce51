"""Where the time of a step goes: a timeline cut at the borders of named sections.

Every moment belongs to the innermost section that is open, or to `OTHER`, so the parts sum to the
elapsed time by construction. On a GPU the borders are events in its queue, so what is measured is the
GPU's time: the host need not wait before the log line, a section has the time of the work it queued,
and a wait of the host counts only as far as the GPU ran dry meanwhile.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

OTHER = "other"
"""What no section covers."""

_Border = torch.cuda.Event | float
"""On a GPU an event, else seconds."""


class StepClock:
    """Seconds by section since they were last taken."""

    def __init__(
        self, device: torch.device, *, on_section: Callable[[str], None] | None = None
    ) -> None:
        """`on_section` is called on the host with the name of every section that begins."""
        self._device = device
        self._on_section = on_section
        self._open: list[str] = []
        self._unread: deque[tuple[str, _Border, _Border]] = deque()
        self._seconds: dict[str, float] = {}
        self._last = self._border()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time inside is counted as `name`, but for sections within it."""
        if self._on_section is not None:
            self._on_section(name)
        self._cut()
        self._open.append(name)
        try:
            yield
        finally:
            self._cut()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Seconds by section since the last call, `OTHER` among them; waits for the device."""
        self._cut()
        if isinstance(self._last, torch.cuda.Event):
            self._last.synchronize()
        self._read()
        taken, self._seconds = self._seconds, {}
        return {OTHER: 0.0, **taken}

    def _cut(self) -> None:
        """Ends the stretch that runs, in the name of the innermost open section."""
        now = self._border()
        self._unread.append((self._open[-1] if self._open else OTHER, self._last, now))
        self._last = now
        self._read()

    def _read(self) -> None:
        """Adds up the stretches that are over, so that few events are alive at a time."""
        while self._unread:
            name, begin, end = self._unread[0]
            if isinstance(end, torch.cuda.Event):
                assert isinstance(begin, torch.cuda.Event)
                if not end.query():
                    return
                seconds = begin.elapsed_time(end) / 1000
            else:
                assert not isinstance(begin, torch.cuda.Event)
                seconds = end - begin
            self._unread.popleft()
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def _border(self) -> _Border:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
