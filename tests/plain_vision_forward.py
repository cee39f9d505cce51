"""A vision transformer's forward written out, outlier treatments included, the register at the end.

Linears and norms are called one after the other, attention is by hand, activations change in loops
over images as in the released code. It shares nothing with the library's forward and our hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from tiny_vision_transformers import FAMILIES, INPUT_SIZE, MEAN, PATCH, STD, TOKENS, WIDTH, tower_of
from torch import Tensor
from torch.nn import functional

from dsr_scale.encoders.outliers import (
    BiasTreatment,
    ClampTreatment,
    RegisterTreatment,
    Treatment,
)

PARTS = ["blocks", "norm1", "norm2", "q", "k", "v", "out", "up", "down", "scale1", "scale2"]
DINOV2 = (
    "encoder.layer norm1 norm2 attention.attention.query attention.attention.key "
    "attention.attention.value attention.output.dense mlp.fc1 mlp.fc2 layer_scale1 layer_scale2"
)
NAMES: dict[str, str] = {
    "siglip vision": "encoder.layers layer_norm1 layer_norm2 self_attn.q_proj self_attn.k_proj "
    "self_attn.v_proj self_attn.out_proj mlp.fc1 mlp.fc2",
    "dinov2": DINOV2,
    "dinov2 with registers": DINOV2,
    "dinov3": "layer norm1 norm2 attention.q_proj attention.k_proj attention.v_proj "
    "attention.o_proj mlp.up_proj mlp.down_proj layer_scale1 layer_scale2",
    "mae": "encoder.layer layernorm_before layernorm_after attention.attention.query "
    "attention.attention.key attention.attention.value attention.output.dense "
    "intermediate.dense output.dense",
}
"""What each family calls `PARTS`; some have no scales."""


class PlainForward:
    """A network of `NAMES` without its library's forward; `special` tokens, patches, register."""

    def __init__(self, model: Any, family: str, treatment: Treatment | None) -> None:
        self.tower, self.treatment = tower_of(model), treatment
        self.names = dict(zip(PARTS, NAMES[family].split(), strict=False))
        self.special = FAMILIES[family][1]
        self.appends = isinstance(treatment, RegisterTreatment | BiasTreatment)
        self.is_mae, self.has_rope = family == "mae", family == "dinov3"
        self.heads = self.tower.config.num_attention_heads

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """uint8 [B,3,H,W] → [B,C,h,w] of a square image."""
        size = (INPUT_SIZE, INPUT_SIZE)
        pixels = functional.interpolate(images.float() / 255, size=size, mode="bicubic")
        mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (MEAN, STD))
        pixels = (pixels - mean) / std
        tokens = self._embedded(pixels)
        if self.appends:
            tokens = torch.cat([tokens, torch.zeros(len(tokens), 1, WIDTH)], dim=1)
        rotation = self.tower.rope_embeddings(pixels) if self.has_rope else None
        for layer, block in enumerate(self.tower.get_submodule(self.names["blocks"])):
            tokens = self._block(layer, block, tokens, rotation)
        patches = tokens[:, self.special : self.special + TOKENS]
        eps = self.tower.config.layer_norm_eps
        normed = functional.layer_norm(patches, (WIDTH,), eps=eps)
        side = INPUT_SIZE // PATCH
        return normed.permute(0, 2, 1).reshape(-1, WIDTH, side, side)

    def _embedded(self, pixels: Tensor) -> Tensor:
        if self.is_mae:
            self.tower.config.mask_ratio = 0.0
            noise = torch.arange(float(TOKENS)).expand(len(pixels), -1)
            return self.tower.embeddings(pixels, noise=noise)[0]
        return self.tower.embeddings(pixels)

    def _block(self, layer: int, block: Any, tokens: Tensor, rotation: Any) -> Tensor:
        def part(name: str, x: Tensor) -> Tensor:
            return block.get_submodule(self.names[name])(x) if name in self.names else x

        x = part("norm1", tokens)
        q, k, v = (part(name, x) for name in "qkv")
        if isinstance(self.treatment, BiasTreatment):
            k[:, -1], v[:, -1] = self.treatment.key[layer], self.treatment.value[layer]
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        if rotation is not None:
            q, k = (self._rotated(y, *rotation) for y in (q, k))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        tokens = tokens + part("scale1", part("out", (weights @ v).transpose(1, 2).flatten(2)))
        approximate = "tanh" if "siglip" in self.tower.config.model_type else "none"
        activations = functional.gelu(part("up", part("norm2", tokens)), approximate=approximate)
        tokens = tokens + part("scale2", part("down", self._treated(layer, activations)))
        return self._clamped(tokens)

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.clone()
        for patch in range(TOKENS):
            row = x[:, :, self.special + patch].clone()
            first, second = row.chunk(2, dim=-1)
            turned = torch.cat([-second, first], dim=-1)
            x[:, :, self.special + patch] = row * cos[patch] + turned * sin[patch]
        return x

    def _treated(self, layer: int, activations: Tensor) -> Tensor:
        """[B,N,hidden] with the units of this layer moved or silenced."""
        if isinstance(self.treatment, ClampTreatment | None):
            return activations
        for image in activations:
            self._move(image, list(self.treatment.neurons.get(layer, ())))
        return activations

    def _move(self, image: Tensor, units: list[int]) -> None:
        """Changes one image's activations [N,hidden]."""
        treatment = self.treatment
        if not units:
            return
        received: dict[int, float] = {}
        if isinstance(treatment, RegisterTreatment):
            for unit in units:
                among = units if treatment.maximum == "shared" else [unit]
                values = [float(a) for other in among for a in image[:, other]]
                received[unit] = max(values, key=abs)
        kept = isinstance(treatment, RegisterTreatment) and treatment.keep_first_patch
        for unit in units:
            image[self.special + kept : self.special + TOKENS, unit] = 0
            if unit in received:
                image[-1, unit] = received[unit]

    def _clamped(self, tokens: Tensor) -> Tensor:
        if not isinstance(self.treatment, ClampTreatment):
            return tokens
        for image in tokens:
            norms = sorted(float(patch.norm()) for patch in image[self.special :])
            limit = self.treatment.max_over_median * norms[(len(norms) - 1) // 2]
            for patch in image[self.special :]:
                patch *= min(1.0, limit / float(patch.norm()))
        return tokens
