"""Files of a data set, local or fetched into a bounded cache that all processes of a node share.

A remote file is downloaded under a lock into a temporary folder, verified, and renamed, so many
workers that want one shard cause one download and never see half of it. Over the limit, the least
recently used files are unlinked; a process that still has one open keeps reading it, and one that
comes too late fetches it again. What a killed process left of a download is removed by the next
one that holds its lock. Object stores go through mosaicml-streaming's downloaders; plain
HTTP, which it lacks, through the standard library.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from dsr_scale.base.atomic_files import storage_errors
from dsr_scale.base.errors import InputError
from dsr_scale.data.file_locks import locked, locked_if_free
from dsr_scale.data.streaming_parts import streaming_part

CACHE_NAME = "dsr_scale_cache"
_LOCK_STRIPES = 64
_TOUCH_INTERVAL_S = 10.0
"""A file's time of last use is renewed at most this often by each process."""
_TIMEOUT_S = 60.0
_ATTEMPTS = 4
_FIRST_PAUSE_S = 1.0
_TEMPORARY = ".part-"
_LOCKS = ".locks"


def is_remote(location: str) -> bool:
    """Whether `location` is a URL rather than a path."""
    return "://" in location


def download(
    url: str,
    path: Path,
    *,
    verify: Callable[[Path], None] | None = None,
    attempts: int = _ATTEMPTS,
) -> None:
    """Copies `url` to `path`, which must not exist; waits 1, 2, 4 … s between attempts.

    `verify` raises `InputError` on wrong contents, which a network can cause as well as the store.
    Raises `InputError` when the last attempt fails too.
    """
    for attempt in range(attempts):
        try:
            _download_once(url, path)
            if verify is None or _is_intact(path, verify, last=attempt == attempts - 1):
                return
        except InputError:
            raise
        except Exception as error:  # each cloud library has its own exceptions
            path.unlink(missing_ok=True)
            missing = isinstance(error, urllib.error.HTTPError) and error.code in (403, 404, 410)
            if missing or attempt == attempts - 1:
                raise InputError(
                    found=f"{url} could not be fetched ({type(error).__name__}: {error})",
                    required="a reachable file and the right to read it",
                    remedy="check the address, the network and the credentials of this machine",
                ) from error
        time.sleep(_FIRST_PAUSE_S * 2.0**attempt)


def _is_intact(path: Path, verify: Callable[[Path], None], *, last: bool) -> bool:
    try:
        verify(path)
    except InputError as error:
        path.unlink()
        if last:
            raise InputError(
                found=f"{error.found}, in the last of several attempts too",
                required=error.required,
                remedy=error.remedy,
            ) from error
        return False
    return True


def _download_once(url: str, path: Path) -> None:
    if url.startswith(("http://", "https://")):
        # Opened outside storage_errors: a refused connection is no problem of this disk.
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as reply:
            with storage_errors(path), path.open("wb") as file:
                shutil.copyfileobj(reply, file, 1 << 20)
            expected = reply.headers.get("Content-Length")
        if expected is not None and path.stat().st_size != int(expected):
            raise OSError(f"{path.stat().st_size} of {expected} bytes arrived")
        return
    downloader = streaming_part("storage.download").CloudDownloader.get(url)
    with storage_errors(path):
        downloader.download(url, str(path), _TIMEOUT_S)
    downloader.clean_up()


