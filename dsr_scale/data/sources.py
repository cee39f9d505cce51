"""Where samples to be packed come from, cut into units of work.

A source lists deterministic units (a slice of a folder listing, a span of lines, a row group, a
tar), each small enough to be packed in a minute and read on its own by any process. What a unit
yields depends on nothing but the source and the options, so an interrupted pack continues unit by
unit and the result does not depend on how many processes worked on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from dsr_scale.base.errors import InputError
from dsr_scale.data.samples import Caption

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
)

Kind = Literal["auto", "folder", "jsonl", "csv", "parquet", "arrow", "webdataset"]


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source. Column names left at None are found among the usual ones."""

    kind: Kind = "auto"
    image_column: str | None = None
    """Column with a path, the encoded bytes, or a {bytes, path} record."""
    caption_columns: tuple[str, ...] = ()
    """Columns whose text, or list of texts, becomes captions."""
    key_column: str | None = None
    image_root: str | None = None
    """Directory that relative image paths start from; None: where the list file is."""
    unit_samples: int = 4096
    """Samples per unit of work, where the source does not dictate it."""


@dataclass(frozen=True)
class RawSample:
    """One sample as the source has it; the image is not yet opened."""

    key: str
    image: bytes
    captions: tuple[Caption, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Dropped:
    """A sample that is left out, and why. `reason` is one of a few words, `detail` is free."""

    key: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Unit:
    """One piece of a source; `span` means what its source says, and can be pickled."""

    path: str
    span: Any


class Source(Protocol):
    """A readable source; pickled to the packing processes."""

    kind: str
    files: list[Path]
    """What was found at the source's location, captions beside images included."""

    def units(self) -> list[Unit]:
        """All units in order."""
        ...

    def read(self, unit: Unit) -> Iterator[RawSample | Dropped]:
        """The samples of one unit, in order."""
        ...

    def missing_images(self) -> list[str]:
        """Names of images that captions refer to and that are not there."""
        ...


@contextlib.contextmanager
def source_errors() -> Iterator[None]:
    """Turns a refused read of a source's file into an error a person can act on."""
    try:
        yield
    except PermissionError as error:
        raise InputError(
            found=f"no permission to read {error.filename or error}",
            required="a source of which this user may read every file",
            remedy="change the permissions of that file or folder, or leave it out of the source",
        ) from error


_SUFFIX_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
}


def open_source(location: str, options: SourceOptions) -> Source:
    """Detects the kind of `location` (a file or directory) unless it is named, and opens it.

    Raises `InputError` for a missing, empty, ambiguous or unreadable source.
    """
    from dsr_scale.data.source_folders import FolderSource
    from dsr_scale.data.source_lists import ListSource
    from dsr_scale.data.source_tables import TableSource
    from dsr_scale.data.source_tars import TarSource

    path = Path(location)
    if not path.exists():
        raise _unusable(f"{location} does not exist")
    kind = options.kind if options.kind != "auto" else _detect(path)
    if kind == "folder":
        return FolderSource(path, options)
    files = list_files(path, kind)
    if kind in ("jsonl", "csv"):
        return ListSource(files, kind, options)
    if kind in ("parquet", "arrow"):
        return TableSource(files, kind, options)
    return TarSource(files)


def list_files(path: Path, kind: str) -> list[Path]:
    """The files of one kind: `path` itself, or those in the directory `path`, sorted by name."""
    if path.is_file():
        return [path]
    suffixes = {suffix for suffix, its_kind in _SUFFIX_KINDS.items() if its_kind == kind}
    files = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in suffixes)
    if not files:
        raise _unusable(f"{path} holds no {' or '.join(sorted(suffixes))} file")
    return files


def _detect(path: Path) -> str:
    if path.is_file():
        kind = _SUFFIX_KINDS.get(path.suffix.lower())
        if kind is None:
            raise _unusable(f"{path} has an unknown ending")
        return kind
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise InputError(
            found=f"{path} holds several splits: {', '.join(splits)}",
            required="one split",
            remedy=f"name its directory, for example {path / splits[0] if splits else path}",
        )
    endings = {entry.suffix.lower() for entry in path.iterdir() if entry.is_file()}
    kinds = {_SUFFIX_KINDS[ending] for ending in endings if ending in _SUFFIX_KINDS}
    if "webdataset" in kinds:
        kinds.discard("parquet")  # img2dataset writes one table of statistics beside each tar
    has_images = any(ending in IMAGE_SUFFIXES for ending in endings)
    if len(kinds) > 1 or (kinds and has_images):
        names = ["folder", *sorted(kinds)] if has_images else sorted(kinds)
        raise InputError(
            found=f"{path} could be read as {' or '.join(names)}",
            required="one kind of source",
            remedy=f"name it with the option kind: {', '.join(names)}",
        )
    if kinds:
        return kinds.pop()
    if not any(path.iterdir()):
        raise _unusable(f"{path} is empty")
    return "folder"


def name_some(names: Sequence[str], limit: int = 10) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _unusable(found: str) -> InputError:
    return InputError(
        found=found,
        required="a folder of images with caption files, JSONL, CSV or parquet lists, webdataset "
        "tars, or Hugging Face dataset files",
        remedy="correct the path, or name the kind of source",
    )
