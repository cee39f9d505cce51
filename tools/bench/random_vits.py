"""Vision transformers of any size with random weights, saved as published checkpoints are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config.run import RunConfig


class Geometry(NamedTuple):
    """The sizes of a SigLIP vision tower."""

    name: str
    """What the checkpoint calls itself; of a published one its register neurons apply."""
    width: int
    depth: int
    heads: int
    hidden: int
    """Units of an MLP."""
    patch: int
    side: int
    """Of the square input, in pixels."""


def save_vit(directory: Path, geometry: Geometry, dtype: torch.dtype = torch.float32) -> None:
    """Writes the network, without a head, and its processor."""
    declare_torchvision_operators()
    import transformers

    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=geometry.width,
        num_hidden_layers=geometry.depth,
        num_attention_heads=geometry.heads,
        intermediate_size=geometry.hidden,
        patch_size=geometry.patch,
        image_size=geometry.side,
        vision_use_head=False,
    )
    model: Any = transformers.SiglipVisionModel(config)
    model.to(dtype).save_pretrained(directory)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))


def vit_settings(directory: Path, geometry: Geometry, **changes: Any) -> dict[str, Any]:
    """The section `encoders.image` of a network in `directory`."""
    return {
        "kind": "vit",
        "model": str(directory),
        "name": geometry.name,
        "channels": geometry.width,
        "patch": geometry.patch,
        "input_size": geometry.side,
        **changes,
    }


def encoding_run(
    directory: Path, image: dict[str, Any], side: int, **changes: dict[str, Any]
) -> RunConfig:
    """A run that encodes the pairs that ship here, without captions; `changes` are more sections."""
    content = {
        "name": "bench",
        "directory": str(directory),
        "data": {"shards": "package:emoji", "resolution": side, "crop": "center"},
        "encoders": {
            "image": image,
            "text": {"kind": "none"},
            "decoder": {"kind": "none"},
            "latent_dtype": "bf16",
        },
        "model": {
            "width": 64,
            "depth": 2,
            "heads": 4,
            "conditioning": {"kind": "class", "num_classes": 1000},
        },
    }
    for section, values in changes.items():
        content[section] = content.get(section, {}) | values
    return RunConfig.model_validate_json(json.dumps(content), strict=True)
