"""One server process: bind, load, warm up, announce, serve until told to stop, drain, leave.

It answers from the start, with NOT_SERVING and UNAVAILABLE, so that a client never hangs on a server
that is loading; it stands in the registry only while it can encode. On SIGTERM it leaves the registry,
lets the requests that have a credit finish, for a bounded time, and ends with status 0. If its device
breaks or hangs it ends at once with `BROKEN_DEVICE`, and whoever started it may start it anew.
"""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from dsr_scale.base.errors import InputError
from dsr_scale.config.run import AnyRun
from dsr_scale.encode_service import wire
from dsr_scale.encode_service.addresses import join_address, reachable_host, split_address
from dsr_scale.encode_service.batching import DeviceThread
from dsr_scale.encode_service.credentials import (
    MESSAGE_BYTES,
    Credentials,
    credentials_directory,
    ensure_credentials,
    is_guarded,
    server_credentials,
)
from dsr_scale.encode_service.local import build_local
from dsr_scale.encode_service.memory import keep_large_blocks
from dsr_scale.encode_service.metrics import ServerMetrics, metrics_page
from dsr_scale.encode_service.registry import announced, registry_directory
from dsr_scale.encode_service.server import MOST_CALLS, EncoderServicer, Loaded
from dsr_scale.encode_service.stored_latents import open_stored

BROKEN_DEVICE = 70
"""Exit status when the device cannot encode any more, or hangs."""

DRAIN_S = 20.0
"""How long requests that are inside may take to finish: Slurm kills 30 s after SIGTERM."""

LAST_WORDS_S = 0.5
"""For the errors of those that are not let in any more."""

_PR_SET_PDEATHSIG = 1

_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    # Two servers on one port would share its clients unseen.
    ("grpc.so_reuseport", 0),
    # Clients ping every 20 s to notice a dead machine; the default calls that abuse.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # The same the other way: connections of dead clients are given up.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]


@dataclass(frozen=True)
class Ready:
    """A server that can be asked."""

    address: str
    metrics_address: str
    fingerprint: str
    device: str


class Stop:
    """How a server is told to end, from any thread or signal handler of its process."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.status = 0

    def ask(self, status: int = 0) -> None:
        """Ends the server with `status`, after draining when that is 0; the first time counts."""

        def decide() -> None:
            if not self._asked.is_set():
                self.status = status
                self._asked.set()

        self._loop.call_soon_threadsafe(decide)

    async def wait(self) -> None:
        """Until somebody asked."""
        await self._asked.wait()


def run_server(
    run: AnyRun,
    device: torch.device,
    listen: str,
    tell: Callable[[Ready | InputError], Any],
    metrics_port: int = 0,
) -> None:
    """The whole life of a server process; ends it. `tell` gets what to show to the person.

    SIGTERM drains it, and so does the death of the process that started it; SIGINT is left to that one.
    """
    keep_large_blocks()
    parent = multiprocessing.parent_process()
    if parent is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent.pid:  # it died before prctl was called
            os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def life() -> int:
        stop = Stop()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.ask)
        return await serve(run, device, listen, tell, stop, metrics_port)

    try:
        status = asyncio.run(life())
    except InputError as error:
        tell(error)
        status = 2
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads inside a broken driver never end; nothing is left to be written.
    os._exit(status)


async def serve(
    run: AnyRun,
    device: torch.device,
    listen: str,
    ready: Callable[[Ready], Any],
    stop: Stop,
    metrics_port: int = 0,
) -> int:
    """Serves until `stop`; the exit status. Raises InputError for settings, files and addresses."""
    host, _ = split_address(listen)
    guarded = is_guarded(host, run)
    credentials = ensure_credentials(credentials_directory(run)) if guarded else None
    metrics = ServerMetrics(device, run.encoder.server.credits)
    servicer = EncoderServicer(run, credentials, metrics)
    checker = health.aio.HealthServicer()  # type: ignore[attr-defined]
    with ExitStack() as opened:
        opened.callback(servicer.close)
        page = metrics_page(host, metrics_port, metrics, lambda: servicer.serving)
        server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=MOST_CALLS)
        server.add_generic_rpc_handlers((servicer.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(checker, server)
        await _set_health(checker, serving=False)
        port = _bind(server, listen, credentials)
        page_port = opened.enter_context(page)
        await server.start()
        try:
            loaded = await _loaded(run, device, metrics, stop)
            if loaded is not None:
                opened.callback(loaded.device.close)
                servicer.loaded = loaded
                await _set_health(checker, serving=True)
                name = reachable_host(host, run.encoder.server.advertise)
                addresses = join_address(name, port), join_address(name, page_port)
                with announced(registry_directory(run), *addresses):
                    ready(Ready(*addresses, loaded.contract.fingerprint, str(device)))
                    await stop.wait()
            await _set_health(checker, serving=False)
            await servicer.drain(DRAIN_S if stop.status == 0 else 0.0)
        finally:
            await server.stop(LAST_WORDS_S)
    return stop.status


async def _loaded(
    run: AnyRun, device: torch.device, metrics: ServerMetrics, stop: Stop
) -> Loaded | None:
    """Encoders that have encoded an image; None when the server is to stop before."""
    # Not asyncio's own pool, which would be waited for at the end.
    pool = ThreadPoolExecutor(1, "load")
    loading = asyncio.get_running_loop().run_in_executor(pool, _load, run, device, metrics, stop)
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    pool.shutdown(wait=False)
    return loading.result() if loading.done() else None


def _load(run: AnyRun, device: torch.device, metrics: ServerMetrics, stop: Stop) -> Loaded:
    settings = run.encoder.server

    def broken(error: Exception) -> None:
        traceback.print_exception(error, file=sys.stderr)
        print(f"{device} cannot encode any more, the server ends", file=sys.stderr, flush=True)
        stop.ask(BROKEN_DEVICE)

    encoders = build_local(run, device)
    thread = DeviceThread(
        encoders, device, settings, metrics, broken, run.encoder.request_timeout_s
    )
    size = thread.start(run.data.resolution)
    stored = open_stored(settings, encoders.contract.fingerprint, size.dtype)
    return Loaded(encoders.contract, thread, size, stored)


def _bind(server: grpc.aio.Server, listen: str, credentials: Credentials | None) -> int:
    """The port. Raises InputError when it is taken, or not this machine's to listen on."""
    try:
        if credentials is None:
            return server.add_insecure_port(listen)
        return server.add_secure_port(listen, server_credentials(credentials))
    except RuntimeError as error:
        raise InputError(
            found=f"{listen} cannot be listened on",
            required="an address of this machine with a free port",
            remedy="stop what uses it, or set encoder.server.listen; port 0 takes a free one",
        ) from error


async def _set_health(checker: Any, *, serving: bool) -> None:
    status = health_pb2.HealthCheckResponse.ServingStatus
    for name in ("", wire.SERVICE):
        await checker.set(name, status.SERVING if serving else status.NOT_SERVING)
