"""The straight path x_t = (1−t)·x + t·ε and what a network may predict on it (docs/method.md §3).

Whatever the network puts out, loss and solvers work with the velocity v = ε − x, so that data,
noise and velocity prediction share one objective and one sampler.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Prediction = Literal["data", "velocity", "noise"]


def over_latents(t: Tensor) -> Tensor:
    """t [B] shaped to multiply latents: [B,1,1,1]."""
    return t[:, None, None, None]


def add_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of data x and noise ε [B,C,H,W] at t [B] in [0,1]; t = 1 is pure noise."""
    t = over_latents(t)
    return (1 - t) * x + t * noise


def velocity_target(x: Tensor, noise: Tensor) -> Tensor:
    """ε − x, the derivative of the path: [B,C,H,W]."""
    return noise - x


def to_velocity(
    output: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction, clamp: float
) -> Tensor:
    """The velocity [B,C,H,W] that a network's `output` at x_t and t [B] amounts to.

    data: (x_t − x̂)/max(t, clamp). noise: (ε̂ − x_t)/max(1−t, clamp). The clamp bounds how much an
    error of the prediction is magnified near the end where the divisor vanishes.
    """
    t = over_latents(t)
    match prediction:
        case "velocity":
            return output
        case "data":
            return (x_t - output) / t.clamp(min=clamp)
        case "noise":
            return (output - x_t) / (1 - t).clamp(min=clamp)
