"""DiffAug: real and made images are distorted in the same ways before the discriminator sees them.

So it cannot learn the few real images by heart, and the decoder, whose images are distorted after it
made them, learns none of the distortions (Zhao et al., "Differentiable Augmentation"): brightness,
saturation, contrast, translation and cutout, all differentiable. Draws depend on (seed, step, sample
id) alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dsr_scale.base import random_keys

BRIGHTNESS = 0.25
"""Most that is added to all colours, which span 1."""
MOST_SATURATION = 2.0
LEAST_CONTRAST, MOST_CONTRAST = 0.5, 1.5
TRANSLATION = 0.125
"""Most that an image is moved along an axis, of its side."""
CUTOUT = 0.5
"""Side of the square that is blanked, of the image's side."""
GREY = 0.5
"""What moves in from outside and fills the cutout."""


def augmented(images: Tensor, *, seed: int, step: int, sample_ids: Sequence[int]) -> Tensor:
    """Images [B,3,H,W] in [0, 1] scale, each distorted by its own draw; float32, not clamped."""
    uniform = np.stack(
        [
            random_keys.generator(seed, "discriminator augmentation", step, sample).random(7)
            for sample in sample_ids
        ]
    )
    draws = torch.from_numpy(uniform).to(images.device)[:, :, None, None, None]
    down, right, top, left = draws[:, 3:].unbind(1)
    x = _coloured(images.float(), *draws[:, :3].float().unbind(1))
    x = _moved(x, down, dim=2)
    x = _moved(x, right, dim=3)
    return _cut(x, top, left)


def _coloured(x: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Draws [B,1,1,1] in [0, 1)."""
    x = x + (2 * brightness - 1) * BRIGHTNESS
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * (saturation * MOST_SATURATION)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (x - mean) * (LEAST_CONTRAST + contrast * (MOST_CONTRAST - LEAST_CONTRAST))


def _moved(x: Tensor, amount: Tensor, *, dim: int) -> Tensor:
    """`x` moved along `dim` by −⌊side/8⌋ … ⌊side/8⌋ pixels, for amounts [B,1,1,1] in [0, 1)."""
    side = x.shape[dim]
    most = int(side * TRANSLATION)
    shift = (amount * (2 * most + 1)).long() - most
    positions = torch.arange(side, device=x.device)
    source = positions.view([-1 if axis == dim else 1 for axis in range(4)]) - shift
    inside = (source >= 0) & (source < side)
    taken = x.gather(dim, source.clamp(0, side - 1).expand_as(x))
    return torch.where(inside, taken, GREY)


def _cut(x: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """A square around (top, left) made grey, [B,1,1,1] in [0, 1) of the sides; what sticks out falls away."""
    height, width = x.shape[-2:]
    rows = torch.arange(height, device=x.device).view(1, 1, -1, 1) + 0.5
    columns = torch.arange(width, device=x.device).view(1, 1, 1, -1) + 0.5
    hidden = (rows - top * height).abs() < height * CUTOUT / 2
    hidden = hidden & ((columns - left * width).abs() < width * CUTOUT / 2)
    return torch.where(hidden, GREY, x)
