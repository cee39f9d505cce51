"""What can be measured for outliers: a frozen encoder, an exported bundle, a checkpoint of a run.

A target is told by what lies at its path. What a person can have got wrong (no data, too few images,
no captions) is told before weights are loaded. Images are spread evenly over the data and shuffled by
the seed, so that sorted data is seen in all its parts and the first images are a fair sample.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dsr_scale.base import random_keys
from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint import directory
from dsr_scale.config.data import DataConfig
from dsr_scale.config.derive import ModelShape, vit_geometry
from dsr_scale.config.encoders import EncodersConfig, VitImage
from dsr_scale.config.load import load_run
from dsr_scale.config.training import ema_name
from dsr_scale.data.loader import open_samples
from dsr_scale.data.samples import UnusableRecord
from dsr_scale.data.transforms import UnreadableImage, cover_and_crop, decode_rgb
from dsr_scale.encoders.contract import (
    ImageEncoder,
    TextEncoder,
    build_image_encoder,
    build_text_encoder,
    rounded,
)
from dsr_scale.encoders.locate import is_place, locate
from dsr_scale.encoders.vit import VitEncoder
from dsr_scale.evaluate.reference_set import data_at
from dsr_scale.evaluate.sample_sets import prompt_of, spread, unusable_sample
from dsr_scale.export.bundle import (
    DESCRIPTION_FILE,
    load_checkpoint_weights,
    read_description,
    read_model,
)
from dsr_scale.model.build import build_on_meta
from dsr_scale.model.conditioning import Condition
from dsr_scale.model.dit import DiT

_RUN_FILES = (".yaml", ".yml")
_PLAIN_ATTENTION = {"attention": "sdpa"}
"""Equal to flash-attn, which runs on few devices and precisions."""


@dataclass(frozen=True)
class Measurement:
    """How a target is measured."""

    shards: str | None
    """Data instead of what the target was trained on."""
    images: int
    timesteps: tuple[float, ...]
    axis: Literal["model", "preshift"]
    """Which time `timesteps` are."""
    batch: int
    """Images per forward."""
    seed: int
    """Of the images' order and of the noise."""
    threshold: float
    """Norm of the absolute rule."""
    device: torch.device

    def data(self, trained_on: DataConfig | None, resolution: int) -> DataConfig:
        """What the images are read from. Raises InputError where neither side names any."""
        if self.shards is None and trained_on is None:
            raise InputError(
                found="a target that does not know its data, and no --data",
                required="images to measure it on",
                remedy="name packed shards, or --data package:emoji",
            )
        if self.shards is None:
            assert trained_on is not None
            return trained_on
        return data_at(self.shards, resolution)

    def batches(self) -> list[slice]:
        """Which images go together."""
        return [
            slice(first, min(first + self.batch, self.images))
            for first in range(0, self.images, self.batch)
        ]


@dataclass(frozen=True)
class MeasuredImages:
    """The images that a target is measured on."""

    pixels: Tensor
    """uint8 [N,3,R,R], centre-cropped, not mirrored."""
    prompts: tuple[str, ...]
    """What the model is conditioned on; empty for an encoder."""
    sample_ids: tuple[int, ...]
    """Of the data set: an image's noise belongs to its id."""
    origin: dict[str, Any]
    """Data and fingerprint, for the report."""


@dataclass(frozen=True)
class DiffusionTarget:
    """A diffusion transformer with what turns images and prompts into its inputs."""

    name: str
    model: DiT
    timestep_shift: float
    encoders: EncodersConfig
    image_encoder: ImageEncoder
    text_encoder: TextEncoder | None
    images: MeasuredImages
    settings: dict[str, Any]
    """Which weights these are, for the report."""

    def latents(self, images: slice, device: torch.device) -> Tensor:
        """Latents of some of the images as the network was trained on: float32 [B,C,h,w]."""
        pixels = self.images.pixels[images].to(device)
        return rounded(self.image_encoder.encode(pixels), self.encoders).float()

    def condition(self, images: slice, device: torch.device) -> Condition:
        """The same images' captions or classes."""
        prompts = self.images.prompts[images]
        null = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        if self.text_encoder is None:
            labels = torch.tensor([int(prompt) for prompt in prompts], device=device)
            return Condition(null=null, labels=labels)
        text = self.text_encoder.encode(prompts)
        return Condition(null=null, tokens=text.tokens, mask=text.mask).to(device)


@dataclass(frozen=True)
class EncoderTarget:
    """A frozen vision transformer."""

    name: str
    encoder: VitEncoder
    images: MeasuredImages
    settings: dict[str, Any]


Target = DiffusionTarget | EncoderTarget
Load = Callable[[], Target]
"""Reads weights: what may take minutes, and fills a device."""


def find_target(target: str, how: Measurement) -> Load:
    """Checks what `target` names, and reads the images to measure it on.

    A run file (YAML), hub name or directory of weights is an encoder; a directory that `export` wrote
    a bundle; a run directory its newest checkpoint; a checkpoint's own directory that one. Of a run,
    the first average of the weights is taken. Raises InputError for anything else.
    """
    path = Path(target).expanduser()
    if path.suffix in _RUN_FILES:
        run = load_run(path, [])
        return _open_encoder(_vit_of(run.encoders), how.data(run.data, run.data.resolution), how)
    if (path / DESCRIPTION_FILE).is_file():
        return _open_bundle(path, how)
    if (path / directory.RUN_STATE_FILE).is_file():
        return _open_checkpoint(path, how)
    if directory.checkpoints_directory(path).is_dir():
        return _open_checkpoint(directory.find_checkpoint(path), how)
    if path.exists() and not (path / "config.json").is_file():
        raise InputError(
            found=f"{target}, which is nothing that can be measured",
            required="a bundle, a run directory or one of its checkpoints, a run file (.yaml) whose "
            "encoder is meant, or the hub name or directory of a vision transformer",
            remedy="check the path",
        )
    image = _vit_at(target)
    return _open_encoder(image, how.data(None, vit_geometry(image).input_size), how)


