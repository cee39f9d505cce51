"""A request's images as one tensor, decoded by a few threads while the device encodes others.

Decoding is that of the data workers, so a served image has the pixels an inline one has, and the same
images fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dsr_scale.data.encoded import Row
from dsr_scale.data.transforms import UnreadableImage, cover_and_crop, decode_rgb

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
            image = decode_rgb(row.image, background, target)
            pixels[number] = cover_and_crop(image, target, row.view)
        except UnreadableImage as error:
            failures[number] = str(error)
    return failures
