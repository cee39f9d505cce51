"""A latent cache as the source of a training run: `encoder.mode: cache`.

Two views of the same files take the places of the data and of the encoders. `CachedSamples` answers
with the source's fingerprint and shard sizes, so that order, sample ids and resuming are those of a
run that encodes; `CachedEncoder` looks up what a row asks for. The images are not needed: `data.shards`
may name the cache itself where they are not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsr_scale.base.errors import InputError
from dsr_scale.config.encoder_checks import cache_problems
from dsr_scale.config.encoders import BytesText
from dsr_scale.config.problems import raise_problems
from dsr_scale.config.run import AnyRun
from dsr_scale.data.encoded import Encoded, Row
from dsr_scale.data.loader import open_samples
from dsr_scale.data.samples import Caption, Sample, UnusableRecord
from dsr_scale.data.shards import truncated
from dsr_scale.encode_service.cache_format import (
    INDEX_NAME,
    MANIFEST_NAME,
    NULL_CAPTION_NAME,
    SIZES_NAME,
    CacheManifest,
    missing_units,
    planned_manifest,
    read_manifest,
)
from dsr_scale.encode_service.cache_shards import CacheShards, StoredRow
from dsr_scale.encode_service.contract import Contract, expected
from dsr_scale.encoders.contract import TextTokens
from dsr_scale.encoders.loading import TORCH_DTYPES
from dsr_scale.encoders.text_bytes import PADDING_ID

_STORED_DTYPES = {**TORCH_DTYPES, "int16": torch.int16}


def open_cache(run: AnyRun) -> tuple[CachedSamples, CachedEncoder]:
    """The samples and the encoder of the cache that `run.encoder.cache` names.

    Raises InputError for an unfinished or damaged cache, and for one of other data or encoders,
    naming every difference; the kind of device that filled it does not matter here.
    """
    raise_problems("the run", list(cache_problems(run)))
    assert run.encoder.cache is not None, "open_cache is for encoder.mode = cache"
    directory = Path(run.encoder.cache).expanduser()
    manifest = _complete(directory, run.data.shards)
    shard_sizes, fingerprint = truncated(
        np.array(manifest.shard_sizes, dtype=np.int64), manifest.fingerprint, run.data.max_samples
    )
    shards = CacheShards(directory)
    samples = CachedSamples(shards, directory, shard_sizes, fingerprint)
    source = samples if _is_same(directory, run.data.shards) else open_samples(run.data)
    # Of a part of the data, as of the whole, the fingerprint says what it is a part of.
    held = replace(manifest, fingerprint=fingerprint, shard_sizes=tuple(shard_sizes.tolist()))
    lacking = held.lacks(planned_manifest(run, source, expected(run)))
    if lacking:
        raise InputError(
            found=f"{directory} was filled for something else: " + "; ".join(lacking),
            required="latents of this run's data by this run's encoders",
            remedy="correct the settings that differ, or fill another directory with dsr-scale "
            "encode and name it in encoder.cache",
        )
    pads_ids = isinstance(run.encoders.text, BytesText)
    return samples, CachedEncoder(shards, manifest, PADDING_ID if pads_ids else 0)


def null_caption(directory: Path) -> TextTokens | None:
    """Tokens [1,L] or [1,L,C] and mask [1,L] of the null caption; None without text."""
    from safetensors.torch import load_file

    path = directory / NULL_CAPTION_NAME
    if not path.is_file():
        return None
    stored = load_file(path)
    return TextTokens(stored["tokens"], stored["mask"])


class CachedSamples:
    """The source's samples without their images: captions, metadata and what could not be used."""

    def __init__(
        self, shards: CacheShards, directory: Path, shard_sizes: np.ndarray, fingerprint: str
    ) -> None:
        self.shard_sizes = shard_sizes
        self.fingerprint = fingerprint
        self._shards = shards
        self._directory = directory
        self._count = int(shard_sizes.sum())

    def __len__(self) -> int:
        return self._count

    @property
    def sizes(self) -> np.ndarray:
        """[N, 2] (height, width) in pixels of the source's images."""
        stored: np.ndarray = np.load(self._directory / SIZES_NAME, mmap_mode="r")
        return stored[: self._count]

    def read(self, sample_id: int) -> Sample:
        """The sample with an empty image. Raises `UnusableRecord` as the source, or its image, did."""
        about = self._shards.row(sample_id).about
        if "unusable" in about:
            raise UnusableRecord(about["key"], *about["unusable"])
        # Without captions the stream has something to say before it would decode the image.
        if "undecodable" in about and about["captions"]:
            raise UnusableRecord(about["key"], about["undecodable"])
        return Sample(
            image=b"",
            captions=tuple(Caption(**caption) for caption in about["captions"]),
            width=about["width"],
            height=about["height"],
            key=about["key"],
            metadata=about["metadata"],
        )