def _measured_images(
    config: DataConfig, how: Measurement, shape: ModelShape | None
) -> MeasuredImages:
    """The images, with what a network of `shape` is conditioned on.

    Raises InputError for too few images, and for one that cannot be used.
    """
    samples = open_samples(config)
    evenly = spread(len(samples), how.images, config.shards)
    ids = random_keys.generator(how.seed, "outlier images").permutation(evenly).tolist()
    side = (config.resolution, config.resolution)
    pixels, prompts = [], []
    for sample_id in ids:
        try:
            sample = samples.read(sample_id)
            pixels.append(cover_and_crop(decode_rgb(sample.image, config.background, side), side))
            if shape is not None:
                prompts.append(prompt_of(sample, shape, config.label_field))
        except (UnusableRecord, UnreadableImage) as error:
            raise unusable_sample(config, sample_id, error) from error
    origin = {"data": config.shards, "data_fingerprint": samples.fingerprint}
    return MeasuredImages(torch.from_numpy(np.stack(pixels)), tuple(prompts), tuple(ids), origin)


def _open_bundle(path: Path, how: Measurement) -> Load:
    described = read_description(path)
    shape = described.shape.model_copy(update=_PLAIN_ATTENTION)
    described = described.model_copy(update={"shape": shape})
    origin = described.provenance
    return _diffusion_target(
        path.resolve().name,
        lambda: read_model(path, described, how.device),
        shape,
        described.timestep_shift,
        described.encoders,
        how.data(None, described.resolution),
        how,
        {"run": origin.run_name, "step": origin.step, "weights": origin.weights},
    )


def _open_checkpoint(checkpoint: Path, how: Measurement) -> Load:
    state = directory.read_run_state(checkpoint)
    shape = directory.saved_section(checkpoint, ModelShape, state["model_shape"]).model_copy(
        update=_PLAIN_ATTENTION
    )
    run = state["config"]
    average = ema_name(run["training"]["ema_decays"][0])

    def load() -> nn.Module:
        model = build_on_meta(shape).to_empty(device="cpu")
        load_checkpoint_weights(checkpoint, model, average)
        return model.to(how.device).eval().requires_grad_(False)

    data = directory.saved_section(checkpoint, DataConfig, run["data"])
    return _diffusion_target(
        f"{run['name']}, step {state['step']}",
        load,
        shape,
        state["timestep_shift"],
        directory.saved_section(checkpoint, EncodersConfig, run["encoders"]),
        how.data(data, data.resolution),
        how,
        {"run": run["name"], "step": state["step"], "weights": average},
    )


def _diffusion_target(
    name: str,
    load_model: Callable[[], nn.Module],
    shape: ModelShape,
    timestep_shift: float,
    encoders: EncodersConfig,
    data: DataConfig,
    how: Measurement,
    settings: dict[str, Any],
) -> Load:
    images = _measured_images(data, how, shape)

    def load() -> DiffusionTarget:
        text_encoder = None
        if shape.text_kind != "none":
            text_encoder = build_text_encoder(encoders.text, device=how.device)
        image_encoder = build_image_encoder(
            encoders.image, resolution=data.resolution, device=how.device
        )
        model = load_model()
        assert isinstance(model, DiT)
        return DiffusionTarget(
            name, model, timestep_shift, encoders, image_encoder, text_encoder, images, settings
        )

    return load


def _open_encoder(image: VitImage, data: DataConfig, how: Measurement) -> Load:
    images = _measured_images(data, how, None)
    settings = {"encoder": image.known_as, "revision": image.revision, "dtype": image.dtype}

    def load() -> EncoderTarget:
        encoder = VitEncoder(image, resolution=data.resolution, device=how.device)
        return EncoderTarget(Path(image.known_as).name, encoder, images, settings)

    return load


def _vit_of(encoders: EncodersConfig) -> VitImage:
    if not isinstance(encoders.image, VitImage):
        raise InputError(
            found=f"a run file whose encoders.image.kind is {encoders.image.kind}",
            required="a vision transformer: kind vit",
            remedy="name the run's directory or a bundle to measure the diffusion transformer",
        )
    return encoders.image


def _vit_at(target: str) -> VitImage:
    """An encoder as it is, of the sizes that are known, or in the config of its directory."""
    image = VitImage(model=target)
    if not is_place(target):
        return image
    file = Path(locate(target).source) / "config.json"
    try:
        content = json.loads(file.read_text())
        content = content.get("vision_config", content)
        names = {"channels": "hidden_size", "patch": "patch_size", "input_size": "image_size"}
        return image.model_copy(update={ours: int(content[name]) for ours, name in names.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            found=f"{file} without the sizes of a vision transformer: {error!r}",
            required="hidden_size, patch_size and image_size",
            remedy="describe the encoder in a run file (.yaml), and name that",
        ) from error
