"""The training images as the network saw them, without their random choices."""

from __future__ import annotations

import torch
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.config.data import DataConfig
from dsr_scale.data.loader import open_samples
from dsr_scale.data.samples import UnusableRecord
from dsr_scale.data.transforms import UnreadableImage, cover_and_crop, decode_rgb


def training_images(config: DataConfig, count: int) -> tuple[Tensor, list[str]]:
    """The first `count` images, unflipped and centre-cropped, uint8 [N,3,H,W], with their first captions.

    Raises InputError for a sample that cannot be used or has no caption: here each one counts.
    """
    samples = open_samples(config)
    target = (config.resolution, config.resolution)
    images = []
    captions = []
    for sample_id in range(min(count, len(samples))):
        try:
            sample = samples.read(sample_id)
            decoded = decode_rgb(sample.image, config.background, target)
            captions.append(sample.captions[0].text)
        except (UnusableRecord, UnreadableImage, IndexError) as error:
            raise InputError(
                found=f"sample {sample_id} of {config.shards}: {error!r}",
                required=f"{count} readable images with captions at the front of the data",
                remedy="pack the data again without it, or compare fewer images",
            ) from error
        images.append(torch.from_numpy(cover_and_crop(decoded, target)))
    return torch.stack(images), captions
