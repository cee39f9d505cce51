"""Prompts in, images out, on one device: the sampler that training grids, `sample` and tests share.

There is one code path, so an exported bundle draws what the trainer's EMA drew. Noise belongs to
(seed, index of the image), never to the batch it was drawn in.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import ModelShape
from dsr_scale.config.diffusion import DiffusionConfig, SamplingConfig
from dsr_scale.config.encoders import EncodersConfig, VitImage
from dsr_scale.diffusion.guidance import (
    Velocity,
    branches_in_one_batch,
    branches_of_two,
    guided_velocity,
    network_velocity,
)
from dsr_scale.diffusion.solvers import sample as solve
from dsr_scale.diffusion.timesteps import draw_noise
from dsr_scale.encoders.contract import (
    Decoder,
    TextEncoder,
    build_decoder,
    build_text_encoder,
)
from dsr_scale.export.bundle import DTYPES, BundleDtype, read_description, read_model
from dsr_scale.model.conditioning import Condition, concatenate

DEFAULT_SAMPLING = SamplingConfig()


@dataclass(frozen=True)
class Pipeline:
    """A network with everything that turns prompts into images."""

    model: nn.Module
    shape: ModelShape
    diffusion: DiffusionConfig
    timestep_shift: float
    text_encoder: TextEncoder | None
    """None for class conditioning."""
    decoder: Decoder
    device: torch.device
    latent_space: str
    """Encoder, channels and grid: models that share it may guide each other."""
    sampling: SamplingConfig = DEFAULT_SAMPLING
    """What `sample` does unless told otherwise."""

    def condition(self, prompts: Sequence[str]) -> Condition:
        """What the network is conditioned on: captions, or class numbers written as text."""
        null = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        if self.text_encoder is None:
            return Condition(null=null, labels=self._labels(prompts))
        text = self.text_encoder.encode(prompts)
        return Condition(null=null, tokens=text.tokens, mask=text.mask).to(self.device)

    def _labels(self, prompts: Sequence[str]) -> Tensor:
        classes = self.shape.conditioning
        assert classes.kind == "class"
        for prompt in prompts:
            if not (prompt.isdecimal() and int(prompt) < classes.num_classes):
                raise InputError(
                    found=f"prompt {prompt!r} for a class-conditional model",
                    required=f"a class number from 0 to {classes.num_classes - 1}",
                    remedy="give class numbers as prompts",
                )
        return torch.tensor([int(prompt) for prompt in prompts], device=self.device)

    def velocity(self, condition: Condition) -> Velocity:
        """The network's velocity under `condition`, as a solver asks for it."""
        return network_velocity(
            lambda x, t: self.model(x, t, condition),
            self.diffusion.prediction,
            self.diffusion.denominator_clamp,
        )

    @torch.inference_mode()
    def latents(
        self,
        prompts: Sequence[str],
        *,
        seed: int,
        sampling: SamplingConfig,
        first_index: int = 0,
        weaker: Pipeline | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Sampled latents [N,C,H,W] in fp32; image i draws the noise of index `first_index` + i.

        Guidance pushes away from the unconditional branch, or, with `weaker`, from that network's
        prediction for the same prompts (autoguidance).
        """
        condition = self.condition(prompts)
        conditional = self.velocity(condition)
        if weaker is None:
            both = self.velocity(concatenate(condition, condition.as_null()))
            branches = branches_in_one_batch(both)
        else:
            branches = branches_of_two(conditional, weaker.velocity(weaker.condition(prompts)))
        height, width = self.shape.grid
        indices = range(first_index, first_index + len(prompts))
        noise = draw_noise(
            (self.shape.channels, height, width),
            seed,
            [0] * len(prompts),
            indices,
            self.device,
            purpose="sample",
        )
        velocity = guided_velocity(conditional, branches, sampling)
        return solve(velocity, noise, sampling, self.timestep_shift, on_step=on_step)

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        seed: int,
        sampling: SamplingConfig | None = None,
        batch: int = 16,
        weaker: Pipeline | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Images uint8 [N,3,H,W] for N prompts, `batch` at a time; its size changes no image's noise.

        `sampling` is the bundle's by default. `on_step` is told steps done and of all, batch by batch.
        """
        images = []
        for start in range(0, len(prompts), batch):
            chunk = prompts[start : start + batch]
            latents = self.latents(
                chunk,
                seed=seed,
                sampling=sampling or self.sampling,
                first_index=start,
                weaker=weaker,
                on_step=on_step,
            )
            images.append(self.decoder.decode(latents).cpu())
        return torch.cat(images)


def load(
    bundle: str | Path,
    *,
    device: str = "auto",
    dtype: BundleDtype | None = None,
    compile: bool = False,
) -> Pipeline:
    """Opens an exported bundle on one device (`auto`: the first GPU, else the CPU).

    The network runs in `dtype`, by default the bundle's; `compile` compiles each block at its first
    use, which takes minutes and needs a C++ compiler. Raises InputError for a bundle that is missing
    or damaged, a GPU or a compiler that is not there.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            found="no GPU that torch can use",
            required=f"a CUDA device for --device {device}",
            remedy="use --device cpu, or install a CUDA build of torch",
        )
    if compile:
        _require_compiler()
    chosen = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    )
    path = Path(bundle)
    description = read_description(path)
    model = read_model(path, description, chosen)
    if dtype is not None:
        model = model.to(DTYPES[dtype])
    if compile:
        for block in model.get_submodule("blocks").children():
            block.compile()
    return build_pipeline(
        model,
        shape=description.shape,
        diffusion=description.diffusion,
        timestep_shift=description.timestep_shift,
        encoders=description.encoders,
        resolution=description.resolution,
        device=chosen,
        sampling=description.sampling,
    )


def _require_compiler() -> None:
    """torch.compile builds its kernels, or what launches them on a GPU, with the machine's compiler."""
    compilers = [os.environ.get("CXX", ""), os.environ.get("CC", ""), "g++", "gcc", "clang++", "cc"]
    if not any(name and shutil.which(name) for name in compilers):
        raise InputError(
            found="no C++ compiler in PATH, CC or CXX",
            required="one, to compile the network's blocks",
            remedy="install g++, or sample without --compile",
        )


def build_pipeline(
    model: nn.Module,
    *,
    shape: ModelShape,
    diffusion: DiffusionConfig,
    timestep_shift: float,
    encoders: EncodersConfig,
    resolution: int,
    device: torch.device,
    text_encoder: TextEncoder | None = None,
    sampling: SamplingConfig = DEFAULT_SAMPLING,
) -> Pipeline:
    """A pipeline around a loaded network; one in training may lend its loaded `text_encoder`.

    Raises InputError when the encoders name no decoder.
    """
    decoder = build_decoder(encoders, resolution=resolution, device=device)
    if decoder is None:
        raise InputError(
            found="encoders.decoder.kind = none",
            required="a decoder, to turn latents into images",
            remedy="set encoders.decoder to pixels, rae or vae",
        )
    if text_encoder is None and shape.text_kind != "none":
        text_encoder = build_text_encoder(encoders.text, device=device)
    image = encoders.image
    name = image.known_as if isinstance(image, VitImage) else getattr(image, "model", image.kind)
    latent_space = f"{name}, {shape.channels} channels on {shape.grid[0]}×{shape.grid[1]}"
    return Pipeline(
        model,
        shape,
        diffusion,
        timestep_shift,
        text_encoder,
        decoder,
        device,
        latent_space,
        sampling,
    )
