"""Decoding, cropping, captions: compared with plain numpy and with measured frequencies."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
from data_fixtures import encoded, picture
from PIL import Image

from dsr_scale.data.captions import choose_caption, drop_condition
from dsr_scale.data.samples import Caption
from dsr_scale.data.transforms import (
    FORMATS,
    UnreadableImage,
    View,
    choose_view,
    cover_and_crop,
    decode_rgb,
    image_size,
    reencode_image,
    verified_size,
)

WHITE = (255, 255, 255)


def stored(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
"""What a viewer shows for an EXIF orientation, from the EXIF standard's table."""


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = picture(1, 10, 20)
    data = stored(Image.fromarray(pixels), exif=exif)
    expected = UPRIGHT[orientation](pixels)
    np.testing.assert_array_equal(np.asarray(decode_rgb(data, WHITE)), expected)
    assert image_size(data) == verified_size(data) == expected.shape[:2]


def test_modes_become_the_same_rgb() -> None:
    grey = picture(2)[:, :, 0]
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    sixteen_bit = Image.fromarray(grey.astype(np.uint16) * 257)
    palette = Image.fromarray(grey).convert("P")
    for image in (Image.fromarray(grey), sixteen_bit, palette):
        np.testing.assert_array_equal(np.asarray(decode_rgb(stored(image), WHITE)), expected)
    bilevel = Image.fromarray(grey > 127)
    pixels = np.asarray(decode_rgb(stored(bilevel), WHITE))
    np.testing.assert_array_equal(pixels, np.where(grey[:, :, None] > 127, 255, 0).repeat(3, 2))


def test_transparency_lies_over_the_background() -> None:
    colour, alpha = picture(3), picture(4)[:, :, 0]
    data = stored(Image.fromarray(np.dstack([colour, alpha])))
    share = alpha[:, :, None] / 255
    expected = colour * share + np.array([10, 200, 90]) * (1 - share)
    got = np.asarray(decode_rgb(data, (10, 200, 90))).astype(float)
    assert np.abs(got - expected).max() <= 1
    marked = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8)).convert("P")
    marked.putpalette([9, 8, 7, 60, 50, 40])
    data = stored(marked, transparency=1)
    got = np.asarray(decode_rgb(data, (1, 2, 3)))
    assert got[0, 0].tolist() == [9, 8, 7] and got[0, 1].tolist() == [1, 2, 3]


def test_cmyk_is_converted() -> None:
    pixels = picture(5, 64, 64)
    data = stored(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=95)
    error = np.asarray(decode_rgb(data, WHITE)).astype(float) - pixels
    assert np.abs(error).mean() < 6


def test_a_large_jpeg_decoded_at_reduced_scale_gives_nearly_the_same_crop() -> None:
    data = encoded(6, 1200, 1600, "JPEG")
    whole, reduced = decode_rgb(data, WHITE), decode_rgb(data, WHITE, (64, 64))
    assert reduced.size == (200, 150) and whole.size == (1600, 1200)
    difference = cover_and_crop(whole, (64, 64)).astype(int) - cover_and_crop(reduced, (64, 64))
    assert np.abs(difference).max() <= 4
    turned = Image.Exif()
    turned[0x0112] = 6
    sideways = stored(Image.open(io.BytesIO(encoded(6, 160, 1600, "JPEG"))), "JPEG", exif=turned)
    assert decode_rgb(sideways, WHITE, (64, 16)).size == (40, 400)


def test_centre_crop_equals_resize_then_crop() -> None:
    image = Image.fromarray(picture(7, 60, 100))
    got = cover_and_crop(image, (30, 20))
    resized = np.asarray(image.resize((50, 30), Image.Resampling.BICUBIC))
    expected = resized[:, 15:35].transpose(2, 0, 1)
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_random_crop_and_flip_depend_on_identity_alone() -> None:
    image = Image.fromarray(picture(8, 20, 60))
    identity = {"seed": 1, "epoch": 2, "sample_id": 3}
    crop = cover_and_crop(image, (20, 20), choose_view("random", 0.5, **identity))
    again = cover_and_crop(image, (20, 20), choose_view("random", 0.5, **identity))
    np.testing.assert_array_equal(crop, again)
    plain = cover_and_crop(image, (20, 20), choose_view("random", 0.0, **identity))
    mirrored = cover_and_crop(image, (20, 20), choose_view("random", 1.0, **identity))
    np.testing.assert_array_equal(mirrored, plain[:, :, ::-1])
    different = {
        cover_and_crop(
            image, (20, 20), choose_view("random", 0.0, seed=1, epoch=epoch, sample_id=3)
        ).tobytes()
        for epoch in range(20)
    }
    assert len(different) > 15


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", encoded(9)[:80], encoded(9, kind="JPEG")[:-200]],
    ids=["empty", "text", "cut off PNG", "cut off JPEG"],
)
def test_broken_bytes_are_unreadable(data: bytes) -> None:
    for read in (verified_size, lambda data: decode_rgb(data, WHITE)):
        with pytest.raises(UnreadableImage):
            read(data)


