"""Removes the shared memory that a killed data worker left behind.

Decoded micro-batches travel through files in /dev/shm that torch names `torch_<pid>_…` and unlinks
as soon as the receiver can have them. A worker killed in that moment leaves one, and nobody else
ever removes it. At the start of a stream, files of processes that no longer exist are removed; they
must be old and this user's, since another container may share the directory but not the pids.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
OLD_S = 60.0
"""A living process unlinks its file within milliseconds."""

NAME = re.compile(r"torch_(\d+)_\w+")


def remove_abandoned(directory: Path = SHARED_MEMORY, *, old_s: float = OLD_S) -> list[Path]:
    """Removes torch's shared files of dead processes from `directory`; returns what was removed."""
    removed: list[Path] = []
    if not directory.is_dir():
        return removed
    for path in directory.iterdir():
        match = NAME.fullmatch(path.name)
        if match is None or _exists(int(match[1])):
            continue
        # Another rank of this node may be removing the same file.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            status = path.stat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime >= old_s:
                path.unlink()
                removed.append(path)
    return removed


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
