"""The sample record and its columns: what every reader returns and what the packer writes.

A sample is the image as it was stored (encoded bytes, decoded late and close to the training
loop), its captions with the weight of each, and free metadata. Readers are interchangeable: they
answer a global sample id with a `Sample`, and give sizes without opening an image, so that
aspect-ratio buckets are planned from one small array.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

SCHEMA_VERSION = 1
"""Raised when the columns change their meaning."""

COLUMNS: dict[str, str] = {
    "image": "bytes",
    "captions": "json",
    "width": "int",
    "height": "int",
    "key": "str",
    "metadata": "json",
}
"""MDS column names and encodings."""


@dataclass(frozen=True)
class Caption:
    """One text for an image. `weight` is relative to the sample's other captions."""

    text: str
    source: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class Sample:
    """One stored image with its captions; width and height in pixels, after EXIF orientation."""

    image: bytes
    captions: tuple[Caption, ...]
    width: int
    height: int
    key: str
    metadata: dict[str, Any] = field(default_factory=dict)


class UnusableRecord(Exception):
    """One sample's record is damaged: packing drops the sample, training replaces it.

    `reason` is one of a few words, so that it can be counted; `detail` is free.
    """

    def __init__(self, key: str, reason: str, detail: str = "") -> None:
        self.key = key
        self.reason = reason
        self.detail = detail
        super().__init__(key, reason, detail)

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class Samples(Protocol):
    """Random access to a data set. Implementations survive being forked or pickled to workers."""

    fingerprint: str
    """Changes when the contents or their order change; stored in checkpoints."""
    shard_sizes: np.ndarray
    """int64 [shards]: number of samples of each file, in id order. The unit of the shuffle."""

    @property
    def sizes(self) -> np.ndarray:
        """[N, 2] unsigned integers: (height, width) in pixels of every sample."""
        ...

    def __len__(self) -> int: ...

    def read(self, sample_id: int) -> Sample:
        """The sample with this id, 0 ≤ id < N. Raises `UnusableRecord` for a damaged one."""
        ...


def to_columns(sample: Sample) -> dict[str, Any]:
    """The sample as the dictionary that MDSWriter takes."""
    captions = [{"text": c.text, "source": c.source, "weight": c.weight} for c in sample.captions]
    return {
        "image": sample.image,
        "captions": captions,
        "width": sample.width,
        "height": sample.height,
        "key": sample.key,
        "metadata": sample.metadata,
    }


def from_columns(columns: Mapping[str, Any]) -> Sample:
    """The inverse of `to_columns`."""
    return Sample(
        image=columns["image"],
        captions=tuple(Caption(**caption) for caption in columns["captions"]),
        width=int(columns["width"]),
        height=int(columns["height"]),
        key=columns["key"],
        metadata=columns["metadata"],
    )


DIGEST_BYTES = 16


def digest(sample: Sample) -> bytes:
    """16 bytes that name the sample's whole content; the fingerprint hashes them in order."""
    columns = to_columns(sample)
    image = columns.pop("image")
    text = json.dumps(columns, sort_keys=True, ensure_ascii=False)
    state = hashlib.blake2b(image, digest_size=DIGEST_BYTES)
    state.update(text.encode())
    return state.digest()
