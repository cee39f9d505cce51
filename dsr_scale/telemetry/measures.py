"""Losses by timestep, summed on the device; the host learns them at a log line only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def bucket_sums(timesteps: Tensor, values: Tensor, buckets: int) -> Tensor:
    """Sums of values [B,V] by the equal parts of [0,1] in which timesteps [B] lie: float64 [K,V].

    No atomic additions, so the same numbers give the same sums; 1 belongs to the last bucket.
    """
    index = (timesteps * buckets).long().clamp(0, buckets - 1)
    inside = index[:, None] == torch.arange(buckets, device=index.device)
    # A product with 0 would spread a value that is not finite to the other buckets.
    return torch.where(inside[..., None], values.double()[:, None], 0.0).sum(0)


class TimestepLosses:
    """Losses of samples by timestep bucket since they were last taken, of steps that counted."""

    def __init__(self, buckets: int, device: torch.device) -> None:
        self._buckets = buckets
        self._counted = torch.zeros(buckets, 2, dtype=torch.float64, device=device)
        self._step = torch.zeros_like(self._counted)

    @torch.no_grad()
    def add(self, timesteps: Tensor, losses: Tensor) -> None:
        """Losses [B] of samples at model times [B], of the step under way."""
        values = torch.stack([torch.ones_like(losses), losses], dim=1)
        self._step += bucket_sums(timesteps, values, self._buckets)

    def end_step(self, skipped: Tensor) -> None:
        """Counts the step's losses, or forgets them where `skipped`, on the device, is not 0."""
        self._counted += torch.where(skipped > 0, 0.0, self._step)
        self._step.zero_()

    def take(self) -> Tensor:
        """Number and sum by bucket [K,2] on this rank, which begin at 0 again."""
        taken = self._counted.clone()
        self._counted.zero_()
        return taken


def loss_metrics(sums: Sequence[Sequence[float]]) -> dict[str, float]:
    """Metrics of numbers and sums by bucket, of all ranks; nothing for a bucket without samples."""
    return {
        f"loss_t{bucket}": total / count for bucket, (count, total) in enumerate(sums) if count > 0
    }
