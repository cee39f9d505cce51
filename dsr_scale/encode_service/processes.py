"""One server process for each device, watched: what dies is started again, a few times.

A server that breaks takes nothing with it, clients ask the others meanwhile. An input error ends all
only from a server that has never been ready: then it is the person's to correct. One that has been was
started with the same settings, so what it meets now (a disk that is away) may pass. Processes are spawned, not
forked, since neither CUDA nor gRPC survives a fork.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.config.run import AnyRun
from dsr_scale.encode_service.addresses import is_loopback, join_address, split_address
from dsr_scale.encode_service.contract import expected
from dsr_scale.encode_service.credentials import (
    credentials_directory,
    ensure_credentials,
    is_guarded,
)
from dsr_scale.encode_service.registry import registry_directory
from dsr_scale.encode_service.serving import DRAIN_S, Ready, run_server

MOST_RESTARTS = 5
"""In a row; a server that lived `HEALTHY_S` begins anew."""
HEALTHY_S = 600.0
FIRST_BACKOFF_S = 1.0
_POLL_S = 0.2
_KILL_AFTER_S = DRAIN_S + 10.0


@dataclass(eq=False)
class _Place:
    """One device and the process that serves it."""

    device: torch.device
    listen: str
    metrics_port: int
    process: BaseProcess | None = None
    messages: Connection | None = None
    was_ready: bool = False
    started_s: float = 0.0
    restarts: int = 0
    start_at_s: float | None = 0.0
    """When to start a process where there is none; None for never."""


def check_before_start(run: AnyRun) -> list[torch.device]:
    """The devices to serve on. Raises InputError for what can be known before encoders are loaded."""
    settings = run.encoder.server
    host, _ = split_address(settings.listen)
    expected(run)
    devices = _devices(run)
    atomic_files.require_writable_directory(registry_directory(run))
    if is_guarded(host, run):
        ensure_credentials(credentials_directory(run))
    advertised = settings.advertise
    if advertised is not None and is_loopback(advertised) != is_loopback(host):
        raise InputError(
            found=f"encoder.server.advertise = {advertised} and listen = {settings.listen}",
            required="both on loopback or both beyond it: clients tell by the name whether to use TLS",
            remedy="advertise a name of this machine, or listen on 127.0.0.1",
        )
    rows, side = run.training.microbatch_images, run.data.resolution
    limit = settings.max_request_mib << 20
    if rows * 3 * side**2 > limit:
        raise InputError(
            found=f"a micro-batch of {rows} images of {side}×{side} pixels takes "
            f"{rows * 3 * side**2 / 2**20:.0f} MiB decoded",
            required=f"at most encoder.server.max_request_mib = {settings.max_request_mib}",
            remedy="raise encoder.server.max_request_mib, or lower training.microbatch_images",
        )
    return devices


class Servers:
    """All servers that one command starts."""

    def __init__(
        self,
        run: AnyRun,
        devices: Sequence[torch.device],
        *,
        ready: Callable[[Ready], None],
        say: Callable[[str], None],
    ) -> None:
        """`ready` hears of each server that can be asked, `say` of what died and what becomes of it."""
        host, port = split_address(run.encoder.server.listen)
        metrics_port = run.encoder.server.metrics_port
        self._run = run
        self._ready = ready
        self._say = say
        self._places = [
            _Place(
                device,
                join_address(host, port + number if port else 0),
                metrics_port + number if metrics_port else 0,
            )
            for number, device in enumerate(devices)
        ]
        self._signals: list[int] = []

    def watch(self) -> int:
        """Starts and restarts until a signal or until no server is left; the exit status.

        Raises InputError when a server meets one before it was ever ready.
        """
        try:
            with self._listening_to_signals():
                while not self._signals:
                    for place in self._places:
                        if place.start_at_s is not None and place.start_at_s <= time.monotonic():
                            self._start(place)
                    self._hear()
                    if not any(p.process or p.start_at_s is not None for p in self._places):
                        return 1
                return self._drain()
        finally:
            self._kill()

    def _start(self, place: _Place) -> None:
        context = multiprocessing.get_context("spawn")
        place.messages, theirs = context.Pipe(duplex=False)
        place.process = context.Process(
            target=_serve,
            args=(self._run, place.device, place.listen, theirs, place.metrics_port),
            daemon=True,
        )
        # Ctrl-C reaches the whole process group, but when to end is this process's decision.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        place.process.start()
        signal.signal(signal.SIGINT, handler)
        theirs.close()
        place.started_s = time.monotonic()
        place.start_at_s = None

    def _hear(self) -> None:
        """What servers tell, and deaths, for a moment."""
        pipes = {place.messages: place for place in self._places if place.messages is not None}
        for pipe in connection.wait(list(pipes), timeout=_POLL_S):
            place = pipes[pipe]  # type: ignore[index]
            assert place.messages is not None
            try:
                message = place.messages.recv()
            except EOFError:
                self._died(place)
                continue
            if not isinstance(message, InputError):
                place.was_ready = True
                self._ready(message)
            elif place.was_ready:
                self._say(f"server on {place.device} cannot start: {message.found}")
            else:
                raise message

    def _died(self, place: _Place) -> None:
        assert place.process is not None and place.messages is not None
        place.process.join()
        status = place.process.exitcode
        place.messages.close()
        place.process = place.messages = None
        if self._signals:
            return
        if time.monotonic() - place.started_s > HEALTHY_S:
            place.restarts = 0
        if place.restarts == MOST_RESTARTS:
            self._say(f"server on {place.device} ended with {status} once more, given up")
            return
        backoff_s = FIRST_BACKOFF_S * 2**place.restarts
        place.restarts += 1
        place.start_at_s = time.monotonic() + backoff_s
        self._say(f"server on {place.device} ended with {status}, started again in {backoff_s:g} s")

    def _drain(self) -> int:
        """Asks all to finish what they have; a second signal, or too long, kills them."""
        for place in self._places:
            if place.process is not None:
                place.process.terminate()
        asked, until_s = len(self._signals), time.monotonic() + _KILL_AFTER_S
        while any(place.process for place in self._places):
            if len(self._signals) > asked or time.monotonic() > until_s:
                return 1
            self._hear()
        return 0

    def _kill(self) -> None:
        for place in self._places:
            if place.process is not None:
                place.process.kill()
                place.process.join()

    @contextlib.contextmanager
    def _listening_to_signals(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = [signal.signal(n, lambda got, _: self._signals.append(got)) for n in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, previous, strict=True):
                signal.signal(number, handler)


def _serve(
    run: AnyRun, device: torch.device, listen: str, messages: Connection, metrics_port: int
) -> None:
    run_server(run, device, listen, messages.send, metrics_port)


def _devices(run: AnyRun) -> list[torch.device]:
    wanted, available = run.encoder.server.devices, torch.cuda.device_count()
    if run.training.device == "cpu" or (run.training.device == "auto" and available == 0):
        return [torch.device("cpu")] * (wanted or 1)
    if not 1 <= (wanted or available) <= available:
        raise InputError(
            found=f"{available} visible GPUs for encoder.server.devices = {wanted}",
            required="one GPU per server, or training.device=cpu",
            remedy="lower encoder.server.devices, check CUDA_VISIBLE_DEVICES, "
            "or set training.device=cpu",
        )
    return [torch.device("cuda", index) for index in range(wanted or available)]
