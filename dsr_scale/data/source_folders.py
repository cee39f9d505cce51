"""A folder of images with caption files beside them: `x.jpg`, `x.txt`, and optionally `x.json`.

Each line of the text file is one caption; the JSON object becomes metadata. Subfolders are
included; a sample's key is its path below the folder, without the ending.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dsr_scale.base.errors import InputError
from dsr_scale.data.rows import parse_caption_lines, parse_metadata
from dsr_scale.data.samples import UnusableRecord
from dsr_scale.data.sources import (
    IMAGE_SUFFIXES,
    Dropped,
    RawSample,
    SourceOptions,
    Unit,
    name_some,
)

_SIDECAR_SUFFIXES = (".txt", ".json")


class FolderSource:
    """Images below one directory. A unit's span is a tuple of (key, image file name or None)."""

    kind = "folder"

    def __init__(self, directory: Path, options: SourceOptions) -> None:
        self._directory = directory
        self._unit_samples = options.unit_samples
        images: dict[str, list[str]] = {}
        texts: set[str] = set()
        beside: list[tuple[str, str]] = []
        for parent, folders, names in os.walk(directory, onerror=_raise):
            folders.sort()
            below = Path(parent).relative_to(directory)
            for name in names:
                suffix = Path(name).suffix
                key = (below / name.removesuffix(suffix)).as_posix()
                if suffix.lower() in IMAGE_SUFFIXES:
                    images.setdefault(key, []).append(key + suffix)
                elif suffix.lower() in _SIDECAR_SUFFIXES:
                    beside.append((key, key + suffix))
                    if suffix.lower() == ".txt":
                        texts.add(key)
        doubled = [name for names in images.values() if len(names) > 1 for name in sorted(names)]
        if doubled:
            raise InputError(
                found=f"{directory} has images that differ only in their ending: "
                f"{name_some(doubled)}",
                required="one image for each caption file",
                remedy="remove or rename the others",
            )
        if not images:
            raise InputError(
                found=f"{directory} holds no images",
                required=f"files that end in {', '.join(sorted(IMAGE_SUFFIXES))}",
                remedy="correct the path, or name the kind of source",
            )
        orphans = [(key, None) for key in texts - images.keys()]
        self._entries = sorted([*((key, names[0]) for key, names in images.items()), *orphans])
        wanted = texts | images.keys()  # a JSON file of its own is no part of the source
        names = [name for _, name in self._entries if name is not None]
        names += [name for key, name in beside if key in wanted]
        self.files = [directory / name for name in sorted(names)]

    def units(self) -> list[Unit]:
        """Slices of `unit_samples` entries of the sorted listing."""
        size, entries = self._unit_samples, self._entries
        return [
            Unit(str(self._directory), tuple(entries[start : start + size]))
            for start in range(0, len(entries), size)
        ]

    def read(self, unit: Unit) -> Iterator[RawSample | Dropped]:
        """The unit's samples in order."""
        for key, name in unit.span:
            if name is None:
                yield Dropped(key, "missing image", f"{key}.txt has no image")
                continue
            image = self._directory / name
            text, description = _beside(image, ".txt"), _beside(image, ".json")
            try:
                captions = parse_caption_lines(text, key) if text is not None else ()
                metadata = parse_metadata(description, key) if description is not None else {}
            except UnusableRecord as error:
                yield Dropped(error.key, error.reason, error.detail)
                continue
            yield RawSample(key, image.read_bytes(), captions, metadata)

    def missing_images(self) -> list[str]:
        """Caption files without an image."""
        return [f"{key}.txt" for key, name in self._entries if name is None]

    def __getstate__(self) -> dict[str, object]:
        # The listing may be long, and a unit carries its own part of it.
        return {**self.__dict__, "_entries": [], "files": []}


def _raise(error: OSError) -> None:
    raise error  # os.walk would skip a folder that it may not list


def _beside(image: Path, suffix: str) -> bytes | None:
    path = image.with_suffix(suffix)
    return path.read_bytes() if path.is_file() else None
