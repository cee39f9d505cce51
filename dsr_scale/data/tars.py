"""Random access to webdataset tars in img2dataset layout, without packing them first.

The same interface as `shards.ShardStore`, over an index of each tar. Good for trying a data set
and for tens of millions of samples; packing is better for repeated runs over remote tars, because
every node must fetch each tar once before the first step to index it. A sample without an image
stays in the index and is treated as a corrupt one, so that nothing is left out unseen.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.data.remote_files import FileStore, is_remote
from dsr_scale.data.samples import Sample
from dsr_scale.data.shards import truncated
from dsr_scale.data.tar_index import ABSENT, TarIndex, ensure_indexes, load_index
from dsr_scale.data.tar_members import captions_and_metadata

_LOADED_INDEXES = 64


class TarStore:
    """The samples of a directory of tars, or of a path or URL with braces: `…/{000..099}.tar`."""

    def __init__(self, config: DataConfig) -> None:
        location, names = list_tars(config.shards)
        self._names = names
        self._files = FileStore(
            location,
            cache_directory=config.cache_directory,
            cache_limit_gib=config.cache_limit_gib,
        )
        if config.cache_directory is None:
            self._index_directory = Path(location) / ".tar_index"
        else:
            name = hashlib.sha256(location.encode()).hexdigest()[:20]
            # Beside the file cache, out of reach of its size limit.
            self._index_directory = Path(config.cache_directory) / "dsr_scale_tar_index" / name
        ensure_indexes(self._files, names, self._index_directory)
        indexes = [load_index(self._index_directory, name) for name in names]
        self._files.require_room_for(max(index.tar_bytes for index in indexes))
        counts = np.array([len(index.keys) for index in indexes], dtype=np.int64)
        state = hashlib.sha256()
        for name, index in zip(names, indexes, strict=True):
            state.update(name.encode() + index.digest())
        if not counts.sum():
            raise InputError(
                found=f"{config.shards} holds no samples",
                required="tars with members such as key.jpg, key.txt, key.json",
                remedy="correct the path in data.shards",
            )
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self.shard_sizes, self.fingerprint = truncated(
            counts, state.hexdigest(), config.max_samples
        )
        self._count = int(self.shard_sizes.sum())
        self._sizes = np.concatenate([index.sizes for index in indexes])[: self._count]
        self._index = self._cached_index()

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_index"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._index = self._cached_index()

    @property
    def sizes(self) -> np.ndarray:
        """[N, 2] (height, width) in pixels, from the index."""
        return self._sizes

    def read(self, sample_id: int) -> Sample:
        """Reads one sample, fetching its tar if it is remote and not cached.

        Raises `UnusableRecord` for captions or metadata that cannot be read.
        """
        if not 0 <= sample_id < self._count:
            raise IndexError(f"sample {sample_id} of {self._count}")
        number = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        within = sample_id - int(self._starts[number])
        index = self._index(number)
        key = str(index.keys[within])
        image, text, metadata = self._members(number, index.spans[within].tolist())
        captions, content = captions_and_metadata(text, metadata, key)
        height, width = index.sizes[within].tolist()
        return Sample(image or b"", captions, width, height, key, content)

    def _members(self, number: int, spans: list[list[int]]) -> list[bytes | None]:
        name = self._names[number]
        try:
            file = self._files.open(name)
        except FileNotFoundError as error:
            raise InputError(
                found=f"{self._files.url(name)} is missing",
                required="every tar that was there when the run began",
                remedy="copy the tar again",
            ) from error
        with file:
            return [
                None if offset == ABSENT else os.pread(file.fileno(), size, offset)
                for offset, size in spans
            ]

    def _cached_index(self) -> Any:
        load = functools.partial(_load_numbered, self._index_directory, self._names)
        return functools.lru_cache(_LOADED_INDEXES)(load)


def _load_numbered(directory: Path, names: list[str], number: int) -> TarIndex:
    return load_index(directory, names[number])


def list_tars(shards: str) -> tuple[str, list[str]]:
    """The common directory or URL, and the names of all tars below it, in order."""
    if "{" in shards or shards.endswith(".tar"):
        from webdataset.shardlists import expand_urls

        location = shards.partition("{")[0].rpartition("/")[0] or "."
        names = [url.removeprefix(location).lstrip("/") for url in expand_urls(shards)]
        if not is_remote(location):
            absent = [name for name in names if not (Path(location) / name).is_file()]
            if absent:
                raise _no_tars(f"{shards} names tars that do not exist: {', '.join(absent[:10])}")
        return location, names
    if is_remote(shards):
        raise _no_tars(f"{shards} cannot be listed")
    names = sorted(path.name for path in Path(shards).glob("*.tar"))
    if not names:
        raise _no_tars(f"{shards} holds no tars" if Path(shards).exists() else f"no {shards}")
    return shards.rstrip("/"), names


def _no_tars(found: str) -> InputError:
    return InputError(
        found=f"data.format is webdataset, and {found}",
        required="a local directory with *.tar, or a path or URL with braces: …/{00000..00099}.tar",
        remedy="correct data.shards",
    )
