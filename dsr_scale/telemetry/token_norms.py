"""Norms of tokens by block: where outliers live, measured scale-free (docs/method.md §5).

For each image n_i is the L2 norm of image token i of a block's output; which are outliers is decided
by `base.token_outliers`. Registers are reported apart from image tokens.

Two probes: `NormProbe` keeps the norms of one forward for a look at single tokens, `TokenNorms` sums
statistics over a training run's forwards on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dsr_scale.base.token_outliers import outliers
from dsr_scale.telemetry.measures import bucket_sums

STATISTICS = ("outlier_ratio", "max_over_median", "register_over_median")
"""Of a block's output, in the order of `image_statistics`."""


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
    def outlier_ratio(self) -> float:
        """Share of image tokens that are outliers by the rule of `base.token_outliers`."""
        return self._means[0]

    @property
    def max_over_median(self) -> float:
        """Largest over median image-token norm, averaged over images."""
        return self._means[1]

    @property
    def register_over_median(self) -> float | None:
        """Largest register norm over the median image-token norm; None without registers."""
        return None if self.register_norms.shape[1] == 0 else self._means[2]

    @property
    def _means(self) -> list[float]:
        return image_statistics(self.image_norms, self.register_norms).mean(0).tolist()


def image_statistics(image_norms: Tensor, register_norms: Tensor) -> Tensor:
    """`STATISTICS` of each image, from norms [B,T] and [B,K]: [B,3]; 0 for registers without any."""
    median = image_norms.median(1).values
    registers = torch.zeros_like(median)
    if register_norms.shape[1]:
        registers = register_norms.amax(1) / median
    ratio = outliers(image_norms).to(median.dtype).mean(1)
    return torch.stack([ratio, image_norms.amax(1) / median, registers], dim=1)


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


class TokenNorms:
    """Statistics of every block's output by timestep bucket, summed over forwards on the device.

    A pipeline rank fills the blocks that it has; sums of all ranks together are of the whole model.
    """

    def __init__(
        self,
        blocks: Sequence[str],
        buckets: int,
        device: torch.device,
        *,
        whole_rows: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`blocks` are the names of all blocks. `whole_rows` makes norms of all rows [B,N] of a rank's
        share of them, where ranks divide the tokens."""
        self.blocks = tuple(blocks)
        self._buckets = buckets
        self._whole_rows = whole_rows
        self._places = {name: place for place, name in enumerate(blocks)}
        # Images, images with registers, then sums of the statistics.
        self._sums = torch.zeros(
            len(blocks), buckets, 2 + len(STATISTICS), dtype=torch.float64, device=device
        )

    def probe(self, timesteps: Tensor) -> Callable[[str, Tensor, Layout], None]:
        """The probe for a forward of images at model times [B]."""

        @torch.no_grad()
        def measure(block: str, tokens: Tensor, layout: Layout) -> None:
            # Taken of the share of rows that is here, and gathered: a number per row, not a token.
            norms = torch.linalg.vector_norm(tokens.detach(), dim=-1, dtype=torch.float32)
            if self._whole_rows is not None:
                norms = self._whole_rows(norms)
            rows = layout.at(block)
            registers = norms[:, rows.register_slice]
            statistics = image_statistics(norms[:, rows.image_slice], registers)
            ones = torch.ones_like(statistics[:, :1])
            has_registers = ones if registers.shape[1] else torch.zeros_like(ones)
            values = torch.cat([ones, has_registers, statistics], dim=1)
            self._sums[self._places[block]] += bucket_sums(timesteps, values, self._buckets)

        return measure

    def take(self) -> Tensor:
        """This rank's sums [blocks,K,5], which begin at 0 again."""
        taken = self._sums.clone()
        self._sums.zero_()
        return taken


def norm_metrics(blocks: Sequence[str], sums: Tensor) -> dict[str, float]:
    """Metrics of the sums [blocks,K,5] of all ranks: the largest of each statistic, then one for
    every block and bucket with images in it."""
    found: dict[str, dict[str, float]] = {statistic: {} for statistic in STATISTICS}
    for block, by_bucket in zip(blocks, sums.tolist(), strict=True):
        for bucket, (images, with_registers, *totals) in enumerate(by_bucket):
            counts = (images, images, with_registers)
            for statistic, count, total in zip(STATISTICS, counts, totals, strict=True):
                if count > 0:
                    found[statistic][f"{statistic}/{block}/t{bucket}"] = total / count
    largest = {statistic: max(values.values()) for statistic, values in found.items() if values}
    return largest | {name: value for values in found.values() for name, value in values.items()}
