"""How much of everything the demonstration does; the only place that says so."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tools.train_toy_encoder import Settings


@dataclass(frozen=True)
class Sizes:
    """One form of the demonstration."""

    encoder: Settings
    encoder_images: int | None
    """Training emoji that the encoder sees; None is all."""
    register_images: int
    """Emoji on which register neurons are sought."""
    forced_neurons: int
    """How many are taken where the search finds an encoder without outliers."""
    decoder_steps: int
    steps: int
    """Of each diffusion transformer."""
    images: int
    """Training emoji of the diffusion transformers."""
    sampling_steps: int
    seeds: int
    held_out_samples: int | None
    outlier_images: int
    timesteps: str
    recognition_prompts: int
    prompts: int
    """Pictured training captions; half as many held-out ones stand beside them."""

    def with_training(self, factor: float) -> Sizes:
        """The same with `factor` times as many steps of everything that is trained."""

        def scaled(steps: int) -> int:
            return max(1, round(factor * steps))

        return replace(
            self,
            encoder=replace(self.encoder, steps=scaled(self.encoder.steps)),
            decoder_steps=scaled(self.decoder_steps),
            steps=scaled(self.steps),
        )


FULL = Sizes(
    encoder=Settings(depth=6, heads=4, steps=700, batch_images=64),
    encoder_images=None,
    register_images=500,
    forced_neurons=10,
    decoder_steps=360,
    steps=600,
    images=128,
    sampling_steps=30,
    seeds=2,
    held_out_samples=None,
    outlier_images=64,
    timesteps="0.1,0.3,0.5,0.7,0.9",
    recognition_prompts=64,
    prompts=8,
)
"""Meant for half an hour on 2 CPU cores; docs/results.md says how long it took."""

SHORT = Sizes(
    encoder=Settings(depth=6, heads=4, steps=10, batch_images=16),
    encoder_images=32,
    register_images=16,
    forced_neurons=4,
    decoder_steps=4,
    steps=4,
    images=16,
    sampling_steps=3,
    seeds=1,
    held_out_samples=8,
    outlier_images=8,
    timesteps="0.3,0.7",
    recognition_prompts=4,
    prompts=4,
)
"""Every stage once, in a few minutes; its numbers mean nothing."""
