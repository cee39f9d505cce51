"""Small random vision transformers of every supported family, saved as checkpoints are.

Their final norms have weights and biases far from one and zero, so that forgetting to remove them
shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config.encoders import VitImage

declare_torchvision_operators()
import transformers  # noqa: E402

WIDTH, PATCH, INPUT_SIZE, RESOLUTION, LAYERS, HIDDEN = 24, 4, 16, 20, 3, 48
TOKENS = (INPUT_SIZE // PATCH) ** 2
"""Patches of a square image."""
MEAN, STD = [0.2, 0.4, 0.6], [0.3, 0.5, 0.7]
SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": HIDDEN,
    "patch_size": PATCH,
    "image_size": INPUT_SIZE,
}


def _dinov2_with_registers() -> Any:
    # Published checkpoints have more positions than are used: here 6×6, interpolated to 4×4.
    config = transformers.Dinov2WithRegistersConfig(
        **{**SMALL, "image_size": 24}, num_register_tokens=3, mlp_ratio=2
    )
    return transformers.Dinov2WithRegistersModel(config)


def _dinov2() -> Any:
    return transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, mlp_ratio=2))


def _dinov2_swiglu() -> Any:
    config = transformers.Dinov2Config(**SMALL, mlp_ratio=3, use_swiglu_ffn=True)
    return transformers.Dinov2Model(config)


def _dinov3() -> Any:
    config = transformers.DINOv3ViTConfig(**SMALL, num_register_tokens=2)
    return transformers.DINOv3ViTModel(config)


def _dinov3_gated() -> Any:
    config = transformers.DINOv3ViTConfig(**SMALL, num_register_tokens=4, use_gated_mlp=True)
    return transformers.DINOv3ViTModel(config)


def _siglip_vision() -> Any:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL))


def _siglip_whole() -> Any:
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    return transformers.SiglipModel(
        transformers.SiglipConfig(vision_config=SMALL, text_config=text)
    )


def _mae() -> Any:
    config = transformers.ViTMAEConfig(
        **SMALL, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=1
    )
    return transformers.ViTMAEForPreTraining(config)


FAMILIES: dict[str, tuple[Callable[[], Any], int]] = {
    "dinov2 with registers": (_dinov2_with_registers, 4),
    "dinov2": (_dinov2, 1),
    "dinov2 swiglu": (_dinov2_swiglu, 1),
    "dinov3": (_dinov3, 3),
    "dinov3 gated": (_dinov3_gated, 5),
    "siglip vision": (_siglip_vision, 0),
    "siglip with text": (_siglip_whole, 0),
    "mae": (_mae, 1),
}
"""How a checkpoint is made, and how many tokens stand before its patches."""


def save_vit(directory: Path, family: str) -> Any:
    """Writes a checkpoint of a family of `FAMILIES` with its processor; returns the network."""
    torch.manual_seed(0)
    model = FAMILIES[family][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    processor = {"image_mean": MEAN, "image_std": STD, "size": {"height": 1, "width": 1}}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def vit_config(directory: Path, **changes: Any) -> VitImage:
    """The config of a checkpoint in `directory`, in chunks of 4 images."""
    settings = {
        "channels": WIDTH,
        "patch": PATCH,
        "input_size": INPUT_SIZE,
        "chunk_images": 4,
        **changes,
    }
    return VitImage(model=str(directory), **settings)


def random_images(batch: int, height: int = RESOLUTION, width: int = RESOLUTION) -> torch.Tensor:
    """The same uint8 [B,3,H,W] every time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator, dtype=torch.uint8)


def tower_of(model: Any) -> Any:
    """The vision part of what `save_vit` returns."""
    for name in ("vit", "vision_model"):
        model = getattr(model, name, model)
    return model
