"""Servers in processes of their own, and their CPU time: real encoders, prepared answers, a plain socket."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from dsr_scale.base.errors import InputError
from dsr_scale.config.encoders import PixelsImage
from dsr_scale.config.run import RunConfig
from dsr_scale.encode_service.local import LocalEncoders
from dsr_scale.encoders.contract import build_image_encoder
from tools.bench.protocol import Sample, timed

CPU = torch.device("cpu")


def timed_with(clock: int, action: Callable[[], object]) -> Sample:
    """`timed`, with the CPU time of the process of `clock` added."""
    before_s = time.clock_gettime(clock)
    sample = timed(action)
    return {**sample, "cpu_s": sample["cpu_s"] + time.clock_gettime(clock) - before_s}


@contextlib.contextmanager
def child(work: Callable[[Any, Connection], None], argument: Any) -> Iterator[tuple[Any, int]]:
    """A process that does `work` until the exit: what it first tells, and its CPU clock.

    Spawned, for gRPC does not survive a fork. Raises the InputError that it tells.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(argument, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        message = ours.recv()
        if isinstance(message, InputError):
            raise message
        clock = ctypes.c_int()
        failed = ctypes.CDLL(None).clock_getcpuclockid(process.pid, ctypes.byref(clock))
        assert not failed
        yield message, clock.value
    finally:
        process.terminate()
        process.join()


def serve(config: RunConfig, messages: Connection) -> None:
    """A server on the CPU with one thread for arithmetic."""
    from dsr_scale.encode_service.serving import run_server

    torch.set_num_threads(1)
    run_server(config, CPU, config.encoder.server.listen, messages.send)


@dataclass(frozen=True)
class _Prepared(LocalEncoders):
    """Encoders that have the answer already."""

    answer: torch.Tensor

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        return self.answer[: len(images)]


def prepared_answer(shape: tuple[int, int, int, int]) -> torch.Tensor:
    """bf16 [B,C,h,w], the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def serve_prepared(
    shape: tuple[int, int, int, int], config: RunConfig, messages: Connection
) -> None:
    """A server whose encoders give `prepared_answer(shape)` at no cost."""
    from dsr_scale.encode_service import serving

    def prepared(config: RunConfig, device: torch.device) -> LocalEncoders:
        image = build_image_encoder(PixelsImage(), resolution=1, device=device)
        return _Prepared(config, device, image, None, prepared_answer(shape))

    serving.build_local = prepared
    serve(config, messages)


def send_raw(size: int, messages: Connection) -> None:
    """Tells its port, and sends `size` bytes for every byte it gets."""
    # Random, since the kernel has but one page for all that is zero and never written.
    content = os.urandom(size)
    with socket.create_server(("127.0.0.1", 0)) as server:
        messages.send(server.getsockname()[1])
        connection, _ = server.accept()
        with connection:
            while connection.recv(1):
                connection.sendall(content)
