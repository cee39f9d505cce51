"""Random access to the rows of a latent cache: only the bytes that are asked for, straight into place.

mosaicml-streaming's own reader reads a sample whole, which is twice the bytes where mirrored latents
are stored and three copies before a tensor. The layout of an MDS shard is simple enough to read
directly: number of samples and their offsets as uint32, then for each sample the sizes of its columns
as uint32 and the columns. Every length is checked before it is believed, every part by its checksum.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash

from dsr_scale.base.errors import InputError
from dsr_scale.encode_service.cache_format import CHECKED, CHECKSUM_BYTES, COLUMNS, INDEX_NAME

_OPEN_FILES = 64
_FIRST_READ_BYTES = 4096
"""Holds the sizes, the captions and the checksums of nearly every sample."""
_SIZES_BYTES = 4 * len(COLUMNS)


class _OpenShard(NamedTuple):
    path: Path
    file: BinaryIO
    offsets: np.ndarray
    """uint32 [samples + 1]"""


class StoredRow:
    """One sample of the cache; its parts are read when they are asked for."""

    def __init__(self, shard: _OpenShard, number: int, damaged: _Damaged) -> None:
        """`number` counts within the shard."""
        self._shard = shard
        self._damaged = damaged
        begin, end = shard.offsets[number : number + 2].tolist()
        first = os.pread(shard.file.fileno(), min(_FIRST_READ_BYTES, end - begin), begin)
        sizes = np.frombuffer(first[:_SIZES_BYTES], dtype=np.uint32).tolist()
        edges = list(itertools.accumulate(sizes, initial=begin + _SIZES_BYTES))
        if len(sizes) != len(COLUMNS) or edges[-1] != end:
            raise damaged(f"sizes of sample {number} that do not add up")
        self._spans = dict(zip(COLUMNS, itertools.pairwise(edges), strict=True))
        need = self._spans["checksums"][1] - begin
        if need > len(first):
            first += os.pread(shard.file.fileno(), need - len(first), begin + len(first))
        about = first[_SIZES_BYTES : self._spans["about"][1] - begin]
        self._checksums = first[self._spans["checksums"][0] - begin : need]
        self._check("about", CHECKED.index("about"), about)
        self.about: dict[str, Any] = json.loads(about)

    def size(self, column: str) -> int:
        """Bytes of a column."""
        begin, end = self._spans[column]
        return end - begin

    def latents_into(self, buffer: memoryview, *, mirrored: bool) -> None:
        """Fills `buffer`, which must have their length. Raises InputError for damage."""
        column = "mirrored" if mirrored else "latents"
        if self.size(column) != len(buffer):
            raise self._damaged(f"{self.size(column)} bytes of {column} instead of {len(buffer)}")
        self._read_into(buffer, self._spans[column][0])
        self._check(column, CHECKED.index(column), buffer)

    def tokens(self, caption: int, token_bytes: int) -> bytearray:
        """The tokens of a caption of this sample. Raises InputError for damage."""
        counts = self.about["token_counts"]
        buffer = bytearray(counts[caption] * token_bytes)
        begin, end = self._spans["tokens"]
        if sum(counts) * token_bytes != end - begin:
            raise self._damaged(f"{end - begin} bytes of tokens instead of {sum(counts)} tokens")
        self._read_into(memoryview(buffer), begin + sum(counts[:caption]) * token_bytes)
        self._check("tokens", len(CHECKED) + caption, buffer)
        return buffer

    def _read_into(self, buffer: memoryview, position: int) -> None:
        if len(buffer) and os.preadv(self._shard.file.fileno(), [buffer], position) != len(buffer):
            raise self._damaged("an end before its last sample")

    def _check(self, what: str, place: int, content: bytes | bytearray | memoryview) -> None:
        begin = CHECKSUM_BYTES * place
        if xxhash.xxh3_64_digest(content) != self._checksums[begin : begin + CHECKSUM_BYTES]:
            raise self._damaged(f"{what} that do not fit their checksum")


class _Damaged(NamedTuple):
    """Makes the error for a shard."""

    path: Path

    def __call__(self, what: str) -> InputError:
        return InputError(
            found=f"{self.path} is damaged: it has {what}",
            required="the file as dsr-scale encode wrote it",
            remedy=f"restore it from a copy, or remove {self.path.parent} and run the same "
            "dsr-scale encode again: it encodes only what is not there",
        )


class CacheShards:
    """The rows of a complete cache by sample id. Pickled and forked freely; files open when used."""

    def __init__(self, directory: Path) -> None:
        """Raises InputError when the index is damaged. Shards are looked at when they are read.

        Asking for the size of each of hundred thousands on every rank takes minutes on a network disk.
        """
        self._directory = directory
        self._names: list[str] = []
        self._bytes: list[int] = []
        sizes = []
        with _index_errors(directory / INDEX_NAME):
            for shard in json.loads((directory / INDEX_NAME).read_text())["shards"]:
                if shard["column_names"] != list(COLUMNS) or shard["compression"]:
                    raise ValueError(f"columns {shard['column_names']}")
                self._names.append(shard["raw_data"]["basename"])
                sizes.append(int(shard["samples"]))
                self._bytes.append(int(shard["raw_data"]["bytes"]))
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def require_whole(self) -> None:
        """Raises InputError when a shard is missing or of another size than the index says."""
        for number, name in enumerate(self._names):
            path = self._directory / name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise _missing(path, str(error.strerror)) from error
            self._require_size(number, size)

    def row(self, sample_id: int) -> StoredRow:
        """The row of a sample, 0 ≤ id < N. Raises InputError for damage."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        number = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        shard = self._opened(number)
        return StoredRow(shard, sample_id - int(self._starts[number]), _Damaged(shard.path))

    def _opened(self, number: int) -> _OpenShard:
        if number not in self._open:
            self._open[number] = self._open_file(number)
            if len(self._open) > _OPEN_FILES:
                # Closed when nobody reads from it any more, so not here.
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _open_file(self, number: int) -> _OpenShard:
        path = self._directory / self._names[number]
        samples = int(self._starts[number + 1] - self._starts[number])
        try:
            file = path.open("rb", buffering=0)
        except OSError as error:
            raise _missing(path, str(error.strerror)) from error
        self._require_size(number, os.fstat(file.fileno()).st_size)
        table = np.frombuffer(os.pread(file.fileno(), 4 * (samples + 2), 0), dtype=np.uint32)
        offsets = table[1:]
        in_order = len(offsets) == samples + 1 and bool(
            (np.diff(offsets.astype(np.int64)) > 0).all()
        )
        if not in_order or table[0] != samples:
            raise _Damaged(path)(f"a table that is not one of {samples} samples")
        return _OpenShard(path, file, offsets)

    def _require_size(self, number: int, found: int) -> None:
        if found != self._bytes[number]:
            damaged = _Damaged(self._directory / self._names[number])
            raise damaged(f"{found} bytes instead of {self._bytes[number]}")


def _missing(path: Path, why: str) -> InputError:
    return InputError(
        found=f"{path} cannot be read: {why}",
        required="every file that the cache's index lists",
        remedy="restore it from a copy, or run the same dsr-scale encode again: it encodes only "
        "units whose directory is not there",
    )


@contextlib.contextmanager
def _index_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            found=f"{path} is no index of a latent cache ({type(error).__name__}: {error})",
            required="the file that dsr-scale encode wrote last",
            remedy="remove it and run the same dsr-scale encode again, which writes it anew",
        ) from error
