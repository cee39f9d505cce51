"""Transformer blocks. Their forwards take tensors only, so each compiles on its own."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from dsr_scale.config.model import AttentionVariant
from dsr_scale.model.layers import Attention, CrossAttention, RMSNorm, SwiGLU, modulate


class Block(nn.Module):
    """A block of body or head: AdaLN-zero self-attention, cross-attention if any, AdaLN-zero SwiGLU."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        cross: bool = False,
        qk_norm: bool = False,
        attention: Literal["sdpa", "flash"] = "sdpa",
        variant: AttentionVariant = "plain",
        hidden: int = 0,
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(
            width, heads, qk_norm=qk_norm, kind=attention, variant=variant, hidden=hidden
        )
        if cross:
            self.norm_cross = RMSNorm(width)
            self.cross = CrossAttention(width, heads)
        self.has_cross = cross
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """x [B,N,D] and its condition c, [B,1,D] or one row per token [B,N,D] → [B,N,D].

        `cos`, `sin`: RoPE [N, head_dim/2]. `mask`: keys of self-attention [B,1,1,N]. `text`
        [B,L,D] and `text_mask` [B,1,1,L] are what a block with cross-attention reads.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), cos, sin, mask)
        if self.has_cross:
            assert text is not None and text_mask is not None
            x = x + self.cross(self.norm_cross(x), text, text_mask)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class TextBlock(nn.Module):
    """A plain pre-norm bidirectional block among text tokens: [B,L,D] → [B,L,D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """`mask`: keys [B,1,1,L], True = real token."""
        text = text + self.attn(self.norm1(text), None, None, mask)
        return text + self.mlp(self.norm2(text))


class ConnectorBlock(nn.Module):
    """A pre-norm block through which queries [B,T,D] read text [B,L,D] → [B,T,D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.cross = CrossAttention(width, heads)
        self.norm2 = RMSNorm(width)
        self.mlp = SwiGLU(width)

    def forward(self, queries: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """`mask`: text keys [B,1,1,L]."""
        queries = queries + self.cross(self.norm1(queries), text, mask)
        return queries + self.mlp(self.norm2(queries))
