"""Images of a data set without a training run's random choices: for measuring an encoder.

In order, centre-cropped, not mirrored, decoded on threads with a bounded window ahead of the
reader. A part of a set is spread evenly over it, since sets are often sorted by class. The
fingerprint is a sum of hashes modulo 2¹²⁸, so that the sum of the shares' fingerprints is the
whole set's, and no process has to read more than its share.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.data.loader import open_samples
from dsr_scale.data.samples import UnusableRecord
from dsr_scale.data.shares import WHOLE, Share
from dsr_scale.data.sources import IMAGE_SUFFIXES, source_errors
from dsr_scale.data.transforms import UnreadableImage, cover_and_crop, decode_rgb

_DIGEST_BYTES = 16
_MODULUS = 1 << (8 * _DIGEST_BYTES)
_MOST_THREADS = 32
_AHEAD_PER_THREAD = 4
_NAMED = 5
_SIZES_IN_NAME = 1000
"""File sizes that go into a folder's name; asking for all takes minutes on a network disk."""


class ImageSource(Protocol):
    """Encoded images by position."""

    name: str
    """A digest that tells this set from others without reading its images."""
    where: str
    """For messages: the folder or the shards."""

    def __len__(self) -> int: ...

    def read(self, position: int) -> tuple[str, bytes]:
        """(name for people, encoded bytes). Raises UnusableRecord or OSError."""
        ...


