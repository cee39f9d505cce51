"""Pixels from ViT latents: the decoder of a representation autoencoder (docs/method.md §4).

diffusers' `AutoencoderRAE` carries latent statistics of its own, whitens with another epsilon and
may scale. None of that is used: our whitening is undone with our statistics, and the decoder gets
the tokens themselves. So a decoder serves an encoder with registers or recomputed statistics as
it is, and nothing is applied twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import latent_grid, vit_geometry
from dsr_scale.config.encoders import EncodersConfig, RaeDecoder, VitImage
from dsr_scale.encoders.loading import load_autoencoder, require_equal
from dsr_scale.encoders.locate import locate
from dsr_scale.encoders.whitening import load_whitening


class RaeInverse:
    """Latents of a `VitEncoder` → uint8 images of the training resolution, in float32."""

    def __init__(
        self, image: VitImage, config: RaeDecoder, *, resolution: int, device: torch.device
    ) -> None:
        self.device = device
        self.grid = latent_grid(EncodersConfig(image=image), resolution, resolution, resolution)
        location = locate(config.model, config.revision)
        self.whitening = load_whitening(image, resolution=resolution, device=device)
        self.rae = load_autoencoder("AutoencoderRAE", location, dtype="fp32", device=device)
        require_equal(
            "the encoder's token width",
            vit_geometry(image).channels,
            self.rae.config.encoder_hidden_size,
            location,
        )
        require_equal(
            "the number of latent positions",
            self.grid[0] * self.grid[1],
            self.rae.num_patches,
            location,
        )
        require_equal("data.resolution", resolution, self.rae.decoder_image_size, location)
        del self.rae.encoder

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """float [B,C,h,w] → uint8 [B,3,H,W].

        Raises InputError for another grid than that of the square training image, the only one
        that the decoder's position embedding has.
        """
        if latents.shape[-2:] != self.grid:
            raise InputError(
                found=f"latents of {latents.shape[-2]}×{latents.shape[-1]} positions",
                required=f"the {self.grid[0]}×{self.grid[1]} positions of the RAE decoder",
                remedy="sample square images of data.resolution, or use another decoder",
            )
        z = latents.to(self.device).float()
        if self.whitening:
            z = self.whitening.undo(z)
        patches = self.rae.decoder(z.flatten(2).transpose(1, 2).contiguous()).logits
        images = self.rae.decoder.unpatchify(patches)
        images = images * self.rae.encoder_std + self.rae.encoder_mean
        return (images * 255).round().clamp(0, 255).to(torch.uint8)
