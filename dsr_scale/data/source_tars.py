"""Webdataset tars in img2dataset layout as a source to pack; a unit is one tar."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dsr_scale.data.samples import UnusableRecord
from dsr_scale.data.sources import Dropped, RawSample, Unit
from dsr_scale.data.tar_members import captions_and_metadata, scan_tar


class TarSource:
    """Local tars."""

    kind = "webdataset"

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def units(self) -> list[Unit]:
        """One unit for each tar."""
        return [Unit(str(file), None) for file in self.files]

    def read(self, unit: Unit) -> Iterator[RawSample | Dropped]:
        """The samples of one tar in order."""
        path = Path(unit.path)
        with path.open("rb") as file:
            for entry in scan_tar(file, unit.path):
                if entry.image is None:
                    present = ", ".join(entry.suffixes)
                    yield Dropped(entry.key, "missing image", f"has only {present}")
                    continue
                try:
                    captions, metadata = captions_and_metadata(
                        _read(file, entry.text), _read(file, entry.metadata), entry.key
                    )
                except UnusableRecord as error:
                    yield Dropped(error.key, error.reason, error.detail)
                    continue
                yield RawSample(entry.key, _read(file, entry.image) or b"", captions, metadata)

    def missing_images(self) -> list[str]:
        """None that could be told without reading everything: dropped samples name them."""
        return []


def _read(file: BinaryIO, span: tuple[int, int] | None) -> bytes | None:
    if span is None:
        return None
    file.seek(span[0])
    return file.read(span[1])
