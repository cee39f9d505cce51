"""What the rest of the program knows of the three frozen networks, and how each is built.

Images go in as uint8 and come out as latents, captions as tokens with a mask, latents as uint8.
Nothing else is promised, so an encoder in this process, in another one or in a cache can stand in
for each other. Implementations are imported when they are built: importing this file costs torch
and nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never

import torch
from torch import Tensor, nn

from dsr_scale.base.errors import InputError
from dsr_scale.config.encoders import (
    BytesText,
    EncodersConfig,
    ImageEncoderConfig,
    NoDecoder,
    NoText,
    PixelsDecoder,
    PixelsImage,
    RaeDecoder,
    TextEncoderConfig,
    TransformersText,
    VaeDecoder,
    VaeImage,
    VitImage,
)


class ImageEncoder(Protocol):
    """Pixels to latents. Frozen, without dropout, each image independent of its batch."""

    @property
    def channels(self) -> int:
        """C of the latents."""
        ...

    @property
    def network(self) -> nn.Module | None:
        """What holds the weights, if anything does."""
        ...

    @property
    def files_digest(self) -> str | None:
        """Of what was read from files beside the weights and decides results; None for nothing."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B,3,H,W] → float32 latents [B,C,h,w] on the encoder's device."""
        ...


@dataclass(frozen=True)
class TextTokens:
    """Encoded captions, padded on the right to one length L."""

    tokens: Tensor
    """Features [B,L,C] with zeros in the padding, or byte ids [B,L] int64 padded with 256."""
    mask: Tensor
    """bool [B,L], True for real tokens. A caption without tokens has a row of False."""


class TextEncoder(Protocol):
    """Captions to tokens. Frozen, each caption independent of its batch."""

    @property
    def network(self) -> nn.Module | None:
        """What holds the weights, if anything does."""
        ...

    @property
    def files_digest(self) -> str | None:
        """Of what was read from files beside the weights and decides results; None for nothing."""
        ...

    def encode(self, captions: Sequence[str]) -> TextTokens:
        """B captions → tokens and mask on the encoder's device."""
        ...


class Decoder(Protocol):
    """Latents to pixels, the inverse of the image encoder it was built for."""

    def decode(self, latents: Tensor) -> Tensor:
        """float [B,C,h,w] → uint8 [B,3,H,W] on the decoder's device."""
        ...


def rounded(latents: Tensor, encoders: EncodersConfig) -> Tensor:
    """Latents in `encoders.latent_dtype`: the one place where their precision is decided."""
    return latents.to(torch.bfloat16 if encoders.latent_dtype == "bf16" else torch.float32)


def build_image_encoder(
    config: ImageEncoderConfig, *, resolution: int, device: torch.device | str
) -> ImageEncoder:
    """The image encoder that `config` names, for training squares of `resolution` pixels.

    Raises InputError when the weights cannot be found or do not agree with the config.
    """
    device = torch.device(device)
    match config:
        case PixelsImage():
            from dsr_scale.encoders.pixels import PixelsEncoder

            return PixelsEncoder(config.patch, device)
        case VitImage():
            from dsr_scale.encoders.vit import VitEncoder

            return VitEncoder(config, resolution=resolution, device=device)
        case VaeImage():
            from dsr_scale.encoders.vae import VaeEncoder

            return VaeEncoder(config, device=device)
        case _:
            assert_never(config)


def build_text_encoder(
    config: TextEncoderConfig, *, device: torch.device | str
) -> TextEncoder | None:
    """The text encoder that `config` names; None for `kind: none`.

    Raises InputError when the weights cannot be found or do not agree with the config.
    """
    device = torch.device(device)
    match config:
        case NoText():
            return None
        case BytesText():
            from dsr_scale.encoders.text_bytes import BytesEncoder

            return BytesEncoder(config.max_length, device)
        case TransformersText():
            from dsr_scale.encoders.text_transformers import TransformersEncoder

            return TransformersEncoder(config, device=device)
        case _:
            assert_never(config)


def build_decoder(
    encoders: EncodersConfig, *, resolution: int, device: torch.device | str
) -> Decoder | None:
    """The decoder of `encoders.image`'s latents; None for `kind: none`.

    Raises InputError when the decoder does not belong to the image encoder, or its weights cannot
    be found or do not agree with the config.
    """
    device = torch.device(device)
    image, decoder = encoders.image, encoders.decoder
    match image, decoder:
        case _, NoDecoder():
            return None
        case PixelsImage(), PixelsDecoder():
            from dsr_scale.encoders.pixels import PixelsInverse

            return PixelsInverse(image.patch, device)
        case VitImage(), RaeDecoder():
            from dsr_scale.encoders.rae import RaeInverse

            return RaeInverse(image, decoder, resolution=resolution, device=device)
        case VaeImage(), VaeDecoder():
            from dsr_scale.encoders.vae import VaeInverse

            return VaeInverse(image, decoder, device=device)
        case _:
            fitting = {"pixels": "pixels", "vit": "rae", "vae": "vae"}[image.kind]
            raise InputError(
                found=f"encoders.decoder.kind = {decoder.kind} with encoders.image.kind = "
                f"{image.kind}",
                required="a decoder of the image encoder's latents",
                remedy=f"set encoders.decoder.kind to {fitting}, or to none for latents only",
            )
