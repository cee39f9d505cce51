"""Token norms on the path of a sampled image: every block at every step, with the image it led to.

`norms.py` measures noised training images, where a path of the solver may never come by; this reads the
tokens of the very forwards that draw an image. The probe only reads, so the image is that of
`Pipeline.sample`, bit for bit. Kept is one number per token, block and step: 50 steps of 28 blocks with
260 tokens are 1.5 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.export.pipeline import Pipeline
from dsr_scale.model.conditioning import Condition
from dsr_scale.telemetry.token_norms import BlockNorms, NormProbe


@dataclass(frozen=True)
class StepNorms:
    """Norms of one image's tokens where a step of the solver begins."""

    time: float
    """Model time; 1 is noise."""
    blocks: tuple[BlockNorms, ...]
    """Of every block of body and head, in order; of a batch of one."""


@dataclass(frozen=True)
class SampledNorms:
    """An image and the norms of its tokens on the way to it."""

    image: Tensor
    """uint8 [3,H,W]."""
    steps: tuple[StepNorms, ...]
    """From noise to data."""


def sample_with_norms(
    pipeline: Pipeline,
    prompt: str,
    *,
    seed: int,
    sampling: SamplingConfig,
    weaker: Pipeline | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> SampledNorms:
    """The first image of `pipeline.sample` for this seed, with the norms under its prompt.

    Of guidance's two branches they are the conditional one's. Arguments and InputError as there.
    """
    network = _ProbedNetwork(pipeline.model)
    probed = replace(pipeline, model=network)
    images = probed.sample([prompt], seed=seed, sampling=sampling, weaker=weaker, on_step=on_step)
    return SampledNorms(images[0], tuple(StepNorms(*step) for step in network.steps.items()))


class _ProbedNetwork(nn.Module):
    """A network that keeps the norms of the first image of each forward, by model time."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.steps: dict[float, tuple[BlockNorms, ...]] = {}

    def forward(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        probe = NormProbe()
        output = self.network(latents, timesteps, condition, probe=probe)
        # The first row is the conditional branch. Heun comes twice to a time: with its guess of the
        # latents, then with the latents themselves, which replace it.
        self.steps[timesteps[0].item()] = tuple(
            BlockNorms(name, norms.image_norms[:1], norms.register_norms[:1])
            for name, norms in probe.blocks.items()
        )
        return output
