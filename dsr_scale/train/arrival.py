"""Waiting for the data of the next step, which may be as long as an outage of the encoder servers.

The next step's data is taken before the ranks agree on how the last one went, in the same exchange of
a few numbers: a rank that cannot read or whose servers are gone says so there, and all save and end
together instead of meeting a timeout in a collective. A signal does not have to wait either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dsr_scale.base.errors import InputError
from dsr_scale.train.feed import StepData
from dsr_scale.train.signals import Interrupted, StopRequest


class Arrivals:
    """The data of one step after the other."""

    def __init__(self, steps: Iterator[StepData], *, may_wait_long: bool) -> None:
        self._steps = steps
        self._may_wait_long = may_wait_long
        self.failure: Exception | None = None
        """Why no more data comes, once that is so on this rank."""

    def next(self, request: StopRequest) -> StepData | None:
        """Data of the next step; None when a stop was asked for or it could not be had."""
        interrupting = request.interrupting() if self._may_wait_long else contextlib.nullcontext()
        try:
            with interrupting:
                data = next(self._steps)
        except Interrupted:
            return None
        self.failure = data.failure
        return data if self.failure is None else None


def failure_elsewhere() -> InputError:
    """The error of a rank that had data while another had none."""
    return InputError(
        found="another rank got no data; its own message says why",
        required="data, and encoders, that every reading rank reaches",
        remedy="do what that message says, then give the same command again",
    )