class CachedEncoder:
    """Looks latents and tokens up by sample id, view and caption."""

    def __init__(self, shards: CacheShards, manifest: CacheManifest, padding: int) -> None:
        self._shards = shards
        self._manifest = manifest
        self._padding = padding

    @property
    def wants_pixels(self) -> bool:
        """Images are not looked at."""
        return False

    @property
    def contract(self) -> Contract:
        """Of the encoders that filled the cache."""
        return Contract(self._manifest.contract)

    def encode(self, rows: Sequence[Row], target: tuple[int, int]) -> Encoded:
        """Latents [B,C,h,w], tokens and mask of B rows as the encoders gave them.

        Raises InputError for damaged files, and for what the cache does not hold.
        """
        manifest = self._manifest
        side = int(manifest.contract["resolution"])
        assert target == (side, side), "buckets are refused when a cache is opened"
        latents = torch.empty(
            (len(rows), *manifest.latent_shape), dtype=_STORED_DTYPES[manifest.latent_dtype]
        )
        memory: Any = latents.view(torch.uint8).reshape(len(rows), -1).numpy()
        texts, failures = [], {}
        for number, row in enumerate(rows):
            stored = self._shards.row(row.sample_id)
            if "undecodable" in stored.about:
                failures[number] = stored.about["undecodable"]
                latents[number].zero_()
                texts.append(bytearray())
                continue
            stored.latents_into(memoryview(memory[number]), mirrored=row.view.mirrored)
            texts.append(self._tokens(stored, row.caption))
        if manifest.token_shape is None:
            return Encoded(latents, None, None, failures)
        return Encoded(latents, *self._padded(texts), failures)

    def _tokens(self, stored: StoredRow, caption: str) -> bytearray:
        """Of one caption, without padding; a sample that has no captions has no tokens."""
        manifest, about = self._manifest, stored.about
        if manifest.token_shape is None or not about["captions"]:
            return bytearray()
        texts = [each["text"] for each in about["captions"]]
        if caption not in texts:
            raise InputError(
                found=f"sample {about['key']} has no caption {caption!r} in the cache",
                required="one of the captions it was filled with",
                remedy="fill the cache again from these shards",
            )
        return stored.tokens(texts.index(caption), manifest.token_bytes)

    def _padded(self, texts: Sequence[bytearray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B,L] or [B,L,C] and mask [B,L], padded as the text encoder pads."""
        shape, name = self._manifest.token_shape, self._manifest.token_dtype
        assert shape is not None and name is not None
        stored = _STORED_DTYPES[name]
        dtype = torch.int64 if stored == torch.int16 else stored
        lengths = torch.tensor([len(text) // self._manifest.token_bytes for text in texts])
        mask = torch.arange(shape[0]) < lengths[:, None]
        tokens = torch.full((len(texts), *shape), self._padding, dtype=dtype)
        joined = bytearray().join(texts)
        if joined:
            real = torch.frombuffer(joined, dtype=stored).reshape(-1, *shape[1:])
            tokens[mask] = real.to(dtype)
        return tokens, mask


def _complete(directory: Path, shards: str) -> CacheManifest:
    manifest = read_manifest(directory)
    if manifest is None:
        raise InputError(
            found=f"{directory} has no {MANIFEST_NAME}",
            required="a cache of latents",
            remedy=f"fill it: dsr-scale encode {shards} {directory} --config CONFIG, with this run's "
            "file for CONFIG; or correct encoder.cache",
        )
    if not (directory / INDEX_NAME).is_file():
        missing = missing_units(directory, manifest)
        total = sum(size > 0 for size in manifest.shard_sizes)
        raise InputError(
            found=f"{directory} is unfinished: {len(missing)} of {total} units are missing"
            + ("" if missing else ", but its index is"),
            required="all units, and the index that is written last",
            remedy=f"run dsr-scale encode {shards} {directory} --config CONFIG to its end, with this "
            "run's file for CONFIG; units that are there are kept",
        )
    return manifest


def _is_same(directory: Path, shards: str) -> bool:
    return Path(shards).expanduser().resolve() == directory.resolve()
