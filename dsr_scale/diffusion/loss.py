"""The training loss: mean squared error of the velocity, optionally weighted.

Two weightings exist: min-SNR over timesteps, and the paper's loss masking over tokens, whose
negative result (docs/method.md §3) shows that outliers are not just a few extreme tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dsr_scale.config.diffusion import DiffusionConfig
from dsr_scale.diffusion.path import velocity_target

_EPSILON = 1e-8


class Loss(NamedTuple):
    """The loss of one micro-batch."""

    mean: Tensor
    """Scalar with gradient."""
    per_sample: Tensor
    """[B] without gradient; its mean is `mean`, so losses can be told apart by timestep."""


def min_snr_weight(t: Tensor, gamma: float) -> Tensor:
    """Weight on the velocity loss that is min(SNR, γ) on the data loss, SNR = ((1−t)/t)²: [B] → [B].

    The data error is t times the velocity error, so the weight is t²·min(SNR, γ), written without
    a division.
    """
    return ((1 - t) ** 2).minimum(gamma * t**2)


def token_mask_weight(x: Tensor, threshold: float) -> Tensor:
    """Weights [B,1,H,W] that leave tokens of norm ≥ `threshold` out: m/(mean m + ε) (docs/method.md §3).

    The norm is over the channels of the whitened latents x [B,C,H,W], the mean over each image: a
    sample's loss is then its own, whatever micro-batch and rank it falls to (docs/method.md §6).
    """
    kept = (x.float().norm(dim=1, keepdim=True) < threshold).float()
    return kept / (kept.mean(dim=(1, 2, 3), keepdim=True) + _EPSILON)


def velocity_loss(
    velocity: Tensor, x: Tensor, noise: Tensor, t: Tensor, config: DiffusionConfig
) -> Loss:
    """Squared error of `velocity` against ε − x in float32, all [B,C,H,W] and t [B], mean over all."""
    error = (velocity.float() - velocity_target(x.float(), noise.float())) ** 2
    if config.mask_token_norm is not None:
        error = error * token_mask_weight(x, config.mask_token_norm)
    per_sample = error.flatten(1).mean(dim=1)
    if config.weighting == "min_snr":
        per_sample = per_sample * min_snr_weight(t.float(), config.min_snr_gamma)
    return Loss(per_sample.mean(), per_sample.detach())
