"""Doing something on several ranks so that all succeed or all raise the same.

A rank that failed alone would leave the others waiting in their next collective. A process without
others, with or without a process group, sends no message at all: on CPU, messages through gloo made
all later training steps slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dsr_scale.base.errors import InputError

T = TypeVar("T")


class FailedTogetherError(RuntimeError):
    """At least one rank failed with something else than bad input; every rank raises this."""


def place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Rank and number of ranks; without a group, one process."""
    if group is None:
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def together(action: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """What `action` returned on each rank, in rank order. A collective.

    When it failed on some, every rank raises: the first InputError, or FailedTogetherError.
    """
    ranks = place(group)[1]
    result: Any = None
    failure: InputError | str | None = None
    cause: BaseException | None = None
    try:
        result = action()
    # DCP's own exception is no Exception.
    except (Exception, dcp.CheckpointException) as error:
        cause = error
        # Only errors of ours are known to survive the journey to other processes.
        failure = error if isinstance(error, InputError) else described(error)
    outcomes: list[Any] = [(result, failure)]
    if ranks > 1:
        outcomes = [None] * ranks
        dist.all_gather_object(outcomes, (result, failure), group=group)
    failures = [failed for _, failed in outcomes if failed is not None]
    if not failures:
        return [result for result, _ in outcomes]
    for failed in failures:
        if isinstance(failed, InputError):
            raise failed from cause
    raise FailedTogetherError("; ".join(sorted(set(failures)))) from cause


def on_first(action: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """What `action` returned on rank 0, where alone it is called, on every rank. A collective."""
    rank, _ = place(group)

    def first_only() -> T | None:
        return action() if rank == 0 else None

    result: Any = together(first_only, group)[0]
    return result


def described(failure: BaseException) -> str:
    """One line on what failed, with the causes that DCP wraps."""
    if isinstance(failure, dcp.CheckpointException):
        text = "; ".join(sorted({repr(cause[0]) for cause in failure.failures.values()}))
    else:
        text = repr(failure)
    # torch's writer reports a full disk only as a position that is not the expected one.
    if "inline_container" in text or "PytorchStreamWriter" in text:
        return f"no space left or write refused ({text.splitlines()[0][:200]})"
    return text.splitlines()[0][:300]
