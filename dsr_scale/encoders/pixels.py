"""Raw pixels as latents: patches in [-1, 1], and their exact inverse. Needs no weights.

Channel `(colour·p + row)·p + column` of a latent is that colour of the pixel at (row, column) of
its p×p patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsr_scale.base.errors import InputError


class PixelsEncoder:
    """uint8 images → patches in [-1, 1]."""

    def __init__(self, patch: int, device: torch.device) -> None:
        self.patch = patch
        self.device = device

    @property
    def network(self) -> nn.Module | None:
        """There are no weights."""
        return None

    @property
    def files_digest(self) -> str | None:
        """Nothing is read from files."""
        return None

    @property
    def channels(self) -> int:
        """C = 3·patch²."""
        return 3 * self.patch**2

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B,3,H,W] → float32 [B,3·p²,H/p,W/p].

        Raises InputError when a side is not divisible by the patch.
        """
        if images.shape[-2] % self.patch or images.shape[-1] % self.patch:
            raise InputError(
                found=f"an image of {images.shape[-2]}×{images.shape[-1]} pixels",
                required=f"sides divisible by the patch of {self.patch}",
                remedy="change data.resolution, data.buckets or encoders.image.patch",
            )
        return functional.pixel_unshuffle(from_uint8(images.to(self.device)), self.patch)


class PixelsInverse:
    """Patches in [-1, 1] → uint8 images; exact on what `PixelsEncoder` made."""

    def __init__(self, patch: int, device: torch.device) -> None:
        self.patch = patch
        self.device = device

    def decode(self, latents: Tensor) -> Tensor:
        """float [B,3·p²,h,w] → uint8 [B,3,h·p,w·p]; values outside [-1, 1] are clipped."""
        return to_uint8(functional.pixel_shuffle(latents.to(self.device).float(), self.patch))


def from_uint8(images: Tensor) -> Tensor:
    """uint8 0…255 → float32 in [-1, 1]."""
    assert images.dtype == torch.uint8
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float in [-1, 1], clipped → uint8, rounded to the nearest."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
