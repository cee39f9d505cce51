"""The moving average of the weights, kept as one more entry of the optimizer's flat state.

ZeRO then shards it like the moments, for free, and it is gathered and restored by the same calls.
It is fp32 and updated in place from the fp32 master partition: nothing is gathered in a step.
"""

from __future__ import annotations

import torch
from torch.optim import Optimizer

EMA = "ema"
"""Key of the average in the optimizer's state."""


def decay_at(step: int, decay: float) -> float:
    """Decay used by step `step` (first is 0): short memory at first, so that the random start is forgotten."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update(optimizer: Optimizer, decay: float) -> None:
    """ema ← decay·ema + (1−decay)·weights, on this rank's partition."""
    averages = []
    weights = []
    for group in optimizer.param_groups:
        for partition in group["params"]:
            averages.append(optimizer.state[partition][EMA])
            weights.append(partition.detach())
    torch._foreach_lerp_(averages, weights, 1 - decay)
