"""Norms of tokens by block: where outliers live, measured scale-free (docs/method.md §5).

For each image n_i is the L2 norm of image token i of a block's output; which are outliers is decided
by `base.token_outliers`. Registers are reported apart from image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from dsr_scale.base.token_outliers import outliers


class Rows(Protocol):
    """What is needed of a block's rows: which are registers and which are image."""

    @property
    def register_slice(self) -> slice: ...

    @property
    def image_slice(self) -> slice: ...


class Layout(Protocol):
    """What is needed of a token layout: the rows that leave a named block."""

    def at(self, name: str) -> Rows: ...


@dataclass(frozen=True)
class BlockNorms:
    """Statistics of one block's output over a batch."""

    block: str
    image_norms: torch.Tensor
    """[B,T] norms of image tokens."""
    register_norms: torch.Tensor
    """[B,K] norms of register rows; K is 0 where none are present."""

    @property
    def max_over_median(self) -> float:
        """Largest over median image-token norm, averaged over images."""
        return float((self.image_norms.amax(1) / self.image_norms.median(1).values).mean())

    @property
    def outlier_ratio(self) -> float:
        """Share of image tokens that are outliers by the rule of `base.token_outliers`."""
        return float(outliers(self.image_norms).float().mean())

    @property
    def register_over_median(self) -> float | None:
        """Largest register norm over the median image-token norm; None without registers."""
        if self.register_norms.shape[1] == 0:
            return None
        return float((self.register_norms.amax(1) / self.image_norms.median(1).values).mean())


class NormProbe:
    """Pass it to the model as `probe`; it keeps one `BlockNorms` per block of the last forward."""

    def __init__(self) -> None:
        self.blocks: dict[str, BlockNorms] = {}

    def __call__(self, block: str, tokens: torch.Tensor, layout: Layout) -> None:
        norms = tokens.detach().float().norm(dim=-1).cpu()
        rows = layout.at(block)
        self.blocks[block] = BlockNorms(
            block, norms[:, rows.image_slice], norms[:, rows.register_slice]
        )
