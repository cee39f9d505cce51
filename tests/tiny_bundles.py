"""Bundles of tiny random networks that draw pixels: an evaluation's subject without a training run."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from dsr_scale.config.derive import ModelShape
from dsr_scale.config.diffusion import DiffusionConfig, SamplingConfig
from dsr_scale.config.encoders import (
    BytesText,
    EncodersConfig,
    NoText,
    PixelsDecoder,
    PixelsImage,
)
from dsr_scale.config.model import (
    ClassConditioning,
    ConditioningConfig,
    CrossAttentionConditioning,
)
from dsr_scale.export.bundle import FORMAT, BundleDescription, Provenance, write_bundle
from dsr_scale.model.build import build_model

SIDE, PATCH, CLASSES, TEXT_LENGTH = 32, 8, 7, 48


def write_tiny_bundle(
    out: Path, *, classes: bool = False, diffusion: DiffusionConfig | None = None
) -> Path:
    """Writes a bundle conditioned on captions, or on `CLASSES` classes; returns its directory."""
    conditioning: ConditioningConfig = CrossAttentionConditioning()
    if classes:
        conditioning = ClassConditioning(num_classes=CLASSES)
    shape = ModelShape(
        width=32,
        depth=2,
        heads=2,
        head=None,
        patch=1,
        channels=3 * PATCH * PATCH,
        grid=(SIDE // PATCH, SIDE // PATCH),
        registers=4,
        register_start=1,
        conditioning=conditioning,
        text_kind="none" if classes else "bytes",
        text_channels=0,
        text_length=0 if classes else TEXT_LENGTH,
        qk_norm=False,
        attention="sdpa",
    )
    model = build_model(shape, seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():  # a new network's output is zero
            if not parameter.any():
                scale = 1 / math.sqrt(parameter.shape[-1])
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    encoders = EncodersConfig(
        image=PixelsImage(patch=PATCH),
        text=NoText() if classes else BytesText(max_length=TEXT_LENGTH),
        decoder=PixelsDecoder(),
    )
    description = BundleDescription(
        format=FORMAT,
        written_by="test",
        dtype="fp32",
        resolution=SIDE,
        shape=shape,
        diffusion=diffusion or DiffusionConfig(),
        timestep_shift=1.5,
        encoders=encoders,
        sampling=SamplingConfig(steps=4, guidance=2.0),
        provenance=Provenance(
            run_name="tiny",
            step=1,
            samples_seen=2,
            weights="raw",
            data_fingerprint="none",
            versions={},
        ),
    )
    write_bundle(out, model, description, encoders)
    return out
