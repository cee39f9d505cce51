"""The encoder service against in-process encoding, a raw socket, plain PIL, and plain reads of a cache.

Four parts, each in processes of its own, with nothing but the service between what is compared:

    encode      image files → latents: client and server against one process that decodes and encodes
    transport   answers of a server whose encoders cost nothing, against sendall/recv_into of as much
    decode      a server's decoding on one thread, against open, convert, resize
    cache       rows of a filled cache, against preadv of the same bytes; both from the page cache

The server takes its clients' batches singly here (`batch_images` is their size): joined, two requests
would be decoded, encoded and answered together, and nothing would overlap.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from dsr_scale.data.encoded import Row
from dsr_scale.data.transforms import CENTRE
from dsr_scale.encode_service.cache import open_cache
from dsr_scale.encode_service.cache_format import COLUMNS, INDEX_NAME
from dsr_scale.encode_service.client import ServiceClient
from dsr_scale.encode_service.decoding import decode_rows
from dsr_scale.encode_service.fill import fill
from dsr_scale.encode_service.local import build_local
from dsr_scale.encode_service.memory import keep_large_blocks
from tools.bench.protocol import (
    Aim,
    Comparison,
    Report,
    Sample,
    Samples,
    Settings,
    Variant,
    compare,
    interleave,
    timed,
)
from tools.bench.random_vits import Geometry, encoding_run, save_vit, vit_settings
from tools.bench.ranks import in_own_process
from tools.bench.service_processes import (
    child,
    prepared_answer,
    send_raw,
    serve,
    serve_prepared,
    timed_with,
)

CPU = torch.device("cpu")
OVERHEAD_AIM, DECODE_AIM, DRAFT_AIM = Aim(high=1.1), Aim(low=0.85), Aim(low=3.0)
BYTES, IMAGES = "bytes_per_s", "images_per_s"
PIXELS = {"kind": "pixels", "patch": 16}
"""Latents of 768 channels, as large as SigLIP2-B's, that cost nothing."""

Part = tuple[Samples, dict[str, object]]


class Sizes(NamedTuple):
    """What is encoded, sent, decoded and read."""

    vit: Geometry | None
    """What encodes in `encode`; None is raw pixels, which need no library."""
    batch_images: int
    batches: int
    """Of a visit to either side of `encode`; even, for two clients share them."""
    answer: tuple[int, int, int, int]
    """[B,C,h,w] of an answer in `transport`, in bf16."""
    answers: int
    side: int
    """Pixels of the squares that are encoded, decoded and cached."""
    files: dict[int, int]
    """How many JPEGs of which side are decoded in a visit."""
    cached_images: int
    cached_batch: int


REAL = Sizes(
    # One wide block: latents of a usual size for the time that encoding them takes.
    vit=Geometry("one block", width=320, depth=1, heads=5, hidden=320, patch=16, side=256),
    batch_images=32,
    batches=4,
    answer=(64, 1152, 16, 16),
    answers=8,
    side=256,
    files={256: 128, 1024: 16},
    cached_images=256,
    cached_batch=64,
)
TINY = Sizes(
    vit=None,
    batch_images=2,
    batches=2,
    answer=(2, 8, 2, 2),
    answers=2,
    side=32,
    files={32: 2, 128: 2},
    cached_images=6,
    cached_batch=3,
)


def run(settings: Settings) -> Report:
    """All four parts, one after the other."""
    sizes = TINY if settings.tiny else REAL
    samples: Samples = {}
    facts: dict[str, object] = dict(sizes._asdict())
    for part in (encode, transport, decode, cache):
        measured, found = in_own_process(part, sizes, settings)
        samples |= measured
        facts |= found
    return Report(compare(samples, _comparisons(sizes)), samples, facts)


def _comparisons(sizes: Sizes) -> list[Comparison]:
    here, wire, read = (_names(each) for each in ("in process", "raw socket", "raw read"))
    found = [
        Comparison(f"service, {clients} under way", metric, f"{clients} under way", *here, aim)
        for metric, aim in (("wall_s", OVERHEAD_AIM), ("cpu_s", OVERHEAD_AIM))
        for clients in ("one", "two")
    ]
    found += [Comparison("transport", metric, "transport", *wire) for metric in (BYTES, "cpu_s")]
    for side, aim in zip(sizes.files, (DECODE_AIM, DRAFT_AIM), strict=True):
        plain = _names(f"plain PIL, {side} px")
        found.append(Comparison(f"decode {side} px", IMAGES, f"decode {side} px", *plain, aim))
    found += [Comparison("cache", metric, "cache", *read) for metric in (BYTES, "cpu_s")]
    return found