@pytest.mark.parametrize("kind", ["ICO", "TGA", "EPS", "PDF"])
def test_formats_that_no_server_decodes_are_decoded_nowhere(kind: str) -> None:
    data = stored(Image.fromarray(picture(1)), kind)
    for read in (
        image_size,
        verified_size,
        lambda data: decode_rgb(data, WHITE),
        lambda data: reencode_image(data, format="jpeg", quality=90),
    ):
        with pytest.raises(UnreadableImage, match="known format"):
            read(data)


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
def test_every_listed_format_is_decoded(kind: str) -> None:
    pixels = np.full((24, 32, 3), (200, 30, 90), dtype=np.uint8)
    data = stored(Image.fromarray(pixels), kind)
    assert image_size(data) == verified_size(data) == (24, 32)
    image = decode_rgb(data, WHITE)
    # GIF has the nearest colour of a palette, JPEG and its like a colour nearby.
    assert np.abs(np.asarray(image).astype(int) - pixels).max() <= 8
    cropped = cover_and_crop(image, (24, 32))
    np.testing.assert_array_equal(cropped, np.asarray(image).transpose(2, 0, 1))
    mirrored = cover_and_crop(image, (24, 32), View(mirrored=True))
    np.testing.assert_array_equal(mirrored, cropped[:, :, ::-1])


def test_floating_point_pixels_are_refused() -> None:
    data = stored(Image.fromarray(picture(1)[:, :, 0].astype(np.float32)), "TIFF")
    for read in (verified_size, lambda data: decode_rgb(data, WHITE)):
        with pytest.raises(UnreadableImage, match="floating-point"):
            read(data)


def test_reencoding_scales_and_keeps_transparency() -> None:
    alpha = np.full((40, 80), 128, dtype=np.uint8)
    data = stored(Image.fromarray(np.dstack([picture(1, 40, 80), alpha])))
    small, height, width = reencode_image(data, format="webp", quality=95, max_side=32)
    assert (height, width) == image_size(small) == (16, 32)
    with Image.open(io.BytesIO(small)) as image:
        assert np.asarray(image.convert("RGBA"))[:, :, 3].tolist() == [[128] * 32] * 16
    opaque, *_ = reencode_image(data, format="jpeg", quality=95)
    difference = np.asarray(decode_rgb(opaque, WHITE)).astype(int) - np.asarray(
        decode_rgb(data, WHITE)
    )
    assert np.abs(difference).mean() < 3


def test_captions_are_drawn_by_weight() -> None:
    captions = (Caption("a", weight=3), Caption("b", weight=1), Caption("c", weight=6))
    draws = Counter(
        choose_caption(captions, "weighted", seed=0, epoch=epoch, sample_id=5)
        for epoch in range(2000)
    )
    for text, share in (("a", 0.3), ("b", 0.1), ("c", 0.6)):
        assert abs(draws[text] / 2000 - share) < 0.04
    assert choose_caption(captions, "first", seed=0, epoch=0, sample_id=5) == "a"


def test_conditions_are_dropped_at_the_given_rate() -> None:
    drops = [drop_condition(0.1, seed=0, epoch=0, sample_id=n) for n in range(3000)]
    assert abs(sum(drops) / 3000 - 0.1) < 0.02
    assert not any(drop_condition(0.0, seed=0, epoch=0, sample_id=n) for n in range(100))
    assert all(drop_condition(1.0, seed=0, epoch=0, sample_id=n) for n in range(100))
