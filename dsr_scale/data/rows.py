"""One row of a list or table as a sample: which columns hold the image, the captions and the key.

Everything else in the row becomes metadata, as far as JSON can hold it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsr_scale.base.errors import InputError
from dsr_scale.data.samples import Caption, UnusableRecord
from dsr_scale.data.sources import Dropped, RawSample, SourceOptions

_IMAGE_COLUMNS = (
    "image",
    "image_path",
    "path",
    "file_name",
    "filename",
    "filepath",
    "jpg",
    "png",
    "webp",
)
_CAPTION_COLUMNS = ("captions", "caption", "text", "prompt")
_KEY_COLUMNS = ("key", "id", "__key__")

BAD_CAPTION = "bad caption"
BAD_METADATA = "bad metadata"


@dataclass(frozen=True)
class RowColumns:
    """Which columns mean what."""

    image: str
    captions: tuple[str, ...]
    key: str | None

    @classmethod
    def choose(cls, present: Sequence[str], options: SourceOptions, where: str) -> RowColumns:
        """Takes the named columns, or the first usual name that is present."""
        image = options.image_column or _first(_IMAGE_COLUMNS, present)
        usual = _first(_CAPTION_COLUMNS, present)
        captions = options.caption_columns or ((usual,) if usual else ())
        key = options.key_column or _first(_KEY_COLUMNS, present)
        absent = [name for name in (image, *captions, key) if name and name not in present]
        if image is None or absent:
            raise InputError(
                found=f"{where} has columns {', '.join(present) or 'none'}"
                + (f", not {', '.join(absent)}" if absent else ""),
                required="a column with the image" if image is None else "the columns named",
                remedy="name the image, caption and key columns with the options",
            )
        return cls(image, tuple(captions), key)


def row_to_sample(
    row: Mapping[str, Any], columns: RowColumns, *, default_key: str, root: Path
) -> RawSample | Dropped:
    """Reads the image if the row has only its path.

    Raises `InputError` for an image column of the wrong type.
    """
    value = row.get(columns.image)
    key = default_key if columns.key is None else str(row.get(columns.key))
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        key = value if columns.key is None else key
        try:
            image = (root / value).read_bytes()
        except FileNotFoundError:
            return Dropped(key, "missing image", value)
    elif isinstance(value, bytes | bytearray | memoryview) and len(value):
        image = bytes(value)
    elif value is None or (isinstance(value, str | bytes) and not value):
        return Dropped(key, "missing image", "empty value")
    else:
        raise InputError(
            found=f"column {columns.image} of {default_key} holds {type(value).__name__}",
            required="a path, encoded bytes, or a record of bytes and path",
            remedy="name another image column with the option",
        )
    try:
        captions = [
            caption
            for name in columns.captions
            for caption in parse_captions(row.get(name), name, key)
        ]
    except UnusableRecord as error:
        return Dropped(error.key, error.reason, error.detail)
    used = {columns.image, columns.key, *columns.captions}
    metadata = {
        name: content
        for name, value in row.items()
        if name not in used and value is not None and (content := _as_json(value)) is not _NOT_JSON
    }
    return RawSample(key, image, tuple(captions), metadata)


def parse_captions(value: Any, source: str, key: str) -> list[Caption]:
    """Captions from a text, a list of texts, or a list of {text, source, weight} records.

    `source` names the column, `key` the sample. Raises `UnusableRecord` for anything else.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, str):
        text = _checked(value, key)
        return [Caption(text, source)] if text else []
    if isinstance(value, Mapping):
        weight = value.get("weight", 1.0)
        text = value.get("text")
        if (
            isinstance(text, str)
            and isinstance(weight, int | float)
            and 0 < weight <= sys.float_info.max
        ):
            kept = _checked(text, key)
            name = str(value.get("source", source))
            return [Caption(kept, name, float(weight))] if kept else []
    elif isinstance(value, Sequence):
        return [caption for item in value for caption in parse_captions(item, source, key)]
    raise UnusableRecord(
        key,
        BAD_CAPTION,
        f"{source} holds {value!r:.80}, not a text, nor a list of texts or of "
        "{text, source, weight > 0}",
    )


def parse_caption_lines(text: bytes, key: str) -> tuple[Caption, ...]:
    """One caption for each line that is not blank. Raises `UnusableRecord` if not UTF-8."""
    try:
        lines = [line.strip() for line in text.decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UnusableRecord(key, BAD_CAPTION, f"not UTF-8 ({error})") from error
    return tuple(Caption(line, "text") for line in lines if line)


def parse_metadata(content: bytes, key: str) -> dict[str, Any]:
    """A JSON object. Raises `UnusableRecord` for anything else."""
    try:
        metadata = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UnusableRecord(key, BAD_METADATA, f"not JSON ({error})") from error
    if not isinstance(metadata, dict):
        raise UnusableRecord(key, BAD_METADATA, f"{metadata!r:.80}, not a JSON object")
    return metadata


def _checked(text: str, key: str) -> str:
    """The text without blanks around it. JSON can spell half a surrogate pair, which no text is."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRecord(key, BAD_CAPTION, f"no Unicode text ({error})") from error
    return text.strip()


_NOT_JSON = object()


def _as_json(value: Any) -> Any:
    """The value as JSON gives it back, so that a sample equals what is read later."""
    if isinstance(value, bytes | bytearray | memoryview):
        return _NOT_JSON
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return _as_json(str(value))


def _first(usual: Sequence[str], present: Sequence[str]) -> str | None:
    return next((name for name in usual if name in present), None)
