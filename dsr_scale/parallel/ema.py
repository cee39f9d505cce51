"""Moving averages of the weights, kept as more entries of the optimizer's flat state.

ZeRO then shards them like the moments, for free, and they are saved and restored by the same code.
They are fp32 and updated in place from the fp32 master partition: nothing is gathered in a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dsr_scale.config.training import ema_name


def decay_at(step: int, decay: float) -> float:
    """Decay used by step `step` (first is 0): short memory at first, so that the random start is forgotten."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update(
    partitions: Iterable[Tensor],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    decays: Sequence[float],
    step: int,
    applied: Tensor,
) -> None:
    """ema ← decay·ema + (1−decay)·weights on this rank's partitions, for every decay.

    `applied` is 1, or 0 for a step that changed nothing and must move no average either; it stays on
    the device, so that nobody waits for it.
    """
    for partition in partitions:
        weights = partition.detach()
        for decay in decays:
            share = applied.to(weights) * (1 - decay_at(step, decay))
            state[partition][ema_name(decay)].lerp_(weights, share)
