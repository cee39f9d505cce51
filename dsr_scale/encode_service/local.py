"""The frozen encoders of a run on one device, answering rows: what servers and caches are filled from."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsr_scale.config.run import AnyRun
from dsr_scale.data.encoded import Encoded
from dsr_scale.encode_service.contract import Contract, served
from dsr_scale.encoders.contract import (
    ImageEncoder,
    TextEncoder,
    build_image_encoder,
    build_text_encoder,
    rounded,
)


@dataclass(frozen=True)
class LocalEncoders:
    """Both encoders, and what they promise."""

    run: AnyRun
    device: torch.device
    image: ImageEncoder
    text: TextEncoder | None

    @functools.cached_property
    def contract(self) -> Contract:
        """What they promise. Computed when it is first asked for, since that reads every weight."""
        return served(self.run, self.image, self.text, self.device)

    @torch.inference_mode()
    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B,3,H,W] → [B,C,h,w] in `encoders.latent_dtype`, on the host."""
        return rounded(self.image.encode(images), self.run.encoders).cpu()

    @torch.inference_mode()
    def encode(self, images: torch.Tensor, captions: Sequence[str]) -> Encoded:
        """uint8 [B,3,H,W] and B captions → latents and tokens on the host."""
        latents = self.latents(images)
        if self.text is None:
            return Encoded(latents, None, None)
        text = self.text.encode(captions)
        return Encoded(latents, text.tokens.cpu(), text.mask.cpu())


def build_local(run: AnyRun, device: torch.device) -> LocalEncoders:
    """Loads the encoders that `run` names. Raises InputError as they do."""
    image = build_image_encoder(run.encoders.image, resolution=run.data.resolution, device=device)
    text = build_text_encoder(run.encoders.text, device=device)
    return LocalEncoders(run, device, image, text)
