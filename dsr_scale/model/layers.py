"""The parts of a block: normalisation, attention, SwiGLU, embeddings, the final layer.

Module and parameter names are those of the published state dicts. Linears are plain
`torch.nn.Linear`; head counts are read off the projected width, so a linear that holds only some
heads works unchanged.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsr_scale.base.errors import InputError
from dsr_scale.config.derive import FREQUENCIES, padded_hidden_width
from dsr_scale.config.model import AttentionVariant


class RMSNorm(nn.Module):
    """x/√(mean x² + 1e-6) in float32, cast back, times a learned weight: [..., D] → [..., D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.rms_norm(x.float(), (x.shape[-1],), eps=1e-6)
        return normed.to(x.dtype) * self.weight


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift, with shift and scale [B,1,D] or [B,N,D]."""
    return x * (1 + scale) + shift


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on adjacent channel pairs in float32: x [B,h,N,d], cos and sin [N,d/2]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _flash_function() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """flash-attn's attention on [B,N,h,d]; None where the package is missing or does not load."""
    try:
        return importlib.import_module("flash_attn").flash_attn_func
    except ImportError:
        return None


def require_flash(device: torch.device) -> None:
    """Raises InputError where `attention: flash` cannot run; call it before expensive work."""
    if _flash_function() is None:
        raise InputError(
            found="model.attention = flash, but the package flash-attn cannot be imported",
            required="flash-attn 2.7 or newer, built for the installed torch",
            remedy="install the extra `flash`, or set model.attention to sdpa",
        )
    if device.type != "cuda":
        raise InputError(
            found=f"model.attention = flash on the device {device.type}",
            required="a CUDA device and bf16 or fp16 weights",
            remedy="set model.attention to sdpa",
        )


class AttentionBias(nn.Module):
    """A key and a value per head that every query may attend to, [h,d] each (docs/method.md §2)."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(heads, head_dim))
        self.value = nn.Parameter(torch.empty(heads, head_dim))

    def forward(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends them to keys and values: [B,h,N,d] → [B,h,N+1,d]."""
        key, value = (x[None, :, None].expand(len(k), -1, -1, -1) for x in (self.key, self.value))
        return torch.cat([k, key], dim=2), torch.cat([v, value], dim=2)


class Attention(nn.Module):
    """Self-attention with a fused qkv projection: [B,N,D] → [B,N,D].

    The first `hidden` rows see all and are seen by each other only. Their queries and the others' are
    two calls, since a mask over pairs of rows would lose the fast kernels.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool = False,
        kind: Literal["sdpa", "flash"] = "sdpa",
        variant: AttentionVariant = "plain",
        hidden: int = 0,
    ) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.kind = kind
        self.variant = variant
        self.hidden = hidden
        # Imported here: torch.compile cannot trace an import. A machine that only plans has none.
        self.flash = _flash_function() if kind == "flash" else None
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        if variant == "bias":
            self.sink = AttentionBias(heads, self.head_dim)
        if variant == "gated":
            self.gate = nn.Linear(width, heads)

    def forward(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """`cos`, `sin`: [N, head_dim/2] or None for no RoPE; `mask`: keys [B,1,1,N], True = seen."""
        qkv = self.qkv(x).unflatten(-1, (3, -1, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.variant == "bias":
            k, v = self.sink(k, v)
        elif self.variant == "off_by_one":
            # A key of zeros has the logit 0, so it adds e⁰ to the denominator and, by its value, nothing.
            k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        if mask is not None and self.variant in ("bias", "off_by_one"):
            mask = functional.pad(mask, (0, 1), value=True)
        out = self._attend(q, k, v, mask)
        if self.variant == "gated":
            out = out * self.gate(x).sigmoid().transpose(1, 2)[..., None]
        return self.proj(out.transpose(1, 2).flatten(-2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax attention of q [B,h,N,d] to k and v [B,h,M,d]; `mask` [B,1,1,M]."""
        if not self.hidden:
            return self._kernel(q, k, v, mask)
        first, rest = slice(self.hidden), slice(self.hidden, None)
        seen = None if mask is None else mask[..., rest]
        return torch.cat(
            [
                self._kernel(q[:, :, first], k, v, mask),
                self._kernel(q[:, :, rest], k[:, :, rest], v[:, :, rest], seen),
            ],
            dim=2,
        )

    def _kernel(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.kind == "sdpa":
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert mask is None, "flash-attn takes no mask; check_shape refuses text in context"
        return self._flash(q, k, v)

    def _flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """flash-attn on [B,h,N,d]; its own layout is [B,N,h,d]."""
        if self.flash is None or q.device.type != "cuda":
            require_flash(q.device)
        assert self.flash is not None
        out = self.flash(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention from tokens to text: x [B,N,D], text [B,L,D], mask [B,1,1,L] → [B,N,D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        kv = self.kv(text).unflatten(-1, (2, -1, self.head_dim))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    """w3(silu(a)·b) with [a,b] = w12(x), hidden width zero-padded (`padded_hidden_width`).

    Odd widths such as 5461 lose the fast matrix kernels and do not split over ranks. The padding
    rows of w12 (at the end of a and of b) and columns of w3 are zero and get exactly zero gradient,
    so the padded layer computes and trains as the published one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = padded_hidden_width(width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(a) * b)


class PatchEmbed(nn.Module):
    """Latents [B,C,H,W] → row-major tokens [B,T,D] by a convolution of kernel and stride p."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """t [B] in [0,1] → [B,D] through fixed random Fourier features and an MLP.

    The frequencies W stay in float32 whatever dtype the model is cast to: 2πtW in bf16 would merge
    neighbouring timesteps.
    """

    W: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("W", torch.empty(FREQUENCIES))
        self.mlp = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def _apply(self, fn: Any, recurse: bool = True) -> TimestepEmbedder:
        frequencies = self.W
        super()._apply(fn, recurse)
        if self.W.dtype != torch.float32:
            self.W = frequencies.to(self.W.device)
        return self

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = 2 * math.pi * timesteps.float()[:, None] * self.W[None, :]
        features = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class FinalLayer(nn.Module):
    """Tokens [B,T,D] modulated by c [B,1,D] or [B,T,D] → [B,T,p²·C]."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
