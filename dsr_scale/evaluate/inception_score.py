"""The Inception Score: how sure a classifier is of each image, and how varied its answers are.

exp of the mean divergence of p(y|x) from its mean p(y), which is the mean of Σ p log p minus Σ p̄ log p̄:
two sums that add up over ranks. The score depends on the number of images, so large sets are split
into parts of 5000 or more, as ADM does, and the mean over parts is reported.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsr_scale.evaluate.frechet import require_samples

PART_IMAGES = 5000


class InceptionScore(NamedTuple):
    """Over the parts of a set."""

    mean: float
    std: float
    """Population standard deviation; 0 for one part."""


class ScoreSums:
    """Sums over the images of each part: number, Σ p log p, and p itself, float64."""

    def __init__(self, images: int, classes: int, device: torch.device | str = "cpu") -> None:
        """`images` is the number of all ranks together; it decides the parts."""
        self._images = images
        self._parts = max(1, images // PART_IMAGES)
        self._classes = classes
        self.sums = torch.zeros(self._parts, 2 + classes, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, first_index: int) -> None:
        """Counts logits [B,C] in, of the images from `first_index` on in the order of the set."""
        log_p = logits.to(self.sums).log_softmax(dim=1)
        p = log_p.exp()
        values = torch.cat([torch.ones_like(p[:, :1]), (p * log_p).sum(1, keepdim=True), p], dim=1)
        index = torch.arange(first_index, first_index + len(logits), device=p.device)
        part = index * self._parts // self._images
        inside = part == torch.arange(self._parts, device=p.device)[:, None]
        self.sums += inside.to(values) @ values

    def tensors(self) -> list[Tensor]:
        """What adds up over ranks."""
        return [self.sums]

    def score(self) -> InceptionScore:
        """Raises InputError when a part has fewer images than there are classes."""
        count = self.sums[:, 0]
        require_samples("inception_score", int(count.min()), self._classes)
        certainty = self.sums[:, 1] / count
        mean_p = self.sums[:, 2:] / count[:, None]
        scores = (certainty - torch.special.xlogy(mean_p, mean_p).sum(1)).exp()
        return InceptionScore(float(scores.mean()), float(scores.std(correction=0)))
