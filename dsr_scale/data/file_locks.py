"""An exclusive lock between processes of one node, released by the kernel when its holder dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from dsr_scale.base.atomic_files import storage_errors
from dsr_scale.base.errors import InputError


@contextlib.contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Holds the lock file `path`; waits for it, or raises `InputError` saying `busy` if given."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError as error:
            raise InputError(
                found=str(busy),
                required="one at a time",
                remedy="wait for it to end, or choose another directory",
            ) from error
        yield
    finally:
        os.close(descriptor)
