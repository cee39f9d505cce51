"""Path, timesteps, keyed draws and loss against their formulas and distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsr_scale.config.diffusion import DiffusionConfig, TimestepsConfig
from dsr_scale.diffusion.loss import velocity_loss
from dsr_scale.diffusion.path import Prediction, add_noise, to_velocity, velocity_target
from dsr_scale.diffusion.timesteps import (
    draw_noise,
    draw_sample_timesteps,
    shift_timesteps,
    timesteps_from_normal,
)


def pair(batch: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 4, 4, generator=generator) * 2
    noise = torch.randn(batch, 3, 4, 4, generator=generator)
    return x, noise, torch.linspace(0.1, 0.9, batch)


@pytest.mark.parametrize("prediction", ["data", "noise", "velocity"])
def test_exact_outputs_give_the_target_velocity(prediction: Prediction) -> None:
    x, noise, t = pair()
    target = noise - x
    output = {"data": x, "noise": noise, "velocity": target}[prediction]
    x_t = add_noise(x, noise, t)
    found = to_velocity(output, x_t, t, prediction, 0.05)
    torch.testing.assert_close(found, target, atol=1e-5, rtol=1e-5)
    assert torch.equal(velocity_target(x, noise), target)


def test_path_ends_and_slope() -> None:
    x, noise, t = pair()
    assert torch.equal(add_noise(x, noise, torch.zeros(6)), x)
    assert torch.equal(add_noise(x, noise, torch.ones(6)), noise)
    slope = (add_noise(x, noise, t + 0.05) - add_noise(x, noise, t - 0.05)) / 0.1
    torch.testing.assert_close(slope, noise - x, atol=1e-5, rtol=1e-5)


def test_the_clamp_bounds_the_divisor() -> None:
    x_t, output = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    near_data, near_noise = torch.tensor([0.01]), torch.tensor([0.99])
    assert to_velocity(output, x_t, near_data, "data", 0.05).item() == pytest.approx(20)
    assert to_velocity(output, x_t, near_noise, "data", 0.05).item() == pytest.approx(1 / 0.99)
    assert to_velocity(output, x_t, near_noise, "noise", 0.05).item() == pytest.approx(-20)


def test_shift() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    alpha = 6.928
    shifted = shift_timesteps(t, alpha)
    assert shifted[0] == 0 and shifted[-1] == 1
    expected = torch.tensor([alpha * v / (1 + (alpha - 1) * v) for v in t.tolist()])
    torch.testing.assert_close(shifted.float(), expected)
    torch.testing.assert_close(shift_timesteps(shifted, 1 / alpha), t)
    assert torch.equal(shift_timesteps(t, 1.0), t)


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def kolmogorov_distance(draws: Tensor, cdf: list[float]) -> float:
    ranks = torch.arange(len(draws), dtype=torch.float64) / len(draws)
    return (torch.tensor(cdf, dtype=torch.float64) - ranks).abs().max().item()


@pytest.mark.parametrize(
    "config",
    [
        TimestepsConfig(),
        TimestepsConfig(mean=-0.4, std=1.3),
        TimestepsConfig(distribution="uniform"),
    ],
)
def test_distribution_of_timesteps(config: TimestepsConfig) -> None:
    alpha, count = 3.0, 4000
    t = draw_sample_timesteps(config, alpha, 0, [2] * count, range(count), "cpu")
    assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1
    before_shift = shift_timesteps(t.double().sort().values, 1 / alpha).tolist()
    if config.distribution == "uniform":
        cdf = before_shift
    else:
        logits = [math.log(v / (1 - v)) for v in before_shift]
        cdf = [normal_cdf((z - config.mean) / config.std) for z in logits]
    assert kolmogorov_distance(t, cdf) < 1.63 / math.sqrt(count)  # 1 % level


def test_published_share_of_low_noise() -> None:
    """A share of 0.026 of training is below t = 0.5 and 0.603 below 0.9 at α = 6.928 (§1.1)."""
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    t = timesteps_from_normal(normal, TimestepsConfig(), math.sqrt(48))
    assert (t < 0.5).double().mean().item() == pytest.approx(0.026, abs=0.002)
    assert (t < 0.9).double().mean().item() == pytest.approx(0.603, abs=0.005)


def test_draws_belong_to_samples_not_to_batches() -> None:
    epochs, samples = [0, 0, 1, 1, 0], [5, 9, 5, 10**9, 3]
    shape, config = (3, 4, 4), TimestepsConfig()
    noise = draw_noise(shape, 7, epochs, samples, "cpu")
    t = draw_sample_timesteps(config, 2.0, 7, epochs, samples, "cpu")
    order = [3, 0, 4, 2, 1]
    shuffled = [epochs[i] for i in order], [samples[i] for i in order]
    assert torch.equal(draw_noise(shape, 7, *shuffled, "cpu"), noise[order])
    assert torch.equal(draw_sample_timesteps(config, 2.0, 7, *shuffled, "cpu"), t[order])
    for cut in (1, 3):
        for part in (slice(None, cut), slice(cut, None)):
            alone = draw_noise(shape, 7, epochs[part], samples[part], "cpu")
            assert torch.equal(alone, noise[part])
            times = draw_sample_timesteps(config, 2.0, 7, epochs[part], samples[part], "cpu")
            assert torch.equal(times, t[part])
    assert len(t.unique()) == 5 and len(noise[:, 0, 0, 0].unique()) == 5
    assert not torch.equal(draw_noise(shape, 8, epochs, samples, "cpu"), noise)
    assert not torch.equal(draw_sample_timesteps(config, 2.0, 8, epochs, samples, "cpu"), t)


def test_draws_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    draw_noise((1, 2, 2), 0, [0], [0], "cpu")
    draw_sample_timesteps(TimestepsConfig(), 1.0, 0, [0], [0], "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_standard_normal() -> None:
    draws = draw_noise((4, 16, 16), 0, [0] * 8, range(8), "cpu").flatten().double().sort().values
    cdf = [normal_cdf(value) for value in draws.tolist()]
    assert kolmogorov_distance(draws, cdf) < 1.63 / math.sqrt(len(draws))


def test_plain_loss() -> None:
    x, noise, t = pair()
    velocity = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), requires_grad=True)
    loss = velocity_loss(velocity, x, noise, t, DiffusionConfig())
    expected = ((velocity - (noise - x)) ** 2).mean()
    torch.testing.assert_close(loss.mean, expected)
    by_hand = [((velocity[i] - (noise[i] - x[i])) ** 2).mean().item() for i in range(6)]
    torch.testing.assert_close(loss.per_sample, torch.tensor(by_hand))
    assert loss.mean.requires_grad and not loss.per_sample.requires_grad
    low = velocity_loss(velocity.bfloat16(), x, noise, t, DiffusionConfig())
    assert low.mean.dtype == torch.float32


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_the_data_loss(gamma: float) -> None:
    """The velocity loss of a data prediction, weighted, is min(SNR, γ) times its data loss."""
    x, noise, t = pair()
    predicted = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    velocity = to_velocity(predicted, add_noise(x, noise, t), t, "data", 1e-3)
    config = DiffusionConfig(weighting="min_snr", min_snr_gamma=gamma)
    found = velocity_loss(velocity, x, noise, t, config).per_sample
    data_loss = ((predicted - x) ** 2).flatten(1).mean(1)
    snr = ((1 - t) / t) ** 2
    torch.testing.assert_close(found, snr.clamp(max=gamma) * data_loss, atol=1e-4, rtol=1e-3)


def test_masked_loss_leaves_outlier_tokens_out() -> None:
    x, noise, t = pair()
    x[2, :, 1, 3] = 40.0
    x[4, :, 0, 0] = -40.0
    velocity = torch.zeros_like(x)
    config = DiffusionConfig(mask_token_norm=30.0)
    found = velocity_loss(velocity, x, noise, t, config)
    squared = (noise - x) ** 2
    kept = torch.ones(6, 4, 4, dtype=torch.bool)
    kept[2, 1, 3] = kept[4, 0, 0] = False
    images = zip(squared.permute(0, 2, 3, 1), kept, strict=True)
    expected = torch.stack([image[seen].mean() for image, seen in images]).mean()
    torch.testing.assert_close(found.mean, expected)
    assert found.mean < velocity_loss(velocity, x, noise, t, DiffusionConfig()).mean / 2
    nothing = velocity_loss(velocity, x, noise, t, DiffusionConfig(mask_token_norm=1e-6))
    assert nothing.mean == 0


def test_masking_counts_the_threshold_itself_as_an_outlier() -> None:
    x = torch.zeros(1, 2, 1, 2)
    x[0, :, 0, 0] = torch.tensor([3.0, 4.0])
    noise, t, velocity = torch.zeros_like(x), torch.tensor([0.5]), torch.zeros_like(x)
    at = velocity_loss(velocity, x, noise, t, DiffusionConfig(mask_token_norm=5.0))
    above = velocity_loss(velocity, x, noise, t, DiffusionConfig(mask_token_norm=5.01))
    assert at.mean == 0 and above.mean.item() == pytest.approx(25 / 4)
