"""An exported model: one directory with weights, the network's shape, and what surrounds it.

    model.safetensors   weights in the bundle's dtype, by parameter name
    bundle.json         shape, diffusion settings, encoder and decoder references, provenance

Frozen encoders are referenced by name and revision, not copied. The whole of it is read without
DeepSpeed, megatron-core or streaming.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import nn

from dsr_scale import __version__
from dsr_scale.base import atomic_files
from dsr_scale.base.errors import InputError
from dsr_scale.checkpoint import directory, tensors
from dsr_scale.config.derive import ModelShape
from dsr_scale.config.diffusion import DiffusionConfig, SamplingConfig
from dsr_scale.config.encoders import EncodersConfig
from dsr_scale.config.section import Section
from dsr_scale.model.build import build_on_meta

WEIGHTS_FILE = "model.safetensors"
DESCRIPTION_FILE = "bundle.json"
FORMAT = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Provenance(Section):
    """Where the weights come from."""

    run_name: str
    step: int
    samples_seen: int
    weights: Literal["ema", "raw"]
    data_fingerprint: str
    versions: dict[str, str]


class BundleDescription(Section):
    """The content of bundle.json."""

    format: int
    written_by: str
    dtype: Literal["fp32", "bf16", "fp16"]
    resolution: int
    shape: ModelShape
    diffusion: DiffusionConfig
    timestep_shift: float
    encoders: EncodersConfig
    sampling: SamplingConfig
    """Defaults of `dsr-scale sample`."""
    provenance: Provenance


def export_run(
    run_directory: Path,
    out: Path,
    *,
    step: int | None = None,
    weights: Literal["ema", "raw"] = "ema",
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
) -> BundleDescription:
    """Writes the bundle of a run's checkpoint, the newest unless `step` is given.

    Reads in one process whatever number of ranks saved, one tensor group at a time: memory is
    bounded by the model, not by the optimizer. Raises InputError for a missing checkpoint, one of
    another model, or a directory that cannot be written.
    """
    from safetensors.torch import save

    checkpoint = directory.find_checkpoint(run_directory, step)
    atomic_files.require_writable_directory(out)
    state = directory.read_run_state(checkpoint)
    shape = ModelShape.model_validate(state["model_shape"])
    config = state["config"]
    description = BundleDescription(
        format=FORMAT,
        written_by=f"dsr-scale {__version__}",
        dtype=dtype,
        resolution=config["data"]["resolution"],
        shape=shape,
        diffusion=DiffusionConfig.model_validate(config["diffusion"]),
        timestep_shift=state["timestep_shift"],
        encoders=EncodersConfig.model_validate(config["encoders"]),
        sampling=SamplingConfig.model_validate(config["grid"]["sampling"]),
        provenance=Provenance(
            run_name=config["name"],
            step=state["step"],
            samples_seen=state["samples_seen"],
            weights=weights,
            data_fingerprint=state["data_fingerprint"],
            versions=state["versions"],
        ),
    )
    model = build_on_meta(shape).to_empty(device="cpu")
    load_checkpoint_weights(checkpoint, model, weights)
    content = {
        name: tensor.contiguous() for name, tensor in model.to(DTYPES[dtype]).state_dict().items()
    }
    atomic_files.write_bytes(out / WEIGHTS_FILE, save(content, metadata={"format": "pt"}))
    atomic_files.write_json(out / DESCRIPTION_FILE, description.model_dump(mode="json"))
    return description


@torch.no_grad()
def load_checkpoint_weights(
    checkpoint: Path, model: nn.Module, weights: Literal["ema", "raw"]
) -> None:
    """Fills `model` with a training checkpoint's EMA or raw weights, and its saved buffers."""
    kind = "ema" if weights == "ema" else "weights"
    parameters = dict(model.named_parameters())
    targets: dict[str, torch.Tensor] = {f"{kind}.{n}": p for n, p in parameters.items()}
    targets |= {
        f"buffers.{name}": tensor
        for name, tensor in model.state_dict().items()
        if name not in parameters
    }
    shapes = {name: target.shape for name, target in targets.items()}
    tensors.load(checkpoint, shapes, lambda name, tensor: targets[name].copy_(tensor))


def read_description(bundle: Path) -> BundleDescription:
    """Reads bundle.json. Raises InputError for a directory that is no bundle or of another format."""
    path = bundle / DESCRIPTION_FILE
    if not path.is_file():
        raise InputError(
            found=f"no {DESCRIPTION_FILE} in {bundle}",
            required="a directory written by dsr-scale export",
            remedy="export a run first: dsr-scale export RUN OUT",
        )
    content: dict[str, Any] = json.loads(path.read_text())
    if content.get("format") != FORMAT:
        raise InputError(
            found=f"bundle format {content.get('format')} in {path}",
            required=f"format {FORMAT}",
            remedy="export the run again with this version of dsr-scale",
        )
    try:
        return BundleDescription.model_validate(content)
    except ValidationError as error:
        raise InputError(
            found=f"{path} does not describe a bundle: {error}",
            required="the file as dsr-scale export wrote it",
            remedy="export the run again",
        ) from error


def read_model(bundle: Path, description: BundleDescription, device: torch.device) -> nn.Module:
    """The network of a bundle in evaluation mode. Raises InputError for weights that do not fit."""
    from safetensors.torch import load_file

    path = bundle / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(
            found=f"no {WEIGHTS_FILE} in {bundle}",
            required="a complete bundle",
            remedy="export the run again",
        )
    model = build_on_meta(description.shape).to_empty(device="cpu").to(DTYPES[description.dtype])
    problems = model.load_state_dict(load_file(path), strict=False)
    if problems.missing_keys or problems.unexpected_keys:
        raise InputError(
            found=f"{path} with missing {problems.missing_keys[:5]} and unknown "
            f"{problems.unexpected_keys[:5]} weights",
            required="the weights of the network in bundle.json",
            remedy="export the run again",
        )
    return model.to(device).eval().requires_grad_(False)
