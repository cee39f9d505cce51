"""What travels between a data worker and an encoder server, and how it is checked.

Bulk data goes as raw bytes in chunks of at most 4 MiB, never as protobuf fields, which copy it several
times (measured: 5 to 8 times slower). A message is

    size (8 bytes) | xxh3-128 of the body (16) | body = header size (4) | JSON header | payload

Nothing of a message is believed before it was checked: the size against a limit before memory is
taken, the checksum, then every number of the header against the payload that is there.

    Describe   "" → the server's contract as JSON
    Encode     client: empty hello → server: CREDIT → client: request → server: reply
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from dsr_scale.data.encoded import Encoded, Row
from dsr_scale.data.transforms import View
from dsr_scale.encode_service.answers import Expected, ExpectedTokens
from dsr_scale.encoders.text_bytes import PADDING_ID

PROTOCOL = 1
"""Raised when a message changes its meaning."""

SERVICE = "dsr_scale.Encoder"
DESCRIBE = "Describe"
ENCODE = "Encode"
TOKEN_METADATA = "authorization"
"""gRPC metadata key; its value is `Bearer TOKEN`."""

CREDIT = b"credit"
CHUNK_BYTES = 4 << 20
MOST_ROWS = 4096
LARGEST_SIDE = 16_384
"""Pixels; larger targets are refused before anything is allocated."""

_PREAMBLE = struct.Struct("<Q16s")
_HEADER = struct.Struct("<I")
_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int16": torch.int16,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class MalformedMessage(Exception):
    """A message that does not say what it should; its text names what is wrong."""


def chunks(header: dict[str, Any], payload: Sequence[Any]) -> Iterator[bytes]:
    """A message in pieces of at most `CHUNK_BYTES`; `payload` is a sequence of buffers."""
    text = json.dumps(header, separators=(",", ":")).encode()
    parts = [
        memoryview(_HEADER.pack(len(text)) + text),
        *(memoryview(p).cast("B") for p in payload),
    ]
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    yield _PREAMBLE.pack(sum(len(part) for part in parts), state.digest())
    for part in parts:
        for start in range(0, len(part), CHUNK_BYTES):
            yield bytes(part[start : start + CHUNK_BYTES])


def receive(messages: Iterable[bytes], limit_bytes: int) -> tuple[dict[str, Any], memoryview]:
    """Header and payload of one message. Raises MalformedMessage; reads no more than it needs."""
    source = iter(messages)
    preamble = next(source, b"")
    if len(preamble) != _PREAMBLE.size:
        raise MalformedMessage(f"a preamble of {len(preamble)} bytes instead of {_PREAMBLE.size}")
    size, checksum = _PREAMBLE.unpack(preamble)
    if not _HEADER.size <= size <= limit_bytes:
        raise MalformedMessage(f"{size} bytes announced, {limit_bytes} allowed")
    # A bytearray would be filled with zeros first.
    buffer: Any = np.empty(size, np.uint8)
    body = memoryview(buffer)
    filled = 0
    while filled < size:
        piece = next(source, None)
        if not piece:
            raise MalformedMessage(f"ends after {filled} of {size} bytes")
        if filled + len(piece) > size:
            raise MalformedMessage(f"more than the {size} bytes announced")
        body[filled : filled + len(piece)] = piece
        filled += len(piece)
    if xxhash.xxh3_128_digest(body) != checksum:
        raise MalformedMessage("the checksum does not fit the content")
    (header_size,) = _HEADER.unpack_from(body)
    end = _HEADER.size + header_size
    if end > size:
        raise MalformedMessage(f"a header of {header_size} bytes in a message of {size}")
    try:
        header = json.loads(bytes(body[_HEADER.size : end]))
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"no JSON header: {error}") from error
    if not isinstance(header, dict):
        raise MalformedMessage("the header is no JSON object")
    return header, body[end:]


@dataclass(frozen=True)
class EncodeRequest:
    """Rows to encode at one size, by a server of one contract."""

    contract: str
    """Fingerprint that the answering server must have."""
    target: tuple[int, int]
    """(height, width) in pixels."""
    rows: tuple[Row, ...]

    def chunks(self) -> Iterator[bytes]:
        """The request as a message."""
        images = [row.image for row in self.rows]
        header = {
            "contract": self.contract,
            "target": list(self.target),
            "images": [
                ["file", len(image)] if isinstance(image, bytes) else ["pixels", image.nbytes]
                for image in images
            ],
            "views": [[row.view.share_x, row.view.share_y, row.view.mirrored] for row in self.rows],
            "captions": [row.caption for row in self.rows],
        }
        return chunks(header, images)

    @classmethod
    def receive(cls, messages: Iterable[bytes], limit_bytes: int) -> EncodeRequest:
        """Reads and checks a request. Raises MalformedMessage."""
        header, payload = receive(messages, limit_bytes)
        try:
            return cls._checked(header, payload)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise MalformedMessage(f"a header that is no request: {error!r}") from error

    @classmethod
    def _checked(cls, header: dict[str, Any], payload: memoryview) -> EncodeRequest:
        height, width = (_integer(side, 1, LARGEST_SIDE) for side in header["target"])
        images, views, captions = header["images"], header["views"], header["captions"]
        if not 1 <= len(images) <= MOST_ROWS or not len(images) == len(views) == len(captions):
            raise MalformedMessage(
                f"{len(images)} images, {len(views)} views, {len(captions)} captions"
            )
        rows, start = [], 0
        for (kind, size), view, caption in zip(images, views, captions, strict=True):
            stop = start + _integer(size, 0, len(payload) - start)
            rows.append(
                Row(
                    -1,
                    _image(kind, payload[start:stop], height, width),
                    _view(*view),
                    _string(caption),
                )
            )
            start = stop
        if start != len(payload):
            raise MalformedMessage(f"{len(payload) - start} bytes of payload too many")
        return cls(_string(header["contract"]), (height, width), tuple(rows))


def reply_chunks(encoded: Encoded, contract: str) -> Iterator[bytes]:
    """An answer as a message; captions travel without their padding."""
    header: dict[str, Any] = {
        "contract": contract,
        "latents": _described(encoded.latents),
        "failures": {str(row): reason for row, reason in encoded.failures.items()},
    }
    payload = [_buffer(encoded.latents)]
    if encoded.tokens is not None and encoded.mask is not None:
        kept = encoded.tokens[encoded.mask]
        if kept.dtype == torch.int64:
            kept = kept.to(torch.int16)
        header["tokens"] = _described(kept)
        header["lengths"] = encoded.mask.sum(dim=1).tolist()
        payload.append(_buffer(kept))
    return chunks(header, payload)


def receive_reply(
    messages: Iterable[bytes], contract: str, rows: int, expected: Expected
) -> Encoded:
    """Reads and checks the answer to a request of `rows` rows.

    Raises MalformedMessage when it is damaged, of another contract or not what is `expected`.
    """
    header, payload = receive(messages, expected.most_bytes(rows))
    try:
        return _checked_reply(header, payload, contract, rows, expected)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise MalformedMessage(f"a header that is no answer: {error!r}") from error


def _checked_reply(
    header: dict[str, Any], payload: memoryview, contract: str, rows: int, expected: Expected
) -> Encoded:
    if header["contract"] != contract:
        raise MalformedMessage(f"an answer of contract {header['contract']}, asked was {contract}")
    latents, rest = _tensor(header["latents"], payload)
    _require(latents, (rows, *expected.latents), expected.latent_dtype, "latents")
    failures = {int(row): _string(reason) for row, reason in header["failures"].items()}
    if not all(0 <= row < rows for row in failures):
        raise MalformedMessage(f"failures of rows {sorted(failures)} among {rows}")
    if expected.tokens is None:
        if len(rest):
            raise MalformedMessage(f"{len(rest)} bytes of payload too many")
        return Encoded(latents, None, None, failures)
    tokens, mask = _checked_tokens(header, rest, rows, expected.tokens)
    return Encoded(latents, tokens, mask, failures)


def _checked_tokens(
    header: dict[str, Any], payload: memoryview, rows: int, expected: ExpectedTokens
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded tokens and mask."""
    kept, rest = _tensor(header["tokens"], payload)
    if len(rest):
        raise MalformedMessage(f"{len(rest)} bytes of payload too many")
    length = expected.length
    lengths = torch.tensor([_integer(n, 0, length) for n in header["lengths"]])
    if len(lengths) != rows:
        raise MalformedMessage(f"{len(lengths)} captions for {rows} rows")
    mask = torch.arange(length) < lengths[:, None]
    count = int(lengths.sum())
    if expected.channels is None:
        _require(kept, (count,), expected.dtype, "byte ids")
        kept = kept.to(torch.int64)
        tokens = torch.full((rows, length), PADDING_ID, dtype=torch.int64)
    else:
        _require(kept, (count, expected.channels), expected.dtype, "caption features")
        tokens = torch.zeros(rows, length, expected.channels, dtype=expected.dtype)
    tokens[mask] = kept
    return tokens, mask


