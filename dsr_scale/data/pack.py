"""Packs image-caption sources into MDS shards: parallel, resumable, the same whatever happened.

The source is cut into units (`sources.py`), each packed by any process into its own directory and
finished by one rename (`pack_unit.py`). Run again after an interruption, only missing units are
packed. At the end the units' tables are joined in order and `manifest.json` is written: a pack
with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsr_scale.base.atomic_files import (
    require_writable_directory,
    storage_errors,
    write_bytes,
    write_json,
)
from dsr_scale.base.errors import InputError
from dsr_scale.data import pack_unit as unit_files
from dsr_scale.data.file_locks import locked
from dsr_scale.data.manifest import (
    DROPPED_NAME,
    INDEX_NAME,
    MANIFEST_NAME,
    SIZES_NAME,
    Manifest,
    fingerprint,
    parse_manifest,
    write_manifest,
    write_sizes,
)
from dsr_scale.data.pack_unit import PackOptions, pack_unit, part_name
from dsr_scale.data.samples import COLUMNS, SCHEMA_VERSION
from dsr_scale.data.sources import Source, Unit, name_some, open_source, source_errors
from dsr_scale.data.worker_processes import tie_to_parent

PLAN_NAME = ".plan.json"
_LOCK_NAME = ".lock"
_PERCENTILES = (5, 50, 95)
_DEFAULTS = PackOptions()
_OTHER = "another source, of files that changed since, or with other options"


@dataclass(frozen=True)
class PackProgress:
    """Told to the callback after every unit."""

    units_done: int
    units: int
    samples: int
    """Samples read by this call so far."""


@dataclass(frozen=True)
class PackReport:
    """What a finished pack holds. `dropped` counts by reason; each key is in `dropped.jsonl`."""

    kept: int
    dropped: dict[str, int]
    caption_characters: dict[str, float]
    short_side_pixels: dict[str, float]
    shards: int
    fingerprint: str


def pack(
    source: str,
    out: Path,
    options: PackOptions = _DEFAULTS,
    progress: Callable[[PackProgress], None] | None = None,
) -> PackReport:
    """Packs `source` into the directory `out`, continuing what an interrupted call left there.

    The result is the same for any number of workers and interruptions. Raises `InputError` for a
    missing, empty, changed or unreadable source, an `out` that holds something else, a full disk,
    and a source of which nothing could be kept.
    """
    with source_errors():
        opened = open_source(source, options.source)
    require_writable_directory(out)
    with locked(out / _LOCK_NAME, f"another process is packing into {out}"):
        with source_errors():
            described = _describe(source, opened, options)
        finished = _finished(out, described)
        if finished is not None:
            (out / _LOCK_NAME).unlink(missing_ok=True)
            return finished
        with source_errors():
            units = _complete_units(opened, options)
        _claim(out, {**described, "units": len(units)})
        _pack_units(opened, units, out, options, progress)
        report = _join(out, len(units), described)
        for number in range(len(units)):
            _remove_unit_files(out / part_name(number))
        (out / PLAN_NAME).unlink()
        (out / _LOCK_NAME).unlink(missing_ok=True)
        return report


def _complete_units(source: Source, options: PackOptions) -> list[Unit]:
    """All units, after a look whether the images that captions name are there."""
    if not options.allow_missing and (missing := source.missing_images()):
        raise InputError(
            found=f"{len(missing)} images that captions name are missing: {name_some(missing)}",
            required="every image that a caption refers to",
            remedy="restore them, correct image_root, or set allow_missing to drop them",
        )
    return source.units()


def _describe(location: str, source: Source, options: PackOptions) -> dict[str, Any]:
    """What fixes the result, for the manifest and for refusing to mix two packs."""
    root = Path(location) if Path(location).is_dir() else Path(location).parent
    listing = hashlib.sha256()
    total = 0
    for file in source.files:
        status = file.stat()
        total += status.st_size
        line = f"{file.relative_to(root).as_posix()} {status.st_size} {status.st_mtime_ns}\n"
        listing.update(os.fsencode(line))
    kept = asdict(options)
    del kept["workers"], kept["source_name"]
    if options.source_name:
        kept["source"]["image_root"] = None
    return {
        "source": {
            "name": options.source_name or location,
            "kind": source.kind,
            "files": len(source.files),
            "bytes": total,
            "listing_sha256": listing.hexdigest(),
        },
        "options": kept,
    }


def _finished(out: Path, described: dict[str, Any]) -> PackReport | None:
    """The report of a complete pack of the same source, after removing left-over unit files."""
    path = out / MANIFEST_NAME
    if not path.is_file():
        return None
    manifest = parse_manifest(path.read_text(), str(path))
    if {"source": manifest.source, "options": manifest.options} != json.loads(
        json.dumps(described)
    ):
        raise _occupied(out, f"a finished pack of {_OTHER}")
    for part in out.glob("part-*"):
        _remove_unit_files(part)
    (out / PLAN_NAME).unlink(missing_ok=True)
    return PackReport(**manifest.report)


def _claim(out: Path, plan: dict[str, Any]) -> None:
    """Records the plan in an empty directory, or checks that an interrupted pack had the same."""
    plan_path = out / PLAN_NAME
    if plan_path.is_file():
        if json.loads(plan_path.read_text()) != json.loads(json.dumps(plan)):
            raise _occupied(out, f"an unfinished pack of {_OTHER}")
    else:
        foreign = sorted(path.name for path in out.iterdir() if path.name != _LOCK_NAME)
        if foreign:
            raise _occupied(out, f"other files: {name_some(foreign)}")
        write_json(plan_path, plan)
    for left in out.glob(f"{unit_files.TEMPORARY_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


def _occupied(out: Path, what: str) -> InputError:
    return InputError(
        found=f"{out} holds {what}",
        required="an empty directory, or an unfinished pack of the same source and options",
        remedy="choose another directory or remove this one",
    )


def _pack_units(
    source: Source,
    units: list[Unit],
    out: Path,
    options: PackOptions,
    progress: Callable[[PackProgress], None] | None,
) -> None:
    waiting = [
        (source, unit, number, out, options)
        for number, unit in enumerate(units)
        if not (out / part_name(number)).is_dir()
    ]
    done, samples = len(units) - len(waiting), 0
    for read in _results(waiting, options.workers):
        done, samples = done + 1, samples + read
        if progress is not None:
            progress(PackProgress(done, len(units), samples))


def _results(waiting: list[tuple[Any, ...]], workers: int) -> Iterator[int]:
    if workers <= 1 or len(waiting) <= 1:
        for arguments in waiting:
            yield pack_unit(*arguments)
        return
    with ProcessPoolExecutor(
        max_workers=min(workers, len(waiting)),
        mp_context=multiprocessing.get_context("fork"),
        initializer=tie_to_parent,
        initargs=(os.getpid(),),
    ) as pool:
        futures = [pool.submit(pack_unit, *arguments) for arguments in waiting]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise InputError(
                found="a packing process was killed, most often for lack of memory",
                required=f"memory for {workers} processes with one shard each",
                remedy="run again with fewer workers; finished units are kept",
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _join(out: Path, units: int, described: dict[str, Any]) -> PackReport:
    """Writes the joined index, sizes, dropped keys and, last, the manifest."""
    parts = [out / part_name(number) for number in range(units)]
    counts = [json.loads((part / unit_files.COUNTS_NAME).read_text()) for part in parts]
    kept = sum(count["kept"] for count in counts)
    dropped = _sum_counters(count["dropped"] for count in counts)
    with storage_errors(out), (out / DROPPED_NAME).open("wb") as file:
        for part in parts:
            file.write((part / unit_files.UNIT_DROPPED_NAME).read_bytes())
    if kept == 0:
        optional = (
            "keep images without captions with --captions-optional; or "
            if "missing caption" in dropped
            else ""
        )
        raise InputError(
            found=f"nothing was kept: {dict(dropped) or 'the source has no samples'} "
            f"(keys in {out / DROPPED_NAME})",
            required="at least one readable image with what the options ask for",
            remedy=optional + "look at the dropped keys, correct the source or the options, and "
            "choose an empty directory",
        )
    shards = [shard for part in parts for shard in _part_shards(part)]
    # Compact, unlike our other JSON: one entry per shard, hundred thousands of them in a large pack.
    write_bytes(out / INDEX_NAME, json.dumps({"version": 2, "shards": shards}).encode())
    sizes = np.concatenate([np.load(part / unit_files.UNIT_SIZES_NAME) for part in parts])
    sizes_sha256 = write_sizes(out / SIZES_NAME, sizes)
    report = PackReport(
        kept=kept,
        dropped=dict(sorted(dropped.items())),
        caption_characters=_statistics(count["caption_characters"] for count in counts),
        short_side_pixels=_statistics(count["short_side_pixels"] for count in counts),
        shards=len(shards),
        fingerprint=fingerprint((part / unit_files.DIGESTS_NAME).read_bytes() for part in parts),
    )
    manifest = Manifest(
        schema=SCHEMA_VERSION,
        samples=kept,
        fingerprint=report.fingerprint,
        sizes_sha256=sizes_sha256,
        columns=COLUMNS,
        report=asdict(report),
        **described,
    )
    write_manifest(out, manifest)
    return report


def _part_shards(part: Path) -> list[dict[str, Any]]:
    path = part / INDEX_NAME
    if not path.is_file():  # a unit of which nothing was kept
        return []
    shards = json.loads(path.read_text())["shards"]
    for shard in shards:
        shard["raw_data"]["basename"] = f"{part.name}/{shard['raw_data']['basename']}"
    return shards


def _remove_unit_files(part: Path) -> None:
    for name in (
        INDEX_NAME,
        unit_files.COUNTS_NAME,
        unit_files.DIGESTS_NAME,
        unit_files.UNIT_SIZES_NAME,
        unit_files.UNIT_DROPPED_NAME,
    ):
        (part / name).unlink(missing_ok=True)
    if not any(part.iterdir()):
        part.rmdir()


def _sum_counters(counters: Iterable[dict[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _statistics(histograms: Iterable[dict[str, int]]) -> dict[str, float]:
    """Mean, extremes and percentiles of the values that histograms {value: count} hold."""
    total = _sum_counters(histograms)
    if not total:
        return {}
    values = np.array(sorted(map(int, total)))
    ends = np.cumsum([total[str(value)] for value in values])
    mean = sum(int(value) * count for value, count in total.items()) / int(ends[-1])
    picked = {
        f"p{percent}": float(values[np.searchsorted(ends, ends[-1] * percent / 100)])
        for percent in _PERCENTILES
    }
    return {"mean": mean, "min": float(values[0]), **picked, "max": float(values[-1])}
