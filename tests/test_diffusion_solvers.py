"""Solvers and guidance against Gaussian data, whose velocity field and flow are known exactly."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dsr_scale.config.diffusion import SamplingConfig
from dsr_scale.diffusion.guidance import (
    branches_in_one_batch,
    branches_of_two,
    guided_velocity,
    network_velocity,
)
from dsr_scale.diffusion.path import Prediction
from dsr_scale.diffusion.solvers import sample, time_grid

MEAN, STD = 1.5, 0.4


def posterior_mean(x_t: Tensor, t: float) -> Tensor:
    """E[x | x_t] for x ~ N(MEAN, STD²)."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return MEAN + (1 - t) * STD**2 / variance * (x_t - (1 - t) * MEAN)


def exact_velocity(x_t: Tensor, t: float) -> Tensor:
    """E[ε − x | x_t]."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return t / variance * (x_t - (1 - t) * MEAN) - posterior_mean(x_t, t)


def make_noise() -> Tensor:
    return torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))


def error(solver: str, steps: int, alpha: float) -> float:
    """Largest distance from the exact flow, which carries noise z to MEAN + STD·z."""
    noise = make_noise()
    config = SamplingConfig.model_validate({"solver": solver, "steps": steps})
    found = sample(exact_velocity, noise, config, alpha)
    return (found - (MEAN + STD * noise)).abs().max().item()


@pytest.mark.parametrize("alpha", [1.0, 3.0])
@pytest.mark.parametrize(
    ("solver", "order", "steps"), [("euler", 1, 40), ("heun", 2, 40), ("dpm++", 2, 160)]
)
def test_order_of_convergence(solver: str, order: int, steps: int, alpha: float) -> None:
    """DPM-Solver++ steps evenly in flow time, not in log-SNR, and reaches its order late."""
    coarse, fine = error(solver, steps, alpha), error(solver, 2 * steps, alpha)
    assert fine < 0.05
    tolerance = 0.6 if solver == "dpm++" else 0.35
    assert abs(math.log2(coarse / fine) - order) < tolerance, (coarse, fine)
    assert solver == "euler" or coarse < 0.5 * error("euler", steps, alpha)


@pytest.mark.parametrize("solver", ["heun", "dpm++"])
def test_second_order_solvers_agree_with_a_fine_euler(solver: str) -> None:
    noise = make_noise()
    fine = sample(exact_velocity, noise, SamplingConfig(solver="euler", steps=2000), 2.0)
    config = SamplingConfig.model_validate({"solver": solver, "steps": 300})
    torch.testing.assert_close(sample(exact_velocity, noise, config, 2.0), fine, atol=5e-3, rtol=0)


def test_dpm_takes_every_step_under_a_strong_shift() -> None:
    """With α = 7 the scheduler's rounded timesteps repeat near pure noise."""
    seen: list[float] = []

    def velocity(x_t: Tensor, t: float) -> Tensor:
        seen.append(t)
        return exact_velocity(x_t, t)

    config = SamplingConfig(solver="dpm++", steps=200)
    out = sample(velocity, make_noise(), config, 7.0)
    assert len(seen) == 200 and all(a > b > 0 for a, b in pairwise(seen))
    assert 0.9999 < seen[0] < 1
    torch.testing.assert_close(out, MEAN + STD * make_noise(), atol=1e-2, rtol=0)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 6), ("heun", 11), ("dpm++", 6)])
def test_evaluations_and_progress(solver: str, evaluations: int) -> None:
    calls: list[float] = []
    progress: list[tuple[int, int]] = []

    def velocity(x_t: Tensor, t: float) -> Tensor:
        calls.append(t)
        return exact_velocity(x_t, t)

    config = SamplingConfig.model_validate({"solver": solver, "steps": 6})
    sample(velocity, make_noise(), config, 2.0, on_step=lambda i, n: progress.append((i, n)))
    assert len(calls) == evaluations and min(calls) > 0
    assert progress == [(i, 6) for i in range(1, 7)]


