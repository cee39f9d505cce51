"""Groups of rank processes that stay alive and do one step when they are told.

Several groups (one process, tensor ranks, pipeline ranks) exist at once and wait in turn, so that a
benchmark can interleave them. A rank has one thread for arithmetic and one core to itself as far as
there are any: otherwise two ranks would borrow each other's cores and their CPU times say nothing.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import pickle
import random
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from tools.bench.protocol import Sample

TIMEOUT_S = 600

T = TypeVar("T")

Step = Callable[[], Sample | None]
"""One step of a rank, and what it measured beside time."""


@functools.cache
def _context() -> Any:
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.bench.preloaded"])
    return context


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """What `function(*arguments)` returns in a process that ends with it."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=_context()) as pool:
        return pool.submit(function, *arguments).result()


class RankGroup:
    """`ranks` processes, each of which called `build(*arguments)` for its step."""

    def __init__(self, build: Callable[..., Step], ranks: int, *arguments: Any) -> None:
        # Below the ports that the kernel gives to outgoing connections, which would race for it.
        port = random.randint(10_000, 30_000)
        self._pipes, self._processes = [], []
        for rank in range(ranks):
            ours, theirs = _context().Pipe()
            process = _context().Process(
                target=_serve, args=(theirs, build, arguments, rank, ranks, port), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._ready = False

    def begin(self) -> None:
        """Starts a step on all ranks, once they are ready for the first."""
        if not self._ready:
            self._answers()
            self._ready = True
        for pipe in self._pipes:
            pipe.send_bytes(b"step")

    def finish(self) -> Sample:
        """Waits for the step: wall time from the first start to the last end; sums of the rest."""
        answers: list[Sample] = self._answers()
        wall = max(each.pop("stop_s") for each in answers)
        wall -= min(each.pop("start_s") for each in answers)
        return {"wall_s": wall} | {key: sum(each[key] for each in answers) for key in answers[0]}

    def step(self) -> Sample:
        """One step."""
        self.begin()
        return self.finish()

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(b"")
        for process in self._processes:
            process.join(timeout=20)
            process.kill()

    def _answers(self) -> list[Any]:
        return [self._answer(rank) for rank in range(len(self._pipes))]

    def _answer(self, rank: int) -> Any:
        if not self._pipes[rank].poll(TIMEOUT_S):
            raise RuntimeError(f"rank {rank} did not answer within {TIMEOUT_S} s")
        failed, answer = pickle.loads(self._pipes[rank].recv_bytes())
        if failed:
            raise RuntimeError(f"rank {rank}:\n{answer}")
        return answer


def _serve(
    pipe: Connection,
    build: Callable[..., Step],
    arguments: tuple[Any, ...],
    rank: int,
    ranks: int,
    port: int,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    try:
        step = build(*arguments)
        pipe.send_bytes(pickle.dumps((False, None)))
        while pipe.recv_bytes():
            pipe.send_bytes(pickle.dumps((False, _measured(step))))
    except EOFError:
        pass
    except BaseException:
        pipe.send_bytes(pickle.dumps((True, traceback.format_exc())))
    # Skips the teardown of process groups, where a rank would wait for others that failed.
    os._exit(0)


def _measured(step: Step) -> Sample:
    # The clock counts from the machine's start, so ranks may be compared.
    start, cpu = time.perf_counter(), time.process_time()
    found = step() or {}
    stop = time.perf_counter()
    return {**found, "cpu_s": time.process_time() - cpu, "start_s": start, "stop_s": stop}
