"""Files that appear whole or not at all, and directories that are checked before work starts.

A file is written beside its target, flushed to the disk and renamed over it, so that a crash
leaves the old content or the new one. Full disks and missing permissions become an `InputError`
that names the path.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsr_scale.base.errors import InputError


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns a full disk or a refused write under `path` into an error a person can act on."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                found=f"no space left while writing {path}",
                required="room for the whole file",
                remedy="free space on that disk or choose another directory",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(
                found=f"no permission to write {path}",
                required="a directory this user may write to",
                remedy="choose another directory or change its permissions",
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise InputError(
                found=f"{error.filename or path} is in the way of {path}",
                required="a path whose parents are directories",
                remedy="choose another path, or move what is in the way",
            ) from error
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces `path` by `content` atomically."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def rename(source: Path, target: Path) -> None:
    """Renames over `target` and flushes the directory, so that the new name survives a power loss."""
    source.replace(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: Any) -> None:
    """Replaces `path` by `content` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def require_writable_directory(path: Path) -> None:
    """Makes `path` and proves that a file can be written in it, before any long work starts."""
    with storage_errors(path):
        if path.exists() and not path.is_dir():
            raise InputError(
                found=f"{path} is a file",
                required="a directory, or a path that does not exist yet",
                remedy="choose another output directory",
            )
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
