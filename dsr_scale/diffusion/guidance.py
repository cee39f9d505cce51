"""Guidance: a velocity pushed away from that of a weaker or unconditional prediction.

A solver asks for a velocity at one time for the whole batch, so time is a plain float and the
interval is decided without touching the device. Both branches run as one doubled batch
(classifier-free guidance) or as two networks (autoguidance with a weaker model).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.diffusion.path import Prediction, to_velocity

Network = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B,C,H,W], t [B]) → the network's output [B,C,H,W]."""
Velocity = Callable[[Tensor, float], Tensor]
"""(x_t [B,C,H,W], t) → velocity [B,C,H,W]."""
Branches = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""(x_t [B,C,H,W], t) → velocities of the conditional and of the negative branch."""


def network_velocity(network: Network, prediction: Prediction, clamp: float) -> Velocity:
    """The velocity, in float32, of a network that predicts data, velocity or noise."""

    def velocity(x_t: Tensor, t: float) -> Tensor:
        times = torch.full((len(x_t),), t, dtype=torch.float32, device=x_t.device)
        return to_velocity(network(x_t, times).float(), x_t, times, prediction, clamp)

    return velocity


def branches_in_one_batch(joint: Velocity) -> Branches:
    """Both branches from one velocity over a doubled batch: conditional rows first, then negative."""

    def branches(x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
        conditional, negative = joint(torch.cat([x_t, x_t]), t).chunk(2)
        return conditional, negative

    return branches


def branches_of_two(conditional: Velocity, negative: Velocity) -> Branches:
    """Both branches from two velocities: autoguidance when `negative` is a weaker model's."""
    return lambda x_t, t: (conditional(x_t, t), negative(x_t, t))


def guided_velocity(conditional: Velocity, branches: Branches, config: SamplingConfig) -> Velocity:
    """negative + w·(conditional − negative) inside the interval, the conditional alone outside.

    At guidance w = 1 the negative branch is never computed.
    """
    low, high = config.guidance_interval
    if config.guidance == 1.0:
        return conditional

    def velocity(x_t: Tensor, t: float) -> Tensor:
        if not low <= t <= high:
            return conditional(x_t, t)
        positive, negative = branches(x_t, t)
        return negative + config.guidance * (positive - negative)

    return velocity
