"""From stored bytes to a uint8 RGB image of the training size.

The image is scaled to cover the target and cropped in one resampling pass over the crop box, so no
pixel outside the crop is ever computed; a JPEG that is much larger than needed is decoded at a
reduced scale by the DCT (up to 8 times less work). Crop and flip depend on (seed, epoch, sample
id) only.
"""

from __future__ import annotations

import io
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dsr_scale.base import random_keys

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TIFF")
"""Raster formats that PIL decodes by itself, JPEG with the MPO of cameras. EPS, for one, would start an
interpreter, and encoder servers read what others send. The same everywhere, so that servers, caches and
trainers fail on the same images."""

_EXIF_ORIENTATION = 0x0112
_DRAFT_MARGIN = 2
"""A JPEG is decoded at no less than this many times the target, so resampling sets the quality."""


class UnreadableImage(Exception):
    """The bytes are not an image that can be decoded; the message says why."""


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels after EXIF orientation, from the header alone."""
    try:
        with _opened(data) as image:
            return _oriented_size(image)
    except Exception as error:  # PIL's decoders raise nearly anything on broken bytes
        raise UnreadableImage(_describe(error)) from error


def verified_size(data: bytes) -> tuple[int, int]:
    """(height, width) after EXIF orientation, having decoded every byte once."""
    try:
        with _opened(data) as image:
            size = _oriented_size(image)
            # The smallest DCT scale still reads the whole stream, which is what is to be proven.
            image.draft("RGB", (1, 1))
            image.load()
            if image.mode in ("I", "F"):
                _to_rgb(image, (0, 0, 0))
            return size
    except UnreadableImage:
        raise
    except Exception as error:  # as above
        raise UnreadableImage(_describe(error)) from error


def decode_rgb(
    data: bytes, background: tuple[int, int, int], cover: tuple[int, int] | None = None
) -> Image.Image:
    """Decodes to RGB, upright, transparency laid over `background`.

    With `cover` (height, width) a large JPEG is decoded at a reduced scale that still covers twice
    that size. Raises `UnreadableImage`.
    """
    try:
        with _opened(data) as image:
            if cover is not None and image.format == "JPEG":
                height, width = cover
                if _is_transposed(image):
                    height, width = width, height
                image.draft("RGB", (_DRAFT_MARGIN * width, _DRAFT_MARGIN * height))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image, background)
    except UnreadableImage:
        raise
    except Exception as error:  # as above
        raise UnreadableImage(_describe(error)) from error


def reencode_image(
    data: bytes,
    *,
    format: Literal["jpeg", "webp"],
    quality: int,
    alpha_quality: int = 100,
    max_side: int | None = None,
) -> tuple[bytes, int, int]:
    """Stores the image anew, upright: (bytes, height, width).

    WebP keeps transparency; JPEG lays it over white. Scaled down with Lanczos if the longer side
    exceeds `max_side`. Raises `UnreadableImage`.
    """
    try:
        with _opened(data) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            transparent = image.has_transparency_data
        if format == "webp" and transparent:
            image = image.convert("RGBA")
        else:
            image = _to_rgb(image, (255, 255, 255))
        if max_side is not None:
            image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=None)
        buffer = io.BytesIO()
        if format == "webp":
            image.save(buffer, "WEBP", quality=quality, alpha_quality=alpha_quality, method=6)
        else:
            image.save(buffer, "JPEG", quality=quality, optimize=True)
        return buffer.getvalue(), image.height, image.width
    except UnreadableImage:
        raise
    except Exception as error:  # as above
        raise UnreadableImage(_describe(error)) from error


class View(NamedTuple):
    """Which part of an image is seen, and which way round."""

    share_x: float = 0.5
    """Where the crop lies in the room that is left: 0 is the left edge, 1 the right."""
    share_y: float = 0.5
    """The same from top to bottom."""
    mirrored: bool = False


CENTRE = View()


def choose_view(
    crop: Literal["center", "random"], flip: float, *, seed: int, epoch: int, sample_id: int
) -> View:
    """The view of a sample in an epoch: a function of these alone; mirrored with probability `flip`."""
    share_x = share_y = 0.5
    if crop == "random":
        share_x, share_y = random_keys.generator(seed, "crop", epoch, sample_id).random(2).tolist()
    mirrored = flip > 0 and random_keys.generator(seed, "flip", epoch, sample_id).random() < flip
    return View(share_x, share_y, bool(mirrored))


def cover_and_crop(image: Image.Image, target: tuple[int, int], view: View = CENTRE) -> np.ndarray:
    """Scales an RGB image to cover `target` (height, width) and crops to `view`: uint8 [3, H, W].

    Bicubic with antialiasing.
    """
    height, width = target
    scale = max(height / image.height, width / image.width)
    crop_width, crop_height = width / scale, height / scale
    free_x, free_y = image.width - crop_width, image.height - crop_height
    left, top = max(0.0, free_x * view.share_x), max(0.0, free_y * view.share_y)
    box = (
        left,
        top,
        min(image.width, left + crop_width),
        min(image.height, top + crop_height),
    )
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    # PIL takes colours apart three times faster than numpy transposes them.
    planes = bytearray().join(image.tobytes("raw", colour) for colour in "RGB")
    pixels = np.frombuffer(planes, dtype=np.uint8).reshape(3, height, width)
    return np.ascontiguousarray(pixels[:, :, ::-1]) if view.mirrored else pixels


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _describe(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own text holds a memory address
        return "not an image of a known format"
    return f"{type(error).__name__}: {error}".replace("\n", " ")


def _is_transposed(image: Image.Image) -> bool:
    return image.getexif().get(_EXIF_ORIENTATION, 1) in (5, 6, 7, 8)


def _oriented_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if _is_transposed(image) else (height, width)


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any PIL mode to RGB; an RGB image itself, not a copy."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableImage("integer grey values outside 0 to 65535")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise UnreadableImage("floating-point pixels have no defined range")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (*background, 255))
        return Image.alpha_composite(canvas, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
