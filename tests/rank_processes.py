"""Functions run on several ranks, in fresh processes that need not import everything again.

A fork server imports torch, DeepSpeed and megatron once; each rank is a fork of it, so that no test
leaves a process group, a patched module or a thread behind for the next.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import random
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOADED = ["preloaded"]


@functools.cache
def _context() -> Any:
    # The server takes its path from the environment, not from this process.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returned on each of `ranks` processes, in order of rank.

    A failure on any rank ends all of them and is raised here with its traceback.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(ranks):
        ours, theirs = _context().Pipe(duplex=False)
        process = _context().Process(
            target=_run_rank, args=(theirs, function, arguments, rank, ranks, port), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        results = [_received(pipe, rank) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(timeout=20)
            process.kill()
    return results


def _received(pipe: Connection, rank: int) -> Any:
    if not pipe.poll(timeout=180):
        raise AssertionError(f"rank {rank} did not answer within 180 s")
    try:
        # Plain pickles: multiprocessing's own would share tensors with a process that is gone.
        failed, answer = pickle.loads(pipe.recv_bytes())
    except EOFError as error:
        raise AssertionError(f"rank {rank} died") from error
    if failed:
        raise AssertionError(f"rank {rank}:\n{answer}")
    return answer


def _run_rank(
    pipe: Connection,
    function: Callable[..., Any],
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
    warnings.simplefilter("ignore", FutureWarning)
    import torch

    torch.set_num_threads(1)
    try:
        answer = (False, function(*arguments))
    except BaseException:
        answer = (True, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    # Skips the teardown of process groups, where a rank would wait for others that failed.
    os._exit(0)


def free_port() -> int:
    """A port below those that the kernel gives to outgoing connections, which would race for it."""
    while True:
        port = random.randint(10_000, 30_000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
