"""Latents of a KL autoencoder: the posterior's mean, shifted and scaled as its config says.

Encoder and decoder are loaded apart and each drops the other's half, so that training holds no
decoder it does not use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsr_scale.config.encoders import Dtype, VaeDecoder, VaeImage
from dsr_scale.encoders.chunks import encode_in_chunks
from dsr_scale.encoders.identity import settings_digest
from dsr_scale.encoders.loading import load_autoencoder, require_equal
from dsr_scale.encoders.locate import locate
from dsr_scale.encoders.pixels import from_uint8, to_uint8


class VaeEncoder:
    """uint8 images → scaled latents of an `AutoencoderKL`."""

    def __init__(self, config: VaeImage, *, device: torch.device) -> None:
        self.device = device
        self.chunk_images = config.chunk_images
        self.vae = _load(config.model, config.revision, config, config.dtype, device)
        del self.vae.decoder
        self.shift, self.scale = _affine(self.vae.config, device)

    @property
    def network(self) -> nn.Module | None:
        """What holds the weights."""
        return self.vae

    @property
    def files_digest(self) -> str | None:
        """Of the autoencoder's config, shift and scale among it."""
        return settings_digest(self.vae.config)

    @property
    def channels(self) -> int:
        """C of the latents."""
        return self.vae.config.latent_channels

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B,3,H,W] → float32 [B,C,H/d,W/d], d the autoencoder's downsampling.

        In chunks of `chunk_images`.
        """
        return encode_in_chunks(self._latents, images, self.chunk_images)

    def _latents(self, images: Tensor) -> Tensor:
        pixels = from_uint8(images.to(self.device)).to(self.vae.dtype)
        mean = self.vae.encode(pixels).latent_dist.mode()
        return (mean.float() - self.shift) * self.scale


class VaeInverse:
    """Scaled latents → uint8 images, in float32."""

    def __init__(self, image: VaeImage, config: VaeDecoder, *, device: torch.device) -> None:
        self.device = device
        self.vae = _load(config.model, config.revision, image, "fp32", device)
        del self.vae.encoder
        self.shift, self.scale = _affine(self.vae.config, device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """float [B,C,h,w] → uint8 [B,3,h·d,w·d]."""
        z = latents.to(self.device).float() / self.scale + self.shift
        return to_uint8(self.vae.decode(z).sample)


def _load(
    model: str, revision: str | None, image: VaeImage, dtype: Dtype, device: torch.device
) -> Any:
    """The autoencoder. Raises InputError when it does not have the shape that `image` says."""
    location = locate(model, revision)
    vae = load_autoencoder("AutoencoderKL", location, dtype=dtype, device=device)
    downsample = 2 ** (len(vae.config.block_out_channels) - 1)
    require_equal("encoders.image.channels", image.channels, vae.config.latent_channels, location)
    require_equal("encoders.image.downsample", image.downsample, downsample, location)
    return vae


def _affine(config: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Shift and scale of latents, broadcastable to [B,C,h,w]: z = (mean − shift)·scale.

    Most configs have one number each; some have a mean and a standard deviation per channel.
    """
    shift = config.latents_mean or [config.shift_factor or 0.0]
    deviation = torch.tensor(config.latents_std or [1.0], device=device)
    scale = config.scaling_factor / deviation
    return torch.tensor(shift, device=device).view(1, -1, 1, 1), scale.view(1, -1, 1, 1)
