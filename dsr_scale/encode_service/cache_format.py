"""What a latent cache looks like on disk, and what must agree before it is read or filled further.

    cache.json                 which data, which encoders, what is stored; counts once complete
    sizes.npy                  (height, width) of every source sample
    null_caption.safetensors   tokens and mask of "", for guidance
    unit-00000/ …              what one source shard became: MDS shards, their index, counts.json
    index.json                 the shards of all units; written last, so that it means complete

A row of the MDS shards is a sample: `about` (captions and metadata as JSON), `latents`, `mirrored`
(empty where flips are not stored) and `tokens`, those of all its captions one after the other and
without padding. `checksums` are xxh3-64 of the first three and of each caption's tokens, so that damage
is found when it is read: that costs less than the copy, and no pass over a cache of terabytes is needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dsr_scale.base.atomic_files import write_json
from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import latent_channels, latent_grid
from dsr_scale.config.encoders import BytesText, TransformersText
from dsr_scale.config.run import AnyRun
from dsr_scale.data.samples import Samples
from dsr_scale.encode_service.contract import Contract

FORMAT = 1
"""Raised when files change their meaning."""

MANIFEST_NAME = "cache.json"
INDEX_NAME = "index.json"
SIZES_NAME = "sizes.npy"
NULL_CAPTION_NAME = "null_caption.safetensors"
COUNTS_NAME = "counts.json"

COLUMNS = {
    "about": "str",
    "checksums": "bytes",
    "latents": "bytes",
    "mirrored": "bytes",
    "tokens": "bytes",
}
"""MDS columns, in the order in which they are written, which is that of the alphabet."""
CHECKED = ("about", "latents", "mirrored")
"""What the first checksums are of; those of each caption's tokens follow."""
CHECKSUM_BYTES = 8

_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int16": 2}
_NO_MATTER = {"protocol"}
"""Parts of a contract that say nothing about what is stored."""


@dataclass(frozen=True)
class CacheManifest:
    """The contents of `cache.json`."""

    fingerprint: str
    """Of the source's data."""
    shard_sizes: tuple[int, ...]
    """Samples of each source shard; unit n holds those of shard n."""
    contract: Mapping[str, str]
    """Of the encoders that filled it."""
    latent_shape: tuple[int, int, int]
    """(C, h, w)"""
    latent_dtype: str
    token_shape: tuple[int, ...] | None
    """(L,) for ids, (L, C) for features, L being the padded length; None without text."""
    token_dtype: str | None
    mirrored: bool
    """Whether latents of the mirrored image are stored too."""
    format: int = FORMAT
    counts: Mapping[str, int] | None = None
    """Samples, unusable ones, captions, tokens and bytes; None until all units are there."""

    @property
    def samples(self) -> int:
        """Of all units."""
        return sum(self.shard_sizes)

    @property
    def latent_bytes(self) -> int:
        """Of one view of one image."""
        return math.prod(self.latent_shape) * _ELEMENT_BYTES[self.latent_dtype]

    @property
    def token_bytes(self) -> int:
        """Of one token; 0 without text."""
        if self.token_shape is None or self.token_dtype is None:
            return 0
        return math.prod(self.token_shape[1:]) * _ELEMENT_BYTES[self.token_dtype]

    def lacks(self, wanted: CacheManifest) -> list[str]:
        """What `wanted` asks for and this does not hold: one text for each difference."""
        found = []
        if self.fingerprint != wanted.fingerprint:
            found.append(
                f"the data is {self.fingerprint[:16]}… ({self.samples} samples), wanted "
                f"{wanted.fingerprint[:16]}… ({wanted.samples} samples)"
            )
        meant = {k: v for k, v in wanted.contract.items() if k not in _NO_MATTER}
        found += Contract(self.contract).differences(meant)
        if wanted.mirrored and not self.mirrored:
            found.append("no mirrored latents are stored, wanted for data.horizontal_flip > 0")
        return found


def planned_manifest(run: AnyRun, samples: Samples, contract: Contract) -> CacheManifest:
    """What a cache of `samples` for `run` holds. Raises InputError when sizes do not divide."""
    side, text = run.data.resolution, run.encoders.text
    token_shape: tuple[int, ...] | None = None
    token_dtype = None
    if isinstance(text, BytesText):
        token_shape, token_dtype = (text.max_length,), "int16"
    elif isinstance(text, TransformersText):
        token_shape, token_dtype = (text.max_length, text.channels), text.dtype
    return CacheManifest(
        fingerprint=samples.fingerprint,
        shard_sizes=tuple(np.asarray(samples.shard_sizes).tolist()),
        contract=dict(contract.values),
        latent_shape=(
            latent_channels(run.encoders),
            *latent_grid(run.encoders, side, side, side),
        ),
        latent_dtype=run.encoders.latent_dtype,
        token_shape=token_shape,
        token_dtype=token_dtype,
        mirrored=run.data.horizontal_flip > 0,
    )


def unit_name(unit: int) -> str:
    """The directory of what source shard `unit` became."""
    return f"unit-{unit:05d}"


def missing_units(directory: Path, manifest: CacheManifest) -> list[int]:
    """Source shards that have samples and are not encoded yet."""
    units = [unit for unit, size in enumerate(manifest.shard_sizes) if size]
    return [unit for unit in units if not (directory / unit_name(unit)).is_dir()]


def pack_row(
    about: Mapping[str, Any],
    latents: bytes = b"",
    mirrored: bytes = b"",
    tokens: Sequence[bytes] = (),
) -> dict[str, Any]:
    """A sample as the dictionary that MDSWriter takes; `tokens` are those of each caption."""
    text = json.dumps(about)
    parts = (text.encode(), latents, mirrored, *tokens)
    return {
        "about": text,
        "checksums": b"".join(map(xxhash.xxh3_64_digest, parts)),
        "latents": latents,
        "mirrored": mirrored,
        "tokens": b"".join(tokens),
    }


def write_manifest(directory: Path, manifest: CacheManifest) -> None:
    """Writes `cache.json`."""
    write_json(directory / MANIFEST_NAME, asdict(manifest))


def read_manifest(directory: Path) -> CacheManifest | None:
    """The manifest in `directory`; None when there is none. Raises InputError for a damaged one."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        for name in ("shard_sizes", "latent_shape", "token_shape"):
            content[name] = None if content[name] is None else tuple(content[name])
        return CacheManifest(**content)
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            found=f"{path} is no manifest of a latent cache ({error})",
            required="the file that dsr-scale encode wrote",
            remedy="restore it from a copy, or fill another directory",
        ) from error
