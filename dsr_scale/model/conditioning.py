"""What a batch is conditioned on, and the embedders that turn it into vectors and text tokens.

Every kind has an unconditional branch of its own (a null class row, a null token, a null
embedding), chosen per sample by `Condition.null`; guidance therefore never calls a text encoder.
A caption without a single real token counts as null.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsr_scale.config.derive import BYTE_LAYERS, BYTE_VOCABULARY, ModelShape
from dsr_scale.config.model import ClassConditioning, QueryAdaLNConditioning
from dsr_scale.model.block import ConnectorBlock, TextBlock
from dsr_scale.model.layers import RMSNorm
from dsr_scale.model.positions import sincos_1d


@dataclass(frozen=True)
class Condition:
    """Labels or text of a batch; `null` marks the samples of the unconditional branch."""

    null: Tensor
    """[B] bool."""
    labels: Tensor | None = None
    """[B] int64; ignored where null."""
    tokens: Tensor | None = None
    """Text features [B,L,C] or byte ids [B,L] int64; None is no text at all, every sample null."""
    mask: Tensor | None = None
    """[B,L] bool, True = real token; None is all real."""

    def as_null(self) -> Condition:
        """The same batch without its condition: the negative branch of guidance."""
        return replace(self, null=torch.ones_like(self.null))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Condition:
        """Moves every tensor to `device`, and text features to `dtype`."""

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        return Condition(
            null=self.null.to(device),
            labels=move(self.labels),
            tokens=move(self.tokens),
            mask=move(self.mask),
        )

    @property
    def text_length(self) -> int:
        """L as the model sees it: one null token where there is no text at all."""
        return 1 if self.tokens is None else self.tokens.shape[1]


def concatenate(first: Condition, second: Condition) -> Condition:
    """One batch of both, `first` before `second`; their text must have one padded length."""

    def join(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        assert (a is None) == (b is None), "conditions of different kinds"
        return None if a is None or b is None else torch.cat([a, b])

    return Condition(
        null=torch.cat([first.null, second.null]),
        labels=join(first.labels, second.labels),
        tokens=join(first.tokens, second.tokens),
        mask=join(first.mask, second.mask),
    )


class Embedded(NamedTuple):
    """A condition as the transformer takes it."""

    vector: Tensor
    """Added to the timestep embedding: [B,1,D], or one row per image token [B,T,D]."""
    text: Tensor | None
    """[B,L,D] for blocks that read text."""
    mask: Tensor | None
    """[B,L] bool, True = real."""


class ClassEmbedder(nn.Module):
    """A learned vector per class; the last row is the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, condition: Condition, grid: tuple[int, int]) -> Embedded:
        labels = condition.labels
        if labels is None:
            rows = torch.full_like(condition.null, self.num_classes, dtype=torch.long)
        else:
            rows = torch.where(condition.null, self.num_classes, labels)
        return Embedded(self.embedding_table(rows)[:, None], None, None)


