"""What is measured of a diffusion transformer: losses by timestep, token norms of every block.

Both are summed on the device and read at a log line alone, where the ranks put together what each of
them knows in one message between hosts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dsr_scale.config.training import TrackingConfig
from dsr_scale.model.dit import DiT
from dsr_scale.parallel.groups import Axis, Ranks
from dsr_scale.parallel.pipeline import Probes
from dsr_scale.telemetry.measures import TimestepLosses, loss_metrics
from dsr_scale.telemetry.token_norms import TokenNorms, norm_metrics
from dsr_scale.train.objective import Example, Watched


class DiffusionMeasures:
    """Sums of this rank since the last log line."""

    def __init__(
        self, tracking: TrackingConfig, network: DiT, ranks: Ranks, *, split_rows: bool
    ) -> None:
        """`split_rows`: tensor ranks share out the tokens between blocks."""
        self._ranks = ranks
        self._norms_every_steps = tracking.norms_every_steps
        self._losses = TimestepLosses(tracking.timestep_buckets, ranks.device)
        self._norms: TokenNorms | None = None
        self._norms_measured = False
        if tracking.norms_every_steps is not None:
            self._norms = TokenNorms(
                [network.block_name(index) for index in range(network.total_blocks)],
                tracking.timestep_buckets,
                ranks.device,
                whole_rows=rows_gatherer(ranks.tensor) if split_rows else None,
            )

    def watched(self, examples: Sequence[Example]) -> Sequence[Example]:
        """A step's examples, such that their losses are counted."""
        return Watched(examples, self._losses.add)

    def probes(self, step: int) -> Probes | None:
        """What looks at the tokens of step `step`, from 1; None for most steps."""
        every_steps = self._norms_every_steps
        if self._norms is None or every_steps is None or step % every_steps:
            return None
        self._norms_measured = True
        return self._norms.probe

    def end_step(self, skipped: Tensor) -> None:
        """Counts a step; `skipped`, on the device, is not 0 for one that changed nothing."""
        self._losses.end_step(skipped)

    def take(self) -> dict[str, float]:
        """Metrics of all ranks since the last call. A collective."""
        losses = self._losses.take()
        parts = [losses.flatten()]
        norms = None
        if self._norms is not None and self._norms_measured:
            norms = self._norms.take()
            parts.append(norms.flatten())
        self._norms_measured = False
        # Tensor ranks know the same sums, which cancels in every mean.
        whole = self._ranks.sum_on_host(torch.cat(parts).tolist())
        sums = torch.tensor(whole, dtype=torch.float64)
        metrics = loss_metrics(sums[: losses.numel()].view(losses.shape).tolist())
        if self._norms is not None and norms is not None:
            metrics |= norm_metrics(self._norms.blocks, sums[losses.numel() :].view(norms.shape))
        return metrics


def rows_gatherer(tensor: Axis) -> Callable[[Tensor], Tensor]:
    """From each tensor rank's share of the rows [B,N/tp] to all of them [B,N], on every rank."""

    def gather(share: Tensor) -> Tensor:
        shares = [torch.empty_like(share) for _ in range(tensor.size)]
        dist.all_gather(shares, share.contiguous(), group=tensor.group)
        return torch.cat(shares, dim=1)

    return gather
