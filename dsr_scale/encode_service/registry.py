"""A directory in which running servers stand, one small file each, so that trainers find them.

A server writes its file when it can answer and removes it when it stops cleanly. After `kill -9` or a
lost node the file stays: the next server on that machine sweeps it up, and until then clients merely
fail to connect. Files and loopback addresses belong to a machine, since many may share the disk. There is no heartbeat: clocks and caches of shared disks make one unreliable, and
clients find out who is alive by asking.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.config.run import AnyRun
from dsr_scale.encode_service.addresses import is_loopback, split_address

_PROBE_S = 0.5
_FIELD_START_TIME = 19
"""Of /proc/PID/stat, counted after the command's name."""


@dataclass(frozen=True)
class Entry:
    """One running server."""

    address: str
    metrics: str
    """host:port of its metrics page."""
    machine: str
    process: int
    started: str
    """When the process started, as the kernel counts: tells a process from a later one of its number."""


def registry_directory(run: AnyRun) -> Path:
    """Where the servers of `run` announce themselves."""
    chosen = run.encoder.registry
    return Path(run.directory) / "encoder_servers" if chosen is None else Path(chosen).expanduser()


@contextlib.contextmanager
def announced(directory: Path, address: str, metrics_address: str) -> Iterator[Path]:
    """While entered, this process stands in `directory` as a server at `address`.

    Sweeps up entries of this machine whose process is dead. Raises InputError when the directory cannot
    be written.
    """
    remove_dead(directory)
    host, port = split_address(address)
    machine, process = socket.gethostname(), os.getpid()
    name = f"{machine}-{host}-{port}".replace(":", "_").replace("/", "_")
    path = directory / f"{name}.json"
    entry = Entry(address, metrics_address, machine, process, _start_time(process))
    atomic_files.write_json(path, asdict(entry))
    try:
        yield path
    finally:
        # A server that was started since on the same port owns the file now.
        if _read(path) == entry:
            path.unlink(missing_ok=True)


def entries_in(directory: Path) -> list[tuple[Path, Entry]]:
    """Every whole entry with its file; other files, and a missing directory, are passed over."""
    found = [(path, _read(path)) for path in sorted(directory.glob("*.json"))]
    return [(path, entry) for path, entry in found if entry is not None]


def servers_in(directory: Path) -> list[str]:
    """Addresses of the servers in `directory` that this machine can reach, sorted.

    A loopback address of another machine would lead to whoever has that port here.
    """
    here = socket.gethostname()
    return sorted(
        {
            entry.address
            for _, entry in entries_in(directory)
            if entry.machine == here or not is_loopback(split_address(entry.address)[0])
        }
    )


def remove_dead(directory: Path) -> None:
    """Removes entries of this machine whose process is gone and whose port nobody answers.

    Both, since containers may share a machine's name and not its processes.
    """
    for path, entry in entries_in(directory):
        here = entry.machine == socket.gethostname()
        if here and _start_time(entry.process) != entry.started and not _accepts(entry.address):
            path.unlink(missing_ok=True)


def _read(path: Path) -> Entry | None:
    try:
        values = json.loads(path.read_bytes())
        entry = Entry(**{field.name: values[field.name] for field in fields(Entry)})
        split_address(entry.address)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError):
        return None
    return entry


def _start_time(process: int) -> str:
    """Empty for a process that is not there, or a kernel without /proc."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[_FIELD_START_TIME]


def _accepts(address: str) -> bool:
    try:
        with socket.create_connection(split_address(address), timeout=_PROBE_S):
            return True
    except OSError:
        return False
