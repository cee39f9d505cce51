"""A map of token norms over the image that the tokens became.

Drawn with Pillow alone: what is installed to show a page has no matplotlib. Colours run from 0 to the
largest norm, in units of the median and at least to 2, the least that the rule of
`base.token_outliers` calls an outlier: a map without outliers then looks as even as it is.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dsr_scale.base.token_outliers import outliers

SIDE = 512
"""Pixels of the longer side, at least."""
_LEAST_TOP = 2.0
_ANCHORS = np.array(
    [
        [0, 0, 4],
        [28, 16, 68],
        [79, 18, 123],
        [129, 37, 129],
        [181, 54, 122],
        [229, 80, 100],
        [251, 135, 97],
        [254, 194, 135],
        [252, 253, 191],
    ]
)
"""Red, green and blue of matplotlib's magma at equal distances, as in the reports."""
_MARK = "#56B4E9"
_SCALE_HEIGHT, _BAR_HEIGHT, _FONT_SIZE = 48, 14, 17


def norm_overlay(image: Tensor, norms: Tensor, *, opacity: float) -> Image.Image:
    """Image uint8 [3,H,W], in grey, under the colours of token norms [h,w], with their scale beneath.

    `opacity` 0 shows the image alone, 1 the map alone. Outlier tokens are framed.
    """
    height, width = image.shape[1:]
    enlarged = max(1.0, SIDE / max(height, width))
    size = round(width * enlarged), round(height * enlarged)
    median = norms.float().median()
    relative = (norms / median).numpy()
    top = max(_LEAST_TOP, float(relative.max()))
    picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.LANCZOS)
    grey = picture.convert("L").convert("RGB")  # of the colours, only the norms' remain
    heat = Image.fromarray(_colours(relative / top)).resize(size, Image.Resampling.NEAREST)
    blended = Image.blend(grey, heat, opacity)
    _frame_outliers(blended, norms)
    sheet = Image.new("RGB", (size[0], size[1] + _SCALE_HEIGHT), "white")
    sheet.paste(blended, (0, 0))
    _draw_scale(sheet, size[1], top)
    return sheet


def _colours(values: np.ndarray) -> np.ndarray:
    """Values […] in [0, 1] → uint8 […,3]."""
    places = np.linspace(0, 1, len(_ANCHORS))
    channels = [np.interp(values, places, channel) for channel in _ANCHORS.T]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _frame_outliers(picture: Image.Image, norms: Tensor) -> None:
    rows, columns = norms.shape
    draw = ImageDraw.Draw(picture)
    for token in outliers(norms.flatten()[None])[0].nonzero()[:, 0].tolist():
        row, column = divmod(token, columns)
        left, right = (place * picture.width // columns for place in (column, column + 1))
        above, below = (place * picture.height // rows for place in (row, row + 1))
        draw.rectangle((left, above, right - 1, below - 1), outline=_MARK, width=3)


def _draw_scale(sheet: Image.Image, top_edge: int, top: float) -> None:
    """A bar of all colours and, under its ends, the norms that they stand for."""
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=_FONT_SIZE)
    bar = _colours(np.linspace(0, 1, sheet.width))[None].repeat(_BAR_HEIGHT, axis=0)
    sheet.paste(Image.fromarray(bar), (0, top_edge + 4))
    y = top_edge + 4 + _BAR_HEIGHT + 4
    draw.text((2, y), "0", fill="black", font=font)
    largest = f"{top:.3g} times the median norm"
    draw.text((sheet.width - 2, y), largest, fill="black", font=font, anchor="ra")
