"""The training images as the network saw them, without their random choices."""

from __future__ import annotations

import torch
from torch import Tensor

from dsr_scale.config.data import DataConfig
from dsr_scale.data.loader import open_samples
from dsr_scale.data.transforms import cover_and_crop, decode_rgb


def training_images(config: DataConfig, count: int) -> tuple[Tensor, list[str]]:
    """The first `count` images, unflipped and centre-cropped, uint8 [N,3,H,W], with their first captions."""
    samples = open_samples(config)
    target = (config.resolution, config.resolution)
    images = []
    captions = []
    for sample_id in range(min(count, len(samples))):
        sample = samples.read(sample_id)
        decoded = decode_rgb(sample.image, config.background, target)
        images.append(torch.from_numpy(cover_and_crop(decoded, target)))
        captions.append(sample.captions[0].text)
    return torch.stack(images), captions
