"""A batch → images and the latents that they are to be made from, as a decoder learns.

Latents come as a diffusion transformer sees them, in whitened form and in `encoders.latent_dtype`;
what the decoder gets is unwhitened by the same statistics, as when it decodes samples later, and
then noised. So encoders in this process, servers and caches give the same examples.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsr_scale.data.loader import Batch
from dsr_scale.decoders.noise import noised
from dsr_scale.encoders.whitening import Whitening
from dsr_scale.train.objective import Encoders


@dataclass(frozen=True)
class Reconstruction:
    """One micro-batch on the device."""

    images: Tensor
    """[B,3,H,W] float32 in [0, 1], what is to come out."""
    latents: Tensor
    """[B,C,h,w] float32, unwhitened, with their noise."""
    sample_ids: tuple[int, ...]


@dataclass(frozen=True)
class Reconstructing:
    """The objective of RAE's decoders, as far as data goes."""

    whitening: Whitening | None
    noise_tau: float
    seed: int

    def example(self, batch: Batch, encoders: Encoders) -> Reconstruction:
        """The encoded micro-batch; its noise depends on seed, epoch and sample alone."""
        assert batch.images is not None, "the stream keeps images"
        latents = encoders.latents(batch)
        if self.whitening is not None:
            latents = self.whitening.undo(latents)
        ids = tuple(batch.sample_ids.tolist())
        latents = noised(
            latents,
            tau=self.noise_tau,
            seed=self.seed,
            epochs=batch.epochs.tolist(),
            sample_ids=ids,
        )
        return Reconstruction(batch.images.to(encoders.device).float() / 255, latents, ids)
