"""Fills a latent cache: every sample encoded once, in units that survive anything.

Decoding runs on threads ahead of the encoders, writing on one thread behind them, and both run across
the borders of units, so that the device does not wait. Any number of processes fill one directory, each
its share of the units, one for each device; whoever finds all units there writes the index.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch

from dsr_scale.base.atomic_files import require_writable_directory, storage_errors, write_bytes
from dsr_scale.base.errors import InputError
from dsr_scale.config.encoder_checks import changing_view_problems
from dsr_scale.config.problems import raise_problems
from dsr_scale.config.run import AnyRun
from dsr_scale.data.file_locks import locked
from dsr_scale.data.loader import open_samples
from dsr_scale.data.manifest import write_sizes
from dsr_scale.data.samples import Samples, UnusableRecord
from dsr_scale.data.shares import WHOLE, Share
from dsr_scale.encode_service.cache_format import (
    COUNTS_NAME,
    INDEX_NAME,
    NULL_CAPTION_NAME,
    SIZES_NAME,
    CacheManifest,
    missing_units,
    planned_manifest,
    read_manifest,
    unit_name,
    write_manifest,
)
from dsr_scale.encode_service.cache_shards import CacheShards
from dsr_scale.encode_service.contract import expected
from dsr_scale.encode_service.fill_unit import (
    LOCKS_NAME,
    TEMPORARY_PREFIX,
    Decoded,
    UnitWriter,
    decode,
    encode,
)
from dsr_scale.encode_service.local import LocalEncoders, build_local

BATCH_IMAGES = 32
"""Images that are decoded, encoded and written together."""
_WRITES_AHEAD = 2
_PROBED_SAMPLES = 16
_CLAIM_LOCK = ".claim.lock"


@dataclass(frozen=True)
class FillProgress:
    """Told to the callback after every batch."""

    images_done: int
    """By this call."""
    images: int
    """That this call has to do, fewer when another process does some."""


@dataclass(frozen=True)
class FillReport:
    """How a call ended."""

    images: int
    """Encoded by this call."""
    missing_units: int
    """Left to other shares; 0 means that the cache is complete."""
    counts: dict[str, int]
    """Of the complete cache: samples, unusable, captions, tokens, bytes; else empty."""


def fill(
    run: AnyRun,
    out: Path,
    *,
    device: torch.device,
    share: Share = WHOLE,
    decode_threads: int = 4,
    progress: Callable[[FillProgress], None] | None = None,
) -> FillReport:
    """Encodes this share of `run.data`, every `share.of`-th unit, into `out`, continuing what is there.

    The result is the same for any shares and interruptions. Raises InputError for random crops and
    buckets, for an `out` that was filled from other data or by other encoders, or holds something
    else, and for too little room.
    """
    raise_problems("the run", list(changing_view_problems(run)))
    samples = open_samples(run.data)
    planned = planned_manifest(run, samples, expected(run))
    require_writable_directory(out)
    if (known := read_manifest(out)) is not None:
        _refuse_others(known, planned, out)
    missing = missing_units(out, planned)
    images = 0
    if missing or known is None:
        encoders = build_local(run, device)
        manifest = _claim(out, planned_manifest(run, samples, encoders.contract), samples, encoders)
        _require_room(out, manifest, missing, samples, encoders)
        mine = [unit for unit in missing if unit % share.of == share.index]
        pipeline = _Pipeline(run, out, samples, encoders, manifest.mirrored, decode_threads)
        images = pipeline.run_units(mine, progress)
    return _finish(out, images)


class _Batch(NamedTuple):
    writer: UnitWriter
    ids: range
    is_last: bool
    """Of its unit."""


class _Pipeline:
    """Decoding threads → encoders → a writing thread."""

    def __init__(
        self,
        run: AnyRun,
        out: Path,
        samples: Samples,
        encoders: LocalEncoders,
        mirrored: bool,
        decode_threads: int,
    ) -> None:
        self._data = run.data
        self._out = out
        self._samples = samples
        self._encoders = encoders
        self._mirrored = mirrored
        self._decode_threads = decode_threads
        self._starts = np.concatenate([[0], np.cumsum(samples.shard_sizes)]).tolist()
        self._unfinished: list[UnitWriter] = []

    def run_units(
        self, units: Sequence[int], progress: Callable[[FillProgress], None] | None
    ) -> int:
        """Encodes those that nobody else has; returns how many images that were."""
        total = sum(self._starts[unit + 1] - self._starts[unit] for unit in units)
        done = 0
        writes: deque[Future[None]] = deque()
        with (
            ThreadPoolExecutor(self._decode_threads, "decode") as decoders,
            ThreadPoolExecutor(1, "write") as writing,
        ):
            try:
                for batch, decoded in self._decoded(units, decoders):
                    rows = encode(self._encoders, decoded, mirrored=self._mirrored)
                    writes.append(writing.submit(batch.writer.write, rows))
                    if batch.is_last:
                        writes.append(writing.submit(self._finish_unit, batch.writer))
                    while len(writes) > _WRITES_AHEAD:
                        writes.popleft().result()
                    done += len(rows)
                    if progress is not None:
                        progress(FillProgress(done, total))
                while writes:
                    writes.popleft().result()
            finally:
                for pool in (decoders, writing):
                    pool.shutdown(cancel_futures=True)
                for writer in self._unfinished:
                    writer.abandon()
        return done

    def _decoded(
        self, units: Sequence[int], decoders: ThreadPoolExecutor
    ) -> Iterator[tuple[_Batch, list[Decoded]]]:
        """Batches in order, with one per thread and two more under way."""
        reading = Lock()
        waiting: deque[tuple[_Batch, Future[list[Decoded]]]] = deque()
        for batch in self._batches(units):
            future = decoders.submit(decode, self._samples, batch.ids, self._data, reading)
            waiting.append((batch, future))
            if len(waiting) > self._decode_threads + 2:
                ready, decoded = waiting.popleft()
                yield ready, decoded.result()
        for ready, decoded in waiting:
            yield ready, decoded.result()

    def _batches(self, units: Sequence[int]) -> Iterator[_Batch]:
        for unit in units:
            writer = UnitWriter.open(self._out, unit)
            if writer is None:
                continue
            self._unfinished.append(writer)
            first, end = self._starts[unit], self._starts[unit + 1]
            for start in range(first, end, BATCH_IMAGES):
                stop = min(start + BATCH_IMAGES, end)
                yield _Batch(writer, range(start, stop), stop == end)

    def _finish_unit(self, writer: UnitWriter) -> None:
        writer.finish()
        self._unfinished.remove(writer)


def _claim(
    out: Path, planned: CacheManifest, samples: Samples, encoders: LocalEncoders
) -> CacheManifest:
    """The manifest that is in force: `planned` in an empty directory, else what is there."""
    with locked(out / _CLAIM_LOCK):
        known = read_manifest(out)
        if known is not None:
            _refuse_others(known, planned, out)
            return known
        ours = {_CLAIM_LOCK, SIZES_NAME, NULL_CAPTION_NAME}
        foreign = sorted(path.name for path in out.iterdir() if path.name not in ours)
        if foreign:
            raise InputError(
                found=f"{out} holds other files: {', '.join(foreign[:10])}",
                required="an empty directory, or a cache of the same data and encoders",
                remedy="choose another directory",
            )
        write_sizes(out / SIZES_NAME, np.asarray(samples.sizes))
        if encoders.text is not None:
            from safetensors.torch import save

            with torch.inference_mode():
                null = encoders.text.encode([""])
            content = save({"tokens": null.tokens.cpu(), "mask": null.mask.cpu()})
            write_bytes(out / NULL_CAPTION_NAME, content)
        write_manifest(out, planned)
        return planned


def _refuse_others(known: CacheManifest, planned: CacheManifest, out: Path) -> None:
    lacking = known.lacks(planned)
    if lacking:
        raise InputError(
            found=f"{out} is a cache of something else: " + "; ".join(lacking),
            required="an empty directory, or a cache of the same data and encoders",
            remedy="correct the settings that differ, or choose another directory",
        )


def _require_room(
    out: Path,
    manifest: CacheManifest,
    missing: Sequence[int],
    samples: Samples,
    encoders: LocalEncoders,
) -> None:
    """Raises InputError unless the missing units of all shares fit, by what a few samples need."""
    views = 2 if manifest.mirrored else 1
    per_image = views * manifest.latent_bytes + _probed_text_bytes(samples, manifest, encoders)
    images = sum(manifest.shard_sizes[unit] for unit in missing)
    free = shutil.disk_usage(out).free
    if images * per_image > free:
        raise InputError(
            found=f"{free / 2**30:.1f} GiB free at {out}",
            required=f"about {images * per_image / 2**30:.1f} GiB: {images} images of "
            f"{per_image / 2**10:.0f} KiB ({views} × {manifest.latent_bytes / 2**10:.0f} KiB of "
            "latents, the rest captions)",
            remedy="choose another directory, cache a part with data.max_samples, or store less: "
            "encoders.latent_dtype=bf16 halves fp32, data.horizontal_flip=0 drops mirrored latents",
        )


@torch.inference_mode()
def _probed_text_bytes(samples: Samples, manifest: CacheManifest, encoders: LocalEncoders) -> float:
    """Bytes per sample for captions, metadata and tokens, from a few spread over the data."""
    found = []
    count = min(_PROBED_SAMPLES, len(samples))
    for place in range(count):
        try:
            found.append(samples.read(place * len(samples) // count))
        except UnusableRecord:
            continue
    if not found:
        return 0.0
    captions = [caption.text for sample in found for caption in sample.captions]
    total = sum(len(json.dumps(sample.metadata)) for sample in found)
    total += sum(len(caption.encode("utf-8", "replace")) for caption in captions)
    if encoders.text is not None and captions:
        total += int(encoders.text.encode(captions).mask.sum()) * manifest.token_bytes
    return total / len(found)


def _finish(out: Path, images: int) -> FillReport:
    """Writes counts and the joined index if all units are there. Raises InputError for cut shards."""
    manifest = read_manifest(out)
    assert manifest is not None
    missing = missing_units(out, manifest)
    if missing:
        return FillReport(images, len(missing), {})
    if not images and (out / INDEX_NAME).is_file() and manifest.counts is not None:
        CacheShards(out).require_whole()
        return FillReport(0, 0, dict(manifest.counts))
    counts: Counter[str] = Counter()
    shards = []
    for unit, size in enumerate(manifest.shard_sizes):
        if not size:
            continue
        directory = out / unit_name(unit)
        counts.update(json.loads((directory / COUNTS_NAME).read_text()))
        for shard in json.loads((directory / INDEX_NAME).read_text())["shards"]:
            shard["raw_data"]["basename"] = f"{directory.name}/{shard['raw_data']['basename']}"
            shards.append(shard)
    with storage_errors(out):
        write_manifest(out, replace(manifest, counts=dict(counts)))
        # Compact: one entry per shard, hundred thousands of them in a large cache.
        write_bytes(out / INDEX_NAME, json.dumps({"version": 2, "shards": shards}).encode())
        for left in out.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        (out / _CLAIM_LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (out / LOCKS_NAME).rmdir()
    CacheShards(out).require_whole()
    return FillReport(images, 0, dict(counts))
