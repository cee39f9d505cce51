"""A batch → latents and condition → what the network is asked, and the loss of its answer.

The loop knows nothing of diffusion; replacing this object replaces what is trained. Encoding happens
once per replica, on the rank that reads the data; an `Example` is what every rank of the replica has,
and noise and timesteps follow from its sample ids, so each makes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from dsr_scale.config.diffusion import DiffusionConfig
from dsr_scale.config.encoders import EncodersConfig
from dsr_scale.data.loader import Batch
from dsr_scale.diffusion.loss import velocity_loss
from dsr_scale.diffusion.path import add_noise, to_velocity
from dsr_scale.diffusion.timesteps import draw_noise, draw_sample_timesteps
from dsr_scale.encoders.contract import ImageEncoder, TextEncoder, rounded
from dsr_scale.model.conditioning import Condition

OnLosses = Callable[[Tensor, Tensor], None]
"""Is told the timesteps and losses [B] of a micro-batch, both on the device."""


@dataclass(frozen=True)
class FlowMatching:
    """The objective of DSR and RAE (docs/method.md §3)."""

    config: DiffusionConfig
    timestep_shift: float
    seed: int

    def example(self, batch: Batch, encoders: Encoders) -> Example:
        """The encoded micro-batch under this objective."""
        latents, condition = encoders.encode(batch)
        return Example(
            self, latents, condition, tuple(batch.epochs.tolist()), tuple(batch.sample_ids.tolist())
        )


@dataclass(frozen=True)
class Example:
    """One encoded micro-batch under an objective, equal on every rank of a replica."""

    objective: FlowMatching
    latents: Tensor
    """Clean, [B,C,H,W] float32."""
    condition: Condition
    epochs: tuple[int, ...]
    sample_ids: tuple[int, ...]
    on_losses: OnLosses | None = None

    @property
    def latent_shape(self) -> torch.Size:
        """[B,C,H,W]."""
        return self.latents.shape

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Noised latents and timesteps: functions of seed, epoch and sample alone."""
        return self._noised, self._timesteps

    def loss(self, output: Tensor) -> Tensor:
        """Mean loss of the network's output [B,C,H,W] for `inputs`."""
        config, timesteps = self.objective.config, self._timesteps
        velocity = to_velocity(
            output, self._noised, timesteps, config.prediction, config.denominator_clamp
        )
        loss = velocity_loss(velocity, self.latents, self._noise, timesteps, config)
        if self.on_losses is not None:
            self.on_losses(timesteps, loss.per_sample)
        return loss.mean

    @cached_property
    def _noised(self) -> Tensor:
        return add_noise(self.latents, self._noise, self._timesteps)

    @cached_property
    def _timesteps(self) -> Tensor:
        return draw_sample_timesteps(
            self.objective.config.timesteps,
            self.objective.timestep_shift,
            self.objective.seed,
            self.epochs,
            self.sample_ids,
            self.latents.device,
        )

    @cached_property
    def _noise(self) -> Tensor:
        channels, height, width = self.latents.shape[1:]
        return draw_noise(
            (channels, height, width),
            self.objective.seed,
            self.epochs,
            self.sample_ids,
            self.latents.device,
        )


@dataclass(frozen=True)
class Watched(Sequence[Example]):
    """Examples whose losses are told to `on_losses`; still encoded when one is asked for."""

    examples: Sequence[Example]
    on_losses: OnLosses

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return Watched(self.examples[index], self.on_losses)
        return replace(self.examples[index], on_losses=self.on_losses)


@dataclass(frozen=True)
class Encoders:
    """From a batch to latents and condition, on the rank of a replica that reads the data."""

    config: EncodersConfig
    image: ImageEncoder | None
    """None when batches arrive encoded."""
    text: TextEncoder | None
    """None for class conditioning; also encodes the prompts of sample grids."""
    device: torch.device

    @torch.no_grad()
    def latents(self, batch: Batch) -> Tensor:
        """Latents [B,C,H,W] float32."""
        if batch.encoded is not None:
            return batch.encoded.latents.to(self.device).float()
        assert self.image is not None and batch.images is not None
        return rounded(self.image.encode(batch.images.to(self.device)), self.config).float()

    @torch.no_grad()
    def encode(self, batch: Batch) -> tuple[Tensor, Condition]:
        """Latents [B,C,H,W] float32, and labels or encoded captions with dropped ones marked."""
        null = batch.null.to(self.device)
        latents = self.latents(batch)
        if batch.encoded is not None:
            tokens, mask = batch.encoded.tokens, batch.encoded.mask
        else:
            text = None if self.text is None else self.text.encode(batch.captions)
            tokens, mask = (None, None) if text is None else (text.tokens, text.mask)
        if batch.labels is not None:
            return latents, Condition(null=null, labels=batch.labels.to(self.device))
        assert tokens is not None and mask is not None
        return latents, Condition(
            null=null, tokens=tokens.to(self.device), mask=mask.to(self.device)
        )
