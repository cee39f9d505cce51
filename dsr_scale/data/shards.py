"""Random access to packed MDS shards by global sample id.

Only mosaicml-streaming's shard reader and downloaders are used, not its StreamingDataset: that
one keeps state in shared memory, waits for ever when a rank dies, and ties the order to its own
process layout. Here a store is a table of shards and one seek per sample; it holds no file open.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.data.manifest import INDEX_NAME, MANIFEST_NAME, SIZES_NAME, Manifest, parse_manifest
from dsr_scale.data.remote_files import FileStore, download, is_remote
from dsr_scale.data.samples import COLUMNS, Sample, from_columns
from dsr_scale.data.streaming_parts import streaming_part

PACKAGE_PREFIX = "package:"
_OPEN_ATTEMPTS = 5
"""A shard may be evicted by a neighbour between being fetched and being opened."""


def resolve_location(shards: str) -> str:
    """The path or URL that `data.shards` means; `package:emoji` is the pack shipped here."""
    if not shards.startswith(PACKAGE_PREFIX):
        return shards
    name = shards.removeprefix(PACKAGE_PREFIX)
    directory = Path(__file__).parent / name
    if not name.isidentifier() or not (directory / MANIFEST_NAME).is_file():
        raise InputError(
            found=f"data.shards = {shards}",
            required="a pack that ships with this package: package:emoji",
            remedy="use package:emoji, or a directory or URL of your own shards",
        )
    return str(directory)


def truncated(
    shard_sizes: np.ndarray, fingerprint: str, max_samples: int | None
) -> tuple[np.ndarray, str]:
    """Shard sizes and fingerprint of the first `max_samples` samples (None: all)."""
    ends = np.cumsum(shard_sizes)
    if max_samples is None or max_samples >= int(ends[-1]):
        return shard_sizes, fingerprint
    kept = np.minimum(ends, max_samples)
    text = f"{fingerprint} first {max_samples}"
    return np.diff(kept, prepend=0), hashlib.sha256(text.encode()).hexdigest()


class ShardStore:
    """The samples of a directory or URL that `pack` wrote. Raises `InputError` when it is not one."""

    def __init__(self, config: DataConfig) -> None:
        location = resolve_location(config.shards).rstrip("/")
        manifest, self._shards = _read_tables(location)
        self._files = FileStore(
            location,
            cache_directory=config.cache_directory,
            cache_limit_gib=config.cache_limit_gib,
            namespace=manifest.fingerprint,
        )
        full_sizes = np.array([shard["samples"] for shard in self._shards], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(full_sizes)])
        total = int(self._starts[-1])
        if total != manifest.samples or total == 0:
            raise InputError(
                found=f"{location}: {INDEX_NAME} lists {total} samples, {MANIFEST_NAME} "
                f"{manifest.samples}",
                required="the same number, at least 1, in both",
                remedy="the pack is damaged or mixed from two; pack the data again",
            )
        if not self._files.remote:
            _require_whole_files(Path(location), self._shards)
        self._files.require_room_for(max(shard["raw_data"]["bytes"] for shard in self._shards))
        self.shard_sizes, self.fingerprint = truncated(
            full_sizes, manifest.fingerprint, config.max_samples
        )
        self._count = int(self.shard_sizes.sum())
        self._sizes_sha256 = manifest.sizes_sha256
        self._sizes: np.ndarray | None = None
        self._readers: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sizes": None, "_readers": {}}

    @property
    def sizes(self) -> np.ndarray:
        """[N, 2] (height, width) in pixels, mapped from `sizes.npy`."""
        if self._sizes is None:
            path = self._files.path(SIZES_NAME, self._verify_sizes)
            if not path.is_file():
                raise _missing(self._files.url(SIZES_NAME))
            if not self._files.remote:
                self._verify_sizes(path)
            mapped: np.ndarray = np.load(path, mmap_mode="r")
            self._sizes = mapped[: self._count]
        return self._sizes

    def read(self, sample_id: int) -> Sample:
        """Reads one sample, fetching its shard if it is remote and not cached."""
        if not 0 <= sample_id < self._count:
            raise IndexError(f"sample {sample_id} of {self._count}")
        number = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        within = sample_id - int(self._starts[number])
        for _ in range(_OPEN_ATTEMPTS):
            try:
                return from_columns(self._reader(number)[within])
            except FileNotFoundError:
                if not self._files.remote:
                    break
        raise _missing(self._files.url(self._shards[number]["raw_data"]["basename"]))

    def _reader(self, number: int) -> Any:
        """mosaicml-streaming's reader over the local copy of shard `number`."""
        shard = self._shards[number]
        name = shard["raw_data"]["basename"]
        path = self._files.path(name, lambda fetched: _verify_shard(fetched, shard))
        if number not in self._readers:
            root = str(path).removesuffix(name)
            with _index_errors(self._files.url(INDEX_NAME)):
                self._readers[number] = shard_reader(root, shard)
        return self._readers[number]

    def _verify_sizes(self, path: Path) -> None:
        if hashlib.sha256(path.read_bytes()).hexdigest() != self._sizes_sha256:
            raise InputError(
                found=f"{self._files.url(SIZES_NAME)} differs from what {MANIFEST_NAME} recorded",
                required="the sizes that were written with this pack",
                remedy="copy the file again from the original pack, or pack the data again",
            )