class FolderImages:
    """Image files below a folder, sorted by their path."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError for no folder, and for one without images."""
        self.where = str(folder)
        self._folder = folder
        with source_errors():
            self._names = sorted(
                Path(parent, name).relative_to(folder).as_posix()
                for parent, _, names in os.walk(folder, onerror=_unless_missing)
                for name in names
                if Path(name).suffix.lower() in IMAGE_SUFFIXES
            )
        if not self._names:
            raise InputError(
                found=f"{folder} is no folder that holds images",
                required=f"files that end in {', '.join(sorted(IMAGE_SUFFIXES))}",
                remedy="correct the path, or leave it out to take the images of data.shards",
            )
        state = hashlib.blake2b("\0".join(self._names).encode(), digest_size=_DIGEST_BYTES)
        for name in self._names[:: -(-len(self._names) // _SIZES_IN_NAME)]:
            state.update(b"%d " % (folder / name).stat().st_size)
        self.name = state.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def read(self, position: int) -> tuple[str, bytes]:
        """The file's path below the folder, and its content."""
        name = self._names[position]
        return name, (self._folder / name).read_bytes()


class ShardImages:
    """The images of a run's shards, in the order of their ids."""

    def __init__(self, config: DataConfig) -> None:
        """Raises InputError when `data.shards` cannot be opened."""
        self.where = config.shards
        self._samples = open_samples(config)
        self._reading = threading.Lock()
        self.name = self._samples.fingerprint

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, position: int) -> tuple[str, bytes]:
        """The sample's key, and its image as it was stored."""
        with self._reading:  # readers of shards are made for one thread
            sample = self._samples.read(position)
        return sample.key, sample.image


class PlainImages:
    """`count` images spread evenly over a source, or this process's share of them.

    `unusable` and `fingerprint` tell of the last pass through `batches` that came to its end.
    """

    def __init__(
        self,
        source: ImageSource,
        count: int,
        *,
        resolution: int,
        background: tuple[int, int, int],
        share: Share = WHOLE,
    ) -> None:
        """`resolution`: side of the square that images are scaled to cover and cropped to, pixels."""
        assert 0 < count <= len(source) and 0 <= share.index < share.of
        self.source = source
        self.count = count
        self.share = share
        self.unusable: dict[str, str] = {}
        """Name of an image that could not be used → why."""
        self._target = (resolution, resolution)
        self._background = background
        self._numbers = range(
            count * share.index // share.of, count * (share.index + 1) // share.of
        )
        self._digest_sum = 0

    def __len__(self) -> int:
        """Images of the share, unusable ones included."""
        return len(self._numbers)

    @property
    def data_set(self) -> str:
        """Names the whole set of which this is a share: 32 hexadecimal digits."""
        text = f"{self.source.name} {self.count} of {len(self.source)}"
        return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Of the positions and encoded bytes of all usable images: 32 hexadecimal digits."""
        return _hexadecimal(self._digest_sum)

    @property
    def unusable_report(self) -> str | None:
        """How many images could not be used, and why the first of them; None if all could."""
        if not self.unusable:
            return None
        named = [f"{name} ({why})" for name, why in list(self.unusable.items())[:_NAMED]]
        more = ", …" if len(self.unusable) > _NAMED else ""
        return f"{len(self.unusable)} of {len(self)} images unusable: {', '.join(named)}{more}"

    def batches(self, images: int) -> Iterator[Tensor]:
        """uint8 [N,3,S,S] in order; N = `images` in all but the last."""
        unusable: dict[str, str] = {}
        digest_sum = 0
        pending: list[np.ndarray] = []
        for outcome in _in_order(self._load, self._numbers):
            if isinstance(outcome, _Unusable):
                unusable[outcome.name] = outcome.reason
                continue
            digest_sum += int.from_bytes(outcome.digest)
            pending.append(outcome.pixels)
            if len(pending) == images:
                yield torch.from_numpy(np.stack(pending))
                pending = []
        if pending:
            yield torch.from_numpy(np.stack(pending))
        self.unusable, self._digest_sum = unusable, digest_sum

    def _load(self, number: int) -> _Loaded | _Unusable:
        position = number * len(self.source) // self.count
        name = f"image {position}"
        try:
            name, content = self.source.read(position)
            image = decode_rgb(content, self._background, self._target)
        except (UnusableRecord, UnreadableImage, OSError) as error:
            return _Unusable(name, str(error))
        state = hashlib.blake2b(b"%d " % position, digest_size=_DIGEST_BYTES)
        state.update(content)
        return _Loaded(cover_and_crop(image, self._target), state.digest())


def plain_images(
    config: DataConfig,
    *,
    folder: Path | None = None,
    count: int | None = None,
    share: Share = WHOLE,
) -> PlainImages:
    """`count` (None: all) images of `folder`, or of the shards that `config` names.

    Raises InputError when there are fewer, or when a share would be empty.
    """
    source = ShardImages(config) if folder is None else FolderImages(folder)
    available = len(source)
    if count is not None and count > available:
        raise InputError(
            found=f"{available} images in {source.where}",
            required=f"{count} images",
            remedy=f"give --count {available}, or more images",
        )
    chosen = count or available
    if share.of > chosen:
        raise InputError(
            found=f"{share.of} shares of {chosen} images",
            required="at least one image in every share",
            remedy=f"use at most {chosen} shares",
        )
    return PlainImages(
        source, chosen, resolution=config.resolution, background=config.background, share=share
    )


def joined_fingerprint(fingerprints: Sequence[str]) -> str:
    """The fingerprint of a whole set from those of its shares."""
    return _hexadecimal(sum(int(fingerprint, 16) for fingerprint in fingerprints))


class _Loaded(NamedTuple):
    pixels: np.ndarray
    digest: bytes


class _Unusable(NamedTuple):
    name: str
    reason: str


def _hexadecimal(digest_sum: int) -> str:
    return f"{digest_sum % _MODULUS:0{2 * _DIGEST_BYTES}x}"


def _in_order(
    load: Callable[[int], _Loaded | _Unusable], numbers: range
) -> Iterator[_Loaded | _Unusable]:
    """`load` of every number, in order, with a few per thread under way."""
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    waiting: deque[Future[_Loaded | _Unusable]] = deque()
    with ThreadPoolExecutor(threads, "decode") as pool:
        try:
            for number in numbers:
                waiting.append(pool.submit(load, number))
                if len(waiting) > _AHEAD_PER_THREAD * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error  # os.walk would skip a folder that it may not list
