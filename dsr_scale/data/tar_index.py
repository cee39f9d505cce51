"""The index of a webdataset tar: keys, member positions and image sizes, scanned once and kept.

Scanning costs a header read per member and per image (about a second for 10,000 samples), so the
result is stored as one small file for each tar, in the cache directory or beside the tars, and
reused while the tar's size and time of change stay the same.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsr_scale.base.atomic_files import require_writable_directory, write_bytes
from dsr_scale.base.errors import InputError
from dsr_scale.data.file_locks import locked
from dsr_scale.data.remote_files import FileStore
from dsr_scale.data.tar_members import TarEntry, scan_tar
from dsr_scale.data.transforms import UnreadableImage, image_size
from dsr_scale.data.worker_processes import tie_to_parent

_VERSION = 1
_PROCESSES = 8
ABSENT = -1
"""Offset of a member that a sample does not have."""


class TarIndex(NamedTuple):
    """What is known of one tar with n samples."""

    keys: np.ndarray
    """str [n]"""
    spans: np.ndarray
    """int64 [n, 3, 2]: (offset, size) of image, text and metadata; offset -1 where absent."""
    sizes: np.ndarray
    """uint32 [n, 2]: (height, width) in pixels; (1, 1) for an image that cannot be read."""
    stamp: np.ndarray
    """int64 [3]: format version, and the tar's bytes and time of change when it was scanned."""

    @property
    def tar_bytes(self) -> int:
        """Size of the tar when it was scanned."""
        return int(self.stamp[1])

    def digest(self) -> bytes:
        """Names the tar's contents as far as the index sees them."""
        state = hashlib.sha256()
        for array in (np.array(self.keys.tolist(), dtype=np.str_), self.spans, self.sizes):
            state.update(array.tobytes())
        return state.digest()


def index_path(directory: Path, name: str) -> Path:
    """Where the index of tar `name` is kept."""
    return directory / f"{name}.index.npz"


def ensure_indexes(files: FileStore, names: Sequence[str], directory: Path) -> None:
    """Scans every tar that has no current index, in several processes.

    Raises `InputError` for a damaged tar, a directory that cannot be written, or a cache limit that
    does not hold one of the tars.
    """
    if all(_is_current(files, name, directory) for name in names):
        return
    try:
        require_writable_directory(directory)
    except InputError as error:
        raise InputError(
            found=f"{error.found}, to keep the index of the tars",
            required=error.required,
            remedy="set data.cache_directory to a directory that can be written",
        ) from error
    with locked(directory / ".lock"):
        _index_all(
            [(files, name, directory) for name in names if not _is_current(files, name, directory)]
        )


def _index_all(waiting: list[tuple[FileStore, str, Path]]) -> None:
    processes = min(_PROCESSES, os.cpu_count() or 1, len(waiting))
    if processes <= 1:
        for arguments in waiting:
            _index_tar(*arguments)
        return
    with ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("fork"),
        initializer=tie_to_parent,
        initargs=(os.getpid(),),
    ) as pool:
        futures = [pool.submit(_index_tar, *arguments) for arguments in waiting]
        try:
            for future in futures:
                future.result()
        except BaseException:  # do not fetch a thousand tars before saying what is wrong
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def load_index(directory: Path, name: str) -> TarIndex:
    """The kept index of one tar."""
    with np.load(index_path(directory, name)) as stored:
        return TarIndex(**stored)


def _is_current(files: FileStore, name: str, directory: Path) -> bool:
    path = index_path(directory, name)
    if not path.is_file():
        return False
    with np.load(path) as stored:
        stamp = stored["stamp"]
    if stamp[0] != _VERSION:
        return False
    # What lies behind a URL is taken to stay as it is; asking for every tar would cost a round trip.
    return files.remote or np.array_equal(stamp, _stamp(files.path(name).stat()))


def _stamp(status: os.stat_result) -> np.ndarray:
    return np.array([_VERSION, status.st_size, status.st_mtime_ns], dtype=np.int64)


def _index_tar(files: FileStore, name: str, directory: Path) -> None:
    entries: list[TarEntry] = []
    sizes: list[tuple[int, int]] = []
    # Opened once: indexing others at the same time may evict it from a small cache.
    with files.open(name) as file:
        status = os.fstat(file.fileno())
        files.require_room_for(status.st_size)
        for entry in scan_tar(file, files.url(name)):
            entries.append(entry)
            sizes.append(_image_size(file, entry.image))
    spans = [
        [span or (ABSENT, 0) for span in (entry.image, entry.text, entry.metadata)]
        for entry in entries
    ]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        keys=np.array([entry.key for entry in entries], dtype=np.str_),
        spans=np.array(spans, dtype=np.int64).reshape(-1, 3, 2),
        sizes=np.array(sizes, dtype=np.uint32).reshape(-1, 2),
        stamp=_stamp(status),
    )
    write_bytes(index_path(directory, name), buffer.getvalue())


def _image_size(file: Any, span: tuple[int, int] | None) -> tuple[int, int]:
    if span is None:
        return (1, 1)
    file.seek(span[0])
    try:
        return image_size(file.read(span[1]))
    except UnreadableImage:
        return (1, 1)
