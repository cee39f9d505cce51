"""Waiting for the data of the next step, which may be as long as an outage of the encoder servers.

The next step's data is taken before the ranks agree on how the last one went, in the same exchange of
a few numbers: a rank that cannot read or whose servers are gone says so there, and all save and end
together instead of meeting a timeout in a collective. A signal does not have to wait either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from dsr_scale.base.errors import InputError
from dsr_scale.parallel.groups import Ranks
from dsr_scale.train.feed import StepData
from dsr_scale.train.signals import Interrupted, StopRequest


class Arrivals:
    """The data of one step after the other."""

    def __init__(self, start: Callable[[], Iterator[StepData]], *, may_wait_long: bool) -> None:
        """`start` starts the workers, if any, and returns the data of all steps."""
        self._start = start
        self._steps: Iterator[StepData] | None = None
        self._may_wait_long = may_wait_long
        self.failure: Exception | None = None
        """Why no more data comes, once that is so on this rank."""

    def next(self, request: StopRequest) -> StepData | None:
        """Data of the next step; None when a stop was asked for or it could not be had."""
        if self._steps is None:
            # Not to be interrupted: what a signal's handler raises inside a fork is lost.
            self._steps = self._start()
        interrupting = request.interrupting() if self._may_wait_long else contextlib.nullcontext()
        try:
            with interrupting:
                data = next(self._steps)
        except Interrupted:
            return None
        self.failure = data.failure
        return data if self.failure is None else None


def shared_failure(failure: Exception | None, ranks: Ranks) -> Exception:
    """The rank's own failure, or else the first of another's. A collective, once any rank has one."""
    # Only errors of ours are known to survive the journey to other processes.
    told = failure if isinstance(failure, InputError) else failure and repr(failure)
    others = ranks.gather_on_host([] if told is None else [told])
    if failure is not None:
        return failure
    first = others[0]
    if isinstance(first, InputError):
        return first
    return RuntimeError(f"on a rank that reads data: {first}")
