"""An exclusive lock between processes of one node, released by the kernel when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from dsr_scale.base.atomic_files import storage_errors
from dsr_scale.base.errors import InputError

_PATIENCE_S = 3.0
"""The workers of a holder that was just killed need a moment to die."""
_POLL_S = 0.05


@contextlib.contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Holds the lock file `path`; waits for it, or for seconds only if `busy` says what to report.

    Processes forked while it is held share it, so it lasts until the last of them has died.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if busy is None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        else:
            _lock_within(descriptor, _PATIENCE_S, busy)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Holds the lock file `path` if nobody else does, and tells whether; never waits."""
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _lock_within(descriptor: int, patience_s: float, busy: str) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    found=busy,
                    required="one at a time",
                    remedy="wait for it to end, or choose another directory",
                ) from error
        time.sleep(_POLL_S)
