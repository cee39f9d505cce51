"""The colour of an object: which of ten names CLIP finds nearest to what the object's mask shows.

A colour's text embedding is the mean over three sentences, two of which name the object's class. What
lies in the box but outside the mask is painted grey, so that the background's colour does not count;
a detector without masks leaves it in, and its scores are lower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dsr_scale.evaluate.clip_score import ClipScorer
from dsr_scale.evaluate.detection import DetectedObject

COLORS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
)

BACKGROUND = 0x99
"""Of each channel, where the object is not."""

BATCH_OBJECTS = 64


def object_crop(image: Tensor, found: DetectedObject) -> Image.Image:
    """An object of a uint8 image [3,H,W] cut out along its box, at least one pixel either way."""
    pixels = image.cpu()
    if found.mask is not None:
        pixels = torch.where(found.mask, pixels, torch.full_like(pixels, BACKGROUND))
    _, height, width = pixels.shape
    left, top, right, bottom = (round(edge) for edge in found.box)
    left, top = min(left, width - 1), min(top, height - 1)
    pixels = pixels[:, top : max(bottom, top + 1), left : max(right, left + 1)]
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


class ColorClassifier:
    """Names colours by a CLIP model."""

    def __init__(self, clip: ClipScorer) -> None:
        self._clip = clip
        self._of_class: dict[str, Tensor] = {}

    def __call__(self, crops: Sequence[Image.Image], names: Sequence[str]) -> list[str]:
        """The colour of each object, given its picture and the name of its class."""
        colors = []
        for start in range(0, len(crops), BATCH_OBJECTS):
            part = slice(start, start + BATCH_OBJECTS)
            texts = torch.stack([self._texts(name) for name in names[part]])
            seen = self._clip.embed_images(crops[part])
            nearest = torch.einsum("bd,bcd->bc", seen, texts).argmax(dim=1)
            colors += [COLORS[index] for index in nearest.tolist()]
        return colors

    def _texts(self, name: str) -> Tensor:
        """[C,D] unit vectors, one per colour of an object of class `name`."""
        if name not in self._of_class:
            sentences = [
                sentence
                for color in COLORS
                for sentence in (
                    f"a photo of a {color} {name}",
                    f"a photo of a {color}-colored {name}",
                    f"a photo of a {color} object",
                )
            ]
            embeddings = self._clip.embed_texts(sentences)
            means = embeddings.unflatten(0, (len(COLORS), -1)).mean(dim=1)
            self._of_class[name] = F.normalize(means, dim=-1)
        return self._of_class[name]
