"""Does a sample show what its prompt says? Asked without any pretrained network.

Each sample's nearest training image, in pixels, either carries the sample's caption or does not.
The share that does, against chance, cannot be faked by pretty pictures. It measures recall of the
training set, which is the point of a small demonstration and no measure of generalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NearestMatch:
    """Result over all prompts."""

    prompts: int
    candidates: int
    matches: int
    chance: float
    """Expected share of matches of a sampler that ignores its prompt."""
    nearest: tuple[int, ...]
    """Index of the nearest training image of each sample."""

    @property
    def rate(self) -> float:
        """Share of samples whose nearest training image has the very caption."""
        return self.matches / self.prompts

    def __str__(self) -> str:
        return (
            f"{self.matches} of {self.prompts} samples ({self.rate:.0%}) are nearest, in pixels, to "
            f"a training image with their very caption, among {self.candidates} images; chance "
            f"{self.chance:.1%}"
        )


def nearest_match(
    samples: Tensor, prompts: Sequence[str], images: Tensor, captions: Sequence[str]
) -> NearestMatch:
    """Compares uint8 `samples` [N,3,H,W] for `prompts` with training `images` [M,3,H,W] and their captions."""
    distances = torch.cdist(samples.flatten(1).float(), images.flatten(1).float())
    nearest = distances.argmin(dim=1).tolist()
    matches = sum(captions[j] == prompt for j, prompt in zip(nearest, prompts, strict=True))
    expected = [
        sum(caption == prompt for caption in captions) / len(captions) for prompt in prompts
    ]
    return NearestMatch(
        prompts=len(prompts),
        candidates=len(captions),
        matches=matches,
        chance=sum(expected) / len(prompts),
        nearest=tuple(nearest),
    )
