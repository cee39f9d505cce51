"""A request's images as one tensor, decoded by a few threads while the device encodes others.

Decoding is that of the data workers, so a served image has the pixels an inline one has, and the same
images fail. Two things are refused besides, since servers read what others send: formats that PIL hands
to other programs, and, by PIL itself, images of more than 179 million pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from dsr_scale.data.encoded import Row
from dsr_scale.data.transforms import UnreadableImage, cover_and_crop, decode_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "JPEG2000", "MPO", "PPM", "TIFF")
"""Raster formats that PIL decodes by itself. EPS, for one, would start an interpreter."""

ROWS_AT_ONCE = 8
"""Images of one piece of work: threads share a request, and are not handed each image singly."""

Colour = tuple[int, int, int]


def pieces(rows: int) -> Iterator[range]:
    """Row numbers of each piece of work."""
    for start in range(0, rows, ROWS_AT_ONCE):
        yield range(start, min(rows, start + ROWS_AT_ONCE))


def decode_rows(
    rows: Sequence[Row], numbers: Sequence[int], pixels: np.ndarray, background: Colour
) -> dict[int, str]:
    """Writes `rows[i]` to `pixels[i]` uint8 [3,H,W] for each of `numbers`.

    Gives the reason for each row whose image cannot be decoded; its pixels are left as they are.
    """
    failures = {}
    target = (pixels.shape[-2], pixels.shape[-1])
    for number in numbers:
        row = rows[number]
        if isinstance(row.image, np.ndarray):
            pixels[number] = row.image
            continue
        try:
            _require_raster(row.image)
            image = decode_rgb(row.image, background, target)
            pixels[number] = cover_and_crop(image, target, row.view)
        except UnreadableImage as error:
            failures[number] = str(error)
    return failures


def _require_raster(data: bytes) -> None:
    """Looks at the header; what is no image at all is left to the decoder, which says so."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = image.format
    except Exception:  # PIL's parsers raise nearly anything on broken bytes
        return
    if kind not in FORMATS:
        raise UnreadableImage(f"a file of format {kind}, which servers do not decode")
