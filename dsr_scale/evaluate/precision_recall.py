"""Improved precision and recall (Kynkäänniemi et al. 2019): which set reaches into the other.

A set's manifold is the union of balls around its features that reach to each one's k-th neighbour.
Precision is the share of generated images inside the real manifold, recall the share of real images
inside the generated one. Features of all images are needed at once: 2048 channels in float32 are
8 KiB an image. Distances are taken in blocks, in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dsr_scale.evaluate.frechet import require_samples

NEIGHBOURS = 3
"""k of ADM's evaluator and of the paper."""
SAMPLES_NEEDED = NEIGHBOURS + 1
_BLOCK_ROWS = 2048


class PrecisionRecall(NamedTuple):
    """Shares from 0 to 1."""

    precision: float
    recall: float


class FeatureRows:
    """A table with one row per image of the whole set [N,D] float32; a rank fills the rows it has.

    Rows of other ranks are zero, so tables add up, and `filled` says which rows anybody has.
    """

    def __init__(self, images: int, channels: int, device: torch.device | str = "cpu") -> None:
        self.rows = torch.zeros(images, channels, device=device)
        self.filled = torch.zeros(images, device=device)

    def add(self, features: Tensor, first_index: int) -> None:
        """Fills the rows from `first_index` on with features [B,D]."""
        place = slice(first_index, first_index + len(features))
        self.rows[place] = features.float()
        self.filled[place] = 1

    def tensors(self) -> list[Tensor]:
        """What adds up over ranks."""
        return [self.rows, self.filled]

    def features(self) -> Tensor:
        """The filled rows [M,D]."""
        return self.rows[self.filled > 0]


def precision_recall(real: Tensor, generated: Tensor) -> PrecisionRecall:
    """Of features [N,D] and [M,D] on one device.

    Raises InputError for 3 images or fewer in a set. Features that are not finite give NaN.
    """
    for name, features in (("real", real), ("generated", generated)):
        require_samples(f"precision_recall ({name})", len(features), SAMPLES_NEEDED)
    if not (real.isfinite().all() and generated.isfinite().all()):
        return PrecisionRecall(math.nan, math.nan)  # comparisons with NaN would count as outside
    return PrecisionRecall(
        precision=_share_inside(generated, real, _radii(real)),
        recall=_share_inside(real, generated, _radii(generated)),
    )


def _radii(features: Tensor) -> Tensor:
    """Distance [N] of each feature to its k-th neighbour in the same set, itself not counted."""
    centres = features.double()
    radii = [
        torch.cdist(block.double(), centres).kthvalue(NEIGHBOURS + 1, dim=1).values
        for block in features.split(_BLOCK_ROWS)
    ]
    return torch.cat(radii)


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of points [M,D] within the radius [N] of any centre [N,D]."""
    centres = centres.double()
    inside = [
        (torch.cdist(block.double(), centres) <= radii).any(dim=1)
        for block in points.split(_BLOCK_ROWS)
    ]
    return float(torch.cat(inside).double().mean())
