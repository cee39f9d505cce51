"""Packs one unit of a source into MDS shards, finished by a single rename.

A unit is written to a temporary directory with all that is needed later (sizes, digests, counts,
dropped keys) and then renamed to `part-NNNNN`. What exists under that name is complete, whatever
happened before; that is the whole of resuming.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dsr_scale.base.atomic_files import storage_errors
from dsr_scale.data.rows import BAD_METADATA
from dsr_scale.data.samples import COLUMNS, Sample, digest, to_columns
from dsr_scale.data.sources import (
    Dropped,
    RawSample,
    Source,
    SourceOptions,
    Unit,
    source_errors,
)
from dsr_scale.data.streaming_parts import streaming_part
from dsr_scale.data.transforms import UnreadableImage, reencode_image, verified_size

TEMPORARY_PREFIX = ".packing-"
COUNTS_NAME = "counts.json"
DIGESTS_NAME = "digests.bin"
UNIT_SIZES_NAME = "sizes.npy"
UNIT_DROPPED_NAME = "dropped.jsonl"
SHARD_HASH = "xxh3_64"


@dataclass(frozen=True)
class Reencode:
    """Store images anew instead of as they are. Opaque JPEG, or WebP that keeps transparency."""

    format: Literal["jpeg", "webp"] = "jpeg"
    quality: int = 90
    alpha_quality: int = 100
    """WebP only; below 100 the transparency is stored with loss."""
    max_side: int | None = None
    """Larger images are scaled down so that their longer side is this many pixels."""


@dataclass(frozen=True)
class PackOptions:
    """What is packed and how. All but `workers` shape the result."""

    source: SourceOptions = field(default_factory=SourceOptions)
    require_caption: bool = True
    """Drop samples without any caption; False keeps them (class-conditional data)."""
    allow_missing: bool = False
    """Count captions whose image does not exist as dropped instead of refusing the source."""
    min_side: int = 1
    """Images with a shorter side, in pixels, are dropped."""
    reencode: Reencode | None = None
    shard_mib: float = 64.0
    source_name: str | None = None
    """Written into the manifest in place of the source's path."""
    workers: int = 1
    """Processes."""


def part_name(number: int) -> str:
    """The directory of unit `number`."""
    return f"part-{number:05d}"


def pack_unit(source: Source, unit: Unit, number: int, out: Path, options: PackOptions) -> int:
    """Packs unit `number` to `out/part-NNNNN`; returns how many samples it read.

    Raises `InputError` when the disk is full, or the source or `out` may not be used; nothing
    half-written stays.
    """
    temporary = out / f"{TEMPORARY_PREFIX}{part_name(number)}-{os.getpid()}"
    with storage_errors(out):
        temporary.mkdir()
    try:
        with source_errors():
            read = _write_part(source.read(unit), temporary, options)
        with storage_errors(out):
            _flush_to_disk(temporary)
            temporary.rename(out / part_name(number))
        return read
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_part(
    samples: Iterator[RawSample | Dropped], directory: Path, options: PackOptions
) -> int:
    writer: Any = None
    sizes, digests, dropped = [], [], []
    short_sides: Counter[int] = Counter()
    caption_lengths: Counter[int] = Counter()
    for raw in samples:
        sample = raw if isinstance(raw, Dropped) else _accept(raw, options)
        if isinstance(sample, Dropped):
            dropped.append(sample)
            continue
        try:
            digests.append(digest(sample))
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            dropped.append(Dropped(sample.key, BAD_METADATA, f"no Unicode text ({error})"))
            continue
        with storage_errors(directory):
            writer = writer or _open_writer(directory, options)
            writer.write(to_columns(sample))
        sizes.append((sample.height, sample.width))
        short_sides[min(sizes[-1])] += 1
        caption_lengths.update(len(caption.text) for caption in sample.captions)
    with storage_errors(directory):
        if writer is not None:
            writer.finish()
        buffer = io.BytesIO()
        np.save(buffer, np.array(sizes, dtype=np.uint32).reshape(-1, 2))
        (directory / UNIT_SIZES_NAME).write_bytes(buffer.getvalue())
        (directory / DIGESTS_NAME).write_bytes(b"".join(digests))
        lines = "".join(json.dumps(asdict(each)) + "\n" for each in dropped)
        (directory / UNIT_DROPPED_NAME).write_text(lines)
        counts = {
            "kept": len(digests),
            "dropped": dict(Counter(each.reason for each in dropped)),
            "caption_characters": caption_lengths,
            "short_side_pixels": short_sides,
        }
        (directory / COUNTS_NAME).write_text(json.dumps(counts))
    return len(digests) + len(dropped)


def _accept(raw: RawSample, options: PackOptions) -> Sample | Dropped:
    if options.require_caption and not raw.captions:
        return Dropped(raw.key, "missing caption")
    image = raw.image
    try:
        height, width = verified_size(image)
        if min(height, width) < options.min_side:
            return Dropped(raw.key, "too small", f"{width}×{height} pixels")
        if (wanted := options.reencode) is not None:
            image, height, width = reencode_image(
                image,
                format=wanted.format,
                quality=wanted.quality,
                alpha_quality=wanted.alpha_quality,
                max_side=wanted.max_side,
            )
    except UnreadableImage as error:
        return Dropped(raw.key, "unreadable image", str(error))
    return Sample(image, raw.captions, width, height, raw.key, raw.metadata)


def _open_writer(directory: Path, options: PackOptions) -> Any:
    return streaming_part("format.mds.writer").MDSWriter(
        columns=COLUMNS,
        out=str(directory),
        hashes=[SHARD_HASH],
        size_limit=int(options.shard_mib * 2**20),
    )


def _flush_to_disk(directory: Path) -> None:
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
