"""Functions run on several ranks, and commands, in fresh processes that need not import everything again.

A fork server imports torch, DeepSpeed, megatron and the trainer once; each rank is a fork of it, so that
no test leaves a process group, a patched module or a thread behind for the next.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
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

    Several find the variables that torchrun sets, one finds none. A failure on any rank ends all of them and is raised here with its traceback.
    """
    pipes, processes = [], []
    for environment in rank_environments(ranks):
        ours, theirs = _context().Pipe(duplex=False)
        process = _context().Process(
            target=_run_rank, args=(theirs, function, arguments, {**os.environ, **environment})
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        results = [_received(*each) for each in zip(pipes, processes, range(ranks), strict=True)]
    finally:
        for process in processes:
            process.join(timeout=20)
            process.kill()
    return results


def _received(pipe: Connection, process: BaseProcess, rank: int) -> Any:
    if not pipe.poll(timeout=180):
        raise AssertionError(f"rank {rank} did not answer within 180 s")
    try:
        # Plain pickles: multiprocessing's own would share tensors with a process that is gone.
        failed, answer = pickle.loads(pipe.recv_bytes())
    except EOFError as error:
        process.join(timeout=20)
        raise AssertionError(f"rank {rank} died with status {process.exitcode}") from error
    if failed:
        raise AssertionError(f"rank {rank}:\n{answer}")
    return answer


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """The variables that torchrun sets for each of `ranks` processes; a single one needs none."""
    if ranks == 1:
        return [{}]
    port = str(free_port())
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for rank in range(ranks)
    ]


def _run_rank(
    pipe: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    _prepare(environment)
    try:
        answer = (False, function(*arguments))
    except BaseException:
        answer = (True, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    # Skips the teardown of process groups, where a rank would wait for others that failed.
    os._exit(0)


def _prepare(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    warnings.simplefilter("ignore", FutureWarning)
    import torch

    torch.set_num_threads(1)


class ForkedCommand:
    """`dsr-scale` with `arguments`, as `subprocess.Popen` would run it; what it prints is kept in a file."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        with tempfile.NamedTemporaryFile(delete=False) as printed:
            self._printed = Path(printed.name)
        weakref.finalize(self, os.unlink, self._printed)
        self._process = _context().Process(
            target=_run_command,
            args=(arguments, {**os.environ, **(environment or {})}, self._printed),
        )
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status once it has ended; a signal's number is negative."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self._process.exitcode

    def wait(self, timeout_s: float) -> int:
        """Until it ends, or `subprocess.TimeoutExpired`."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("dsr-scale", timeout_s)
        return self._process.exitcode

    def finish(self, timeout_s: float) -> str:
        """What it printed until its end."""
        try:
            self.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"runs on; printed {self._printed.read_text()}") from error
        return self._printed.read_text()

    def send_signal(self, number: int) -> None:
        """To this process alone."""
        if self._process.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it without a chance to say goodbye."""
        self._process.kill()
        self._process.join()


def _run_command(arguments: tuple[str, ...], environment: Mapping[str, str], printed: Path) -> None:
    # A process group of its own, as a shell would give it.
    os.setpgid(0, 0)
    _prepare(environment)
    file = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["dsr-scale", *arguments]
    from dsr_scale.cli.main import run

    run()


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
