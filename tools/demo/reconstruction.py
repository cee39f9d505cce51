"""How much of an image a decoder gives back, measured on images that nothing was trained on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dsr_scale.config.encoders import EncodersConfig
from dsr_scale.data.loader import open_samples
from dsr_scale.encoders.contract import build_decoder, build_image_encoder
from dsr_scale.evaluate.reference_set import data_at
from dsr_scale.evaluate.training_images import training_images
from dsr_scale.telemetry.pictures import image_grid

_BATCH = 32
_SHOWN = 8


def psnr_db(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Of each image: 10·log₁₀(255² / mean squared error); uint8 [B,3,H,W] twice → [B] in dB.

    An exact reconstruction counts as one that is off by one step in one value.
    """
    errors = (images.double() - reconstructions.double()).square().flatten(1)
    return 10 * torch.log10(255**2 / errors.mean(1).clamp(min=1 / errors.shape[1]))


def reconstruction(
    encoders: EncodersConfig, shards: str, resolution: int, picture: Path, count: int | None
) -> dict[str, float]:
    """Mean PSNR over the first `count` images (None: all) at `shards`; draws the first few."""
    device = torch.device("cpu")
    encoder = build_image_encoder(encoders.image, resolution=resolution, device=device)
    decoder = build_decoder(encoders, resolution=resolution, device=device)
    assert decoder is not None
    data = data_at(shards, resolution)
    images, captions = training_images(data, count or len(open_samples(data)))
    decoded = torch.cat([decoder.decode(encoder.encode(part)) for part in images.split(_BATCH)])
    # What a decoder that ignores its latents would reach at best.
    mean = images.double().mean(0).round().to(torch.uint8).expand_as(images)
    rows = [("image", images[:_SHOWN]), ("decoded", decoded[:_SHOWN])]
    image_grid(rows, captions[:_SHOWN], picture, side=64)
    return {
        "images": len(images),
        "psnr_db": psnr_db(images, decoded).mean().item(),
        "psnr_db_of_mean_image": psnr_db(images, mean).mean().item(),
    }