def _names(reference: str) -> tuple[str, tuple[str, str]]:
    """A reference, and the twins of its A/A row."""
    return reference, (f"{reference} again", reference)


def encode(sizes: Sizes, settings: Settings) -> Part:
    """Batches of image files to latents, here and by a server."""
    torch.set_num_threads(1)
    keep_large_blocks()
    side, rows, image = sizes.side, sizes.batch_images, PIXELS
    if sizes.vit is not None:
        directory = settings.scratch / "vit"
        save_vit(directory, sizes.vit)
        image = vit_settings(directory, sizes.vit, chunk_images=rows)
    access = {"mode": "service", "server": {"batch_images": rows}}
    config = encoding_run(settings.scratch, image, side, encoder=access)
    local = build_local(config, CPU)
    files = [photo(side, number) for number in range(rows)]
    batches = [[Row(-1, file, CENTRE, "") for file in files]] * sizes.batches

    def here(batch: Sequence[Row]) -> torch.Tensor:
        pixels = np.zeros((rows, 3, side, side), dtype=np.uint8)
        failures = decode_rows(batch, range(rows), pixels, config.data.background)
        assert not failures
        return local.latents(torch.from_numpy(pixels))

    with child(serve, config) as (_, clock), ThreadPoolExecutor(2) as threads:
        contract = ServiceClient(config).agree()
        clients = [ServiceClient(config).bound_to(contract) for _ in range(2)]

        def asked(clients: Sequence[ServiceClient]) -> None:
            def work(number: int) -> None:
                for batch in batches[number :: len(clients)]:
                    clients[number].encode(batch, (side, side))

            list(threads.map(work, range(len(clients))))

        latents = clients[0].encode(batches[0], (side, side)).latents
        assert torch.equal(latents, here(batches[0]))
        in_process = partial(timed, lambda: [here(batch) for batch in batches])
        variants: dict[str, Variant] = {
            "in process": in_process,
            "in process again": in_process,
            "one under way": lambda: timed_with(clock, lambda: asked(clients[:1])),
            "two under way": lambda: timed_with(clock, lambda: asked(clients)),
        }
        samples = interleave(variants, settings.rounds)
    pixels = torch.zeros(rows, 3, side, side, dtype=torch.uint8)
    seconds = [timed(lambda: local.latents(pixels))["wall_s"] for _ in range(3)]
    encoding_ms = 1000 * statistics.median(seconds) / rows
    return samples, {"encoding alone, ms per image": round(encoding_ms, 2)}


def transport(sizes: Sizes, settings: Settings) -> Part:
    """Answers that a server has ready, through servicer and client, and through a plain socket."""
    keep_large_blocks()
    # A pixel for a latent: a request is small beside its answer.
    count, channels, *target = sizes.answer
    rows = [Row(-1, np.zeros((3, *target), dtype=np.uint8), CENTRE, "") for _ in range(count)]
    image = {"kind": "vit", "model": "prepared", "channels": channels, "patch": 1}
    image["input_size"] = side = target[0]
    config = encoding_run(settings.scratch, image, side, encoder={"mode": "service"})
    size = prepared_answer(sizes.answer).nbytes
    buffer = memoryview(bytearray(size))
    serving = child(partial(serve_prepared, sizes.answer), config)
    with serving as (_, clock), child(send_raw, size) as (port, raw_clock):
        client = ServiceClient(config)
        client = client.bound_to(client.agree())
        assert torch.equal(client.encode(rows, (side, side)).latents, prepared_answer(sizes.answer))
        with socket.create_connection(("127.0.0.1", port)) as connection:

            def receive() -> None:
                for _ in range(sizes.answers):
                    connection.sendall(b"?")
                    filled = 0
                    while filled < size:
                        filled += connection.recv_into(buffer[filled:])

            def ask() -> None:
                for _ in range(sizes.answers):
                    client.encode(rows, (side, side))

            raw = _rated(BYTES, sizes.answers * size, lambda: timed_with(raw_clock, receive))
            ours = _rated(BYTES, sizes.answers * size, lambda: timed_with(clock, ask))
            variants = {"raw socket": raw, "raw socket again": raw, "transport": ours}
            return interleave(variants, settings.rounds), {"bytes of an answer": size}


