"""Loss masking: each image by its definition, so that no split into micro-batches and ranks changes it."""

from __future__ import annotations

import pytest
import torch

from dsr_scale.config.diffusion import DiffusionConfig
from dsr_scale.diffusion.loss import velocity_loss

THRESHOLD = 2.4


def batch() -> tuple[torch.Tensor, ...]:
    """Latents of which image 0 keeps all tokens, image 1 none and the rest some; velocity, noise, t."""
    generator = torch.Generator().manual_seed(4)
    velocity, x, noise = torch.randn(3, 8, 6, 4, 4, generator=generator, dtype=torch.float64)
    x[0] *= 0.1
    x[1] *= 100
    return velocity, x, noise, torch.rand(8, generator=generator)


@pytest.mark.parametrize("weighting", ["none", "min_snr"])
def test_a_sample_s_loss_is_its_definition(weighting: str) -> None:
    velocity, x, noise, t = batch()
    config = DiffusionConfig.model_validate(
        {"mask_token_norm": THRESHOLD, "weighting": weighting, "min_snr_gamma": 2.0}
    )
    found = velocity_loss(velocity, x, noise, t, config).per_sample
    for image in range(8):
        kept = [
            (velocity[image, :, row, column] - noise[image, :, row, column] + cell) ** 2
            for row in range(4)
            for column in range(4)
            if (cell := x[image, :, row, column]).square().sum().sqrt() < THRESHOLD
        ]
        assert len(kept) == {0: 16, 1: 0}.get(image, len(kept))
        assert image < 2 or 0 < len(kept) < 16
        expected = torch.stack(kept).mean().item() if kept else 0.0
        if weighting == "min_snr":
            expected *= min((1 - t[image].item()) ** 2, 2.0 * t[image].item() ** 2)
        assert found[image].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("images", [1, 2, 4])
def test_micro_batches_and_ranks_mean_the_same_loss_and_gradient(images: int) -> None:
    velocity, x, noise, t = batch()
    config = DiffusionConfig(mask_token_norm=THRESHOLD)
    velocity.requires_grad_()
    whole = velocity_loss(velocity, x, noise, t, config).mean
    (gradient,) = torch.autograd.grad(whole, velocity)
    parts = []
    for first in range(0, 8, images):
        mine = slice(first, first + images)
        parts.append(velocity_loss(velocity[mine], x[mine], noise[mine], t[mine], config))
    mean = torch.stack([part.mean for part in parts]).mean()
    torch.testing.assert_close(mean, whole, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(mean, velocity)[0], gradient, atol=1e-9, rtol=1e-5
    )
