"""A server in a thread, encoders that wait or fail when told to, and calls by hand.

Tests that speak gRPC run in a process of their own (`apart`): once gRPC has been used in a process,
forking it may hang the child, and other tests fork.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import importlib
import io
import multiprocessing
import queue
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from tiny_runs import write_config

from dsr_scale.config.load import load_run
from dsr_scale.config.run import RunConfig
from dsr_scale.data.encoded import Encoded, Row
from dsr_scale.data.transforms import CENTRE, View, cover_and_crop, decode_rgb
from dsr_scale.encode_service import wire
from dsr_scale.encode_service.answers import expected_answer
from dsr_scale.encode_service.local import LocalEncoders, build_local

TIMEOUT_S = 20.0


@functools.cache
def _process() -> ProcessPoolExecutor:
    """One spawned process for all tests of a session that speak gRPC."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def apart(test: Callable[[Path], None]) -> Callable[[Path], None]:
    """Runs the test in that process."""

    @functools.wraps(test)
    def run(tmp_path: Path) -> None:
        _process().submit(_run_body, test.__module__, test.__name__, tmp_path).result(120)

    return run


def _run_body(module: str, name: str, tmp_path: Path) -> None:
    getattr(importlib.import_module(module), name).__wrapped__(tmp_path)


def tiny_run(folder: Path, *overrides: str) -> RunConfig:
    """Pixels of patch 8 and bytes, at 32 pixels."""
    return load_run(write_config(folder), list(overrides))


@dataclasses.dataclass
class HookedImages:
    """An image encoder that calls `before` with what it is asked to encode."""

    inner: Any
    before: Callable[[torch.Tensor], None]

    @property
    def network(self) -> torch.nn.Module | None:
        return self.inner.network

    @property
    def files_digest(self) -> str | None:
        return self.inner.files_digest

    @property
    def channels(self) -> int:
        return self.inner.channels

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.before(images)
        return self.inner.encode(images)


