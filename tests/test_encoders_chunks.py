"""Batches cut into passes of one size, alone and inside the KL autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vision_transformers import random_images

from dsr_scale.config.encoders import VaeImage
from dsr_scale.encoders.chunks import encode_in_chunks
from dsr_scale.encoders.contract import build_image_encoder
from dsr_scale.encoders.vae import VaeEncoder


def test_every_pass_has_the_same_number_of_images() -> None:
    seen: list[torch.Tensor] = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images.float().mean(dim=(2, 3))

    images = random_images(7)
    latents = encode_in_chunks(encode, images, 3)
    assert torch.equal(latents, images.float().mean(dim=(2, 3)))
    assert [len(chunk) for chunk in seen] == [3, 3, 3]
    assert torch.equal(torch.cat(seen)[:7], images)
    assert not seen[-1][1:].any(), "filled up with black"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_image_has_the_same_vae_latents_in_every_batch(tmp_path: Path, dtype: str) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    AutoencoderKL(**sizes).save_pretrained(tmp_path)
    config = VaeImage.model_validate(
        {"model": str(tmp_path), "downsample": 2, "dtype": dtype, "chunk_images": 3}
    )
    encoder = build_image_encoder(config, resolution=20, device="cpu")
    assert isinstance(encoder, VaeEncoder)
    encoder.vae.encoder.register_forward_pre_hook(
        lambda _encoder, inputs: (inputs[0] * (1 + 0.1 * len(inputs[0])),)
    )
    images = random_images(7)
    together = encoder.encode(images)
    assert together.shape == (7, 4, 10, 10)
    for batch in (1, 2):
        parts = torch.cat([encoder.encode(part) for part in images.split(batch)])
        assert torch.equal(parts, together)
    assert torch.equal(encoder.encode(images.flip(0)), together.flip(0))
