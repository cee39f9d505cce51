"""A bundle as a diffusers pipeline: `DSRPipeline.from_pretrained(BUNDLE)`, and images come out.

A thin layer over `export.pipeline`, which draws them: same prompts, settings and seed, same bits. The
class lives here and not in the bundle (docs/decisions/0013-diffusers-pipeline.md), so a bundle stays
data and nobody runs code from it. Importing this module makes the class known to diffusers, after
which `DiffusionPipeline.from_pretrained(BUNDLE)` finds it too.

diffusers moves and casts the network. Text encoder and decoder are opened at the first call, on the
device that the network is on by then.
"""

# No `from __future__ import annotations`: diffusers reads the classes of components off annotations.

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.diffusion.solvers import time_grid
from dsr_scale.export.bundle import BundleDescription, read_description, read_model
from dsr_scale.export.pipeline import Pipeline, build_pipeline
from dsr_scale.model.conditioning import Condition

declare_torchvision_operators()

import diffusers  # noqa: E402
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin  # noqa: E402

OnStepEnd = Callable[["DSRPipeline", int, float, dict[str, Any]], object]
"""Called with the pipeline, the step from 0, the model time it began at, and an empty dictionary."""


class BundleTransformer(ModelMixin):
    """The network of a bundle, as the component that diffusers loads, moves and casts."""

    def __init__(self, network: torch.nn.Module, description: BundleDescription) -> None:
        super().__init__()
        self.network = network
        self.description = description

    @classmethod
    def from_pretrained(
        cls, bundle: str | Path, torch_dtype: torch.dtype | None = None, **unused: Any
    ) -> "BundleTransformer":
        """Reads the bundle in that directory, on the CPU; diffusers passes much that it does not need."""
        description = read_description(Path(bundle))
        network = read_model(Path(bundle), description, torch.device("cpu"))
        return cls(network if torch_dtype is None else network.to(torch_dtype), description)

    def forward(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """As `model.dit.DiT`."""
        return self.network(latents, timesteps, condition)


class DSRPipeline(DiffusionPipeline):
    """Captions, or class numbers as text, to images."""

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: BundleTransformer) -> None:
        super().__init__()
        self.transformer: BundleTransformer
        self.register_modules(transformer=transformer)
        self._opened: Pipeline | None = None

    def save_pretrained(self, save_directory: Any, *unused: Any, **options: Any) -> None:
        """Raises InputError: files beside the network would be missing."""
        raise InputError(
            found=f"save_pretrained to {save_directory}",
            required="a bundle, which only dsr-scale export writes",
            remedy="copy the bundle's directory, or export the run again",
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        solver: Literal["euler", "heun", "dpm++"] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 16,
        output_type: Literal["pil", "np"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> ImagePipelineOutput | tuple[list[Image.Image] | np.ndarray]:
        """Draws images; settings that are None are the bundle's.

        `seed` is that of `dsr-scale sample`. Without it one is drawn from `generator`, which moves on
        as diffusers' users expect, or from torch's global generator. `guidance_interval` is in model
        time, 1 is noise. `np` gives float32 [N,H,W,3] in [0,1].
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [each for each in prompts for _ in range(num_images_per_prompt)]
        if seed is None:
            seed = int(torch.randint(2**62, (1,), generator=generator, device=_place(generator)))
        pipeline = self._pipeline()
        given = {
            "steps": num_inference_steps,
            "guidance": guidance_scale,
            "guidance_interval": guidance_interval,
            "solver": solver,
        }
        chosen = {name: value for name, value in given.items() if value is not None}
        sampling = SamplingConfig.model_validate(pipeline.sampling.model_dump() | chosen)
        times = time_grid(sampling.steps, pipeline.timestep_shift)
        batches = -(-len(prompts) // batch_size)
        # Its decorator hides its parameters from the type checker.
        with self.progress_bar(total=batches * sampling.steps) as bar:  # pyright: ignore[reportCallIssue]

            def on_step(done: int, total: int) -> None:
                bar.update()
                if callback_on_step_end is not None:
                    callback_on_step_end(self, done - 1, times[done - 1], {})

            drawn = pipeline.sample(
                prompts, seed=seed, sampling=sampling, batch=batch_size, on_step=on_step
            )
        images = _as(output_type, drawn)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _pipeline(self) -> Pipeline:
        """The sampler around the network where it is now."""
        device = torch.device(self._execution_device)
        if self._opened is None or self._opened.device != device:
            description = self.transformer.description
            self._opened = build_pipeline(
                self.transformer,
                shape=description.shape,
                diffusion=description.diffusion,
                timestep_shift=description.timestep_shift,
                encoders=description.encoders,
                resolution=description.resolution,
                device=device,
                sampling=description.sampling,
            )
        return self._opened


def _place(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _as(output_type: Literal["pil", "np"], drawn: Tensor) -> list[Image.Image] | np.ndarray:
    """uint8 [N,3,H,W] in the form that diffusers gives."""
    pixels = drawn.permute(0, 2, 3, 1).numpy()
    if output_type == "np":
        return pixels.astype(np.float32) / 255
    return [Image.fromarray(image) for image in pixels]


# Where `DiffusionPipeline.from_pretrained` looks for the class that model_index.json names.
diffusers.DSRPipeline = DSRPipeline  # pyright: ignore[reportAttributeAccessIssue]
