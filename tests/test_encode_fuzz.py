"""Ten thousand damaged requests: each is refused or answered, nothing falls over, memory stays flat."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import xxhash
from fake_encoders import apart, ask, assert_same, encode, file_rows, running, tiny_run

from dsr_scale.data.encoded import Row
from dsr_scale.data.transforms import CENTRE
from dsr_scale.encode_service import wire
from dsr_scale.encode_service.batching import AnswerSize
from dsr_scale.encode_service.credentials import open_channel
from dsr_scale.encode_service.decoding import decode_rows
from dsr_scale.encode_service.metrics import resident_bytes
from dsr_scale.encode_service.server import Refused, refuse_oversized

MUTATIONS = 10_000
THROUGH_GRPC = 300
LIMIT_BYTES = 1 << 20
LARGEST_GROWTH_BYTES = 24 << 20

SIZE = AnswerSize(per_pixel=12.0, per_caption=512, dtype=torch.float32)
VALUES = (
    None,
    True,
    -1,
    0,
    3,
    8000,
    1 << 70,
    1e308,
    float("nan"),
    "x",
    "\ud800",
    [],
    {},
    [1, 2],
    "file",
)


def requests(contract: str) -> list[list[bytes]]:
    pixels = Row(-1, np.zeros((3, 16, 16), np.uint8), CENTRE, "blank")
    made = (
        wire.EncodeRequest(contract, (32, 32), tuple(file_rows(3))),
        wire.EncodeRequest(contract, (16, 16), (pixels, *file_rows(2))),
        wire.EncodeRequest(contract, (16, 16), (pixels,)),
    )
    return [list(request.chunks()) for request in made]


def sealed(body: bytes) -> list[bytes]:
    """A body with the preamble that belongs to it: gets past the checksum."""
    return [struct.pack("<Q16s", len(body), xxhash.xxh3_128_digest(body)), body]


def with_other_value(body: bytes, random: np.random.Generator) -> bytes:
    """One value somewhere in the header replaced, dropped or doubled."""
    (size,) = struct.unpack_from("<I", body)
    header = json.loads(body[4 : 4 + size])
    place = header
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = keys[random.integers(len(keys))]
        if isinstance(place[key], list) and place[key] and random.random() < 0.7:
            place = place[key]
            continue
        break
    match random.integers(3):
        case 0:
            place[key] = VALUES[random.integers(len(VALUES))]
        case 1:
            del place[key]
        case _ if isinstance(place, list):
            place.append(place[key])
    text = json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + body[4 + size :]


def mutated(valid: list[bytes], random: np.random.Generator) -> list[bytes]:
    """A damaged copy: bytes, chunks, length, or the content under a checksum that fits."""
    chunks = list(valid)
    body = bytearray(b"".join(chunks[1:]))
    match random.integers(6):
        case 0:  # some bytes of the message, checksum and all
            number = random.integers(len(chunks))
            chunk = bytearray(chunks[number])
            for place in random.integers(len(chunk), size=3):
                chunk[place] = random.integers(256)
            chunks[number] = bytes(chunk)
            return chunks
        case 1:  # chunks lost, doubled or in another order
            picked = random.integers(len(chunks), size=random.integers(len(chunks) + 2))
            return [chunks[number] for number in picked]
        case 2:  # another size announced
            size = int(random.integers(1 << 62)) >> int(random.integers(62))
            return [struct.pack("<Q16s", size, chunks[0][8:]), *chunks[1:]]
        case 3:  # some bytes of the content
            for place in random.integers(len(body), size=random.integers(1, 9)):
                body[place] = random.integers(256)
        case 4:  # the content cut or longer
            body = body[: random.integers(4, len(body))] + random.bytes(random.integers(9))
        case _:
            body = bytearray(with_other_value(bytes(body), random))
    return sealed(bytes(body))


def handled(messages: list[bytes]) -> str:
    """What becomes of a message up to the encoders, as the server does it."""
    try:
        request = wire.EncodeRequest.receive(iter(messages), LIMIT_BYTES)
        refuse_oversized(request, SIZE, LIMIT_BYTES)
    except wire.MalformedMessage:
        return "malformed"
    except Refused:
        return "refused"
    pixels = np.zeros((len(request.rows), 3, *request.target), np.uint8)
    failures = decode_rows(request.rows, range(len(request.rows)), pixels, (255, 255, 255))
    return "undecodable" if failures else "decoded"


def test_ten_thousand_damaged_messages_in_one_process() -> None:
    random = np.random.default_rng(0)
    valid = requests("c" * 32)
    assert {handled(messages) for messages in valid} == {"decoded"}
    ends: Counter[str] = Counter()
    settled = 0.0
    for number in range(MUTATIONS):
        if number == MUTATIONS // 5:
            settled = resident_bytes()
        ends[handled(mutated(valid[number % len(valid)], random))] += 1
    assert resident_bytes() - settled < LARGEST_GROWTH_BYTES
    # Every stage was reached, or the test would prove little.
    assert min(ends[end] for end in ("malformed", "undecodable", "decoded")) > 100, ends
    assert ends["refused"] > 0, ends


@apart
def test_damaged_messages_through_grpc(tmp_path: Path) -> None:
    import grpc

    run = tiny_run(tmp_path, "encoder.server.max_request_mib=1", "encoder.request_timeout_s=5")
    random = np.random.default_rng(1)
    with running(run) as server, open_channel(server.ready.address, run) as channel:
        valid = requests(server.ready.fingerprint)
        rows = tuple(file_rows(3))
        good = wire.EncodeRequest(server.ready.fingerprint, (32, 32), rows)
        expected = encode(channel, run, good)
        ends: Counter[str] = Counter()
        settled = 0.0
        for number in range(THROUGH_GRPC):
            if number == THROUGH_GRPC // 3:
                settled = resident_bytes()
            try:
                ask(channel, mutated(valid[number % len(valid)], random))
                ends["OK"] += 1
            except grpc.RpcError as error:
                ends[error.code().name] += 1  # type: ignore[attr-defined]
        assert set(ends) <= {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION"}, ends
        assert min(ends["OK"], ends["INVALID_ARGUMENT"]) > THROUGH_GRPC // 20, ends
        assert resident_bytes() - settled < LARGEST_GROWTH_BYTES
        assert server.value("credits_in_use") == 0
        assert_same(encode(channel, run, good), expected)
