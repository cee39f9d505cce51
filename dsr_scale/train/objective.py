"""One micro-batch → its loss: encode, noise, predict, compare in velocity space.

The loop knows nothing of diffusion; replacing this object replaces what is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsr_scale.config.diffusion import DiffusionConfig
from dsr_scale.data.loader import Batch
from dsr_scale.diffusion.loss import Loss, velocity_loss
from dsr_scale.diffusion.path import add_noise, to_velocity
from dsr_scale.diffusion.timesteps import draw_noise, draw_sample_timesteps
from dsr_scale.encoders.contract import ImageEncoder, TextEncoder
from dsr_scale.model.conditioning import Condition


@dataclass(frozen=True)
class FlowMatching:
    """The objective of DSR and RAE (docs/method.md §3)."""

    config: DiffusionConfig
    timestep_shift: float
    seed: int
    image_encoder: ImageEncoder
    text_encoder: TextEncoder | None
    device: torch.device

    def condition(self, batch: Batch) -> Condition:
        """The batch's labels or encoded captions, with its dropped conditions marked."""
        null = batch.null.to(self.device)
        if self.text_encoder is None:
            assert batch.labels is not None
            return Condition(null=null, labels=batch.labels.to(self.device))
        text = self.text_encoder.encode(batch.captions)
        return Condition(
            null=null,
            tokens=text.tokens.to(self.device),
            mask=text.mask.to(self.device),
        )

    def noised(self, latents: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Noised latents, noise and timesteps of a batch: functions of seed, epoch and sample alone."""
        epochs, sample_ids = batch.epochs.tolist(), batch.sample_ids.tolist()
        channels, height, width = latents.shape[1:]
        noise = draw_noise((channels, height, width), self.seed, epochs, sample_ids, self.device)
        timesteps = draw_sample_timesteps(
            self.config.timesteps,
            self.timestep_shift,
            self.seed,
            epochs,
            sample_ids,
            self.device,
        )
        return add_noise(latents, noise, timesteps), noise, timesteps

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        """Loss of `model` on one micro-batch."""
        with torch.no_grad():
            latents = self.image_encoder.encode(batch.images.to(self.device)).float()
            condition = self.condition(batch)
            noised, noise, timesteps = self.noised(latents, batch)
        velocity = to_velocity(
            model(noised, timesteps, condition),
            noised,
            timesteps,
            self.config.prediction,
            self.config.denominator_clamp,
        )
        return velocity_loss(velocity, latents, noise, timesteps, self.config)