def shard_reader(directory: str, shard: dict[str, Any]) -> Any:
    """mosaicml-streaming's reader over the shard that an index describes, below `directory`."""
    return streaming_part("format").reader_from_json(directory, None, shard)


def _read_tables(location: str) -> tuple[Manifest, list[dict[str, Any]]]:
    """Manifest and shard table, checked for completeness and columns."""
    read = _fetch_table if is_remote(location) else _read_local_table
    text = read(location, INDEX_NAME)
    with _index_errors(f"{location}/{INDEX_NAME}"):
        shards = json.loads(text)["shards"]
        for shard in shards:
            _require_columns(location, shard)
            _require_fields(shard)
    return parse_manifest(read(location, MANIFEST_NAME), f"{location}/{MANIFEST_NAME}"), shards


def _fetch_table(location: str, name: str) -> bytes:
    # Never from the cache: the pack behind a URL may have been rebuilt.
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / name
        download(f"{location}/{name}", path, attempts=2)
        return path.read_bytes()


def _read_local_table(location: str, name: str) -> bytes:
    directory = Path(location)
    if not directory.is_dir() or not any(directory.iterdir()):
        state = "is empty" if directory.is_dir() else "is no directory"
        raise InputError(
            found=f"data.shards = {directory} {state}",
            required="a directory of packed shards, or package:emoji",
            remedy="run `dsr-scale pack SOURCE OUT` and give OUT, or correct the path",
        )
    if not (directory / name).is_file():
        tars = any(directory.glob("*.tar"))
        raise InputError(
            found=f"{directory} has no {name}" + (" but holds tar files" if tars else ""),
            required="a finished pack: shards, index.json, manifest.json and sizes.npy",
            remedy="set data.format: webdataset to read tars as they are"
            if tars
            else "run `dsr-scale pack SOURCE OUT` (again, if it was interrupted)",
        )
    return (directory / name).read_bytes()


def _require_columns(location: str, shard: dict[str, Any]) -> None:
    found = dict(zip(shard.get("column_names", []), shard.get("column_encodings", []), strict=True))
    compression = shard.get("compression")
    if found == COLUMNS and not compression and shard.get("format") == "mds":
        return
    listed = ", ".join(f"{name}: {kind}" for name, kind in found.items()) or "none"
    raise InputError(
        found=f"{location} has {shard.get('format')} shards with columns {listed}"
        + (f", compression {compression}" if compression else ""),
        required="uncompressed mds shards with columns "
        + ", ".join(f"{name}: {kind}" for name, kind in COLUMNS.items()),
        remedy="pack the original data with `dsr-scale pack`",
    )


def _require_fields(shard: dict[str, Any]) -> None:
    """Raises what `_index_errors` turns into words unless all that is used here is there."""
    info = shard["raw_data"]
    for number in (shard["samples"], info["bytes"]):
        if not isinstance(number, int) or number < 0:
            raise ValueError(f"{number!r} is no number of samples or bytes")
    for algorithm, expected in info["hashes"].items():
        if not isinstance(expected, str):
            raise ValueError(f"{expected!r} is no {algorithm} hash")
    if not isinstance(info["basename"], str):
        raise ValueError(f"{info['basename']!r} is no file name")


@contextlib.contextmanager
def _index_errors(where: str) -> Iterator[None]:
    """Turns what a damaged index causes when it is used into an error a person can act on."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise InputError(
            found=f"{where} is no shard index ({type(error).__name__}: {error})",
            required="the index that packing wrote",
            remedy="pack the data again, or restore the file from a copy of the pack",
        ) from error


def _require_whole_files(directory: Path, shards: list[dict[str, Any]]) -> None:
    for shard in shards:
        path = directory / shard["raw_data"]["basename"]
        if not path.is_file():
            raise _missing(str(path))
        _verify_bytes(path, shard)


def _verify_bytes(path: Path, shard: dict[str, Any]) -> None:
    info = shard["raw_data"]
    if path.stat().st_size != info["bytes"]:
        raise InputError(
            found=f"shard {info['basename']} has {path.stat().st_size} bytes",
            required=f"{info['bytes']} bytes, as {INDEX_NAME} says",
            remedy="the file is cut off or from another pack; copy it again",
        )


def _verify_shard(path: Path, shard: dict[str, Any]) -> None:
    """Size and every hash in the index, for a shard that came over a network."""
    get_hash = streaming_part("hashing").get_hash
    _verify_bytes(path, shard)
    info = shard["raw_data"]
    content = path.read_bytes()
    for algorithm, expected in info["hashes"].items():
        if get_hash(algorithm, content) != expected:
            raise InputError(
                found=f"shard {info['basename']} arrived with another {algorithm} hash",
                required=f"{expected}, as {INDEX_NAME} says",
                remedy="the stored file is damaged; upload it again from the original pack",
            )


def _missing(name: str) -> InputError:
    return InputError(
        found=f"{name} is missing",
        required="every file that the pack's index lists",
        remedy="copy the pack again, or pack the data again",
    )
