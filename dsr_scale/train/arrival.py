"""Waiting for the data of the next step, which may be as long as an outage of the encoder servers.

The next step's data is taken before the ranks agree on how the last one went, in the same exchange of
a few numbers: a rank whose servers are gone says so there, and all save and end together instead of
meeting a timeout in a collective. A signal does not have to wait either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dsr_scale.data.encoded import EncodersLost
from dsr_scale.train.feed import StepData
from dsr_scale.train.signals import Interrupted, StopRequest


class Arrivals:
    """The data of one step after the other."""

    def __init__(self, steps: Iterator[StepData], *, may_wait_long: bool) -> None:
        self._steps = steps
        self._may_wait_long = may_wait_long
        self.lost: EncodersLost | None = None
        """Why no more data comes, once that is so on this rank."""

    def next(self, request: StopRequest) -> StepData | None:
        """Data of the next step; None when a stop was asked for or the encoders were lost instead."""
        interrupting = request.interrupting() if self._may_wait_long else contextlib.nullcontext()
        try:
            with interrupting:
                data = next(self._steps)
        except Interrupted:
            return None
        if isinstance(data.failure, EncodersLost):
            self.lost = data.failure
            return None
        return data


def lost_elsewhere() -> EncodersLost:
    """The error of a rank that had data while another had none."""
    return EncodersLost(
        found="another rank lost its encoder servers; its own message says more",
        required="a running 'dsr-scale serve' that every reading rank reaches",
        remedy="start it, then give the same command again",
    )
