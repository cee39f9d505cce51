"""What the small JSON files of a pack say of it, for whoever plans a run on a machine without torch.

Nothing is checked: whether a pack is sound is for packing and training to say. What cannot be read,
because the pack is remote, not made yet or broken, is None.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import dsr_scale
from dsr_scale.config.data import DataConfig


class LocalPack(NamedTuple):
    """A pack's figures, each None where it is unknown."""

    samples: int | None
    """Samples that the run uses: all, or `data.max_samples`."""
    sample_bytes: int | None
    """Mean size of a stored sample: image file, captions and metadata."""
    caption_characters: float | None
    """Mean length of a caption."""


def local_pack(data: DataConfig) -> LocalPack:
    """Reads `manifest.json` and the MDS `index.json` at `data.shards`."""
    directory = _directory(data.shards)
    manifest, index = _content(directory / "manifest.json"), _content(directory / "index.json")
    shards = _dig(index, "shards")
    packed = _total(shards, "samples")
    size = _total(shards, "raw_data", "bytes")
    samples = _number(_dig(manifest, "samples")) if manifest is not None else packed
    used = samples
    if samples is not None and data.max_samples is not None:
        used = min(samples, data.max_samples)
    return LocalPack(
        samples=None if used is None else int(used),
        sample_bytes=round(size / packed) if size and packed else None,
        caption_characters=_number(_dig(manifest, "report", "caption_characters", "mean")),
    )


def _directory(shards: str) -> Path:
    if shards.startswith("package:"):
        return Path(dsr_scale.__file__).parent / "data" / shards.removeprefix("package:")
    return Path(shards)


def _content(path: Path) -> Any:
    """The parsed file; None where there is none, and an empty object where it cannot be read."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _dig(content: Any, *keys: str) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _total(shards: Any, *keys: str) -> int | None:
    """Sum over shards of what stands under `keys`; None unless every shard has it."""
    numbers = [_number(_dig(shard, *keys)) for shard in shards] if isinstance(shards, list) else []
    known = [number for number in numbers if number is not None]
    return int(sum(known)) if known and len(known) == len(numbers) else None


def _number(value: Any) -> float | int | None:
    sound = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    return value if sound else None
