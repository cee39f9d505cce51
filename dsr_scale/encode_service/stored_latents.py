"""Latents that this machine's servers encoded before, kept on disk by what they were made from.

The key covers everything a latent depends on: contract, target, view and the image. So a hit is the
latent that encoding would give, and a changed encoder never meets its predecessor's. Captions are not
kept: text encoders remember their own.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dsr_scale.config.encoder_access import ServerConfig
from dsr_scale.data.encoded import Row

if TYPE_CHECKING:
    from dsr_scale.encode_service.rolling import RollingCache

_SHAPE = struct.Struct("<3I")


class StoredLatents:
    """A rolling cache, seen as rows and latents."""

    def __init__(self, cache: RollingCache, fingerprint: str, dtype: torch.dtype) -> None:
        self._cache = cache
        self._fingerprint = fingerprint.encode()
        self._dtype = dtype

    def keys(self, rows: Sequence[Row], target: tuple[int, int]) -> list[bytes]:
        """One for each row."""
        return [self._key(row, target) for row in rows]

    def find(self, keys: Sequence[bytes]) -> dict[int, torch.Tensor]:
        """The latent [C,h,w] of each key that is stored, by its place in `keys`."""
        values = self._cache.get(keys)
        return {place: self._read(v) for place, v in enumerate(values) if v is not None}

    def keep(self, latents: Mapping[bytes, torch.Tensor]) -> None:
        """Stores latents [C,h,w] by key."""
        values = [
            _SHAPE.pack(*latent.shape) + latent.contiguous().view(torch.uint8).numpy().tobytes()
            for latent in latents.values()
        ]
        self._cache.put(list(latents), values)

    def _key(self, row: Row, target: tuple[int, int]) -> bytes:
        # Of other people's images: a hash for which nobody can make two with one key.
        state = hashlib.blake2b(self._fingerprint, digest_size=16)
        if isinstance(row.image, np.ndarray):  # the view was applied before it was sent
            state.update(f"pixels {target}".encode())
            state.update(np.ascontiguousarray(row.image).data)
        else:
            state.update(f"file {target} {tuple(row.view)}".encode())
            state.update(row.image)
        return state.digest()

    def _read(self, value: bytes) -> torch.Tensor:
        shape = _SHAPE.unpack_from(value)
        content = bytearray(memoryview(value)[_SHAPE.size :])
        return torch.frombuffer(content, dtype=self._dtype).reshape(shape)


def open_stored(
    settings: ServerConfig, fingerprint: str, dtype: torch.dtype
) -> StoredLatents | None:
    """The disk cache that the run file asks for, if it does."""
    if settings.cache_directory is None:
        return None
    from dsr_scale.encode_service.rolling import RollingCache

    directory = Path(settings.cache_directory).expanduser()
    cache = RollingCache(directory, int(settings.cache_gib * 2**30))
    return StoredLatents(cache, fingerprint, dtype)
