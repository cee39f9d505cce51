"""The encoders without weights: pixels and bytes, against loops written out by hand."""

from __future__ import annotations

import pytest
import torch

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import latent_channels, latent_grid
from dsr_scale.config.encoders import (
    BytesText,
    EncodersConfig,
    NoDecoder,
    NoText,
    PixelsImage,
    RaeDecoder,
)
from dsr_scale.encoders.contract import build_decoder, build_image_encoder, build_text_encoder


def _images(batch: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)


def test_pixel_latents_follow_the_documented_order() -> None:
    patch, images = 4, _images(2, 8, 12)
    encoders = EncodersConfig(image=PixelsImage(patch=patch))
    encoder = build_image_encoder(encoders.image, resolution=8, device="cpu")
    latents = encoder.encode(images)
    assert encoder.channels == latent_channels(encoders)
    assert latents.shape == (2, encoder.channels, *latent_grid(encoders, 8, 12, 8))
    for colour, row, column in [(0, 0, 0), (1, 2, 3), (2, 3, 1)]:
        channel = (colour * patch + row) * patch + column
        expected = images[:, colour, row::patch, column::patch].float() / 127.5 - 1
        assert torch.equal(latents[:, channel], expected)


def test_every_byte_value_survives_pixels_and_back() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    encoders = EncodersConfig(image=PixelsImage(patch=8))
    encoder = build_image_encoder(encoders.image, resolution=16, device="cpu")
    decoder = build_decoder(encoders, resolution=16, device="cpu")
    assert decoder is not None
    assert torch.equal(decoder.decode(encoder.encode(images)), images)
    assert decoder.decode(torch.full((1, 192, 1, 1), 7.0)).unique().tolist() == [255]


def test_pixels_that_do_not_divide_are_refused() -> None:
    encoder = build_image_encoder(PixelsImage(patch=16), resolution=32, device="cpu")
    with pytest.raises(InputError, match="sides divisible by the patch of 16"):
        encoder.encode(_images(1, 32, 40))


@pytest.mark.parametrize(
    ("caption", "kept"),
    [
        ("cat", b"cat"),
        ("exactly8", b"exactly8"),
        ("much longer than eight", b"much lon"),
        ("Füchse ä", b"F\xc3\xbcchse "),
        ("seven..ü", b"seven.."),
        ("🦊🦊🦊", "🦊🦊".encode()),
        ("", b""),
    ],
)
def test_bytes_are_cut_between_characters(caption: str, kept: bytes) -> None:
    encoder = build_text_encoder(BytesText(max_length=8), device="cpu")
    assert encoder is not None
    text = encoder.encode(["other", caption])
    assert text.tokens[1].tolist() == list(kept) + [256] * (8 - len(kept))
    assert text.mask[1].tolist() == [True] * len(kept) + [False] * (8 - len(kept))
    assert torch.equal(encoder.encode([caption]).tokens[0], text.tokens[1])


def test_none_builds_nothing_and_strangers_are_refused() -> None:
    assert build_text_encoder(NoText(), device="cpu") is None
    silent = EncodersConfig(decoder=NoDecoder())
    assert build_decoder(silent, resolution=16, device="cpu") is None
    strangers = EncodersConfig(decoder=RaeDecoder(model="any/name"))
    with pytest.raises(InputError, match=r"set encoders\.decoder\.kind to pixels"):
        build_decoder(strangers, resolution=16, device="cpu")
