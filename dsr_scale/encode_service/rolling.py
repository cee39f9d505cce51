"""A disk cache of byte strings with a size limit, shared by the processes of a machine.

diskcache keeps an SQLite table of keys and one file for each value, and puts out what was used least
recently. It would also unpickle what it finds; here a value is a plain file of bytes or it does not
exist, so a directory that somebody else wrote to can give wrong values but run no code. Wrong values are
told by a checksum. A cache is never needed: whatever fails is a miss. Where it would go on failing, as on
a full disk, the process stops writing (or, if the table cannot be read, stops asking) and says so once.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import diskcache
import xxhash
from diskcache.core import MODE_BINARY

from dsr_scale.base.atomic_files import require_writable_directory

_CHECKSUM_BYTES = 16
_LOCK_PATIENCE_S = 1
"""Longer than any transaction of a live neighbour; then encoding is faster than waiting."""


class RollingCache:
    """Values by key; both are bytes. One object may serve several threads, and be forked."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        """Raises InputError when `directory` cannot be written."""
        require_writable_directory(directory)
        self._directory = directory
        self._readable = self._writable = True
        try:
            self._cache: Any = diskcache.Cache(
                str(directory),
                timeout=_LOCK_PATIENCE_S,
                disk=_BytesOnly,
                disk_min_file_size=0,
                size_limit=limit_bytes,
                eviction_policy="least-recently-used",
                # Not with every `set`, which would put out entries by number, not by size.
                cull_limit=0,
                statistics=0,
            )
        except (OSError, sqlite3.Error, diskcache.Timeout) as error:
            self._stop_reading(error)

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The value of each key, None for what is not there or damaged."""
        if not self._readable:
            return [None] * len(keys)
        try:
            # Files are opened under one lock and read after it: reading may wait for the disk.
            with self._cache.transact():
                files = [self._cache.get(key, read=True) for key in keys]
            return [
                None if file is None else self._checked(key, file)
                for key, file in zip(keys, files, strict=True)
            ]
        except diskcache.Timeout:
            pass
        except (OSError, sqlite3.Error) as error:
            self._stop_reading(error)
        return [None] * len(keys)

    def put(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Stores each value under its key and puts out the least recently used over the limit."""
        if not self._writable:
            return
        try:
            for key, value in zip(keys, values, strict=True):
                self._cache.set(key, xxhash.xxh3_128_digest(value) + value)
            self._cache.cull()
        except diskcache.Timeout:
            pass
        except (OSError, sqlite3.Error) as error:
            self._writable = False
            self._say(f"nothing more is stored by this process: {error}")

    def close(self) -> None:
        """Closes the table; the values stay for the next process."""
        if self._readable:
            self._cache.close()

    def _checked(self, key: bytes, file: BinaryIO) -> bytes | None:
        with file:
            checksum, value = file.read(_CHECKSUM_BYTES), file.read()
        if checksum == xxhash.xxh3_128_digest(value):
            return value
        self._cache.delete(key)
        return None

    def _stop_reading(self, error: Exception) -> None:
        self._readable = self._writable = False
        self._say(f"it is not used by this process any more: {error}")

    def _say(self, what: str) -> None:
        print(f"latent cache in {self._directory}: {what}", file=sys.stderr, flush=True)


class _BytesOnly(diskcache.Disk):
    """Keys and values as they are: nothing is pickled, nothing unpickled."""

    def put(self, key: Any) -> Any:
        assert type(key) is bytes
        return super().put(key)

    def get(self, key: Any, raw: Any) -> Any:
        if not raw:
            raise OSError("a pickled key")
        return super().get(key, raw)

    def store(self, value: Any, read: Any, key: Any = diskcache.UNKNOWN) -> Any:
        assert type(value) is bytes
        name, path = self.filename()
        try:
            self._write(path, [value], "xb")
        except OSError:
            Path(path).unlink(missing_ok=True)  # else a full disk stays full of halves
            raise
        return len(value), MODE_BINARY, name, None

    def fetch(self, mode: Any, filename: Any, value: Any, read: Any) -> Any:
        if mode != MODE_BINARY or not filename:
            raise OSError("no file of bytes")  # which diskcache takes for an absent key
        return super().fetch(mode, filename, value, read)