def _require(got: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
    if got.shape != shape or got.dtype != dtype:
        raise MalformedMessage(
            f"{what} {list(got.shape)} in {_NAMES[got.dtype]}, "
            f"expected {list(shape)} in {_NAMES[dtype]}"
        )


def _image(kind: Any, content: memoryview, height: int, width: int) -> bytes | np.ndarray:
    if kind == "file":
        return bytes(content)
    if kind != "pixels" or len(content) != 3 * height * width:
        raise MalformedMessage(f"{len(content)} bytes of {kind!r} for {height}×{width} pixels")
    return np.frombuffer(content, dtype=np.uint8).reshape(3, height, width)


def _view(share_x: Any, share_y: Any, mirrored: Any) -> View:
    shares = (float(share_x), float(share_y))
    if not all(0 <= share <= 1 for share in shares):
        raise MalformedMessage(f"a view at {shares}, outside 0 to 1")
    return View(*shares, bool(mirrored))


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise MalformedMessage(f"{type(value).__name__} in place of text")
    return value


def _integer(value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise MalformedMessage(f"{value!r} in place of a number from {least} to {most}")
    return value


def _described(tensor: torch.Tensor) -> dict[str, Any]:
    return {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape)}


def _buffer(tensor: torch.Tensor) -> memoryview:
    # numpy knows no bfloat16.
    flat: Any = tensor.contiguous().view(torch.uint8).reshape(-1).numpy()
    return memoryview(flat)


def _tensor(description: dict[str, Any], payload: memoryview) -> tuple[torch.Tensor, memoryview]:
    """The tensor that the front of `payload` holds, without a copy, and what comes after it."""
    dtype = _DTYPES[description["dtype"]]
    shape = [_integer(size, 0, 1 << 32) for size in description["shape"]]
    size = dtype.itemsize * math.prod(shape)
    if size > len(payload):
        raise MalformedMessage(f"a tensor of {size} bytes in {len(payload)}")
    if size == 0:
        return torch.empty(shape, dtype=dtype), payload
    values = torch.frombuffer(payload[:size], dtype=torch.uint8)
    return values.view(dtype).reshape(shape), payload[size:]
