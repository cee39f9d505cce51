"""`dsr-scale serve` in processes of its own, and the means to kill its servers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rank_processes import ForkedCommand

from dsr_scale.encode_service.registry import Entry, entries_in

COMMAND = Path(sys.executable).with_name("dsr-scale")
START_S = 120.0


def until(
    condition: Callable[[], object], *processes: subprocess.Popen[str] | ForkedCommand
) -> None:
    """Waits for `condition` while all `processes` live."""
    deadline = time.monotonic() + START_S
    while not condition():
        assert all(process.poll() is None for process in processes), "a process ended"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def entries(registry: Path) -> list[Entry]:
    """The servers that stand in the registry, by the time their files were written."""
    found = sorted(entries_in(registry), key=lambda pair: pair[0].stat().st_mtime)
    return [entry for _, entry in found]


class Commands:
    """Running serve commands."""

    def __init__(self, processes: list[subprocess.Popen[str]], registry: Path) -> None:
        self.processes = processes
        self.registry = registry

    def stop_for_good(self) -> None:
        """Ends servers and those who would start them again, without a goodbye."""
        for process in self.processes:
            process.kill()
        for server in entries(self.registry):
            kill(server)


@contextlib.contextmanager
def serving(config: Path, registry: Path, *overrides: str, commands: int = 1) -> Iterator[Commands]:
    """`commands` serve commands whose servers stand in `registry`; ended at the exit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(COMMAND), "serve", str(config), f"encoder.registry={registry}", *overrides]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, text=True)
        for _ in range(commands)
    ]
    try:
        until(lambda: len(entries(registry)) == commands, *processes)
        yield Commands(processes, registry)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(START_S)


def kill(server: Entry) -> None:
    """No chance to say goodbye."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(server.process, signal.SIGKILL)
