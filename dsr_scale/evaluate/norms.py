"""Token norms of a trained network on noised training images, block by block (docs/method.md §5)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsr_scale.diffusion.path import add_noise
from dsr_scale.diffusion.timesteps import draw_noise
from dsr_scale.encoders.contract import ImageEncoder
from dsr_scale.export.pipeline import Pipeline
from dsr_scale.telemetry.token_norms import BlockNorms, NormProbe


@torch.inference_mode()
def block_norms(
    pipeline: Pipeline,
    image_encoder: ImageEncoder,
    images: Tensor,
    captions: list[str],
    *,
    timestep: float,
    seed: int = 0,
) -> list[BlockNorms]:
    """Norms after every block for uint8 images [B,3,H,W] noised to `timestep` (model time, 1 is noise)."""
    latents = image_encoder.encode(images.to(pipeline.device)).float()
    channels, height, width = latents.shape[1:]
    count = len(images)
    noise = draw_noise((channels, height, width), seed, [0] * count, range(count), pipeline.device)
    timesteps = torch.full((count,), timestep, device=pipeline.device)
    probe = NormProbe()
    pipeline.model(
        add_noise(latents, noise, timesteps),
        timesteps,
        pipeline.condition(captions),
        probe=probe,
    )
    return list(probe.blocks.values())
