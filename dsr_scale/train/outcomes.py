"""What became of each step, known to the host one step later.

Loss, gradient norm and whether the step was skipped are numbers on the device. Asking for them at
once would make the host wait for the whole step; they are copied in the background instead and read
after the next step has been queued. So an interval's loss, the count of skipped steps and the end of
a lost run are exact, one step late; `flush` waits for what is still under way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Outcome(NamedTuple):
    """One finished optimizer step."""

    step: int
    """Its number, from 1."""
    loss: float
    gradient_norm: float
    """Of the whole model, before clipping."""
    skipped: bool
    """Nothing was changed: not finite, or a spike."""
    samples: list[str]
    """Those that this rank read, by id and key."""


class _Waiting(NamedTuple):
    step: int
    values: Tensor
    copied: torch.cuda.Event | None
    samples: list[str]


class Outcomes:
    """The steps whose outcome the host does not know yet: at most one."""

    def __init__(self) -> None:
        self._waiting: _Waiting | None = None

    def push(self, step: int, values: Tensor, samples: list[str]) -> list[Outcome]:
        """Takes loss, norm and skipped [3] of a step; returns the outcome of the one before."""
        before = self.flush()
        copied = None
        if values.is_cuda:
            host = torch.empty(3, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            values = host
        self._waiting = _Waiting(step, values, copied, samples)
        return before

    def flush(self) -> list[Outcome]:
        """Outcomes that were not returned yet."""
        if self._waiting is None:
            return []
        step, values, copied, samples = self._waiting
        self._waiting = None
        if copied is not None:
            copied.synchronize()
        loss, norm, skipped = values.tolist()
        return [Outcome(step, loss, norm, skipped > 0, samples)]
