"""Files of a data set, local or fetched into a bounded cache that all processes of a node share.

A remote file is downloaded under a lock into a temporary name, verified, and renamed, so many
workers that want one shard cause one download and never see half of it. Over the limit, the least
recently used files are unlinked; a process that still has one open keeps reading it, and one that
comes too late fetches it again. Object stores go through mosaicml-streaming's downloaders; plain
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

from dsr_scale.base.atomic_files import storage_errors
from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.data.file_locks import locked

CACHE_NAME = "dsr_scale_cache"
_LOCK_STRIPES = 64
_TOUCH_INTERVAL_S = 10.0
"""A file's time of last use is renewed at most this often by each process."""
_TIMEOUT_S = 60.0
_ATTEMPTS = 4
_TEMPORARY = ".part-"


def is_remote(location: str) -> bool:
    """Whether `location` is a URL rather than a path."""
    return "://" in location


def download(url: str, path: Path, *, attempts: int = _ATTEMPTS) -> None:
    """Copies `url` to `path`, which must not exist; waits 1, 2, 4 … s between attempts.

    Raises `InputError` when the last attempt fails too.
    """
    for attempt in range(attempts):
        try:
            _download_once(url, path)
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
        time.sleep(2.0**attempt)


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
    declare_torchvision_operators()
    from streaming.base.storage.download import CloudDownloader

    downloader = CloudDownloader.get(url)
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
        """The local file, fetched first if need be. `verify` raises on wrong contents."""
        if not self.remote:
            return Path(self.location) / name
        path = self._cache / name
        if self._touch(path):
            return path
        with locked(self._lock_path(str(path))):
            if self._touch(path):
                return path
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
            try:
                download(self.url(name), partial)
                if verify is not None:
                    verify(partial)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            self._touched[str(path)] = time.monotonic()
        self._evict(keep=path)
        return path

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

    def _lock_path(self, name: str) -> Path:
        # A fixed number of lock files: they are never removed, because removing one is a race.
        stripe = int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "little")
        return self._cache_root / ".locks" / f"{stripe % _LOCK_STRIPES:02d}"

    def _evict(self, keep: Path) -> None:
        if self._limit is None:
            return
        with locked(self._cache_root / ".locks" / "eviction"):
            files = []
            for path in self._cache_root.rglob("*"):
                if ".locks" in path.parts or path.name.startswith(_TEMPORARY):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    if path.is_file():
                        files.append((status.st_mtime_ns, status.st_size, path))
            excess = sum(size for _, size, _ in files) - self._limit
            for _, size, path in sorted(files):
                if excess <= 0:
                    break
                if path != keep:
                    path.unlink(missing_ok=True)
                    excess -= size