def decode(sizes: Sizes, settings: Settings) -> Part:
    """JPEGs to squares of the training size, as the server does it and with PIL alone."""
    samples: Samples = {}
    facts: dict[str, object] = {}
    size = (sizes.side, sizes.side)
    for side, count in sizes.files.items():
        files = [photo(side, number) for number in range(count)]
        rows = [Row(-1, file, CENTRE, "") for file in files]
        pixels = np.zeros((count, 3, *size), dtype=np.uint8)

        def plain(files: Sequence[bytes] = files) -> None:
            for file in files:
                picture = Image.open(io.BytesIO(file)).convert("RGB")
                np.asarray(picture.resize(size, Image.Resampling.BICUBIC))

        def ours(rows: Sequence[Row] = rows, pixels: np.ndarray = pixels) -> None:
            failures = decode_rows(rows, range(len(rows)), pixels, (255, 255, 255))
            assert not failures

        reference, (again, _) = _names(f"plain PIL, {side} px")
        visits = {reference: plain, again: plain, f"decode {side} px": ours}
        variants = {
            name: _rated(IMAGES, count, partial(timed, visit)) for name, visit in visits.items()
        }
        samples |= interleave(variants, settings.rounds)
        facts[f"bytes of a JPEG of {side} px"] = round(statistics.mean(map(len, files)))
    return samples, facts


def cache(sizes: Sizes, settings: Settings) -> Part:
    """Latents of all samples in an order without pattern, from a cache of raw pixels."""
    torch.set_num_threads(1)
    keep_large_blocks()
    directory = settings.scratch / "cache"
    config = encoding_run(
        settings.scratch,
        PIXELS,
        sizes.side,
        data={"max_samples": sizes.cached_images, "horizontal_flip": 0.0},
        encoder={"mode": "cache", "cache": str(directory)},
    )
    fill(config, directory, device=CPU, decode_threads=1)
    encoder = open_cache(config)[1]
    order = np.random.default_rng(0).permutation(sizes.cached_images).tolist()
    steps = range(0, len(order), sizes.cached_batch)
    batches = [order[first : first + sizes.cached_batch] for first in steps]
    target = (sizes.side, sizes.side)

    def ours(batch: Sequence[int]) -> torch.Tensor:
        return encoder.encode([Row(each, b"", CENTRE, "") for each in batch], target).latents

    with contextlib.ExitStack() as files:
        places = latent_places(directory, files)
        size = places[0].size
        buffer = np.zeros((sizes.cached_batch, size), dtype=np.uint8)

        def plain(batch: Sequence[int]) -> None:
            for row, sample in zip(buffer, batch, strict=False):
                place = places[sample]
                read = os.preadv(place.file, [memoryview(row)], place.begin)
                assert read == size

        for batch in batches:
            plain(batch)
            found: Any = ours(batch).view(torch.uint8).reshape(len(batch), -1).numpy()
            assert np.array_equal(found, buffer[: len(batch)])
        volume = size * len(order)
        raw = _rated(BYTES, volume, partial(timed, lambda: [plain(each) for each in batches]))
        rows = _rated(BYTES, volume, partial(timed, lambda: [ours(each) for each in batches]))
        variants = {"raw read": raw, "raw read again": raw, "cache": rows}
        return interleave(variants, settings.rounds), {"bytes of cached latents": size}


class Place(NamedTuple):
    """Where the latents of one sample are."""

    file: int
    """Descriptor."""
    begin: int
    size: int


def latent_places(directory: Path, files: contextlib.ExitStack) -> list[Place]:
    """By the layout of MDS: a table of samples, and in each the sizes of its columns before them."""
    found = []
    for shard in json.loads((directory / INDEX_NAME).read_text())["shards"]:
        path = directory / shard["raw_data"]["basename"]
        content = np.memmap(path, dtype=np.uint8, mode="r")
        file = files.enter_context(path.open("rb", buffering=0)).fileno()
        table = content[4 : 4 * (shard["samples"] + 1)].view(np.uint32)
        for begin in table.tolist():
            columns = content[begin : begin + 4 * len(COLUMNS)].tobytes()
            lengths = dict(zip(COLUMNS, np.frombuffer(columns, dtype=np.uint32), strict=True))
            before = len(columns) + int(lengths["about"]) + int(lengths["checksums"])
            found.append(Place(file, begin + before, int(lengths["latents"])))
    return found


def photo(side: int, seed: int) -> bytes:
    """A square JPEG of smooth colours with a little grain, so that its size is that of a photograph."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (max(side // 16, 2), max(side // 16, 2), 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    grain = random.normal(0, 4, (side, side, 3))
    pixels = np.clip(np.asarray(smooth) + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _rated(metric: str, amount: int, visit: Variant) -> Variant:
    def rated() -> Sample:
        sample = visit()
        return {**sample, metric: amount / sample["wall_s"]}

    return rated
