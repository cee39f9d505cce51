"""Latents from a frozen vision transformer: the encoder of a representation autoencoder (RAE).

uint8 → [0, 1] → bicubic resize to the encoder's input size (no antialiasing, as published) →
(x − mean)/std of the checkpoint's processor → ViT → last layer norm without its weight and bias →
patch tokens as [B,C,h,w] → whitened (docs/method.md §4). The norm's weight and bias are removed from
the loaded network, so that its own output is what we read, whatever its family calls its layers.
Outlier tokens are treated inside the network (`outliers.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from dsr_scale.base.errors import InputError
from dsr_scale.base.torchvision_operators import declare_torchvision_operators
from dsr_scale.config.derive import latent_grid, vit_geometry
from dsr_scale.config.encoders import EncodersConfig, VitImage
from dsr_scale.encoders.chunks import encode_in_chunks
from dsr_scale.encoders.identity import settings_digest
from dsr_scale.encoders.loading import load_transformer, loading_errors, require_equal
from dsr_scale.encoders.locate import Location, locate
from dsr_scale.encoders.outliers import (
    Treatment,
    appends_register,
    apply_treatment,
    build_treatment,
)
from dsr_scale.encoders.register_file import encoder_identity
from dsr_scale.encoders.vit_structure import structure_of
from dsr_scale.encoders.whitening import load_whitening

PROCESSOR_FILE = "preprocessor_config.json"


class Family(NamedTuple):
    """What differs between vision transformers of the transformers library."""

    model_class: str
    final_norm: str
    """Last part of the name of the norm after the last block."""
    has_cls: bool
    """A CLS token, then registers if the config counts any, stand before the patches."""
    interpolates_on_request: bool
    """Position embeddings fit other input sizes only when asked; DINOv2 and 3 always do it."""


FAMILIES: dict[str, Family] = {
    "dinov2": Family("Dinov2Model", "layernorm", True, False),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", "layernorm", True, False),
    "siglip": Family("SiglipVisionModel", "post_layernorm", False, True),
    "siglip_vision_model": Family("SiglipVisionModel", "post_layernorm", False, True),
    "dinov3_vit": Family("DINOv3ViTModel", "norm", True, False),
    "vit_mae": Family("ViTMAEModel", "layernorm", True, True),
}
"""By `model_type` of the checkpoint's config. SigLIP2 of fixed resolution calls itself siglip."""


