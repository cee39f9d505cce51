"""Encodes one source shard into a unit of the cache, finished by a single rename.

A unit is written to a temporary directory, flushed and renamed to `unit-NNNNN`. What exists under that
name is complete, whatever happened before; that is the whole of resuming. A lock held while a unit is
written keeps other processes of the machine from the same unit, and tells abandoned directories.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch

from dsr_scale.base.atomic_files import rename, storage_errors
from dsr_scale.config.data import DataConfig
from dsr_scale.data.file_locks import locked_if_free
from dsr_scale.data.samples import Samples, UnusableRecord
from dsr_scale.data.streaming_parts import streaming_part
from dsr_scale.data.transforms import UnreadableImage, cover_and_crop, decode_rgb
from dsr_scale.encode_service.cache_format import COLUMNS, COUNTS_NAME, pack_row, unit_name
from dsr_scale.encode_service.local import LocalEncoders

LOCKS_NAME = ".locks"
TEMPORARY_PREFIX = ".filling-"
SHARD_BYTES = 256 << 20
"""A shard is held in memory while it is written; smaller ones make more files."""


class Decoded(NamedTuple):
    """A sample ready to be encoded."""

    about: dict[str, Any]
    pixels: np.ndarray | None
    """uint8 [3,H,W]; None for what cannot be used."""


class Packed(NamedTuple):
    """A row of the cache."""

    columns: dict[str, Any]
    usable: bool
    captions: int = 0
    tokens: int = 0


def decode(
    samples: Samples, sample_ids: Iterable[int], data: DataConfig, reading: Lock
) -> list[Decoded]:
    """Reads and decodes samples as training does. `reading` is held while `samples` is used."""
    target = (data.resolution, data.resolution)
    decoded = []
    for sample_id in sample_ids:
        pixels = None
        try:
            with reading:  # readers of shards are made for one thread
                sample = samples.read(sample_id)
        except UnusableRecord as error:
            about = {"key": error.key, "unusable": [error.reason, error.detail]}
            decoded.append(Decoded(about, None))
            continue
        about = {
            "key": sample.key,
            "captions": [
                {"text": c.text, "source": c.source, "weight": c.weight} for c in sample.captions
            ],
            "width": sample.width,
            "height": sample.height,
            "metadata": sample.metadata,
        }
        try:
            pixels = cover_and_crop(decode_rgb(sample.image, data.background, target), target)
        except UnreadableImage as error:
            about["undecodable"] = str(error)
        decoded.append(Decoded(about, pixels))
    return decoded


def encode(encoders: LocalEncoders, samples: Sequence[Decoded], *, mirrored: bool) -> list[Packed]:
    """Rows of the cache; those of unusable samples hold only why."""
    usable = [sample for sample in samples if sample.pixels is not None]
    rows = iter(_encode_usable(encoders, usable, mirrored) if usable else ())
    return [
        Packed(pack_row(sample.about), usable=False) if sample.pixels is None else next(rows)
        for sample in samples
    ]


def _encode_usable(
    encoders: LocalEncoders, samples: Sequence[Decoded], mirrored: bool
) -> Iterator[Packed]:
    pixels = torch.from_numpy(np.stack([np.asarray(sample.pixels) for sample in samples]))
    views = [_bytes_of(row) for row in encoders.latents(pixels)]
    flipped = [b""] * len(samples)
    if mirrored:
        flipped = [_bytes_of(row) for row in encoders.latents(pixels.flip(-1))]
    texts = _encode_captions(encoders, samples)
    for sample, latents, mirror, (counts, tokens) in zip(
        samples, views, flipped, texts, strict=True
    ):
        columns = pack_row(sample.about | {"token_counts": counts}, latents, mirror, tokens)
        yield Packed(columns, True, len(sample.about["captions"]), sum(counts))


@torch.inference_mode()
def _encode_captions(
    encoders: LocalEncoders, samples: Sequence[Decoded]
) -> list[tuple[list[int], list[bytes]]]:
    """For each sample, the number of tokens of its captions and the tokens themselves."""
    captions = [[caption["text"] for caption in sample.about["captions"]] for sample in samples]
    flat = [text for texts in captions for text in texts]
    if encoders.text is None or not flat:
        return [([], []) for _ in samples]
    encoded = encoders.text.encode(flat)
    counts = encoded.mask.sum(dim=1).tolist()
    positions = torch.arange(encoded.mask.shape[1], device=encoded.mask.device)
    assert torch.equal(encoded.mask, positions < encoded.mask.sum(dim=1, keepdim=True))
    tokens = encoded.tokens.cpu()
    if tokens.dtype == torch.int64:
        tokens = tokens.to(torch.int16)
    each = iter((count, _bytes_of(row[:count])) for row, count in zip(tokens, counts, strict=True))
    found = []
    for texts in captions:
        taken = [next(each) for _ in texts]
        found.append(([count for count, _ in taken], [content for _, content in taken]))
    return found


def _bytes_of(tensor: torch.Tensor) -> bytes:
    # numpy knows no bfloat16.
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class UnitWriter:
    """The directory of one unit while it is written. Ends with `finish` or `abandon`."""

    def __init__(self, out: Path, unit: int, lock: contextlib.ExitStack) -> None:
        self.unit = unit
        self._final = out / unit_name(unit)
        self._lock = lock
        prefix = f"{TEMPORARY_PREFIX}{unit_name(unit)}-"
        with storage_errors(out):
            for left in out.glob(f"{prefix}*"):
                shutil.rmtree(left, ignore_errors=True)
            self._directory = out / f"{prefix}{uuid.uuid4().hex[:12]}"
            self._directory.mkdir()
        self._counts = dict.fromkeys(("samples", "unusable", "captions", "tokens"), 0)
        self._writer: Any = streaming_part("format.mds.writer").MDSWriter(
            columns=COLUMNS, out=str(self._directory), hashes=["xxh3_64"], size_limit=SHARD_BYTES
        )

    @classmethod
    def open(cls, out: Path, unit: int) -> UnitWriter | None:
        """None when the unit is finished, or another process of this machine is at it."""
        if (out / unit_name(unit)).is_dir():
            return None
        (out / LOCKS_NAME).mkdir(exist_ok=True)
        lock = contextlib.ExitStack()
        mine = lock.enter_context(locked_if_free(out / LOCKS_NAME / unit_name(unit)))
        if not mine or (out / unit_name(unit)).is_dir():
            lock.close()
            return None
        return cls(out, unit, lock)

    def write(self, rows: Sequence[Packed]) -> None:
        """Adds samples. Raises InputError when the disk is full."""
        with storage_errors(self._final):
            for row in rows:
                self._writer.write(row.columns)
        self._counts["samples"] += len(rows)
        self._counts["unusable"] += sum(not row.usable for row in rows)
        self._counts["captions"] += sum(row.captions for row in rows)
        self._counts["tokens"] += sum(row.tokens for row in rows)

    def finish(self) -> None:
        """Flushes and names the unit; from here on it is never encoded again."""
        with storage_errors(self._final):
            self._writer.finish()
            files = list(self._directory.iterdir())
            counts = {**self._counts, "bytes": sum(path.stat().st_size for path in files)}
            (self._directory / COUNTS_NAME).write_text(json.dumps(counts))
            for path in [*self._directory.iterdir(), self._directory]:
                _flush_to_disk(path)
            try:
                rename(self._directory, self._final)
            except OSError:
                # Another machine, of which the lock knows nothing, was at the same unit.
                if not self._final.is_dir():
                    raise
        (self._final.parent / LOCKS_NAME / self._final.name).unlink(missing_ok=True)
        self.abandon()

    def abandon(self) -> None:
        """Removes what is not finished."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._lock.close()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
