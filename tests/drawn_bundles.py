"""Bundles of small untrained networks whose every weight is drawn, so that images have contrast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsr_scale.config.derive import ModelShape
from dsr_scale.config.diffusion import DiffusionConfig, SamplingConfig
from dsr_scale.config.encoders import EncodersConfig, PixelsImage
from dsr_scale.config.model import CrossAttentionConditioning
from dsr_scale.export.bundle import BundleDescription, Provenance, write_bundle
from dsr_scale.export.encoder_files import models_to_copy, relocated
from dsr_scale.model.build import build_model
from dsr_scale.model.dit import DiT

RESOLUTION = 32
PIXELS = EncodersConfig(image=PixelsImage(patch=8))


def small_shape(**changes: Any) -> ModelShape:
    """A body of four blocks on 4×4 patches of pixels, bytes as text; `changes` replace single values."""
    values: dict[str, Any] = {
        "width": 32,
        "depth": 4,
        "heads": 2,
        "head": None,
        "patch": 1,
        "channels": 192,
        "grid": (4, 4),
        "registers": 4,
        "register_start": 2,
        "conditioning": CrossAttentionConditioning(),
        "text_kind": "bytes",
        "text_channels": 0,
        "text_length": 64,
        "qk_norm": False,
        "attention": "sdpa",
    }
    return ModelShape(**(values | changes))


def drawn_network(shape: ModelShape, seed: int = 0) -> DiT:
    """As initialised, with noise on every weight: as initialised it puts out zeros."""
    model = build_model(shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def description_of(shape: ModelShape, **changes: Any) -> BundleDescription:
    """What bundle.json says of such a network; `changes` replace single values."""
    values: dict[str, Any] = {
        "format": 1,
        "written_by": "a test",
        "dtype": "fp32",
        "resolution": RESOLUTION,
        "shape": shape,
        "diffusion": DiffusionConfig(),
        "timestep_shift": 2.0,
        "encoders": PIXELS,
        "sampling": SamplingConfig(steps=4, guidance=2.0),
        "provenance": Provenance(
            run_name="drawn",
            step=0,
            samples_seen=0,
            weights="raw",
            data_fingerprint="none",
            versions={},
        ),
    }
    return BundleDescription(**(values | changes))


def write_drawn_bundle(
    out: Path, encoders: EncodersConfig = PIXELS, *, copy_encoders: bool = False, **changes: Any
) -> Path:
    """A bundle in directory `out`, which is returned; with the files of the encoders when asked for."""
    shape = changes.pop("shape", small_shape())
    copied = models_to_copy(encoders) if copy_encoders else {}
    placed = relocated(encoders, lambda name: name, copied)
    description = description_of(shape, encoders=placed, copied_models=copied, **changes)
    write_bundle(out, drawn_network(shape), description, encoders)
    return out