class VitEncoder:
    """A frozen ViT with its preprocessing, outlier treatment and whitening."""

    def __init__(self, config: VitImage, *, resolution: int, device: torch.device) -> None:
        self.config = config
        self.resolution = resolution
        self.device = device
        self.geometry = vit_geometry(config)
        latent_grid(EncodersConfig(image=config), resolution, resolution, resolution)
        location = locate(
            config.model,
            config.revision,
            files=("config.json", PROCESSOR_FILE),
            name=config.name,
        )
        self.whitening = load_whitening(config, resolution=resolution, device=device)
        vit_config = _vision_config(location)
        require_equal(
            "encoders.image.channels", self.geometry.channels, vit_config.hidden_size, location
        )
        require_equal("encoders.image.patch", self.geometry.patch, vit_config.patch_size, location)
        self.family = FAMILIES[vit_config.model_type]
        self.special_tokens = int(self.family.has_cls) + getattr(
            vit_config, "num_register_tokens", 0
        )
        self.mean, self.std = (
            part.view(1, 3, 1, 1).to(device) for part in _normalisation(location)
        )
        self.model = _load(self.family, vit_config, location, config, device)
        self.structure = structure_of(self.model, vit_config.model_type)
        self.treatment: Treatment | None = None
        self._hooks: list[RemovableHandle] = []
        self.treat(build_treatment(config.outliers, self.structure, encoder_identity(config)))

    @property
    def network(self) -> nn.Module | None:
        """What holds the weights."""
        return self.model

    @property
    def files_digest(self) -> str | None:
        """Of the network's config and the pixel normalisation."""
        normalisation = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        return settings_digest({**self.model.config.to_diff_dict(), "pixels": normalisation})

    @property
    def channels(self) -> int:
        """C, the width of the ViT's tokens."""
        return self.geometry.channels

    @property
    def register_row(self) -> int | None:
        """Row of the token that the outlier treatment appends; None where it appends none."""
        return self.special_tokens if appends_register(self.treatment) else None

    @property
    def dropped_tokens(self) -> int:
        """Rows before the patches: CLS, trained registers, the treatment's token."""
        return self.special_tokens + appends_register(self.treatment)

    @property
    def patch_rows(self) -> slice:
        """Rows of the patches in a sequence [B,N,C], after every block."""
        return slice(self.dropped_tokens, None)

    def treat(self, treatment: Treatment | None) -> None:
        """Replaces the outlier treatment for good; `outliers.treated` does it for a while.

        Raises InputError, and leaves the old one, when it does not fit the network.
        """
        hooks = apply_treatment(treatment, self.structure, self.special_tokens) if treatment else []
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.treatment = hooks, treatment

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B,3,H,W] → float32 [B,C,h,w], in chunks of `chunk_images`.

        A bucket of other sides is scaled by the factor of the square. Raises InputError when its
        sides at the encoder are not divisible by the patch.
        """
        return encode_in_chunks(self._latents, images, self.config.chunk_images)

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """uint8 [B,3,H,W] → all tokens [B,N,C] after the last norm, in one pass without filling.

        For whoever hooks the network and must see these images only. Raises as `encode`.
        """
        h, w = self._grid(images)
        pixels = self.preprocess(images, (h * self.geometry.patch, w * self.geometry.patch))
        arguments = self._arguments(len(images), h * w)
        return self.model(pixel_values=pixels.to(self.model.dtype), **arguments).last_hidden_state

    def _latents(self, images: Tensor) -> Tensor:
        patches = self.tokens(images)[:, self.patch_rows].float()
        latents = patches.transpose(1, 2).unflatten(-1, self._grid(images)).contiguous()
        return self.whitening.apply(latents) if self.whitening else latents

    def _grid(self, images: Tensor) -> tuple[int, int]:
        height, width = images.shape[-2:]
        return latent_grid(EncodersConfig(image=self.config), height, width, self.resolution)

    def preprocess(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """uint8 [B,3,H,W] → what the ViT sees, float32 [B,3,*size]."""
        assert images.dtype == torch.uint8
        pixels = images.to(self.device).float() / 255
        if pixels.shape[-2:] != size:
            pixels = functional.interpolate(pixels, size=size, mode="bicubic", align_corners=False)
        return (pixels - self.mean) / self.std

    def _arguments(self, batch: int, tokens: int) -> dict[str, Any]:
        if not self.family.interpolates_on_request:
            return {}
        arguments: dict[str, Any] = {"interpolate_pos_encoding": True}
        if self.family.model_class == "ViTMAEModel":
            # MAE orders its patches by this noise; counting up keeps them in place. float32, since
            # bf16 cannot tell 256 from 257.
            order = torch.arange(tokens, dtype=torch.float32, device=self.device)
            arguments["noise"] = order.expand(batch, -1)
        return arguments


def _vision_config(location: Location) -> Any:
    """The vision part of the checkpoint's config. Raises InputError for an unknown family."""
    declare_torchvision_operators()
    from transformers import AutoConfig

    with loading_errors(location):
        config = AutoConfig.from_pretrained(location.source, revision=location.revision)
    if config.model_type not in FAMILIES:
        raise InputError(
            found=f"{location.source} of type {config.model_type}",
            required=f"a vision transformer of type {', '.join(FAMILIES)}",
            remedy="choose another encoder (SigLIP2 with fixed resolution is of type siglip)",
        )
    return getattr(config, "vision_config", config)


def _normalisation(location: Location) -> tuple[Tensor, Tensor]:
    """Mean and std [3] that the checkpoint's processor subtracts and divides by, of [0, 1]."""
    from transformers.utils.hub import cached_file

    with loading_errors(location):
        file = cached_file(location.source, PROCESSOR_FILE, revision=location.revision)
        processor = json.loads(Path(str(file)).read_text())
        return torch.tensor(processor["image_mean"]), torch.tensor(processor["image_std"])


def _load(
    family: Family, vit_config: Any, location: Location, config: VitImage, device: torch.device
) -> Any:
    """The network with its last norm made affine-free and everything after it left out."""
    import transformers

    if family.model_class == "SiglipVisionModel":
        vit_config.vision_use_head = False
    if family.model_class == "ViTMAEModel":
        vit_config.mask_ratio = 0.0
    model = load_transformer(
        getattr(transformers, family.model_class),
        location,
        dtype=config.dtype,
        device=device,
        config=vit_config,
    )
    norms = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and name.split(".")[-1] == family.final_norm
    ]
    assert len(norms) == 1, "one norm after the last block"
    norms[0].register_parameter("weight", None)
    norms[0].register_parameter("bias", None)
    return model
