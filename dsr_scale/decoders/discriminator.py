"""The discriminator: frozen features of a self-supervised ViT under small trainable heads.

Several blocks of the ViT are tapped; each has a head of three convolutions over its patches, and
every patch of every tap gives one logit (Sauer et al., "StyleGAN-T"; the published decoders do it
with DINO-S/8). With frozen features little has to be learnt, which a few epochs suffice for.

The published heads normalise over the batch and bound their matrices by a running power iteration.
Here they normalise within an image and iterate from a fixed vector, so that a logit depends on its
image and the weights alone, not on batch, rank or history, and the weights are the whole state. The
price is a bound that twelve iterations leave a few percent low.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsr_scale.decoders.initialisation import initialise
from dsr_scale.decoders.vit_features import VitFeatures, open_vit_features

POWER_ITERATIONS = 12
LEAK = 0.2
"""Slope of the rectifiers below zero."""


class Discriminator(nn.Module):
    """Images → logits. Only `heads` is trained, and only its state is worth saving."""

    def __init__(self, features: VitFeatures) -> None:
        super().__init__()
        self.features = features
        self.heads = nn.ModuleList(Head(features.width) for _ in features.blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W] in [0, 1] scale → logits [B,K] float32, K = taps · patches.

        Gradients reach the images where they want one, and never the features' weights.
        """
        maps = self.features(images)
        logits = [head(x).flatten(1) for head, x in zip(self.heads, maps, strict=True)]
        return torch.cat(logits, dim=1).float()


class Head(nn.Module):
    """Features of patches [B,D,h,w] → logits [B,1,h,w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inward = SpectralConv2d(width, width, 1)
        self.inward_norm = nn.GroupNorm(math.gcd(32, width), width)
        self.around = SpectralConv2d(width, width, 3, padding=1)
        self.around_norm = nn.GroupNorm(math.gcd(32, width), width)
        self.outward = SpectralConv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.outward.weight.dtype)
        x = functional.leaky_relu(self.inward_norm(self.inward(x)), LEAK)
        around = functional.leaky_relu(self.around_norm(self.around(x)), LEAK)
        # Divided so that the sum of two independent parts is as large as one.
        return self.outward((x + around) / math.sqrt(2))


class SpectralConv2d(nn.Conv2d):
    """A convolution by its weight over the largest singular value of the weight as a matrix
    [out, in·k·k] (Miyato et al.), which bounds how fast its output can change."""

    start: Tensor

    def __init__(self, width_in: int, width_out: int, kernel: int, padding: int = 0) -> None:
        super().__init__(width_in, width_out, kernel, padding=padding)
        start = torch.randn(width_out, generator=torch.Generator().manual_seed(0))
        self.register_buffer("start", start, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.largest_singular_value().to(self.weight.dtype)
        return self._conv_forward(x, weight, self.bias)

    def largest_singular_value(self) -> Tensor:
        """A scalar, from below; its gradient takes the singular vectors as constant, as it may."""
        matrix = self.weight.flatten(1).float()
        with torch.no_grad():
            left = functional.normalize(self.start.float(), dim=0)
            for _ in range(POWER_ITERATIONS):
                right = functional.normalize(matrix.T @ left, dim=0)
                left = functional.normalize(matrix @ right, dim=0)
        return left @ matrix @ right


def open_discriminator(
    model: str, revision: str | None, *, blocks: Sequence[int], seed: int
) -> Discriminator:
    """A discriminator on the CPU over the vision transformer `model`, with the heads of `seed`.

    `model` is a directory or a hub name, `blocks` counts from 0. Raises InputError when the model
    cannot be loaded or has no such block.
    """
    discriminator = Discriminator(open_vit_features(model, revision, blocks=blocks))
    initialise(discriminator.heads, seed)
    return discriminator


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator: half the mean of max(0, 1 − real) and max(0, 1 + fake)."""
    return (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()) / 2


def generator_loss(fake: Tensor) -> Tensor:
    """What the decoder lowers: minus the mean logit of its images."""
    return -fake.mean()
