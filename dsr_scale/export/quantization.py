"""Weights of the blocks in 8 bits, with one scale per output channel; everything else stays as it is.

    int8   127 levels on each side of zero, evenly spaced: error at most scale/2
    fp8    e4m3, largest 448: error at most 1/16 of the weight, less precise for it but not near zero

Only weights are quantized: each product dequantizes its weight first, so memory and disk shrink and
speed does not grow. The linears of the blocks hold nearly all weights, those of modulation (AdaLN) a
third of them; to quantize these too raised the error by a tenth (docs/inference.md). Embeddings, norms
and the final layer keep the bundle's dtype.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Quantization = Literal["int8", "fp8"]

_DTYPES: dict[Quantization, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST: dict[Quantization, float] = {"int8": 127.0, "fp8": 448.0}


def quantized_weight(weight: Tensor, kind: Quantization) -> tuple[Tensor, Tensor]:
    """weight [out,in] → 8-bit values [out,in] and float32 scales [out,1]; their product is the weight.

    A row's largest entry becomes the largest value that `kind` has; rows of zeros stay zeros.
    """
    weight = weight.float()
    scale = weight.abs().amax(dim=1, keepdim=True) / _LARGEST[kind]
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    values = weight / scale
    if kind == "int8":
        values = values.round()
    return values.to(_DTYPES[kind]), scale


class QuantizedLinear(nn.Module):
    """`nn.Linear` with an 8-bit weight, which it dequantizes to its input's dtype: [...,in] → [...,out].

    A cast of the network changes the bias alone.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, kind: Quantization) -> None:
        super().__init__()
        weight, scale = quantized_weight(linear.weight.detach(), kind)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        # In float32, because a scale rounded to bf16 would be an error shared by a whole row.
        weight = (self.weight.float() * self.scale).to(x.dtype)
        return functional.linear(x, weight, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        before = {"weight": self.weight, "scale": self.scale}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = getattr(self, name)
            if now.dtype != tensor.dtype:
                setattr(self, name, tensor.to(now.device))
        return self


def quantize_blocks(model: nn.Module, kind: Quantization) -> None:
    """Replaces the linears inside `model.blocks` by quantized ones, in place.

    On the meta device it gives the names and sizes into which quantized weights are loaded.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, QuantizedLinear(module, kind))