class Gate:
    """A hook that lets one image pass, the warm-up, then waits to be opened."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        """Images of each call."""
        self.arrived = threading.Semaphore(0)
        self._open = threading.Event()

    def __call__(self, images: torch.Tensor) -> None:
        self.seen.append(len(images))
        if len(self.seen) > 1:
            self.arrived.release()
            assert self._open.wait(TIMEOUT_S)

    def open(self) -> None:
        self._open.set()


class Server:
    """What a test knows of a server in a thread of this process."""

    def __init__(self) -> None:
        self.ready: Any = None
        self.stop: Any = None
        self.ended: Future[int] = Future()
        self.started = threading.Event()

    def metrics(self) -> dict[str, float]:
        """Every value of the metrics page, by name and labels."""
        text = self.page("metrics")
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    def page(self, name: str) -> str:
        url = f"http://{self.ready.metrics_address}/{name}"
        return urllib.request.urlopen(url, timeout=TIMEOUT_S).read().decode()

    def value(self, name: str) -> float:
        return self.metrics()[f"dsr_encoder_{name}"]

    def outcomes(self, name: str) -> float:
        return self.value(f'requests_total{{outcome="{name}"}}')


@contextlib.contextmanager
def running(
    run: RunConfig,
    *,
    hook: Callable[[torch.Tensor], None] | None = None,
    wait: bool = True,
    device: torch.device | str = "cpu",
) -> Iterator[Server]:
    """A server of `run` on `device`; `hook` hears of images before they are encoded."""
    from dsr_scale.encode_service import serving

    def build(run: RunConfig, device: torch.device) -> LocalEncoders:
        encoders = build_local(run, device)
        if hook is None:
            return encoders
        return dataclasses.replace(encoders, image=HookedImages(encoders.image, hook))

    server = Server()

    def ready(message: Any) -> None:
        server.ready = message
        server.started.set()

    async def life() -> int:
        server.stop = serving.Stop()
        listen = run.encoder.server.listen
        return await serving.serve(run, torch.device(device), listen, ready, server.stop)

    def work() -> None:
        try:
            server.ended.set_result(asyncio.run(life()))
        except BaseException as error:
            server.ended.set_exception(error)
        server.started.set()

    with mock.patch.object(serving, "build_local", build):
        thread = threading.Thread(target=work)
        thread.start()
        try:
            if wait:
                assert server.started.wait(TIMEOUT_S)
                if server.ended.done():
                    server.ended.result()
            yield server
        finally:
            if server.stop is not None and not server.ended.done():
                server.stop.ask()
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()


class Call:
    """An Encode call whose messages the test sends one by one."""

    def __init__(self, channel: Any, metadata: Any = (), timeout_s: float = TIMEOUT_S) -> None:
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method = channel.stream_stream(f"/{wire.SERVICE}/{wire.ENCODE}")
        self.replies = method(iter(self._messages.get, None), metadata=metadata, timeout=timeout_s)

    def send(self, messages: Iterable[bytes]) -> None:
        for message in messages:
            self._messages.put(message)

    def finish(self) -> None:
        self._messages.put(None)

    def credit(self) -> None:
        """Says hello and waits for the credit."""
        self.send([b""])
        assert next(self.replies) == wire.CREDIT

    def close(self) -> None:
        self.finish()
        self.replies.cancel()


def ask(channel: Any, messages: Iterable[bytes], metadata: Any = ()) -> list[bytes]:
    """All messages of the answer to a whole request. Raises grpc.RpcError."""
    call = Call(channel, metadata)
    try:
        call.credit()
        call.send(messages)
        call.finish()
        return list(call.replies)
    finally:
        call.close()


def encode(
    channel: Any, run: RunConfig, request: wire.EncodeRequest, metadata: Any = ()
) -> Encoded:
    """The answer of a server of `run` to `request`."""
    replies = ask(channel, request.chunks(), metadata)
    return wire.receive_reply(
        replies, request.contract, len(request.rows), expected_answer(run, request.target)
    )


def refusal(work: Callable[[], Any]) -> tuple[str, str]:
    """Name of the status and text with which `work` fails."""
    import grpc

    try:
        work()
    except grpc.RpcError as error:
        return error.code().name, error.details()  # type: ignore[attr-defined]
    raise AssertionError("the call did not fail")


def picture(number: int, format: str = "PNG", size: tuple[int, int] = (48, 40)) -> bytes:
    """An image file with random pixels; `size` is (width, height)."""
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format)
    return buffer.getvalue()


def file_rows(count: int, first: int = 0) -> list[Row]:
    """Pictures of several formats, each with another view."""
    rows = []
    for number in range(first, first + count):
        share = np.random.default_rng(number).random(2).tolist()
        view = View(*share, mirrored=number % 2 == 1)
        data = picture(number, ("PNG", "JPEG", "WEBP")[number % 3])
        rows.append(Row(-1, data, view, f"caption {number}"))
    return rows


def decoded(rows: Sequence[Row], run: RunConfig, target: tuple[int, int]) -> torch.Tensor:
    """The pixels a trainer that encodes inline would have."""
    images = [
        row.image
        if isinstance(row.image, np.ndarray)
        else cover_and_crop(decode_rgb(row.image, run.data.background, target), target, row.view)
        for row in rows
    ]
    return torch.from_numpy(np.stack(images))


def as_pixels(rows: Sequence[Row], run: RunConfig, target: tuple[int, int]) -> list[Row]:
    """The same rows, decoded before they are sent."""
    pixels = decoded(rows, run, target).numpy()
    return [Row(-1, image, CENTRE, r.caption) for image, r in zip(pixels, rows, strict=True)]


def assert_same(served: Encoded, local: Encoded) -> None:
    """Bit for bit."""
    assert torch.equal(served.latents, local.latents)
    assert served.latents.dtype == local.latents.dtype
    assert (served.tokens is None) == (local.tokens is None)
    if served.tokens is not None and local.tokens is not None:
        assert torch.equal(served.tokens, local.tokens)
    if served.mask is not None and local.mask is not None:
        assert torch.equal(served.mask, local.mask)
