"""Noise on the decoder's latents: its distribution, and that it belongs to the sample alone."""

from __future__ import annotations

from typing import Any

import torch
from scipy import stats

from dsr_scale.decoders.noise import noise_levels, noised

SHAPE = (8, 6, 6)


def _identity(ids: list[int], epoch: int = 0) -> dict[str, Any]:
    return {"seed": 3, "epochs": [epoch] * len(ids), "sample_ids": ids}


def test_noise_belongs_to_the_sample_and_not_to_its_batch() -> None:
    latents = torch.randn(5, *SHAPE)
    together = noised(latents, tau=0.8, **_identity([4, 9, 2, 7, 5]))
    turned = noised(latents.flip(0), tau=0.8, **_identity([5, 7, 2, 9, 4]))
    assert torch.equal(together, turned.flip(0))
    alone = noised(latents[3:4], tau=0.8, **_identity([7]))
    assert torch.equal(together[3:4], alone)
    shifted = noised(latents + 1, tau=0.8, **_identity([4, 9, 2, 7, 5]))
    torch.testing.assert_close(shifted - latents - 1, together - latents, rtol=0, atol=1e-6)


def test_seed_epoch_and_sample_each_change_it() -> None:
    zero = torch.zeros(1, *SHAPE)
    first = noised(zero, tau=0.8, **_identity([4]))
    for change in (_identity([5]), _identity([4], epoch=1), {**_identity([4]), "seed": 4}):
        other = noised(zero, tau=0.8, **change)
        correlation = torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]
        assert correlation.abs() < 0.2


def test_levels_are_uniform_and_the_noise_is_normal() -> None:
    tau, ids = 0.8, list(range(1500))
    noise = noised(torch.zeros(len(ids), *SHAPE), tau=tau, **_identity(ids)).flatten(1)
    # The root mean square of 288 normals has a spread of 4 %, so it can stand for their deviation.
    measured = noise.square().mean(1).sqrt()
    levels = noise_levels(tau=tau, **_identity(ids))
    torch.testing.assert_close(measured, levels, rtol=0.25, atol=0)
    assert stats.kstest(measured / tau, "uniform").pvalue > 0.01
    normal = (noise / levels[:, None])[::20].flatten()
    assert stats.kstest(normal, "norm").pvalue > 0.01
    assert 0 <= levels.min() < 0.01 * tau < 0.99 * tau < levels.max() < tau


def test_no_tau_leaves_latents_alone_and_their_dtype_stays() -> None:
    latents = torch.randn(2, *SHAPE).bfloat16()
    assert torch.equal(noised(latents, tau=0, **_identity([1, 2])), latents)
    noisy = noised(latents, tau=0.8, **_identity([1, 2]))
    exact = noised(latents.float(), tau=0.8, **_identity([1, 2]))
    assert noisy.dtype == torch.bfloat16
    assert torch.equal(noisy, exact.bfloat16())
