"""What a finished pack says about itself: `manifest.json`, `sizes.npy` and the content fingerprint.

The manifest is written last, so its presence means that the pack is complete. The fingerprint
hashes 16-byte sample digests in order: it depends neither on the number of workers nor on how the
samples were split into shards, and a training run stores it to refuse a resume on other data.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsr_scale.base.atomic_files import write_bytes, write_json
from dsr_scale.base.errors import InputError
from dsr_scale.data.samples import COLUMNS, SCHEMA_VERSION

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.json"
SIZES_NAME = "sizes.npy"
DROPPED_NAME = "dropped.jsonl"


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`."""

    schema: int
    samples: int
    fingerprint: str
    sizes_sha256: str
    columns: dict[str, str]
    source: dict[str, Any]
    options: dict[str, Any]
    report: dict[str, Any]


def fingerprint(digests: Iterable[bytes]) -> str:
    """Hex SHA-256 over sample digests in order; they may come in pieces of any length."""
    state = hashlib.sha256(f"dsr_scale samples {SCHEMA_VERSION}\n".encode())
    for piece in digests:
        state.update(piece)
    return state.hexdigest()


def write_sizes(path: Path, sizes: np.ndarray) -> str:
    """Writes (height, width) [N, 2] as the smallest fitting unsigned type; returns its SHA-256."""
    dtype = np.uint16 if sizes.size == 0 or int(sizes.max()) < 2**16 else np.uint32
    buffer = io.BytesIO()
    np.save(buffer, sizes.astype(dtype))
    content = buffer.getvalue()
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes `manifest.json`, which marks the pack as complete."""
    write_json(directory / MANIFEST_NAME, asdict(manifest))


def parse_manifest(text: str | bytes, where: str) -> Manifest:
    """Reads a manifest; `where` names it in the error when it is of another schema."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(
            found=f"{where} is not JSON ({error})",
            required="the manifest that packing wrote",
            remedy="pack the data again, or restore the file from a copy of the pack",
        ) from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA_VERSION:
        version = content.get("schema") if isinstance(content, dict) else None
        raise InputError(
            found=f"{where} has schema {version!r}",
            required=f"schema {SCHEMA_VERSION}, with columns {', '.join(COLUMNS)}",
            remedy="pack the data with this version of dsr-scale",
        )
    try:
        return Manifest(**content)
    except TypeError as error:
        raise InputError(
            found=f"{where} lacks or exceeds the known fields ({error})",
            required=f"the fields {', '.join(Manifest.__dataclass_fields__)}",
            remedy="pack the data again with this version of dsr-scale",
        ) from error
