"""Forward passes of one size, so that an image's latents do not depend on its batch.

Libraries choose kernels by the size of what they are given, and another kernel adds in another
order. A batch is therefore cut into chunks of always the same number of images, the last one filled
up with black ones whose latents are thrown away. The price is paid by small batches: one image
costs as much as a whole chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def encode_in_chunks(
    encode: Callable[[Tensor], Tensor], images: Tensor, chunk_images: int
) -> Tensor:
    """uint8 images [B,3,H,W] → the latents [B,…] that `encode` gives, `chunk_images` at a time.

    `encode` always sees [chunk_images,3,H,W]; B ≥ 1.
    """
    latents: list[Tensor] = []
    for chunk in images.split(chunk_images):
        missing = chunk_images - len(chunk)
        if missing:
            chunk = torch.cat([chunk, chunk.new_zeros(missing, *chunk.shape[1:])])
        latents.append(encode(chunk))
    return torch.cat(latents)[: len(images)]