class FileStore:
    """Names below one directory or URL, answered with local paths.

    `namespace` separates contents that share a URL at different times (a pack that was rebuilt).
    Holds no open files or locks between calls, so it is safe to fork and to pickle.
    """

    def __init__(
        self,
        location: str,
        *,
        cache_directory: str | None = None,
        cache_limit_gib: float | None = None,
        namespace: str = "",
    ) -> None:
        self.location = location.rstrip("/")
        self.remote = is_remote(location)
        self._limit = None if cache_limit_gib is None else int(cache_limit_gib * 2**30)
        self._touched: dict[str, float] = {}
        if not self.remote:
            return
        if cache_directory is None:
            raise InputError(
                found=f"data.shards = {location} without a cache directory",
                required="a local directory for the shards that were fetched",
                remedy="set data.cache_directory to a fast local disk",
            )
        # A directory of our own: what lies beside it in the user's is never evicted.
        self._cache_root = Path(cache_directory) / CACHE_NAME
        name = hashlib.sha256(f"{self.location}\n{namespace}".encode()).hexdigest()[:20]
        self._cache = self._cache_root / name
        with storage_errors(self._cache):
            self._cache.mkdir(parents=True, exist_ok=True)

    def url(self, name: str) -> str:
        """Where `name` comes from, for messages."""
        return f"{self.location}/{name}"

    def path(self, name: str, verify: Callable[[Path], None] | None = None) -> Path:
        """The local file, fetched first if need be. `verify` raises `InputError` on wrong contents.

        Under a limit, a neighbour may evict it before it is opened; `open` has no such gap.
        """
        if not self.remote:
            return Path(self.location) / name
        path = self._cache / name
        if not self._touch(path):
            self._fetch(name, path, verify).close()
        return path

    def open(self, name: str) -> BinaryIO:
        """The open local file, fetched first if need be; readable also when it is evicted.

        Raises `FileNotFoundError` if it is local and absent.
        """
        if not self.remote:
            return (Path(self.location) / name).open("rb")
        path = self._cache / name
        if self._touch(path):
            with contextlib.suppress(FileNotFoundError):
                return path.open("rb")
        return self._fetch(name, path, None)

    def _fetch(self, name: str, path: Path, verify: Callable[[Path], None] | None) -> BinaryIO:
        """Downloads to `path` unless another process just has; the file is open before it can go."""
        with locked(self._lock_path(path)):
            if self._touch(path):
                with contextlib.suppress(FileNotFoundError):
                    return path.open("rb")
            folder = _partial_folder(path)
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            with storage_errors(path):
                folder.mkdir(parents=True)
            try:
                partial = folder / path.name
                download(self.url(name), partial, verify=verify)
                file = partial.open("rb")
                partial.replace(path)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            self._touched[str(path)] = time.monotonic()
        self._evict(keep=path)
        return file

    def require_room_for(self, largest_bytes: int) -> None:
        """Refuses a cache limit that cannot hold the largest file."""
        if self.remote and self._limit is not None and self._limit < largest_bytes:
            raise InputError(
                found=f"data.cache_limit_gib = {self._limit / 2**30:.3g}",
                required=f"room for the largest shard, {largest_bytes / 2**30:.3g} GiB",
                remedy="raise the limit; a few times data.shuffle_block_samples avoids refetching",
            )

    def _touch(self, path: Path) -> bool:
        """Marks `path` as used now; False when it is not there."""
        now = time.monotonic()
        try:
            if now - self._touched.get(str(path), float("-inf")) > _TOUCH_INTERVAL_S:
                os.utime(path)
                self._touched[str(path)] = now
            elif not path.exists():
                return False
        except FileNotFoundError:
            return False
        return True

    def _lock_path(self, path: Path) -> Path:
        # A fixed number of lock files: they are never removed, because removing one is a race.
        stripe = int.from_bytes(hashlib.sha256(str(path).encode()).digest()[:2], "little")
        return self._cache_root / _LOCKS / f"{stripe % _LOCK_STRIPES:02d}"

    def _evict(self, keep: Path) -> None:
        if self._limit is None:
            return
        with locked(self._cache_root / _LOCKS / "eviction"):
            total, files = self._survey()
            for _, size, path in sorted(files):
                if total <= self._limit:
                    break
                if path != keep:
                    path.unlink(missing_ok=True)
                    total -= size

    def _survey(self) -> tuple[int, list[tuple[int, int, Path]]]:
        """Bytes in the cache, and (last use, bytes, path) of every file that may be evicted.

        Downloads at work count and stay; what a killed process left of one is removed.
        """
        total, files = 0, []
        for parent, folders, names in os.walk(self._cache_root):
            if _LOCKS in folders:
                folders.remove(_LOCKS)
            directory = Path(parent)
            arriving = directory.name.startswith(_TEMPORARY)
            if arriving and self._remove_abandoned(directory):
                continue
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    status = (directory / name).stat()
                    total += status.st_size
                    if not arriving:
                        files.append((status.st_mtime_ns, status.st_size, directory / name))
        return total, files

    def _remove_abandoned(self, folder: Path) -> bool:
        path = folder.with_name(folder.name.removeprefix(_TEMPORARY))
        with locked_if_free(self._lock_path(path)) as abandoned:
            if abandoned:
                shutil.rmtree(folder, ignore_errors=True)
            return abandoned


def _partial_folder(path: Path) -> Path:
    # A folder, because some downloaders write beside their target; named by the file alone, so
    # that whoever holds the file's lock finds what a killed process left.
    return path.with_name(_TEMPORARY + path.name)