class TextTokens(nn.Module):
    """Text features or bytes → tokens [B,L,D], which of them are real [B,L], which samples are null [B].

    Features go through one linear layer. Bytes have a table, fixed positions and two bidirectional
    blocks. What stands in the padding never reaches a real token.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.width = shape.width
        if shape.text_kind == "features":
            self.proj = nn.Linear(shape.text_channels, shape.width)
        else:
            self.byte_table = nn.Embedding(BYTE_VOCABULARY, shape.width)
            self.layers = nn.ModuleList(
                TextBlock(shape.width, shape.heads) for _ in range(BYTE_LAYERS)
            )
        self.is_features = shape.text_kind == "features"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return (self.proj if self.is_features else self.byte_table).weight.dtype

    def forward(self, condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
        """Null samples come back with one real token, the first, whose content is meaningless."""
        tokens, null = condition.tokens, condition.null
        if tokens is None:
            # No text in the whole batch: one row per sample, whose content the caller replaces.
            empty = torch.zeros(len(null), 1, self.width, dtype=self.dtype, device=null.device)
            return empty, torch.ones_like(null)[:, None], torch.ones_like(null)
        mask = condition.mask
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        null = null | ~mask.any(dim=1)
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        real = torch.where(null[:, None], first, mask)
        if self.is_features:
            readable = mask & ~null[:, None]
            features = torch.where(readable[:, :, None], tokens, torch.zeros_like(tokens))
            return self.proj(features.to(self.proj.weight.dtype)), real, null
        positions = sincos_1d(tokens.shape[1], self.width, tokens.device)
        text = self.byte_table(tokens)
        text = text + positions.to(text.dtype)
        for layer in self.layers:
            text = layer(text, real[:, None, None])
        return text, real, null


class PooledTextEmbedder(nn.Module):
    """Text tokens for blocks to read, and their masked mean through an MLP as the vector."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.tokens = TextTokens(shape)
        self.null_token = nn.Parameter(torch.empty(1, 1, shape.width))
        self.pooled_mlp = nn.Sequential(
            nn.Linear(shape.width, shape.width),
            nn.SiLU(),
            nn.Linear(shape.width, shape.width),
        )

    def forward(self, condition: Condition, grid: tuple[int, int]) -> Embedded:
        text, mask, null = self.tokens(condition)
        text = torch.where(null[:, None, None], self.null_token, text)
        seen = mask[:, :, None]
        total = (text * seen).sum(dim=1, keepdim=True, dtype=torch.float32)
        mean = (total / seen.sum(dim=1, keepdim=True)).to(text.dtype)
        return Embedded(self.pooled_mlp(mean), text, mask)


class QueryEmbedder(nn.Module):
    """One learned query per image token reads the text: y_i [B,T,D] (Scale-RAE, docs/method.md §2).

    Queries exist for the training grid and are interpolated bicubically to any other. A null sample
    has one learned embedding for all its tokens.
    """

    def __init__(self, shape: ModelShape, connector_depth: int) -> None:
        super().__init__()
        self.grid = (shape.grid[0] // shape.patch, shape.grid[1] // shape.patch)
        self.tokens = TextTokens(shape)
        self.queries = nn.Parameter(torch.empty(1, shape.image_tokens, shape.width))
        self.null_token = nn.Parameter(torch.empty(1, 1, shape.width))
        self.layers = nn.ModuleList(
            ConnectorBlock(shape.width, shape.heads) for _ in range(connector_depth)
        )
        self.norm = RMSNorm(shape.width)
        self.proj = nn.Linear(shape.width, shape.width)

    def queries_for(self, grid: tuple[int, int]) -> Tensor:
        """Queries of a grid of image tokens: [1,T,D]."""
        if grid == self.grid:
            return self.queries
        image = self.queries.float().transpose(1, 2).unflatten(-1, self.grid)
        image = functional.interpolate(image, grid, mode="bicubic", align_corners=False)
        return image.flatten(2).transpose(1, 2).to(self.queries.dtype)

    def forward(self, condition: Condition, grid: tuple[int, int]) -> Embedded:
        text, mask, null = self.tokens(condition)
        y = self.queries_for(grid).expand(len(text), -1, -1)
        for layer in self.layers:
            y = layer(y, text, mask[:, None, None])
        y = torch.where(null[:, None, None], self.null_token, self.proj(self.norm(y)))
        return Embedded(y, None, None)


def make_embedder(shape: ModelShape) -> nn.Module:
    """The embedder that the shape's conditioning asks for."""
    match shape.conditioning:
        case ClassConditioning(num_classes=num_classes):
            return ClassEmbedder(num_classes, shape.width)
        case QueryAdaLNConditioning(connector_depth=depth):
            return QueryEmbedder(shape, depth)
        case _:
            return PooledTextEmbedder(shape)
