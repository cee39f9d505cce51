"""From noise to latents along the learned velocity, on the shifted time grid.

`steps` intervals divide [1,0] evenly before the shift. The paper's "50" counts the grid's points,
that is 49 of our steps (docs/method.md §3). Euler is the published sampler; Heun is of second order at
two evaluations per step; DPM-Solver++ (diffusers) is of second order at one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.diffusion.timesteps import shift_timesteps

OnStep = Callable[[int, int], None]
"""Called after each step with the number of steps done and of all."""


def time_grid(steps: int, alpha: float) -> list[float]:
    """steps + 1 times from 1 to 0, shifted by α."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift_timesteps(even, alpha).tolist()


@torch.no_grad()
def sample(
    velocity: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    config: SamplingConfig,
    alpha: float,
    *,
    on_step: OnStep | None = None,
) -> Tensor:
    """Integrates dx/dt = velocity(x, t) from noise [B,C,H,W] at t = 1 to latents at t = 0, float32.

    `velocity` sees only t > 0.
    """
    x = noise.float()
    match config.solver:
        case "euler":
            return _euler(velocity, x, time_grid(config.steps, alpha), on_step)
        case "heun":
            return _heun(velocity, x, time_grid(config.steps, alpha), on_step)
        case "dpm++":
            return _dpm(velocity, x, config.steps, alpha, on_step)


def _report(on_step: OnStep | None, done: int, total: int) -> None:
    if on_step is not None:
        on_step(done, total)


def _euler(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    times: list[float],
    on_step: OnStep | None,
) -> Tensor:
    total = len(times) - 1
    for index, (now, then) in enumerate(pairwise(times)):
        x = x + (then - now) * velocity(x, now)
        _report(on_step, index + 1, total)
    return x


def _heun(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    times: list[float],
    on_step: OnStep | None,
) -> Tensor:
    """The trapezoid rule; the last step is Euler's, for no network was trained at t = 0."""
    total = len(times) - 1
    for index, (now, then) in enumerate(pairwise(times)):
        slope = velocity(x, now)
        if index < total - 1:
            ahead = velocity(x + (then - now) * slope, then)
            slope = (slope + ahead) / 2
        x = x + (then - now) * slope
        _report(on_step, index + 1, total)
    return x


def _dpm(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    steps: int,
    alpha: float,
    on_step: OnStep | None,
) -> Tensor:
    """DPM-Solver++(2M). diffusers rounds its timesteps to integers, so times are its sigmas."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    # The first sigma is 1 − O(1/num_train_timesteps): many, so that the start is pure noise.
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=100_000,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=alpha,
    )
    scheduler.set_timesteps(steps)
    # Rounded timesteps may repeat near t = 1; a lookup by value would then skip a step.
    scheduler.set_begin_index(0)
    times = scheduler.sigmas.tolist()[:-1]
    for index, (timestep, now) in enumerate(zip(scheduler.timesteps, times, strict=True)):
        x = scheduler.step(velocity(x, now), timestep, x, return_dict=False)[0]
        _report(on_step, index + 1, steps)
    return x
