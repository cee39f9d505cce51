"""One run directory is written by one run.

A lock file that its holder refreshes works on every shared file system with hard links, where locks of
the kernel often do not. The price is that the death of a holder on another machine is known only by
its silence. Nobody trusts the clock of another machine: a lock whose time moves is held, whatever the
time says.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
from flufl.lock import SEP, Lock, NotLockedError, TimeOutError

from dsr_scale.base.atomic_files import storage_errors
from dsr_scale.base.errors import InputError

LOCK_FILE = "run.lock"


@dataclass(frozen=True)
class _Timing:
    lifetime_s: float = 60.0
    refresh_s: float = 10.0
    look_s: float = 1.0
    """Between two looks at another's lock."""


@dataclass(frozen=True)
class _Holder:
    """What a lock file says."""

    host: str
    process: int
    claim: str
    """Name of the file, beside the lock, that only this holder has."""
    expires_s: float
    """Seconds since the epoch, by the holder's clock."""

    @property
    def is_dead(self) -> bool:
        """Known only of processes of this machine."""
        if self.host != socket.gethostname():
            return False
        try:
            # A zombie is dead and not buried: its parent may never ask.
            return psutil.Process(self.process).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


class _Lock(Lock):
    @property
    def hostname(self) -> str:
        # The fully qualified name is "localhost" on machines whose hosts file says so.
        return socket.gethostname()


@contextlib.contextmanager
def held(
    run_directory: Path,
    *,
    on_lost: Callable[[InputError], None],
    tell: Callable[[str], None],
) -> Iterator[None]:
    """Holds the lock of `run_directory`; makes the directory.

    A lock whose holder is gone is taken over, and `tell` is called with a line that says whose it was:
    at once if the holder was a process of this machine, after seconds if the lock has expired, after
    little more than a minute at most. `on_lost` is called from a thread when somebody else broke the
    lock: it should end the run. Raises InputError when another run holds it.
    """
    with _held(run_directory, _Timing(), on_lost, tell):
        yield


@contextlib.contextmanager
def _held(
    run_directory: Path,
    timing: _Timing,
    on_lost: Callable[[InputError], None],
    tell: Callable[[str], None],
) -> Iterator[None]:
    logging.getLogger("flufl.lock").propagate = False
    path = run_directory.absolute() / LOCK_FILE
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _Lock(str(path), lifetime=timedelta(seconds=timing.lifetime_s))
        _acquire(lock, path, timing, tell)
    released = threading.Event()
    threading.Thread(
        target=_keep, args=(lock, path, timing, released, on_lost), name="run lock", daemon=True
    ).start()
    try:
        yield
    finally:
        released.set()
        # Lost, or on a disk that is gone: the error that ends the run says more.
        with contextlib.suppress(NotLockedError, OSError):
            lock.unlock()


def _acquire(lock: _Lock, path: Path, timing: _Timing, tell: Callable[[str], None]) -> None:
    seen: _Holder | None = None
    since_s = 0.0
    while True:
        holder = _holder(path)
        if holder is None:
            if _claimed(lock):
                return
            continue
        if seen is None or holder.claim != seen.claim:
            seen, since_s = holder, time.monotonic()
        elif holder.expires_s != seen.expires_s:
            raise _refusal(path, holder)
        silent_s = time.monotonic() - since_s
        expired = holder.expires_s < time.time()
        patience_s = 2 * timing.refresh_s if expired else timing.lifetime_s + timing.refresh_s
        if (holder.is_dead or silent_s > patience_s) and _broken(
            lock, path, holder, by_force=silent_s > 2 * patience_s
        ):
            tell(
                f"took over {path}: its holder, process {holder.process} on {holder.host}, is gone"
                if holder.is_dead
                else f"took over {path}: the lock of process {holder.process} on {holder.host} ran out"
            )
        else:
            time.sleep(timing.look_s)


def _claimed(lock: _Lock) -> bool:
    try:
        # A time that is over before it begins: one try, and never the library's own way of breaking
        # locks, in which two takers can both win.
        lock.lock(timeout=timedelta(seconds=-1))
    except TimeOutError:
        return False
    return True


def _holder(path: Path) -> _Holder | None:
    """Who holds the lock; None when nobody does."""
    try:
        # Opening makes NFS ask its server; a plain stat may be a minute old.
        with path.open() as file:
            content = file.read().strip()
            expires_s = os.fstat(file.fileno()).st_mtime
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise
    try:
        name, host, process, random = content.rsplit(SEP, 3)
        claim = SEP.join((Path(name).name, host, process, random))
        return _Holder(host, int(process), claim, expires_s)
    except ValueError:
        # A crash of the whole machine may leave an empty file.
        return _Holder("an unknown host", 0, f"{path.name}{SEP}unreadable", expires_s)


def _broken(lock: _Lock, path: Path, holder: _Holder, *, by_force: bool) -> bool:
    """Removes the lock of a dead holder; False when another taker is at it.

    Of several takers only one can rename the holder's claim, so none removes the lock of the one that
    was faster. `by_force` is for a claim that is missing for long: a taker died in between.
    """
    aside = Path(f"{lock.claimfile}{SEP}broken")
    try:
        path.with_name(holder.claim).rename(aside)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE) or not by_force:
            return False
    path.unlink(missing_ok=True)
    aside.unlink(missing_ok=True)
    return True


def _keep(
    lock: _Lock,
    path: Path,
    timing: _Timing,
    released: threading.Event,
    on_lost: Callable[[InputError], None],
) -> None:
    """Refreshes the lock until it is released or lost."""
    missed = False
    # A file server that hiccups is no loss: a second look confirms it.
    while not released.wait(min(timing.look_s, timing.refresh_s) if missed else timing.refresh_s):
        try:
            lock.refresh()
        except NotLockedError:
            if missed:
                on_lost(_loss(path))
                return
            missed = True
        except OSError:
            # The disk may come back; a lock that was taken meanwhile shows then.
            continue
        else:
            missed = False


def _refusal(path: Path, holder: _Holder) -> InputError:
    return InputError(
        found=f"the run directory {path.parent} is written by process {holder.process} on "
        f"{holder.host}",
        required="one run at a time in a run directory",
        remedy="wait for that run or end it, or set another directory",
    )


def _loss(path: Path) -> InputError:
    holder = _holder(path)
    now = (
        "is gone" if holder is None else f"belongs to process {holder.process} on {holder.host} now"
    )
    return InputError(
        found=f"the lock {path} of this run {now}",
        required="one run at a time in a run directory",
        remedy="look for another job of this run; this one ended without saving",
    )
