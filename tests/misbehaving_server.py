"""A server that answers as told: late, not at all, cut short, with another's answer, or as someone else."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from fake_encoders import decoded

from dsr_scale.config.run import RunConfig
from dsr_scale.encode_service import wire
from dsr_scale.encode_service.contract import Contract
from dsr_scale.encode_service.local import build_local

Misbehaviour = Callable[[list[bytes]], Iterator[bytes]]
"""From the messages of the right answer to those that are sent."""


def right(answer: list[bytes]) -> Iterator[bytes]:
    yield from answer


def late(answer: list[bytes]) -> Iterator[bytes]:
    time.sleep(1)
    yield from answer


def stalling(answer: list[bytes]) -> Iterator[bytes]:
    yield answer[0]
    time.sleep(1)


def dropping(answer: list[bytes]) -> Iterator[bytes]:
    raise RuntimeError("out of memory")
    yield from answer


def truncating(answer: list[bytes]) -> Iterator[bytes]:
    yield from answer[:-1]
    yield answer[-1][:-7]


def reordering(answer: list[bytes]) -> Iterator[bytes]:
    yield answer[0]
    body = b"".join(answer[1:])
    yield body[len(body) // 2 :]
    yield body[: len(body) // 2]


def flipping(answer: list[bytes]) -> Iterator[bytes]:
    yield from answer[:-1]
    yield answer[-1][:-1] + bytes([answer[-1][-1] ^ 1])


def babbling(answer: list[bytes]) -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK"


def silent(answer: list[bytes]) -> Iterator[bytes]:
    yield from ()


def huge(answer: list[bytes]) -> Iterator[bytes]:
    yield (1 << 62).to_bytes(8, "little") + b"\0" * 16
    yield b"\0" * 1000


def fewer(answer: list[bytes]) -> Iterator[bytes]:
    """A sound message that answers another request: one row too few."""
    header, payload = wire.receive(answer, 1 << 30)
    rows, *rest = header["latents"]["shape"]
    size = len(payload) // rows
    header = {
        "contract": header["contract"],
        "latents": {**header["latents"], "shape": [rows - 1, *rest]},
    }
    yield from wire.chunks({**header, "failures": {}}, [payload[size:]])


def reshaping(answer: list[bytes]) -> Iterator[bytes]:
    """The right bytes as latents of another shape."""
    header, payload = wire.receive(answer, 1 << 30)
    rows, *sizes = header["latents"]["shape"]
    header["latents"]["shape"] = [rows, *reversed(sizes)]
    yield from wire.chunks(header, [payload])


def retyping(answer: list[bytes]) -> Iterator[bytes]:
    """As many latents in half precision, which is no precision of any run."""
    header, payload = wire.receive(answer, 1 << 30)
    size = 2 * math.prod(header["latents"]["shape"])
    header["latents"]["dtype"] = "fp16"
    yield from wire.chunks(header, [payload[:size], payload[2 * size :]])


def tiny(answer: list[bytes]) -> Iterator[bytes]:
    """Latents that another encoder would give."""
    header, payload = wire.receive(answer, 1 << 30)
    rows, *_ = header["latents"]["shape"]
    size = 4 * math.prod(header["latents"]["shape"])
    header["latents"]["shape"] = [rows, 7, 3, 5]
    yield from wire.chunks(header, [payload[: rows * 420], payload[size:]])


def mute(answer: list[bytes]) -> Iterator[bytes]:
    """Without the captions' tokens."""
    header, payload = wire.receive(answer, 1 << 30)
    size = 4 * math.prod(header["latents"]["shape"])
    kept = {name: header[name] for name in ("contract", "latents", "failures")}
    yield from wire.chunks(kept, [payload[:size]])


def padded(answer: list[bytes]) -> Iterator[bytes]:
    """Ids as a caption of more tokens than there is room for."""
    header, payload = wire.receive(answer, 1 << 30)
    ids = bytes(2 * 5000 * len(header["lengths"]))
    header["lengths"] = [5000] * len(header["lengths"])
    size = 4 * math.prod(header["latents"]["shape"])
    header["tokens"]["shape"] = [len(ids) // 2]
    yield from wire.chunks(header, [payload[:size], ids])


class Misbehaving:
    """What a test knows of one."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.asked = 0
        """Requests that arrived whole."""


@contextlib.contextmanager
def misbehaving(
    run: RunConfig, behave: Misbehaviour = right, *, lie: dict[str, str] | None = None
) -> Iterator[Misbehaving]:
    """A server of `run`; `lie` is what its description says against the truth."""
    import grpc

    encoders = build_local(run, torch.device("cpu"))
    described = Contract({**encoders.contract.values, **(lie or {})})
    lock = threading.Lock()

    def encode(messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        assert next(messages) == b""
        yield wire.CREDIT
        request = wire.EncodeRequest.receive(messages, 1 << 30)
        with lock:
            server.asked += 1
            pixels = decoded(list(request.rows), run, request.target)
            encoded = encoders.encode(pixels, [row.caption for row in request.rows])
        yield from behave(list(wire.reply_chunks(encoded, request.contract)))

    handlers = {
        wire.DESCRIBE: grpc.unary_unary_rpc_method_handler(lambda *_: described.to_json()),
        wire.ENCODE: grpc.stream_stream_rpc_method_handler(encode),
    }
    grpc_server = grpc.server(ThreadPoolExecutor(8))
    grpc_server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(wire.SERVICE, handlers),)
    )
    server = Misbehaving(f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}")
    grpc_server.start()
    try:
        yield server
    finally:
        grpc_server.stop(None)