def test_published_grid() -> None:
    """50 points are 49 steps; at α = √48 the last time before 0 is 0.126 (docs/method.md §3)."""
    grid = time_grid(49, math.sqrt(196608 / 4096))
    assert len(grid) == 50 and grid[0] == 1 and grid[-1] == 0
    assert round(grid[-2], 3) == 0.126


def test_last_euler_step_of_a_data_prediction_returns_the_prediction() -> None:
    """As the paper's sampler does: the final latents are x̂ at the last time before 0."""
    outputs: list[Tensor] = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        outputs.append(posterior_mean(x_t, float(t[0])))
        return outputs[-1]

    velocity = network_velocity(network, "data", 0.05)
    out = sample(velocity, make_noise(), SamplingConfig(steps=49), math.sqrt(48))
    torch.testing.assert_close(out, outputs[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["data", "noise", "velocity"])
def test_every_prediction_gives_the_same_field(prediction: Prediction) -> None:
    def network(x_t: Tensor, t: Tensor) -> Tensor:
        time = float(t[0])
        x = posterior_mean(x_t, time)
        v = exact_velocity(x_t, time)
        return {"data": x, "velocity": v, "noise": v + x}[prediction].to(torch.float64)

    velocity = network_velocity(network, prediction, 0.01)
    x_t = make_noise()
    for t in (0.05, 0.5, 0.98):
        torch.testing.assert_close(velocity(x_t, t), exact_velocity(x_t, t), atol=1e-4, rtol=1e-4)
        assert velocity(x_t, t).dtype == torch.float32


def positive(x_t: Tensor, t: float) -> Tensor:
    return x_t * t + 1


def negative(x_t: Tensor, t: float) -> Tensor:
    return x_t - t


def joint(x_t: Tensor, t: float) -> Tensor:
    half = len(x_t) // 2
    return torch.cat([positive(x_t[:half], t), negative(x_t[half:], t)])


def test_guidance_of_one_never_computes_the_negative_branch() -> None:
    def forbidden(x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
        raise AssertionError("computed")

    x_t = make_noise()
    velocity = guided_velocity(positive, forbidden, SamplingConfig(guidance=1.0))
    assert torch.equal(velocity(x_t, 0.4), positive(x_t, 0.4))


def test_guidance_is_linear_in_its_scale_and_one_batch_equals_two_networks() -> None:
    x_t = make_noise()
    results = {}
    for scale in (0.0, 2.0, 3.0):
        config = SamplingConfig(guidance=scale)
        one = guided_velocity(positive, branches_in_one_batch(joint), config)(x_t, 0.3)
        two = guided_velocity(positive, branches_of_two(positive, negative), config)(x_t, 0.3)
        assert torch.equal(one, two)
        results[scale] = one
    torch.testing.assert_close(results[0.0], negative(x_t, 0.3))
    step = positive(x_t, 0.3) - negative(x_t, 0.3)
    torch.testing.assert_close(results[2.0], positive(x_t, 0.3) + step)
    torch.testing.assert_close(results[3.0] - results[2.0], step)


def test_guidance_acts_inside_its_interval_only() -> None:
    x_t = make_noise()
    config = SamplingConfig(guidance=2.0, guidance_interval=(0.3, 0.8))
    velocity = guided_velocity(positive, branches_of_two(positive, negative), config)
    for t in (0.1, 0.29, 0.81, 1.0):
        assert torch.equal(velocity(x_t, t), positive(x_t, t))
    for t in (0.3, 0.5, 0.8):
        assert not torch.equal(velocity(x_t, t), positive(x_t, t))


def test_diffusion_imports_no_model() -> None:
    code = (
        "import sys\n"
        "from dsr_scale.diffusion import guidance, loss, path, solvers, timesteps\n"
        "assert not [m for m in sys.modules if m.startswith(('dsr_scale.model', 'diffusers'))]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
