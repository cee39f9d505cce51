"""Webdataset tars: which members form a sample (the img2dataset layout).

Members that share a name up to its first dot belong together: `key.jpg`, `key.txt`, `key.json`.
A tar without compression can be read at any offset, so one scan of its headers is an index.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from dsr_scale.base.errors import InputError
from dsr_scale.data.rows import parse_caption_lines, parse_captions, parse_metadata
from dsr_scale.data.samples import Caption
from dsr_scale.data.sources import IMAGE_SUFFIXES


@dataclass
class TarEntry:
    """Where one sample's members lie: (offset, size) in bytes, None for one that is absent."""

    key: str
    image: tuple[int, int] | None = None
    text: tuple[int, int] | None = None
    metadata: tuple[int, int] | None = None
    suffixes: list[str] = field(default_factory=list)


def scan_tar(file: BinaryIO, name: str) -> Iterator[TarEntry]:
    """The samples of an open, uncompressed tar in order; the caller may seek between two of them.

    Raises `InputError`, with the tar's `name`, for a damaged file.
    """
    entry: TarEntry | None = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                key, suffix = split_name(member.name)
                if entry is None or entry.key != key:
                    if entry is not None:
                        yield entry
                    entry = TarEntry(key)
                _place(entry, suffix, (member.offset_data, member.size))
        if entry is not None:
            yield entry
    except (tarfile.TarError, EOFError) as error:
        raise InputError(
            found=f"{name} is no whole, uncompressed tar ({error})",
            required="tars in webdataset layout",
            remedy="fetch the file again; unpack compressed tars first",
        ) from error


def split_name(name: str) -> tuple[str, str]:
    """A member's sample key and ending: `a/b.seg.png` gives `a/b` and `.seg.png`."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, dot, ending = base.partition(".")
    return folder + slash + stem, (dot + ending).lower()


def captions_and_metadata(
    text: bytes | None, metadata: bytes | None, key: str
) -> tuple[tuple[Caption, ...], dict[str, Any]]:
    """Captions from the text member, one for each line, or else from the metadata's `caption`.

    Raises `UnusableRecord` for captions or metadata that cannot be read.
    """
    content = {} if metadata is None else parse_metadata(metadata, key)
    if text is not None:
        return parse_caption_lines(text, key), content
    return tuple(parse_captions(content.get("caption"), "caption", key)), content


def _place(entry: TarEntry, suffix: str, span: tuple[int, int]) -> None:
    if suffix in IMAGE_SUFFIXES and entry.image is None:
        entry.image = span
    elif suffix == ".txt":
        entry.text = span
    elif suffix == ".json":
        entry.metadata = span
    entry.suffixes.append(suffix)
