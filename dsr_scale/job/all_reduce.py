"""A small all-reduce over all nodes, in a child process: a collective that hangs can only be killed.

The child imports torch while its parent still checks other things, then waits for the address of the
store. It reports every stage it reaches, so that after a hang it is known which nodes arrived. Each node
contributes its first GPU over NCCL, or its CPU over gloo.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

Backend = Literal["nccl", "gloo"]

FLOATS = 16 * 2**20
"""64 MiB."""
TIMED_ROUNDS = 3


@dataclass(frozen=True)
class Task:
    """What a child is asked for."""

    backend: Backend
    rank: int
    world: int
    host: str
    """Where rank 0 keeps the store."""
    port: int
    """0 on rank 0, which takes a free one."""
    limit_s: float


@dataclass(frozen=True)
class Outcome:
    """How far one node came."""

    stage: str
    """start (torch not loaded), loaded, arrived (at the store), group (all have arrived), done."""
    error: str = ""
    seconds: float | None = None
    """Of one all-reduce, the fastest."""


class Child:
    """A process that takes part in one all-reduce."""

    def __init__(self, log: Path) -> None:
        """Starts it; it loads torch and waits. Its output goes to `log`."""
        self._log = log
        self._news: dict[str, Any] = {"stage": "start"}
        self._changed = threading.Condition()
        self._ended = False
        reading, writing = os.pipe()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, str(writing)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(writing,),
            )
        os.close(writing)
        threading.Thread(target=self._listen, args=(reading,), daemon=True).start()

    def begin(self, task: Task) -> None:
        """Tells it whom to meet."""
        assert self._process.stdin is not None
        # One that has died is found out by `outcome`.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write((json.dumps(asdict(task)) + "\n").encode())
            self._process.stdin.flush()

    def port(self, timeout_s: float) -> int | None:
        """Where rank 0's store listens; None when there is none in time."""
        self._wait("port", timeout_s)
        return self._news.get("port")

    def outcome(self, timeout_s: float) -> Outcome:
        """How far it has come when it is done, has died, or the time is over."""
        self._wait("seconds", timeout_s)
        with self._changed:
            news, ended = dict(self._news), self._ended
        error = news.get("error", "")
        if ended and news["stage"] != "done" and not error:
            error = self._last_words()
        return Outcome(news["stage"], error, news.get("seconds"))

    def close(self) -> None:
        """Ends it, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _listen(self, reading: int) -> None:
        with os.fdopen(reading) as lines:
            for line in lines:
                with self._changed:
                    self._news |= json.loads(line)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _wait(self, key: str, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: key in self._news or self._ended, timeout_s)

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line]
        return lines[-1].strip() if lines else "its process died"


def bus_bandwidth(seconds: float, world: int) -> float:
    """Bytes per second that each node's link carried in an all-reduce of 64 MiB: 2 (n − 1) / n of them,
    as nccl-tests counts."""
    return 2 * (world - 1) / world * FLOATS * 4 / seconds


def _take_part(events: Any) -> None:
    def tell(**news: Any) -> None:
        events.write(json.dumps(news) + "\n")
        events.flush()

    import torch
    import torch.distributed as dist

    tell(stage="loaded")
    line = sys.stdin.readline()
    if not line:
        return
    task = Task(**json.loads(line))
    # Should the parent die first, a hung collective would stay for ever.
    signal.alarm(int(task.limit_s) + 5)
    try:
        timeout = timedelta(seconds=task.limit_s)
        leads = task.rank == 0
        host = "127.0.0.1" if leads else task.host
        store = dist.TCPStore(
            host, task.port, task.world, leads, timeout=timeout, wait_for_workers=False
        )
        tell(stage="arrived", port=store.port)
        device = torch.device("cuda", 0) if task.backend == "nccl" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            task.backend, store=store, rank=task.rank, world_size=task.world, timeout=timeout
        )
        tell(stage="group")
        seconds = _timed(torch, dist, device, task)
        # A process that ends early would break the last round of others.
        store.set(f"done/{task.rank}", "1")
        store.wait([f"done/{rank}" for rank in range(task.world)], timeout)
        tell(stage="done", seconds=seconds)
        # The parent of rank 0, where the store lives, ends it when it has heard of all.
        sys.stdin.read()
    except Exception as error:
        tell(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        raise


def _timed(torch: Any, dist: Any, device: Any, task: Task) -> float:
    """Seconds of the fastest round. Raises ArithmeticError when the sum is wrong."""
    values = torch.full((FLOATS,), float(task.rank + 1), device=device)

    def round_s() -> float:
        began = time.monotonic()
        dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - began

    round_s()  # Connections are made in the first one.
    expected = task.world * (task.world + 1) / 2
    wrong = int((values != expected).sum())
    if wrong:
        raise ArithmeticError(f"{wrong} of {FLOATS} sums are wrong")
    values.zero_()
    return min(round_s() for _ in range(TIMED_ROUNDS))


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1]), "w") as _events:
        _take_part(_events)
        _events.flush()
    # Skips the teardown of process groups, which waits for nodes that may be gone.
    os._exit(0)
