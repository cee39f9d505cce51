"""The Fréchet distance of two Gaussians (FID, sFID), from sums that add up over batches and ranks.

What is kept of a set of features is their number, sum and sum of outer products in float64. They have
one shape whatever a rank saw, so ranks with uneven shares, or none, join by one addition. The price
is cancellation when the mean is far larger than the spread; at Inception's features it costs the last
4 of 16 digits.

The trace of the matrix square root √(Σ₁Σ₂) is the sum of the roots of the eigenvalues of the symmetric
√Σ₁·Σ₂·√Σ₁, so no general matrix root is taken, and a root that would be imaginary shows as a negative
eigenvalue. Fewer samples than channels + 1 give a singular covariance, and a distance that tells of the
number of samples more than of the images: an error here, not a number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsr_scale.base.errors import InputError

_NEGATIVE = 1e-6
"""Most negative eigenvalue of a covariance, in units of the largest: what float32 storage leaves."""
_IMAGINARY = 1e-3
"""Most of the root's trace that may be imaginary, in units of its real part."""


@dataclass(frozen=True)
class Gaussian:
    """A distribution of features by its first two moments, float64 on the host."""

    mean: Tensor
    """[D]"""
    covariance: Tensor
    """[D,D], symmetric; normalised by N − 1."""


class FeatureMoments:
    """Number, sum [D] and outer products [D,D] of the features seen so far, float64."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(channels, dtype=torch.float64, device=device)
        self.products = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def add(self, features: Tensor) -> None:
        """Counts features [B,D] in."""
        features = features.to(self.total)
        self.count += len(features)
        self.total += features.sum(0)
        self.products.addmm_(features.T, features)

    def tensors(self) -> list[Tensor]:
        """What adds up over ranks, in a fixed order and of fixed shapes."""
        return [self.count, self.total, self.products]

    def gaussian(self, metric: str) -> Gaussian:
        """Mean and covariance. Raises InputError for too few samples; `metric` is for its message."""
        count = int(self.count)
        require_samples(metric, count, samples_needed(len(self.total)))
        mean = self.total / count
        covariance = (self.products - count * torch.outer(mean, mean)) / (count - 1)
        return Gaussian(mean.cpu(), covariance.cpu())


def samples_needed(channels: int) -> int:
    """The fewest samples whose covariance over that many channels can have full rank."""
    return channels + 1


def require_samples(metric: str, count: int, needed: int) -> None:
    """Raises InputError when a metric has fewer samples than it needs."""
    if count < needed:
        raise InputError(
            found=f"{count} images for {metric}",
            required=f"at least {needed}: with fewer the value depends on their number",
            remedy="evaluate more images, or leave this metric out with --metrics",
        )


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2√(Σ₁Σ₂)).

    Raises InputError for Gaussians of different size, values that are not finite, a matrix that is no
    covariance, and a square root with an imaginary part.
    """
    if first.mean.shape != second.mean.shape:
        raise InputError(
            found=f"statistics of {len(first.mean)} and of {len(second.mean)} channels",
            required="statistics of the same features",
            remedy="compute both with this command, or take the statistics file of this metric",
        )
    for gaussian in (first, second):
        if not (gaussian.mean.isfinite().all() and gaussian.covariance.isfinite().all()):
            raise _no_root("statistics with values that are not finite")
    # A second matrix that is no covariance has its negative eigenvalues in the product as well.
    root = _root(first.covariance)
    product = root @ second.covariance @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    real = eigenvalues.clamp(min=0).sqrt().sum()
    imaginary = (-eigenvalues).clamp(min=0).sqrt().sum()
    if not imaginary <= _IMAGINARY * real + torch.finfo(torch.float64).tiny:
        raise _no_root(f"an imaginary part of {float(imaginary):.3g} beside {float(real):.3g}")
    difference = first.mean - second.mean
    traces = first.covariance.trace() + second.covariance.trace()
    distance = float(difference.dot(difference) + traces - 2 * real)
    return max(distance, 0.0)  # rounding takes equal Gaussians below


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a covariance [D,D]."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    if eigenvalues[0] < -_NEGATIVE * eigenvalues[-1].abs():
        raise _no_root(
            f"a covariance with eigenvalues from {float(eigenvalues[0]):.3g} "
            f"to {float(eigenvalues[-1]):.3g}"
        )
    return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T


def _no_root(found: str) -> InputError:
    return InputError(
        found=found,
        required="covariances with a real square root",
        remedy="look for broken images or weights; write the reference statistics in float64",
    )
