"""Whitening of latents by mean and variance per channel and position, and its inverse.

`(z − μ) / √(σ² + 1e-5)` with μ, σ² [C,h,w] of the square training image (docs/method.md §4). For an
image of another shape the statistics are resized bilinearly to its grid, as the encoder's position
embedding is resized; the inverse does the same, so it undoes exactly what was applied.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from dsr_scale.config.derive import latent_grid, vit_geometry
from dsr_scale.config.encoders import EncodersConfig, VitImage
from dsr_scale.encoders.outliers import treatment_identity
from dsr_scale.encoders.statistics import StatisticsIdentity, load_statistics, require_shape

EPSILON = 1e-5


class Whitening:
    """Applies and undoes one set of statistics on one device, in float32."""

    def __init__(self, mean: Tensor, variance: Tensor, device: torch.device) -> None:
        self.mean = mean.to(device, torch.float32)
        self.variance = variance.to(device, torch.float32)

    def apply(self, latents: Tensor) -> Tensor:
        """float32 [B,C,h,w] → whitened [B,C,h,w]."""
        mean, deviation = self._at((latents.shape[-2], latents.shape[-1]))
        return (latents - mean) / deviation

    def undo(self, latents: Tensor) -> Tensor:
        """Whitened float32 [B,C,h,w] → latents [B,C,h,w]."""
        mean, deviation = self._at((latents.shape[-2], latents.shape[-1]))
        return latents * deviation + mean

    def _at(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        mean, variance = self.mean, self.variance
        if mean.shape[-2:] != grid:
            both = torch.stack([mean, variance])
            mean, variance = functional.interpolate(
                both, size=grid, mode="bilinear", align_corners=False
            )
        return mean, (variance + EPSILON).sqrt()


def statistics_identity(image: VitImage, resolution: int) -> StatisticsIdentity:
    """What statistics of this encoder's latents must be of, for squares of `resolution` pixels.

    Raises InputError when a register file that `image.outliers` names cannot be read.
    """
    treatment = treatment_identity(image.outliers)
    return StatisticsIdentity(image.known_as, image.revision, resolution, treatment)


def load_whitening(image: VitImage, *, resolution: int, device: torch.device) -> Whitening | None:
    """The whitening that `image.statistics` names; None where it names none.

    Raises InputError when the file is missing, of another encoder, or of another shape.
    """
    if image.statistics is None:
        return None
    path = Path(image.statistics).expanduser()
    statistics = load_statistics(path, statistics_identity(image, resolution))
    grid = latent_grid(EncodersConfig(image=image), resolution, resolution, resolution)
    require_shape(path, statistics, vit_geometry(image).channels, grid)
    return Whitening(statistics.mean, statistics.variance, device)
